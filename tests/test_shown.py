"""Foreign text on the terminal: printable, short, on one line."""

import pytest

from system.shown import MOST, MOST_IN_LINE, MOST_LINES, shown, shown_message


@pytest.mark.parametrize("foreign", ["\x1b[2J\x1b]0;title\x07", "\x9b2J", "a\0b", "a\rb", "a\nb", "\u202eabc", "\udc80",
                                     "\u2028", "\x7f", "\x1b" * 10_000, b"\x1b[2J", ["\x1b[2J"]])
def test_nothing_that_a_terminal_obeys_gets_through(foreign):
    text = shown(foreign)
    assert text.isprintable() and len(text) <= MOST
    assert text.encode()  # no lone surrogates: standard output may be strict


def test_plain_text_stays_as_it_is():
    for text in ("base-1337", "café, naïve, 日本", "", "x" * MOST, 'C:\\new "name"'):
        assert shown(text) == text


def test_the_middle_of_a_long_text_is_left_out():
    for n in (MOST + 1, 2 * MOST, 2 * MOST + 1, 1_000_000):
        text = shown("begin" + "x" * (n - 8) + "end")
        assert len(text) == MOST and text.startswith("begin") and text.endswith("end") and "…" in text
    assert len(shown("abcdefgh" * 9, most=10)) == 10


def test_values_without_a_text_are_named():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(10**5000) == "int too large to show"
    assert shown(deep) == "list too large to show"
    while deep:  # a list this deep is freed layer by layer
        deep = deep.pop()


def test_a_message_keeps_its_lines():
    assert shown_message("two runs failed:\na: \x1b[2J\nb: \t") == "two runs failed:\na: \\x1b[2J\nb: \\t"
    text = shown_message("\n".join(["y" * 10_000] * 1000))
    assert text.count("\n") <= MOST_LINES and max(map(len, text.split("\n"))) == MOST_IN_LINE
