"""Vocabularies of Hugging Face models: tokenizer.json, read by their own library.

    tokenizer = JsonTokenizer("Llama-3.2-1B", 128256)    # a folder, with config.json or tokenizer_config.json, too
    tokenizer.write("data/mine/tok128256")               # the files that make such a vocabulary, for a data set

Token ids are what the file says. So BOS and the ids that end a text differ from model to model: `bos`, `ends`.

What this leaves out on purpose: vocabularies in other files (vocab.json with merges.txt, tiktoken's), chat templates.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from system.files import atomic_write, parse_json, read_text
from system.shown import shown

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
FILES = (TOKENIZER, TOKENIZER_CONFIG, GENERATION)  # that write() writes
SPELT_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def read_object(path: Path) -> dict:
    """A JSON file that holds an object; one with a byte order mark, too. Errors: ValueError."""
    if not path.exists():
        raise ValueError(f"{path}: cannot read: no such file; a Hugging Face folder has one")
    text = read_text(path).removeprefix("\N{BYTE ORDER MARK}")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def token_ids(content: dict, key: str, path: Path) -> list[int]:
    """The ids under `key`: a number, a list of them, or nothing. Errors: ValueError."""
    value = content.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path}: {key}: expected a token id or a list of them, found {shown(repr(value))}")
    return ids


class JsonTokenizer:
    """The tokenizer.json in a folder. Errors: ValueError naming the file if it cannot be read, has more than V tokens,
    or no file says which token starts a text.

    vocab_size: V of the model, which may have room for more tokens; None: as its config.json has it.
    bos: the token before each text; ends: those that end one.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None):
        folder = Path(folder)
        path = folder / TOKENIZER
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path}: needs tokenizers: pip install -r requirements-export.txt") from None
        self._byte_level = '"ByteLevel"' in json.dumps(read_object(path).get("decoder"))
        self.file = path.read_bytes()
        try:
            self._model = tokenizers.Tokenizer.from_buffer(self.file)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
        self._model.no_truncation()
        self._model.no_padding()
        largest = max(self._model.get_vocab().values(), default=-1) + 1
        if vocab_size is None:
            config = read_object(folder / "config.json") if (folder / "config.json").exists() else {}
            stated = config.get("vocab_size")
            vocab_size = stated if type(stated) is int else largest
        if largest > vocab_size:
            raise ValueError(f"{path}: expected at most {vocab_size} tokens, found {largest}")
        self.vocab_size = vocab_size
        self.config = read_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
        self._find_special_tokens(folder)

    def _find_special_tokens(self, folder: Path) -> None:
        """Set bos and ends. Configs of models name them by id, the tokenizer's by text."""
        by_id = [(folder / name, read_object(folder / name)) for name in ("config.json", GENERATION)
                 if (folder / name).exists()]
        starts = self._named("bos_token") or self._model.encode("").ids[:1]  # what is put before any text
        ends = self._named("eos_token")
        for path, content in by_id:
            starts = starts or token_ids(content, "bos_token_id", path)
            ends = ends + token_ids(content, "eos_token_id", path)
        if not starts:
            raise ValueError(f"{folder / TOKENIZER_CONFIG}: bos_token: expected the token that starts a text; "
                             "config.json has no bos_token_id either")
        self.bos = starts[0]
        self.ends = tuple(i for i in dict.fromkeys(ends) if i != self.bos)
        if largest := [i for i in (self.bos, *self.ends) if i >= self.vocab_size]:
            raise ValueError(f"{folder}: special token {largest[0]}: expected an id below {self.vocab_size}")

    def _named(self, key: str) -> list[int]:
        token = self.config.get(key)
        name = token.get("content") if isinstance(token, dict) else token
        found = self._model.token_to_id(name) if isinstance(name, str) else None
        return [] if found is None else [found]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(list(ids), skip_special_tokens=True)

    def pieces(self) -> Iterator[tuple[bytes, float]]:
        """The text of each token, empty for special ones and ids without a token; scores fall with the id."""
        spell = byte_level() if self._byte_level else None
        special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        for i in range(self.vocab_size):
            name = self._model.id_to_token(i)
            text = b""
            if name is not None and i not in special:
                spelt = SPELT_BYTE.fullmatch(name)
                if spell:
                    text = bytes(spell[c] for c in name) if all(c in spell for c in name) else name.encode()
                else:
                    text = bytes.fromhex(spelt[1]) if spelt else name.replace("▁", " ").encode()
            yield text, float(-i)

    def write(self, folder: str | Path) -> None:
        """The files that JsonTokenizer and transformers need, into a folder."""
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self._model.id_to_token(self.bos)}
        if self.ends:
            names["eos_token"] = self._model.id_to_token(self.ends[0])
        ids = {"bos_token_id": self.bos, "eos_token_id": [*self.ends, self.bos]}  # a BOS begins the next text
        if self.ends:
            ids["pad_token_id"] = self.ends[0]
        with atomic_write(Path(folder) / TOKENIZER) as f:
            f.write(self.file)
        for name, content in ((TOKENIZER_CONFIG, names | self.config), (GENERATION, ids)):
            with atomic_write(Path(folder) / name, "w", encoding="utf-8") as f:
                f.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def byte_level() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes, as ByteLevel vocabularies spell them: letter -> byte.

    Printable bytes of Latin-1 stand for themselves, the others are U+0100 and up in turn.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}
