"""How fast is run.c? Decoding at four sizes, next to other programs if there are any, and drafting on real prompts.

    python -m bench.decoding decode                           # make bench-c: writes doc/decode.md and doc/decode.svg
    python -m bench.decoding draft MODEL.bin HEADS.bin STORIES.txt   # plain, n-grams, heads on beginnings of stories

`decode` takes in other programs that the environment names (PEERS below): an older build of run.c, llama2.c's run
and runq, llama.cpp's llama-bench. All read the same random weights:

    RUN_BEFORE=~/old/run LLAMA2C_RUN=~/llama2.c/run LLAMA2C_RUNQ=~/llama2.c/runq make bench-c

Times are medians over rounds in which all variants take turns, so that a machine that slows down
slows all of them; ratios are taken within a round. Close other programs first.

What this leaves out on purpose: training (bench.py).
"""

from system.program import positive, program

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from formats.gguf import write_gguf
from formats.llama2c import write_trunk
from model import ModelArgs, Transformer
from step.machine import describe
from study.tables import markdown
from system.files import atomic_write
from tinystories import read_stories

ROOT = Path(__file__).resolve().parent.parent
BUILD, MODELS = ROOT / "build", ROOT / "out" / "bench"
STEPS = 256
SIZES = {  # dim, hidden_dim, layers, heads, kv heads, vocabulary: stories260K's shape, and llama2.c's three larger ones
    "260K": (64, 172, 5, 8, 4, 512), "15M": (288, 768, 6, 6, 6, 32000), "42M": (512, 1376, 8, 8, 8, 32000),
    "110M": (768, 2048, 12, 12, 12, 32000)}
BUILDS = {"scalar": "-O2 -fno-tree-vectorize -fno-tree-slp-vectorize -DSCALAR -DSCREEN_FROM=1e30",
          "unscreened": "-O3 -march=native -DSCREEN_FROM=1e30", "run": "-O3 -march=native"}
VARIANTS = {  # name: (build, file, flags)
    "scalar fp32": ("scalar", "v0.bin", []), "fp32": ("unscreened", "v0.bin", []),
    "fp32, screened": ("run", "v0.bin", []), "bf16, screened": ("run", "v0.bin", ["--bf16"]),
    "int8": ("run", "v2.bin", [])}
PEERS = {  # environment variable that names the program: {row: file}
    "RUN_BEFORE": {"before: fp32": "v0.bin", "before: int8": "v2.bin"},
    "LLAMA2C_RUN": {"llama2.c run": "v0.bin"}, "LLAMA2C_RUNQ": {"llama2.c runq": "v2.bin"},
    "LLAMA_BENCH": {"llama.cpp f16": "f16.gguf", "llama.cpp q8_0": "q8_0.gguf"}}


def compile_c(name: str, flags: str, source: str = "run.c") -> Path:
    BUILD.mkdir(exist_ok=True)
    cc = os.environ.get("CC", "cc").split()
    command = [*cc, *flags.split(), "-pthread", "-o", BUILD / name, ROOT / source, "-lm"]
    if not shutil.which(command[0]) or subprocess.run(command, check=False).returncode:
        raise ValueError(f"cannot compile {source}: {shlex.join(map(str, command))}")
    return BUILD / name


def random_model(size: str, folder: Path) -> None:
    """Files of versions 0 and 2 and a tokenizer of a random model that emits neither BOS nor EOS, so that no story ends
    early; GGUF files too if llama-bench takes part."""
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size = SIZES[size]
    last = "q8_0.gguf" if "LLAMA_BENCH" in os.environ else "v2.bin"
    if (folder / last).exists():
        return
    torch.manual_seed(1)
    model = Transformer(ModelArgs(dim=dim, hidden_dim=hidden_dim, n_layers=n_layers, n_heads=n_heads,
                                  n_kv_heads=n_kv_heads, vocab_size=vocab_size, max_seq_len=STEPS))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, p.shape[1] ** -0.5)
        model.tok_embeddings.weight[1:3] = 0  # their logits are 0, and the best one is not
    with atomic_write(folder / "tokenizer.bin") as f:
        f.write(b"\x02\0\0\0" + b"\0\0\0\0\x02\0\0\0ab" * vocab_size)
    write_trunk(model, folder / "v0.bin", 0)
    write_trunk(model, folder / "v2.bin", 2)
    if last == "q8_0.gguf":
        pieces = SimpleNamespace(pieces=lambda: [(b"t%d" % i, 0.0) for i in range(vocab_size)])
        for kind in ("f16", "q8_0"):
            write_gguf(model, pieces, folder / f"{kind}.gguf", kind)


