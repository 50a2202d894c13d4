"""kernels.c against PyTorch in float64, value by value and gradient by gradient."""

import ctypes
import os
import subprocess

import pytest
import torch
import torch.nn.functional as F
from test_losses import total_of
from torch.autograd import Function

from losses import Objective, all_losses
from model import FUTURE_HEADS, FeedForward, ModelArgs, RMSNorm, Transformer, TransformerBlock, rope_table, rotate
from step import kernels
from text.letters import Letters, alphabet_size

# A product of float32 kernels is as good as float32 can be; one of bfloat16 has 8 bits, and sums of hundreds of those.
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])


def compare(got, want, dtype, scale=1.0):
    """got equals want (float64) up to rounding to dtype; `scale`: of the largest values that were summed."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance["rtol"], atol=tolerance["atol"] * scale)


def leaf(*shape, dtype, seed=0, scale=1.0):
    """Random numbers that dtype holds exactly: one copy for the kernel, one for the float64 reference."""
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    return x.clone().requires_grad_(), x.double().requires_grad_()


# ---------------------------------------------------------------------------------------------
# the trunk's functions, as nodes of a graph of their own

class CausalAttention(Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, n_heads, n_kv_heads, dropout=0.0):
        ctx.shape = kernels.Shape(n_heads, n_kv_heads, dropout, (int(torch.randint(2**62, ())), 0, 0))
        y, log_sum = kernels.attention(qkv, cos, sin, ctx.shape)
        ctx.save_for_backward(qkv, cos, sin, y, log_sum)
        return y

    @staticmethod
    def backward(ctx, dy):
        return kernels.attention_backward(*ctx.saved_tensors, dy.contiguous(), ctx.shape), None, None, None, None, None


class AddNorm(Function):
    @staticmethod
    def forward(ctx, h, branch, weight, eps):
        ctx.eps, (total, out) = eps, kernels.norm(h, branch, weight, eps, branch.dtype)
        ctx.save_for_backward(total, weight)
        return total, out

    @staticmethod
    def backward(ctx, dtotal, dout):
        total, weight = ctx.saved_tensors
        return *kernels.norm_backward(total, weight, ctx.eps, dout.contiguous(), dtotal.contiguous(), True), None


class SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return kernels.swiglu(gate_up)

    @staticmethod
    def backward(ctx, dout):
        return kernels.swiglu_backward(*ctx.saved_tensors, dout.contiguous())


def dropout_of(B, T, H, dropout, seed=0):
    """(B, H, T, T): what the next attention after torch.manual_seed(seed) multiplies probabilities by.

    No query or key differs from another, so position t weighs the keys up to it with 1 / (t + 1) each; and value j
    is 1 in place j alone, so what comes out are the weights after dropout.
    """
    qkv = torch.zeros(B, T, 3 * H, T)
    qkv[:, :, 2 * H :] = torch.eye(T)[:, None]
    torch.manual_seed(seed)
    y = CausalAttention.apply(qkv.flatten(2), torch.ones(T, T // 2), torch.zeros(T, T // 2), H, H, dropout)
    return y.unflatten(-1, (H, T)).transpose(1, 2) * torch.arange(1.0, T + 1)[:, None]


ATTENTIONS = [
    (2, 37, 8, 4, 8, 0.0), (1, 1, 2, 1, 2, 0.0), (3, 16, 4, 4, 6, 0.0), (1, 65, 6, 2, 48, 0.0), (2, 8, 2, 2, 10, 0.0),
    (1, 300, 3, 1, 16, 0.0), (2, 38, 8, 4, 8, 0.3), (1, 66, 6, 2, 48, 0.5), (2, 30, 1, 1, 16, 0.9),
    (1, 180, 2, 1, 8, 0.4)]


@dtypes
@pytest.mark.parametrize("B,T,H,G,hd,dropout", ATTENTIONS)
def test_attention(B, T, H, G, hd, dropout, dtype):
    kept = dropout_of(B, T, H, dropout).double() if dropout else 1.0
    torch.manual_seed(0)
    qkv, wide = leaf(B, T, (H + 2 * G) * hd, dtype=dtype, scale=2.0)
    up, wide_up = leaf(B, T, H * hd, dtype=dtype, seed=1)
    cos, sin = rope_table(hd, T)
    y = CausalAttention.apply(qkv, cos, sin, H, G, dropout)
    y.backward(up.detach())

    # straight from the definition: rotate, score, mask, softmax, drop, mix
    q, k, v = (t.unflatten(-1, (-1, hd)) for t in wide.split([H * hd, G * hd, G * hd], -1))
    angles = torch.complex(cos.double(), sin.double())[:, None]
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * angles).flatten(-2)
            for t in (q, k))
    k, v = (t.repeat_interleave(H // G, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / hd**0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    want = torch.einsum("bhts,bshd->bthd", scores.softmax(-1) * kept, v).flatten(2)
    want.backward(wide_up.detach())

    compare(y, want, dtype, scale=4)
    compare(qkv.grad, wide.grad, dtype, scale=wide.grad.abs().max().item())


def torchs_attention(qkv, cos, sin, H, G):
    """The plain model's: turned in float32, the rest in qkv's type."""
    q, k, v = qkv.unflatten(-1, (H + 2 * G, -1)).split((H, G, G), 2)
    q, k = (rotate(t, cos, sin).to(t.dtype) for t in (q, k))
    k, v = (t.repeat_interleave(H // G, 2) for t in (k, v))
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    return y.transpose(1, 2).flatten(2)


def errors_of_attention(attention, dtype):
    """Relative errors, root mean square, of y and of the gradient; at the sizes of a 260K model."""
    B, T, H, G, hd = 2, 256, 8, 4, 8
    found = []
    for function, column in ((attention, 0), (torchs_attention, 1)):
        qkv = leaf(B, T, (H + 2 * G) * hd, dtype=dtype)[column]
        y = function(qkv, *(t.type_as(qkv) if column else t for t in rope_table(hd, T)), H, G)
        y.backward(leaf(B, T, H * hd, dtype=dtype, seed=1)[column].detach())
        found.append((y.detach().double(), qkv.grad.double()))
    return [((got - want).norm() / want.norm()).item() for got, want in zip(*found, strict=True)]


def test_attention_errs_no_more_than_torchs_own():
    mine, torchs = (errors_of_attention(f, torch.bfloat16) for f in (CausalAttention.apply, torchs_attention))
    assert mine[0] < 1.05 * torchs[0] and mine[1] < torchs[1], (mine, torchs)
    assert max(errors_of_attention(CausalAttention.apply, torch.float32)) < 1e-6


@pytest.mark.parametrize("needed,flags", [(None, []), ("avx2", ["-mavx2", "-mfma"]),
                                          ("avx512_bf16", ["-march=native", "-mno-amx-bf16"])],
                         ids=["none", "AVX2", "AVX-512"])
def test_without_the_processors_own_instructions_attention_errs_as_little(needed, flags, monkeypatch, tmp_path):
    """The lines that stand in for those of AMX and of AVX-512, in the narrowest registers and in AVX2's."""
    if needed and not torch.cpu.get_capabilities().get(needed):
        pytest.skip(f"this processor has no {needed}")
    built = tmp_path / "kernels.so"
    command = ["cc", "-std=c11", "-O1", *flags, "-shared", "-fPIC"]
    subprocess.run([*command, kernels.SOURCE, "-o", built, "-lm"], check=True)
    other = kernels._load(built, False)
    monkeypatch.setattr(kernels, "library", lambda: other)
    test_attention_errs_no_more_than_torchs_own()
    for shape in ATTENTIONS:
        for dtype in TOLERANCE:
            test_attention(*shape, dtype)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1 - 2**-53])
