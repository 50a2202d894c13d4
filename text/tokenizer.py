"""Text to token ids and back: SentencePiece BPE and plain bytes, with one small interface.

Both number their tokens as Llama does - 0 is <unk>, 1 is BOS, 2 is EOS, 3..258 are the 256 raw
bytes, pieces follow - so a model file and its `tokenizer.bin` work in every llama2.c port. A
non-empty text gets a space in front (SentencePiece's dummy prefix); decoding takes it off again.

tinystories.py train_vocab trains one; tokenizer_json.py has the vocabularies of Hugging Face models.
"""

import math
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece

from system.files import atomic_write, refuse_irregular
from text import tokenizer_json

UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3  # id of raw byte 0x00; the other 255 follow
BYTE_VOCAB_SIZE = FIRST_BYTE + 256
SPECIAL = {UNK: "<unk>", BOS: "<s>", EOS: "</s>"}  # in all files but tokenizer.bin
SPELT = {BOS: "\n<s>\n", EOS: "\n</s>\n"}  # in tokenizer.bin, as llama2.c does; never matched by text
MAX_VOCAB_SIZE = 1 << 20


class Tokenizer(Protocol):
    """What the rest of the lab asks of a tokenizer."""

    vocab_size: int
    bos: int  # the token before each text
    ends: tuple[int, ...]  # tokens that end a text

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS; [] for an empty text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS and EOS add nothing, bytes that are not UTF-8 become U+FFFD."""

    def pieces(self) -> Iterator[tuple[bytes, float]]:
        """(bytes, merge score) of every token in the order of ids, as tokenizer.bin has them."""


class SentencePieceTokenizer:
    """A SentencePiece model file, kept in `file`. Errors: ValueError if it cannot be read or is no such file.

    >>> SentencePieceTokenizer("data/toy/tok512/tokenizer.model").encode("Once upon")  # doctest: +SKIP
    [403, 407]
    """

    bos, ends = BOS, (EOS,)

    def __init__(self, path: str | Path):
        self.file = read_file(path)
        self._open(path)

    @classmethod
    def from_pieces(cls, pieces: list[tuple[bytes, float]], path: str | Path) -> "SentencePieceTokenizer":
        """The tokenizer of the pieces of a `tokenizer.bin`; `path` is for errors."""
        self = cls.__new__(cls)
        self.file = as_sentencepiece(pieces)
        self._open(path)
        return self

    def _open(self, path: str | Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.file)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a SentencePiece model; expected a tokenizer.model, .bin or .json") from error
        self.vocab_size = self._model.vocab_size()
        if (self._model.unk_id(), self._model.bos_id(), self._model.eos_id()) != (UNK, BOS, EOS):
            raise ValueError(f"{path}: expected <unk>, BOS, EOS at ids 0, 1, 2, found them at "
                             f"{self._model.unk_id()}, {self._model.bos_id()}, {self._model.eos_id()}")
        for i in range(FIRST_BYTE, BYTE_VOCAB_SIZE):
            name = self._model.id_to_piece(i) if i < self.vocab_size else "nothing"
            if name != byte_name(i) or not self._model.is_byte(i):
                raise not_a_byte(path, i, name)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(list(ids))

    def pieces(self) -> Iterator[tuple[bytes, float]]:
        for i in range(self.vocab_size):
            text = SPELT.get(i) or self._model.id_to_piece(i).replace("▁", " ")
            yield text.encode("utf-8"), self._model.get_score(i)


class ByteTokenizer:
    """One token a byte of UTF-8: 259 ids, nothing to train.

    >>> ByteTokenizer().encode("Hi")
    [35, 75, 108]
    >>> ByteTokenizer().decode([35, 75, 108])
    'Hi'
    """

    vocab_size, bos, ends = BYTE_VOCAB_SIZE, BOS, (EOS,)

    def encode(self, text: str) -> list[int]:
        return [FIRST_BYTE + b for b in (" " + text).encode("utf-8")] if text else []

    def decode(self, ids: Iterable[int]) -> str:
        text = bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode("utf-8", errors="replace")
        return text.removeprefix(" ")

    def pieces(self) -> Iterator[tuple[bytes, float]]:
        for i, name in SPECIAL.items():
            yield SPELT.get(i, name).encode("utf-8"), 0.0
        for b in range(256):
            # Readers look up the dummy prefix as the string " ", so this byte is spelled as a space.
            yield (b" " if b == ord(" ") else b"<0x%02X>" % b), 0.0


def byte_name(i: int) -> str:
    """How SentencePiece and tokenizer.bin spell the byte token with id i: <0x00> to <0xFF>."""
    return f"<0x{i - FIRST_BYTE:02X}>"


def not_a_byte(path: str | Path, i: int, found: str) -> ValueError:
    return ValueError(f"{path}: token {i}: expected {byte_name(i)}, as Llama numbers bytes, found {found!r}; "
                      "vocabularies without byte tokens (SentencePiece's byte_fallback) are not supported")


def vocab_folder(dataset_folder: str | Path, vocab_size: int) -> Path:
    """Where a data set keeps a vocabulary and the tokens made with it: `data/<dataset>/tok<V>`."""
    return Path(dataset_folder) / f"tok{vocab_size}"


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a `data/<dataset>/tok<V>` folder; V = 259 is the byte tokenizer, which needs no file."""
    as_json = Path(folder) / tokenizer_json.TOKENIZER
    if as_json.exists():
        return open_tokenizer(as_json, vocab_size)
    if vocab_size == BYTE_VOCAB_SIZE:
        return ByteTokenizer()
    return open_tokenizer(Path(folder) / "tokenizer.model", vocab_size)


