"""Whole runs of a tiny model: what is logged and saved, resuming bit for bit, stopping, refusing."""

import html
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, start

import export
import synthetic
import train
from configurator import configure
from losses import Objective, all_losses
from model import FUTURE_HEADS, ModelArgs, Transformer
from model import HEADS as HEAD_NAMES
from settings import Settings, check
from study.runs import leveldb_records
from system.lock import hold
from text.tokenizer import BOS, load_tokenizer
from tinystories import Windows
from train import learning_rate

HEADS = {"n_future_heads": 2, "nitp_weight": 0.3, "consistency_weight": 0.1}
GUESSES = {f"val/{n}" for n in ("acc_0", "acc_1", "acc_2", "agree_1", "agree_2", "kl_1", "kl_2", "bits_per_byte")}
AT_EVALUATIONS = GUESSES | {"peak_mib", "sample"}


def run(argv: list[str]) -> None:
    assert train.main(argv) == 0


def weights(folder, name="last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)["model"]


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_lines(folder, headers: bool = False) -> list[dict]:
    """The lines of a log with figures, or those with settings."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if ("config" in line) == headers]


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "tok_per_s", "peak_mib")}
            for line in lines]


# ---------------------------------------------------------------------------------------------
# what a run writes


def test_log_and_checkpoints_of_a_run(words, tmp_path, capsys):
    run(words(**HEADS))
    lines = log_lines(tmp_path / "out")
    assert [line["iter"] for line in lines] == list(range(9))
    always = {"iter", "tokens", "seconds"}
    losses = {"ntp", "nitp_1", "nitp_2", "consistency_1", "consistency_2"}
    step = {"lr", "tok_per_s", "grad_norm", "train/total"} | {f"train/{n}" for n in losses} | {
        f"weight/{n}" for n in losses - {"ntp"}}
    val = {f"val/{n}" for n in losses} | AT_EVALUATIONS
    for line in lines:
        evaluated, stepped = line["iter"] in (0, 4, 8), line["iter"] < 8
        assert set(line) == always | (step if stepped else set()) | (val if evaluated else set()), line["iter"]
        assert all(math.isfinite(v) for k, v in line.items() if k != "sample")
    assert lines[8]["tokens"] == 8 * 4 * 32 and lines[0]["tokens"] == 0
    first = lines[0]
    total = first["train/ntp"] + sum(first[f"weight/{n}"] * first[f"train/{n}"] for n in losses - {"ntp"})
    assert first["train/total"] == pytest.approx(total)
    assert first["weight/nitp_1"] == 0.3 and first["weight/consistency_2"] == 0.1
    assert first["val/ntp"] == pytest.approx(math.log(512), abs=0.1)
    assert lines[8]["val/ntp"] < first["val/ntp"] - 0.2  # it learns

    checkpoint = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_ntp", "config", "rng"} <= set(checkpoint)
    assert checkpoint["iter_num"] == 8 and checkpoint["best_val_ntp"] == lines[8]["val/ntp"]
    assert checkpoint["config"]["nitp_weight"] == 0.3 and checkpoint["model_args"]["n_future_heads"] == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"last.pt", "ckpt.pt", "log.jsonl"}
    printed = capsys.readouterr().out
    assert "14,032 in trunk" in printed and "16,384 in 2 future heads" in printed and "128 a step" in printed


def test_lines_on_the_terminal_fit_100_columns(words, capsys):
    run(words(n_future_heads=8, nitp_weight=0.3, consistency_weight=0.1))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iter ")]
    assert len(lines) == 8 + 3 and all(len(line) <= 100 for line in lines)
    assert all("ntp" in line and "nitp_1" in line and "nitp_2" not in line for line in lines)
    assert all(f"  {name} " in lines[0] for name in ("ntp", "bits_per_byte", "acc_0", "nitp_1", "acc_1"))
    s = Settings(max_iters=1_000_000)
    step = {"iter": 900_000, "train/ntp": 10.12345, "train/consistency_1": 1.12345, "tok_per_s": 1_234_567.0}
    assert len(train.show_step(step, s, 1.0)) <= 100 and "27:46:40 left" in train.show_step(step, s, 1.0)
    answers = {f"exact_in_{i}": 0.5 for i in range(9)}
    shown = train.show_evaluation(900_000, s, {"ntp": 1.0, "acc_0": 0.5} | answers)
    assert len(shown) <= 100 and "exact_in_1 0.5000" in shown


def test_a_finished_run_says_so_also_when_resumed(words, capsys):
    for init_from in ("scratch", "resume"):
        run(words(max_iters=2, init_from=init_from))
        assert "complete at 2; raise --max_iters to go on" in capsys.readouterr().err


def test_the_log_says_how_a_run_was_made_and_how_it_went_on(words, tmp_path, data_dir):
    run(words(max_iters=8))
    (header,) = log_lines(tmp_path / "out", headers=True)
    assert header["iter"] == 0 and header["config"] == asdict(configure(Settings, words(max_iters=8)))
    facts, folder = header["facts"], data_dir / "toy" / "tok512"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None  # macOS has none
    assert facts["path"] == "fast" and facts["threads"] == 1 and facts["cores"] == cores
    assert facts["train_tokens"] == (folder / "train.bin").stat().st_size // 2 and facts["val_tokens"] == 32 * 32
    assert facts["vocabulary_crc32"] == f"{zlib.crc32((folder / 'tokenizer.bin').read_bytes()):08x}"
    if sys.platform == "linux":  # elsewhere memory is unknown, and 0
        assert all(line["peak_mib"] > 50 for line in log_lines(tmp_path / "out") if "val/ntp" in line)
    run([*words(max_iters=8, path="plain", eval_iters=2), "--init_from=resume"])
    first, second = log_lines(tmp_path / "out", headers=True)
    assert first == header and second["iter"] == 8 and second["facts"]["path"] == "plain"
    assert second["facts"]["val_crc32"] != facts["val_crc32"] and second["facts"]["torch"] == torch.__version__


def test_a_part_of_the_training_tokens_is_gone_over_again_and_again(words, tmp_path, capsys):
    run(words(train_fraction=0.1))
    (header,) = log_lines(tmp_path / "out", headers=True)
    whole = Windows(header["config"]["data_dir"] / train.Path("toy/tok512/train.bin"), 512, 32)
    assert header["facts"]["train_tokens"] == int(len(whole.tokens) * 0.1)
    epochs = 8 * 4 / ((header["facts"]["train_tokens"] - 1) // 32)
    assert f"{epochs:.2f} epochs" in capsys.readouterr().out
    assert train.main(words(out_dir=tmp_path / "none", train_fraction=0.0001)) == 1
    assert "train.bin: 0.0001 of it has" in capsys.readouterr().err


def test_the_best_checkpoint_is_chosen_by_validation_ntp(words, tmp_path, monkeypatch):
    """Not by the total: ntp is best at iteration 4, everything else at 8."""
    values = iter([{"ntp": 3.0, "nitp_1": 9.0}, {"ntp": 1.0, "nitp_1": 9.0}, {"ntp": 2.0, "nitp_1": 0.0}])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(values))
    run(words(**HEADS))
    best, last = (torch.load(tmp_path / "out" / name, weights_only=True) for name in ("ckpt.pt", "last.pt"))
    assert best["iter_num"] == 4 and last["iter_num"] == 8 and last["best_val_ntp"] == 1.0


def test_same_seed_same_numbers_other_seed_other_numbers(words, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(words(out_dir=tmp_path / out, seed=seed))
    a, b, c = (without_times(log_lines(tmp_path / out)) for out in "abc")
    assert a == b and a != c
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_evaluation_is_on_the_same_batches_whatever_the_run(words, tmp_path):
    """One set of weights, other batch size, seed and objective: the same validation loss."""
    run(words())
    shown = []
    for changes in ({}, {"batch_size": 7, "seed": 9, "gradient_accumulation_steps": 2}, HEADS):
        common = {"init_from": tmp_path / "out/last.pt", "out_dir": tmp_path / "x", "max_iters": 1, "warmup_iters": 0}
        run(words(**common, **changes))
        shown.append(log_lines(tmp_path / "x")[0]["val/ntp"])
        for file in (tmp_path / "x").iterdir():
            file.unlink()
    assert shown[0] == shown[1] == shown[2] == log_lines(tmp_path / "out")[-1]["val/ntp"]


def test_a_weight_of_zero_leaves_the_trunk_as_if_there_were_no_head(words, tmp_path):
    run(words(out_dir=tmp_path / "base"))
    run(words(out_dir=tmp_path / "idle", n_future_heads=2))
    run(words(out_dir=tmp_path / "active", n_future_heads=2, nitp_weight=0.5))
    base, idle, active = (weights(tmp_path / out) for out in ("base", "idle", "active"))
    assert all(torch.equal(w, idle[name]) for name, w in base.items())
    assert not torch.equal(base["norm.weight"], active["norm.weight"])


def test_heads_are_trained_and_the_two_weights_are_two(words, tmp_path):
    for out, nitp, consistency in (("n", 0.3, 0.0), ("c", 0.0, 0.3), ("both", 0.3, 0.3)):
        run(words(out_dir=tmp_path / out, n_future_heads=1, nitp_weight=nitp, consistency_weight=consistency))
    still = {"max_iters": 1, "warmup_iters": 0, "learning_rate": 1e-9}
    run(words(out_dir=tmp_path / "start", n_future_heads=1, nitp_weight=0.3, **still))
    heads = [weights(tmp_path / out)["future_heads.0.weight"] for out in ("start", "n", "c", "both")]
    for i in range(4):
        for j in range(i):
            assert (heads[i] - heads[j]).abs().max() > 1e-4
    kinds = [{k for k in log_lines(tmp_path / out)[0] if k.startswith("train/")} for out in ("n", "c")]
    assert kinds == [{"train/ntp", "train/nitp_1", "train/total"}, {"train/ntp", "train/consistency_1", "train/total"}]


def test_a_schedule_that_ends_is_logged_and_then_free(words, tmp_path, monkeypatch):
    asked = []
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, x, targets, weights: (
        asked.append(tuple(targets)), forward(self, x, targets, weights))[1])
    run(words(**HEADS | {"consistency_weight": 0}, aux_schedule="linear", aux_end=0.5))
    assert [line["weight/nitp_1"] for line in log_lines(tmp_path / "out")[:-1]] == pytest.approx(
        [0.3, 0.225, 0.15, 0.075, 0, 0, 0, 0])
    assert asked == [("ntp", "nitp_1", "nitp_2")] * 4 + [("ntp",)] * 4


def test_gradient_accumulation_equals_one_big_batch(words, tmp_path):
    """Also with masked document ends, which leave micro-batches unequal numbers of targets."""
    common = HEADS | {"mask_document_ends": True, "max_seq_len": 64, "max_iters": 3, "dtype": "float32"}
    run(words(out_dir=tmp_path / "big", batch_size=8, **common))
    run(words(out_dir=tmp_path / "parts", batch_size=2, gradient_accumulation_steps=4, **common))
    big, parts = log_lines(tmp_path / "big"), log_lines(tmp_path / "parts")
    for a, b in zip(big, parts, strict=True):
        for key in a.keys() - {"sample", "seconds", "tok_per_s", "peak_mib"}:
            assert a[key] == pytest.approx(b[key], rel=2e-4), key


@pytest.mark.parametrize("dtype,path", [("bfloat16", "plain"), ("bfloat16", "fast"), ("float16", "plain")])
def test_half_precision_learns_the_same(words, tmp_path, dtype, path):
    run(words(out_dir=tmp_path / "full", dtype="float32", path="plain"))
    run(words(out_dir=tmp_path / "half", dtype=dtype, path=path))
    full, half = (log_lines(tmp_path / out)[-1]["val/ntp"] for out in ("full", "half"))
    assert half == pytest.approx(full, abs=0.05) and half != full
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "half").values())


def test_learning_rate():
    s = Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=4, max_iters=24)
    assert [learning_rate(s, it) for it in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert learning_rate(s, 4) == 1.0 and learning_rate(s, 14) == pytest.approx(0.55)
    assert learning_rate(s, 24) == pytest.approx(0.1)
    s.lr_schedule = "constant"
    assert learning_rate(s, 20) == 1.0
    s.lr_schedule, s.decay_fraction = "wsd", 0.25  # falls from 18 on
    assert [learning_rate(s, it) for it in (3, 4, 18, 20, 21, 24)] == pytest.approx([0.8, 1.0, 1.0, 0.7, 0.55, 0.1])
    s.decay_fraction = 1.0  # warm-up comes first
    assert [learning_rate(s, it) for it in (3, 4, 14, 24)] == pytest.approx([0.8, 1.0, 0.55, 0.1])


# ---------------------------------------------------------------------------------------------
# resuming and stopping


def states(checkpoint) -> list[dict]:
    """The state of each parameter, of one optimiser or of several."""
    optimizer = checkpoint["optimizer"]
    parts = [optimizer] if "state" in optimizer else optimizer.values()
    return [state for part in parts for state in part["state"].values()]


OTHERS = {"spelling_letters": 3, "spelling_weight": 0.2, "order_window": 4, "order_weight": 0.1}


@pytest.mark.parametrize("changes", [HEADS, {"dropout": 0.2}, {"dtype": "float16"}, HEADS | {"optimizer": "muon"},
                                     {"optimizer": "muon", "dtype": "float16"},
                                     OTHERS | {"soft_weight": 0.2, "soft_refresh": 3}, {"trunk": "rnn"}])
def test_resuming_is_never_having_stopped(words, tmp_path, changes):
    """2N steps = N steps + resume + N steps, to the bit: weights, optimizer and log."""
    common = changes | {"lr_schedule": "constant"}  # so that a run of 4 is the beginning of a run of 8
    run(words(out_dir=tmp_path / "whole", max_iters=8, **common))
    run(words(out_dir=tmp_path / "halves", max_iters=4, **common))
    run(words(out_dir=tmp_path / "halves", max_iters=8, init_from="resume", **common))
    whole, halves = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("whole", "halves"))
    assert same_weights(whole["model"], halves["model"])
    assert len(states(whole)) >= 10
    for a, b in zip(states(whole), states(halves), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert whole["best_val_ntp"] == halves["best_val_ntp"] and whole["tokens"] == halves["tokens"]
    assert without_times(log_lines(tmp_path / "whole")) == without_times(log_lines(tmp_path / "halves"))
    assert [line["seconds"] for line in log_lines(tmp_path / "halves")] == sorted(
        line["seconds"] for line in log_lines(tmp_path / "halves"))


def test_auto_starts_or_resumes_with_the_checkpoints_settings(words, tmp_path, capsys):
    run(words(init_from="auto", max_iters=4, lr_schedule="constant", **HEADS))
    capsys.readouterr()
    run([f"--out_dir={tmp_path}/out", "--init_from=auto", "--max_iters=8"])  # all else is in the checkpoint
    told = capsys.readouterr().err
    assert "without a config file: settings are those in" in told and "resuming with max_iters=8, was 4" in told
    run(words(out_dir=tmp_path / "whole", lr_schedule="constant", **HEADS))
    assert same_weights(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert without_times(log_lines(tmp_path / "out")) == without_times(log_lines(tmp_path / "whole"))
    first, second = (header["facts"] for header in log_lines(tmp_path / "out", headers=True))
    assert first["pid"] == second["pid"] == os.getpid() and first["started"] <= second["started"]
    assert first["host"] and "pytest" in first["command"] and {"commit", "dirty"} <= first.keys()


def test_a_rate_that_was_held_under_its_old_name_is_still_held(words, tmp_path, capsys):
    """decay_lr is lr_schedule by now: in checkpoints, and never silently on the command line."""
    run(words(max_iters=4, lr_schedule="constant"))
    last = tmp_path / "out" / "last.pt"
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["config"]["lr_schedule"], checkpoint["config"]["decay_fraction"]
    torch.save(checkpoint | {"config": checkpoint["config"] | {"decay_lr": False}}, last)
    run([f"--out_dir={tmp_path}/out", "--init_from=resume", "--max_iters=8"])
    assert log_lines(tmp_path / "out")[-2]["lr"] == 1e-2
    run(words(out_dir=tmp_path / "whole", lr_schedule="constant"))
    assert same_weights(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    torch.save(torch.load(last, weights_only=True) | {"config": checkpoint["config"] | {"decay_lr": False}}, last)
    capsys.readouterr()
    run(words(init_from="resume", max_iters=12, lr_schedule="cosine"))
    assert "resuming with lr_schedule=cosine, was constant" in capsys.readouterr().err
    assert train.main(words(out_dir=tmp_path / "new", decay_lr=False)) == 1
    assert "--decay_lr: no such setting; here it is lr_schedule" in capsys.readouterr().err


def test_ddp_looks_for_unused_parameters_only_where_a_head_has_no_loss():
    losses = all_losses(2, 3, True)
    objective = Objective(Transformer(ModelArgs(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64,
                                                max_seq_len=16, n_future_heads=2, spelling_letters=3,
                                                alphabet_size=30, order_window=4)))
    for missing, idle in ((None, False), ("nitp_1", False), ("spelling", True), ("order", True)):
        names = tuple(name for name in losses if missing is None or not name.startswith(missing))
        assert objective.has_idle_heads(names) == idle, missing
    assert objective.has_idle_heads(("ntp", "nitp_1", "consistency_1", "spelling_1", "order"))  # head 2
    assert objective.has_idle_heads(("superposition",))


def test_a_run_is_not_resumed_with_another_optimizer(words, tmp_path, capsys):
    run(words(max_iters=2))
    assert train.main(words(init_from="resume", max_iters=4, optimizer="muon")) == 1
    assert "last.pt: its optimizer" in capsys.readouterr().err


def wait_for(process, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}: {process.stderr.read()}")


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_ends(words, tmp_path, number, code):
    argv = words(max_iters=200, eval_interval=1000, **HEADS)
    process = start("train.py", *argv)
    wait_for(process, "iter 5/")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and "--init_from=resume" in error and "Traceback" not in error
    stopped_at = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["iter_num"]
    assert 5 < stopped_at < 200
    assert [line["iter"] for line in log_lines(tmp_path / "out")] == list(range(stopped_at))
    process = start("train.py", *argv, "--init_from=resume")
    process.communicate(timeout=120)
    whole = start("train.py", *argv, f"--out_dir={tmp_path}/whole")
    whole.communicate(timeout=120)
    assert process.returncode == whole.returncode == 0
    assert same_weights(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert without_times(log_lines(tmp_path / "out")) == without_times(log_lines(tmp_path / "whole"))


def test_killed_ten_times_and_resumed_equals_never_killed(words, tmp_path):
    argv = words(max_iters=400, eval_interval=3, log_interval=5, **HEADS)
    rng = random.Random(0)
    for attempt in range(10):
        have = (tmp_path / "out" / "last.pt").exists()
        process = start("train.py", *argv, f"--init_from={'resume' if have else 'scratch'}")
        for _ in range(rng.randint(1, 3)):  # of two, the first has been saved
            wait_for(process, "| val")
        time.sleep(rng.random() * 0.3)  # the whole run takes several seconds
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, attempt
    assert start("train.py", *argv, "--init_from=resume").wait(timeout=120) == 0
    assert start("train.py", *argv, f"--out_dir={tmp_path}/whole").wait(timeout=120) == 0
    assert same_weights(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert same_weights(weights(tmp_path / "out", "ckpt.pt"), weights(tmp_path / "whole", "ckpt.pt"))
    assert without_times(log_lines(tmp_path / "out")) == without_times(log_lines(tmp_path / "whole"))


def test_a_half_written_log_line_is_left_out_on_resume(words, tmp_path, capsys):
    run(words())
    log = tmp_path / "out" / "log.jsonl"
    log.write_text(log.read_text() + '{"iter": 9, "tok')
    run(words(init_from="resume", max_iters=10))
    assert [line["iter"] for line in log_lines(tmp_path / "out")] == list(range(11))
    assert "log.jsonl, line 11: broken, left out" in capsys.readouterr().err


def test_a_run_is_not_overwritten(words, tmp_path, capsys):
    run(words())
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for init_from in ("scratch", tmp_path / "out" / "ckpt.pt"):
        assert train.main(words(init_from=init_from)) == 1
        assert "--init_from=resume" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_what_is_left_of_a_run_is_not_overwritten(words, tmp_path, capsys):
    """Not its best checkpoint, nor its log, whichever program wrote them and whatever is in them."""
    run(words())
    out = tmp_path / "out"
    (out / "last.pt").unlink()
    for name in ("ckpt.pt", "log.jsonl"):
        for content in ((out / name).read_bytes(), b'{"somebody": "else"}\n'):
            (out / name).write_bytes(content)
            for init_from in ("auto", "scratch"):
                assert train.main(words(init_from=init_from)) == 1
                assert f"out/{name}: this out_dir holds" in capsys.readouterr().err
            assert (out / name).read_bytes() == content
        (out / name).unlink()
    run(words())


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(words, tmp_path):
    run(words())
    out = tmp_path / "out"
    (out / "last.pt").unlink()  # ckpt.pt is written first
    torch.save(torch.load(out / "ckpt.pt", weights_only=True) | {"iter_num": 0}, out / "ckpt.pt")
    header = (out / "log.jsonl").read_text().splitlines(keepends=True)[0]
    (out / "log.jsonl").write_text(header)
    run(words(init_from="auto"))
    assert weights(out) and len(log_lines(out)) > 1


def test_a_broken_checkpoint_is_reported_with_the_best_one(words, tmp_path, capsys):
    run(words())
    last = tmp_path / "out" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    for argv in (words(init_from="auto"), [f"--out_dir={tmp_path / 'out'}", "--init_from=resume"]):
        assert train.main(argv) == 1
        said = capsys.readouterr().err
        assert "out/last.pt: " in said and f"--init_from={tmp_path / 'out' / 'ckpt.pt'} with another --out_dir" in said
    run(words(init_from=tmp_path / "out" / "ckpt.pt", out_dir=tmp_path / "new"))


def test_a_run_that_is_further_than_max_iters_is_not_resumed(words, capsys):
    run(words())
    assert train.main(words(init_from="resume", max_iters=3)) == 1
    assert "at iteration 8; expected one from 0 to max_iters=3" in capsys.readouterr().err


def test_a_stop_after_divergence_keeps_the_better_checkpoint(words, tmp_path, capsys, monkeypatch):
    class Stop:
        """A signal that comes with the first weight that is not a number."""

        def __init__(self, text):
            pass

        @property
        def signal(self) -> int:
            return signal.SIGTERM if any(w.detach().isnan().any() for w in watched) else 0

    monkeypatch.setattr(train, "Stop", Stop)
    watched = []
    make = train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda s, m: (watched.extend(m.parameters()), make(s, m))[1])
    assert train.main(words(learning_rate=1e30, grad_clip=0, log_interval=1000, eval_interval=1000, max_iters=50)) == 1
    assert "largest weight is nan" in capsys.readouterr().err
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "out").values())


def test_a_second_run_in_an_out_dir_is_refused(words, tmp_path, capsys):
    with hold(tmp_path / "out" / "lock"):
        assert train.main(words()) == 1
        assert f"out: another program is at work here (pid {os.getpid()} on " in capsys.readouterr().err
    assert not (tmp_path / "out" / "log.jsonl").exists()
    run(words())
    with hold(tmp_path / "out" / "lock"):
        assert train.main([*words(max_iters=12), "--init_from=resume"]) == 1
        assert train.main([*words(), "--init_from=resume", "--eval_only"]) == 0  # which writes nothing
    assert not (tmp_path / "out" / "lock").exists()


def test_a_run_goes_on_with_its_own_data_unless_told_otherwise(words, data_dir, tmp_path, capsys):
    data, resumed = tmp_path / "data", [*words(data_dir=tmp_path / "data", max_iters=9), "--init_from=resume"]
    shutil.copytree(data_dir, data)
    run(words(data_dir=data))
    for name in ("tokenizer.bin", "train.bin", "val.bin"):
        path = data / "toy" / "tok512" / name
        content = path.read_bytes()
        path.write_bytes(np.frombuffer(content[: len(content) // 2 * 2], np.uint16)[::-1].tobytes())
        assert train.main(resumed) == 1
        assert f"{name} of toy is not the run's: expected {len(content)} bytes, crc32 " in capsys.readouterr().err
        path.write_bytes(content)
    (path.parent / "tokenizer.bin").rename(data / "tokenizer.bin")
    assert train.main(resumed) == 1  # a file that has gone is another difference
    assert "tokenizer.bin of toy is not the run's: expected " in capsys.readouterr().err
    (data / "tokenizer.bin").rename(path.parent / "tokenizer.bin")
    path.write_bytes(np.frombuffer(content, np.uint16)[::-1].tobytes())
    run([*resumed, "--allow_other_data"])
    out_dir = f"--out_dir={tmp_path / 'out'}"
    assert not train.settings_from([out_dir, "--init_from=resume"]).allow_other_data  # leave for one resume
    assert "resuming although val.bin of toy is not the run's" in capsys.readouterr().err
    last = [line["val/ntp"] for line in log_lines(tmp_path / "out") if "val/ntp" in line][-1]
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["best_val_ntp"] == last  # no other rows' loss
    run(resumed)  # with what is its own data by now


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_out_dir_is_removed_ends_and_says_so(words, tmp_path, capsys, monkeypatch, replaced):
    save = train.save

    def save_and_remove(file_names, run, progress):
        save(file_names, run, progress)
        shutil.rmtree(tmp_path / "out")
        if replaced:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "log.jsonl").write_text("another run's\n")

    monkeypatch.setattr(train, "save", save_and_remove)
    assert train.main(words()) == 1
    assert "log.jsonl: was removed or replaced during the run" in capsys.readouterr().err
    assert not replaced or [p.read_text() for p in (tmp_path / "out").iterdir()] == ["another run's\n"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_run_goes_on_without_standard_output(words, tmp_path, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        run(words())
    assert capsys.readouterr().err.count("standard output: No space left on device; going on without it") == 1
    assert [line["iter"] for line in log_lines(tmp_path / "out")] == list(range(9))


@pytest.mark.parametrize("end", [0.1, 0.3, 1 / 3, 0.5, 0.999])
@pytest.mark.parametrize("iters", [1, 3, 7, 10, 1000])
def test_all_tokens_of_a_run_are_counted_without_going_through_it(end, iters):
    s, machine = Settings(superposition=4, superposition_end=end, max_iters=iters), train.Machine(torch.device("cpu"))
    assert train.tokens_of_run(s, machine) == sum(train.tokens_per_step(s, machine, it) for it in range(iters))


def test_a_run_beyond_the_machine_is_refused_before_anything_is_built(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "build", None)
    for changes in ({"dim": 65536}, {"n_layers": 1024, "dim": 8192}, {"batch_size": 1_000_000, "max_seq_len": 4096},
                    {"gradient_accumulation_steps": 1_000_000, "batch_size": 1000}):
        assert train.main(words(**changes)) == 1
        assert "out of memory: this run needs at least " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_the_older_checkpoint(words, tmp_path, capsys, monkeypatch):
    run(words(max_iters=4))
    before = (tmp_path / "out" / "last.pt").read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert train.main(words(init_from="resume")) == 1
    error = capsys.readouterr().err
    assert "cannot write" in error and "No space left" in error
    assert (tmp_path / "out" / "last.pt").read_bytes() == before
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith(".tmp")]


# ---------------------------------------------------------------------------------------------
# other starts


def test_eval_only_prints_each_loss_and_writes_nothing(words, tmp_path, capsys):
    run(words(**HEADS))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    run([*words(**HEADS), "--init_from=resume", "--eval_only"])
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("val/"))
    logged = log_lines(tmp_path / "out")[-1]
    assert set(shown) == {f"val/{n}" for n in all_losses(2)} | GUESSES
    for name, value in shown.items():
        assert float(value) == pytest.approx(logged[name], abs=1e-6)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_starting_from_another_checkpoint_takes_its_trunk(words, tmp_path, capsys):
    run(words(dim=32, n_layers=1))
    run(words(init_from=tmp_path / "out" / "ckpt.pt", out_dir=tmp_path / "new", **HEADS))  # asks for dim=16, n_layers=2
    told = capsys.readouterr().err
    assert "dim=32" in told and "n_layers=1" in told and "future_heads.0.weight" in told and "norm_eps" not in told
    lines = log_lines(tmp_path / "new")
    assert lines[0]["val/ntp"] == log_lines(tmp_path / "out")[-1]["val/ntp"] and lines[0]["iter"] == 0
    assert weights(tmp_path / "new")["future_heads.1.weight"].shape == (512, 32)


@pytest.mark.parametrize("changes,says", [
    ({"init_from": "resume"}, ["last.pt", "No such file"]),
    ({"init_from": "nowhere.pt"}, ["nowhere.pt", "No such file"]),
    ({"dataset": "tales"}, ["tales/tok512/train.bin", "tinystories.py local FILE --dataset=tales"]),
    ({"max_seq_len": 100_000}, ["tok512/train.bin", "100000"]),
    ({"device": "abacus"}, ["device=abacus"]),
    ({"device": "cuda:99"}, ["device=cuda:99"]),
    ({"device": "meta"}, ["device=meta", "cpu"]),
    ({"vocab_size": 3}, ["vocab_size", "in [4,"]),
    ({"n_future_heads": 40}, ["n_future_heads=40", "max_seq_len=32"]),
    ({"seed": 2**64}, ["seed"]),
    ({"out_dir": ""}, ["out_dir"]),
    ({"learning_rate": 1e9, "grad_clip": 0}, ["iter", "lower learning_rate"]),
])
def test_refusals_name_what_is_wrong(words, tmp_path, capsys, changes, says):
    assert train.main(words(**changes)) == 1
    error = capsys.readouterr().err
    for text in says:
        assert text in error
    assert "Traceback" not in error


def test_a_checkpoint_that_lacks_something_is_not_resumed(words, tmp_path, capsys):
    run(words())
    path = tmp_path / "out" / "last.pt"
    whole = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in whole.items() if k != "rng"} | {"iter_num": "8"}, path)
    assert train.main(words(init_from="resume")) == 1
    error = capsys.readouterr().err
    assert "last.pt" in error and "no iter_num, rng" in error
    for broken in ({"optimizer": {"state": {}, "param_groups": [{}, {}]}}, {"optimizer": {"state": {}}}, {"rng": []}):
        torch.save(whole | broken, path)
        assert train.main(words(init_from="resume", max_iters=9)) == 1
        assert "last.pt" in capsys.readouterr().err


def test_a_run_shorter_than_its_warm_up_is_told_and_runs(words, tmp_path, capsys):
    run(words(max_iters=3, warmup_iters=10))
    assert "warmup_iters=10" in capsys.readouterr().err
    assert log_lines(tmp_path / "out")[2]["lr"] == pytest.approx(1e-2 * 3 / 11)


def test_a_resumed_run_keeps_its_shape_and_takes_other_settings(words, tmp_path, capsys):
    run(words())
    assert train.main(words(init_from="resume", dim=32)) == 1
    assert "dim=32" in capsys.readouterr().err
    run(words(init_from="resume", max_iters=9, learning_rate=1e-3, weight_decay=0.7, beta2=0.5))
    told = capsys.readouterr().err
    assert "learning_rate=0.001, was 0.01" in told and "weight_decay=0.7, was 0.1" in told
    groups = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.7, 0.0] and all(g["betas"] == (0.9, 0.5) for g in groups)


def test_compiled_step_learns_the_same(words, tmp_path):
    """And is compiled once per set of losses, not for each weight of a schedule."""
    from torch._dynamo.utils import counters

    common = HEADS | {"path": "plain", "max_iters": 6, "aux_schedule": "linear", "aux_end": 0.6}
    run(words(out_dir=tmp_path / "eager", **common))
    torch.compiler.reset()
    counters.clear()
    run(words(out_dir=tmp_path / "compiled", compile=True, **common))
    assert counters["stats"]["unique_graphs"] == 4  # targets and step, with the auxiliary losses, and without
    assert not counters["graph_break"]
    lines = log_lines(tmp_path / "compiled")
    assert [line["compile_seconds"] > before["compile_seconds"] for before, line in zip(lines, lines[1:])] == [
        step in (0, 4) for step in range(6)]  # of the step before the line
    assert lines[0]["tok_per_s"] is None and lines[1]["seconds"] == 0.0 and lines[-1]["seconds"] > 0.0
    eager, compiled = (log_lines(tmp_path / out)[-1]["val/ntp"] for out in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, abs=1e-3)
    assert weights(tmp_path / "eager").keys() == weights(tmp_path / "compiled").keys()


# ---------------------------------------------------------------------------------------------
# objectives, heads and phases


def test_every_objective_is_logged_by_name_with_its_weight(words, tmp_path, capsys):
    run(words(**HEADS, **OTHERS, soft_weight=0.3, soft_neighbours=5))
    first, last = log_lines(tmp_path / "out")[0], log_lines(tmp_path / "out")[-1]
    names = {"nitp_1", "nitp_2", "consistency_1", "consistency_2", "spelling_1", "spelling_2", "spelling_3", "order",
             "soft"}
    for name in names:
        assert first[f"val/{name}"] > 0 and first[f"weight/{name}"] > 0 and f"train/{name}" in first
    total = first["train/ntp"] + sum(first[f"weight/{n}"] * first[f"train/{n}"] for n in names)
    assert first["train/total"] == pytest.approx(total)
    assert all(last[f"val/{name}"] < first[f"val/{name}"] for name in ("spelling_1", "order", "soft"))
    assert "2 future heads and others" in capsys.readouterr().out


@pytest.mark.parametrize("head", FUTURE_HEADS)
def test_every_type_of_head_trains(words, tmp_path, head):
    run(words(**HEADS, head=head))
    lines = log_lines(tmp_path / "out")
    assert lines[-1]["val/nitp_2"] < lines[0]["val/nitp_2"] - 0.1


def test_bits_per_byte(words, tmp_path, data_dir):
    """From the loss of the whole text in nats and its length in bytes."""
    run(words(eval_iters=1000))
    tokenizer = load_tokenizer(data_dir / "toy" / "tok512", 512)
    rows = Windows(data_dir / "toy" / "tok512" / "val.bin", 512, 32)
    targets = rows.tokens[1 : 1 + len(rows) * 32].tolist()
    size = len("".join(" " + tokenizer.decode(story) for story in stories(targets)).encode())
    for line in (log_lines(tmp_path / "out")[k] for k in (0, -1)):
        nats = line["val/ntp"] * len(targets)
        assert line["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=2e-3)  # rows cut stories


def stories(ids: list[int]) -> list[list[int]]:
    found = [[]]
    for i in ids:
        if i == BOS:
            found.append([])
        else:
            found[-1].append(i)
    return [story for story in found if story]


def at_iteration(words, it: int, out, **changes) -> dict:
    """The weights that a run of 8 iterations has at iteration `it`."""
    if not (out / "last.pt").exists():
        run(words(out_dir=out, max_iters=it, lr_schedule="constant", **changes))
    else:
        run(words(out_dir=out, max_iters=it, lr_schedule="constant", init_from="resume", **changes))
    return weights(out)


@pytest.mark.parametrize("head", ["linear", "residual", "block", "sequential"])
def test_heads_learn_alone_while_the_trunk_is_frozen(words, tmp_path, head):
    changes = HEADS | OTHERS | {"head": head, "freeze_trunk_iters": 4, "freeze_embeddings": True}
    start = at_iteration(words, 1, tmp_path / "start", **changes | {"learning_rate": 1e-30})
    frozen = at_iteration(words, 4, tmp_path / "out", **changes)
    joined = at_iteration(words, 6, tmp_path / "out", **changes)
    for name, w in start.items():
        is_head = name.startswith(HEAD_NAMES)
        assert torch.equal(w, frozen[name]) == (not is_head), name
        moved = not torch.equal(frozen[name], joined[name])
        assert moved == (name not in ("tok_embeddings.weight", "output.weight")), name


def test_a_trunk_that_is_frozen_forever_stays_as_it_was(words, tmp_path):
    run(words())
    run(words(init_from=tmp_path / "out/last.pt", out_dir=tmp_path / "new", freeze_trunk_iters=-1, head="block",
              head_init="last_block", **HEADS))
    before, after = weights(tmp_path / "out"), weights(tmp_path / "new")
    assert all(torch.equal(w, after[name]) for name, w in before.items())
    best = torch.load(tmp_path / "new" / "ckpt.pt", weights_only=True)  # of equal trunks the one with the newest heads
    assert best["iter_num"] == 8 and same_weights(best["model"], after)
    lines = log_lines(tmp_path / "new")
    assert lines[-1]["val/nitp_1"] < lines[0]["val/nitp_1"] and lines[-1]["val/ntp"] == lines[0]["val/ntp"]


def test_blocks_of_new_heads_copy_the_last_block_of_the_checkpoint(words, tmp_path):
    run(words())
    still = {"max_iters": 1, "warmup_iters": 0, "learning_rate": 1e-30, "head": "block", "head_init": "last_block"}
    run(words(init_from=tmp_path / "out/last.pt", out_dir=tmp_path / "new", **HEADS, **still))
    trunk, new = weights(tmp_path / "out"), weights(tmp_path / "new")
    for name, w in trunk.items():
        if name.startswith("layers.1."):
            torch.testing.assert_close(new[name.replace("layers.1.", "future_heads.1.block.")], w)


def test_the_recipe_of_frozen_heads_takes_a_checkpoint_in_llama2cs_layout(words, tmp_path, monkeypatch):
    """As llama2.c saves it: under torch.compile's prefix, with its rotary tables, without our fields."""
    run(words())
    ours = torch.load(tmp_path / "out/last.pt", weights_only=True)
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps", "max_seq_len",
             "dropout")
    state = {f"_orig_mod.{name}": w for name, w in ours["model"].items()} | {"_orig_mod.freqs_cos": torch.zeros(32, 2)}
    torch.save({"model": state, "model_args": {k: ours["model_args"][k] for k in names}, "config": {}, "optimizer": {}},
               tmp_path / "theirs.pt")
    monkeypatch.chdir(ROOT)
    argv = words(init_from=tmp_path / "theirs.pt", out_dir=tmp_path / "new", freeze_trunk_iters=4, log_interval=1,
                 max_epochs=0)
    run(["config/frozen_heads.py", *argv])
    lines, after = log_lines(tmp_path / "new"), weights(tmp_path / "new")
    pretrained = log_lines(tmp_path / "out")[-1]["val/ntp"]
    assert lines[0]["val/ntp"] == lines[4]["val/ntp"] == pretrained != lines[8]["val/ntp"]
    assert {"train/nitp_4", "weight/nitp_4"} <= lines[0].keys() and lines[8]["val/nitp_4"] < lines[0]["val/nitp_4"]
    assert "future_heads.3.block.attention.wq.weight" in after


