"""What all programs share: started by a Python without the libraries, each ends in one line that says what to run."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_layout import PROGRAMS

BENCHMARKS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("program", [*([f"{name}.py"] for name in PROGRAMS),
                                     *(["-m", f"bench.{name}"] for name in BENCHMARKS)], ids=" ".join)
def test_without_the_venv_every_program_names_the_command_that_makes_it(program):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", *program, "--help"],  # -S: no site-packages, so no libraries
                          cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "make .venv/ready" in done.stderr, done.stderr
    assert done.stderr.startswith(f"{program[-1].removesuffix('.py').removeprefix('bench.')}.py: ")


def test_options_are_not_taken_for_others_that_begin_alike():
    for words in (["compare.py", "doc/runs/confirm.jsonl", "--htm=x"], ["sample.py", "--checkpoint=x", "--temp=1"]):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and f"unrecognized arguments: {words[-1]}" in done.stderr, done.stderr
