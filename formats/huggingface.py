"""Llamas as Hugging Face folders, in both directions: config.json, safetensors, tokenizer files.

    write_folder(model, tokenizer, "stories")      # transformers.AutoModelForCausalLM.from_pretrained("stories")
    checkpoint = read_folder("stories")            # as a checkpoint: {"model": ..., "model_args": ...}

Fields of config.json that model.py does not support are refused by name. Tensors stay in their files until they are
copied into a model (`Stored`), so loading takes no more memory than the model does.

Two Llamas differ in how RoPE pairs the numbers of a head: Meta's and llama2.c's turn neighbours (2j, 2j+1),
transformers' turns (j, j + hd/2). So the rows of wq and wk go into another order on the way, and queries
and keys have the same products as before.

What this leaves out on purpose: future heads, which no transformers model has; pickles (pytorch_model.bin);
Llamas with biases or RoPE scaled in other ways than model.ROPE_SCALINGS.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from formats import llama2c
from formats.llama2c import layout, renamed
from model import ROPE_THETA, ModelArgs, Transformer, rope_frequencies
from system.files import atomic_folder, atomic_write
from system.shown import shown
from text import tokenizer_json
from text.tokenizer import BOS, BYTE_VOCAB_SIZE, EOS, SPECIAL, UNK, Tokenizer
from text.tokenizer_json import JsonTokenizer, read_object, token_ids

FILES = ("model.safetensors", *tokenizer_json.FILES, "tokenizer.model", "config.json")  # that write_folder writes
SIZES = {"dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers",
         "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size",
         "max_seq_len": "max_position_embeddings"}  # ours -> config.json's
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # as model.py has it
ROPE = {"rope_factor": "factor", "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_seq_len": "original_max_position_embeddings"}  # ours -> of rope_scaling
OF_SCALING = {"none": (), "linear": ("rope_factor",), "llama3": tuple(ROPE)}  # those that each kind has
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that are read
AT_ONCE = 1 << 22  # numbers of a tensor that are read at a time
NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
         "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
         "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def halves(w: Tensor, n_heads: int) -> Tensor:
    """Rows of each head (n_heads * hd, D) from neighbouring pairs to pairs half a head apart."""
    return w.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def neighbours(w: Tensor, n_heads: int) -> Tensor:
    """The inverse of halves()."""
    return w.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turned(name: str, w: Tensor, args: ModelArgs, how) -> Tensor:
    """w, with its rows reordered by `how` if it makes queries or keys."""
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.split(".")[-2])
    return how(w, heads) if heads else w


# ---------------------------------------------------------------------------------------------
# out

def need_safetensors() -> None:
    """ValueError with the install line if a library that these folders need is missing."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ValueError("Hugging Face folders need safetensors: pip install -r requirements-export.txt") from None


def write_folder(model: Transformer, tokenizer: Tokenizer | None, folder: str | Path,
                 special_tokens: tuple[int, tuple[int, ...]] | None = None) -> None:
    """Write trunk and NTP head as they are, and the tokenizer if there is one: the whole folder at once, or nothing.

    special_tokens: BOS and the ids that end a text, of a model without a tokenizer; default Llama 2's. A folder that
    was written before gives way. Errors: ValueError if the folder holds other files, or cannot be written, or if the
    format cannot hold what the model is.
    """
    need_safetensors()
    from safetensors.torch import save_file

    args, state = model.as_llama()
    weights, owners = {}, set()
    for name, w in state.items():
        w = turned(name, w.detach().cpu(), args, halves).contiguous()
        shared = w.data_ptr() in owners  # by layers that recur, which the format refuses
        owners.add(w.data_ptr())
        weights[renamed(name, NAMES, "model.layers.")] = w.clone() if shared else w
    bos, ends = special_tokens or ((tokenizer.bos, tokenizer.ends) if tokenizer else (BOS, (EOS,)))
    with atomic_folder(folder, FILES) as new:
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        with open(new / "model.safetensors", "rb") as f:
            os.fsync(f.fileno())
        if isinstance(tokenizer, JsonTokenizer):
            tokenizer.write(new)
        else:
            if tokenizer:
                write_tokenizer(tokenizer, args.max_seq_len, new)
            ids = {"bos_token_id": bos, "eos_token_id": [*ends, bos]}  # a BOS begins the next story
            write_json(new / tokenizer_json.GENERATION, ids | ({"pad_token_id": ends[0]} if ends else {}))
        write_json(new / "config.json", config_json(args, bos, ends))


