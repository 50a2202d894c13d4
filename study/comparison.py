"""What is reported of a comparison: one sentence, tables, rows of CSV.

What this leaves out on purpose: what the figures are (figures.py), how tables are written (tables.py).
"""

import math

from study.figures import Figures, Goal, rises
from study.intervals import (
    FEWEST,
    MANY,
    Interval,
    deviation_interval,
    holm,
    interval,
    pooled,
    seeds_needed,
    smallest_effect,
    variance,
)
from study.runs import Remark
from study.seconds import BEYOND
from study.setups import tables_of_what_was_run
from study.tables import Table, number
from system.shown import shown

EFFECTS = (0.005, 0.01, 0.02)  # nats, for which the number of seeds is reported
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
IN_WORDS = {"better": "better", "worse": "worse", "tie": "no difference seen", "too few": "too few seeds to say",
            "–": "not compared"}
ORDER = (*IN_WORDS, "not comparable")  # of verdicts in a summary
MOST_SENTENCES = 6  # set-ups in a summary that have a sentence each


# ---------------------------------------------------------------------------------------------
# in words

def summary(found: list[Figures]) -> list[str]:
    """What came out: a sentence for each set-up, or for all that fared alike where there are many."""
    base, others = found[0], [f for f in found[1:] if f.difference.n or f.equal_seconds.n or not f.comparable]
    if not others:
        return [f"Nothing was compared with {base.group.label}."]
    steps, seconds = holm([f.difference.p for f in others]), holm([f.equal_seconds.p for f in others])
    if len(others) <= MOST_SENTENCES:
        return [f"{sentence(f, p_steps, p_seconds)}."
                for f, p_steps, p_seconds in zip(others, steps, seconds, strict=True)]
    alike: dict[str, list[str]] = {}
    for what in ORDER:
        for f, p in zip(others, steps, strict=True):
            if verdict(f, f.difference) == what:
                alike.setdefault(in_words(what, p), []).append(f.group.label)
    return [f"Against {base.group.label} at equal steps, {words}: {', '.join(labels)}."
            for words, labels in alike.items()]


def in_words(verdict: str, p: float) -> str:
    """A verdict, and whether it stands among all that are compared. p: after Holm's correction."""
    words = IN_WORDS.get(verdict, verdict)
    if verdict in ("better", "worse") and p >= 0.05:
        words += " by itself but not after Holm's correction"
    return words


def sentence(f: Figures, p_steps: float, p_seconds: float) -> str:
    """nitp: no difference seen, -0.002 ± 0.012, five seeds; at equal seconds worse, +0.013 ± 0.011"""
    if not f.comparable:
        return f"{f.group.label}: cannot be compared, other validation tokens"
    d, e = f.difference, f.equal_seconds
    seeds = NUMBERS[d.n] if d.n < len(NUMBERS) else str(d.n)
    said = f"{f.group.label}: {in_words(d.verdict, p_steps)}"
    if d.n:
        said += f", {short(d)}, {seeds} seed{'' if d.n == 1 else 's'}"
    if e.verdict in ("better", "worse", "tie"):
        said += f"; at equal seconds {in_words(e.verdict, p_seconds)}, {short(e)}"
    return said


def short(d: Interval) -> str:
    mean = round(d.mean, 3) + 0.0  # not -0.000
    return f"{mean:+.3f}" if math.isnan(d.half) else f"{mean:+.3f} ± {d.half:.3f}"


def verdict(f: Figures, d: Interval) -> str:
    return d.verdict if f.comparable else "not comparable"


def one_p(p: float) -> str:
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def p_values(intervals: list[Interval]) -> list[list[str]]:
    """A column of cells with Holm's p, where more than one set-up is compared; else no column."""
    found = holm([d.p for d in intervals])
    if sum(not math.isnan(p) for p in found) < 2:
        return [[] for _ in found]
    return [[one_p(p)] for p in found]


# ---------------------------------------------------------------------------------------------
# tables

HOLM = ("p (Holm): how likely so large a difference is if no set-up changes anything, corrected for how many are "
        "compared; one below 0.05 stands among all of them.")


def grave_remarks(remarks: list[Remark]) -> tuple[str, ...]:
    return tuple(str(remark) for remark in remarks if remark.grave)


