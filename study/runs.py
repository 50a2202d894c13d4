"""Runs of train.py to be compared, from wherever their logs are.

    out/seeds4/base-1337          a run's folder; out/seeds4: all those in it
    doc/runs/seeds4.jsonl         a log; or many in one file, whose lines say "run" (compare.py --keep)
    wandb/offline-run-...         what wandb kept with --wandb_mode=offline; wandb: all of them
    wandb:entity/project[/run]    at wandb, through its public API

What is broken in a log is reported by run and line, and left out; the rest is read.

What this leaves out on purpose: everything that one run does not know of the others (groups.py).
"""

import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from settings import Computing, Output, names_of, with_names_of_today
from system.files import parse_json, read_bytes
from system.shown import shown

MOST_COMPLAINTS = 3  # about the lines of one run
MOST_NAMES = 12  # in one remark
LARGEST = 1e30  # what is beyond it is no loss, no time and no memory
HARMLESS = names_of(Output, Computing) | {"seed", "data_dir"}  # settings; how a run was computed is among its facts
OWN_FACTS = {"cores", "parameters", "host", "started", "command", "pid"}  # of each run its own
KINDS = {"seed": int, "max_iters": int, "init_from": str, "cores": list, "threads": int}  # of settings and facts in use


class Remark(NamedTuple):
    """What a reader should know of a run, a file or a set-up."""

    who: str
    what: str
    grave: bool = False  # figures of it are left out, or would mislead

    def __str__(self) -> str:
        return f"{self.who}: {self.what}"


def joined(remarks: Iterable[Remark]) -> list[Remark]:
    """Equal remarks on several as one, in the order of the first of them."""
    who: dict[tuple[str, bool], list[str]] = {}
    for remark in remarks:
        who.setdefault((remark.what, remark.grave), []).append(remark.who)
    found = []
    for (what, grave), names in who.items():
        names = list(dict.fromkeys(names))
        if len(names) > MOST_NAMES:
            names[MOST_NAMES:] = [f"and {len(names) - MOST_NAMES} more"]
        found.append(Remark(", ".join(names), what, grave))
    return found


