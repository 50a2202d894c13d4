"""Downloads from a server on this machine that has every fault a server can have."""

import gzip
import http.server
import json
import os
import socket
import threading
import time

import pytest

import tinystories
from system import download

STORY = b"Once upon a time.\n" * 4000


class Server(http.server.ThreadingHTTPServer):
    """Serves `story` under every name; its faults are set by the test."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.story, self.etag = STORY, '"one"'
        self.cut_after = None  # bytes of the body after which the connection ends
        self.claim = "length"  # what HEAD says of the length; None: nothing
        self.status, self.ranges = 200, True
        self.sent_range = None  # the Content-Range of a 206, if not the one that was asked for
        self.headers = {}  # of every answer
        self.endless = False  # the body never ends
        self.trickle = None  # "headers" or "body" come a byte at a time
        self.asked = []  # (method, Range header)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        claim = len(self.server.story) if self.server.claim == "length" else self.server.claim
        self.answer(b"", claim)

    def do_GET(self):
        start, wanted = 0, self.headers.get("Range")
        same = self.headers.get("If-Range", self.server.etag) == self.server.etag
        if wanted and self.server.ranges and same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        size = len(self.server.story)
        body = self.server.story[start:]
        sent = self.server.sent_range or f"bytes {start}-{size - 1}/{size}"
        self.answer(body[: self.server.cut_after], len(body), sent if start else None)

    def answer(self, body, length, content_range=None):
        server = self.server
        server.asked.append((self.command, self.headers.get("Range")))
        self.send_response(206 if content_range and server.status == 200 else server.status)
        headers = {"ETag": server.etag, "Content-Range": content_range, **server.headers}
        if length is not None and not (server.endless and self.command == "GET"):
            headers["Content-Length"] = str(length)
        if server.trickle == "headers":
            self.flush_headers()
            self.slowly(b"X: " + b"x" * 1000)
            return
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if server.trickle == "body":
            self.slowly(body)
        elif server.endless and self.command == "GET":
            try:
                while True:
                    self.wfile.write(body)
            except OSError:
                pass
        else:
            self.wfile.write(body)

    def slowly(self, content):
        try:
            for k in range(len(content)):
                self.wfile.write(content[k : k + 1])
                time.sleep(0.02)
        except OSError:
            pass


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.shutdown()


@pytest.fixture
def fetch(server, tmp_path):
    """fetch(): download the server's file to tmp_path/x.txt."""
    return lambda: download.fetch(f"{server.url}/x", tmp_path / "x.txt")


@pytest.fixture
def cut_off(server, tmp_path, fetch):
    """A download that was cut off; gives the number of bytes that are kept."""
    server.cut_after = 30_000
    with pytest.raises(ValueError, match="connection was cut .* bytes are kept"):
        fetch()
    server.cut_after = None
    server.asked.clear()
    assert not (tmp_path / "x.txt").exists()
    return (tmp_path / "x.part").stat().st_size


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_download_both_files(server, tmp_path):
    tinystories.download(tmp_path, "v1", server.url)
    assert (tmp_path / "train.txt").read_bytes() == (tmp_path / "val.txt").read_bytes() == STORY
    assert names(tmp_path) == ["train.txt", "val.txt"]
    server.asked.clear()
    tinystories.download(tmp_path, "v1", server.url)  # complete: nothing is fetched again
    assert [method for method, _ in server.asked] == ["HEAD", "HEAD"]


def test_a_download_that_was_cut_off_is_continued(server, tmp_path, cut_off, fetch):
    assert 0 < cut_off <= 30_000
    fetch()
    assert (tmp_path / "x.txt").read_bytes() == STORY and names(tmp_path) == ["x.txt"]
    assert server.asked[-1] == ("GET", f"bytes={cut_off}-")


def test_a_server_without_ranges_starts_again(server, tmp_path, cut_off, fetch):
    server.ranges = False
    fetch()
    assert (tmp_path / "x.txt").read_bytes() == STORY


@pytest.mark.parametrize("sent", ["bytes 0-71999/72000", "bytes 20000-71999/72000", "bytes 30000-71999/80000", "", "x"])
def test_another_range_than_asked_is_refused(server, tmp_path, cut_off, fetch, sent):
    server.sent_range = sent or "nothing"
    with pytest.raises(ValueError, match=f"asked for bytes {cut_off}-71999/72000, the server sent "):
        fetch()
    assert (tmp_path / "x.part").stat().st_size == cut_off
    server.sent_range = None
    fetch()
    assert (tmp_path / "x.txt").read_bytes() == STORY


def test_a_file_that_has_changed_is_fetched_anew(server, tmp_path, cut_off, fetch, capfd):
    server.story, server.etag = STORY.upper(), '"two"'  # of the same length
    fetch()
    assert (tmp_path / "x.txt").read_bytes() == STORY.upper()
    assert "not the beginning of the file" in capfd.readouterr().err
    assert server.asked[-1] == ("GET", None)


