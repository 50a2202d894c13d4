"""The model in models/: its files fit each other and their config, and run writes stories with them."""

import json
import subprocess

import pytest
import torch
from conftest import ROOT, SHARED

import tinystories
import train
from configurator import configure
from formats.checkpoint import find_tokenizer, load_model, read_checkpoint
from settings import Settings, shape_of

MODELS = ROOT / "models"
MODEL, HEADS = MODELS / "stories260k.bin", MODELS / "stories260k.heads.bin"
STORIES = SHARED / "tinystories" / "TinyStories-valid.txt"


def story(run, *words) -> str:
    command = [run, MODEL, "-t", "0", "-n", "200", "-i", "Once upon a time", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_it_has_the_shape_of_its_config():
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    of_config, found = shape_of(configure(Settings, [str(MODELS / "stories260k.py")])), load_model(MODEL).args
    assert [getattr(found, name) for name in names] == [getattr(of_config, name) for name in names]


def test_run_writes_a_story_of_words_with_heads_as_without(build):
    run = build("plain")
    text = story(run)
    assert text.startswith("Once upon a time, there was a") and len(text.split()) > 80
    assert story(run, "-d", str(HEADS)) == text


def test_pytorch_writes_the_same(build):
    model, tokenizer = load_model(MODEL), find_tokenizer(MODEL, read_checkpoint(MODEL), 512)
    ids = [tokenizer.bos, *tokenizer.encode("Once upon a time")]
    with torch.no_grad():
        for _ in range(40):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert story(build("plain")).startswith(tokenizer.decode(ids))


@pytest.mark.skipif(not STORIES.exists(), reason="the real stories are not there")
def test_its_loss_is_that_of_its_log(tmp_path, capsys):
    """On the stories that its run was validated on, with its vocabulary."""
    lines = [json.loads(line) for line in (MODELS / "stories260k.jsonl").read_text().splitlines()]
    evaluations = [line["val/ntp"] for line in lines if "val/ntp" in line]
    folder = tmp_path / "tinystories"
    folder.mkdir()
    for split in ("train", "val"):  # of the former nothing is used
        (folder / f"{split}.txt").write_text(STORIES.read_text())
    tinystories.main(["train_vocab", f"--from={MODELS / 'tokenizer.bin'}", "--dataset=tinystories",
                      f"--data_dir={tmp_path}"])
    tinystories.main(["pretokenize", "--dataset=tinystories", "--vocab_size=512", f"--data_dir={tmp_path}"])
    capsys.readouterr()
    config = str(MODELS / "stories260k.py")
    assert train.main([config, f"--init_from={MODEL}", "--eval_only", f"--data_dir={tmp_path}", "--n_future_heads=0",
                       "--nitp_weight=0", f"--out_dir={tmp_path / 'out'}"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    assert float(printed["val/ntp"]) == pytest.approx(min(evaluations), abs=2e-3)
