"""Text from a checkpoint, token by token as it comes; with --speculative several tokens a forward.

    python sample.py --checkpoint=out/ckpt.pt --prompt="Once upon a time"
    python sample.py --checkpoint=out/ckpt.pt --temperature=0 --speculative           # its own heads guess ahead
    python sample.py --checkpoint=out/ckpt.pt --temperature=0 --speculative --tree=2  # two candidates a head

Speculative: block-wise parallel decoding (Stern et al. 2018; arXiv 2404.19737, section 3.2). The heads guess
the next tokens, one forward of the trunk reads the last token and all guesses, and the longest accepted prefix
stays. With --tree=k each head names k candidates, which make a small static tree that one forward reads under
a mask (Medusa, arXiv 2401.10774, section 2.1.2).

A guess is accepted if it equals the token sampled from p, the model's distribution at that position: with
probability p(guess). If it is rejected, the sampled token is distributed as p without the guess. For a guess that is
one token and no distribution, this is the rejection rule of Leviathan et al. 2023 (arXiv 2211.17192). The output is
distributed exactly as in plain decoding, and since both draw once per token, a seed gives the same text in both.
That holds up to rounding: logits of several tokens together differ from those of one token by some 1e-6, which a
tie, or a draw at the very edge, can show. The statistics report whether a run's texts were equal.

What this leaves out on purpose: batches, quantised weights (run.c), `sequential` heads as guessers (they must read
the tokens between), rnn trunks (they keep a state, not a KV cache), and draft lengths that adapt (run.c).
"""

from system.program import program

import argparse
import functools
import heapq
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from formats.checkpoint import (
    TEXT_WILL_BE_WRONG,
    find_tokenizer,
    model_of,
    read_checkpoint,
    was_trained_with_another,
)
from model import KVCache, States, Transformer
from step.machine import find_machine
from text.tokenizer import BOS, EOS, Tokenizer

ENDS = (BOS, EOS)  # where a text stops unless its vocabulary has others; they are no part of it
GUESSERS = ("linear", "residual", "block", "shared")  # types of heads that see no later token
MOST_GUESSES = 16  # of a tree, all read in one forward; a chain may be longer
Pick = Callable[[Tensor], int]  # logits (V,) on the CPU -> token


# ---------------------------------------------------------------------------------------------
# one token from logits

