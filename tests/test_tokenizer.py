"""Both tokenizers behind one interface, and the file that run.c reads."""

import struct

import pytest
import sentencepiece

import export
import sample
import train
from formats.checkpoint import find_tokenizer
from text import tokenizer
from text.tokenizer import BOS, EOS, ByteTokenizer, SentencePieceTokenizer, load_tokenizer, open_tokenizer, write_bin

TEXTS = ["Once upon a time, a dog.", " two  spaces \n\nand lines\n", "café €5 😀", "12345", "", " ", "\t<s></s>"]


@pytest.fixture(params=["bytes", "pieces"])
def some_tokenizer(request, data_dir):
    return load_tokenizer(data_dir / "toy" / "tok512", 512) if request.param == "pieces" else ByteTokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(some_tokenizer, text):
    ids = some_tokenizer.encode(text)
    assert some_tokenizer.decode(ids) == text
    assert some_tokenizer.decode([BOS, *ids, EOS]) == text
    assert all(2 < i < some_tokenizer.vocab_size for i in ids)


def test_byte_tokens():
    assert ByteTokenizer().encode("Hi") == [3 + 0x20, 3 + ord("H"), 3 + ord("i")]
    assert ByteTokenizer().vocab_size == 259
    assert ByteTokenizer().decode([3 + 0x20, 3 + 0xFF]) == "\N{REPLACEMENT CHARACTER}"


