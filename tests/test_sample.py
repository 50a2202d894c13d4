"""Text from checkpoints: the KV cache equals the model, drafting equals plain decoding, and what is printed."""

import itertools
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, start

import sample
from model import KVCache, ModelArgs, States, Transformer
from sample import Printer, Tally, compare, generate, main, picker, probabilities, static_tree
from text.tokenizer import BOS, BYTE_VOCAB_SIZE, EOS, ByteTokenizer

V, D, S = 12, 16, 32
ARGS = {"dim": D, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": V, "max_seq_len": S, "hidden_dim": D}
PROMPT = [BOS, 10, 11, 3]
GUESSERS = ["linear", "residual", "block"]


def lively(seed=0, scale=0.3, **changes) -> Transformer:
    """A random model whose logits are far from flat."""
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**ARGS | changes)).eval().requires_grad_(False)
    for p in model.parameters():
        p += torch.randn_like(p) * scale
    return model


def counting(head="linear", n=3, step=1, noise=0.0, seed=0, wheel=range(3, V), **changes) -> Transformer:
    """Repeats the tokens of a wheel in turn, and its heads know. Noise: what attention adds to the states, so that the
    next token hangs on all that came before, and heads are right often, not always.
    """
    model = lively(seed, 0.5, head=head, n_future_heads=n, tie_embeddings=False, **changes)
    wheel = list(wheel)

    def shift(by):  # (D, D): one-hot x -> one-hot of the token that is `by` turns behind it
        m = torch.zeros(D, D)
        for at, x in enumerate(wheel):
            m[wheel[(at + by) % len(wheel)], x] = 1.0
        return m

    heads_blocks = [future.block for future in model.future_heads if head == "block"]
    for p in (p for p in model.parameters() if p.dim() == 1):
        p.fill_(1.0)
    for block in (*model.layers, *heads_blocks):
        block.attention.wo.weight *= noise
        block.feed_forward.w2.weight.zero_()
    model.tok_embeddings.weight.copy_(torch.eye(V, D))
    model.output.weight.copy_(shift(step)[:V])
    for i, future in enumerate(model.future_heads, 1):
        if head == "linear":
            future.weight.copy_(shift(step * (1 + i))[:V])
        elif head == "residual":
            future.residual.weight.copy_(20 * shift(step * i))
        else:  # silu(4) * 4 at the one that is i turns behind
            future.block.feed_forward.w1.weight.copy_(shift(step * i))
            future.block.feed_forward.w3.weight.copy_(shift(step * i))
            future.block.feed_forward.w2.weight.copy_(torch.eye(D))
    return model


def greedy(logits: torch.Tensor) -> int:
    """Of the tokens that do not end a text."""
    return int(logits[3:].argmax()) + 3


def text(model, n=0, k=1, pick=greedy, most=0, prompt=PROMPT, tally=None) -> list[int]:
    return list(generate(model, prompt, most, pick, n, k, tally))


def uncached(model) -> list[int]:
    """The same by whole forwards."""
    ids = list(PROMPT)
    while len(ids) <= S:
        ids.append(greedy(model(torch.tensor([ids]))[0, -1]))
    return ids[len(PROMPT) :]


# ---------------------------------------------------------------------------------------------
# the cache

def chain(T):
    return torch.arange(T), torch.ones(T, T, dtype=torch.bool).tril()


SHAPES = [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"n_layers": 3, "recurrence": 2}]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("sizes", [[1] * 20, [7, 1, 5, 4, 3], [20]])
def test_logits_with_a_cache_are_those_without(changes, sizes):
    model, cache = lively(**changes), KVCache(20)
    x = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(1))
    found = []
    for part in x.split(sizes, 1):
        cache.begin(*chain(part.shape[1]))
        h = model.trunk(part, cache)
        found.append(model.readouts(part, h, [0])[0].logits())
        cache.keep(torch.arange(part.shape[1]))
    torch.testing.assert_close(torch.cat(found, 1), model(x), atol=1e-5, rtol=1e-5)
    assert len(cache.entries) == len(model.unrolled())