def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (V,) -> what to draw from, (V,) float64: of softmax(logits / temperature) the top_k best, and of
    these the best whose sum first exceeds top_p. top_k = 0, top_p = 0 and top_p = 1 leave all in.
    """
    p = ((logits.double() - logits.max()) / temperature).softmax(0)  # the largest is 0, so tiny temperatures do as well
    if top_k or 0.0 < top_p < 1.0:
        best, order = p.sort(descending=True, stable=True)
        if top_k:
            best[top_k:] = 0.0
        if 0.0 < top_p < 1.0:
            best /= best.sum()
            best[best.cumsum(0) - best > top_p] = 0.0  # what comes before it is enough
        p = torch.zeros_like(p).scatter_(0, order, best)
    return p / p.sum()


def picker(temperature: float, top_k: int, top_p: float, seed: int) -> Pick:
    """The next token of logits (V,): at temperature 0 the best, else drawn, once a call. Errors: ValueError for NaN."""
    generator = torch.Generator().manual_seed(seed)

    def pick(logits: Tensor) -> int:
        if not logits.isfinite().all():
            raise ValueError("--checkpoint: the model's logits are not finite")
        if temperature == 0.0:
            return int(logits.argmax())
        return int(torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator))

    return pick


# ---------------------------------------------------------------------------------------------
# guesses

class Tree(NamedTuple):
    """Where N - 1 guesses stand below the token at hand, which is row 0. A parent comes before its children."""

    depths: Tensor  # (N,) of each row; a guess of depth i is head i's
    ranks: Tensor  # (N,) which of that head's candidates it is, 0 the best
    sees: Tensor  # (N, N) bool: row r sees its own path from the token at hand on
    children: list[list[int]]  # the rows that follow each row


@functools.cache
def static_tree(depth: int, k: int) -> Tree:
    """The likeliest paths of at most `depth` guesses, k candidates each, were the candidate of rank r right with
    probability 2^-(r + 1): MOST_GUESSES guesses in all. k = 1: a chain, whole. depth = 0: the token at hand alone.
    """
    frontier, paths = [(0, 0, ())], []  # bits of the path's probability, the deepest first where equal, ranks
    while frontier and len(paths) <= max(MOST_GUESSES, depth):
        bits, _, path = heapq.heappop(frontier)
        paths.append(path)
        if len(path) < depth:
            for rank in range(k):
                heapq.heappush(frontier, (bits + rank + 1, -len(path) - 1, (*path, rank)))
    row = {path: r for r, path in enumerate(paths)}
    sees, children = torch.eye(len(paths), dtype=torch.bool), [[] for _ in paths]
    for path, r in row.items():
        if path:
            parent = row[path[:-1]]
            sees[r] |= sees[parent]
            children[parent].append(r)
    ranks = torch.tensor([path[-1] if path else 0 for path in paths])
    return Tree(torch.tensor([len(path) for path in paths]), ranks, sees, children)


def walk(tree: Tree, tokens: list[int], logits: Tensor, pick: Pick, ends: tuple[int, ...] = ENDS
         ) -> tuple[list[int], list[int]]:
    """Go down the tree as long as what is picked was guessed.

    tokens: of the N rows; logits: (N, V), what follows each. Returns the rows of the path, row 0 first, and what
    was picked: a token for each row, but none after one that ends the text.
    """
    path, picked = [0], []
    while True:
        picked.append(pick(logits[path[-1]]))
        right = [row for row in tree.children[path[-1]] if tokens[row] == picked[-1]]
        path += right  # one or none: candidates of a head differ
        if not right or picked[-1] in ends:
            return path, picked


class Reader:
    """A model, the text that it has read, and what its first n heads guess to come next, k candidates each."""

    def __init__(self, model: Transformer, n: int, k: int, room: int):
        """room: the longest text, in tokens."""
        self.model, self.n, self.k = model, n, k
        self.device = model.output.weight.device
        # The heads read only what stays, so theirs is another: one of them attends to states, and never to guesses.
        self.trunk_cache, self.head_cache = KVCache(room + max(MOST_GUESSES, n)), KVCache(room)
        self.guesses = torch.zeros(0, k, dtype=torch.long)  # (n, k), best first; none before anything is read

    def read(self, tokens: Tensor, depths: Tensor, sees: Tensor) -> States:
        """Tokens (T,) -> the trunk's states of them."""
        self.trunk_cache.begin(depths.to(self.device), sees.to(self.device))
        return self.model.trunk(tokens[None].to(self.device), self.trunk_cache)

    def keep(self, rows: Tensor, tokens: Tensor, states: States) -> None:
        """Of what was read last these rows stay, and the heads guess what follows them."""
        rows = rows.to(self.device)
        self.trunk_cache.keep(rows)
        if not self.n:
            return
        depths = torch.arange(len(rows), device=self.device)
        self.head_cache.begin(depths, depths <= depths[:, None])
        heads = range(1, self.n + 1)
        kept = States(*(h[:, rows] for h in states))
        found = self.model.readouts(tokens[None].to(self.device)[:, rows], kept, heads, self.head_cache)
        self.head_cache.keep(depths)
        last = [found[i]._replace(features=found[i].features[0, -1]).logits() for i in heads]  # (V,) each
        self.guesses = torch.stack(last).topk(self.k).indices.cpu()


# ---------------------------------------------------------------------------------------------
# a text

@dataclass
class Tally:
    """What generating took, the prompt's own forward left out."""

    tokens: int = 0  # the one that ended a text included
    forwards: int = 0
    seconds: float = 0.0
    reached: Counter = field(default_factory=Counter)  # head -> guesses verified: all those before them were right
    right: Counter = field(default_factory=Counter)  # head -> of these, how many were right

    def add(self, tree: Tree, path: list[int], picked: list[int], seconds: float) -> None:
        self.tokens, self.forwards, self.seconds = self.tokens + len(picked), self.forwards + 1, self.seconds + seconds
        self.right.update(range(1, len(path)))
        self.reached.update(depth for depth, row in enumerate(path[: len(picked)], 1) if tree.children[row])


