"""Hugging Face folders against their real reader, transformers; and broken folders."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from test_export import random_model, save

import export
from formats import huggingface
from formats.checkpoint import find_tokenizer, load_model, read_checkpoint
from formats.huggingface import halves, neighbours, write_folder
from text import toystories
from text.tokenizer import BOS, EOS, ByteTokenizer, load_tokenizer, open_tokenizer, write_bin

os.environ["HF_HUB_OFFLINE"] = "1"
PUBLISHED = SHARED / "stories260K"
TEXTS = ["Once upon a time", "", " ", "  two  spaces and a  tab\t.\n\nA line. ", "naïve 漢字 😀 \x7f", "▁x",
         "1234567890", 'She said, "Look!" and ran.'] + [s for s, _ in zip(toystories.stories("val", 40), range(40))]


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def worst(model, theirs) -> float:
    x = torch.randint(0, model.args.vocab_size, (2, min(60, model.args.max_seq_len)))
    with torch.no_grad():
        return (model(x) - theirs(x).logits).abs().max().item()


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"tie_embeddings": False},
                                     {"n_kv_heads": 4, "tie_embeddings": False}, {"norm_eps": 1e-3},
                                     {"recurrence": 3, "prelude_layers": 1, "coda_layers": 0}, {"n_future_heads": 2}])
def test_transformers_has_the_same_logits(transformers, tmp_path, changes):
    model = random_model(**changes)
    write_folder(model, None, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert worst(model, theirs) < 1e-4
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in {*model.as_llama()[1].values()}) + (
        model.args.recurrence - 1) * sum(p.numel() for layer in model.layers[1:] for p in layer.parameters())


@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_the_same_logits_after_training(transformers, tmp_path, words, n_kv_heads):
    """Weights that differ between directions, as trained ones do, so a wrong order of rows shows."""
    import train

    train.main(words(max_iters=20, n_kv_heads=n_kv_heads, n_future_heads=1, nitp_weight=0.5))
    export.main([str(tmp_path / "out" / "ckpt.pt"), f"--hf={tmp_path / 'hf'}"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert worst(load_model(tmp_path / "out" / "ckpt.pt"), theirs) < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    asked = tokenizer("Once upon a time", return_tensors="pt")
    told = theirs.generate(**asked, max_new_tokens=8, do_sample=False)[0].tolist()
    assert told[0] == BOS and len(told) > asked["input_ids"].shape[1]


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published stories260K is not there")
def test_the_published_model_tells_the_published_story(transformers, tmp_path):
    export.main([str(PUBLISHED / "stories260K.bin"), f"--hf={tmp_path}", "--tokenizer", str(PUBLISHED / "tok512.bin")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert worst(load_model(PUBLISHED / "stories260K.bin"), theirs) < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = tokenizer("Once upon a time", return_tensors="pt")
    told = theirs.generate(**asked, max_new_tokens=200, do_sample=False)[0]
    story = (PUBLISHED / "greedy.txt").read_text()
    assert tokenizer.decode(told, skip_special_tokens=True)[:400] == story[:400]


@pytest.mark.parametrize("vocab_size", [512, 259])
def test_the_tokenizer_makes_the_same_tokens_and_texts(transformers, data_dir, tmp_path, vocab_size):
    ours = load_tokenizer(data_dir / "toy" / f"tok{vocab_size}", vocab_size)
    write_folder(random_model(vocab_size=vocab_size), ours, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (BOS, EOS, vocab_size)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [BOS, *ids], text
        assert theirs.decode([BOS, *ids, EOS], skip_special_tokens=True) == ours.decode(ids), text
    back = find_tokenizer(tmp_path, {}, vocab_size)
    assert [back.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_merges_go_by_score_whatever_the_ids(transformers, data_dir, tmp_path):
    """Our vocabularies are numbered by score; others need not be."""
    pieces = list(load_tokenizer(data_dir / "toy" / "tok512", 512).pieces())
    mixed = pieces[:259] + pieces[259:][::-1]
    content = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in mixed)
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 99) + content)
    ours = open_tokenizer(tmp_path / "tokenizer.bin", 512)
    write_folder(random_model(), ours, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [BOS, *ours.encode(text)], text


def test_a_tokenizer_bin_is_as_good_as_its_source(data_dir, tmp_path):
    ours = load_tokenizer(data_dir / "toy" / "tok512", 512)
    write_bin(ours, tmp_path / "tokenizer.bin")
    read = open_tokenizer(tmp_path / "tokenizer.bin", 512)
    assert list(read.pieces()) == list(ours.pieces())
    for text in TEXTS:
        ids = ours.encode(text)
        assert read.encode(text) == ids and read.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4, "tie_embeddings": False}])
def test_what_transformers_writes_is_read(transformers, tmp_path, changes):
    """In one file and in several, in float32 and bfloat16, and back to the same bytes."""
    model = random_model(**changes)
    write_folder(model, None, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for name in ("ours", "theirs", "parts"):
        back = load_model(tmp_path / name)
        assert back.args == model.args, name
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True)), name
    theirs.bfloat16().save_pretrained(tmp_path / "half")
    half = load_model(tmp_path / "half")
    assert half.norm.weight.dtype == torch.float32
    assert torch.equal(half.layers[1].attention.wq.weight, model.layers[1].attention.wq.weight.bfloat16().float())


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
         "bos_token_id": 1,
         "eos_token_id": 2, "tie_word_embeddings": True}
TODAYS = [{"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, {"rope_parameters": LINEAR},
          {"rope_parameters": LLAMA3}, {"head_dim": 24}, {"rms_norm_eps": 1e-3}, {"tie_word_embeddings": False},
          {"num_key_value_heads": 4}, {"bos_token_id": 298, "eos_token_id": [299, 297]},
          {"rope_parameters": LLAMA3, "head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False}]


def their_model(transformers, folder: Path, dtype=torch.float32, shards: bool = False, **changes) -> Path:
    """A folder as transformers writes it, of a random Llama with lively weights."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | changes))
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(5.0).add_(torch.randn_like(p) * 0.02)
    theirs.to(dtype).save_pretrained(folder, **{"max_shard_size": "30KB"} if shards else {})
    return folder


