"""Every answer against a slow reference; windows are rows; what is scored, and how."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import synthetic
import tinystories
from bench import arithmetic
from formats.checkpoint import load_model
from model import ModelArgs, Transformer
from synthetic import Answers, Name, Spelling
from text.tokenizer import BOS, EOS, ByteTokenizer, load_tokenizer
from tinystories import Windows


def make(data_dir, *words):
    """The folder that a command has written."""
    synthetic.main([*words, f"--data_dir={data_dir}"])
    return next((data_dir / words[0]).iterdir())


def rows_of(folder, split, vocab_size, T):
    """(tokens, groups) of each row as train.py sees it: x and the last target; groups only for val."""
    windows = Windows(folder / f"{split}.bin", vocab_size, T)
    x, y = windows.rows(range(len(windows)))
    assert len(windows) * T + 1 == len(windows.tokens)
    assert (x[:, 0] == BOS).all() and (y[:, -1] == BOS).all() and not (x[:, 1:] == BOS).any()
    marks = np.fromfile(folder / "val.answers.bin", dtype=np.uint8) if split == "val" else np.zeros(len(windows) * T)
    return list(zip(x.tolist(), marks[: len(windows) * T].reshape(-1, T).tolist(), strict=True))


def everything_right(folder, T):
    """Scores of a model that makes no mistake."""
    windows, answers = Windows(folder / "val.bin", 1 << 16, T), Answers.find(folder / "val.bin")
    _, y = windows.rows(range(len(windows)))
    return answers.score(range(len(windows)), T, y, y)


# ---------------------------------------------------------------------------------------------
# arithmetic

ARITHMETIC = ("arithmetic", "--vocab_size=16", "--length=8")  # modulo 13: 156 pairs, 15 of them for validation


def test_rows_are_progressions_and_windows_are_rows(tmp_path):
    folder = make(tmp_path, *ARITHMETIC, "--sequences=100")
    assert folder.name == "tok16"
    pairs = {}
    for split, count in (("train", 100), ("val", 15)):
        rows = rows_of(folder, split, 16, 8)
        for tokens, groups in rows:
            numbers = [t - 3 for t in tokens[1:]]
            assert 0 <= min(numbers) and len({(b - a) % 13 for a, b in zip(numbers, numbers[1:])} - {0}) == 1
            assert split == "train" or groups == [0, 0, 0, 1, 2, 2, 2, 2]
        pairs[split] = {tuple(tokens[1:3]) for tokens, _ in rows}
        assert len(rows) == len(pairs[split]) == count
    assert not pairs["train"] & pairs["val"]
    assert everything_right(folder, 8) == {"third": (15, 15), "rest": (15, 15)}


def test_validation_and_first_rows_do_not_depend_on_how_many_there_are(tmp_path):
    few, many = (make(tmp_path / n, *ARITHMETIC, f"--sequences={n}") for n in ("20", "141"))
    assert (few / "val.bin").read_bytes() == (many / "val.bin").read_bytes()
    assert (many / "train.bin").read_bytes().startswith((few / "train.bin").read_bytes())
    with pytest.raises(ValueError, match="--sequences=142: expected at most 141"):
        make(tmp_path / "more", *ARITHMETIC, "--sequences=142")


# ---------------------------------------------------------------------------------------------
# polynomials

def reference(tokens):
    """Value of a prefix expression, popped from the end of `tokens` backwards: all powers in full, cut at the end."""
    stack = []
    for token in reversed(tokens):
        if token < 10:
            stack.append(token - 3)
        elif token == 10:
            f = [stack.pop() for _ in range(5)]
            stack += [(7 - c) % 7 for c in reversed(f)]
        else:
            f, g = ([stack.pop() for _ in range(5)] for _ in range(2))
            if token == 11:
                value = np.array(f) + np.array(g)
            elif token == 12:
                value = np.convolve(f, g)
            else:
                value, power = np.zeros(17, dtype=np.int64), np.array([1])
                for c in f:
                    value[: len(power)] += c * power
                    power = np.convolve(power, g)
            stack += [int(c) % 7 for c in value[:5]][::-1]
    assert len(stack) == 5
    return stack[::-1]


def test_the_reference_knows_a_product_and_a_composition():
    x, one_plus_x = [3, 4, 3, 3, 3], [4, 4, 3, 3, 3]
    assert reference([12, *one_plus_x, *one_plus_x]) == [1, 2, 1, 0, 0]
    assert reference([13, 3, 3, 3, 4, 3, *one_plus_x]) == [1, 3, 3, 1, 0]  # X^3 of 1 + X
    assert reference([13, *one_plus_x, 3, 3, 3, 4, 3]) == [1, 0, 0, 1, 0]  # 1 + X of X^3
    assert reference([12, 3, 3, 3, 3, 4, *x]) == [0, 0, 0, 0, 0]  # X^4 times X
    assert reference([10, *one_plus_x]) == [6, 6, 0, 0, 0]


def test_answers_are_right_and_groups_are_numbers_of_operations(tmp_path):
    folder = make(tmp_path, "polynomial", "--operations=3", "--beyond=2", "--sequences=400", "--val_sequences=60")
    T = json.loads((folder / "answers.json").read_text())["length"]
    assert T == 1 + 5 + 6 * 5 + 1 + 5
    questions, operators = {}, set()
    for split in ("train", "val"):
        rows, counts = rows_of(folder, split, 15, T), []
        for tokens, groups in rows:
            equals = tokens.index(14)
            expression, answer = tokens[1:equals], tokens[equals + 1 : equals + 6]
            assert [t - 3 for t in answer] == reference(expression)
            assert set(tokens[equals + 6 :]) <= {EOS}
            counts.append(sum(t >= 10 for t in expression))
            operators |= set(expression) - set(range(3, 10))
            if split == "val":
                assert groups == [0] * (equals + 1) + [counts[-1]] * 5 + [0] * (T - equals - 6)
        questions[split] = {tuple(tokens) for tokens, _ in rows}
        assert counts == [1, 2, 3, 4, 5] * 60 if split == "val" else set(counts) == {1, 2, 3} and len(counts) == 400
    assert operators == {10, 11, 12, 13}
    assert len(questions["val"]) == 300 and not questions["train"] & questions["val"]
    assert everything_right(folder, T) == {name: (60, 60) for name in ("in_1", "in_2", "in_3", "out_4", "out_5")}


def test_no_expression_of_validation_is_trained_on(monkeypatch):
    monkeypatch.setattr(synthetic, "P", 2)  # few polynomials, so that train and val would meet
    task = synthetic.polynomial(operations=1, beyond=0, sequences=2000, val_sequences=300, seed=1)
    train, val = ({tuple(tokens) for tokens, _ in rows} for rows in (task.train, task.val))
    assert len(val) == 300 and len(train) > 500 and not train & val


# ---------------------------------------------------------------------------------------------
# induction


@pytest.fixture(scope="module")
def induction(data_dir, tmp_path_factory):
    """induction(vocab_size, length) -> folder of the toy stories with made-up names."""
    out = tmp_path_factory.mktemp("induction")
    (out / "toy").symlink_to(data_dir / "toy")

    def get(vocab_size, length):
        folder = out / f"length{length}" / f"tok{vocab_size}"
        if not folder.exists():
            synthetic.main(["induction", f"--data_dir={out}", "--from_dataset=toy", f"--dataset=length{length}",
                            f"--vocab_size={vocab_size}", f"--length={length}"])
        return folder

    return get


def pattern_of(story):
    """A regular expression for the story with other names, each the same throughout."""
    parts, seen = [], set()
    for part in re.split(rf"({synthetic.NAME.pattern})", story):
        known = part in seen
        if synthetic.NAME.fullmatch(part):
            seen.add(part)
            parts.append(f"(?P={part})" if known else f"(?P<{part}>[A-Z][a-z]+)")
        else:
            parts.append(re.escape(part))
    return "".join(parts)


@pytest.mark.parametrize("vocab_size,length", [(259, 1200), (512, 600)])  # long enough for every story
def test_names_are_two_tokens_and_the_second_is_scored_from_its_second_mention_on(
        data_dir, induction, vocab_size, length):
    folder = induction(vocab_size, length)
    tokenizer, names = load_tokenizer(folder, vocab_size), {"train": set(), "val": set()}
    for split, count in (("train", 300), ("val", 20)):
        stories = tinystories.read_stories(data_dir / "toy" / f"{split}.txt")
        for tokens, groups in rows_of(folder, split, vocab_size, length)[:count]:
            ids = tokens[1 : tokens.index(EOS)]
            text = tokenizer.decode(ids)
            story = next(filter(None, (re.fullmatch(pattern_of(s), text) for s in stories)))  # rows keep their order
            made = set(story.groupdict().values())
            names[split] |= made
            if split == "val":
                assert tokenizer.encode(text) == ids
                assert groups == seconds_again(tokenizer, ids, text, made) + [0] * (length - len(ids) - 1)
    assert names["val"] and not names["train"] & names["val"]
    for name in names["val"]:  # its halves are known, from other names
        assert any(other[0] == name[0] for other in names["train"])
        assert any(other[-1] == name[-1] for other in names["train"])
    assert len({name[0] for name in names["train"]}) < len(names["train"]) / 3  # the first does not tell the second


def seconds_again(tokenizer, ids, text, made):
    """Groups of BOS and `ids`, from where each token ends in the text."""
    ends = [-1, *(len(tokenizer.decode(ids[: k + 1])) for k in range(len(ids)))]  # of BOS and each token
    groups, firsts = [0] * len(ends), set()
    for name in made:
        mentions = [m.span() for m in re.finditer(rf"\b{name}\b", text)]
        seconds = [ends.index(end) for _, end in mentions]
        for (start, _), k in zip(mentions, seconds):
            assert ends[k - 2] in (start - 1, start) and ends[k - 1] > start  # two tokens, maybe the space before
        for k in seconds[1:]:
            groups[k] = 1
        firsts.add(text[mentions[0][0] : ends[seconds[0] - 1]])
    assert len(firsts) == len(made)  # else the first token would not say whose name it is
    return groups


def test_stories_are_cut_to_the_row_and_what_has_no_answer_left_is_left_out(induction):
    whole, cut = (rows_of(induction(512, length), "val", 512, length) for length in (600, 60))
    assert all(any(groups) for _, groups in cut) and 0 < len(cut) < len(whole)
    assert len(cut) == sum(any(groups[:60]) for _, groups in whole)
    assert all(EOS not in tokens for tokens, _ in cut) and all(EOS in tokens for tokens, _ in whole)


def test_the_vocabulary_comes_along(data_dir, induction):
    for name in ("tokenizer.model", "tokenizer.bin"):
        assert (induction(512, 600) / name).read_bytes() == (data_dir / "toy" / "tok512" / name).read_bytes()


def test_a_name_that_is_no_two_tokens_is_not_taken():
    spelling, name = Spelling(ByteTokenizer()), Name("Q", "z")
    assert spelling.name_tokens('Qz and "Qz"', [name])[1] == [(2, name), (10, name)]
    assert spelling.name_tokens("Qzz is not Qz", [name])[1] == [(13, name)]
    assert spelling.name_tokens("Qz", [Name("Q", "zz")])[1] == []
    assert spelling.name_tokens("Qzz", [Name("Q", "zz")]) is None  # three bytes


def test_without_stories_or_names(tmp_path):
    with pytest.raises(ValueError, match="nothing/train.txt: no such text") as caught:
        make(tmp_path, "induction", "--from_dataset=nothing")
    command = f"python tinystories.py local FILE --dataset=nothing --vocab_size=512 --data_dir={tmp_path}"
    assert command in str(caught.value)
    tinystories.write_stories(tmp_path / "nameless", [("train", "a cat."), ("train", "a dog."), ("val", "a bird.")])
    with pytest.raises(ValueError, match="nameless.*tokenizer.model: no such tokenizer; .* train_vocab"):
        make(tmp_path, "induction", "--from_dataset=nameless")
    tinystories.pretokenize(tmp_path / "nameless", 259, workers=1)
    with pytest.raises(ValueError, match="found none"):
        make(tmp_path, "induction", "--from_dataset=nameless", "--vocab_size=259")
    assert not (tmp_path / "induction").exists()


def test_a_vocabulary_without_names(data_dir):
    spelling = Spelling(ByteTokenizer())
    spelling.texts = [b"" for _ in spelling.texts]
    with pytest.raises(ValueError, match="found 0 and 0; try another --vocab_size"):
        synthetic.invent_names(spelling, set(), synthetic.random_numbers("", 1))


# ---------------------------------------------------------------------------------------------
# answers

def answers_of(folder, marks, groups='{"groups": {"1": "a", "2": "b", "255": "c"}, "length": 5}'):
    np.zeros(len(marks), dtype=np.uint16).tofile(folder / "val.bin")
    (folder / "val.answers.bin").write_bytes(bytes(marks))
    (folder / "answers.json").write_text(groups)
    return Answers.find(folder / "val.bin")


@pytest.mark.parametrize("wrong,scores", [
    ([], {"a": (2, 2), "b": (1, 1), "c": (1, 1)}),
    ([(0, 1)], {"a": (1, 2), "b": (1, 1), "c": (1, 1)}),  # the first token of an answer of two
    ([(0, 2)], {"a": (1, 2), "b": (1, 1), "c": (1, 1)}),  # its last
    ([(0, 1), (0, 2)], {"a": (1, 2), "b": (1, 1), "c": (1, 1)}),
    ([(0, 3)], {"a": (2, 2), "b": (0, 1), "c": (1, 1)}),  # another group begins where that one ends
    ([(0, 0), (0, 4), (1, 1)], {"a": (2, 2), "b": (1, 1), "c": (1, 1)}),  # nothing that is scored
    ([(1, 0)], {"a": (1, 2), "b": (1, 1), "c": (1, 1)}),  # tokens 6 and 7: the first target of the window
    ([(1, 4)], {"a": (2, 2), "b": (1, 1), "c": (0, 1)}),  # token 10: its last target
])
def test_an_answer_is_right_as_a_whole(tmp_path, wrong, scores):
    answers = answers_of(tmp_path, [0, 0, 1, 1, 2, 0, 1, 0, 0, 0, 255])
    y = torch.arange(1, 11).reshape(2, 5)
    best = y.clone()
    for b, t in wrong:
        best[b, t] = 0
    assert answers.score([0, 1], 5, best, y) == scores
    assert answers.score([1, 0], 5, best.flip(0), y.flip(0)) == scores


def test_an_answer_cut_by_a_windows_end_does_not_count(tmp_path):
    #                              window 0 ends with target 5, window 1 with target 10
    answers = answers_of(tmp_path, [1, 1, 0, 0, 1, 1, 1, 0, 0, 2, 2])
    y = torch.zeros(1, 5, dtype=torch.int64)
    nothing = {"a": (0, 0), "b": (0, 0), "c": (0, 0)}
    assert answers.score([0], 5, y, y) == nothing  # 0, 1: token 0 is no target; 4 to 6: reaches into window 1
    assert answers.score([1], 5, y, y) == nothing | {"b": (1, 1)}
    assert answers.score([0], 10, torch.zeros(1, 10), torch.zeros(1, 10)) == nothing | {"a": (1, 1), "b": (1, 1)}
    assert answers.score([], 5, y[:0], y[:0]) == nothing
    assert answers_of(tmp_path, [0] * 11).score([0, 1], 5, y.expand(2, 5), y.expand(2, 5)) == nothing


def test_scores_are_those_of_counting_by_hand(tmp_path):
    rng = np.random.default_rng(1)
    marks = rng.integers(0, 3, 401).tolist()
    y = torch.from_numpy(rng.integers(0, 2, (50, 8)))
    best = torch.from_numpy(rng.integers(0, 2, (50, 8)))
    expected = {g: [0, 0] for g in (1, 2)}
    p = 0
    while p < 401:
        q = p
        while q + 1 < 401 and marks[q + 1] == marks[p]:
            q += 1
        j = (p - 1) // 8
        if marks[p] and p > 0 and q <= j * 8 + 8:
            expected[marks[p]][1] += 1
            expected[marks[p]][0] += all(best[j, k - j * 8 - 1] == y[j, k - j * 8 - 1] for k in range(p, q + 1))
        p = q + 1
    scores = answers_of(tmp_path, marks).score(range(50), 8, best, y)
    assert scores == {"a": tuple(expected[1]), "b": tuple(expected[2]), "c": (0, 0)}


def test_broken_answers_are_refused_by_name(tmp_path):
    assert Answers.find(tmp_path / "val.bin") is None
    answers_of(tmp_path, [0, 1, 0])
    for file, content, says in (
            ("val.answers.bin", b"\0\1", "val.answers.bin: expected 3 bytes, .*, found 2"),
            ("val.answers.bin", b"\0\3\0", "val.answers.bin: holds group 3, which has no name in .*answers.json"),
            ("answers.json", b"{", "answers.json: expected .*groups"),
            ("answers.json", b"[]", "answers.json: expected"),
            ("answers.json", b'{"groups": {"one": "a"}, "length": 5}', "answers.json: expected"),
            ("answers.json", b'{"groups": {"1": "a"}}', "answers.json: expected .*length"),
            ("answers.json", b'{"groups": {"300": "a"}, "length": 5}', "answers.json: expected"),
            ("answers.json", b"\xff", "answers.json: expected")):
        answers_of(tmp_path, [0, 1, 0])
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            Answers.find(tmp_path / "val.bin")
    (tmp_path / "answers.json").unlink()
    with pytest.raises(ValueError, match="answers.json: cannot read"):
        Answers.find(tmp_path / "val.bin")


# ---------------------------------------------------------------------------------------------
# files and command line

@pytest.mark.parametrize("command", [ARITHMETIC + ("--sequences=9",),
                                     ("polynomial", "--sequences=50", "--val_sequences=5")])
def test_the_same_seed_writes_the_same_bytes(tmp_path, command):
    a, b = (make(tmp_path / name, *command) for name in "ab")
    other = make(tmp_path / "c", *command, "--seed=2")
    assert sorted(p.name for p in a.iterdir()) == ["answers.json", "train.bin", "val.answers.bin", "val.bin"]
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes()
    for split in ("train.bin", "val.bin"):
        assert (a / split).read_bytes() != (other / split).read_bytes()
    parameters = json.loads((a / "answers.json").read_text())
    assert parameters["task"] == command[0] and parameters["seed"] == 1 and "length" in parameters


def test_names_do_not_depend_on_the_process(induction, tmp_path):
    folder = induction(512, 60)
    (tmp_path / "toy").symlink_to(folder.parent.parent / "toy")
    env = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "synthetic.py", "induction", "--from_dataset=toy", "--length=60"]
    subprocess.run([*command, f"--data_dir={tmp_path}"], cwd=ROOT, env=env, check=True, capture_output=True)
    for name in ("train.bin", "val.bin", "val.answers.bin"):
        assert (tmp_path / "induction" / "tok512" / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_there_is_kept_and_never_replaced(tmp_path):
    folder = make(tmp_path, *ARITHMETIC, "--sequences=9")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    make(tmp_path, *ARITHMETIC, "--sequences=9")
    with pytest.raises(ValueError, match="holds something else already; choose another --dataset, or delete"):
        make(tmp_path, *ARITHMETIC, "--sequences=10")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    (folder / "val.answers.bin").unlink()
    make(tmp_path, *ARITHMETIC, "--sequences=9")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {name: kept for name, (kept, _) in before.items()}


@pytest.mark.parametrize("words,says", [
    (["arithmetic", "--vocab_size=3"], "expected 7 to 1003, found 3"),
    (["arithmetic", "--length=4"], "expected 5 to"),
    (["arithmetic", "--sequences=many"], "expected 1 to 10000000, found many"),
    (["polynomial", "--operations=0"], "expected 1 to 20, found 0"),
    (["induction", "--vocab_size=100000"], "expected 259 to 65536"),
    (["arithmetic", "--seed=" + "9" * 5000], "found 9999"),
    (["sorting"], "invalid choice"),
])
def test_bad_flags_are_refused(words, says, capsys):
    with pytest.raises(SystemExit):
        synthetic.main(words)
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# plots

@pytest.fixture
def run_folder(tmp_path):
    """run_folder(name, heads, seed, sequences): what train.py leaves of a run on arithmetic, with random weights."""
    make(tmp_path, *ARITHMETIC, "--sequences=9")

    def get(name, heads, seed=1, sequences=9):
        model = Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=16, max_seq_len=8,
                                      n_future_heads=heads))
        config = {"data_dir": str(tmp_path), "dataset": "arithmetic", "vocab_size": 16, "max_seq_len": 8,
                  "n_future_heads": heads, "seed": seed}
        (tmp_path / name).mkdir(parents=True)
        torch.save({"model": model.state_dict(), "model_args": model.args.as_dict(), "config": config},
                   tmp_path / name / "ckpt.pt")
        header = {"iter": 0, "config": config, "facts": {"train_tokens": 8 * sequences}}
        log = [{"iter": k, "val/ntp": 2.0 - k - 0.1 * seed} | {f"val/acc_{i}": k / 4 for i in range(heads + 1)}
               for k in range(3)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *log]))
        return tmp_path / name

    return get


def test_accuracy_by_position_and_distance(run_folder, tmp_path):
    folder = run_folder("mtp", 2)
    model, shares = load_model(folder / "ckpt.pt"), arithmetic.accuracy_map(folder)
    assert shares.shape == (3, 8) and shares.isnan().tolist() == [[t + i >= 8 for t in range(8)] for i in range(3)]
    tokens = np.fromfile(tmp_path / "arithmetic" / "tok16" / "val.bin", dtype=np.uint16).tolist()
    right = torch.zeros(3, 8)
    for j in range(15):
        best = arithmetic.predictions(model, torch.tensor([tokens[j * 8 : j * 8 + 8]]))
        for i in range(3):
            for t in range(8 - i):
                right[i, t] += best[i][0, t].item() == tokens[j * 8 + t + 1 + i]
    assert right.sum() > 0 and torch.equal(shares.nan_to_num(), right / 15)


def test_one_figure_of_all_seeds_and_sizes(run_folder, tmp_path):
    """Drawn twice, it is the same; its bars are means over seeds, its last panel has a line for each set-up."""
    folders = [run_folder(f"{name}-{seed}", heads, seed) for name, heads in (("base", 0), ("mtp", 1))
               for seed in (1, 2)]
    folders += [run_folder(f"few/{name}-1", heads, 1, 4) for name, heads in (("base", 0), ("mtp", 1))]
    for name in "ab":
        arithmetic.main([*map(str, folders), f"--folder={tmp_path / name}"])
    assert (tmp_path / "a" / "arithmetic.svg").read_bytes() == (tmp_path / "b" / "arithmetic.svg").read_bytes()
    sizes, places = arithmetic.read_runs(folders)
    assert {size: [(g.label, len(g.runs)) for g in groups] for size, groups in sizes.items()} == {
        4: [("base", 1), ("mtp", 1)], 9: [("base", 2), ("mtp", 2)]}
    assert sorted(places.values()) == sorted(folders)
    found = arithmetic.lowest_loss(sizes[9][0])
    assert found.mean == pytest.approx(-0.15) and found.n == 2


def test_a_folder_without_a_run_is_refused(run_folder, tmp_path):
    for folder, says in ((tmp_path / "nothing", "no such file or folder"), (tmp_path, "no run there")):
        with pytest.raises(ValueError, match=says):
            arithmetic.main([str(folder), f"--folder={tmp_path}"])
    mtp = run_folder("mtp", 1)
    (mtp / "log.jsonl").write_text('{"iter": 0, "val/ntp": 1.0}\n')
    with pytest.raises(ValueError, match="does not say how long its rows are"):
        arithmetic.main([str(mtp), f"--folder={tmp_path}"])
    (mtp / "log.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="no run with an evaluation"):
        arithmetic.main([str(mtp), f"--folder={tmp_path}"])
