"""A Llama as llama2.c has it, with n heads that look further ahead than the next token.

The trunk turns tokens into states h; the next-token (NTP) head and each future head read them:

    h = model.trunk(tokens)             # (B, T, D), after the last block
    heads = model.readouts(h, [0, i])
    z = heads[0].logits()               # (B, T, V), z[t] scores x[t+1]
    a = heads[i].logits()               # (B, T, V), a[t] scores x[t+1+i], i = 1..n

B batch, T positions, D model dim, H heads, hd head dim, V vocabulary, n future heads. Parameter
names of the trunk are llama2.c's, so its checkpoints load; heads are under `future_heads.`.

What this leaves out on purpose: losses (losses.py), optimisers and files (train.py, export.py),
the KV cache (run.c).
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelArgs:
    """The shape of a model; llama2.c's names. `model_args` of a checkpoint is this, as a dict."""

    dim: int = 64
    n_layers: int = 5
    n_heads: int = 8
    n_kv_heads: int = 4  # key/value heads, each shared by n_heads / n_kv_heads query heads
    vocab_size: int = 512
    hidden_dim: int = 0  # of the feed-forward; 0: 2/3 of 4 dim, rounded up to multiple_of
    multiple_of: int = 4
    norm_eps: float = 1e-5
    max_seq_len: int = 512
    dropout: float = 0.0
    tie_embeddings: bool = True  # one matrix for the token embedding and the NTP head
    n_future_heads: int = 0
    head: str = "linear"

    def __post_init__(self):
        if self.dim % self.n_heads or self.dim // self.n_heads % 2:
            raise ValueError(f"dim={self.dim}: expected an even multiple of n_heads={self.n_heads} (RoPE turns pairs)")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads}: expected a divisor of n_heads={self.n_heads}")
        if self.hidden_dim == 0:
            self.hidden_dim = self.multiple_of * math.ceil(int(2 * 4 * self.dim / 3) / self.multiple_of)

    def as_dict(self) -> dict:
        return asdict(self)


class Readout(NamedTuple):
    """What a head makes of the trunk's states: logits are `features` times `weight` transposed.

    Kept apart so that a loss can form the logits a chunk at a time, or not at all.
    """

    features: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)

    def logits(self) -> Tensor:
        return F.linear(self.features, self.weight)  # (B, T, V)


# ---------------------------------------------------------------------------------------------
# trunk

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def rope_table(head_dim: int, length: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (length, head_dim / 2), float32 (RoFormer, arXiv 2104.09864)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs (x[2j], x[2j+1]) of x: (B, T, H, hd) by their position's angles: (T, hd / 2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, hd / 2) each
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, hd / 2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key/value head (GQA, arXiv 2305.13245)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)
        self.dropout = args.dropout

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, T, H | H_kv, hd)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = self.n_heads // self.n_kv_heads
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))  # query head j reads kv head j // groups
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, hd)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.wo(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (arXiv 2002.05202)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.dropout = args.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class TransformerBlock(nn.Module):
    Norm = RMSNorm  # kernels.py puts a faster one with the same parameters in its place

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = self.Norm(args.dim, args.norm_eps)
        self.ffn_norm = self.Norm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cos, sin)
        return h + self.feed_forward(self.ffn_norm(h))


# ---------------------------------------------------------------------------------------------
# future heads: each is built from ModelArgs and maps the model, its states h and norm(h) to a Readout

class LinearHead(nn.Module):
    """An unembedding of its own on the trunk's normed states: V x D parameters a head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(args.vocab_size, args.dim))

    def forward(self, model: "Transformer", h: Tensor, normed: Tensor) -> Readout:
        return Readout(normed, self.weight)


FUTURE_HEADS = {"linear": LinearHead}


class Transformer(nn.Module):
    """Trunk, NTP head and `n_future_heads` future heads."""

    Block = TransformerBlock  # kernels.py puts a faster one with the same parameters in its place

    def __init__(self, args: ModelArgs):
        super().__init__()
        if args.head not in FUTURE_HEADS:
            raise ValueError(f"head={args.head}: expected one of {', '.join(FUTURE_HEADS)}")
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(self.Block(args) for _ in range(args.n_layers))
        self.norm = self.Block.Norm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        cos, sin = rope_table(args.dim // args.n_heads, args.max_seq_len)
        self.register_buffer("rope_cos", cos, persistent=False)  # (max_seq_len, hd / 2)
        self.register_buffer("rope_sin", sin, persistent=False)
        self._init_weights(self)
        # Heads last: the trunk of a seed starts the same whatever heads sit on it, so runs can be compared in pairs.
        self.future_heads = nn.ModuleList(FUTURE_HEADS[args.head](args) for _ in range(args.n_future_heads))
        self._init_weights(self.future_heads)

    def _init_weights(self, module: nn.Module) -> None:
        """Matrices from N(0, 0.02); those that write into the residual stream smaller, by sqrt(2 n_layers) (GPT-2)."""
        for name, p in module.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * self.args.n_layers) if residual else 0.02)

    def trunk(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64, T <= max_seq_len -> h: (B, T, D), the states after the last block."""
        T = tokens.shape[1]
        if T > self.args.max_seq_len:
            raise ValueError(f"a row of {T} tokens: this model's max_seq_len is {self.args.max_seq_len}")
        h = F.dropout(self.tok_embeddings(tokens), self.args.dropout, self.training)
        for layer in self.layers:
            h = layer(h, self.rope_cos[:T], self.rope_sin[:T])
        return h

    def readouts(self, h: Tensor, heads: Iterable[int]) -> dict[int, Readout]:
        """{i: head i on states h}: 0 is the NTP head, i = 1..n_future_heads looks i tokens further ahead."""
        normed = self.norm(h)  # once, for all heads that read it
        ntp = Readout(normed, self.output.weight)
        return {i: self.future_heads[i - 1](self, h, normed) if i else ntp for i in heads}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) -> NTP logits z: (B, T, V)."""
        return self.readouts(self.trunk(tokens), [0])[0].logits()

    def parameter_counts(self) -> dict[str, int]:
        """{'trunk': parameters with the NTP head, 'future heads': parameters only they have}."""
        heads = sum(p.numel() for p in self.future_heads.parameters())
        return {"trunk": sum(p.numel() for p in self.parameters()) - heads, "future heads": heads}
