"""A Llama as llama2.c has it, with n heads that look further ahead than the next token.

The trunk turns tokens into states h; the next-token (NTP) head and each future head read them:

    states = model.trunk(tokens)            # after the last block and before it, (B, T, D) each
    heads = model.readouts(tokens, states, [0, i])
    z = heads[0].logits()                   # (B, T, V), z[t] scores x[t+1]
    a = heads[i].logits()                   # (B, T, V), a[t] scores x[t+1+i], i = 1..n

B batch, T positions, D model dim, H heads, hd head dim, V vocabulary, n future heads. Parameter
names of the trunk are llama2.c's, so its checkpoints load; those of heads begin as in HEADS. What each
type of head is for: doc/objectives.md.

Both take a KVCache where tokens go through the model a few at a time, as sample.py has them.

What this leaves out on purpose: losses (losses.py), optimisers and files (train.py, export.py).
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_THETA = 10000.0  # the base of RoPE's angles in llama2.c


@dataclass
class ModelArgs:
    """The shape of a model; llama2.c's names. `model_args` of a checkpoint is this, as a dict."""

    dim: int = 64
    n_layers: int = 5
    n_heads: int = 8
    n_kv_heads: int = 4  # key/value heads, each shared by n_heads / n_kv_heads query heads
    head_dim: int = 0  # numbers in a query, key or value; 0: dim / n_heads
    vocab_size: int = 512
    hidden_dim: int = 0  # of the feed-forward; 0: 2/3 of 4 dim, rounded up to multiple_of
    multiple_of: int = 4
    norm_eps: float = 1e-5
    max_seq_len: int = 512
    rope_theta: float = ROPE_THETA  # the base of RoPE's angles
    rope_scaling: str = "none"  # linear or llama3: how RoPE's angles were stretched for longer contexts
    rope_factor: float = 1.0  # by how much
    rope_low_freq_factor: float = 1.0  # llama3: waves longer than rope_original_seq_len / this are stretched
    rope_high_freq_factor: float = 4.0  # llama3: waves shorter than rope_original_seq_len / this are not
    rope_original_seq_len: int = 0  # llama3: the context before it was stretched
    dropout: float = 0.0
    tie_embeddings: bool = True  # one matrix for the token embedding and the NTP head
    trunk: str = "transformer"  # or rnn, which no file format of run.c's can hold
    recurrence: int = 1  # how often the layers between prelude and coda are applied
    prelude_layers: int = 1
    coda_layers: int = 1
    n_future_heads: int = 0
    head: str = "linear"
    head_input: str = "last"  # the state that heads read: after the trunk's last block, or before it (before_last)
    aux_grad_scale: float = 1.0  # the part of each further head's gradient that reaches the trunk
    aux_grad_power: bool = False  # head i's part is that to the power of i
    spelling_letters: int = 0  # letters of the following text that are predicted, each by a separate head
    alphabet_size: int = 0  # classes of those heads
    order_window: int = 0  # tokens ahead that the order head ranks; 0: there is none
    param_dtype: str = "float32"  # of the trunk's matrices; heads and norms are always float32

    def __post_init__(self):
        if self.head_dim == 0:
            if self.dim % self.n_heads or self.dim // self.n_heads % 2:
                raise ValueError(f"dim={self.dim}: expected an even multiple of n_heads={self.n_heads} (RoPE turns "
                                 "pairs), or a head_dim")
            self.head_dim = self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: expected an even number (RoPE turns pairs)")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads}: expected a divisor of n_heads={self.n_heads}")
        if self.recurrence < 1 or self.prelude_layers < 0 or self.coda_layers < 0:
            raise ValueError(f"recurrence={self.recurrence}, prelude_layers={self.prelude_layers}, coda_layers="
                             f"{self.coda_layers}: expected at least 1, 0 and 0")
        if self.recurrence > 1 and self.prelude_layers + self.coda_layers >= self.n_layers:
            raise ValueError(f"recurrence={self.recurrence}: no layer is between prelude_layers={self.prelude_layers} "
                             f"and coda_layers={self.coda_layers} of n_layers={self.n_layers}")
        for name, known in (("head", FUTURE_HEADS), ("trunk", ("transformer", "rnn")), ("rope_scaling", ROPE_SCALINGS),
                            ("head_input", ("last", "before_last")), ("param_dtype", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: expected one of {', '.join(known)}")
        if self.head_input == "before_last" and (self.head not in READ_STATES or self.trunk == "rnn"):
            raise ValueError(f"head_input=before_last: needs head={' or '.join(READ_STATES)} and a Transformer, found "
                             f"head={self.head}, trunk={self.trunk}")
        if self.param_dtype != "float32" and self.trunk == "rnn":
            raise ValueError(f"param_dtype={self.param_dtype}: not with trunk=rnn")
        self._check_rope()
        if self.hidden_dim == 0:
            self.hidden_dim = self.multiple_of * math.ceil(int(2 * 4 * self.dim / 3) / self.multiple_of)

    def _check_rope(self) -> None:
        if not 0 < self.rope_theta < math.inf or not 1 <= self.rope_factor < math.inf:
            raise ValueError(f"rope_theta={self.rope_theta}, rope_factor={self.rope_factor}: expected a number above 0 "
                             "and one from 1 up")
        if self.rope_scaling == "none" and self.rope_factor != 1.0:
            raise ValueError(f"rope_factor={self.rope_factor}: needs rope_scaling, found none")
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if self.rope_scaling == "llama3" and not (0 < low < high < math.inf and self.rope_original_seq_len > 0):
            raise ValueError(f"rope_scaling=llama3: expected 0 < rope_low_freq_factor < rope_high_freq_factor and a "
                             f"rope_original_seq_len, found {low}, {high} and {self.rope_original_seq_len}")

    def as_dict(self) -> dict:
        return asdict(self)


class States(NamedTuple):
    """The trunk's output, (B, T, D) each."""

    last: Tensor  # after the last block: what the NTP head reads
    before_last: Tensor  # what the last block reads


class Readout(NamedTuple):
    """A head's output: logits are `features` times `weight` transposed.

    Kept apart so that a loss can form the logits a chunk at a time, or not at all.
    """

    features: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)

    def logits(self) -> Tensor:
        return F.linear(self.features, self.weight)  # (B, T, V)


# ---------------------------------------------------------------------------------------------
# trunk

def matrix(inputs: int, outputs: int, args: ModelArgs) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=getattr(torch, args.param_dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """weight: used in place of the norm's weight."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * (self.weight if weight is None else weight)


def unscaled_frequencies(head_dim: int, theta: float = ROPE_THETA) -> Tensor:
    """RoPE's angle per position of each pair, (head_dim / 2,) float32 (RoFormer, arXiv 2104.09864)."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim)


def rope_frequencies(args: ModelArgs) -> Tensor:
    """The same, stretched for a longer context.

    linear: every angle is divided by rope_factor (Chen et al. 2023, arXiv 2306.15595). llama3: only those of pairs
    whose wave is long against the original context, with a straight passage between (Llama 3.1's release).
    """
    frequencies = unscaled_frequencies(args.head_dim, args.rope_theta)
    if args.rope_scaling == "none":
        return frequencies
    stretched = frequencies / args.rope_factor
    if args.rope_scaling == "linear":
        return stretched
    waves = args.rope_original_seq_len * frequencies / (2 * math.pi)  # that fit into the original context
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    return torch.lerp(stretched, frequencies, ((waves - low) / (high - low)).clamp(0, 1))


def rope_table(head_dim: int, length: int, frequencies: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (length, head_dim / 2), float32. frequencies: default llama2.c's."""
    frequencies = unscaled_frequencies(head_dim) if frequencies is None else frequencies
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs (x[2j], x[2j+1]) of x: (B, T, H, hd) by their position's angles: (T, hd / 2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, hd / 2) each
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, hd / 2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class KVCache:
    """Keys and values of the tokens fed before, so that only new tokens go through the layers.

        cache.begin(depths, sees)       # positions of the new tokens
        h = model.trunk(new, cache)
        cache.keep(rows)                # those that stay

    An attention finds its entry by the order of the calls, which is the same in every feed: a layer that is applied
    r times has r entries. Future heads may be fed other tokens than the trunk, so they need a separate cache.
    """

    def __init__(self, room: int):
        """room: the most positions ever held, including those of a feed that are dropped again."""
        self.room, self.length = room, 0
        self.entries: list[tuple[Tensor, Tensor]] = []  # k, v of each attention: (B, room, H_kv, hd)

    def begin(self, depths: Tensor, sees: Tensor) -> None:
        """T new tokens, `depths` (T,) positions after the last kept token; they attend to every kept token. Row t of
        `sees`, (T, T) bool, says which of the new tokens token t attends to: itself and what comes before it.
        """
        self.positions = self.length + depths  # (T,)
        self.mask = F.pad(sees, (self.length, 0), value=True)  # (T, length + T)
        self.asked = 0

    def join(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """The next attention's keys and values of the new tokens, (B, T, H_kv, hd) -> of all, (B, length + T, ...)."""
        if self.asked == len(self.entries):
            self.entries.append(tuple(t.new_empty(t.shape[0], self.room, *t.shape[2:]) for t in (k, v)))
        entry, end = self.entries[self.asked], self.length + k.shape[1]
        self.asked += 1
        for held, new in zip(entry, (k, v), strict=True):
            held[:, self.length : end] = new
        return [held[:, :end] for held in entry]

    def keep(self, rows: Tensor) -> None:
        """Keep these rows of the new tokens, in this order, one position each; drop the others."""
        end = self.length + len(rows)
        for entry in self.entries:
            for held in entry:
                held[:, self.length : end] = held[:, self.length + rows]  # the right side is a copy
        self.length = end


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key/value head (GQA, arXiv 2305.13245)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim = args.head_dim
        self.wq = matrix(args.dim, args.n_heads * args.head_dim, args)
        self.wk = matrix(args.dim, args.n_kv_heads * args.head_dim, args)
        self.wv = matrix(args.dim, args.n_kv_heads * args.head_dim, args)
        self.wo = matrix(args.n_heads * args.head_dim, args.dim, args)
        self.dropout = args.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, T, H | H_kv, hd)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.join(k, v)
        groups = self.n_heads // self.n_kv_heads
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))  # query head j reads kv head j // groups
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, hd)
        y = F.scaled_dot_product_attention(q, k, v, None if cache is None else cache.mask, is_causal=cache is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.wo(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = matrix(args.dim, args.hidden_dim, args)
        self.w2 = matrix(args.hidden_dim, args.dim, args)
        self.w3 = matrix(args.dim, args.hidden_dim, args)
        self.dropout = args.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class TransformerBlock(nn.Module):
    Norm = RMSNorm  # step/kernels.py puts a faster one with the same parameters in its place

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = self.Norm(args.dim, args.norm_eps)
        self.ffn_norm = self.Norm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return h + self.feed_forward(self.ffn_norm(h))


# ---------------------------------------------------------------------------------------------
# future heads: each is built from ModelArgs and the trunk's kind of block

def part_of_gradient(x: Tensor, part: float) -> Tensor:
    """Identity forward; scales the gradient by `part` backward."""
    if part == 1.0:
        return x
    return x.detach() if part == 0.0 else torch.lerp(x.detach(), x, part)  # the same numbers, exactly


class View:
    """The states and weights that future heads read; `part` of their gradient reaches the trunk."""

    def __init__(self, model: "Transformer", tokens: Tensor, states: States, ntp: Readout, part: float,
                 cache: KVCache | None):
        h = states.before_last if model.args.head_input == "before_last" else states.last
        self.model, self.tokens, self.part, self.ntp = model, tokens, part, ntp
        self.h = part_of_gradient(h, part)  # (B, T, D)
        self.normed = part_of_gradient(ntp.features, part)  # (B, T, D), norm(h)
        self.unembedding = part_of_gradient(ntp.weight, part)  # (V, D)
        self.places = model.places(h.shape[1], cache)

    def embedding_ahead(self, i: int) -> Tensor:
        """(B, T, D): at t the embedding of x[t+i]; the last i positions of a row are meaningless."""
        weight = part_of_gradient(self.model.tok_embeddings.weight, self.part)
        return F.embedding(self.tokens.roll(-i, 1), weight).float()

    def readout(self, state: Tensor) -> Readout:
        """The trunk's norm and unembedding of a head's own state (B, T, D)."""
        return Readout(self.model.norm(state, part_of_gradient(self.model.norm.weight, self.part)), self.unembedding)


class LinearHead(nn.Module):
    """A separate unembedding on norm(h): V x D parameters per head (lingua; Platek's fork of llama2.c)."""

    def __init__(self, args: ModelArgs, block: type):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(args.vocab_size, args.dim))

    def forward(self, view: View) -> Readout:
        return Readout(view.normed, self.weight)


class ResidualHead(nn.Module):
    """h + SiLU(W h), W = 0 at the start: D x D parameters per head (Medusa, arXiv 2401.10774, section 2.1)."""

    def __init__(self, args: ModelArgs, block: type):
        super().__init__()
        self.residual = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, view: View) -> Readout:
        return view.readout(view.h + F.silu(self.residual(view.h)))


