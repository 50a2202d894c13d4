"""From head logits to per-position losses, without ever holding all logits.

    total, losses, best = per_position_losses(heads, rows, position_weights)

Every objective is one of two formulas: the cross-entropy of a head's logits against a few classes, or
the divergence of a head's softmax from the next-token (NTP) head's. losses.py chooses the targets.

There are three ways through, and they agree within rounding. Whole: all logits at once, a part of the graph that
torch.compile fuses. Chunked: a slice of rows at a time, with its gradients, so that memory does not grow with the
vocabulary; torch.compile breaks its graph there and compiles what is done with a slice. C: step/kernels.py, chunked
as well, on a CPU.

B batch, T positions, N = B T rows, D model dim, V classes of a head.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 1 << 24  # a CPU forms up to this many logits of a head (64 MiB) at once, above it a CHUNK at a time
CHUNK = 1 << 20  # logits, 4 MiB of float32; but at least FEWEST rows
FEWEST = 256
BYTES_PER_LOGIT = 24  # of memory where whole logits are formed, at most (doc/notes.md)
BUSY = 1 << 26  # logits that keep an accelerator busy; larger chunks gain nothing
PLAIN_KL = ("forward", 1.0)  # direction and temperature of a divergence


class Limits(NamedTuple):
    """How many logits of a head are formed at once."""

    whole: int  # up to this many all of them, above it
    chunk: int  # so many at a time, but at least those of FEWEST rows


def limits_of(free_bytes: int, heads: int) -> Limits:
    """The limits of a device with so much free memory: logits of all heads together get a quarter of it.

    A power of two, so that a run that goes on when a little less is free computes the same way as before.
    """
    whole = 1 << max(free_bytes // 4 // (BYTES_PER_LOGIT * heads), 1).bit_length() - 1
    return Limits(whole, min(whole, BUSY))


def chunk_rows(positions: int, vocab_size: int, with_kernels: bool = False, limits: Limits | None = None
               ) -> int | None:
    """How many rows of logits are formed at a time; None: all of them. limits: None: a CPU's.

    A chunk's gradients are computed while its logits exist, so memory does not grow with positions or
    heads (Gloeckle et al. 2024, section 2). For a small vocabulary whole logits are as fast, except
    with kernels.c, which still finds a chunk in the cache.
    """
    limits = limits or Limits(WHOLE, CHUNK)
    whole = positions * vocab_size <= limits.whole and not with_kernels
    return None if whole else max(FEWEST, limits.chunk // vocab_size)


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

    def of_rows(self, rows: slice) -> "Target":
        """Some rows of a flat target."""
        classes = None if self.classes is None else self.classes[rows]
        shares = None if self.shares is None else self.shares[rows]
        return Target(self.valid[rows], classes, shares, self.divergence)


class Head(NamedTuple):
    """A head and the targets of its losses. The first head of a list is the NTP head, with shift 0: the teacher.

    Other heads may have fewer rows than the NTP head: its first ones, as many as their features have.
    """

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


class Rows(NamedTuple):
    """What some rows of a head's logits give. Only the total has gradients."""

    total: Tensor  # scalar: what they add to the total loss
    losses: list[Tensor]  # (N,) of each target
    log_p: Tensor | None  # (N, V), log-probabilities, if this head teaches
    best: Tensor | None  # (N,), the most likely classes, if anybody asks


def losses_of_rows(targets: list[Target], weights: list[Tensor | None], features: Tensor, weight: Tensor,
                   log_p: Tensor | None, teaches: bool, guess: bool) -> Rows:
    """The losses of a head's rows: features (N, D), targets (N, ...), in lists, so that heads share a compiled graph.

    weights: what each valid row of a target adds to the total; None: nothing. log_p: the NTP head's, detached.
    """
    # float32: softmax statistics in bfloat16 or float16 lose the digits that matter
    log_q = F.log_softmax(F.linear(features, weight).float(), dim=-1)
    total, losses = torch.zeros((), device=features.device), []
    for target, position_weight in zip(targets, weights, strict=True):
        if target.classes is None:
            loss = divergence(log_p, log_q, *target.divergence)
        elif target.shares is None:
            loss = -log_q.gather(1, target.classes).sum(1)
        else:
            loss = -(log_q.gather(1, target.classes) * target.shares).sum(1)
        if position_weight is not None:
            total = total + position_weight * torch.where(target.valid, loss, 0.0).sum()
        losses.append(loss.detach())
    return Rows(total, losses, log_q.detach() if teaches else None, log_q.argmax(1) if guess else None)


@functools.cache
def compiled_losses_of_rows() -> Callable:
    return torch.compile(losses_of_rows)


