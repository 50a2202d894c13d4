"""A run's lines on the terminal, of at most 100 columns; log.jsonl has all figures."""

import textwrap

from settings import Settings
from system.shown import shown

COLUMNS = 100


def show_step(line: dict, s: Settings, step_seconds: float) -> str:
    """A step for the terminal: the NTP head's loss and head 1's, speed, time left."""
    names = [name for name in ("ntp", "superposition", "nitp_1", "consistency_1") if f"train/{name}" in line][:2]
    losses = "  ".join(f"{name} {line['train/' + name]:.4f}" for name in names)
    text = f"iter {line['iter']}/{s.max_iters} | {losses}"
    if line["tok_per_s"] is None:
        return f"{text} | compiled"
    minutes, seconds = divmod(round((s.max_iters - line["iter"]) * step_seconds), 60)
    return (f"{text} | {step_seconds * 1000:.0f} ms | {line['tok_per_s']:,.0f} tok/s | "
            f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")


def show_evaluation(it: int, s: Settings, val: dict[str, float]) -> str:
    """An evaluation for the terminal: of NTP and head 1, and of answers, what fits one line."""
    names = [name for name in ("ntp", "bits_per_byte", "acc_0", "nitp_1", "acc_1") if name in val]
    text = f"iter {it}/{s.max_iters} | val"
    for name in [*names, *(name for name in val if name.startswith("exact_"))]:
        figure = f"  {name} {val[name]:.4f}"
        if len(text) + len(figure) <= COLUMNS:
            text += figure
    return text


def show_story(text: str) -> str:
    """A sample for the terminal."""
    return textwrap.fill(shown(text, 2000), COLUMNS, initial_indent="  ", subsequent_indent="  ")