def test_dropout_drops_its_share_and_grows_the_rest(dropout):
    B, T, H = 8, 64, 4
    past = torch.ones(T, T).tril().bool()
    factors = dropout_of(B, T, H, dropout)
    kept = factors[..., past] > 0
    assert torch.isclose(factors[..., past][kept], torch.tensor(1 / (1 - dropout))).all()
    assert not factors[..., ~past].any()
    # as often as by chance, over all, by key, by query and by head: 5 deviations of a binomial distribution
    kept = torch.where(past, (factors > 0).double() - (1 - dropout), 0.0)
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        counts = past.expand(B, H, T, T).sum(axes)
        assert (kept.sum(axes).abs() <= 5 * (counts * dropout * (1 - dropout)).sqrt() + 1e-6).all()


def test_dropout_of_one_place_says_nothing_of_another():
    """Masks of neighbouring rows, heads, queries and keys, and of another seed: as alike as chance makes them."""
    B, T, H = 8, 64, 4
    signs = torch.where(dropout_of(B, T, H, 0.5) > 0, 1.0, -1.0)
    other_seed = torch.where(dropout_of(B, T, H, 0.5, seed=1) > 0, 1.0, -1.0)
    past = torch.ones(T, T).tril()
    both = past * past.roll(1, 0) * past.roll(1, 1) * past.roll((5, 5), (0, 1))  # seen by all that are compared
    for other in (other_seed, *(signs.roll(1, axis) for axis in range(4)), signs.roll((5, 5), (2, 3))):
        assert abs((signs * other * both).sum()) < 5 * (B * H * both.sum()) ** 0.5
    assert torch.equal(dropout_of(B, T, H, 0.5), dropout_of(B, T, H, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5, 1 - 2**-53])