def execute(command: list, **environment: str) -> tuple[str, bytes]:
    """What a program reports on stderr, and its output. Errors: ValueError if it fails."""
    words = [str(c) for c in command]
    done = subprocess.run(words, capture_output=True, check=False, env=os.environ | environment)
    report = done.stderr.decode(errors="replace")
    if done.returncode:
        raise ValueError(f"{shlex.join(words)}: {report}")
    return report, done.stdout


def measure(command: list, **environment: str) -> tuple[float, str, bytes]:
    """A run's tokens per second (0 for a story that ends where it begins), its report on stderr, and its story."""
    report, story = execute(command, **environment)
    speed = re.search(r"achieved tok/s: ([0-9.]+)", report)
    return float(speed.group(1)) if speed else 0.0, report, story


def speed_of(program: str, file: Path, flags: list[str], threads: int) -> float:
    """Tokens per second of one story; all programs but llama-bench take llama2.c's flags."""
    if file.suffix == ".gguf":
        _, out = execute([program, "-m", file, "-p", 0, "-n", STEPS, "-r", 1, "-t", threads, "-o", "json"])
        return json.loads(out)[0]["avg_ts"]
    command = [program, file, "-t", 0, "-n", STEPS, "-z", file.parent / "tokenizer.bin", *flags]
    return measure(command, OMP_NUM_THREADS=str(threads))[0]


def programs() -> dict[str, tuple[str, str, list[str]]]:
    """{row: (program, file, flags)}: our builds, compiled now, and the peers that the environment names."""
    for name, flags in BUILDS.items():
        compile_c(name, flags)
    rows = {row: (str(BUILD / build), file, flags) for row, (build, file, flags) in VARIANTS.items()}
    for variable, files in PEERS.items():
        program = os.environ.get(variable)
        if program and not shutil.which(program):
            raise ValueError(f"{variable}: expected a program, found {program}")
        if program:
            rows |= {row: (program, file, []) for row, file in files.items()}
    return rows


def bytes_per_token(row: str, size: str, file: Path) -> float:
    """About what a token reads of the weights, in MB: the file, less what rounding and the screen save."""
    megabytes, width = file.stat().st_size / 1e6, 4
    if "bf16" in row:
        megabytes, width = megabytes / 2, 2
    if "screened" in row:  # of the classifier, bytes are read, and few of its rows
        megabytes -= (width - 1) * SIZES[size][0] * SIZES[size][5] / 1e6
    return megabytes


def decode(sizes: list[str], rounds: int, threads: list[int], folder: Path) -> None:
    """Tokens a second of each size, precision and number of threads; a table and a plot in `folder`."""
    rows_of = programs()
    read = compile_c("read", BUILDS["run"], "bench/read_main.c")
    rows, speeds = [], {}
    for size in tqdm(sizes, desc="sizes", file=sys.stderr):
        models = MODELS / size
        random_model(size, models)
        cases = [("scalar fp32", 1), *itertools.product(list(rows_of)[1:], threads)]
        if size == "260K":
            cases = [case for case in cases if "screened" not in case[0]]  # its classifier is too small for that
        times = {case: [] for case in cases}
        repeats = 5 if size == "260K" else 1  # its stories take milliseconds
        for _, case in itertools.product(tqdm(range(rounds), size, leave=False, file=sys.stderr), cases):
            program, file, flags = rows_of[case[0]]
            speeds_now = [speed_of(program, models / file, flags, case[1]) for _ in range(repeats)]
            times[case].append(statistics.median(speeds_now))
        for case in cases:
            variant, n = case
            speed = statistics.median(times[case])
            ratio = statistics.median(a / b for a, b in zip(times[case], times["scalar fp32", 1], strict=True))
            size_of = bytes_per_token(variant, size, models / rows_of[variant][1])
            bandwidth = float(subprocess.run([read, str(size_of), str(n)], capture_output=True, check=True).stdout)
            spread = f"{min(times[case]):,.0f}-{max(times[case]):,.0f}"
            rows.append((size, variant, n, f"{speed:,.0f}", spread, f"{ratio:.1f}", f"{size_of:.1f}",
                         f"{speed * size_of / 1e3:.0f} of {bandwidth:.0f}", f"{speed * size_of / bandwidth / 10:.0f}%"))
            speeds[size, variant, n] = speed, min(times[case]), max(times[case])
    head = ("model", "precision", "threads", "tokens/s", "range", "x scalar", "MB per token",
            "GB/s, of what can be read", "share")
    text = f"""# Decoding speed of run.c

`make bench-c` on {describe()}; greedy, {STEPS} tokens, random weights, medians of {rounds} rounds in which
the variants take turns. *scalar* is the same file built with `{BUILDS["scalar"].split(" -DSCREEN")[0]}`;
ratios to it are taken within a round. What can be read is measured over as many bytes, with as many threads
(bench/read_main.c).

{markdown(head, rows)}

![tokens a second by size, precision and threads](decode.svg)
"""
    with atomic_write(folder / "decode.md", "w") as f:
        f.write(text)
    plot(speeds, sizes, folder / "decode.svg")
    print(text)


