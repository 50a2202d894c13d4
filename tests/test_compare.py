"""Comparing runs: reading whole and broken logs, groups, the arithmetic against SciPy's, tables, plots and the page."""

import csv
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as xml
import zlib
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

import compare
import train
from study.figures import figures, staying
from study.groups import group_runs
from study.runs import Reader, leveldb_records
from study.seconds import step_ratios

CONFIG = {"max_iters": 400, "batch_size": 32, "nitp_weight": 0.0, "n_future_heads": 0, "learning_rate": 0.002}
FACTS = {"device": "cpu", "threads": 1, "cores": [0], "path": "fast", "val_crc32": "aa", "vocabulary_crc32": "bb"}


def write_log(folder: Path, values: list[float], seed: int = 1, config: dict | None = None, facts: dict | None = None,
              step_seconds: float = 0.5, **more: list[float]) -> Path:
    """A log with an evaluation every 100 steps. more: {key with __ for /: values at the evaluations}."""
    folder.mkdir(parents=True, exist_ok=True)
    length = 100 * (len(values) - 1)
    own = {"seed": seed, "max_iters": length, "out_dir": str(folder)}
    lines = [{"iter": 0, "config": CONFIG | own | (config or {}), "facts": FACTS | (facts or {})}]
    for k, value in enumerate(values):
        it = 100 * k
        lines.append({"iter": it, "tokens": it * 8192, "seconds": it * step_seconds, "val/ntp": value,
                      "peak_mib": 300 + k, **{key.replace("__", "/"): column[k] for key, column in more.items()}})
        lines += [{"iter": it + 50, "tokens": (it + 50) * 8192, "seconds": (it + 50) * step_seconds,
                   "train/ntp": value}] if k < len(values) - 1 else []
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def variant(weight: float = 0.1) -> dict:
    return {"n_future_heads": 1, "nitp_weight": weight}


BASE = {1: [6.0, 3.0, 2.5, 2.2, 2.0], 2: [6.0, 3.1, 2.6, 2.3, 2.1], 3: [6.0, 3.0, 2.4, 2.1, 1.9]}
NITP = {1: [6.0, 2.8, 2.3, 2.0, 1.9], 2: [6.0, 2.9, 2.4, 2.0, 1.96], 3: [6.0, 2.9, 2.3, 2.0, 1.84]}


@pytest.fixture
def runs(tmp_path):
    """out/base-1..3 and out/nitp-1..3, the latter 20% slower a step."""
    for seed in BASE:
        write_log(tmp_path / "out" / f"base-{seed}", BASE[seed], seed)
        write_log(tmp_path / "out" / f"nitp-{seed}", NITP[seed], seed, variant(), step_seconds=0.6,
                  val__acc_0=[0.0, 0.1, 0.2, 0.3, 0.4], val__acc_1=[0.0, 0.05, 0.1, 0.15, 0.2],
                  val__nitp_1=[6.0, 5.0, 4.5, 4.0, 3.9], weight__nitp_1=[0.1, 0.1, 0.05, 0.0, 0.0])
    return tmp_path / "out"


def rows(capsys, *words) -> dict[str, dict[str, str]]:
    """{set-up: its row} of compare.py --csv."""
    assert compare.main([*map(str, words), "--csv"]) == 0
    return {row["set_up"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}


def call(*words, env: dict | None = None) -> subprocess.CompletedProcess:
    """compare.py as a program."""
    return subprocess.run([sys.executable, "compare.py", *map(str, words)], cwd=Path(compare.__file__).parent, env=env,
                          capture_output=True, text=True, timeout=120)


# ---------------------------------------------------------------------------------------------
# what is reported

def test_from_where_a_curve_stays_below_a_target():
    x, y = np.array([0.0, 10.0, 20.0, 30.0]), np.array([4.0, 2.0, 3.0, 1.0])
    assert staying(x, y, 3.0) == 5.0 and staying(x, y, 2.0) == 25.0 and staying(x, y, 1.5) == 27.5
    assert staying(x, y, 0.9) is None and staying(x, y, 5.0) == 0.0 and staying(x[:0], y[:0], 1.0) is None


def test_figures_of_two_set_ups(runs, capsys):
    found = rows(capsys, runs, "--steps", 200, 250)
    base, nitp = found["base"], found["nitp"]
    assert base["seeds"] == "1 2 3" and float(base["ntp_end"]) == pytest.approx(2.0)
    assert float(base["ntp_end_deviation"]) == pytest.approx(0.1)
    assert float(nitp["ntp_at_200"]) == pytest.approx((2.3 + 2.4 + 2.3) / 3)
    assert float(nitp["ntp_at_250"]) == pytest.approx((2.15 + 2.2 + 2.15) / 3)  # between two evaluations
    low, high = stats.ttest_rel([1.9, 1.96, 1.84], [2.0, 2.1, 1.9]).confidence_interval(0.95)
    assert float(nitp["difference_end"]) == pytest.approx(-0.1) and nitp["pairs"] == "3"
    assert float(nitp["difference_end_half_interval"]) == pytest.approx((high - low) / 2)
    assert float(nitp["difference_at_200"]) == pytest.approx((-0.2 - 0.2 - 0.1) / 3)
    assert float(nitp["steps_to_reach"]) == pytest.approx(300.0) and base["steps_to_reach"] == "400.0"
    assert float(nitp["seconds_to_reach"]) == pytest.approx(180.0) and nitp["seeds_that_reach"] == "3"
    assert float(nitp["step_time_ratio"]) == pytest.approx(1.2) and nitp["equal_seconds"] == ""
    assert float(nitp["tokens_per_second"]) == pytest.approx(8192 / 0.6) and nitp["peak_mib"] == "304.0"
    assert float(nitp["acc_0"]) == pytest.approx(0.4) and float(nitp["acc_1"]) == pytest.approx(0.2)
    assert base["acc_0"] == "" and base["equal_seconds"] == ""


def test_the_end_may_be_the_mean_of_the_last_evaluations(runs, capsys):
    found = rows(capsys, runs, "--last", 2)
    assert float(found["base"]["ntp_end"]) == pytest.approx((2.1 + 2.2 + 2.0) / 3)
    assert float(found["nitp"]["difference_end"]) == pytest.approx((1.95 + 1.98 + 1.92 - 2.1 - 2.2 - 2.0) / 3)


def test_at_equal_seconds_the_baseline_may_train_longer(runs, capsys):
    for seed in (1, 2):
        write_log(runs / f"base600-{seed}", [*BASE[seed], 1.9, BASE[seed][4] - 0.2], seed)
    found = rows(capsys, runs, "--baseline", "base")
    at_cost = 0.2 * math.log(1.2) / math.log(1.5)  # what 20% more steps bring, over the logarithm
    assert float(found["nitp"]["equal_seconds"]) == pytest.approx(-0.1 + at_cost)  # of all three pairs
    assert found["nitp"]["equal_seconds_pairs"] == "3"
    assert found["base600"]["equal_seconds"] == "" and found["base600"]["difference_end"] == ""
    measured = runs / "steps.json"
    measured.write_text(json.dumps({"seconds": {"base": [1.0, 2.0, 1.0], "nitp": [1.5, 3.0, 4.0]}}))  # one disturbed
    found = rows(capsys, runs, "--baseline", "base", "--step_seconds", measured)
    assert float(found["nitp"]["step_time_ratio"]) == 1.5
    assert float(found["nitp"]["equal_seconds"]) == pytest.approx(-0.1 + 0.2)
    assert float(found["nitp"]["seconds_to_reach"]) == pytest.approx(180.0 / 0.6 * 1.5)
    assert float(found["nitp"]["tokens_per_second"]) == pytest.approx(8192 / 1.5)
    assert float(found["base600"]["tokens_per_second"]) == pytest.approx(8192)  # a longer run's steps are the same


def test_logs_whose_clocks_disagree_give_no_number_at_equal_seconds(runs, capsys):
    for seed in (1, 2):
        write_log(runs / f"base600-{seed}", [*BASE[seed], 1.9, BASE[seed][4] - 0.2], seed)
    log = runs / "nitp-1" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line | ({"seconds": line["seconds"] * 1.25} if "seconds" in line else {})) + "\n"
                           for line in lines))  # 50% slower than the base of its seed, the other 20%
    found = rows(capsys, runs, "--baseline", "base")
    assert found["nitp"]["equal_seconds"] == "" and found["nitp"]["equal_seconds_why_not"] == "clocks 25% apart"
    assert found["nitp"]["steps_to_reach"] != "" == found["nitp"]["seconds_to_reach"]
    compare.main([str(runs), "--baseline", "base"])
    printed = capsys.readouterr()
    assert "nitp (25%): step times differ between seeds" in printed.err and "clocks 25% apart" in printed.out
    (runs / "step_seconds.json").write_text(json.dumps({"seconds": {"base": [1.0, 1.0], "nitp": [1.2, 1.2]}}))
    found = rows(capsys, runs, "--baseline", "base")  # found by itself, and better
    assert float(found["nitp"]["equal_seconds"]) == pytest.approx(-0.1 + 0.2 * math.log(1.2) / math.log(1.5))
    compare.main([str(runs), "--baseline", "base"])
    assert "step times differ" not in capsys.readouterr().err
    found = rows(capsys, runs, "--baseline", "base", "--step_seconds", "logs")
    assert found["nitp"]["equal_seconds_why_not"] == "clocks 25% apart"