def opened(folder: Path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", TODAYS)
def test_todays_llamas_go_in_and_come_out(transformers, tmp_path, changes, dtype):
    """With the logits that transformers has, and out again with the same ones, and the same config."""
    folder = their_model(transformers, tmp_path / "theirs", dtype, shards=dtype != torch.float32, **changes)
    theirs, ours = opened(folder), load_model(folder)
    assert worst(ours, theirs) < 1e-4
    export.main([str(folder), f"--hf={tmp_path / 'ours'}"])
    back = opened(tmp_path / "ours")
    assert worst(ours, back) < 1e-4
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), back.parameters(), strict=True))
    for key in (*SMALL, "head_dim", "rope_parameters"):
        assert getattr(back.config, key) == getattr(theirs.config, key), key
    assert load_model(tmp_path / "ours").args == ours.args


@pytest.mark.parametrize("rope", [{"rope_theta": 500000, "rope_scaling": {k: v for k, v in LLAMA3.items()
                                                                          if k != "rope_theta"}},
                                  {"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_theta": 2e6}])
def test_configs_of_older_versions_and_with_a_byte_order_mark(transformers, tmp_path, rope):
    folder = their_model(transformers, tmp_path / "hf")
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps(config | rope))
    theirs = opened(folder)
    (folder / "config.json").write_text(json.dumps(config | rope), encoding="utf-8-sig")
    assert worst(load_model(folder), theirs) < 1e-4


def test_formats_that_cannot_say_it_name_the_field(transformers, tmp_path):
    for changes, field in ((TODAYS[0], "rope_theta"), (TODAYS[1], "rope_scaling"), (TODAYS[3], "head_dim"),
                           (TODAYS[4], "norm_eps")):
        folder = their_model(transformers, tmp_path / field, **changes)
        for version in (0, 1, 2):
            with pytest.raises(ValueError, match=f"m.bin: this format cannot say {field}: .* --hf or --gguf"):
                export.main([str(folder), str(tmp_path / "m.bin"), f"--version={version}"])
    assert not (tmp_path / "m.bin").exists()


def test_a_head_that_the_config_contradicts_is_refused_and_an_equal_one_is_fine(transformers, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = their_model(transformers, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    assert load_model(folder).args.tie_embeddings
    head[299, 31] += 0.5  # the last number
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "lm_head.weight: expected the numbers of model.embed_tokens.weight", "tie_word_embeddings")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert worst(load_model(folder), opened(folder)) < 1e-4
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": 1e4 ** -(torch.arange(0, 8, 2) / 8)}
    save_file(weights | {"lm_head.weight": head} | frequencies, folder / "model.safetensors", {"format": "pt"})
    load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False, "rope_parameters": TODAYS[0][
        "rope_parameters"]}))
    refused(folder, "inv_freq: expected the frequencies of rope_theta=500000.0")