def config_json(args: ModelArgs, bos: int, ends: tuple[int, ...]) -> dict:
    """A Llama's config.json, which transformers 4 and 5 read; `rope_scaling` is where both look."""
    scaling = {"rope_type": args.rope_scaling} | {ROPE[name]: getattr(args, name)
                                                  for name in OF_SCALING[args.rope_scaling]}
    return FIXED | {there: getattr(args, ours) for ours, there in SIZES.items()} | {
        "architectures": ["LlamaForCausalLM"], "head_dim": args.head_dim, "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta, "rope_scaling": None if args.rope_scaling == "none" else scaling,
        "tie_word_embeddings": args.tie_embeddings, "dtype": args.param_dtype,
        "bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else list(ends)}


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tokenizer(tokenizer: Tokenizer, max_seq_len: int, folder: Path) -> None:
    """tokenizer.json, which AutoTokenizer reads; tokenizer.model where there is such a thing."""
    write_json(folder / tokenizer_json.TOKENIZER, as_json(tokenizer))
    write_json(folder / tokenizer_json.TOKENIZER_CONFIG, {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len, "unk_token": SPECIAL[UNK],
        "bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS], "clean_up_tokenization_spaces": False})
    if tokenizer.vocab_size != BYTE_VOCAB_SIZE:
        with atomic_write(folder / "tokenizer.model") as f:
            f.write(tokenizer.file)


def as_json(tokenizer: Tokenizer) -> dict:
    """The same vocabulary in the words of the tokenizers library: same text, same tokens, and back; but for "<s>",
    "</s>" and "<unk>" in a text, which are the special tokens there.

    Pieces become a BPE with ranked merges: all ways to make a piece of two others, pieces of a higher
    score first, which are those that SentencePiece merges first.
    """
    space = " " if tokenizer.vocab_size == BYTE_VOCAB_SIZE else "▁"
    names = list(SPECIAL.values()) + [f"<0x{b:02X}>" for b in range(256)]
    scores = [score for _, score in tokenizer.pieces()]
    names += [piece.decode("utf-8").replace(" ", space) for piece, _ in tokenizer.pieces()][BYTE_VOCAB_SIZE:]
    ids = {name: i for i, name in enumerate(names)}
    merges = []
    for piece in sorted(names[BYTE_VOCAB_SIZE:], key=lambda name: (-scores[ids[name]], ids[name])):
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [pair for pair in pairs if min(ids.get(part, 0) for part in pair) >= BYTE_VOCAB_SIZE]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    spaced = [{"type": "Replace", "pattern": {"String": " "}, "content": space}] if space != " " else []
    unspaced = [{"type": "Replace", "pattern": {"String": space}, "content": " "}] if space != " " else []
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, name in SPECIAL.items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": space}, *spaced]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}},
                                      {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [{"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}},
                                    {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {SPECIAL[BOS]: {"id": SPECIAL[BOS], "ids": [BOS],
                                                             "tokens": [SPECIAL[BOS]]}}},
        "decoder": {"type": "Sequence", "decoders": [*unspaced, {"type": "ByteFallback"}, {"type": "Fuse"},
                                                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": SPECIAL[UNK], "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": ids, "merges": merges},
    }


# ---------------------------------------------------------------------------------------------
# in

class Stored:
    """A tensor that is still in its safetensors file."""

    def __init__(self, file: Path, name: str, shape: tuple[int, ...], dtype: str):
        self.file, self.name, self.shape, self.dtype = file, name, torch.Size(shape), dtype
        self.head_rows = 0  # of each head, where the rows of its halves are apart (`halves`)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """A few rows at a time, in whole heads. The file is closed in between, which frees its mapped pages."""
        from safetensors import SafetensorError, safe_open

        heads = self.head_rows or 1
        step = max(1, AT_ONCE // max(1, math.prod(self.shape[1:])) // heads) * heads
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            try:
                with safe_open(self.file, "pt") as f:
                    part = f.get_slice(self.name)[rows]
                    yield rows, neighbours(part, len(part) // heads) if self.head_rows else part
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.file}: {self.name}: cannot read: {error}") from error

    def copy_to(self, target: Tensor) -> None:
        for rows, part in self.parts():
            target[rows].copy_(part)

    def equals(self, other: "Stored") -> bool:
        return self.shape == other.shape and all(
            torch.equal(a, b) for (_, a), (_, b) in zip(self.parts(), other.parts(), strict=True))


def read_folder(folder: str | Path) -> dict:
    """The Llama in a folder as a checkpoint: `model` under llama2.c's names, each tensor `Stored`; `model_args`;
    `special_tokens`, BOS and the ids that end a text.

    Errors: ValueError naming file and key, or tensor, what was found and what was expected.
    """
    folder = Path(folder)
    args = read_config(folder / "config.json")
    found = stored_tensors(folder)
    for name in [name for name in found if name.endswith("rotary_emb.inv_freq")]:  # folders of older versions
        check_frequencies(found.pop(name), args)
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if args.tie_embeddings and head and embedding:
        if not head.equals(embedding):
            raise ValueError(f"{head.file}: lm_head.weight: expected the numbers of model.embed_tokens.weight, as "
                             f"tie_word_embeddings is true in {folder / 'config.json'}, found others; if the head has "
                             "numbers of its own, make it false")
        del found["lm_head.weight"]
    state = {}
    for name, shape in layout(args, version=1):
        theirs = renamed(name, NAMES, "model.layers.")
        if theirs not in found:
            untied = "; tie_word_embeddings is not true" if theirs == "lm_head.weight" else ""
            raise ValueError(f"{folder}: has no tensor {theirs}{untied}")
        w = state[name] = found.pop(theirs)
        if w.shape != shape or w.dtype not in DTYPES:
            raise ValueError(f"{folder}: {theirs}: expected shape {shape} of {', '.join(DTYPES)}, found "
                             f"{tuple(w.shape)} {w.dtype}")
        w.head_rows = args.head_dim if name.endswith(("wq.weight", "wk.weight")) else 0
    if found:
        raise ValueError(f"{folder}: unexpected tensor {shown(next(iter(found)))}")
    if all(w.dtype == "BF16" for name, w in state.items() if len(w.shape) == 2):
        args.param_dtype = "bfloat16"
    return {"model": state, "model_args": args.as_dict(), "special_tokens": special_tokens(folder)}


def special_tokens(folder: Path) -> tuple[int, tuple[int, ...]]:
    """BOS and the ids that end a text, by config.json; Llama 2's where it does not tell."""
    path = folder / "config.json"
    starts, ends = (token_ids(read_object(path), key, path) for key in ("bos_token_id", "eos_token_id"))
    return (starts or [BOS])[0], tuple(ends or [EOS])


def check_frequencies(stored: Stored, args: ModelArgs) -> None:
    """ValueError where a folder has RoPE's frequencies as a tensor, and they are not those of its config.json."""
    expected = rope_frequencies(args)
    if stored.shape != expected.shape or stored.dtype not in DTYPES:
        raise ValueError(f"{stored.file}: {stored.name}: expected shape {tuple(expected.shape)}, found "
                         f"{tuple(stored.shape)} {stored.dtype}")
    numbers = torch.empty_like(expected)
    stored.copy_to(numbers)
    if not torch.allclose(numbers, expected, rtol=1e-2):  # they may be stored in 16 bits
        raise ValueError(f"{stored.file}: {stored.name}: expected the frequencies of rope_theta={args.rope_theta}, as "
                         "config.json says, found others")


def number(content: dict, key: str, default: float, path: Path) -> float:
    value = content.get(key, default)
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise ValueError(f"{path}: {key}: expected a number above 0, found {shown(repr(value))}")
    return float(value)


def read_config(path: Path) -> ModelArgs:
    """The shape in a config.json. Errors: ValueError naming a field that model.py does not support."""
    config = {key: value for key, value in read_object(path).items() if value is not None}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    for ours, there in SIZES.items():
        most = llama2c.SIZES[ours]
        if type(config.get(there)) is not int or not 1 <= config[there] <= most:
            raise ValueError(f"{path}: {there}: expected a number from 1 to {most}, found "
                             f"{shown(repr(config.get(there)))}")
    size = {ours: config[there] for ours, there in SIZES.items()}
    rope = read_rope(config, path)
    given = {"model_type": None} | config
    for key, value in (FIXED | {"partial_rotary_factor": 1.0, "quantization_config": "none"}).items():
        if given.get(key, value) != value:
            raise ValueError(f"{path}: {key}: expected {value}, found {shown(repr(given[key]))}")
    tied, head_dim = config.get("tie_word_embeddings", False), config.get("head_dim", 0)  # transformers' defaults
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings: expected true or false, found {shown(repr(tied))}")
    if type(head_dim) is not int or not 0 <= head_dim <= llama2c.SIZES["dim"]:
        raise ValueError(f"{path}: head_dim: expected a number from 1 to {llama2c.SIZES['dim']}, found "
                         f"{shown(repr(head_dim))}")
    eps = number(config, "rms_norm_eps", 1e-6, path)
    if eps >= 1:
        raise ValueError(f"{path}: rms_norm_eps: expected a small number, found {eps}")
    try:
        return ModelArgs(**size, **rope, head_dim=head_dim, norm_eps=eps, tie_embeddings=tied)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_rope(config: dict, path: Path) -> dict:
    """A config.json's RoPE under ModelArgs' names: rope_parameters (transformers 5), or rope_scaling and rope_theta."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    ours = {"default": "none", "linear": "linear", "llama3": "llama3"}.get(kind if isinstance(kind, str) else "")
    if ours is None:
        raise ValueError(f"{path}: {key}: expected an object of rope_type default, linear or llama3, found "
                         f"{shown(repr(kind))}")
    if (partial := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor: expected 1.0, found {shown(repr(partial))}")
    found = {"rope_theta": number(config | rope, "rope_theta", ROPE_THETA, path), "rope_scaling": ours}
    for name in OF_SCALING[ours]:
        if ROPE[name] not in rope:
            raise ValueError(f"{path}: {key}: {kind}: expected {ROPE[name]}, found {shown(', '.join(rope))}")
        value = number(rope, ROPE[name], 0.0, path)
        found[name] = int(value) if name == "rope_original_seq_len" else value
    return found


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of model.safetensors, or those that model.safetensors.index.json names, each in its file."""
    need_safetensors()
    from safetensors import SafetensorError, safe_open

    parts, index = None, folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        parts = read_object(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(n, str) and Path(n).name == n for n in parts.values()):
            raise ValueError(f"{index}: weight_map: expected tensors with names of files in this folder")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(parts.values())) if parts else ["model.safetensors"]:
        path = folder / name
        if not path.is_file():
            pickled = "; pickles are not read" if (folder / "pytorch_model.bin").exists() else ""
            raise ValueError(f"{path}: no such file; expected the weights as safetensors{pickled}")
        try:
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    if not parts or parts.get(key) == name:
                        slice_ = f.get_slice(key)
                        tensors[key] = Stored(path, key, tuple(slice_.get_shape()), slice_.get_dtype())
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: not safetensors, or broken: {error}") from error
    return tensors