class InChunks(torch.autograd.Function):
    """The total of all heads, `rows` target rows at a time, with the gradients ready after the forward pass.

    So no logits outlive their chunk (doc/notes.md has what activation checkpoints would hold). Only the total has
    gradients. of_rows: losses_of_rows, compiled or not. tensors: features (N, D) and weight (V, D) of each head in
    turn. Fills losses {loss: (N,)} and best [(N,) or None of each head].
    """

    @staticmethod
    def forward(ctx, of_rows: Callable, heads, rows: int, position_weights, losses, best, *tensors):
        learns, device = ctx.needs_input_grad[6:], tensors[0].device
        gradients = [torch.zeros_like(t) if wanted else None for t, wanted in zip(tensors, learns, strict=True)]
        total, N, log_p = torch.zeros((), device=device), len(tensors[0]), None
        # float16 would lose these gradients, which are not loss-scaled yet; its products are in float32
        bfloat16 = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16
        rounded = [t.detach().to(torch.bfloat16 if bfloat16 else torch.float32) for t in tensors]
        for k, head in enumerate(heads):  # row u holds the features at u - shift, so that all chunks are of one shape
            rounded[2 * k] = F.pad(rounded[2 * k], (0, 0, head.shift, 0))
        for start in range(0, N, rows):
            for k, head in enumerate(heads):
                chunk = slice(start, min(start + rows, len(tensors[2 * k])))
                if chunk.stop <= start:
                    continue
                targets = [target.of_rows(chunk) for target in head.targets.values()]
                weights = [position_weights.get(name) for name in head.targets]
                wanted = learns[2 * k : 2 * k + 2]
                with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(any(wanted)):
                    features = rounded[2 * k][chunk].detach().requires_grad_(wanted[0])
                    weight = rounded[2 * k + 1].detach().requires_grad_(wanted[1])
                    teacher = None if k == 0 else log_p[: len(features)]
                    teaches = k == 0 and len(heads) > 1
                    found = of_rows(targets, weights, features, weight, teacher, teaches, best[k] is not None)
                    leaves = [leaf for leaf in (features, weight) if leaf.requires_grad]
                    of_leaves = []
                    if found.total.requires_grad:  # else no loss of this head has a weight
                        of_leaves = torch.autograd.grad(found.total, leaves)
                if teaches:
                    log_p = found.log_p
                for leaf, gradient in zip(leaves, of_leaves, strict=False):
                    if leaf is weight:
                        gradients[2 * k + 1] += gradient
                    else:
                        inputs, part = rows_of(head.shift, start, chunk.stop)
                        gradients[2 * k][inputs] = gradient[part.start - start :].to(gradients[2 * k].dtype)
                total += found.total.detach()
                for name, loss in zip(head.targets, found.losses, strict=True):
                    losses[name][chunk] = loss
                if best[k] is not None:
                    best[k][chunk] = found.best
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return *[None] * 6, *(t if t is None else gradient * t for t in ctx.saved_tensors)


def that_may_learn(tensors: Iterable[Tensor]) -> list[Tensor]:
    """For an autograd.Function that forms gradients in its forward pass: as they are, but none learns without a graph.

    Its needs_input_grad is True of every parameter, under no_grad as well.
    """
    return list(tensors) if torch.is_grad_enabled() else [t.detach() for t in tensors]


@torch._disable_dynamo  # a loop over chunks would be unrolled; torch.compiler.disable takes 1.5 s to import
def in_chunks(heads: list[Head], rows: int, position_weights: dict[str, Tensor], guess: bool, tensors: list[Tensor],
              compiled: bool) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    device = tensors[0].device
    losses = {name: torch.zeros(len(target.valid), device=device)
              for head in heads for name, target in head.targets.items()}
    best = [torch.zeros(len(features), dtype=torch.long, device=device) if guess else None for features in tensors[::2]]
    of_rows = compiled_losses_of_rows() if compiled else losses_of_rows
    return InChunks.apply(of_rows, heads, rows, position_weights, losses, best, *that_may_learn(tensors)), losses, best


def at_once(heads: list[Head], position_weights: dict[str, Tensor], guess: bool, tensors: list[Tensor]
            ) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    total, losses, best, log_p = torch.zeros((), device=tensors[0].device), {}, [], None
    for k, head in enumerate(heads):
        inputs, rows = rows_of(head.shift, 0, len(tensors[2 * k]))
        teacher = None if k == 0 else log_p[rows]
        found = losses_of_rows([target.of_rows(rows) for target in head.targets.values()],
                               [position_weights.get(name) for name in head.targets],
                               tensors[2 * k][inputs], tensors[2 * k + 1], teacher, k == 0, guess)
        total = total + found.total
        if k == 0:
            log_p = found.log_p
        losses |= {name: F.pad(loss, (rows.start, 0)) for name, loss in zip(head.targets, found.losses, strict=True)}
        best.append(F.pad(found.best, (rows.start, 0)) if guess else None)
    return total, losses, best


def per_position_losses(heads: list[Head], rows: int | None, position_weights: dict[str, Tensor], guess: bool = False
                        ) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """(total, {loss: (N,)}, [each head's most likely class (N,), if guess]), `rows` rows at a time; None: all at once.

    position_weights: {loss: what each valid row adds to the total}. Only the total has gradients to rely on.
    """
    tensors = [t for head in heads for t in (head.readout.features.flatten(0, 1), head.readout.weight)]
    if rows is None:
        return at_once(heads, position_weights, guess, tensors)
    return in_chunks(heads, rows, position_weights, guess, tensors, torch.compiler.is_compiling())