@torch.inference_mode()
def generate(model: Transformer, prompt: list[int], max_new_tokens: int, pick: Pick, n: int = 0, k: int = 1,
             tally: Tally | None = None, ends: tuple[int, ...] = ENDS) -> Iterator[int]:
    """The tokens that follow a prompt, as they come; fills the tally.

    prompt: 1 to max_seq_len ids. max_new_tokens: 0 means as many as the context holds, which no number exceeds:
    every position says one token, so text and prompt are at most max_seq_len + 1. n: heads that guess, 0 for plain
    decoding; k: candidates of each. Stops before a token of `ends`.
    """
    tally = Tally() if tally is None else tally
    length, end = len(prompt), model.args.max_seq_len + 1
    end = min(end, length + max_new_tokens) if max_new_tokens else end
    reader = Reader(model, n, k, end)
    if length > 1:
        depths = torch.arange(length - 1)
        given = torch.tensor(prompt[:-1])
        reader.keep(depths, given, reader.read(given, depths, depths <= depths[:, None]))
    at_hand = prompt[-1]
    while length < end:
        start = time.perf_counter()
        # A forward yields a token more than were guessed right, so the guesses stop one short of the end.
        tree = static_tree(min(len(reader.guesses), end - length - 1), k)
        guesses = reader.guesses[tree.depths[1:] - 1, tree.ranks[1:]]
        tokens = torch.cat((torch.tensor([at_hand]), guesses))  # (N,)
        states = reader.read(tokens, tree.depths, tree.sees)
        logits = model.readouts(tokens, states, [0])[0].logits()[0].float().cpu()  # (N, V)
        path, picked = walk(tree, tokens.tolist(), logits, pick, ends)
        reader.keep(torch.tensor(path), tokens, states)
        tally.add(tree, path, picked, time.perf_counter() - start)
        for token in picked:
            if token in ends:
                return
            yield token
        at_hand, length = picked[-1], length + len(picked)


class Printer:
    """Writes a text as its tokens come; a character whose bytes have not all come yet waits for them."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int]):
        self.tokenizer, self.ids, self.written = tokenizer, list(ids), 0
        self.add([])

    def add(self, ids: list[int], held_back: str = "\N{REPLACEMENT CHARACTER}") -> None:
        self.ids += ids
        text = self.tokenizer.decode(self.ids).rstrip(held_back)  # half a character decodes to this
        print(text[self.written :], end="", flush=True)
        self.written = max(self.written, len(text))

    def finish(self) -> None:
        self.add([], held_back="")
        print(flush=True)


# ---------------------------------------------------------------------------------------------
# the program

def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="a ckpt.pt or last.pt, a "
                        "model.bin, a Hugging Face folder of a Llama")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.model or .bin, or a folder "
                        "with one (default: that of the run's data set, or beside the model)")
    parser.add_argument("--prompt", default="", help="what the text begins with (default: nothing)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the best token (default 1)")
    parser.add_argument("--top_p", type=float, default=0.9, help="draw from the best tokens that add up to this; 0 or "
                        "1: from all (default 0.9)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the K best tokens; 0: from all (default)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="0: until the context is full (default 256)")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, a line --- between them (default 1)")
    parser.add_argument("--seed", type=int, default=1337, help="of the first sample, one more for each (default 1337)")
    parser.add_argument("--speculative", action="store_true", help="let the checkpoint's future heads guess ahead")
    parser.add_argument("--tree", type=int, metavar="K", help="with --speculative: candidates of each head (default 1)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Errors: ValueError naming the flag, what was found and what is expected."""
    for name, fits, expected in (
            ("temperature", 0.0 <= args.temperature < math.inf, "a number >= 0"),
            ("top_p", 0.0 <= args.top_p <= 1.0, "a number from 0 to 1"),
            ("top_k", args.top_k >= 0, "an int >= 0"),
            ("max_new_tokens", args.max_new_tokens >= 0, "an int >= 0"),
            ("num_samples", args.num_samples >= 1, "an int >= 1"),
            ("seed", 0 <= args.seed < 2**63, "an int from 0 to 2^63 - 1"),
            ("tree", args.tree is None or args.tree >= 1, "an int >= 1")):
        if not fits:
            raise ValueError(f"--{name}={getattr(args, name)}: expected {expected}")
    if args.tree is not None and not args.speculative:
        raise ValueError(f"--tree={args.tree}: expected --speculative as well")


