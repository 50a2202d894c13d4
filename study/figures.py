"""What a comparison finds of each group of runs: means, differences to the baseline, times to reach it.

Differences are paired by seed: base and variant of one seed share the trunk's initial weights and the order of the
data.

What this leaves out on purpose: how figures are shown (tables.py, report.py).
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from study.groups import Group, of_other_length
from study.intervals import Interval, interval
from study.runs import Run


@dataclass
class Figures:
    """What is told of a group, beside the baseline."""

    group: Group
    at: dict[int, float]  # step -> mean val NTP
    end: float
    ends: list[float]  # of which it is the mean
    end_step: float  # where that is
    spread: float  # standard deviation between seeds at the end; NaN with one seed
    differences: dict[int, Interval]  # step -> to the baseline
    difference: Interval  # at the end
    each: list[float]  # of which it is the mean
    steps_to_reach: float | None  # where the baseline ends with the same seeds, and to stay below; None: not reached
    seconds_to_reach: float | None
    reached: int  # by so many seeds of their own
    cost: float  # step time over the baseline's
    equal_seconds: Interval
    tokens_per_second: float
    peak_mib: float
    accuracy: dict[str, float]  # acc_0, acc_1, ..., agree_1, ... at the end


def set_step_seconds(groups: list[Group], measured: dict[str, list[float]]) -> list[str]:
    """Stretch each run's seconds to the step times measured, {label: seconds of a step in each round}.

    The first group's are medians over rounds; others' those times the median of ratios within rounds, since machines
    drift between them. The baseline's at other lengths are the baseline's. Returns what was not measured, in words.
    """
    base, lengths, unmeasured = groups[0], of_other_length(groups), []
    for group in groups if measured else ():
        of = base.label if group in lengths else group.label
        if of not in measured or base.label not in measured:
            unmeasured.append(f"{group.label}: its step time was not measured in turns with {base.label}'s; "
                              "its seconds are those of its logs")
            continue
        ratio = statistics.median(a / b for a, b in zip(measured[of], measured[base.label], strict=True))
        for run in group.runs.values():
            if run.seconds_per_step > 0.0:
                run.stretch(statistics.median(measured[base.label]) * ratio / run.seconds_per_step)
    return unmeasured


def figures(groups: list[Group], steps: list[int], last: int = 1, best: bool = False) -> list[Figures]:
    """Of each group; the first is the baseline.

    last: the end is the mean of so many evaluations of the baseline, of others as many steps before their own end.
    best: it is each run's lowest evaluation instead, wherever that is.
    Errors: ValueError if the baseline has not so many behind its start.
    """
    base, lengths = groups[0], of_other_length(groups)
    evaluated = base.first.points("val/ntp")[0]
    if last > max((evaluated > 0).sum(), 1):
        raise ValueError(f"--last={last}: {base.label} has {(evaluated > 0).sum()} evaluations behind its start")
    back = base.first.length - evaluated[-last:]

    def end(run: Run) -> float:
        return float(run.points("val/ntp")[1].min() if best else run.at("val/ntp", run.length - back).mean())

    def end_step(run: Run) -> float:
        at, values = run.points("val/ntp")
        return float(at[values.argmin()] if best else run.length)

    found = []
    for group in groups:
        pairs, runs = group.pairs(base), list(group.runs.values())
        each = [end(a) - end(b) for a, b in pairs] if group.length == base.length else []
        ends = [end(run) for run in runs]
        same_seeds = [base.runs[seed] for seed in group.runs if seed in base.runs]
        target = statistics.fmean(end(run) for run in same_seeds or base.runs.values())
        reach = crossing(*mean_curve(group), target)
        found.append(Figures(
            group=group,
            at={step: group.mean(partial(ntp_at, step=step)) for step in steps},
            end=statistics.fmean(ends),
            ends=ends,
            end_step=group.mean(end_step),
            spread=statistics.stdev(ends) if len(ends) > 1 else math.nan,
            differences={step: interval([ntp_at(a, step) - ntp_at(b, step) for a, b in pairs]) for step in steps},
            difference=interval(each),
            each=each,
            steps_to_reach=reach,
            seconds_to_reach=None if reach is None else group.mean(lambda run, reach=reach: run.at("seconds", reach)),
            reached=sum(crossing(*run.points("val/ntp"), target) is not None for run in runs),
            cost=median(step_cost(run, base.runs[seed]) for seed, run in group.runs.items() if seed in base.runs),
            equal_seconds=at_equal_seconds(group, base, lengths, end),
            tokens_per_second=group.mean(tokens_per_second),
            peak_mib=group.mean(lambda run: max(run.points("peak_mib")[1], default=math.nan)),
            accuracy=accuracies(group)))
    return found


def ntp_at(run: Run, step: float) -> float:
    return float(run.at("val/ntp", step))


def mean_curve(group: Group) -> tuple[np.ndarray, np.ndarray]:
    x, values = group.curve("val/ntp")
    return x, values.mean(0)


def accuracies(group: Group) -> dict[str, float]:
    """acc_0, acc_1, ..., agree_1, ... at the end, means over seeds."""
    keys = {key for run in group.runs.values() for line in run.lines for key in line
            if re.fullmatch(r"val/(acc|agree)_\d+", key)}
    return {key.removeprefix("val/"): group.mean(lambda run, key=key: run.last(key)) for key in sorted(keys)}


def tokens_per_second(run: Run) -> float:
    return float(run.at("tokens", run.length) / (run.at("seconds", run.length) or math.nan))


def median(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return statistics.median(known) if known else math.nan


def crossing(x: np.ndarray, y: np.ndarray, target: float) -> float | None:
    """From where on the line through the points stays at or below `target`; None: it does not end there.

    Not where it first is: noise alone would be first there, early, in all but the run that set the target.
    """
    if not len(x) or y[-1] > target + 1e-12:  # means of the same numbers may differ in the last bit
        return None
    above = np.flatnonzero(y > target + 1e-12)
    if not len(above):
        return float(x[0])
    k = above[-1]
    return float(np.interp(target, [y[k + 1], y[k]], [x[k + 1], x[k]]))


def at_equal_seconds(group: Group, base: Group, lengths: list[Group], end: Callable[[Run], float]) -> Interval:
    """The difference to the baseline of the length that takes as long, for each seed that has two such lengths.

    Between whole runs, since a run that is cut off has not let its learning rate fall; and up to 5% beyond the longest.
    Each pair by its own seconds, so that the interval is wide where clocks were unsteady.
    """
    differences = []
    for seed, run in group.runs.items() if group not in lengths else ():
        known = sorted((g.runs[seed].length, end(g.runs[seed])) for g in lengths if seed in g.runs)
        if seed in base.runs and len(known) > 1:
            wanted = run.length * step_cost(run, base.runs[seed])
            if 0.95 * known[0][0] <= wanted <= 1.05 * known[-1][0]:
                differences.append(end(run) - at_length(*zip(*known, strict=True), wanted))
    return interval(differences)


def at_length(lengths: tuple[int, ...], losses: tuple[float, ...], length: float) -> float:
    """The loss of a run of `length` steps, between runs of other lengths: straight over the logarithm of the length."""
    x = np.log(lengths)
    k = int(np.clip(np.searchsorted(lengths, length) - 1, 0, len(x) - 2))
    share = (np.log(length) - x[k]) / (x[k + 1] - x[k])
    return float(losses[k] + share * (losses[k + 1] - losses[k]))


def step_cost(run: Run, base: Run) -> float:
    """A step's time over the baseline's."""
    return run.seconds_per_step / (base.seconds_per_step or math.nan)
