"""Show foreign text: names and values from files, flags or servers, safe to print and short.

    shown("run\x1b[2J")       ->  run\\x1b[2J        a terminal does not obey it
    shown("a" * 100_000)      ->  aaaa…aaaa         200 characters, the middle left out
"""

MOST = 200  # characters of one name or value
MOST_IN_LINE = 1000  # a line of a message may quote several
MOST_LINES = 40


def shown(foreign: object, most: int = MOST) -> str:
    """str(foreign) on one line: unprintable characters as escapes, the middle left out beyond `most` characters."""
    try:
        text = str(foreign)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list nested without end
        text = f"{type(foreign).__name__} too large to show"
    if len(text) > 2 * most:  # escaping megabytes takes seconds
        text = text[:most] + text[-most:]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= most:
        return text
    tail = most // 2
    return text[: most - tail - 1] + "…" + text[-tail:]


def shown_message(message: object) -> str:
    """A message that may quote foreign text: safe to print, its line breaks kept, no line and no list endless."""
    lines = str(message).split("\n")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES // 2 : -MOST_LINES // 2] = ["…"]
    return "\n".join(shown(line, MOST_IN_LINE) for line in lines)
