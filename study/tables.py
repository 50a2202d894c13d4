"""Tables, and the forms that they are written in: for a terminal, as GitHub's Markdown, as CSV."""

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH = 100  # columns of a terminal


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


def number(value: float | None, digits: int = 4, missing: str = "–") -> str:
    if value is None or math.isnan(value):
        return missing
    return f"{value:,.{digits}f}"


def as_text(table: Table) -> str:
    """For a terminal: columns padded, numbers to the right."""
    rows = [table.head, *table.rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(table.head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    note = textwrap.wrap(table.note, max(len(lines[0]), WIDTH))
    return "\n".join([table.title, "", lines[0], "-" * len(lines[0]), *lines[1:], *note])


def markdown(head: Sequence, rows: Iterable[Sequence]) -> str:
    """A table of GitHub's Markdown: a head, a rule, a line for each row; all columns but the first to the right."""
    lines = [[str(cell).replace("|", r"\|") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(head) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_markdown(table: Table) -> str:
    return f"**{table.title}**\n\n{markdown(table.head, table.rows)}\n\n{table.note}"


def as_csv(rows: list[dict]) -> str:
    """One line for each row, one column for each key that a row has; empty where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue()