def check_model(model: Transformer, path: Path, speculative: bool) -> None:
    """Errors: ValueError where this program cannot decode with the model, or not with its heads."""
    args = model.args
    if args.trunk != "transformer":
        raise ValueError(f"{path}: expected a Transformer, found trunk={args.trunk}")
    if not speculative:
        return
    if args.n_future_heads < 1:
        raise ValueError(f"{path}: --speculative needs a checkpoint with future heads, found none")
    if args.head not in GUESSERS:
        raise ValueError(f"{path}: --speculative needs heads of type {', '.join(GUESSERS)}, found {args.head}")


def load(args: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    checkpoint = read_checkpoint(args.checkpoint, mapped=True)
    model = model_of(checkpoint, args.checkpoint)
    check_model(model, args.checkpoint, args.speculative)
    tokenizer = find_tokenizer(args.checkpoint, checkpoint, model.args.vocab_size, args.tokenizer)
    if was_trained_with_another(checkpoint, tokenizer):
        tell(f"{args.tokenizer or args.checkpoint}: {TEXT_WILL_BE_WRONG}")
    return model.to(find_machine(args.device).device).float(), tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str, context: int) -> list[int]:
    """BOS and the text's ids. Errors: ValueError if they do not fit into the context."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"--prompt: expected UTF-8, found {text!r}") from None
    ids = [tokenizer.bos, *tokenizer.encode(text)]
    if len(ids) > context:
        raise ValueError(f"--prompt: {len(ids)} tokens with BOS; the model's max_seq_len is {context}")
    return ids


def tell(*words: str) -> None:
    print(*words, file=sys.stderr, flush=True)


def report(tally: Tally, plain: Tally | None) -> None:
    """The statistics, on standard error; `plain` where guesses were at work."""
    speed = tally.tokens / tally.seconds
    if plain is None:
        return tell(f"{tally.tokens} tokens, {speed:.1f} tokens/s")
    plain_speed = plain.tokens / plain.seconds
    tell(f"{tally.tokens} tokens in {tally.forwards} forwards, {tally.tokens / tally.forwards:.2f} tokens per forward; "
         f"{speed:.1f} tokens/s, {speed / plain_speed:.2f} times plain decoding ({plain_speed:.1f} tokens/s)")
    shares = ", ".join(f"{head}: {tally.right[head] / n:.0%} of {n}" for head, n in sorted(tally.reached.items()))
    tell(f"acceptance per head, where all heads before it were right: {shares or 'nothing was guessed'}")


def compare(ids: list[int], plain: list[int], sample: int) -> bool:
    """Are two texts equal? If not, say where they part."""
    if ids == plain:
        return True
    at = next((t for t, pair in enumerate(zip(ids, plain)) if len(set(pair)) == 2), min(len(ids), len(plain)))
    tell(f"WARNING: sample {sample} is not that of plain decoding from new token {at + 1} on; "
         "only a tie that rounding decides may do this")
    return False


def main(argv: list[str]) -> None:
    args = read_arguments(argv)
    check_arguments(args)
    model, tokenizer = load(args)
    S, V = model.args.max_seq_len, model.args.vocab_size
    prompt = encode_prompt(tokenizer, args.prompt, S)
    n, k = (model.args.n_future_heads, min(args.tree or 1, V)) if args.speculative else (0, 1)
    tally, plain, same = Tally(), Tally() if args.speculative else None, True

    def texts(sample: int, n: int, tally: Tally | None, most: int = args.max_new_tokens) -> Iterator[int]:
        pick = picker(args.temperature, args.top_k, args.top_p, args.seed + sample)
        return generate(model, prompt, most, pick, n, k, tally, (tokenizer.bos, *tokenizer.ends))

    if args.speculative:  # first forwards are slow ones, and not to be compared
        for heads in (0, n):
            list(texts(0, heads, None, most=8))
    for sample in range(args.num_samples):
        if sample:
            print("---")
        printer, ids = Printer(tokenizer, prompt), []
        for token in texts(sample, n, tally):
            ids.append(token)
            printer.add([token])
        printer.finish()
        if len(prompt) + len(ids) == S + 1:
            tell(f"sample {sample + 1} ends where the context does, {S} tokens")
        if plain:  # in turns, so that both meet the same machine
            same &= compare(ids, list(texts(sample, 0, plain)), sample + 1)
    report(tally, plain)
    if plain and same:
        tell("the tokens are those of plain decoding")


if __name__ == "__main__":
    sys.exit(program(main))
