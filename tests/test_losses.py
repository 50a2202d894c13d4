"""The objectives against an unfused, slow, obviously correct reference, gradients included."""

import math

import pytest
import torch
from conftest import ROOT

import losses
from configurator import configure
from losses import Objective, all_losses, heads_in_curriculum, loss_weights, position_weights, schedule, valid_positions
from model import FUTURE_HEADS, ModelArgs, Readout, Transformer
from settings import Settings, check
from step import chunks, kernels
from text.letters import ALPHABETS, Letters, Prefixes, alphabet_size

BOS = 1


@pytest.fixture(params=["whole", "chunks", "kernels"])
def objective_of(request, monkeypatch):
    """objective_of(logits, bos): with whole logits, in chunks of four positions, and in kernels.c."""
    if request.param != "whole":
        for module in (losses, kernels):
            monkeypatch.setattr(module, "chunk_rows", lambda *_: 4)

    def make(logits, bos=None, shared=False, others=None, **options):
        fast = request.param == "kernels"
        if fast:
            logits, others = [t.float() for t in logits], {k: t.float() for k, t in (others or {}).items()}
        return Objective(Table(logits, shared, **others or {}), bos, kernels if fast else None, **options)

    return make


def total_of(objective, x, y, weights: dict[str, float], counts: dict | None = None, answers=None, sample=None
             ) -> tuple[torch.Tensor, dict]:
    """What a step's forward returns; counts: of the whole iteration, where x and y are a part of it."""
    targets = objective.targets(y, tuple(weights), answers, sample)
    counts = counts or valid_counts(targets)
    counts = torch.stack([counts[name] for name in weights])
    return objective(x, targets, position_weights(torch.tensor(list(weights.values())), counts))


def valid_counts(targets) -> dict[str, torch.Tensor]:
    return {name: target.valid.sum() for name, target in targets.items()}


def learn(objective, x, y, weights: dict[str, float], answers=None, sample=None) -> dict:
    """One step's gradients and losses."""
    total, found = total_of(objective, x, y, weights, answers=answers, sample=sample)
    total.backward()
    assert total.item() == pytest.approx(sum(weights[name] * loss.mean.item() for name, loss in found.items()))
    return found


class Table(torch.nn.Module):
    """A stand-in for a model whose logits are free parameters: logits[i] is (B, T, V) for head i, and by name."""

    def __init__(self, logits: list[torch.Tensor], shared: bool = False, **others: torch.Tensor):
        super().__init__()
        self.tables = torch.nn.ParameterList(torch.nn.Parameter(t.clone()) for t in logits)
        self.others = torch.nn.ParameterDict({k: torch.nn.Parameter(t.clone()) for k, t in others.items()})
        self.shared_head, self.read = shared, set()
        self.tok_embeddings = torch.nn.Embedding(logits[0].shape[-1], 4)

    def trunk(self, x):
        return x

    def readouts(self, x, h, heads, rows):
        self.read.update(heads)
        logits = {i: self.others[i] if isinstance(i, str) else self.tables[0 if self.shared_head else i] for i in heads}
        logits = {i: t if i == 0 else t[:rows] for i, t in logits.items()}
        return {i: Readout(t, torch.eye(t.shape[-1], dtype=t.dtype)) for i, t in logits.items()}


