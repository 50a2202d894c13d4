"""tokenizer.json of other models: the tokens that transformers makes, the special ones they name, and broken files."""

import json
from pathlib import Path

import pytest
from test_huggingface import TEXTS

from text import toystories
from text.tokenizer import ByteTokenizer, load_tokenizer, open_tokenizer
from text.tokenizer_json import JsonTokenizer, byte_level

START, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


def write_json_vocabulary(folder: Path, vocab_size: int, split: str | None = None) -> None:
    """A byte-level BPE as Llama 3's, trained on stories, with BOS and EOS behind all pieces. split: else GPT-2's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    isolated = [] if split is None else [pre_tokenizers.Split(tokenizers.Regex(split), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*isolated, bytes_only]) if isolated else bytes_only
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 6, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(list(toystories.stories("train", 600)), trainer)
    tokenizer.add_special_tokens([START, END, TURN])
    start = tokenizer.token_to_id(START)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, start)])
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "eos_token": END, "model_max_length": 128}))


def json_tokenizer(folder: Path, vocab_size: int, split: str | None = None) -> JsonTokenizer:
    write_json_vocabulary(folder, vocab_size, split)
    return JsonTokenizer(folder, vocab_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    write_json_vocabulary(folder, 600)
    return folder


def test_the_tokens_are_those_of_transformers(folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), open_tokenizer(folder, 600)
    assert isinstance(ours, JsonTokenizer) and ours.vocab_size == 600
    assert (ours.bos, ours.ends) == (theirs.bos_token_id, (theirs.eos_token_id,)) and ours.bos > 500
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.bos, *ids], text
        assert ours.decode([ours.bos, *ids, *ours.ends]) == text


def test_pieces_are_the_texts_of_tokens(folder):
    tokenizer = open_tokenizer(folder, 600)
    pieces = [piece for piece, _ in tokenizer.pieces()]
    assert len(pieces) == 600 and pieces[tokenizer.bos] == pieces[599] == b""
    for text in TEXTS:
        assert b"".join(pieces[i] for i in tokenizer.encode(text)) == text.encode()
    assert sorted(byte_level().values()) == list(range(256))


def test_a_vocabulary_with_byte_fallback_has_the_same_pieces_as_its_source(data_dir, tmp_path):
    from formats.huggingface import write_tokenizer

    for source in (load_tokenizer(data_dir / "toy" / "tok512", 512), ByteTokenizer()):
        write_tokenizer(source, 32, tmp_path)
        read = JsonTokenizer(tmp_path, source.vocab_size)
        assert (read.bos, read.ends) == (source.bos, source.ends)
        for text in TEXTS:
            assert read.encode(text) == source.encode(text)
        pieces, theirs = list(read.pieces()), list(source.pieces())
        assert [piece for piece, _ in pieces[259:]] == [piece for piece, _ in theirs[259:]]
        assert pieces[3 + 0xE9][0] == b"\xe9"


def test_what_is_written_is_read_as_the_same(folder, tmp_path):
    """Also the ids that end a text by a model's config.json, which need no such file any more."""
    first = open_tokenizer(folder, 600)
    first.write(tmp_path / "plain")
    assert (tmp_path / "plain" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    (tmp_path / "plain" / "config.json").write_text(json.dumps({"eos_token_id": [first.ends[0], first.ends[0] + 1]}))
    second = open_tokenizer(tmp_path / "plain", 600)
    assert second.bos == first.bos and second.ends == (first.ends[0], first.ends[0] + 1)
    second.write(tmp_path / "again")
    third = open_tokenizer(tmp_path / "again", 600)
    assert (third.bos, third.ends, third.encode("Once")) == (second.bos, second.ends, second.encode("Once"))


def test_without_a_config_the_template_or_the_models_config_tells_bos(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    expected = open_tokenizer(folder, 600).bos
    assert JsonTokenizer(tmp_path, 600).bos == expected and JsonTokenizer(tmp_path, 600).ends == ()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(ValueError, match="tokenizer_config.json: bos_token"):
        JsonTokenizer(tmp_path, 600)
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 8}', encoding="utf-8-sig")
    assert (JsonTokenizer(tmp_path, 600).bos, JsonTokenizer(tmp_path, 600).ends) == (7, (8,))


def test_a_sentencepiece_model_of_as_many_tokens_comes_first(data_dir, folder, tmp_path):
    source = load_tokenizer(data_dir / "toy" / "tok512", 512)
    (tmp_path / "tokenizer.model").write_bytes(source.file)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert not isinstance(open_tokenizer(tmp_path, 512), JsonTokenizer)
    assert isinstance(open_tokenizer(tmp_path, 600), JsonTokenizer)
    (tmp_path / "tokenizer.model").write_bytes(b"of another library")
    assert isinstance(open_tokenizer(tmp_path, 600), JsonTokenizer)


@pytest.mark.parametrize("content,says", [
    ("", "not JSON"), ("[1]", "expected an object"), ("{}", "not a tokenizer"), ("[" * 100_000, "not JSON"),
    ('{"model": {"type": "BPE", "vocab": {"a": 700}, "merges": []}, "version": "1.0"}', "most 600 tokens, found 701")
])
def test_broken_files_are_refused_by_name(tmp_path, content, says):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json: ") as caught:
        JsonTokenizer(tmp_path, 600)
    assert says in str(caught.value)


def test_special_tokens_that_cannot_be_are_refused(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for ids, says in (("[7, true]", "eos_token_id: expected a token id or a list"), ("600", "an id below 600")):
        (tmp_path / "config.json").write_text(f'{{"eos_token_id": {ids}}}')
        with pytest.raises(ValueError, match=says):
            JsonTokenizer(tmp_path, 600)


def test_without_the_library_the_install_line_is_given(folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install -r requirements-export.txt"):
        open_tokenizer(folder, 600)
