"""Refuse a run that cannot fit into the machine, before anything is built.

    check_memory(s, args, machine)   # ValueError: ... needs at least 1,234 GiB, this machine has 23 GiB

The estimate is a lower bound: what is refused cannot run, what passes may still be too big.
"""

import os
from dataclasses import replace

import torch

from model import ModelArgs, Transformer
from step.machine import Machine

GIB = 2**30
PER_PARAMETER = 4 * 5  # bytes: float32 weight, gradient, at least one moment; a checkpoint's copy of weight and moment
PER_TOKEN = 2 * 8  # x and y, int64, of all micro-batches of an iteration


def parameter_count(args: ModelArgs) -> int:
    """Parameters of a model that is not built: shapes alone, on the meta device, of one layer and one head of many."""
    def count(n_layers: int, n_future_heads: int) -> int:
        with torch.device("meta"):
            model = Transformer(replace(args, recurrence=1, n_layers=n_layers, n_future_heads=n_future_heads))
        return sum(p.numel() for p in model.parameters())

    layers, heads = min(args.n_layers, 2), min(args.n_future_heads, 1)
    fewest = count(layers, heads)
    more_layers = (args.n_layers - layers) * (count(layers + 1, heads) - fewest)
    return fewest + more_layers + (args.n_future_heads - heads) * (count(layers, heads + 1) - fewest)


def activation_bytes(args: ModelArgs, tokens: int) -> int:
    """At least what a forward pass over these tokens keeps for backward: bfloat16, of attention and feed-forward."""
    if args.trunk == "rnn":
        return 2 * args.dim * args.n_layers * tokens
    applied = args.n_layers
    if args.recurrence > 1:
        applied += (args.recurrence - 1) * (args.n_layers - args.prelude_layers - args.coda_layers)
    attention = args.n_heads * (args.head_dim or args.dim // args.n_heads)
    return 2 * (2 * args.dim + 2 * attention + 3 * args.hidden_dim) * applied * tokens


def check_memory(s, args: ModelArgs, machine: Machine) -> None:
    """s: batch_size, gradient_accumulation_steps, max_seq_len. Errors: ValueError if a step cannot fit."""
    available = machine.memory_bytes()
    micro = s.batch_size * s.max_seq_len
    parameters = parameter_count(args) * PER_PARAMETER
    step = activation_bytes(args, micro) + micro * s.gradient_accumulation_steps * PER_TOKEN
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if machine.device.type == "cpu" else 1
    needed = processes * (parameters + step)
    if available is None or needed <= available:
        return
    biggest = ("batch_size, max_seq_len or gradient_accumulation_steps" if step > parameters else
               "vocab_size, dim, n_layers or n_future_heads")
    raise ValueError(f"out of memory: this run needs at least {needed / GIB:,.1f} GiB ({parameters / GIB:,.1f} for "
                     f"parameters, {step / GIB:,.1f} for a step"
                     + (f", in each of {processes} processes" if processes > 1 else "") +
                     f"), {machine.device} has {available / GIB:,.1f} GiB; try a smaller {biggest}")
