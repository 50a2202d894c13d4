"""Evaluation: the same validation rows for every run, every loss by name, and a story.

    validation = load_validation(s, rows, texts)      # once
    means = evaluate(run, validation)                 # {"ntp": 1.77, "nitp_1": ..., "acc_0": ..., ...}

run: a train.Training. Several processes share the rows.
"""

import math
from typing import NamedTuple

import numpy as np
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
    """{name: mean over all validation rows}, of losses, the heads' guesses, a task's answers and groups of tokens.

    Waits for the device when all batches are done, not between them.
    """
    objective, machine, answers, of_run = run.objective, run.machine, validation.answers, losses_of(run.s)
    n = objective.model.args.n_future_heads
    names = of_run  # of all figures
    names += tuple(f"acc_{i}" for i in range(n + 1))
    names += tuple(f"{kind}_{i}" for kind in ("agree", "kl") for i in range(1, n + 1))
    names += tuple(f"{kind}_{group}" for group in validation.groups[0] for kind in ("ntp", "acc"))
    figures = [torch.zeros(2, len(names), device=machine.device)]  # of each batch: means and counts
    scored = []  # of each batch: its rows' numbers, most likely tokens, next tokens
    objective.eval()
    every = list(zip(validation.windows, validation.batches, validation.groups, strict=True))
    bar = tqdm(every[machine.rank :: machine.world], "validation", leave=False,
               disable=machine.rank > 0 or None)  # None: on terminals
    for windows, batch, of_batch in bar:
        x, y, *mask = machine.put(*batch)
        groups = dict(zip(of_batch, machine.put(*of_batch.values()), strict=True))
        with run.path.autocast():
            losses, best = objective.evaluate(x, y, of_run, n, mask[0] if mask else None, groups)
        figures.append(torch.stack([torch.stack([losses[name].mean for name in names]),
                                    torch.stack([losses[name].count for name in names]).float()]))
        if answers:
            scored.append((windows, best, y))
    objective.train()
    means, counts = torch.tensor(machine.read(torch.stack(figures)), dtype=torch.float64).unbind(1)  # (batches, names)
    totals = torch.stack([(means * counts).sum(0), counts.sum(0)], dim=1)  # (names, 2)
    if answers:
        totals = torch.cat([totals, score(answers, scored)])
        names += tuple(f"exact_{group}" for group in answers.names.values())
    totals = dict(zip(names, machine.sum(totals).tolist(), strict=True))
    means = {name: value / max(count, 1.0) for name, (value, count) in totals.items()}
    means |= {f"count_{group}": totals[f"acc_{group}"][1] for group in validation.groups[0]}
    if validation.tokens_per_byte:
        means["bits_per_byte"] = means["ntp"] / math.log(2.0) * validation.tokens_per_byte
    return means


def score(answers: Answers, batches: list[tuple[np.ndarray, Tensor, Tensor]]) -> Tensor:
    """(groups, 2) float64: how many answers of each group are right as a whole, and how many there are."""
    if not batches:  # more processes than batches
        return torch.zeros(len(answers.names), 2, dtype=torch.float64)
    windows, best, y = zip(*batches, strict=True)
    found = answers.score(np.concatenate(windows), y[0].shape[1], torch.cat(best), torch.cat(y))
    return torch.tensor(list(found.values()), dtype=torch.float64)


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