def random_case(n: int, boundaries: bool, B=3, T=9, V=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(2, V, (B, T + 1), generator=g)
    if boundaries:
        x[torch.rand(B, T + 1, generator=g) < 0.25] = BOS
    logits = [torch.randn(B, T, V, generator=g, dtype=torch.float64) * 2 for _ in range(n + 1)]
    return x[:, :-1], x[:, 1:], logits


def slow_losses(x, y, tables, n: int, masked: bool, sample: int | None = None) -> dict:
    """Straight from the definitions, one position and one token at a time; {name: (mean, count)}.

    sample: the rows on which future heads have losses; None: all.
    """
    B, T = x.shape

    def log_softmax(v):
        return v - torch.log(torch.exp(v).sum())

    def target_in_same_document(b, t, i):
        return not any(int(x[b, s]) == BOS for s in range(t + 1, t + i + 1))

    terms = {name: [] for name in all_losses(n)}
    for b in range(B):
        for t in range(T):
            terms["ntp"].append(-log_softmax(tables[0][b, t])[y[b, t]])
            for i in range(1, n + 1 if b in range(B)[:sample] else 1):
                if t + i >= T or (masked and not target_in_same_document(b, t, i)):
                    continue
                log_q = log_softmax(tables[i][b, t])
                terms[f"nitp_{i}"].append(-log_q[y[b, t + i]])
                log_p = log_softmax(tables[0][b, t + i].detach())
                kl = sum(torch.exp(log_p[v]) * (log_p[v] - log_q[v]) for v in range(len(log_q)))
                terms[f"consistency_{i}"].append(kl)
    return {name: (sum(ts) / len(ts) if ts else torch.tensor(0.0), len(ts)) for name, ts in terms.items()}


@pytest.mark.parametrize("boundaries,masked", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("n,sample", [(1, None), (2, None), (3, None), (4, None), (1, 2), (4, 1)])
def test_losses_and_gradients_equal_the_slow_reference(n, sample, boundaries, masked, objective_of):
    x, y, logits = random_case(n, boundaries, seed=n)
    weights = {name: 0.3 + 0.1 * k for k, name in enumerate(all_losses(n))}  # all different: a swap shows

    fast = objective_of(logits, bos=BOS if masked else None)
    got = learn(fast, x, y, weights, sample=sample)

    slow = [t.clone().requires_grad_() for t in logits]
    want = slow_losses(x, y, slow, n, masked, sample)
    sum(weights[name] * mean for name, (mean, _) in want.items()).backward()

    assert list(got) == list(all_losses(n)) == list(fast.evaluate(x, y, all_losses(n))[0])[: 2 * n + 1]
    for name, (mean, count) in want.items():
        assert got[name].count.item() == count, name
        assert got[name].mean.item() == pytest.approx(mean.item(), rel=1e-5), name  # float32 against float64
    for i in range(n + 1):
        torch.testing.assert_close(fast.model.tables[i].grad.double(), slow[i].grad, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------------------------------
# the others, each against its definition

TEXTS = [b"", b"", b"", b" a", b"Bc", b"d.", b"\xc3\xa9", b"efG"]  # of tokens 0..7
GROWING = [b"", b"", b"a", b" a", b"an", b" ant", b" an", b"and"]
BEGIN_WITH = {4: 2, 5: 6, 6: 3, 7: 4}  # the longest token that each of them begins with


def agrees(objective, x, y, weights: dict[str, float], slow: list[torch.Tensor], want: dict[str, list],
           answers=None, sample=None) -> None:
    """Losses and gradients of `objective` are those of the terms `want`, {loss: [a scalar for each valid position]}.

    slow: copies of the objective's parameters, of which the terms are made.
    """
    got = learn(objective, x, y, weights, answers, sample)
    sum(weights[name] * sum(terms) / len(terms) for name, terms in want.items()).backward()
    for name, terms in want.items():
        assert got[name].count.item() == len(terms), name
        assert got[name].mean.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5), name
    mine = [*objective.model.tables, *objective.model.others.values()]
    for a, b in zip(mine, slow, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a.grad is None else a.grad.double(),
                                   torch.zeros_like(b) if b.grad is None else b.grad, rtol=1e-4, atol=1e-7)


def copies(*tables: torch.Tensor) -> list[torch.Tensor]:
    return [t.double().clone().requires_grad_() for t in tables]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
def test_consistency_in_each_direction(direction, temperature, objective_of):
    x, y, logits = random_case(2, True, seed=3)
    slow = copies(*logits)
    want = {"ntp": [], "consistency_1": [], "consistency_2": []}
    for b in range(3):
        for t in range(9):
            want["ntp"].append(-slow[0][b, t].log_softmax(0)[y[b, t]])
            for i in (1, 2):
                if t + i < 9 and BOS not in y[b, t : t + i].tolist():
                    p = (slow[0][b, t + i].detach() / temperature).softmax(0)
                    q = (slow[i][b, t] / temperature).softmax(0)
                    m = (p + q) / 2
                    kl = {"forward": p * (p / q).log(), "reverse": q * (q / p).log(),
                          "js": (p * (p / m).log() + q * (q / m).log()) / 2}[direction]
                    want[f"consistency_{i}"].append(kl.sum() * temperature**2)
    objective = objective_of(logits, BOS, consistency=(direction, temperature))
    agrees(objective, x, y, {"ntp": 1.0, "consistency_1": 0.7, "consistency_2": 0.4}, slow, want)


@pytest.mark.parametrize("masked", [False, True])
def test_the_control_has_the_teacher_that_has_not_seen_more(masked, objective_of):
    x, y, logits = random_case(2, True, seed=3)
    slow = copies(*logits)
    want = {"ntp": [-slow[0][b, t].log_softmax(0)[y[b, t]] for b in range(3) for t in range(9)],
            "nitp_2": [], "consistency_1": [], "consistency_2": []}
    for b in range(3):
        for t in range(9):
            for i in (1, 2):
                if t + i < 9 and not (masked and BOS in y[b, t : t + i].tolist()):
                    log_p, log_q = slow[0][b, t].detach().log_softmax(0), slow[i][b, t].log_softmax(0)
                    want[f"consistency_{i}"].append((log_p.exp() * (log_p - log_q)).sum())
                    if i == 2:
                        want["nitp_2"].append(-log_q[y[b, t + 2]])
    objective = objective_of(logits, BOS if masked else None, teacher="same")
    agrees(objective, x, y, {"ntp": 1.0, "nitp_2": 0.3, "consistency_1": 0.7, "consistency_2": 0.4}, slow, want)
    usual = objective_of(logits, BOS if masked else None)
    for i in (1, 2):  # what evaluations report of agreement is of the later teacher in either case
        kl = [o.evaluate(x, y, (), 2)[0][f"kl_{i}"].mean.item() for o in (objective, usual)]
        assert kl[0] == kl[1]


def test_the_first_study_sums_reverse_kl_at_the_same_position_over_the_row(objective_of):
    """Its code: F.kl_div with reduction="batchmean" of (B, T - 1, V), so a sum over positions; weights are equal."""
    x, y, logits = random_case(1, False, seed=9)
    weight, T = 0.01, x.shape[1]
    slow = copies(*logits)
    z, a = (t.log_softmax(-1) for t in slow)
    ntp = torch.nn.functional.cross_entropy(slow[0].flatten(0, 1), y.flatten())
    nitp = torch.nn.functional.cross_entropy(slow[1][:, :-1].flatten(0, 1), y[:, 1:].flatten())
    consistency = torch.nn.functional.kl_div(z[:, :-1].detach(), a[:, :-1], log_target=True, reduction="batchmean")
    (ntp + weight * nitp + weight * consistency).backward()
    s = configure(Settings, [str(ROOT / "config/first_study/both.py"), f"--max_seq_len={T}", "--vocab_size=7"])
    weights = loss_weights(s, 0.0)
    assert weights["consistency_1"] == pytest.approx(weight * 511)  # 5.11 per position, at its T of 512
    weights["consistency_1"] *= (T - 1) / 511  # at the T of this test
    objective = objective_of(logits, teacher=s.consistency_teacher,
                             consistency=(s.consistency_direction, s.consistency_temperature))
    got = learn(objective, x, y, weights)
    total = sum(weights[name] * loss.mean.item() for name, loss in got.items())
    assert total == pytest.approx((ntp + weight * (nitp + consistency)).item(), rel=1e-5)
    for mine, reference in zip(objective.model.tables, slow, strict=True):
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_a_shared_head_is_the_next_token_head_asked_for_later_tokens(masked, objective_of):
    x, y, logits = random_case(0, True, seed=4)
    slow = copies(*logits)
    want = {name: [] for name in ("ntp", "nitp_1", "nitp_2", "consistency_1")}
    for b in range(3):
        for t in range(9):
            log_q = slow[0][b, t].log_softmax(0)
            for i, name in enumerate(("ntp", "nitp_1", "nitp_2")):
                if t + i < 9 and not (masked and BOS in y[b, t : t + i].tolist()):
                    want[name].append(-log_q[y[b, t + i]])
                    if i == 1:
                        p = slow[0][b, t + 1].detach().softmax(0)
                        want["consistency_1"].append((p * (p.log() - log_q)).sum())
    objective = objective_of(logits, BOS if masked else None, shared=True)
    agrees(objective, x, y, {"ntp": 1.0, "nitp_1": 0.5, "nitp_2": 0.25, "consistency_1": 0.3}, slow, want)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [1, 4, 20])
def test_order_ranks_tokens_by_how_soon_they_come(window, masked, objective_of):
    x, y, logits = random_case(1, True, seed=5)
    order = logits.pop()
    slow = copies(*logits, order)
    terms = []
    for b in range(3):
        for t in range(9):
            nearest = {}  # token: distance
            for d, token in enumerate(y[b, t : t + window].tolist()):
                nearest.setdefault(token, d)
                if masked and token == BOS:
                    break
            total = sum(math.exp(-d) for d in nearest.values())
            log_q = slow[1][b, t].log_softmax(0)
            terms.append(-sum(math.exp(-d) / total * log_q[token] for token, d in nearest.items()))
    objective = objective_of(logits, BOS if masked else None, others={"order": order}, order_window=window)
    agrees(objective, x, y, {"order": 0.8}, slow, {"order": terms})


def test_soft_targets_are_shared_by_neighbours(objective_of):
    x, y, logits = random_case(0, False, seed=6)
    objective = objective_of(logits, neighbours=(3, 0.2))
    objective.refresh_neighbours()
    unit = objective.model.tok_embeddings.weight.detach()
    unit = unit / unit.norm(dim=1, keepdim=True)
    slow = copies(*logits)
    want = {"ntp": [], "soft": []}
    for b in range(3):
        for t in range(9):
            log_q, cosine = slow[0][b, t].log_softmax(0), unit @ unit[y[b, t]]
            near = sorted(range(7), key=lambda v: -cosine[v])[:3]
            assert near[0] == y[b, t]
            shares = (cosine[near] / 0.2).softmax(0)
            want["ntp"].append(-log_q[y[b, t]])
            want["soft"].append(-sum(share * log_q[v] for share, v in zip(shares, near, strict=True)))
    agrees(objective, x, y, {"ntp": 1.0, "soft": 0.5}, slow, want)


def test_the_token_that_a_token_begins_with():
    byte_tokens = [b"", b"", b"", *(bytes([b]) for b in range(256))]  # of every SentencePiece vocabulary
    pieces = [b" ", b"a", b"t", b" t", b" th", b" there", b" the", b"\xc3\xa9", b"t\xc3\xa9", b"there", b"\xc3\xa9t"]
    ids = {text: 259 + k for k, text in enumerate(pieces)}
    want = {b" t": b" ", b" th": b" t", b" the": b" th", b" there": b" the", b"t\xc3\xa9": b"t", b"there": b"t",
            b"\xc3\xa9t": b"\xc3\xa9"}
    classes, known = Prefixes(byte_tokens + pieces).of(torch.arange(259 + len(pieces))[None])
    assert not known[0, :259].any() and known.sum() == len(want) + 1
    for text, i in ids.items():
        expected = ids[want[text]] if text in want else 3 + 0xC3 if text == b"\xc3\xa9" else None  # a byte alone
        assert (classes[0, i].item() if known[0, i] else None) == expected, text
    with pytest.raises(ValueError, match="prefix_weight: none of 259 tokens begins with another"):
        Prefixes(byte_tokens)


def test_prefixes_are_targets_of_the_next_token_head(objective_of):
    x, y, logits = random_case(0, True, B=4, V=8, seed=11)
    slow = copies(*logits)
    want = {"ntp": [], "prefix": []}
    for b in range(4):
        for t in range(9):
            log_q = slow[0][b, t].log_softmax(0)
            want["ntp"].append(-log_q[y[b, t]])
            if y[b, t].item() in BEGIN_WITH:
                want["prefix"].append(-log_q[BEGIN_WITH[y[b, t].item()]])
    assert 5 < len(want["prefix"]) < 31
    agrees(objective_of(logits, BOS, prefixes=Prefixes(GROWING)), x, y, {"ntp": 1.0, "prefix": 0.25}, slow, want)


def test_all_tokens_as_even_neighbours_are_label_smoothing(objective_of):
    x, y, logits = random_case(0, False)
    objective = objective_of(logits, neighbours=(7, 1e8))
    objective.refresh_neighbours()
    epsilon = 0.2
    total, _ = total_of(objective, x, y, {"ntp": 1 - epsilon, "soft": epsilon})
    want = torch.nn.functional.cross_entropy(logits[0].flatten(0, 1), y.flatten(), label_smoothing=epsilon)
    assert total.item() == pytest.approx(want.item(), rel=1e-5)


def test_neighbours_are_looked_up_when_asked_and_not_before():
    objective = Objective(Table([torch.randn(1, 4, 7)]), neighbours=(2, 0.1))
    objective.refresh_neighbours()
    before = objective.soft_classes.clone(), objective.soft_shares.clone()
    with torch.no_grad():
        objective.model.tok_embeddings.weight.normal_()
    assert torch.equal(before[0], objective.soft_classes)
    objective.refresh_neighbours()
    assert not torch.equal(before[1], objective.soft_shares)


@pytest.mark.parametrize("case", ["true", "lower", "upper"])
@pytest.mark.parametrize("masked", [False, True])
def test_spelling_asks_for_the_letters_of_the_text_that_follows(masked, case, objective_of):
    x, y, logits = random_case(0, True, V=8, seed=7)
    m, size = 3, alphabet_size(case)
    heads = torch.randn(3, 9, m * size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slow = copies(*logits, heads)
    fold = {"true": lambda c: c, "lower": str.lower, "upper": str.upper}[case]
    want = {f"spelling_{j}": [] for j in range(1, m + 1)}
    for b in range(3):
        for t in range(9):
            text = "".join(TEXTS[v].decode("latin-1") or "\0" for v in y[b, t:].tolist())  # \0: a document ends
            for j in range(m):
                if j < len(text) and not (masked and "\0" in text[:j]):
                    letter = fold(text[j]) if text[j] < "\x80" else text[j]
                    known = ALPHABETS[case].find(letter)
                    target = 1 if letter == "\0" else known + 2 if known >= 0 else 0
                    want[f"spelling_{j + 1}"].append(-slow[1][b, t, j * size : (j + 1) * size].log_softmax(0)[target])
    objective = objective_of(logits, BOS if masked else None, others={"spelling": heads},
                             letters=(Letters(TEXTS, case), m))
    agrees(objective, x, y, {name: 0.3 + 0.2 * k for k, name in enumerate(want)}, slow, want)


def test_lower_and_upper_case_ask_for_the_same_letters():
    """Only the names of the classes differ: one objective, apart from initial weights."""
    y = torch.randint(0, 8, (2, 9))
    (lower, known), (upper, _) = (Letters(TEXTS, case).ahead(y, 4, None) for case in ("lower", "upper"))
    assert torch.equal(lower[known], upper[known])


@pytest.mark.parametrize("s", [2, 3, 9])
def test_superposition_asks_for_the_next_bag(s, objective_of):
    x, y, _ = random_case(0, False, T=9 if s != 2 else 10, seed=8)
    bags = x.shape[1] // s
    logits = [torch.randn(3, bags, 7, dtype=torch.float64)]
    slow = copies(*logits)
    terms = []
    for b in range(3):
        for p in range(bags - 1):
            log_q = slow[0][b, p].log_softmax(0)
            terms.append(-sum(log_q[v] for v in x[b, (p + 1) * s : (p + 2) * s].tolist()) / s)
    objective = objective_of(logits, BOS, bag=s)
    if terms:
        agrees(objective, x, y, {"superposition": 1.0}, slow, {"superposition": terms})
    else:  # one bag has none after it
        assert learn(objective, x, y, {"superposition": 1.0})["superposition"].mean.item() == 0


@pytest.mark.parametrize("kind", ["own heads", "same teacher", "shared head"])
@pytest.mark.parametrize("masked,sample", [(False, None), (True, None), (True, 2)])
def test_only_tokens_of_answers_are_targets(masked, sample, kind, objective_of):
    """Every loss, by a slow mask: a term is left out, or a share of it, where its target is no token of an answer.

    With a sample only losses on the NTP head's own logits have terms outside of it.
    """
    x, y, logits = random_case(2, True, B=4, V=8, seed=9)
    answers = torch.rand(4, 9, generator=torch.Generator().manual_seed(9)) < 0.5
    answers[2], answers[3] = False, True  # a row without an answer, and one that is nothing else
    is_answer, window, m, size = answers.tolist(), 4, 3, alphabet_size("lower")
    order = torch.randn(4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    letters = torch.randn(4, 9, m * size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    shared = kind == "shared head"
    if shared:
        del logits[1:]
    objective = objective_of(logits, BOS if masked else None, shared, {"order": order, "spelling": letters},
                             teacher="same" if kind == "same teacher" else "later", order_window=window,
                             letters=(Letters(TEXTS, "lower"), m), neighbours=(3, 0.2), prefixes=Prefixes(GROWING))
    objective.refresh_neighbours()
    slow = copies(*logits, order, letters)
    heads = [slow[0]] * 3 if shared else slow[:3]
    want = {name: [] for name in all_losses(2, m, order=True, soft=True, prefix=True)}
    for b in range(4):
        sampled = b in range(4)[:sample]
        for t in range(9):
            log_q = slow[0][b, t].log_softmax(0)
            if is_answer[b][t]:
                want["ntp"].append(-log_q[y[b, t]])
                classes, shares = objective.soft_classes[y[b, t]], objective.soft_shares[y[b, t]]
                want["soft"].append(-sum(share * log_q[v] for share, v in zip(shares.tolist(), classes.tolist())))
                if y[b, t].item() in BEGIN_WITH:
                    want["prefix"].append(-log_q[BEGIN_WITH[y[b, t].item()]])
            for i in (1, 2):
                if t + i < 9 and is_answer[b][t + i] and not (masked and BOS in y[b, t : t + i].tolist()):
                    log_q = heads[i][b, t].log_softmax(0)
                    teacher = slow[0][b, t if kind == "same teacher" else t + i].detach().log_softmax(0)
                    if sampled or shared:
                        want[f"nitp_{i}"].append(-log_q[y[b, t + i]])
                    if sampled:
                        want[f"consistency_{i}"].append((teacher.exp() * (teacher - log_q)).sum())
            if not sampled:
                continue
            nearest, text = {}, []  # token: distance; (letter, is it of an answer?)
            for d, token in enumerate(y[b, t : t + window].tolist()):
                if is_answer[b][t + d]:
                    nearest.setdefault(token, d)
                if masked and token == BOS:
                    break
            if nearest:
                log_q, total = slow[-2][b, t].log_softmax(0), sum(math.exp(-d) for d in nearest.values())
                want["order"].append(-sum(math.exp(-d) / total * log_q[v] for v, d in nearest.items()))
            for d, token in enumerate(y[b, t:].tolist()):
                text += [(letter, is_answer[b][t + d]) for letter in TEXTS[token].decode("latin-1") or "\0"]
            for j, (letter, counts) in enumerate(text[:m]):
                if counts and not (masked and any(c == "\0" for c, _ in text[:j])):
                    known = ALPHABETS["lower"].find(letter.lower() if letter < "\x80" else letter)
                    target = 1 if letter == "\0" else known + 2 if known >= 0 else 0
                    want[f"spelling_{j + 1}"].append(-slow[-1][b, t, j * size : (j + 1) * size].log_softmax(0)[target])
    weights = {name: 0.3 + 0.1 * k for k, name in enumerate(want)}
    agrees(objective, x, y, weights, slow, want, answers, sample)
    got = objective.evaluate(x, y, ("ntp",), 2, answers)[0]
    assert got["ntp"].count == got["acc_0"].count == len(want["ntp"])
    if sample is None:
        assert got["kl_2"].count == got["agree_2"].count == len(want["nitp_2"])


def test_a_bag_is_shared_by_its_tokens_of_answers(objective_of):
    x, y, _ = random_case(0, False, T=9, seed=8)
    answers = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    logits = [torch.randn(3, 3, 7, dtype=torch.float64)]
    slow = copies(*logits)
    terms = []
    for b in range(3):
        for p in range(2):
            bag = [y[b, t] for t in range((p + 1) * 3 - 1, (p + 2) * 3 - 1) if answers[b, t]]
            if bag:
                terms.append(-sum(slow[0][b, p].log_softmax(0)[v] for v in bag) / len(bag))
    assert 0 < len(terms) < 6
    agrees(objective_of(logits, bag=3), x, y, {"superposition": 1.0}, slow, {"superposition": terms}, answers)


def test_without_any_answer_nothing_is_learnt_and_no_loss_is_nan(objective_of):
    y = torch.randint(2, 8, (2, 6))
    others = {"order": torch.randn(2, 6, 8), "spelling": torch.randn(2, 6, 4 * alphabet_size("lower"))}
    objective = objective_of([torch.randn(2, 6, 8) for _ in range(4)], BOS, others=others, **OPTIONS)
    objective.refresh_neighbours()
    got = learn(objective, y, y, dict.fromkeys(EVERY, 1.0), torch.zeros(2, 6, dtype=torch.bool))
    assert all(loss.count == 0 and loss.mean == 0 for loss in got.values())
    assert all(t.grad is None or not t.grad.any() for t in objective.model.parameters())


def test_a_guess_agrees_with_the_head_that_has_seen_more(objective_of):
    """agree_i compares head i at t with the NTP head at t+i, whatever the target is; kl_i is forward KL."""
    x, y, logits = random_case(2, False)
    logits[1][:, :-1] = 5 * logits[0][:, 1:]
    logits[2][:, :-2] = -logits[0][:, 2:]
    objective = objective_of(logits, consistency=("reverse", 2.0))
    got = objective.evaluate(x, y, ("ntp",), 2)[0]
    assert got["agree_1"].mean.item() == 1 and got["agree_2"].mean.item() == 0 and got["acc_1"].mean.item() < 1
    log_p, log_q = logits[0][:, 1:].log_softmax(-1), logits[1][:, :-1].log_softmax(-1)
    want = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert got["kl_1"].mean.item() == pytest.approx(want.item(), rel=1e-5)


OPTIONS = {"order_window": 30, "bag": 2, "neighbours": (2, 1.0), "letters": (Letters(TEXTS, "lower"), 4)}
EVERY = ("ntp", "order", "soft", "spelling_1", "spelling_4", "nitp_3", "consistency_3")


@pytest.mark.parametrize("T,row", [(1, None), (2, None), (6, BOS), (6, 7)])
def test_rows_that_are_short_or_all_document_starts_give_numbers(T, row, objective_of):
    """More letters and tokens ahead than the row has, and rows in which every document ends at once."""
    y = torch.randint(2, 8, (2, T)) if row is None else torch.full((2, T), row)
    others = {"order": torch.randn(2, T, 8), "spelling": torch.randn(2, T, 4 * alphabet_size("lower"))}
    objective = objective_of([torch.randn(2, T, 8) for _ in range(4)], BOS, others=others, **OPTIONS)
    objective.refresh_neighbours()
    got = learn(objective, y, y, dict.fromkeys(EVERY, 1.0))
    if row == BOS:
        assert [got[name].count.item() for name in ("spelling_4", "nitp_3", "spelling_1")] == [0, 0, 2 * T]
    for loss in got.values():
        assert math.isfinite(loss.mean.item()) and (loss.count.item() > 0 or loss.mean.item() == 0)
    for t in objective.model.parameters():
        assert t.grad is None or torch.isfinite(t.grad).all()


def test_a_perfect_student_has_no_consistency_loss(objective_of):
    """Head i has at t the logits of the NTP head at t+i: tests the shift without a reference."""
    x, y, logits = random_case(2, False)
    for i in (1, 2):
        logits[i][:, :-i] = logits[0][:, i:]
    got = objective_of(logits).evaluate(x, y, ("consistency_1", "consistency_2"))[0]
    assert got["consistency_1"].mean.item() == pytest.approx(0, abs=1e-6)
    assert got["consistency_2"].mean.item() == pytest.approx(0, abs=1e-6)


def test_consistency_is_forward_kl_and_its_teacher_is_detached(objective_of):
    """KL(teacher || student) by hand on one position: teacher (.9, .1), student (.5, .5)."""
    teacher, student = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    tables = [torch.stack([torch.zeros(2), teacher])[None], torch.stack([student, torch.zeros(2)])[None]]
    objective = objective_of(tables)
    loss = learn(objective, torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), {"consistency_1": 1.0})["consistency_1"]
    assert loss.count.item() == 1  # t = 1 has no teacher
    assert loss.mean.item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-5)
    assert objective.model.tables[0].grad is None or objective.model.tables[0].grad.abs().sum() == 0
    assert objective.model.tables[1].grad.abs().sum() > 0


def test_each_loss_reaches_its_own_head_and_nothing_else(objective_of):
    x, y, logits = random_case(3, False)
    for name in all_losses(3):
        objective = objective_of(logits)
        learn(objective, x, y, {name: 1.0})
        head = 0 if name == "ntp" else int(name[-1])
        reached = [i for i, t in enumerate(objective.model.tables) if t.grad is not None and t.grad.abs().sum() > 0]
        assert reached == [head], name


def test_a_head_that_no_loss_asks_for_is_not_run():
    x, y, logits = random_case(3, False)
    objective = Objective(Table(logits))
    total_of(objective, x, y, {"ntp": 1.0, "nitp_2": 1.0})
    assert objective.model.read == {0, 2}


@pytest.mark.parametrize("n,T", [(3, 3), (5, 2), (1, 1)])
def test_no_valid_target_gives_zero_not_nan(n, T, objective_of):
    x, y, logits = random_case(n, False, T=T)
    objective = objective_of(logits)
    got = objective.evaluate(x, y, all_losses(n), n)[0]
    for kind in ("nitp", "consistency", "acc"):
        for i in range(1, n + 1):
            loss = got[f"{kind}_{i}"]
            assert (loss.count.item() > 0) == (i < T)
            assert math.isfinite(loss.mean.item()) and (i < T or loss.mean.item() == 0)
    learn(objective, x, y, dict.fromkeys(all_losses(n), 1.0))
    assert all(torch.isfinite(t.grad).all() for t in objective.model.tables if t.grad is not None)


def test_a_row_that_is_all_document_starts_has_no_future_target(objective_of):
    y = torch.full((2, 6), BOS)
    assert valid_positions(y, 0, BOS).all()
    assert not valid_positions(y, 1, BOS).any()
    x, y, logits = y, y, [torch.randn(2, 6, 5) for _ in range(2)]
    got = objective_of(logits, bos=BOS).evaluate(x, y, all_losses(1))[0]
    assert got["nitp_1"].mean.item() == 0 and got["consistency_1"].mean.item() == 0 and got["ntp"].count.item() == 12


def test_an_infinite_loss_at_a_masked_position_does_not_leak():
    x, y, logits = random_case(1, False)
    y[0, 0] = BOS  # masks position 0 for head 1
    logits[1][0, 0] = float("-inf")
    logits[1][0, 0, 3] = 0.0
    got = Objective(Table(logits), bos=BOS).evaluate(x, y, ("nitp_1",))[0]
    assert math.isfinite(got["nitp_1"].mean.item())


def test_statistics_are_float32_under_half_precision():
    """A softmax in bfloat16 over 3,000 equal logits is off by far more than this."""
    V = 3000
    logits = [torch.zeros(1, 4, V, dtype=torch.bfloat16) for _ in range(2)]
    x = y = torch.zeros(1, 4, dtype=torch.long)
    for name, loss in total_of(Objective(Table(logits)), x, y, dict.fromkeys(all_losses(1), 1.0))[1].items():
        assert loss.mean.dtype == torch.float32
        assert loss.mean.item() == pytest.approx(0.0 if name == "consistency_1" else math.log(V), abs=1e-5)


def test_chunks_of_an_evaluation_keep_no_graph(monkeypatch):
    """A parameter's gradient needs no place there, and no chunk's logits are kept for it."""
    monkeypatch.setattr(losses, "chunk_rows", lambda *_: 7)
    kept, of_rows = [], chunks.losses_of_rows

    def watched(targets, weights, features, weight, *more):
        kept.append(torch.is_grad_enabled() or features.requires_grad or weight.requires_grad)
        return of_rows(targets, weights, features, weight, *more)

    monkeypatch.setattr(chunks, "losses_of_rows", watched)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=30, n_future_heads=2))
    objective = Objective(model)
    x, y = torch.randint(30, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    objective.evaluate(x, y, ("ntp", "nitp_1", "consistency_2"), 2)
    assert len(kept) > 3 and not any(kept)
    total_of = objective(x, objective.targets(y, ("ntp", "nitp_1")), torch.ones(2))[0]
    assert total_of.requires_grad and kept[-1]


def test_chunks_keep_gradients_that_float16_would_lose(monkeypatch):
    """A GradScaler's factor comes after the chunks have made theirs."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=2000, n_future_heads=1))
    x, y = torch.randint(0, 2000, (2, 8, 256))
    found = []
    for rows, half in ((None, False), (256, True)):
        monkeypatch.setattr(losses, "chunk_rows", lambda *_, rows=rows: rows)
        model.zero_grad()
        objective, weights = Objective(model), {"ntp": 1.0, "consistency_1": 1.0}
        with torch.autocast("cpu", torch.float16, enabled=half):
            total, _ = total_of(objective, x, y, weights)
        (total * 65536).backward()
        found.append(model.norm.weight.grad / 65536)
    assert (found[1] - found[0]).norm() < 0.01 * found[0].norm()


def test_accuracy_is_top_1_of_each_head_at_its_own_target(objective_of):
    x, y, logits = random_case(2, False)
    for i in range(3):
        length = y.shape[1] - i
        logits[i].zero_()
        logits[i][:, :length].scatter_(2, y[:, i:, None], 1.0)
    logits[2][0] = -logits[2][0]  # a third of head 2's rows always wrong
    got = objective_of(logits).evaluate(x, y, ("nitp_1", "nitp_2"), 2)[0]
    assert got["acc_0"].mean.item() == 1 and got["acc_1"].mean.item() == 1
    assert got["acc_2"].mean.item() == pytest.approx(2 / 3)


def test_micro_batches_add_up_to_the_whole_batch(objective_of):
    """Also where document ends leave them unequal numbers of targets."""
    x, y, logits = random_case(2, True, B=4, seed=5)
    y[0] = BOS  # a micro-batch nearly without future targets
    names = all_losses(2)
    weights = {name: 0.5 + 0.2 * k for k, name in enumerate(names)}

    whole = objective_of(logits, bos=BOS)
    learn(whole, x, y, weights)
    parts = objective_of(logits, bos=BOS)
    counts = valid_counts(parts.targets(y, names))
    for rows in (slice(0, 1), slice(1, 4)):
        part = Objective(SimpleRows(parts.model, rows), BOS, parts.kernels)
        total_of(part, x[rows], y[rows], weights, counts)[0].backward()
    for a, b in zip(whole.model.tables, parts.model.tables, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("with_kernels", [None, kernels])
@pytest.mark.parametrize("head", FUTURE_HEADS)
def test_a_sample_of_rows_is_unbiased(head, with_kernels, monkeypatch):
    """The mean gradient over all samples of one row is that of all rows, of which each has as many targets."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=50, n_future_heads=2,
                                  head=head, order_window=3))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() < 2 else 0.0, 0.2)
    monkeypatch.setattr(losses, "chunk_rows", lambda *_: 13 if with_kernels else None)
    objective = Objective(model, None, with_kernels, order_window=3)
    x, y = torch.randint(0, 50, (2, 4, 10))
    weights = {name: 0.5 + 0.3 * k for k, name in enumerate(all_losses(2, order=True))}

    def gradients(x, y, sample) -> torch.Tensor:
        model.zero_grad()
        learn(objective, x, y, weights, sample=sample)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradients(x, y, None)
    sampled = torch.stack([gradients(x.roll(r, 0), y.roll(r, 0), 1) for r in range(4)])
    assert ((sampled - whole).norm(dim=1) > 0.02 * whole.norm()).all()  # each is of other positions
    torch.testing.assert_close(sampled.mean(0), whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    assert torch.equal(gradients(x, y, 4), whole)


def test_heads_run_on_the_sample_only():
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=50, n_future_heads=1,
                                  head="residual"))
    seen = []
    model.future_heads[0].residual.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    x, y = torch.randint(0, 50, (2, 4, 10))
    found = learn(Objective(model), x, y, {"ntp": 1.0, "nitp_1": 0.1}, sample=3)
    assert seen == [3] and found["nitp_1"].count == 27 and found["ntp"].count == 40


