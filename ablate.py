"""Train set-ups, each with several seeds, and compare them.

    python ablate.py seeds4                                # config/seeds4/*.py, five seeds each
    python ablate.py objectives --seeds 1337 1338 1339     # config/objectives/*.py
    python ablate.py seeds4 config/variants/uncorrected.py --longer 1.25 --max_iters=500 --out=out/short
    python ablate.py config/stories260k_nitp.py --vary n_future_heads=0,1,2,4,8      # one set-up for each value
    python ablate.py little --vary train_fraction=0.05,0.1,0.25,0.5,1                # all set-ups at each value
    python ablate.py finetune                              # a set in which runs start from others' checkpoints
    python ablate.py seeds4 --print | parallel -j 4        # the command lines, for other machines
    python ablate.py seeds4 --no_runs                      # compare what is there

A set is a folder of configs; the first config called base, else the first, is what the others are compared with.
Words like --max_iters=500 are settings for all runs. --vary makes set-ups from one config, or has all of a set at each
value; several --vary make all combinations. A config whose init_from is in the out_dir of another config of the set
starts from that config's run of the same seed, and that run is in no comparison.

A run is one process with one thread, as many at a time as there are cores (--jobs), each pinned to its own, which its
log says. Finished runs are skipped, runs that were cut short go on. --longer trains the baseline once more at other
lengths, for comparisons at equal seconds. Step times are measured apart, when nothing else runs: the steps of all
set-ups in turns, averaged over the course of a run, since schedules change them. In the end compare.py reports, on
the terminal and in OUT/report.html.

What this leaves out on purpose: what is reported of the runs (compare.py), and searching (sweep.py).
"""

from system.program import positive, program

import argparse
import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import compare
from configurator import configure
from formats.checkpoint import read_checkpoint
from settings import NEED_TEXT, Output, Settings, check, names_of
from step.machine import describe, find_machine
from study.processes import POLL, complaint, evaluations, free_cores, how_to_begin, settings_in, start, stop
from system.files import atomic_write
from system.lock import hold
from system.shown import shown
from text.letters import token_texts
from text.tokenizer import load_tokenizer, vocab_folder
from tinystories import need_tokens
from train import step_on_random_tokens

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "config"
BASE = "base"
SEEDS = [1337, 1338, 1339, 1340, 1341]
REPORT_NEEDS = ("matplotlib", "scipy")  # libraries; one that is missing is reported before the runs, not after them


class SetUp(NamedTuple):
    """A config, and the words that make it this set-up."""

    name: str  # of its runs' folders, before the seed; several set-ups may share it, in folders of their own
    config: Path
    words: list[str] = []
    folder: str = ""  # below OUT

    def settings(self, more: list[str]) -> Settings:
        """Errors: ValueError."""
        return configure(Settings, [str(self.config), *more, *self.words])


class Run(NamedTuple):
    """A run of a set-up: its settings, the command line that has them, and the run that it starts from."""

    settings: Settings
    words: list[str]
    source: str | None  # out_dir; None: it starts from no run of this set


# ---------------------------------------------------------------------------------------------
# which runs there are

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


def parse_vary(words: list[str]) -> dict[str, list[str]]:
    """{setting: values} of KEY=V1,V2,... Errors: ValueError."""
    found = {}
    for word in words:
        key, _, values = word.partition("=")
        if not key or not values or not all(values.split(",")):
            raise ValueError(f"--vary={word}: expected SETTING=VALUE,VALUE,...")
        if key in found or key in ("seed", "out_dir", "max_iters"):
            raise ValueError(f"--vary={word}: {key} is set already; there are --seeds, --out and --longer")
        found[key] = values.split(",")
        if len(set(found[key])) < len(found[key]):
            raise ValueError(f"--vary={word}: expected each value once")
    return found


