"""A run as an accelerator sees it, on a CPU: what waits for the device, what is held there, how logits are chunked."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from test_train import log_lines, run, without_times
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import train
from losses import loss_weights
from settings import Settings
from step import chunks
from step.chunks import CHUNK, FEWEST, WHOLE, chunk_rows, limits_of
from step.machine import Machine
from text.tokenizer import BOS
from tinystories import ANSWER, FIRST, Resident, TrainBatches, Windows

CPU = torch.device("cpu")
EVERYTHING = {"n_future_heads": 2, "nitp_weight": 0.3, "consistency_weight": 0.1, "mask_document_ends": True,
              "spelling_letters": 2, "spelling_weight": 0.1, "order_window": 3, "order_weight": 0.1, "soft_weight": 0.2,
              "soft_neighbours": 4, "prefix_weight": 0.1}
TINY = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16, "vocab_size": 64, "device": "cpu",
        "dtype": "float32", "max_iters": 10, "path": "plain"}

# ---------------------------------------------------------------------------------------------
# waiting

FUNCTIONS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}  # which read; the others end in operators:
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "aten.equal")  # item(), float(), bool(), ...


@contextlib.contextmanager
def noting(note: Callable[[str], None]) -> Iterator[None]:
    """note(its name) of whatever reads a tensor's numbers, and so waits for a device that works on its own."""

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in FUNCTIONS:
                note(function.__name__)
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            by_mask = "aten.index" in str(function) and any(
                t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1] if not isinstance(t, int))
            if by_mask or any(name in str(function) for name in OPERATORS):
                note(str(function))
            return function(*args, **(kwargs or {}))

    with Functions(), Operators():
        yield


@pytest.mark.parametrize("wait", [
    lambda x: x[0].item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: x.nonzero(),
    lambda x: x[x > 0], lambda x: float(x[0]), lambda x: 1 if x[0] > 0 else 2, lambda x: torch.masked_select(x, x > 0)])
def test_whatever_waits_is_noted(wait):
    noted = []
    with noting(noted.append):
        (torch.ones(3) * 2).sum()
        assert not noted
        wait(torch.ones(3))
    assert len(noted) == 1


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"head": "shared"} | EVERYTHING, {"superposition": 2}])
def test_a_step_never_waits_for_its_device(changes, monkeypatch):
    """On the meta device nothing can be read, so whoever waits for a number gets an error."""
    texts = [bytes([97 + k % 26]) * (k % 4) for k in range(64)]
    run = train.build(Settings(**TINY | changes), Machine(torch.device("meta")), texts)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)  # torch's fused AdamW has no meta device
    tokens = torch.zeros(2, 4, 16 * run.s.superposition, dtype=torch.long, device="meta")
    answers = torch.ones(tokens.shape[1:], dtype=torch.bool, device="meta")
    step = train.training_step(run, 0, loss_weights(run.s, 0.0), [(*tokens, answers)] * 2)
    assert {t.device.type for t in (*step.means.values(), step.grad_norm)} == {"meta"}
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        step.grad_norm.item()


@pytest.mark.parametrize("rows,changes", [
    (None, {}), (None, EVERYTHING | {"soft_refresh": 3, "gradient_accumulation_steps": 2}), (8, EVERYTHING)])
def test_a_run_waits_once_for_each_line_and_once_for_each_evaluation(words, rows, changes, monkeypatch):
    during = {}  # {(what, iteration): [waits]}, of training and of evaluations

    def marks(what, function, iteration):
        def wrapped(*args):
            place[0] = during.setdefault((what, iteration(*args)), [])
            result = function(*args)
            if what == "evaluate":
                place[0] = []
            return result
        return wrapped

    place, evaluations = [[]], itertools.count()
    monkeypatch.setattr(losses, "chunk_rows", lambda *_: rows)
    monkeypatch.setattr(train, "next_batches", marks("train", train.next_batches, lambda run, data, it, weights: it))
    monkeypatch.setattr(train, "evaluate", marks("evaluate", train.evaluate, lambda *_: 6 * next(evaluations)))
    monkeypatch.setattr(Machine, "synchronize", lambda self: place[0].append("synchronize"))
    with noting(lambda name: place[0].append(name)):
        run(words(path="plain", max_iters=12, eval_interval=6, eval_iters=2, log_interval=3, sample_tokens=0,
                  **changes))
    # synchronize: before an evaluation, so that seconds of training are not counted as its own. An evaluation's second
    # tolist is of what several processes add up; one process has that on the host
    assert during == {("evaluate", it): ["tolist", "tolist"] for it in (0, 6, 12)} | {
        ("train", it): ["tolist"] if it % 3 == 0 else ["synchronize"] if it in (5, 11) else [] for it in range(12)}


# ---------------------------------------------------------------------------------------------
# data on the device