def test_dropout_of_activations(share, dtype):
    """As often as by chance, over all, by row and by column; the rest grows; the same seed, the same places."""
    N, D = 512, 83  # not whole registers
    x, _ = leaf(N, D, dtype=dtype)
    x = torch.where(x == 0, 1, x).detach()
    out = kernels.drop(x, share, 5)
    dropped = out == 0
    kept = (x.float() / (1 - share)).to(dtype)
    torch.testing.assert_close(out[~dropped], kept[~dropped], rtol=1e-6 if dtype == torch.float32 else 0.01, atol=0)
    for axes in ((0, 1), (0,), (1,)):
        off, count = (dropped.double() - share).sum(axes), N * D // dropped.sum(axes).numel()
        assert (off.abs() <= 5 * (count * share * (1 - share)) ** 0.5 + 1e-6).all()
    assert torch.equal(kernels.drop(x, share, 5), out)
    assert kernels.drop(x, 0.0, 5) is x


def test_dropout_of_one_activation_says_nothing_of_another():
    """Neighbours in a row and a column, other seeds, halves of seeds: as alike as chance makes them."""
    x = torch.ones(512, 80)
    signs = torch.where(kernels.drop(x, 0.5, 5) > 0, 1.0, -1.0)
    others = [torch.where(kernels.drop(x, 0.5, seed) > 0, 1.0, -1.0) for seed in (6, 5 + 2**32, 5 + 3 * 2**40)]
    for other in (*others, signs.roll(1, 0), signs.roll(1, 1), signs.roll(16, 1), signs.roll((1, 1), (0, 1))):
        assert abs((signs * other).sum()) < 5 * x.numel() ** 0.5


def test_attention_of_scores_that_overflow_an_exponential():
    """Scores of +-1e4: the largest takes all the weight, whatever comes before or after it."""
    B, T, H, hd = 1, 40, 1, 8
    qkv = torch.zeros(B, T, 3 * hd)
    qkv[..., 0] = 200.0  # q
    qkv[0, :, hd] = -200.0  # k: scores of -1.4e4 ...
    qkv[0, 20, hd] = 200.0  # ... but for one key
    qkv[..., 2 * hd :] = torch.randn(T, hd)
    y = CausalAttention.apply(qkv, torch.ones(T, hd // 2), torch.zeros(T, hd // 2), H, H)
    torch.testing.assert_close(y[0, 20:], qkv[0, 20, 2 * hd :].expand(20, hd))
    torch.testing.assert_close(y[0, 4], qkv[0, :5, 2 * hd :].mean(0))


@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1, 2), (5, 100), (700, 16)])
@pytest.mark.parametrize("with_branch", [False, True])
def test_norm(shape, with_branch, dtype):
    h, wide_h = leaf(*shape, dtype=torch.float32)
    branch, wide_branch = leaf(*shape, dtype=dtype, seed=1)
    weight, wide_weight = leaf(shape[-1], dtype=torch.float32, seed=2)
    up, wide_up = leaf(*shape, dtype=dtype, seed=3)
    later, wide_later = leaf(*shape, dtype=torch.float32, seed=4)

    total = wide_h + wide_branch if with_branch else wide_h
    want = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * wide_weight
    if with_branch:
        got_total, got = AddNorm.apply(h, branch, weight, 1e-5)
        torch.autograd.backward((got_total, got), (later.detach(), up.detach()))
        torch.autograd.backward((total, want), (wide_later.detach(), wide_up.detach()))
        compare(got_total, total, torch.float32)
        compare(branch.grad, wide_branch.grad, dtype, scale=4)
    else:
        got = kernels.Norm.apply(h, weight, 1e-5, dtype)
        got.backward(up.detach())
        want.backward(wide_up.detach())
    assert got.dtype == dtype
    compare(got, want, dtype, scale=4)
    compare(h.grad, wide_h.grad, torch.float32, scale=10)
    compare(weight.grad, wide_weight.grad, torch.float32, scale=30)