def set_ups(configs: dict[str, Path], vary: dict[str, list[str]]) -> list[SetUp]:
    """Each config at each combination of values, the baseline first."""
    if not vary:
        return [SetUp(name, path) for name, path in configs.items()]
    found = []
    for values in itertools.product(*vary.values()):
        chosen = dict(zip(vary, values, strict=True))
        label = ",".join(f"{key}={value.replace('/', '_')}" for key, value in chosen.items())
        words = [f"--{key}={value}" for key, value in chosen.items()]
        if chosen.get("n_future_heads") == "0":  # losses of heads that are not there
            words += ["--nitp_weight=0", "--consistency_weight=0"]
        if len(configs) == 1:
            found.append(SetUp(label, *configs.values(), words))
        else:
            found += [SetUp(name, path, words, label) for name, path in configs.items()]
    return found


def sources_of(made: list[SetUp], words: list[str]) -> dict[tuple[str, str], SetUp]:
    """{(folder, name) of a set-up: the one of the same folder from whose run it starts}."""
    own = {(s.folder, Path(s.settings(words).out_dir)): s for s in made}
    found = {}
    for s in made:
        start = Path(s.settings(words).init_from)
        if (source := own.get((s.folder, start.parent))) and source != s:
            found[s.folder, s.name] = source
    return found


def run_of(s: SetUp, seed: int, words: list[str], out: Path, source: SetUp | None = None, longer: float = 1.0) -> Run:
    """A set-up with one seed; its out_dir tells it from all other runs. Errors: ValueError."""
    own = [*words, *s.words, f"--seed={seed}"]
    length = s.settings(words).max_iters
    name = s.name
    if longer != 1.0:
        length = round(length * longer)
        name += f",max_iters={length}" if "=" in name else f"_{length}" if name[-1].isdigit() else str(length)
        own.append(f"--max_iters={length}")
    own.append(f"--out_dir={out / s.folder / f'{name}-{seed}'}")
    if s.settings(words).wandb_log:  # from these wandb draws mean and band
        own += [f"--wandb_group={Path(s.folder) / name}", f"--wandb_job_type=seed {seed}"]
    start = None
    if source:
        start = str(out / source.folder / f"{source.name}-{seed}")
        own.append(f"--init_from={Path(start) / Path(s.settings(words).init_from).name}")
    settings = configure(Settings, [str(s.config), *own])
    check(settings)
    config = s.config.relative_to(ROOT) if s.config.is_relative_to(ROOT) else s.config  # as other machines have it
    return Run(settings, [str(config), *own], start)


# ---------------------------------------------------------------------------------------------
# runs

def check_same(s: Settings) -> None:
    """ValueError if the run in the out_dir of `s` was trained with other settings."""
    path = Path(s.out_dir) / "last.pt"
    config = read_checkpoint(path).get("config", {}) if path.exists() else settings_in(path.parent)
    for field in fields(Settings):
        then, now = config.get(field.name, field.default), getattr(s, field.name)
        if config and field.name not in names_of(Output) | {"init_from"} and then != now:
            raise ValueError(f"{s.out_dir}: was trained with {field.name}={shown(then)}, its config has {now} by now; "
                             f"delete {s.out_dir}, or choose another --out")


def progress(s: Settings) -> int:
    """The iteration of a run's last evaluation; -1: none yet."""
    return max(evaluations(Path(s.out_dir)), default=-1)


def finished(out_dir: str, runs: list[Run]) -> bool:
    return all(progress(run.settings) >= run.settings.max_iters for run in runs if run.settings.out_dir == out_dir)


def command_lines(runs: list[Run]) -> list[str]:
    """Of all runs that are not finished and that could start now, for a shell."""
    lines = []
    for run in runs:
        if not finished(run.settings.out_dir, runs) and (run.source is None or finished(run.source, runs)):
            lines.append(shlex.join(["python", "train.py", *run.words, *how_to_begin(Path(run.settings.out_dir))]))
    return lines


