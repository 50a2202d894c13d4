"""The two formulas that all objectives are made of, and how PyTorch takes them without holding all logits.

    cross-entropy   of one head's logits against a few classes with shares (`Aim`)
    divergence      of one head's probabilities from those of the next-token head

    total, found = plain_engine(parts, rows, kinds, scales, wants_best=False)

B batch, T positions, N = B T rows, D model dim, V classes of a head. kernels.engine does the same on CPUs.

What this leaves out on purpose: which head is asked for what (losses.py).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = 1 << 24  # a head's logits are formed all at once up to so many (64 MiB), else a CHUNK of them at a time
CHUNK = 1 << 20  # 4 MiB of float32; and no fewer than FEWEST rows
FEWEST = 256


def chunk_rows(positions: int, vocab_size: int, with_kernels: bool = False) -> int | None:
    """How many positions' logits are formed at a time; None: all of them.

    A chunk's gradients are made while its logits are at hand, so memory does not grow with positions
    or heads (Gloeckle et al. 2024, section 2). For a small vocabulary whole logits are as fast, but
    not with kernels.py, which finds a chunk in the cache again.
    """
    whole = positions * vocab_size <= WHOLE and not with_kernels
    return None if whole else max(FEWEST, CHUNK // vocab_size)


class Aim(NamedTuple):
    """What a cross-entropy asks a head for: the classes that share the target at positions t = 0..S-1.

    Heads that look i tokens ahead have S = T - i, or no positions; all others have S = T.
    """

    classes: Tensor  # (B, S, K) int64
    valid: Tensor  # (B, S) bool
    shares: Tensor | None = None  # (B, S, K) float32, whose sum is 1; None: K = 1, and it has all


def divergence(log_p: Tensor, log_q: Tensor, direction: str = "forward", temperature: float = 1.0) -> Tensor:
    """Consistency at each row: from student log_q (N, V) to teacher log_p (N, V), logs of probabilities -> (N,).

    forward: KL(p || q); reverse: KL(q || p); js: the mean of both's KL to their middle. With a temperature
    both are softened, and the loss times its square (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    if temperature != 1.0:
        log_p, log_q = (F.log_softmax(log / temperature, dim=-1) for log in (log_p, log_q))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)  # F.kl_div takes the second first

    if direction == "forward":
        found = kl(log_p, log_q)
    elif direction == "reverse":
        found = kl(log_q, log_p)
    else:
        middle = torch.logaddexp(log_p, log_q) - math.log(2.0)
        found = 0.5 * (kl(log_p, middle) + kl(log_q, middle))
    return found * temperature**2


class Part(NamedTuple):
    """All that is asked of one head in the frame of its targets: row u = b T + t + shift of N = B T rows."""

    readout: NamedTuple  # .features (B, T, D), .weight (V, D)
    shift: int  # so many positions before its row's lie the features
    aims: dict[str, Aim]  # by loss, framed: (N, K) and (N,)
    taught: dict[str, Tensor]  # by loss that compares with part 0, which has shift 0: valid, (N,)


class Found(NamedTuple):
    """What an engine makes of a part, by row."""

    entropies: dict[str, Tensor]  # by loss of part.aims, (N,)
    divergences: dict[str, Tensor]  # by loss of part.taught, (N,)
    best: Tensor | None  # (N,) the class with the largest logit, the first of equals


def values(parts: list[Part], tensors: list[Tensor], start: int, end: int, kinds: dict[str, tuple],
           wants_best: bool) -> list[Found]:
    """What the rows start..end of all parts have to say; tensors: features (N or fewer, D), weight of each in turn.

    kinds: {loss: (direction, temperature)} of losses that compare with part 0.
    """
    found, log_p = [], None
    for part, features, weight in zip(parts, tensors[0::2], tensors[1::2], strict=True):
        none = end - start - len(features)  # no features lie `shift` before these rows; none of them is valid
        # float32: softmax statistics in bfloat16 or float16 lose the digits that matter
        log_q = F.log_softmax(F.linear(features, weight).float(), dim=-1)
        log_p = log_q.detach() if log_p is None else log_p
        entropies, rows = {}, slice(start + none, end)
        for name, (classes, _, shares) in part.aims.items():
            score = log_q.gather(1, classes[rows])
            entropies[name] = F.pad(-(score if shares is None else score * shares[rows]).sum(1), (none, 0))
        divergences = {name: F.pad(divergence(log_p[none:], log_q, *kinds[name]), (none, 0)) for name in part.taught}
        found.append(Found(entropies, divergences, F.pad(log_q.argmax(1), (none, 0)) if wants_best else None))
    return found


