"""Checkpoints as torch.save writes them, ours, llama2.c's and those of its multi-token fork.

    checkpoint = read_torch("out/ckpt.pt")     # {"model": {name: tensor}, "model_args": {...}, ...}

Nothing in a file is executed: PyTorch's weights-only reader takes tensors and plain values, and SAFE adds what
training scripts often save with them, as plain values too: numpy numbers, command-line arguments, paths. Every
other Python object is refused by its name.

What this leaves out on purpose: numpy arrays, which are passed over, since no model is kept in one.
"""

import argparse
import math
import re
import struct
import types
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from system.shown import shown

WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # of torch.compile, DDP, FSDP
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # types of tensors that are read
NUMBER = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H",
          "u1": "B", "b1": "?"}  # numpy's name of a type -> struct's


class NumpyType:
    """In place of numpy.dtype: its name and byte order."""

    def __init__(self, kind: str, *_):
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


class NumpyArray:
    """In place of numpy.ndarray: nothing."""

    def __setstate__(self, state: tuple) -> None:
        pass


def numpy_array(*_) -> NumpyArray:
    return NumpyArray()


def numpy_number(kind: NumpyType, content: bytes) -> int | float | bool:
    """In place of numpy's scalars: the number."""
    return struct.unpack(kind.order + NUMBER[kind.kind], content)[0]


def joined_path(*parts: str) -> str:
    """In place of pathlib's paths: the text."""
    return "/".join(map(str, parts))


SAFE = [(NumpyType, "numpy.dtype"), (NumpyArray, "numpy.ndarray"),
        *((numpy_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((numpy_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        *((joined_path, f"{module}.{kind}Path") for module in ("pathlib", "pathlib._local")
          for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")),
        (argparse.Namespace, "argparse.Namespace"), (types.SimpleNamespace, "types.SimpleNamespace")]


def read_torch(path: Path, mapped: bool = False) -> dict:
    """A checkpoint, with llama2.c's names. mapped: leave its tensors in the file until they are read, which is for
    whoever copies them at once: the file must not change meanwhile.

    Errors: ValueError naming the file, what was found and what was expected.
    """
    is_archive = check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(SAFE):
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_archive)
    except Exception as error:  # broken files raise whatever PyTorch's reader stumbles over
        raise ValueError(f"{path}: {reason_of(error)}") from error
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    for name in ("model_args", "config"):
        if isinstance(parts.get(name), (argparse.Namespace, types.SimpleNamespace)):
            parts[name] = vars(parts[name])
    if not all(isinstance(parts.get(k), dict) for k in ("model", "model_args")):
        found = ", ".join(map(str, parts)) or f"a {type(checkpoint).__name__}"
        raise ValueError(f"{path}: expected a checkpoint with `model` and `model_args`, found {shown(found)}")
    if not parts["model"] or not all(isinstance(name, str) for name in parts["model"]):
        raise ValueError(f"{path}: model: expected tensors by name, found "
                         f"{'other keys' if parts['model'] else 'none'}")
    parts["model"] = plain_names(parts["model"], path)
    for name, t in parts["model"].items():
        if flaw := flaw_of(t):
            raise ValueError(f"{path}: {shown(name)}: expected a tensor of floats, found {flaw}")
    return parts


def check_archive(path: Path) -> bool:
    """Is this the zip file that torch.save writes, not an older bare pickle? ValueError if its parts are larger than
    the file: torch.save does not compress, and a small file must not ask for much memory.
    """
    with open(path, "rb") as f:
        if f.read(2) != b"PK":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a checkpoint, or a broken one: {error}") from error
    size, asked = path.stat().st_size, sum(part.file_size for part in parts)
    if asked > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError(f"{path}: not a checkpoint as torch.save writes it: parts of {asked:,} bytes, packed into "
                         f"{size:,}")
    return True


def reason_of(error: Exception) -> str:
    """Why torch.load did not take a file, in one line."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (f"holds a Python object, {shown(found[1])}; only tensors and plain values are read, so save the model "
                "without it")
    reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return f"not a checkpoint, or a broken one: {shown(reason)}"


def plain_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """llama2.c's names of tensors, without the parts that wrappers add; the fork's heads under our names."""
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state}
    embedding = next((name for name in names.values() if name.endswith(".tok_embeddings.weight")), "")
    outer = embedding.removesuffix("tok_embeddings.weight")  # of a class of one's own that has the model, "model."
    renamed = {}
    for name, tensor in state.items():
        plain = re.sub(r"^aux_output\.(\d+)\.weight$", r"future_heads.\1.weight", names[name].removeprefix(outer))
        if plain in renamed:
            raise ValueError(f"{path}: model: {shown(plain)} is there twice, also as "
                             f"{shown(name)}")
        renamed[plain] = tensor
    return renamed


def flaw_of(t: object) -> str:
    """Why this is not a plain tensor of floats that holds all its numbers; empty if it is."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    if t.layout is not torch.strided or t.is_nested or t.device.type != "cpu":
        return f"a tensor that is {'nested' if t.is_nested else t.layout}, on {t.device.type}"
    if t.dtype not in FLOATS:
        return str(t.dtype)
    # an expanded tensor has fewer numbers than elements: a small file would fill the memory
    if math.prod(t.shape) * t.element_size() > t.untyped_storage().nbytes():
        return f"shape {tuple(t.shape)}, but numbers for {t.untyped_storage().nbytes()} bytes"
    return ""
