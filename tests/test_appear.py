"""bench/appear.py: differences of differences, against numbers worked out by hand."""

import json

import pytest

from bench import appear
from study.intervals import interval

GAIN = {1: 0.010, 2: 0.014, 3: 0.012}  # of nitp over base, in small batches, by seed
MORE = {1: 0.020, 2: 0.021, 3: 0.022}  # and that much more in large ones


def write_run(folder, name, seed, micro, length, values):
    """A log whose bits per byte are values(step), with an evaluation every 50 steps."""
    path = folder / f"{name}-{seed}" / "log.jsonl"
    path.parent.mkdir(parents=True)
    config = {"seed": seed, "vocab_size": 512, "gradient_accumulation_steps": micro, "lr_schedule": "constant"}
    lines = [{"iter": 0, "config": config, "facts": {}}]
    for step in range(0, length + 1, 50):
        lines.append({"iter": step, "tokens": step * micro * 8192, "val/ntp": 2.0, "val/bits_per_byte": values(step)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folders(tmp_path):
    """1,500 steps of one micro-batch, 400 of eight; a gain grows in proportion to steps, from 0."""
    for seed in GAIN:
        few, many = tmp_path / "few", tmp_path / "many"
        write_run(few, "base", seed, 1, 1500, lambda step: 3.0 - step / 1000)
        write_run(few, "nitp", seed, 1, 1500, lambda step, s=seed: 3.0 - step / 1000 - GAIN[s] * step / 400)
        write_run(many, "base", seed, 8, 400, lambda step: 2.5 - step / 1000)
        write_run(many, "nitp", seed, 8, 400, lambda step, s=seed: 2.5 - step / 1000 - (GAIN[s] + MORE[s]) * step / 400)
    return few, many


def found(*folders):
    reader = appear.Reader()
    for folder in folders:
        reader.read(str(folder))
    return appear.table(appear.by_set_up(reader.runs)).rows


def test_gain_in_large_batches_minus_that_in_small_ones(folders):
    steps, tokens = found(*folders)
    assert steps[:3] == ["512", "nitp", "steps"] and tokens[:3] == ["512", "nitp", "tokens"]
    assert steps[3] == str(interval([-gain for gain in GAIN.values()]))  # both at step 400
    assert steps[4] == str(interval([-GAIN[s] - MORE[s] for s in GAIN]))
    assert steps[5:] == [str(interval([-more for more in MORE.values()])), "grows with the batch", "3"]
    at_the_end, at_187_5 = 1500 / 400, 187.5 / 400  # as many tokens: 12,288,000
    assert tokens[3] == str(interval([-gain * at_the_end for gain in GAIN.values()]))
    assert tokens[4] == str(interval([-(GAIN[s] + MORE[s]) * at_187_5 for s in GAIN]))
    change = [GAIN[s] * at_the_end - (GAIN[s] + MORE[s]) * at_187_5 for s in GAIN]
    assert tokens[5:] == [str(interval(change)), "shrinks with the batch", "3"]


def test_only_seeds_that_all_four_have(folders):
    few, many = folders
    (many / "base-2" / "log.jsonl").unlink()
    steps, _ = found(few, many)
    assert steps[3] == str(interval([-GAIN[1], -GAIN[3]])) and steps[6:] == ["too few", "2"]


def test_runs_judged_on_other_tokens_are_in_no_pair(folders):
    few, many = folders
    for log in few.glob("nitp-*/log.jsonl"):
        log.write_text(log.read_text().replace('"facts": {}', '"facts": {"val_crc32": "1"}'))
    assert found(few, many)[0][7] == "3"  # the base's logs do not say theirs
    for log in few.glob("base-*/log.jsonl"):
        log.write_text(log.read_text().replace('"facts": {}', '"facts": {"val_crc32": "2"}'))
    assert [row[6:] for row in found(few, many)] == [["–", "0"], ["–", "0"]]


def test_runs_that_cannot_be_compared(folders, tmp_path):
    few, many = folders
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1: expected runs of two values"):
        found(few)
    with pytest.raises(ValueError, match="the same set-up and seed as .*few"):
        found(few, few, many)
    log = many / "nitp-3" / "log.jsonl"
    log.write_text(log.read_text().replace('"constant"', '"cosine"'))
    with pytest.raises(ValueError, match="nitp-3.*: lr_schedule=cosine; expected constant"):
        found(few, many)
    log.write_text(log.read_text().replace('"cosine"', '"constant"').replace('"vocab_size": 512', '"vocab_size": null'))
    with pytest.raises(ValueError, match="nitp-3.*: does not say its vocab_size"):
        found(few, many)
    log.write_text(log.read_text().replace("null", "512").replace("bits_per_byte", "bits"))
    with pytest.raises(ValueError, match="nitp-3.*: has no val/bits_per_byte"):
        found(few, many)


def test_into_a_page(folders, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- appear -->\n<!-- /appear -->\nafter\n")
    appear.main([*map(str, folders), "--markdown", f"{page}#appear"])
    text = page.read_text()
    assert "| 512 | nitp | steps |" in text and text.startswith("before\n") and text.endswith("after\n")
    assert "8 minus 1" in capsys.readouterr().out
