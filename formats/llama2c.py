"""llama2.c's model files, in both directions, and a file for future heads.

    write_trunk(model, "model.bin")            # version 0; 1 has a longer header, 2 is int8
    write_heads(model, "model.heads.bin")      # for drafting
    checkpoint = read_trunk("stories15M.bin")  # as a checkpoint: {"model": ..., "model_args": ...}

The formats, byte by byte: doc/formats.md. A reader trusts no length that a file states: the size that
the header asks for is held against the file's before anything is read. Future heads are never in a
model file; run.c knows by the checksum of the trunk's norms which heads belong to it.

What this leaves out on purpose: reading heads (run.c does), and `tokenizer.bin` (tokenizer.py).
"""

import struct
import zlib
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from model import ROPE_THETA, ModelArgs, Transformer
from system.files import atomic_write

NORM_EPS = 1e-5  # what readers of every version assume; the file has no place for it
MAGIC, HEADER_BYTES = 0x616B3432, 256  # versions 1 and 2 begin so: "ak42"
HEADS_MAGIC, MAX_HEADS = 0x64616568, 31  # a heads file begins with "head"; run.c's bound
HEAD_TYPES = {"linear": 1}  # as heads files number them
SIZES = {"dim": 1 << 16, "hidden_dim": 1 << 20, "n_layers": 1 << 10, "n_heads": 1 << 16, "n_kv_heads": 1 << 16,
         "vocab_size": 1 << 24, "max_seq_len": 1 << 24}  # of a header, in its order, and the most that run.c takes


