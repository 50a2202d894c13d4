"""Whole comparisons: what is run, what is skipped, what is refused."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest

import ablate
from ablate import SetUp, find_configs, parse_vary, run_of, set_ups, sources_of
from configurator import configure
from settings import Settings
from study.groups import OBJECTIVE
from study.processes import free_cores
from system.lock import hold


@pytest.fixture
def lab(data_dir, tmp_path, monkeypatch):
    """A set of two tiny configs instead of the project's."""
    common = f"""
data_dir = {str(data_dir)!r}
dataset = "toy"
max_seq_len = 32
batch_size = 4
dim = 16
n_layers = 2
n_heads = 4
n_kv_heads = 2
learning_rate = 1e-2
max_iters = 8
warmup_iters = 2
eval_interval = 4
eval_iters = 1
device = "cpu"
"""
    configs = tmp_path / "configs" / "tiny"
    configs.mkdir(parents=True)
    (configs / "base.py").write_text(common)
    (configs / "spelling.py").write_text(common + "spelling_letters = 2\nspelling_weight = 0.1\n")
    monkeypatch.setattr(ablate, "CONFIGS", tmp_path / "configs")
    return tmp_path


def words(lab, *more: str) -> list[str]:
    return ["tiny", "--seeds", "1", "2", "--rounds", "1", "--out", str(lab / "out"), "--jobs", "1", *more]


def figures(lab, run: str) -> list[dict]:
    """The lines of a run's log without clock and memory."""
    lines = map(json.loads, (lab / "out" / run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "tok_per_s", "peak_mib")}
            for line in lines if "config" not in line]


def test_one_command_trains_compares_and_goes_on(lab, capsys):
    ablate.main(words(lab, "--longer", "1.25"))
    names = {"base-1", "base-2", "base10-1", "base10-2", "spelling-1", "spelling-2"}
    assert {path.name for path in (lab / "out").iterdir() if path.is_dir()} == names
    told = capsys.readouterr()
    ends = [figures(lab, f"spelling-{seed}")[-1]["val/ntp"] for seed in (1, 2)]
    assert f"{sum(ends) / 2:.4f}" in told.out and "max_iters\u00a08\u00a0→\u00a010" in told.out
    assert "<svg" in (lab / "out" / "report.html").read_text()
    measured = json.loads((lab / "out" / "step_seconds.json").read_text())["seconds"]
    assert measured.keys() == {"base", "spelling"} and all(len(v) == 1 and v[0] > 0 for v in measured.values())
    header = json.loads((lab / "out" / "base-1" / "log.jsonl").read_text().splitlines()[0])
    assert len(header["facts"]["cores"]) == 1 and header["facts"]["threads"] == 1  # pinned

    stamps = {path: path.stat().st_mtime_ns for path in (lab / "out").rglob("last.pt")}
    log, whole = lab / "out" / "spelling-2" / "log.jsonl", figures(lab, "spelling-2")
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + '\n{"iter": 8, "val/')  # as if it had been killed
    ablate.main(words(lab, "--longer", "1.25"))
    assert figures(lab, "spelling-2") == whole
    changed = {path.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"spelling-2"}


def test_settings_for_all_runs_and_some_of_the_configs(lab, capsys):
    ablate.main(words(lab, "--only", "spelling", "--max_iters=4", "--rounds", "0"))
    assert {line["iter"] for line in figures(lab, "spelling-2")} == set(range(5))
    assert not (lab / "out" / "step_seconds.json").exists()
    capsys.readouterr()
    ablate.main(words(lab, "--only", "base", "--max_iters=4", "--rounds", "0", "--no_runs"))
    assert "spelling" not in capsys.readouterr().out


def test_a_run_of_an_older_config_is_not_taken_for_one_of_this(lab):
    ablate.main(words(lab, "--only", "base", "--rounds", "0"))
    with pytest.raises(ValueError, match="base-1: was trained with dropout=0.0, its config has 0.1"):
        ablate.main(words(lab, "--no_runs", "--dropout=0.1"))
    (lab / "out" / "base-1" / "last.pt").unlink()  # the log knows as well
    with pytest.raises(ValueError, match="base-1: was trained with dropout=0.0, its config has 0.1"):
        ablate.main(words(lab, "--no_runs", "--dropout=0.1"))


def test_what_all_runs_need_is_asked_for_before_the_first(lab, monkeypatch):
    with pytest.raises(ValueError, match="no such data set; make it with one of\n    python tinystories.py down"):
        ablate.main(words(lab, "--dataset=tinystories"))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(ModuleNotFoundError) as missing:
        ablate.main(words(lab))
    assert missing.value.name == "matplotlib" and not (lab / "out").exists()