def tables(found: list[Figures], remarks: list[Remark], notes: list[str]) -> list[Table]:
    """Everything that is reported of the baseline (the first) and the others. notes: how figures came about."""
    groups, base, others = [f.group for f in found], found[0], found[1:]
    made = [*tables_of_what_was_run(groups), table_of_ntp(found, notes)]
    if others:
        made.append(table_of_differences(base, others, grave_remarks(remarks), notes))
        if base.at and any(f.difference.n for f in others):
            made.append(table_on_the_way(base, others))
        made.append(table_at_equal_seconds(base, others, notes))
    made.append(table_of_the_way(found))
    made += [table_judged(base, others, key) for key in base.judged if others]
    made += [table_until(found, goal) for goal in base.passed]
    if any(key.startswith("exact_") for f in found for key in f.shares):
        made.append(table_of_answers(found))
    if any(not key.startswith("exact_") for f in found for key in f.shares):
        made.append(table_of_guesses(found))
    noisy = [f for f in others if len(f.each) >= FEWEST]
    if noisy:
        made.append(table_of_noise(base, noisy))
    return made


def table_of_ntp(found: list[Figures], notes: list[str]) -> Table:
    rows = [[f.group.label, str(len(f.group.runs)), number(f.end), number(f.spread), *map(number, f.at.values())]
            for f in found]
    return Table("Validation NTP, nats per token",
                 ["set-up", "seeds", "at the end", "between seeds", *(f"step {step:,}" for step in found[0].at)], rows,
                 " ".join(["Means over seeds; between seeds: their standard deviation at the end.", *notes]))


def table_of_differences(base: Figures, others: list[Figures], warnings: tuple[str, ...],
                         notes: list[str]) -> Table:
    ps = p_values([f.difference for f in others])
    rows = [[f.group.label, str(f.difference), verdict(f, f.difference), str(f.difference.n), *p]
            for f, p in zip(others, ps, strict=True)]
    holms = ["p (Holm)"] if ps[0] else []
    return Table(f"Difference to {base.group.label} at equal steps, at the end",
                 ["set-up", "difference", "verdict", "pairs", *holms], rows,
                 " ".join(["Mean ± half of the 95% interval (Student's t); negative is better, and inside the "
                           f"interval is a tie. No verdict below {FEWEST} pairs.", *([HOLM] if holms else []), *notes]),
                 warnings)


def table_on_the_way(base: Figures, others: list[Figures]) -> Table:
    return Table(f"Difference to {base.group.label} on the way", ["set-up", *(f"step {step:,}" for step in base.at)],
                 [[f.group.label, *map(str, f.differences.values())] for f in others if f.difference.n],
                 "As above, at evaluations before the end.")


def table_at_equal_seconds(base: Figures, others: list[Figures], notes: list[str]) -> Table:
    ps = p_values([f.equal_seconds for f in others])
    rows = [[f.group.label, number(f.cost, 3), str(f.equal_seconds), verdict(f, f.equal_seconds),
             str(f.equal_seconds.n), *p] for f, p in zip(others, ps, strict=True)]
    return Table(f"Difference to {base.group.label} at equal seconds",
                 ["set-up", "step time x", "difference", "verdict", "pairs", *(["p (Holm)"] if ps[0] else [])], rows,
                 " ".join(["The baseline may train as many steps more as its steps are cheaper; its loss there is "
                           f"interpolated between its runs of several lengths, or drawn out by up to {BEYOND:.0%}, for "
                           "seeds without a longer run by the mean gain of the others. The interval has the errors of "
                           "the pairs, of that gain and of the step ratio. In place of a number: no longer base "
                           "(ablate.py --longer trains it); clocks apart: the seeds' step times in the logs disagree "
                           "(ablate.py measures them in turns).", *notes]))


def table_of_the_way(found: list[Figures]) -> Table:
    base = found[0].group.label
    rows = []
    for f in found:
        missing = "not reached" if f.comparable else "–"
        seconds = number(f.seconds_to_reach, 0, "–" if f.steps_to_reach else missing)
        rows.append([f.group.label, number(f.steps_to_reach, 0, missing), seconds,
                     f"{f.reached} of {len(f.group.runs)}" if f.comparable else "–",
                     number(f.tokens_per_second, 0), number(f.peak_mib, 0)])
    return Table(f"The way to where {base} ends, and speed",
                 ["set-up", "steps", "seconds", "seeds that get there", "tokens/s", "peak MiB"], rows,
                 "Steps and seconds: from where the mean over seeds stays below the baseline's end with the same "
                 "seeds, interpolated; seconds of training, without evaluations, where the seeds' clocks agree.")