def layout(args: ModelArgs, version: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in the file's order; a shape of one number is that of a norm."""
    D, H, V, S = args.dim, args.hidden_dim, args.vocab_size, args.max_seq_len
    Q, K, half = args.head_dim * args.n_heads, args.head_dim * args.n_kv_heads, args.head_dim // 2
    shapes = {"wq": (Q, D), "wk": (K, D), "wv": (K, D), "wo": (D, Q), "w1": (H, D), "w2": (D, H), "w3": (H, D)}
    embedding, last = [("tok_embeddings.weight", (V, D))], [("norm.weight", (D,))]
    output = [] if args.tie_embeddings else [("output.weight", (V, D))]
    rope = [("rope_cos", (S, half)), ("rope_sin", (S, half))]  # readers skip these, but count on their space

    def each(*names: str, part: str = "") -> list[tuple[str, tuple[int, ...]]]:
        return [(f"layers.{k}.{part}{w}.weight", shapes.get(w, (D,))) for w in names for k in range(args.n_layers)]

    attention = each("wq", "wk", "wv", "wo", part="attention.")
    ffn = each("w1", "w2", "w3", part="feed_forward.")
    if version == 0:
        return [*embedding, *each("attention_norm"), *attention, *each("ffn_norm"), *ffn, *last, *rope, *output]
    return [*each("attention_norm"), *each("ffn_norm"), *last, *embedding, *attention, *ffn, *output]


def renamed(name: str, names: dict[str, str], layers: str) -> str:
    """A parameter's name in another program's words.

    >>> renamed("layers.0.attention.wq.weight", {"attention.wq": "attn_q"}, "blk.")
    'blk.0.attn_q.weight'
    """
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{names[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"{layers}{layer}.{names[part]}.weight"


# ---------------------------------------------------------------------------------------------
# out

def float_bytes(t: Tensor) -> bytes:
    return t.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()


def int8_shape(args: ModelArgs) -> tuple[int, ModelArgs]:
    """Columns of a weight matrix that share an int8 scale, and the shape that version 2 writes.

    The group is the largest of 64 (llama2.c's), 32, 16, 8 and 4 that divides dim. hidden_dim is rounded up to whole
    groups: the new units are zero, so the model computes the same, and no group reaches into the next row.
    Errors: ValueError if no group divides dim.
    """
    for group in (64, 32, 16, 8, 4):  # run.c multiplies four columns at a time
        if args.dim % group == 0:
            return group, replace(args, hidden_dim=-(-args.hidden_dim // group) * group)
    raise ValueError(f"dim {args.dim}: version 2 needs a multiple of 4")


def int8_bytes(t: Tensor, shape: tuple[int, int], group: int) -> bytes:
    """Q8_0: the numbers as int8 in -127..127, then a float32 scale for each `group` of them; zeros fill up `shape`."""
    rows, columns = t.shape
    rows = pad(t.detach().float(), (0, shape[1] - columns, 0, shape[0] - rows)).reshape(-1, group)
    scale = rows.abs().amax(1, keepdim=True) / 127
    q = torch.where(scale > 0, rows / scale, 0).round().to(torch.int8)
    return q.numpy().tobytes() + float_bytes(scale)


def check_unstated(args: ModelArgs, path: str | Path) -> None:
    """ValueError where a model is other than readers assume, and the file has no place to say so."""
    assumed = {"norm_eps": NORM_EPS, "rope_theta": ROPE_THETA, "rope_scaling": "none",
               "head_dim": args.dim // args.n_heads}
    for name, value in assumed.items():
        if (found := getattr(args, name)) != value:
            raise ValueError(f"{path}: this format cannot say {name}: its readers take {value}, the model has {found}; "
                             "export it with --hf or --gguf")


def write_trunk(model: Transformer, path: str | Path, version: int = 0) -> None:
    """Write trunk and NTP head in llama2.c's version 0 (float32), 1 (float32, longer header) or 2 (int8).

    Errors: ValueError if the format cannot say what the model is, or the file cannot be written.
    """
    args, state = model.as_llama()
    check_unstated(args, path)
    # In version 0 a negative vocabulary size says that a separate unembedding follows at the end.
    sign = -1 if version == 0 and not args.tie_embeddings else 1
    group = 0
    if version == 2:
        group, args = int8_shape(args)
    sizes = {name: getattr(args, name) for name in SIZES}
    header = struct.pack("<7i", *(sizes | {"vocab_size": sign * args.vocab_size}).values())
    if version > 0:
        header = struct.pack("<Ii", MAGIC, version) + header + struct.pack("<Bi", args.tie_embeddings, group)
        header = header.ljust(HEADER_BYTES, b"\0")
    state["rope_cos"], state["rope_sin"] = model.rope_cos, model.rope_sin
    with atomic_write(path) as f:
        f.write(header)
        for name, shape in layout(args, version):
            as_int8 = version == 2 and len(shape) == 2
            f.write(int8_bytes(state[name], shape, group) if as_int8 else float_bytes(state[name]))


def trunk_checksum(model: Transformer) -> int:
    """CRC-32 of the trunk's norms, which are float32 in every version: run.c's test that heads and trunk match."""
    args, state = model.as_llama()
    norms = [name for name, shape in layout(args, version=1) if len(shape) == 1]
    return zlib.crc32(b"".join(float_bytes(state[name]) for name in norms))


def check_heads(model: Transformer, path: str | Path) -> None:
    """ValueError if run.c cannot take the model's future heads, or there are none or too many."""
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


# ---------------------------------------------------------------------------------------------
# in

def wrong_size(sizes: tuple[int, ...]) -> str:
    """Why seven numbers cannot be the sizes of a model; empty if they can."""
    for (name, most), size in zip(SIZES.items(), sizes, strict=True):
        if not 1 <= size <= most:
            return f"{name}: expected 1 to {most}, found {size}"
    dim, _, _, heads, kv_heads, _, _ = sizes
    if dim % heads or dim // heads % 2 or heads % kv_heads:
        return (f"dim {dim}, n_heads {heads}, n_kv_heads {kv_heads}: expected an even multiple of n_heads, "
                "and n_heads a multiple of n_kv_heads")
    return ""


def read_header(path: Path, start: bytes) -> tuple[int, ModelArgs, int, int]:
    """(version, shape, group size, bytes of the header) of a model.bin that begins with `start`."""
    magic, version = struct.unpack("<Ii", start[:8].ljust(8, b"\0"))
    if magic == HEADS_MAGIC:
        raise ValueError(f"{path}: a file of future heads, for run's -d; expected a model")
    versioned = magic == MAGIC
    if versioned and version not in (1, 2):
        raise ValueError(f"{path}: version {version}: expected 0, 1 or 2")
    at, header = (8, HEADER_BYTES) if versioned else (0, 28)
    if len(start) < header:
        raise ValueError(f"{path}: no checkpoint, and too short for a model.bin: expected {header} bytes and more, "
                         f"found {len(start)}")
    *sizes, tied, group = struct.unpack("<7iBi", start[at : at + 33].ljust(33, b"\0"))
    if not versioned:
        version, group, tied, sizes[5] = 0, 0, sizes[5] > 0, abs(sizes[5])
    if wrong := wrong_size(tuple(sizes)):
        swapped = struct.unpack(">i", struct.pack("<i", sizes[0]))[0]
        big = sizes[0] > SIZES["dim"] and 0 < swapped <= SIZES["dim"] or start[:4] == struct.pack(">I", MAGIC)
        kind = "" if versioned else "no checkpoint, and as the header of a model.bin of version 0: "
        raise ValueError(f"{path}: {kind}{wrong}{' (a big-endian file? expected little-endian)' if big else ''}")
    args = ModelArgs(**dict(zip(SIZES, sizes, strict=True)), tie_embeddings=bool(tied))
    if version == 2 and (group < 4 or group % 4 or args.dim % group or args.hidden_dim % group):
        raise ValueError(f"{path}: group size {group}: expected a multiple of 4 that divides dim {args.dim} and "
                         f"hidden_dim {args.hidden_dim}")
    return version, args, group, header


def read_trunk(path: str | Path) -> dict:
    """A model.bin of version 0, 1 or 2 as a checkpoint: `model` in float32, `model_args`.

    Errors: ValueError naming the file if it cannot be read, is no such file, or has another size than its header says.
    """
    path = Path(path)
    try:
        content = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise ValueError(f"{path}: cannot read this model: {error.strerror or error}") from error
    except ValueError:
        raise ValueError(f"{path}: expected a model, found an empty file") from None
    version, args, group, at = read_header(path, content[:HEADER_BYTES].tobytes())
    tensors = layout(args, version)
    quantized = [version == 2 and len(shape) == 2 for _, shape in tensors]
    sizes = [prod(shape) + 4 * prod(shape) // group if q else 4 * prod(shape)
             for (_, shape), q in zip(tensors, quantized, strict=True)]
    if at + sum(sizes) != len(content):
        shape = ", ".join(f"{name} {getattr(args, name)}" for name in SIZES)
        raise ValueError(f"{path}: expected {at + sum(sizes):,} bytes by its header (version {version}, {shape}), "
                         f"found {len(content):,}")
    state = {}
    for (name, shape), q, size in zip(tensors, quantized, sizes, strict=True):
        part, n = content[at : at + size], prod(shape)
        at += size
        if name.startswith("rope_"):  # the model makes its own
            continue
        if q:
            scale = part[n:].view("<f4").astype(np.float32)
            numbers = part[:n].view(np.int8).reshape(-1, group) * scale[:, None]
        else:
            numbers = part.view("<f4").astype(np.float32)
        state[name] = torch.from_numpy(numbers.reshape(shape))
    return {"model": state, "model_args": args.as_dict()}
