"""Student's t intervals over seeds, a test by ranks, tests of many set-ups, and what a number of seeds can show.

    interval([-0.010, -0.002, -0.006])  ->  -0.0060 ± 0.0099, three pairs: a tie
"""

import math
import statistics
from typing import NamedTuple

FEWEST = 3  # pairs with a verdict; of two, an interval is six times as wide as their difference
LEVEL = 0.95  # of every interval
POWER = 0.8  # with which an effect counts as seen: in four of five comparisons
MANY = 1000  # seeds; more are not counted


class Part(NamedTuple):
    """A source of error of a mean: it adds weight * variance to the mean's variance."""

    source: str
    variance: float  # NaN: there is such an error, and it is not known
    freedom: int  # degrees of freedom with which the variance is known
    weight: float


class Interval(NamedTuple):
    """A mean of n pairs and its sources of error, which are independent; or why there is none."""

    mean: float
    n: int
    parts: tuple[Part, ...] = ()
    why: str = ""

    @property
    def error(self) -> float:
        """Standard error; NaN where it is not known."""
        return math.sqrt(sum(part.weight * part.variance for part in self.parts)) if self.parts else math.nan

    @property
    def freedom(self) -> float:
        """Degrees of freedom, by Welch and Satterthwaite where there are several sources."""
        each = [(part.weight * part.variance, part.freedom) for part in self.parts if part.weight * part.variance > 0.0]
        if not each:
            return 1.0  # of an error of 0, or of none: any will do
        return sum(v for v, _ in each) ** 2 / sum(v * v / f for v, f in each)

    @property
    def half(self) -> float:
        """Half the width of the 95% interval; NaN where the error is not known."""
        return student(0.5 + LEVEL / 2, self.freedom) * self.error if self.error > 0.0 else self.error

    @property
    def p(self) -> float:
        """Two-sided: how likely a mean so far from 0 is if the true one is 0. NaN below three pairs."""
        if self.n < FEWEST or math.isnan(self.error):
            return math.nan
        if self.error == 0.0:
            return 0.0 if self.mean else 1.0
        from scipy.stats import t  # late: the demo compares one seed without it

        return float(2.0 * t.sf(abs(self.mean) / self.error, self.freedom))

    @property
    def verdict(self) -> str:
        if self.why or not self.n:
            return "–"
        if self.n < FEWEST:
            return "too few"
        if math.isnan(self.half):
            return "–"
        if abs(self.mean) <= self.half:
            return "tie"
        return "better" if self.mean < 0.0 else "worse"

    def __str__(self) -> str:
        if not self.n:
            return self.why or "–"
        return f"{self.mean:+.4f}" if math.isnan(self.half) else f"{self.mean:+.4f} ± {self.half:.4f}"


def interval(values: list[float]) -> Interval:
    """Student's t at 95% over `values`, of which NaNs are left out."""
    values = [v for v in values if not math.isnan(v)]
    n = len(values)
    parts = (Part("pairs", variance(values), n - 1, 1 / n),) if n > 1 else ()
    return Interval(statistics.fmean(values) if n else math.nan, n, parts)


def variance(values: list[float]) -> float:
    return statistics.variance(values) if len(values) > 1 else math.nan


def pooled(intervals: list[Interval], sources: set[str]) -> list[Interval]:
    """The same means, the variance of each of `sources` pooled over all intervals that have it."""
    shared = {}
    for source in sources:
        parts = [p for i in intervals for p in i.parts if p.source == source and not math.isnan(p.variance)]
        if freedom := sum(part.freedom for part in parts):
            shared[source] = sum(part.freedom * part.variance for part in parts) / freedom, freedom
    found = []
    for i in intervals:
        parts = [Part(p.source, *shared.get(p.source, (p.variance, p.freedom)), p.weight) for p in i.parts]
        found.append(i._replace(parts=tuple(parts)))
    return found


def signed_rank(differences: list[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test of paired differences; NaN if no pair differs.

    Exact for up to 50 differences of different sizes, or 13 where some are equal. Differences of 0 are dropped, as
    Wilcoxon does; infinite ones are larger than all others. n pairs that all agree have p = 2^(1 - n).
    """
    from scipy.stats import wilcoxon

    found = [d for d in differences if d and not math.isnan(d)]
    return float(wilcoxon(found).pvalue) if found else math.nan


def holm(ps: list[float]) -> list[float]:
    """Holm's correction of p for as many tests as there are numbers; NaN stays NaN and is no test."""
    order = sorted((k for k in range(len(ps)) if not math.isnan(ps[k])), key=lambda k: ps[k])
    found, least = [math.nan] * len(ps), 0.0
    for rank, k in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * ps[k]))
        found[k] = least
    return found


def student(probability: float, freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(probability, freedom))


# ---------------------------------------------------------------------------------------------
# what a number of seeds can show

def deviation_interval(deviation: float, freedom: int) -> tuple[float, float]:
    """The 95% interval of a standard deviation, by chi-square."""
    from scipy.stats import chi2

    low, high = chi2.ppf((0.5 + LEVEL / 2, 0.5 - LEVEL / 2), freedom)
    return deviation * math.sqrt(freedom / low), deviation * math.sqrt(freedom / high)


def power(deviation: float, effect: float, n: int, pooled_over: int = 1) -> float:
    """How often n pairs tell a true mean difference `effect` from 0, by the noncentral t distribution.

    deviation: of one pair's difference, in the test that of `pooled_over` set-ups of n pairs together.
    """
    from scipy.stats import nct

    distance = effect * math.sqrt(n) / deviation if deviation else math.inf
    if distance > 30.0:  # beyond it SciPy's distribution is not to be trusted, and the power is 1
        return 1.0
    freedom = pooled_over * (n - 1)
    edge = student(0.5 + LEVEL / 2, freedom)
    return float(nct.sf(edge, freedom, distance) + nct.cdf(-edge, freedom, distance))


def seeds_needed(deviation: float, effect: float, pooled_over: int = 1) -> int:
    """How many pairs see the effect in four of five comparisons; MANY: as many, or more."""
    low, high = 1, 2  # too few, perhaps enough
    while high < MANY and power(deviation, effect, high, pooled_over) < POWER:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(deviation, effect, middle, pooled_over) >= POWER else (middle, high)
    return min(high, MANY)


def smallest_effect(deviation: float, n: int, pooled_over: int = 1) -> float:
    """The difference that n pairs see in four of five comparisons."""
    low, high = 0.0, deviation
    while power(deviation, high, n, pooled_over) < POWER:
        low, high = high, 2.0 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if power(deviation, middle, n, pooled_over) >= POWER else (middle, high)
    return high
