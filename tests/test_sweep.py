"""The search: what it reads and refuses, whole searches, and interrupted ones."""

import json
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import yaml
from conftest import ROOT, start

import sweep
import train
from configurator import configure
from settings import Settings, check
from study import processes
from system.lock import hold

FILES = sorted((ROOT / "config" / "sweep").glob("*.yaml"))
# Trains nothing: writes the log that plan.json has for the trial, and stops or fails where it is told to.
FAKE = '''
import json, os, signal, sys, time
from pathlib import Path

words = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
out, here = Path(words["out_dir"]), Path(__file__).parent
plan = json.loads((here / "plan.json").read_text()).get(out.name, {})
resumed = words.get("init_from") == "resume"
first = int((out / "last.pt").read_text()) if resumed else 0
with open(out / "starts.jsonl", "a") as f:
    f.write(json.dumps(words | {"pid": os.getpid(), "first": first}) + "\\n")

def save_and_stop(*_):
    (out / "last.pt").write_text(str(it))
    sys.exit(143)

it = first
signal.signal(signal.SIGTERM, save_and_stop)
lines = (out / "log.jsonl").read_text().splitlines(True)[:first + 1] if resumed else ['{"iter": 0, "config": {}}\\n']
(out / "log.jsonl").write_text("".join(lines))
log = open(out / "log.jsonl", "a", buffering=1)
for it in range(first, 13):
    if it == plan.get("fails_at"):
        print("a warning", plan["error"], "a last word", sep="\\n", file=sys.stderr)
        sys.exit(1)
    if it == plan.get("waits_at"):
        log.write('{"iter": 0, "val/nt')  # half a line
        until = time.monotonic() + 60.0
        while not (here / "go").exists() and time.monotonic() < until:
            time.sleep(0.01)
        log.seek(log.tell() - 19)
        log.truncate()
    (out / "last.pt").write_text(str(it))
    log.write(json.dumps({"iter": it, "val/ntp": plan.get("level", 2.0) - it / 100}) + "\\n")
'''


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A fake train.py, and lab(plan, **changes) -> the path of a search over its learning rate."""
    monkeypatch.setattr(sweep, "POLL", 0.02)
    monkeypatch.setattr(processes, "POLL", 0.02)
    (tmp_path / "train.py").write_text(FAKE)

    def make(plan: dict | None = None, **changes) -> Path:
        (tmp_path / "plan.json").write_text(json.dumps(plan or {}))
        words = ["--max_iters=12", "--eval_interval=1", "--warmup_iters=1"]
        content = {"program": str(tmp_path / "train.py"), "command": [*sweep.PLAIN, "${program}", *words, "${args}"],
                   "method": "bayes", "metric": {"name": "val/ntp", "goal": "minimize"},
                   "early_terminate": {"type": "hyperband", "min_iter": 5}, "run_cap": 3,
                   "parameters": {"learning_rate": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.008},
                                  "n_future_heads": {"min": 1, "max": 4}}} | changes
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return make


def run(path: Path, *words) -> None:
    sweep.main([str(path), "--out", str(path.parent / "out"), "--jobs", "1", *map(str, words)])


def trials_of(path: Path, out: str = "out") -> list:
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{path.parent / out / 'study.db'}").trials


def starts(path: Path, number: int) -> list[dict]:
    """How often the trainer of a trial was started, and with what."""
    file = path.parent / "out" / str(number) / "starts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def wait_for(found) -> None:
    for _ in range(2000):
        if found():
            return
        time.sleep(0.02)
    raise AssertionError("waited for nothing")


# ---------------------------------------------------------------------------------------------
# the file

@pytest.mark.parametrize("name, found, expected", [
    ("dropout", {"value": 0}, ("constant", [0.0])),
    ("dropout", {"distribution": "constant", "value": 0.1}, ("constant", [0.1])),
    ("aux_schedule", {"values": ["linear", "cosine"]}, ("categorical", ["linear", "cosine"])),
    ("tie_embeddings", {"distribution": "categorical", "values": [True, False]}, ("categorical", [True, False])),
    ("n_layers", {"min": 1, "max": 4}, ("int_uniform", [1, 4])),
    ("n_layers", {"distribution": "int_uniform", "min": 1, "max": 4}, ("int_uniform", [1, 4])),
    ("dropout", {"min": 0, "max": 0.5}, ("uniform", [0.0, 0.5])),
    ("dropout", {"distribution": "uniform", "min": 0, "max": 0.5}, ("uniform", [0.0, 0.5])),
    ("weight_decay", {"min": 0, "max": 2}, ("int_uniform", [0.0, 2.0])),  # as wandb infers it
    ("learning_rate", {"distribution": "log_uniform_values", "min": 0.1, "max": 1}, ("log_uniform_values", [0.1, 1.0])),
])
def test_distributions_are_read_as_wandb_does(name, found, expected):
    assert sweep.read_parameter(name, found, "x") == {"distribution": expected[0], "values": expected[1]}


@pytest.mark.parametrize("name, found, complaint", [
    ("learning_rates", {"value": 1}, "no such setting; did you mean learning_rate"),
    ("out_dir", {"value": "a"}, "cannot be compared"),
    ("dropout", 0.1, "expected keys and values, found 0.1"),
    ("dropout", {}, "expected value, values or min and max"),
    ("dropout", {"values": []}, "expected value, values or min and max"),
    ("dropout", {"values": 0.5}, "expected value, values or min and max"),
    ("dropout", {"vals": [0.1]}, "vals: not known here, expected distribution, max, min, value, values"),
    ("dropout", {"min": 0.0}, "max: missing"),
    ("dropout", {"value": 0.1, "max": 0.5}, "max: not known here"),
    ("dropout", {"distribution": "q_uniform", "min": 0.0, "max": 0.5}, "expected constant, .*found 'q_uniform'"),
    ("dropout", {"distribution": ["uniform"], "min": 0.0, "max": 0.5}, "distribution: expected"),
    ("dropout", {"distribution": "normal", "mu": 0.0}, "mu: not known here"),
    ("dropout", {"min": 0.0, "max": 1.0}, r"expected float in \[0, 1\), found 1.0"),
    ("dropout", {"min": 0.5, "max": 0.1}, "expected min < max"),
    ("weight_decay", {"distribution": "log_uniform_values", "min": 0.0, "max": 0.1}, "0 < min"),
    ("learning_rate", {"min": "1e-3", "max": 0.1}, "YAML takes 1e-3 for a text"),
    ("n_layers", {"distribution": "uniform", "min": 1, "max": 4}, "uniform from 1 to 4: expected one that gives int"),
    ("n_layers", {"min": 1.0, "max": 4.0}, "expected int in \\[1, 1024\\], found 1.0"),
    ("weight_decay", {"distribution": "int_uniform", "min": 0.5, "max": 2}, "expected one that gives float"),
    ("n_layers", {"values": [0, 1]}, "expected int in \\[1, 1024\\], found 0"),
    ("tie_embeddings", {"min": 0, "max": 1}, "expected bool, found 0"),
    ("aux_schedule", {"values": ["linear", "steps"]}, "expected one of constant, linear, cosine, found 'steps'"),
])
def test_parameters_that_cannot_be_are_refused(name, found, complaint):
    with pytest.raises(ValueError, match=f"^x: .*{complaint}"):
        sweep.read_parameter(name, found, "x: p")


@pytest.mark.parametrize("changes, complaint", [
    ({"steps": 3}, "search.yaml: steps: not known here"),
    ({"method": None}, "search.yaml: method: missing"),
    ({"method": "grid"}, "method: expected bayes, found 'grid'"),
    ({"metric": {"name": "val/total", "goal": "minimize"}}, "metric: expected .*val/ntp.* found .*val/total"),
    ({"metric": {"name": "val/ntp", "goal": "maximize"}}, "metric: expected .*minimize.*found .*maximize"),
    ({"metric": "val/ntp"}, "metric: expected .*found 'val/ntp'"),
    ({"early_terminate": {"type": "median"}}, "early_terminate: type: expected hyperband, found 'median'"),
    ({"run_cap": 0}, "run_cap: expected int >= 1, found 0"),
    ({"program": "trains.py"}, "program: expected a file in .*found 'trains.py'"),
    ({"parameters": []}, r"parameters: expected settings and their values, found \[\]"),
    ({"parameters": {"dropout": {"value": 0.1}}}, "found none to search over"),
    ({"parameters": {3: {"value": 0.1}}}, "parameters: 3: no such setting"),
    ({"command": "python train.py"}, "command: expected a list of"),
    ({"command": [*sweep.PLAIN, "${program}", "--dim=8"]}, "command: expected a list of"),
    ({"command": ["nice", *sweep.PLAIN, "${program}", "${args}"]}, "command: expected a list of"),
    ({"command": [*sweep.PLAIN, "${program}", "${args_no_hyphens}", "${args}"]}, "command: expected a list of"),
    ({"command": [*sweep.PLAIN, "${program}", "no.py", "${args}"]}, "command: no.py: cannot read this config file"),
    ({"command": [*sweep.PLAIN, "${program}", "--dims=8", "${args}"]}, "command: --dims: no such setting"),
])
def test_files_that_cannot_be_are_refused(lab, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        sweep.read_sweep(lab(**changes))


def test_the_program_complains_in_a_line(lab, tmp_path, monkeypatch, capfd):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(tmp_path / "none.yaml")])
    try:
        with pytest.raises(SystemExit, match="^1$"):
            runpy.run_path(str(ROOT / "sweep.py"), run_name="__main__")
        assert re.match("sweep.py: .*none.yaml: cannot read this sweep file: No such file", capfd.readouterr().err)
        for module in ("optuna.exceptions", "yaml"):
            with monkeypatch.context() as without, pytest.raises(SystemExit, match="^1$"):
                without.setitem(sys.modules, module, None)
                runpy.run_path(str(ROOT / "sweep.py"), run_name="__main__")
            assert capfd.readouterr().err == f"sweep.py: needs {module}: pip install -r requirements-compare.txt\n"
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_what_is_no_search_and_no_study_is_said(lab, tmp_path, capfd):
    for text in (b"a: [1\n", b"a: !!python/name:os.system\n", b"\xff\xfe\x00"):
        (tmp_path / "bad.yaml").write_bytes(text)
        with pytest.raises(ValueError, match="bad.yaml: not YAML: "):
            sweep.read_sweep(tmp_path / "bad.yaml")
    path = lab()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.db").write_text("this is no database, however long it may be" * 30)
    with pytest.raises(ValueError, match="study.db: Optuna cannot work with it: .*not a database"):
        run(path)
    with pytest.raises(OSError, match="search.yaml"):
        sweep.main([str(path), "--out", str(path)])
    with pytest.raises(SystemExit):
        run(path, "--trials", "0")
    assert "--trials: expected an integer from 1 up, found '0'" in capfd.readouterr().err


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_projects_searches_are_valid_and_mean_the_same_to_wandb(path, tmp_path, monkeypatch):
    """The command that wandb's agent makes of the file, run: train.py gets the same settings as in a trial."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    found = sweep.read_sweep(path)
    assert {"base", "objective", "shared"} == {file.stem for file in FILES}
    rates = found.parameters["learning_rate"]  # the control's are all that the others have, and more
    assert rates == {"distribution": "log_uniform_values",
                     "values": [1e-3, 8e-3] if path.stem == "base" else [2e-3, 5e-3]}
    assert found.settings.max_iters == 500 and found.settings.eval_interval == 50 and found.stops_early
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask()
    words = [*found.words, *sweep.suggest(trial, found.parameters)]
    ours = configure(Settings, words)
    check(ours)

    content = load_sweep_config(str(path))
    fixed = {name: p["value"] for name, p in content["parameters"].items() if "value" in p}
    values = {name: {"value": value} for name, value in (fixed | trial.params).items()}
    (tmp_path / "program.py").write_text("import sys; print(*sys.argv[1:], sep='\\n')")
    replaced = create_sweep_command_args({"args": values}) | {
        "env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [str(tmp_path / "program.py")]}
    command = [word for part in create_sweep_command(content["command"])
               for word in (replaced[part[2:-1]] if part.startswith("${") else [part])]
    done = subprocess.run(command, env=os.environ | {"WANDB_RUN_ID": "abc"}, capture_output=True, text=True, check=True)
    theirs = configure(Settings, done.stdout.splitlines())
    assert theirs.out_dir == "out/sweep/wandb/abc" and theirs.wandb_log and not ours.wandb_log
    theirs.out_dir, theirs.wandb_log = ours.out_dir, ours.wandb_log
    assert theirs == ours


# ---------------------------------------------------------------------------------------------
# searches

def test_a_whole_search_with_real_runs(lab, words, tmp_path, capsys):
    small = words(max_iters=12, eval_interval=3, eval_iters=1, log_interval=2, out_dir="elsewhere")
    path = lab(program="train.py", run_cap=2, command=[*sweep.OWN_FOLDER, "${program}", *small, "--wandb_log=true",
                                                       "${args}"],
               parameters={"learning_rate": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1},
                           "head": {"value": "shared"}, "n_future_heads": {"value": 1},
                           "nitp_weight": {"min": 0.1, "max": 0.5}})
    run(path, "--jobs", 2)
    run(path, "--trials", 3, "--last", 3, "--markdown", tmp_path / "table.md")
    trials = trials_of(path)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    for trial in trials:
        file = tmp_path / "out" / str(trial.number) / "log.jsonl"
        log = [json.loads(line) for line in file.read_text().splitlines()]
        s = Settings(**log[0]["config"])
        assert s.learning_rate == trial.params["learning_rate"] and s.nitp_weight == trial.params["nitp_weight"]
        assert s.head == "shared" and s.n_future_heads == 1 and not s.wandb_log
        found = {line["iter"]: line["val/ntp"] for line in log if "val/ntp" in line}
        assert found == trial.intermediate_values and list(found) == [0, 3, 6, 9, 12]
        assert trial.value == statistics.fmean([found[it] for it in (6, 9, 12)])
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    best = min(trials, key=lambda trial: trial.value)
    assert text.splitlines()[2].startswith(f"| {best.number} | {best.value:.4f} | ")
    assert "Trials: 3 complete, 0 stopped early, 0 failed" in text

    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("log.jsonl")}
    run(path, "--trials", 3)
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("log.jsonl")} and len(stamps) == 3
    python, program, *command = text.strip().splitlines()[-1].split()
    assert (python, program) == ("python", "train.py") and train.main(command) == 0
    again = processes.evaluations(tmp_path / "out" / "best")
    assert again == best.intermediate_values


