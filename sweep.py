"""Search for settings: one file in the format of wandb's sweeps, read by wandb or, without it, by Optuna.

    python sweep.py config/sweep/objective.yaml             # with Optuna; the same command goes on where it stopped
    python sweep.py config/sweep/objective.yaml --trials=60 # to 60 trials, those that have ended among them
    wandb sweep config/sweep/objective.yaml                 # the same search with wandb; it says how to start an agent

A trial is a process of train.py with one thread, as many at a time as there are cores, each on its own.
Optuna draws its settings (TPE for wandb's `bayes`) and stops it early where its validation loss is above
the median of other trials at the same iteration. The value of a trial is the mean of its last few
evaluations, which is less noisy than the last one; wandb takes the lowest. out/sweep/<name> holds study.db
(Optuna's, in SQLite) and a folder for each trial, <number>. Trials that were at work when the search was
interrupted, or killed, go on with the same settings.

A winner was chosen because it looks good: the best of many noisy runs looks better than it is. Train it and
the base with fresh seeds before believing it (ablate.py).

What this leaves out on purpose: several seeds a trial, other methods and metrics, several machines at one
search, and trials that log to wandb; the last two are what `wandb sweep` is for.
"""

from system.program import positive, program

import argparse
import math
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import checked, configure, kind_of
from settings import Data, Settings, names_of
from study.processes import METRIC, POLL, complaint, evaluations, free_cores, how_to_begin, start, stop
from study.tables import markdown
from system.files import atomic_write
from system.lock import hold
from system.shown import shown
from system.signals import ENDING

if TYPE_CHECKING:
    import optuna

ROOT = Path(__file__).resolve().parent
MOST_FAILURES = 3  # trials in a row; then something is wrong with the search
NOT_SEARCHED = names_of(Data) | {"out_dir", "eval_interval", "eval_only", "max_iters", "vocab_size"}
STARTUP_TRIALS = 5  # that have to be complete before one is stopped early
STOPPED = {code for number in ENDING for code in (128 + number, -number)}  # exit codes
PLAIN = ["${env}", "${interpreter}"]
# wandb tells a run its name in the environment only; without a folder of its own train.py refuses all but the first
OWN_FOLDER = ["${env}", "sh", "-c", 'exec "$@" --out_dir="out/sweep/wandb/$WANDB_RUN_ID"', "sh", "${interpreter}"]


DISTRIBUTIONS = {"constant": {"value"}, "categorical": {"values"}, "uniform": {"min", "max"},
                 "int_uniform": {"min", "max"}, "log_uniform_values": {"min", "max"}}  # and what each has


# ---------------------------------------------------------------------------------------------
# the file

class Sweep(NamedTuple):
    """What a sweep file says."""

    program: Path
    words: list[str]  # for the program in every trial
    settings: Settings  # what these words say
    parameters: dict[str, dict]  # {setting: {"distribution": ..., "values": [...]}}; of a range, values are its ends
    trials: int
    stops_early: bool


