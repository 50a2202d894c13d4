"""One program at a time in a folder, and a lock that ends with its process."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from system.lock import hold, holder, sign, take


def hold_until_killed(path, taken):
    with hold(path):
        taken.set()
        time.sleep(60)


@pytest.fixture
def other(tmp_path):
    """Another process that holds tmp_path/out/lock."""
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    process = context.Process(target=hold_until_killed, args=(tmp_path / "out" / "lock", taken))
    process.start()
    assert taken.wait(10)
    yield process
    process.kill()
    process.join()


def test_the_second_is_refused_and_told_who_holds_it(tmp_path, other):
    with pytest.raises(ValueError, match=rf"out: another program .*\(pid {other.pid} on {socket.gethostname()}\)"):
        with hold(tmp_path / "out" / "lock"):
            pass
    assert take(tmp_path / "out" / "lock") is None
    assert holder(tmp_path / "out" / "lock")[1] == other.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_process(tmp_path, other, number):
    os.kill(other.pid, number)
    other.join()
    with hold(tmp_path / "out" / "lock"):
        assert holder(tmp_path / "out" / "lock")[1] == os.getpid()
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_stays_and_what_was_put_in_its_place_does(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(KeyError), hold(path):
        raise KeyError
    assert not path.exists()
    with hold(path):
        path.unlink()
        with hold(path):  # the folder was removed while the first was at work, and another began there
            pass
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_a_lock_removed_between_opening_and_locking_is_taken_anew(tmp_path, monkeypatch):
    path, first = tmp_path / "lock", []
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def once_removed(f, how):
        flock(f, how)
        if not first:
            first.append(True)
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", once_removed)
    with hold(path) as f:
        assert first and os.path.samestat(os.stat(path), os.fstat(f.fileno()))


def test_a_child_that_inherits_it_keeps_it(tmp_path):
    path = tmp_path / "lock"
    with take(path) as f:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[f.fileno()])
        sign(f, child.pid)
    assert take(path) is None and holder(path)[1] == child.pid
    child.communicate(b"\n")
    with take(path):
        pass


def test_the_holder_of_another_machine_has_no_pid_here(tmp_path):
    (tmp_path / "lock").write_text("pid 1 on elsewhere\x1b[2J\n")
    assert holder(tmp_path / "lock") == ("pid 1 on elsewhere\\x1b[2J", None)


def test_places_without_room_for_a_lock_are_named(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, says in (("file/lock", "file: is a file; expected a folder"), ("file/x/lock", "cannot write"),
                       ("pipe", "expected a file")):
        with pytest.raises(ValueError, match=says), hold(tmp_path / path):
            pass
