"""bench/training.py does what it says; no speed is asserted."""

import pytest
import torch

from bench import training
from step import machine
from train import Settings


def cells(table: str, first: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith(f"| {first}")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.fixture
def tiny(monkeypatch):
    shape = {"max_seq_len": 16, "batch_size": 2, "dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    monkeypatch.setattr(training, "MODELS", {"260K, T 256": shape})
    monkeypatch.setattr(training, "PATHS", {name: training.PATHS[name] for name in ("plain", "fast")})
    monkeypatch.setattr(training, "VOCABULARIES", (512,))
    monkeypatch.setattr(training, "LENGTHS", (16,))
    monkeypatch.setattr(training, "HEADS", (0, 2))


def test_a_table_and_a_plot(tiny, tmp_path, capsys):
    training.main(["--threads", "1", "--rounds", "2", "--folder", str(tmp_path)])
    table = (tmp_path / "training.md").read_text()
    assert table in capsys.readouterr().out
    rows = cells(table, "260K, T 256")
    assert [row[:3] for row in rows] == [["260K, T 256", "plain", "1"], ["260K, T 256", "fast", "1"]]
    assert rows[0][4] == "1.00" and all(float(row[3].replace(",", "")) > 0 for row in rows)
    assert [row[0] for row in cells(table, "n = ")] == ["n = 0", "n = 2", "n = 2, both losses"]
    known = machine.memory("VmRSS") > 0  # not on every system
    assert all((float(row[2]) > 0 or not known) and row[3] == "n = 0" for row in cells(table, "n = "))
    assert [row[0] for row in cells(table, "V = ")] == ["V = 512, plain", "V = 512", "V = 512, n = 4, both losses"]
    assert [row[0] for row in cells(table, "T = ")] == ["T = 16, plain", "T = 16"]
    dropout = cells(table, "dropout = ")
    assert [row[0] for row in dropout] == ["dropout = 0", "dropout = 0, plain", "dropout = 0.1", "dropout = 0.1, plain"]
    assert {row[3] for row in dropout} == {"dropout = 0"}
    assert "<svg" in (tmp_path / "training.svg").read_text()


def test_a_step_that_cannot_be_taken_is_told(tmp_path):
    case = training.Case(Settings(path="fast", dtype="float16"), 1, "x")
    with pytest.raises(ValueError, match="x: its process ended with exit code 1"):
        training.measure({"x": case}, 1)


def test_flops_of_a_step():
    """One layer, one head, by hand: 6 for each weight and token, and for each layer, dim and key."""
    s = Settings(dim=4, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=300, hidden_dim=8, max_seq_len=10, batch_size=3)
    weights = 300 * 4 + 4 * 4 * 4 + 3 * 4 * 8 + 3 * 4  # embedding, attention, feed-forward, norms
    assert training.flops(s) == 30 * (6 * weights + 6 * 1 * 4 * 10)
    assert training.flops(Settings(**vars(s) | {"n_future_heads": 2})) == training.flops(s) + 30 * 6 * 2 * 300 * 4


def test_a_peak_is_positive():
    assert training.peak_rate(torch.float32, 1) > 0