def test_a_checkpoint_with_heads_goes_on_without_and_with_others(words, tmp_path):
    """And the initial trunk is the same, whatever heads there were and are."""
    run(words(**HEADS, **OTHERS, head="block"))
    end = log_lines(tmp_path / "out")[-1]
    nitp = {}
    for k, changes in enumerate(({}, HEADS | {"head": "block"}, HEADS | {"head": "residual"}, OTHERS,
                                 OTHERS | {"spelling_letters": 2}, HEADS | {"head": "sequential"},
                                 HEADS | {"head": "shared", "n_future_heads": 1}, {"recurrence": 2, "coda_layers": 0})):
        run(words(init_from=tmp_path / "out/last.pt", out_dir=tmp_path / f"new{k}", max_iters=2, **changes))
        first = log_lines(tmp_path / f"new{k}")[0]
        assert (first["val/ntp"] == end["val/ntp"]) == ("recurrence" not in changes), changes
        nitp[changes.get("head")] = first.get("val/nitp_1")
        if changes.get("spelling_letters"):
            assert (first["val/spelling_1"] == end["val/spelling_1"]) == (changes == OTHERS)
    assert nitp["block"] == end["val/nitp_1"]  # kept
    assert nitp["residual"] == pytest.approx(nitp["shared"], rel=1e-3)  # begins as the next-token head, as that is
    assert nitp["sequential"] != end["val/nitp_1"]  # though some of its parameters have the names of a block's


