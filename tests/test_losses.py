"""The objectives against an unfused, slow, obviously correct reference, gradients included."""

import math

import pytest
import torch

import kernels
import losses
from losses import Objective, all_losses, loss_weights, scales, schedule, valid_positions
from model import ModelArgs, Readout, Transformer
from settings import Settings

BOS = 1


@pytest.fixture(params=["whole", "chunks", "kernels"])
def objective_of(request, monkeypatch):
    """objective_of(logits, bos): with whole logits, with those of four positions at a time, and those in kernels.c."""
    if request.param != "whole":
        monkeypatch.setattr(losses, "chunk_rows", lambda *_: 4)

    def make(logits, bos=None):
        if request.param == "kernels":
            return Objective(Table([t.float() for t in logits]), bos, kernels)
        return Objective(Table(logits), bos)

    return make


def learn(objective, x, y, weights: dict[str, float]) -> dict:
    """One step's gradients and losses."""
    total, found = objective(x, y, scales(weights, objective.counts(y, tuple(weights))))
    total.backward()
    assert total.item() == pytest.approx(sum(weights[name] * loss.mean.item() for name, loss in found.items()))
    return found


class Table(torch.nn.Module):
    """A stand-in for a model whose logits are free parameters: logits[i] is (B, T, V) for head i."""

    def __init__(self, logits: list[torch.Tensor]):
        super().__init__()
        self.tables = torch.nn.ParameterList(torch.nn.Parameter(t.clone()) for t in logits)
        self.read = set()

    def trunk(self, x):
        return x

    def readouts(self, x, h, heads):
        self.read.update(heads)
        V, dtype = self.tables[0].shape[-1], self.tables[0].dtype
        return {i: Readout(self.tables[i], torch.eye(V, dtype=dtype)) for i in heads}


