"""The log of a run: cut back on resume, noticed when it is gone, and independent of wandb."""

import json
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

from study.log import SHOWN, Log

HEADER = {"config": {"seed": 1}, "facts": {}}
BROKEN = [b"\xff\xfe", b'{"iter": 1, "x": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000, b'{"iter": 1', b"7", b"{}",
          b'{"iter": "1"}', b'{"iter": ' + b"1" * 5000 + b"}", b"\0" * 100, b"\x1b[2J"]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_is_left_out_by_number_and_the_rest_stays(tmp_path, capsys, broken):
    path = tmp_path / "log.jsonl"
    before, after = b'{"iter": 0, "name": "caf\xc3\xa9\xe2\x80\xa8"}\n', b'{"iter": 1}\n'
    path.write_bytes(before + broken + b"\n" + after + b'{"iter": 2}\n')
    Log(tmp_path, 2, HEADER, None).close()
    assert path.read_bytes() == before + after + json.dumps({"iter": 2} | HEADER).encode() + b"\n"
    (complaint,) = capsys.readouterr().err.splitlines()
    assert "log.jsonl, line 2: broken, left out: " in complaint and complaint.isprintable() and len(complaint) < 500


def test_many_broken_lines_are_few_complaints(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_bytes(b"\xff\n" * 1000)
    Log(tmp_path, 1, HEADER, None).close()
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == SHOWN + 1 and "left out 997 more broken lines" in complaints[-1]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_log_that_is_gone_ends_the_run(tmp_path, replaced):
    log = Log(tmp_path / "out", 0, HEADER, None)
    log.write({"iter": 0})
    log.path.unlink()
    if replaced:
        log.path.write_text("another run's\n")
    with pytest.raises(ValueError, match="log.jsonl: was removed or replaced during the run"):
        log.write({"iter": 1})
    assert not replaced or log.path.read_text() == "another run's\n"
    log.close()


def test_a_line_that_is_written_in_part_ends_the_run(tmp_path):
    log = Log(tmp_path, 0, HEADER, None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot write .*log.jsonl: No space left on device"):
            log.write({"iter": 0, "train/ntp": 1.0})
        with pytest.raises(ValueError, match="cannot write .*log.jsonl: File too large"):
            log.write({"iter": 0, "train/ntp": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close()


def test_wandb_killed_during_a_run_is_a_note_not_a_traceback(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from study.log import Log
log = Log(Path("out"), 0, {{}}, {{"project": "p", "name": "n", "mode": "offline", "id": None}})
for number in filter(str.isdigit, os.listdir("/proc")):
    try:
        parent = int(Path("/proc", number, "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        continue
    if parent == os.getpid():
        os.kill(int(number), signal.SIGKILL)
for it in range(200):
    log.write({{"iter": it, "val/ntp": 1.0}})
log.close()
""")
    if not sys.platform.startswith("linux"):
        pytest.skip("finds wandb's process in /proc")
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 201
    (note,) = done.stderr.splitlines()
    assert note.startswith("wandb failed, the run goes on without it")
