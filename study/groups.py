"""Runs in groups: those that differ in the seed only. And what else groups differ in than what they compare.

What this leaves out on purpose: where runs come from (runs.py), what is found of groups (figures.py).
"""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from settings import Heads, Looking, names_of
from study.runs import HARMLESS, OWN_FACTS, Run

OBJECTIVE = names_of(Heads, Looking)  # what set-ups are meant to differ in
COMPUTED = {"device", "path", "dtype"}  # facts of a run's arithmetic


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
                    remark = f"{group.label}: {key}={ours[key]}, {base.label} has {theirs[key]}"
                    if key == "val_crc32":
                        remark += "; val NTP is of other tokens and cannot be compared"
                    found.append(remark)
        if alone := [str(key) for key in group.runs.keys() ^ base.runs.keys() if isinstance(key, int)]:
            found.append(f"{group.label}: seeds {', '.join(sorted(alone))} have no partner in one of it and "
                         f"{base.label}, and are in no difference")
        if group.length != base.length:
            found.append(f"{group.label}: ends at step {group.length:,}, {base.label} at {base.length:,}; "
                         "no difference at the end")
    return found
