"""All objectives side by side: each trained with several seeds, at equal steps and at equal seconds.

    python ablate.py                       # config/objectives/*.py, two seeds each: two hours on two cores
    python ablate.py --only base linear    # some of them
    python ablate.py --no_runs             # the table, from the runs that are there

A run is one process with one thread, as many at a time as there are cores, each on its own. What is
finished is skipped, what was cut short goes on. Seconds are measured apart, when nothing else runs: the
step times of all objectives in turns, averaged over the course of a run, since schedules change them. At
equal seconds an objective is compared with the base of the length that takes as long as it does,
interpolated between whole runs of the base of several lengths. Writes the table into doc/objectives.md,
the differences into doc/objectives.svg, and all evaluations into doc/runs/objectives.jsonl.

What this leaves out on purpose: other logs, intervals, wandb.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from tqdm import tqdm

from bench import machine, make_step, markdown
from configurator import configure
from export import read_checkpoint
from files import atomic_write
from letters import token_texts
from settings import Settings, check
from tokenizer import load_tokenizer, vocab_folder

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "config" / "objectives"
BASE = "base"
LONGER = (1.25, 1.625)  # lengths of the base, beside its own
MAY_DIFFER = {"out_dir", "init_from", "eval_interval", "log_interval"}  # without another result
BEGIN, END = "<!-- made by python ablate.py -->", "<!-- end -->"


def settings_of(name: str, seed: int = 1337, longer: float = 1.0, out: Path = Path("out/objectives")) -> Settings:
    """The settings of one run; its out_dir tells it from all others."""
    s = configure(Settings, [str(CONFIGS / f"{name}.py"), f"--seed={seed}"])
    s.max_iters = round(s.max_iters * longer)
    s.out_dir = str(out / f"{name}{s.max_iters if longer != 1.0 else ''}-{seed}")
    check(s)
    return s


# ---------------------------------------------------------------------------------------------
# runs

def evaluations(s: Settings) -> list[dict]:
    """What the log of a run has of its evaluations so far."""
    path = Path(s.out_dir) / "log.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]  # none half-written
    return [{k: v for k, v in line.items() if k == "iter" or k.startswith("val/")}
            for line in lines if "val/ntp" in line]


def is_finished(s: Settings) -> bool:
    found = evaluations(s)
    return bool(found) and found[-1]["iter"] == s.max_iters


def check_same(s: Settings) -> None:
    """ValueError if what lies in a run's out_dir was trained with other settings than `s` has."""
    path = Path(s.out_dir) / "last.pt"
    config = read_checkpoint(path).get("config", {}) if path.exists() else {}
    for field in fields(Settings):
        then, now = config.get(field.name, field.default), getattr(s, field.name)
        if config and field.name not in MAY_DIFFER and then != now:
            raise ValueError(f"{path}: was trained with {field.name}={then}, its config has {now} by now; "
                             f"delete {s.out_dir}, or choose another --out")


def run_all(runs: list[Settings]) -> None:
    """Train what is not finished, a process for each core. Errors: ValueError naming the runs that failed."""
    cores: SimpleQueue = SimpleQueue()
    free = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for core in free:
        cores.put(core)
    left = [s for s in runs if not is_finished(s)]
    bar = tqdm(total=sum(s.max_iters for s in left), desc=f"{len(left)} runs", unit=" steps", file=sys.stderr)

    def run(s: Settings) -> str:
        core, shown = cores.get(), 0
        start = "resume" if (Path(s.out_dir) / "last.pt").exists() else "scratch"
        words = [f"--{key}={value}" for key, value in asdict(s).items()]
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words, f"--init_from={start}"], text=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {core})
        while True:
            try:
                error = process.communicate(timeout=2)[1]
                break
            except subprocess.TimeoutExpired:
                now = max([line["iter"] for line in evaluations(s)], default=0)
                bar.update(max(now - shown, 0))
                shown = max(now, shown)
        cores.put(core)
        if process.returncode == 0:
            bar.update(s.max_iters - shown)
            return ""
        lines = error.strip().splitlines() or [f"exit code {process.returncode}"]
        return f"{s.out_dir}: {next((line for line in lines if line.startswith('train.py: ')), lines[-1])}"

    pool = ThreadPoolExecutor(len(free))
    try:
        failures = [failure for failure in pool.map(run, left) if failure]
    finally:  # of Ctrl-C the runs hear as well; they save and end
        pool.shutdown(cancel_futures=True)
        bar.close()
    if failures:
        raise ValueError("some runs failed; the same command goes on with them:\n" + "\n".join(failures))