def table_judged(base: Figures, others: list[Figures], key: str) -> Table:
    rows = [[base.group.label, number(base.judged[key].end), *["–"] * 5]]
    for f in others:
        j = f.judged[key]
        rows.append([f.group.label, number(j.end), str(j.difference), str(j.difference.n), one_p(j.p),
                     str(j.equal_seconds), one_p(j.equal_seconds_p)])
    sign = "positive" if rises(key) else "negative"
    return Table(f"Difference to {base.group.label} in {shown(key, 60)}",
                 ["set-up", "at the end", "difference", "pairs", "p", "at equal seconds", "p, equal seconds"], rows,
                 f"Differences as above; {sign} is better. p: Wilcoxon's signed-rank test, two-sided and exact; pairs "
                 "without a difference are dropped. At equal seconds it is over the seeds that have a longer "
                 f"{base.group.label}. It is not corrected for how many set-ups are compared.")


def table_until(found: list[Figures], goal: Goal) -> Table:
    rows = []
    for f in found:
        p = f.passed[goal]
        ratio = sooner = "–"
        if p.ratio.n:
            ratio = f"{math.exp(p.ratio.mean):.2f}"
        if p.ratio.n >= FEWEST:
            low, high = (math.exp(p.ratio.mean + side * p.ratio.half) for side in (-1.0, 1.0))
            ratio += f" ({low:.2f} to {high:.2f})"
        if f is not found[0]:
            sooner = f"{p.sooner} of {p.pairs}"
        rows.append([f.group.label, f"{p.reached} of {len(f.group.runs)}", number(p.steps, 0), number(p.seconds, 0),
                     ratio, sooner, one_p(p.p_steps), one_p(p.p_seconds)])
    return Table(f"Until {shown(str(goal), 60)}",
                 ["set-up", "seeds that get there", "steps", "seconds", "seconds x", "sooner", "p, steps",
                  "p, seconds"], rows,
                 "Until a run first passes it, interpolated between evaluations. Steps and seconds: medians over "
                 "seeds, where those that never get there count as last (–: most). Seconds x: the geometric mean of "
                 "the ratio to the baseline over pairs that both get there, with its 95% interval from three pairs "
                 "on. Sooner: pairs in which it was there first, or the baseline never, of those in which one was. p: "
                 "Wilcoxon's signed-rank test over these, in which never is later than any time.")


def table_of_answers(found: list[Figures]) -> Table:
    keys = list(dict.fromkeys(key for f in found for key in f.shares if key.startswith("exact_")))
    rows = []
    for f in found:
        cells = []
        for key in keys:
            d = f.exact.get(key)
            cells += [number(f.shares.get(key)), str(d) if d and f is not found[0] else "–"]
        rows.append([f.group.label, *cells])
    head = [word for key in keys for word in (key, "difference" if len(keys) == 1 else f"difference, {key[6:]}")]
    return Table("Answers that are wholly right, at the end", ["set-up", *head], rows,
                 "Share of a group of answers; means over seeds. Differences are paired by seed, ± half of the 95% "
                 "interval; positive is better.")


def table_of_guesses(found: list[Figures]) -> Table:
    keys = list(dict.fromkeys(key for f in found for key in f.shares if not key.startswith("exact_")))
    keys.sort(key=lambda key: (key.split("_")[0], len(key), key))
    return Table("Top-1 guesses at the end", ["set-up", *keys],
                 [[f.group.label, *(number(f.shares.get(key)) for key in keys)] for f in found],
                 "acc_i: share of head i's guesses that equal the token i after the next; agree_i: that equal what the "
                 "NTP head guesses i tokens later; acc_again, acc_rest, acc_name: the NTP head's on tokens that the "
                 "row gives away, on all others, and on names.")


def table_of_noise(base: Figures, noisy: list[Figures]) -> Table:
    rows = [noise(f.group.label, variance(f.each), f.difference.n - 1, f.difference.n) for f in noisy]
    if len(noisy) > 1:
        (one, *_) = pooled([interval(f.each) for f in noisy], {"pairs"})  # f.difference may be pooled already
        fewest = min(len(f.each) for f in noisy)
        rows.append(noise("all, pooled", one.parts[0].variance, one.parts[0].freedom, fewest, len(noisy)))
    return Table("Noise, and what it takes to see through it",
                 ["set-up", "pairs", "deviation", "its interval", "seen", *(f"for {x:g}" for x in EFFECTS)], rows,
                 "Standard deviation of paired differences at the end, with its 95% interval (chi-square); that of "
                 f"{base.group.label} between its {len(base.group.runs)} seeds is {number(base.spread)}. "
                 "Seen: the true difference that these pairs detect in four of five comparisons; for 0.01: the "
                 "number of pairs that detect 0.01 nats as often. Pooled: in tests that have this one deviation, "
                 "--pool.")


