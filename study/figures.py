"""What a comparison finds of each group of runs: means, differences to the baseline, times to get somewhere.

Differences are paired by seed: base and variant of one seed share the trunk's initial weights and the order of the
data.

What this leaves out on purpose: how figures are shown (tables.py, report.py).
"""

import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from study.groups import Group, comparable
from study.intervals import Interval, interval, pooled
from study.runs import Run
from study.seconds import StepRatio, at_equal_seconds
from system.shown import shown

SHARES = r"val/(acc|agree|exact)_\w+"  # keys that rise as a model learns; all others fall


class Goal(NamedTuple):
    """A value that a metric has to pass."""

    key: str
    value: float

    @property
    def rises(self) -> bool:
        return bool(re.fullmatch(SHARES, self.key))

    def __str__(self) -> str:
        return f"{self.key} {'>=' if self.rises else '<='} {self.value:g}"


class Passed(NamedTuple):
    """How a group's runs came to a goal."""

    reached: int  # runs that did
    steps: float  # medians over runs, of which those that never did count as infinite; NaN: most never did
    seconds: float
    ratio: Interval  # of the logarithm of seconds to the baseline's, where both of a pair did
    sooner: int  # pairs in which it got there before the baseline did, or the baseline never did
    pairs: int  # of which at least one was


@dataclass
class Figures:
    """What is found of a group, compared with the baseline."""

    group: Group
    comparable: bool  # judged on the baseline's tokens
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
    reached: int  # seeds whose own curve gets there
    cost: float  # step time over the baseline's; NaN: no clock to trust
    equal_seconds: Interval
    tokens_per_second: float
    peak_mib: float
    shares: dict[str, float]  # acc_0, agree_1, exact_again, ... at the end
    exact: dict[str, Interval]  # exact_again, ... -> difference to the baseline at the end
    passed: dict[Goal, Passed]


class Ends:
    """Where a run ends: the mean of the baseline's last evaluations, of others as many steps before their own end.

    best: each run's lowest evaluation instead, wherever that is.
    Errors: ValueError if the baseline has fewer than `last` evaluations after its start.
    """

    def __init__(self, base: Group, last: int, best: bool):
        evaluated = base.first.points("val/ntp")[0]
        if last > max((evaluated > 0).sum(), 1):
            raise ValueError(f"--last={last}: {base.label} has {(evaluated > 0).sum()} evaluations after its start")
        self.back, self.best = base.first.length - evaluated[-last:], best

    def __call__(self, run: Run) -> float:
        values = run.points("val/ntp")[1] if self.best else run.at("val/ntp", run.length - self.back)
        return float(values.min() if self.best else values.mean())

    def step(self, run: Run) -> float:
        at, values = run.points("val/ntp")
        return float(at[values.argmin()] if self.best else run.length)


def figures(groups: list[Group], ratios: list[StepRatio], steps: list[int], last: int = 1, best: bool = False,
            pool: bool = False, goals: Iterable[Goal] = ()) -> list[Figures]:
    """Of each group; the first is the baseline.

    ratios: of each group's step time. steps: at which val NTP is reported. last, best: see Ends. pool: one deviation
    of paired differences for all groups. goals: to which steps and seconds are counted.
    """
    end = Ends(groups[0], last, best)
    found = [figures_of(group, groups, step, steps, end) for group, step in zip(groups, ratios, strict=True)]
    for f in found:
        f.passed = {goal: passed(f.group, groups[0], goal) for goal in goals}
    if pool:
        pool_deviations(found)
    return found


def figures_of(group: Group, groups: list[Group], step: StepRatio, steps: list[int], end: Ends) -> Figures:
    base = groups[0]
    pairs, runs = group.pairs(base), list(group.runs.values())
    each = [end(a) - end(b) for a, b in pairs] if group.length == base.length else []
    ends = [end(run) for run in runs]
    same_tokens = comparable(group.first, base.first)
    same_seeds = [b for _, b in group.partners(base).values()]
    target = statistics.fmean(end(run) for run in same_seeds or base.runs.values()) if same_tokens else -math.inf
    reach = staying(*mean_curve(group), target)
    return Figures(
        group=group,
        comparable=same_tokens,
        at={at: group.mean(partial(ntp_at, step=at)) for at in steps},
        end=statistics.fmean(ends),
        ends=ends,
        end_step=group.mean(end.step),
        spread=statistics.stdev(ends) if len(ends) > 1 else math.nan,
        differences={at: interval([ntp_at(a, at) - ntp_at(b, at) for a, b in pairs]) for at in steps},
        difference=interval(each),
        each=each,
        steps_to_reach=reach,
        seconds_to_reach=None if reach is None else group.mean(partial(seconds_at, step=reach)),
        reached=sum(staying(*run.points("val/ntp"), target) is not None for run in runs),
        cost=math.nan if step.why else step.ratio,
        equal_seconds=at_equal_seconds(group, groups, step, end),
        tokens_per_second=group.mean(tokens_per_second),
        peak_mib=group.mean(lambda run: max(run.points("peak_mib")[1], default=math.nan)),
        shares=shares(group),
        exact=exact_differences(group, base),
        passed={})