def test_the_way_is_to_where_the_baseline_ends_with_the_same_seeds(tmp_path, capsys):
    for seed, offset in ((1, 0.0), (2, 0.0), (3, 0.6)):  # a third seed of the baseline, far off
        write_log(tmp_path / f"base-{seed}", [v + offset for v in BASE[1]], seed)
        if seed < 3:
            write_log(tmp_path / f"same-{seed}", BASE[1], seed, variant())
    found = rows(capsys, tmp_path)["same"]
    assert float(found["steps_to_reach"]) == 400.0 and found["seeds_that_reach"] == "2"


def test_a_run_like_the_baseline_takes_as_long_whatever_the_noise(tmp_path, capsys):
    noisy = [6.0, 1.85, 1.80, 1.83, 1.82]
    for seed in (1, 2):
        write_log(tmp_path / f"base-{seed}", noisy, seed)
        write_log(tmp_path / f"same-{seed}", noisy, seed, variant())
    for last in (1, 3):
        found = rows(capsys, tmp_path, "--last", last)
        assert found["same"]["steps_to_reach"] == found["base"]["steps_to_reach"]
        assert found["same"]["difference_end"] == "0.0" and found["same"]["seeds_that_reach"] == (
            found["base"]["seeds_that_reach"])


def test_the_last_evaluations_are_as_many_steps_whatever_the_interval(tmp_path, capsys):
    fall = [6.0 - 0.01 * k for k in range(9)]
    write_log(tmp_path / "base-1", fall[::2], 1)
    log = write_log(tmp_path / "often-1", fall, 1, variant() | {"max_iters": 400, "eval_interval": 50})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line | ({"iter": line["iter"] // 2} if "val/ntp" in line else {})) + "\n"
                           for line in lines if "train/ntp" not in line))
    found = rows(capsys, tmp_path, "--last", 3)
    assert float(found["often"]["difference_end"]) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="--last=5: base has 4 evaluations after its start"):
        compare.main([str(tmp_path), "--last", "5"])


def test_a_run_that_was_cut_short_is_not_slower_for_it(runs, capsys):
    log = runs / "nitp-1" / "log.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")  # ends with a step behind an evaluation
    found = rows(capsys, runs / "base-1", log)
    assert float(found["nitp"]["step_time_ratio"]) == pytest.approx(1.2)


def test_step_times_that_were_not_measured_are_told(runs, tmp_path, capsys):
    (tmp_path / "steps.json").write_text(json.dumps({"seconds": {"base": [1.0]}}))
    compare.main([str(runs), "--step_seconds", str(tmp_path / "steps.json")])
    assert "nitp: step time not measured in turns with base's" in capsys.readouterr().err


def test_kept_runs_of_one_name_stay_two(tmp_path, capsys):
    for folder, weight in (("x", 0.1), ("y", 0.2)):
        write_log(tmp_path / folder / "nitp-1", NITP[1], 1, variant(weight))
    compare.main([str(tmp_path / "x"), str(tmp_path / "y"), "--keep", str(tmp_path / "kept.jsonl")])
    capsys.readouterr()
    assert set(rows(capsys, tmp_path / "kept.jsonl")) == {"nitp", "nitp (nitp_weight=0.2)"}


def test_runs_that_were_kept_are_not_lost(runs, tmp_path, capsys):
    kept, other = tmp_path / "kept.jsonl", tmp_path / "notes.jsonl"
    compare.main([str(runs), "--keep", str(kept)])
    compare.main([str(runs), "--keep", str(kept)])  # the same again
    before = kept.read_bytes()
    with pytest.raises(ValueError, match="kept.jsonl has [0-9]+ runs that would be lost .*nitp-1"):
        compare.main([*map(str, runs.glob("base-*")), "--keep", str(kept)])
    other.write_text("not a log\n")
    with pytest.raises(ValueError, match="notes.jsonl exists and is no log of runs"):
        compare.main([str(runs), "--keep", str(other)])
    assert kept.read_bytes() == before and other.read_text() == "not a log\n"


def test_nothing_is_said_of_steps_that_a_run_has_not_come_to(runs, capsys):
    found = rows(capsys, runs, "--steps", 300, 500)
    assert found["base"]["ntp_at_500"] == "" and found["nitp"]["difference_at_500"] == ""
    assert found["nitp"]["difference_at_300"] != ""


def test_another_baseline_can_be_named(runs, capsys):
    found = rows(capsys, runs, "--baseline", "nitp")
    assert list(found) == ["nitp", "base"] and float(found["base"]["difference_end"]) == pytest.approx(0.1)
    assert found["base"]["steps_to_reach"] == ""  # never
    with pytest.raises(ValueError, match="--baseline=mtp: expected one of base, nitp"):
        compare.main([str(runs), "--baseline", "mtp"])


def test_tables_on_the_terminal_in_markdown_and_on_a_page(runs, tmp_path, capsys):
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- four -->\nold\n<!-- /four -->\nafter\n")
    assert compare.main([str(runs), "--markdown", f"{page}#four", "--baseline", "nitp"]) == 0
    printed = capsys.readouterr().out
    assert "Difference to nitp at equal steps" in printed and "+0.1000 ± 0.0994" in printed and "worse" in printed
    assert "not reached" in printed and "1 of 3" in printed
    text = page.read_text()
    assert text.startswith("before\n<!-- four -->\n") and text.endswith("<!-- /four -->\nafter\n")
    assert "\nold\n" not in text
    assert "| base | 3 |" in text
    compare.main([str(runs), "--markdown", f"{page}#four", "--baseline", "nitp"])
    assert page.read_text() == text
    with pytest.raises(ValueError, match="results.md: expected the lines <!-- five -->"):
        compare.main([str(runs), "--markdown", f"{page}#five"])
    compare.main([str(runs), "--markdown", str(tmp_path / "whole.md"), "--csv", str(tmp_path / "whole.csv")])
    assert "**Validation NTP" in (tmp_path / "whole.md").read_text()
    assert (tmp_path / "whole.csv").read_text().startswith("set_up,seeds,")


def test_kept_logs_tell_the_same(runs, tmp_path, capsys):
    kept = tmp_path / "runs" / "kept.jsonl"
    measured = tmp_path / "steps.json"
    measured.write_text(json.dumps({"seconds": {"base": [7.0], "nitp": [8.0]}}))
    compare.main([str(runs), "--keep", str(kept), "--step_seconds", str(measured)])  # keeps what the logs say
    capsys.readouterr()
    whole, again = rows(capsys, runs), rows(capsys, kept)
    assert whole == again and "train/" not in kept.read_text()
    assert str(tmp_path) not in kept.read_text()  # where they lay is nobody's business
    assert kept.stat().st_size < sum(path.stat().st_size for path in runs.glob("*/log.jsonl"))


