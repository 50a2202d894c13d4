"""Every objective: what it compares, which positions count, what it weighs at a given step.

B batch, T positions, V vocabulary, n future heads. A position t has read x[0..t]; y[t] = x[t+1] is
its next token; z are the NTP head's logits and a_i those of future head i, all (B, T, V).

    ntp             mean over t of  CE(z[t], y[t])
    nitp_i          mean over t of  CE(a_i[t], y[t+i])                        head i predicts x[t+1+i]
    consistency_i   mean over t of  KL(softmax(z[t+i]) || softmax(a_i[t]))    the NTP head, i tokens later,
                                                                              teaches head i; z is detached
    total           ntp + sum of weight(step) * loss

Each loss is a mean over its own valid positions: row ends have no target i tokens further on, and
with mask_document_ends neither has a position whose target lies behind the next BOS. Only val ntp
judges a run; the others are means to that end.

Multi-token prediction: Gloeckle et al. 2024 (arXiv 2404.19737, section 2). The consistency loss is
self-distillation (Hinton et al. 2015, arXiv 1503.02531) from the head that knows more to the one
that knows less.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions

WHOLE = 1 << 24  # a head's logits are formed all at once up to so many (64 MiB), else a CHUNK of them at a time
CHUNK = 1 << 20  # 4 MiB of float32; and no fewer than FEWEST rows
FEWEST = 256
IGNORED = -100  # a target that does not count, as F.cross_entropy has it


def chunk_rows(positions: int, vocab_size: int, aligned: bool = False) -> int | None:
    """How many positions' logits are formed at a time; None: all of them.

    A chunk's gradients are made while its logits are at hand, so memory does not grow with positions
    or heads (Gloeckle et al. 2024, section 2). For a small vocabulary whole logits are as fast, but
    not where AlignedLosses takes them, which finds a chunk in the cache again.
    """
    whole = positions * vocab_size <= WHOLE and not aligned
    return None if whole else max(FEWEST, CHUNK // vocab_size)


class Loss(NamedTuple):
    mean: Tensor  # scalar, float32; 0 where count is 0
    count: Tensor  # scalar, int64: how many positions the mean is over


def mean_over(total: Tensor, valid: Tensor) -> Loss:
    """A sum over the positions where valid (B, S) is true as their mean; 0, not NaN, where it nowhere is."""
    count = valid.sum()
    return Loss(total / count.clamp(min=1), count)


def masked_mean(per_position: Tensor, valid: Tensor) -> Loss:
    """The mean of per_position (B, S) where valid (B, S) is true."""
    return mean_over(torch.where(valid, per_position, 0.0).sum(), valid)  # not a product: 0 * inf would be NaN


def valid_positions(y: Tensor, i: int, bos: int | None) -> Tensor:
    """(B, max(T - i, 0)) bool: may position t be asked for y[t+i]?

    bos: the token that starts a document; a target behind the next one, so with bos among
    y[t..t+i-1], is not asked for (bos itself is a fair target). None looks across documents.
    i = 0, the next token, is always valid.

    >>> valid_positions(torch.tensor([[5, 1, 6, 7]]), 1, bos=1)  # y[1] is BOS: 6 lies behind it
    tensor([[ True, False,  True]])
    """
    B, T = y.shape
    length = max(T - i, 0)
    valid = torch.ones(B, length, dtype=torch.bool, device=y.device)
    if bos is not None:
        for j in range(min(i, T)):
            valid &= y[:, j : j + length] != bos
    return valid


def ahead_loss(logits: Tensor, y: Tensor, i: int, valid: Tensor) -> Loss:
    """NTP (i = 0) and NiTP_i: cross-entropy of logits[t] against y[t+i]. logits: (B, T, V), y: (B, T)."""
    length = valid.shape[1]
    loss = F.cross_entropy(logits[:, :length].flatten(0, 1), y[:, i : i + length].flatten(), reduction="none")
    return masked_mean(loss.view_as(valid), valid)


def consistency_loss(teacher: Tensor, student: Tensor, i: int, valid: Tensor) -> Loss:
    """Consistency_i: KL(softmax(teacher[t+i]) || softmax(student[t])), summed over V. Both (B, T, V).

    At t+i the NTP head predicts the same token as head i at t, having read the i tokens between.
    """
    length = valid.shape[1]
    log_p = F.log_softmax(teacher[:, i : i + length].detach(), dim=-1)
    log_q = F.log_softmax(student[:, :length], dim=-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)  # F.kl_div takes q first
    return masked_mean(kl, valid)


class ChunkedDivergence(torch.autograd.Function):
    """Sum over rows of KL(softmax(teacher) || softmax(student)), counted rows only; logits are features times weight.

    Like F.linear_cross_entropy in chunks it has its gradients ready after the forward pass: that of
    KL by the student's logits is softmax(student) - softmax(teacher). teacher, features: (N, D),
    weights: (V, D), counts: (N, 1), 1 where a row counts, else 0; the teacher gets no gradient.
    """

    @staticmethod
    def forward(ctx, teacher, teacher_weight, features, weight, counts, rows: int, wants_gradients: bool):
        total = features.new_zeros(())
        to_features, to_weight = torch.empty_like(features), torch.zeros_like(weight)
        for start in range(0, len(features), rows):
            part = slice(start, start + rows)
            log_p = F.log_softmax(F.linear(teacher[part], teacher_weight), dim=-1)
            log_q = F.log_softmax(F.linear(features[part], weight), dim=-1)
            kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1, keepdim=True)
            total += torch.where(counts[part] > 0, kl, 0.0).sum()
            if wants_gradients:
                to_logits = log_q.exp_().sub_(log_p.exp_()).mul_(counts[part])
                torch.mm(to_logits, weight, out=to_features[part])
                to_weight.addmm_(to_logits.T, features[part])
        ctx.save_for_backward(to_features, to_weight)
        return total

    @staticmethod
    def backward(ctx, gradient):
        to_features, to_weight = ctx.saved_tensors
        return None, None, gradient * to_features, gradient * to_weight, None, None, None


@torch.compiler.disable  # a loop over chunks would be unrolled
def chunked_ahead_loss(head, y: Tensor, i: int, valid: Tensor, rows: int) -> Loss:
    """ahead_loss from a readout - .features (B, T, D), .weight (V, D) - the logits of `rows` positions at a time."""
    length = valid.shape[1]
    target = y[:, i : i + length].masked_fill(~valid, IGNORED).flatten()
    if target.numel() == 0:  # of which linear_cross_entropy makes no chunks
        return masked_mean(head.features.new_zeros(valid.shape), valid)
    with torch.autocast(head.features.device.type, enabled=False):
        total = F.linear_cross_entropy(head.features[:, :length].flatten(0, 1).float(), head.weight.float(), target,
                                       reduction="sum", ignore_index=IGNORED,
                                       options=LinearCrossEntropyOptions(batch_chunk_size=rows))
    return mean_over(total, valid)


@torch.compiler.disable
def chunked_consistency_loss(teacher, student, i: int, valid: Tensor, rows: int) -> Loss:
    """consistency_loss from both readouts, the logits of `rows` positions at a time."""
    length = valid.shape[1]
    with torch.autocast(valid.device.type, enabled=False):
        total = ChunkedDivergence.apply(
            teacher.features[:, i : i + length].detach().flatten(0, 1).float(), teacher.weight.detach().float(),
            student.features[:, :length].flatten(0, 1).float(), student.weight.float(),
            valid.reshape(-1, 1).float(), rows, torch.is_grad_enabled())
    return mean_over(total, valid)


def chunked_hits(head, y: Tensor, i: int, valid: Tensor, rows: int) -> Tensor:
    """Where the head's best token is y[t+i]: bool, the shape of `valid`."""
    length = valid.shape[1]
    best = [F.linear(part, head.weight).argmax(-1) for part in head.features[:, :length].flatten(0, 1).split(rows)]
    return torch.cat(best).view_as(valid) == y[:, i : i + length]


