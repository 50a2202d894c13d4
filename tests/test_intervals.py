"""Intervals, corrections and powers against SciPy's own, and against draws."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from study.intervals import (
    MANY,
    Interval,
    Part,
    deviation_interval,
    holm,
    interval,
    pooled,
    power,
    seeds_needed,
    signed_rank,
    smallest_effect,
)


def test_signed_ranks_by_counting_all_signs():
    """Ties share ranks, zeros are dropped, infinite differences are the largest."""
    for each in ([1.0] * 8, [0.3, -0.1, 0.4, 0.5, 0.0, 0.9], [0.2, 0.2, -0.2, 0.4], [math.inf, math.inf, 3.0, -2.0],
                 [-0.1, -0.2, 0.05, -0.4, -0.3, -0.7, math.nan]):
        found = [d for d in each if d and not math.isnan(d)]
        ranks = [sum(abs(e) < abs(d) for e in found) + (sum(abs(e) == abs(d) for e in found) + 1) / 2 for d in found]
        sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign)
                for signs in itertools.product((False, True), repeat=len(found))]
        mine = sum(r for r, d in zip(ranks, found, strict=True) if d > 0)
        extreme = [s for s in sums if abs(s - sum(ranks) / 2) >= abs(mine - sum(ranks) / 2) - 1e-9]
        assert signed_rank(each) == pytest.approx(len(extreme) / len(sums)), each
    assert signed_rank([1.0] * 8) == 2**-7 and math.isnan(signed_rank([0.0, math.nan]))


def test_intervals_are_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    found = interval(list(a - b))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high)) and found.n == 7
    assert found.p == pytest.approx(test.pvalue)


def test_errors_of_two_sources_are_welchs():
    """The mean of one sample less that of another, independent one, with other deviations."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(0.0, 1.0, 6), generator.normal(0.5, 4.0, 9)
    test = stats.ttest_ind(a, b, equal_var=False)
    parts = Part("a", a.var(ddof=1), 5, 1 / 6), Part("b", b.var(ddof=1), 8, 1 / 9)
    found = Interval(a.mean() - b.mean(), 6, parts)
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.p == pytest.approx(test.pvalue) and found.freedom == pytest.approx(test.df)


def test_verdicts():
    three = ([-1.0, -1.1, -1.2], [1.0, 1.1, 1.2], [1.0, -1.0, 0.1])
    assert [interval(values).verdict for values in three] == ["better", "worse", "tie"]
    assert [interval(values[:2]).verdict for values in three] == ["too few"] * 3  # however far apart
    assert interval([0.1, math.nan]).n == 1 and interval([]).verdict == "–" and math.isnan(interval([1.0, 1.1]).p)
    assert str(Interval(math.nan, 0, why="no longer base")) == "no longer base"
    unknown = Interval(0.5, 3, (Part("pairs", 0.1, 2, 1 / 3), Part("clock", math.nan, 0, 1.0)))
    assert unknown.verdict == "–" and str(unknown) == "+0.5000" and math.isnan(unknown.p)
    assert interval([0.2] * 3).half == 0.0 and interval([0.2] * 3).verdict == "worse"


def test_holm_rejects_what_its_rule_rejects():
    """Step down: the k-th smallest of m is held against 0.05 / (m - k + 1), until one is too large."""
    generator = np.random.default_rng(2)
    for _ in range(50):
        ps = list(generator.uniform(0.0, 0.06, size=5))
        rejected = set()
        for k, i in enumerate(np.argsort(ps)):
            if ps[i] > 0.05 / (5 - k):
                break
            rejected.add(int(i))
        assert {i for i, p in enumerate(holm(ps)) if p <= 0.05} == rejected
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)  # NaN is no test
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_pooled_deviation_is_that_of_all_residuals():
    a, b = [0.1, 0.3, 0.2, 0.5], [1.0, 1.4, 0.8]
    residuals = [x - np.mean(values) for values in (a, b) for x in values]
    deviation = math.sqrt(np.square(residuals).sum() / (len(residuals) - 2))
    for found, values in zip(pooled([interval(a), interval(b)], {"pairs"}), (a, b), strict=True):
        assert found.mean == pytest.approx(np.mean(values))
        assert found.half == pytest.approx(stats.t.ppf(0.975, 5) * deviation / math.sqrt(len(values)))
    clock = Interval(0.0, 3, (Part("pairs", 1.0, 2, 1 / 3), Part("clock", 9.0, 4, 1.0)))
    assert pooled([clock, interval(a)], {"pairs"})[0].parts[1] == clock.parts[1]  # each has its own clock


@pytest.mark.parametrize("effect", [0.3, 0.5, 1.0, 2.0])
def test_so_many_pairs_see_the_effect_in_four_of_five_comparisons(effect):
    n = seeds_needed(0.01, 0.01 * effect)
    assert power(0.01, 0.01 * effect, n) >= 0.8 > (power(0.01, 0.01 * effect, n - 1) if n > 2 else 0.0)
    assert smallest_effect(0.01, n) <= 0.01 * effect < smallest_effect(0.01, max(n - 1, 2))
    assert seeds_needed(1.0, 1e-9) == MANY


def test_power_is_how_often_draws_are_told_from_zero():
    draws = np.random.default_rng(3).normal(0.0075, 0.0079, size=(20_000, 5))
    seen = stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05
    assert power(0.0079, 0.0075, 5) == pytest.approx(seen.mean(), abs=0.01)
    arms = draws.reshape(4_000, 5, 5)  # five set-ups of five pairs, tested with one deviation
    deviation = np.sqrt(arms.var(axis=2, ddof=1).mean(axis=1))
    distance = np.abs(arms[:, 0].mean(axis=1)) * math.sqrt(5) / deviation
    seen = distance > stats.t.ppf(0.975, 20)
    assert power(0.0079, 0.0075, 5, pooled_over=5) == pytest.approx(seen.mean(), abs=0.02)
    assert seen.mean() > power(0.0079, 0.0075, 5) + 0.05


def test_the_interval_of_a_deviation_holds_it_in_95_of_100_draws():
    deviations = np.random.default_rng(4).normal(0.0, 2.0, size=(2_000, 6)).std(axis=1, ddof=1)
    bounds = [deviation_interval(d, 5) for d in deviations]
    assert np.mean([low < 2.0 < high for low, high in bounds]) == pytest.approx(0.95, abs=0.02)