@dtypes
@pytest.mark.parametrize("shape", [(2, 3, 172), (1, 1), (9, 17)])
def test_swiglu(shape, dtype):
    gate_up, wide = leaf(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=3.0)
    up, wide_up = leaf(*shape, dtype=dtype, seed=1)
    got = SwiGLU.apply(gate_up)
    got.backward(up.detach())
    gate, linear = wide.chunk(2, -1)
    want = F.silu(gate) * linear
    want.backward(wide_up.detach())
    compare(got, want, dtype)
    compare(gate_up.grad, wide.grad, dtype)


def test_swiglu_far_from_zero():
    x = torch.tensor([-1e30, -200.0, -88.0, -1.0, 0.0, 88.0, 200.0, 1e30])
    gate_up = torch.cat((x, torch.ones(8)))[None].requires_grad_()
    got = SwiGLU.apply(gate_up)
    torch.testing.assert_close(got[0], F.silu(x), rtol=1e-6, atol=1e-7)
    got.sum().backward()
    assert torch.isfinite(gate_up.grad).all()


# ---------------------------------------------------------------------------------------------
# the losses' functions

def head_losses(logits, classes, scales, gradient=None, teacher=None, taught=None, teacher_scale=0.0):
    results = (torch.full(classes.shape, torch.nan), *torch.full((3, len(logits)), torch.nan))
    kernels.head_losses(logits, classes, scales, gradient, teacher, taught, teacher_scale, results)
    return results


