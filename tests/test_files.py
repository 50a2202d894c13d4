"""A file is written whole or not at all."""

import multiprocessing
import os
import signal
import time

import pytest

from system.files import atomic_folder, atomic_write, refuse_irregular


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


def test_devices_and_pipes_are_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    pipe = tmp_path / "pipe"
    with pytest.raises(ValueError, match="cannot write .*pipe: it is there, and no file"), atomic_write(pipe):
        pass
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=f"{path.name}: expected a file, found a"):
            refuse_irregular(path)
    refuse_irregular(tmp_path / "none")


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "f"
    for names in ("ab", "bc"):
        with atomic_folder(path, "abc") as new:
            for name in names:
                (new / name).write_text(name)
            assert not path.exists() or names == "bc"
        assert sorted(p.name for p in path.iterdir()) == list(names)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path, "abc") as new:
        (new / "a").write_text("half")
        raise KeyboardInterrupt
    assert sorted(p.name for p in path.iterdir()) == ["b", "c"] and list(path.parent.iterdir()) == [path]
    (path / "mine").write_text("x")
    with pytest.raises(ValueError, match="cannot write .*f: it holds other files: mine"), atomic_folder(path, "abc"):
        pass
    with pytest.raises(ValueError, match="cannot write"), atomic_folder(path / "mine", "abc"):
        pass
    assert (path / "mine").read_text() == "x"
