"""The text of tokens: letters as targets for spelling heads, the tokens that tokens begin with, lengths in bytes.

    letters = Letters(token_texts(tokenizer), "lower")
    targets, known = letters.ahead(y, 4, bos)     # the next four letters of the text, at every position
    classes, known = Prefixes(texts).of(y)        # of " there" the token " the", if there is no longer one

A letter is a byte of UTF-8, as one of the few classes of an alphabet: a to z, space, line break,
digits, common punctuation; one class for all other bytes, and one for the end of a document.

What this leaves out on purpose: letters beyond ASCII, and heads (model.py).
"""

import string

import torch
from torch import Tensor, nn

from text.tokenizer import FIRST_BYTE, Tokenizer
from text.tokenizer_json import JsonTokenizer

OTHER, END = 0, 1  # classes of every alphabet
COMMON = " \n.,!?;:'\"-" + string.digits
ALPHABETS = {"true": string.ascii_letters + COMMON, "lower": string.ascii_lowercase + COMMON,
             "upper": string.ascii_uppercase + COMMON}


def alphabet_size(case: str) -> int:
    """Classes of a letter where its case is kept ("true") or all letters are "lower" or "upper"."""
    return 2 + len(ALPHABETS[case])


def token_texts(tokenizer: Tokenizer) -> list[bytes]:
    """The text that each token stands for, in UTF-8; empty for <unk>, BOS and EOS."""
    texts = [piece for piece, _ in tokenizer.pieces()]
    if isinstance(tokenizer, JsonTokenizer):  # which has no ids that all vocabularies share
        return texts
    return [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)] + texts[FIRST_BYTE + 256 :]


class Letters(nn.Module):
    """The letters of each token of a vocabulary, for batches of tokens. case: true, lower or upper."""

    def __init__(self, texts: list[bytes], case: str):
        super().__init__()
        folded = {"true": bytes, "lower": bytes.lower, "upper": bytes.upper}[case]
        classes = {ord(letter): 2 + k for k, letter in enumerate(ALPHABETS[case])}
        spelt = [[classes.get(b, OTHER) for b in folded(text)] or [END] for text in texts]
        longest = max(map(len, spelt))
        self.register_buffer("length", torch.tensor([len(s) for s in spelt]), persistent=False)  # (V,)
        table = torch.tensor([s + [OTHER] * (longest - len(s)) for s in spelt])
        self.register_buffer("table", table, persistent=False)  # (V, longest)

    def ahead(self, y: Tensor, m: int, bos: int | None, answers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of next tokens y (B, T) the m letters that follow each position, (B, T, m), and which of them are known.

        Letters are those of y[t], y[t+1], ... without a break. None is known past the end of a row, with `bos`
        none past the end of a document (its own class is), and with `answers`, (B, T) bool, only theirs are.
        """
        B, T = y.shape
        longest, lengths = self.table.shape[1], self.length[y]  # (B, T)
        start = lengths.cumsum(1) - lengths  # where each token's letters begin in the text of its row
        place = start[..., None] + torch.arange(longest, device=y.device)  # (B, T, longest)
        place = place.masked_fill(place >= (start + lengths)[..., None], T * longest)  # the padding of a short token
        at = start[..., None] + torch.arange(m, device=y.device)  # (B, T, m)

        def of_the_text(of_letters: Tensor) -> Tensor:
            """(B, T, longest) of each token's letters -> (B, T, m) of the letters after each position."""
            text = of_letters.new_zeros(B, T * longest + m + 1).scatter_(1, place.flatten(1), of_letters.flatten(1))
            return text.gather(1, at.clamp(max=T * longest - 1).flatten(1)).view(B, T, m)

        letters = of_the_text(self.table[y])
        known = at < (start + lengths)[:, -1:, None]
        if answers is not None:
            known = known & of_the_text(answers[..., None].expand(B, T, longest).contiguous())
        if bos is not None:
            ended = letters == END
            known = known & (ended.cumsum(2) - ended.long() == 0)
        return letters, known


class Prefixes(nn.Module):
    """Of each token the longest other one with which its text begins, byte by byte.

    Prefix token prediction (modded-nanogpt, pull request 337). Tokens without text begin with none and are none. Of
    two tokens with one text, which are a byte and a piece of it, the piece counts: the one that texts are encoded with.
    Errors: ValueError if no token begins with another, as in a vocabulary of bytes.

    >>> Prefixes([b"", b"a", b"b", b"an", b"and", b" an"]).table
    tensor([-1, -1, -1,  1,  3, -1])
    """

    def __init__(self, texts: list[bytes]):
        super().__init__()
        ids = {text: i for i, text in enumerate(texts) if text}  # pieces have larger ids than bytes

        def longest(text: bytes) -> int:
            return next((ids[text[:k]] for k in range(len(text) - 1, 0, -1) if text[:k] in ids), -1)

        table = [longest(text) for text in texts]
        if max(table) < 0:
            raise ValueError(f"prefix_weight: none of {len(texts)} tokens begins with another, so it has no target")
        self.register_buffer("table", torch.tensor(table), persistent=False)  # (V,)

    def of(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix of each token, and where there is one; both of the shape of y."""
        classes = self.table[y]
        return classes.clamp(min=0), classes >= 0
