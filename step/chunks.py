"""From head logits to per-position losses, without ever holding all logits.

    total, losses, best = per_position_losses(heads, rows, position_weights)

Every objective is one of two formulas: the cross-entropy of a head's logits against a few classes, or
the divergence of a head's softmax from the next-token (NTP) head's. losses.py chooses the targets.

There are three ways through, and they agree within rounding. Whole: all logits at once, which
torch.compile fuses. Chunked: a slice of rows at a time, with
its gradients, so that memory does not grow with the vocabulary. C: step/kernels.py, chunked as well, on a CPU.

B batch, T positions, N = B T rows, D model dim, V classes of a head.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 1 << 24  # up to this many logits of a head (64 MiB) are formed at once, above it a CHUNK at a time
CHUNK = 1 << 20  # logits, 4 MiB of float32; but at least FEWEST rows
FEWEST = 256
PLAIN_KL = ("forward", 1.0)  # direction and temperature of a divergence


def chunk_rows(positions: int, vocab_size: int, with_kernels: bool = False) -> int | None:
    """How many rows of logits are formed at a time; None: all of them.

    A chunk's gradients are computed while its logits exist, so memory does not grow with positions or
    heads (Gloeckle et al. 2024, section 2). For a small vocabulary whole logits are as fast, except
    with kernels.c, which still finds a chunk in the cache.
    """
    whole = positions * vocab_size <= WHOLE and not with_kernels
    return None if whole else max(FEWEST, CHUNK // vocab_size)


class Target(NamedTuple):
    """What one loss compares a head with, a row for each target token.

    Leading dimensions are (B, T), or (N,) once flattened.
    """

    valid: Tensor  # (N,) bool: rows that count
    classes: Tensor | None = None  # (N, K) int64; None: the target is the NTP head's softmax on the same row
    shares: Tensor | None = None  # (N, K) float32, how the classes share the target, sum 1; None: K = 1
    divergence: tuple[str, float] = PLAIN_KL  # where classes is None

    def flat(self) -> "Target":
        """(B, T, ...) -> (N, ...)."""
        classes = None if self.classes is None else self.classes.flatten(0, 1)
        shares = None if self.shares is None else self.shares.flatten(0, 1)
        return Target(self.valid.flatten(), classes, shares, self.divergence)


class Head(NamedTuple):
    """A head and the targets of its losses. The first head of a list is the NTP head, with shift 0: the teacher."""

    readout: NamedTuple  # .features (B, T, D), .weight (V, D)
    shift: int  # the row of target token u is predicted from the features at u - shift
    targets: dict[str, Target]  # {loss: target}, flat


def divergence(log_p: Tensor, log_q: Tensor, direction: str = "forward", temperature: float = 1.0) -> Tensor:
    """Consistency on each row: of student log_q from teacher log_p, log-probabilities (N, V) -> (N,).

    forward: KL(p || q); reverse: KL(q || p); js: the mean of the KLs of p and q to their mixture. A temperature
    softens both, and the loss is multiplied by its square (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    if temperature != 1.0:
        log_p, log_q = (F.log_softmax(log / temperature, dim=-1) for log in (log_p, log_q))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)  # KL(a || b): F.kl_div takes b first

    if direction == "forward":
        loss = kl(log_p, log_q)
    elif direction == "reverse":
        loss = kl(log_q, log_p)
    else:
        middle = torch.logaddexp(log_p, log_q) - math.log(2.0)
        loss = 0.5 * (kl(log_p, middle) + kl(log_q, middle))
    return loss * temperature**2


def rows_of(shift: int, start: int, end: int) -> tuple[slice, slice]:
    """(slice of a head's features, slice of target rows) for those of rows start..end that have features.

    Rows are flattened over the batch. The first `shift` of them have no features; the first `shift` of each later
    sequence get those of the sequence before it. Targets are not valid on either.
    """
    first = min(max(start, shift), end)
    return slice(max(first - shift, 0), max(end - shift, 0)), slice(first, end)


def losses_of_head(head: Head, features: Tensor, weight: Tensor, rows: slice, log_p: Tensor | None
                   ) -> tuple[dict[str, Tensor], Tensor]:
    """({loss: per-position loss on `rows`}, the head's log-probabilities there); features: only those of `rows`.

    log_p: the NTP head's log-probabilities on the same rows, detached.
    """
    # float32: softmax statistics in bfloat16 or float16 lose the digits that matter
    log_q = F.log_softmax(F.linear(features, weight).float(), dim=-1)
    losses = {}
    for name, target in head.targets.items():
        if target.classes is None:
            losses[name] = divergence(log_p, log_q, *target.divergence)
        elif target.shares is None:
            losses[name] = -log_q.gather(1, target.classes[rows]).sum(1)
        else:
            losses[name] = -(log_q.gather(1, target.classes[rows]) * target.shares[rows]).sum(1)
    return losses, log_q


