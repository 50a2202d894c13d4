"""Equal seconds: the baseline of another length, and what is not known exactly of the gap to it."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from study.groups import Group
from study.intervals import Interval
from study.runs import Run
from study.seconds import (
    StepRatio,
    at_equal_seconds,
    at_length,
    errors_of_a_gap,
    find_step_seconds,
    logged_ratio,
    measured_ratio,
    read_step_seconds,
)


def run(name: str, seed: int, length: int, end: float, step_seconds: float = 1.0, **config) -> Run:
    config = {"seed": seed, "max_iters": length} | config
    lines = [{"iter": 0, "seconds": 0.0, "val/ntp": 6.0},
             {"iter": length, "seconds": length * step_seconds, "val/ntp": end}]
    return Run(name, name, config, {}, lines)


def group(name: str, ends: dict[int, float], length: int = 1000, **more) -> Group:
    return Group(name, {seed: run(name, seed, length, end, **more) for seed, end in ends.items()})


def end(r: Run) -> float:
    return r.last("val/ntp")


def test_the_baseline_of_another_length_lies_between_its_runs():
    known = [(800, 2.0), (1000, 1.9), (1300, 1.8)]
    for n, loss in known:
        assert at_length(known, n) == pytest.approx(loss)
    assert at_length(known, math.sqrt(800 * 1000)) == pytest.approx(1.95)
    assert at_length(known, math.sqrt(1000 * 1300)) == pytest.approx(1.85)
    assert at_length(known, 790) > 2.0 and at_length(known, 1400) < 1.8  # a little beyond


def test_with_all_lengths_of_all_seeds_and_an_exact_clock_it_is_a_paired_t_test():
    generator = np.random.default_rng(0)
    base = {seed: 2.0 + generator.normal(0, 0.01) for seed in range(6)}
    longer = {seed: base[seed] - 0.1 + generator.normal(0, 0.01) for seed in base}
    variant = {seed: base[seed] + generator.normal(0, 0.01) for seed in base}
    groups = [group("base", base), group("base1250", longer, 1250), group("v", variant, nitp_weight=0.1)]
    for g in groups[:2]:
        for r in g.runs.values():
            r.config["nitp_weight"] = 0.0
    found = at_equal_seconds(groups[2], groups, StepRatio(1.25, 0.0, 5), end)
    test = stats.ttest_rel([variant[s] for s in base], [longer[s] for s in base])
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high)) and found.n == 6
    assert at_equal_seconds(groups[1], groups, StepRatio(1.0, 0.0, 5), end).n == 0  # the baseline, at another length
    assert at_equal_seconds(groups[2], groups, StepRatio(1.5, 0.0, 5), end).why == "needs 1,500 steps"
    assert at_equal_seconds(groups[2], [groups[0], groups[2]], StepRatio(1.1, 0.0, 5), end).why == "no longer base"


@pytest.mark.parametrize("reached", [0, 1000, 1200])
def test_a_longer_baseline_that_stopped_on_the_way_is_none(reached):
    ends = {1: 2.0, 2: 2.1, 3: 2.2}
    groups = [group("base", ends, nitp_weight=0.0), group("base1250", ends, reached, nitp_weight=0.0),
              group("v", ends, nitp_weight=0.1)]
    for r in groups[1].runs.values():
        r.config["max_iters"] = 1250
    assert math.isnan(at_equal_seconds(groups[2], groups, StepRatio(1.1, 0.0, 5), end).mean)


@pytest.mark.parametrize("longer_seeds", [range(3), range(2, 8), range(6, 9)])
def test_the_interval_holds_the_truth_in_95_of_100_draws(longer_seeds):
    """Pairs 0 to 4; the baseline is trained longer with some of their seeds, or with others, and the clock is noisy."""
    generator = np.random.default_rng(5)
    truth, ratio, held, draws = 0.02, 1.1, 0, 400
    slope = -0.1 / math.log(1.25)
    for _ in range(draws):
        base = {seed: 2.0 + generator.normal(0, 0.006) for seed in range(9)}
        longer = {seed: 1.9 + generator.normal(0, 0.006) for seed in longer_seeds}
        variant = {seed: 2.0 + slope * math.log(ratio) + truth + generator.normal(0, 0.006) for seed in range(5)}
        rounds = ratio * np.exp(generator.normal(0, 0.03, 7))
        groups = [group("base", base, nitp_weight=0.0), group("base1250", longer, 1250, nitp_weight=0.0),
                  group("v", variant, nitp_weight=0.1)]
        step = measured_ratio(groups[2], groups, {"base": [1.0] * 7, "v": list(rounds)})
        found = at_equal_seconds(groups[2], groups, step, end)
        held += abs(found.mean - truth) <= found.half
    assert 0.92 <= held / draws <= 1.0


def test_each_source_of_error_counts():
    differences, gains = {1: 0.1, 2: 0.3, 3: 0.2}, {2: 0.05, 3: 0.09, 4: 0.04}
    parts = {part.source: part for part in errors_of_a_gap(differences, gains)}
    assert set(parts) == {"pairs and gains", "pairs", "gains"}
    assert parts["pairs and gains"].variance == pytest.approx(np.var([0.35, 0.29], ddof=1))
    assert [part.weight for part in parts.values()] == pytest.approx([2 / 9, 1 / 9, 1 / 9])
    lone = errors_of_a_gap(differences, {2: 0.05})  # one seed of the longer baseline: nobody knows its error
    assert math.isnan(Interval(0.0, 3, tuple(lone)).half)


def test_step_ratios_of_logs_and_of_rounds():
    base = Group("base", {seed: run("base", seed, 100, 2.0, 1.0, nitp_weight=0.0) for seed in (1, 2, 3)})
    steady = Group("v", {seed: run("v", seed, 100, 2.0, 1.2 + 0.01 * seed, nitp_weight=0.1) for seed in (1, 2, 3)})
    noisy = Group("v", {seed: run("v", seed, 100, 2.0, 1.2 + 0.1 * seed) for seed in (1, 2, 3)})
    step = logged_ratio(steady, base)
    assert step.ratio == pytest.approx(1.22) and not step.why and 0.0 < step.error < 0.01
    assert logged_ratio(noisy, base).why == "clocks 15% apart"
    step = measured_ratio(steady, [base, steady], {"base": [1.0, 2.0, 4.0], "v": [1.1, 2.2, 4.8]})
    assert step.ratio == pytest.approx(1.1) and step.freedom == 2 and step.measured
    assert measured_ratio(steady, [base, steady], {"base": [1.0]}) is None


def test_step_times_are_found_beside_the_runs(tmp_path):
    for place in ("out/step_seconds.json", "kept_seconds.json"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(json.dumps({"seconds": {"base": [1.0]}}))
    (tmp_path / "out" / "base-1").mkdir()
    out, kept = tmp_path / "out" / "step_seconds.json", tmp_path / "kept_seconds.json"
    for words, there in ((["out"], [out]), (["out/base-1"], [out]), (["kept.jsonl"], [kept]), (["other.jsonl"], []),
                         (["out/base-1", "out", "kept.jsonl"], [out, kept])):
        assert find_step_seconds([str(tmp_path / word) for word in words]) == there
    assert read_step_seconds(out) == {"base": [1.0]} and find_step_seconds(["wandb:me/lab", ""]) == []