def plot(speeds: dict, sizes: list[str], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(3.2 * len(sizes), 3.6), layout="constrained", squeeze=False)
    colours = dict(zip(VARIANTS, ("#999999", "#4477aa", "#66ccee", "#228833", "#ee6677"), strict=True))
    for axis, size in zip(axes[0], sizes, strict=True):
        cases = [case for case in speeds if case[0] == size]
        for i, case in enumerate(cases):
            middle, low, high = speeds[case]
            hatch = "//" if case[2] > 1 else None
            axis.bar(i, middle, color=colours.get(case[1], "#ccbb44"), hatch=hatch, edgecolor="white")
            axis.plot([i, i], [low, high], color="black", linewidth=1)
        axis.set_xticks(range(len(cases)), [f"{variant}, {n} thr." for _, variant, n in cases], rotation=60, ha="right")
        axis.set_title(size)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens a second")
    with atomic_write(path, "w") as f:
        figure.savefig(f, format="svg", metadata={"Date": None})


def draft(model: Path, heads: Path, stories: Path, prompts: int, temperature: float) -> None:
    """Plain decoding, n-grams and heads on the beginnings of real stories: speed, tokens a pass, acceptance."""
    run = compile_c("run", BUILDS["run"])
    beginnings = [" ".join(story.split()[:12]) for story in itertools.islice(read_stories(stories), prompts)]
    kinds = {"plain": [], "ngram": ["-d", "ngram"], "heads": ["-d", heads]}
    speed, seconds, passes, hits = ({kind: [] for kind in kinds} for _ in range(4))
    for prompt in tqdm(beginnings, "prompts", file=sys.stderr):
        texts = set()
        for kind, flags in kinds.items():
            command = [run, model, "-t", temperature, "-s", 1, "-n", 0, "-i", prompt, *flags]
            rate, report, text = measure(command)
            texts.add(text)
            if rate == 0.0:
                break
            speed[kind].append(rate)
            drafts = re.search(r"drafting: ([0-9.]+) tokens per pass; accepted/drafted by distance:(.*)", report)
            if drafts:
                passes[kind].append(float(drafts.group(1)))
                hits[kind].append([[int(n) for n in pair.split("/")] for pair in drafts.group(2).split()])
        if len(texts) > 1:
            raise ValueError(f"drafting changed the story that begins with {prompt!r}")
    print(f"{model}, temperature {temperature}, {len(beginnings)} prompts, {describe()}\n")
    print("| drafts | tokens/s | x plain | tokens per pass | accepted, by distance |")
    print("|---|---|---|---|---|")
    for kind in kinds:
        if not speed[kind]:
            raise ValueError("every story ended where it began")
        ratio = statistics.median(a / b for a, b in zip(speed[kind], speed["plain"], strict=True))
        sums = [[sum(column) for column in zip(*pairs, strict=True)] for pairs in zip(*hits[kind], strict=True)]
        shares = ", ".join(f"{right / tried:.0%} of {tried}" if tried else "-" for right, tried in sums)
        rate = f"{statistics.mean(passes[kind]):.2f}" if passes[kind] else "1"
        print(f"| {kind} | {statistics.median(speed[kind]):,.0f} | {ratio:.2f} | {rate} | {shares} |")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("decode", allow_abbrev=False, help="tokens a second by size, precision and threads")
    p.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    p.add_argument("--rounds", type=positive, default=5, help="default: 5")
    p.add_argument("--threads", type=positive, nargs="+", default=[1, 2], help="default: 1 2")
    p.add_argument("--folder", type=Path, default=ROOT / "doc", help="for decode.md and decode.svg; default: doc")
    p = commands.add_parser("draft", allow_abbrev=False, help="drafting against plain decoding")
    p.add_argument("model", type=Path, help="as export.py writes it")
    p.add_argument("heads", type=Path, help="its heads, from export.py --heads")
    p.add_argument("stories", type=Path, help="a text as in data/<dataset>/val.txt")
    p.add_argument("--prompts", type=positive, default=60, help="default: 60")
    p.add_argument("--temperature", type=float, default=0.0, help="default: 0")
    args = vars(parser.parse_args(argv))
    {"decode": decode, "draft": draft}[args.pop("command")](**args)


if __name__ == "__main__":
    sys.exit(program(main))
