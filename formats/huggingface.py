"""Llamas as Hugging Face folders, in both directions: config.json, safetensors, tokenizer files.

    write_folder(model, tokenizer, "stories")      # transformers.AutoModelForCausalLM.from_pretrained("stories")
    checkpoint = read_folder("stories")            # as a checkpoint: {"model": ..., "model_args": ...}

Two Llamas differ in how RoPE pairs the numbers of a head: Meta's and llama2.c's turn neighbours (2j, 2j+1),
transformers' turns (j, j + hd/2). So the rows of wq and wk go into another order on the way, and queries
and keys have the same products as before.

What this leaves out on purpose: future heads, which no transformers model has; pickles (pytorch_model.bin);
Llamas with biases, scaled RoPE or another base than 10,000, which model.py has not.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from formats import llama2c
from formats.llama2c import layout, renamed
from model import ROPE_THETA, ModelArgs, Transformer
from system.files import atomic_folder, atomic_write
from text.tokenizer import BOS, BYTE_VOCAB_SIZE, EOS, SPECIAL, UNK, Tokenizer

FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json",
         "config.json")  # that write_folder writes
SIZES = {"dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers",
         "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size",
         "max_seq_len": "max_position_embeddings"}  # ours -> config.json's
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "rope_theta": ROPE_THETA, "bos_token_id": BOS, "eos_token_id": EOS}  # as model.py and tokenizer.py have it
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
    """w with its rows in another order where it makes queries or keys."""
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.split(".")[-2])
    return how(w, heads) if heads else w


# ---------------------------------------------------------------------------------------------
# out

def need_safetensors() -> None:
    """ValueError with the line that installs what these folders need, where it is missing."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ValueError("Hugging Face folders need safetensors: pip install -r requirements-export.txt") from None


def write_folder(model: Transformer, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Write trunk and NTP head in float32, and the tokenizer if there is one: the whole folder at once, or nothing.

    A folder that was written before gives way. Errors: ValueError if the folder holds other files, or cannot be
    written, or if the format cannot hold what the model is.
    """
    need_safetensors()
    from safetensors.torch import save

    args, state = model.as_llama()
    weights = {}
    for name, w in state.items():  # cloned: layers that recur share theirs, which the format refuses
        w = turned(name, w.detach().float().cpu(), args, halves)
        weights[renamed(name, NAMES, "model.layers.")] = w.clone(memory_format=torch.contiguous_format)
    config = FIXED | {there: getattr(args, ours) for ours, there in SIZES.items()} | {
        "architectures": ["LlamaForCausalLM"], "head_dim": args.dim // args.n_heads, "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_embeddings, "dtype": "float32"}
    ids = {"bos_token_id": BOS, "eos_token_id": [EOS, BOS], "pad_token_id": EOS}  # a BOS begins the next story
    with atomic_folder(folder, FILES) as new:
        with atomic_write(new / "model.safetensors") as f:
            f.write(save(weights, metadata={"format": "pt"}))
        if tokenizer:
            write_tokenizer(tokenizer, args.max_seq_len, new)
        write_json(new / "generation_config.json", ids)
        write_json(new / "config.json", config)


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tokenizer(tokenizer: Tokenizer, max_seq_len: int, folder: Path) -> None:
    """tokenizer.json, which AutoTokenizer reads; tokenizer.model where there is such a thing."""
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len, "unk_token": SPECIAL[UNK],
        "bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS], "clean_up_tokenization_spaces": False})
    if tokenizer.vocab_size != BYTE_VOCAB_SIZE:
        with atomic_write(folder / "tokenizer.model") as f:
            f.write(tokenizer.file)


def tokenizer_json(tokenizer: Tokenizer) -> dict:
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

def read_folder(folder: str | Path) -> dict:
    """The Llama in a folder as a checkpoint: `model` in float32 under llama2.c's names, `model_args`.

    Errors: ValueError naming file and key, or tensor, what was found and what was expected.
    """
    folder = Path(folder)
    args = read_config(folder / "config.json")
    found = read_tensors(folder)
    found = {name: w for name, w in found.items() if not name.endswith("rotary_emb.inv_freq")}  # older ones have it
    if args.tie_embeddings:
        found.pop("lm_head.weight", None)
    state = {}
    for name, shape in layout(args, version=1):
        theirs = renamed(name, NAMES, "model.layers.")
        if theirs not in found:
            raise ValueError(f"{folder}: has no tensor {theirs}")
        w = found.pop(theirs)
        if tuple(w.shape) != shape or not w.is_floating_point():
            raise ValueError(f"{folder}: {theirs}: expected shape {shape} of floats, found {tuple(w.shape)} {w.dtype}")
        state[name] = turned(name, w.float(), args, neighbours)
    if found:
        raise ValueError(f"{folder}: holds a tensor that this model has not: {next(iter(found))}")
    return {"model": state, "model_args": args.as_dict()}


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}; a Hugging Face folder has one") from error
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; [[[[[...
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def read_config(path: Path) -> ModelArgs:
    """The shape in a config.json. Errors: ValueError for what model.py has not, by key."""
    config = {key: value for key, value in read_json(path).items() if value is not None}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    for ours, there in SIZES.items():
        most = llama2c.SIZES[ours]
        if type(config.get(there)) is not int or not 1 <= config[there] <= most:
            raise ValueError(f"{path}: {there}: expected a number from 1 to {most}, found {config.get(there)!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, 4
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rope_scaling: expected none, found {rope}")
    size = {ours: config[there] for ours, there in SIZES.items()}
    wanted = FIXED | {"head_dim": size["dim"] // size["n_heads"], "partial_rotary_factor": 1.0,
                      "quantization_config": "none"}
    given = {"model_type": None} | config | {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")
                                             if key in rope}
    for key, value in wanted.items():
        if given.get(key, value) != value:
            raise ValueError(f"{path}: {key}: expected {value}, found {given[key]!r}")
    eps, tied = config.get("rms_norm_eps", 1e-6), config.get("tie_word_embeddings", False)  # transformers' defaults
    if not isinstance(eps, float) or not 0 < eps < 1 or not isinstance(tied, bool):
        raise ValueError(f"{path}: rms_norm_eps, tie_word_embeddings: expected a small number and true or false, "
                         f"found {eps!r}, {tied!r}")
    try:
        return ModelArgs(**size, norm_eps=eps, tie_embeddings=tied)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or those that model.safetensors.index.json names, each from its file."""
    need_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    parts, index = None, folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(n, str) and Path(n).name == n for n in parts.values()):
            raise ValueError(f"{index}: weight_map: expected tensors with names of files in this folder")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(parts.values())) if parts else ["model.safetensors"]:
        if not (folder / name).is_file():
            pickled = "; pickles are not read" if (folder / "pytorch_model.bin").exists() else ""
            raise ValueError(f"{folder / name}: no such file; expected the weights as safetensors{pickled}")
        try:
            found = load_file(folder / name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder / name}: not safetensors, or broken: {error}") from error
        tensors |= {key: w for key, w in found.items() if not parts or parts.get(key) == name}
    return tensors
