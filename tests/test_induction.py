"""Tokens that a row gives away, against slow loops and a search through the text; and that evaluations report them."""

import json
import re

import pytest
import torch

import train
from losses import Objective
from model import ModelArgs, Transformer
from text.induction import induction_groups

TEXTS = [b"", b"", b" L", b" Lily", b"ily", b"i", b" saw", b",", b".", b" and", b"'s", b" T", b"om", b"\xc3", b"\xa9",
         b"\n", b" a", b"Tom", b" X2"]


V = len(TEXTS)


def random_rows(shares: torch.Tensor, B: int, T: int = 24):
    """x and y of tokens 1.. with these shares."""
    tokens = 1 + shares.multinomial(B * (T + 1), replacement=True, generator=torch.Generator().manual_seed(0))
    x = tokens.view(B, T + 1)
    return x[:, :-1], x[:, 1:]


def test_pairs_that_the_row_had_before():
    x, y = random_rows(torch.ones(7), 60)
    T, groups = x.shape[1], induction_groups(x, y, None)
    for b, row in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        pairs = list(zip(*row, strict=True))
        for t, pair in enumerate(pairs):
            again = pair in pairs[:t]
            assert (groups["again"][b, t], groups["rest"][b, t]) == (again, not again)
            for k in range(4):
                here = k * T / 4 <= t < (k + 1) * T / 4
                assert groups[f"again_{k + 1}"][b, t] == (again and here)
                assert groups[f"rest_{k + 1}"][b, t] == (not again and here)
    assert "name" not in groups and 0.1 < groups["again"].float().mean() < 0.9


def test_names_that_the_row_had_before():
    """By a search through the text of a row for capitalised words, of which the tokens are counted afterwards."""
    shares = torch.ones(V - 1)
    shares[[TEXTS.index(piece) - 1 for piece in (b" L", b" T", b"ily", b"om")]] = 5.0
    x, y = random_rows(shares, 300, T=48)
    found = induction_groups(x, y, TEXTS)["name"]
    count = 0
    for b in range(len(x)):
        row = [*x[b].tolist(), y[b, -1].item()]
        pieces = [TEXTS[i] or b"\0" for i in row]  # BOS is no letter and ends a sentence
        starts = [sum(map(len, pieces[:k])) for k in range(len(row) + 1)]
        text, mentioned, expected = b"".join(pieces), set(), set()
        for match in re.finditer(rb" [A-Z][A-Za-z]*(?![A-Za-z\x80-\xff])", text):
            if match.start() in starts and match.end() in starts[:-1]:  # whole tokens, and the row goes on after it
                t = starts.index(match.start())
                if starts.index(match.end()) == t + 2:
                    in_sentence = re.search(rb"[A-Za-z0-9,;]\Z", text[: match.start()])
                    if in_sentence and (row[t], row[t + 1]) in mentioned:
                        expected.add(t)
                    mentioned.add((row[t], row[t + 1]))
        assert set(found[b].nonzero().flatten().tolist()) == expected, text
        count += len(expected)
    assert count > 50


def rows_of(*pieces: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[TEXTS.index(piece) for piece in pieces]])
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("pieces,names", [
    ([b" saw", b" L", b"ily", b" saw", b" L", b"ily", b"'s"], [4]),  # the second mention
    ([b".", b" L", b"ily", b" saw", b" L", b"ily", b"."], [4]),  # the first may begin a sentence
    ([b" saw", b" L", b"ily", b".", b" L", b"ily", b"."], []),  # the second may not
    ([b" saw", b" L", b"ily", b",", b" L", b"ily", b"i"], []),  # three tokens are another word
    ([b" saw", b" L", b"ily", b",", b" L", b"ily", b"\xc3"], []),
    ([b" saw", b" L", b"ily", b",", b" L", b"ily"], []),  # nobody knows how it goes on
    ([b" saw", b" Lily", b" saw", b" Lily", b" saw"], []),  # one token
    ([b" L", b"ily", b" T", b"ily", b","], []),  # another name
    ([b" X2", b"om", b",", b" X2", b"om", b","], []), ([b" a", b"om", b" a", b"om", b","], []),  # no names
])
def test_what_is_a_name(pieces, names):
    assert induction_groups(*rows_of(*pieces), TEXTS)["name"][0].nonzero().flatten().tolist() == names


@pytest.mark.parametrize("with_answers", [False, True])
def test_losses_and_guesses_of_groups_are_those_of_their_positions(with_answers):
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=V, max_seq_len=24))
    x, y = random_rows(torch.ones(V - 1), 5)
    answers = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5 if with_answers else None
    groups = induction_groups(x, y, TEXTS)
    losses, best = Objective(model).evaluate(x, y, ("ntp",), 0, answers, groups)
    log_q = model(x).log_softmax(-1)
    for name, group in groups.items():
        places = [(b, t) for b, t in group.nonzero().tolist() if answers is None or answers[b, t]]
        for kind, values in (("ntp", [-log_q[b, t, y[b, t]].item() for b, t in places]),
                             ("acc", [float(best[b, t] == y[b, t]) for b, t in places])):
            assert losses[f"{kind}_{name}"].count == len(places), name
            assert losses[f"{kind}_{name}"].mean.item() == pytest.approx(sum(values) / max(len(values), 1), abs=1e-5)


def test_evaluations_report_them_when_asked(words, tmp_path):
    lines = []
    for name, asked in (("without", False), ("with", True)):
        assert train.main(words(out_dir=tmp_path / name, eval_induction=asked, eval_iters=2)) == 0
        lines.append([json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()][-1])
    without, told = lines
    new = told.keys() - without.keys()
    groups = ["again", "rest", *(f"{name}_{k}" for name in ("again", "rest") for k in (1, 2, 3, 4)), "name"]
    assert new == {f"val/{kind}_{group}" for kind in ("ntp", "acc", "count") for group in groups}
    assert told["val/ntp"] == without["val/ntp"]
    for group, parts in (("again", 4), ("rest", 4)):
        counts = [told[f"val/count_{group}_{k + 1}"] for k in range(parts)]
        assert sum(counts) == told[f"val/count_{group}"] > 0
        assert sum(n * told[f"val/ntp_{group}_{k + 1}"] for k, n in enumerate(counts)) == pytest.approx(
            told[f"val/ntp_{group}"] * sum(counts), rel=1e-5)
    both = [(told[f"val/count_{group}"], told[f"val/ntp_{group}"]) for group in ("again", "rest")]
    assert sum(n * x for n, x in both) / sum(n for n, _ in both) == pytest.approx(told["val/ntp"], rel=1e-5)