def test_what_cannot_be_compared_is_said(lab):
    with pytest.raises(ValueError, match="out: no run there yet"):
        ablate.main(words(lab, "--no_runs", "--rounds", "0"))
    with pytest.raises(ValueError, match="some runs failed(.|\n)*base-1: train.py: .*expected more than 32"):
        ablate.main(words(lab, "--only", "base", "--train_fraction=0.0001"))
    with pytest.raises(ValueError, match="--only nitp: expected some of base, spelling"):
        ablate.main(words(lab, "--only", "nitp"))
    for word, says in (("--max_iter=3", "--max_iter: no such setting; did you mean max_iters"),
                       ("--seed=7", "--seed=7: each run has its own"), ("--out_dir=x", "--out_dir=x: each run has"),
                       ("spelling", "spelling: expected sets first"), ("--rounds=-1", "--rounds=-1: expected 0")):
        with pytest.raises(ValueError, match=says):
            ablate.main(words(lab, word))
    (lab / "out").mkdir(exist_ok=True)
    with hold(lab / "out" / "lock"), pytest.raises(ValueError, match="out: another program is at work here"):
        ablate.main(words(lab, "--no_runs"))


def test_a_broken_line_in_a_log_does_not_stop_a_comparison(lab, capsys):
    ablate.main(words(lab, "--only", "base", "--seeds", "1", "1", "--rounds", "0", "--max_iters=4"))
    assert [path.name for path in (lab / "out").glob("base*")] == ["base-1"]  # a seed given twice is one run
    log = lab / "out" / "base-1" / "log.jsonl"
    log.write_text(log.read_text() + '{"val/ntp": 3}\n{"val/ntp": 3x\n')
    ablate.main(words(lab, "--only", "base", "--seeds", "1", "--max_iters=4", "--no_runs"))
    assert "expected a whole number as iter" in capsys.readouterr().err


def test_sets_and_single_configs_stand_together(lab):
    single = lab / "mine.py"
    single.write_text("dim = 32\n")
    assert list(find_configs([str(single), "tiny"])) == ["base", "mine", "spelling"]  # the baseline comes first
    assert list(find_configs([str(single)])) == ["mine"]
    with pytest.raises(ValueError, match="nowhere: neither a config file nor a set; sets are tiny"):
        find_configs(["nowhere"])
    with pytest.raises(ValueError, match="base.py: a second config called base"):
        find_configs(["tiny", str(lab / "configs" / "tiny" / "base.py")])


def test_a_run_goes_by_its_config_its_length_and_its_seed(lab):
    base = SetUp("base", lab / "configs" / "tiny" / "base.py")
    s = run_of(base, 5, ["--dim=32"], lab / "out", longer=1.25).settings
    assert (s.seed, s.dim, s.max_iters, s.out_dir) == (5, 32, 10, str(lab / "out" / "base10-5"))
    for name, longer in (("learning_rate=1e-3", "learning_rate=1e-3,max_iters=10"), ("mtp8", "mtp8_10")):
        s = run_of(base._replace(name=name), 5, [], lab / "out", longer=1.25).settings
        assert s.out_dir == str(lab / "out" / f"{longer}-5")


def test_set_ups_from_one_config(lab, capsys):
    """n = 0 has no heads, so no weight of theirs; the first value is the baseline; results are drawn against n."""
    config = str(lab / "configs" / "tiny" / "base.py")
    common = ["--seeds", "1", "--rounds", "0", "--out", str(lab / "out"), "--max_iters=4", "--nitp_weight=0.1"]
    ablate.main([config, "--vary", "n_future_heads=0,1,2", *common])
    told = capsys.readouterr()
    folders = {path.name for path in (lab / "out").iterdir() if path.is_dir()}
    assert folders == {f"n_future_heads={n}-1" for n in (0, 1, 2)}
    assert "n_future_heads\u00a00\u00a0→\u00a02" in told.out and "Difference to n_future_heads=0" in told.out
    assert "Validation NTP against n_future_heads" in (lab / "out" / "report.html").read_text()
    ablate.main([config, "--vary", "n_future_heads=0,1,2", *common, "--no_runs"])
    again = capsys.readouterr().out
    assert again == told.out


def test_a_set_at_each_value_of_a_setting(lab, capsys):
    ablate.main(words(lab, "--vary", "train_fraction=0.5,1.0", "--rounds", "0", "--max_iters=4", "--seeds", "1"))
    told = capsys.readouterr().out
    assert {str(path.relative_to(lab / "out")) for path in (lab / "out").glob("*/*") if path.is_dir()} == {
        f"train_fraction={x}/{name}-1" for x in ("0.5", "1.0") for name in ("base", "spelling")}
    rows = [line.split() for line in told.split("Validation NTP against train_fraction")[1].splitlines()]
    assert [row[:2] for row in rows if len(row) > 5 and row[1] in ("base", "1")] == [
        ["0.5", "base"], ["spelling", "1"], ["1", "base"], ["spelling", "1"]]


