"""What a run needs at least is never more than what it takes; what cannot fit is refused before it is built."""

import time

import pytest
import torch

from model import ModelArgs, Transformer
from settings import Settings
from step import memory
from step.machine import Machine
from system.memory import machine_bytes

SHAPES = [{}, {"n_layers": 2, "recurrence": 1, "hidden_dim": 500}, {"n_layers": 3, "recurrence": 4},
          {"trunk": "rnn", "n_layers": 2}, {"n_heads": 2, "n_kv_heads": 1, "n_future_heads": 3, "head": "block"},
          {"n_layers": 7, "n_future_heads": 4, "head": "sequential"}, {"n_layers": 1, "n_future_heads": 1}]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_a_lower_bound(shape):
    args = ModelArgs(**shape)
    model, kept = Transformer(args), {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    assert memory.parameter_count(args) == sum(p.numel() for p in model.parameters())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        states = model.trunk(torch.zeros(2, 32, dtype=torch.int64))  # alive, and with them what backward needs
    activations = sum(size for where, size in kept.items() if where not in weights)
    assert states and activations / 10 < memory.activation_bytes(args, 64) <= activations


def test_what_cannot_fit_is_refused_at_once_with_what_would_help(monkeypatch):
    machine = Machine(torch.device("cpu"))
    monkeypatch.setattr(Machine, "memory_bytes", lambda self: 2**34)
    began = time.monotonic()
    for changes, shape, helps in (({}, {"dim": 65536}, "vocab_size, dim, n_layers or n_future_heads"),
                                  ({}, {"n_layers": 1024, "dim": 8192}, "vocab_size, dim"),
                                  ({"batch_size": 10**6}, {}, "batch_size, max_seq_len"),
                                  ({"gradient_accumulation_steps": 10**6}, {}, "batch_size, max_seq_len or gradient"),
                                  ({"max_seq_len": 1 << 24}, {"dim": 1024}, "batch_size, max_seq_len")):
        with pytest.raises(ValueError, match="out of memory: this run needs at least [0-9,.]+ GiB .*, "
                                             f"cpu has 16.0 GiB; try a smaller {helps}"):
            memory.check_memory(Settings(**changes), ModelArgs(**shape), machine)
    assert time.monotonic() - began < 20
    memory.check_memory(Settings(), ModelArgs(), machine)
    monkeypatch.setattr(Machine, "memory_bytes", lambda self: None)  # a system that does not say
    memory.check_memory(Settings(batch_size=10**6), ModelArgs(), machine)


def test_processes_on_one_processor_share_its_memory(monkeypatch):
    s, args, machine = Settings(batch_size=1000), ModelArgs(), Machine(torch.device("cpu"))
    monkeypatch.setattr(Machine, "memory_bytes", lambda self: 6 * 2**30)
    memory.check_memory(s, args, machine)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="in each of 8 processes"):
        memory.check_memory(s, args, machine)


def test_this_machine_says_what_it_has():
    assert machine_bytes() is None or machine_bytes() > 2**28
