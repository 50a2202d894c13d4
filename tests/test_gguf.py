"""GGUF files: their content, by the gguf package's reader; and llama.cpp's story, where it is installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from test_export import greedy, random_model, save
from test_huggingface import TEXTS
from test_tokenizer_json import json_tokenizer

import export
from formats import gguf
from formats.checkpoint import load_model, read_checkpoint
from formats.gguf import write_gguf
from text.tokenizer import BOS, EOS, ByteTokenizer, load_tokenizer, open_tokenizer

PUBLISHED = SHARED / "stories260K"
WIDE = {"dim": 64, "hidden_dim": 96, "n_heads": 2, "n_kv_heads": 2}  # rows of 64 and 96: whole blocks


@pytest.fixture
def tokenizer(data_dir):
    return load_tokenizer(data_dir / "toy" / "tok512", 512)


def contents(path: Path) -> tuple[dict, dict]:
    """(settings, tensors: name -> (type, numbers in float32))."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("kind,error", [("f32", 0.0), ("f16", 2**-11), ("q8_0", 0.5 / 127 + 2**-11)])
@pytest.mark.parametrize("changes", [WIDE, WIDE | {"tie_embeddings": False, "n_kv_heads": 1},
                                     WIDE | {"n_future_heads": 2, "recurrence": 2}])
def test_the_file_holds_the_model(tokenizer, tmp_path, kind, error, changes):
    model = random_model(**changes)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    settings, tensors = contents(tmp_path / "m.gguf")
    args, state = model.as_llama()
    assert settings["general.architecture"] == "llama"
    for key, value in {"embedding_length": args.dim, "block_count": args.n_layers, "context_length": args.max_seq_len,
                       "feed_forward_length": args.hidden_dim, "attention.head_count": args.n_heads,
                       "attention.head_count_kv": args.n_kv_heads, "rope.dimension_count": args.dim // args.n_heads,
                       "rope.freq_base": 10000.0, "vocab_size": args.vocab_size}.items():
        assert settings[f"llama.{key}"] == value, key
    assert settings["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(args.norm_eps)
    assert len(tensors) == len(state) and ("output.weight" in tensors) != args.tie_embeddings
    for name, w in state.items():
        found, numbers = tensors[gguf.renamed(name, gguf.NAMES, "blk.")]
        assert found.lower() == ("f32" if w.dim() == 1 else kind)
        blocks = w.detach().reshape(-1, 32).abs()
        bound = 0.0 if w.dim() == 1 else error * (blocks.amax(1, keepdim=True) if kind == "q8_0" else blocks)
        off = (torch.tensor(np.array(numbers)).reshape(-1, 32) - w.detach().reshape(-1, 32)).abs()
        assert (off <= bound + 1e-7 * bool(error)).all(), name


def test_rows_that_are_no_whole_blocks_stay_f16(tokenizer, tmp_path, capsys):
    path = save(random_model(hidden_dim=44), tmp_path / "ckpt.pt")
    words = [str(path), f"--gguf={tmp_path / 'm.gguf'}", "--gguf_type=q8_0", "--tokenizer"]
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.file)
    export.main([*words, str(tmp_path)])
    _, tensors = contents(tmp_path / "m.gguf")
    assert tensors["blk.0.ffn_down.weight"][0] == "F16" and tensors["blk.0.ffn_up.weight"][0] == "Q8_0"
    assert "no multiple of 32" in capsys.readouterr().err


def test_the_vocabulary_is_inside(tokenizer, tmp_path):
    write_gguf(random_model(), tokenizer, tmp_path / "m.gguf")
    settings, _ = contents(tmp_path / "m.gguf")
    tokens, scores = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.scores"]
    pieces = list(tokenizer.pieces())
    assert len(tokens) == 512 and tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert [t.replace("▁", " ").encode() for t in tokens[259:]] == [piece for piece, _ in pieces[259:]]
    assert np.allclose(scores, [score for _, score in pieces])
    assert settings["tokenizer.ggml.token_type"] == [2, 3, 3] + [6] * 256 + [1] * 253
    assert (settings["tokenizer.ggml.bos_token_id"], settings["tokenizer.ggml.eos_token_id"]) == (BOS, EOS)
    assert settings["tokenizer.ggml.add_bos_token"] is True and settings["tokenizer.ggml.add_space_prefix"] is True