def test_a_file_that_changes_after_the_question_is_not_glued_either(server, tmp_path, cut_off, fetch, monkeypatch):
    version = download.remote_version(f"{server.url}/x")
    server.story, server.etag = STORY.upper(), '"two"'
    monkeypatch.setattr(download, "remote_version", lambda url: version)
    fetch()
    assert (tmp_path / "x.txt").read_bytes() == STORY.upper()
    assert server.asked[-1] == ("GET", f"bytes={cut_off}-")  # If-Range made the server send all of it


@pytest.mark.parametrize("part,remarks", [(b"z" * 10, None), (b"z" * 72_001, "same"), (b"z" * 10, "[" * 10_000)])
def test_a_part_that_is_no_beginning_is_thrown_away(server, tmp_path, fetch, part, remarks):
    (tmp_path / "x.part").write_bytes(part)
    if remarks == "same":
        remarks = json.dumps(download.remote_version(f"{server.url}/x"))
    if remarks:
        (tmp_path / "x.part.json").write_text(remarks)
    fetch()
    assert (tmp_path / "x.txt").read_bytes() == STORY and names(tmp_path) == ["x.txt"]


def test_a_part_that_was_complete_is_moved_into_place(server, tmp_path, fetch):
    (tmp_path / "x.part").write_bytes(STORY)
    (tmp_path / "x.part.json").write_text(json.dumps(download.remote_version(f"{server.url}/x")))
    server.asked.clear()
    fetch()
    assert (tmp_path / "x.txt").read_bytes() == STORY and [m for m, _ in server.asked] == ["HEAD"]


@pytest.mark.parametrize("claim,says", [
    (len(STORY) + 5, f"expected {len(STORY) + 5:,} bytes, found {len(STORY):,}"),  # the head says more than there is
    (len(STORY) - 5, f"more than the {len(STORY) - 5:,} bytes that it announced"),
    (0, "the file is empty"), (None, "does not say how long"), ("-5", "does not say how long"),
    ("9" * 5000, "does not say how long"), ("9" * 15, "has room for"),
])
def test_a_wrong_length_is_refused(server, tmp_path, fetch, claim, says):
    server.claim = claim
    with pytest.raises(ValueError, match=says):
        fetch()
    assert not (tmp_path / "x.txt").exists()


def test_a_body_without_end_is_left_at_the_announced_length(server, tmp_path, fetch):
    server.endless = True
    with pytest.raises(ValueError, match=f"more than the {len(STORY):,} bytes"):
        fetch()
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".json"]


def test_a_gzip_bomb_is_not_opened(server, tmp_path, fetch):
    server.headers, server.story = {"Content-Encoding": "gzip"}, gzip.compress(b"\0" * 10_000_000)
    with pytest.raises(ValueError, match="expected plain bytes, the server sent them as gzip"):
        fetch()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind,beginning", [("text/html; charset=utf-8", b"<p>Please log in"),
                                            ("text/plain", b"\n<!DOCTYPE html><html>Please log in")])
def test_a_web_page_is_no_data_set(server, tmp_path, fetch, kind, beginning):
    server.headers, server.story = {"Content-Type": kind}, beginning + STORY
    with pytest.raises(ValueError, match="expected text, the server sent a web page"):
        fetch()
    assert not (tmp_path / "x.txt").exists()


@pytest.mark.parametrize("slow", ["headers", "body"])
def test_a_byte_now_and_then_is_not_waited_for(server, tmp_path, fetch, monkeypatch, slow):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    server.trickle = slow
    began = time.monotonic()
    with pytest.raises(ValueError, match="the server is too slow: (no answer|only .* bytes) in"):
        fetch()
    assert time.monotonic() - began < 5.0


def test_a_server_that_falls_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SOCKET_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ValueError, match="the server is too slow: nothing in 0.2 seconds"):
            download.fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/x", tmp_path / "x.txt")


@pytest.mark.parametrize("status", [404, 503, 204])
def test_a_refusal_is_reported(server, tmp_path, fetch, status):
    server.status = status
    with pytest.raises(ValueError, match=str(status)) as caught:
        fetch()
    assert server.url in str(caught.value)
    assert names(tmp_path) == []


def test_no_network_names_the_alternatives(tmp_path):
    with pytest.raises(ValueError, match="no connection") as caught:
        tinystories.download(tmp_path, "v1", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert "tinystories.py toy" in str(caught.value) and "tinystories.py local" in str(caught.value)


def test_other_text_is_not_overwritten_by_a_download(server, tmp_path, fetch):
    (tmp_path / "x.txt").write_text("my own stories")
    with pytest.raises(ValueError, match="found 14"):
        fetch()
    assert (tmp_path / "x.txt").read_text() == "my own stories"


def test_pipes_are_no_downloads(server, tmp_path, fetch):
    os.mkfifo(tmp_path / "x.part")
    with pytest.raises(ValueError, match="x.part: expected a file, found a pipe or device"):
        fetch()


def test_versions_are_data_sets_of_their_own():
    assert tinystories.parse_arguments(["download"]).dataset == "tinystories"
    assert tinystories.parse_arguments(["download", "--version=v2"]).dataset == "tinystories_v2"
    assert json.dumps(tinystories.DOWNLOADS).count("GPT4") == 2