def run_all(runs: list[Run], jobs: int) -> None:
    """Train what is not finished, `jobs` at a time; a run that starts from another's checkpoint after that one.

    Errors: ValueError naming the runs that failed.
    """
    cores = free_cores()
    if jobs > len(cores) or not hasattr(os, "sched_setaffinity"):
        print(f"ablate.py: {jobs} at a time, not pinned to cores of their own: seconds of these runs are those "
              "of a shared machine", file=sys.stderr)
    places: list[int | None] = [*cores[:jobs]] if jobs <= len(cores) else [None] * jobs
    waiting = [run for run in runs if not finished(run.settings.out_dir, runs)]
    undone = {run.settings.out_dir for run in waiting}
    done = {run.settings.out_dir: max(progress(run.settings), 0) for run in waiting}
    running: list[tuple[Settings, int | None, subprocess.Popen]] = []
    failures = []
    bar = tqdm(total=sum(run.settings.max_iters for run in waiting), initial=sum(done.values()), unit=" steps",
               file=sys.stderr, desc=f"{len(waiting)} of {len(runs)} runs")
    try:
        while waiting or running:
            ready = [run for run in waiting if run.source not in undone]
            while ready and places:
                run, core = ready.pop(0), places.pop(0)
                waiting.remove(run)
                words = [f"--{key}={value}" for key, value in asdict(run.settings).items()]
                folder = Path(run.settings.out_dir)
                process = start(ROOT / "train.py", [*words, *how_to_begin(folder)], folder, core)
                running.append((run.settings, core, process))
            if not running:  # what is left starts from runs that failed
                break
            time.sleep(POLL)
            for run in list(running):
                s, core, process = run
                done[s.out_dir] = max(progress(s), 0)
                if process.poll() is not None:
                    running.remove(run)
                    places.append(core)
                    if process.returncode:
                        failures.append(f"{s.out_dir}: {complaint(Path(s.out_dir), process.returncode)}")
                    else:
                        undone.discard(s.out_dir)
            bar.update(sum(done.values()) - bar.n)
    finally:
        stop([process for _, _, process in running])
        bar.close()
    if failures:
        raise ValueError("some runs failed; the same command goes on with them:\n" + "\n".join(failures))


def step_seconds(setups: dict[str, Settings], rounds: int) -> dict[str, list[float]]:
    """{set-up: seconds of a step in each round}, averaged over ten points of a run; one thread, in turns.

    Seconds of CPU time, as a free core would take: what other programs do on it does not count.
    """
    torch.set_num_threads(1)
    steps, found = {}, {name: [] for name in setups}
    for name, s in setups.items():
        folder = vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size)
        with_texts = any(getattr(s, setting) for setting in NEED_TEXT)
        texts = token_texts(load_tokenizer(folder, s.vocab_size)) if with_texts else None
        steps[name] = step_on_random_tokens(s, texts)
    points = [k / 10 + 0.05 for k in range(10)]
    for turn in tqdm(range(rounds + 1), "step times", leave=False, file=sys.stderr):  # the first one warms up
        spent = dict.fromkeys(setups, 0.0)
        for share in points if turn else points[::5]:
            for name, step in steps.items():  # step by step in turns: these machines drift within seconds
                began = time.process_time()
                step(share)
                spent[name] += (time.process_time() - began) / len(points)
        if turn:
            for name in setups:
                found[name].append(spent[name])
    return found


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the settings for all runs. Errors: ValueError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # --seed is train.py's
    parser.add_argument("sets", nargs="+", metavar="SET", help="folders of config/, or config files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the sets' configs; default: all")
    parser.add_argument("--vary", action="append", default=[], metavar="SETTING=V1,V2,...",
                        help="set-ups with each of these values")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: %(default)s")
    parser.add_argument("--longer", type=float, nargs="+", default=[], metavar="X", help="the baseline X times as long")
    parser.add_argument("--jobs", type=positive, help="runs at a time; default: one per core, or one on a GPU")
    parser.add_argument("--rounds", type=int, help="of step times; 0: the logs' own; default: 5, or 0 with --no_runs")
    parser.add_argument("--no_runs", action="store_true", help="train nothing, compare what is there")
    parser.add_argument("--print", action="store_true", help="train nothing, print command lines of unfinished runs")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: out/ and the first SET, and what varies")
    args, words = parser.parse_known_args(argv)
    if args.rounds is None:
        args.rounds = 0 if args.no_runs else 5
    if args.rounds < 0:
        raise ValueError(f"--rounds={args.rounds}: expected 0 or more")
    for word in words:
        if not word.startswith("--"):
            raise ValueError(f"{word}: expected sets first, then options and --setting=value")
        if word.partition("=")[0] in ("--seed", "--out_dir"):
            raise ValueError(f"{word}: each run has its own; there are --seeds and --out")
    args.vary = parse_vary(args.vary)
    args.out = args.out or Path("out") / "_".join([Path(args.sets[0]).stem, *args.vary])
    return args, words