@pytest.fixture(params=["uint16", "uint32", "shards", "part", "examples", "packed"])
def windows(request, tmp_path) -> Windows:
    """Rows of 7 tokens, from every type of file."""
    kind, rng = request.param, np.random.default_rng(0)
    V = 70_000 if kind == "uint32" else 65_536
    tokens = rng.integers(3, V, 103).astype(np.uint32 if kind == "uint32" else np.uint16)
    tokens[:2] = V - 1  # the sign bit of as many bytes
    path = tmp_path / "train.bin"
    if kind == "shards":
        for k in range(4):
            tokens[25 * k : 25 * k + 25].tofile(tmp_path / f"data{k:02}.bin")
    else:
        tokens.tofile(path)
    if kind in ("examples", "packed"):
        mask = (rng.random(103) < 0.4) * ANSWER + (rng.random(103) < 0.2) * FIRST
        mask[0] |= FIRST
        mask.astype(np.uint8).tofile(tmp_path / "train.mask.bin")
    return Windows(path, V, 7, 0.8 if kind == "part" else 1.0, pack=kind == "packed")


@pytest.mark.parametrize("piece", [10, 1000])
def test_rows_gathered_on_a_device_are_those_of_the_file(windows, piece, monkeypatch):
    monkeypatch.setattr(Resident, "PIECE", piece)
    resident = Resident(windows, Machine(CPU))
    assert Resident.size(windows) == sum(t.numel() * t.element_size() for t in (resident.tokens, resident.mask)
                                         if t is not None)
    for k in range(7):  # over the ends of epochs
        host, device = (TrainBatches(windows, 4, 1, 1, 2, copy)[k] for copy in (None, resident))
        assert len(host) == len(device) == (2 if windows.mask is None else 3)
        for a, b in zip(host, device, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("changes", [{}, {"superposition": 2, "superposition_end": 0.5, "eval_interval": 8}])
def test_a_run_with_its_data_on_the_device_is_the_same_run(words, tmp_path, changes, monkeypatch, capsys):
    common = {"path": "plain", "dtype": "float32"} | changes
    run(words(out_dir=tmp_path / "host", **common))
    monkeypatch.setattr(Machine, "free_bytes", lambda self: 1 << 30)
    run(words(out_dir=tmp_path / "device", **common))
    assert "cpu: logits of all rows at once; tokens copied there" in capsys.readouterr().out
    assert without_times(log_lines(tmp_path / "host")) == without_times(log_lines(tmp_path / "device"))


# ---------------------------------------------------------------------------------------------
# logits

GIB = 1 << 30


def test_a_cpu_has_the_limits_of_its_caches_and_a_gpu_those_of_its_memory():
    assert chunk_rows(64 * 512, 512) is None and chunk_rows(64 * 512 + 1, 512) == CHUNK // 512
    assert chunk_rows(1, 512, True) == CHUNK // 512 and chunk_rows(10**6, 32_000) == FEWEST
    h100 = limits_of(78 * GIB, 2)  # config/gpu/stories15m.py: the NTP head and one more
    assert chunk_rows(128 * 256, 4096, False, h100) is None
    assert chunk_rows(128 * 256, 32_000, False, h100) == h100.chunk // 32_000 > 1000
    assert h100.whole > 8 * WHOLE and h100.chunk <= h100.whole


@pytest.mark.parametrize("heads", [1, 2, 9])
def test_whole_logits_fit_into_a_quarter_of_the_memory(heads):
    for free in (0, 1, 10**6, GIB, 80 * GIB):
        limits = limits_of(free, heads)
        assert 1 <= limits.chunk <= limits.whole
        assert limits.whole == 1 or limits.whole * heads * chunks.BYTES_PER_LOGIT <= free / 4
        assert limits_of(2 * free, heads).whole in (limits.whole, 2 * limits.whole)
        assert limits_of(max(free - free // 50, 0), heads).whole <= limits.whole


@pytest.mark.parametrize("rows,graphs,changes", [
    (16, 2, {"dtype": "bfloat16"}), (20, 4, {"consistency_direction": "js", "head": "shared"}),
    (16, 2, {"aux_positions": 0.5, "batch_size": 4})])
def test_chunks_are_compiled_once_for_all_heads_and_learn_the_same(rows, graphs, changes, monkeypatch):
    """The graph breaks for the loop over chunks. A chunk has one graph for the NTP head and one for all others.

    Where rows do not divide into such chunks, the last has another two.
    """
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.utils import counters

    monkeypatch.setattr(losses, "chunk_rows", lambda *_: rows)  # of 64
    compile, made = torch.compile, Counter()  # {what was compiled: graphs}

    def compile_and_count(function):
        def backend(graph, inputs):
            made[getattr(function, "__name__", "step")] += 1
            return lookup_backend("aot_eager")(graph, inputs)
        return compile(function, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_and_count)
    chunks.compiled_losses_of_rows.cache_clear()
    torch.compiler.reset()
    counters.clear()
    heads = {"n_future_heads": 3, "nitp_weight": 0.3, "consistency_weight": 0.1, "mask_document_ends": True}
    x, y = torch.randint(BOS, 64, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        run = train.build(Settings(**TINY | heads | changes | {"compile": compiled}), Machine(CPU))
        steps = [train.training_step(run, it, loss_weights(run.s, 0.0), [(x, y)]) for it in range(3)]
        found.append([torch.stack(list(step.means.values())) for step in steps] + list(run.model.parameters()))
    chunks.compiled_losses_of_rows.cache_clear()
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert list(counters["graph_break"].values()) == [3]  # one place, three functions deep
    assert made["losses_of_rows"] == graphs and made["counted_targets"] == 1
