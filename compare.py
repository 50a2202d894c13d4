"""Compare runs by validation NTP: tables, plots, one page.

    python compare.py out/seeds4                          # all runs in a folder; or any folders and files
    python compare.py out/base-* out/mtp-* --baseline base --steps 500 1000
    python compare.py doc/runs/seeds4.jsonl --html out/report.html --plots out/plots --order difference
    python compare.py out/polynomials --until val/exact_in_1=0.24     # steps and seconds until a value is passed
    python compare.py out/polynomials --judge val/exact_in_1  # the end by another metric, tested by signed ranks
    python compare.py wandb wandb:me/lookahead            # wandb's offline runs, and those of a project
    python compare.py out/little --along train_fraction --best    # lowest loss against a setting, each value by itself

The first group of runs, or --baseline, is what the others are compared with, paired by seed. Intervals are
Student's t at 95% over the seeds; a difference inside its interval is a tie, and below three pairs there is no
verdict. doc/comparing.md says how to read each table, and how runs are compared at equal seconds.

What this leaves out on purpose: training (ablate.py), searching (sweep.py), and any score but those of the logs.
"""

from system.program import program

import argparse
import json
import math
import shlex
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

from study.comparison import csv_rows, summary, table_along, tables
from study.figures import Figures, check_known, figures, parse_goal
from study.groups import Group, choose_baseline, families, group_runs, of_other_length, remarks_on
from study.runs import Reader, Remark, Run, joined
from study.seconds import find_step_seconds, read_step_seconds, remarks_on_clocks, step_ratios
from study.setups import tables_of_what_was_run
from study.tables import WIDTH, as_csv, as_markdown, as_text
from system.files import atomic_write, read_text
from system.shown import shown, shown_message

KEPT_DIGITS = 7  # significant ones, of figures in logs that are kept
KEPT_EVERY = 50  # lines without an evaluation
NOT_KEPT = {"command", "host", "pid"}  # facts of a run that are nobody else's business


# ---------------------------------------------------------------------------------------------
# files

def deliver(text: str, where: str) -> None:
    """Print it (-), write it to a file, or with PAGE#NAME into that page, between <!-- NAME --> and <!-- /NAME -->."""
    path, mark, name = where.partition("#")
    if where == "-":
        print(text)
        return
    if mark:
        before, begin, rest = read_text(path).partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not end:
            raise ValueError(f"{path}: expected the lines <!-- {name} --> and <!-- /{name} -->, between which it goes")
        text = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    with atomic_write(path, "w", encoding="utf-8") as f:
        f.write(text if text.endswith("\n") else text + "\n")


def refuse_to_lose_runs(path: Path, runs: list[Run]) -> None:
    """ValueError if the log at `path` has a run that is not among `runs`, or is no log at all."""
    there = Reader()
    with suppress(ValueError):
        there.read(str(path))
    if not there.runs:
        raise ValueError(f"--keep: {path} exists and is no log of runs; choose another file, or delete it")
    lost = sorted({run.name for run in there.runs} - {run.name for run in runs})
    if lost:
        names = ", ".join(shown(name) for name in lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise ValueError(f"--keep: {path} has {len(lost)} runs that would be lost ({names}); choose another file, or "
                         "name it among the runs to be read and keep all in a new one")


def keep(runs: list[Run], path: Path) -> None:
    """Headers, evaluations and each 50th other line of all runs in one small file, which can be compared again."""
    if path.exists():
        refuse_to_lose_runs(path, runs)

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
            facts = {key: value for key, value in run.facts.items() if key not in NOT_KEPT}
            f.write(json.dumps({"run": name, "iter": 0, "config": config, "facts": facts}) + "\n")
            for k, line in enumerate(run.lines):
                if "val/ntp" in line or k % KEPT_EVERY == 0:
                    f.write(json.dumps({"run": name} | {k: short(v) for k, v in line.items()}) + "\n")


# ---------------------------------------------------------------------------------------------
# command line

def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders, .jsonl files, wandb:entity/project[/run]")
    parser.add_argument("--baseline", metavar="LABEL", help="what the others are compared with; default: the first")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help="steps to report; default: quarters")
    parser.add_argument("--last", type=int, default=1, metavar="K", help="the end: mean of the last K evaluations")
    parser.add_argument("--best", action="store_true", help="the end is a run's lowest evaluation")
    parser.add_argument("--until", nargs="+", default=[], metavar="KEY=VALUE",
                        help="steps and seconds until a metric passes a value, as in val/exact_in_1=0.24, or half of "
                        "what the baseline ends with, as in val/acc_again=half")
    parser.add_argument("--judge", nargs="+", default=[], metavar="KEY", help="compare the end by these as well, with "
                        "Wilcoxon's signed-rank test, as in val/exact_in_1")
    parser.add_argument("--pool", action="store_true", help="pool the deviation of differences over all set-ups")
    parser.add_argument("--order", choices=("given", "difference"), default="given", help="of set-ups; default: given")
    parser.add_argument("--along", metavar="SETTING", help="compare at each value of a setting by itself; where each "
                        "value is one set-up, these are compared with one another")
    parser.add_argument("--step_seconds", metavar="FILE", help="step times measured apart (ablate.py); logs: those of "
                        "the logs; default: step_seconds.json or <log>_seconds.json beside the runs, else logs")
    parser.add_argument("--markdown", nargs="?", const="-", metavar="FILE", help="tables in Markdown; PAGE#NAME puts "
                        "them between <!-- NAME --> and <!-- /NAME -->; no FILE: on the terminal")
    parser.add_argument("--csv", nargs="?", const="-", metavar="FILE", help="one row per set-up, every figure in full")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="each plot as .svg and .png")
    parser.add_argument("--draw", nargs="+", metavar="PLOT", help="only these, as --plots names them; default: all")
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
    args.until = [parse_goal(word) for word in args.until]
    return args


