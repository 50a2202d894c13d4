"""Llamas as GGUF files, which llama.cpp and what is built on it read; the tokenizer is inside.

    write_gguf(model, tokenizer, "stories.gguf", "q8_0")

Tensors keep llama2.c's order of rows, which is Meta's: llama.cpp's RoPE turns neighbouring pairs, too.
Norms are float32 in every kind of file. q8_0 has blocks of 32 numbers of a row; a matrix whose rows
are no multiple of that (the feed-forward of 260K models: 172) is kept in f16.

What this leaves out on purpose: reading, and future heads, which llama.cpp has no place for in a Llama.
"""

import math
from pathlib import Path

from formats.llama2c import renamed
from model import ROPE_THETA, Transformer
from system.files import atomic_write
from text.tokenizer import BOS, BYTE_VOCAB_SIZE, EOS, FIRST_BYTE, SPECIAL, UNK, Tokenizer

KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # ours -> the format's name of such a file
LARGEST = {"f32": math.inf, "f16": 65504.0, "q8_0": 127 * 65504.0}  # number that fits; q8_0 has scales in float16
BLOCK = 32  # numbers of a row that share a scale in q8_0
NAMES = {"attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
         "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
         "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "tok_embeddings": "token_embd", "norm": "output_norm",
         "output": "output"}


def kind_of(shape: tuple[int, ...], kind: str) -> str:
    """What a tensor of this shape is in a file of this kind."""
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
    """ValueError with the line that installs what these files need, where it is missing."""
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
        writer.add_rope_dimension_count(args.dim // args.n_heads)
        writer.add_rope_freq_base(ROPE_THETA)
        add_vocabulary(writer, tokenizer)
        for name, w in state.items():
            numbers = w.detach().float().cpu().numpy()
            as_kind = gguf.GGMLQuantizationType[kind_of(numbers.shape, kind).upper()]
            writer.add_tensor(renamed(name, NAMES, "blk."), gguf.quants.quantize(numbers, as_kind), raw_dtype=as_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


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
