"""The log of a run: out_dir/log.jsonl, one object a line (doc/formats.md), and the same keys at wandb and TensorBoard.

Its first line, and one wherever the run was resumed, has the settings and facts: data, machine, path.

The file is always written. If wandb fails - no network, no login, a full disk - or TensorBoard, a note says so and
the run goes on without it. Only the first of several processes has a log.
"""

import errno
import html
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from settings import Settings
from study.runs import leveldb_records
from system.files import atomic_write, is_at, parse_json, read_bytes
from system.shown import shown

SHOWN = 3  # complaints about broken lines


class Log:
    """Appends to out_dir/log.jsonl, cut back to the lines before iteration `start`, and to wandb and TensorBoard.

    header: settings and facts of the run from `start` on.
    wandb_settings: keyword arguments of wandb.init, `id` among them; None leaves wandb out.
    tensorboard: True also writes out_dir/tensorboard.
    Errors: ValueError if that needs to be installed.
    """

    def __init__(self, out_dir: Path, start: int, header: dict, wandb_settings: dict | None, tensorboard: bool = False):
        self.path = out_dir / "log.jsonl"
        header = {"iter": start} | header
        kept = self._lines_before(start) if start and self.path.exists() else []
        writer = new_summary_writer(out_dir / "tensorboard", start) if tensorboard else None
        with atomic_write(self.path) as f:
            f.writelines([*kept, as_line(header)])
        self.file = open(self.path, "ab", buffering=0)
        self.mirrors: dict[str, Wandb | TensorBoard] = {}  # by name
        self.wandb_id, self.wandb_failed = None, False
        if writer:
            self.mirrors["TensorBoard"] = TensorBoard(writer)
            self._mirror(lambda mirror: mirror.begin(header))
        if wandb_settings:
            self._start_wandb(wandb_settings, kept)

    def _lines_before(self, start: int) -> list[bytes]:
        """The lines before iteration `start`. A run killed after its checkpoint writes the rest again."""
        kept, broken = [], []
        for number, line in enumerate(read_bytes(self.path).splitlines(), 1):
            try:
                if parse_json(line.decode())["iter"] < start:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError):
                start_of_it = shown(line[:200].decode(errors="replace"), 60)
                broken.append(f"{self.path}, line {number}: broken, left out: {start_of_it}")
        if len(broken) > SHOWN:
            broken[SHOWN:] = [f"{self.path}: left out {len(broken) - SHOWN} more broken lines"]
        for complaint in broken:
            print(complaint, file=sys.stderr)
        return kept

    def _start_wandb(self, settings: dict, kept: list[bytes]) -> None:
        self.wandb_id = settings["id"]  # for a later resume, even if wandb fails now
        try:
            self.mirrors["wandb"] = Wandb(settings)
            self.wandb_id = self.mirrors["wandb"].run.id
            for line in map(json.loads, kept):  # those it lacks: it was killed, it failed, or it is new here
                if "config" not in line:
                    self.mirrors["wandb"].write(line)
        except Exception as error:  # no network, no login, a full disk: none should end a run
            self._give_up("wandb", error)

    def _give_up(self, name: str, error: Exception) -> None:
        print(f"{name} failed, the run goes on without it (log.jsonl has everything): {shown(error)}", file=sys.stderr)
        self.mirrors.pop(name, None)
        self.wandb_failed |= name == "wandb"

    def _mirror(self, action: Callable) -> None:
        """Do the same in wandb and TensorBoard, where they are in use."""
        for name, mirror in list(self.mirrors.items()):
            try:
                action(mirror)
            except Exception as error:
                self._give_up(name, error)

    def check(self) -> None:
        """ValueError if the file was removed or replaced: its folder is gone, or is another run's by now."""
        if not is_at(self.path, self.file):
            raise ValueError(f"{self.path}: was removed or replaced during the run, which ends here")

    def write(self, line: dict) -> None:
        """Errors: ValueError if the line cannot be written, or the file was removed or replaced meanwhile."""
        self.check()
        content = as_line(line)
        try:
            if self.file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from error
        self._mirror(lambda mirror: mirror.write(line))

    def keep(self, path: Path) -> None:
        """Send a file to wandb."""
        self._mirror(lambda mirror: mirror.keep(path))

    def close(self) -> None:
        self.file.close()
        self._mirror(lambda mirror: mirror.close())
        if self.wandb_failed:
            with suppress(Exception):  # at the interpreter's end a killed service would be a traceback
                import wandb

                wandb.teardown()