def random_case(n: int, boundaries: bool, B=3, T=9, V=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(2, V, (B, T + 1), generator=g)
    if boundaries:
        x[torch.rand(B, T + 1, generator=g) < 0.25] = BOS
    logits = [torch.randn(B, T, V, generator=g, dtype=torch.float64) * 2 for _ in range(n + 1)]
    return x[:, :-1], x[:, 1:], logits


def slow_losses(x, y, tables, n: int, masked: bool) -> dict:
    """Straight from the definitions, one position and one token at a time; {name: (mean, count)}."""
    B, T = x.shape

    def log_softmax(v):
        return v - torch.log(torch.exp(v).sum())

    def target_in_same_document(b, t, i):
        return not any(int(x[b, s]) == BOS for s in range(t + 1, t + i + 1))

    terms = {name: [] for name in all_losses(n)}
    for b in range(B):
        for t in range(T):
            terms["ntp"].append(-log_softmax(tables[0][b, t])[y[b, t]])
            for i in range(1, n + 1):
                if t + i >= T or (masked and not target_in_same_document(b, t, i)):
                    continue
                log_q = log_softmax(tables[i][b, t])
                terms[f"nitp_{i}"].append(-log_q[y[b, t + i]])
                log_p = log_softmax(tables[0][b, t + i].detach())
                kl = sum(torch.exp(log_p[v]) * (log_p[v] - log_q[v]) for v in range(len(log_q)))
                terms[f"consistency_{i}"].append(kl)
    return {name: (sum(ts) / len(ts) if ts else torch.tensor(0.0), len(ts)) for name, ts in terms.items()}


@pytest.mark.parametrize("boundaries,masked", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_losses_and_gradients_equal_the_slow_reference(n, boundaries, masked, objective_of):
    x, y, logits = random_case(n, boundaries, seed=n)
    weights = {name: 0.3 + 0.1 * k for k, name in enumerate(all_losses(n))}  # all different: a swap shows

    fast = objective_of(logits, bos=BOS if masked else None)
    got = learn(fast, x, y, weights)

    slow = [t.clone().requires_grad_() for t in logits]
    want = slow_losses(x, y, slow, n, masked)
    sum(weights[name] * mean for name, (mean, _) in want.items()).backward()

    assert list(got) == list(all_losses(n)) == list(fast.evaluate(x, y, all_losses(n)))[: 2 * n + 1]
    for name, (mean, count) in want.items():
        assert got[name].count.item() == count, name
        assert got[name].mean.item() == pytest.approx(mean.item(), rel=1e-5), name  # float32 against float64
    for i in range(n + 1):
        torch.testing.assert_close(fast.model.tables[i].grad.double(), slow[i].grad, rtol=1e-4, atol=1e-7)


def test_a_perfect_student_has_no_consistency_loss(objective_of):
    """Head i that says at t what the NTP head says at t+i: the shift itself, without a reference."""
    x, y, logits = random_case(2, False)
    for i in (1, 2):
        logits[i][:, :-i] = logits[0][:, i:]
    got = objective_of(logits).evaluate(x, y, ("consistency_1", "consistency_2"))
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
    objective(x, y, {"ntp": torch.tensor(1.0), "nitp_2": torch.tensor(1.0)})
    assert objective.model.read == {0, 2}


@pytest.mark.parametrize("n,T", [(3, 3), (5, 2), (1, 1)])
def test_no_valid_target_gives_zero_not_nan(n, T, objective_of):
    x, y, logits = random_case(n, False, T=T)
    objective = objective_of(logits)
    got = objective.evaluate(x, y, all_losses(n), n)
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
    got = objective_of(logits, bos=BOS).evaluate(x, y, all_losses(1))
    assert got["nitp_1"].mean.item() == 0 and got["consistency_1"].mean.item() == 0 and got["ntp"].count.item() == 12


def test_an_infinite_loss_at_a_masked_position_does_not_leak():
    x, y, logits = random_case(1, False)
    y[0, 0] = BOS  # masks position 0 for head 1
    logits[1][0, 0] = float("-inf")
    logits[1][0, 0, 3] = 0.0
    got = Objective(Table(logits), bos=BOS).evaluate(x, y, ("nitp_1",))
    assert math.isfinite(got["nitp_1"].mean.item())


def test_statistics_are_float32_under_half_precision():
    """A softmax in bfloat16 over 3,000 equal logits is off by far more than this."""
    V = 3000
    logits = [torch.zeros(1, 4, V, dtype=torch.bfloat16) for _ in range(2)]
    x = y = torch.zeros(1, 4, dtype=torch.long)
    for name, loss in Objective(Table(logits))(x, y, dict.fromkeys(all_losses(1), torch.tensor(0.25)))[1].items():
        assert loss.mean.dtype == torch.float32
        assert loss.mean.item() == pytest.approx(0.0 if name == "consistency_1" else math.log(V), abs=1e-5)


def test_accuracy_is_top_1_of_each_head_at_its_own_target(objective_of):
    x, y, logits = random_case(2, False)
    for i in range(3):
        length = y.shape[1] - i
        logits[i].zero_()
        logits[i][:, :length].scatter_(2, y[:, i:, None], 1.0)
    logits[2][0] = -logits[2][0]  # a third of head 2's rows always wrong
    got = objective_of(logits).evaluate(x, y, ("nitp_1", "nitp_2"), 2)
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
    counts = parts.counts(y, names)
    for rows in (slice(0, 1), slice(1, 4)):
        part = Objective(SimpleRows(parts.model, rows), BOS, parts.kernels)
        part(x[rows], y[rows], scales(weights, counts))[0].backward()
    for a, b in zip(whole.model.tables, parts.model.tables, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


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
        got = objective.evaluate(x, y, ("ntp", name), 2)
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

    assert B * T * V > losses.WHOLE
    model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=V, n_future_heads=1))
    objective = Objective(model, None, with_kernels)
    x, y = torch.randint(0, V, (2, B, T))
    with Largest() as seen:
        objective.evaluate(x, y, all_losses(1), 1)
        learn(objective, x, y, dict.fromkeys(all_losses(1), 1.0))
    assert 0 < seen.numel == losses.FEWEST * V < B * T * V / 4


class SimpleRows(torch.nn.Module):
    """Some rows of a Table, sharing its parameters."""

    def __init__(self, table: Table, rows: slice):
        super().__init__()
        self.table, self.rows = table, rows

    def trunk(self, x):
        return x

    def readouts(self, x, h, heads):
        return {i: Readout(r.features[self.rows], r.weight) for i, r in self.table.readouts(x, h, heads).items()}


# ---------------------------------------------------------------------------------------------
# weights

def settings(**changes):
    return Settings(**{"n_future_heads": 2, "nitp_weight": 0.4, "consistency_weight": 0.02, "head_decay": 0.5} | changes)


def test_weights_are_independent_and_decay_by_head():
    assert loss_weights(settings(), 0.3) == pytest.approx(
        {"ntp": 1.0, "nitp_1": 0.4, "nitp_2": 0.2, "consistency_1": 0.02, "consistency_2": 0.01})
    assert set(loss_weights(settings(nitp_weight=0.0), 0.3)) == {"ntp", "consistency_1", "consistency_2"}
    assert set(loss_weights(settings(consistency_weight=0.0), 0.3)) == {"ntp", "nitp_1", "nitp_2"}


def test_a_loss_whose_schedule_has_ended_or_not_begun_is_left_out():
    s = settings(aux_schedule="linear", aux_start=0.2, aux_end=0.6)
    assert set(loss_weights(s, 0.19)) == set(loss_weights(s, 0.6)) == {"ntp"}
    assert loss_weights(s, 0.4)["nitp_1"] == pytest.approx(0.2)


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
