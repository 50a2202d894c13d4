"""How fast is a training step, and what does it hold in memory?

    python -m bench.training     # make bench: writes doc/training.md and doc/training.svg, in fifteen minutes
    python -m bench.training --rounds=2 --models "260K, T 256" --threads 2 --folder out/bench    # a look, in five

Times are medians over rounds in which all variants take turns, so that a machine that slows down slows
all of them; ratios are taken within a round. Each variant has a process of its own, so that memory can
be told apart. Close other programs first. LLAMA2C=FOLDER, a checkout of llama2.c, has its train.py take part.

What this leaves out on purpose: what is learned (compare runs of train.py for that), run.c (decoding.py).
"""

from system.program import positive, program

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from model import Transformer
from settings import Settings, shape_of
from step import chunks
from step.machine import choose_path, describe, memory
from study.tables import markdown
from system.files import atomic_write
from train import step_on_random_tokens

ROOT = Path(__file__).resolve().parent.parent
PATHS = {"plain": {"path": "plain", "dtype": "float32"}, "plain, bfloat16": {"path": "plain", "dtype": "bfloat16"},
         "compiled, bfloat16": {"path": "plain", "dtype": "bfloat16", "compile": True},
         "fast, float32": {"path": "fast", "dtype": "float32"}, "fast": {"path": "fast", "dtype": "auto"}}
MODELS = {  # as in config/
    "260K, T 256": {"max_seq_len": 256, "batch_size": 32}, "260K, T 512": {"max_seq_len": 512, "batch_size": 16},
    "15M, T 256": {"max_seq_len": 256, "batch_size": 16, "vocab_size": 4096, "dim": 288, "n_layers": 6, "n_heads": 6,
                   "n_kv_heads": 6, "multiple_of": 32}}
HEADS, VOCABULARIES, LENGTHS = (0, 1, 2, 4, 8), (512, 4096, 32000), (128, 256, 512, 1024)
SAMPLES = (0.5, 0.25, 0.125)  # aux_positions
LONG_ENOUGH = 0.05  # seconds of a product by which a machine is measured
PEERS = {"llama2.c": PATHS["plain"], "llama2.c, compiled": PATHS["plain"] | {"compile": True}}
LOOKING = {"n_future_heads": 4, "nitp_weight": 0.1, "consistency_weight": 0.1}


class Case(NamedTuple):
    """A step to be timed, how many threads it has, and the case that it is compared with."""

    settings: Settings
    threads: int
    base: str
    whole: bool = False  # all logits at once, as most programs have them
    llama2c: str = ""  # a folder: the step of the train.py there


class Figures(NamedTuple):
    """What was found, medians over the rounds."""

    seconds: float
    mib: float
    slower: float  # than the base
    larger: float


# ---------------------------------------------------------------------------------------------
# measuring

