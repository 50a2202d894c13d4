"""Equal seconds: what a set-up's steps cost, and its difference to a baseline that trains as long as it does.

A set-up whose step takes 1.05 times as long is compared with the baseline after 1.05 times as many steps. How the
baseline ends there is interpolated between its runs of several lengths (ablate.py --longer): whole runs, since one
that is cut off has not let its learning rate fall.

Step times are best measured in turns (ablate.py does, into OUT/step_seconds.json). Those of logs are used if they
are steady.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from study.groups import Group, of_other_length
from study.intervals import Interval, Part, variance
from study.runs import Remark, Run
from system.files import read_json

UNSTEADY = 1.1  # largest over smallest step time of seeds, beyond which logs are not to be trusted
OF_MEDIAN = math.sqrt(math.pi / 2)  # a median's standard error over a mean's
BEYOND = 0.05  # of the shortest and longest baseline, within which their line may be prolonged


class StepRatio(NamedTuple):
    """A step's time over the baseline's."""

    ratio: float  # NaN: not known
    error: float = math.nan  # standard error of its logarithm
    freedom: int = 0
    why: str = ""  # it is not to be trusted
    measured: bool = False  # in turns


# ---------------------------------------------------------------------------------------------
# step times

def find_step_seconds(words: list[str]) -> list[Path]:
    """The files of step times beside the runs: OUT/step_seconds.json for folders, <log>_seconds.json for logs."""
    found = {}
    for path in (Path(word) for word in words if Path(word).name):
        for place in (path / "step_seconds.json", path.with_name("step_seconds.json"),
                      path.with_name(f"{path.stem}_seconds.json")):
            if place.is_file():
                found[place.resolve()] = place
    return list(found.values())


def read_step_seconds(path: Path) -> dict[str, list[float]]:
    """{label: seconds of a step in each round}. Errors: ValueError."""
    content = read_json(path)
    seconds = content.get("seconds") if isinstance(content, dict) else None
    if not isinstance(seconds, dict) or not all(isinstance(rounds, list) and rounds for rounds in seconds.values()):
        raise ValueError(f'{path}: no step times as ablate.py writes them; expected {{"seconds": {{label: [...]}}}}')
    for label, rounds in seconds.items():
        if not all(type(x) in (int, float) and 0.0 < x < 1e9 for x in rounds):
            raise ValueError(f"{path}: no step times of {label}: expected positive numbers of seconds")
    if len({len(rounds) for rounds in seconds.values()}) > 1:
        raise ValueError(f"{path}: no step times of rounds: expected as many of each set-up")
    return seconds


def step_ratios(groups: list[Group], measured: dict[str, list[float]]) -> list[StepRatio]:
    """Each group's step over the first group's, measured in turns where that was done, else from the logs.

    The seconds of runs that were measured are stretched to it, so that curves over seconds can be compared.
    """
    base = groups[0]
    found = [measured_ratio(group, groups, measured) or logged_ratio(group, base) for group in groups]
    for group, step in zip(groups, found, strict=True):
        for run in group.runs.values():
            if step.measured and run.seconds_per_step > 0.0:
                run.stretch(statistics.median(measured[base.label]) * step.ratio / run.seconds_per_step)
    return found


def measured_ratio(group: Group, groups: list[Group], measured: dict[str, list[float]]) -> StepRatio | None:
    """The median of ratios within rounds, since machines drift between them; None if it was not measured.

    The baseline's steps at other lengths are the baseline's.
    """
    base = groups[0]
    label = base.label if group in of_other_length(groups) else group.label
    if label not in measured or base.label not in measured:
        return None
    ratios = [a / b for a, b in zip(measured[label], measured[base.label], strict=True)]
    return median_ratio(ratios)._replace(measured=True)


def logged_ratio(group: Group, base: Group) -> StepRatio:
    """From the seconds of logs: the median over seeds, if the seeds' step times agree with one another."""
    pairs = [(run.seconds_per_step, base.runs[seed].seconds_per_step)
             for seed, run in group.runs.items() if seed in base.runs]
    pairs = [(a, b) for a, b in pairs if a > 0.0 and b > 0.0]  # NaN is not
    if not pairs:
        return StepRatio(math.nan, why="no step times")
    apart = max(max(each) / min(each) for each in zip(*pairs, strict=True))
    ratio = median_ratio([a / b for a, b in pairs])
    if group is not base and apart > UNSTEADY:
        return ratio._replace(why=f"clocks {apart - 1.0:.0%} apart")
    return ratio


def median_ratio(ratios: list[float]) -> StepRatio:
    error = OF_MEDIAN * math.sqrt(variance([math.log(x) for x in ratios]) / len(ratios))
    return StepRatio(statistics.median(ratios), error, len(ratios) - 1)