@pytest.mark.parametrize("head,head_input", [*((head, "last") for head in GUESSERS), ("block", "before_last")])
def test_heads_with_a_cache_are_those_without(head, head_input):
    model, cache = lively(head=head, head_input=head_input, n_future_heads=3), KVCache(20)
    x = torch.randint(0, V, (1, 20), generator=torch.Generator().manual_seed(1))
    states = model.trunk(x)
    found = []
    for part in (slice(0, 9), slice(9, 10), slice(10, 14), slice(14, 20)):
        T = part.stop - part.start
        cache.begin(*chain(T))
        readouts = model.readouts(x[:, part], States(*(h[:, part] for h in states)), [1, 2, 3], cache)
        found.append([readouts[i].logits() for i in (1, 2, 3)])
        cache.keep(torch.arange(T))
    whole = model.readouts(x, states, [1, 2, 3])
    for i in (1, 2, 3):
        torch.testing.assert_close(torch.cat([f[i - 1] for f in found], 1), whole[i].logits(), atol=1e-5, rtol=1e-5)
    assert len(cache.entries) == (3 if head == "block" else 0)


@pytest.mark.parametrize("changes", SHAPES)
def test_each_path_of_a_tree_is_a_text_of_its_own(changes):
    """Its logits are those of its path without the rest of the tree, whichever path is kept."""
    model, tree, kept = lively(**changes), static_tree(3, 3), [3, 8, 5]
    drawn = torch.randint(0, V, (len(tree.ranks),), generator=torch.Generator().manual_seed(2))
    cache = KVCache(60)
    cache.begin(*chain(3))
    model.trunk(torch.tensor([kept]), cache)
    cache.keep(torch.arange(3))
    for round in range(3):
        cache.begin(tree.depths, tree.sees)
        logits = model.readouts(drawn[None], model.trunk(drawn[None], cache), [0])[0].logits()[0]
        for row in range(len(drawn)):
            path = tree.sees[row].nonzero()[:, 0]  # a parent's row is before its child's
            alone = model(torch.tensor([kept + drawn[path].tolist()]))[0, -1]
            torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=1e-5)
        leaf = [r for r in range(len(drawn)) if not tree.children[r] and tree.depths[r] == 3][round]
        path = tree.sees[leaf].nonzero()[:, 0]
        assert path.tolist() != list(range(4))  # rows that do not lie next to each other
        cache.keep(path)
        kept = kept + drawn[path].tolist()


# ---------------------------------------------------------------------------------------------
# the tree

def test_a_chain_is_the_tree_of_one_candidate():
    tree = static_tree(4, 1)
    assert tree.depths.tolist() == [0, 1, 2, 3, 4] and tree.ranks.tolist() == [0] * 5
    assert tree.children == [[1], [2], [3], [4], []]
    assert torch.equal(tree.sees, chain(5)[1])
    assert static_tree(0, 3).children == [[]]


def test_a_small_tree_is_whole_and_a_large_one_keeps_the_likeliest():
    tree = static_tree(2, 2)
    assert sorted(zip(tree.depths.tolist(), tree.ranks.tolist())) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 0), (2, 1),
                                                                      (2, 1)]
    assert len(static_tree(31, 1).depths) == 32  # a chain is never cut
    large = static_tree(8, 4)
    assert len(large.depths) == 1 + sample.MOST_GUESSES
    for row, below in enumerate(large.children):
        assert [large.ranks[r] for r in below] == list(range(len(below)))  # no candidate before a better one
        for r in below:
            assert row < r and large.depths[r] == large.depths[row] + 1
            assert large.sees[r].sum() == large.depths[r] + 1 and large.sees[r, row] and large.sees[r, r]


# ---------------------------------------------------------------------------------------------
# the same text

@pytest.mark.parametrize("changes", SHAPES)
def test_plain_decoding_is_the_model(changes):
    model = lively(**changes)
    found = text(model)
    assert found == uncached(model) and len(found) == S + 1 - len(PROMPT)
    assert len(set(found)) > 2


@pytest.mark.parametrize("head", [*GUESSERS, "shared"])
@pytest.mark.parametrize("k", [1, 3])
def test_guessing_tells_the_text_of_plain_decoding(head, k):
    """To the end of the context, greedy and drawn, of random models."""
    for seed, n in enumerate((1, 2, 5)):
        model = lively(seed, head=head, n_future_heads=n)
        assert text(model, n, k) == text(model)
        assert text(model, n, k, picker(1.0, 0, 0.9, seed)) == text(model, pick=picker(1.0, 0, 0.9, seed))