class BlockHead(nn.Module):
    """A separate transformer block on h (Gloeckle et al. 2024, arXiv 2404.19737, section 2)."""

    def __init__(self, args: ModelArgs, block: type):
        super().__init__()
        self.block = block(args)

    def forward(self, view: View) -> Readout:
        return view.readout(self.block(view.h, *view.places))


class SequentialHead(nn.Module):
    """A block on a projection of [norm(state of the head before) ; norm(embedding of x[t+i])] (DeepSeek-V3, arXiv
    2412.19437, section 2.2). Head i at t has seen the i tokens in between, and needs all heads before it.
    """

    def __init__(self, args: ModelArgs, block: type):
        super().__init__()
        self.state_norm = block.Norm(args.dim, args.norm_eps)
        self.token_norm = block.Norm(args.dim, args.norm_eps)
        self.project = nn.Linear(2 * args.dim, args.dim, bias=False)
        self.block = block(args)

    def next_state(self, view: View, i: int, state: Tensor) -> Tensor:
        both = torch.cat((self.state_norm(state), self.token_norm(view.embedding_ahead(i))), dim=-1)
        return self.block(self.project(both).type_as(state), *view.places)


class SharedHead(nn.Module):
    """The next-token head itself, trained on later tokens too (modded-nanogpt's multi-token record)."""

    def __init__(self, args: ModelArgs, block: type):
        super().__init__()

    def forward(self, view: View) -> Readout:
        return view.ntp