def test_superposition_reads_more_text_and_then_plain_tokens(words, tmp_path):
    run(words(superposition=4, superposition_end=0.5, gradient_accumulation_steps=2))
    lines = log_lines(tmp_path / "out")
    assert [line["tokens"] // (2 * 4 * 32) for line in lines] == [0, 4, 8, 12, 16, 17, 18, 19, 20]
    for line in lines[:-1]:
        in_bags = line["iter"] < 4
        assert ("train/superposition" in line) == in_bags == ("train/ntp" not in line)
        assert line["weight/superposition"] == in_bags
    assert lines[-1]["val/ntp"] < lines[0]["val/ntp"] - 0.1


def test_soft_targets_may_be_others_in_a_resumed_run(words, tmp_path, capsys):
    for k in (0, 4, 5):  # none, newly on, with another table
        soft = {"soft_weight": 0.1, "soft_neighbours": k} if k else {}
        run(words(max_iters=2 + k, init_from="resume" if k else "scratch", **soft))
        assert ("soft_neighbours" in capsys.readouterr().err) == (k > 0)
    assert "val/soft" in log_lines(tmp_path / "out")[-1]


def test_prefixes_are_a_loss_of_text_only(words, tmp_path, capsys):
    run(words(prefix_weight=0.25, aux_schedule="linear", aux_end=0.5))
    lines = log_lines(tmp_path / "out")
    assert [line["weight/prefix"] for line in lines[:5]] == pytest.approx([0.25, 0.1875, 0.125, 0.0625, 0.0])
    assert lines[0]["train/prefix"] > 0 and "train/prefix" not in lines[4] and lines[-1]["val/prefix"] > 0
    run(words(init_from="resume", max_iters=10))
    assert "soft" not in capsys.readouterr().err
    assert train.main(words(prefix_weight=0.25, vocab_size=259, out_dir=tmp_path / "bytes")) == 1
    assert "prefix_weight: none of 259 tokens" in capsys.readouterr().err


def test_what_a_checkpoint_decides_is_checked_too(words, tmp_path, capsys):
    run(words(vocab_size=259))
    assert train.main(words(init_from=tmp_path / "out/last.pt", out_dir=tmp_path / "new", soft_weight=0.1,
                            soft_neighbours=400)) == 1
    assert "soft_neighbours=400: expected at most vocab_size=259" in capsys.readouterr().err


def test_an_rnn_learns_and_is_not_exported(words, tmp_path, capsys):
    run(words(trunk="rnn", **HEADS))
    lines = log_lines(tmp_path / "out")
    assert lines[-1]["val/ntp"] < lines[0]["val/ntp"] - 0.1
    with pytest.raises(ValueError, match="last.pt: other programs' formats hold Transformers, .* trunk is rnn"):
        export.main([str(tmp_path / "out/last.pt"), str(tmp_path / "m.bin")])
    assert not (tmp_path / "m.bin").exists()
    run(words(init_from=tmp_path / "out/last.pt", out_dir=tmp_path / "new", max_iters=2))
    assert "trunk=rnn, from" in capsys.readouterr().err
    assert log_lines(tmp_path / "new")[0]["val/ntp"] == lines[-1]["val/ntp"]


def test_a_task_with_a_known_answer_is_scored(words, tmp_path, capsys):
    """By the log's share of fully right answers, and the checkpoint's, counted by hand."""
    synthetic.main(["arithmetic", f"--data_dir={tmp_path}", "--length=8", "--vocab_size=14", "--sequences=90"])
    task = {"data_dir": tmp_path, "dataset": "arithmetic", "vocab_size": 14, "max_seq_len": 8, "batch_size": 16}
    run(words(**task, max_iters=300, eval_interval=300, log_interval=100, dtype="float32", path="plain"))
    line = log_lines(tmp_path / "out")[-1]
    assert not any("bits_per_byte" in key for key in line)
    model = Transformer(ModelArgs(**torch.load(tmp_path / "out/last.pt", weights_only=True)["model_args"]))
    model.load_state_dict(weights(tmp_path / "out"))
    rows = torch.from_numpy(np.fromfile(tmp_path / "arithmetic/tok14/val.bin", dtype=np.uint16)[:-1].astype(int))
    rows = rows.view(-1, 8)
    right = model(rows)[:, :-1].argmax(-1) == rows[:, 1:]  # [:, 2:] are numbers that start and step decide
    assert line["val/exact_third"] == pytest.approx(right[:, 2].float().mean().item())
    assert line["val/exact_rest"] == pytest.approx(right[:, 3:].all(1).float().mean().item())
    assert 0 < line["val/exact_third"] < 1
    assert train.main(words(**task | {"max_seq_len": 9, "out_dir": tmp_path / "other"})) == 1
    assert "max_seq_len=9: expected 8" in capsys.readouterr().err
    assert train.main(words(**task | {"vocab_size": 15, "out_dir": tmp_path / "other"})) == 1
    assert "python synthetic.py arithmetic" in capsys.readouterr().err


CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "config").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    s = configure(Settings, [str(path)])
    check(s)
    assert s.out_dir.startswith("out/")


