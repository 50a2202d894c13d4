"""A trained checkpoint becomes a file that run.c, and every other llama2.c port, reads.

    python export.py out/ckpt.pt out/model.bin                             # float32
    python export.py out/ckpt.pt out/model.q8.bin --version=2              # int8, a quarter to a half of the size
    python export.py out/ckpt.pt out/model.bin --heads=out/model.heads.bin # the future heads, for drafting

writes the trunk and the NTP head in llama2.c's formats (doc/formats.md), never a future head, and
puts the run's `tokenizer.bin` beside it. Future heads go into a file of their own. Reading checkpoints
lives here too: ours and llama2.c's `ckpt.pt`, as tensors and plain values only, so nothing in the
file is executed.

What this leaves out on purpose: other programs' formats.
"""

import argparse
import itertools
import pickle
import struct
import sys
import zlib
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from files import atomic_write
from model import HEADS, ModelArgs, Transformer
from tokenizer import vocab_folder

MAX_SEQ_LEN = 1 << 24  # run.c's bound
NORM_EPS = 1e-5  # what readers of every version assume; the file has no place for it
MAGIC, HEADER_BYTES = 0x616B3432, 256  # versions 1 and 2 begin so: "ak42"
HEADS_MAGIC, MAX_HEADS = 0x64616568, 31  # a heads file begins with "head"; run.c's bound
HEAD_TYPES = {"linear": 1}  # as heads files number them


def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint in `path`: at least `model` (name -> tensor) and `model_args` (a dict).

    Errors: ValueError naming the file if it is missing, broken, or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot read this checkpoint: {error.strerror or error}") from error
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(f"{path}: not a checkpoint, or a broken one: {reason}") from error
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(parts.get(k), dict) for k in ("model", "model_args")):
        found = ", ".join(map(str, parts)) or f"a {type(checkpoint).__name__}"
        raise ValueError(f"{path}: expected a checkpoint with `model` and `model_args`, found {found[:200]}")
    if not all(isinstance(name, str) for name in parts["model"]):
        raise ValueError(f"{path}: model: expected names of tensors, found other keys")
    # llama2.c saves the module that torch.compile wraps; ours never does.
    checkpoint["model"] = {name.removeprefix("_orig_mod."): t for name, t in checkpoint["model"].items()}
    return checkpoint


def model_args_of(checkpoint: dict, path: str | Path) -> ModelArgs:
    """The shape of a checkpoint's model; what llama2.c leaves out of `model_args` is read off the tensors."""
    known = {f.name: type(f.default) for f in fields(ModelArgs)}
    args = {k: v for k, v in checkpoint["model_args"].items() if k in known and v is not None}
    for name, value in args.items():
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            raise ValueError(f"{path}: model_args: {name}: expected {known[name].__name__}, found {value!r}")
    args.setdefault("n_kv_heads", args.get("n_heads"))
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"):
        if type(args.get(name)) is not int or args[name] < 1:
            raise ValueError(f"{path}: model_args: {name}: expected an int >= 1, found {args.get(name)!r}")
    state = checkpoint["model"]
    expected, is_rnn = {"tok_embeddings.weight": (args["vocab_size"], args["dim"])}, args.get("trunk") == "rnn"
    if is_rnn:
        expected[f"rnn.weight_hh_l{args['n_layers'] - 1}"] = (args["dim"], args["dim"])
    else:
        expected["layers.0.feed_forward.w1.weight"] = (args.get("hidden_dim") or None, args["dim"])
    for name, shape in expected.items():  # before anything is built of the sizes that model_args states
        found = tuple(state[name].shape) if isinstance(state.get(name), Tensor) else None
        if found is None or len(found) != 2 or any(s not in (f, None) for s, f in zip(shape, found, strict=True)):
            raise ValueError(f"{path}: {name}: expected shape {shape} by model_args, found {found}")
    counts = {}
    if not is_rnn:
        counts["n_layers"] = len({n.split(".")[1] for n in state if n.startswith("layers.")})
    if args.get("head") != "shared":  # which has no tensors
        counts["n_future_heads"] = len({n.split(".")[1] for n in state if n.startswith("future_heads.")})
    for name, found in counts.items():
        if args.setdefault(name, 0) != found:
            raise ValueError(f"{path}: model_args: {name}={args[name]!r}, but there are tensors for {found}")
    if args["max_seq_len"] > MAX_SEQ_LEN:
        raise ValueError(f"{path}: max_seq_len: expected at most {MAX_SEQ_LEN}, found {args['max_seq_len']}")
    if not is_rnn:
        args["hidden_dim"] = len(state["layers.0.feed_forward.w1.weight"])
    if "tie_embeddings" not in args:
        output = state.get("output.weight")
        args["tie_embeddings"] = output is None or torch.equal(output, state["tok_embeddings.weight"])
    try:
        return ModelArgs(**args)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: model_args: {error}") from error