def pool_deviations(found: list[Figures]) -> None:
    """One deviation of paired differences for all set-ups, at the end, at each step and at equal seconds."""
    sources = {"pairs", "pairs and gains"}
    for f, d in zip(found, pooled([f.difference for f in found], sources), strict=True):
        f.difference = d
    for f, d in zip(found, pooled([f.equal_seconds for f in found], sources), strict=True):
        f.equal_seconds = d
    for at in found[0].differences:
        for f, d in zip(found, pooled([f.differences[at] for f in found], sources), strict=True):
            f.differences[at] = d


# ---------------------------------------------------------------------------------------------
# parts of the above

def ntp_at(run: Run, step: float) -> float:
    return float(run.at("val/ntp", step))


def seconds_at(run: Run, step: float) -> float:
    return float(run.at("seconds", step))


def mean_curve(group: Group) -> tuple[np.ndarray, np.ndarray]:
    x, values = group.curve("val/ntp")
    return x, values.mean(0)


def tokens_per_second(run: Run) -> float:
    return float(run.at("tokens", run.length) / (run.at("seconds", run.length) or math.nan))


def keys_like(group: Group, pattern: str) -> list[str]:
    """Keys of its logs, in the order in which a person counts: acc_2 before acc_10."""
    keys = {key for run in group.runs.values() for line in run.lines for key in line if re.fullmatch(pattern, key)}
    return sorted(keys, key=lambda key: (key.split("_")[0], len(key), key))


def shares(group: Group) -> dict[str, float]:
    """acc_0, acc_1, agree_1, exact_again, ... at the end, means over seeds."""
    return {key.removeprefix("val/"): group.mean(partial(Run.last, key=key)) for key in keys_like(group, SHARES)}


def exact_differences(group: Group, base: Group) -> dict[str, Interval]:
    """{exact_<group of answers>: the difference to the baseline at the end}."""
    return {key.removeprefix("val/"): interval([a.last(key) - b.last(key) for a, b in group.pairs(base)])
            for key in keys_like(group, r"val/exact_\w+")}


def staying(x: np.ndarray, y: np.ndarray, target: float) -> float | None:
    """From where on the line through the points stays at or below `target`; None: it does not end there.

    Not where it first is: by noise, every run but the one that set the target would be there early.
    """
    if not len(x) or y[-1] > target + 1e-12:  # means of the same numbers may differ in the last bit
        return None
    above = np.flatnonzero(y > target + 1e-12)
    if not len(above):
        return float(x[0])
    k = above[-1]
    return float(np.interp(target, [y[k + 1], y[k]], [x[k + 1], x[k]]))


def first_pass(run: Run, goal: Goal) -> float:
    """The step at which the line through a run's points first passes a goal; infinite if it never does."""
    x, y = run.points(goal.key)
    target = goal.value
    if goal.rises:
        y, target = -y, -target
    passes = np.flatnonzero(y <= target)
    if not len(passes):
        return math.inf
    k = passes[0]
    return float(np.interp(target, [y[k], y[k - 1]], [x[k], x[k - 1]]) if k else x[0])


def passed(group: Group, base: Group, goal: Goal) -> Passed:
    def seconds(run: Run) -> float:
        step = first_pass(run, goal)
        return step if math.isinf(step) else seconds_at(run, step)

    def median(values: list[float]) -> float:
        middle = statistics.median(values)
        return math.nan if math.isinf(middle) else middle

    runs = list(group.runs.values())
    times = [(seconds(a), seconds(b)) for a, b in group.partners(base).values()] if group is not base else []
    return Passed(
        reached=sum(math.isfinite(first_pass(run, goal)) for run in runs),
        steps=median([first_pass(run, goal) for run in runs]),
        seconds=median([seconds(run) for run in runs]),
        ratio=interval([math.log(a / b) for a, b in times if 0.0 < a < math.inf and 0.0 < b < math.inf]),
        sooner=sum(a < b for a, b in times),
        pairs=sum(math.isfinite(min(a, b)) for a, b in times))


def parse_goal(word: str) -> Goal:
    """KEY=VALUE. Errors: ValueError."""
    key, _, value = word.partition("=")
    try:
        return Goal(key, float(value))
    except ValueError:
        raise ValueError(f"--until={shown(word)}: expected KEY=VALUE, as in val/exact_in_1=0.24") from None


def known_goals(goals: list[Goal], groups: Iterable[Group]) -> None:
    """ValueError for a goal that no run has a value of."""
    keys = {key for group in groups for run in group.runs.values() for line in run.lines for key in line}
    for goal in goals:
        if goal.key not in keys:
            near = sorted(shown(key, 40) for key in keys if key.startswith("val/"))
            raise ValueError(f"--until={shown(goal.key)}: no run has it; there are {', '.join(near)}")