def test_a_verdict_among_several_says_whether_it_survives_correction(runs, capsys):
    """nitp's p is just below 0.05: enough for one set-up, too much for two."""
    for seed, values in BASE.items():
        write_log(runs / f"tie-{seed}", [v + 0.01 * (-1) ** seed for v in values], seed, variant(0.2))
    compare.main([str(runs)])
    first = capsys.readouterr().out.split("\n\n")[0].replace("\n    ", " ")
    assert "nitp: better by itself but not after Holm's correction, -0.100 ± 0.099, three seeds." in first
    assert "tie: no difference seen" in first
    for k in range(6):
        for seed, values in BASE.items():
            write_log(runs / f"far{k}-{seed}", [v + k + 1 + 0.001 * seed for v in values], seed, variant(k + 1.0))
    compare.main([str(runs)])
    first = capsys.readouterr().out.split("\n\n")[0].replace("\n    ", " ")
    assert "Against base at equal steps, better by itself but not after Holm's correction: nitp." in first
    assert "equal steps, worse: far0, far1, far2, far3, far4, far5." in first


def test_the_set_ups_and_what_they_ran_on_come_first(runs, capsys):
    compare.main([str(runs)])
    printed = capsys.readouterr().out
    sentence, set_ups, ran, *_ = printed.split("\n\n")
    assert sentence == "nitp: better, -0.100 ± 0.099, three seeds."
    assert printed.index("Set-ups") < printed.index("What was run") < printed.index("Validation NTP")
    assert "n_future_heads\u00a00\u00a0→\u00a01" in printed and "nitp_weight\u00a00.0\u00a0→\u00a00.1" in printed
    row = next(line for line in printed.splitlines() if line.startswith("validation tokens"))
    assert row.split() == ["validation", "tokens", "(checksum", "aa)", "all"]


def test_what_runs_ran_on_is_one_line_where_they_agree(tmp_path, capsys):
    for seed, commit, threads in ((1, "a" * 40, 1), (2, "b" * 40, 1)):
        facts = {"commit": commit, "dirty": seed == 2, "started": f"2026-01-0{seed}T10:00:00", "threads": threads,
                 "device_name": "a processor", "train_tokens": 1_234_567, "host": f"node{seed}", "pid": seed}
        config = {"dataset": "toy", "vocab_size": 512, "max_seq_len": 256, "train_fraction": 0.5}
        write_log(tmp_path / f"base-{seed}", BASE[seed], seed, config, facts)
        write_log(tmp_path / f"nitp-{seed}", NITP[seed], seed, config | variant(), facts)
    compare.main([str(tmp_path)])
    told = capsys.readouterr()
    table = told.out.split("What was run")[1].split("Validation NTP")[0]
    rows = [line.split() for line in table.splitlines() if line]
    assert ["data", "set", "toy,", "0.5", "of", "it,", "V", "512,", "T", "256", "all"] in rows
    assert ["training", "tokens", "1,234,567", "all"] in rows
    assert ["machine", "a", "processor,", "1", "thread", "all"] in rows
    assert ["commit", "a" * 12, "base,", "nitp"] in rows and ["b" * 12, "with", "changes", "base,", "nitp"] in rows
    assert ["begun", "2026-01-01", "base,", "nitp"] in rows
    assert "commit" in told.err and "host" not in told.err and "pid" not in told.err  # of each run its own


def many(folder: Path, count: int, **more) -> None:
    """A baseline and variants with long names, of four seeds."""
    for k in range(count):
        for seed in range(1, 5):
            noise = 0.01 * np.random.default_rng([k, seed]).normal(size=5)
            values = list(np.array(BASE[1]) + noise + 0.03 * (k % 3) * (k > 0))
            config = variant(0.01 * k) if k else {}
            write_log(folder / f"a_rather_long_name_of_a_set_up_{k:02}-{seed}", values, seed, config, **more)


def test_tables_fit_a_hundred_columns(tmp_path, capsys):
    many(tmp_path, 8, **{f"val__acc_{i}": [0.1] * 5 for i in range(9)})
    compare.main([str(tmp_path), "--steps", "100", "150", "200", "250", "300", "350"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("a_rather_long_name_of_a_set_up_07  0.1") for line in lines) == 2  # acc_0 to acc_8


def test_holms_column_and_the_order_by_difference(tmp_path, capsys):
    many(tmp_path, 4)
    found = rows(capsys, tmp_path, "--order", "difference")
    others = list(found.values())[1:]
    means = [float(row["difference_end"]) for row in others]
    assert means == sorted(means) and list(found)[0].endswith("00")
    ps = [float(row["difference_end_p"]) for row in others]
    compare.main([str(tmp_path), "--order", "difference"])
    table = capsys.readouterr().out.split("at equal steps, at the end")[1].split("on the way")[0]
    cells = [line.split()[-1] for line in table.splitlines() if line.startswith("a_rather")]
    smallest = min(range(3), key=ps.__getitem__)
    assert cells[smallest] == ("<0.001" if 3 * ps[smallest] < 0.001 else f"{3 * ps[smallest]:.3f}")
    assert "corrected for how many are compared" in table.replace("\n", " ")


def test_a_pooled_deviation_is_that_of_all_set_ups_but_the_baseline(tmp_path, capsys):
    """The right value: three set-ups of four pairs have 9 degrees of freedom, and t at 97.5% is 2.262."""
    many(tmp_path, 4)
    ends = {path.name: json.loads((path / "log.jsonl").read_text().splitlines()[-1])["val/ntp"]
            for path in tmp_path.iterdir()}
    base, *others = ([ends[f"a_rather_long_name_of_a_set_up_{k:02}-{seed}"] for seed in range(1, 5)] for k in range(4))
    variances = [np.var(np.subtract(other, base), ddof=1) for other in others]
    half = 2.262157 * math.sqrt(np.mean(variances) / 4)
    found = [[float(row["difference_end_half_interval"]) for row in list(rows(capsys, tmp_path, *words).values())[1:]]
             for words in ([], ["--pool"])]
    assert len(set(found[0])) == 3 and found[1] == pytest.approx([half] * 3, rel=1e-5)
    noise = []
    for words in ([], ["--pool"]):
        compare.main([str(tmp_path), *words])
        noise.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("all, pooled")])
    assert noise[0] and noise[0] == noise[1]


def test_no_verdict_below_three_pairs(runs, capsys):
    shutil.rmtree(runs / "nitp-3")
    assert rows(capsys, runs)["nitp"]["verdict"] == "too few"
    compare.main([str(runs)])
    assert "nitp: too few seeds to say, -0.120" in capsys.readouterr().out


