"""The comparison of objectives: what it runs, what it leaves alone, and its arithmetic."""

import json
import math

import pytest

import ablate
from ablate import at_length, compare, evaluations, is_finished, settings_of

PAGE = f"before\n{ablate.BEGIN}\nold\n{ablate.END}\nafter\n"


@pytest.fixture
def lab(data_dir, tmp_path, monkeypatch):
    """Two tiny configs in place of the project's, and a page for the table."""
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
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "base.py").write_text(common)
    (configs / "spelling.py").write_text(common + "spelling_letters = 2\nspelling_weight = 0.1\n")
    (tmp_path / "doc" / "runs").mkdir(parents=True)
    (tmp_path / "doc" / "objectives.md").write_text(PAGE)
    monkeypatch.setattr(ablate, "CONFIGS", configs)
    return tmp_path


def test_one_command_trains_compares_and_goes_on(lab, capsys):
    words = ["--seeds", "1", "2", "--rounds", "1", "--out", str(lab / "out"), "--folder", str(lab / "doc")]
    ablate.main(words)
    names = {"base-1", "base-2", "base10-1", "base10-2", "base13-1", "base13-2", "spelling-1", "spelling-2"}
    assert {path.name for path in (lab / "out").iterdir()} == names
    page = (lab / "doc" / "objectives.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    ends = [evaluations(settings_of("spelling", seed, out=lab / "out"))[-1]["val/ntp"] for seed in (1, 2)]
    assert f"| {sum(ends) / 2:.4f} |" in page and "| **+0.0000** (+0.0000, +0.0000) | 1.00 |" in page
    assert "<svg" in (lab / "doc" / "objectives.svg").read_text()
    lines = [json.loads(line) for line in (lab / "doc" / "runs" / "objectives.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == names and all("val/ntp" in line for line in lines)

    stamps = {path: path.stat().st_mtime_ns for path in (lab / "out").rglob("last.pt")}
    log = lab / "out" / "spelling-2" / "log.jsonl"
    whole = [{k: v for k, v in line.items() if k not in ("seconds", "tok_per_s")}
             for line in map(json.loads, log.read_text().splitlines())]
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + '\n{"iter": 8, "val/')  # as if it had been killed
    assert not is_finished(settings_of("spelling", 2, out=lab / "out"))
    ablate.main(words)
    again = [{k: v for k, v in line.items() if k not in ("seconds", "tok_per_s")}
             for line in map(json.loads, log.read_text().splitlines())]
    assert again == whole
    changed = {path.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"spelling-2"}


def test_a_run_of_an_older_config_is_not_taken_for_one_of_this(lab):
    words = ["--seeds", "1", "--rounds", "1", "--out", str(lab / "out"), "--folder", str(lab / "doc")]
    ablate.main([*words, "--only", "base"])  # one seed will do
    config = lab / "configs" / "base.py"
    config.write_text(config.read_text() + "dropout = 0.1\n")
    with pytest.raises(ValueError, match="base-1/last.pt: was trained with dropout=0.0, its config has 0.1"):
        ablate.main([*words, "--no_runs"])


def test_what_cannot_be_compared_is_said(lab):
    words = ["--seeds", "1", "--rounds", "1", "--out", str(lab / "out"), "--folder", str(lab / "doc")]
    with pytest.raises(ValueError, match="base-1.*not finished"):
        ablate.main([*words, "--no_runs"])
    (lab / "configs" / "base.py").write_text('dataset = "nowhere"\n')
    with pytest.raises(ValueError, match="some runs failed(.|\n)*base-1: train.py: .*nowhere"):
        ablate.main([*words, "--only", "base"])
    with pytest.raises(ValueError, match="objectives.md: expected the lines"):
        (lab / "doc" / "objectives.md").write_text("no marks")
        ablate.write("table", lab / "doc" / "objectives.md")


def test_the_base_of_another_length_lies_between_its_runs():
    lengths, losses = [800, 1000, 1300], [2.0, 1.9, 1.8]
    for n, loss in zip(lengths, losses, strict=True):
        assert at_length(lengths, losses, n) == pytest.approx(loss)
    assert at_length(lengths, losses, math.sqrt(800 * 1000)) == pytest.approx(1.95)
    assert at_length(lengths, losses, math.sqrt(1000 * 1300)) == pytest.approx(1.85)
    assert at_length(lengths, losses, 790) > 2.0 and at_length(lengths, losses, 1400) < 1.8  # a little beyond


def test_differences_are_paired_by_seed_and_cost_is_paid_for(lab, monkeypatch):
    """An objective 25% dearer is held against the base that trained 25% longer."""
    ends = {"base-1": 2.0, "base-2": 2.2, "base10-1": 1.9, "base10-2": 2.0, "base13-1": 1.8, "base13-2": 1.9,
            "spelling-1": 1.95, "spelling-2": 2.1}
    monkeypatch.setattr(ablate, "evaluations", lambda s: [{"iter": s.max_iters, "val/ntp": ends[s.out_dir[4:]]}])
    monkeypatch.chdir(lab)
    seconds = {"base": [1.0, 2.0, 1.0], "spelling": [1.25, 2.5, 4.0]}  # round by round; the third was disturbed
    rows = {row["objective"]: row for row in compare(["base", "spelling"], [1, 2], seconds, ablate.Path("out"))}
    assert rows["spelling"]["cost"] == 1.25 and rows["base"]["at seconds"] == pytest.approx([0, 0])
    assert rows["spelling"]["at steps"] == pytest.approx([-0.05, -0.1])
    assert rows["spelling"]["at seconds"] == pytest.approx([0.05, 0.1])