@pytest.mark.parametrize("name", all_losses(2))
def test_chunks_equal_the_whole_with_a_real_model(name, monkeypatch):
    """Gradients of trunk and heads, through unembeddings that are tied and shared by several losses."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=300, n_future_heads=2))
    x, y = torch.randint(0, 300, (2, 3, 20))
    results = []
    for rows, with_kernels in ((None, None), (7, None), (7, kernels)):
        monkeypatch.setattr(losses, "chunk_rows", lambda *_, rows=rows: rows)
        model.zero_grad()
        objective = Objective(model, BOS, with_kernels)
        got = objective.evaluate(x, y, ("ntp", name), 2)[0]
        learn(objective, x, y, {"ntp": 1.0} | {name: 0.3})
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*(loss.mean for loss in got.values()), *gradients])
    assert len(results[0]) > 12
    for whole, *others in zip(*results, strict=True):
        for chunked in others:
            torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("with_kernels", [None, kernels])
def test_a_large_vocabulary_never_has_all_its_logits(with_kernels):
    """No tensor of the step, forward or backward, is larger than a chunk, the weights aside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    V, B, T = 20_000, 4, 300

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.shape[-1:] == (V,):
                    self.numel = max(self.numel, t.numel())
            return out

    assert B * T * V > chunks.WHOLE
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=V, n_future_heads=1))
    objective = Objective(model, None, with_kernels)
    x, y = torch.randint(0, V, (2, B, T))
    with Largest() as seen:
        objective.evaluate(x, y, all_losses(1), 1)[0]
        learn(objective, x, y, dict.fromkeys(all_losses(1), 1.0))
    assert 0 < seen.numel == chunks.FEWEST * V < B * T * V / 4


