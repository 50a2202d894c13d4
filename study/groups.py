"""Runs in groups, and what can be said of them beside a baseline: means, intervals, times to reach it.

Runs that differ in nothing but the seed are a group. Differences are paired by seed: base and variant of one seed
share the trunk's initial weights and the order of the data.

What this leaves out on purpose: where runs come from (runs.py), how figures are shown (compare.py, report.py).
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from settings import Heads, Looking, names_of
from study.runs import HARMLESS, OWN_FACTS, Run

OBJECTIVE = names_of(Heads, Looking)  # what set-ups are meant to differ in
COMPUTED = {"device", "path", "dtype"}  # facts of a run's arithmetic
MANY = 1000  # seeds; more are not counted


class Interval(NamedTuple):
    """A mean and half the width of its 95% interval; NaN with less than two values."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        half = "" if math.isnan(self.half) else f" ± {self.half:.4f}"
        return f"{self.mean:+.4f}{half}" if self.n else "–"

    @property
    def verdict(self) -> str:
        if self.n < 2:
            return "one seed" if self.n else "–"
        return "tie" if abs(self.mean) <= self.half else "better" if self.mean < 0.0 else "worse"


def interval(values: list[float]) -> Interval:
    """Student's t at 95% over `values`, of which NaNs are left out."""
    values = [v for v in values if not math.isnan(v)]
    n = len(values)
    half = student(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(statistics.fmean(values) if n else math.nan, half, n)


def student(probability: float, freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(probability, freedom))


def deviation_interval(deviation: float, n: int) -> tuple[float, float]:
    """The 95% interval of a standard deviation found from n values, by chi-square."""
    from scipy.stats import chi2

    low, high = chi2.ppf((0.975, 0.025), n - 1)
    return deviation * math.sqrt((n - 1) / low), deviation * math.sqrt((n - 1) / high)


def seeds_needed(deviation: float, effect: float) -> int:
    """How many seeds let a true mean difference `effect` be told from 0 in four of five comparisons (95%, two-sided).

    deviation: of one seed's difference. The usual normal-theory formula, with t in place of z.
    """
    n = 2
    while n < MANY and n < ((student(0.975, n - 1) + student(0.8, n - 1)) * deviation / effect) ** 2:
        n += 1
    return n


@dataclass
class Group:
    """Runs that differ in the seed alone."""

    label: str
    runs: dict[int | str, Run] = field(default_factory=dict)  # by seed; where that is unknown by where they are

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def length(self) -> int:
        return max(run.length for run in self.runs.values())

    def pairs(self, base: "Group") -> list[tuple[Run, Run]]:
        """(run, the baseline's of the same seed), of those that let the learning rate fall at the same pace."""
        if self.first.config.get("max_iters") != base.first.config.get("max_iters"):
            return []
        return [(run, base.runs[seed]) for seed, run in self.runs.items() if seed in base.runs]

    def mean(self, value: Callable[[Run], float]) -> float:
        found = [v for v in map(value, self.runs.values()) if not math.isnan(v)]
        return statistics.fmean(found) if found else math.nan

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Iterations, and the values (seeds, iterations) of `key` there, as far as all seeds have come."""
        each = [run.points(key)[0] for run in self.runs.values()]
        if any(len(x) == 0 for x in each):
            return np.zeros(0), np.zeros((len(each), 0))
        x = np.unique(np.concatenate(each))
        x = x[(x >= max(e[0] for e in each)) & (x <= min(e[-1] for e in each))]
        return x, np.array([run.at(key, x) for run in self.runs.values()])


def step_cost(run: Run, base: Run) -> float:
    """A step's time over the baseline's."""
    return run.seconds_per_step / (base.seconds_per_step or math.nan)


# ---------------------------------------------------------------------------------------------
# groups

def settings_alike(a: Run, b: Run, but: set[str] = frozenset()) -> bool:
    """Have both runs the same settings, as far as both logs tell; or no log of settings, and but for seeds one name?"""
    def told(run: Run) -> dict:
        return run.config | {"init_from": run.config.get("init_from", "scratch").replace("resume", "scratch")}

    if not a.config or not b.config:
        return not a.config and not b.config and split_name(a)[0] == split_name(b)[0] and not but
    mine, theirs = told(a), told(b)
    return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys() - HARMLESS - but)


def split_name(run: Run) -> tuple[str, int | None]:
    """A run's name without its seed, and the seed: base-1337, base_1337, base_seed1337.

    Where the log does not tell the seed, a number at the end of the name is it.
    """
    found = re.fullmatch(rf"(.+?)[-_](?:seed)?({r'[0-9]+' if run.seed is None else run.seed})", run.name)
    return (found[1], int(found[2])) if found else (run.name, run.seed)


def computed_alike(a: Run, b: Run) -> bool:
    """Have both runs gone through the same arithmetic, as far as both logs tell?"""
    return all(a.facts[key] == b.facts[key] for key in COMPUTED & a.facts.keys() & b.facts.keys())


def group_runs(runs: list[Run], problems: list[str]) -> list[Group]:
    """In the order of their first runs; labels are names without seeds, and with settings where these are alike.

    Runs of one seed that went through other arithmetic are in two groups; of two seeds in one, with a warning.
    """
    groups: list[Group] = []
    for run in runs:
        name, seed = split_name(run)
        key = run.where if seed is None else seed
        same = [g for g in groups if settings_alike(run, g.first)]
        group = next((g for g in same if computed_alike(run, g.first)),
                     next((g for g in same if key not in g.runs), None))
        if group is None:
            groups.append(group := Group(name))
        if key in group.runs:
            problems.append(f"{run.where}: the same settings and seed as {group.runs[key].where}; left out")
        else:
            group.runs[key] = run
    for group in groups:
        for key, run in list(group.runs.items()):
            if run.length < group.length:
                problems.append(f"{run.where}: ends at step {run.length:,}, its group at {group.length:,}; left out")
                del group.runs[key]
    for label in {g.label for g in groups}:
        alike = [g for g in groups if g.label == label]
        for number, group in enumerate(alike[1:], 2):
            first, config = alike[0].first.config, group.first.config
            differ = [f"{k}={v}" for k, v in config.items() if k not in HARMLESS and first.get(k, v) != v]
            differ += [f"{k}={v}" for k, v in group.first.facts.items()
                       if k in COMPUTED and alike[0].first.facts.get(k, v) != v]
            group.label += f" ({', '.join(differ) or number})"
    return groups


def choose_baseline(groups: list[Group], label: str | None) -> list[Group]:
    """The groups with the baseline first. Errors: ValueError if there is none called so."""
    if label is None:
        return groups
    found = [g for g in groups if g.label == label]
    if not found:
        raise ValueError(f"--baseline={label}: expected one of {', '.join(g.label for g in groups)}")
    return found + [g for g in groups if g is not found[0]]


def of_other_length(groups: list[Group]) -> list[Group]:
    """The first group, and those that differ from it in nothing but how long they train."""
    length = {"max_iters", "warmup_iters"}
    return groups[:1] + [g for g in groups[1:] if settings_alike(g.first, groups[0].first, length)]


def families(runs: list[Run], setting: str, problems: list[str]) -> dict[float, list[Run]]:
    """The runs by their value of a setting, smallest first. Runs whose log has no number for it are left out."""
    found: dict[float, list[Run]] = {}
    for run in runs:
        value = run.config.get(setting)
        if type(value) in (int, float):
            found.setdefault(value, []).append(run)
        else:
            problems.append(f"{run.where}: {setting}: expected a number, found {value!r}; left out")
    return dict(sorted(found.items()))


def warnings(groups: list[Group]) -> list[str]:
    """What runs differ in beside the objective and the seed, and what seconds are worth."""
    found, base = [], groups[0]
    for group in groups:
        runs, facts = list(group.runs.values()), group.first.facts
        for key in sorted({key for run in runs for key in run.facts} - OWN_FACTS):
            values = dict.fromkeys(str(run.facts[key]) for run in runs if key in run.facts)
            if len(values) > 1:
                found.append(f"{group.label}: its seeds differ in {key}: {', '.join(values)}")
        each = [run.seconds_per_step for run in runs if run.seconds_per_step > 0.0]
        if len(each) > 1 and max(each) > 1.1 * min(each):
            found.append(f"{group.label}: its seeds' step times are up to {max(each) / min(each) - 1.0:.0%} apart, "
                         "though they do the same: seconds of a shared machine (ablate.py measures them in turns)")
        if facts.get("device") == "cpu" and len(facts.get("cores", ())) > facts.get("threads", math.inf):
            found.append(f"{group.label}: not pinned to cores of its own: seconds may be those of a shared machine")
        if not group.first.config:
            found.append(f"{group.label}: logs without settings; grouped by name, and not checked for differences")
        if unknown := [key for key in group.runs if isinstance(key, str)]:
            found.append(f"{group.label}: the seed of {', '.join(unknown)} is not known; in no pair")
        if group is base:
            continue
        for ours, theirs, ignored in ((group.first.config, base.first.config, HARMLESS | OBJECTIVE | {"init_from"}),
                                      (facts, base.first.facts, OWN_FACTS)):
            for key in sorted(ours.keys() & theirs.keys() - ignored):
                if ours[key] != theirs[key]:
                    found.append(f"{group.label}: {key}={ours[key]}, {base.label} has {theirs[key]}"
                                 + "; val NTP is of other tokens and cannot be compared" * (key == "val_crc32"))
        if alone := [str(key) for key in group.runs.keys() ^ base.runs.keys() if isinstance(key, int)]:
            found.append(f"{group.label}: seeds {', '.join(sorted(alone))} have no partner in one of it and "
                         f"{base.label}, and are in no difference")
        if group.length != base.length:
            found.append(f"{group.label}: ends at step {group.length:,}, {base.label} at {base.length:,}; "
                         "no difference at the end")
    return found


# ---------------------------------------------------------------------------------------------
# figures

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
        x, values = group.curve("val/ntp")
        reach = crossing(x, values.mean(0), target)
        keys = {key for run in runs for line in run.lines for key in line if re.fullmatch(r"val/(acc|agree)_\d+", key)}
        found.append(Figures(
            group, {step: group.mean(lambda run, step=step: float(run.at("val/ntp", step))) for step in steps},
            statistics.fmean(ends), ends, group.mean(end_step), statistics.stdev(ends) if len(ends) > 1 else math.nan,
            {step: interval([float(a.at("val/ntp", step) - b.at("val/ntp", step)) for a, b in pairs])
             for step in steps},
            interval(each), each, reach,
            None if reach is None else group.mean(lambda run, reach=reach: float(run.at("seconds", reach))),
            sum(crossing(*run.points("val/ntp"), target) is not None for run in runs),
            median(step_cost(run, base.runs[seed]) for seed, run in group.runs.items() if seed in base.runs),
            at_equal_seconds(group, base, lengths, end),
            group.mean(tokens_per_second),
            group.mean(lambda run: max(run.points("peak_mib")[1], default=math.nan)),
            {key.removeprefix("val/"): group.mean(lambda run, key=key: run.last(key)) for key in sorted(keys)}))
    return found


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
