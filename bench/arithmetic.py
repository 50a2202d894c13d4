"""How far ahead does a model see? Runs on arithmetic progressions, with future heads and without, in one figure.

    python -m bench.arithmetic --base out/arithmetic_base --mtp out/arithmetic_mtp --folder doc
    python -m bench.arithmetic --base ... --mtp ... --by_sequences 250=out/a250_base 250=out/a250_mtp 4000=...

writes `arithmetic.svg` into the folder: the loss by step of both runs; top-1 accuracy by step, a line for
each distance ahead; the accuracy of the mtp run's ckpt.pt at each position and distance, on all validation
rows; with --by_sequences, the lowest loss of each run by its number of training sequences.

What this leaves out on purpose: other tasks, and averages over seeds.
"""

from system.program import program

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from formats.checkpoint import model_of, read_checkpoint
from model import Transformer
from system.files import atomic_write
from text.tokenizer import vocab_folder
from tinystories import Windows, eval_batches

BASE, MTP = "#999999", "#4477aa"


def evaluations(folder: Path) -> list[dict]:
    """The lines of a run's log that hold validation. Errors: ValueError if there are none."""
    path = folder / "log.jsonl"
    try:
        lines = [line for line in map(json.loads, path.read_text().splitlines()) if "val/ntp" in line]
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror}; expected the out_dir of a run of train.py") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a log of train.py: {error}") from error
    if not lines:
        raise ValueError(f"{path}: holds no val/ntp")
    return lines


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


def lowest_losses(runs: list[tuple[int, Path]]) -> dict[bool, list[tuple[int, float]]]:
    """{has future heads: [(training sequences, lowest validation loss)]} of the runs."""
    found: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
    for sequences, folder in sorted(runs):
        lines = evaluations(folder)
        found["val/acc_1" in lines[0]].append((sequences, min(line["val/ntp"] for line in lines)))
    return found


def draw(base: Path, mtp: Path, by_sequences: list[tuple[int, Path]], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    matplotlib.rcParams["svg.hashsalt"] = "lookahead"  # else the names of its parts are drawn at random
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    loss, distance, positions, sizes = axes.flat

    curves = {"base": (BASE, evaluations(base)), "mtp": (MTP, evaluations(mtp))}
    for name, (colour, lines) in curves.items():
        loss.plot([line["iter"] for line in lines], [line["val/ntp"] for line in lines], color=colour, label=name)
    loss.set(title="validation NTP loss", xlabel="step", ylabel="nats a token")
    loss.legend(frameon=False)

    lines = curves["mtp"][1]
    count = sum(key.startswith("val/acc_") for key in lines[0])
    shades = pyplot.get_cmap("viridis")
    for i in range(count):
        distance.plot([line["iter"] for line in lines], [line[f"val/acc_{i}"] for line in lines],
                      color=shades(i / max(count, 2)), label=f"{i + 1} ahead")
    lines = curves["base"][1]
    distance.plot([line["iter"] for line in lines], [line["val/acc_0"] for line in lines], "--", color=BASE,
                  label="1 ahead, base")
    distance.set(title="top-1 accuracy by distance ahead", xlabel="step", ylim=(0, 1))
    distance.legend(frameon=False)

    shares = accuracy_map(mtp)
    shown = positions.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower",
                             extent=(-0.5, shares.shape[1] - 0.5, 0.5, len(shares) + 0.5))
    figure.colorbar(shown, ax=positions)
    positions.set(title="accuracy by position and distance, mtp", xlabel="position of the last token read",
                  ylabel="tokens ahead", yticks=range(1, len(shares) + 1))

    if by_sequences:
        for heads, points in lowest_losses(by_sequences).items():
            sizes.plot(*zip(*points), "o-", color=MTP if heads else BASE, label="mtp" if heads else "base")
        sizes.set(title="lowest validation NTP loss", xlabel="training sequences", ylabel="nats a token", xscale="log")
        counts = sorted({sequences for sequences, _ in by_sequences})
        sizes.set_xticks(counts, map(str, counts))
        sizes.minorticks_off()
        sizes.legend(frameon=False)
    else:
        sizes.axis("off")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, "w") as f:
        figure.savefig(f, format="svg", metadata={"Date": None})


def run_of_size(text: str) -> tuple[int, Path]:
    sequences, _, folder = text.partition("=")
    if not sequences.isdecimal() or int(sequences) < 1 or not folder:
        raise argparse.ArgumentTypeError(f"expected SEQUENCES=FOLDER, found {text!r}")
    return int(sequences), Path(folder)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="out_dir of a run without future heads")
    parser.add_argument("--mtp", type=Path, required=True, help="out_dir of a run with some")
    parser.add_argument("--by_sequences", type=run_of_size, nargs="+", default=[], metavar="N=FOLDER",
                        help="out_dirs of runs on N training sequences, with heads or without")
    parser.add_argument("--folder", type=Path, default="doc", help="for arithmetic.svg; default: doc")
    args = parser.parse_args(argv)
    draw(args.base, args.mtp, args.by_sequences, args.folder / "arithmetic.svg")


if __name__ == "__main__":
    sys.exit(program(main))