def step_of_llama2c(folder: str, s: Settings) -> Callable[[], None]:
    """What llama2.c's train.py does in a step on a CPU, which is in float32 whatever its dtype says."""
    spec = importlib.util.spec_from_file_location("llama2c_model", Path(folder) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    same = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len", "dropout")
    model = theirs.Transformer(theirs.ModelArgs(**{name: getattr(s, name) for name in same}))
    optimizer = model.configure_optimizers(s.weight_decay, s.learning_rate, (s.beta1, s.beta2), "cpu")
    forward = torch.compile(model) if s.compile else model
    x, y = torch.randint(s.vocab_size, (2, s.batch_size, s.max_seq_len))

    def step() -> None:
        forward(x, y)
        model.last_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def work(pipe, case: Case) -> None:
    """In a process of its own: a step, its seconds and the memory it needed, each time the pipe asks for one."""
    torch.set_num_threads(case.threads)
    if case.whole:
        chunks.WHOLE = 1 << 62
    torch.zeros(8).sum()
    before = memory("VmRSS")
    step = step_of_llama2c(case.llama2c, case.settings) if case.llama2c else step_on_random_tokens(case.settings)
    for _ in range(2):  # compiles, and has all memory that it needs
        step()
    pipe.send(None)
    while pipe.recv():
        began = time.perf_counter()
        step()
        pipe.send((time.perf_counter() - began, memory("VmHWM") - before))


def measure(cases: dict[str, Case], rounds: int) -> dict[str, Figures]:
    """Each case's figures; the cases take turns, each in a process that waits meanwhile."""
    context, workers = multiprocessing.get_context("spawn"), {}
    for name, case in cases.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, case), daemon=True)
        process.start()
        theirs.close()
        workers[name] = process, ours

    def answer(name: str):
        process, pipe = workers[name]
        try:
            return pipe.recv()
        except EOFError as error:
            process.join()
            raise ValueError(f"{name}: its process ended with exit code {process.exitcode}") from error

    for name in tqdm(workers, "warming up", leave=False, file=sys.stderr):
        answer(name)
    found = {name: [] for name in cases}  # (seconds, MiB) of each round
    for _ in tqdm(range(rounds), "rounds", leave=False, file=sys.stderr):
        for name, (_, pipe) in workers.items():
            pipe.send(True)
            found[name].append(answer(name))
    for process, _ in workers.values():
        process.kill()
        process.join()

    def median(name: str, column: int, base: str = "") -> float:
        values = [row[column] for row in found[name]]
        by = [row[column] or 1.0 for row in found[base]] if base else [1.0] * rounds
        return statistics.median(a / b for a, b in zip(values, by, strict=True))

    return {name: Figures(median(name, 0), median(name, 1), median(name, 0, case.base), median(name, 1, case.base))
            for name, case in cases.items()}


def peak_rate(dtype: torch.dtype, threads: int) -> float:
    """GFLOP/s of large matrix products, the best of several: what the machine can do.

    As large as takes LONG_ENOUGH: where a processor has no products of this type, one of 2,048 takes half a minute.
    """
    torch.set_num_threads(threads)
    for n in (256, 512, 1024, 2048):
        a, b = torch.randn(2, n, n).to(dtype)
        times = []
        for _ in range(8):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        if min(times) > LONG_ENOUGH:
            break
    return 2 * n**3 / min(times) / 1e9


def flops(s: Settings) -> float:
    """Of a step's matrix products and attention: 6 a weight and token, 6 a layer, dim and key (12, halved: causal).

    Kaplan et al. 2020 (arXiv 2001.08361, 2.1), Chowdhery et al. 2022 (arXiv 2204.02311, appendix B).
    """
    with torch.device("meta"):
        counts = Transformer(shape_of(s)).parameter_counts()
    return s.batch_size * s.max_seq_len * (6 * sum(counts.values()) + 6 * s.n_layers * s.dim * s.max_seq_len)


# ---------------------------------------------------------------------------------------------
# what is compared

def cases_by_path(model: str, threads: list[int]) -> dict[str, Case]:
    folder = os.environ.get("LLAMA2C", "")
    if folder and not (Path(folder) / "model.py").exists():
        raise ValueError(f"LLAMA2C: expected a folder with llama2.c's model.py, found {folder}")
    ways = {path: (more, "") for path, more in PATHS.items()}
    if folder:
        ways |= {path: (more, folder) for path, more in PEERS.items()}
    return {f"{path}; {n}": Case(Settings(**MODELS[model], **more), n, f"plain; {n}", llama2c=where)
            for n in threads for path, (more, where) in ways.items()}


def cases_by_heads(n_threads: int) -> dict[str, Case]:
    shape, base = MODELS["260K, T 256"], "n = 0"
    cases = {f"n = {n}": Case(Settings(**shape, n_future_heads=n, nitp_weight=0.1 if n else 0.0), n_threads, base)
             for n in HEADS}
    both = {n: Settings(**shape, **LOOKING | {"n_future_heads": n}) for n in HEADS if n}
    return cases | {f"n = {n}, both losses": Case(s, n_threads, base) for n, s in both.items()}


def plain_and_fast(name: str, shape: dict, n_threads: int) -> dict[str, Case]:
    """Both compared with the plain path."""
    base = f"{name}, plain"
    return {base: Case(Settings(**shape, **PATHS["plain"]), n_threads, base),
            name: Case(Settings(**shape), n_threads, base)}


