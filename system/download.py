"""Fetch a file over HTTP, and believe no server.

    fetch("https://.../stories.txt", Path("data/x/train.txt"))

A download that was cut off is continued by the next call. Until it is complete it lies beside its
place as `stories.txt.part`, with what identified the file on the server in `stories.txt.part.json`;
if that has changed, the download starts again, so the halves of two files are never joined. Nothing
is written beyond the announced length, and a server that is too slow is given up.
"""

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

import requests
import urllib3
from tqdm import tqdm

from system.files import atomic_write, refuse_irregular
from system.shown import shown

SOCKET_SECONDS = 30  # without a single byte
STALL_SECONDS = 60  # in which STALL_BYTES must come; a server may send one a second for years
STALL_BYTES = 60 << 10
BLOCK = 1 << 18
PLAIN = {"Accept-Encoding": "identity"}  # compressed bytes would have another length, and a bomb no end
NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError)


class TooSlow(requests.RequestException):
    """The server sends something now and then, but not enough."""


def fetch(url: str, path: Path, hint: str = "") -> None:
    """Download `url` to `path`, continuing what an earlier call has left.

    Errors: ValueError naming the address if the server cannot be reached, refuses, sends something else than the
    file, stalls or ends early. It ends with `hint` where a network is what is missing.
    """
    part = path.with_name(url.rpartition("/")[2] + ".part")  # its remote name: no other file is continued by mistake
    remarks = part.with_name(part.name + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    for local in (path, part, remarks):
        refuse_irregular(local)
    try:
        version = remote_version(url)
        size = version["size"]
        if path.exists():
            if path.stat().st_size == size:
                print(f"{path}: already complete", file=sys.stderr)
                return
            raise ValueError(f"{path}: expected the {size:,} bytes of {url}, found {path.stat().st_size:,}; "
                             f"choose another --dataset, or delete {path.parent}")
        have = part.stat().st_size if part.exists() else 0
        if have and (have > size or version != read_version(remarks)):
            print(f"{part}: not the beginning of the file that the server has now; starting again", file=sys.stderr)
            have = 0
        if have == 0:
            part.unlink(missing_ok=True)
            with atomic_write(remarks, "w") as f:
                json.dump(version, f)
        if size - have > (free := shutil.disk_usage(path.parent).free):
            raise ValueError(f"{url}: is {size:,} bytes; {path.parent} has room for {free:,}")
        if have < size:
            append(url, part, have, version)
    except NETWORK_ERRORS as error:
        kept = f" ({part.stat().st_size:,} bytes are kept; the same command continues)" if part.exists() else ""
        raise ValueError(f"{url}: {explain(error)}{kept}{hint}") from error
    except OSError as error:
        raise ValueError(f"{part}: cannot write: {error.strerror}") from error
    if part.stat().st_size != size:
        raise ValueError(f"{url}: expected {size:,} bytes, found {part.stat().st_size:,}; the same command continues")
    os.replace(part, path)
    remarks.unlink(missing_ok=True)


def remote_version(url: str) -> dict:
    """{size, etag, last_modified} of the file behind `url`, before anything is fetched."""
    answer = in_time(lambda: requests.head(url, allow_redirects=True, timeout=SOCKET_SECONDS, headers=PLAIN))
    check_answer(url, answer)
    length = answer.headers.get("Content-Length", "")
    if not re.fullmatch(r"\d{1,15}", length):
        raise ValueError(f"{url}: the server does not say how long the file is")
    if int(length) == 0:
        raise ValueError(f"{url}: the server says that the file is empty")
    return {"size": int(length), "etag": answer.headers.get("ETag"),
            "last_modified": answer.headers.get("Last-Modified")}


def read_version(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def append(url: str, part: Path, have: int, version: dict) -> None:
    """Fetch bytes have..size of `url` onto the end of `part`; from the start if the server ignores ranges."""
    size, headers = version["size"], dict(PLAIN)
    if have:
        headers["Range"] = f"bytes={have}-"
        # The server compares: another version of the file comes as a whole. A weak ETag does not vouch for bytes.
        tag = version["etag"]
        condition = tag if tag and not tag.startswith("W/") else version["last_modified"]
        if condition:
            headers["If-Range"] = condition
    with in_time(lambda: requests.get(url, stream=True, timeout=SOCKET_SECONDS, headers=headers)) as answer:
        check_answer(url, answer)
        if answer.status_code == 206:
            sent = answer.headers.get("Content-Range", "nothing")
            if not have or not re.fullmatch(rf"bytes {have}-\d+/({size}|\*)", sent):
                raise ValueError(f"{url}: asked for bytes {have}-{size - 1}/{size}, the server sent {shown(sent, 80)}")
        else:
            have = 0
        with (open(part, "ab" if have else "wb") as f,
              tqdm(desc=part.stem, total=size, initial=have, unit="B", unit_scale=True, file=sys.stderr) as bar):
            since, recent = time.monotonic(), 0  # when bytes were last counted, and those that came afterwards
            while block := answer.raw.read1(BLOCK):  # what has arrived, so that little is lost if the connection is cut
                if have == 0 and looks_like_html(block):
                    raise ValueError(f"{url}: expected text, the server sent a web page")
                have, recent = have + len(block), recent + len(block)
                if have > size:
                    part.unlink()
                    raise ValueError(f"{url}: the server sends more than the {size:,} bytes that it announced")
                f.write(block)
                bar.update(len(block))
                if (now := time.monotonic()) - since > STALL_SECONDS:
                    if recent < STALL_BYTES:
                        raise TooSlow(f"only {recent:,} bytes in {now - since:.0f} seconds")
                    since, recent = now, 0


def check_answer(url: str, answer: requests.Response) -> None:
    """Errors: RequestException for a refusal, ValueError for an answer that cannot be the file."""
    answer.raise_for_status()
    if answer.status_code not in (200, 206):
        raise ValueError(f"{url}: the server answered {answer.status_code}, expected 200 or 206")
    kind, coding = (answer.headers.get(name, "").strip().lower() for name in ("Content-Type", "Content-Encoding"))
    if kind.startswith(("text/html", "application/xhtml")):
        raise ValueError(f"{url}: expected text, the server sent a web page")
    if coding not in ("", "identity"):
        raise ValueError(f"{url}: expected plain bytes, the server sent them as {shown(coding, 40)}")


def looks_like_html(beginning: bytes) -> bool:
    return beginning.lstrip().lower().startswith((b"<!doctype html", b"<html"))


def in_time(ask: Callable[[], requests.Response]) -> requests.Response:
    """What `ask` returns or raises, unless that takes STALL_SECONDS; the socket's limit alone lets headers trickle."""
    answers: SimpleQueue = SimpleQueue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=STALL_SECONDS)
    except Empty:
        raise TooSlow(f"no answer in {STALL_SECONDS} seconds") from None
    if error:
        raise error
    return answer


def explain(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code} {shown(response.reason, 80)}"
    if isinstance(error, TooSlow):
        return f"the server is too slow: {error}"
    if isinstance(error, urllib3.exceptions.ReadTimeoutError | requests.ReadTimeout):
        return f"the server is too slow: nothing in {SOCKET_SECONDS} seconds"
    if isinstance(error, urllib3.exceptions.ProtocolError | requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return "no connection"
    return shown(error)
