"""How programs end by signals, and go on without standard streams. Each is a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

HEAD = f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom system.program import program\n"


def start(tmp_path, code: str, **options) -> subprocess.Popen:
    """A program with this code, which has printed a line."""
    (tmp_path / "program.py").write_text(HEAD + code)
    process = subprocess.Popen([sys.executable, "-u", str(tmp_path / "program.py")], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, **options)
    assert process.stdout.readline()
    return process


TIDIES = """
def main(argv):
    try:
        print("begun")
        time.sleep(60)
    finally:
        print("tidied")
        if {wait}:
            time.sleep(60)
sys.exit(program(main, "interrupted; the same command goes on"))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_program_with_a_line_after_it_has_tidied(tmp_path, number):
    process = start(tmp_path, TIDIES.format(wait=False))
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("tidied\n", "program.py: interrupted; the same command goes on\n")
    assert process.returncode == 128 + number


def test_a_second_signal_ends_it_at_once(tmp_path):
    process = start(tmp_path, TIDIES.format(wait=True))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "tidied\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == -signal.SIGINT


def test_what_a_program_was_started_to_ignore_stays_ignored(tmp_path):
    """As under nohup."""
    process = start(tmp_path, TIDIES.format(wait=False),
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


STOPS = """
from system.signals import Stop
def main(argv):
    stop = Stop("stopping\\n")
    print("begun")
    while not stop.signal:
        time.sleep(0.01)
    print("step done")
    if {wait}:
        time.sleep(60)
    return 128 + stop.signal
sys.exit(program(main))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_loop_is_asked_once_and_ended_by_the_second_signal(tmp_path, number):
    process = start(tmp_path, STOPS.format(wait=False))
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("step done\n", "stopping\n") and process.returncode == 128 + number
    process = start(tmp_path, STOPS.format(wait=True))
    process.send_signal(number)
    assert process.stdout.readline() == "step done\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "stopping\n") and process.returncode == -signal.SIGINT


def test_ctrl_c_while_libraries_load_ends_a_program_in_silence():
    process = subprocess.Popen([sys.executable, "-X", "importtime", "train.py"], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # importtime: a line an import
    for line in process.stderr:
        if "torch" in line or "numpy" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == -signal.SIGINT and "Traceback" not in rest and "KeyboardInterrupt" not in rest


def shell(command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False, **options)


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    done = shell(f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; {sys.executable} {ROOT}/train.py")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[-1] == "train.py: the working directory was removed; cd to another one"
    assert "Traceback" not in done.stderr


def test_no_folder_for_temporary_files_is_a_line():
    """What PyTorch raises as it loads, where there is none, or where no file may grow (ulimit -f 0)."""
    code = (f"import sys; sys.argv = [{str(ROOT / 'train.py')!r}]; sys.path.insert(0, {str(ROOT)!r})\n"
            "import system.program\nraise FileNotFoundError(2, 'No usable temporary directory found')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "train.py: No usable temporary directory found\n")


PRINTS = """
from system.streams import open_standard_streams, tell
open_standard_streams()
log = open({log!r}, "w")
def main(argv):
    for k in range(3):
        tell(f"line {{k}}")
        log.write(f"line {{k}}\\n")
sys.exit(program(main))
"""


@pytest.mark.parametrize("redirection,says", [
    (">/dev/full", "standard output: No space left on device; going on without it\n"),
    (">&-", "standard output: Bad file descriptor; going on without it\n"), ("2>&-", ""), (">&- 2>&-", ""),
    (">/dev/full 2>/dev/full", ""), ("<&- >&- 2>&-", "")])
def test_a_program_goes_on_without_its_streams(tmp_path, redirection, says):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("the system has no /dev/full")
    (tmp_path / "program.py").write_text(HEAD + PRINTS.format(log=str(tmp_path / "log")))
    done = shell(f"{sys.executable} {tmp_path}/program.py {redirection}")
    assert done.returncode == 0 and done.stderr == says
    assert (tmp_path / "log").read_text() == "line 0\nline 1\nline 2\n"  # and no stream's output in its place


def test_a_program_goes_on_when_its_reader_is_gone(tmp_path):
    (tmp_path / "program.py").write_text(HEAD + PRINTS.format(log=str(tmp_path / "log")))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], stdout=writing, stderr=subprocess.PIPE, text=True,
                          check=False)
    os.close(writing)
    assert done.returncode == 0 and done.stderr == "standard output: Broken pipe; going on without it\n"
    assert (tmp_path / "log").read_text() == "line 0\nline 1\nline 2\n"


@pytest.mark.parametrize("code,status,says", [
    ("raise ValueError('run\\x1b[2J' + 'x' * 100_000)", 1, "program.py: run\\x1b[2Jxxx"),
    ("raise MemoryError", 1, "program.py: out of memory"),
    ("raise OSError(28, 'No space left on device', 'a/b')", 1, "program.py: a/b: No space left on device"),
    ("return 3", 3, "")])
def test_what_a_user_can_cause_is_one_short_line(tmp_path, code, status, says):
    (tmp_path / "program.py").write_text(f"{HEAD}def main(argv):\n    {code}\nsys.exit(program(main))\n")
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False)
    assert done.returncode == status and done.stderr.startswith(says)
    assert len(done.stderr) < 1100 and done.stderr.count("\n") <= 1 and "\x1b" not in done.stderr
