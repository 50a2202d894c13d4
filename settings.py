"""Every setting of train.py: its type and range, what it is for, and which settings contradict each other.

`python train.py --help` prints them; config/*.py and the command line set them (configurator.py).

Settings stand in sections by what they are for: a resumed run keeps its Shape and Heads, set-ups that are compared
differ in Heads and Looking, and so on. `names_of` gives a section's settings to whoever needs them. This file does
not import torch, so that compare.py starts in a second; what a setting does is in model.py, losses.py and train.py.
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from configurator import Range
from text.tokenizer import MAX_VOCAB_SIZE

if TYPE_CHECKING:
    from model import ModelArgs

MOST_NEIGHBOURS = 1 << 24  # entries of the table of soft targets; 12 bytes each, in every checkpoint

# Ranges by name, so that the list of settings stays readable. What is beyond them is a slip of the keyboard; what is
# beyond one machine's memory, step/memory.py knows.
Interval = Annotated[int, Range(1, 10**9)]  # iterations
Iterations = Annotated[int, Range(0, 10**9)]
Epochs = Annotated[float, Range(0, 10**6)]
Rows = Annotated[int, Range(1, 10**6)]  # or other things of which an iteration has many
Length = Annotated[int, Range(1, 1 << 24)]  # tokens
Width = Annotated[int, Range(1, 1 << 16)]
Hidden = Annotated[int, Range(0, 1 << 20)]
Depth = Annotated[int, Range(1, 1 << 10)]  # layers
DepthOrNone = Annotated[int, Range(0, 1 << 10)]  # layers, heads
Positive = Annotated[float, Range(0, low_open=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
FractionAbove0 = Annotated[float, Range(0, 1, low_open=True)]
FractionBelow1 = Annotated[float, Range(0, 1, high_open=True)]
FractionBetween = Annotated[float, Range(0, 1, low_open=True, high_open=True)]


@dataclass
class Output:
    """Where a run is kept and what it logs; no result depends on these."""

    out_dir: str = "out"  # folder of ckpt.pt, last.pt and log.jsonl
    eval_interval: Interval = 250  # iterations between evaluations; each saves last.pt
    eval_only: bool = False  # evaluate once and stop; writes nothing
    eval_induction: bool = False  # also report tokens that a pair seen before in the row gives away, and names
    log_interval: Interval = 1  # iterations between lines on the terminal and in log.jsonl
    sample_tokens: Annotated[int, Range(0, 10**6)] = 64  # of a text by the NTP head at each evaluation; 0: none
    tensorboard_log: bool = False  # write out_dir/tensorboard as well
    wandb_log: bool = False  # send the log to wandb as well
    wandb_mode: Literal["auto", "online", "offline"] = "auto"  # offline: in ./wandb for `wandb sync`; auto: WANDB_MODE
    wandb_entity: str = ""  # user or team; empty: WANDB_ENTITY, as with all that follow
    wandb_project: str = ""  # WANDB_PROJECT, else lookahead
    wandb_run_name: str = ""  # WANDB_NAME, else the name of out_dir
    wandb_group: str = ""  # WANDB_RUN_GROUP; ablate.py: the set-up
    wandb_job_type: str = ""  # WANDB_JOB_TYPE; ablate.py: the seed
    wandb_tags: str = ""  # WANDB_TAGS; with commas between them
    wandb_notes: str = ""  # WANDB_NOTES
    wandb_artifact: bool = False  # send the best checkpoint of a complete run


@dataclass
class Data:
    """What a run starts from and what it reads."""

    init_from: str = "scratch"  # scratch; resume: out_dir/last.pt; auto: that if it is there, else scratch; or a model
    data_dir: str = "data"  # folder of all data sets
    dataset: str = "tinystories"  # reads data_dir/dataset/tok<vocab_size>/{train,val}.bin
    train_fraction: FractionAbove0 = 1.0  # train on only this leading part of train.bin, over and over
    pack: bool = False  # prompts and answers: rows hold whatever follows, not one example each
    eval_iters: Rows = 25  # validation batches (32 rows each) per evaluation, the same in every run
    allow_other_data: bool = False  # resume even if the data or its vocabulary is not what the run began with
    seed: Annotated[int, Range(0, 2**32 - 1)] = 1337  # of initial weights, order of the data, dropout


@dataclass
class Shape:
    """The trunk; a resumed run keeps its shape."""

    vocab_size: Annotated[int, Range(4, MAX_VOCAB_SIZE)] = 512  # tokens; 259 is the byte tokenizer
    max_seq_len: Length = 512  # tokens in a row, and the longest context of the model
    dim: Width = 64  # width of the residual stream
    n_layers: Depth = 5  # transformer blocks
    n_heads: Width = 8  # query heads; dim must be an even multiple
    n_kv_heads: Width = 4  # key/value heads; a divisor of n_heads
    head_dim: Annotated[int, Range(0, 1 << 16)] = 0  # numbers in a query, key or value; 0: dim / n_heads
    hidden_dim: Hidden = 0  # width of the feed-forward; 0: 2/3 of 4 dim, rounded up to multiple_of
    multiple_of: Width = 4  # see hidden_dim
    norm_eps: Positive = 1e-5  # RMSNorm's epsilon; run.c uses 1e-5
    tie_embeddings: bool = True  # one matrix for the token embedding and the NTP head
    rope_theta: Positive = 10000.0  # base of RoPE's angles; run.c uses 10000
    rope_scaling: Literal["none", "linear", "llama3"] = "none"  # how RoPE's angles are stretched for longer contexts
    rope_factor: Annotated[float, Range(1)] = 1.0  # by how much
    rope_low_freq_factor: Positive = 1.0  # llama3: waves longer than rope_original_seq_len / this are stretched
    rope_high_freq_factor: Positive = 4.0  # llama3: waves shorter than rope_original_seq_len / this are not
    rope_original_seq_len: Annotated[int, Range(0, 1 << 24)] = 0  # llama3: the context before it was stretched
    trunk: Literal["transformer", "rnn"] = "transformer"  # rnn: n_layers of Elman's, for comparison; not exported
    recurrence: Depth = 1  # how often the layers between prelude and coda are applied
    prelude_layers: DepthOrNone = 1  # layers before the ones that recur
    coda_layers: DepthOrNone = 1  # layers after the ones that recur


@dataclass
class Heads:
    """The heads besides the next-token (NTP) head; a resumed run keeps them."""

    n_future_heads: DepthOrNone = 0  # n; head i predicts x[t+1+i]
    head: Literal["linear", "residual", "block", "sequential", "shared"] = "linear"  # type of the future heads
    head_input: Literal["last", "before_last"] = "last"  # heads read the state after, or before, the trunk's last block
    spelling_letters: DepthOrNone = 0  # letters of the following text, a small head for each
    spelling_case: Literal["true", "lower", "upper"] = "true"  # letters as they are, or all lower or upper case
    order_window: Annotated[int, Range(0, 32)] = 0  # tokens ahead that a head ranks by distance; 0: no such head


@dataclass
class Looking:
    """Looking ahead: losses besides the next token's, and when they act."""

    nitp_weight: NonNegative = 0.0  # weight of the first head's cross-entropy
    consistency_weight: NonNegative = 0.0  # weight of the first head's divergence from the NTP head i tokens later
    consistency_direction: Literal["forward", "reverse", "js"] = "forward"  # KL(NTP || head), KL(head || NTP), or js
    consistency_teacher: Literal["later", "same"] = "later"  # the NTP head at t+i, or at t (a control)
    consistency_temperature: Positive = 1.0  # softens both sides
    head_decay: FractionAbove0 = 1.0  # head i's weights are those above times head_decay^(i-1)
    head_weights: str = ""  # "1,0.5,0.25": a factor for each head instead, head 1's first
    head_init: Literal["random", "last_block"] = "random"  # last_block: blocks of heads copy the trunk's last
    aux_positions: FractionAbove0 = 1.0  # share of a micro-batch's rows, the first ones, on which further heads learn
    aux_grad_scale: Fraction = 1.0  # the part of each further head's gradient that reaches the trunk
    aux_grad_power: bool = False  # head i's part is that to the power of i
    freeze_trunk_iters: Annotated[int, Range(-1, 10**9)] = 0  # iterations in which only heads learn; -1: all
    freeze_embeddings: bool = False  # token embeddings, and an unembedding tied to them, stay as they start
    curriculum: Literal["none", "forward", "reverse"] = "none"  # future heads join, or leave, one by one over the run
    spelling_weight: NonNegative = 0.0  # weight of all letters together
    order_weight: NonNegative = 0.0  # weight of the order head's ranking
    soft_weight: NonNegative = 0.0  # weight of the cross-entropy against neighbours of the next token
    soft_neighbours: Rows = 8  # tokens that share a soft target, the next token included
    soft_temperature: Positive = 0.1  # of the softmax of their cosines; high: even shares
    soft_refresh: Interval = 100  # iterations between updates of the table of neighbours
    prefix_weight: NonNegative = 0.0  # weight of the cross-entropy against the longest token that the next begins with
    superposition: Annotated[int, Range(1, 64)] = 1  # tokens in a bag, in the first part of the run; 1: no bags
    superposition_end: FractionBetween = 0.3  # fraction of the run at which that part ends
    mask_document_ends: bool = False  # future-token targets never cross a story boundary
    normalize_weights: bool = False  # divide all weights, that of the next token's loss included, by their sum
    aux_schedule: Literal["constant", "linear", "cosine"] = "constant"  # of all weights between aux_start and aux_end
    aux_start: FractionBelow1 = 0.0  # fraction of the run before which they are 0
    aux_end: Fraction = 1.0  # fraction of the run from which they are 0 (1: never)


