"""Tables as text."""


def markdown(head: tuple, rows: list[tuple]) -> str:
    """A table of GitHub's Markdown: a head, a rule, a line for each row."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])
