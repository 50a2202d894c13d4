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


def chunk_rows(positions: int, vocab_size: int, kernels: bool = False) -> int | None:
    """How many positions' logits are formed at a time; None: all of them.

    A chunk's gradients are made while its logits are at hand, so memory does not grow with positions
    or heads (Gloeckle et al. 2024, section 2). For a small vocabulary whole logits are as fast, but
    not where kernels.py takes them: it reads and writes a chunk while it is in the cache.
    """
    whole = positions * vocab_size <= WHOLE and not kernels
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


class ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over rows of logits, features times weight transposed, `rows` of them at a time.

    Like F.linear_cross_entropy in chunks it has its gradients ready after the forward pass.
    features: (N, D), weight: (V, D), which is rounded to the type of the features; loss_of(logits,
    part) returns the losses of the rows in slice `part`, (rows,) float32, and if `gradients` leaves
    each loss's gradient by its logits in their place.
    """

    @staticmethod
    def forward(ctx, features, weight, rows: int, loss_of, gradients: bool):
        rounded = weight.to(features.dtype)
        to_features, to_weight = torch.empty_like(features), torch.zeros_like(weight)
        total = torch.zeros((), device=features.device)
        for start in range(0, len(features), rows):
            part = slice(start, start + rows)
            logits = F.linear(features[part], rounded)
            total += loss_of(logits, part).sum()
            if gradients:
                torch.mm(logits, rounded, out=to_features[part])
                if weight.dtype == logits.dtype:
                    to_weight.addmm_(logits.T, features[part])
                else:
                    to_weight += logits.T @ features[part]
        ctx.save_for_backward(to_features, to_weight)
        return total

    @staticmethod
    def backward(ctx, gradient):
        to_features, to_weight = ctx.saved_tensors
        return gradient * to_features, gradient * to_weight, None, None, None


def divergence(teacher: Tensor, logits: Tensor, counts: Tensor, gradients: bool) -> Tensor:
    """KL(softmax(teacher) || softmax(logits)) of rows (N, V) -> (N,); 0 where counts (N,) is false.

    If `gradients`, logits become its gradient by them, softmax(logits) - softmax(teacher).
    """
    log_p, log_q = F.log_softmax(teacher, dim=-1), F.log_softmax(logits, dim=-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if gradients:
        torch.sub(log_q.exp_(), log_p.exp_(), out=logits).masked_fill_(~counts[:, None], 0.0)
    return torch.where(counts, kl, 0.0)


@torch.compiler.disable  # a loop over chunks would be unrolled
def chunked_ahead_loss(head, y: Tensor, i: int, valid: Tensor, rows: int, kernels=None) -> Loss:
    """ahead_loss from a readout - .features (B, T, D), .weight (V, D) - the logits of `rows` positions at a time."""
    target = y[:, i:].masked_fill(~valid, IGNORED)
    target = F.pad(target, (0, y.shape[1] - target.shape[1]), value=IGNORED).flatten()  # (B T,): no copy of features
    features, gradients = head.features.flatten(0, 1), torch.is_grad_enabled()
    if kernels:
        total = ChunkedLoss.apply(features, head.weight, rows, lambda logits, part:
                                  kernels.cross_entropy(logits, target[part], gradients), gradients)
        return mean_over(total, valid)
    with torch.autocast(y.device.type, enabled=False):
        total = F.linear_cross_entropy(features.float(), head.weight.float(), target, reduction="sum",
                                       ignore_index=IGNORED, options=LinearCrossEntropyOptions(batch_chunk_size=rows))
    return mean_over(total, valid)


@torch.compiler.disable
def chunked_consistency_loss(teacher, student, i: int, valid: Tensor, rows: int, kernels=None) -> Loss:
    """consistency_loss from both readouts, the logits of `rows` positions at a time."""
    wide = torch.float32 if kernels is None else student.features.dtype
    beyond = student.features.shape[1] - valid.shape[1]  # positions at a row's end that have no teacher
    teacher_features = F.pad(teacher.features.detach().to(wide)[:, i:], (0, 0, 0, beyond)).flatten(0, 1)  # t reads t+i
    teacher_weight = teacher.weight.detach().to(wide)
    features, counts = student.features.to(wide).flatten(0, 1), F.pad(valid, (0, beyond)).flatten()
    gradients = torch.is_grad_enabled()

    def loss_of(logits, part):
        z = F.linear(teacher_features[part], teacher_weight)
        return (kernels.divergence if kernels else divergence)(z, logits, counts[part], gradients)

    with torch.autocast(valid.device.type, enabled=False):
        return mean_over(ChunkedLoss.apply(features, student.weight, rows, loss_of, gradients), valid)


def chunked_hits(head, y: Tensor, i: int, valid: Tensor, rows: int) -> Tensor:
    """Where the head's best token is y[t+i]: bool, the shape of `valid`."""
    length, weight = valid.shape[1], head.weight.to(head.features.dtype)
    best = [F.linear(part, weight).argmax(-1) for part in head.features[:, :length].flatten(0, 1).split(rows)]
    return torch.cat(best).view_as(valid) == y[:, i : i + length]


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
    kernels: the module of that name, if its cross_entropy and divergence are to take the logits; or None.
    """

    def __init__(self, model: nn.Module, bos: int | None = None, kernels=None):
        super().__init__()
        self.model = model
        self.bos = bos
        self.kernels = kernels

    def forward(self, x: Tensor, y: Tensor, names: tuple[str, ...], accuracy: bool = False) -> dict[str, Loss]:
        """The losses called `names` on tokens x and their next tokens y, both (B, T) int64.

        Heads that no name asks for are not run. With `accuracy`, acc_i joins each head that is run:
        the share of valid positions whose top-1 token is y[t+i] (acc_0 is the NTP head's).
        """
        h = self.model.trunk(x)
        heads = sorted({parse_name(name)[1] for name in names} | {0})
        readouts = self.model.readouts(h, heads)
        valid = {i: valid_positions(y, i, self.bos) for i in heads}
        rows = chunk_rows(y.numel(), readouts[0].weight.shape[0], self.kernels is not None)
        # float32: softmax statistics in bfloat16 or float16 lose the digits that matter
        logits = {} if rows else {i: readout.logits().float() for i, readout in readouts.items()}
        losses = {}
        for name in names:
            kind, i = parse_name(name)
            if kind == "consistency" and rows:
                losses[name] = chunked_consistency_loss(readouts[0], readouts[i], i, valid[i], rows, self.kernels)
            elif kind == "consistency":
                losses[name] = consistency_loss(logits[0], logits[i], i, valid[i])
            elif rows:
                losses[name] = chunked_ahead_loss(readouts[i], y, i, valid[i], rows, self.kernels)
            else:
                losses[name] = ahead_loss(logits[i], y, i, valid[i])
        for i in heads if accuracy else ():
            length = valid[i].shape[1]
            hits = (chunked_hits(readouts[i], y, i, valid[i], rows) if rows else
                    logits[i][:, :length].argmax(-1) == y[:, i : i + length])
            losses[f"acc_{i}"] = masked_mean(hits.float(), valid[i])
        return losses

    def counts(self, y: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """How many positions each loss will be a mean over, known from the targets alone."""
        return {name: valid_positions(y, parse_name(name)[1], self.bos).sum() for name in names}


def weighted_total(losses: dict[str, Loss], weights: dict[str, float], counts: dict[str, Tensor]) -> Tensor:
    """What a micro-batch adds to the total loss of its iteration: sum of weight * loss * its share of positions.

    counts: positions of each loss in the whole iteration. Summed over micro-batches this is the
    loss of one big batch, also where masks leave them unequal numbers of positions.
    """
    return sum(weights[name] * loss.mean * (loss.count / counts[name].clamp(min=1)) for name, loss in losses.items())


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
