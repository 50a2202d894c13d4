"""Compare runs by validation NTP: tables, plots, one page.

    python compare.py out/seeds4                          # all runs in a folder; or any folders and files
    python compare.py out/base-* out/mtp-* --baseline base --steps 500 1000
    python compare.py doc/runs/seeds4.jsonl --html out/report.html --plots out/plots
    python compare.py wandb wandb:me/lookahead            # wandb's offline runs, and those of a project
    python compare.py out/little --along train_fraction --best    # lowest loss against a setting, each value by itself

The first group of runs, or --baseline, is what the others are compared with, paired by seed. Intervals are
Student's t at 95% over the seeds; a difference inside its interval is a tie. "At equal seconds" wants runs of the
baseline of at least two lengths (--max_iters): a set-up is compared with the baseline of the length that takes as
long as it does. What runs differ in beside the objective is told, and what is broken in a log.

What this leaves out on purpose: training (ablate.py), searching (sweep.py), and any score but those of the logs.
"""

from system.program import program

import argparse
import json
import math
import shlex
import statistics
import sys
from pathlib import Path

from study.figures import Figures, figures, set_step_seconds
from study.groups import choose_baseline, families, group_runs, warnings
from study.intervals import MANY, deviation_interval, seeds_needed
from study.runs import Reader, Run
from study.tables import Table, as_csv, as_markdown, as_text, number
from system.files import atomic_write

EFFECTS = (0.005, 0.01, 0.02)  # nats, for which the number of seeds is told
KEPT_DIGITS = 7  # significant ones, of figures in logs that are kept


def end_note(args: argparse.Namespace) -> str:
    if args.best:
        return " The end is each run's lowest evaluation."
    return f" The end is the mean of the last {args.last} evaluations." if args.last > 1 else ""


def ends(f: Figures) -> list[str]:
    """Where a set-up ends, as cells."""
    return [f.group.label, str(len(f.group.runs)), number(f.end), number(f.spread), number(f.end_step, 0)]


def table_along(found: dict[float, list[Figures]], args: argparse.Namespace) -> Table:
    """What each set-up comes to at each value of a setting, and its difference to the baseline there."""
    rows = []
    for value, (base, *others) in found.items():
        rows.append([f"{value:g}", *ends(base), "–", "–", "–"])
        rows += [["", *ends(f), str(f.difference), f.difference.verdict, str(f.difference.n)] for f in others]
    head = [args.along, "set-up", "seeds", "at the end", "between seeds", "at step", "difference", "verdict", "pairs"]
    return Table(
        f"Validation NTP against {args.along}", head, rows,
        "Means over seeds. Differences are to the first set-up at the same value, paired by seed: mean ± half of the "
        "95% interval (Student's t); negative is better, and inside the interval is a tie." + end_note(args))


def tables(found: list[Figures], args: argparse.Namespace) -> list[Table]:
    """All that is told, of the baseline (the first) and the others."""
    base, others = found[0], found[1:]
    steps = [f"step {step:,}" for step in base.at]
    ntp = Table("Validation NTP, nats a token", ["set-up", "seeds", "at the end", "between seeds", *steps], [
        [f.group.label, str(len(f.group.runs)), number(f.end), number(f.spread), *(number(v) for v in f.at.values())]
        for f in found], "Means over seeds; between seeds: their standard deviation at the end." + end_note(args))
    shown = [ntp]
    if others:
        shown.append(Table(
            f"Difference to {base.group.label}, paired by seed", ["set-up", "at the end", "verdict", "pairs", *steps],
            [[f.group.label, str(f.difference), f.difference.verdict,
              str(max(d.n for d in (*f.differences.values(), f.difference))), *map(str, f.differences.values())]
             for f in others],
            "Mean ± half of the 95% interval (Student's t); negative is better. A difference inside its interval is a "
            "tie. Of 20 set-ups that change nothing, one is better or worse by chance."))
    shown.append(Table(
        f"Speed, and the way to where {base.group.label} ends",
        ["set-up", "at equal seconds", "verdict", "pairs", "step time x", "steps", "seconds", "seeds that get there",
         "tokens/s", "peak MiB"],
        [[f.group.label, str(f.equal_seconds), f.equal_seconds.verdict, str(f.equal_seconds.n), number(f.cost, 3),
          number(f.steps_to_reach, 0, "not reached"),
          number(f.seconds_to_reach, 0, "–" if f.steps_to_reach else "not reached"),
          f"{f.reached} of {len(f.group.runs)}", number(f.tokens_per_second, 0), number(f.peak_mib, 0)] for f in found],
        "At equal seconds: the difference to the baseline that trains as long in seconds, between its runs of several "
        "lengths; the interval is that of seeds and of the logs' seconds, not of the interpolation. Steps and seconds: "
        "from where the mean over seeds stays below the baseline's end with the same seeds, interpolated; seconds of "
        "training alone, without evaluations."))
    keys = sorted({key for f in found for key in f.accuracy}, key=lambda key: (key.split("_")[0], len(key), key))
    if keys:
        shown.append(Table("Guesses at the end", ["set-up", *keys],
                           [[f.group.label, *(number(f.accuracy.get(key)) for key in keys)] for f in found],
                           "acc_i: share of head i's guesses that are the token i further on than the next; agree_i: "
                           "that are what the next-token head guesses i tokens later."))
    noisy = [f for f in others if len(f.each) > 2]
    if noisy:
        shown.append(Table("Noise, and what it takes to see through it", [
            "set-up", "pairs", "between seeds", "of paired differences", "its interval",
            *(f"pairs for {effect:g}" for effect in EFFECTS)], [noise(f) for f in noisy],
            f"Standard deviations at the end, that of differences with its 95% interval (chi-square); that of "
            f"{base.group.label} between its {len(base.group.runs)} seeds: {number(base.spread)}. Pairs for: how many "
            "let a true difference of so many nats be told from 0 in four of five comparisons."))
    return shown


