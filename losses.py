"""Every objective: its targets, the positions that count, its weight at a given step.

    tokens x -> trunk h                      model.trunk
             -> head logits z, a_1 .. a_n    model.readouts
    tokens y -> targets                      Objective.targets: what each loss expects, and where it counts
    both     -> per-position losses          step/chunks.py, or step/kernels.py in C
             -> mean over valid positions    Loss, by name
             -> total                        ntp + sum of weight(step) * loss

B batch, T positions, V vocabulary, n future heads. A position t has read x[0..t]; y[t] = x[t+1] is
its next token; z are the NTP head's logits and a_i those of future head i, all (B, T, V).

    ntp             mean over t of  CE(z[t], y[t])
    nitp_i          mean over t of  CE(a_i[t], y[t+i])                        head i predicts x[t+1+i]
    consistency_i   mean over t of  D(softmax(z[t+i]), softmax(a_i[t]))       the NTP head, i tokens later,
                                                                              teaches head i; z is detached
    spelling_j      mean over t of  CE(s_j[t], letter j of the text after t)
    order           mean over t of  CE(o[t], the tokens to come, the nearer the more)
    soft            mean over t of  CE(z[t], the neighbours of y[t])
    prefix          mean over t of  CE(z[t], the longest other token that y[t] begins with)
    superposition   in place of ntp: CE(z[p], all tokens of the next bag), where p has read bags

Each loss is a mean over its own valid positions: row ends have no target i tokens further on,
with mask_document_ends future targets never cross a document boundary, and in data with prompts and
answers only tokens of answers are targets (`answers`, a mask beside y). In training, losses of heads
besides the NTP head may be means over a sample of positions, the first rows of a batch (`sample`). Only
validation NTP judges a run; the others are means to that end. Formulas, sources and costs: doc/objectives.md.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step.chunks import PLAIN_KL, Head, Limits, Target, chunk_rows, per_position_losses


class Loss(NamedTuple):
    mean: Tensor  # scalar, float32; 0 where count is 0
    count: Tensor  # scalar, int64: how many positions the mean is over


def masked_mean(per_position: Tensor, valid: Tensor) -> Loss:
    """The mean of per_position (N,) where valid (N,) is true; 0, not NaN, if no position is valid."""
    count = valid.sum()
    total = torch.where(valid, per_position, 0.0).sum()  # not a product: 0 * inf would be NaN
    return Loss(total / count.clamp(min=1), count)


# ---------------------------------------------------------------------------------------------
# targets

def valid_positions(y: Tensor, i: int, bos: int | None, answers: Tensor | None = None) -> Tensor:
    """(B, max(T - i, 0)) bool: does position t have the target y[t+i]?

    bos: the document-start token. Targets past the next bos are masked; bos itself may be predicted.
    None: targets may cross documents. The next token, i = 0, is valid everywhere.
    answers: (B, T) bool, the tokens of y that are targets at all; None: all of them.

    >>> valid_positions(torch.tensor([[5, 1, 6, 7]]), 1, bos=1)  # y[1] is bos: 6 is past it
    tensor([[ True, False,  True]])
    """
    B, T = y.shape
    length = max(T - i, 0)
    valid = torch.ones(B, length, dtype=torch.bool, device=y.device)
    if bos is not None:
        for j in range(min(i, T)):
            valid &= y[:, j : j + length] != bos
    if answers is not None:
        valid &= answers[:, i:]
    return valid


def by_target(t: Tensor, T: int) -> Tensor:
    """(B, T - i) of positions t -> (B, T) of their targets u = t + i; the first i rows are 0."""
    return F.pad(t, (T - t.shape[1], 0))


def by_position(t: Tensor, T: int) -> Tensor:
    """(B, T - i) of positions t -> (B, T); the last i rows are 0."""
    return F.pad(t, (0, T - t.shape[1]))


def upcoming_tokens(y: Tensor, window: int, bos: int | None, answers: Tensor | None = None) -> Target:
    """Order: the tokens y[t..t+window-1], each at its first occurrence, with shares of softmax(-distance).

    With `answers` (valid_positions) only their tokens; a position without any does not count.

    TOP (arXiv 2508.19228, section 3): ListNet's listwise ranking loss on scores that fall by one from
    token to token.
    """
    def windows(t: Tensor, past_the_row: int) -> Tensor:
        return F.pad(t, (0, window - 1), value=past_the_row).unfold(1, window, 1)  # (B, T, W)

    later = windows(y, -1)
    counts = later >= 0
    if bos is not None:
        starts = (later == bos).long()
        counts &= starts.cumsum(-1) - starts == 0  # no document starts before it
    if answers is not None:
        counts &= windows(answers, 0)
    later = later.masked_fill(~counts, -1)
    counts &= ~(later[..., :, None] == later[..., None, :]).tril(-1).any(-1)  # occurred before, nearer
    nearness = torch.exp(-torch.arange(window, device=y.device, dtype=torch.float32)) * counts
    total = nearness.sum(-1, keepdim=True)
    shares = nearness / total.masked_fill(total == 0, 1.0)
    return Target(counts.any(-1), later.clamp(min=0), shares)


def next_bag(y: Tensor, s: int, answers: Tensor | None = None) -> Target:
    """Superposition: bag p has read x[ps..ps+s-1]; the s tokens after it share the target. y: (B, T), s divides T.

    Token superposition (arXiv 2605.06546): multi-hot cross-entropy on the next bag. With `answers`
    (valid_positions) only their tokens share it; a bag without any does not count.
    """
    B, T = y.shape
    if answers is None:
        answers = torch.ones_like(y, dtype=torch.bool)

    def bags(t: Tensor) -> Tensor:
        next_ones = t[:, s - 1 : T - 1].unflatten(1, (T // s - 1, s)) if T > s else t.new_zeros(B, 0, s)
        return F.pad(next_ones, (0, 0, 0, 1))  # what follows the last bag is not in the row

    counts = bags(answers)
    valid = counts.any(-1)
    return Target(valid, bags(y), counts / counts.sum(-1, keepdim=True).clamp(min=1))


@torch.no_grad()
def nearest_tokens(embeddings: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Of each token (V, D) the k nearest by cosine, itself included, and softmax(cosine / temperature): both (V, k).

    Token alignment of Stefanik et al. 2023 (ACL 2023.acl-long.492, section 3), here between
    the tokens of a vocabulary by their own embeddings. k = V and a high temperature smooth labels evenly.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    nearest = [(part @ unit.T).topk(k) for part in unit.split(1024)]
    return (torch.cat([part.indices for part in nearest]),
            torch.cat([F.softmax(part.values / temperature, dim=1) for part in nearest]))


# ---------------------------------------------------------------------------------------------
# a model and its losses

def parse_name(name: str) -> tuple[str, int]:
    """'nitp_2' -> ('nitp', 2); 'ntp' -> ('ntp', 0)."""
    kind, _, i = name.partition("_")
    return kind, int(i or 0)


def all_losses(n_future_heads: int, letters: int = 0, order: bool = False, soft: bool = False, prefix: bool = False
               ) -> tuple[str, ...]:
    """The names of all next-token losses of a model with such heads; superposition, which replaces them, aside."""
    names = ["ntp"]
    for kind, count in (("nitp", n_future_heads), ("consistency", n_future_heads), ("spelling", letters)):
        names += [f"{kind}_{i}" for i in range(1, count + 1)]
    if order:
        names.append("order")
    if soft:
        names.append("soft")
    if prefix:
        names.append("prefix")
    return tuple(names)


class Objective(nn.Module):
    """A model with its losses as one module, so that DDP and torch.compile see a whole step.

    model: has trunk(x) -> h, readouts(x, h, heads) -> {head: Readout} and shared_head, as model.Transformer has.
    bos: the document-start token, if future targets must not cross documents (valid_positions); or None.
    kernels: the module step.kernels, if the losses run in C; or None.
    consistency: direction and temperature of the consistency losses (`divergence`).
    teacher: "later", z[t+i]; or "same", z[t], which predicts another token than head i (a negative control).
    letters: letters.Letters, and how many letters ahead the model's spelling heads predict; or None.
    order_window: tokens ahead that the order head ranks. bag: tokens in a bag of superposition.
    neighbours: how many tokens share a soft target, and the temperature of their shares; or None.
        refresh_neighbours fills the table.
    prefixes: letters.Prefixes, which knows what token each token begins with; or None.
    limits: how many logits are formed at once (chunks.limits_of); None: a CPU's.
    """

    limits: Limits | None = None

    def __init__(self, model: nn.Module, bos: int | None = None, kernels=None, *,
                 consistency: tuple[str, float] = PLAIN_KL, teacher: str = "later",
                 letters: tuple[nn.Module, int] | None = None, order_window: int = 0, bag: int = 1,
                 neighbours: tuple[int, float] | None = None, prefixes: nn.Module | None = None):
        super().__init__()
        self.model, self.bos, self.kernels, self.teacher = model, bos, kernels, teacher
        self.consistency, self.order_window, self.bag, self.neighbours = consistency, order_window, bag, neighbours
        self.letters, self.n_letters = letters or (None, 0)
        self.prefixes = prefixes
        if neighbours:
            V = model.tok_embeddings.num_embeddings
            self.register_buffer("soft_classes", torch.zeros(V, neighbours[0], dtype=torch.long))
            self.register_buffer("soft_shares", torch.zeros(V, neighbours[0]))

    def refresh_neighbours(self) -> None:
        """Look up anew which tokens are near each other; soft targets are constant between calls."""
        classes, shares = nearest_tokens(self.model.tok_embeddings.weight, *self.neighbours)
        self.soft_classes.copy_(classes)
        self.soft_shares.copy_(shares)

    def targets(self, y: Tensor, names: tuple[str, ...], answers: Tensor | None = None, sample: int | None = None
                ) -> dict[str, Target]:
        """{loss: its target}, from the next tokens y (B, T) alone; rows as `head_of` the loss has them.

        answers: (B, T) bool, which tokens of y are targets; None: all.
        sample: losses of heads besides the NTP head have targets (sample, T), of the first rows of y; None: of all.
        """
        T, targets, whole = y.shape[1], {}, (y, answers)
        part = y[:sample], None if answers is None else answers[:sample]
        if any(name.startswith("spelling") for name in names):
            letters, known = self.letters.ahead(part[0], self.n_letters, self.bos, part[1])
        for name in names:
            kind, i = parse_name(name)
            head, shift = self.head_of(name)
            y, answers = whole if head == 0 else part
            if kind in ("ntp", "nitp", "soft", "prefix", "consistency", "kl"):
                valid = valid_positions(y, i, self.bos, answers)
            if kind == "ntp":
                targets[name] = Target(valid, y[..., None])
            elif kind == "nitp" and shift:
                targets[name] = Target(by_target(valid, T), y[..., None])
            elif kind == "nitp":
                targets[name] = Target(by_position(valid, T), by_position(y[:, i:], T)[..., None])
            elif kind in ("consistency", "kl"):
                rows = by_target(valid, T) if shift else by_position(valid, T)
                targets[name] = Target(rows, divergence=self.consistency if kind == "consistency" else PLAIN_KL)
            elif kind == "spelling":
                targets[name] = Target(known[..., i - 1], letters[..., i - 1 : i])
            elif kind == "order":
                targets[name] = upcoming_tokens(y, self.order_window, self.bos, answers)
            elif kind == "soft":
                targets[name] = Target(valid, self.soft_classes[y], self.soft_shares[y])
            elif kind == "prefix":
                classes, known = self.prefixes.of(y)
                targets[name] = Target(valid & known, classes[..., None])
            elif kind == "superposition":
                targets[name] = next_bag(y, self.bag, answers)
        return targets

    def counted_targets(self, y: Tensor, names: tuple[str, ...], answers: Tensor | None = None,
                        sample: int | None = None) -> tuple[dict[str, Target], Tensor]:
        """`targets`, and how many positions of each are valid, (losses,) int64."""
        targets = self.targets(y, names, answers, sample)
        return targets, torch.stack([target.valid.sum() for target in targets.values()])

    def head_of(self, name: str) -> tuple[int | str, int]:
        """(head, shift): which head a loss reads, and how many positions its target rows are ahead of the features."""
        kind, i = parse_name(name)
        if kind == "nitp" and self.model.shared_head:
            return 0, 0  # one softmax of the NTP head's logits, for all of its targets
        if kind == "consistency" and self.teacher == "same":
            return i, 0
        if kind in ("nitp", "consistency", "kl"):
            return i, i
        if kind in ("spelling", "order"):
            return name, 0
        return 0, 0

    def has_idle_heads(self, names: tuple[str, ...]) -> bool:
        """Is there a head with parameters that none of these losses reads?"""
        args, kinds = self.model.args, {parse_name(name)[0] for name in names}
        learning = max((i for kind, i in map(parse_name, names) if kind in ("nitp", "consistency")), default=0)
        return ((learning < args.n_future_heads and not self.model.shared_head)
                or (args.spelling_letters > 0 and "spelling" not in kinds)
                or (args.order_window > 0 and "order" not in kinds))

    def forward(self, x: Tensor, targets: dict[str, Target], position_weights: Tensor
                ) -> tuple[Tensor, dict[str, Loss]]:
        """What tokens x (B, T) int64 add to the total loss, and the losses themselves. Only the total has gradients.

        position_weights: of each target, (losses,). Losses without a target are not computed, and heads without a
        loss are not run. Where targets have fewer rows than x, heads besides the NTP head run on the first rows only.
        """
        of_losses = dict(zip(targets, position_weights.unbind(), strict=True))
        total, per_position, _ = self._compute(x, targets, of_losses)
        losses = means_of(per_position, targets)
        return total, {name: Loss(loss.mean.detach(), loss.count) for name, loss in losses.items()}

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, names: tuple[str, ...], heads: int = 0, answers: Tensor | None = None,
                 groups: dict[str, Tensor] | None = None) -> tuple[dict[str, Loss], Tensor]:
        """The losses called `names`, accuracy and agreement of heads 0..heads, and the NTP head's top-1 tokens (B, T).

        acc_i: the share of valid positions whose top-1 token is y[t+i]; agree_i: the share where it
        is the NTP head's at t+i; kl_i: the mean of KL(NTP head at t+i || head i at t).
        groups: {name: (B, T) bool}, positions over which ntp_name and acc_name are means of ntp and acc_0.
        """
        ahead = range(1, heads + 1)
        targets = self.targets(y, (*names, *(f"kl_{i}" for i in ahead)), answers)
        _, per_position, best = self._compute(x, targets, {}, (0, *ahead))
        losses = means_of(per_position, targets)
        for i in (0, *ahead):
            valid, later = valid_positions(y, i, self.bos, answers), slice(i, None)
            guess = best[i][:, : valid.shape[1]]
            losses[f"acc_{i}"] = masked_mean((guess == y[:, later]).float(), valid)
            if i:
                losses[f"agree_{i}"] = masked_mean((guess == best[0][:, later]).float(), valid)
        for name, group in (groups or {}).items():
            valid = valid_positions(y, 0, self.bos, answers) & group
            losses[f"ntp_{name}"] = masked_mean(per_position["ntp"], valid.flatten())
            losses[f"acc_{name}"] = masked_mean((best[0] == y).float(), valid)
        return losses, best[0]

    def _heads(self, x: Tensor, targets: dict[str, Target], guessing: tuple[int, ...]) -> dict[tuple, Head]:
        """{(head, shift): the head with its targets}, (0, 0) first: the NTP head, which teaches the others."""
        wanted = {(0, 0): {}}  # (head, shift): its targets
        for name, target in targets.items():
            wanted.setdefault(self.head_of(name), {})[name] = target.flat()
        for i in guessing:
            wanted.setdefault((i, i), {})
        tokens = x.unflatten(1, (-1, self.bag)) if "superposition" in targets else x
        names = {head.partition("_")[0] if isinstance(head, str) else head for head, _ in wanted}
        rows = min([len(x), *(len(target.valid) for target in targets.values())])
        readouts = self.model.readouts(tokens, self.model.trunk(tokens), sorted(names, key=str), rows=rows)
        heads = {}
        for (head, shift), of_head in wanted.items():
            if isinstance(head, str) and head.startswith("spelling"):  # one matrix for the classes of all letters
                readout, j = readouts["spelling"], parse_name(head)[1]
                readout = readout._replace(weight=readout.weight.unflatten(0, (self.n_letters, -1))[j - 1])
            else:
                readout = readouts[head]
            heads[head, shift] = Head(readout, shift, of_head)
        return heads

    def _compute(self, x: Tensor, targets: dict[str, Target], position_weights: dict[str, Tensor],
                 guessing: tuple[int, ...] = ()) -> tuple[Tensor, dict[str, Tensor], dict[int, Tensor]]:
        """(total, {loss: (B * T,)}, {head: its most likely tokens (B, T - head), of the heads `guessing`})."""
        heads = self._heads(x, targets, guessing)
        ntp = heads[0, 0].readout
        rows = chunk_rows(ntp.features.shape[:2].numel(), len(ntp.weight), self.kernels is not None, self.limits)
        through = self.kernels.per_position_losses if self.kernels else per_position_losses
        total, per_position, best = through(list(heads.values()), rows, position_weights, len(guessing) > 0)
        guesses = {head: tokens.view(x.shape)[:, head:] for (head, shift), tokens in zip(heads, best, strict=True)
                   if guessing and head == shift}
        return total, per_position, guesses


def means_of(per_position: dict[str, Tensor], targets: dict[str, Target]) -> dict[str, Loss]:
    """{loss: its mean over the positions that have a target}."""
    return {name: masked_mean(per_position[name], target.valid.flatten()) for name, target in targets.items()}


def position_weights(weights: Tensor, counts: Tensor) -> Tensor:
    """weight / count of each loss, (losses,): what each valid position adds to the total loss of an iteration.

    counts: valid positions of each loss in the whole iteration. So the total, summed over micro-batches, is the
    loss of one big batch, also where masks leave micro-batches unequal numbers of positions. A tensor, since
    torch.compile would compile anew for every other number, and a device is not to wait for numbers of the host.
    """
    return weights / counts.clamp(min=1)


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

    settings: the names below, as settings.Settings has them. Head i weighs a part of its kind's
    weight, its head_factor; the letters share that of spelling. While tokens are in superposition nothing else weighs.
    With normalize_weights all are divided by their sum, so that NTP weighs less while others weigh.
    """
    s = settings
    if s.superposition > 1 and progress < s.superposition_end:
        return {"superposition": 1.0}
    factor = schedule(s.aux_schedule, s.aux_start, s.aux_end, progress)
    weights = {"ntp": 1.0}
    for kind, weight in (("nitp", s.nitp_weight), ("consistency", s.consistency_weight)):
        for i in range(1, heads_in_curriculum(s.curriculum, s.n_future_heads, progress) + 1):
            weights[f"{kind}_{i}"] = weight * s.head_factor(i) * factor
    for j in range(1, s.spelling_letters + 1):
        weights[f"spelling_{j}"] = s.spelling_weight / s.spelling_letters * factor
    weights |= {"order": s.order_weight * factor, "soft": s.soft_weight * factor, "prefix": s.prefix_weight * factor}
    whole = sum(weights.values()) if s.normalize_weights else 1.0
    return {name: weight / whole for name, weight in weights.items() if weight > 0.0}
