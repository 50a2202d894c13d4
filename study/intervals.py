"""Student's t intervals over seeds, and how many seeds a difference takes.

    interval([-0.010, -0.002, -0.006])  ->  -0.0060 ± 0.0099, three pairs
"""

import math
import statistics
from typing import NamedTuple

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