def test_a_search_in_two_parts_draws_what_one_draws(lab):
    path = lab({str(k): {"level": 2.0 + k % 3} for k in range(12)})
    run(path, "--trials", 12)
    sweep.main([str(path), "--out", str(path.parent / "parts"), "--jobs", "1"])  # run_cap: 3
    assert len(trials_of(path, "parts")) == 3
    sweep.main([str(path), "--out", str(path.parent / "parts"), "--jobs", "1", "--trials", "12"])
    once, twice = trials_of(path), trials_of(path, "parts")
    assert [trial.params for trial in once] == [trial.params for trial in twice]
    assert len({trial.params["learning_rate"] for trial in once}) == 12  # none asked anew
    sweep.main([str(path), "--out", str(path.parent / "other"), "--jobs", "1", "--seed", "2", "--trials", "1"])
    assert trials_of(path, "other")[0].params != once[0].params


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_each_trial_has_a_core_and_all_stop_with_the_search(lab):
    path = lab({"0": {"waits_at": 1}, "1": {"waits_at": 1}}, run_cap=2)
    process = start("sweep.py", path, "--out", path.parent / "out")
    files = [path.parent / "out" / str(k) / "starts.jsonl" for k in range(min(2, len(os.sched_getaffinity(0))))]
    try:
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [starts(path, k)[0]["pid"] for k in range(len(files))]
        cores = [os.sched_getaffinity(pid) for pid in pids]
    finally:
        process.terminate()
        assert "interrupted; the same command goes on" in process.communicate(timeout=60)[1]
    assert all(len(core) == 1 for core in cores) and len(set.union(*cores)) == len(files)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # nothing goes on by itself


