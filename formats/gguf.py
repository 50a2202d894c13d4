"""Llamas as GGUF files, which llama.cpp and what is built on it read; the tokenizer is inside.

    write_gguf(model, tokenizer, "stories.gguf", "q8_0")

Tensors keep llama2.c's order of rows, which is Meta's: llama.cpp's RoPE turns neighbouring pairs, too.
Norms are float32 in every kind of file. q8_0 has blocks of 32 numbers of a row; a matrix whose rows
are no multiple of that (the feed-forward of 260K models: 172) is kept in f16.

What this leaves out on purpose: reading, and future heads, which llama.cpp's Llama does not have.
"""

import json
import math
from pathlib import Path

from formats.llama2c import renamed
from model import ModelArgs, Transformer, rope_frequencies, unscaled_frequencies
from system.files import atomic_write
from text.tokenizer import BOS, BYTE_VOCAB_SIZE, EOS, FIRST_BYTE, SPECIAL, UNK, Tokenizer
from text.tokenizer_json import JsonTokenizer

KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # ours -> the format's name of such a file
LARGEST = {"f32": math.inf, "f16": 65504.0, "q8_0": 127 * 65504.0}  # number that fits; q8_0 has scales in float16
# How Llama 3's tokenizer.json splits a text, by which llama.cpp knows it.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
BLOCK = 32  # numbers of a row that share a scale in q8_0
NAMES = {"attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
         "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
         "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "tok_embeddings": "token_embd", "norm": "output_norm",
         "output": "output"}


def kind_of(shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor of this shape in a file of this kind."""
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % BLOCK else kind


def vocabulary(tokenizer: Tokenizer) -> tuple[list[bytes], list[float], list[str]]:
    """(text, score, type) of each token: SentencePiece's, with ▁ for a space.

    In a byte vocabulary the byte 0x20 is a token "▁": llama.cpp turns spaces into that before it looks for bytes.
    """
    texts, scores, types = [], [], []
    kinds = {UNK: "UNKNOWN", BOS: "CONTROL", EOS: "CONTROL"}
    for i, (piece, score) in enumerate(tokenizer.pieces()):
        is_byte = FIRST_BYTE <= i < BYTE_VOCAB_SIZE and piece != b" "
        texts.append(SPECIAL[i].encode() if i in SPECIAL else piece.replace(b" ", "▁".encode()))
        scores.append(score)
        types.append(kinds.get(i) or ("BYTE" if is_byte else "NORMAL"))
    return texts, scores, types


def need_gguf() -> None:
    """ValueError with the install line if a library that these files need is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("GGUF files need gguf: pip install -r requirements-export.txt") from None


def write_gguf(model: Transformer, tokenizer: Tokenizer, path: str | Path, kind: str = "f16") -> None:
    """Write trunk and NTP head as f32, f16 or q8_0.

    Errors: ValueError if the format cannot hold what the model is, or the file cannot be written.
    """
    need_gguf()
    import gguf

    args, state = model.as_llama()
    for name, w in state.items():
        if not (largest := w.abs().max().item()) <= LARGEST[kind_of(w.shape, kind)]:
            raise ValueError(f"{path}: {name}: {largest:g} does not fit {kind_of(w.shape, kind)}; expected f32")
    with atomic_write(path) as f:  # the writer opens the same file by its name
        writer = gguf.GGUFWriter(f.name, "llama")
        writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
        writer.add_vocab_size(args.vocab_size)
        writer.add_context_length(args.max_seq_len)
        writer.add_embedding_length(args.dim)
        writer.add_block_count(args.n_layers)
        writer.add_feed_forward_length(args.hidden_dim)
        writer.add_head_count(args.n_heads)
        writer.add_head_count_kv(args.n_kv_heads)
        writer.add_layer_norm_rms_eps(args.norm_eps)
        writer.add_key_length(args.head_dim)
        writer.add_value_length(args.head_dim)
        add_rope(writer, args)
        if isinstance(tokenizer, JsonTokenizer):
            add_json_vocabulary(writer, tokenizer, path)
        else:
            add_vocabulary(writer, tokenizer)
        for name, w in state.items():
            numbers = w.detach().float().cpu().numpy()
            as_kind = gguf.GGMLQuantizationType[kind_of(numbers.shape, kind).upper()]
            writer.add_tensor(renamed(name, NAMES, "blk."), gguf.quants.quantize(numbers, as_kind), raw_dtype=as_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_rope(writer, args: ModelArgs) -> None:
    """RoPE's base and scaling. llama.cpp has llama3's as a divisor for each pair's angle, in a tensor."""
    import gguf

    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    if args.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(args.rope_factor)
    elif args.rope_scaling == "llama3":
        divisors = unscaled_frequencies(args.head_dim, args.rope_theta) / rope_frequencies(args)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())


def add_vocabulary(writer, tokenizer: Tokenizer) -> None:
    import gguf

    texts, scores, types = vocabulary(tokenizer)
    writer.add_tokenizer_model("llama")  # SentencePiece's way of merging, by score
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types([gguf.TokenType[kind] for kind in types])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(BOS)  # a BOS begins the next story: readers stop there
    writer.add_unk_token_id(UNK)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


def pre_tokenizer_of(content: dict) -> str | None:
    """llama.cpp's name of how a byte-level BPE splits a text before it merges; None where it has none."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    *first, last = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    if content.get("normalizer"):
        return None
    if not first and last == byte_level | {"use_regex": True}:
        return "gpt-2"
    if first == [split] and last == byte_level | {"use_regex": False}:
        return "llama-bpe"
    return None


def add_json_vocabulary(writer, tokenizer: JsonTokenizer, path: str | Path) -> None:
    """A tokenizer.json of GPT-2's or Llama 3's kind. Errors: ValueError for others, which llama.cpp does not know."""
    import gguf

    content = json.loads(tokenizer.file)
    model, pre = content.get("model", {}), pre_tokenizer_of(content)
    if model.get("type") != "BPE" or pre is None:
        raise ValueError(f"{path}: tokenizer.json: expected a byte-level BPE that splits texts as GPT-2 or Llama 3 "
                         "does, which llama.cpp knows; found another")
    names = dict.fromkeys(range(tokenizer.vocab_size)) | {i: name for name, i in model["vocab"].items()}
    types = [gguf.TokenType.UNUSED if name is None else gguf.TokenType.NORMAL for name in names.values()]
    for token in content.get("added_tokens", []):
        names[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([f"[PAD{i}]" if name is None else name for i, name in names.items()])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos)
    if tokenizer.ends:
        writer.add_eos_token_id(tokenizer.ends[0])
    writer.add_eot_token_id(tokenizer.bos)  # a BOS begins the next text: readers stop there
    writer.add_add_bos_token(True)