def keys_of(found: Any, required: set[str], optional: set[str], where: str) -> dict:
    """`found`, or a ValueError if it is no mapping, has a key that is not known here, or lacks one."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected keys and values, found {found!r}")
    for key in found:
        if key not in required | optional:
            raise ValueError(f"{where}: {key}: not known here, expected {', '.join(sorted(required | optional))}")
    if missing := sorted(required - found.keys()):
        raise ValueError(f"{where}: {missing[0]}: missing")
    return found


def read_sweep(path: Path) -> Sweep:
    """Errors: ValueError that names the file and the key, what was found and what was expected."""
    import yaml

    try:
        with open(path, encoding="utf-8") as f:
            content = yaml.safe_load(f)
    except OSError as error:
        raise ValueError(f"{path}: cannot read this sweep file: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    keys_of(content, {"program", "command", "method", "metric", "run_cap", "parameters"},
            {"early_terminate", "name", "description", "project", "entity"}, str(path))
    stops = keys_of(content.get("early_terminate", {"type": "hyperband"}), {"type"},
                    {"min_iter", "max_iter", "s", "eta", "strict"}, f"{path}: early_terminate")
    for key, found, expected in (("method", content["method"], "bayes"),
                                 ("early_terminate: type", stops["type"], "hyperband"),
                                 ("metric", content["metric"], {"name": METRIC, "goal": "minimize"})):
        if found != expected:
            raise ValueError(f"{path}: {key}: expected {expected}, found {found!r}")
    if type(content["run_cap"]) is not int or content["run_cap"] < 1:
        raise ValueError(f"{path}: run_cap: expected int >= 1, found {content['run_cap']!r}")
    program = ROOT / str(content["program"])
    if not program.is_file():
        raise ValueError(f"{path}: program: expected a file in {ROOT}, found {content['program']!r}")
    if not isinstance(content["parameters"], dict):
        raise ValueError(f"{path}: parameters: expected settings and their values, found {content['parameters']!r}")
    searched = {name: read_parameter(name, p, f"{path}: parameters: {name}")
                for name, p in content["parameters"].items()}
    words = [word for word in command_words(content["command"], f"{path}: command") if "--wandb_log" not in word]
    words += [f"--{name}={p['values'][0]}" for name, p in searched.items() if p["distribution"] == "constant"]
    words.append("--wandb_log=false")
    searched = {name: p for name, p in searched.items() if p["distribution"] != "constant"}
    if not searched:
        raise ValueError(f"{path}: parameters: expected one with several values, found none to search over")
    try:
        settings = configure(Settings, words)
    except ValueError as error:
        raise ValueError(f"{path}: command: {error}") from error
    # where wandb stops by hyperband, Optuna does by the median: its hyperband needs far more trials than these files'
    return Sweep(program, words, settings, searched, content["run_cap"], "early_terminate" in content)


def command_words(command: Any, where: str) -> list[str]:
    """The program's words in every trial: those between ${program} and ${args}."""
    words = [str(word) for word in command] if isinstance(command, list) else []
    for first in ([*PLAIN, "${program}"], [*OWN_FOLDER, "${program}"]):
        fixed = words[len(first):-1]
        if words[:len(first)] == first and words[-1] == "${args}" and not any("${" in word for word in fixed):
            return fixed
    raise ValueError(f"{where}: expected a list of {' '.join(PLAIN)} (or {shlex.join(OWN_FOLDER)}), ${{program}}, "
                     f"words for it, ${{args}}; found {command!r}")


def read_parameter(name: Any, found: Any, where: str) -> dict:
    """A distribution and its values; the name of the former may be left out in the file, as wandb allows."""
    kind = kind_of(Settings, str(name), where)[0]
    keys_of(found, set(), {"distribution"}.union(*DISTRIBUTIONS.values()), where)
    values = found.get("values", [found[key] for key in ("value", "min", "max") if key in found])
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: expected value, values or min and max, found {found!r}")
    wholes = all(type(x) is int for x in values)
    inferred = ("constant" if "value" in found else "categorical" if "values" in found
                else "int_uniform" if wholes else "uniform")
    distribution = str(found.get("distribution", inferred))
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"{where}: distribution: expected {', '.join(DISTRIBUTIONS)}, found {distribution!r}")
    keys_of(found, DISTRIBUTIONS[distribution], {"distribution"}, where)
    if kind is float and any(isinstance(x, str) for x in values):
        raise ValueError(f"{where}: expected numbers, found {values}; YAML takes 1e-3 for a text, 1.0e-3 for a number")
    values = [checked(Settings, name, x, where) for x in values]
    if name in NOT_SEARCHED:
        raise ValueError(f"{where}: trials with other values of it cannot be compared, or have their own")
    if distribution not in ("constant", "categorical"):
        low, high = values
        if kind not in (int, float) or not wholes and distribution == "int_uniform" or (
                kind is int and distribution != "int_uniform"):
            raise ValueError(f"{where}: {distribution} from {low} to {high}: expected one that gives {kind.__name__}")
        if low >= high or low <= 0 and distribution == "log_uniform_values":
            raise ValueError(f"{where}: expected min < max (and 0 < min, if log), found {low} and {high}")
    return {"distribution": distribution, "values": values}


# ---------------------------------------------------------------------------------------------
# the search