def weighted_sum(head: Head, losses: dict[str, Tensor], rows: slice, position_weights: dict[str, Tensor]) -> Tensor:
    """What `rows` of a head add to the total loss."""
    total = torch.zeros((), device=head.readout.weight.device)
    for name, loss in losses.items():
        if name in position_weights:
            total = total + position_weights[name] * torch.where(head.targets[name].valid[rows], loss, 0.0).sum()
    return total


class InChunks(torch.autograd.Function):
    """The total of all heads, `rows` target rows at a time, with the gradients ready after the forward pass.

    So no logits outlive their chunk (doc/notes.md has what activation checkpoints would hold). Only the total has
    gradients. tensors: features (N, D) and weight (V, D) of each head in turn. Fills losses {loss: (N,)} and
    best [(N,) or None of each head].
    """

    @staticmethod
    def forward(ctx, heads, rows: int, position_weights, losses, best, *tensors):
        learns = ctx.needs_input_grad[5:]
        gradients = [torch.zeros_like(t) if wanted else None for t, wanted in zip(tensors, learns, strict=True)]
        total, N, log_p = torch.zeros((), device=tensors[0].device), len(tensors[0]), None
        for start in range(0, N, rows):
            for k, head in enumerate(heads):
                inputs, chunk = rows_of(head.shift, start, min(start + rows, N))
                # float32: these gradients are not loss-scaled yet and would underflow in float16
                with (torch.autocast(tensors[0].device.type, enabled=False),
                      torch.set_grad_enabled(any(learns[2 * k : 2 * k + 2]))):
                    features = tensors[2 * k].detach()[inputs].float().requires_grad_(learns[2 * k])
                    weight = tensors[2 * k + 1].detach().float().requires_grad_(learns[2 * k + 1])
                    teacher = None if k == 0 else log_p[chunk.start - start :]
                    of_head, log_q = losses_of_head(head, features, weight, chunk, teacher)
                    part = weighted_sum(head, of_head, chunk, position_weights)
                    leaves = [(i, t) for i, t in ((2 * k, features), (2 * k + 1, weight)) if learns[i]]
                    of_leaves = []
                    if part.requires_grad:  # else no loss of this head has a weight
                        of_leaves = torch.autograd.grad(part, [t for _, t in leaves])
                if k == 0:
                    log_p = log_q.detach()
                for (i, _), gradient in zip(leaves, of_leaves, strict=False):
                    gradients[i][inputs if i == 2 * k else slice(None)] += gradient
                total += part.detach()
                for name, loss in of_head.items():
                    losses[name][chunk] = loss.detach()
                if best[k] is not None:
                    best[k][chunk] = log_q.argmax(1)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return *[None] * 5, *(t if t is None else gradient * t for t in ctx.saved_tensors)


@torch._disable_dynamo  # a loop over chunks would be unrolled; torch.compiler.disable takes 1.5 s to import
def in_chunks(heads: list[Head], rows: int, position_weights: dict[str, Tensor], guess: bool, tensors: list[Tensor]
              ) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    N, device = len(tensors[0]), tensors[0].device
    losses = {name: torch.zeros(N, device=device) for head in heads for name in head.targets}
    best = [torch.zeros(N, dtype=torch.long, device=device) if guess else None for _ in heads]
    return InChunks.apply(heads, rows, position_weights, losses, best, *tensors), losses, best


def at_once(heads: list[Head], position_weights: dict[str, Tensor], guess: bool, tensors: list[Tensor]
            ) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    N, total, losses, best, log_p = len(tensors[0]), torch.zeros((), device=tensors[0].device), {}, [], None
    for k, head in enumerate(heads):
        inputs, rows = rows_of(head.shift, 0, N)
        teacher = None if k == 0 else log_p[rows]
        of_head, log_q = losses_of_head(head, tensors[2 * k][inputs], tensors[2 * k + 1], rows, teacher)
        total = total + weighted_sum(head, of_head, rows, position_weights)
        if k == 0:
            log_p = log_q.detach()
        losses |= {name: F.pad(loss, (rows.start, 0)) for name, loss in of_head.items()}
        best.append(F.pad(log_q.argmax(1), (rows.start, 0)) if guess else None)
    return total, losses, best


def per_position_losses(heads: list[Head], rows: int | None, position_weights: dict[str, Tensor], guess: bool = False
                        ) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """(total, {loss: (N,)}, [each head's most likely class (N,), if guess]), `rows` rows at a time; None: all at once.

    position_weights: {loss: what each valid row adds to the total}. Only the total has gradients to rely on.
    """
    tensors = [t for head in heads for t in (head.readout.features.flatten(0, 1), head.readout.weight)]
    if rows is None:
        return at_once(heads, position_weights, guess, tensors)
    return in_chunks(heads, rows, position_weights, guess, tensors)