def test_a_tensor_is_copied_in_parts(transformers, tmp_path, monkeypatch):
    """So no tensor is in memory twice; whole heads at a time, whose rows change places."""
    folder = their_model(transformers, tmp_path / "hf", head_dim=24)
    whole = load_model(folder)
    monkeypatch.setattr(huggingface, "AT_ONCE", 1)
    stored = huggingface.read_folder(folder)["model"]
    assert len(list(stored["layers.0.attention.wq.weight"].parts())) == 4
    assert len(list(stored["tok_embeddings.weight"].parts())) == 300
    for a, b in zip(whole.parameters(), load_model(folder).parameters(), strict=True):
        assert torch.equal(a, b)


def test_rows_are_turned_by_halves_of_each_head():
    w = torch.arange(8.0)[:, None]  # two heads of four
    assert halves(w, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(neighbours(halves(w, 2), 2), w)


def test_training_starts_from_a_folder_and_from_a_model_bin(tmp_path, words, capsys):
    import train

    model = random_model(dim=16, n_layers=2, max_seq_len=32)
    write_folder(model, None, tmp_path / "hf")
    export.write_trunk(model, tmp_path / "m.bin")
    for start in ("hf", "m.bin"):
        train.main(words(init_from=tmp_path / start, out_dir=tmp_path / f"out_{start}", max_iters=1, learning_rate=1e-9,
                         n_future_heads=1, nitp_weight=0.1, n_layers=3))
        assert "n_layers=2, from" in capsys.readouterr().err
        back = load_model(tmp_path / f"out_{start}" / "last.pt")
        assert torch.allclose(back.norm.weight, model.norm.weight, atol=1e-6) and back.args.n_future_heads == 1


# ---------------------------------------------------------------------------------------------
# folders that are not what they say

@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder(random_model(), None, tmp_path / "hf")
    return tmp_path / "hf"


def refused(folder: Path, *says: str) -> None:
    with pytest.raises(ValueError, match="hf") as caught:
        read_checkpoint(folder)
    assert all(word in str(caught.value) for word in says), caught.value


@pytest.mark.parametrize("key,value,says", [
    ("model_type", "gpt2", "expected llama, found 'gpt2'"), ("model_type", None, "model_type"),
    ("hidden_size", None, "hidden_size"), ("hidden_size", "64", "hidden_size: expected a number"),
    ("num_hidden_layers", 10**9, "num_hidden_layers"), ("num_hidden_layers", 4, "has no tensor model.layers.3."),
    ("num_hidden_layers", 1 << 20, "num_hidden_layers"), ("num_hidden_layers", 2, "model.layers.2."),
    ("num_key_value_heads", 3, "n_kv_heads=3"), ("vocab_size", 500, "(500, 32)"),
    ("vocab_size", True, "vocab_size"), ("rope_theta", "5e5", "rope_theta: expected a number above 0, found '5e5'"),
    ("rope_theta", 0, "rope_theta"), ("rope_theta", 10**400, "rope_theta"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "llama3: expected low_freq_factor, found"),
    ("rope_scaling", 3, "rope_scaling"), ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "found 'dynamic'"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 5e5}, "rope_parameters: expected"),
    ("rope_parameters", {"rope_type": ["linear"]}, "rope_parameters: expected"),
    ("rope_scaling", {"type": "linear", "factor": 0.5}, "rope_factor=0.5"),
    ("head_dim", 16, "q_proj.weight: expected shape (64, 32)"), ("head_dim", 7, "head_dim=7"),
    ("head_dim", "8", "head_dim"),
    ("num_key_value_heads", None, "(16, 32)"), ("bos_token_id", "<s>", "bos_token_id: expected a token id"),
    ("eos_token_id", [2, "x"], "eos_token_id"), ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("quantization_config", {"bits": 4}, "quantization_config"),
    ("hidden_act", "gelu", "hidden_act"), ("attention_bias", True, "attention_bias"),
    ("mlp_bias", True, "mlp_bias"), ("rms_norm_eps", "x", "rms_norm_eps"), ("rms_norm_eps", 1, "rms_norm_eps"),
    ("tie_word_embeddings", False, "has no tensor lm_head.weight"), ("tie_word_embeddings", 1, "tie_word_embeddings")])
def test_configs_of_other_models_are_refused_by_key(folder, key, value, says):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    refused(folder, says)