def test_steps_and_seconds_until_a_metric_passes_a_value(tmp_path, capsys):
    """Of three pairs the variant is sooner in two; in one nobody gets there, and one baseline never does."""
    shares = {("base", 1): [0, 0.1, 0.2, 0.3, 0.2], ("base", 2): [0, 0, 0.1, 0, 0], ("base", 3): [0] * 5,
              ("mtp", 1): [0, 0.1, 0.3, 0.3, 0.4], ("mtp", 2): [0, 0, 0.1, 0.3, 0.2], ("mtp", 3): [0] * 5}
    for (name, seed), values in shares.items():
        write_log(tmp_path / f"{name}-{seed}", BASE[1], seed, variant() if name == "mtp" else {},
                  step_seconds=0.6 if name == "mtp" else 0.5, val__exact_in_1=values)
    goal = "until_val/exact_in_1=0.25_"
    found = rows(capsys, tmp_path, "--until", "val/exact_in_1=0.25", "val/ntp=2.5")
    base, mtp = found["base"], found["mtp"]
    assert (base[goal + "seeds"], base[goal + "steps"]) == ("1", "")  # most of its seeds never do
    assert (mtp[goal + "seeds"], float(mtp[goal + "steps"])) == ("2", pytest.approx(275.0))
    assert float(mtp[goal + "seconds"]) == pytest.approx(275.0 * 0.6) and mtp[goal + "sooner"] == "2"
    assert float(mtp[goal + "log_ratio"]) == pytest.approx(math.log(175 * 0.6 / (250 * 0.5)))
    assert float(mtp["until_val/ntp=2.5_steps"]) == 200.0  # a loss has to fall
    assert float(mtp["exact_in_1_difference"]) == pytest.approx((0.2 + 0.2 + 0.0) / 3)
    compare.main([str(tmp_path), "--until", "val/exact_in_1=0.25"])
    printed = capsys.readouterr().out
    assert "Until val/exact_in_1 >= 0.25" in printed and "2 of 2" in printed and "wholly right" in printed
    assert float(mtp[goal + "p_seconds"]) == float(mtp[goal + "p_steps"]) == 0.5  # two pairs, both sooner
    for word, says in (("val/exact", "--until=val/exact: expected KEY=VALUE"),
                       ("val/ntp=half", "--until=val/ntp=half: half of the end: expected a share"),
                       ("val/exact_in=1", "--until=val/exact_in: no run has it; there are .*val/exact_in_1")):
        with pytest.raises(ValueError, match=says):
            compare.main([str(tmp_path), "--until", word])


def test_the_goal_may_be_half_of_where_the_baseline_ends(tmp_path, capsys):
    for seed, end in ((1, 0.5), (2, 0.3)):  # half of the mean is 0.2
        write_log(tmp_path / f"base-{seed}", BASE[seed], seed, val__acc_again=[0, 0.1, 0.1, 0.25, end])
        write_log(tmp_path / f"mtp-{seed}", BASE[seed], seed, variant(), val__acc_again=[0, 0.3, 0.4, 0.8, 0.9])
    found = rows(capsys, tmp_path, "--until", "val/acc_again=half")
    assert float(found["base"]["until_val/acc_again=0.2_steps"]) == pytest.approx(200 + 100 * 0.1 / 0.15)
    assert float(found["mtp"]["until_val/acc_again=0.2_steps"]) == pytest.approx(100 * 0.2 / 0.3)
    compare.main([str(tmp_path), "--until", "val/acc_again=half"])
    assert "Until val/acc_again >= 0.2" in capsys.readouterr().out


def test_the_end_may_be_judged_by_another_metric(tmp_path, capsys):
    """Eight pairs; the baseline's longer run has five of the seeds, and gains as much as the ratio of steps says."""
    draw = np.random.default_rng(0)
    ends, gaps, gains = {}, {}, {}
    for seed in range(1, 9):
        ends[seed], gaps[seed], gains[seed] = draw.random(3) * (0.5, 0.3, 0.1) - (0, 0.05, 0)
        write_log(tmp_path / f"base-{seed}", BASE[1], seed, val__exact_in_1=[0, 0, 0, 0, ends[seed]])
        write_log(tmp_path / f"mtp-{seed}", NITP[1], seed, variant(), step_seconds=0.6,
                  val__exact_in_1=[0, 0, 0, 0, ends[seed] + gaps[seed]])
        if seed <= 5:
            write_log(tmp_path / f"base600-{seed}", [*BASE[1], 1.9, 1.8], seed,
                      val__exact_in_1=[0, 0, 0, 0, 0, 0, ends[seed] + gains[seed]])
    mtp = rows(capsys, tmp_path, "--baseline", "base", "--judge", "val/exact_in_1")["mtp"]
    at_cost = math.log(1.2) / math.log(1.5)
    at_equal = [gaps[seed] - at_cost * gains[seed] for seed in range(1, 6)]
    key = "val/exact_in_1_"
    assert float(mtp[key + "difference"]) == pytest.approx(np.mean(list(gaps.values())))
    assert float(mtp[key + "half_interval"]) == pytest.approx(
        stats.t.ppf(0.975, 7) * stats.sem(list(gaps.values())))
    assert float(mtp[key + "p"]) == stats.wilcoxon(list(gaps.values())).pvalue
    assert float(mtp[key + "equal_seconds"]) == pytest.approx(
        np.mean(list(gaps.values())) - at_cost * np.mean(list(gains.values())[:5]))
    assert float(mtp[key + "equal_seconds_p"]) == stats.wilcoxon(at_equal).pvalue
    compare.main([str(tmp_path), "--baseline", "base", "--judge", "val/exact_in_1", "val/ntp"])
    printed = capsys.readouterr().out
    assert "Difference to base in val/exact_in_1" in printed and "positive is better" in printed
    assert "Difference to base in val/ntp" in printed and "negative is better. p: Wil" in printed.replace("\n", " ")
    with pytest.raises(ValueError, match="--judge=val/exact: no run has it; there are .*val/exact_in_1"):
        compare.main([str(tmp_path), "--judge", "val/exact"])


def test_runs_on_other_validation_tokens_are_not_compared_and_that_is_in_red(runs, tmp_path, capsys):
    for seed in BASE:
        write_log(runs / f"other-{seed}", NITP[seed], seed, variant(0.3), {"val_crc32": "cc"})
    assert compare.main([str(runs), "--baseline", "base", "--html", str(tmp_path / "x.html")]) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "x.html").read_text()
    assert "other: cannot be compared, other validation tokens." in printed
    for name, text in (("printed", printed), ("page", page)):
        table = text.split("Difference to base at equal steps")[1].split("on the way")[0]
        assert "other: other validation tokens than base: val NTP cannot be compared" in table, name
        assert "not comparable" in table, name
    assert "<p class=grave>other:" in page and '<td class="worse">not comparable</td>' in page
    assert rows(capsys, runs, "--baseline", "base")["other"]["difference_end"] == ""


def test_equal_remarks_are_one_with_the_names_in_it(tmp_path, capsys):
    write_log(tmp_path / "base-1", BASE[1], 1)
    for k in range(3):
        write_log(tmp_path / f"v{k}-1", BASE[1], 1, variant(0.1 + k) | {"batch_size": 64})
    compare.main([str(tmp_path)])
    assert "compare.py: v0, v1, v2: batch_size=64, base has 32\n" in capsys.readouterr().err


def test_runs_that_start_from_checkpoints_of_their_own_seeds_are_a_group(tmp_path, capsys):
    for seed in (1, 2):
        for name in ("a", "b"):
            start = {"init_from": f"out/{name}-{seed}/last.pt"}
            write_log(tmp_path / f"after_{name}-{seed}", BASE[seed], seed, start)
    found = rows(capsys, tmp_path)
    assert {label: row["seeds"] for label, row in found.items()} == {"after_a": "1 2", "after_b": "1 2"}


# ---------------------------------------------------------------------------------------------
# foreign text

def test_no_name_or_setting_from_a_file_reaches_the_terminal_as_it_is(tmp_path, capsys):
    odd = "\x1b[2Jgone\x9b\x00"
    write_log(tmp_path / "base-1", BASE[1], 1)
    log = write_log(tmp_path / "x", BASE[1], 1, variant() | {"optimizer": odd, "a" * 9000: odd}, {"device": odd})
    log.write_text(log.read_text() + json.dumps({"iter": 400, f"val/{odd}": "x", "val/ntp": odd}) + "\n"
                   + json.dumps({"run": odd * 100, "iter": 0, "val/ntp": 2.0}) + "\n")
    compare.main([str(tmp_path), "--html", str(tmp_path / "x.html"), "--csv", str(tmp_path / "x.csv"),
                  "--markdown", str(tmp_path / "x.md")])
    told = capsys.readouterr()
    for text in (told.out, told.err, *((tmp_path / f"x.{kind}").read_text() for kind in ("html", "csv", "md"))):
        assert not any(c in text for c in "\x1b\x9b\x00")
    assert "gone" in told.out and max(map(len, told.err.splitlines())) < 2_000
    with pytest.raises(ValueError) as error:
        compare.main([str(tmp_path), "--baseline", odd])
    assert "\x1b" not in str(error.value)


