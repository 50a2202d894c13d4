"""Every objective: what it asks of which head, which positions count, what it weighs at a given step.

B batch, T positions, V vocabulary, n future heads. A position t has read x[0..t]; y[t] = x[t+1] is
its next token; z are the NTP head's logits and a_i those of future head i, all (B, T, V).

    ntp             mean over t of  CE(z[t], y[t])
    nitp_i          mean over t of  CE(a_i[t], y[t+i])                        head i predicts x[t+1+i]
    consistency_i   mean over t of  D(softmax(z[t+i]), softmax(a_i[t]))       the NTP head, i tokens later,
                                                                              teaches head i; z is detached
    spelling_j      mean over t of  CE(s_j[t], letter j of the text after t)
    order           mean over t of  CE(o[t], the tokens to come, the nearer the more)
    soft            mean over t of  CE(z[t], the neighbours of y[t])
    superposition   in place of ntp: CE(z[p], all tokens of the next bag), where p has read bags
    total           ntp + sum of weight(step) * loss

All but consistency are cross-entropies of one head's logits against a few classes with shares (step/chunks.py, Aim).
Each loss is a mean over its own valid positions: row ends have no target i tokens further on, and
with mask_document_ends neither has a position whose target lies behind the next BOS. Only val ntp
judges a run; the others are means to that end. Formulas, sources and costs: doc/objectives.md.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step.chunks import Aim, Part, chunk_rows, plain_engine


class Loss(NamedTuple):
    mean: Tensor  # scalar, float32; 0 where count is 0
    count: Tensor  # scalar, int64: how many positions the mean is over


def masked_mean(per_position: Tensor, valid: Tensor) -> Loss:
    """The mean of per_position (N,) where valid (N,) is true; 0, not NaN, where it nowhere is."""
    count = valid.sum()
    total = torch.where(valid, per_position, 0.0).sum()  # not a product: 0 * inf would be NaN
    return Loss(total / count.clamp(min=1), count)


# ---------------------------------------------------------------------------------------------
# what the objectives ask for

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


def ahead(y: Tensor, i: int, bos: int | None) -> Aim:
    """NTP (i = 0) and NiTP_i: y[t+i]."""
    return Aim(y[:, i:, None], valid_positions(y, i, bos))


def upcoming(y: Tensor, window: int, bos: int | None) -> Aim:
    """Order: the tokens y[t..t+window-1], each where it comes first, with shares of softmax(-distance).

    TOP (arXiv 2508.19228, section 3): ListNet's listwise ranking loss on scores that fall by one from
    token to token. What lies more than 16 tokens ahead would have a share of e^-16.
    """
    later = F.pad(y, (0, window - 1), value=-1).unfold(1, window, 1)  # (B, T, W), -1 behind the row
    repeated = (later[..., :, None] == later[..., None, :]).tril(-1).any(-1)  # came before, nearer
    counts = (later >= 0) & ~repeated
    if bos is not None:
        starts = (later == bos).long()
        counts &= starts.cumsum(-1) - starts == 0  # no document starts before it
    nearness = torch.exp(-torch.arange(window, device=y.device, dtype=torch.float32)) * counts
    return Aim(later.clamp(min=0), torch.ones_like(y, dtype=torch.bool), nearness / nearness.sum(-1, keepdim=True))


def next_bag(y: Tensor, s: int) -> Aim:
    """Superposition: bag p has read x[ps..ps+s-1]; the s tokens after it share the target. y: (B, T), s divides T.

    Token superposition (arXiv 2605.06546): multi-hot cross-entropy on the next bag.
    """
    B, T = y.shape
    bags = y[:, s - 1 : T - 1].unflatten(1, (T // s - 1, s)) if T > s else y.new_zeros(B, 0, s)
    classes = F.pad(bags, (0, 0, 0, 1))  # what follows the last bag is not in the row
    valid = torch.arange(T // s, device=y.device).expand(B, -1) < T // s - 1
    return Aim(classes, valid, torch.full(classes.shape, 1.0 / s, device=y.device))


@torch.no_grad()
def nearest_tokens(embeddings: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Of each token (V, D) the k nearest by cosine, itself among them, and softmax(cosine / temperature): both (V, k).

    Token alignment of Stefanik et al. 2023 (ACL 2023.acl-long.492, section 3), here between
    the tokens of a vocabulary by their own embeddings. k = V and a high temperature smooth labels evenly.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    nearest = [(part @ unit.T).topk(k) for part in unit.split(1024)]
    return (torch.cat([found.indices for found in nearest]),
            torch.cat([F.softmax(found.values / temperature, dim=1) for found in nearest]))


# ---------------------------------------------------------------------------------------------
# a model and its losses

def framed(t: Tensor, T: int) -> Tensor:
    """(B, S, ...) of positions t = 0..S-1 as (B T, ...) in the frame of targets, moved by T - S."""
    return F.pad(t, (0, 0) * (t.dim() - 2) + (T - t.shape[1], 0)).flatten(0, 1)


def parse_name(name: str) -> tuple[str, int]:
    """'nitp_2' -> ('nitp', 2); 'ntp' -> ('ntp', 0)."""
    kind, _, i = name.partition("_")
    return kind, int(i or 0)


def all_losses(n_future_heads: int, letters: int = 0, order: bool = False, soft: bool = False) -> tuple[str, ...]:
    """The names of all losses of next tokens that a model with such heads has."""
    return ("ntp", *(f"{kind}_{i}" for kind in ("nitp", "consistency") for i in range(1, n_future_heads + 1)),
            *(f"spelling_{j}" for j in range(1, letters + 1)), *["order"] * order, *["soft"] * soft)


class Objective(nn.Module):
    """A model with its losses as one module, so that DDP and torch.compile see a whole step.

    model: has trunk(x) -> h and readouts(x, h, heads) -> {head: Readout}, as model.Transformer has.
    bos: the token that starts a document, if future targets are to stay inside theirs (valid_positions); or None.
    kernels: the module of that name, if it is to take the logits; or None.
    consistency: direction and temperature of the consistency losses (`divergence`).
    teacher: "later", z[t+i]; or "same", z[t], which predicts another token than head i (a negative control).
    letters: text.letters.Letters, and how many of them ahead the model's spelling heads are asked for; or None.
    order_window: tokens ahead that the order head ranks. bag: tokens in a bag of superposition.
    neighbours: how many tokens share a soft target, and the temperature between them, once
        refresh_neighbours has looked for them; or None.
    """

    def __init__(self, model: nn.Module, bos: int | None = None, kernels=None, *,
                 consistency: tuple[str, float] = ("forward", 1.0), teacher: str = "later",
                 letters: tuple[nn.Module, int] | None = None, order_window: int = 0, bag: int = 1,
                 neighbours: tuple[int, float] | None = None):
        super().__init__()
        self.model, self.bos, self.kernels, self.teacher = model, bos, kernels, teacher
        self.consistency, self.order_window, self.bag, self.neighbours = consistency, order_window, bag, neighbours
        self.letters, self.n_letters = letters or (None, 0)
        if neighbours:
            V = model.tok_embeddings.num_embeddings
            self.register_buffer("soft_classes", torch.zeros(V, neighbours[0], dtype=torch.long))
            self.register_buffer("soft_shares", torch.zeros(V, neighbours[0]))

    def refresh_neighbours(self) -> None:
        """Look up anew which tokens are near each other; between two calls soft targets stay what they are."""
        classes, shares = nearest_tokens(self.model.tok_embeddings.weight, *self.neighbours)
        self.soft_classes.copy_(classes)
        self.soft_shares.copy_(shares)

    def forward(self, x: Tensor, y: Tensor, scales: dict[str, Tensor]) -> tuple[Tensor, dict[str, Loss]]:
        """What tokens x and their next tokens y, both (B, T) int64, add to the total loss, and the losses themselves.

        scales: {loss: what each of its positions adds to the total} (`scales`). Losses that are not
        in it are not computed, and heads that none of them asks for are not run. Only the total has
        gradients.
        """
        total, losses, _ = self._compute(x, y, tuple(scales), scales)
        return total, {name: Loss(loss.mean.detach(), loss.count) for name, loss in losses.items()}

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, names: tuple[str, ...], heads: int = 0) -> tuple[dict[str, Loss], Tensor]:
        """The losses called `names`, those of the guesses of heads 0..heads, and the NTP head's guesses (B, T).

        acc_i: the share of valid positions whose top-1 token is y[t+i]; agree_i: that of those where it
        is the NTP head's at t+i; kl_i: the mean of KL(NTP head at t+i || head i at t).
        """
        ahead = range(1, heads + 1)
        _, losses, best = self._compute(x, y, (*names, *(f"kl_{i}" for i in ahead)), {}, (0, *ahead))
        for i in (0, *ahead):
            valid, later = valid_positions(y, i, self.bos), slice(i, None)
            guess = best[i][:, : valid.shape[1]]
            losses[f"acc_{i}"] = masked_mean((guess == y[:, later]).float(), valid)
            if i:
                losses[f"agree_{i}"] = masked_mean((guess == best[0][:, later]).float(), valid)
        return losses, best[0]

    def aims(self, y: Tensor, names: tuple[str, ...]) -> dict[str, Aim]:
        """What the cross-entropies among the losses `names` ask for; known from the targets alone."""
        found = {}
        if any(name.startswith("spelling") for name in names):
            letters, known = self.letters.ahead(y, self.n_letters, self.bos)
        for name in names:
            kind, i = parse_name(name)
            if kind in ("ntp", "nitp"):
                found[name] = ahead(y, i, self.bos)
            elif kind == "spelling":
                found[name] = Aim(letters[..., i - 1 : i], known[..., i - 1])
            elif kind == "order":
                found[name] = upcoming(y, self.order_window, self.bos)
            elif kind == "soft":
                found[name] = Aim(self.soft_classes[y], torch.ones_like(y, dtype=torch.bool), self.soft_shares[y])
            elif kind == "superposition":
                found[name] = next_bag(y, self.bag)
        return found

    def counts(self, y: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """How many positions each loss will be a mean over, known from the targets alone."""
        spelling = self.aims(y, tuple(name for name in names if name.startswith("spelling")))
        found = {}
        for name in names:
            kind, i = parse_name(name)
            if kind == "superposition":
                found[name] = torch.tensor(y.shape[0] * (y.shape[1] // self.bag - 1), device=y.device)
            elif kind in ("order", "soft"):
                found[name] = torch.tensor(y.numel(), device=y.device)
            else:
                found[name] = (spelling[name].valid if name in spelling else valid_positions(y, i, self.bos)).sum()
        return found

    def _parts(self, x: Tensor, y: Tensor, names: tuple[str, ...], guessing: tuple[int, ...]) -> dict[tuple, Part]:
        """{(head, shift): what is asked of it}, (0, 0) first: of the NTP head, which teaches the others."""
        kinds = {name: parse_name(name) for name in names}
        heads = {kind if kind in ("spelling", "order") else i for kind, i in kinds.values() if kind != "superposition"}
        tokens = x.unflatten(1, (-1, self.bag)) if "superposition" in names else x
        readouts = self.model.readouts(tokens, self.model.trunk(tokens), [0, *sorted(heads - {0}, key=str)])
        T = tokens.shape[1]
        parts = {(0, 0): Part(readouts[0], 0, {}, {})}

        def part(head, shift, readout) -> Part:
            return parts.setdefault((head, shift), Part(readout, shift, {}, {}))

        for name, aim in self.aims(y, names).items():
            kind, i = kinds[name]
            head, shift, readout = 0, 0, readouts[0]
            if kind == "nitp":
                if readouts[i] is readouts[0]:  # one softmax of the NTP head's logits, whatever it is asked for
                    aim = Aim(*(t if t is None else F.pad(t, (0, 0) * (t.dim() - 2) + (0, T - t.shape[1]))
                                for t in aim))
                else:
                    head, shift, readout = i, i, readouts[i]
            elif kind == "spelling":
                all_letters = readouts[kind].weight.unflatten(0, (self.n_letters, -1))
                head, readout = name, readouts[kind]._replace(weight=all_letters[i - 1])
            elif kind == "order":
                head, readout = kind, readouts[kind]
            part(head, shift, readout).aims[name] = Aim(*(t if t is None else framed(t, T) for t in aim))
        for name, (kind, i) in kinds.items():
            if kind in ("consistency", "kl"):
                valid, shift = valid_positions(y, i, self.bos), i
                if kind == "consistency" and self.teacher == "same":
                    valid, shift = F.pad(valid, (0, T - valid.shape[1])), 0
                part(i, shift, readouts[i]).taught[name] = framed(valid, T)
        for i in guessing:
            part(i, i, readouts[i])
        return parts

    def _compute(self, x: Tensor, y: Tensor, names: tuple[str, ...], scales: dict[str, Tensor],
                 guessing: tuple[int, ...] = ()) -> tuple[Tensor, dict[str, Loss], dict[int, Tensor]]:
        """(total, losses, {head: its best token at each position, of the heads `guessing`: (B, T - head)})."""
        parts = self._parts(x, y, names, guessing)
        asked = list(parts.values())
        rows = chunk_rows(asked[0].readout.features.shape[:2].numel(), len(asked[0].readout.weight), bool(self.kernels))
        kinds = {name: ("forward", 1.0) if parse_name(name)[0] == "kl" else self.consistency
                 for part in asked for name in part.taught}
        engine = self.kernels.engine if self.kernels else plain_engine
        total, found = engine(asked, rows, kinds, scales, bool(guessing))
        losses = {}
        for part, (entropies, divergences, _) in zip(asked, found, strict=True):
            losses |= {name: masked_mean(entropies[name], aim.valid) for name, aim in part.aims.items()}
            losses |= {name: masked_mean(divergences[name], valid) for name, valid in part.taught.items()}
        best = {head: f.best.view(y.shape)[:, head:] for (head, shift), f in zip(parts, found, strict=True)
                if guessing and head == shift}
        return total, {name: losses[name] for name in names}, best


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


def heads_in_curriculum(kind: str, n: int, progress: float) -> int:
    """How many of n future heads have losses at `progress` of the run.

    All (none); or in n + 1 stages of equal length one more in each, from 0 to n (forward), or one
    less, from n to 0 (reverse). Aynetdinov & Akbik 2025 (arXiv 2505.22757, section 3).
    """
    stage = min(int(progress * (n + 1)), n)
    return {"none": n, "forward": stage, "reverse": n - stage}[kind]


def loss_weights(settings, progress: float) -> dict[str, float]:
    """{loss: weight} at `progress` (0..1) of the run; a loss that weighs 0 is left out and need not be computed.

    settings: the names below, as settings.Settings has them. Head i weighs head_decay^(i-1) of its
    kind's weight; the letters share that of spelling. While tokens are in superposition nothing else weighs.
    """
    s = settings
    if s.superposition > 1 and progress < s.superposition_end:
        return {"superposition": 1.0}
    factor = schedule(s.aux_schedule, s.aux_start, s.aux_end, progress)
    weights = {"ntp": 1.0}
    for kind, weight in (("nitp", s.nitp_weight), ("consistency", s.consistency_weight)):
        for i in range(1, heads_in_curriculum(s.curriculum, s.n_future_heads, progress) + 1):
            weights[f"{kind}_{i}"] = weight * s.head_decay ** (i - 1) * factor
    for j in range(1, s.spelling_letters + 1):
        weights[f"spelling_{j}"] = s.spelling_weight / s.spelling_letters * factor
    weights |= {"order": s.order_weight * factor, "soft": s.soft_weight * factor}
    return {name: weight for name, weight in weights.items() if weight > 0.0}