def test_broken_folders_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    whole, config = path.read_bytes(), (folder / "config.json").read_text()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(folder, "model.safetensors: not safetensors, or broken")
    path.write_bytes(b"\xff" * 8 + whole[8:])  # a header longer than the file
    refused(folder, "broken")
    save_file(weights | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 16)}, path)
    refused(folder, "model.layers.0.self_attn.q_proj.weight: expected shape (32, 32)", "found (32, 16)")
    for dtype, name in ((torch.int64, "I64"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file(weights | {"model.norm.weight": torch.zeros(32, dtype=dtype)}, path)
        refused(folder, "model.norm.weight: expected shape (32,) of F64, F32, F16, BF16", name)
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, path)
    refused(folder, "unexpected tensor model.layers.0.self_attn.q_proj.bias")
    path.unlink()
    refused(folder, "no such file")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(folder, "pickles are not read")
    for index in ('{"weight_map": {"x": "../../secret"}}', '{"weight_map": 3}', "[]", "{",
                  '{"weight_map": {"x": "gone"}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        refused(folder, "hf")
    for broken in ("", "[1]", "{", config[:-9], "[" * 100_000):
        (folder / "config.json").write_text(broken)
        refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "config.json: cannot read", "a Hugging Face folder has one")


def test_without_safetensors_the_install_line_is_told(folder, monkeypatch, tmp_path):
    import sys

    for name in [m for m in sys.modules if m.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = save(random_model(), tmp_path / "ckpt.pt")
    for use in (lambda: read_checkpoint(folder), lambda: write_folder(random_model(), None, tmp_path / "new"),
                lambda: export.main([str(path), str(tmp_path / "new" / "m.bin"), f"--hf={tmp_path / 'hf2'}"])):
        with pytest.raises(ValueError, match="pip install -r requirements-export.txt"):
            use()
    assert not (tmp_path / "new").exists()


def test_a_folder_is_not_written_over_its_own_source(folder, tmp_path):
    with pytest.raises(ValueError, match="different"):
        export.main([str(folder), f"--hf={folder}"])
    assert huggingface.read_config(folder / "config.json").dim == 32


def test_the_folder_of_a_run_is_told_from_one_of_hugging_face(tmp_path):
    save(random_model(), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="a folder of a run; give the file: .*ckpt.pt"):
        read_checkpoint(tmp_path)


def test_a_folder_of_ours_gives_way_whole(data_dir, tmp_path):
    """No file of the previous model stays: its vocabulary would not fit."""
    folder = tmp_path / "hf"
    write_folder(random_model(), load_tokenizer(data_dir / "toy" / "tok512", 512), folder)
    assert (folder / "tokenizer.model").exists()
    write_folder(random_model(vocab_size=259), ByteTokenizer(), folder)
    assert not (folder / "tokenizer.model").exists() and (folder / "tokenizer.json").exists()
    write_folder(random_model(), None, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    (folder / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="cannot write .*hf: it holds other files: README.md"):
        write_folder(random_model(), None, folder)


def test_a_tensor_is_taken_from_the_file_that_the_index_names(folder):
    from safetensors.torch import load_file, save_file

    weights, before = load_file(folder / "model.safetensors"), load_model(folder)
    save_file(weights, folder / "a.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, folder / "b.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        name: "b.safetensors" if name == "model.norm.weight" else "a.safetensors" for name in weights}}))
    after = load_model(folder)
    assert torch.equal(after.norm.weight, before.norm.weight + 1)
    assert torch.equal(after.tok_embeddings.weight, before.tok_embeddings.weight)


def test_training_on_from_another_vocabulary_is_told(data_dir, tmp_path, words, capsys):
    import train

    ours = load_tokenizer(data_dir / "toy" / "tok512", 512)
    pieces = list(ours.pieces())
    model = random_model(dim=16, n_layers=2, max_seq_len=32)
    for name, mixed in (("same", pieces), ("other", pieces[:259] + pieces[259:][::-1])):
        export.write_trunk(model, tmp_path / name / "m.bin")
        (tmp_path / name / "tokenizer.bin").write_bytes(struct.pack("<i", 9) + b"".join(
            struct.pack("<fi", score, len(piece)) + piece for piece, score in mixed))
        train.main(words(init_from=tmp_path / name / "m.bin", out_dir=tmp_path / f"out_{name}", max_iters=1))
        assert ("its 512 tokens are not those of" in capsys.readouterr().err) == (name == "other")