class SimpleRows(torch.nn.Module):
    """Some rows of a Table, sharing its parameters."""

    def __init__(self, table: Table, rows: slice):
        super().__init__()
        self.table, self.rows, self.shared_head = table, rows, table.shared_head

    def trunk(self, x):
        return x

    def readouts(self, x, h, heads, rows):
        whole = self.table.readouts(x, h, heads, None)
        return {i: Readout(r.features[self.rows][: None if i == 0 else rows], r.weight) for i, r in whole.items()}


# ---------------------------------------------------------------------------------------------
# weights

def settings(**changes):
    two_heads = {"n_future_heads": 2, "nitp_weight": 0.4, "consistency_weight": 0.02, "head_decay": 0.5}
    return Settings(**two_heads | changes)


def test_weights_are_independent_and_decay_by_head():
    assert loss_weights(settings(), 0.3) == pytest.approx(
        {"ntp": 1.0, "nitp_1": 0.4, "nitp_2": 0.2, "consistency_1": 0.02, "consistency_2": 0.01})
    assert set(loss_weights(settings(nitp_weight=0.0), 0.3)) == {"ntp", "consistency_1", "consistency_2"}
    assert set(loss_weights(settings(consistency_weight=0.0), 0.3)) == {"ntp", "nitp_1", "nitp_2"}


