"""Runs in groups, and what can be said of them beside a baseline: means, intervals, times to reach it.

Runs that differ in nothing but the seed are a group. Differences are paired by seed: base and variant of one seed
share the trunk's initial weights and the order of the data.

What this leaves out on purpose: where runs come from (runs.py), how figures are shown (compare.py, report.py).
"""

import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from runs import Run

OBJECTIVE = {  # settings that set-ups are meant to differ in: those under "looking ahead" in settings.py
    "n_future_heads", "head", "nitp_weight", "consistency_weight", "consistency_direction", "consistency_teacher",
    "consistency_temperature", "head_decay", "head_init", "aux_grad_scale", "aux_grad_power", "freeze_trunk_iters",
    "freeze_embeddings", "curriculum", "spelling_letters", "spelling_weight", "spelling_case", "order_window",
    "order_weight", "soft_weight", "soft_neighbours", "soft_temperature", "soft_refresh", "superposition",
    "superposition_end", "mask_document_ends", "aux_schedule", "aux_start", "aux_end"}
HARMLESS = {"seed", "out_dir", "data_dir", "eval_interval", "eval_only", "log_interval", "wandb_log", "wandb_project",
            "wandb_run_name", "wandb_mode", "device", "dtype", "path", "compile"}  # the last four: by facts
OWN_FACTS = {"cores", "parameters"}  # of each run its own


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
    runs: dict[int, Run] = field(default_factory=dict)  # by seed

    @property
    def config(self) -> dict:
        return next(iter(self.runs.values())).config

    @property
    def length(self) -> int:
        return max(run.length for run in self.runs.values())

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
        return x, np.array([[run.at(key, at) for at in x] for run in self.runs.values()]).reshape(len(each), len(x))


def seconds_per_step(run: Run) -> float:
    return run.end("seconds") / run.length if run.length else math.nan


def step_cost(run: Run, base: Run) -> float:
    """A step's time over the baseline's."""
    return seconds_per_step(run) / (seconds_per_step(base) or math.nan)


def set_step_seconds(groups: list[Group], measured: dict[str, list[float]]) -> None:
    """Stretch each run's seconds to the step times measured, {label: seconds of a step in each round}.

    The first group's are medians over rounds; others' those times the median of ratios within rounds, since machines
    drift between them. The baseline's at other lengths are the baseline's.
    """
    base = groups[0]
    if base.label not in measured:
        return
    for group in groups:
        of = base.label if group in of_other_length(groups) else group.label
        if of in measured:
            ratio = statistics.median(a / b for a, b in zip(measured[of], measured[base.label], strict=True))
            for run in group.runs.values():
                stretch = statistics.median(measured[base.label]) * ratio / seconds_per_step(run)
                for line in run.lines:
                    if "seconds" in line:
                        line["seconds"] *= stretch


def of_other_length(groups: list[Group]) -> list[Group]:
    """The first group, and those that differ from it in nothing but how long they train."""
    first = next(iter(groups[0].runs.values()))
    return [g for g in groups if settings_alike(next(iter(g.runs.values())), first, {"max_iters", "warmup_iters"})]


# ---------------------------------------------------------------------------------------------
# groups

def settings_alike(a: Run, b: Run, but: set[str] = frozenset()) -> bool:
    """Have both runs the same settings, as far as both logs tell?"""
    def told(run: Run) -> dict:
        return run.config | {"init_from": run.config.get("init_from", "scratch").replace("resume", "scratch")}

    if bool(a.config) != bool(b.config) or (not a.config and stem(a) != stem(b)):
        return False
    mine, theirs = told(a), told(b)
    return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys() - HARMLESS - but)


def stem(run: Run) -> str:
    """The name of a run without its seed."""
    seed = r"\d+" if run.seed is None else str(run.seed)
    return re.sub(rf"[-_]?(seed)?{seed}$", "", run.name) or run.name


def seed_of(run: Run, group: Group) -> int:
    """The run's seed; where the log does not say, the number at the end of its name, or a number of its own."""
    if run.seed is not None:
        return run.seed
    found = re.search(r"[-_](?:seed)?(\d+)$", run.name)
    return int(found.group(1)) if found else -1 - len(group.runs)