def noise(f: Figures) -> list[str]:
    deviation = statistics.stdev(f.each)
    low, high = deviation_interval(deviation, len(f.each))
    needed = [seeds_needed(deviation, effect) for effect in EFFECTS]
    return [f.group.label, str(len(f.each)), number(f.spread), number(deviation), f"{number(low)} to {number(high)}",
            *(f"{n:,}" if n < MANY else f">{n:,}" for n in needed)]


# ---------------------------------------------------------------------------------------------
# how it is shown

def csv_rows(found: dict[float, list[Figures]], along: str | None) -> list[dict]:
    """A set-up each (at each value of the setting `along`), every figure in full."""
    accuracies = sorted({key for each in found.values() for f in each for key in f.accuracy})
    rows = []
    for value, each in found.items():
        for f in each:
            row = {along: value} if along else {}
            row |= {"set_up": f.group.label, "seeds": " ".join(map(str, f.group.runs))}
            row |= {f"ntp_at_{step}": v for step, v in f.at.items()}
            row |= {"ntp_end": f.end, "ntp_end_step": f.end_step, "ntp_end_deviation": f.spread}
            for step, d in f.differences.items():
                row |= {f"difference_at_{step}": d.mean, f"difference_at_{step}_half_interval": d.half}
            row |= {"difference_end": f.difference.mean, "difference_end_half_interval": f.difference.half,
                    "pairs": f.difference.n, "steps_to_reach": f.steps_to_reach,
                    "seconds_to_reach": f.seconds_to_reach, "seeds_that_reach": f.reached,
                    "step_time_ratio": f.cost, "equal_seconds": f.equal_seconds.mean,
                    "equal_seconds_half_interval": f.equal_seconds.half,
                    "tokens_per_second": f.tokens_per_second, "peak_mib": f.peak_mib}
            rows.append(row | {key: f.accuracy.get(key) for key in accuracies})
    return rows


def deliver(text: str, where: str) -> None:
    """Print it (-), write it to a file, or with PAGE#NAME into that page, between <!-- NAME --> and <!-- /NAME -->."""
    path, mark, name = where.partition("#")
    if where == "-":
        print(text)
        return
    if mark:
        try:
            page = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot read: {error}") from error
        before, begin, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"{path}: expected the lines <!-- {name} --> and <!-- /{name} -->, between which it goes")
        text = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    with atomic_write(path, "w", encoding="utf-8") as f:
        f.write(text if text.endswith("\n") else text + "\n")


def keep(runs: list[Run], path: Path) -> None:
    """Headers and evaluations of all runs in one small file, from which everything here can be made again."""
    def short(value: float) -> float:
        return float(f"{value:.{KEPT_DIGITS}g}") if isinstance(value, float) else value

    names: set[str] = set()
    with atomic_write(path, "w") as f:
        for run in runs:
            name, number = run.name, 2
            while name in names:
                name, number = f"{number}/{run.name}", number + 1  # as if in another folder: the name is what follows
            names.add(name)
            config = {key: value for key, value in run.config.items() if key not in ("out_dir", "data_dir")}
            f.write(json.dumps({"run": name, "iter": 0, "config": config, "facts": run.facts}) + "\n")
            for line in run.lines:
                if "val/ntp" in line:
                    f.write(json.dumps({"run": name} | {k: short(v) for k, v in line.items()}) + "\n")


# ---------------------------------------------------------------------------------------------
# command line

