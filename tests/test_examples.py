"""Prompts and answers: from a .jsonl to rows of one example each, of which only answers are learnt."""

import json

import numpy as np
import pytest
import torch
from test_tokenizer_json import json_tokenizer

import tinystories
import train
from losses import loss_weights
from step.machine import Machine
from text.stories import StoryFile, Turn, read_stories
from text.tokenizer import BOS, EOS, ByteTokenizer
from tinystories import ANSWER, FIRST, Windows, eval_batches

EXAMPLES = [("Who is Tim?", "A boy who has a dog."), ("Say no.", "No."), ("", "Once."),
            ("A question that is longer than any row of the tests", "yes, a longer answer than any row, too")]


def write_lines(path, *records):
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def folder(tmp_path):
    """data/qa/tok259 of EXAMPLES, the last of which is val's as well."""
    lines = [{"id": 1, "prompt": p, "answer": a} for p, a in EXAMPLES]
    train_file = write_lines(tmp_path / "qa.jsonl", *lines)
    val_file = write_lines(tmp_path / "val.jsonl", *lines)
    tinystories.main(["local", str(train_file), f"--val={val_file}", "--vocab_size=259", f"--data_dir={tmp_path}/data"])
    return tmp_path / "data" / "qa" / "tok259"


def slow_tokens() -> list[tuple[list[int], list[bool]]]:
    """Of each example its tokens, and which of them an answer has."""
    encode, found = ByteTokenizer().encode, []
    for prompt, answer in EXAMPLES:
        given, wanted = [BOS, *encode(prompt)], [*encode(answer), EOS]
        found.append((given + wanted, [False] * len(given) + [True] * len(wanted)))
    return found


# ---------------------------------------------------------------------------------------------
# text

@pytest.mark.parametrize("record,turns", [
    ({"prompt": "P", "answer": " A\n"}, [("P", "A")]), ({"prompt": "P", "completion": "A", "text": "x"}, [("P", "A")]),
    ({"response": "A", "prompt": "P"}, [("P", "A")]),
    ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "P"},
                   {"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"},
                   {"role": "assistant", "content": "B"}]},
     [("[INST] <<SYS>>\nS\n<</SYS>>\n\nP [/INST]", "A"), ("[INST] Q [/INST]", "B")]),  # as `run -m chat` has it
])
def test_formats_of_examples(tmp_path, record, turns):
    path = write_lines(tmp_path / "a.jsonl", record, record)
    assert list(read_stories(path)) == [[Turn(*turn) for turn in turns]] * 2
    if "text" in record:
        assert list(StoryFile(path, field="text").read()) == ["x", "x"]


@pytest.mark.parametrize("record", [
    {"prompt": "P"}, {"prompt": "P", "answer": 3}, {"prompt": None, "answer": "A"}, {"prompt": "\ud800", "answer": "A"},
    {"messages": []}, {"messages": 3}, {"messages": ["user"]}, {"messages": [{"role": "user", "content": "P"}]},
    {"messages": [{"role": "assistant", "content": "A"}, {"role": "user", "content": "P"}]},
    {"messages": [{"role": "user", "content": "P"}, {"role": "assistant", "content": ["A"]}]},
    {"turns": [["P"]]}, {"turns": "PA"},
])
def test_broken_examples_are_refused_by_line(tmp_path, record):
    first = {"prompt": "P", "answer": "A"} if "prompt" in record else {
        "messages": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "A"}]}
    path = write_lines(tmp_path / "a.jsonl", first if "turns" not in record else {"turns": [["P", "A"]]}, record)
    with pytest.raises(ValueError, match='a.jsonl:2: expected {"'):
        list(read_stories(path))