def test_bin_file_holds_every_piece_in_order(some_tokenizer, tmp_path):
    write_bin(some_tokenizer, tmp_path / "tokenizer.bin")
    data = (tmp_path / "tokenizer.bin").read_bytes()
    (longest,) = struct.unpack_from("<i", data)
    entries, at = [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        entries.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    assert len(entries) == some_tokenizer.vocab_size and longest == max(len(piece) for piece, _ in entries)
    assert [piece for piece, _ in entries[:3]] == [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    assert entries[3 + 0x41][0] == b"<0x41>" and entries[3 + 0xFF][0] == b"<0xFF>"
    # joined pieces spell the text that was encoded, dummy prefix included
    ids = some_tokenizer.encode("Once upon a dog")
    spelled = b"".join(bytes([i - 3]) if 3 <= i < 259 else entries[i][0] for i in ids)
    assert spelled == b" Once upon a dog"
    assert b" " in [piece for piece, _ in entries]  # run.c looks the dummy prefix up


def test_merge_scores_are_the_models_own(data_dir, tmp_path):
    path = data_dir / "toy" / "tok512" / "tokenizer.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = list(SentencePieceTokenizer(path).pieces())
    assert [score for _, score in pieces] == [model.get_score(i) for i in range(512)]
    assert len({score for _, score in pieces[259:]}) > 200


def test_bad_files_are_refused_by_name(tmp_path, data_dir):
    with pytest.raises(ValueError, match=r"none.*train_vocab"):
        SentencePieceTokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path, 300)
    with pytest.raises(ValueError, match="expected 300 tokens, found 512"):
        load_tokenizer(data_dir / "toy" / "tok512", 300)


def test_a_model_with_other_special_ids_is_refused(tmp_path):
    lines = iter(["a cat and a dog saw a bird"] * 50)
    with open(tmp_path / "m", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=f, model_type="char", vocab_size=16, bos_id=-1, minloglevel=2)
    with pytest.raises(ValueError, match="ids 0, 1, 2"):
        tokenizer.SentencePieceTokenizer(tmp_path / "m")


def first_bin(new: bytes) -> bytes:
    """A tokenizer.bin as llama2.c's first export wrote it: the byte token <0xE9> as the character U+00E9."""
    for b in range(256):
        old, name = chr(b).encode(), b"<0x%02X>" % b
        new = new.replace(struct.pack("<fi", 0.0, 6) + name, struct.pack("<fi", 0.0, len(old)) + old)
    return new


def test_llama2cs_first_tokenizer_bin_is_read(data_dir, tmp_path):
    folder = data_dir / "toy" / "tok512"
    old = first_bin((folder / "tokenizer.bin").read_bytes())
    assert len(old) == (folder / "tokenizer.bin").stat().st_size - 1152  # as llama2.c's, 432,717 for 433,869 bytes
    (tmp_path / "old.bin").write_bytes(old)
    ours, theirs = load_tokenizer(folder, 512), open_tokenizer(tmp_path / "old.bin", 512)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert tokenizer.bin_bytes(theirs) == (folder / "tokenizer.bin").read_bytes()


def test_a_vocabulary_without_byte_tokens_is_refused_by_name(tmp_path):
    lines = [" ".join(f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "lmnprst")] * 20
    with open(tmp_path / "m.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=f, model_type="bpe",
                                                 vocab_size=280, minloglevel=2, hard_vocab_limit=False)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    V = model.vocab_size()
    pieces = [(model.id_to_piece(i).replace("▁", " ").encode(), model.get_score(i)) for i in range(V)]
    content = struct.pack("<i", 9) + b"".join(struct.pack("<fi", score, len(p)) + p for p, score in pieces)
    (tmp_path / "m.bin").write_bytes(content)
    said = []
    for kind in ("model", "bin"):
        with pytest.raises(ValueError, match=f"m.{kind}: token 3: expected <0x00>.*byte_fallback") as caught:
            open_tokenizer(tmp_path / f"m.{kind}", V)
        said.append(str(caught.value).partition(": ")[2].replace("▁", " "))
    assert said[0] == said[1]


def test_broken_tokenizer_bins_are_refused(data_dir, tmp_path):
    path = tmp_path / "tokenizer.bin"
    write_bin(load_tokenizer(data_dir / "toy" / "tok512", 512), path)
    whole = path.read_bytes()
    for content, says in ((whole[:-1], "token 511 does not end"), (whole[:2000], "does not end within the file"),
                          (b"", "expected 512 tokens, found 0"), (b"text " * 900, "token 0 does not end"),
                          (whole + struct.pack("<fi", 0.0, 1) + b"x", "expected 512 tokens, found more"),
                          (whole + b"x", "does not end"),
                          (whole[:4] + struct.pack("<fi", 0.0, -5) + whole[12:], "token 0")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"tokenizer.bin: .*{says}"):
            open_tokenizer(path, 512)
    path.write_bytes(whole)
    for wrong in (511, 513):
        with pytest.raises(ValueError, match=f"expected {wrong} tokens, found (more|512)"):
            open_tokenizer(path, wrong)
    for content, says in ((whole.replace(b"<0x41>", b"<0x42>"), "token 68: expected <0x41>"),
                          (whole.replace(b" the", b" t\xff\xfe"), "expected UTF-8 and a score, found b' t"),
                          (whole[:4] + struct.pack("<f", float("nan")) + whole[8:], "token 0: .* and nan")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"tokenizer.bin: .*{says}"):
            open_tokenizer(path, 512)
    swapped = struct.pack(">i", 9) + b"".join(struct.pack(">fi", 0.0, 1) + b"x" for _ in range(512))
    path.write_bytes(swapped)
    with pytest.raises(ValueError, match="big-endian"):
        open_tokenizer(path, 512)
    path.write_bytes(whole.replace(b" the", b" and"))  # two tokens of one text
    with pytest.raises(ValueError, match="tokenizer.bin: not a SentencePiece model"):
        open_tokenizer(path, 512)
    with pytest.raises(ValueError, match="none.bin: no such tokenizer"):
        open_tokenizer(tmp_path / "none.bin", 512)
    with pytest.raises(ValueError, match="pipe or device"):
        open_tokenizer("/dev/zero", 512)


def test_a_tokenizer_that_is_named_is_opened_for_bytes_too(data_dir, tmp_path):
    for path, says in ((tmp_path / "none.bin", "no such"), (data_dir / "toy" / "tok512", "expected 259 tokens"),
                       (data_dir / "toy" / "tok512" / "tokenizer.bin", "expected 259 tokens, found more")):
        with pytest.raises(ValueError, match=says):
            find_tokenizer("x", {}, 259, path)
    assert isinstance(find_tokenizer("x", {}, 259, data_dir / "toy" / "tok259"), ByteTokenizer)


def test_a_vocabulary_of_another_text_is_noticed(data_dir, tmp_path, capsys, words):
    """A checkpoint has the checksum of its vocabulary; one of the same size is not enough."""
    assert train.main(words(max_iters=1)) == 0
    pieces = list(load_tokenizer(data_dir / "toy" / "tok512", 512).pieces())
    pieces[300], pieces[301] = pieces[301], pieces[300]
    other = tmp_path / "other.bin"
    write_bin(SentencePieceTokenizer.from_pieces(pieces, other), other)
    checkpoint = tmp_path / "out" / "ckpt.pt"
    capsys.readouterr()
    for path, noticed in ((other, True), (data_dir / "toy" / "tok512" / "tokenizer.bin", False),
                          (data_dir / "toy" / "tok512" / "tokenizer.model", False)):
        export.main([str(checkpoint), str(tmp_path / f"{noticed}" / "m.bin"), f"--tokenizer={path}"])
        assert (f"{path}: the tokenizer's pieces are not those" in capsys.readouterr().err) == noticed
        sample.main([f"--checkpoint={checkpoint}", f"--tokenizer={path}", "--max_new_tokens=1", "--device=cpu"])
        assert (f"{path}: the tokenizer's pieces are not those" in capsys.readouterr().err) == noticed


def test_the_tokenizer_is_looked_for_with_the_data_then_beside_the_model(data_dir, tmp_path):
    source = data_dir / "toy" / "tok512"
    config = {"data_dir": str(data_dir), "dataset": "toy"}
    assert find_tokenizer(tmp_path / "ckpt.pt", {"config": config}, 512).vocab_size == 512
    with pytest.raises(ValueError, match=f"ckpt.pt: no tokenizer.model, .* in {tmp_path}; name one"):
        find_tokenizer(tmp_path / "ckpt.pt", {}, 512)
    with pytest.raises(ValueError, match=f"gone/tok512 or {tmp_path}"):
        find_tokenizer(tmp_path / "ckpt.pt", {"config": config | {"dataset": "gone"}}, 512)
    (tmp_path / "tokenizer.bin").write_bytes((source / "tokenizer.bin").read_bytes())
    for place in (tmp_path / "ckpt.pt", tmp_path):  # beside the file, in the folder
        assert find_tokenizer(place, {"config": {"data_dir": 3}}, 512).vocab_size == 512
    with pytest.raises(ValueError, match="expected 300 tokens, found more"):
        find_tokenizer(tmp_path / "ckpt.pt", {}, 300)
    assert find_tokenizer(tmp_path / "ckpt.pt", {}, 300 - 41).encode("A") == [35, 68]
    assert find_tokenizer("x", {}, 512, source / "tokenizer.model").vocab_size == 512
    with pytest.raises(ValueError, match="expected 600 tokens, found 512"):
        find_tokenizer("x", {}, 600, source / "tokenizer.model")
