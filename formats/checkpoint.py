"""Models from files, whoever wrote them: the one way in for training, export and sampling.

    model = load_model("out/stories260k_mtp/ckpt.pt")
    tokenizer = find_tokenizer("stories15M.bin", read_checkpoint("stories15M.bin"), 32000)

| what                                   | how it is known                                            |
|----------------------------------------|------------------------------------------------------------|
| checkpoint, ours or llama2.c's         | torch.save wrote it (torch_file.py)                        |
| llama2.c's model.bin, versions 0, 1, 2 | any other file; its header must ask for the file's size    |
| Hugging Face folder of a Llama         | it is a folder, with config.json and safetensors           |

Nothing in a file is executed, and nothing is built before its sizes are known to agree with the file's.

What this leaves out on purpose: the formats themselves (torch_file.py, llama2c.py, huggingface.py), and GGUF, which is
written only.
"""

import os
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from formats import huggingface, llama2c
from formats.torch_file import read_torch
from model import HEADS, ModelArgs, Transformer
from settings import with_names_of_today
from system.files import fingerprint_of, refuse_irregular
from system.shown import shown
from text.tokenizer import BYTE_VOCAB_SIZE, ByteTokenizer, Tokenizer, bin_bytes, open_tokenizer, vocab_folder

MOST = llama2c.SIZES | {"recurrence": 1 << 10, "n_future_heads": 1 << 10, "head_dim": llama2c.SIZES["dim"]}
MOST_OTHERS = 1 << 24  # of any other whole number in model_args
MOST_ROPE = 1 << 28  # max_seq_len * head dim: tables of a gigabyte
TEXT_WILL_BE_WRONG = "the tokenizer's pieces are not those that the model was trained with: its text will be wrong"


def read_checkpoint(path: str | Path, mapped: bool = False) -> dict:
    """What `path` holds: at least `model` (name -> tensor, llama2.c's names) and `model_args` (a dict).

    mapped: leave a checkpoint's tensors in its file until they are copied (torch_file.read_torch).

    Errors: ValueError naming the file if it is missing, broken, or something else.
    """
    path = Path(path)
    try:
        if path.is_dir() and not (path / "config.json").exists() and (path / "ckpt.pt").exists():
            raise ValueError(f"{path}: a folder of a run; give the file: {path / 'ckpt.pt'}")
        if path.is_dir():
            return huggingface.read_folder(path)
        refuse_irregular(path)
        with open(path, "rb") as f:
            start = f.read(llama2c.HEADER_BYTES)
    except OSError as error:
        raise ValueError(f"{path}: cannot read this checkpoint: {error.strerror or error}") from error
    if start[:4] == b"GGUF":
        raise ValueError(f"{path}: a GGUF file, which can be written, not read; give the checkpoint it was made of")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: tensors without the model's sizes; give the folder that has its config.json, too")
    if start[:2] == b"PK" or start[:1] == b"\x80":  # a zip file, or an old bare pickle
        checkpoint = read_torch(path, mapped)
        if isinstance(checkpoint.get("config"), dict):
            checkpoint["config"] = with_names_of_today(checkpoint["config"])
        return checkpoint
    return llama2c.read_trunk(path)


def model_args_of(checkpoint: dict, path: str | Path) -> ModelArgs:
    """The shape of a checkpoint's model; what llama2.c leaves out of `model_args` is read off the tensors.

    Errors: ValueError naming key or tensor, found and expected, before anything is built of a size that a file states.
    """
    state, args = checkpoint["model"], stated(checkpoint["model_args"], path)
    complete(args, state, path)
    try:
        found = ModelArgs(**args)
        with torch.device("meta"):  # only shapes
            shapes = Transformer(found).state_dict()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: model_args: {error}") from error
    for name, expected in shapes.items():
        if name in state:
            check_shape(state[name], expected, name, path)
        elif name != "output.weight" or not found.tie_embeddings:
            raise ValueError(f"{path}: has no tensor {name}")
    return found


def stated(model_args: dict, path: str | Path) -> dict:
    """The fields of a ModelArgs that `model_args` has, types and ranges checked."""
    known = {f.name: type(f.default) for f in fields(ModelArgs)}
    args = {k: v for k, v in model_args.items() if k in known and v is not None}
    args.setdefault("n_kv_heads", args.get("n_heads"))
    for name, value in args.items():
        if type(value) is not known[name] and not (known[name] is float and type(value) is int):
            raise ValueError(f"{path}: model_args: {name}: expected {known[name].__name__}, found "
                             f"{shown(repr(value))}")
        most = MOST.get(name, MOST_OTHERS)
        if type(value) is int and not 0 <= value <= most:
            found = value if abs(value) < 1 << 64 else "a number of more than 64 bits"
            raise ValueError(f"{path}: model_args: {name}: expected an int from 0 to {most}, found {found}")
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len"):
        if args.get(name, 0) < 1:
            raise ValueError(f"{path}: model_args: {name}: expected an int >= 1, found {args.get(name)}")
    head_dim = args.get("head_dim") or args["dim"] // args["n_heads"]
    if args["max_seq_len"] * head_dim > MOST_ROPE:
        raise ValueError(f"{path}: max_seq_len: expected at most {MOST_ROPE // head_dim} with heads of {head_dim}, "
                         f"found {args['max_seq_len']}")
    return args