def test_stories_and_examples_do_not_mix(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"text": "A story."}, {"text": "Another."})
    write_lines(tmp_path / "b.jsonl", {"prompt": "P", "answer": "A"})
    command = ["local", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--dataset=x", f"--data_dir={tmp_path}/d"]
    with pytest.raises(ValueError, match="cannot be in one data set"):
        tinystories.main(command)
    assert list((tmp_path / "d" / "x").iterdir()) == []
    tinystories.main([*command[:2], *command[3:]])
    with pytest.raises(ValueError, match="train.txt: holds other text already"):
        tinystories.main([*command[:1], *command[2:], f"--val={tmp_path}/b.jsonl"])


# ---------------------------------------------------------------------------------------------
# tokens and rows

def test_tokens_and_their_mask(folder, capfd):
    tokens, mask = (np.fromfile(folder / name, kind) for name, kind in (("train.bin", np.uint16),
                                                                       ("train.mask.bin", np.uint8)))
    expected = slow_tokens()
    assert tokens.tolist() == [i for ids, _ in expected for i in ids]
    assert (mask & ANSWER).astype(bool).tolist() == [a for _, answers in expected for a in answers]
    begins = np.cumsum([0, *(len(ids) for ids, _ in expected)])[:-1]
    assert np.flatnonzero(mask & FIRST).tolist() == begins.tolist()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tok259", "train.jsonl", "val.jsonl"]


def test_several_turns_are_one_example(tmp_path):
    turns = [Turn("P", "A"), Turn("Q", "B")]
    ids, mask = tinystories.encode_stories(tmp_path, 259, [turns, [Turn("R", "C")]])
    one = [BOS, 35, 3 + ord("P"), 35, 3 + ord("A"), EOS]
    assert ids[:6].tolist() == one and (ids == BOS).sum() == 3  # each turn begins as `run -m chat` begins it
    assert mask.tolist() == [FIRST, 0, 0, 1, 1, 1] + [0, 0, 0, 1, 1, 1] + [FIRST, 0, 0, 1, 1, 1]


def test_a_vocabulary_of_tokenizer_json_marks_examples_with_its_own_tokens(tmp_path):
    source = json_tokenizer(tmp_path / "model", 400)
    write_lines(tmp_path / "qa.jsonl", *({"prompt": p, "answer": a} for p, a in EXAMPLES))
    command = ["local", str(tmp_path / "qa.jsonl"), f"--data_dir={tmp_path}/data"]
    for name in ("tokenizer.json", ""):  # the file, or the model's folder
        tinystories.main([*command, f"--from={tmp_path}/model/{name}", "--vocab_size=400"])  # the model's, padded
    folder = tmp_path / "data" / "qa" / "tok400"
    tokens = np.fromfile(folder / "val.bin", np.uint16).tolist()
    assert tokens == [source.bos, *source.encode(EXAMPLES[3][0]), *source.encode(EXAMPLES[3][1]), source.ends[0]]
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert not (folder / "tokenizer.bin").exists()  # run.c cannot read such a vocabulary
    json_tokenizer(tmp_path / "model", 400, split="x")
    with pytest.raises(ValueError, match="tok400: holds another vocabulary"):
        tinystories.main([*command, f"--from={tmp_path}/model", "--vocab_size=400"])


@pytest.mark.parametrize("T", [7, 24, 200])
def test_a_row_is_one_example_and_every_answer_is_in_one(folder, T):
    rows, expected = Windows(folder / "train.bin", 259, T), []
    for ids, answers in slow_tokens():
        for begin in range(0, len(ids) - 1, T):
            if any(answers[begin + 1 : begin + T + 1]):
                padding = max(T + 1 - len(ids[begin:]), 0)
                expected.append((ids[begin : begin + T + 1] + [EOS] * padding,
                                 answers[begin : begin + T + 1] + [False] * padding))
    assert len(rows) == len(expected) and (T < 200 or len(rows) == 4)
    x, y, answers = rows.rows(range(len(rows)))
    for k, (tokens, wanted) in enumerate(expected):
        assert x[k].tolist() == tokens[:-1] and y[k].tolist() == tokens[1:] and answers[k].tolist() == wanted[1:]
    assert answers.sum() == sum(sum(a) for _, a in slow_tokens())  # each is a target once


def test_packed_rows_follow_one_another(folder):
    packed = Windows(folder / "train.bin", 259, 24, pack=True)
    ids, answers = ([value for part in slow_tokens() for value in part[k]] for k in (0, 1))
    x, y, mask = packed.rows(range(len(packed)))
    assert len(packed) == (len(ids) - 1) // 24
    assert x.flatten().tolist() == ids[: 24 * len(packed)] and y.flatten().tolist() == ids[1 : 24 * len(packed) + 1]
    assert mask.flatten().tolist() == answers[1 : 24 * len(packed) + 1]


def test_a_fraction_has_no_later_example(folder):
    half = Windows(folder / "train.bin", 259, 200, fraction=0.3)
    assert len(half) == 2 and half.rows([0])[0][0].tolist()[:30] == slow_tokens()[0][0][:30]


def test_bad_masks_are_refused_by_name(folder):
    path = folder / "train.mask.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train.mask.bin: expected .* bytes, one for each token"):
        Windows(folder / "train.bin", 259, 24)
    path.write_bytes(bytes(len(path.read_bytes()) + 1))
    with pytest.raises(ValueError, match="train.bin: it holds no answer"):
        Windows(folder / "train.bin", 259, 24)
    path.unlink()  # then everything would be a target
    with pytest.raises(ValueError, match="train.mask.bin: no such mask; .* pretokenize again"):
        Windows(folder / "train.bin", 259, 24)


