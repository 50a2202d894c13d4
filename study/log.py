"""The log of a run: out_dir/log.jsonl, one object a line (doc/formats.md), and the same keys at wandb.

Its first line, and one wherever the run was resumed, has the settings and facts: data, machine, path.

The file is always written. If wandb fails - no network, no login, a full disk - a note says so and
the run goes on without it. Only the first of several processes has a log.
"""

import errno
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from system.files import atomic_write, is_at, parse_json, read_bytes
from system.shown import shown

SHOWN = 3  # complaints about broken lines


class Log:
    """Appends to out_dir/log.jsonl, cut back to the lines before iteration `start`, and to wandb where asked.

    header: settings and facts of the run from `start` on.
    wandb_settings: keyword arguments of wandb.init, `id` among them; None leaves wandb out.
    """

    def __init__(self, out_dir: Path, start: int, header: dict, wandb_settings: dict | None):
        self.path = out_dir / "log.jsonl"
        kept = self._lines_before(start) if start and self.path.exists() else []
        with atomic_write(self.path) as f:
            f.writelines([*kept, as_line({"iter": start} | header)])
        self.file = open(self.path, "ab", buffering=0)
        self.wandb, self.wandb_id, self.wandb_failed = None, None, False
        if wandb_settings:
            self._start_wandb(wandb_settings)

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

    def _start_wandb(self, settings: dict) -> None:
        self.wandb_id = settings["id"]  # for a later resume, even if wandb fails now
        try:
            import wandb  # late: most runs are spared its seconds of start-up

            self.wandb = wandb.init(**settings)
            self.wandb_id = self.wandb.id
            for axis in ("iter", "tokens", "seconds"):  # val/ntp can be drawn against each
                self.wandb.define_metric(axis)
            self.wandb.define_metric("*", step_metric="iter")
            self.wandb.define_metric("val/ntp", step_metric="iter", summary="min")
        except Exception as error:  # no network, no login, a full disk: none should end a run
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(f"wandb failed, the run goes on without it (log.jsonl has everything): {shown(error)}", file=sys.stderr)
        self.wandb, self.wandb_failed = None, True

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
        if self.wandb:
            try:
                self.wandb.log(line)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        self.file.close()
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:
                self._give_up(error)
        if self.wandb_failed:
            with suppress(Exception):  # at the interpreter's end a killed service would be a traceback
                import wandb

                wandb.teardown()


def as_line(values: dict) -> bytes:
    return json.dumps(values).encode() + b"\n"