def step_seconds(names: list[str], rounds: int) -> dict[str, list[float]]:
    """{objective: seconds of a step in each round}, averaged over ten points of a run; one thread, in turns."""
    torch.set_num_threads(1)
    steps, found = {}, {name: [] for name in names}
    for name in names:
        s = settings_of(name)
        texts = token_texts(load_tokenizer(vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size), s.vocab_size))
        steps[name] = make_step(s, texts)
    points = [k / 10 + 0.05 for k in range(10)]
    for round in tqdm(range(rounds + 1), "step times", leave=False, file=sys.stderr):  # the first one warms up
        spent = dict.fromkeys(names, 0.0)
        for progress in points if round else points[::5]:
            for name, step in steps.items():  # step by step in turns: these machines drift within seconds
                began = time.perf_counter()
                step(progress)
                spent[name] += (time.perf_counter() - began) / len(points)
        if round:
            for name in names:
                found[name].append(spent[name])
    return found


# ---------------------------------------------------------------------------------------------
# comparing

def at_length(lengths: list[float], losses: list[float], length: float) -> float:
    """What the base would end at after `length` steps: between runs of other lengths, or a little beyond them, in a
    straight line over the logarithm of the length.
    """
    x = np.log(lengths)
    k = int(np.clip(np.searchsorted(lengths, length) - 1, 0, len(x) - 2))
    share = (np.log(length) - x[k]) / (x[k + 1] - x[k])
    return float(losses[k] + share * (losses[k + 1] - losses[k]))


def compare(names: list[str], seeds: list[int], seconds: dict[str, list[float]], out: Path) -> list[dict]:
    """A row of the table for each objective whose runs are finished, by their difference at equal seconds."""
    base = {seed: {s.max_iters: evaluations(s)[-1]["val/ntp"] for longer in (1.0, *LONGER)
                   if is_finished(s := settings_of(BASE, seed, longer, out))} for seed in seeds}
    rows = []
    for name in names:
        runs = {seed: settings_of(name, seed, out=out) for seed in seeds}
        if not all(is_finished(s) for s in runs.values()):
            print(f"{name}: not finished, left out", file=sys.stderr)
            continue
        cost = statistics.median(a / b for a, b in zip(seconds[name], seconds[BASE], strict=True))
        ends = {seed: evaluations(s)[-1]["val/ntp"] for seed, s in runs.items()}
        lengths = {seed: sorted(found) for seed, found in base.items()}
        equal = {seed: at_length(lengths[seed], [base[seed][n] for n in lengths[seed]], runs[seed].max_iters * cost)
                 for seed in seeds}
        rows.append({"objective": name, "ntp": list(ends.values()), "cost": cost,
                     "at steps": [ends[seed] - base[seed][runs[seed].max_iters] for seed in seeds],
                     "at seconds": [ends[seed] - equal[seed] for seed in seeds]})
    return sorted(rows, key=lambda row: statistics.mean(row["at seconds"]))