@pytest.mark.parametrize("head", GUESSERS)
@pytest.mark.parametrize("changes", SHAPES[::3])
def test_guesses_that_are_often_right(head, changes):
    """Several tokens per forward, in a text that depends on all of its tokens."""
    tally, unlike, model = Tally(), 0, counting(head, noise=0.08, **changes)
    for pick in (lambda: greedy, lambda: picker(0.25, 0, 1.0, 9)):
        plain = text(model, pick=pick())
        unlike += plain != text(counting(head, **changes), pick=pick())
        for k in (1, 2, 4):
            assert text(model, 3, k, pick(), tally=tally) == plain
    assert tally.tokens / tally.forwards > 1.5
    assert unlike and tally.right[1] < tally.reached[1]  # the noise is felt


@pytest.mark.parametrize("head", GUESSERS)
def test_heads_that_know_save_forwards(head):
    tally = Tally()
    found = text(counting(head), 3, tally=tally)
    assert found == [4, 5, 6, 7, 8, 9, 10, 11, 3] * 3 + [4, 5]
    assert tally.right == tally.reached and set(tally.right) == {1, 2, 3}
    assert (tally.tokens, tally.forwards) == (29, 8)  # 7 of four tokens and the last, which has no room for a guess


@pytest.mark.parametrize("head", GUESSERS)
def test_guesses_are_those_of_heads_that_read_the_whole_text(head, monkeypatch):
    """Rejected drafts leave no trace in them. A bad draft shows in no text, only in speed."""
    model, said, keep, rounds = counting(head, noise=0.08), [], sample.Reader.keep, []

    def checked(reader, rows, tokens, h):
        keep(reader, rows, tokens, h)
        said.extend(tokens[rows].tolist())
        x = torch.tensor([said])
        whole = model.readouts(x, model.trunk(x), [1, 2, 3])
        assert reader.guesses.tolist() == [whole[i].logits()[0, -1].topk(2).indices.tolist() for i in (1, 2, 3)]
        rounds.append(len(rows))

    monkeypatch.setattr(sample.Reader, "keep", checked)
    found = text(model, 3, 2)
    assert said == (PROMPT + found)[: len(said)] and len(said) > 20 and {1, 3} <= set(rounds)


def test_a_tree_takes_a_second_candidate():
    """A head whose best candidate is always wrong, and whose second is always right."""
    model = counting(n=1)
    with torch.no_grad():
        model.future_heads[0].weight[0] = 2.0  # never said
    chained, branched = Tally(), Tally()
    assert text(model, 1, 1, tally=chained) == text(model, 1, 2, tally=branched) == text(model)
    assert (chained.right[1], chained.reached[1], chained.forwards) == (0, 28, 29)
    assert (branched.right[1], branched.reached[1], branched.forwards) == (14, 14, 15)


def test_acceptance_is_counted_where_a_head_was_reached():
    """Head 2 is never right: it is reached whenever head 1 is right, and head 3 is never reached."""
    model, tally = counting(), Tally()
    model.future_heads[1].weight.zero_()
    model.future_heads[1].weight[0] = 1.0
    text(model, 3, tally=tally, most=9)
    assert tally.reached == {1: 4, 2: 4} and +tally.right == {1: 4}
    assert (tally.tokens, tally.forwards) == (9, 5)


# ---------------------------------------------------------------------------------------------
# the same distribution

