"""Groups of runs that differ in the seed only, and remarks on what else groups differ in besides the objective.

What this leaves out on purpose: where runs come from (runs.py), what is found of groups (figures.py).
"""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from settings import Heads, Looking, names_of
from study.runs import HARMLESS, OWN_FACTS, Remark, Run, joined
from system.shown import shown

OBJECTIVE = names_of(Heads, Looking)  # what set-ups are meant to differ in
COMPUTED = {"device", "path", "dtype"}  # facts of a run's arithmetic
MOST_NAMED = 3  # settings in a label


@dataclass
class Group:
    """Runs that differ in the seed only: a set-up."""

    label: str
    runs: dict[int | str, Run] = field(default_factory=dict)  # by seed; where that is unknown by where they are

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def length(self) -> int:
        return max(run.length for run in self.runs.values())

    def partners(self, base: "Group") -> dict[int | str, tuple[Run, Run]]:
        """{seed: (run, the baseline's of the same seed)}; none if both were judged on other tokens."""
        if not comparable(self.first, base.first):
            return {}
        return {seed: (run, base.runs[seed]) for seed, run in self.runs.items() if seed in base.runs}

    def pairs(self, base: "Group") -> list[tuple[Run, Run]]:
        """The partners, if their learning rates fall at the same pace."""
        same = self.first.config.get("max_iters") == base.first.config.get("max_iters")
        return list(self.partners(base).values()) if same else []

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
    """Do both runs have the same settings, as far as both logs say? Without settings: the same name but for the seed?

    but: settings that may differ.
    """
    if not a.config or not b.config:
        return not a.config and not b.config and split_name(a)[0] == split_name(b)[0] and not but
    mine, theirs = settings_of(a), settings_of(b)
    return all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys() - HARMLESS - but)


def settings_of(run: Run) -> dict:
    """A run's settings. init_from is what it began with, and of another run's checkpoint the path without the seed."""
    start = str(run.config.get("init_from", "scratch"))
    if start in ("resume", "auto"):
        start = "scratch"
    return run.config | {"init_from": re.sub(rf"(?<!\d){run.seed}(?!\d)", "SEED", start)}


def split_name(run: Run) -> tuple[str, int | None]:
    """A run's name without its seed, and the seed: base-1337, base_1337, base_seed1337.

    Where the log does not say the seed, a number at the end of the name is it.
    """
    found = re.fullmatch(rf"(.+?)[-_](?:seed)?({r'[0-9]+' if run.seed is None else run.seed})", run.name)
    return (found[1], int(found[2])) if found else (run.name, run.seed)


def computed_alike(a: Run, b: Run) -> bool:
    """Did both runs go through the same arithmetic, as far as both logs say?"""
    return all(a.facts[key] == b.facts[key] for key in COMPUTED & a.facts.keys() & b.facts.keys())


def group_runs(runs: list[Run], problems: list[Remark]) -> list[Group]:
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
            problems.append(Remark(run.where, f"the same settings and seed as {group.runs[key].where}; left out"))
        else:
            group.runs[key] = run
    for group in groups:
        for key, run in list(group.runs.items()):
            if run.length < group.length:
                what = f"ends at step {run.length:,}, its group at {group.length:,}; left out"
                problems.append(Remark(run.where, what))
                del group.runs[key]
    tell_apart(groups)
    return groups


def tell_apart(groups: list[Group]) -> None:
    """Give groups of one label labels of their own, by the settings in which they differ from the first of them."""
    taken = set()
    for label in dict.fromkeys(g.label for g in groups):
        first, *others = [g for g in groups if g.label == label]
        for number, group in enumerate(others, 2):
            differ = [f"{key}={shown(new, 40)}" for key, _, new in differences(group, first)][:MOST_NAMED]
            group.label = f"{label} ({', '.join(differ) or number})"
            if group.label in taken:
                group.label = f"{label} ({number})"
            taken.add(group.label)


def differences(group: Group, base: Group) -> list[tuple[str, object, object]]:
    """(setting or fact, the baseline's value, the group's) where they differ, as far as both logs say."""
    ours, theirs = settings_of(group.first), settings_of(base.first)
    found = [(key, theirs[key], new) for key, new in ours.items()
             if key not in HARMLESS and key in theirs and theirs[key] != new]
    ours, theirs = group.first.facts, base.first.facts
    return found + [(key, theirs[key], new) for key, new in ours.items()
                    if key in COMPUTED and key in theirs and theirs[key] != new]


