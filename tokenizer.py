"""Text to token ids and back: SentencePiece BPE and plain bytes behind one small interface.

Both number their tokens as Llama does - 0 is <unk>, 1 is BOS, 2 is EOS, 3..258 are the 256 raw
bytes, pieces follow - so a model file and its `tokenizer.bin` work in every llama2.c port. A
non-empty text gets a space in front (SentencePiece's dummy prefix); decoding takes it off again.

What this leaves out on purpose: training (tinystories.py train_vocab) and any other tokenizer.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece

from files import atomic_write

UNK, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3  # id of raw byte 0x00; the other 255 follow
BYTE_VOCAB_SIZE = FIRST_BYTE + 256
MAX_VOCAB_SIZE = 1 << 20


class Tokenizer(Protocol):
    """What the rest of the lab asks of a tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS; [] for an empty text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS and EOS add nothing, bytes that are not UTF-8 become U+FFFD."""

    def pieces(self) -> Iterator[tuple[bytes, float]]:
        """(bytes, merge score) of every token in the order of ids, as run.c's tokenizer.bin wants them."""


class SentencePieceTokenizer:
    """A SentencePiece model file. Errors: ValueError if it cannot be read or is no such file.

    >>> SentencePieceTokenizer("data/toy/tok512/tokenizer.model").encode("Once upon")  # doctest: +SKIP
    [403, 407]
    """

    def __init__(self, path: str | Path):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such tokenizer; `python tinystories.py train_vocab` makes one")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from error
        self.vocab_size = self._model.vocab_size()
        if (self._model.unk_id(), self._model.bos_id(), self._model.eos_id()) != (UNK, BOS, EOS):
            raise ValueError(f"{path}: expected <unk>, BOS, EOS at ids 0, 1, 2, found them at "
                             f"{self._model.unk_id()}, {self._model.bos_id()}, {self._model.eos_id()}")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(list(ids))

    def pieces(self) -> Iterator[tuple[bytes, float]]:
        special = {BOS: "\n<s>\n", EOS: "\n</s>\n"}  # llama2.c's spelling; never matched by text
        for i in range(self.vocab_size):
            text = special.get(i) or self._model.id_to_piece(i).replace("▁", " ")
            yield text.encode("utf-8"), self._model.get_score(i)


class ByteTokenizer:
    """One token a byte of UTF-8: 259 ids, nothing to train.

    >>> ByteTokenizer().encode("Hi")
    [35, 75, 108]
    >>> ByteTokenizer().decode([35, 75, 108])
    'Hi'
    """

    vocab_size = BYTE_VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return [FIRST_BYTE + b for b in (" " + text).encode("utf-8")] if text else []

    def decode(self, ids: Iterable[int]) -> str:
        text = bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode("utf-8", errors="replace")
        return text.removeprefix(" ")

    def pieces(self) -> Iterator[tuple[bytes, float]]:
        yield from ((b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0))
        for b in range(256):
            # Readers look the dummy prefix up as the string " ", so that byte is spelled out.
            yield (b" " if b == ord(" ") else b"<0x%02X>" % b), 0.0


def vocab_folder(dataset_folder: str | Path, vocab_size: int) -> Path:
    """Where a data set keeps a vocabulary and the tokens made with it: `data/<dataset>/tok<V>`."""
    return Path(dataset_folder) / f"tok{vocab_size}"


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a `data/<dataset>/tok<V>` folder; V = 259 is the byte tokenizer, which needs no file."""
    if vocab_size == BYTE_VOCAB_SIZE:
        return ByteTokenizer()
    tokenizer = SentencePieceTokenizer(Path(folder) / "tokenizer.model")
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"{folder}/tokenizer.model: expected {vocab_size} tokens, found {tokenizer.vocab_size}")
    return tokenizer


def write_bin(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write llama2.c's tokenizer.bin: int32 longest piece, then per token float32 score, int32 length, bytes."""
    pieces = list(tokenizer.pieces())
    with atomic_write(path) as f:
        f.write(struct.pack("<i", max(len(piece) for piece, _ in pieces)))
        for piece, score in pieces:
            f.write(struct.pack("<fi", score, len(piece)) + piece)
