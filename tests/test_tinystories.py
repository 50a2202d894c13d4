"""Text in, tokens out, batches by number; downloads against a server on this machine."""

import gzip
import json
import os
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import SHARED

import tinystories
from text.stories import StoryFile
from text.tokenizer import BOS, load_tokenizer
from tinystories import END, TrainBatches, Windows, eval_batches, read_stories

# ---------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize("name,text,stories", [
    ("a.txt", f"One.\nTwo.\n\nThree.\n{END}\nFour.\n{END}\n", ["One.\nTwo.\n\nThree.", "Four."]),
    ("a.txt", f"One.{END}Two.{END} {END}\nThree.", ["One.", "Two.", "Three."]),
    ("a.txt", "One.\nTwo.\n\n\nThree.\n", ["One.\nTwo.", "Three."]),
    ("a.txt", "One.\r\nTwo.\r\n\r\nThree.", ["One.\nTwo.", "Three."]),
    ("a.jsonl", '{"text": "One.\\n\\nTwo."}\n\n{"text": " Three. ", "id": 3}\n{"text": ""}\n',
     ["One.\n\nTwo.", "Three."]),
    ("a.jsonl", f'{{"text": "One.{END}Two."}}\n', ["One. Two."]),
    ("a.txt", "\ufeffOne.\n\nTwo.", ["One.", "Two."]),  # a byte order mark is no part of the story
    ("a.jsonl", '\ufeff{"text": "One."}', ["One."]),
    ("a.jsonl", '{"story": "One.", "id": 1}\n{"story": "Two."}', ["One.", "Two."]),
    ("a.json", '\ufeff [{"story": "One.", "n": [1, {"a": null}]},\n {"n": 2, "story": "Two\\u00e9."}\n]\n',
     ["One.", "Twoé."]),
    ("a.json", '{"text": "One."}\n{"text": "Two\u2028three."}\n', ["One.", "Two\u2028three."]),
])
def test_text_formats(tmp_path, name, text, stories):
    (tmp_path / name).write_bytes(text.encode())
    assert list(read_stories(tmp_path / name)) == stories


