"""The log of a run: out_dir/log.jsonl, one object a line (doc/formats.md), and the same keys at wandb.

Its first line, and one wherever the run was resumed, has the settings and what was found: data, machine, path.

The file is always written. Failures of wandb - no network, no login, a full disk - are told and
the run goes on without it. Only the first of several processes has a log.
"""

import json
import sys
from pathlib import Path

from system.files import atomic_write


class Log:
    """Appends to out_dir/log.jsonl, cut back to the lines before iteration `start`, and to wandb where asked.

    header: how the run goes on from `start`.
    wandb_settings: keyword arguments of wandb.init, `id` among them; None leaves wandb out.
    """

    def __init__(self, out_dir: Path, start: int, header: dict, wandb_settings: dict | None):
        self.path = out_dir / "log.jsonl"
        kept = self._lines_before(start) if start and self.path.exists() else []
        with atomic_write(self.path, "w") as f:
            f.writelines([*kept, json.dumps({"iter": start} | header) + "\n"])
        self.wandb, self.wandb_id = None, None
        if wandb_settings:
            self._start_wandb(wandb_settings)

    def _lines_before(self, start: int) -> list[str]:
        """The log up to iteration `start`; a run that was killed after its checkpoint writes the rest again."""
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["iter"] < start:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                print(f"{self.path}: leaving out a broken line: {line[:60]!r}", file=sys.stderr)
        return kept

    def _start_wandb(self, settings: dict) -> None:
        self.wandb_id = settings["id"]  # kept if wandb fails today, for a later resume
        try:
            import wandb  # late: seconds of start-up that most runs do without

            self.wandb = wandb.init(**settings)
            self.wandb_id = self.wandb.id
            for axis in ("iter", "tokens", "seconds"):  # val/ntp can be drawn against each
                self.wandb.define_metric(axis)
            self.wandb.define_metric("*", step_metric="iter")
            self.wandb.define_metric("val/ntp", step_metric="iter", summary="min")
        except Exception as error:  # no network, no login, a full disk: none of them is worth a run
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(f"wandb failed, the run goes on without it (log.jsonl has everything): {error}", file=sys.stderr)
        self.wandb = None

    def write(self, line: dict) -> None:
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from error
        if self.wandb:
            try:
                self.wandb.log(line)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:
                self._give_up(error)
