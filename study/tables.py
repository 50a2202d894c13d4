"""Tables, and the forms that they are written in: for a terminal, as GitHub's Markdown, as CSV."""

import csv
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH = 100  # columns of a terminal
NARROW = 24  # a column of words is not squeezed below it
RED, PLAIN = "\x1b[31m", "\x1b[0m"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet would compute


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    warnings: tuple[str, ...] = ()  # shown in red, above the rows
    words: tuple[str, ...] = ()  # columns of words, to the left; all but these and the first are numbers, to the right


def number(value: float | None, digits: int = 4, missing: str = "–") -> str:
    if value is None or math.isnan(value):
        return missing
    return f"{value:,.{digits}f}"


# ---------------------------------------------------------------------------------------------
# for a terminal

def as_text(table: Table, colour: bool = False) -> str:
    """For a terminal of 100 columns: words wrapped, and where columns do not fit, the rest of them below."""
    begin, end = (RED, PLAIN) if colour else ("", "")
    warnings = [f"{begin}{line}{end}" for text in table.warnings for line in textwrap.wrap(text, WIDTH)]
    blocks = [block_of(table, columns) for columns in columns_that_fit(table)]
    body = "\n\n".join(blocks)
    return "\n".join([table.title, "", *warnings, body, *textwrap.wrap(table.note, WIDTH)])


def widths_of(table: Table) -> list[int]:
    """What each column needs; columns of words share what the others leave."""
    widths = [max(len(row[k]) for row in (table.head, *table.rows)) for k in range(len(table.head))]
    words = [k for k, name in enumerate(table.head) if name in table.words]
    left = WIDTH - sum(width + 2 for k, width in enumerate(widths) if k not in words)
    for done, k in enumerate(sorted(words, key=lambda k: widths[k])):  # those that need less than a share first
        widths[k] = min(widths[k], max(left // (len(words) - done) - 2, NARROW))
        left -= widths[k] + 2
    widths[0] = min(widths[0], WIDTH // 2)
    return widths


def columns_that_fit(table: Table) -> list[list[int]]:
    """The columns in blocks, each of which fits; the first column in all of them."""
    widths = widths_of(table)
    blocks, used = [[0]], widths[0]
    for k in range(1, len(widths)):
        if used + 2 + widths[k] > WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(k)
        used += 2 + widths[k]
    return blocks


def block_of(table: Table, columns: list[int]) -> str:
    widths, lines = widths_of(table), []
    for number_of_row, row in enumerate((table.head, *table.rows)):
        cells = [textwrap.wrap(row[k], widths[k]) or [""] for k in columns]
        for line in range(max(map(len, cells))):
            parts = []
            for k, cell in zip(columns, cells, strict=True):
                text = cell[line] if line < len(cell) else ""
                to_left = k == 0 or table.head[k] in table.words
                parts.append(text.ljust(widths[k]) if to_left else text.rjust(widths[k]))
            lines.append("  ".join(parts).rstrip())
        if number_of_row == 0:
            lines.append("-" * (sum(widths[k] + 2 for k in columns) - 2))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# in files

def markdown(head: Sequence, rows: Iterable[Sequence], words: Iterable[str] = ()) -> str:
    """A table of GitHub's Markdown: a head, a rule, a line for each row; numbers to the right."""
    lines = [[str(cell).replace("|", r"\|").replace("<", "&lt;") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---" if k == 0 or name in words else "---:" for k, name in enumerate(head)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_markdown(table: Table) -> str:
    warnings = [f"**{text}**" for text in table.warnings]
    return "\n\n".join(filter(None, [f"**{table.title}**", *warnings, markdown(table.head, table.rows, table.words),
                                     table.note]))


def as_csv(rows: list[dict]) -> str:
    """One line for each row, one column for each key that a row has; empty where there is no number.

    Words that a spreadsheet would compute as a formula have an apostrophe before them.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [], lineterminator="\n")
    writer.fieldnames = list(dict.fromkeys(key for row in rows for key in row))
    writer.writerow({key: harmless(key) for key in writer.fieldnames})
    for row in rows:
        writer.writerow({key: harmless(value) for key, value in row.items()})
    return text.getvalue()


def harmless(cell: object) -> object:
    if isinstance(cell, float) and math.isnan(cell):
        return ""
    if isinstance(cell, str) and cell.startswith(FORMULA):
        return f"'{cell}"
    return cell