@dataclass
class Run:
    """A trial at work."""

    trial: "optuna.Trial"
    folder: Path
    max_iters: int
    core: int
    process: subprocess.Popen
    reported: set[int]  # iterations whose evaluation Optuna has
    stopped_at: int | None = None


def suggest(trial: "optuna.Trial", parameters: dict[str, dict]) -> list[str]:
    """The trial's settings, as words; those it has already, from before the search was killed, stay as they are."""
    words = []
    for name, p in parameters.items():
        if p["distribution"] == "categorical":
            value = trial.suggest_categorical(name, p["values"])
        elif p["distribution"] == "int_uniform":
            value = trial.suggest_int(name, *map(int, p["values"]))
        else:
            value = trial.suggest_float(name, *p["values"], log=p["distribution"] == "log_uniform_values")
        words.append(f"--{name}={value}")
    return words


def begin(study: "optuna.Study", trial: "optuna.Trial", sweep: Sweep, out: Path, core: int) -> Run:
    words = [*sweep.words, *suggest(trial, sweep.parameters)]
    folder = out / str(trial.number)
    process = start(sweep.program, [*words, f"--out_dir={folder}", *how_to_begin(folder)], folder, core)
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    return Run(trial, folder, configure(Settings, words).max_iters, core, process, reported)


def follow(run: Run) -> None:
    """Report what has come in, and stop a run that Optuna has seen enough of; not at its end, where it has a value."""
    for it, ntp in sorted(evaluations(run.folder).items()):
        if it in run.reported or run.stopped_at is not None:
            continue
        run.trial.report(ntp, it)
        run.reported.add(it)
        if it < run.max_iters and run.trial.should_prune():
            run.stopped_at = it
            run.process.terminate()


def finish(study: "optuna.Study", run: Run, last: int) -> tuple[str, bool]:
    """Tell Optuna how a trial ended; returns that in words, and whether it failed."""
    from optuna.trial import TrialState

    code, found = run.process.returncode, evaluations(run.folder)
    if code == 0 and run.max_iters in found:
        value = statistics.fmean([found[it] for it in sorted(found)][-last:])
        study.tell(run.trial, value)
        return f"{value:.4f}", False
    if run.stopped_at is not None:
        study.tell(run.trial, state=TrialState.PRUNED)
        return f"stopped early at iter {run.stopped_at}", False
    if code in STOPPED:
        raise ValueError(f"trial {run.trial.number} was stopped by somebody else; the same command goes on with it")
    study.tell(run.trial, state=TrialState.FAIL)
    return f"failed: {complaint(run.folder, code)}", True


def search(study: "optuna.Study", at_work: "list[optuna.Trial]", sweep: Sweep, out: Path,
           args: argparse.Namespace) -> None:
    """Go on with trials that were at work, then to as many as asked for. ValueError if several in a row fail."""
    from optuna.samplers import TPESampler

    waiting, asked, total = list(at_work), len(study.trials), args.trials or sweep.trials
    free = free_cores()
    cores = [free[k % len(free)] for k in range(args.jobs or len(free))]
    failures, running = 0, []
    bar = tqdm(total=max(total, asked), initial=asked - len(waiting), desc="trials", file=sys.stderr)
    try:
        while True:
            while cores and (waiting or asked < total):
                if waiting:
                    trial = waiting.pop(0)
                else:  # a sampler for each, so that a search that was interrupted draws what it would have drawn
                    draws = np.random.SeedSequence([args.seed, asked]).generate_state(1)
                    study.sampler = TPESampler(seed=int(draws[0]))
                    trial, asked = study.ask(), asked + 1
                running.append(begin(study, trial, sweep, out, cores.pop(0)))
            if not running:
                break
            time.sleep(POLL)
            for run in list(running):
                ended = run.process.poll() is not None  # asked before the log is read, which then is whole
                follow(run)
                if ended:
                    running.remove(run)
                    cores.append(run.core)
                    words, failed = finish(study, run, args.last)
                    tqdm.write(f"trial {run.trial.number}: {words}", file=sys.stderr)
                    bar.update()
                    failures = failures + 1 if failed else 0
                    if failures == MOST_FAILURES:
                        raise ValueError(f"{failures} trials in a row failed, the last one, {run.folder}, {words}")
            if complete := ranked(study):
                bar.set_postfix(best=f"{complete[0].value:.4f}")
    finally:
        stop([run.process for run in running])
        bar.close()


