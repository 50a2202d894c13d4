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


def rows_of(shift: int, start: int, end: int) -> tuple[slice, slice]:
    """Where rows start..end of a part with this shift lie in its features (N, D), and which of the rows those are.

    No features lie `shift` before a batch's first rows; none of these is valid.
    """
    first = min(max(start, shift), end)
    return slice(first - min(shift, first), end - min(shift, end)), slice(first, end)


def values(part: Part, features: Tensor, weight: Tensor, rows: slice, log_p: Tensor | None, kinds: dict[str, tuple],
           wants_best: bool) -> tuple[Found, Tensor]:
    """What `rows` of a part have to say, and the logs of its probabilities; features (rows, D) are only theirs.

    log_p: those of part 0 on the same rows. kinds: {loss: (direction, temperature)} of part.taught.
    """
    # float32: softmax statistics in bfloat16 or float16 lose the digits that matter
    log_q = F.log_softmax(F.linear(features, weight).float(), dim=-1)
    entropies = {}
    for name, (classes, _, shares) in part.aims.items():
        score = log_q.gather(1, classes[rows])
        entropies[name] = -(score if shares is None else score * shares[rows]).sum(1)
    divergences = {name: divergence(log_p, log_q, *kinds[name]) for name in part.taught}
    return Found(entropies, divergences, log_q.argmax(1) if wants_best else None), log_q


def weighted(part: Part, found: Found, scales: dict[str, Tensor], rows: slice) -> Tensor:
    """What `rows` of a part add to the total loss."""
    total = torch.zeros((), device=part.readout.weight.device)
    valid = {name: aim.valid for name, aim in part.aims.items()} | part.taught
    for name, per_row in (found.entropies | found.divergences).items():
        if name in scales:
            total = total + scales[name] * torch.where(valid[name][rows], per_row, 0.0).sum()
    return total


def joined(pieces: list[Found], missing: int) -> Found:
    """Several chunks of a part as one, behind as many rows as it has no features for."""
    def join(of_pieces: list[Tensor]) -> Tensor:
        return F.pad(torch.cat(of_pieces), (missing, 0))

    first = pieces[0]
    return Found({name: join([f.entropies[name] for f in pieces]) for name in first.entropies},
                 {name: join([f.divergences[name] for f in pieces]) for name in first.divergences},
                 None if first.best is None else join([f.best for f in pieces]))


class InChunks(torch.autograd.Function):
    """`values` of all parts and their total, some rows at a time, with the gradients ready after the forward pass.

    So the logits of no chunk and of no head outlive it (doc/notes.md has what checkpoints would hold). Only the
    total has gradients. pieces: a list for each part, which gets what each chunk has to say.
    """

    @staticmethod
    def forward(ctx, parts, rows: int, kinds, scales, wants_best: bool, pieces: list[list[Found]], *tensors):
        learns = ctx.needs_input_grad[6:]
        gradients = [torch.zeros_like(t) if wanted else None for t, wanted in zip(tensors, learns, strict=True)]
        total, N, log_p = torch.zeros((), device=tensors[0].device), len(tensors[0]), None
        for start in range(0, N, rows):
            for k, part in enumerate(parts):
                inputs, chunk = rows_of(part.shift, start, min(start + rows, N))
                # float32: a GradScaler's factor is not yet in these gradients, which float16 would lose
                with (torch.autocast(tensors[0].device.type, enabled=False),
                      torch.set_grad_enabled(any(learns[2 * k : 2 * k + 2]))):
                    features = tensors[2 * k].detach()[inputs].float().requires_grad_(learns[2 * k])
                    weight = tensors[2 * k + 1].detach().float().requires_grad_(learns[2 * k + 1])
                    teacher = log_p[chunk.start - start :] if part.taught else None
                    found, log_q = values(part, features, weight, chunk, teacher, kinds, wants_best)
                    of_part = weighted(part, found, scales, chunk)
                    leaves = [t for t in (features, weight) if t.requires_grad]
                    of_leaves = torch.autograd.grad(of_part, leaves) if of_part.requires_grad else ()
                log_p = log_q.detach() if k == 0 else log_p
                for t, gradient in zip(leaves, of_leaves, strict=False):  # none where nothing of the part weighs
                    gradients[2 * k + (t is weight)][inputs if t is features else slice(None)] += gradient
                total += of_part.detach()
                pieces[k].append(Found({name: v.detach() for name, v in found.entropies.items()},
                                       {name: v.detach() for name, v in found.divergences.items()}, found.best))
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return *[None] * 6, *(t if t is None else gradient * t for t in ctx.saved_tensors)


@torch.compiler.disable  # a loop over chunks would be unrolled
def in_chunks(parts, rows: int, kinds, scales, wants_best: bool, tensors: list[Tensor]) -> tuple[Tensor, list[Found]]:
    pieces: list[list[Found]] = [[] for _ in parts]
    total = InChunks.apply(parts, rows, kinds, scales, wants_best, pieces, *tensors)
    N = len(tensors[0])
    return total, [joined(found, min(part.shift, N)) for part, found in zip(parts, pieces, strict=True)]


def plain_engine(parts: list[Part], rows: int | None, kinds: dict[str, tuple], scales: dict[str, Tensor],
                 wants_best: bool) -> tuple[Tensor, list[Found]]:
    """(what all rows add to the total, what each has to say), by PyTorch alone, `rows` at a time; None: all at once.

    scales: {loss: what each of its positions adds to the total}; kinds as in `values`.
    """
    tensors = [t for part in parts for t in (part.readout.features.flatten(0, 1), part.readout.weight)]
    N = len(tensors[0])
    if rows is not None:
        return in_chunks(parts, rows, kinds, scales, wants_best, tensors)
    found, total, log_p = [], torch.zeros((), device=tensors[0].device), None
    for k, part in enumerate(parts):
        inputs, all_rows = rows_of(part.shift, 0, N)
        teacher = log_p[all_rows] if part.taught else None
        piece, log_q = values(part, tensors[2 * k][inputs], tensors[2 * k + 1], all_rows, teacher, kinds, wants_best)
        total = total + weighted(part, piece, scales, all_rows)
        log_p = log_q.detach() if k == 0 else log_p
        found.append(joined([piece], all_rows.start))
    return total, found