def test_a_bad_trial_is_stopped_early_and_a_good_one_is_not(lab, capsys):
    levels = {str(k): {"level": 2.0 + k / 10} for k in range(5)}
    path = lab(levels | {"5": {"level": 9.0, "waits_at": 8}, "6": {"level": 1.0}})
    run(path, "--trials", 7)  # trial 5 would wait a minute if it were not stopped
    trials, said = trials_of(path), capsys.readouterr()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5 + ["PRUNED", "COMPLETE"]
    assert max(trials[5].intermediate_values) == 4  # a third of 12: never before
    assert len(trials[6].intermediate_values) == 13 and "Trials: 6 complete, 1 stopped early, 0 failed" in said.out
    assert "trial 5: stopped early at iter 4" in said.err and "| 6 | 0.8900 |" in said.out and "| 5 |" not in said.out


def test_without_early_terminate_none_is_stopped(lab):
    path = lab({str(k): {"level": 2.0 + k} for k in range(7)}, early_terminate=None)
    run(path, "--trials", 7)
    assert [trial.state.name for trial in trials_of(path)] == ["COMPLETE"] * 7


def test_failures_are_told_and_three_in_a_row_end_the_search(lab, capsys):
    path = lab({str(k): {"fails_at": k - 1, "error": f"train.py: loss {k} is nan"} for k in (1, 3, 4, 5)})
    with pytest.raises(ValueError, match="3 trials in a row failed, the last one, .*out/5, failed: .*loss 5 is nan"):
        run(path, "--trials", 9)
    assert [trial.state.name for trial in trials_of(path)] == ["COMPLETE", "FAIL", "COMPLETE", "FAIL", "FAIL", "FAIL"]
    assert "trial 1: failed: train.py: loss 1 is nan\n" in capsys.readouterr().err
    run(path, "--trials", 7)  # goes on with the next one
    assert "Trials: 3 complete, 0 stopped early, 4 failed" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# cut short

