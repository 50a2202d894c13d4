"""The log of a run: cut back on resume, noticed when it is gone, and independent of wandb."""

import json
import resource
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from study.log import SHOWN, Log
from study.runs import Reader, leveldb_records

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


# ---------------------------------------------------------------------------------------------
# wandb and TensorBoard, as they keep what they get

KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from study.log import Log
settings = {"project": "p", "name": "n", "mode": "offline", "id": "abc"}
log = Log(Path("out"), int(sys.argv[2]), {"config": {"max_iters": 12}, "facts": {}}, settings, tensorboard=True)
for it in range(int(sys.argv[2]), int(sys.argv[3])):
    log.write({"iter": it, "tokens": it, "seconds": 0.1 * it, "val/ntp": 1.0 + (it - 5) ** 2, "sample": f"<{it}"})
if sys.argv[4] == "kill":
    time.sleep(float(sys.argv[5]))
    os.kill(os.getpid(), signal.SIGKILL)
log.close()
"""


def test_after_kill_9_nothing_is_sent_twice_and_nothing_is_missing(tmp_path, wandb_dir, monkeypatch):
    """Each iteration once, under its number.

    Killed at 8 with a checkpoint of 4; again at 10, before wandb has written that, with a checkpoint of 9; finished.
    """
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # seconds
    for start, stop, end, wait in ((0, 8, "kill", 6), (4, 10, "kill", 0), (9, 12, "close", 0)):
        done = subprocess.run([sys.executable, "-c", KILLED, str(ROOT), str(start), str(stop), end, str(wait)],
                              cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == (0 if end == "close" else -signal.SIGKILL), done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines if "config" not in line] == list(range(12))

    from wandb.proto.wandb_internal_pb2 import Record

    steps, summary = [], {}
    for path in sorted(wandb_dir.glob("offline-run-*/run-abc.wandb")):
        for record in [Record.FromString(data) for data in leveldb_records(path.read_bytes()) if data]:
            if record.WhichOneof("record_type") == "history":
                values = {item.key or ".".join(item.nested_key): json.loads(item.value_json)
                          for item in record.history.item}
                assert values["_step"] == values["iter"] == record.history.step.num
                assert values["sample._type"] == "html-file"
                steps.append(values["iter"])
            elif record.WhichOneof("record_type") == "metric" and record.metric.name == "val/ntp":
                summary = {"min": record.metric.summary.min, "last": record.metric.summary.last}
    assert steps == list(range(12)) and summary == {"min": True, "last": True}

    reader = Reader()
    reader.read(str(wandb_dir))
    (run,) = reader.runs
    assert run.points("val/ntp")[0].tolist() == list(range(12)) and run.points("val/ntp")[1].min() == 1.0
    # the process killed at once may have left a file of its own, with nothing in it yet
    assert all(problem.what.startswith("no val/ntp in it") for problem in reader.problems)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/ntp")] == [(it, 1.0 + (it - 5) ** 2) for it in range(12)]
    assert "sample/text_summary" in events.Tags()["tensors"]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard_log: needs .*pip install -r requirements-tensorboard.txt"):
        Log(tmp_path / "out", 0, HEADER, None, tensorboard=True)
    assert not (tmp_path / "out").exists()