def features_of(part: Part, start: int, end: int) -> slice:
    """Where in its features (N, D) a part's rows start..end lie."""
    return slice(min(max(start, part.shift), end) - part.shift, end - part.shift) if end > part.shift else slice(0, 0)


def weighted(parts: list[Part], found: list[Found], scales: dict[str, Tensor], start: int, end: int) -> Tensor:
    """What the rows start..end add to the total loss."""
    total = torch.zeros((), device=parts[0].readout.weight.device)
    for part, (entropies, divergences, _) in zip(parts, found, strict=True):
        valid = {name: aim.valid for name, aim in part.aims.items()} | part.taught
        for name, per_row in (entropies | divergences).items():
            if name in scales:
                total = total + scales[name] * torch.where(valid[name][start:end], per_row, 0.0).sum()
    return total


class InChunks(torch.autograd.Function):
    """`values` and their total, some rows at a time, with the gradients ready after the forward pass.

    So no chunk's logits outlive it: half of what checkpoints hold (doc/notes.md). Only the total has gradients.
    """

    @staticmethod
    def forward(ctx, parts, rows: int, kinds, scales, wants_best: bool, chunks: list, *tensors):
        learns = ctx.needs_input_grad[6:]
        gradients = [torch.zeros_like(t) if wanted else None for t, wanted in zip(tensors, learns, strict=True)]
        total, N = torch.zeros((), device=tensors[0].device), len(tensors[0])
        for start in range(0, N, rows):
            end = min(start + rows, N)
            places = [place for part in parts for place in (features_of(part, start, end), slice(None))]
            with torch.set_grad_enabled(any(learns)):
                pieces = [t.detach()[place].requires_grad_(wanted)
                          for t, place, wanted in zip(tensors, places, learns, strict=True)]
                found = values(parts, pieces, start, end, kinds, wants_best)
                of_chunk = weighted(parts, found, scales, start, end)
            if of_chunk.requires_grad:
                leaves = [k for k, wanted in enumerate(learns) if wanted]
                got = torch.autograd.grad(of_chunk, [pieces[k] for k in leaves], allow_unused=True)
                for k, gradient in zip(leaves, got, strict=True):
                    if gradient is not None:
                        gradients[k][places[k]] += gradient
            total += of_chunk.detach()
            chunks.append([Found({name: v.detach() for name, v in f.entropies.items()},
                                 {name: v.detach() for name, v in f.divergences.items()}, f.best) for f in found])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return *[None] * 6, *(t if t is None else gradient * t for t in ctx.saved_tensors)


@torch.compiler.disable  # a loop over chunks would be unrolled
def in_chunks(parts, rows: int, kinds, scales, wants_best: bool, tensors: list[Tensor]) -> tuple[Tensor, list[Found]]:
    chunks: list[list[Found]] = []
    total = InChunks.apply(parts, rows, kinds, scales, wants_best, chunks, *tensors)

    def joined(of_chunks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([found[name] for found in of_chunks]) for name in of_chunks[0]}

    return total, [Found(joined([f.entropies for f in found]), joined([f.divergences for f in found]),
                         torch.cat([f.best for f in found]) if wants_best else None)
                   for found in zip(*chunks, strict=True)]


def plain_engine(parts: list[Part], rows: int | None, kinds: dict[str, tuple], scales: dict[str, Tensor],
                 wants_best: bool) -> tuple[Tensor, list[Found]]:
    """(what all rows add to the total, what each has to say), by PyTorch alone, `rows` at a time; None: all at once.

    scales: {loss: what each of its positions adds to the total}; kinds as in `values`.
    """
    tensors = [t for part in parts for t in (part.readout.features.flatten(0, 1), part.readout.weight)]
    N = len(tensors[0])
    if rows is not None:
        return in_chunks(parts, rows, kinds, scales, wants_best, tensors)
    pieces = [t[features_of(parts[k // 2], 0, N)] if k % 2 == 0 else t for k, t in enumerate(tensors)]
    found = values(parts, pieces, 0, N, kinds, wants_best)
    return weighted(parts, found, scales, 0, N), found