@pytest.mark.filterwarnings("error:.*already reported")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_search_that_was_cut_short_goes_on_with_its_trial(lab, number):
    path = lab({"1": {"waits_at": 6}})
    file = path.parent / "out" / "1" / "log.jsonl"
    process = start("sweep.py", path, "--out", path.parent / "out", "--jobs", 1, start_new_session=True)
    wait_for(lambda: file.exists() and '"val/nt' in file.read_text().splitlines()[-1])
    wait_for(lambda: len(trials_of(path)[1].intermediate_values) == 6)  # the half line is not among them
    os.killpg(process.pid, number)  # Ctrl-C is for all of a terminal's processes
    out, error = process.communicate(timeout=60)
    assert process.returncode == (128 + number if number != signal.SIGKILL else -number) and not out
    assert "Traceback" not in error and ("interrupted; the same command goes on" in error) == (number != signal.SIGKILL)
    pid = starts(path, 1)[0]["pid"]
    outlived = Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
    assert not outlived or number == signal.SIGKILL
    before = [trial.params for trial in trials_of(path)]
    assert [trial.state.name for trial in trials_of(path)] == ["COMPLETE", "RUNNING"]

    (path.parent / "plan.json").write_text("{}")
    run(path)
    trials = trials_of(path)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert [trial.params for trial in trials[:2]] == before
    first, second = starts(path, 1)
    assert second["init_from"] == "resume" and second["first"] == 6  # its process saved, even that of a killed search
    assert {k: v for k, v in second.items() if k not in ("init_from", "pid", "first")} == {
        k: v for k, v in first.items() if k not in ("pid", "first")}
    assert trials[1].intermediate_values == {it: 2.0 - it / 100 for it in range(13)}
    assert len(starts(path, 0)) == 1