def measured_step_seconds(args: argparse.Namespace, problems: list[Remark]) -> dict[str, list[float]]:
    """Step times from --step_seconds, or from the file beside the runs. Errors: ValueError."""
    if args.step_seconds == "logs":
        return {}
    if args.step_seconds:
        return read_step_seconds(Path(args.step_seconds))
    there = find_step_seconds(args.runs)
    if len(there) > 1:
        names = ", ".join(map(str, there))
        problems.append(Remark("step times", f"not used, there are several: {names}; name one with --step_seconds"))
    return read_step_seconds(there[0]) if len(there) == 1 else {}


def lines_along(found: dict[float, list[Figures]], setting: str) -> dict[str, list[tuple[float, Figures]]]:
    """{set-up: (value of the setting, its figures there)}; where each value is one set-up, all are one line."""
    if len(found) == 1:
        (each,) = found.values()
        length = each[0].group.length
        return {"": sorted(((f.group.first.config[setting], f) for f in each if f.group.length == length),
                           key=lambda point: point[0])}
    lines: dict[str, list[tuple[float, Figures]]] = {}
    for value, each in found.items():
        for f in each:
            lines.setdefault(f.group.label, []).append((value, f))
    return lines


def how_measured(args: argparse.Namespace) -> list[str]:
    """What a table's note says of how its figures came about."""
    notes = []
    if args.best:
        notes.append("The end is each run's lowest evaluation.")
    if args.last > 1:
        notes.append(f"The end is the mean of the last {args.last} evaluations.")
    if args.pool:
        notes.append("The deviation of paired differences is pooled over all set-ups.")
    return notes


def quarters(run: Run) -> list[int]:
    """The evaluations nearest to a quarter, a half and three quarters of the way."""
    steps = run.points("val/ntp")[0]
    nearest = (int(steps[abs(steps - run.length * k / 4).argmin()]) for k in (1, 2, 3))
    return [step for step in dict.fromkeys(nearest) if 0 < step < run.length]


def groups_of(args: argparse.Namespace, reader: Reader) -> dict[float, list[Group]]:
    """The groups at each value of --along, the baseline first; without it, or if each value is one set-up, all as one.

    Errors: ValueError.
    """
    if args.along:
        runs = families(reader.runs, args.along, reader.problems)
        found = {value: group_runs(each, reader.problems) for value, each in runs.items()}
    else:
        found = {math.nan: group_runs(reader.runs, reader.problems)}
    if not any(found.values()):
        raise ValueError("nothing to compare: no run with an evaluation was found")
    if args.along and all(len(of_other_length(groups)) == len(groups) for groups in found.values()):
        found = {math.nan: group_runs([run for run in reader.runs if run.config.get(args.along) in runs], [])}
    if args.baseline and len(found) > 1:
        found = with_baseline(found, args, reader.problems)
    return {value: choose_baseline(groups, args.baseline) for value, groups in found.items()}