def group_runs(runs: list[Run], problems: list[str]) -> list[Group]:
    """In the order of their first runs; labels are names without seeds, and with settings where these are alike."""
    groups: list[Group] = []
    for run in runs:
        group = next((g for g in groups if settings_alike(run, next(iter(g.runs.values())))), None)
        if group is None:
            groups.append(group := Group(stem(run)))
        seed = seed_of(run, group)
        if seed in group.runs:
            problems.append(f"{run.where}: the same settings and seed as {group.runs[seed].where}; left out")
        else:
            group.runs[seed] = run
    for group in groups:
        for seed, run in list(group.runs.items()):
            if run.length < group.length:
                problems.append(f"{run.where}: ends at step {run.length:,}, its group at {group.length:,}; left out")
                del group.runs[seed]
    for label in {g.label for g in groups}:
        alike = [g for g in groups if g.label == label]
        for group in alike[1:]:
            first = alike[0].config
            differ = [f"{k}={v}" for k, v in group.config.items() if k not in HARMLESS and first.get(k, v) != v]
            group.label += f" ({', '.join(differ)})" if differ else f" ({len(groups)})"
    return groups


def choose_baseline(groups: list[Group], label: str | None) -> list[Group]:
    """The groups with the baseline first. Errors: ValueError if there is none called so."""
    if label is None:
        return groups
    found = [g for g in groups if g.label == label]
    if not found:
        raise ValueError(f"--baseline={label}: expected one of {', '.join(g.label for g in groups)}")
    return found + [g for g in groups if g is not found[0]]


def warnings(groups: list[Group]) -> list[str]:
    """What runs differ in beside the objective and the seed."""
    found, base = [], groups[0]
    for group in groups:
        facts = [run.facts for run in group.runs.values()]
        for key in sorted({key for f in facts for key in f} - OWN_FACTS):
            values = {json.dumps(f[key]): None for f in facts if key in f}
            if len(values) > 1:
                found.append(f"{group.label}: its seeds differ in {key}: {', '.join(values)}")
        if group is base:
            continue
        ours, theirs = group.config, base.config
        for key in sorted(ours.keys() & theirs.keys() - HARMLESS - OBJECTIVE - {"init_from"}):
            if ours[key] != theirs[key]:
                found.append(f"{group.label}: {key}={ours[key]}, {base.label} has {theirs[key]}")
        here, there = facts[0], next(iter(base.runs.values())).facts
        for key in sorted(here.keys() & there.keys() - OWN_FACTS):
            if here[key] != there[key]:
                found.append(f"{group.label}: {key} is {here[key]}, {base.label} has {there[key]}"
                             + ("; val NTP is of other tokens and cannot be compared" if key == "val_crc32" else ""))
        if unpaired := sorted(group.runs.keys() ^ base.runs.keys()):
            found.append(f"{group.label}: seeds {', '.join(map(str, unpaired))} have no partner in one of it and "
                         f"{base.label}, and are in no difference")
        if group.length != base.length:
            found.append(f"{group.label}: ends at step {group.length:,}, {base.label} at {base.length:,}; "
                         "no difference at the end")
    unknown = [g.label for g in groups if any(not run.config for run in g.runs.values())]
    if unknown:
        found.append(f"{', '.join(unknown)}: logs without settings; grouped by name, and not checked for differences")
    for group in groups:
        each = [seconds for run in group.runs.values() if (seconds := seconds_per_step(run)) > 0.0]
        if len(each) > 1 and max(each) > 1.1 * min(each):
            found.append(f"{group.label}: its seeds' step times are up to {max(each) / min(each) - 1.0:.0%} apart, "
                         "though they do the same: seconds of a shared machine (ablate.py measures them in turns)")
    loose = [g.label for g in groups for f in [next(iter(g.runs.values())).facts]
             if f.get("device") == "cpu" and f.get("cores") and len(f["cores"]) > f.get("threads", 1)]
    if loose:
        found.append(f"{', '.join(loose)}: not pinned to cores of their own; seconds may be those of a shared machine")
    return found


# ---------------------------------------------------------------------------------------------
# figures

