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
from study.intervals import Interval, interval, pooled, signed_rank
from study.runs import Run
from study.seconds import StepRatio, at_equal_seconds, pairs_at_equal_seconds
from system.shown import shown

SHARES = r"val/(acc|agree|exact)_\w+"  # keys that rise as a model learns; all others fall


class Goal(NamedTuple):
    """A value that a metric has to pass."""

    key: str
    value: float  # NaN: half of where the baseline ends

    @property
    def rises(self) -> bool:
        return rises(self.key)

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
    p_steps: float  # by signed ranks of the differences of pairs; who never gets there is behind all who do
    p_seconds: float


class Judged(NamedTuple):
    """How a group compares with the baseline by a metric other than val NTP, at the end."""

    end: float
    difference: Interval
    p: float  # by signed ranks
    equal_seconds: Interval
    equal_seconds_p: float


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
    judged: dict[str, Judged]  # by key


class Ends:
    """Where a run ends: the mean of the baseline's last evaluations, of others as many steps before their own end.

    best: each run's evaluation of the lowest val NTP instead, wherever that is. key: the metric.
    Errors: ValueError if the baseline has fewer than `last` evaluations after its start.
    """

    def __init__(self, base: Group, last: int, best: bool, key: str = "val/ntp"):
        evaluated = base.first.points("val/ntp")[0]
        if last > max((evaluated > 0).sum(), 1):
            raise ValueError(f"--last={last}: {base.label} has {(evaluated > 0).sum()} evaluations after its start")
        self.back, self.best, self.key = base.first.length - evaluated[-last:], best, key

    def __call__(self, run: Run) -> float:
        return float(np.mean(run.at(self.key, self.step(run) if self.best else run.length - self.back)))

    def step(self, run: Run) -> float:
        at, values = run.points("val/ntp")
        return float(at[values.argmin()] if self.best else run.length)


def figures(groups: list[Group], ratios: list[StepRatio], steps: list[int], last: int = 1, best: bool = False,
            pool: bool = False, goals: Iterable[Goal] = (), judge: Iterable[str] = ()) -> list[Figures]:
    """Of each group; the first is the baseline.

    ratios: of each group's step time. steps: at which val NTP is reported. last, best: see Ends. pool: one deviation
    of paired differences for all groups. goals: to which steps and seconds are counted. judge: metrics by which the
    end is compared as well.
    """
    end = Ends(groups[0], last, best)
    found = [figures_of(group, groups, step, steps, end) for group, step in zip(groups, ratios, strict=True)]
    goals = [half_of_the_end(goal, groups[0]) if math.isnan(goal.value) else goal for goal in goals]
    for f, step in zip(found, ratios, strict=True):
        f.passed = {goal: passed(f.group, groups[0], goal) for goal in goals}
        f.judged = {key: judged(f.group, groups, step, Ends(groups[0], last, best, key)) for key in judge}
    if pool:
        pool_deviations(found[1:])
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
        seconds_to_reach=None if reach is None or step.why else group.mean(partial(seconds_at, step=reach)),
        reached=sum(staying(*run.points("val/ntp"), target) is not None for run in runs),
        cost=math.nan if step.why else step.ratio,
        equal_seconds=at_equal_seconds(group, groups, step, end),
        tokens_per_second=group.mean(tokens_per_second),
        peak_mib=group.mean(lambda run: max(run.points("peak_mib")[1], default=math.nan)),
        shares=shares(group),
        exact=exact_differences(group, base),
        passed={},
        judged={})


def pool_deviations(others: list[Figures]) -> None:
    """One deviation of paired differences for all set-ups, without the baseline's to itself, which are 0."""
    sources = {"pairs", "pairs and gains"}
    for f, d in zip(others, pooled([f.difference for f in others], sources), strict=True):
        f.difference = d
    for f, d in zip(others, pooled([f.equal_seconds for f in others], sources), strict=True):
        f.equal_seconds = d
    for at in others[0].differences if others else ():
        for f, d in zip(others, pooled([f.differences[at] for f in others], sources), strict=True):
            f.differences[at] = d


# ---------------------------------------------------------------------------------------------
# parts of the above

def rises(key: str) -> bool:
    return bool(re.fullmatch(SHARES, key))


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
    partners = group.partners(base).values() if group is not base else []
    times = [(seconds(a), seconds(b)) for a, b in partners]
    steps = [(first_pass(a, goal), first_pass(b, goal)) for a, b in partners]
    return Passed(
        reached=sum(math.isfinite(first_pass(run, goal)) for run in runs),
        steps=median([first_pass(run, goal) for run in runs]),
        seconds=median([seconds(run) for run in runs]),
        ratio=interval([math.log(a / b) for a, b in times if 0.0 < a < math.inf and 0.0 < b < math.inf]),
        sooner=sum(a < b for a, b in times),
        pairs=len(behind(times)),
        p_steps=signed_rank(behind(steps)),
        p_seconds=signed_rank(behind(times)))


def behind(pairs: list[tuple[float, float]]) -> list[float]:
    """By how much the first of each pair is later; of pairs in which at least one gets there."""
    return [a - b for a, b in pairs if math.isfinite(min(a, b))]


def half_of_the_end(goal: Goal, base: Group) -> Goal:
    """The goal that is half of the value with which the baseline ends, mean over seeds."""
    return goal._replace(value=0.5 * base.mean(partial(Run.last, key=goal.key)))


def judged(group: Group, groups: list[Group], step: StepRatio, end: Ends) -> Judged:
    """The ends of all pairs by the metric of `end`."""
    each = [end(a) - end(b) for a, b in group.pairs(groups[0])]
    at_equal = at_equal_seconds(group, groups, step, end)
    if math.isnan(at_equal.mean) and not at_equal.why:
        at_equal = Interval(math.nan, 0)  # the baseline itself, or logs without this metric
    pairs = pairs_at_equal_seconds(group, groups, step, end) if at_equal.n else []
    return Judged(group.mean(end), interval(each), signed_rank(each), at_equal, signed_rank(pairs))


def parse_goal(word: str) -> Goal:
    """KEY=VALUE or KEY=half. Errors: ValueError."""
    key, _, value = word.partition("=")
    try:
        goal = Goal(key, math.nan if value == "half" else float(value))
    except ValueError:
        raise ValueError(f"--until={shown(word)}: expected KEY=VALUE, as in val/exact_in_1=0.24, or KEY=half") from None
    if math.isnan(goal.value) and not goal.rises:
        raise ValueError(f"--until={shown(word)}: half of the end: expected a share, as in val/acc_0=half")
    return goal


def check_known(option: str, wanted: Iterable[str], groups: Iterable[Group]) -> None:
    """ValueError for a key that no run has a value of."""
    keys = {key for group in groups for run in group.runs.values() for line in run.lines for key in line}
    for key in wanted:
        if key not in keys:
            near = sorted(shown(key, 40) for key in keys if key.startswith("val/"))
            raise ValueError(f"{option}={shown(key)}: no run has it; there are {', '.join(near)}")