def test_cells_that_a_spreadsheet_would_compute_are_quoted(tmp_path, capsys):
    for name in ("=1+1", "+a", "-b", "@c", "d"):
        write_log(tmp_path / f"{name}-1", BASE[1], 1, variant(len(name) + ord(name[0])))
    compare.main([str(tmp_path), "--csv"])
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["set_up"] for row in found} == {"'=1+1", "'+a", "'-b", "'@c", "d"}
    assert all(float(row["difference_end"]) == 0.0 for row in found)  # numbers stay numbers


def test_a_pipe_in_the_place_of_a_file_does_not_hang(runs):
    log, offline, steps, page = (runs / name for name in ("nitp-1/log.jsonl", "run-1.wandb", "steps.json", "page.md"))
    log.unlink()
    for path in (log, offline, steps, page):
        os.mkfifo(path)
    done = call(runs)
    for path in (log, offline):
        assert any(str(path) in line and "found a pipe or device" in line for line in done.stderr.splitlines())
    assert done.returncode == 0 and "Difference to base" in done.stdout  # the other runs are compared
    for words in (["--step_seconds", steps], ["--markdown", f"{page}#x"]):
        done = call(runs, *words)
        assert done.returncode == 1 and "expected a file, found a pipe or device" in done.stderr, words


# ---------------------------------------------------------------------------------------------
# groups and remarks

def test_runs_that_differ_in_the_seed_alone_are_a_group(tmp_path):
    write_log(tmp_path / "a-1", BASE[1], 1)
    write_log(tmp_path / "other_name", BASE[2], 2, {"wandb_log": True, "init_from": "resume", "eval_interval": 7})
    write_log(tmp_path / "a-3", BASE[3], 3, {"nitp_weight": 0.2})
    write_log(tmp_path / "z-1", BASE[1], 1)  # the same once more
    reader = Reader()
    for name in ("a-1", "other_name", "a-3", "z-1"):
        reader.read(str(tmp_path / name))
    found = group_runs(reader.runs, reader.problems)
    assert [(g.label, list(g.runs)) for g in found] == [("a", [1, 2]), ("a (nitp_weight=0.2)", [3])]
    assert len(reader.problems) == 1 and "z-1" in reader.problems[0].who and "same settings" in reader.problems[0].what


def test_logs_with_the_old_name_of_a_setting_are_of_the_same_set_up(tmp_path):
    """decay_lr is lr_schedule by now."""
    for seed, old in ((1, {"decay_lr": True}), (2, {"lr_schedule": "cosine"}), (3, {"decay_lr": False}),
                      (4, {"lr_schedule": "constant"}), (5, {"lr_schedule": "wsd"})):
        write_log(tmp_path / f"run-{seed}", BASE[1], seed, old)
    reader = Reader()
    reader.read(str(tmp_path))
    assert [list(group.runs) for group in group_runs(reader.runs, reader.problems)] == [[1, 2], [3, 4], [5]]
    assert not reader.problems


def test_what_else_differs_is_told(tmp_path, capsys):
    write_log(tmp_path / "base-1", BASE[1], 1)
    write_log(tmp_path / "base-2", BASE[2], 2, facts={"torch": "2", "path": "plain"})
    write_log(tmp_path / "big-1", BASE[1], 1, {"batch_size": 64} | variant(), {"val_crc32": "cc", "cores": [0, 1]})
    write_log(tmp_path / "big-9", BASE[1], 9, {"batch_size": 64} | variant())
    write_log(tmp_path / "long-1", [*BASE[1], 1.9], 1, variant(0.5))
    compare.main([str(tmp_path)])
    told = capsys.readouterr().err
    assert 'base: its seeds differ in path: fast, plain' in told
    assert "big: batch_size=64, base has 32" in told
    assert "big: other validation tokens than base: val NTP cannot be compared" in told
    assert "big: not pinned" in told and "base: not pinned" not in told
    assert "big: seeds 2, 9 are in only one of it and base" in told
    assert "long: ends at step 500, base at 400; no difference at the end" in told
    assert "nitp_weight" not in told and "cores" not in told.replace("to cores of", "")


def test_one_seed_in_two_types_of_products_is_two_set_ups(tmp_path, capsys):
    for seed in (1, 2):
        write_log(tmp_path / f"base-{seed}", BASE[seed], seed, facts={"dtype": "float32"})
        write_log(tmp_path / "half" / f"base-{seed}", [v + 0.5 for v in BASE[seed]], seed, facts={"dtype": "bfloat16"})
    words = "base-1", "half/base-1", "half/base-2", "base-2"  # the first group could take the second seed of either
    found, half = rows(capsys, *(tmp_path / word for word in words)), "base (dtype=bfloat16)"
    assert {label: row["seeds"] for label, row in found.items()} == {"base": "1 2", half: "1 2"}
    assert float(found[half]["difference_end"]) == pytest.approx(0.5)


def test_compare_starts_without_torch():
    code = "import sys, compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(compare.__file__).parent, check=False).returncode == 0


# ---------------------------------------------------------------------------------------------
# what is broken

@pytest.mark.parametrize("rows", [1, 3000])  # less and more than Python holds back before it writes
def test_a_full_disk_is_told_and_a_closed_pipe_is_not(rows, runs):
    words = [sys.executable, "compare.py", str(runs), "--steps", *map(str, range(1, rows + 1))]
    cwd = Path(compare.__file__).parent
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=cwd, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "compare.py: cannot write: No space left" in done.stderr.splitlines()[-1]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, cwd=cwd, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and "Error" not in done.stderr


def test_a_broken_log_is_told_by_run_and_line_and_the_rest_is_compared(runs, tmp_path, capsys):
    (runs / "empty").mkdir()
    (runs / "empty" / "log.jsonl").write_text("")
    (runs / "blind").mkdir()
    (runs / "blind" / "log.jsonl").write_text('{"iter": 0, "train/ntp": 3.0}\n')
    (runs / "odd").mkdir()
    (runs / "odd" / "log.jsonl").write_bytes(b'\xff\xfe\n[1, 2]\n{"iter": 1.5, "val/ntp": 2}\n{"val/ntp": 2}\n'
                                             b'{"iter": 3, "val/ntp": "low"}\n{"iter": -1}\nnull\n')
    nan = runs / "nitp-2" / "log.jsonl"
    lines = nan.read_text().splitlines()
    lines[5] = lines[5].replace('"val/ntp": 2.4', '"val/ntp": NaN')
    nan.write_text("\n".join(lines) + "\n")
    half = runs / "nitp-3" / "log.jsonl"
    half.write_text(half.read_text() + '{"iter": 410, "val/nt')
    short = runs / "base-3" / "log.jsonl"
    short.write_text("\n".join(short.read_text().splitlines()[:6]) + "\n")
    untimed = runs / "nitp-1" / "log.jsonl"
    untimed.write_text(untimed.read_text().replace('"seconds"', '"secs"'))
    found = rows(capsys, runs, "--baseline", "base")
    assert compare.main([str(runs), "--baseline", "base"]) == 0
    told = capsys.readouterr().err
    assert "empty/log.jsonl: empty" in told and f"blind/log.jsonl, {runs}/odd/log.jsonl: no val/ntp in it" in told
    assert "odd/log.jsonl: line 1: not JSON; left out" in told
    assert "nitp-2/log.jsonl: line 6: val/ntp is nan; left out" in told
    assert "nitp-3/log.jsonl: line 11: half-written; left out" in told
    assert "base-3/log.jsonl: ends at iter 200 of 400" in told and "its group at 400; left out" in told
    assert "nitp-1/log.jsonl: line 2: an evaluation without tokens or seconds, the first of 5" in told
    assert found["base"]["seeds"] == "1 2" and found["nitp"]["seeds"] == "1 2 3" and found["nitp"]["pairs"] == "2"
    assert float(found["nitp"]["difference_end"]) == pytest.approx(-0.12)