def test_combinations_of_several_settings(lab):
    found = set_ups({"base": lab / "x.py"}, parse_vary(["dim=16,32", "head=linear,block"]))
    assert [s.name for s in found] == ["dim=16,head=linear", "dim=16,head=block", "dim=32,head=linear",
                                       "dim=32,head=block"]
    assert found[1].words == ["--dim=16", "--head=block"]
    for word, says in (("dim", "expected SETTING=VALUE"), ("dim=1,,2", "expected SETTING=VALUE"),
                       ("dim=1,2,1", "dim=1,2,1: expected each value once"), ("seed=1,2", "seed is set already")):
        with pytest.raises(ValueError, match=says):
            parse_vary([word])
    with pytest.raises(ValueError, match="dims: no such setting"):
        ablate.main(words(lab, "--vary", "dims=16,32"))


def test_printed_command_lines_are_those_of_unfinished_runs(lab, capsys):
    ablate.main(words(lab, "--only", "base", "--rounds", "0"))
    capsys.readouterr()
    ablate.main(words(lab, "--longer", "1.5", "--print"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("python train.py ") for line in lines)
    made = [configure(Settings, line.split()[2:]) for line in lines]
    assert {Path(s.out_dir).name for s in made} == {"spelling-1", "spelling-2", "base12-1", "base12-2"}
    assert {s.max_iters for s in made if "base12" in s.out_dir} == {12}


@pytest.fixture
def two_stages(lab):
    """A set of which two runs start from a third."""
    folder = lab / "configs" / "tiny"
    common = (folder / "base.py").read_text() + "max_iters = 4\n"
    (folder / "first.py").write_text(common + 'out_dir = "out/tiny/first"\n')
    for name in ("base", "spelling"):
        text = (folder / f"{name}.py").read_text() + "max_iters = 4\n"
        text += f'out_dir = "out/tiny/{name}"\ninit_from = "out/tiny/first/last.pt"\n'
        (folder / f"{name}.py").write_text(text)
    return lab


def test_runs_start_from_runs_of_their_own_seed(two_stages, capsys):
    lab = two_stages
    ablate.main(words(lab, "--print"))
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2 and "4 more start from checkpoints of these" in told.err
    ablate.main(words(lab, "--rounds", "0"))
    told = capsys.readouterr()
    assert "Difference to base" in told.out and "\nfirst " not in told.out  # what others start from is not compared
    for seed in (1, 2):
        ends = figures(lab, f"first-{seed}")[-1]["val/ntp"]
        header = json.loads((lab / "out" / f"base-{seed}" / "log.jsonl").read_text().splitlines()[0])
        assert header["config"]["init_from"] == str(lab / "out" / f"first-{seed}" / "last.pt")
        assert figures(lab, f"base-{seed}")[0]["val/ntp"] == pytest.approx(ends, abs=1e-3)


def test_runs_whose_source_failed_do_not_start(two_stages, monkeypatch):
    (two_stages / "configs" / "tiny" / "first.py").write_text(
        (two_stages / "configs" / "tiny" / "first.py").read_text() + "train_fraction = 0.0001\n")
    with pytest.raises(ValueError, match="some runs failed") as error:
        ablate.main(words(two_stages, "--rounds", "0"))
    assert "first-1: train.py: " in str(error.value) and "base-1" not in str(error.value)


def test_the_2x2_of_fine_tuning(monkeypatch):
    made = [SetUp(name, path) for name, path in find_configs(["finetune"]).items()]
    assert made[0].name == "base"
    assert {name: s.name for (_, name), s in sources_of(made, []).items()} == {
        "base": "pretrain", "mtp": "pretrain", "base_after_mtp": "pretrain_mtp", "mtp_after_mtp": "pretrain_mtp"}


def test_more_runs_than_cores_are_not_pinned_and_that_is_said(lab, capsys):
    jobs = len(free_cores()) + 1
    ablate.main(words(lab, "--only", "base", "--rounds", "0", "--jobs", str(jobs), "--max_iters=4"))
    assert "not pinned to cores of their own" in capsys.readouterr().err


def test_every_set_of_the_project_differs_from_its_baseline_in_the_objective_alone():
    for folder in (path for path in (ablate.ROOT / "config").iterdir() if (path / "base.py").exists()):
        base = asdict(configure(Settings, [str(folder / "base.py")]))
        for path in folder.glob("*.py"):
            other = asdict(configure(Settings, [str(path)]))
            if path.stem.startswith("pretrain"):  # others start from it
                continue
            differ = {key for key in base if base[key] != other[key]} - {"out_dir", "init_from"}
            of_a_search = {"learning_rate"} if folder.name == "confirm" else set()  # each its own
            assert differ <= OBJECTIVE | {"recurrence"} | of_a_search, path