def choose_baseline(groups: list[Group], label: str | None) -> list[Group]:
    """The groups with the baseline first. Errors: ValueError if there is none called so."""
    if label is None:
        return groups
    found = [g for g in groups if g.label == label]
    if not found:
        raise ValueError(f"--baseline={shown(label)}: expected one of {', '.join(g.label for g in groups)}")
    return found + [g for g in groups if g is not found[0]]


def of_other_length(groups: list[Group]) -> list[Group]:
    """The first group, and those that differ from it in nothing but how long they train."""
    length = {"max_iters", "warmup_iters"}
    return groups[:1] + [g for g in groups[1:] if settings_alike(g.first, groups[0].first, length)]


def families(runs: list[Run], setting: str, problems: list[Remark]) -> dict[float, list[Run]]:
    """The runs by their value of a setting, smallest first. Runs whose log has no number for it are left out."""
    found: dict[float, list[Run]] = {}
    for run in runs:
        value = run.config.get(setting)
        if type(value) in (int, float):
            found.setdefault(value, []).append(run)
        else:
            what = f"{shown(setting, 40)}: expected a number, found {shown(repr(value), 40)}; left out"
            problems.append(Remark(run.where, what))
    return dict(sorted(found.items()))


# ---------------------------------------------------------------------------------------------
# what else they differ in

def comparable(a: Run, b: Run) -> bool:
    """Were both judged on the same tokens, as far as both logs say?"""
    key = "val_crc32"
    return a.facts.get(key) is None or b.facts.get(key) is None or a.facts[key] == b.facts[key]


def remarks_on(groups: list[Group], varied: str | None = None) -> list[Remark]:
    """What runs differ in besides the objective, the seed and the setting `varied`."""
    found, base = [], groups[0]
    lengths = of_other_length(groups)
    for group in groups:
        found += remarks_on_seeds(group)
        if group in lengths:  # the baseline at another length differs as it should
            continue
        found += remarks_on_pairs(group, base, varied)
        if group.length != base.length:
            found.append(Remark(group.label, f"ends at step {group.length:,}, {base.label} at {base.length:,}; "
                                             "no difference at the end"))
    return joined(found)


def remarks_on_seeds(group: Group) -> list[Remark]:
    """What the runs of a group differ in."""
    found = []
    runs = list(group.runs.values())
    for key in sorted({key for run in runs for key in run.facts} - OWN_FACTS):
        values = dict.fromkeys(shown(run.facts[key], 40) for run in runs if key in run.facts)
        if len(values) > 1:
            found.append(Remark(group.label, f"its seeds differ in {shown(key, 40)}: {', '.join(values)}"))
    if not group.first.config:
        found.append(Remark(group.label, "logs without settings; grouped by name, and not checked for differences"))
    if unknown := [key for key in group.runs if isinstance(key, str)]:
        found.append(Remark(group.label, f"the seed of {', '.join(unknown)} is not known; in no pair"))
    return found


def remarks_on_pairs(group: Group, base: Group, varied: str | None) -> list[Remark]:
    """What a group and the baseline differ in that is no part of the question."""
    found, facts = [], group.first.facts
    if not comparable(group.first, base.first):
        found.append(Remark(group.label, f"other validation tokens than {base.label}: val NTP cannot be compared",
                            grave=True))
    ignored = HARMLESS | OBJECTIVE | {"init_from", "max_iters", varied}
    for ours, theirs, skipped in ((group.first.config, base.first.config, ignored),
                                  (facts, base.first.facts, OWN_FACTS | {"val_crc32"})):
        for key in sorted(ours.keys() & theirs.keys() - skipped):
            if ours[key] != theirs[key]:
                found.append(Remark(group.label, f"{shown(key, 40)}={shown(ours[key], 40)}, {base.label} has "
                                                 f"{shown(theirs[key], 40)}"))
    if alone := sorted(str(key) for key in group.runs.keys() ^ base.runs.keys() if isinstance(key, int)):
        found.append(Remark(group.label, f"seeds {', '.join(alone)} are in only one of it and {base.label}, and in no "
                                         "difference"))
    return found
