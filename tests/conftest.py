"""A tiny data set, ways to run train.py on it, and builds of run.c."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import tinystories
from text import toystories

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SHARED", ROOT.parent / "shared"))  # real stories, a published model: where they are
SANITIZE = "-g -O1 -DSEPARATE_BUFFERS -fsanitize=address,undefined -fno-sanitize-recover=all"
BUILDS = {"plain": "-O3", "fast": "-O3 -ffast-math -march=native", "sanitized": SANITIZE}
SPECIAL_BUILDS = {"native": "-O3 -march=native", "avx2": "-O3 -mavx2 -mfma",
                  "screened": "-O3 -march=native -DSCREEN_FROM=1", "screened portable": "-O3 -DSCREEN_FROM=1",
                  "races": "-g -O1 -fsanitize=thread",
                  "sanitized threads": f"{SANITIZE} -march=native -fopenmp -Wno-unknown-pragmas"}
EASY = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}  # busy machines are slow
settings.register_profile("suite", max_examples=40, derandomize=True, **EASY)
settings.register_profile("fuzz", max_examples=1000, print_blob=True, **EASY)
settings.load_profile("suite")
os.environ["WANDB_SILENT"] = "true"  # no advertisement in the tests' output
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, by what the tests start as well
torch.set_num_threads(1)  # tiny models: a second thread would only wait for the first


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """data/toy with 300 + 60 stories, tok512 and tok259."""
    folder = tmp_path_factory.mktemp("data")
    numbers = {"train": 300, "val": 60}
    stories = ((split, story) for split, n in numbers.items() for story in toystories.stories(split, n))
    tinystories.write_stories(folder / "toy", stories)
    for vocab_size in (512, 259):
        tinystories.train_vocab(folder / "toy", vocab_size)
        tinystories.pretokenize(folder / "toy", vocab_size, workers=1)
    return folder


@pytest.fixture(scope="session")
def fresh_folder(tmp_path_factory):
    """fresh_folder() -> an empty folder, the same one each time: for the many examples of a test by hypothesis."""
    folder = tmp_path_factory.mktemp("example")

    def empty() -> Path:
        shutil.rmtree(folder)
        folder.mkdir()
        return folder

    return empty


@pytest.fixture
def words(data_dir, tmp_path):
    """words(max_iters=4, ...): the command line of a run of a tiny model that takes about a second."""

    def make(**changes) -> list[str]:
        settings = {"data_dir": data_dir, "dataset": "toy", "vocab_size": 512, "out_dir": tmp_path / "out",
                    "max_seq_len": 32, "batch_size": 4, "dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
                    "learning_rate": 1e-2, "max_iters": 8, "warmup_iters": 2, "eval_interval": 4, "eval_iters": 1,
                    "device": "cpu"} | changes
        return [f"--{key}={value}" for key, value in settings.items()]

    return make


@pytest.fixture
def wandb_dir(tmp_path, monkeypatch) -> Path:
    """Where wandb keeps offline runs of this test; it remembers the folder until it is torn down."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield tmp_path / "wandb"
    wandb.teardown()


def start(*argv, **options) -> subprocess.Popen:
    """A Python program of the project as a process, output captured."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """build(kind, source="run.c") -> path of a binary; each is compiled once a session."""
    folder, made = tmp_path_factory.mktemp("run"), {}
    cc = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not cc:
        pytest.skip("no C compiler: set CC")

    def get(kind, source="run.c"):
        if (kind, source) not in made:
            out = folder / f"{kind.replace(' ', '_')}_{Path(source).stem}"
            flags = (BUILDS | SPECIAL_BUILDS)[kind].split()
            if source == "run.c":
                flags += ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
            command = [*cc.split(), "-std=c11", "-pthread", *flags, "-o", out, ROOT / source, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode and kind != "plain":
                empty = folder / "empty.c"
                empty.write_text("int main(void) { return 0; }\n")
                command = [*cc.split(), *flags, "-o", folder / "empty", empty]
                probe = subprocess.run(command, capture_output=True, check=False)
                if probe.returncode:
                    pytest.skip(f"{cc} cannot build with {' '.join(flags)}")
            assert done.returncode == 0, done.stderr
            made[kind, source] = out
        return made[kind, source]

    return get