def complete(args: dict, state: dict[str, Tensor], path: str | Path) -> None:
    """Read off the tensors what `args` leaves out, and check its numbers of layers and heads against them."""
    layers = "rnn.weight_hh_l" if args.get("trunk") == "rnn" else "layers."
    counts = {"n_layers": len({name.removeprefix(layers).split(".")[0] for name in state if name.startswith(layers)})}
    if args.get("head") != "shared":  # which has no tensors
        counts["n_future_heads"] = len({n.split(".")[1] for n in state if n.startswith("future_heads.")})
    for name, found in counts.items():
        if args.setdefault(name, found) != found:
            raise ValueError(f"{path}: model_args: {name}={args[name]}, but there are tensors for {found}")
    w1, embedding, output = (state.get(f"{name}.weight") for name in ("layers.0.feed_forward.w1", "tok_embeddings",
                                                                      "output"))
    if not args.get("hidden_dim") and w1 is not None and w1.dim():
        args["hidden_dim"] = len(w1)
    if "tie_embeddings" not in args:
        args["tie_embeddings"] = output is None or embedding is not None and torch.equal(output, embedding)


def check_shape(found: Tensor, expected: Tensor, name: str, path: str | Path) -> None:
    if found.shape != expected.shape:
        raise ValueError(f"{path}: {name}: expected shape {tuple(expected.shape)}, found {tuple(found.shape)}")


def load_weights(model: Transformer, state: dict[str, Tensor], path: str | Path) -> list[str]:
    """Copy a checkpoint's tensors into `model`; returns the heads' parameters that the checkpoint lacks.

    The trunk must be complete and of the same shape. The checkpoint's heads that the model lacks are left out.

    Errors: ValueError naming the file and tensor, found and expected.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    if "output.weight" in missing and model.args.tie_embeddings:
        missing.remove("output.weight")
    fresh = [name for name in missing if name.startswith(HEADS)]
    if len(fresh) < len(missing):
        raise ValueError(f"{path}: has no tensor {next(n for n in missing if n not in fresh)}")
    if model.args.tie_embeddings and "output.weight" in state:
        if not torch.equal(state["output.weight"], state["tok_embeddings.weight"]):
            raise ValueError(f"{path}: output.weight: expected that of tok_embeddings, as tie_embeddings says, "
                             "found other numbers")
    for name, tensor in state.items():
        if name not in own:
            if name.startswith(HEADS) or name in ("freqs_cos", "freqs_sin"):  # older llama2.c saved its tables
                continue
            raise ValueError(f"{path}: unexpected tensor {shown(name)}")
        check_shape(tensor, own[name], name, path)
        if isinstance(tensor, huggingface.Stored):
            tensor.copy_to(own[name])
        else:
            own[name].copy_(tensor)
    return fresh


def model_of(checkpoint: dict, path: str | Path) -> Transformer:
    """The model that read_checkpoint found in `path`, future heads included, in eval mode on the CPU."""
    model = Transformer(model_args_of(checkpoint, path))
    load_weights(model, checkpoint["model"], path)
    for name, p in model.named_parameters():
        if not torch.stack(p.detach().aminmax()).isfinite().all():  # NaN is both; no copy of p is made
            raise ValueError(f"{path}: {name}: expected finite numbers, found others: training has diverged")
    return model.eval()


def load_model(path: str | Path) -> Transformer:
    """The model in `path`, whatever kind of file that is, in float32."""
    return model_of(read_checkpoint(path, mapped=True), path).float()


def find_tokenizer(path: str | Path, checkpoint: dict, vocab_size: int, given: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model: `given`, else the one of the run's data set, else the one next to the model's file.

    Errors: ValueError naming the folders that were searched, or a file of another vocabulary.
    """
    if given:
        return open_tokenizer(given, vocab_size)
    if vocab_size == BYTE_VOCAB_SIZE:
        return ByteTokenizer()
    config, places = checkpoint.get("config"), [Path(path) if Path(path).is_dir() else Path(path).parent]
    if isinstance(config, dict) and all(isinstance(config.get(name), str) for name in ("data_dir", "dataset")):
        places.insert(0, vocab_folder(Path(config["data_dir"]) / config["dataset"], vocab_size))
    for place in places:
        if any(os.path.exists(place / f"tokenizer.{kind}") for kind in ("model", "json", "bin")):
            return open_tokenizer(place, vocab_size)
    raise ValueError(f"{path}: no tokenizer.model, tokenizer.json or tokenizer.bin in {' or '.join(map(str, places))}; "
                     "name one with --tokenizer")


def was_trained_with_another(checkpoint: dict, tokenizer: Tokenizer) -> bool:
    """Does a checkpoint say that its run had another vocabulary than this? Few but those of this lab say which."""
    files = checkpoint.get("data")
    trained = files.get("tokenizer.bin") if isinstance(files, dict) else None
    return isinstance(trained, str) and trained != fingerprint_of(bin_bytes(tokenizer))


def has_another_vocabulary(path: str | Path, checkpoint: dict, vocab_size: int, folder: Path) -> bool:
    """Do the model and a data set have vocabularies that differ? Then ids mean other texts."""
    try:
        ours, theirs = open_tokenizer(folder, vocab_size), find_tokenizer(path, checkpoint, vocab_size)
    except ValueError:
        return False
    return [piece for piece, _ in ours.pieces()] != [piece for piece, _ in theirs.pieces()]