def test_a_trial_that_had_not_begun_is_not_lost(lab):
    """The search was killed between asking for a trial and drawing its settings, or before the trial saved anything."""
    path = lab(run_cap=2)
    found = sweep.read_sweep(path)
    (path.parent / "out").mkdir()
    study, at_work = sweep.open_study(path.parent / "out", found)
    sweep.check_same(study, found, 3, path.parent / "out")
    half, whole = study.ask(), study.ask()
    half.suggest_float("learning_rate", 0.001, 0.008, log=True)
    sweep.suggest(whole, found.parameters)
    run(path)
    trials = trials_of(path)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2 and not at_work
    assert trials[0].params.keys() == found.parameters.keys() and trials[0].params.items() >= half.params.items()
    assert trials[1].params == whole.params and len(starts(path, 1)) == 1 and "init_from" not in starts(path, 1)[0]


def test_a_trial_that_somebody_else_stopped_is_not_lost(lab):
    path = lab({"0": {"waits_at": 3}}, run_cap=1)
    file = path.parent / "out" / "0" / "log.jsonl"

    def somebody():
        wait_for(lambda: file.exists() and '"val/nt' in file.read_text().splitlines()[-1])
        os.kill(starts(path, 0)[0]["pid"], signal.SIGTERM)

    thread = threading.Thread(target=somebody)
    thread.start()
    with pytest.raises(ValueError, match="trial 0 was stopped by somebody else; the same command goes on with it"):
        run(path)
    thread.join()
    (path.parent / "go").touch()
    run(path)
    assert len(starts(path, 0)) == 2 and trials_of(path)[0].state.name == "COMPLETE"