def remarks_on_clocks(groups: list[Group], ratios: list[StepRatio]) -> list[Remark]:
    """What makes seconds doubtful, of groups whose step times were not measured in turns."""
    found, base = [], groups[0]
    some = any(step.measured for step in ratios)
    for group, step in zip(groups, ratios, strict=True):
        if step.measured:
            continue
        if some:
            found.append(Remark(group.label, f"step time not measured in turns with {base.label}'s: seconds are those "
                                             "of its logs"))
        each = [run.seconds_per_step for run in group.runs.values() if run.seconds_per_step > 0.0]
        if len(each) > 1 and max(each) > UNSTEADY * min(each):
            found.append(Remark(f"{group.label} ({max(each) / min(each) - 1.0:.0%})",
                                "step times differ between seeds, though they do the same: seconds of a shared machine "
                                "(ablate.py measures them in turns)"))
        facts = group.first.facts
        if facts.get("device") == "cpu" and len(facts.get("cores", ())) > facts.get("threads", math.inf):
            found.append(Remark(group.label, "not pinned to cores of their own: seconds may be those of a shared "
                                             "machine"))
    return found


# ---------------------------------------------------------------------------------------------
# the comparison

def at_equal_seconds(group: Group, groups: list[Group], step: StepRatio, end: Callable[[Run], float]) -> Interval:
    """The difference to the baseline that trains as long in seconds.

    With d the difference to the baseline of the usual length, and g by how much the baseline of the right length ends
    lower, it is mean(d) + mean(g). All pairs count in d, all seeds that have a longer baseline in g: where a seed has
    both, its d and g go together; where it has no longer baseline, the gain of the others stands for its own. Sources
    of error are both, and the step ratio through the slope of the loss over the logarithm of the length.
    """
    base, lengths = groups[0], of_other_length(groups)
    partners = group.partners(base)
    if group in lengths or not partners:
        return Interval(math.nan, 0)
    if step.why:
        return Interval(math.nan, 0, why=step.why)
    wanted = group.length * step.ratio
    gains, slopes = gains_of(lengths, wanted, end)
    if not gains:
        longer = any(len(g.runs) and g is not base for g in lengths)
        return Interval(math.nan, 0, why=f"needs {wanted:,.0f} steps" if longer else "no longer base")
    differences = {seed: end(a) - end(b) for seed, (a, b) in partners.items()}
    parts = errors_of_a_gap(differences, gains)
    if step.error > 0.0 or math.isnan(step.error):
        parts.append(Part("clock", (statistics.fmean(slopes) * step.error) ** 2, step.freedom, 1.0))
    mean = statistics.fmean(differences.values()) + statistics.fmean(gains.values())
    return Interval(mean, len(differences), tuple(parts) if len(differences) > 1 else ())


def pairs_at_equal_seconds(group: Group, groups: list[Group], step: StepRatio, end: Callable[[Run], float]
                           ) -> list[float]:
    """The difference of each pair by itself, of seeds that have a longer baseline."""
    gains, _ = gains_of(of_other_length(groups), group.length * step.ratio, end)
    return [end(a) - end(b) + gains[seed] for seed, (a, b) in group.partners(groups[0]).items() if seed in gains]


def gains_of(lengths: list[Group], wanted: float, end: Callable[[Run], float]) -> tuple[dict[int, float], list[float]]:
    """By how much the baseline of `wanted` steps ends lower than that of the usual length, by seed; and slopes there.

    lengths: the baseline at several lengths, the usual one first. Seeds without a run as long are left out, and so are
    runs that stopped on the way, where the learning rate was still high. A slope is that of the loss over the
    logarithm of the length.
    """
    gains, slopes = {}, []
    for seed, run in lengths[0].runs.items():
        whole = [g.runs[seed] for g in lengths if seed in g.runs and g.runs[seed].length >= g.runs[seed].planned]
        known = sorted((each.length, end(each)) for each in whole)
        if len(known) > 1 and (1.0 - BEYOND) * known[0][0] <= wanted <= (1.0 + BEYOND) * known[-1][0]:
            gains[seed] = end(run) - at_length(known, wanted)
            slopes.append((at_length(known, 1.01 * wanted) - at_length(known, wanted)) / math.log(1.01))
    return gains, slopes


def errors_of_a_gap(differences: dict[int, float], gains: dict[int, float]) -> list[Part]:
    """The sources of error of mean(differences) + mean(gains), some seeds of which may be the same."""
    n, m = len(differences), len(gains)
    both = [differences[seed] + n / m * gains[seed] for seed in differences if seed in gains]
    together = len(both) if len(both) > 1 else 0
    parts = [Part("pairs and gains", variance(both), together - 1, together / n**2),
             Part("pairs", variance(list(differences.values())), n - 1, (n - together) / n**2),
             Part("gains", variance(list(gains.values())), m - 1, (m - together) / m**2)]
    return [part for part in parts if part.weight > 0.0]


def at_length(known: list[tuple[int, float]], length: float) -> float:
    """The loss of a run of `length` steps between runs of other lengths: straight over the logarithm of the length."""
    lengths, losses = zip(*known, strict=True)
    x = np.log(lengths)
    k = int(np.clip(np.searchsorted(lengths, length) - 1, 0, len(x) - 2))
    share = (np.log(length) - x[k]) / (x[k + 1] - x[k])
    return float(losses[k] + share * (losses[k + 1] - losses[k]))