def test_a_byte_vocabulary_has_its_space_where_llama_cpp_looks(tmp_path):
    texts, _, types = gguf.vocabulary(ByteTokenizer())
    assert texts[3 + 32].decode() == "▁" and types[3 + 32] == "NORMAL"
    assert texts[3 + 65] == b"<0x41>" and types[3 + 65] == "BYTE" and types.count("BYTE") == 255


def test_what_cannot_be_written_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    path = save(random_model(), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="no tokenizer.model, .* in .*; name one with --tokenizer"):
        export.main([str(path), f"--gguf={tmp_path / 'm.gguf'}"])
    with pytest.raises(ValueError, match="rnn"):
        write_gguf(random_model(trunk="rnn"), tokenizer, tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install -r requirements-export.txt"):
        write_gguf(random_model(), tokenizer, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_numbers_that_a_type_cannot_hold_are_refused(tokenizer, tmp_path):
    for kind, value in (("f16", 7e4), ("q8_0", 1e7), ("f16", torch.nan)):
        model = random_model(**WIDE)
        with torch.no_grad():
            model.layers[0].attention.wo.weight[3, 5] = value
        with pytest.raises(ValueError, match=f"layers.0.attention.wo.weight: .* does not fit {kind}; expected f32"):
            write_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("changes", [{"rope_theta": 5e5}, {"rope_scaling": "linear", "rope_factor": 4.0},
                                     {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_seq_len": 16,
                                      "rope_theta": 5e5, "head_dim": 24}])
def test_rope_and_heads_as_todays_llamas_have_them(tokenizer, tmp_path, changes):
    """Divisors of angles are held against transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = random_model(**changes)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    settings, tensors = contents(tmp_path / "m.gguf")
    hd = model.args.head_dim
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
    assert [settings[f"llama.{key}"] for key in keys] == [hd, hd, hd, model.args.rope_theta]
    scaling = settings.get("llama.rope.scaling.type"), settings.get("llama.rope.scaling.factor")
    assert scaling == (("linear", 4.0) if changes.get("rope_scaling") == "linear" else (None, None))
    divisors = tensors.pop("rope_freqs.weight", ("F32", np.ones(hd // 2, np.float32)))[1]
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}
    if changes.get("rope_scaling") == "llama3":
        config = LlamaConfig(head_dim=hd, rope_parameters=rope)
        theirs = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
        plain = 5e5 ** -(np.arange(0, hd, 2) / hd)
        assert np.allclose(plain / divisors, theirs, rtol=1e-5) and divisors.max() == 8.0
    else:
        assert (divisors == 1).all()
    assert tensors["blk.0.attn_q.weight"][1].shape == (4 * hd, 32)


def test_a_json_vocabulary_is_inside(tmp_path):
    tokenizer = json_tokenizer(tmp_path, 600, split=gguf.LLAMA3_SPLIT)
    write_gguf(random_model(vocab_size=600), tokenizer, tmp_path / "m.gguf")
    settings, _ = contents(tmp_path / "m.gguf")
    assert settings["tokenizer.ggml.model"] == "gpt2" and settings["tokenizer.ggml.pre"] == "llama-bpe"
    assert settings["tokenizer.ggml.bos_token_id"] == tokenizer.bos and tokenizer.ends[0] != EOS
    assert settings["tokenizer.ggml.eos_token_id"] == tokenizer.ends[0]
    tokens, types = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 600 and types[tokenizer.bos] == 3 and types[599] == 5
    assert tokens[tokenizer.encode(" there")[0]] == "Ġthere"
    first, second = settings["tokenizer.ggml.merges"][-1].split(" ")
    assert first + second in tokens
    for split, pre in ((None, "gpt-2"), ("x", None)):
        content = json.loads(json_tokenizer(tmp_path / pre if pre else tmp_path, 600, split=split).file)
        assert gguf.pre_tokenizer_of(content) == pre
    with pytest.raises(ValueError, match="tokenizer.json: expected a byte-level BPE that splits"):
        write_gguf(random_model(vocab_size=600), json_tokenizer(tmp_path, 600, split="x"), tmp_path / "n.gguf")
    assert not (tmp_path / "n.gguf").exists()


def test_gguf_files_are_not_read(tokenizer, tmp_path):
    write_gguf(random_model(), tokenizer, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="a GGUF file, which can be written, not read"):
        read_checkpoint(tmp_path / "m.gguf")


# ---------------------------------------------------------------------------------------------
# llama.cpp itself

@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: make test-interop")


def open_llama(llama_cpp, path: Path, length: int):
    """With its cache in float32, so that near ties fall as in ours."""
    f32 = llama_cpp.GGML_TYPE_F32 if hasattr(llama_cpp, "GGML_TYPE_F32") else 0
    return llama_cpp.Llama(str(path), n_ctx=length, n_threads=1, n_batch=length, logits_all=True, verbose=False,
                           type_k=f32, type_v=f32)


def continued(llama, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for token in llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        ids.append(token)
        if len(ids) >= n or token == BOS:
            return ids
    return ids


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"tie_embeddings": False, "n_kv_heads": 1},
                                     {"recurrence": 2}, {"vocab_size": 259}])
def test_llama_cpp_has_the_same_logits_and_the_same_greedy_tokens(llama_cpp, data_dir, tmp_path, changes):
    model = random_model(**changes)
    V = model.args.vocab_size
    write_gguf(model, load_tokenizer(data_dir / "toy" / f"tok{V}", V), tmp_path / "m.gguf", "f32")
    llama = open_llama(llama_cpp, tmp_path / "m.gguf", model.args.max_seq_len)
    ids = greedy(model, 60)
    llama.eval(ids)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    theirs = np.array(llama.scores[: len(ids)])
    assert np.abs(ours - theirs).max() < 1e-4
    llama.reset()
    assert continued(llama, [BOS], len(ids)) == ids


@pytest.mark.parametrize("vocab_size", [512, 259])
def test_llama_cpp_makes_the_same_tokens_and_texts(llama_cpp, data_dir, tmp_path, vocab_size):
    ours = load_tokenizer(data_dir / "toy" / f"tok{vocab_size}", vocab_size)
    write_gguf(random_model(vocab_size=vocab_size), ours, tmp_path / "m.gguf")
    llama = open_llama(llama_cpp, tmp_path / "m.gguf", 256)
    assert (llama.token_bos(), llama.token_eos()) == (BOS, EOS)
    for text in TEXTS:
        if text.startswith("▁"):  # llama.cpp takes it for a space
            continue
        ids = ours.encode(text)
        assert llama.tokenize(text.encode(), add_bos=True) == [BOS, *ids], text
        assert llama.detokenize([BOS, *ids]).decode() == ours.decode(ids), text


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published stories260K is not there")
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_llama_cpp_tells_the_published_story(llama_cpp, tmp_path, kind):
    export.main([str(PUBLISHED / "stories260K.bin"), f"--gguf={tmp_path / 'm.gguf'}", f"--gguf_type={kind}",
                 "--tokenizer", str(PUBLISHED / "tok512.bin")])
    llama = open_llama(llama_cpp, tmp_path / "m.gguf", 512)
    model, tokenizer = load_model(PUBLISHED / "stories260K.bin"), open_tokenizer(PUBLISHED / "tok512.bin", 512)
    n = 200 if kind == "f32" else 40  # rounded weights tell their own story after a while
    ids = continued(llama, [BOS], n)
    assert len(ids) >= n
    assert ids == greedy(model, n)[: len(ids)]
    assert (PUBLISHED / "greedy.txt").read_text().startswith(tokenizer.decode(ids[1:])[: 400 if kind == "f32" else 80])