def test_a_resumed_run_on_another_path_is_told(runs, capsys):
    log = runs / "base-1" / "log.jsonl"
    header, *rest = log.read_text().splitlines()
    other = json.loads(header)
    other["facts"]["path"], other["config"]["init_from"], other["iter"] = "plain", "resume", 200
    log.write_text("\n".join([header, *rest[:4], json.dumps(other), *rest[4:]]) + "\n")
    assert rows(capsys, runs)["base"]["seeds"] == "1 2 3"
    compare.main([str(runs)])
    assert "base-1/log.jsonl: line 6: goes on with path=plain, was fast" in capsys.readouterr().err


@pytest.mark.parametrize("word,says", [
    ("nowhere", "nowhere: no such file or folder"), ("", "no run there"),
    ("wandb:me", "expected wandb:entity/project")])
def test_words_that_name_no_run_are_told_and_the_rest_is_compared(runs, tmp_path, capsys, word, says):
    word = word if word.startswith("wandb:") else str(tmp_path / word)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare.main([word])
    assert says in capsys.readouterr().err
    assert compare.main([str(runs), word]) == 1
    told = capsys.readouterr()
    assert says in told.err and "Difference to base" in told.out


@pytest.mark.parametrize("line", [
    '{"iter": 1, "val/ntp": %s}' % ("9" * 400), '{"iter": %s, "val/ntp": 2}' % ("9" * 400), "[" * 100_000,
    '{"iter": 0, "config": {"max_iters": "many"}}', '{"iter": 0, "config": {"init_from": 3, "seed": [1]}}',
    '{"iter": 0, "config": {"seed": {}}, "facts": {"device": "cpu", "cores": 4, "threads": "x"}}',
    '{"iter": 0, "config": 3}', '{"iter": 0, "config": {}, "facts": []}', '{"iter": 3, "val/ntp": 1e308}',
    '{"iter": 3, "seconds": true}'])
def test_no_line_however_odd_stops_a_comparison(runs, tmp_path, capsys, line):
    log = runs / "nitp-1" / "log.jsonl"
    log.write_text(log.read_text() + line + "\n")
    assert compare.main([str(runs), "--html", str(tmp_path / "page.html")]) == 0
    told = capsys.readouterr()
    assert "nitp-1/log.jsonl: line 11: " in told.err and "nitp" in told.out


def test_a_run_that_goes_on_with_other_settings_is_told(runs, capsys):
    log = runs / "base-1" / "log.jsonl"
    header, *rest = log.read_text().splitlines()
    other = json.loads(header)
    other["config"] |= {"learning_rate": 9.0, "max_iters": 400, "wandb_log": True}
    other["facts"]["cores"] = [3]
    log.write_text("\n".join([header, *rest[:4], json.dumps(other), *rest[4:]]) + "\n")
    compare.main([str(runs / "base-1")])
    assert "line 6: goes on with learning_rate=9.0, was 0.002\n" in capsys.readouterr().err


def test_names_of_logs_without_settings(tmp_path, capsys):
    for name, values in (("mtp4", BASE[1]), ("mtp8", BASE[2]), ("a-1337", BASE[1]), ("a_seed1338", BASE[2])):
        path = write_log(tmp_path / name, values)
        path.write_text("".join(path.read_text().splitlines(True)[1:]))
    found = rows(capsys, tmp_path)
    assert set(found) == {"mtp4", "mtp8", "a"} and found["a"]["seeds"] == "1337 1338"
    assert found["mtp4"]["difference_end"] == ""
    compare.main([str(tmp_path)])
    assert "mtp4: the seed of" in capsys.readouterr().err


def test_odd_names(tmp_path, capsys):
    for k, name in enumerate(("base", "$x_1$", "_under", "a|b", "two\nlines")):
        for seed in (1, 2):
            write_log(tmp_path / f"{name}-{seed}", BASE[seed], seed, variant(k))
    compare.main([str(tmp_path), "--baseline", "base", "--html", str(tmp_path / "x.html"),
                  "--markdown", str(tmp_path / "x.md")])
    page = (tmp_path / "x.html").read_text()
    svgs = "".join(part.split("</svg>")[0] for part in page.split("<svg")[1:])
    assert "$x_1$ (2)" in svgs and "_under (2)" in svgs and "two lines" in capsys.readouterr().out
    assert r"a\|b" in (tmp_path / "x.md").read_text()