def cases_by_vocabulary(n_threads: int) -> dict[str, Case]:
    cases = {}
    for V in VOCABULARIES:
        shape, name = {"max_seq_len": 256, "batch_size": 16, "vocab_size": V}, f"V = {V:,}"
        cases |= plain_and_fast(name, shape, n_threads)
        cases[f"{name}, n = 4, both losses"] = Case(Settings(**shape, **LOOKING), n_threads, name)
        if V == 32000:
            cases |= cases_by_sample(shape, n_threads, name)
            whole = Case(Settings(**shape, **PATHS["plain"]), n_threads, name, whole=True)
            cases |= {f"{name}, plain, whole logits": whole}
    return cases


def cases_by_sample(shape: dict, n_threads: int, base: str) -> dict[str, Case]:
    """Four heads of both types, the residual ones on all positions too, compared with none."""
    cases = {}
    for head, samples in (("linear", SAMPLES), ("residual", (1.0, *SAMPLES))):
        for share in samples:
            s = Settings(**shape, **LOOKING, head=head, aux_positions=share)
            cases[f"{base}, n = 4, both losses, {head}, aux_positions = {share:g}"] = Case(s, n_threads, base)
    return cases


def cases_by_length(n_threads: int) -> dict[str, Case]:
    cases = {}
    for T in LENGTHS:
        cases |= plain_and_fast(f"T = {T:,}", {"max_seq_len": T, "batch_size": 8192 // T}, n_threads)
    return cases


def cases_by_dropout(n_threads: int) -> dict[str, Case]:
    """All compared with the fast path that drops nothing."""
    cases = {}
    for share in (0, 0.1):
        shape, name = MODELS["260K, T 256"] | {"dropout": share}, f"dropout = {share}"
        cases |= {name: Case(Settings(**shape), n_threads, "dropout = 0"),
                  f"{name}, plain": Case(Settings(**shape, **PATHS["plain"]), n_threads, "dropout = 0")}
    return cases


# ---------------------------------------------------------------------------------------------
# telling

def table_of_paths(model: str, cases: dict[str, Case], found: dict[str, Figures], peak: dict) -> list[tuple]:
    rows = []
    for name, (s, threads, *_) in cases.items():
        seconds, mib, slower, _ = found[name]
        dtype = choose_path(s, torch.device("cpu")).dtype
        gflops, most = flops(s) / seconds / 1e9, peak[dtype, threads]
        rows.append((model, name.partition(";")[0], threads, f"{s.batch_size * s.max_seq_len / seconds:,.0f}",
                     f"{1 / slower:.2f}", f"{gflops:.0f} of {most:.0f}", f"{gflops / most:.0%}", f"{mib:,.0f}"))
    return rows


def table_of(what: str, cases: dict[str, Case], found: dict[str, Figures]) -> str:
    head = (what, "step time, ms", "peak MiB", "compared with", "time x", "memory x")
    return markdown(head, [(name, f"{f.seconds * 1e3:,.0f}", f"{f.mib:,.0f}", cases[name].base, f"{f.slower:.2f}",
                            f"{f.larger:.2f}") for name, f in found.items()])


def bench(models: list[str], threads: list[int], rounds: int, folder: Path) -> None:
    """All comparisons; a table and a plot in `folder`."""
    most = max(threads)
    peak = {(dtype, n): peak_rate(dtype, n) for dtype in (torch.float32, torch.bfloat16) for n in threads}
    rows, speeds = [], {}
    for model in tqdm(models, "models", leave=False, file=sys.stderr):
        cases = cases_by_path(model, threads)
        found = measure(cases, rounds)
        rows += table_of_paths(model, cases, found, peak)
        tokens = MODELS[model]["batch_size"] * MODELS[model]["max_seq_len"]
        speeds |= {(model, *name.split("; ")): tokens / figures.seconds for name, figures in found.items()}
    heads, vocabularies, lengths = cases_by_heads(most), cases_by_vocabulary(most), cases_by_length(most)
    by_heads = measure(heads, 5 * rounds)  # small differences
    by_vocabulary, by_length = measure(vocabularies, rounds), measure(lengths, rounds)
    dropout = cases_by_dropout(most)
    by_dropout = measure(dropout, rounds)
    path_head = ("model", "path", "threads", "tokens/s", "x plain", "GFLOP/s, of the machine's", "share", "peak MiB")
    text = f"""# Training: speed and memory

`make bench` on {describe()}, PyTorch {torch.__version__}. Whole steps - losses, gradients, clipping, AdamW - on random
tokens; medians of {rounds} rounds in which the variants take turns, each in a process of its own; ratios are taken
within a round. *plain* is PyTorch as it comes, in float32; *fast* is kernels.c with the products' type that
`dtype=auto` finds here. Memory is the most that the process held beyond what it held with PyTorch loaded: weights,
optimizer state, activations. GFLOP/s are those of matrix products and attention, next to the rate of a product of two
2,048 x 2,048 matrices of the same type with as many threads. *llama2.c*: its train.py, if LLAMA2C names its folder.

## By path

{markdown(path_head, rows)}

## By future heads

260K, V 512, T 256, 8,192 tokens a step, fast, {most} threads, {5 * rounds} rounds; NiTP losses unless said otherwise.

{table_of("heads", heads, by_heads)}

## By vocabulary

260K's trunk, T 256, 4,096 tokens a step, fast unless said otherwise, {most} threads. Heads are linear and learn on all
positions unless said otherwise (`aux_positions`, objectives.md).

{table_of("vocabulary", vocabularies, by_vocabulary)}

## By length

260K, V 512, 8,192 tokens a step, {most} threads.

{table_of("length", lengths, by_length)}

## By dropout

260K, V 512, T 256, 8,192 tokens a step, {most} threads.

{table_of("dropout", dropout, by_dropout)}

![tokens a second by path; step time and memory by heads, vocabulary and length](training.svg)
"""
    with atomic_write(folder / "training.md", "w") as f:
        f.write(text)
    drawn = {name: figures for name, figures in by_vocabulary.items() if "aux_positions" not in name}  # too many bars
    plot(speeds, {"heads": by_heads, "vocabulary": drawn, "length": by_length}, folder / "training.svg")
    print(text)


def plot(speeds: dict, series: dict[str, dict[str, Figures]], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    colours = {"plain": "#999999", "plain, bfloat16": "#bbbbbb", "compiled, bfloat16": "#ccbb44",
               "fast, float32": "#66ccee", "fast": "#4477aa", "llama2.c": "#eeaa99", "llama2.c, compiled": "#ee6677"}
    models = list(dict.fromkeys(model for model, _, _ in speeds))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 8.5), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=False):
        bars = {(way, n): speed for (name, way, n), speed in speeds.items() if name == model}
        for i, ((way, n), speed) in enumerate(bars.items()):
            axis.bar(i, speed, color=colours[way], hatch="//" if n != "1" else None, edgecolor="white")
        axis.set_xticks(range(len(bars)), [f"{way}, {n} thr." for way, n in bars], rotation=60, ha="right")
        axis.set_title(f"{model}: tokens a second")
    for axis in axes[0][len(models):]:
        axis.axis("off")
    for axis, (name, found) in zip(axes[1], series.items(), strict=True):
        middle = range(len(found))
        axis.bar([i - 0.2 for i in middle], [f.seconds * 1e3 for f in found.values()], 0.4, color="#4477aa", label="ms")
        axis.bar([i + 0.2 for i in middle], [f.mib for f in found.values()], 0.4, color="#ee6677", label="MiB")
        if name == "vocabulary":
            axis.set_yscale("log")
        axis.set_xticks(middle, list(found), rotation=60, ha="right")
        axis.set_title(f"a step by {name}: time and peak memory")
        axis.legend(frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, "w") as f:
        figure.savefig(f, format="svg", metadata={"Date": None})


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--rounds", type=positive, default=5, help="default: 5")
    parser.add_argument("--folder", type=Path, default=ROOT / "doc", help="for training.md and .svg; default: doc")
    bench(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(program(main))
