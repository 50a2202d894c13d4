"""Settings from files and the command line: what is accepted, what is refused, and the message."""

import os
import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import pytest

import train
from configurator import Range, configure, help_text
from settings import Fraction, FractionBelow1, Positive

AtLeast1 = Annotated[int, Range(1)]


@dataclass
class Knobs:
    batch_size: AtLeast1 = 32  # rows; at least one
    learning_rate: Positive = 1e-3  # peak # with a second hash
    share: Fraction = 0.5
    dropout: FractionBelow1 = 0.0  # of activations
    name: str = "a"  # a text
    compile: bool = True  # or not
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products
    elsewhere = {"steps": "here it is batch_size, of a kind"}


def write(tmp_path, text):
    path = tmp_path / "x.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("word,key,value", [
    ("--learning_rate=1", "learning_rate", 1.0),
    ("--learning_rate=3e-4", "learning_rate", 3e-4),
    ("--learning-rate=2", "learning_rate", 2.0),
    ("--batch_size=7", "batch_size", 7),
    ("--batch_size=1_000", "batch_size", 1000),
    ("--name=a=b", "name", "a=b"),
    ("--name=", "name", ""),
    ("--name=3", "name", "3"),
    ("--compile", "compile", True),
    ("--compile=False", "compile", False),
    ("--compile=true", "compile", True),
    ("--compile=0", "compile", False),
    ("--dtype=bfloat16", "dtype", "bfloat16"),
    ("--share=1", "share", 1.0),
])
def test_words_that_are_taken(word, key, value):
    got = getattr(configure(Knobs, [word]), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("word,says", [
    ("--bach_size=3", ["--bach_size", "batch_size"]),
    ("--zzz=3", ["--zzz", "--help"]),
    ("--batch_size=0", ["--batch_size", ">= 1", "0"]),
    ("--batch_size=1.5", ["--batch_size", "int", "'1.5'"]),
    ("--batch_size=True", ["--batch_size", "int"]),
    ("--batch_size", ["--batch_size", "32"]),
    ("--learning_rate=0", ["--learning_rate", "> 0"]),
    ("--learning_rate=nan", ["--learning_rate", "nan"]),
    ("--learning_rate=inf", ["--learning_rate", "inf"]),
    ("--share=1.01", ["--share", "[0, 1]"]),
    ("--dropout=1", ["--dropout", "[0, 1)"]),
    ("--compile=maybe", ["--compile", "bool", "maybe"]),
    ("--dtype=fp8", ["--dtype", "float32, bfloat16", "fp8"]),
    ("-b", ["-b", "--key=value"]),
    ("--", ["--key=value"]),
    ("--=3", ["no such setting"]),
    ("--zzz=" + "9" * 100_000, ["--zzz: no such setting"]),
    ("--batch_size=" + "9" * 10_000, ["--batch_size: expected int >= 1, found '99", " ... "]),
    ("--a\x1b[2J=3", ["'--a\\x1b[2J=3'", "no such setting"]),
    ("--steps=3", ["--steps: no such setting; here it is batch_size, of a kind"]),
    ("--resume", ["--resume: no such setting; --help lists all"]),
    ("--typo=1", ["--typo: no such setting; --help lists all"]),
])
def test_words_that_are_refused(word, says):
    with pytest.raises(ValueError) as caught:
        configure(Knobs, [word])
    for text in says:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_and_words_together(tmp_path):
    path = write(tmp_path, '"""A recipe."""\nbatch_size = 2 * 8 // 4  # rows\nlearning_rate = batch_size / 8\n'
                           'dropout = 1 - 0.75\nname = "n"\ncompile = False\n')
    got = configure(Knobs, ["--batch_size=5", path, "--name=m", "--name=k"])
    assert got == Knobs(batch_size=5, learning_rate=0.5, dropout=0.25, name="k", compile=False)


@pytest.mark.parametrize("text,says", [
    ("batch_sise = 3", ["x.py:1", "batch_sise", "batch_size"]),
    ("\nbatch_size = 0", ["x.py:2", "batch_size", ">= 1"]),
    ("batch_size = '3'", ["x.py:1", "int", "'3'"]),
    ("batch_size = True", ["x.py:1", "int"]),
    ("compile = 1", ["x.py:1", "bool"]),
    ("batch_size = 1 / 0", ["x.py:1", "zero"]),
    ("import os", ["x.py:1", "import os"]),
    ("batch_size = __import__('os').getpid()", ["x.py:1", "__import__"]),
    ("batch_size = other", ["x.py:1", "other"]),
    ("batch_size, dropout = 1, 0.5", ["x.py:1"]),
    ("batch_size = name = 3", ["x.py:1"]),
    ("batch_size =", ["x.py:1"]),
    ("batch_size = 'a' * 3", ["x.py:1"]),
    ("a\0b", ["x.py"]),
    ("learning_rate = " + "9" * 400, ["x.py:1", "learning_rate"]),
    ("batch_size = True + 1", ["x.py:1"]),
    ("batch_size = 0x" + "f" * 10_000, ["x.py:1: batch_size: expected a number of at most 64 bits"]),
    ("batch_size = " + "9" * 10_000, ["x.py:1"]),
    ("batch_size = " + " * ".join(["9999999999"] * 2000), ["x.py:1: batch_size: nested too deeply"]),
    ("batch_size = " + " * ".join(["9999999999"] * 3), ["expected a number of at most 64 bits, found"]),
    ("batch_size = -0x" + "f" * 10_000 + " if 1 else 0", ["x.py:1", "found `...`"]),
    ("name = 'a'\n0x" + "f" * 10_000, ["x.py:2", "found `...`"]),
    ("batch_size = [" + "1, " * 20_000 + "]", ["x.py:1", "[1, 1, 1", " ...`"]),
    ("batch_size = 3\n" * 10_000, ["x.py: expected a config file of at most 65,536 characters"]),
    ("batch_size = " + "-" * 100_000 + "1", ["x.py"]),
])
def test_files_that_are_refused(tmp_path, text, says):
    with pytest.raises(ValueError) as caught:
        configure(Knobs, [write(tmp_path, text)])
    for part in says:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 700


def test_config_files_are_read_not_run(tmp_path):
    with pytest.raises(ValueError):
        configure(Knobs, [write(tmp_path, f"name = open({str(tmp_path / 'made')!r}, 'w').name")])
    assert not (tmp_path / "made").exists()


def test_missing_file_second_file_and_binary_file(tmp_path):
    with pytest.raises(ValueError, match="nope.py"):
        configure(Knobs, ["nope.py"])
    path = write(tmp_path, "batch_size = 3")
    with pytest.raises(ValueError, match="second config file"):
        configure(Knobs, [path, path])
    with pytest.raises(ValueError, match="second config file .*; did you mean --batch_size=5?"):
        configure(Knobs, [path, "batch_size=5"])
    for words in (["--batch_size", "5"], [path, "--batch_size", "5"], ["--batch-size", "5", path]):
        with pytest.raises(ValueError, match="--batch.size '5': expected --batch.size=5, with an equals sign"):
            configure(Knobs, words)
    assert configure(Knobs, ["--compile", path]).batch_size == 3
    os.mkfifo(tmp_path / "pipe.py")
    for name, kind in (("pipe.py", "pipe or device"), ("", "folder")):
        with pytest.raises(ValueError, match=f"expected a config file, found a {kind}"):
            configure(Knobs, [str(tmp_path / name)])
    (tmp_path / "b.py").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        configure(Knobs, [str(tmp_path / "b.py")])


def test_help_names_every_setting_with_default_range_and_comment():
    text = help_text(Knobs, "usage")
    assert "--learning_rate=0.001" in text and "float > 0; peak # with a second hash" in text
    assert '--name="a"' in text and "rows; at least one" in text and "one of float32, bfloat16" in text
    text = help_text(train.Settings, "usage")
    for field in fields(train.Settings):
        entry = re.search(rf"--{field.name}=.*\n +(.+)", text)
        assert entry, field.name
        assert len(entry[1].split("; ", 1)[1]) > 3, f"{field.name} has no comment"


def test_settings_of_other_programs_are_told_by_their_name_here():
    for word, says in (("--aux_losses", "n_future_heads"), ("--use_k_ntp_loss=True", "here it is nitp_weight"),
                       ("--use_consistency_loss", "consistency_weight"), ("--vocab_source=custom", "dataset"),
                       ("--always_save_checkpoint", "last.pt"), ("--resume", "--init_from=resume"),
                       ("--block_size=3", "max_seq_len"), ("--n_layer=3", "n_layers")):
        with pytest.raises(ValueError, match=f"{word.partition('=')[0]}: no such setting; .*{says}"):
            configure(train.Settings, [word])
    names = {field.name for field in fields(train.Settings)}
    assert not names & set(train.Settings.elsewhere)


@pytest.mark.parametrize("words,says", [
    (["--n_heads=7"], ["dim=64", "n_heads=7"]),
    (["--n_heads=64", "--n_kv_heads=64"], ["dim=64", "even"]),
    (["--n_kv_heads=3"], ["n_kv_heads=3", "n_heads=8"]),
    (["--nitp_weight=0.1"], ["nitp_weight", "n_future_heads=0"]),
    (["--consistency_weight=0.1"], ["consistency_weight", "n_future_heads=0"]),
    (["--aux_start=0.5", "--aux_end=0.5"], ["aux_start", "aux_end"]),
    (["--min_lr=1"], ["min_lr", "learning_rate"]),
    (["--eval_only"], ["eval_only", "init_from"]),
])
def test_contradictions_are_refused_before_anything_is_loaded(words, says, tmp_path, capsys):
    assert train.main([*words, f"--data_dir={tmp_path}/none", f"--out_dir={tmp_path}/out"]) == 1
    error = capsys.readouterr().err
    for text in says:
        assert text in error
    assert "none" not in error and not (tmp_path / "out").exists()


def test_the_four_260k_configs_differ_in_the_objective_alone():
    names = ("base", "nitp", "consist", "mtp")
    runs = {name: vars(configure(train.Settings, [f"config/stories260k_{name}.py"])) for name in names}
    objective = {"out_dir", "n_future_heads", "nitp_weight", "consistency_weight"}
    for name in names:
        train.check(train.Settings(**runs[name]))
        assert {k for k in runs["base"] if runs["base"][k] != runs[name][k]} <= objective
    assert len({runs[name]["out_dir"] for name in names}) == 4
    weights = {name: (runs[name]["nitp_weight"] > 0, runs[name]["consistency_weight"] > 0) for name in names}
    assert weights == {"base": (False, False), "nitp": (True, False), "consist": (False, True), "mtp": (True, True)}
    shape = [runs["base"][k] for k in ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "vocab_size")]
    assert shape == [64, 5, 8, 4, 512, 512]
