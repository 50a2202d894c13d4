"""Groups of target tokens that earlier text of their row gives away, to see whether a model copies from its context.

    groups = induction_groups(x, y, texts)    # {"again": (B, T) bool, "rest": ..., "again_1": ..., "name": ...}

    again   the pair (x[t], y[t]) was in the row before: the same token followed the same token
    rest    all others
    again_1 .. again_4, rest_1 .. rest_4      those of the first to the last quarter of the row
    name    y[t] is the second token of a name that the row has mentioned before

A name is a capitalised word of exactly two tokens, inside a sentence (Gloeckle et al. 2024, arXiv 2404.19737, section
4.1, who put such names into stories; here stories are as they are). A mention before may be anywhere in the row.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

QUARTERS = 4
CAPITALISED = re.compile(rb" [A-Z][A-Za-z]*")  # how a name begins
LETTERS = re.compile(rb"[A-Za-z]+")  # how it goes on
GOES_ON = re.compile(rb"[A-Za-z\x80-\xff]")  # a token that begins so belongs to the word before it
IN_SENTENCE = re.compile(rb"(?s).*[A-Za-z0-9,;]")  # a token that ends so has a word of its sentence after it


def induction_groups(x: Tensor, y: Tensor, texts: list[bytes] | None) -> dict[str, Tensor]:
    """{group: (B, T) bool} of tokens x and their next tokens y, (B, T) int64. texts: of all tokens; None: no names."""
    T = x.shape[1]
    pairs = x * (max(x.max(), y.max()) + 1) + y
    quarter = torch.arange(T) * QUARTERS // T
    again = seen_before(pairs)
    groups = {"again": again, "rest": ~again}
    for name, group in list(groups.items()):
        groups |= {f"{name}_{k + 1}": group & (quarter == k) for k in range(QUARTERS)}
    if texts:
        groups["name"] = names_again(x, y, pairs, texts)
    return groups


def seen_before(codes: Tensor) -> Tensor:
    """(B, T) -> (B, T) bool: has the row the same number further to the left?"""
    order = codes.argsort(dim=1, stable=True)
    ranked = codes.gather(1, order)
    repeats = F.pad(ranked[:, 1:] == ranked[:, :-1], (1, 0))
    return torch.zeros_like(repeats).scatter_(1, order, repeats)


def names_again(x: Tensor, y: Tensor, pairs: Tensor, texts: list[bytes]) -> Tensor:
    """Where (x[t], y[t]) is a name inside a sentence, and the row had this word before."""
    def tokens_like(pattern: re.Pattern, whole: bool = True) -> Tensor:
        return torch.tensor([bool(pattern.fullmatch(text) if whole else pattern.match(text)) for text in texts])

    ends_there = F.pad(~tokens_like(GOES_ON, whole=False)[y][:, 1:], (0, 1))  # not known of a row's last token
    word = tokens_like(CAPITALISED)[x] & tokens_like(LETTERS)[y] & ends_there
    in_sentence = F.pad(tokens_like(IN_SENTENCE)[x][:, :-1], (1, 0))
    alone = -1 - torch.arange(x.shape[1]).expand_as(pairs)  # what is no such word equals nothing
    return word & in_sentence & seen_before(torch.where(word, pairs, alone))