def with_baseline(found: dict[float, list[Group]], args: argparse.Namespace,
                  problems: list[Remark]) -> dict[float, list[Group]]:
    """The values at which the baseline has runs; the others are left out with a remark. None has: all."""
    kept = {}
    for value, groups in found.items():
        if any(group.label == args.baseline for group in groups):
            kept[value] = groups
        else:
            problems.append(Remark(f"{shown(args.along, 40)}={value:g}", f"no run of {shown(args.baseline)}; left out"))
    return kept or found


def main(argv: list[str]) -> int:
    args = arguments(argv)
    reader, unread = Reader(), []
    for word in args.runs:
        try:
            reader.read(word)
        except ValueError as error:
            unread.append(str(error))
    try:
        by_value = groups_of(args, reader)
        measured = measured_step_seconds(args, reader.problems)
    finally:
        problems = joined(reader.problems)
        for problem in [*unread, *problems]:
            print(f"compare.py: {shown_message(problem)}", file=sys.stderr)
    all_groups = [group for groups in by_value.values() for group in groups]
    check_known("--until", [goal.key for goal in args.until], all_groups)
    check_known("--judge", args.judge, all_groups)
    if args.keep:
        keep([run for group in all_groups for run in group.runs.values()], args.keep)

    found, remarks = {}, []
    for value, groups in by_value.items():
        ratios = step_ratios(groups, measured)
        each = figures(groups, ratios, args.steps or quarters(groups[0].first), args.last, args.best, args.pool,
                       args.until, args.judge)
        if args.order == "difference":
            each[1:] = sorted(each[1:], key=lambda f: (math.isnan(f.difference.mean), f.difference.mean))
        found[value] = each
        if math.isnan(value):
            remarks += remarks_on(groups, args.along) + remarks_on_clocks(groups, ratios)
        else:  # nothing is said of seconds there
            at = f" at {shown(args.along, 40)}={value:g}"
            remarks += [remark._replace(who=remark.who + at) for remark in remarks_on(groups)]
    remarks = joined(remarks)
    for remark in remarks:
        print(f"compare.py: {shown_message(remark)}", file=sys.stderr)
    show(args, argv, found, remarks, [Remark("not read", text, grave=True) for text in unread] + problems)
    return 1 if unread else 0  # what can be compared was; what was asked for is not all there


def show(args: argparse.Namespace, argv: list[str], found: dict[float, list[Figures]], remarks: list[Remark],
         problems: list[Remark]) -> None:
    """All that was asked for: on the terminal and in files."""
    everything = [f for each in found.values() for f in each]
    several = len(found) > 1
    notes = how_measured(args)
    if several:
        last = list(found.values())[-1]
        in_short = [f"At {shown(args.along, 40)}={value:g}, {said}" for value, each in found.items()
                    for said in summary(each)]
        all_tables = [*tables_of_what_was_run([f.group for f in last], [f.group for f in everything]),
                      table_along(found, shown(args.along, 40), remarks, notes)]
    else:
        in_short = summary(everything)
        all_tables = tables(everything, remarks, notes)
    if args.markdown != "-" and args.csv != "-":
        texts = [as_text(table, sys.stdout.isatty()) for table in all_tables]
        lines = [line for said in in_short for line in textwrap.wrap(said, WIDTH, subsequent_indent="    ")]
        print("\n\n".join(["\n".join(lines), *texts]))
    if args.markdown:
        bullets = "\n".join(f"- {said}" for said in in_short)
        deliver("\n\n".join([bullets, *map(as_markdown, all_tables)]), args.markdown)
    if args.csv:
        deliver(as_csv(csv_rows(found, args.along if several else None)).rstrip("\n"), args.csv)
    if args.plots or args.html:
        from study import report  # late: matplotlib

        panels = {} if several else report.panels(everything)
        if args.along:
            panels = report.panels_along(lines_along(found, args.along), args.along) | panels
        if unknown := sorted(set(args.draw or ()) - panels.keys()):
            raise ValueError(f"--draw {shown(unknown[0])}: expected some of {', '.join(panels)}")
        panels = {name: panel for name, panel in panels.items() if name in (args.draw or panels)}
        if args.plots:
            report.write_plots(panels, args.plots)
        if args.html:
            report.write_page(args.title, in_short, all_tables, panels, problems + remarks,
                              shlex.join(["python", "compare.py", *argv]), args.html)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # ± on a terminal that has none
    sys.exit(program(main))
