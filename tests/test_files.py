"""A file is written whole or not at all."""

import multiprocessing
import os
import signal
import time

import pytest

from system.files import (
    atomic_folder,
    atomic_write,
    fingerprint,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    refuse_irregular,
)


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
    with pytest.raises(ValueError, match="cannot write .*pipe: it exists and is no regular file"), atomic_write(pipe):
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


@pytest.mark.parametrize("read", [read_bytes, read_text, read_json])
def test_readers_take_regular_files_only_and_name_what_they_refuse(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")  # a reader that opened it would wait for ever
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="expected a file, found a"):
            read(path)
    for path in (tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(ValueError, match=r"(none|a\\x00b): cannot read"):
            read(path)
    (tmp_path / "long").write_bytes(b"1" * 11)
    with pytest.raises(ValueError, match="long: expected at most 10 bytes, found more"):
        read(tmp_path / "long", 10)
    assert read(tmp_path / "long", 11) in (b"1" * 11, "1" * 11, 11111111111)


def test_bytes_that_are_no_utf8_and_json_without_an_end_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[1,\n\xff]")
    with pytest.raises(ValueError, match="a.json, line 2: expected UTF-8, found byte 0xff"):
        read_json(path)
    assert read_text(path, errors="replace") == "[1,\n\N{REPLACEMENT CHARACTER}]"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="a.json: expected JSON: nested too deeply"):
        read_json(path)
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 5000, "", "nan"):
        with pytest.raises(ValueError):
            parse_json(text)


def test_a_fingerprint_tells_files_apart_and_costs_no_time_with_big_ones(tmp_path):
    path = tmp_path / "a.bin"
    prints = set()
    for content in (b"", b"a", b"b", b"a" * 99_999, b"a" * 99_998 + b"b", b"a" * 50_000 + b"b" + b"a" * 49_998):
        path.write_bytes(content)
        prints.add(fingerprint(path))
    assert len(prints) == 6
    with open(path, "wb") as f:
        f.truncate(2 << 30)  # 2 GiB that take no room
    began = time.process_time()
    sparse = fingerprint(path)
    assert time.process_time() - began < 1.0
    for at in (0, (2 << 30) - 1):
        with open(path, "r+b") as f:
            f.seek(at)
            f.write(b"x")
        assert fingerprint(path) != sparse
        with open(path, "r+b") as f:
            f.seek(at)
            f.write(b"\0")
