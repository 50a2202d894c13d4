"""Train set-ups side by side, each with several seeds, and compare them.

    python ablate.py seeds4                                # config/seeds4/*.py, five seeds each
    python ablate.py objectives --seeds 1337 1338          # config/objectives/*.py
    python ablate.py seeds4 config/variants/uncorrected.py --longer 1.25 --max_iters=500 --out=out/short
    python ablate.py seeds4 --no_runs                      # compare what is there

A set is a folder of configs; the first config called base, else the first, is what the others are compared with.
Words like --max_iters=500 are settings for all runs. A run is one process with one thread, as many at a time as
there are cores (--jobs), each pinned to its own, which its log tells. What is finished is skipped, what was cut short
goes on. --longer trains the baseline once more at other lengths, for comparisons at equal seconds. Seconds
are measured apart, when nothing else runs: the steps of all set-ups in turns, averaged over the course of a run, since
schedules change them. In the end compare.py tells all, on the terminal and in OUT/report.html.

What this leaves out on purpose: what is told of the runs (compare.py), and searching (sweep.py).
"""

from system.program import positive, program

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tqdm import tqdm

import compare
from configurator import configure
from formats.checkpoint import read_checkpoint
from settings import Output, Settings, check, names_of
from step.machine import describe, find_machine
from study.processes import POLL, complaint, evaluations, free_cores, how_to_begin, settings_in, start, stop
from system.files import atomic_write
from system.lock import hold
from text.letters import token_texts
from text.tokenizer import load_tokenizer, vocab_folder
from train import step_on_random_tokens

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "config"
BASE = "base"
SEEDS = [1337, 1338, 1339, 1340, 1341]


def find_configs(words: list[str]) -> dict[str, Path]:
    """{name: config} of sets and single configs, the baseline first. Errors: ValueError."""
    found: dict[str, Path] = {}
    for word in words:
        folder = CONFIGS / word
        paths = sorted(folder.glob("*.py")) if folder.is_dir() else [Path(word)]
        if not paths or not paths[0].is_file():
            sets = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and list(path.glob("*.py")))
            raise ValueError(f"{word}: neither a config file nor a set; sets are {', '.join(sets)}")
        for path in paths:
            if path.stem in found:
                raise ValueError(f"{path}: a second config called {path.stem}, after {found[path.stem]}")
            found[path.stem] = path
    base = BASE if BASE in found else next(iter(found))
    return {base: found[base]} | found


def settings_of(name: str, config: Path, seed: int, words: list[str], out: Path, longer: float = 1.0) -> Settings:
    """The settings of one run; its out_dir tells it from all others. Errors: ValueError."""
    s = configure(Settings, [str(config), *words, f"--seed={seed}"])
    s.max_iters = round(s.max_iters * longer)
    s.out_dir = str(out / f"{name}{s.max_iters if longer != 1.0 else ''}-{seed}")
    check(s)
    return s


# ---------------------------------------------------------------------------------------------
# runs

def check_same(s: Settings) -> None:
    """ValueError if what lies in a run's out_dir was trained with other settings than `s` has."""
    path = Path(s.out_dir) / "last.pt"
    config = read_checkpoint(path).get("config", {}) if path.exists() else settings_in(path.parent)
    for field in fields(Settings):
        then, now = config.get(field.name, field.default), getattr(s, field.name)
        if config and field.name not in names_of(Output) | {"init_from"} and then != now:
            raise ValueError(f"{s.out_dir}: was trained with {field.name}={then}, its config has {now} by now; "
                             f"delete {s.out_dir}, or choose another --out")


def progress(s: Settings) -> int:
    """The iteration of a run's last evaluation; -1: none yet."""
    return max(evaluations(Path(s.out_dir)), default=-1)


def run_all(runs: list[Settings], jobs: int) -> None:
    """Train what is not finished, `jobs` at a time. Errors: ValueError naming the runs that failed."""
    cores = free_cores()
    if jobs > len(cores) or not hasattr(os, "sched_setaffinity"):
        print(f"ablate.py: {jobs} at a time, not pinned to cores of their own: seconds of these runs are those "
              "of a shared machine", file=sys.stderr)
    places: list[int | None] = [*cores[:jobs]] if jobs <= len(cores) else [None] * jobs
    waiting = [s for s in runs if progress(s) < s.max_iters]
    running: list[tuple[Settings, int | None, subprocess.Popen]] = []
    failures, done = [], {s.out_dir: max(progress(s), 0) for s in waiting}
    bar = tqdm(total=sum(s.max_iters for s in waiting), initial=sum(done.values()), unit=" steps", file=sys.stderr,
               desc=f"{len(waiting)} of {len(runs)} runs")
    try:
        while waiting or running:
            while waiting and places:
                s, core = waiting.pop(0), places.pop(0)
                words = [f"--{key}={value}" for key, value in asdict(s).items()]
                folder = Path(s.out_dir)
                running.append((s, core, start(ROOT / "train.py", [*words, *how_to_begin(folder)], folder, core)))
            time.sleep(POLL)
            for run in list(running):
                s, core, process = run
                done[s.out_dir] = max(progress(s), 0)
                if process.poll() is not None:
                    running.remove(run)
                    places.append(core)
                    if process.returncode:
                        failures.append(f"{s.out_dir}: {complaint(Path(s.out_dir), process.returncode)}")
            bar.update(sum(done.values()) - bar.n)
    finally:
        stop([process for _, _, process in running])
        bar.close()
    if failures:
        raise ValueError("some runs failed; the same command goes on with them:\n" + "\n".join(failures))