def test_each_head_may_have_a_weight_of_its_own():
    s = settings(head_decay=1.0, head_weights="1, 0.25")
    check(s)
    assert loss_weights(s, 0.3) == pytest.approx(
        {"ntp": 1.0, "nitp_1": 0.4, "nitp_2": 0.1, "consistency_1": 0.02, "consistency_2": 0.005})
    assert set(loss_weights(settings(head_decay=1.0, head_weights="0,1"), 0.3)) == {"ntp", "nitp_2", "consistency_2"}
    with pytest.raises(ValueError, match="expected one of head_weights and head_decay"):
        check(settings(head_weights="1,0.5"))
    for wrong in ("1", "1,0.5,0.25", "1,x", "1,-1", "1,nan", "1,inf", "0,0", ",", "1;2"):
        with pytest.raises(ValueError, match="head_weights=.*: expected 2 numbers >= 0"):
            check(settings(head_decay=1.0, head_weights=wrong))


def test_a_sample_is_whole_rows_and_fewer_than_all():
    for share, batch, rows in ((1.0, 5, 5), (0.25, 16, 4), (0.07, 100, 7), (0.01, 8, 1), (0.3, 8, 3)):
        s = settings(aux_positions=share, batch_size=batch)
        check(s)
        assert s.aux_rows(s.batch_size) == rows
    for share, batch in ((0.5, 1), (0.9, 8)):
        with pytest.raises(ValueError, match=f"aux_positions={share}: .*all of batch_size={batch}"):
            check(settings(aux_positions=share, batch_size=batch))