@dtypes
@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("N,V,K", [(5, 512, 1), (1, 1, 1), (3, 17, 0), (40, 259, 3), (2, 5000, 2)])
def test_head_losses(N, V, K, with_teacher, dtype):
    logits, wide = leaf(N, V, dtype=dtype, scale=4.0)
    z, wide_z = leaf(N, V, dtype=dtype, scale=3.0, seed=1)
    g = torch.Generator().manual_seed(1)
    classes, scales = torch.randint(V, (N, K), generator=g), torch.rand(N, K, generator=g)
    scales[torch.arange(N) % 3 == 1] = 0.0  # rows that nobody asks
    taught = torch.arange(N) % 3 != 1
    teacher = (z.detach(), z.detach().float().logsumexp(-1)) if with_teacher else None
    how = (teacher, taught if with_teacher else None, 0.2 * with_teacher)

    entropy = -wide.log_softmax(-1).gather(1, classes)
    divergence = F.kl_div(wide.log_softmax(-1), wide_z.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    divergence = torch.where(taught, divergence, 0.0) * with_teacher
    ((scales * entropy).sum() + 0.2 * divergence.sum()).backward()

    for aliased in (False, True):  # the gradient in a place of its own, and in that of the logits
        rows = logits.detach().clone()
        gradient = rows if aliased else torch.full_like(rows, torch.nan)
        got = head_losses(rows, classes, scales, gradient, *how)
        assert torch.equal(got[3].long(), wide.argmax(-1))
        for mine, want in zip(got[:3], (entropy, divergence, wide.logsumexp(-1)), strict=True):
            compare(mine, want.detach(), torch.float32)  # of the logits as rounded, so float32 whatever they are
        compare(gradient, wide.grad, dtype)
        assert (gradient[torch.arange(N) % 3 == 1] == 0).all()
        assert aliased or torch.equal(rows, logits)
    rows = logits.detach().clone()
    assert all(map(torch.equal, head_losses(rows, classes, scales, None, *how), got))
    assert torch.equal(rows, logits)  # nobody asked for gradients
    without_best = (*(torch.empty_like(t) for t in got[:3]), None)
    kernels.head_losses(rows, classes, scales, None, *how, without_best)
    assert all(map(torch.equal, without_best[:3], got))


def test_losses_of_logits_that_overflow_or_are_nan():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [3e38, 0.0, -3e38], [0.0, torch.nan, 0.0]])
    classes, one = torch.tensor([[0], [1], [0], [0]]), torch.ones(4, 1)
    entropy, _, log_sum, _ = head_losses(logits, classes, one)
    torch.testing.assert_close(entropy[:3, 0], torch.tensor([0.0, torch.tensor(3.0).log(), 0.0]))
    assert entropy[3].isnan()  # so that train.py stops
    _, divergence, _, _ = head_losses(logits, classes, one, None, (logits, log_sum), torch.ones(4).bool(), 1.0)
    torch.testing.assert_close(divergence[:2], torch.zeros(2), atol=1e-3, rtol=0)
    assert divergence[3].isnan()
    gradient = torch.empty_like(logits)
    head_losses(logits, classes, torch.tensor([[1.0], [1.0], [1.0], [0.0]]), gradient)
    assert torch.isfinite(gradient).all()  # a row that nobody asks does not leak


def test_of_equal_logits_the_first_is_the_best():
    best = head_losses(torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 2.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]]),
                       torch.zeros(3, 1).long(), torch.ones(3, 1))[3]
    assert best.tolist() == [1.0, 0.0, 3.0]


def test_a_class_outside_of_the_vocabulary_is_an_error_not_a_read_elsewhere():
    for outside in (5, -1):
        with pytest.raises(IndexError, match="outside of the vocabulary"):
            head_losses(torch.zeros(2, 5), torch.tensor([[4], [outside]]), torch.ones(2, 1), torch.zeros(2, 5))


# ---------------------------------------------------------------------------------------------
# whole models

SHAPES = [{}, {"n_kv_heads": 4}, {"tie_embeddings": False, "hidden_dim": 50},
          {"dim": 24, "n_heads": 2, "n_kv_heads": 1}]


def twins(**changes):
    """A Transformer and a KernelTransformer of the same seed."""
    args = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100, "max_seq_len": 40,
            "n_future_heads": 2} | changes
    models = []
    for kind in (Transformer, kernels.KernelTransformer):
        torch.manual_seed(0)
        models.append(kind(ModelArgs(**args)))
    return models


@pytest.mark.parametrize("changes", SHAPES)
def test_both_paths_have_the_same_parameters_and_start_alike(changes):
    plain, fast = (m.state_dict() for m in twins(**changes))
    assert list(plain) == list(fast)
    assert all(torch.equal(plain[name], fast[name]) for name in plain)


LETTERS = Letters([b"ab", b"c"] * 50, "lower")
OTHERS = {"spelling_letters": 2, "alphabet_size": alphabet_size("lower"), "order_window": 5}
HEAD_TYPES = [{"head": head, "aux_grad_scale": 0.5 if head != "shared" else 1.0} | OTHERS for head in FUTURE_HEADS]


