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
    monkeypatch.delenv("LLAMA2C", raising=False)


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


THEIR_MODEL = """
import torch
from dataclasses import dataclass

@dataclass
class ModelArgs:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    multiple_of: int
    max_seq_len: int
    dropout: float

class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embedding = torch.nn.Embedding(args.vocab_size, args.dim)
        self.last_loss = None

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, tokens, targets):
        logits = self.embedding(tokens) @ self.embedding.weight.T
        self.last_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_llama2c_takes_part_where_it_is_named(tiny, tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(THEIR_MODEL)
    monkeypatch.setenv("LLAMA2C", str(tmp_path))
    cases = training.cases_by_path("260K, T 256", [1])
    assert list(cases) == ["plain; 1", "fast; 1", "llama2.c; 1", "llama2.c, compiled; 1"]
    found = training.measure({name: cases[name] for name in ("plain; 1", "llama2.c; 1")}, 1)
    assert found["llama2.c; 1"].seconds > 0
    monkeypatch.setenv("LLAMA2C", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="LLAMA2C: expected a folder with llama2.c's model.py, found .*nowhere"):
        training.cases_by_path("260K, T 256", [1])


def test_the_step_of_llama2c_learns(tmp_path):
    note = '        with open(__file__ + ".losses", "a") as f: print(self.last_loss.item(), file=f)\n'
    (tmp_path / "model.py").write_text(THEIR_MODEL + note)
    step = training.step_of_llama2c(str(tmp_path), Settings(vocab_size=16, max_seq_len=8, dim=16, learning_rate=0.1))
    for _ in range(20):
        step()
    losses = [float(line) for line in (tmp_path / "model.py.losses").read_text().split()]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]


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