@dataclass
class Optimisation:
    """How the parameters are updated."""

    batch_size: Rows = 16  # rows in a micro-batch of one process
    gradient_accumulation_steps: Rows = 1  # micro-batches per iteration
    max_iters: Interval = 100_000  # iterations of the whole run
    max_epochs: Epochs = 0.0  # length of the run in passes over the data, in place of max_iters; 0: max_iters
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the trunk's matrices, AdamW for the rest
    learning_rate: Positive = 5e-4  # peak of the learning rate
    warmup_iters: Iterations = 1000  # iterations in which the rate rises to its peak
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # after warm-up; wsd: constant, then a straight line
    decay_fraction: FractionAbove0 = 0.2  # wsd: the last part of the run, in which the rate falls
    min_lr: NonNegative = 0.0  # where cosine and wsd end
    weight_decay: NonNegative = 0.1  # on matrices only
    beta1: FractionBelow1 = 0.9  # AdamW's
    beta2: FractionBelow1 = 0.95  # AdamW's
    grad_clip: NonNegative = 1.0  # largest norm of the whole gradient; 0: no clipping
    dropout: FractionBelow1 = 0.0  # share of activations dropped in training


@dataclass
class Computing:
    """How it is computed; the numbers are the same within rounding."""

    device: str = "auto"  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of products; auto: bfloat16 where it is fast
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the trunk's matrices, which bfloat16 rounds
    path: Literal["auto", "plain", "fast"] = "auto"  # fast: step/kernels.c, on CPUs; plain: PyTorch; auto: the fastest
    compile: bool = False  # torch.compile the plain path