class AlignedLosses(torch.autograd.Function):
    """All losses of all heads in one pass over the targets, by way of kernels.py.

    Head i asks at t for the token that the NTP head asks for at t+i. So a chunk of targets u has one
    row of each head's logits, from the features at u - i, and one teacher for all, the NTP logits:
    each head's are formed once, whatever losses they have, and their gradients, weighted, are ready
    when the chunk is done.

    scales: {i: (of the cross-entropy, of the consistency loss or None)}, head 0 first; valid: {i: (N,)
    bool by target}; tensors: features (N, D), weight (V, D) of each head in turn. Returns the total,
    which has gradients, and by head the sums of cross-entropy, divergence and hits: (heads, 3).
    """

    @staticmethod
    def forward(ctx, kernels, targets, valid, scales, rows: int, gradients: bool, *tensors):
        features, weights = tensors[0::2], tensors[1::2]
        rounded = [w.to(f.dtype) for f, w in zip(features, weights)]
        to_features = [torch.zeros_like(f) for f in features] if gradients else []
        to_weights = [torch.zeros_like(w) for w in weights] if gradients else []
        teaches = any(scale is not None for _, scale in scales.values())
        found = torch.zeros(len(scales), 4, len(targets))  # cross-entropy, divergence, log-sum of the logits, hit
        for start in range(0, len(targets), rows):
            end, z = min(start + rows, len(targets)), None
            for k, (i, (scale, divergence_scale)) in enumerate(scales.items()):
                first = max(start, i)  # no features lie i before these targets; later rows' first i are not valid
                if first >= end:
                    continue
                inputs, part = slice(first - i, end - i), slice(first, end)
                logits = F.linear(features[k][inputs], rounded[k])
                teacher = None if divergence_scale is None else (z[first - start :], found[0, 2, part])
                gradient = None if not gradients else torch.empty_like(logits) if i == 0 and teaches else logits
                kernels.head_losses(logits, targets[part], valid[i][part], scale, gradient, teacher,
                                    divergence_scale or 0.0, tuple(found[k, :, part]))
                z = logits if i == 0 else z
                if gradients:
                    torch.mm(gradient, rounded[k], out=to_features[k][inputs])
                    if weights[k].dtype == gradient.dtype:
                        to_weights[k].addmm_(gradient.T, features[k][inputs])
                    else:
                        to_weights[k] += gradient.T @ features[k][inputs]
        ctx.save_for_backward(*(t for pair in zip(to_features, to_weights) for t in pair))
        sums = found[:, [0, 1, 3]].sum(-1)
        ctx.mark_non_differentiable(sums)
        weight = torch.tensor([[scale, divergence_scale or 0.0] for scale, divergence_scale in scales.values()])
        return (sums[:, :2] * weight).sum(), sums

    @staticmethod
    def backward(ctx, gradient, _):
        return *[None] * 6, *(t.mul_(gradient) for t in ctx.saved_tensors)  # in place: they are asked for once