@dataclass
class Run:
    """One log: the settings and facts of its header (empty in logs without one) and its figures."""

    name: str
    where: str  # for messages
    config: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    lines: list[dict] = field(default_factory=list)  # iter rising; every value a finite number
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # of lines, once asked for

    def points(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Iterations at which there is a `key`, and its values."""
        if key not in self.columns:
            found = [(line["iter"], line[key]) for line in self.lines if key in line]
            self.columns[key] = tuple(np.array(found, dtype=float).reshape(-1, 2).T)
        return self.columns[key]

    def at(self, key: str, iterations: float | np.ndarray) -> float | np.ndarray:
        """`key` at iterations, in a straight line between those that have it; NaN outside of them."""
        x, y = self.points(key)
        return np.interp(iterations, x, y, left=math.nan, right=math.nan) if len(x) else iterations * math.nan

    def last(self, key: str) -> float:
        """The last `key`; NaN if there is none."""
        values = self.points(key)[1]
        return float(values[-1]) if len(values) else math.nan

    def stretch(self, factor: float) -> None:
        """Let all seconds be `factor` times as long."""
        for line in self.lines:
            if "seconds" in line:
                line["seconds"] *= factor
        self.columns.pop("seconds", None)

    @property
    def length(self) -> int:
        """Iterations up to the last evaluation."""
        return int(self.points("val/ntp")[0][-1])

    @property
    def planned(self) -> int:
        """Iterations that its settings ask for; without settings as many as it has."""
        return self.config.get("max_iters", self.length)

    @property
    def seconds_per_step(self) -> float:
        return float(self.at("seconds", self.length)) / self.length if self.length else math.nan

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")


class Reader:
    """Collects runs, and in `problems` what was wrong with them."""

    def __init__(self):
        self.runs: list[Run] = []
        self.problems: list[Remark] = []

    def read(self, word: str) -> None:
        """Add the runs that `word` stands for (see above). Errors: ValueError if there is nothing of the kind."""
        try:
            self._read(word)
        except OSError as error:
            raise ValueError(f"{shown(word)}: cannot read: {error.strerror}") from error

    def _read(self, word: str) -> None:
        if word.startswith("wandb:"):
            return self._read_online(word)
        path = Path(word)
        if path.is_dir():
            logs = [path / "log.jsonl"] if (path / "log.jsonl").exists() else sorted(path.glob("*/log.jsonl"))
            offline = sorted([*path.glob("run-*.wandb"), *path.glob("offline-run-*/run-*.wandb")])
            if not logs and not offline:
                raise ValueError(f"{shown(path)}: no run there; expected log.jsonl or a wandb offline run, in it or "
                                 "one below")
        elif path.is_file():
            logs, offline = ([], [path]) if path.suffix == ".wandb" else ([path], [])
        else:
            raise ValueError(f"{shown(path)}: no such file or folder; a run is a folder with log.jsonl, a .jsonl file, "
                             "a wandb offline folder, or wandb:entity/project[/run]")
        resumed: dict[str, tuple[Run, list]] = {}  # wandb writes a file for each time that a run goes on
        for file in [*logs, *offline]:
            try:
                if file in offline:
                    self._read_offline(file, resumed)
                else:
                    self._read_log(file)
            except ValueError as error:  # one of many that cannot be read
                if len(logs) + len(offline) == 1:
                    raise
                who, _, what = str(error).partition(": ")
                self.problems.append(Remark(who, what))
        for run, rows in resumed.values():
            self._add(run, rows)

    # -------------------------------------------------------------------------------------------
    # where lines come from

    def _read_log(self, path: Path) -> None:
        text = read_bytes(path).decode("utf-8", errors="replace")
        runs: dict[str, list] = {}  # by name
        whole = text.count("\n")  # lines; what is behind the last of them was not finished
        name = path.resolve().parent.name if path.name == "log.jsonl" else path.stem
        for number, row in enumerate(text.splitlines(), 1):
            try:
                line = parse_json(row)
            except ValueError:
                line = "half-written" if number == whole + 1 else "not JSON"
            own = line.pop("run", name) if isinstance(line, dict) else name
            runs.setdefault(str(own), []).append((f"line {number}", line))
        if not runs:
            self.problems.append(Remark(shown(path), "empty"))
        for own, rows in runs.items():
            where = shown(path) if own == name else f"{shown(path)}, {shown(own, 60)}"
            self._add(Run(own.rpartition("/")[2], where), rows)

    def _read_offline(self, path: Path, resumed: dict[str, tuple[Run, list]]) -> None:
        """Put what a file has of a run into `resumed`, by the run's id."""
        from wandb.proto.wandb_internal_pb2 import Record

        config, rows, id, name = {}, [], path.stem, path.stem
        data = read_bytes(path)
        if not data.startswith(b":W&B"):
            self.problems.append(Remark(shown(path), f"not a file of wandb's: it begins with {data[:4]!r}"))
            return
        for number, content in enumerate(leveldb_records(data), 1):
            if content is None:
                self.problems.append(Remark(f"{shown(path)}, record {number}",
                                            "half-written or broken; the rest is left out"))
                break
            try:
                record = Record.FromString(content)
                kind = record.WhichOneof("record_type")
                if kind in ("run", "config"):
                    name, id = record.run.display_name or name, record.run.run_id or id
                    for item in (record.run.config if kind == "run" else record.config).update:
                        config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
                elif kind == "history":
                    flat = [item for item in record.history.item if len(item.nested_key) < 2]  # not a story's parts
                    rows.append((f"record {number}", {item.key or item.nested_key[0]: json.loads(item.value_json)
                                                     for item in flat}))
            except Exception as error:  # protobuf's DecodeError, json's: whatever a broken file brings
                self.problems.append(Remark(f"{shown(path)}, record {number}", shown(repr(error))))
        _, before = resumed.setdefault(id, (Run(name, shown(path)), []))
        before += [("its config", split_config(config)), *rows]

    def _read_online(self, word: str) -> None:
        """Errors: ValueError if wandb cannot be asked, or knows no such run."""
        parts = word.removeprefix("wandb:").strip("/").split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise ValueError(f"{shown(word)}: expected wandb:entity/project or wandb:entity/project/run")
        import wandb

        try:
            api = wandb.Api()
            runs = [api.run("/".join(parts))] if len(parts) == 3 else list(api.runs("/".join(parts)))
        except Exception as error:  # no login, no network, no such project: wandb has many kinds of them
            raise ValueError(f"{shown(word)}: wandb says: {shown(' '.join(str(error).split()), 300)}") from error
        if not runs:
            raise ValueError(f"{shown(word)}: this project has no runs")
        for run in runs:
            where = f"wandb:{'/'.join(run.path)}"
            try:
                rows = [(f"step {row.get('_step')}", row) for row in run.scan_history()]
                self._add(Run(run.name, where), [("its config", split_config(dict(run.config))), *rows])
            except Exception as error:
                self.problems.append(Remark(where, f"wandb says: {shown(' '.join(str(error).split()), 300)}"))

    # -------------------------------------------------------------------------------------------
    # what lines say

    def _add(self, run: Run, rows: Iterable[tuple[str, object]]) -> None:
        """Take into `run` what is sound of `rows`, (where, a line); and the run, if anything can be compared."""
        run.name = shown(" ".join(run.name.encode("utf-8", "replace").decode().split()), 60) or "unnamed"
        complaints: list[str] = []
        by_iter: dict[int, dict] = {}
        untimed: list[str] = []
        latest = -1
        for where, line in rows:
            if not isinstance(line, dict):
                complaints.append(f"{where}: {line if isinstance(line, str) else 'expected an object'}; left out")
            elif "config" in line:
                complaints += self._take_header(run, where, line)
            elif type(line.get("iter")) is not int or not 0 <= line["iter"] < LARGEST:
                complaints.append(f"{where}: expected a whole number as iter, found {shown(line.get('iter'), 20)}; "
                                  "left out")
            else:
                if line["iter"] <= latest:
                    complaints.append(f"{where}: iter {line['iter']} comes after {latest}")
                latest = max(latest, line["iter"])
                numbers = {}
                for key, value in line.items():
                    if type(value) in (int, float) and -LARGEST < value < LARGEST:  # NaN is not
                        numbers[key] = value
                    elif value is not None and ("/" in key or key in ("tokens", "seconds")):  # a story is no number
                        complaints.append(f"{where}: {shown(key, 40)} is {shown(value, 20)}; left out")
                if "val/ntp" in numbers and not {"tokens", "seconds"} <= numbers.keys():
                    untimed.append(where)
                by_iter[line["iter"]] = by_iter.get(line["iter"], {}) | numbers
        if untimed:
            complaints.append(f"{untimed[0]}: an evaluation without tokens or seconds, the first of {len(untimed)}")
        run.lines = [by_iter[k] for k in sorted(by_iter)]
        if not any("val/ntp" in line for line in run.lines):
            complaints.append("no val/ntp in it, so nothing to compare; left out")
        else:
            self.runs.append(run)
            if run.length < run.planned:
                complaints.append(f"ends at iter {run.length} of {run.planned}")
        if len(complaints) > MOST_COMPLAINTS + 1:
            more = f"and {len(complaints) - MOST_COMPLAINTS} more like these"
            complaints = [*complaints[:MOST_COMPLAINTS], complaints[-1], more]
        self.problems += [Remark(run.where, text) for text in complaints]

    def _take_header(self, run: Run, where: str, line: dict) -> list[str]:
        """Into the run what is sound of its settings and facts; returns complaints."""
        complaints, sound = [], []
        for name in ("config", "facts"):
            found = line.get(name, {})
            if not isinstance(found, dict):
                complaints.append(f"{where}: expected {name} to be an object; left out")
                found = {}
            for key in KINDS.keys() & found.keys():
                if type(found[key]) is not KINDS[key]:
                    complaints.append(f"{where}: {name}: {key} is {shown(found[key], 20)}; left out")
            sound.append({k: v for k, v in found.items() if type(v) is KINDS.get(k, type(v))})
        config, facts = with_names_of_today(sound[0]), sound[1]
        if run.config:  # a run that goes on: where it started from is in its first header
            config["init_from"] = run.config.get("init_from", "scratch")
            differ = [f"{shown(key, 40)}={shown(new[key], 40)}, was {shown(old[key], 40)}" for old, new, ignored in (
                          (run.config, config, HARMLESS | {"max_iters"}), (run.facts, facts, OWN_FACTS))
                      for key in sorted(old.keys() & new.keys() - ignored) if old[key] != new[key]]
            if differ:
                complaints.append(f"{where}: goes on with {'; '.join(differ)}")
        run.config, run.facts = run.config | config, run.facts | facts
        return complaints


def split_config(config: dict) -> dict:
    """wandb's config as a header of log.jsonl: settings, and facts apart."""
    config = {key: value for key, value in config.items() if key != "_wandb"}
    return {"config": config, "facts": config.pop("facts", {})}


def leveldb_records(data: bytes) -> Iterator[bytes | None]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, the first behind 7 bytes of wandb's own.

    A record that is cut short or whose checksum is wrong comes as None, and is the last. wandb has no
    public reader of these files.
    """
    at, record = 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header: zeros
            at += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7].ljust(7, b"\0"))
        piece = data[at + 7 : at + 7 + length]
        if len(piece) < length or zlib.crc32(data[at + 6 : at + 7] + piece) != checksum:
            yield None
            return
        at += 7 + length
        record = piece if kind in (1, 2) else record + piece  # whole, first, middle, last: 1, 2, 3, 4
        if kind in (1, 4):
            yield record