@pytest.mark.parametrize("changes,says", [
    ({"nitp_weight": 0.1}, "nitp_weight=0.1: needs a head for it, found n_future_heads=0"),
    ({"consistency_weight": 0.1}, "consistency_weight=0.1: needs"),
    ({"spelling_weight": 0.1}, "spelling_weight=0.1: needs a head for it, found spelling_letters=0"),
    ({"order_weight": 0.1}, "order_weight=0.1: needs a head for it, found order_window=0"),
    ({"soft_weight": 0.1, "soft_neighbours": 513}, "soft_neighbours=513: expected at most vocab_size=512"),
    ({"soft_weight": 0.1, "soft_neighbours": 4000, "vocab_size": 32000}, "soft_neighbours=4000: .* room for 524"),
    ({"curriculum": "forward"}, "curriculum=forward: needs future heads"),
    (HEADS | {"head": "shared", "aux_grad_scale": 0.5}, "aux_grad_scale=0.5: head=shared"),
    (HEADS | {"head": "sequential", "aux_grad_power": True}, "aux_grad_power=True: not with head=sequential"),
    (HEADS | {"head_init": "last_block"}, "head_init=last_block: needs .* head=linear"),
    ({"head": "block", "head_init": "last_block"}, "head_init=last_block: needs .* n_future_heads=0"),
    (HEADS | {"head": "block", "head_init": "last_block", "trunk": "rnn"}, "head_init=last_block: .* trunk=rnn"),
    ({"trunk": "rnn", "recurrence": 2}, "recurrence=2: not with trunk=rnn"),
    ({"trunk": "rnn", "dropout": 0.1}, "dropout=0.1: not with trunk=rnn"),
    ({"trunk": "rnn", "optimizer": "muon"}, "optimizer=muon: not with trunk=rnn"),
    ({"recurrence": 2, "prelude_layers": 2, "coda_layers": 3}, "recurrence=2: no layer is between prelude_layers=2"),
    ({"freeze_trunk_iters": 5}, "freeze_trunk_iters=5: needs heads with parameters"),
    (HEADS | {"freeze_trunk_iters": 5, "head": "shared"}, "freeze_trunk_iters=5: needs heads with parameters"),
    (HEADS | {"freeze_trunk_iters": -1, "aux_end": 0.5}, "freeze_trunk_iters=-1: nothing would learn outside"),
    (HEADS | {"freeze_trunk_iters": 5, "aux_start": 0.5}, "freeze_trunk_iters=5: nothing would learn outside"),
    (HEADS | {"freeze_trunk_iters": 5, "superposition": 2}, "freeze_trunk_iters=5: .* superposition=2"),
    (HEADS | {"freeze_trunk_iters": 5, "curriculum": "reverse"}, "freeze_trunk_iters=5: .* curriculum=reverse"),
])
def test_settings_that_contradict_each_other_are_refused_by_name(changes, says):
    with pytest.raises(ValueError, match=says):
        check(Settings(**changes))


