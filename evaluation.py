"""Evaluation: the same validation rows for every run, every loss by name, and a story.

    validation = load_validation(s, rows, texts)      # once
    means = evaluate(run, validation)                 # {"ntp": 1.77, "nitp_1": ..., "acc_0": ..., ...}

run: a train.Training. Several processes share the rows.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from losses import all_losses
from sample import picker
from settings import Settings
from synthetic import Answers
from text.induction import induction_groups
from tinystories import Windows, eval_batches, eval_windows


class Validation(NamedTuple):
    """The rows that every run is judged on, and what is known of them."""

    batches: list[tuple[Tensor, ...]]  # x, y, and answers where the data has a mask
    windows: list  # the numbers of each batch's rows in val.bin
    answers: Answers | None  # of a task with a known answer
    tokens_per_byte: float  # of the targets; 0 where tokens are no text
    groups: list[dict[str, Tensor]]  # of each batch, with eval_induction: what text/induction.py tells apart


def load_validation(s: Settings, rows: Windows, texts: list[bytes] | None) -> Validation:
    """Errors: ValueError if answers are broken, or rows of a task not as long as the run's."""
    answers, batches = Answers.find(rows.path), eval_batches(rows, s.eval_iters)
    if answers and answers.length != s.max_seq_len:
        raise ValueError(f"max_seq_len={s.max_seq_len}: expected {answers.length}, the length of a row of {rows.path}")
    length = torch.tensor([len(text) for text in texts or [b""] * s.vocab_size])
    targets = target_tokens(batches)
    size = length[targets].sum().item()
    groups = [induction_groups(x, y, texts) if s.eval_induction else {} for x, y, *_ in batches]
    return Validation(batches, eval_windows(rows, s.eval_iters), answers, len(targets) / size if size else 0.0, groups)


def target_tokens(batches: list[tuple[Tensor, ...]]) -> Tensor:
    """All next tokens that validation loss is a mean over, (tokens,) int64."""
    return torch.cat([y[answers[0]] if answers else y.flatten() for _, y, *answers in batches])


def losses_of(s: Settings) -> tuple[str, ...]:
    """The losses that a run with these settings has a use for, as evaluations report them."""
    return all_losses(s.n_future_heads, s.spelling_letters, s.order_window > 0, s.soft_weight > 0.0,
                      s.prefix_weight > 0.0)


def evaluate(run, validation: Validation) -> dict[str, float]:
    """{name: mean over all validation rows}, of losses, the heads' guesses, a task's answers and groups of tokens."""
    objective, machine, names = run.objective, run.machine, losses_of(run.s)
    n, answers = objective.model.args.n_future_heads, validation.answers
    guesses = [f"acc_{i}" for i in range(n + 1)] + [f"{kind}_{i}" for kind in ("agree", "kl") for i in range(1, n + 1)]
    exact = [f"exact_{group}" for group in answers.names.values()] if answers else []
    of_groups = [f"{kind}_{group}" for group in validation.groups[0] for kind in ("ntp", "acc")]
    every_name = (*names, *guesses, *exact, *of_groups)
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in every_name}  # of values, of positions
    objective.eval()
    every = list(zip(validation.windows, validation.batches, validation.groups, strict=True))
    bar = tqdm(every[machine.rank :: machine.world], "validation", leave=False,
               disable=machine.rank > 0 or None)  # None: on terminals
    for windows, batch, of_batch in bar:
        x, y, *mask = machine.put(*batch)
        groups = dict(zip(of_batch, machine.put(*of_batch.values()), strict=True))
        with run.path.autocast():
            losses, best = objective.evaluate(x, y, names, n, mask[0] if mask else None, groups)
        for name, loss in losses.items():
            count = loss.count.item()
            sums[name] += torch.tensor([loss.mean.item() * count, count])
        if answers:
            for group, counts in answers.score(windows, y.shape[1], best, y).items():
                sums[f"exact_{group}"] += torch.tensor(counts)
    objective.train()
    totals = dict(zip(sums, machine.sum(torch.stack(list(sums.values()))).tolist(), strict=True))
    means = {name: value / max(count, 1.0) for name, (value, count) in totals.items()}
    means |= {f"count_{group}": totals[f"acc_{group}"][1] for group in validation.groups[0]}
    if validation.tokens_per_byte:
        means["bits_per_byte"] = means["ntp"] / math.log(2.0) * validation.tokens_per_byte
    return means


@torch.no_grad()
def write_story(run, texts: list[bytes], bos: int) -> str:
    """A text by the NTP head, cut after sample_tokens tokens; the same random numbers at every evaluation."""
    s, model, ids = run.s, run.model, [bos]
    pick = picker(temperature=0.8, top_k=0, top_p=0.9, seed=0)  # not the run's random numbers: training goes on alike
    model.eval()
    for _ in range(min(s.sample_tokens, s.max_seq_len)):
        x = torch.tensor([ids], device=run.machine.device)
        with run.path.autocast():  # without a cache, which not every trunk has
            logits = model(x)[0, -1]
        ids.append(pick(logits.float().cpu()))
        if ids[-1] == bos:  # the next story
            break
    model.train()
    return b"".join(texts[i] for i in ids if i != bos).decode(errors="replace").strip()