@dtypes
@pytest.mark.parametrize("changes", [*SHAPES, *HEAD_TYPES, {"recurrence": 2, "n_layers": 3}, {"trunk": "rnn"}])
def test_losses_and_gradients_of_both_paths_agree(changes, dtype):
    """The plain path in float32 is the oracle; bfloat16 products may differ by their rounding, and by no more."""
    plain, fast = twins(**changes)
    for model in (plain, fast):  # weights as large as trained ones, or the trunk would hardly matter
        torch.manual_seed(1)
        for p in model.parameters():
            torch.nn.init.normal_(p, 1.0 if p.dim() < 2 else 0.0, 0.2)
    x, y = torch.randint(2, 100, (2, 3, 40), generator=torch.Generator().manual_seed(2))
    names = all_losses(2, letters=changes.get("spelling_letters", 0), order="order_window" in changes, soft=True)
    options = {"letters": (LETTERS, 2), "order_window": 5, "neighbours": (4, 0.1)}
    found = []
    for objective, kind in ((Objective(plain, 1, **options), torch.float32),
                            (Objective(fast, 1, kernels, **options), dtype)):
        objective.refresh_neighbours()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            losses = objective.evaluate(x, y, names, 2)[0]
            weights = {name: 1.0 + k for k, name in enumerate(names)}
            total, _ = total_of(objective, x, y, weights)
        total.backward()
        found.append((losses, {name: p.grad for name, p in objective.model.named_parameters()}))
    (want, want_gradients), (got, got_gradients) = found
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    for name in names:
        assert got[name].mean.item() == pytest.approx(want[name].mean.item(), rel=rounding), name
        assert got[name].count == want[name].count
    for name, gradient in want_gradients.items():
        if gradient is None:
            assert got_gradients[name] is None
            continue
        error = (got_gradients[name] - gradient).norm() / gradient.norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.05), (name, error)


def test_dropout_falls_on_what_it_falls_on_in_the_plain_model(monkeypatch):
    """Embeddings, attention's probabilities and both branches of a block, only in training.

    With masks that are no longer random: dropout doubles the even numbers of a row, and of attention's
    probabilities none is dropped here; that both paths ask for it is counted.
    """
    asked = []

    def dropout(x, p=0.5, training=True, inplace=False):
        asked.append(p if training else 0.0)
        return x * torch.arange(x.shape[-1]).remainder(2).sub(2) if asked[-1] else x

    attend, attention = F.scaled_dot_product_attention, kernels.attention
    of_attention = {"plain": [], "fast": []}

    def plain(*args, dropout_p, **more):
        of_attention["plain"].append(dropout_p)
        return attend(*args, **more)

    def fast(qkv, cos, sin, shape):
        of_attention["fast"].append(shape.dropout)
        return attention(qkv, cos, sin, shape._replace(dropout=0.0))

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    monkeypatch.setattr(kernels, "attention", fast)
    monkeypatch.setattr(kernels, "drop", lambda x, p, seed: dropout(x, p))
    x = torch.randint(2, 100, (3, 40), generator=torch.Generator().manual_seed(2))
    for training in (True, False):
        want, got = (model.train(training)(x) for model in twins(dropout=0.2))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert of_attention["plain"] == of_attention["fast"] == [0.2, 0.2, 0.0, 0.0]
    assert asked == 2 * (5 * [0.2]) + 2 * (5 * [0.0])


def test_gradients_under_dropout_are_of_what_was_dropped():
    """Of a block whose masks a seed fixes: the slope along a direction."""
    _, fast = twins(dropout=0.3)
    block, places = fast.layers[0], fast.places(40, None)
    x, along = torch.randn(2, 2, 40, 32, generator=torch.Generator().manual_seed(0))

    def run(x):
        torch.manual_seed(0)
        return (block(x, *places) * along).sum()

    x.requires_grad_()
    run(x).backward()
    with torch.no_grad():
        slope = (run(x + 0.01 * along) - run(x - 0.01 * along)) / 0.02
    assert (x.grad * along).sum().item() == pytest.approx(slope.item(), rel=1e-3)
    assert not torch.equal(run(x), block.eval()(x, *places).mul(along).sum())


def test_blocks_and_norms_are_told_apart_from_the_plain_ones():
    """What stands in must be what the fast model runs, and its block not the plain one by accident."""
    plain, fast = twins()
    assert type(plain.layers[0]) is TransformerBlock and type(plain.norm) is RMSNorm
    assert type(fast.layers[0]) is kernels.KernelBlock and type(fast.norm) is kernels.KernelNorm
    assert type(fast.layers[0].feed_forward) is FeedForward