def as_line(values: dict) -> bytes:
    return json.dumps(values).encode() + b"\n"


class Wandb:
    """A run at wandb; every method may raise whatever wandb does."""

    def __init__(self, settings: dict):
        import wandb  # late: most runs are spared its seconds of start-up

        self.html, self.run = wandb.Html, wandb.init(**settings)
        self.latest = self.run.step - 1  # the last iteration that the server knows of a resumed run
        if self.run.offline and settings["id"]:
            self.latest = last_offline_step(Path(self.run.dir).parent.parent, settings["id"])
        for axis in ("iter", "tokens", "seconds"):  # val/ntp can be drawn against each
            self.run.define_metric(axis)
        self.run.define_metric("*", step_metric="iter")
        self.run.define_metric("val/ntp", step_metric="iter", summary="min,last")

    def write(self, line: dict) -> None:
        """Nothing is sent twice: a killed run comes again to iterations that it had sent."""
        if line["iter"] <= self.latest:
            return
        if "sample" in line:
            text = html.escape(line["sample"])
            line = line | {"sample": self.html(f'<p style="white-space: pre-wrap">{text}</p>', inject=False)}
        self.run.log(line, step=line["iter"], commit=True)

    def keep(self, path: Path) -> None:
        self.run.log_artifact(str(path), name=f"{path.stem}-{self.run.id}", type="model")

    def close(self) -> None:
        self.run.finish()


def last_offline_step(folder: Path, run_id: str) -> int:
    """The last step in the files that wandb has kept of an offline run; -1 if there is none."""
    from wandb.proto.wandb_internal_pb2 import Record

    latest = -1
    for path in folder.glob(f"offline-run-*/run-{run_id}.wandb"):
        for content in filter(None, leveldb_records(read_bytes(path))):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                latest = max(latest, record.history.step.num)
    return latest


def new_summary_writer(folder: Path, start: int):
    """torch's writer of TensorBoard's files, whose steps from `start` on replace older ones."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # late: an optional library
    except ImportError as error:
        raise ValueError("tensorboard_log: needs TensorBoard: pip install -r requirements-tensorboard.txt") from error
    return SummaryWriter(str(folder), purge_step=start or None)


class TensorBoard:
    """The same for TensorBoard: numbers as scalars, the rest as texts."""

    def __init__(self, writer):
        self.writer = writer

    def begin(self, header: dict) -> None:
        self.writer.add_text("header", f"```\n{json.dumps(header, indent=1)}\n```", header["iter"])

    def write(self, line: dict) -> None:
        for key, value in line.items():
            if isinstance(value, str):
                self.writer.add_text(key, value, line["iter"])
            elif value is not None and key != "iter":
                self.writer.add_scalar(key, value, line["iter"])
        self.writer.flush()  # so that a run that is killed has left what its checkpoint will not write again

    def keep(self, path: Path) -> None:
        pass  # it has no place for files

    def close(self) -> None:
        self.writer.close()


def wandb_settings(s: Settings, header: dict, run_id: str | None) -> dict | None:
    """The arguments of wandb.init; None for a run without wandb."""
    if not s.wandb_log:
        return None
    given = {"entity": s.wandb_entity, "group": s.wandb_group, "job_type": s.wandb_job_type, "notes": s.wandb_notes,
             "tags": [tag.strip() for tag in s.wandb_tags.split(",") if tag.strip()],
             "mode": s.wandb_mode if s.wandb_mode != "auto" else "",
             "project": s.wandb_project or os.environ.get("WANDB_PROJECT", "lookahead"),
             "name": s.wandb_run_name or os.environ.get("WANDB_NAME", Path(s.out_dir).name)}
    return {key: value or None for key, value in given.items()} | {  # None: wandb looks for WANDB_*
        "config": header["config"] | {"facts": header["facts"]}, "allow_val_change": True, "id": run_id,
        "resume": "allow"}