# ---------------------------------------------------------------------------------------------
# training

def settings(folder, tmp_path, **changes) -> list[str]:
    chosen = {"data_dir": folder.parent.parent, "dataset": "qa", "vocab_size": 259, "out_dir": tmp_path / "out",
              "max_seq_len": 24, "batch_size": 2, "dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1,
              "n_future_heads": 2, "nitp_weight": 0.3, "consistency_weight": 0.1, "learning_rate": 1e-2,
              "max_iters": 4, "warmup_iters": 1, "eval_interval": 2, "device": "cpu", "dtype": "float32"} | changes
    return [f"--{key}={value}" for key, value in chosen.items()]


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_a_step_learns_answers_only(folder, path, monkeypatch):
    """Rows in one micro-batch or in two, and whatever else they hold: the same losses and gradients."""
    s = train.configure(train.Settings, settings(folder, folder, path=path))
    x, y, answers = Windows(folder / "train.bin", 259, 24).rows(range(4))
    other = torch.where(answers, y, 100)  # what is no target may be any token
    seen = []
    for micro_batches in ([(x, y, answers)], [(x[:1], y[:1], answers[:1]), (x[1:], y[1:], answers[1:])],
                          [(x, other, answers)]):
        run, gradients = train.build(s, Machine(torch.device("cpu"))), {}
        model = run.model
        with torch.no_grad():
            log_p = model.readouts(x, model.trunk(x), [0])[0].logits().log_softmax(-1)
        monkeypatch.setattr(run.optimizer, "step", lambda *_, model=model, gradients=gradients: gradients.update(
            {name: p.grad.clone() for name, p in model.named_parameters()}))
        means = train.training_step(run, 0, loss_weights(s, 0.0), micro_batches).means
        seen.append((means, gradients))
    terms = [-log_p[b, t, y[b, t]] for b in range(4) for t in range(24) if answers[b, t]]
    assert seen[0][0]["ntp"].item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5)
    for means, gradients in seen[1:]:
        for name, mean in seen[0][0].items():
            assert mean.item() == pytest.approx(means[name].item(), rel=1e-5), name
        for name, gradient in seen[0][1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_run_is_judged_on_answers_and_as_long_as_its_epochs(folder, tmp_path, capsys):
    rows = Windows(folder / "train.bin", 259, 24)
    words = settings(folder, tmp_path, max_epochs=3, eval_iters=1)
    assert train.main(words) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    iterations = -(-3 * len(rows) // 2)
    assert lines[0]["config"]["max_iters"] == lines[-1]["iter"] == iterations
    _, _, answers = eval_batches(Windows(folder / "val.bin", 259, 24), 1)[0]
    assert lines[0]["facts"]["val_tokens"] == answers.sum()
    assert lines[-1]["val/ntp"] < lines[1]["val/ntp"]
    capsys.readouterr()
    assert train.main([*words, "--init_from=resume"]) == 0  # as long as it was
    assert "resuming with max_iters" not in capsys.readouterr().err
    assert train.main([*words, "--init_from=resume", "--max_epochs=1"]) == 1
    assert f"the run is at iteration {iterations}; expected one" in capsys.readouterr().err
    assert train.main([*words, "--init_from=resume", "--max_epochs=4", "--pack=true"]) == 0
    mask = bytearray((folder / "train.mask.bin").read_bytes())
    mask[-1] = 0
    (folder / "train.mask.bin").write_bytes(mask)
    capsys.readouterr()
    assert train.main([*words, "--init_from=resume", "--max_epochs=9"]) == 1
    assert "train.mask.bin of qa is not the run's" in capsys.readouterr().err


def test_epochs_count_what_bags_read():
    s = train.Settings(max_epochs=2.0, batch_size=4, gradient_accumulation_steps=2)
    assert train.iterations_of(s, 100, 1) == 25 and train.iterations_of(s, 100, 2) == 13
    with pytest.raises(ValueError, match="max_epochs=1000000.0: .* iterations, expected at most 1,000,000,000"):
        train.iterations_of(train.Settings(max_epochs=1e6), 10**6, 1)
    s.superposition, s.superposition_end = 4, 0.5
    assert train.iterations_of(s, 100, 1) == 10