FUTURE_HEADS = {"linear": LinearHead, "residual": ResidualHead, "block": BlockHead, "sequential": SequentialHead,
                "shared": SharedHead}
READ_STATES = ("residual", "block", "sequential")  # types that read the trunk's state, others its norm
ROPE_SCALINGS = ("none", "linear", "llama3")
OF_LLAMAS = ("dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "hidden_dim", "multiple_of", "norm_eps",
             "max_seq_len", "tie_embeddings", "rope_theta", "rope_scaling", "rope_factor", "rope_low_freq_factor",
             "rope_high_freq_factor", "rope_original_seq_len", "param_dtype")  # of ModelArgs, what other programs know
HEADS = ("future_heads.", "spelling_heads.", "order_head.")  # prefixes of parameters outside the trunk


class Transformer(nn.Module):
    """Trunk, NTP head, `n_future_heads` future heads, and heads for letters and order where ModelArgs has them."""

    Block = TransformerBlock  # step/kernels.py puts a faster one with the same parameters in its place

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        output = matrix(args.dim, args.vocab_size, args)  # first: if tied, its numbers go before much memory is taken
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, dtype=getattr(torch, args.param_dtype))
        if args.tie_embeddings:
            output.weight = self.tok_embeddings.weight
        if args.trunk == "rnn":  # Elman 1990, with PyTorch's own initial weights
            self.rnn = nn.RNN(args.dim, args.dim, args.n_layers, batch_first=True)
            self.layers = nn.ModuleList()
        else:
            self.layers = nn.ModuleList(self.Block(args) for _ in range(args.n_layers))
        self.norm = self.Block.Norm(args.dim, args.norm_eps)
        self.output = output
        cos, sin = rope_table(args.head_dim, args.max_seq_len, rope_frequencies(args))
        self.register_buffer("rope_cos", cos, persistent=False)  # (max_seq_len, hd / 2)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._init_weights(self)
        # Heads last: the trunk of a seed starts the same whatever heads sit on it, so runs can be compared in pairs.
        of_heads = replace(args, param_dtype="float32")
        self.future_heads = nn.ModuleList(FUTURE_HEADS[args.head](of_heads, self.Block)
                                          for _ in range(args.n_future_heads))
        self._init_weights(self.future_heads)
        if args.spelling_letters:
            self.spelling_heads = nn.Linear(args.dim, args.spelling_letters * args.alphabet_size, bias=False)
            self._init_weights(self.spelling_heads)
        if args.order_window:
            self.order_head = nn.Linear(args.dim, args.vocab_size, bias=False)
            self._init_weights(self.order_head)

    def _init_weights(self, module: nn.Module) -> None:
        """Matrices from N(0, 0.02); those that write into the residual stream smaller, by sqrt(2 layers) (GPT-2)."""
        depth = len(self.unrolled()) or self.args.n_layers
        for name, p in module.named_parameters():
            if name.endswith("residual.weight"):
                nn.init.zeros_(p)
            elif p.dim() == 2 and not name.startswith("rnn."):
                writes = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * depth) if writes else 0.02)

    def unrolled(self) -> list[TransformerBlock]:
        """The layers in the order in which they are applied: prelude, `recurrence` times the core, coda.

        Recurrent depth: Geiping et al. 2025 (arXiv 2502.05171), here without the input's injection and
        the random first state, which a Llama has no place for.
        """
        layers, r = list(self.layers), self.args.recurrence
        if r == 1:
            return layers
        first, last = self.args.prelude_layers, len(layers) - self.args.coda_layers
        return layers[:first] + layers[first:last] * r + layers[last:]

    def as_llama(self) -> tuple[ModelArgs, dict[str, Tensor]]:
        """Trunk and NTP head as the Llama that other programs know: no other heads, layers that recur written out.

        Errors: ValueError if the trunk is no Transformer.
        """
        if self.args.trunk != "transformer":
            raise ValueError(f"other programs' formats hold Transformers, the model's trunk is {self.args.trunk}")
        layers = self.unrolled()
        args = ModelArgs(n_layers=len(layers), **{name: getattr(self.args, name) for name in OF_LLAMAS})
        state = {"tok_embeddings.weight": self.tok_embeddings.weight, "norm.weight": self.norm.weight}
        state |= {f"layers.{k}.{name}": p for k, layer in enumerate(layers) for name, p in layer.named_parameters()}
        return args, state if args.tie_embeddings else state | {"output.weight": self.output.weight}

    def start_as_last_block(self, heads: Iterable[int]) -> None:
        """Make the blocks of these future heads copies of the trunk's last. Errors: ValueError where there is none."""
        for i in heads:
            if not self.layers or not hasattr(self.future_heads[i - 1], "block"):
                raise ValueError(f"head_init=last_block: needs heads with a block and a Transformer, "
                                 f"found head={self.args.head}, trunk={self.args.trunk}")
            self.future_heads[i - 1].block.load_state_dict(self.layers[-1].state_dict())

    def places(self, T: int, cache: KVCache | None) -> tuple:
        """A block's arguments for T positions: cos and sin, (T, hd / 2) each, and the cache if there is one."""
        if cache is None:
            return self.rope_cos[:T], self.rope_sin[:T]
        return self.rope_cos[cache.positions], self.rope_sin[cache.positions], cache

    def trunk(self, tokens: Tensor, cache: KVCache | None = None) -> States:
        """tokens: (B, T) int64, T <= max_seq_len -> the states around the last block.

        Of tokens (B, T, s), bags of s, a position reads the mean of their embeddings. With a cache, tokens are
        those of the last KVCache.begin. An rnn trunk has no cache.
        """
        T = tokens.shape[1]
        if cache is None and T > self.args.max_seq_len:
            raise ValueError(f"a row of {T} tokens: this model's max_seq_len is {self.args.max_seq_len}")
        h = self.tok_embeddings(tokens).float()  # the residual stream is float32, whatever the matrices are
        h = F.dropout(h.mean(2) if tokens.dim() == 3 else h, self.args.dropout, self.training)
        if self.args.trunk == "rnn":
            with torch.autocast(h.device.type, enabled=False):
                return States(self.rnn(h)[0], h)
        places = self.places(T, cache)
        before = h
        for layer in self.unrolled():
            before, h = h, layer(h, *places)
        return States(h, before)

    def readouts(self, tokens: Tensor, states: States, heads: Iterable[int | str], cache: KVCache | None = None,
                 rows: int | None = None) -> dict[int | str, Readout]:
        """{head: its readout of the trunk's states}: 0 is the NTP head, i = 1..n_future_heads looks i tokens further.

        "spelling" is that of the letters, its weight (spelling_letters * alphabet_size, D); "order" that
        of the order of tokens. tokens (B, T) are those of the states. A cache is that of the heads' blocks. rows: heads
        other than the NTP head read only the first rows of the batch, and have as many; None: all.
        """
        ntp = Readout(self.norm(states.last), self.output.weight)  # normed once, for all heads that read it
        found, state = {0: ntp}, None
        if rows is not None and rows < len(tokens):
            tokens, states = tokens[:rows], States(*(h[:rows] for h in states))
            ntp = ntp._replace(features=ntp.features[:rows])
        part, power = self.args.aux_grad_scale, self.args.aux_grad_power
        views = {}
        for i in range(1, 1 + max(i for i in (0, *heads) if isinstance(i, int))):
            head, chained = self.future_heads[i - 1], self.args.head == "sequential"
            if i in heads or chained:
                share = part**i if power else part
                view = views[share] = views.get(share) or View(self, tokens, states, ntp, share, cache)
                if chained:
                    state = head.next_state(view, i, view.h if state is None else state)
                if i in heads:
                    found[i] = view.readout(state) if chained else head(view)
        for name, head in (("spelling", "spelling_heads"), ("order", "order_head")):
            if name in heads:
                found[name] = Readout(part_of_gradient(ntp.features, part), getattr(self, head).weight)
        return {i: found[i] for i in heads}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) -> NTP logits z: (B, T, V)."""
        return self.readouts(tokens, self.trunk(tokens), [0])[0].logits()

    @property
    def shared_head(self) -> bool:
        """Is every future head the next-token head itself?"""
        return self.args.head == "shared"

    def trunk_parameters(self) -> list[nn.Parameter]:
        """The parameters of trunk and NTP head."""
        return [p for name, p in self.named_parameters() if not name.startswith(HEADS)]

    def parameter_counts(self) -> dict[str, int]:
        """{'trunk': parameters with the NTP head, 'future heads': parameters only they and other heads have}."""
        trunk = sum(p.numel() for p in self.trunk_parameters())
        return {"trunk": trunk, "future heads": sum(p.numel() for p in self.parameters()) - trunk}