def parse_name(name: str) -> tuple[str, int]:
    """'nitp_2' -> ('nitp', 2); 'ntp' -> ('ntp', 0)."""
    kind, _, i = name.partition("_")
    return kind, int(i or 0)


def all_losses(n_future_heads: int) -> tuple[str, ...]:
    """The names of all losses that a model with so many heads has."""
    return ("ntp", *(f"{kind}_{i}" for kind in ("nitp", "consistency") for i in range(1, n_future_heads + 1)))


class Objective(nn.Module):
    """A model with its losses as one module, so that DDP and torch.compile see a whole step.

    model: has trunk(x) -> h and readouts(h, heads) -> {i: Readout}, as model.Transformer has.
    bos: the token that starts a document, if future targets are to stay inside theirs (valid_positions); or None.
    kernels: the module of that name, if its head_losses is to take the logits; or None.
    """

    def __init__(self, model: nn.Module, bos: int | None = None, kernels=None):
        super().__init__()
        self.model = model
        self.bos = bos
        self.kernels = kernels

    def forward(self, x: Tensor, y: Tensor, scales: dict[str, Tensor]) -> tuple[Tensor, dict[str, Loss]]:
        """What tokens x and their next tokens y, both (B, T) int64, add to the total loss, and the losses themselves.

        scales: {loss: what each of its positions adds to the total} (`scales`). Losses that are not
        in it are not computed, and heads that none of them asks for are not run. Only the total has
        gradients.
        """
        if self.kernels:
            return self._aligned(x, y, tuple(scales), scales, accuracy=False)
        losses = self.losses(x, y, tuple(scales))
        total = sum(scales[name] * loss.mean * loss.count for name, loss in losses.items())
        return total, {name: Loss(loss.mean.detach(), loss.count) for name, loss in losses.items()}

    def losses(self, x: Tensor, y: Tensor, names: tuple[str, ...], accuracy: bool = False) -> dict[str, Loss]:
        """The losses called `names` on tokens x and their next tokens y.

        With `accuracy`, acc_i joins each head that is run: the share of valid positions whose top-1
        token is y[t+i] (acc_0 is the NTP head's).
        """
        if self.kernels:
            return self._aligned(x, y, names, {}, accuracy)[1]
        readouts, valid = self._read(x, y, names)
        rows = chunk_rows(y.numel(), readouts[0].weight.shape[0])
        # float32: softmax statistics in bfloat16 or float16 lose the digits that matter
        logits = {} if rows else {i: readout.logits().float() for i, readout in readouts.items()}
        losses = {}
        for name in names:
            kind, i = parse_name(name)
            if kind == "consistency" and rows:
                losses[name] = chunked_consistency_loss(readouts[0], readouts[i], i, valid[i], rows)
            elif kind == "consistency":
                losses[name] = consistency_loss(logits[0], logits[i], i, valid[i])
            elif rows:
                losses[name] = chunked_ahead_loss(readouts[i], y, i, valid[i], rows)
            else:
                losses[name] = ahead_loss(logits[i], y, i, valid[i])
        for i in readouts if accuracy else ():
            length = valid[i].shape[1]
            hits = (chunked_hits(readouts[i], y, i, valid[i], rows) if rows else
                    logits[i][:, :length].argmax(-1) == y[:, i : i + length])
            losses[f"acc_{i}"] = masked_mean(hits.float(), valid[i])
        return losses

    def _read(self, x: Tensor, y: Tensor, names: tuple[str, ...]) -> tuple[dict, dict]:
        """{i: Readout} and {i: valid positions} of the heads that the losses ask for."""
        heads = sorted({parse_name(name)[1] for name in names} | {0})
        return self.model.readouts(self.model.trunk(x), heads), {i: valid_positions(y, i, self.bos) for i in heads}

    def _aligned(self, x: Tensor, y: Tensor, names: tuple[str, ...], scales: dict[str, Tensor], accuracy: bool):
        """(total, losses) by AlignedLosses."""
        readouts, valid = self._read(x, y, names)
        per_position = {name: float(scales.get(name, 0.0)) for name in names}
        by_head = {i: (per_position.get(f"nitp_{i}" if i else "ntp", 0.0), per_position.get(f"consistency_{i}"))
                   for i in readouts}
        by_target = {i: F.pad(v, (y.shape[1] - v.shape[1], 0)).flatten() for i, v in valid.items()}
        tensors = [t for readout in readouts.values() for t in (readout.features.flatten(0, 1), readout.weight)]
        rows = chunk_rows(y.numel(), readouts[0].weight.shape[0], aligned=True)
        with torch.autocast("cpu", enabled=False):  # the features' type is that of the products
            total, sums = AlignedLosses.apply(self.kernels, y.flatten().contiguous(), by_target, by_head, rows,
                                              torch.is_grad_enabled(), *tensors)
        found = {}
        for i, (entropy, divergence, hits) in zip(readouts, sums):
            found |= {f"nitp_{i}" if i else "ntp": entropy, f"consistency_{i}": divergence, f"acc_{i}": hits}
        wanted = (*names, *(f"acc_{i}" for i in readouts if accuracy))
        return total, {name: mean_over(found[name], valid[parse_name(name)[1]]) for name in wanted}

    def counts(self, y: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """How many positions each loss will be a mean over, known from the targets alone."""
        return {name: valid_positions(y, parse_name(name)[1], self.bos).sum() for name in names}


def scales(weights: dict[str, float], counts: dict[str, Tensor]) -> dict[str, Tensor]:
    """{loss: weight over count}: what each of its positions adds to the total loss of an iteration.

    counts: positions of each loss in the whole iteration. Summed over micro-batches the total is the
    loss of one big batch, also where masks leave them unequal numbers of positions. Tensors, since
    torch.compile would compile anew for every other number.
    """
    return {name: weight / counts[name].clamp(min=1) for name, weight in weights.items()}


# ---------------------------------------------------------------------------------------------
# weights over the run

def schedule(kind: str, start: float, end: float, progress: float) -> float:
    """What part of its weight an auxiliary loss has at `progress` of the run: 0 at the first step, 1 at its end.

    0 before `start` and from `end` on (`end` = 1 lasts to the end); between them 1 throughout
    (constant), or falling to 0 in a straight line (linear) or half a cosine (cosine).
    """
    if progress < start or (progress >= end and end < 1.0):
        return 0.0
    done = (progress - start) / (end - start)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]


def loss_weights(settings, progress: float) -> dict[str, float]:
    """{loss: weight} at `progress` (0..1) of the run; a loss that weighs 0 is left out and need not be computed.

    settings: has n_future_heads, nitp_weight, consistency_weight, head_decay, aux_schedule,
    aux_start, aux_end. Head i weighs head_decay^(i-1) of its kind's weight.
    """
    factor = schedule(settings.aux_schedule, settings.aux_start, settings.aux_end, progress)
    weights = {"ntp": 1.0}
    for kind, weight in (("nitp", settings.nitp_weight), ("consistency", settings.consistency_weight)):
        for i in range(1, settings.n_future_heads + 1):
            weights[f"{kind}_{i}"] = weight * settings.head_decay ** (i - 1) * factor
    return {name: weight for name, weight in weights.items() if weight > 0.0}