def test_a_loss_whose_schedule_has_ended_or_not_begun_is_left_out():
    s = settings(aux_schedule="linear", aux_start=0.2, aux_end=0.6)
    assert set(loss_weights(s, 0.19)) == set(loss_weights(s, 0.6)) == {"ntp"}
    assert loss_weights(s, 0.4)["nitp_1"] == pytest.approx(0.2)


def test_a_curriculum_lets_heads_join_or_leave_in_stages_of_equal_length():
    found = {kind: [heads_in_curriculum(kind, 2, progress) for progress in (0.0, 0.3, 0.34, 0.66, 0.67, 0.99, 1.0)]
             for kind in ("none", "forward", "reverse")}
    assert found == {"none": [2] * 7, "forward": [0, 0, 1, 1, 2, 2, 2], "reverse": [2, 2, 1, 1, 0, 0, 0]}
    assert set(loss_weights(settings(curriculum="forward"), 0.4)) == {"ntp", "nitp_1", "consistency_1"}


def test_other_losses_weigh_what_was_said_and_share_the_schedule():
    s = settings(n_future_heads=0, spelling_letters=2, spelling_weight=0.6, order_weight=0.2, order_window=4,
                 soft_weight=0.1, prefix_weight=0.25, aux_schedule="linear")
    assert loss_weights(s, 0.5) == pytest.approx(
        {"ntp": 1.0, "spelling_1": 0.15, "spelling_2": 0.15, "order": 0.1, "soft": 0.05, "prefix": 0.125})