def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders, .jsonl files, wandb:entity/project[/run]")
    parser.add_argument("--baseline", metavar="LABEL", help="what the others are compared with; default: the first")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="where val NTP is told; default: quarters")
    parser.add_argument("--last", type=int, default=1, metavar="K", help="the end is the mean of so many evaluations")
    parser.add_argument("--best", action="store_true", help="the end is a run's lowest evaluation")
    parser.add_argument("--along", metavar="SETTING", help="compare at each value of a setting by itself")
    parser.add_argument("--step_seconds", type=Path, metavar="FILE", help="step times measured apart (ablate.py); "
                        "default: those of the logs")
    parser.add_argument("--markdown", nargs="?", const="-", metavar="FILE", help="tables in Markdown; PAGE#NAME puts "
                        "them between <!-- NAME --> and <!-- /NAME -->; no FILE: on the terminal")
    parser.add_argument("--csv", nargs="?", const="-", metavar="FILE", help="one row a set-up, every figure in full")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="each plot as .svg and .png")
    parser.add_argument("--html", type=Path, metavar="FILE", help="one page with all tables and plots")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="settings and evaluations of all, as one small file")
    parser.add_argument("--title", default="Comparison of runs", help="of the page")
    args = parser.parse_args(argv)
    if args.last < 1 or any(step < 1 for step in args.steps or ()):
        parser.error("--last and --steps: expected numbers from 1 up")
    if args.best and args.last > 1:
        parser.error("--best, --last: expected one of them")
    for option in ("markdown", "csv", "html"):  # --csv a.jsonl would take a run for the file to write
        if str(getattr(args, option)).endswith(".jsonl"):
            parser.error(f"--{option}: expected a file to write, found {getattr(args, option)}; name the runs first")
    if args.keep and args.keep.exists() and args.keep.resolve() in (Path(word).resolve() for word in args.runs):
        parser.error(f"--keep: {args.keep} is one of the files to be read")
    return args


def read_step_seconds(path: Path | None) -> dict[str, list[float]]:
    """{label: seconds of a step in each round}. Errors: ValueError."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())["seconds"]
        if not all(len(v) and all(x > 0.0 for x in v) for v in found.values()):
            raise ValueError("expected lists of positive numbers")
        if len({len(v) for v in found.values()}) > 1:
            raise ValueError("expected as many rounds of each")
        return found
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no step times as ablate.py writes them: {error!r}") from error


def quarters(run: Run) -> list[int]:
    """The evaluations nearest to a quarter, a half and three quarters of the way."""
    steps = run.points("val/ntp")[0]
    nearest = (int(steps[abs(steps - run.length * k / 4).argmin()]) for k in (1, 2, 3))
    return [step for step in dict.fromkeys(nearest) if 0 < step < run.length]


def main(argv: list[str]) -> int:
    args = arguments(argv)
    reader = Reader()
    unread = []
    for word in args.runs:
        try:
            reader.read(word)
        except ValueError as error:
            unread.append(str(error))
    reader.problems += unread
    by_value = families(reader.runs, args.along, reader.problems) if args.along else {math.nan: reader.runs}
    by_value = {value: group_runs(runs, reader.problems) for value, runs in by_value.items()}
    for problem in reader.problems:
        print(f"compare.py: {problem}", file=sys.stderr)
    if not any(by_value.values()):
        raise ValueError("nothing to compare: no run with an evaluation was found")
    by_value = {value: choose_baseline(groups, args.baseline) for value, groups in by_value.items()}
    if args.keep:
        keep([run for groups in by_value.values() for group in groups for run in group.runs.values()], args.keep)
    found, told = {}, []
    for value, groups in by_value.items():
        said = set_step_seconds(groups, read_step_seconds(args.step_seconds))
        found[value] = figures(groups, args.steps or quarters(groups[0].first), args.last, args.best)
        told += [f"{args.along}={value:g}: {warning}" if args.along else warning for warning in said + warnings(groups)]
    for warning in told:
        print(f"compare.py: {warning}", file=sys.stderr)
    everything = [f for each in found.values() for f in each]
    shown = [table_along(found, args)] if args.along else tables(everything, args)
    if args.markdown != "-" and args.csv != "-":
        print("\n\n".join(map(as_text, shown)))
    if args.markdown:
        deliver("\n\n".join(map(as_markdown, shown)), args.markdown)
    if args.csv:
        deliver(as_csv(csv_rows(found, args.along)).rstrip("\n"), args.csv)
    if args.plots or args.html:
        from study import report  # late: matplotlib

        panels = report.panels_along(found, args.along) if args.along else report.panels(everything)
        if args.plots:
            report.write_plots(panels, args.plots)
        if args.html:
            report.write_page(args.title, shown, panels, reader.problems + told,
                              shlex.join(["python", "compare.py", *argv]), args.html)
    return 1 if unread else 0  # what can be compared was; what was asked for is not all there


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # ± on a terminal that has none
    sys.exit(program(main))