@dataclass
class Figures:
    """What is told of a group, beside `base`."""

    group: Group
    at: dict[int, float]  # step -> mean val NTP
    end: float
    spread: float  # standard deviation between seeds at the end; NaN with one seed
    differences: dict[int, Interval]  # step -> to the baseline
    difference: Interval  # at the end
    each: list[float]  # of which it is the mean
    steps_to_reach: float | None  # the baseline's end; None: not reached
    seconds_to_reach: float | None
    reached: int  # by so many seeds of their own
    cost: float  # step time over the baseline's
    equal_seconds: Interval
    tokens_per_second: float
    peak_mib: float
    accuracy: dict[str, float]  # acc_0, acc_1, ..., agree_1, ... at the end


def figures(groups: list[Group], steps: list[int], last: int) -> list[Figures]:
    """Of each group; the first is the baseline. The end is the mean of the `last` evaluations."""
    base = groups[0]
    target = base.mean(lambda run: run.end("val/ntp", last))
    lengths = of_other_length(groups)
    found = []
    for group in groups:
        pairs = [(run, base.runs[seed]) for seed, run in group.runs.items() if seed in base.runs]
        same_length = group.length == base.length
        each = [run.end("val/ntp", last) - other.end("val/ntp", last) for run, other in pairs] if same_length else []
        ends = [run.end("val/ntp", last) for run in group.runs.values()]
        costs = [cost for a, b in pairs if not math.isnan(cost := step_cost(a, b))]
        x, values = group.curve("val/ntp")
        reach = crossing(x, values.mean(0), target) if group is not base else float(base.length)
        seconds = group.mean(lambda run, at=reach: run.at("seconds", at)) if reach is not None else None
        keys = sorted({key for run in group.runs.values() for line in run.lines for key in line
                       if re.fullmatch(r"val/(acc|agree)_\d+", key)})
        found.append(Figures(
            group, {step: group.mean(lambda run, at=step: run.at("val/ntp", at)) for step in steps},
            statistics.fmean(ends), statistics.stdev(ends) if len(ends) > 1 else math.nan,
            {step: interval([a.at("val/ntp", step) - b.at("val/ntp", step) for a, b in pairs]) for step in steps},
            interval(each), each, reach, seconds,
            sum(bool(run.points("val/ntp")[1].min() <= target) for run in group.runs.values()),
            statistics.median(costs) if costs else math.nan, at_equal_seconds(group, base, lengths, last),
            group.mean(lambda run: run.end("tokens") / run.end("seconds") if run.end("seconds") else math.nan),
            group.mean(lambda run: max(run.points("peak_mib")[1], default=math.nan)),
            {key.removeprefix("val/"): group.mean(lambda run, key=key: run.end(key)) for key in keys}))
    return found


def crossing(x: np.ndarray, y: np.ndarray, target: float) -> float | None:
    """Where the line through the points first is down at `target`; None: nowhere."""
    below = np.flatnonzero(y <= target)
    if not len(below):
        return None
    k = below[0]
    return float(x[0] if k == 0 else np.interp(target, [y[k], y[k - 1]], [x[k], x[k - 1]]))


def at_equal_seconds(group: Group, base: Group, lengths: list[Group], last: int) -> Interval:
    """The difference to the baseline of the length that takes as long, for each seed that has two such lengths.

    Between whole runs, since a run that is cut off has not let its learning rate fall; and up to 5% beyond the longest.
    Each pair by its own seconds, so that the interval is wide where clocks were unsteady.
    """
    differences = []
    for seed, run in group.runs.items() if group not in lengths else ():
        known = sorted((g.runs[seed].length, g.runs[seed].end("val/ntp", last)) for g in lengths if seed in g.runs)
        if seed in base.runs and len(known) > 1:
            wanted = run.length * step_cost(run, base.runs[seed])
            if 0.95 * known[0][0] <= wanted <= 1.05 * known[-1][0]:
                differences.append(run.end("val/ntp", last) - at_length(*zip(*known, strict=True), wanted))
    return interval(differences)


def at_length(lengths: tuple[int, ...], losses: tuple[float, ...], length: float) -> float:
    """The loss of a run of `length` steps, between runs of other lengths: straight over the logarithm of the length."""
    x = np.log(lengths)
    k = int(np.clip(np.searchsorted(lengths, length) - 1, 0, len(x) - 2))
    share = (np.log(length) - x[k]) / (x[k + 1] - x[k])
    return float(losses[k] + share * (losses[k + 1] - losses[k]))