def test_logs_of_many_lines_are_read_in_no_time(tmp_path):
    """Quadratic work would take minutes."""
    lines = [{"iter": k, "tokens": k, "seconds": k / 10, "train/ntp": 2.0} | ({"val/ntp": 2.0} if k % 50 == 0 else {})
             for k in range(30_001)]
    for name in ("a-1", "a-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call(tmp_path, "--html", tmp_path / "x.html")
    assert done.returncode == 0 and "step 22,500" in done.stdout, done.stderr


def test_a_program_is_told_what_to_write_after_what_to_read(runs, tmp_path):
    kept = tmp_path / "kept.jsonl"
    compare.main([str(runs), "--keep", str(kept)])
    before = kept.read_bytes()
    for words in (["--csv", kept, runs], [kept, "--keep", kept], ["--html", kept, runs]):
        done = call(*words)
        assert done.returncode == 2 and kept.read_bytes() == before, words


@pytest.mark.parametrize("content", ["", "{}", '{"seconds": {"base": []}}', '{"seconds": {"base": ["1"]}}',
                                     "[" * 100_000, '{"seconds": {"base": [1%s]}}' % ("0" * 400),
                                     '{"seconds": {"base": [true]}}',
                                     '{"seconds": {"base": [1, 2], "nitp": [1]}}'])
def test_step_times_that_are_none_are_refused(runs, tmp_path, content):
    (tmp_path / "steps.json").write_text(content)
    with pytest.raises(ValueError, match="steps.json: (no step times|expected JSON)"):
        compare.main([str(runs), "--step_seconds", str(tmp_path / "steps.json")])


# ---------------------------------------------------------------------------------------------
# wandb

def test_an_offline_run_tells_what_its_log_tells(words, tmp_path, wandb_dir, capsys):
    assert train.main([*words(n_future_heads=1, nitp_weight=0.1), "--wandb_log", "--wandb_mode=offline",
                       "--wandb_run_name=mine"]) == 0
    (folder,) = wandb_dir.glob("offline-run-*")
    deadline = time.monotonic() + 60  # wandb's own process may still be writing, on a busy machine
    while True:
        local, offline = Reader(), Reader()
        local.read(str(tmp_path / "out"))
        offline.read(str(folder))
        if offline.runs and offline.runs[0].length == 8 or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert not local.problems and not offline.problems
    (a,), (b,) = local.runs, offline.runs
    assert b.name == "mine" and a.config == b.config and a.facts == b.facts
    assert [{k: v for k, v in line.items() if not k.startswith("_")} for line in b.lines] == a.lines

    assert train.main([*words(n_future_heads=1, nitp_weight=0.1, max_iters=12), "--wandb_log",
                       "--wandb_mode=offline", "--init_from=resume"]) == 0  # wandb begins another file
    deadline = time.monotonic() + 60
    while True:
        whole = Reader()
        whole.read(str(wandb_dir))
        if whole.runs and whole.runs[0].length == 12 or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert len(whole.runs) == 1 and [line["iter"] for line in whole.runs[0].lines] == list(range(13))

    (file,) = folder.glob("*.wandb")
    data = file.read_bytes()
    for cut in (len(data) - 1, len(data) // 2):
        file.write_bytes(data[:cut])
        reader = Reader()
        reader.read(str(file))
        assert any("half-written or broken" in problem.what for problem in reader.problems)
    file.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    assert list(leveldb_records(file.read_bytes()))[-1] is None  # the checksum tells
    file.write_bytes(b"something else")
    reader = Reader()
    reader.read(str(file))
    assert not reader.runs and "not a file of wandb's" in reader.problems[0].what


def test_records_of_wandbs_files_may_span_blocks():
    """Written here as LevelDB describes it, in blocks of 32 KiB whose last 6 bytes may be too few for a header."""
    records = [b"a" * 100, b"b" * (32768 - 7 - 107 - 7 - 5), b"c" * 70_000, b"d"]  # the second leaves 5 bytes
    data = b":W&B123"
    for record in records:
        first = True
        while first or record:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += b"\0" * room
                continue
            piece, record = record[: room - 7], record[room - 7 :]
            kind = bytes([{(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not record]])
            data += struct.pack("<IH", zlib.crc32(kind + piece), len(piece)) + kind + piece
            first = False
    assert list(leveldb_records(data)) == records
    assert list(leveldb_records(data[:-1])) == [*records[:-1], None]


@pytest.fixture
def wandb_server(tmp_path):
    """The environment of a program whose wandb is a local server with recorded answers about two runs.

    As wandb's own client asks (0.31.0): GraphQL for who we are, projects, runs, and pages of their histories.
    """
    user = {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}
    histories = {"a1": BASE[1], "b2": ["NaN", *BASE[2][1:]]}

    def run(name: str) -> dict:
        config = CONFIG | {"seed": int(name[1]), "facts": FACTS, "_wandb": {}}
        text = dict.fromkeys(("description", "notes", "group", "jobType", "commit", "sweepName"))
        return text | {
            "projectId": "7", "id": name, "tags": [], "name": name, "displayName": f"base-{name[1]}",
            "state": "finished", "config": json.dumps({key: {"value": value} for key, value in config.items()}),
            "readOnly": False, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
            "systemMetrics": "{}", "summaryMetrics": "{}", "historyLineCount": 5,
            "user": {"name": "me", "username": "me"}, "historyKeys": {"lastStep": 4, "sets": [], "keys": {}}}

    def answer(query: str, asked: dict) -> dict:
        name = asked.get("runName") or asked.get("run") or asked.get("name")
        if "viewer {" in query:
            return user
        if asked.get("project") != "lab":
            return {"project": None}
        if "query Runs(" in query:
            edges = [{"node": run(each), "cursor": each} for each in histories]
            return {"project": {"internalId": "7", "runCount": 2, "readOnly": False, "runs": {
                "edges": edges, "pageInfo": {"endCursor": "b2", "hasNextPage": False}}}}
        if name not in histories:
            return {"project": {"run": None}}
        rows = [{"_step": k, "_runtime": k, "iter": 100 * k, "tokens": 100 * k, "seconds": 50.0 * k, "val/ntp": value}
                for k, value in enumerate(histories[name])]
        if "parquetHistory" in query:
            return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": rows}}}}
        if "query HistoryPage" in query:
            return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}
        return {"project": {"run": run(name), "internalId": "7"}}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            asked = json.loads(body) if "graphql" in self.path else {}  # else wandb's own telemetry
            told = answer(asked["query"], asked.get("variables") or {}) if asked else {}
            content = json.dumps({"data": told}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield os.environ | {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40,
                        **{f"WANDB_{kind}_DIR": str(tmp_path) for kind in ("CACHE", "CONFIG", "DATA")}}
    server.shutdown()
    server.server_close()


def test_runs_at_wandb(wandb_server):
    done = call("wandb:me/lab/a1", "wandb:me/lab", "--csv", env=wandb_server)
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert row["set_up"] == "base" and row["seeds"] == "1 2" and float(row["ntp_end"]) == pytest.approx(2.05)
    assert "wandb:me/lab/b2: step 0: val/ntp is NaN; left out" in done.stderr
    assert "wandb:me/lab/a1: the same settings and seed as wandb:me/lab/a1; left out" in done.stderr  # asked for twice
    for word, says in (("wandb:me/lab/xyz", "Could not find run"), ("wandb:me/other", "Could not find project")):
        done = call(word, env=wandb_server)
        assert done.returncode == 1 and done.stderr.startswith(f"compare.py: {word}: wandb says: {says}"), done.stderr


# ---------------------------------------------------------------------------------------------
# plots and page

class Page(HTMLParser):
    """Collects tags, and what the page would have to fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.fetched, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.fetched.append(value)

    def handle_data(self, data):
        self.words.append(data)


def test_plots_and_a_page_that_needs_nothing_else(runs, tmp_path, capsys):
    for seed in BASE:
        write_log(runs / f"base600-{seed}", [*BASE[seed], 1.9, BASE[seed][4] - 0.2], seed)
    assert compare.main([str(runs), "--baseline", "base", "--plots", str(tmp_path / "plots"), "--title", "A <b> & c",
                         "--html", str(tmp_path / "report.html")]) == 0
    names = {"ntp_step", "ntp_seconds", "difference", "ends", "train_ntp", "val_acc_0", "val_acc_1", "val_nitp_1",
             "weights"}  # not ntp_tokens: as many tokens a step for all, so it would be ntp_step once more
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{n}.{kind}" for n in names
                                                                      for kind in ("svg", "png")}
    for path in (tmp_path / "plots").glob("*.svg"):
        text = " ".join(xml.parse(path).getroot().itertext())
        assert "nitp" in text, path.name
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").glob("*.png"))
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == len(names) and page.tags.count("table") == 9 and not page.fetched
    assert "@import" not in text and "url(http" not in text and "#010203" not in text and "currentColor" in text
    assert "A <b> & c" in "".join(page.words) and "<b>" not in text  # escaped
    assert text.index("<h2>Set-ups") < text.index("<h2>Validation NTP") and "compare.py" in text
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert not any(name.startswith(("figure_", "axes_")) for name in ids)


def test_no_plot_is_drawn_twice_or_nearly_empty(tmp_path):
    from study import report

    def drawn(folder) -> set[str]:
        reader = Reader()
        reader.read(str(folder))
        found = group_runs(reader.runs, reader.problems)
        return set(report.panels(figures(found, step_ratios(found, {}), [])))

    kl = [0.1, 0.5, 1.0, 1.2, 1.3]
    for seed in (1, 2):
        write_log(tmp_path / "a" / f"base-{seed}", BASE[seed], seed)
        write_log(tmp_path / "a" / f"x-{seed}", NITP[seed], seed, variant(), val__kl_1=kl, val__consistency_1=kl,
                  val__kl_2=kl[::-1], lr=[0.1] * 5)
        write_log(tmp_path / "b" / f"base-{seed}", BASE[seed][:2], seed)
        write_log(tmp_path / "b" / f"x-{seed}", NITP[seed][:2], seed, variant(), val__kl_1=kl[:2])
        write_log(tmp_path / "c" / f"x-{seed}", NITP[seed], seed)
        write_log(tmp_path / "c" / f"big-{seed}", NITP[seed], seed, {"batch_size": 64}, more_tokens=[1] * 5)
    common = {"ntp_step", "difference", "ends"}
    assert drawn(tmp_path / "a") == common | {"ntp_seconds", "train_ntp", "val_consistency_1", "val_kl_2", "lr"}
    assert drawn(tmp_path / "b") == {"ntp_step", "ends"}  # two evaluations: the tables have them
    for log in (tmp_path / "c").glob("big-*/log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps(line | ({"tokens": 2 * line["tokens"]} if "tokens" in line else {})) + "\n"
                               for line in lines))
    assert "ntp_tokens" in drawn(tmp_path / "c")


def test_tick_labels_do_not_touch():
    from study import report

    def long_numbers(axes):
        axes.plot([1_000_000_000, 1_000_700_000], [0, 1])
        axes.ticklabel_format(style="plain", useOffset=False)
        axes.set_ylabel("a label")

    def many_values(axes):
        axes.plot(range(40), range(40))
        axes.set_xticks(range(40), [f"{1000 + k}" for k in range(40)])

    for draw in (long_numbers, many_values):
        made = report.figure("title", draw)
        made.draw_without_rendering()
        (axes,) = made.axes
        low, high = axes.get_xlim()
        boxes = [label.get_window_extent() for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
                 if low <= at <= high]
        assert len(boxes) > 1 and not any(a.x1 > b.x0 for a, b in zip(boxes, boxes[1:], strict=False)), draw


def test_the_band_holds_all_seeds_and_the_line_is_their_mean(runs):
    from study import report

    reader = Reader()
    reader.read(str(runs))
    found = group_runs(reader.runs, reader.problems)
    made = report.figure("title", report.curves(found, "val/ntp", "tokens"))
    (axes,) = made.axes
    line = axes.get_lines()[0]
    assert line.get_label() == "base (3)" and line.get_xdata().tolist() == [k * 100 * 8192 for k in range(5)]
    assert line.get_ydata() == pytest.approx(np.mean(list(BASE.values()), axis=0))
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 6.0 and band[:, 1].min() == pytest.approx(1.9)


def test_as_a_program(runs, tmp_path):
    done = call(runs, "--plots", tmp_path / "plots")
    assert done.returncode == 0 and "Validation NTP" in done.stdout and (tmp_path / "plots" / "ends.svg").exists()
    done = call(runs, "--plots", tmp_path / "one", "--draw", "ends")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"ends.svg", "ends.png"}
    done = call(runs, "--plots", tmp_path / "one", "--draw", "end")
    assert done.returncode == 1 and "--draw end: expected some of ntp_step, " in done.stderr
    done = call(tmp_path / "nowhere")
    assert done.returncode == 1 and done.stderr.startswith("compare.py: ") and "Traceback" not in done.stderr
    (tmp_path / "file").write_text("")
    done = call(tmp_path / "file")
    assert done.returncode == 1 and "nothing to compare" in done.stderr
    assert call(runs, "--last", 0).returncode == 2


# ---------------------------------------------------------------------------------------------
# along a setting

@pytest.fixture
def little(tmp_path):
    """Runs of base and nitp at two fractions of the data, in folders of the same names; the lowest loss comes early."""
    for fraction, shift in ((0.1, 0.5), (1.0, 0.0)):
        for seed in (1, 2, 3):
            for name, config, gain in (("base", {}, 0.0), ("nitp", variant(), 0.1 * fraction + 0.01 * seed)):
                values = [6.0, 3.0 + shift, 2.0 + shift - gain, 2.5 + shift, 2.7 + shift]
                folder = tmp_path / f"at{fraction}" / f"{name}-{seed}"
                write_log(folder, values, seed, config | {"train_fraction": fraction})
    return [str(tmp_path / "at1.0"), str(tmp_path / "at0.1")]


def test_each_value_of_a_setting_is_compared_by_itself(little, tmp_path, capsys):
    words = ["--along", "train_fraction", "--best", "--csv"]
    assert compare.main([*little, *words, "--keep", str(tmp_path / "kept.jsonl")]) == 0
    told = capsys.readouterr()
    found = list(csv.DictReader(io.StringIO(told.out)))
    assert [(row["train_fraction"], row["set_up"]) for row in found] == [
        ("0.1", "base"), ("0.1", "nitp"), ("1.0", "base"), ("1.0", "nitp")]
    assert [float(row["ntp_end"]) for row in found] == pytest.approx([2.5, 2.47, 2.0, 1.88])
    assert [float(row["ntp_end_step"]) for row in found] == [200.0] * 4
    assert [float(row["difference_end"] or 0) for row in found] == pytest.approx([0.0, -0.03, 0.0, -0.12])
    assert [row["pairs"] for row in found] == ["3"] * 4
    half = 4.302652729911275 * 0.01 / 3**0.5  # Student's t with two degrees of freedom
    assert float(found[1]["difference_end_half_interval"]) == pytest.approx(half)
    assert "train_fraction=" not in told.err  # within a value they do not differ in it
    assert compare.main([str(tmp_path / "kept.jsonl"), *words]) == 0
    assert capsys.readouterr().out == told.out


def test_what_is_drawn_along_a_setting(little, tmp_path, capsys):
    words = ["--along", "train_fraction", "--best", "--plots", str(tmp_path / "p"), "--html", str(tmp_path / "r.html")]
    assert compare.main([*little, *words]) == 0
    out = capsys.readouterr().out
    assert "Validation NTP against train_fraction" in out and "lowest evaluation" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:2] == ["nitp", "3"])
    assert row == ["nitp", "3", "2.4700", "0.0100", "200", "-0.0300", "±", "0.0248", "better", "3"]
    assert {p.name for p in (tmp_path / "p").glob("*.svg")} == {"along_train_fraction.svg",
                                                               "difference_along_train_fraction.svg"}
    assert "against train_fraction" in (tmp_path / "r.html").read_text()
    assert compare.main([*little, "--along", "train_fraction"]) == 0  # the end: as high for both
    assert any(line.split()[:3] == ["nitp", "3", "3.2000"] for line in capsys.readouterr().out.splitlines())


def test_a_single_seed_has_no_bar(little, tmp_path, monkeypatch):
    """A bar of length zero would claim a certainty that one seed does not give."""
    drawn, errorbar = [], Axes.errorbar

    def note(self, at, mean, yerr, **more):
        drawn.append((more["label"], list(at), [list(map(math.isnan, side)) for side in yerr]))
        return errorbar(self, at, mean, yerr, **more)

    monkeypatch.setattr(Axes, "errorbar", note)
    for name in ("base", "nitp"):
        for seed in (2, 3):
            shutil.rmtree(tmp_path / "at0.1" / f"{name}-{seed}")
    assert compare.main([*little, "--along", "train_fraction", "--best", "--plots", str(tmp_path / "p")]) == 0
    alone = [[True, False]] * 2
    assert drawn[:2] == [("base", [0.1, 1.0], alone), ("nitp", [0.1, 1.0], alone)]
    assert ("nitp", [0.1, 1.0], alone) in drawn[2:]  # of differences


def test_set_ups_along_a_setting_have_the_seeds_of_all_values(little, tmp_path, capsys):
    shutil.rmtree(tmp_path / "at1.0" / "nitp-3")
    assert compare.main([*little, "--along", "train_fraction", "--markdown"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "→" in line and line.startswith("| nitp")]
    assert [line.split(" | ")[2] for line in lines] == ["1-3"]


def test_a_value_without_the_baseline_is_left_out(little, tmp_path, capsys):
    for seed in (1, 2, 3):
        shutil.rmtree(tmp_path / "at0.1" / f"base-{seed}")
    words = ["--along", "train_fraction", "--baseline", "base"]
    assert compare.main([*little, *words, "--csv"]) == 0
    told = capsys.readouterr()
    assert [(row["set_up"], float(row["ntp_end"])) for row in csv.DictReader(io.StringIO(told.out))] == [
        ("base", pytest.approx(2.7)), ("nitp", pytest.approx(2.7))]
    assert told.err.count("train_fraction=0.1: no run of base; left out") == 1
    with pytest.raises(ValueError, match="--baseline=bas: expected one of nitp"):
        compare.main([*little, "--along", "train_fraction", "--baseline", "bas"])


def test_a_setting_that_runs_do_not_have(little, tmp_path, capsys):
    write_log(tmp_path / "at1.0" / "odd-1", BASE[1], 1, {"train_fraction": "all"})
    assert compare.main([*little, "--along", "train_fraction"]) == 0
    assert "odd-1: train_fraction: expected a number, found 'all'; left out" in capsys.readouterr().err.replace(
        "/log.jsonl", "")
    with pytest.raises(ValueError, match="nothing to compare"):
        compare.main([*little, "--along", "head_decay"])
    with pytest.raises(SystemExit):
        compare.main([*little, "--best", "--last", "2"])
