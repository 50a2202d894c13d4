"""A trained checkpoint becomes a file that run.c, and every other llama2.c port, reads.

    python export.py out/ckpt.pt out/model.bin

writes the trunk and the NTP head in llama2.c's version 0 format (float32, doc/formats.md), never a
future head, and puts the run's `tokenizer.bin` beside it. Reading checkpoints lives here too: ours
and llama2.c's `ckpt.pt`, as tensors and plain values only, so nothing in the file is executed.

What this leaves out on purpose: versions 1 and 2 of the format, and other programs' formats.
"""

import argparse
import pickle
import struct
import sys
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from files import atomic_write
from model import ModelArgs, Transformer
from tokenizer import vocab_folder

HEAD_PREFIX = "future_heads."
MAX_SEQ_LEN = 1 << 24  # run.c's bound
NORM_EPS = 1e-5  # what readers of version 0 assume; the file has no place for it


def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint in `path`: at least `model` (name -> tensor) and `model_args` (a dict).

    Errors: ValueError naming the file if it is missing, broken, or something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot read this checkpoint: {error.strerror or error}") from error
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
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
    expected = {"tok_embeddings.weight": (args["vocab_size"], args["dim"]),
                "layers.0.feed_forward.w1.weight": (args.get("hidden_dim") or None, args["dim"])}
    for name, shape in expected.items():  # before anything is built of the sizes that model_args states
        found = tuple(state[name].shape) if isinstance(state.get(name), Tensor) else None
        if found is None or len(found) != 2 or any(s not in (f, None) for s, f in zip(shape, found, strict=True)):
            raise ValueError(f"{path}: {name}: expected shape {shape} by model_args, found {found}")
    counts = {"n_layers": len({n.split(".")[1] for n in state if n.startswith("layers.")}),
              "n_future_heads": len({n.split(".")[1] for n in state if n.startswith(HEAD_PREFIX)})}
    for name, found in counts.items():
        if args.setdefault(name, 0) != found:
            raise ValueError(f"{path}: model_args: {name}={args[name]!r}, but there are tensors for {found}")
    if args["max_seq_len"] > MAX_SEQ_LEN:
        raise ValueError(f"{path}: max_seq_len: expected at most {MAX_SEQ_LEN}, found {args['max_seq_len']}")
    args["hidden_dim"] = len(state["layers.0.feed_forward.w1.weight"])
    if "tie_embeddings" not in args:
        output = state.get("output.weight")
        args["tie_embeddings"] = output is None or torch.equal(output, state["tok_embeddings.weight"])
    try:
        return ModelArgs(**args)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: model_args: {error}") from error


def load_weights(model: Transformer, state: dict[str, Tensor], path: str | Path) -> list[str]:
    """Copy a checkpoint's tensors into `model`; returns the future heads' parameters it did not have.

    The trunk must be there, whole and of the same shape. Future heads of the checkpoint that the
    model has not are left out. Errors: ValueError naming the file and tensor, found and expected.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    if "output.weight" in missing and model.args.tie_embeddings:
        missing.remove("output.weight")
    fresh = [name for name in missing if name.startswith(HEAD_PREFIX)]
    if len(fresh) < len(missing):
        raise ValueError(f"{path}: has no tensor {next(n for n in missing if n not in fresh)}")
    for name, tensor in state.items():
        if name not in own:
            if name.startswith(HEAD_PREFIX) or name in ("freqs_cos", "freqs_sin"):  # older llama2.c saved its tables
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


def write_version0(model: Transformer, path: str | Path) -> None:
    """Write trunk and NTP head as llama2.c's version 0: seven int32, then float32 matrices kind by kind.

    Errors: ValueError if the format cannot say what the model is, or the file cannot be written.
    """
    args, layers = model.args, model.layers
    if args.norm_eps != NORM_EPS:
        raise ValueError(f"{path}: this format's readers take norm_eps={NORM_EPS}, the model has {args.norm_eps}")
    kinds = [
        [model.tok_embeddings.weight],
        [layer.attention_norm.weight for layer in layers],
        *([getattr(layer.attention, w).weight for layer in layers] for w in ("wq", "wk", "wv", "wo")),
        [layer.ffn_norm.weight for layer in layers],
        *([getattr(layer.feed_forward, w).weight for layer in layers] for w in ("w1", "w2", "w3")),
        [model.norm.weight],
        [model.rope_cos, model.rope_sin],  # readers skip these, but count on their space
        [] if args.tie_embeddings else [model.output.weight],
    ]
    # A negative vocabulary size says that an unembedding of its own follows at the end.
    vocab_size = args.vocab_size if args.tie_embeddings else -args.vocab_size
    with atomic_write(path) as f:
        f.write(struct.pack("<7i", args.dim, args.hidden_dim, args.n_layers, args.n_heads, args.n_kv_heads,
                            vocab_size, args.max_seq_len))
        for tensor in (t for kind in kinds for t in kind):
            f.write(tensor.detach().float().contiguous().numpy().astype("<f4").tobytes())


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
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(args.checkpoint)
    model = Transformer(model_args_of(checkpoint, args.checkpoint))
    load_weights(model, checkpoint["model"], args.checkpoint)
    write_version0(model, args.out)
    print(f"wrote {args.out}: {args.out.stat().st_size:,} bytes, {model.parameter_counts()['trunk']:,} parameters",
          file=sys.stderr)
    config = checkpoint.get("config")
    if isinstance(config, dict) and {"data_dir", "dataset", "vocab_size"} <= config.keys():
        copy_tokenizer(config, args.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"export.py: {error}")
