"""A trained model becomes a file that other programs read: run.c and llama2.c's ports, transformers, llama.cpp.

    python export.py out/ckpt.pt out/model.bin                             # llama2.c's float32
    python export.py out/ckpt.pt out/model.q8.bin --version=2              # int8, a quarter to a half of the size
    python export.py out/ckpt.pt out/model.bin --heads=out/model.heads.bin # the future heads, for drafting
    python export.py out/ckpt.pt --hf=out/stories                          # a Hugging Face folder
    python export.py out/ckpt.pt --gguf=out/stories.gguf --gguf_type=q8_0  # for llama.cpp

The model may be whatever checkpoint.py reads: our checkpoints and llama2.c's, model.bin, Hugging Face
folders. Trunk and NTP head are written, never a future head: those go into a file of their own. The tokenizer goes
along: for run.c as `tokenizer.bin` beside the model, else inside.

What this leaves out on purpose: the formats (llama2c.py, huggingface.py, llamacpp.py), reading (checkpoint.py).
"""

import argparse
import sys
from pathlib import Path

from checkpoint import find_tokenizer, model_of, read_checkpoint
from files import atomic_write
from huggingface import write_folder
from llama2c import check_heads, write_heads, write_trunk
from llamacpp import KINDS, kind_of, write_gguf
from tokenizer import Tokenizer, bin_bytes


def say(text: str) -> None:
    print(text, file=sys.stderr)


def put_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.bin beside the model file, where run.c looks first.

    One of another vocabulary that lies there is kept: other models in the folder need it.
    """
    target, content = out.parent / "tokenizer.bin", bin_bytes(tokenizer)
    if not target.exists():
        with atomic_write(target) as f:
            f.write(content)
        say(f"wrote {target}")
    elif target.read_bytes() != content:
        say(f"{target}: of another vocabulary, left as it is; export into another folder, or give run the right one "
            "with -z")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    beside = [args.out.parent / "tokenizer.bin"] if args.out else []
    paths = [p for p in (args.checkpoint, args.out, *beside, args.heads, args.hf, args.gguf) if p]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"{', '.join(map(str, paths))}: expected different files for checkpoint, model, tokenizer "
                         "and heads")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    checkpoint = read_checkpoint(args.checkpoint)
    model = model_of(checkpoint, args.checkpoint)
    try:  # before anything is written
        _, state = model.as_llama()
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
    counts = model.parameter_counts()
    if args.out:
        write_trunk(model, args.out, args.version)
        say(f"wrote {args.out}: {args.out.stat().st_size:,} bytes, {counts['trunk']:,} parameters")
        if tokenizer:
            put_tokenizer(tokenizer, args.out)
    if args.heads:
        write_heads(model, args.heads)
        say(f"wrote {args.heads}: {args.heads.stat().st_size:,} bytes, {counts['future heads']:,} parameters")
    if args.hf:
        write_folder(model, tokenizer, args.hf)
        say(f"wrote {args.hf}: {', '.join(sorted(p.name for p in args.hf.iterdir()))}")
    if args.gguf:
        write_gguf(model, tokenizer, args.gguf, args.gguf_type)
        say(f"wrote {args.gguf}: {args.gguf.stat().st_size:,} bytes, {args.gguf_type}")
        if any(kind_of(w.shape, args.gguf_type) == "f16" != args.gguf_type for w in state.values()):
            say(f"{args.gguf}: matrices whose rows are no multiple of 32 are in f16")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"export.py: {error}")