def test_one_search_at_a_time(lab):
    path = lab()
    run(path)
    with hold(path.parent / "out" / "lock"), pytest.raises(ValueError, match="out: another program is at work here"):
        run(path)
    run(path)


def test_trials_that_cannot_be_compared_are_not_mixed(lab):
    path = lab()
    run(path)
    rate = {"distribution": "log_uniform_values", "min": 0.001, "max": 0.008}
    other = [*sweep.PLAIN, "${program}", "--max_iters=13", "--eval_interval=1", "--warmup_iters=1", "${args}"]
    for changes, words, complaint in (
            ({"parameters": {"learning_rate": rate | {"max": 0.01}, "n_future_heads": {"min": 1, "max": 4}}}, [],
             "learning_rate was .*0.008.* is .*0.01"),
            ({"parameters": {"learning_rate": rate}}, [], "n_future_heads was .*int_uniform.* is 0 now"),
            ({"parameters": {"learning_rate": rate, "n_future_heads": {"min": 1, "max": 4}, "dropout": {"min": 0.1,
             "max": 0.2}}}, [], "dropout was 0.0 .* is .*uniform"),
            ({"command": other}, [], "max_iters was 12 .* is 13 now"),
            ({}, ["--last", "2"], "--last was 3 .* is 2 now")):
        with pytest.raises(ValueError, match=f"{complaint}.*choose another --out"):
            run(lab(**changes), *words)
    run(lab(run_cap=4, early_terminate=None, name="renamed"))  # these change no value
    assert len(trials_of(path)) == 4
    storage = optuna.storages.RDBStorage(f"sqlite:///{path.parent / 'study.db'}")
    optuna.create_study(study_name="sweep", storage=storage).ask()
    with pytest.raises(ValueError, match="holds a study that sweep.py did not make"):
        sweep.main([str(path), "--out", str(path.parent)])