@dataclass
class Settings(Computing, Optimisation, Looking, Heads, Shape, Data, Output):  # fields come from the last base first
    """All of them, in the order of this file."""

    elsewhere = {  # settings of llama2.c, its multi-token fork and nanoGPT that have another name or none here
        "aux_losses": "here it is n_future_heads, with nitp_weight or consistency_weight",
        "use_k_ntp_loss": "here it is nitp_weight, with n_future_heads",
        "use_consistency_loss": "here it is consistency_weight, with n_future_heads",
        "vocab_source": "here a data set has its vocabulary: dataset and vocab_size (tinystories.py train_vocab)",
        "always_save_checkpoint": "here last.pt is saved at every evaluation, ckpt.pt when val/ntp is no worse",
        "resume": "here it is --init_from=resume", "block_size": "here it is max_seq_len",
        "n_layer": "here it is n_layers", "n_head": "here it is n_heads", "n_embd": "here it is dim",
        "lr": "here it is learning_rate", "lr_decay_iters": "here the rate falls until max_iters",
        "decay_lr": "here it is lr_schedule; false is --lr_schedule=constant",
        "bias": "a Llama has none", "backend": "here the device decides: nccl for CUDA, else gloo"}

    def head_factor(self, i: int) -> float:
        """Head i's part of nitp_weight and consistency_weight, i = 1..n_future_heads. Errors: ValueError."""
        if not self.head_weights:
            return self.head_decay ** (i - 1)
        try:
            factors = [float(text) for text in self.head_weights.split(",")]
        except ValueError:
            factors = []
        if len(factors) != self.n_future_heads or not all(0 <= x < 1e9 for x in factors) or not any(factors):
            raise ValueError(f"head_weights={self.head_weights[:80]}: expected {self.n_future_heads} numbers >= 0, one "
                             "for each of n_future_heads, with commas between them")
        return factors[i - 1]

    def aux_rows(self, rows: int) -> int:
        """On how many rows of a micro-batch of `rows` heads besides the NTP head learn."""
        return max(1, math.ceil(round(self.aux_positions * rows, 6)))  # 0.07 * 100 is a little above 7


