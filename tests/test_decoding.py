"""bench/decoding.py does what it says; no speed is asserted."""

import re
import shutil

import pytest

from bench import decoding


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_decode_writes_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoding, "BUILD", tmp_path / "build")
    monkeypatch.setattr(decoding, "MODELS", tmp_path / "models")
    monkeypatch.setattr(decoding, "SIZES", {"260K": (16, 24, 2, 4, 2, 64)})
    decoding.main(["decode", "--sizes", "260K", "--rounds", "2", "--threads", "1", "2", "--folder", str(tmp_path)])
    table = (tmp_path / "decode.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("| 260K")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:3] for row in rows] == [["260K", *case] for case in (
        ("scalar fp32", "1"), ("fp32", "1"), ("fp32", "2"), ("int8", "1"), ("int8", "2"))]
    assert rows[0][5] == "1.0" and all(float(row[3].replace(",", "")) > 0 for row in rows)
    assert "<svg" in (tmp_path / "decode.svg").read_text() and table in capsys.readouterr().out
    with pytest.raises(ValueError, match="no.bin: cannot open"):
        decoding.measure([decoding.BUILD / "run", tmp_path / "no.bin"])


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_decode_takes_in_programs_that_the_environment_names(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    for name, line in (("run", "echo achieved tok/s: 7.0 >&2"), ("bench", """echo '[{"avg_ts": 9.0}]'""")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho $OMP_NUM_THREADS \"$@\" >> {tmp_path}/{name}.log\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(decoding, "BUILD", tmp_path / "build")
    monkeypatch.setattr(decoding, "MODELS", tmp_path / "models")
    monkeypatch.setattr(decoding, "SIZES", {"15M": (32, 48, 1, 4, 2, 64)})
    command = ["decode", "--sizes", "15M", "--rounds", "1", "--threads", "2", "--folder", str(tmp_path)]
    for variable in ("RUN_BEFORE", "LLAMA2C_RUN", "LLAMA2C_RUNQ"):
        monkeypatch.setenv(variable, str(tmp_path / "run"))
    monkeypatch.setenv("LLAMA_BENCH", str(tmp_path / "bench"))
    decoding.main(command)
    rows = [line.split(" | ")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("| 15M")]
    peers = [row for files in decoding.PEERS.values() for row in files]
    assert [row[0] for row in rows] == [*decoding.VARIANTS, *peers]
    assert [row[2] for row in rows[-6:]] == ["7"] * 4 + ["9"] * 2
    calls = (tmp_path / "run.log").read_text().splitlines()
    models = tmp_path / "models" / "15M"
    assert calls[0] == f"2 {models}/v0.bin -t 0 -n 256 -z {models}/tokenizer.bin" and "v2.bin" in calls[3]
    assert f"-m {models}/q8_0.gguf -p 0 -n 256 -r 1 -t 2 -o json" in (tmp_path / "bench.log").read_text()
    monkeypatch.setenv("LLAMA2C_RUN", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="LLAMA2C_RUN: expected a program, found .*none"):
        decoding.main(command)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_draft_compares_on_prompts(tmp_path, monkeypatch, capsys, data_dir):
    import torch
    from test_export import random_model

    from formats.llama2c import write_heads, write_trunk
    monkeypatch.setattr(decoding, "BUILD", tmp_path / "build")
    model = random_model(n_future_heads=2)
    with torch.no_grad():
        model.tok_embeddings.weight[1] = 0
    write_trunk(model, tmp_path / "m.bin")
    write_heads(model, tmp_path / "h.bin")
    shutil.copy(data_dir / "toy" / "tok512" / "tokenizer.bin", tmp_path)
    stories = data_dir / "toy" / "val.txt"
    decoding.main(["draft", *map(str, (tmp_path / "m.bin", tmp_path / "h.bin", stories)), "--prompts", "3"])
    out = capsys.readouterr().out
    assert "temperature 0.0, 3 prompts" in out
    assert re.search(r"^\| heads \| [\d,]+ \| [\d.]+ \| [\d.]+ \| (\d+% of \d+|-), (\d+% of \d+|-) \|$", out, re.M)