def open_tokenizer(path: str | Path, vocab_size: int | None) -> Tokenizer:
    """The tokenizer in a file, `.model`, `.bin` or `tokenizer.json`, or in a folder that has one of them.

    vocab_size: None takes any. Errors: ValueError if it cannot be read, has other than V tokens, or (but for
    tokenizer.json) other tokens than bytes at ids 3 to 258.
    """
    path = Path(path)
    if path.is_dir():
        path = vocabulary_file(path, vocab_size)
    if path.name == tokenizer_json.TOKENIZER:
        return tokenizer_json.JsonTokenizer(path.parent, vocab_size)
    if path.suffix == ".bin":
        pieces = read_bin(path, vocab_size)
        return ByteTokenizer() if len(pieces) == BYTE_VOCAB_SIZE else SentencePieceTokenizer.from_pieces(pieces, path)
    tokenizer = SentencePieceTokenizer(path)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(f"{path}: expected {vocab_size} tokens, found {tokenizer.vocab_size}")
    return tokenizer


def vocabulary_file(folder: Path, vocab_size: int | None) -> Path:
    """Of the files that a folder may have: a SentencePiece model of V tokens, else tokenizer.json, else a .bin.

    Some folders of Hugging Face have all of them, and tokens that only tokenizer.json knows.
    """
    model, as_json = folder / "tokenizer.model", folder / tokenizer_json.TOKENIZER
    if not as_json.exists():
        return model if model.exists() else folder / "tokenizer.bin"
    try:
        return model if vocab_size in (None, SentencePieceTokenizer(model).vocab_size) else as_json
    except ValueError:  # there is none, or it is of another kind
        return as_json


def read_file(path: str | Path) -> bytes:
    """A tokenizer's file, whole. Errors: ValueError."""
    try:
        if not os.path.exists(path):
            raise ValueError(f"{path}: no such tokenizer; `python tinystories.py train_vocab` makes one")
        refuse_irregular(Path(path))
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read this tokenizer: {error.strerror or error}") from error


def read_bin(path: str | Path, vocab_size: int | None) -> list[tuple[bytes, float]]:
    """(bytes, merge score) of each token in a tokenizer.bin. vocab_size: None takes all that are there.

    A byte token is spelled <0xE9>, or as the character U+00E9 in UTF-8, which llama2.c's first files have.
    Errors: ValueError if there are more or fewer than V, bytes elsewhere than at ids 3 to 258, or other flaws.
    """
    content = read_file(path)
    most = MAX_VOCAB_SIZE if vocab_size is None else vocab_size
    pieces, at = [], 4
    while at < len(content) and len(pieces) <= most:
        score, n = struct.unpack_from("<fi", content, at) if at + 8 <= len(content) else (0.0, -1)
        if not 0 <= n <= len(content) - at - 8:
            swapped = " (a big-endian file?)" if content[:2] == b"\0\0" and content[2:4] != b"\0\0" else ""
            raise ValueError(f"{path}: token {len(pieces)} does not end within the file: not a tokenizer.bin, or cut"
                             f"{swapped}")
        pieces.append((content[at + 8 : at + 8 + n], score))
        at += 8 + n
    if len(pieces) > most or vocab_size not in (None, len(pieces)):
        expected = f"at most {most}" if vocab_size is None else vocab_size
        found = "more" if at < len(content) or len(pieces) > most else len(pieces)
        raise ValueError(f"{path}: expected {expected} tokens, found {found}")
    for i in range(FIRST_BYTE, BYTE_VOCAB_SIZE):
        piece = pieces[i][0] if i < len(pieces) else b"nothing"
        if piece not in (byte_name(i).encode(), chr(i - FIRST_BYTE).encode()):
            raise not_a_byte(path, i, piece.decode("utf-8", errors="replace"))
    for i, (piece, score) in enumerate(pieces):
        if not math.isfinite(score) or not is_utf8(piece):
            raise ValueError(f"{path}: token {i}: expected UTF-8 and a score, found {piece!r} and {score}")
    return pieces


def is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def as_sentencepiece(pieces: list[tuple[bytes, float]]) -> bytes:
    """A SentencePiece model file of tokens as tokenizer.bin has them, which a Llama's are numbered like."""
    from sentencepiece import sentencepiece_model_pb2 as proto  # late: it takes protobuf to do so

    kind = proto.ModelProto.SentencePiece
    model = proto.ModelProto()
    for i, (piece, score) in enumerate(pieces):
        kinds = {UNK: kind.UNKNOWN, BOS: kind.CONTROL, EOS: kind.CONTROL}
        text = SPECIAL.get(i) or piece.decode("utf-8").replace(" ", "▁")
        if FIRST_BYTE <= i < BYTE_VOCAB_SIZE:
            text = byte_name(i)
        model.pieces.add(piece=text, score=score,
                         type=kinds.get(i, kind.BYTE if i < BYTE_VOCAB_SIZE else kind.NORMAL))
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def bin_bytes(tokenizer: Tokenizer) -> bytes:
    """llama2.c's tokenizer.bin: int32 longest piece, then per token float32 score, int32 length, bytes."""
    pieces = list(tokenizer.pieces())
    longest = struct.pack("<i", max(len(piece) for piece, _ in pieces))
    return longest + b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)


def write_bin(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a tokenizer.bin."""
    with atomic_write(path) as f:
        f.write(bin_bytes(tokenizer))