def open_study(out: Path, sweep: Sweep) -> "tuple[optuna.Study, list[optuna.Trial]]":
    """The study in out/study.db, made if there is none, and its trials that were at work when its search ended."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = (optuna.pruners.MedianPruner(STARTUP_TRIALS, n_warmup_steps=math.ceil(sweep.settings.max_iters / 3))
              if sweep.stops_early else optuna.pruners.NopPruner())
    storage = optuna.storages.RDBStorage(f"sqlite:///{out / 'study.db'}")
    study = optuna.create_study(storage=storage, study_name="sweep", pruner=pruner, load_if_exists=True)
    of_study = storage.get_study_id_from_name("sweep")
    return study, [optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(of_study, trial.number))
                   for trial in study.trials if trial.state.name == "RUNNING"]


def check_same(study: "optuna.Study", sweep: Sweep, last: int, out: Path) -> None:
    """ValueError if the study in `out` has trials that cannot be compared with those of `sweep`."""
    now = {name: value for name, value in asdict(sweep.settings).items()
           if name != "out_dir" and not name.startswith("wandb_")} | sweep.parameters | {"--last": last}
    then = study.user_attrs.get("search")
    if then is None:
        if study.trials:
            raise ValueError(f"{out}: holds a study that sweep.py did not make; choose another --out")
        study.set_user_attr("search", now)
        return
    for name in now:  # what the study does not know of is a newer setting, and was at its default
        if now[name] != (before := then.get(name, getattr(Settings, name, None))):
            raise ValueError(f"{out}: {name} was {shown(before)} when this study was made, is {now[name]} now; "
                             "choose another --out")


def ranked(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """The complete trials, the best one first."""
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return sorted(complete, key=lambda trial: trial.value)


def report(study: "optuna.Study", sweep: Sweep, out: Path) -> str:
    """The best trials, how many ended how, and the command that trains the best one again."""
    states, best = [trial.state.name for trial in study.trials], ranked(study)
    said = f"Trials: {len(best)} complete, {states.count('PRUNED')} stopped early, {states.count('FAIL')} failed."
    if not best:
        return said
    rows = [(trial.number, f"{trial.value:.4f}",
             *(f"{v:.4g}" if isinstance(v, float) else v for v in map(trial.params.get, sweep.parameters)))
            for trial in best[:10]]
    words = [*sweep.words, *(f"--{name}={best[0].params[name]}" for name in sweep.parameters)]
    command = shlex.join(["python", sweep.program.name, *words, f"--out_dir={out / 'best'}"])
    return f"{markdown(('trial', 'val NTP', *sweep.parameters), rows)}\n\n{said} The best one:\n\n    {command}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("file", type=Path, help="a sweep, as config/sweep/*.yaml")
    parser.add_argument("--trials", type=positive, help="how many in all; default: the file's run_cap")
    parser.add_argument("--jobs", type=positive, help="trials at a time; default: as many as there are cores")
    parser.add_argument("--last", type=positive, default=3, help="evaluations in a trial's value; default: 3")
    parser.add_argument("--seed", type=positive, default=1, help="of Optuna's draws; default: 1")
    parser.add_argument("--out", type=Path, help="folder of study and trials; default: out/sweep/<name of the file>")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    sweep = read_sweep(args.file)
    out = args.out or Path("out/sweep") / args.file.stem
    out.mkdir(parents=True, exist_ok=True)
    with hold(out / "lock"):
        try:
            study, at_work = open_study(out, sweep)
            check_same(study, sweep, args.last, out)
            search(study, at_work, sweep, out, args)
            text = report(study, sweep, out)
        except (SQLAlchemyError, OptunaError, RuntimeError) as error:  # not SQLite, of another version, a full disk
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"{out / 'study.db'}: Optuna cannot work with it: {reason}") from error
    print(text)
    if args.markdown:
        with atomic_write(args.markdown, "w") as f:
            f.write(text + "\n")


if __name__ == "__main__":
    sys.exit(program(main, "interrupted; the same command goes on"))
