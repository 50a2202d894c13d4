"""A trained model becomes a file that other programs read: run.c and llama2.c's ports, transformers, llama.cpp.

    python export.py out/ckpt.pt out/model.bin                             # llama2.c's float32
    python export.py out/ckpt.pt out/model.q8.bin --version=2              # int8, a quarter to a half of the size
    python export.py out/ckpt.pt out/model.bin --heads=out/model.heads.bin # the future heads, for drafting
    python export.py out/ckpt.pt --hf=out/stories                          # a Hugging Face folder
    python export.py out/ckpt.pt --gguf=out/stories.gguf --gguf_type=q8_0  # for llama.cpp

The model may be whatever formats/checkpoint.py reads: our checkpoints and llama2.c's, model.bin, Hugging Face
folders. Trunk and NTP head are written, never a future head: those go into a file of their own. The tokenizer goes
along: for run.c as `tokenizer.bin` next to the model, else inside.

What this leaves out on purpose: the formats, and reading them (formats/).
"""

from system.program import program

import argparse
import os
import sys
from pathlib import Path

from formats import huggingface
from formats.checkpoint import (
    TEXT_WILL_BE_WRONG,
    find_tokenizer,
    model_of,
    read_checkpoint,
    was_trained_with_another,
)
from formats.gguf import KINDS, kind_of, need_gguf, write_gguf
from formats.huggingface import need_safetensors, write_folder
from formats.llama2c import check_heads, write_heads, write_trunk
from model import Transformer
from system.files import is_irregular
from text.tokenizer import Tokenizer, bin_bytes, write_bin
from text.tokenizer_json import JsonTokenizer


def say(text: str) -> None:
    print(text, file=sys.stderr)


def put_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.bin next to the model file, where run.c looks first.

    A tokenizer.bin of another vocabulary is left there: other models in the folder need it.
    """
    target = out.parent / "tokenizer.bin"
    if isinstance(tokenizer, JsonTokenizer):
        say(f"{target}: not written: it cannot say how a tokenizer.json merges; run takes none of such a vocabulary")
    elif not target.exists():
        write_bin(tokenizer, target)
        say(f"wrote {target}")
    elif target.read_bytes() != bin_bytes(tokenizer):
        say(f"{target}: of another vocabulary, left as it is; export into another folder, or give run the right one "
            "with -z")


def check_paths(args: argparse.Namespace) -> None:
    """ValueError if one file would be written over another, or over one that is read."""
    beside = args.out.parent / "tokenizer.bin" if args.out else None  # written only where it is not there
    folder = [args.hf, *(args.hf / name for name in huggingface.FILES)] if args.hf else []
    written = [path for path in (args.out, args.heads, args.gguf, *folder) if path]
    read = [args.checkpoint, *(args.checkpoint / name for name in huggingface.FILES)]
    read += [args.tokenizer] if args.tokenizer else []
    real = [os.path.realpath(path) for path in written]
    for path, where in zip(written, real, strict=True):
        if real.count(where) > 1 or where in map(os.path.realpath, (*read, *([beside] if beside else ()))):
            raise ValueError(f"{path}: expected different files for all that is read and written")
    if beside and is_irregular(beside):
        raise ValueError(f"{beside}: expected a file, or nothing, where the tokenizer goes")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="ckpt.pt or last.pt, ours or llama2.c's; a model.bin; a Hugging "
                                                      "Face folder of a Llama")
    parser.add_argument("out", type=Path, nargs="?", help="the .bin file to write")
    parser.add_argument("--version", type=int, choices=(0, 1, 2), default=0,
                        help="llama2.c's format: 0 float32 (default), 1 float32 with a longer header, 2 int8")
    parser.add_argument("--heads", type=Path, metavar="FILE", help="write the future heads, for run's -d")
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="write a folder for transformers")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write a file for llama.cpp")
    parser.add_argument("--gguf_type", choices=KINDS, default="f16", help="of its matrices (default f16)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE",
                        help="tokenizer.model, tokenizer.bin or a folder with one; default: that of the run's data, or "
                             "beside the model")
    args = parser.parse_args(argv)
    if not (args.out or args.heads or args.hf or args.gguf):
        parser.error("nothing to write: expected a .bin file, --heads, --hf or --gguf")
    check_paths(args)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.hf:
        need_safetensors()
    if args.gguf:
        need_gguf()
    checkpoint = read_checkpoint(args.checkpoint, mapped=True)
    model = model_of(checkpoint, args.checkpoint)
    try:  # before anything is written
        model.as_llama()
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from error
    if args.heads:
        check_heads(model, args.heads)
    try:
        tokenizer = find_tokenizer(args.checkpoint, checkpoint, model.args.vocab_size, args.tokenizer)
    except ValueError as error:
        if args.tokenizer or args.gguf:
            raise
        tokenizer = None
        say(f"{error}; without one nothing but token ids goes in and out (run: -z)")
    if tokenizer and was_trained_with_another(checkpoint, tokenizer):
        say(f"{args.tokenizer or args.checkpoint}: {TEXT_WILL_BE_WRONG}")
    write_all(args, model, tokenizer, checkpoint.get("special_tokens"))


def write_all(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer | None,
              special_tokens: tuple[int, tuple[int, ...]] | None) -> None:
    """special_tokens: BOS and the ids that end a text, of a model without a tokenizer."""
    parameters = sum(w.numel() for w in model.as_llama()[1].values())
    if args.out:
        write_trunk(model, args.out, args.version)
        say(f"wrote {args.out}: {args.out.stat().st_size:,} bytes, {parameters:,} parameters")
        if tokenizer:
            put_tokenizer(tokenizer, args.out)
    if args.heads:
        write_heads(model, args.heads)
        say(f"wrote {args.heads}: {args.heads.stat().st_size:,} bytes, "
            f"{model.parameter_counts()['future heads']:,} parameters")
    if args.hf:
        write_folder(model, tokenizer, args.hf, None if tokenizer else special_tokens)
        say(f"wrote {args.hf}: {', '.join(sorted(p.name for p in args.hf.iterdir()))}")
    if args.gguf:
        write_gguf(model, tokenizer, args.gguf, args.gguf_type)
        say(f"wrote {args.gguf}: {args.gguf.stat().st_size:,} bytes, {args.gguf_type}")
        if any(kind_of(w.shape, args.gguf_type) == "f16" != args.gguf_type for w in model.parameters()):
            say(f"{args.gguf}: matrices whose rows are no multiple of 32 are in f16")


if __name__ == "__main__":
    sys.exit(program(main))
