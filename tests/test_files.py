"""A file is written whole or not at all."""

import multiprocessing
import os
import signal
import time

import pytest

from files import atomic_write


def test_new_content_replaces_old(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("one", "two"):
        with atomic_write(path, "w") as f:
            f.write(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w") as f:
        f.write("half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def write_slowly(path):
    with atomic_write(path) as f:
        f.write(b"half")
        f.flush()
        path.with_name("begun").touch()
        time.sleep(60)


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    writer = multiprocessing.get_context("fork").Process(target=write_slowly, args=(path,))
    writer.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("where", ["file/a.txt", "folder"])
def test_places_that_cannot_be_written_are_named(tmp_path, where):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"cannot write .*{where}"), atomic_write(tmp_path / where) as f:
        f.write(b"x")