def main(argv: list[str]) -> None:
    args, words = arguments(argv)
    configs = find_configs(args.sets)
    if unknown := sorted(set(args.only or ()) - configs.keys()):
        raise ValueError(f"--only {unknown[0]}: expected some of {', '.join(configs)}")
    base = next(iter(configs))
    made = set_ups({name: path for name, path in configs.items() if name in {base, *(args.only or configs)}}, args.vary)
    sources = sources_of(made, words)
    runs = [run_of(s, seed, words, args.out, sources.get((s.folder, s.name))) for seed in args.seeds for s in made]
    for s in made if args.longer else ():
        if s.name == made[0].name:  # the baseline, in each folder
            runs += [run_of(s, seed, words, args.out, sources.get((s.folder, s.name)), times)
                     for times in args.longer for seed in args.seeds]
    runs = list({run.settings.out_dir: run for run in runs}.values())  # a seed or a length may have been given twice
    for run in runs:
        check_same(run.settings)
    if args.print:
        return print_command_lines(runs)
    for name in REPORT_NEEDS:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    if not args.no_runs:
        for s in (run.settings for run in runs if not finished(run.settings.out_dir, runs)):
            need_tokens(vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size) / "train.bin", s.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    with hold(args.out / "lock"):
        train_and_compare(args, made, sources, runs, words)


def print_command_lines(runs: list[Run]) -> None:
    lines = command_lines(runs)
    if lines:
        print("\n".join(lines))
    later = sum(not finished(run.settings.out_dir, runs) for run in runs) - len(lines)
    if later:
        print(f"ablate.py: {later} more start from checkpoints of these; print again when these have ended",
              file=sys.stderr)


def train_and_compare(args: argparse.Namespace, made: list[SetUp], sources: dict[tuple[str, str], SetUp],
                      runs: list[Run], words: list[str]) -> None:
    """All runs, the step times of set-ups, the comparison."""
    on_cpu = find_machine(runs[0].settings.device).device.type == "cpu"
    if not args.no_runs:
        run_all(runs, args.jobs or (len(free_cores()) if on_cpu else 1))
    started_from = {run.source for run in runs}
    compared = [s for s in made if s not in sources.values()]
    along = along_what(args.vary, made)
    measured = args.out / "step_seconds.json"
    if args.rounds and on_cpu and not made[0].folder:  # names stand for one set-up each
        timed = {s.name: run_of(s, args.seeds[0], words, args.out).settings for s in compared}
        found = step_seconds(timed, args.rounds)
        with atomic_write(measured, "w") as f:
            json.dump({"machine": describe(), "threads": 1, "seconds": found}, f)
    first = {str(args.out / s.folder / f"{s.name}-") for s in compared if s.name == compared[0].name}
    folders = [run.settings.out_dir for run in runs if progress(run.settings) >= 0
             and run.settings.out_dir not in started_from]
    folders.sort(key=lambda folder: not folder.startswith(tuple(first)))  # the baseline comes first
    if not folders:
        raise ValueError(f"{args.out}: no run there yet; leave out --no_runs")
    options = ["--step_seconds", str(measured) if measured.exists() and on_cpu else "logs"]
    if along:
        options += ["--along", along]
    compare.main([*folders, *options, "--html", str(args.out / "report.html"), "--title", " ".join(args.sets)])
    print(f"\n{args.out / 'report.html'} has the plots")


def along_what(vary: dict[str, list[str]], made: list[SetUp]) -> str | None:
    """The setting against which results are drawn: the one that varies, if its values are numbers."""
    if len(vary) != 1:
        return None
    (key,) = vary
    return key if type(getattr(made[0].settings([]), key)) in (int, float) else None


if __name__ == "__main__":
    sys.exit(program(main, "interrupted; the same command goes on"))