def noise(label: str, squared: float, freedom: int, pairs: int, pooled_over: int = 1) -> list[str]:
    deviation = math.sqrt(squared)
    low, high = deviation_interval(deviation, freedom)
    needed = [seeds_needed(deviation, effect, pooled_over) for effect in EFFECTS]
    seen = smallest_effect(deviation, pairs, pooled_over)
    return [label, str(pairs), number(deviation), f"{number(low)} to {number(high)}", number(seen),
            *(f"{n:,}" if n < MANY else f">{n:,}" for n in needed)]


def table_along(found: dict[float, list[Figures]], setting: str, remarks: list[Remark], notes: list[str]) -> Table:
    """What each set-up comes to at each value of a setting, and its difference to the baseline there."""
    early = any(f.end_step != f.group.length for each in found.values() for f in each)

    def ends(f: Figures) -> list[str]:
        cells = [f.group.label, str(len(f.group.runs)), number(f.end), number(f.spread)]
        return [*cells, number(f.end_step, 0)] if early else cells

    rows = []
    for value, (base, *others) in found.items():
        rows.append([f"{value:g}", *ends(base), "–", "–", "–"])
        rows += [["", *ends(f), str(f.difference), verdict(f, f.difference), str(f.difference.n)] for f in others]
    head = [setting, "set-up", "seeds", "at the end", "between seeds", *(["at step"] if early else []), "difference",
            "verdict", "pairs"]
    return Table(f"Validation NTP against {setting}", head, rows,
                 " ".join(["Means over seeds. Differences are to the first set-up at the same value, paired by seed: "
                           "mean ± half of the 95% interval (Student's t); negative is better, and inside the interval "
                           f"is a tie. No verdict below {FEWEST} pairs.", *notes]),
                 grave_remarks(remarks), words=("set-up",))


def csv_rows(found: dict[float, list[Figures]], along: str | None) -> list[dict]:
    """A set-up each (at each value of the setting `along`), every figure in full."""
    keys = sorted({key for each in found.values() for f in each for key in f.shares})
    rows = []
    for value, each in found.items():
        for f in each:
            row = {along: value} if along else {}
            row |= {"set_up": f.group.label, "seeds": " ".join(map(str, f.group.runs)), "comparable": f.comparable}
            row |= {f"ntp_at_{step}": v for step, v in f.at.items()}
            row |= {"ntp_end": f.end, "ntp_end_step": f.end_step, "ntp_end_deviation": f.spread}
            for step, d in f.differences.items():
                row |= {f"difference_at_{step}": d.mean, f"difference_at_{step}_half_interval": d.half}
            row |= {"difference_end": f.difference.mean, "difference_end_half_interval": f.difference.half,
                    "difference_end_p": f.difference.p, "pairs": f.difference.n, "verdict": verdict(f, f.difference),
                    "steps_to_reach": f.steps_to_reach, "seconds_to_reach": f.seconds_to_reach,
                    "seeds_that_reach": f.reached, "step_time_ratio": f.cost, "equal_seconds": f.equal_seconds.mean,
                    "equal_seconds_half_interval": f.equal_seconds.half, "equal_seconds_p": f.equal_seconds.p,
                    "equal_seconds_pairs": f.equal_seconds.n, "equal_seconds_why_not": f.equal_seconds.why,
                    "tokens_per_second": f.tokens_per_second, "peak_mib": f.peak_mib}
            row |= {key: f.shares.get(key) for key in keys}
            for key, d in f.exact.items():
                row |= {f"{key}_difference": d.mean, f"{key}_difference_half_interval": d.half}
            for goal, p in f.passed.items():
                row |= {f"until_{goal.key}={goal.value:g}_{name}": x for name, x in (
                    ("seeds", p.reached), ("steps", p.steps), ("seconds", p.seconds),
                    ("log_ratio", p.ratio.mean), ("log_ratio_half_interval", p.ratio.half), ("sooner", p.sooner),
                    ("p_steps", p.p_steps), ("p_seconds", p.p_seconds))}
            for key, j in f.judged.items():
                row |= {f"{key}_{name}": x for name, x in (
                    ("end", j.end), ("difference", j.difference.mean), ("half_interval", j.difference.half),
                    ("p", j.p), ("equal_seconds", j.equal_seconds.mean),
                    ("equal_seconds_half_interval", j.equal_seconds.half), ("equal_seconds_p", j.equal_seconds_p))}
            rows.append(row)
    return rows