NEED_TEXT = ("spelling_letters", "prefix_weight")  # settings for which a run must know what its tokens spell


def names_of(*sections: type) -> set[str]:
    """The settings of these sections: names_of(Shape, Heads)."""
    return {f.name for section in sections for f in fields(section)}


def with_names_of_today(config: dict) -> dict:
    """The settings of an older log or checkpoint, under the names that they have now."""
    if "decay_lr" not in config:
        return config
    rest = {name: value for name, value in config.items() if name != "decay_lr"}
    return {"lr_schedule": "cosine" if config["decay_lr"] else "constant"} | rest


def check(s: Settings) -> None:
    """Refuse settings that contradict each other; ValueError names them."""
    shape_of(s)
    for weight, needed in (("nitp_weight", "n_future_heads"), ("consistency_weight", "n_future_heads"),
                           ("spelling_weight", "spelling_letters"), ("order_weight", "order_window")):
        if getattr(s, weight) and not getattr(s, needed):
            raise ValueError(f"{weight}={getattr(s, weight)}: needs a head for it, found {needed}=0")
    if s.n_future_heads >= s.max_seq_len:
        raise ValueError(f"n_future_heads={s.n_future_heads}: expected less than max_seq_len={s.max_seq_len}")
    if s.aux_positions < 1.0 and s.aux_rows(s.batch_size) == s.batch_size:
        raise ValueError(f"aux_positions={s.aux_positions}: in whole rows, rounded up, this is all of batch_size="
                         f"{s.batch_size}; expected a smaller share, a larger batch_size, or 1")
    if s.aux_start >= s.aux_end:
        raise ValueError(f"aux_start={s.aux_start}: expected less than aux_end={s.aux_end}")
    if s.min_lr > s.learning_rate:
        raise ValueError(f"min_lr={s.min_lr}: expected at most learning_rate={s.learning_rate}")
    if not s.out_dir:
        raise ValueError("out_dir: expected the name of a folder, found nothing")
    if s.eval_only and s.init_from == "scratch":
        raise ValueError("eval_only: nothing to evaluate with init_from=scratch; give resume or a checkpoint's path")
    if s.soft_weight and s.soft_neighbours > s.vocab_size:
        raise ValueError(f"soft_neighbours={s.soft_neighbours}: expected at most vocab_size={s.vocab_size}")
    if s.soft_weight and s.soft_neighbours * s.vocab_size > MOST_NEIGHBOURS:
        raise ValueError(f"soft_neighbours={s.soft_neighbours}: a table for vocab_size={s.vocab_size} has room for "
                         f"{MOST_NEIGHBOURS // s.vocab_size} of each token")
    if s.curriculum != "none" and not s.n_future_heads:
        raise ValueError(f"curriculum={s.curriculum}: needs future heads, found n_future_heads=0")
    check_heads(s)
    if s.freeze_trunk_iters:
        check_frozen(s)