# ---------------------------------------------------------------------------------------------
# several processes, and wandb

def start_two(*argv) -> subprocess.Popen:
    """torchrun with two processes."""
    return start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv)


@pytest.mark.parametrize("accumulate,changes", [
    (1, {"aux_schedule": "linear", "aux_end": 0.6}), (2, {"aux_schedule": "linear", "aux_end": 0.6}),
    (1, {"head": "block", "freeze_trunk_iters": 7} | OTHERS)])
def test_two_processes_learn_what_one_learns(words, tmp_path, accumulate, changes):
    """Twice half the batch is the whole, also where masks leave the halves unequal numbers of targets."""
    common = HEADS | {"mask_document_ends": True, "max_iters": 20, "dtype": "float32",
                      "gradient_accumulation_steps": accumulate} | changes
    run(words(out_dir=tmp_path / "one", batch_size=4, **common))
    process = start_two("train.py", *words(out_dir=tmp_path / "two", batch_size=2, **common))
    _, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    one, two = (log_lines(tmp_path / out) for out in ("one", "two"))
    assert [line["iter"] for line in two] == list(range(21)) and two[-1]["tokens"] == one[-1]["tokens"]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"sample", "seconds", "tok_per_s", "peak_mib", "grad_norm"}:
            # a hit is a hit or none: one logit rounded the other way moves the accuracy by one of 1,024
            guess = "acc" in key or "agree" in key
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=2e-3 if guess else 1e-5), key


