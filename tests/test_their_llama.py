"""Somebody's Llama goes in, gets heads, and comes out as the model that transformers has."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_huggingface import opened, worst
from test_tokenizer_json import write_json_vocabulary

import export
import sample
import tinystories
import train
from formats.checkpoint import load_model, read_checkpoint
from formats.gguf import LLAMA3_SPLIT
from text import toystories
from text.tokenizer import open_tokenizer
from text.tokenizer_json import JsonTokenizer

V = 2000


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A random one in the shape of Llama 3.2: theta, scaling, heads of another size, GQA, tied, bfloat16, and a
    vocabulary of 2,000 tokens whose special ones are the last.
    """
    import transformers

    folder = tmp_path_factory.mktemp("theirs") / "Llama-3.2-tiny"
    write_json_vocabulary(folder, V, LLAMA3_SPLIT)
    tokenizer = JsonTokenizer(folder, V)
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=rope, bos_token_id=tokenizer.bos, eos_token_id=[*tokenizer.ends, tokenizer.ends[0] + 1]))
    theirs.bfloat16().save_pretrained(folder)
    return folder


def examples(split: str, n: int) -> list[tuple[str, str]]:
    """A story's first sentence as the prompt, the rest as the answer."""
    return [tuple(story.split(". ", 1)) for story in toystories.stories(split, n)]


@pytest.fixture(scope="module")
def data(llama, tmp_path_factory) -> Path:
    """Prompts and answers in its tokens."""
    folder = tmp_path_factory.mktemp("their_data")
    for split, n in (("train", 200), ("val", 40)):
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in examples(split, n)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    tinystories.main(["local", str(folder / "train.jsonl"), f"--val={folder / 'val.jsonl'}", f"--data_dir={folder}",
                      "--dataset=qa", f"--from={llama}"])
    return folder


def words(llama: Path, data: Path, out: Path, **changes) -> list[str]:
    settings = {"init_from": llama, "data_dir": data, "dataset": "qa", "vocab_size": V, "out_dir": out,
                "max_seq_len": 64, "batch_size": 2, "n_future_heads": 4, "head": "block", "head_init": "last_block",
                "head_input": "before_last", "nitp_weight": 1.0, "aux_grad_scale": 0.1, "freeze_trunk_iters": 5,
                "freeze_embeddings": True, "mask_document_ends": True, "learning_rate": 1e-3, "warmup_iters": 0,
                "max_iters": 20, "eval_interval": 10, "eval_iters": 1, "device": "cpu"} | changes
    return [f"--{key}={value}" for key, value in settings.items()]


def test_tokens_of_the_data_are_those_of_transformers(llama, data):
    """Prompt and answer are encoded apart; BOS before, EOS behind; the mask is 1 on the answer and its EOS."""
    from transformers import AutoTokenizer

    theirs, folder = AutoTokenizer.from_pretrained(llama), data / "qa" / f"tok{V}"
    expected, mask = [], []
    for prompt, answer in examples("val", 40):
        given = theirs(prompt)["input_ids"]
        wanted = [*theirs(answer, add_special_tokens=False)["input_ids"], theirs.eos_token_id]
        expected += given + wanted
        mask += [0] * len(given) + [1] * len(wanted)
    assert np.fromfile(folder / "val.bin", np.uint16).tolist() == expected
    assert (np.fromfile(folder / "val.mask.bin", np.uint8) & tinystories.ANSWER).tolist() == mask
    assert not (folder / "tokenizer.bin").exists() and (folder / "tokenizer.json").exists()


def test_a_llama_goes_in_gets_heads_and_comes_out(llama, data, tmp_path, capsys):
    from transformers import AutoTokenizer

    assert train.main(words(llama, data, tmp_path / "out")) == 0
    said = capsys.readouterr().err
    assert "rope_theta=500000.0, from" in said and "head_dim=16, from" in said and "not those of" not in said
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    first, last = (line for line in (log[1], log[-1]))
    assert all(last[f"val/nitp_{i}"] < first[f"val/nitp_{i}"] for i in (1, 2, 3, 4))
    assert last["val/ntp"] < first["val/ntp"] and last["val/bits_per_byte"] > 0
    before, after = load_model(llama), load_model(tmp_path / "out" / "last.pt")
    assert torch.equal(before.tok_embeddings.weight, after.tok_embeddings.weight)
    assert not torch.equal(before.layers[0].attention.wq.weight, after.layers[0].attention.wq.weight)

    # a folder: logits, tokens and what it says of itself
    export.main([str(tmp_path / "out" / "last.pt"), f"--hf={tmp_path / 'hf'}"])
    theirs, tokenizer = opened(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert worst(after, theirs) < 1e-4
    origin = json.loads((llama / "config.json").read_text())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "head_dim", "tie_word_embeddings", "vocab_size"):
        assert config[key] == origin[key], key
    assert theirs.config.rope_parameters == origin["rope_parameters"]
    asked = tokenizer("Once upon a time", return_tensors="pt")
    ids = theirs.generate(**asked, max_new_tokens=20, do_sample=False)[0].tolist()
    ours = open_tokenizer(tmp_path / "hf", V)
    prompt = sample.encode_prompt(ours, "Once upon a time", 64)
    ends = (ours.bos, *ours.ends)
    continued = list(sample.generate(after, prompt, 20, sample.picker(0.0, 0, 1.0, 0), 4, 1, None, ends))
    assert prompt == asked["input_ids"][0].tolist() and ids[: len(prompt) + len(continued)] == prompt + continued

    # llama.cpp's file holds it; llama2.c's names the field that it has no place for
    export.main([str(tmp_path / "out" / "last.pt"), f"--gguf={tmp_path / 'm.gguf'}", "--gguf_type=f32"])
    with pytest.raises(ValueError, match="this format cannot say (rope_theta|head_dim)"):
        export.main([str(tmp_path / "out" / "last.pt"), str(tmp_path / "m.bin")])


def test_a_run_on_their_llama_is_resumed_without_naming_its_shape(llama, data, tmp_path):
    for out, stops in (("whole", [20]), ("parts", [10, 20])):
        for n, max_iters in enumerate(stops):
            changes = {"max_iters": max_iters, "lr_schedule": "constant"} | ({"init_from": "resume"} if n else {})
            assert train.main(words(llama, data, tmp_path / out, **changes)) == 0
    whole, parts = (load_model(tmp_path / out / "last.pt") for out in ("whole", "parts"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_trunk_in_bfloat16_stays_so_and_a_frozen_one_has_no_state(llama, data, tmp_path):
    flags = {"param_dtype": "bfloat16", "dtype": "bfloat16", "freeze_trunk_iters": -1, "max_iters": 2}
    assert train.main(words(llama, data, tmp_path / "out", **flags)) == 0
    checkpoint = read_checkpoint(tmp_path / "out" / "last.pt")
    heads = [w for name, w in checkpoint["model"].items() if name.startswith("future_heads.")]
    assert len(checkpoint["optimizer"]["state"]) == len(heads) and all(w.dtype == torch.float32 for w in heads)
    source, state = load_model(llama), checkpoint["model"]
    for name, w in source.state_dict().items():
        assert torch.equal(state[name].float(), w), name
        assert state[name].dtype == (torch.bfloat16 if w.dim() == 2 else torch.float32)
    export.main([str(tmp_path / "out" / "last.pt"), f"--hf={tmp_path / 'hf'}"])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert worst(source, opened(tmp_path / "hf")) < 1e-4
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size < 1.1 * (llama / "model.safetensors").stat().st_size
    assert train.main(words(llama, data, tmp_path / "other", **flags | {"dtype": "float32"})) == 1