def load_weights(model: Transformer, state: dict[str, Tensor], path: str | Path) -> list[str]:
    """Copy a checkpoint's tensors into `model`; returns the heads' parameters it did not have.

    The trunk must be there, whole and of the same shape. Heads of the checkpoint that the model has
    not are left out. Errors: ValueError naming the file and tensor, found and expected.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    if "output.weight" in missing and model.args.tie_embeddings:
        missing.remove("output.weight")
    fresh = [name for name in missing if name.startswith(HEADS)]
    if len(fresh) < len(missing):
        raise ValueError(f"{path}: has no tensor {next(n for n in missing if n not in fresh)}")
    for name, tensor in state.items():
        if name not in own:
            if name.startswith(HEADS) or name in ("freqs_cos", "freqs_sin"):  # older llama2.c saved its tables
                continue
            raise ValueError(f"{path}: holds a tensor that this model has not: {name}")
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.is_floating_point()
        if not dense or tensor.shape != own[name].shape:
            found = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: {name}: expected shape {tuple(own[name].shape)}, found {found}")
        own[name].copy_(tensor)
    return fresh


def load_model(path: str | Path) -> Transformer:
    """The model of a checkpoint, future heads included, in eval mode on the CPU."""
    checkpoint = read_checkpoint(path)
    model = Transformer(model_args_of(checkpoint, path))
    load_weights(model, checkpoint["model"], path)
    return model.eval()


def float_bytes(t: Tensor) -> bytes:
    return t.detach().float().contiguous().numpy().astype("<f4").tobytes()


def largest_group(args: ModelArgs) -> int:
    """Columns of a weight matrix that share an int8 scale: at most 64, as in llama2.c, and a divisor of every
    matrix's input dimension, so that no group reaches into the next row. Errors: ValueError if there is none.
    """
    for group in (64, 32, 16, 8, 4):  # run.c multiplies four columns at a time
        if args.dim % group == args.hidden_dim % group == 0:
            return group
    raise ValueError(f"dim {args.dim} and hidden_dim {args.hidden_dim}: version 2 needs multiples of 4")


def int8_bytes(t: Tensor, group: int) -> bytes:
    """Q8_0: the numbers as int8 in -127..127, then a float32 scale for each `group` of them."""
    rows = t.detach().float().reshape(-1, group)
    scale = rows.abs().amax(1, keepdim=True) / 127
    q = torch.where(scale > 0, rows / scale, 0).round().to(torch.int8)
    return q.numpy().tobytes() + float_bytes(scale)


def write_trunk(model: Transformer, path: str | Path, version: int = 0) -> None:
    """Write trunk and NTP head in llama2.c's version 0 (float32), 1 (float32, longer header) or 2 (int8).

    Errors: ValueError if the format cannot say what the model is, or the file cannot be written.
    """
    args, layers = model.args, model.unrolled()  # layers that recur are written as often
    if args.trunk != "transformer":
        raise ValueError(f"{path}: this format is for Transformers, the model's trunk is {args.trunk}")
    if args.norm_eps != NORM_EPS:
        raise ValueError(f"{path}: this format's readers take norm_eps={NORM_EPS}, the model has {args.norm_eps}")
    embedding, norm = [model.tok_embeddings.weight], [model.norm.weight]
    attention_norms = [layer.attention_norm.weight for layer in layers]
    ffn_norms = [layer.ffn_norm.weight for layer in layers]
    attention = [getattr(layer.attention, w).weight for w in ("wq", "wk", "wv", "wo") for layer in layers]
    ffn = [getattr(layer.feed_forward, w).weight for w in ("w1", "w2", "w3") for layer in layers]
    output = [] if args.tie_embeddings else [model.output.weight]
    norms, matrices = [*attention_norms, *ffn_norms, *norm], [*embedding, *attention, *ffn, *output]
    # In version 0 a negative vocabulary size says that an unembedding of its own follows at the end.
    sign = -1 if version == 0 and not args.tie_embeddings else 1
    header = struct.pack("<7i", args.dim, args.hidden_dim, len(layers), args.n_heads, args.n_kv_heads,
                         sign * args.vocab_size, args.max_seq_len)
    if version > 0:
        group = largest_group(args) if version == 2 else 0
        header = struct.pack("<Ii", MAGIC, version) + header + struct.pack("<Bi", args.tie_embeddings, group)
    if version == 0:
        rope = [model.rope_cos, model.rope_sin]  # readers skip these, but count on their space
        parts = map(float_bytes, [*embedding, *attention_norms, *attention, *ffn_norms, *ffn, *norm, *rope, *output])
    elif version == 1:
        parts = map(float_bytes, norms + matrices)
    else:
        parts = itertools.chain(map(float_bytes, norms), (int8_bytes(w, group) for w in matrices))
    with atomic_write(path) as f:
        f.write(header if version == 0 else header.ljust(HEADER_BYTES, b"\0"))
        f.writelines(parts)


def trunk_checksum(model: Transformer) -> int:
    """CRC-32 of the trunk's norms, which are float32 in every version: run.c's test that heads and trunk match."""
    layers = model.unrolled()
    norms = [layer.attention_norm for layer in layers] + [layer.ffn_norm for layer in layers] + [model.norm]
    return zlib.crc32(b"".join(float_bytes(norm.weight) for norm in norms))


def check_heads(model: Transformer, path: str | Path) -> None:
    """ValueError if the model has no future heads that run.c takes, or too many."""
    if model.args.head not in HEAD_TYPES:
        raise ValueError(f"{path}: run drafts with heads of type {', '.join(HEAD_TYPES)}, found {model.args.head}")
    if not 1 <= model.args.n_future_heads <= MAX_HEADS:
        found = model.args.n_future_heads
        raise ValueError(f"{path}: expected a model with 1 to {MAX_HEADS} future heads, found {found}")


def write_heads(model: Transformer, path: str | Path) -> None:
    """Write the future heads, for drafting (`run model.bin -d model.heads.bin`).

    Errors: ValueError if check_heads says so, or the file cannot be written.
    """
    check_heads(model, path)
    args = model.args
    with atomic_write(path) as f:
        f.write(struct.pack("<7I", HEADS_MAGIC, 1, HEAD_TYPES[args.head], args.n_future_heads, args.dim,
                            args.vocab_size, trunk_checksum(model)))
        for head in model.future_heads:
            f.write(float_bytes(head.weight))


def copy_tokenizer(config: dict, out: Path) -> None:
    """Put the tokenizer.bin of the run's data set beside the model file, where run.c looks first.

    One of another vocabulary that lies there is kept: other models in the folder need it.
    """
    source = vocab_folder(Path(config["data_dir"]) / config["dataset"], config["vocab_size"]) / "tokenizer.bin"
    target = out.parent / "tokenizer.bin"
    if not source.exists():
        print(f"{source}: not found; give run a tokenizer with -z", file=sys.stderr)
    elif not target.exists():
        with atomic_write(target) as f:
            f.write(source.read_bytes())
        print(f"wrote {target}", file=sys.stderr)
    elif target.read_bytes() != source.read_bytes():
        print(f"{target}: of another vocabulary, left as it is; this model needs run ... -z {source}", file=sys.stderr)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a ckpt.pt or last.pt, ours or llama2.c's")
    parser.add_argument("out", type=Path, help="the .bin file to write")
    parser.add_argument("--version", type=int, choices=(0, 1, 2), default=0,
                        help="llama2.c's format: 0 float32 (default), 1 float32 with a longer header, 2 int8")
    parser.add_argument("--heads", type=Path, metavar="FILE", help="also write the future heads, for run's -d")
    args = parser.parse_args(argv)
    paths = [args.checkpoint, args.out, args.out.parent / "tokenizer.bin", *([args.heads] if args.heads else [])]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"{', '.join(map(str, paths))}: expected different files for checkpoint, model, tokenizer "
                         "and heads")
    checkpoint = read_checkpoint(args.checkpoint)
    model = Transformer(model_args_of(checkpoint, args.checkpoint))
    load_weights(model, checkpoint["model"], args.checkpoint)
    if args.heads:
        check_heads(model, args.heads)  # before anything is written
    write_trunk(model, args.out, args.version)
    counts = model.parameter_counts()
    print(f"wrote {args.out}: {args.out.stat().st_size:,} bytes, {counts['trunk']:,} parameters", file=sys.stderr)
    if args.heads:
        write_heads(model, args.heads)
        print(f"wrote {args.heads}: {args.heads.stat().st_size:,} bytes, {counts['future heads']:,} parameters",
              file=sys.stderr)
    config = checkpoint.get("config")
    if isinstance(config, dict) and {"data_dir", "dataset", "vocab_size"} <= config.keys():
        copy_tokenizer(config, args.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"export.py: {error}")