TINY = {"vocab_size": 6, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head": "linear", "n_future_heads": 2}
LENGTH = 3


def by_hand(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """{token: its probability}, written out."""
    scores = torch.tensor(logits, dtype=torch.float64) / temperature
    weights = sorted(((float(s.exp()), -i) for i, s in enumerate(scores)), reverse=True)[: top_k or None]
    total, kept, before = sum(w for w, _ in weights), {}, 0.0
    for weight, i in weights:
        if before <= top_p or top_p == 0.0:
            kept[-i] = weight
        before += weight / total
    return {i: weight / sum(kept.values()) for i, weight in kept.items()}


def exact(model, prompt: tuple, setting: tuple) -> dict[tuple, float]:
    """{text of LENGTH tokens, or of fewer that BOS or EOS ended: its probability}."""
    found = {}

    def follow(said, chance):
        if len(said) == LENGTH:
            found[said] = found.get(said, 0.0) + chance
            return
        for token, p in by_hand(model(torch.tensor([prompt + said]))[0, -1].tolist(), *setting).items():
            if token in (BOS, EOS):
                found[said] = found.get(said, 0.0) + chance * p
            else:
                follow((*said, token), chance * p)

    follow((), 1.0)
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def chi_square(model, setting: tuple, n: int, k: int, times: int) -> tuple[float, int]:
    """(statistic, degrees of freedom) of `times` texts; those that are expected fewer than five times are one class."""
    prompt, pick = [BOS, 4], picker(*setting, seed=0)
    expected = {said: times * p for said, p in exact(model, tuple(prompt), setting).items()}
    seen = dict.fromkeys(expected, 0)
    for _ in range(times):
        seen[tuple(text(model, n, k, pick, LENGTH, prompt))] += 1
    classes: dict = {}
    for said, count in expected.items():
        pair = classes.setdefault(said if count >= 5 else "rare", [0.0, 0])
        pair[0] += count
        pair[1] += seen[said]
    return sum((s - e) ** 2 / e for e, s in classes.values()), len(classes) - 1


def far_off(statistic: float, freedom: int) -> bool:
    return statistic > freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("setting,n,k", [((1.0, 0, 0.9), 2, 1), ((0.7, 4, 0.95), 2, 2)])
def test_texts_are_distributed_as_the_model_says(setting, n, k):
    statistic, freedom = chi_square(lively(15, **TINY), setting, n, k, 500)
    assert freedom > 10 and not far_off(statistic, freedom), (statistic, freedom)


@pytest.mark.parametrize("k", [1, 2])
def test_a_rule_that_takes_guesses_too_easily_is_noticed(monkeypatch, k):
    """The test of the test: a draft among the three likeliest tokens is accepted."""

    def lenient(tree, tokens, logits, pick, ends):
        path, picked = [0], []
        while True:
            row = path[-1]
            likely = logits[row].topk(3).indices.tolist()
            right = [r for r in tree.children[row] if tokens[r] in likely and tokens[r] > EOS][:1]
            picked.append(tokens[right[0]] if right else pick(logits[row]))
            path += right
            if not right:
                return path, picked

    monkeypatch.setattr(sample, "walk", lenient)
    assert far_off(*chi_square(lively(15, **TINY), (1.0, 0, 0.9), 2, k, 250))


def test_probabilities():
    g = torch.Generator().manual_seed(4)
    for setting in itertools.product((0.3, 1.0, 3.0), (0, 1, 3, 8, 20), (0.0, 0.2, 0.5, 0.9, 0.999, 1.0)):
        logits = torch.randn(8, generator=g) * 2
        want = by_hand(logits.tolist(), *setting)
        found = probabilities(logits, *setting)
        assert found.dtype == torch.float64 and (found > 0).sum() == len(want), setting
        for token, p in want.items():
            assert found[token].item() == pytest.approx(p), setting


def test_probabilities_at_the_edges():
    logits = torch.tensor([1.0, 3.0, 3.0, -1e30])
    assert probabilities(logits, 1e-310, 0, 1.0).tolist() == [0.0, 0.5, 0.5, 0.0]
    assert probabilities(logits, 1.0, 1, 1.0).tolist() == [0.0, 1.0, 0.0, 0.0]  # of a tie the first, as at 0
    assert picker(0.0, 0, 0.9, 1)(logits) == 1
    with pytest.raises(ValueError, match="not finite"):
        picker(1.0, 0, 0.9, 1)(torch.tensor([0.0, torch.nan]))


def test_a_seed_tells_a_text_and_another_seed_another():
    model = counting(noise=0.1)
    a, b, c = (text(model, pick=picker(0.5, 0, 1.0, seed)) for seed in (1, 1, 2))
    assert a == b != c


# ---------------------------------------------------------------------------------------------
# where a text ends

@pytest.mark.parametrize("n,k", [(0, 1), (2, 1), (3, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("end", [BOS, EOS])
def test_a_text_stops_before_bos_and_eos_though_guesses_go_on(n, k, end):
    model, tally = counting(n=4, wheel=[6, 7, 8, 9, end, 10, 11]), Tally()
    assert text(model, n, k, picker(0.0, 0, 0.9, 1), prompt=[3, 6, 7], tally=tally) == [8, 9]
    assert (tally.tokens, tally.forwards) == (3, 1 if n else 3)
    assert tally.right == tally.reached == dict.fromkeys(range(1, 1 + min(n, 3)), 1)  # nothing is asked behind the end


@pytest.mark.parametrize("most", range(1, 10))
def test_no_more_tokens_than_asked_for(most):
    for n, k in ((0, 1), (3, 1), (3, 3)):
        assert text(counting(), n, k, most=most) == [4, 5, 6, 7, 8, 9, 10, 11, 3][:most]


@pytest.mark.parametrize("most", [0, 1000])
def test_the_context_is_the_last_limit(most):
    """Every position gives a token, the last one included, after one token and after a full context."""
    for n in (0, 3):
        assert len(text(counting(), n, most=most, prompt=[BOS])) == S
        full = [BOS, *[3] * (S - 1)]
        assert text(counting(), n, most=most, prompt=full) == [4]


# ---------------------------------------------------------------------------------------------
# what is printed

def test_half_a_character_waits_for_its_rest(capsys):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("é€😀!")
    printer, seen = Printer(tokenizer, [BOS]), []
    for token in ids:
        printer.add([token])
        seen.append(capsys.readouterr().out)
    assert seen == ["", "", "é", "", "", "€", "", "", "", "😀", "!"]
    printer.add([3 + 0xE2, 3 + 0x82])
    assert capsys.readouterr().out == ""
    printer.finish()  # it never became whole
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"
    printer = Printer(tokenizer, [BOS, *tokenizer.encode("a"), 3 + 0xFF])
    printer.add(tokenizer.encode("b")[1:])
    printer.finish()
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}b\n"


def test_texts_that_part_are_told(capsys):
    assert compare([3, 4], [3, 4], 1) and not capsys.readouterr().err
    for other, at in (([3, 5], 2), ([3], 2), ([3, 4, 5], 3)):
        assert not compare([3, 4], other, 7)
        assert re.search(rf"WARNING: sample 7 .* token {at} ", capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------
# the program

@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(head="block", ...) -> the file of a lively byte-level model."""

    def make(**changes):
        path, config = tmp_path / "ckpt.pt", {"data_dir": "nowhere", "dataset": "none"}
        args = {"vocab_size": BYTE_VOCAB_SIZE, "head": "linear", "n_future_heads": 2, "max_seq_len": 64} | changes
        model = lively(**args)
        model.tok_embeddings.weight[[BOS, EOS]] *= 1e-3  # texts are long
        torch.save({"model": model.state_dict(), "model_args": model.args.as_dict(),
                    "config": config | {"vocab_size": args["vocab_size"]}}, path)
        return path

    return make


def told(capsys, *words) -> tuple[str, str]:
    main([*map(str, words), "--device=cpu"])
    return capsys.readouterr()


def test_program_plain(checkpoint, capsys):
    words = ("--checkpoint", checkpoint(), "--prompt=Hi", "--num_samples=2", "--max_new_tokens=9", "--seed=5")
    out, err = told(capsys, *words)
    assert re.fullmatch(r"\d+ tokens, \d+\.\d tokens/s\n", err)
    first, second = out.split("\n---\n")
    assert first.startswith("Hi") and second.startswith("Hi") and first != second.removesuffix("\n")
    assert told(capsys, *words)[0] == out
    assert told(capsys, *words[:3], "--max_new_tokens=9", "--seed=6")[0] == second  # sample j has seed + j


@pytest.mark.parametrize("flags", [["--temperature=0"], ["--temperature=0", "--tree=3"], ["--tree=2", "--top_k=20"]])
def test_program_speculative(checkpoint, capsys, flags):
    path = checkpoint(head="block")
    words = ("--checkpoint", path, "--max_new_tokens=0", "--num_samples=2", "--prompt=Hi")
    out, err = told(capsys, *words, "--speculative", *flags)
    assert out == told(capsys, *words, *[f for f in flags if "tree" not in f])[0]
    assert re.search(r"\d+ tokens in \d+ forwards, \d\.\d\d tokens per forward; [\d.]+ tokens/s, "
                     r"[\d.]+ times plain decoding \([\d.]+ tokens/s\)\n", err)
    assert re.search(r"acceptance per head, .*: 1: \d+% of \d+", err)
    assert "the tokens are those of plain decoding" in err and "WARNING" not in err
    assert re.search(r"sample \d ends where the context does, 64 tokens", err)


def test_a_difference_to_plain_decoding_is_told(checkpoint, capsys, monkeypatch):
    """With heads that change the text, as rounding could."""

    def wrong(tree, tokens, logits, pick, ends):
        return [0], [5 if len(tokens) > 1 else pick(logits[0])]

    monkeypatch.setattr(sample, "walk", wrong)
    err = told(capsys, "--checkpoint", checkpoint(), "--speculative", "--prompt=Hi", "--temperature=0")[1]
    assert "WARNING: sample 1 is not that of plain decoding from new token 1 on" in err
    assert "the tokens are those" not in err


def refused(checkpoint, *words) -> str:
    with pytest.raises(ValueError) as error:
        main(["--checkpoint", str(checkpoint), "--device=cpu", *words])
    return str(error.value)


@pytest.mark.parametrize("flag", ["--temperature=-1.0", "--temperature=nan", "--temperature=inf", "--top_p=1.1",
                                  "--top_p=-0.1", "--top_p=nan", "--top_k=-1", "--max_new_tokens=-1",
                                  "--num_samples=0", "--seed=-1", "--tree=0"])
def test_values_out_of_range_are_refused(flag):
    assert refused("never read", flag, "--speculative").startswith(f"{flag}: expected ")


def test_what_cannot_be_decoded_is_refused(checkpoint, tmp_path):
    assert "nothing.pt: cannot read" in refused(tmp_path / "nothing.pt")
    assert "--tree=2: expected --speculative" in refused(checkpoint(), "--tree=2")
    assert re.search("--prompt: 102 tokens with BOS.*max_seq_len is 64", refused(checkpoint(), f"--prompt={'a' * 100}"))
    assert refused(checkpoint(), "--device=abacus").startswith("device=abacus: expected")
    assert "found none" in refused(checkpoint(n_future_heads=0), "--speculative")
    sequential = checkpoint(head="sequential")
    assert re.search("linear, residual, block.*found sequential", refused(sequential, "--speculative"))
    main(["--checkpoint", str(sequential), "--device=cpu", "--max_new_tokens=1"])  # its trunk is a trunk
    assert "found trunk=rnn" in refused(checkpoint(trunk="rnn"))


def test_errors_are_one_line_and_exit_code_1(tmp_path):
    done = start("sample.py", "--checkpoint", tmp_path / "nothing.pt")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 1 and not out and re.fullmatch(r"sample.py: .*nothing.pt: cannot read.*\n", err)


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="--prompt: expected UTF-8, found 'caf"):
        sample.encode_prompt(ByteTokenizer(), "caf\udce9", 99)


def test_a_full_disk_is_told(tmp_path):
    path = tmp_path / "ckpt.pt"
    model = lively(vocab_size=259)
    torch.save({"model": model.state_dict(), "model_args": model.args.as_dict()}, path)
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "sample.py", f"--checkpoint={path}"], cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.startswith("sample.py: cannot write: No space left")


def test_ctrl_c_and_a_closed_pipe_end_without_a_traceback(tmp_path):
    path = tmp_path / "ckpt.pt"
    model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=259, max_seq_len=4096))
    torch.save({"model": model.state_dict(), "model_args": model.args.as_dict()}, path)
    for stop in (lambda told: told.send_signal(signal.SIGINT), lambda told: told.stdout.close()):
        told = start("sample.py", f"--checkpoint={path}", "--max_new_tokens=0", "--num_samples=50")
        assert told.stdout.read(3)
        stop(told)
        said = told.stderr.read()
        assert told.wait(timeout=60) in (1, 130) and "Traceback" not in said, said