def test_an_evaluation_forms_no_gradients(monkeypatch):
    """Neither the losses' nor the products that follow from them."""
    head_losses, gradients = kernels.head_losses, []

    def watched(logits, classes, scales, gradient, *more):
        gradients.append(gradient)
        head_losses(logits, classes, scales, gradient, *more)

    monkeypatch.setattr(kernels, "head_losses", watched)
    objective = Objective(twins()[1], None, kernels)
    x, y = torch.randint(100, (2, 3, 40))
    names = ("ntp", "nitp_1", "consistency_2")
    objective.evaluate(x, y, names, 2)
    assert len(gradients) == 3 and not any(g is not None for g in gradients)
    total_of(objective, x, y, dict.fromkeys(names, 1.0))
    assert all(g is not None for g in gradients[3:])


def test_what_does_not_learn_gets_no_gradient():
    _, fast = twins()
    block = fast.layers[0]
    learns = [name for name, _ in block.named_parameters()][::2]
    for name, p in block.named_parameters():
        p.requires_grad = name in learns
    block(torch.randn(1, 40, 32), *fast.places(40, None)).sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad is not None] == learns


def test_the_number_of_threads_changes_no_bit():
    if not kernels.library().threads:
        pytest.skip("this compiler has no OpenMP")
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            qkv, _ = leaf(3, 50, 16 * 8, dtype=torch.float32)
            torch.manual_seed(0)
            CausalAttention.apply(qkv, *rope_table(8, 50), 8, 4, 0.1).square().sum().backward()
            h, _ = leaf(2000, 64, dtype=torch.float32)
            branch, _ = leaf(2000, 64, dtype=torch.float32, seed=1)
            weight, _ = leaf(64, dtype=torch.float32)
            sum(t.square().sum() for t in AddNorm.apply(h, branch, weight, 1e-5)).backward()
            gate_up, _ = leaf(500, 64, dtype=torch.float32)
            SwiGLU.apply(gate_up).square().sum().backward()
            logits, target = torch.randn(99, 300, generator=torch.Generator().manual_seed(0)), torch.arange(99)
            losses = head_losses(logits, target[:, None], torch.full((99, 1), 0.5), logits)
            found.append((qkv.grad, h.grad, branch.grad, weight.grad, gate_up.grad, logits, *losses))
        finally:
            torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_an_epsilon_may_be_a_whole_number():
    """As another program's checkpoint may have it."""
    h, weight = torch.randn(3, 8), torch.ones(8)
    assert torch.equal(kernels.Norm.apply(h, weight, 1, h.dtype), kernels.Norm.apply(h, weight, 1.0, h.dtype))


def test_features_in_float32_under_autocast():
    """Those of a head that ends in float32, say: its logits are float32 as well, and the rest is what it was."""
    plain, fast = twins(n_future_heads=1)
    x, y = torch.randint(2, 100, (2, 3, 40), generator=torch.Generator().manual_seed(2))
    objective = Objective(plain, None, kernels)  # whose RMSNorm ends in float32
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = total_of(objective, x, y, {"ntp": 1.0})
    total.backward()
    assert total.item() == pytest.approx(Objective(plain).evaluate(x, y, ("ntp",))[0]["ntp"].mean.item(), rel=0.01)


def test_no_position_sees_what_comes_after_it():
    _, fast = twins()
    qkv = torch.randn(2, 20, 3 * 8)
    qkv[1] = qkv[0]
    qkv[1, 13, 16:] = 1e38  # a value that nobody before may see, not even with a weight of next to nothing
    y = CausalAttention.apply(qkv, *rope_table(8, 20), 1, 1)
    assert torch.equal(y[0, :13], y[1, :13]) and not torch.isclose(y[0, 13:], y[1, 13:]).any()
    x = torch.randint(2, 100, (1, 40))
    for t in (3, 15, 16, 31):
        changed = x.clone()
        changed[0, t] = 1
        a, b = fast(x), fast(changed)
        assert torch.equal(a[0, :t], b[0, :t]) and not torch.equal(a[0, t], b[0, t])


def test_rotation_is_the_models():
    """rotate() of model.py, which the reference above does with complex numbers."""
    x = torch.randn(1, 5, 2, 8)
    cos, sin = rope_table(8, 5)
    turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None])
    torch.testing.assert_close(rotate(x, cos, sin), turned.flatten(-2))