NAMES_OF_THREADS = """
import glob, pathlib, sys
sys.path.insert(0, ".")
import train
assert train.main(sys.argv[1:]) == 0
names = [pathlib.Path(name).read_text().strip() for name in glob.glob("/proc/self/task/*/comm")]
sys.stdout.write(" ".join(["threads", *names]) + "\\n")  # in one piece: two processes write to the same pipe
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads' names are read from /proc")
def test_a_finished_process_has_no_thread_of_gloo(words, tmp_path):
    """One that outlives destroy_process_group can abort its process while the interpreter ends, one run in 20."""
    (tmp_path / "program.py").write_text(NAMES_OF_THREADS)
    process = start_two(tmp_path / "program.py",
                        *words(batch_size=2, head="block", n_future_heads=1, nitp_weight=0.3, freeze_trunk_iters=4))
    output, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    threads = [line for line in output.splitlines() if line.startswith("threads ")]
    assert len(threads) == 2 and not any("gloo" in line for line in threads), threads


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_with_a_message_and_a_checkpoint(words, tmp_path, victim):
    process = start_two("train.py", *words(batch_size=2, max_iters=100_000))
    for line in process.stdout:
        if line.startswith("iter 9/"):
            break
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[victim]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another process is gone" in error and "--init_from=resume continues it" in error
    held = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["iter_num"]
    assert held >= 8 and held % 4 == 0
    run(words(batch_size=4, init_from="resume", max_iters=held + 2))  # goes on, also with another number of processes
    assert [line["iter"] for line in log_lines(tmp_path / "out")] == list(range(held + 3))


def test_torchrun_starts_again_what_was_killed(words, tmp_path):
    """One command line, with auto: the second attempt goes on from the last evaluation."""
    process = start_two("--max-restarts=1", "train.py",
                        *words(batch_size=2, max_iters=60, eval_interval=10, init_from="auto", **HEADS))
    wait_for(process, "iter 25/")
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "complete at 60" in error and "find_unused_parameters" not in error
    begun, resumed = log_lines(tmp_path / "out", headers=True)
    assert (begun["config"]["init_from"], resumed["config"]["init_from"]) == ("scratch", "resume")
    assert resumed["iter"] >= 20 and [line["iter"] for line in log_lines(tmp_path / "out")] == list(range(61))


def test_wandb_offline_gets_the_keys_of_the_log(words, tmp_path, wandb_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NOTES", "by the environment")
    run([*words(**HEADS), "--wandb_log", "--wandb_run_name=a=b", "--wandb_group=mtp", "--wandb_job_type=seed 1",
         "--wandb_tags=x, y", "--wandb_artifact"])
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = wandb_dir.glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # wandb's own process may still be writing, on a busy machine
    records = []
    while not any(r.WhichOneof("record_type") == "exit" for r in records) and time.monotonic() < deadline:
        time.sleep(0.1)
        records = [Record.FromString(data) for data in leveldb_records(path.read_bytes()) if data]
    history = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
               for r in records if r.WhichOneof("record_type") == "history"]
    own = [{k: v for k, v in line.items() if not k.startswith(("_", "sample"))} for line in history]
    assert own == [{k: v for k, v in line.items() if k != "sample"} for line in log_lines(tmp_path / "out")]
    assert [line["_step"] for line in history] == list(range(9))
    stories = [path.read_text() for path in sorted((path.parent / "files" / "media" / "html").glob("sample_*.html"))]
    assert [line["sample"] for line in log_lines(tmp_path / "out") if "sample" in line] == [
        html.unescape(re.fullmatch("<p style=[^>]*>(.*)</p>", story, re.DOTALL)[1]) for story in stories]
    (of_run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (of_run.run_group, of_run.job_type, list(of_run.tags)) == ("mtp", "seed 1", ["x", "y"])
    assert of_run.project == "lookahead" and of_run.notes == "by the environment"
    (artifact,) = (r.request.log_artifact.artifact if r.WhichOneof("record_type") == "request" else r.artifact
                   for r in records if r.WhichOneof("record_type") == "artifact"
                   or r.request.WhichOneof("request_type") == "log_artifact")
    assert artifact.type == "model" and [entry.path for entry in artifact.manifest.contents] == ["ckpt.pt"]
    config = {item.key: json.loads(item.value_json) for r in records if r.WhichOneof("record_type") == "run"
              for item in r.run.config.update}
    (header,) = log_lines(tmp_path / "out", headers=True)
    assert config.items() >= (header["config"] | {"facts": header["facts"]}).items()
    assert {r.metric.name or r.metric.glob_name for r in records if r.WhichOneof("record_type") == "metric"} >= {
        "iter", "tokens", "seconds", "val/ntp"}
    assert [r.run.display_name for r in records if r.WhichOneof("record_type") == "run"][0] == "a=b"
    run_id = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["wandb_id"]
    assert run_id and run_id in path.name


def test_a_run_outlives_wandb(words, tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(*_, **__):
        raise RuntimeError("no network today")

    monkeypatch.setattr(wandb, "init", refuse)
    run([*words(), "--wandb_log"])
    assert "no network today" in capsys.readouterr().err and len(log_lines(tmp_path / "out")) == 9

    class Broken:
        id = "abc"

        def define_metric(self, *_, **__):
            pass

        log = refuse

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    run([*words(out_dir=tmp_path / "out2"), "--wandb_log"])
    assert "the run goes on without it" in capsys.readouterr().err and len(log_lines(tmp_path / "out2")) == 9