@pytest.mark.parametrize("name,content,says", [
    ("a.txt", b"", "holds no story"),
    ("a.txt", f"\n{END}\n".encode(), "holds no story"),
    ("a.txt", b"caf\xe9", "found byte 0xe9"),
    ("a.txt", b"One day.\nIn the caf\xe9 she sat.", 'found byte 0xe9 after "One day.\\nIn the caf"'),
    ("a.txt", "Once upon a time.".encode("utf-16-le"), "as UTF-16 has them"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "a.jsonl:2"),
    ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1"),
    ("a.jsonl", b"[1]\n", "a.jsonl:1"),
    ("a.jsonl", b"{\n", "a.jsonl:1"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1"),
    ("a.jsonl", b"[" * 200_000, "a.jsonl:1"),
    ("a.json", b'[{"text": "x"}, {"txt": "x"}]', "a.json: item 2"),
    ("a.json", b'[{"text": "x"}, ', "a.json: item 2"),
    ("a.json", b'[{"text": "x"}', "a.json: item 1: expected a comma or the end of the list"),
    ("a.json", b'[{"text": "x"} {"text": "y"}]', "found '{'"),
    ("a.json", b'[{"text": "x"}, {"text": 1e}]', "a.json: item 2"),
    ("a.json", b"[" * 200_000, "a.json: item 1"),
    ("a.json", b'[{"text": ' + b"[" * 200_000, "a.json: item 1"),
    ("a.json", b"[]", "holds no story"),
    ("a.json", b'{"data": [{"text": "x"}]}', "a.json:1"),
    ("a.jsonl", b'{"text": "x"}\n{"story": "x"}\n', 'a.jsonl:2: expected {"text": ...}, found'),
    ("a.txt.gz", b"no gzip", "Not a gzipped file"),
    ("a.txt.gz", gzip.compress(b"One.\n\nTwo." * 1000)[:-20], "cannot read"),
    ("a.txt.gz", gzip.compress(b"caf\xe9"), "0xe9"),
])
def test_bad_text_is_refused_by_name(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="a\\.") as caught:
        list(read_stories(tmp_path / name))
    assert says in str(caught.value)


@pytest.mark.parametrize("text,stories", [
    ("A.\n\nB says <|endoftext|> aloud.\n\nC.", ["A.", "B says   aloud.", "C."]),  # one hit in passing
    ("A.\n\nB.\n\nC.\n<|endoftext|>\n", ["A.", "B.", "C."]),  # and one at the end
    ("A.\n\nB.\n\nC.\n<|endoftext|>\nD.\n\nE.\n\nF.\n<|endoftext|>\n", ["A.\n\nB.\n\nC.", "D.\n\nE.\n\nF."]),
    ("A.<|endoftext|>B.<|endoftext|>C.", ["A.", "B.", "C."]),
    ("A.\nB.\n", ["A.\nB."]),
])
def test_one_mark_does_not_decide_what_separates_stories(tmp_path, text, stories):
    (tmp_path / "a.txt").write_text(text)
    assert list(StoryFile(tmp_path / "a.txt", separator="auto").read()) == stories


def local(data_dir, *words):
    """The stories of both splits that `local` writes to a new data_dir, and the data set's name."""
    tinystories.main(["local", *map(str, words), f"--data_dir={data_dir}"])
    (folder,) = data_dir.iterdir()
    return folder.name, *(list(read_stories(tinystories.text_of(folder, split))) for split in ("train", "val"))


def test_what_was_guessed_is_said_with_the_count(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("A.\n\nB says <|endoftext|> aloud.\n\nC.")
    (tmp_path / "b.jsonl").write_text('{"story": "D."}\n')
    local(tmp_path / "1", tmp_path / "a.txt", tmp_path / "b.jsonl", "--dataset=x")
    said = capfd.readouterr().err
    assert "a.txt: 3 stories, separated by blank lines; 1 <|endoftext|> inside of them became spaces\n" in said
    assert "b.jsonl: 1 stories, each in story\n" in said
    assert "x: 3 stories for training, 1 for validation\n" in said
    local(tmp_path / "2", tmp_path / "a.txt", "--separator=lines")
    assert "a.txt: 3 stories, separated by line ends" in capfd.readouterr().err


def test_files_folders_globs_and_fields(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "b.txt").write_text("B1.\n\nB2.")
    (folder / "a.json").write_text('[{"body": "A1."}, {"body": "A2."}]')
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "C1."}\n{"text": "C2."}\n'))
    (folder / "notes.md").write_text("no story")
    (folder / ".hidden.txt").write_text("no story")
    assert local(tmp_path / "1", folder / "c.jsonl.gz") == ("c", ["C1."], ["C2."])
    assert local(tmp_path / "2", folder / "*.txt", folder / "c.jsonl.gz", "--dataset=x") == (
        "x", ["B1.", "B2.", "C1."], ["C2."])
    assert local(tmp_path / "3", folder / "a.json", "--field=body", f"--val={folder}/*.txt") == (
        "a", ["A1.", "A2."], ["B1.", "B2."])
    with pytest.raises(ValueError, match='a.json: item 1: expected {"text": ...}, {"story": ...}.* found'):
        local(tmp_path / "4", folder)
    (folder / "a.json").write_text('[{"story": "A1."}]')
    assert local(tmp_path / "5", folder) == ("mine", ["A1.", "B1.", "B2.", "C1."], ["C2."])
    with pytest.raises(ValueError, match="--dataset=NAME"):
        local(tmp_path / "6", folder / "b.txt", folder / "a.json")
    for words, says in (([tmp_path / "none.txt", "--dataset=x"], "none.txt: no such file"),
                        ([tmp_path / "1", "--dataset=x"], "1: holds no file whose name ends in .txt")):
        with pytest.raises(ValueError, match=says):
            local(tmp_path / "7", *words)


def test_llama2cs_folder_of_stories(tmp_path):
    folder = tmp_path / "TinyStories_all_data"
    folder.mkdir()
    for k in range(3):
        shard = [{"story": f"Story {k}.{j}.\n", "instruction": {"prompt:": "x"}, "source": "GPT-4"} for j in range(4)]
        (folder / f"data{k:02}.json").write_text(json.dumps(shard))
    name, train, val = local(tmp_path / "data", folder)
    assert name == "TinyStories_all_data" and val == [f"Story 0.{j}." for j in range(4)]
    assert train == [f"Story {k}.{j}." for k in (1, 2) for j in range(4)]


def test_a_large_list_is_a_stream(tmp_path):
    story = json.dumps({"story": "Once upon a time there was a list. " * 30}, indent=1)
    with open(tmp_path / "data00.json", "w") as f:  # 16 MB
        f.write("[" + ",\n".join([story] * 15_000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_stories(tmp_path / "data00.json"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 15_000 and peak < 3e6


def test_progress_is_in_bytes_of_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n" * 50_000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 9))
    for path in (tmp_path / "a.txt", tmp_path / "b.jsonl.gz"):
        moved = []
        assert sum(1 for _ in StoryFile(path).read(moved.append)) > 8
        assert sum(moved) == path.stat().st_size


def test_parquet_and_zst(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": ["One.", "Two.", "Three."]}), tmp_path / "a.parquet")
    with pyarrow.CompressedOutputStream(str(tmp_path / "b.txt.zst"), "zstd") as f:
        f.write(b"One.\n\nTwo.")
    moved = []
    assert list(StoryFile(tmp_path / "a.parquet").read(moved.append)) == ["One.", "Two.", "Three."]
    assert sum(moved) == (tmp_path / "a.parquet").stat().st_size
    assert list(read_stories(tmp_path / "b.txt.zst")) == ["One.", "Two."]
    with pytest.raises(ValueError, match="a.parquet: expected columns body, found n, text"):
        list(StoryFile(tmp_path / "a.parquet", field="body").read())
    (tmp_path / "b.txt.zst").write_bytes((tmp_path / "b.txt.zst").read_bytes()[:-4])
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 9)
    for name in ("b.txt.zst", "a.parquet"):
        with pytest.raises(ValueError, match=f"{name}: cannot read"):
            list(read_stories(tmp_path / name))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    for name in ("b.txt.zst", "a.parquet"):
        with pytest.raises(ValueError, match=f"{name}: needs pyarrow: pip install -r requirements-data.txt"):
            list(read_stories(tmp_path / name))


def test_pipes_are_no_stories(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt: expected a file, found a pipe or device"):
        local(tmp_path / "data", tmp_path / "a.txt")


def test_local_with_and_without_validation_file(tmp_path):
    stories = [f"Story {k}." for k in range(250)]
    (tmp_path / "t.txt").write_text(f"\n{END}\n".join(stories))
    (tmp_path / "v.txt").write_text("Other one.\n\nOther two.\n")
    tinystories.main(["local", str(tmp_path / "t.txt"), f"--data_dir={tmp_path}/a"])
    train, val = (list(read_stories(tmp_path / "a" / "t" / f"{s}.txt")) for s in ("train", "val"))
    assert val == ["Story 99.", "Story 199."] and sorted(train + val) == sorted(stories)
    data = [f"--data_dir={tmp_path}/b", "--dataset=x"]
    tinystories.main(["local", str(tmp_path / "t.txt"), f"--val={tmp_path}/v.txt", *data])
    assert list(read_stories(tmp_path / "b" / "x" / "val.txt")) == ["Other one.", "Other two."]
    assert list(read_stories(tmp_path / "b" / "x" / "train.txt")) == stories


def test_text_that_is_there_is_kept_and_never_replaced(tmp_path):
    (tmp_path / "t.txt").write_text("One.\n\nTwo.")
    command = ["local", str(tmp_path / "t.txt"), f"--data_dir={tmp_path}"]
    tinystories.main(command)
    tinystories.main(command)  # the same text again is fine
    (tmp_path / "t.txt").write_text("One.\n\nThree.")
    with pytest.raises(ValueError, match="other text already"):
        tinystories.main(command)
    assert (tmp_path / "t" / "val.txt").read_text() == f"Two.\n{END}\n"
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["train.txt", "val.txt"]


def test_a_bad_validation_file_leaves_nothing_behind(tmp_path):
    (tmp_path / "t.txt").write_text("One.\n\nTwo.")
    (tmp_path / "v.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="v.txt"):
        tinystories.main(["local", str(tmp_path / "t.txt"), f"--val={tmp_path}/v.txt", f"--data_dir={tmp_path}/d"])
    assert list((tmp_path / "d" / "t").iterdir()) == []


def test_one_story_cannot_be_split(tmp_path):
    (tmp_path / "t.txt").write_text("Only one.")
    with pytest.raises(ValueError, match="cannot be split"):
        tinystories.main(["local", str(tmp_path / "t.txt"), f"--data_dir={tmp_path}"])


# ---------------------------------------------------------------------------------------------
# vocabulary and tokens

@pytest.mark.parametrize("vocab_size", [259, 512])
def test_tokens_are_bos_and_the_story_each_time(data_dir, vocab_size):
    folder = data_dir / "toy" / f"tok{vocab_size}"
    tokens = np.fromfile(folder / "val.bin", dtype=np.uint16).tolist()
    tokenizer, stories = load_tokenizer(folder, vocab_size), list(read_stories(data_dir / "toy" / "val.txt"))
    assert tokens == [i for story in stories for i in (BOS, *tokenizer.encode(story))]
    assert tokens.count(BOS) == 60
    assert tokenizer.decode(tokens[1 : tokens.index(BOS, 1)]) == stories[0]


def test_several_workers_write_what_one_writes(data_dir, tmp_path):
    text = tmp_path / "train.txt"
    text.write_text(f"\n{END}\n".join(f"Story number {k} of a dog." for k in range(5500)))
    folder = data_dir / "toy" / "tok512"
    for workers in (1, 3):  # more batches than the pool holds at a time
        tinystories.tokenize_file(text, folder / f"w{workers}.bin", 512, workers)
    assert (folder / "w1.bin").read_bytes() == (folder / "w3.bin").read_bytes()
    assert np.fromfile(folder / "w1.bin", dtype=np.uint16).tolist().count(BOS) == 5500


def test_large_vocabularies_take_four_bytes():
    assert tinystories.token_type(65_536) is np.uint16 and tinystories.token_type(65_537) is np.uint32


def fail(folder, vocab_size, stories):
    raise ValueError("cannot encode this")


def die(folder, vocab_size, stories):
    os._exit(9)


@pytest.mark.parametrize("worker,says", [(fail, "cannot encode this"), (die, "a worker process died")])
def test_a_workers_failure_is_the_commands_failure(data_dir, tmp_path, monkeypatch, worker, says):
    monkeypatch.setattr(tinystories, "encode_stories", worker)
    with pytest.raises(ValueError, match=says):
        tinystories.tokenize_file(data_dir / "toy" / "train.txt", tmp_path / "train.bin", 512, 2)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_and_bad_text_while_the_vocabulary_is_trained(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_bytes(b"One.\ncaf\xe9")
    with pytest.raises(ValueError, match="0xe9"):
        tinystories.train_vocab(tmp_path, 300)

    def interrupted(path):
        yield "One."
        raise KeyboardInterrupt

    monkeypatch.setattr(tinystories, "text_lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tinystories.train_vocab(tmp_path, 300)


def test_very_long_lines_are_learnt_from(tmp_path):
    (tmp_path / "train.txt").write_text("a cat saw a dog and a bird " * 50_000)  # one line of 1.3 MB
    tinystories.train_vocab(tmp_path, 290)
    assert load_tokenizer(tmp_path / "tok290", 290).encode("saw a bird") != []


def test_tokens_of_an_older_text_are_not_taken_for_new_ones(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("One.\n\nTwo.")
    tinystories.pretokenize(tmp_path, 259, workers=1)
    assert (tmp_path / "tok259" / "tokenizer.bin").exists()
    tinystories.pretokenize(tmp_path, 259, workers=1)
    later = (tmp_path / "tok259" / "val.bin").stat().st_mtime + 5
    os.utime(tmp_path / "train.txt", (later, later))
    with pytest.raises(ValueError, match="older than .*train.txt"):
        tinystories.pretokenize(tmp_path, 259, workers=1)


def test_vocabularies_that_cannot_be_made(data_dir, tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100000 .* smaller"):
        tinystories.train_vocab(data_dir / "toy", 100_000)
    with pytest.raises(ValueError, match="no such text"):
        tinystories.train_vocab(tmp_path / "nothing", 512)
    with pytest.raises(ValueError, match="train_vocab"):
        tinystories.pretokenize(data_dir / "toy", 700)
    with pytest.raises(SystemExit):
        tinystories.main(["train_vocab", "--vocab_size=100"])


def test_one_command_makes_a_data_set_and_a_second_call_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tinystories.toystories, "TRAIN_STORIES", 120)
    monkeypatch.setattr(tinystories.toystories, "VAL_STORIES", 20)
    command = ["toy", f"--data_dir={tmp_path}", "--vocab_size=400"]
    tinystories.main(command)
    files = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "toy" / "tok400").iterdir()}
    assert set(files) == {"tokenizer.model", "tokenizer.bin", "train.bin", "val.bin"}
    tinystories.main(command)
    for name in ("tokenizer.model", "train.bin", "val.bin"):
        assert (tmp_path / "toy" / "tok400" / name).stat().st_mtime_ns == files[name][0]
    assert (tmp_path / "toy" / "tok400" / "tokenizer.bin").read_bytes() == files["tokenizer.bin"][1]
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize("name,says", [
    ("tinystories", ["download --version=v1 --dataset=tinystories", "local FILE --dataset=tinystories"]),
    ("tinystories_v2", ["download --version=v2"]), ("toy", ["tinystories.py toy --dataset=toy"]),
    ("mine", ["local FILE --dataset=mine"]), ("arithmetic", ["synthetic.py arithmetic"]),
])
def test_a_missing_data_set_is_made_by_what_makes_that_one(tmp_path, name, says):
    commands = tinystories.how_to_make(tmp_path / name, 300)
    assert all(command in commands for command in says)
    assert ("tinystories.py toy" in commands) == (name == "toy")


def test_a_vocabulary_that_exists_is_taken_as_it_is(data_dir, tmp_path):
    source, folder = data_dir / "toy" / "tok512", tmp_path / "data" / "t" / "tok512"
    (tmp_path / "t.txt").write_text("One dog.\n\nTwo dogs.")
    command = ["local", str(tmp_path / "t.txt"), f"--data_dir={tmp_path}/data"]
    for kind in ("model", "bin"):
        tinystories.main([*command, f"--from={source}/tokenizer.{kind}"])  # its size need not be said
        for name in ("tokenizer.model", "tokenizer.bin"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    tokens = load_tokenizer(source, 512).encode("Two dogs.")
    assert np.fromfile(folder / "val.bin", np.uint16).tolist() == [BOS, *tokens]
    with pytest.raises(ValueError, match="tokenizer.model: expected 300 tokens, found 512"):
        tinystories.main([*command, f"--from={source}/tokenizer.model", "--vocab_size=300"])
    other = bytearray((source / "tokenizer.bin").read_bytes())
    other[-1:] = b"~"
    (tmp_path / "other.bin").write_bytes(other)
    with pytest.raises(ValueError, match="tok512: holds another vocabulary than .*other.bin"):
        tinystories.main([*command, f"--from={tmp_path}/other.bin"])
    assert (folder / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    with pytest.raises(ValueError, match="t.txt: not a SentencePiece"):
        tinystories.main(["train_vocab", "--dataset=new", f"--data_dir={tmp_path}", f"--from={tmp_path}/t.txt"])
    assert not (tmp_path / "new").exists()


def test_a_vocabulary_may_come_from_a_bin_alone(data_dir, tmp_path):
    source = data_dir / "toy" / "tok512"
    command = ["train_vocab", "--dataset=new", f"--data_dir={tmp_path}", "--from"]
    tinystories.main([*command, str(source / "tokenizer.bin")])
    new = tmp_path / "new" / "tok512"
    assert (new / "tokenizer.bin").read_bytes() == (source / "tokenizer.bin").read_bytes()
    story = "Once upon a time, a café €5 😀."
    assert load_tokenizer(new, 512).encode(story) == load_tokenizer(source, 512).encode(story)
    tinystories.main([*command, str(data_dir / "toy" / "tok259" / "tokenizer.bin")])
    assert [p.name for p in (tmp_path / "new" / "tok259").iterdir()] == ["tokenizer.bin"]


@pytest.mark.skipif(not (SHARED / "llama2_tokenizer").exists(), reason="no shared/llama2_tokenizer")
def test_llama2s_vocabulary_as_llama2c_writes_it(tmp_path):
    source = SHARED / "llama2_tokenizer"
    tinystories.main(["train_vocab", f"--data_dir={tmp_path}", f"--from={source}/tokenizer.model"])
    for name in ("tokenizer.model", "tokenizer.bin"):
        assert (tmp_path / "tinystories" / "tok32000" / name).read_bytes() == (source / name).read_bytes()


# ---------------------------------------------------------------------------------------------
# batches

@pytest.fixture
def counting(tmp_path) -> Windows:
    """Tokens 0, 1, 2, ... 102: ten windows of T = 10, the last with its next token."""
    np.arange(103, dtype=np.uint16).tofile(tmp_path / "t.bin")
    return Windows(tmp_path / "t.bin", 512, 10)


def test_windows_are_contiguous_and_shifted_by_one(counting):
    assert len(counting) == 10
    x, y = counting.rows([0, 9])
    assert x.tolist() == [list(range(10)), list(range(90, 100))]
    assert y.tolist() == [list(range(1, 11)), list(range(91, 101))]


@pytest.fixture
def shards(tmp_path):
    """llama2.c's data/tok512/data00.bin to data03.bin: BOS 10 11 12 ..., 25 tokens in all but the first."""
    folder = tmp_path / "llama2.c" / "data" / "tok512"
    folder.mkdir(parents=True)
    tokens = np.arange(100, 200, dtype=np.uint16)
    tokens[::7] = BOS
    for k, (begin, end) in enumerate([(0, 30), (30, 55), (55, 80), (80, 100)]):
        tokens[begin:end].tofile(folder / f"data{k:02}.bin")
    return folder, tokens


def test_llama2cs_tokens_are_used_where_they_are(shards, tmp_path, data_dir):
    folder, tokens = shards
    (folder.parent / "tok512.model").write_bytes((data_dir / "toy" / "tok512" / "tokenizer.model").read_bytes())
    command = ["local", str(folder), f"--data_dir={tmp_path}/data", "--dataset=mine"]
    tinystories.main(command)  # the vocabulary beside the folder says V
    tinystories.main(command)
    ours = tmp_path / "data" / "mine" / "tok512"
    assert (ours / "tokenizer.bin").read_bytes() == (data_dir / "toy" / "tok512" / "tokenizer.bin").read_bytes()
    assert (ours / "data01.bin").resolve() == (folder / "data01.bin").resolve()
    for place in (folder, ours):  # train.py reads llama2.c's own folder, too
        train, val = (Windows(place / f"{split}.bin", 512, 8) for split in ("train", "val"))
        assert val.tokens.tolist() == tokens[:30].tolist() and len(train.tokens) == 70 and len(train) == 8
        x, y = train.rows(range(8))
        assert x.flatten().tolist() == tokens[30:94].tolist() and y.flatten().tolist() == tokens[31:95].tolist()
    half = Windows(folder / "train.bin", 512, 8, fraction=0.5)
    assert len(half.tokens) == 35 and half.tokens[20:60].tolist() == tokens[50:65].tolist()


def test_bad_shards_are_refused_by_name(shards, tmp_path):
    folder, _ = shards
    with pytest.raises(ValueError, match="data00.bin: which vocabulary"):
        local(tmp_path / "1", folder)
    with pytest.raises(ValueError, match="two shards or more"):
        local(tmp_path / "1", folder / "data00.bin", "--vocab_size=512")
    (folder / "more.bin").write_bytes(b"xx")
    with pytest.raises(ValueError, match="more.bin: expected llama2.c's names"):
        local(tmp_path / "1", folder, "--vocab_size=512")
    command = ["local", str(folder / "data0*.bin"), "--vocab_size=512", "--dataset=x", f"--data_dir={tmp_path}/2"]
    tinystories.main(command)
    (folder / "data04.bin").write_bytes(b"xxx")
    with pytest.raises(ValueError, match="tok512: holds other tokens already"):
        tinystories.main(command)
    with pytest.raises(ValueError, match="data04.bin: .* 3 bytes"):
        Windows(folder / "train.bin", 512, 8)


def test_a_fraction_is_the_beginning_of_the_file(counting):
    part = Windows(counting.path, 512, 10, fraction=0.5)  # 51 tokens
    assert len(part) == 5 and part.tokens.tolist() == list(range(51))
    with pytest.raises(ValueError, match="t.bin: 0.1 of it has 10 tokens, expected more than 10"):
        Windows(counting.path, 512, 10, fraction=0.1)


def rows_of(batches, k):
    return [int(row[0]) // 10 for row in batches[k][0]]


def test_every_window_once_an_epoch_in_a_fresh_order(counting):
    batches = TrainBatches(counting, 3, seed=1)  # 10 windows, 3 a batch: batches straddle epochs
    drawn = [w for k in range(10) for w in rows_of(batches, k)]
    epochs = [drawn[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_k_needs_nothing_but_k(counting):
    batches, again = TrainBatches(counting, 3, seed=1), TrainBatches(counting, 3, seed=1)
    expected = {k: rows_of(batches, k) for k in range(30)}
    for k in (29, 0, 17, 3, 16):
        assert rows_of(again, k) == expected[k]
    assert [rows_of(TrainBatches(counting, 3, seed=2), k) for k in range(5)] != [expected[k] for k in range(5)]


def test_ranks_share_what_one_process_would_see(counting):
    whole = TrainBatches(counting, 4, seed=1)
    ranks = [TrainBatches(counting, 2, seed=1, rank=r, world=2) for r in range(2)]
    for k in range(12):
        assert rows_of(ranks[0], k) + rows_of(ranks[1], k) == rows_of(whole, k)


def test_a_batch_larger_than_the_data_repeats_it(tmp_path):
    np.arange(25, dtype=np.uint16).tofile(tmp_path / "t.bin")
    batches = TrainBatches(Windows(tmp_path / "t.bin", 512, 10), 5, seed=1)
    assert sorted(rows_of(batches, 0) + rows_of(batches, 1)) == [0] * 5 + [1] * 5


def test_evaluation_batches_are_fixed_and_spread(tmp_path):
    np.arange(20_001, dtype=np.uint16).tofile(tmp_path / "t.bin")
    windows = Windows(tmp_path / "t.bin", 65_536, 10)
    chosen = [int(row[0]) // 10 for x, _ in eval_batches(windows, 2) for row in x]
    assert len(chosen) == 64 and chosen[0] == 0 and chosen[-1] == 1999 and chosen == sorted(set(chosen))
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1
    everything = eval_batches(windows, 1000)
    assert sum(len(x) for x, _ in everything) == 2000 and [len(x) for x, _ in everything[-1:]] == [2000 % 32]


def test_bad_token_files_are_refused_by_name(tmp_path):
    folder = tmp_path / "my" / "tok512"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="local FILE --dataset=my --vocab_size=512") as caught:
        Windows(folder / "train.bin", 512, 10)
    assert "train.bin" in str(caught.value) and f"--data_dir={tmp_path}" in str(caught.value)
    (tmp_path / "my" / "train.txt").write_text("One.")
    with pytest.raises(ValueError, match="pretokenize --dataset=my"):
        Windows(folder / "train.bin", 512, 10)
    for content, says in ((np.zeros(10, np.uint16).tobytes(), "it has 10 tokens, expected more than 10"),
                          (b"", "0 bytes"), (b"abc" * 11, "33 bytes"),
                          (np.full(20, 512, np.uint16).tobytes(), "ids below 512, found 512")):
        (folder / "train.bin").write_bytes(content)
        with pytest.raises(ValueError, match=says):
            Windows(folder / "train.bin", 512, 10)