# ---------------------------------------------------------------------------------------------
# building

@pytest.fixture
def anew(monkeypatch, tmp_path):
    """kernels.library() as in a new process, with its build folder in tmp_path."""
    source = tmp_path / "step" / "kernels.c"
    source.parent.mkdir()
    source.write_bytes(kernels.SOURCE.read_bytes())
    monkeypatch.setattr(kernels, "SOURCE", source)
    monkeypatch.setattr(kernels, "BUILD", tmp_path / "build")
    monkeypatch.setattr(kernels, "FLAGS", [flag.replace("-O3", "-O0") for flag in kernels.FLAGS])  # seconds each
    kernels.library.cache_clear()
    yield source
    monkeypatch.undo()
    kernels.library.cache_clear()


def test_a_build_is_kept_and_used_again(anew, monkeypatch):
    assert isinstance(kernels.library(), ctypes.CDLL)
    (built,) = kernels.BUILD.iterdir()  # and nothing half-made beside it
    stamp = built.stat().st_mtime_ns
    kernels.library.cache_clear()
    kernels.library()
    assert built.stat().st_mtime_ns == stamp
    anew.write_text(anew.read_text() + "\n")
    kernels.library.cache_clear()
    kernels.library()
    assert len(list(kernels.BUILD.iterdir())) == 2


@pytest.mark.parametrize("compiler,says", [("no-such-cc", "no C compiler: no-such-cc"), ("false", "false could not")])
def test_without_a_compiler_there_is_a_reason(anew, monkeypatch, compiler, says):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(ValueError, match=says):
        kernels.library()


@pytest.mark.parametrize("compiler,says", [("true", "true could not compile kernels.c: exit code 0, and no library"),
                                           ("'x", "CC='x: No closing quotation")])
def test_what_is_no_compiler_is_told(anew, monkeypatch, compiler, says):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(ValueError, match=says):
        kernels.library()


def test_a_build_that_was_cut_short_or_changed_is_made_anew(anew, monkeypatch):
    """Loading the former ends in SIGBUS, the latter in a crash or wrong numbers: here it is only looked for."""
    monkeypatch.setattr(kernels, "_load", lambda path, threads: path)
    built = kernels.library()
    whole = built.read_bytes()
    for broken in (whole[:-1], whole[:20_000], b"", whole[:5000] + b"\xff" + whole[5001:]):
        built.write_bytes(broken)
        kernels.library.cache_clear()
        built = kernels.library()
        assert list(kernels.BUILD.iterdir()) == [built] and built.read_bytes() == whole


def test_a_library_without_the_functions_is_named(anew, monkeypatch):
    fake = anew.with_name("cc")
    fake.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\n'
                    'for word; do [ "$last" = -o ] && out=$word; last=$word; done\n'
                    'echo "int x;" | cc -x c -shared -o "$out" -\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    with pytest.raises(ValueError, match="kernels-.*so: cannot be loaded: .*attention_forward"):
        kernels.library()


def test_what_a_killed_compilation_left_is_removed_in_time(anew):
    old, new = kernels.BUILD / f"{kernels.TEMPORARY}old", kernels.BUILD / f"{kernels.TEMPORARY}new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "kernels.so").touch()
    os.utime(old, (0, 0))
    kernels.library()
    assert not old.exists() and new.exists()  # another process may be compiling there


def test_a_source_that_does_not_compile_is_named(anew):
    anew.write_text("int attention_forward(void) { return none; }")
    with pytest.raises(ValueError, match="kernels.c: .*error.*none"):
        kernels.library()


def test_a_project_that_cannot_be_written_to_still_has_kernels(anew):
    kernels.BUILD.write_text("a file where the folder should be")
    assert isinstance(kernels.library(), ctypes.CDLL)


@pytest.mark.parametrize("kind", ["sanitized", "sanitized threads", "plain"])
def test_no_kernel_touches_memory_that_is_not_its_own(build, kind):
    """Odd sizes in buffers of exact length, under address and undefined-behaviour sanitizers."""
    done = subprocess.run([build(kind, "tests/c/kernels_main.c")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