def check_heads(s: Settings) -> None:
    """Refuse settings that the chosen heads or trunk do not support."""
    if s.head == "shared" and s.n_future_heads and (s.nitp_weight or s.consistency_weight):
        for name, usual in (("aux_grad_scale", 1.0), ("aux_grad_power", False)):
            if getattr(s, name) != usual:
                raise ValueError(f"{name}={getattr(s, name)}: head=shared is the trunk's own; "
                                 "lower nitp_weight instead")
    if s.head == "sequential" and s.aux_grad_power:
        raise ValueError("aux_grad_power=True: not with head=sequential, whose heads read one another")
    if s.head_input == "before_last" and s.n_future_heads == 0:
        raise ValueError("head_input=before_last: needs future heads, found n_future_heads=0")
    if s.head_weights and s.head_decay != 1.0:
        raise ValueError(f"head_weights={s.head_weights[:80]}: expected one of head_weights and head_decay, found "
                         f"head_decay={s.head_decay} as well")
    s.head_factor(1)
    blocks = s.head in ("block", "sequential") and s.trunk == "transformer" and s.n_future_heads
    if s.head_init == "last_block" and not blocks:
        raise ValueError(f"head_init=last_block: needs future heads with a block, and a Transformer; found "
                         f"n_future_heads={s.n_future_heads}, head={s.head}, trunk={s.trunk}")
    for name, usual in (("recurrence", 1), ("dropout", 0.0), ("optimizer", "adamw")):
        if s.trunk == "rnn" and getattr(s, name) != usual:
            raise ValueError(f"{name}={getattr(s, name)}: not with trunk=rnn")


def check_frozen(s: Settings) -> None:
    """While the trunk is frozen, some head must learn."""
    until = s.max_iters if s.freeze_trunk_iters < 0 else min(s.freeze_trunk_iters, s.max_iters)
    wanted = f"freeze_trunk_iters={s.freeze_trunk_iters}"
    own_heads = s.n_future_heads and s.head != "shared" and (s.nitp_weight or s.consistency_weight)
    if not (own_heads or s.spelling_weight or s.order_weight):
        raise ValueError(f"{wanted}: needs heads with parameters and a weight to learn meanwhile; found "
                         f"n_future_heads={s.n_future_heads}, head={s.head}, all weights 0 or without a head")
    if s.superposition > 1:
        raise ValueError(f"{wanted}: no head learns with superposition={s.superposition}")
    if s.curriculum != "none" and not (s.spelling_weight or s.order_weight):
        raise ValueError(f"{wanted}: heads have no loss at times with curriculum={s.curriculum}")
    if s.aux_start > 0.0 or until > s.aux_end * s.max_iters:
        raise ValueError(f"{wanted}: nothing would learn outside of aux_start={s.aux_start} to aux_end={s.aux_end}")


def shape_of(s: Settings) -> "ModelArgs":
    """The model's part of the settings. Errors: ValueError if they fit no model."""
    from model import ModelArgs  # late: torch
    from text.letters import alphabet_size

    same = {f.name: getattr(s, f.name) for f in fields(ModelArgs) if hasattr(s, f.name)}
    return ModelArgs(**same, alphabet_size=alphabet_size(s.spelling_case) if s.spelling_letters else 0)