def table(rows: list[dict], seeds: list[int], base_lengths: list[str]) -> str:
    def signed(values: list[float]) -> str:
        return f"**{statistics.mean(values):+.4f}** ({', '.join(f'{v:+.4f}' for v in values)})"

    head = ("objective", "val NTP", "at equal steps", "step time x", "at equal seconds")
    return markdown(head, [(f"[{row['objective']}](../config/objectives/{row['objective']}.py)",
                            f"{statistics.mean(row['ntp']):.4f}", signed(row["at steps"]), f"{row['cost']:.2f}",
                            signed(row["at seconds"])) for row in rows]) + (
        f"\n\nMeans over seeds {', '.join(map(str, seeds))}, in brackets each seed; differences are to the base of the "
        f"same seed, negative is better. Whole runs of the base: {'; '.join(base_lengths)}. "
        f"Step times on {machine()}, one thread.")


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 0.38 * len(rows) + 1.6), layout="constrained")
    of_base = next(row["ntp"] for row in rows if row["objective"] == BASE)
    spread = max(of_base) - min(of_base)
    axis.axvspan(-spread, spread, color="#eeeeee", label="distance between seeds of the base")
    for kind, colour, offset in (("at steps", "#4477aa", 0.13), ("at seconds", "#ee6677", -0.13)):
        for k, row in enumerate(rows):
            y = len(rows) - k + offset
            axis.plot(row[kind], [y] * len(row[kind]), "o", color=colour, markersize=4, alpha=0.6)
            axis.plot(statistics.mean(row[kind]), y, "|", color=colour, markersize=13, markeredgewidth=2.5,
                      label=f"at equal {kind[3:]}: mean and seeds" if k == 0 else None)
    axis.axvline(0.0, color="#888888", linewidth=0.8)
    axis.set_yticks([len(rows) - k for k in range(len(rows))], [row["objective"] for row in rows])
    axis.set_xlabel("val NTP less that of the base (nats a token); left is better")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    with atomic_write(path, "w") as f:
        figure.savefig(f, format="svg", metadata={"Date": None})


def write(text: str, path: Path) -> None:
    """Put `text` between the marks of the page `path`."""
    page = path.read_text()
    before, mark, rest = page.partition(BEGIN)
    if not mark or END not in rest:
        raise ValueError(f"{path}: expected the lines {BEGIN} and {END}, between which the table goes")
    with atomic_write(path, "w") as f:
        f.write(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


def main(argv: list[str]) -> None:
    known = sorted(path.stem for path in CONFIGS.glob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME", help="configs; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338], help="default: 1337 1338")
    parser.add_argument("--rounds", type=int, default=5, help="of step times; default: 5")
    parser.add_argument("--no_runs", action="store_true", help="train nothing, take what is there")
    parser.add_argument("--out", type=Path, default=Path("out/objectives"), help="folder of the runs")
    parser.add_argument("--folder", type=Path, default=ROOT / "doc", help="for the table and the plot; default: doc")
    args = parser.parse_args(argv)
    names = [BASE, *(name for name in args.only if name != BASE)]
    base_runs = [settings_of(BASE, seed, times, args.out) for times in (1.0, *LONGER) for seed in args.seeds]
    runs = base_runs + [settings_of(name, seed, out=args.out) for seed in args.seeds for name in names[1:]]
    for s in runs:
        check_same(s)
    if not args.no_runs:
        run_all(runs)
    if missing := [s.out_dir for s in base_runs if not is_finished(s)]:
        raise ValueError(f"{', '.join(missing)}: not finished, and nothing can be compared without")
    rows = compare(names, args.seeds, step_seconds(names, args.rounds), args.out)
    lengths = [f"{s.max_iters:,} steps, seed {s.seed}: {evaluations(s)[-1]['val/ntp']:.4f}" for s in base_runs]
    text = table(rows, args.seeds, lengths)
    write(text, args.folder / "objectives.md")
    plot(rows, args.folder / "objectives.svg")
    with atomic_write(args.folder / "runs" / "objectives.jsonl", "w") as f:
        f.writelines(json.dumps({"run": Path(s.out_dir).name} | line) + "\n" for s in runs for line in evaluations(s))
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"ablate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("ablate.py: interrupted; the same command goes on")