def test_weights_may_be_divided_by_their_sum():
    s = settings(normalize_weights=True, aux_schedule="linear", aux_end=0.5)
    assert loss_weights(s, 0.0) == pytest.approx(
        {"ntp": 1 / 1.63, "nitp_1": 0.4 / 1.63, "nitp_2": 0.2 / 1.63, "consistency_1": 0.02 / 1.63,
         "consistency_2": 0.01 / 1.63})
    assert loss_weights(s, 0.25)["ntp"] == pytest.approx(1 / 1.315)
    assert loss_weights(s, 0.5) == {"ntp": 1.0}


def test_nothing_else_weighs_while_tokens_are_in_superposition():
    s = settings(superposition=4, superposition_end=0.25)
    assert loss_weights(s, 0.2) == {"superposition": 1.0}
    assert "superposition" not in loss_weights(s, 0.25) and "nitp_1" in loss_weights(s, 0.25)


@pytest.mark.parametrize("kind,start,end,points", [
    ("constant", 0.0, 1.0, {0.0: 1, 0.5: 1, 1.0: 1}),
    ("constant", 0.25, 0.75, {0.0: 0, 0.25: 1, 0.7: 1, 0.75: 0, 1.0: 0}),
    ("linear", 0.0, 1.0, {0.0: 1, 0.25: 0.75, 1.0: 0}),
    ("linear", 0.5, 1.0, {0.4: 0, 0.5: 1, 0.75: 0.5}),
    ("cosine", 0.0, 0.5, {0.0: 1, 0.25: 0.5, 0.125: (1 + math.cos(math.pi / 4)) / 2, 0.5: 0, 0.9: 0}),
])
def test_schedule(kind, start, end, points):
    for progress, factor in points.items():
        assert schedule(kind, start, end, progress) == pytest.approx(factor), progress
