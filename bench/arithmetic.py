"""How far ahead does a model see? Runs on arithmetic progressions, several set-ups and seeds, in one figure.

    python ablate.py config/arithmetic_base.py config/arithmetic_mtp.py --vary train_fraction=0.125,0.25,0.5,1 \\
        --out=out/arithmetic
    python -m bench.arithmetic out/arithmetic/* --folder doc

writes `arithmetic.svg` into the folder: validation loss by step; top-1 accuracy at the end by distance ahead, as bars;
the accuracy of the heads at each position and distance, on all validation rows; the lowest loss by number of
training sequences. The first three are of the runs on the most sequences. Lines and bars are means over seeds, with
95% intervals (Student's t) where there are several seeds.

What this leaves out on purpose: verdicts (compare.py), and other tasks.
"""

from system.program import program

import argparse
import math
import re
import sys
from pathlib import Path

import torch
from matplotlib import pyplot
from torch import Tensor

from formats.checkpoint import model_of, read_checkpoint
from model import Transformer
from study.groups import Group, group_runs
from study.intervals import Interval, interval
from study.report import STYLE, curves, look
from study.runs import Reader
from system.files import atomic_write
from text.tokenizer import vocab_folder
from tinystories import Windows, eval_batches


def read_runs(folders: list[Path]) -> tuple[dict[int, list[Group]], dict[str, Path]]:
    """{training sequences: set-ups}, smallest first, and each run's folder by where its log is. Errors: ValueError."""
    sizes: dict[int, list] = {}
    places = {}
    for folder in folders:
        reader = Reader()
        reader.read(str(folder))
        for run in reader.runs:
            tokens, length = run.facts.get("train_tokens"), run.config.get("max_seq_len")
            if type(tokens) is not int or type(length) is not int or length < 1:
                raise ValueError(f"{run.where}: does not say how long its rows are and how many tokens it trained on")
            sizes.setdefault(tokens // length, []).append(run)
            places[run.where] = folder if (folder / "log.jsonl").exists() else folder / run.name
    if not sizes:
        raise ValueError("nothing to draw: no run with an evaluation was found")
    return {size: group_runs(runs, []) for size, runs in sorted(sizes.items())}, places


def predictions(model: Transformer, x: Tensor) -> list[Tensor]:
    """The most likely token of every head, (B, T) each; the next-token head first."""
    heads = range(model.args.n_future_heads + 1)
    return [head.logits().argmax(-1) for head in model.readouts(x, model.trunk(x), heads).values()]


@torch.no_grad()
def accuracy_map(folder: Path) -> Tensor:
    """(heads, T): share of the validation rows in which head i is right at position t; NaN past the row's end."""
    path = folder / "ckpt.pt"
    checkpoint = read_checkpoint(path)
    model, config = model_of(checkpoint, path), checkpoint["config"]
    V, T = config["vocab_size"], config["max_seq_len"]
    windows = Windows(vocab_folder(Path(config["data_dir"]) / config["dataset"], V) / "val.bin", V, T)
    right = torch.zeros(model.args.n_future_heads + 1, T)
    for x, y in eval_batches(windows, len(windows)):
        for i, best in enumerate(predictions(model, x)):
            right[i, : T - i] += (best[:, : T - i] == y[:, i:]).sum(0)  # head i at t predicts y[t + i]
    for i in range(len(right)):
        right[i, T - i :] = torch.nan
    return right / len(windows)


# ---------------------------------------------------------------------------------------------
# panels

def at_the_end(group: Group, key: str) -> Interval:
    return interval([run.last(key) for run in group.runs.values()])


def lowest_loss(group: Group) -> Interval:
    return interval([float(run.points("val/ntp")[1].min()) for run in group.runs.values()])


def half(found: Interval) -> float:
    return 0.0 if math.isnan(found.half) else found.half


def draw_distances(axes: pyplot.Axes, groups: list[Group]) -> None:
    """Bars of top-1 accuracy, side by side for the set-ups, in groups by distance ahead."""
    width = 0.8 / len(groups)
    for k, group in enumerate(groups):
        keys = {key for run in group.runs.values() for line in run.lines for key in line}
        heads = sorted(int(key[8:]) for key in keys if re.fullmatch(r"val/acc_\d+", key))
        found = [at_the_end(group, f"val/acc_{i}") for i in heads]
        axes.bar([i + 1 + (k - (len(groups) - 1) / 2) * width for i in heads], [d.mean for d in found], width,
                 yerr=[half(d) for d in found], capsize=3, label=group.label, color=look(k)["color"])
    axes.set(title="Top-1 accuracy at the end", xlabel="tokens ahead", ylabel="share", ylim=(0, 1))
    axes.xaxis.set_major_locator(pyplot.MaxNLocator(integer=True))
    axes.legend()


def draw_positions(axes: pyplot.Axes, group: Group, places: dict[str, Path]) -> None:
    """The accuracy of each head at each position, the mean over seeds."""
    shares = torch.stack([accuracy_map(places[run.where]) for run in group.runs.values()]).mean(0)
    heads, length = shares.shape
    shown = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower",
                        extent=(-0.5, length - 0.5, 0.5, heads + 0.5))
    axes.figure.colorbar(shown, ax=axes)
    axes.set(title=f"Accuracy by position and distance, {group.label} ({len(group.runs)})",
             xlabel="position of the last token read", ylabel="tokens ahead", yticks=range(1, heads + 1))


def draw_sizes(axes: pyplot.Axes, sizes: dict[int, list[Group]]) -> None:
    """The lowest loss of each set-up by the number of training sequences."""
    labels = list(dict.fromkeys(group.label for groups in sizes.values() for group in groups))
    for k, label in enumerate(labels):
        points = [(size, lowest_loss(group)) for size, groups in sizes.items() for group in groups
                  if group.label == label]
        axes.errorbar([size for size, _ in points], [d.mean for _, d in points], yerr=[half(d) for _, d in points],
                      marker=".", capsize=3, label=label, **look(k))
    axes.set(title="Lowest validation NTP", xlabel="training sequences", ylabel="nats", xscale="log")
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.legend()


def draw(sizes: dict[int, list[Group]], places: dict[str, Path], path: Path) -> None:
    groups = list(sizes.values())[-1]
    with pyplot.rc_context(STYLE):
        figure, ((loss, distances), (positions, by_size)) = pyplot.subplots(2, 2, figsize=(11, 7.5),
                                                                            layout="constrained")
        curves(groups, "val/ntp", "iter")(loss)
        loss.set(title="Validation NTP")
        loss.legend()
        draw_distances(distances, groups)
        with_most_heads = max(groups, key=lambda group: group.first.config.get("n_future_heads", 0))
        draw_positions(positions, with_most_heads, places)
        draw_sizes(by_size, sizes)
        with atomic_write(path, "w") as f:
            figure.savefig(f, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="out_dirs of runs, or folders of them")
    parser.add_argument("--folder", type=Path, default="doc", help="for arithmetic.svg; default: doc")
    args = parser.parse_args(argv)
    folders = [path for path in args.runs if not path.is_file()]  # out/arithmetic/* has a report too
    draw(*read_runs(folders), args.folder / "arithmetic.svg")


if __name__ == "__main__":
    sys.exit(program(main))