def step_seconds(setups: dict[str, Settings], rounds: int) -> dict[str, list[float]]:
    """{set-up: seconds of a step in each round}, averaged over ten points of a run; one thread, in turns."""
    torch.set_num_threads(1)
    steps, found = {}, {name: [] for name in setups}
    for name, s in setups.items():
        folder = vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size)
        texts = token_texts(load_tokenizer(folder, s.vocab_size)) if s.spelling_letters else None
        steps[name] = step_on_random_tokens(s, texts)
    points = [k / 10 + 0.05 for k in range(10)]
    for turn in tqdm(range(rounds + 1), "step times", leave=False, file=sys.stderr):  # the first one warms up
        spent = dict.fromkeys(setups, 0.0)
        for share in points if turn else points[::5]:
            for name, step in steps.items():  # step by step in turns: these machines drift within seconds
                began = time.perf_counter()
                step(share)
                spent[name] += (time.perf_counter() - began) / len(points)
        if turn:
            for name in setups:
                found[name].append(spent[name])
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # --seed is train.py's
    parser.add_argument("sets", nargs="+", metavar="SET", help="folders of config/, or config files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the sets' configs; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: %(default)s")
    parser.add_argument("--longer", type=float, nargs="+", default=[], metavar="X", help="the baseline X times as long")
    parser.add_argument("--jobs", type=positive, help="runs at a time; default: one a core, or one on a GPU")
    parser.add_argument("--rounds", type=int, help="of step times; 0: the logs' own; default: 5, or 0 with --no_runs")
    parser.add_argument("--no_runs", action="store_true", help="train nothing, compare what is there")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: out/ and the first SET")
    args, words = parser.parse_known_args(argv)
    rounds = args.rounds if args.rounds is not None else 0 if args.no_runs else 5
    if rounds < 0:
        raise ValueError(f"--rounds={rounds}: expected 0 or more")
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"{word}: expected sets first, then options and --setting=value")
        if word.partition("=")[0] in ("--seed", "--out_dir"):
            raise ValueError(f"{word}: each run has its own; there are --seeds and --out")
    configs = find_configs(args.sets)
    base = next(iter(configs))
    if unknown := sorted(set(args.only or ()) - configs.keys()):
        raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(configs)}")
    names = [name for name in configs if name in {base, *(args.only or configs)}]
    out = args.out or Path("out") / Path(args.sets[0]).stem
    runs = [settings_of(base, configs[base], seed, words, out, times) for times in (1.0, *args.longer)
            for seed in args.seeds]
    runs += [settings_of(name, configs[name], seed, words, out) for seed in args.seeds for name in names[1:]]
    runs = list({s.out_dir: s for s in runs}.values())  # a seed or a length may have been given twice
    for s in runs:
        check_same(s)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out / "lock"):
        train_and_compare(args, runs, rounds, out, {name: settings_of(name, configs[name], args.seeds[0], words, out)
                                                    for name in names})


def train_and_compare(args: argparse.Namespace, runs: list[Settings], rounds: int, out: Path,
                      setups: dict[str, Settings]) -> None:
    """All runs, the step times of set-ups, the comparison."""
    on_cpu = find_machine(runs[0].device).device.type == "cpu"
    if not args.no_runs:
        run_all(runs, args.jobs or (len(free_cores()) if on_cpu else 1))
    measured = out / "step_seconds.json"
    if rounds and on_cpu:
        found = step_seconds(setups, rounds)
        with atomic_write(measured, "w") as f:
            json.dump({"machine": describe(), "threads": 1, "seconds": found}, f)
    folders = [s.out_dir for s in runs if progress(s) >= 0]
    if not folders:
        raise ValueError(f"{out}: no run there yet; leave out --no_runs")
    compare.main([*folders, *(["--step_seconds", str(measured)] if measured.exists() and on_cpu else []),
                  "--html", str(out / "report.html"), "--title", " ".join(args.sets)])
    print(f"\n{out / 'report.html'} has the plots")


if __name__ == "__main__":
    sys.exit(program(main, "interrupted; the same command goes on"))
