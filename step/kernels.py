"""kernels.c in PyTorch: a training step several times faster on a CPU, with the same parameters and mathematics.

    model = KernelTransformer(args)                 # in place of Transformer
    objective = Objective(model, kernels=kernels)   # this module, whose per_position_losses runs the losses in C
    with torch.autocast("cpu", torch.bfloat16): ... # or without, in float32

kernels.c is compiled once, by the C compiler that also builds run.c, and kept in build/ (`library`).

What this leaves out on purpose: float16 and devices that are not CPUs; those take model.Transformer.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from model import RMSNorm, Transformer, TransformerBlock
from step.chunks import PLAIN_KL, Head, chunk_rows, rows_of, that_may_learn
from step.chunks import per_position_losses as in_pytorch
from system.files import read_bytes
from system.shown import shown

SOURCE = Path(__file__).with_name("kernels.c")
BUILD = SOURCE.parent.parent / "build"
TEMPORARY = ".kernels-"  # begins the names of folders to compile in
FLAGS = ["-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC"]
# In order of preference. OpenMP is the one that PyTorch has loaded, so both share their threads.
MACHINE_FLAGS = (["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"], ["-mcpu=native"], [])
SIGNATURES = {  # p: pointer, i: int64, f: float, d: double
    "attention_forward": "pppppiiiiiiid", "attention_backward": "pppppppiiiiiiid", "norm_forward": "pppppiifi",
    "norm_backward": "pppppppiifi", "swiglu_forward": "ppiii", "swiglu_backward": "pppiii", "drop": "ppiiiid",
    "head_losses": "ppppppp" "f" "pppp" "iiii", "clip": "ppidp", "adamw": "ppppppi" "ddddd"}
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels.c, built on first use (5 s) unless build/ has it for this source, compiler and processor.

    CC names the compiler (default cc). The attribute `threads` of the result is False if the compiler has no
    OpenMP. Errors: ValueError if there is no compiler, it fails, or its library cannot be loaded.
    """
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")
    except ValueError as error:
        raise ValueError(f"CC={os.environ['CC']}: {error}") from error
    for flags in MACHINE_FLAGS:
        # the compiler's own macros tell its version and the processor's instructions
        macros = _run([*compiler, *FLAGS, *flags, "-dM", "-E", str(SOURCE)])
        if macros.returncode == 0:
            break
    key = _digest(repr((macros.stdout, SOURCE.read_bytes(), FLAGS, flags)).encode())
    built = _find(key) or _build([*compiler, *FLAGS, *flags], key)
    return _load(built, "-fopenmp" in flags)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _find(key: str) -> Path | None:
    """The library in build/, if its content is what its name says: loading one that was cut short is a SIGBUS."""
    for path in BUILD.glob(f"kernels-{key}-*.so"):
        with suppress(OSError, ValueError):
            if path.name == f"kernels-{key}-{_digest(read_bytes(path))}.so":
                return path
            path.unlink()  # cut short or changed on the disk
    return None


def _build(command: list[str], key: str) -> Path:
    """Compile kernels.c into build/, or into a folder of this process where that cannot be written."""
    try:
        BUILD.mkdir(exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=BUILD, prefix=TEMPORARY)
    except OSError:  # the project is another user's
        try:
            folder = tempfile.TemporaryDirectory(prefix=TEMPORARY)
        except OSError as error:
            raise ValueError(f"no folder to compile {SOURCE.name} in: {error.strerror}; set TMPDIR") from error
        atexit.register(folder.cleanup)
        return _compile(command, Path(folder.name) / "kernels.so")
    for left in BUILD.glob(f"{TEMPORARY}*"):  # by processes that were killed as they compiled
        if time.time() - left.stat().st_mtime > 600:
            shutil.rmtree(left, ignore_errors=True)
    with folder:
        fresh = _compile(command, Path(folder.name) / "kernels.so")
        path = BUILD / f"kernels-{key}-{_digest(fresh.read_bytes())}.so"
        os.replace(fresh, path)  # in one step: other processes may build it too
        return path


def _compile(command: list[str], to: Path) -> Path:
    done = _run([*command, "-o", str(to), str(SOURCE), "-lm"])
    if done.returncode or not to.exists():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, and no library"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise ValueError(f"{command[0]} could not compile {SOURCE.name}: {shown(reason, 300)}")
    return to


def _load(path: Path, threads: bool) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
        for name, signature in SIGNATURES.items():
            getattr(loaded, name).argtypes = [TYPES[letter] for letter in signature]
        loaded.keep_freed_memory()
    except (OSError, AttributeError) as error:  # AttributeError: a compiler that leaves functions out
        raise ValueError(f"{path}: cannot be loaded: {shown(error)}") from error
    loaded.threads = threads
    return loaded


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise ValueError(f"no C compiler: {command[0]}: {error.strerror}") from error


def _call(name: str, *args: Tensor | ctypes.Array | int | float | None) -> None:
    """Call a function of kernels.c. Tensors must be contiguous; None is NULL. Errors: MemoryError, IndexError."""
    values = list(args)
    for k, arg in enumerate(args):
        if isinstance(arg, Tensor):
            assert arg.is_contiguous() and arg.is_cpu, f"{name}: {arg.shape}, {arg.device}"
            values[k] = arg.data_ptr()
    failure = getattr(library(), name)(*values)
    if failure == -2:
        raise IndexError(f"kernels.c: {name}: a class is outside of the vocabulary")
    if failure:
        raise MemoryError(f"kernels.c: {name}: out of memory")


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    assert all(t.dtype == torch.float32 and t.is_contiguous() and t.is_cpu for t in tensors)
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _sizes(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_int64 * len(tensors))(*[t.numel() for t in tensors])


def _is_bf16(x: Tensor) -> int:
    assert x.dtype in (torch.float32, torch.bfloat16), x.dtype
    return int(x.dtype == torch.bfloat16)


def _activation_dtype() -> torch.dtype:
    """What goes into matrix products: autocast's type, or float32 without it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


# ---------------------------------------------------------------------------------------------
# the trunk

class Shape(NamedTuple):
    """The sizes of attention, and what is dropped in a block."""

    n_heads: int
    n_kv_heads: int
    dropout: float = 0.0  # the share of numbers that are set to 0
    seeds: tuple[int, ...] = (0, 0, 0)  # say which: of attention's probabilities, of its output, of the feed-forward's


def attention(qkv: Tensor, cos: Tensor, sin: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """qkv: (B, T, (n_heads + 2 n_kv_heads) hd), not rotated; cos, sin: (T, hd / 2) -> y: (B, T, n_heads hd), log_sum.

    log_sum: (B, n_heads, T), for attention_backward.
    """
    B, T, width = qkv.shape
    hd = width // (shape.n_heads + 2 * shape.n_kv_heads)
    y, log_sum = qkv.new_empty(B, T, shape.n_heads * hd), torch.empty(B, shape.n_heads, T)
    _call("attention_forward", qkv, cos, sin, y, log_sum, B, T, shape.n_heads, shape.n_kv_heads, hd, _is_bf16(qkv),
          shape.seeds[0], shape.dropout)
    return y, log_sum


def attention_backward(qkv: Tensor, cos: Tensor, sin: Tensor, y: Tensor, log_sum: Tensor, dy: Tensor, shape: Shape
                       ) -> Tensor:
    """dqkv."""
    (B, T, width), dqkv = qkv.shape, torch.empty_like(qkv)
    hd = width // (shape.n_heads + 2 * shape.n_kv_heads)
    _call("attention_backward", qkv, cos, sin, y, log_sum, dy, dqkv, B, T, shape.n_heads, shape.n_kv_heads, hd,
          _is_bf16(qkv), shape.seeds[0], shape.dropout)
    return dqkv


def norm(h: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h: (..., D) float32, branch: (..., D) of `dtype` or None -> their sum, float32, and its RMSNorm, of `dtype`."""
    total, out = h if branch is None else torch.empty_like(h), torch.empty_like(h, dtype=dtype)
    _call("norm_forward", h, branch, weight, None if branch is None else total, out, h.numel() // len(weight),
          len(weight), eps, _is_bf16(out))
    return total, out


def norm_backward(total: Tensor, weight: Tensor, eps: float, dout: Tensor, dtotal: Tensor | None, branch: bool
                  ) -> tuple[Tensor, Tensor | None, Tensor]:
    """dh, dh rounded for the branch if there is one, dweight. dtotal: what total is asked for besides."""
    dh, dweight = torch.empty_like(total), torch.empty_like(weight)
    dbranch = torch.empty_like(dout) if branch else None
    _call("norm_backward", total, weight, dout, dtotal, dh, dbranch, dweight, total.numel() // len(weight), len(weight),
          eps, _is_bf16(dout))
    return dh, dbranch, dweight


def add(h: Tensor, branch: Tensor) -> Tensor:
    """h, float32, + branch, an activation."""
    total = torch.empty_like(h)
    _call("norm_forward", h, branch, None, total, None, h.numel() // h.shape[-1], h.shape[-1], 0.0, _is_bf16(branch))
    return total


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up: (..., 2 D), two halves -> silu(gate) * up: (..., D)."""
    D = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], D)
    _call("swiglu_forward", gate_up, out, out.numel() // D, D, _is_bf16(gate_up))
    return out


def swiglu_backward(gate_up: Tensor, dout: Tensor) -> Tensor:
    """dgate_up."""
    D, dgate_up = dout.shape[-1], torch.empty_like(gate_up)
    _call("swiglu_backward", gate_up, dout, dgate_up, dout.numel() // D, D, _is_bf16(gate_up))
    return dgate_up


def drop(x: Tensor, dropout: float, seed: int) -> Tensor:
    """x: (..., D), an activation, after dropout; by the same seed its gradient. x itself where nothing is dropped."""
    if not dropout:
        return x
    out = torch.empty_like(x)
    _call("drop", x, out, x.numel() // x.shape[-1], x.shape[-1], _is_bf16(x), seed, dropout)
    return out


class Norm(Function):
    """RMSNorm of h: (..., D) float32 -> (..., D) of `dtype`."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        h, ctx.eps = h.contiguous(), eps
        ctx.save_for_backward(h, weight)
        return norm(h, None, weight, eps, dtype)[1]

    @staticmethod
    def backward(ctx, dout: Tensor):
        h, weight = ctx.saved_tensors
        dh, _, dweight = norm_backward(h, weight, ctx.eps, dout.contiguous(), None, False)
        return dh, dweight, None, None


class Block(Function):
    """A transformer block as one node, so that nothing is summed, rounded or looked up between its kernels.

        x ─ norm ─ a ─ wqkv ─ qkv ─ attention ─ y ─ wo ─┐
        └───────────────────────────────────────────── h = x + ─ norm ─ f ─ w13 ─ gate_up ─ swiglu ─ s ─ w2 ─┐
                                                       └───────────────────────────────────────────────── h + ─ out

    x, h and out are float32 (B, T, D), all else is of `dtype`, as matrix products are to be. dropout: of
    attention's probabilities and of what both branches add; torch's generator says which.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, shape: Shape, eps: float, dtype: torch.dtype, norm_1: Tensor,
                wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, norm_2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor
                ) -> Tensor:
        x = x.contiguous()
        wqkv, w13, wo, w2 = torch.cat((wq, wk, wv)).to(dtype), torch.cat((w1, w3)).to(dtype), wo.to(dtype), w2.to(dtype)
        _, a = norm(x, None, norm_1, eps, dtype)
        qkv = F.linear(a, wqkv)
        y, log_sum = attention(qkv, cos, sin, shape)
        branch = drop(F.linear(y, wo), shape.dropout, shape.seeds[1])
        h, f = norm(x, branch, norm_2, eps, dtype)
        gate_up = F.linear(f, w13)
        s = swiglu(gate_up)
        branch = drop(F.linear(s, w2), shape.dropout, shape.seeds[2])
        ctx.shape, ctx.eps, ctx.rows = shape, eps, [len(wq), len(wk), len(wv)]
        ctx.save_for_backward(x, cos, sin, norm_1, a, wqkv, qkv, y, log_sum, wo, norm_2, h, f, w13, gate_up, s, w2)
        return add(h, branch)

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, cos, sin, norm_1, a, wqkv, qkv, y, log_sum, wo, norm_2, h, f, w13, gate_up, s, w2 = ctx.saved_tensors
        learns, shape, dout = ctx.needs_input_grad[6:], ctx.shape, dout.contiguous()

        def of_weights(wanted: tuple[bool, ...], dy: Tensor, x: Tensor, sizes: list[int]) -> tuple[Tensor | None, ...]:
            """The gradients of matrices that are rows of one, split by their numbers of rows."""
            if not any(wanted):
                return (None,) * len(sizes)
            return (dy.flatten(0, -2).T @ x.flatten(0, -2)).float().split(sizes)

        branch = drop(dout.to(s.dtype), shape.dropout, shape.seeds[2])
        dw2 = of_weights(learns[8:], branch, s, [len(w2)])
        dgate_up = swiglu_backward(gate_up, branch @ w2)
        dw13 = of_weights(learns[6:8], dgate_up, f, [len(w13) // 2] * 2)
        dh, branch, dnorm_2 = norm_backward(h, norm_2, ctx.eps, dgate_up @ w13, dout, True)
        branch = drop(branch, shape.dropout, shape.seeds[1])
        dwo = of_weights(learns[4:5], branch, y, [len(wo)])
        dqkv = attention_backward(qkv, cos, sin, y, log_sum, branch @ wo, shape)
        dwqkv = of_weights(learns[1:4], dqkv, a, ctx.rows)
        dx, _, dnorm_1 = norm_backward(x, norm_1, ctx.eps, dqkv @ wqkv, dh, False)
        return dx, None, None, None, None, None, dnorm_1, *dwqkv, *dwo, dnorm_2, *dw13, *dw2


class KernelNorm(RMSNorm):
    """model.RMSNorm, of the type that matrix products want."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return Norm.apply(x, self.weight if weight is None else weight, self.eps, _activation_dtype())


class KernelBlock(TransformerBlock):
    """model.TransformerBlock by way of Block."""

    Norm = KernelNorm

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, f = self.attention, self.feed_forward
        dropout = a.dropout if self.training else 0.0
        seeds = torch.randint(2**62, (3,)).tolist() if dropout else (0, 0, 0)
        shape = Shape(a.n_heads, a.n_kv_heads, dropout, tuple(seeds))
        return Block.apply(x, cos, sin, shape, self.ffn_norm.eps, _activation_dtype(), self.attention_norm.weight,
                           a.wq.weight, a.wk.weight, a.wv.weight, a.wo.weight, self.ffn_norm.weight, f.w1.weight,
                           f.w3.weight, f.w2.weight)


class KernelTransformer(Transformer):
    """model.Transformer on the CPU by way of kernels.c. Errors: ValueError where it cannot be."""

    Block = KernelBlock

    def __init__(self, args):
        library()  # an error now, not in the first step
        super().__init__(args)


# ---------------------------------------------------------------------------------------------
# the losses

def head_losses(logits: Tensor, classes: Tensor, scales: Tensor, gradient: Tensor | None,
                teacher: tuple[Tensor, Tensor] | None, taught: Tensor | None, teacher_scale: float,
                results: tuple[Tensor | None, ...]):
    """Fills `results` for each row of logits (N, V).

    They are its cross-entropy with each of its `classes` (N, K), its divergence from the teacher, log(sum(exp(row))),
    each (N,), and the class of the largest logit, (N,) float32 or None if nobody asks.
    classes: int64; scales: (N, K) float32; teacher: logits (N, V) and their log-sums (N,); taught: (N,) bool,
    the divergence is 0 elsewhere. gradient (N, V), which may be the logits, becomes that of the sum of
    scales * cross-entropies + teacher_scale * KL(softmax(teacher) || softmax(row)).
    Errors: IndexError for a class outside of the vocabulary.
    """
    assert classes.dtype == torch.int64 and classes.shape == scales.shape, (classes.dtype, classes.shape, scales.shape)
    teacher_logits, teacher_log_sum = teacher or (None, None)
    _call("head_losses", logits, classes, scales, taught, gradient, teacher_logits, teacher_log_sum, teacher_scale,
          *results, *logits.shape, classes.shape[1], _is_bf16(logits))


class Packed(NamedTuple):
    """The targets of a head as head_losses takes them, by row."""

    shift: int  # as chunks.Head has it
    classes: Tensor  # (N, K), those of all its cross-entropies side by side
    weights: Tensor  # (N, K), what each adds to the total
    taught: Tensor | None  # (N,) bool, where the divergence from the first head counts
    teacher_weight: float  # what it adds to the total
    matrix: int  # which of HeadLosses' weights is the head's: several may read one


class HeadLosses(Function):
    """The losses of all heads in one pass over the targets.

    Head i at t and the NTP head at t+i have the same target. So a chunk of targets u has one row of each
    head's logits, from the features at u - i, and one teacher for all, the NTP logits: each head's are
    formed once, whatever losses they have, and their gradients, weighted, are ready when the chunk is done.

    tensors: features (N, D) of each head, then the weights (V, D), each once. Returns the total,
    which has gradients, and of each head cross-entropies (N, K), divergence (N,) and best class (N,) or None.
    """

    @staticmethod
    def forward(ctx, heads: list[Packed], rows: int, guess: bool, *tensors):
        features, weights, wanted = tensors[: len(heads)], tensors[len(heads) :], ctx.needs_input_grad[3:]
        learns = [wanted[k] or wanted[len(heads) + head.matrix] for k, head in enumerate(heads)]
        learnt = {head.matrix for k, head in enumerate(heads) if learns[k]}
        N = len(features[0])
        rounded = [w.to(features[0].dtype) for w in weights]
        to_features = [torch.zeros_like(f) if learns[k] else None for k, f in enumerate(features)]
        to_weights = [torch.zeros_like(w) if j in learnt else None for j, w in enumerate(weights)]
        # One place for each head's logits and gradient in turn; where the NTP head teaches, its logits have their own.
        teaches = any(head.taught is not None for head in heads)
        places = rounded[0].new_empty(1 + teaches, min(rows, N) * max(map(len, weights)))
        entropies = [torch.zeros(head.classes.shape) for head in heads]
        divergences, log_sums, bests = ([torch.zeros(len(f)) for f in features] for _ in range(3))
        for start in range(0, N, rows):
            for k, head in enumerate(heads):
                inputs, part = rows_of(head.shift, start, min(start + rows, len(features[k])))
                if part.start == part.stop:
                    continue
                weight, to_weight = rounded[head.matrix], to_weights[head.matrix]
                V, first, last = len(weight), part.start - start, part.stop - start
                gradient = places[0, : (last - first) * V].view(-1, V)
                logits = places[-1, : last * V].view(-1, V) if k == 0 else gradient
                torch.mm(features[k][inputs], weight.T, out=logits)
                teacher, taught = None, None
                if head.taught is not None:
                    teacher = places[-1, first * V : last * V].view(-1, V), log_sums[0][part]
                    taught = head.taught[part]
                best = bests[k][part] if guess else None
                head_losses(logits, head.classes[part], head.weights[part], gradient if learns[k] else None, teacher,
                            taught, head.teacher_weight,
                            (entropies[k][part], divergences[k][part], log_sums[k][part], best))
                if learns[k]:
                    torch.mm(gradient, weight, out=to_features[k][inputs])
                    if to_weight.dtype == gradient.dtype:
                        to_weight.addmm_(gradient.T, features[k][inputs])
                    else:
                        to_weight += gradient.T @ features[k][inputs]
        ctx.save_for_backward(*to_features, *to_weights)
        total = torch.zeros(())
        for head, entropy, divergence in zip(heads, entropies, divergences, strict=True):
            total += torch.where(head.weights > 0.0, head.weights * entropy, 0.0).sum()
            if head.taught is not None:
                total += head.teacher_weight * divergence.sum()
        found = [t for k in range(len(heads)) for t in (entropies[k], divergences[k], bests[k] if guess else None)]
        ctx.mark_non_differentiable(*(t for t in found if t is not None))
        return total, *found

    @staticmethod
    def backward(ctx, gradient, *_):
        # in place: backward runs once
        return None, None, None, *(t if t is None else t.mul_(gradient) for t in ctx.saved_tensors)


def pack(head: Head, in_c: set[str], position_weights: dict[str, float], matrices: list[int]) -> Packed:
    """A head's targets for C; in_c: those of its divergences that C computes; matrices: ids of the weights."""
    N = head.readout.features.shape[:2].numel()
    classes, weights = [torch.zeros(N, 0, dtype=torch.long)], [torch.zeros(N, 0)]
    for name, target in head.targets.items():
        if target.classes is not None:
            shares = torch.ones(1) if target.shares is None else target.shares
            classes.append(target.classes)
            weights.append(position_weights.get(name, 0.0) * target.valid[:, None] * shares)
    taught = [name for name in head.targets if name in in_c]  # consistency and kl: one mask, one divergence
    return Packed(head.shift, torch.cat(classes, 1), torch.cat(weights, 1),
                  head.targets[taught[0]].valid if taught else None,
                  sum(position_weights.get(name, 0.0) for name in taught), matrices.index(id(head.readout.weight)))


def unpack(head: Head, in_c: set[str], entropy: Tensor, divergence: Tensor) -> dict[str, Tensor]:
    """{loss: (N,)} of a head, from what HeadLosses returns of it."""
    losses, column = {}, 0
    for name, target in head.targets.items():
        if target.classes is not None:
            each = entropy[:, column : column + target.classes.shape[1]]
            losses[name] = (each if target.shares is None else each * target.shares).sum(1)
            column += target.classes.shape[1]
        elif name in in_c:
            losses[name] = divergence
    return losses


def per_position_losses(heads: list[Head], rows: int, position_weights: dict[str, Tensor], guess: bool = False
                        ) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """chunks.per_position_losses in C.

    Of divergences C computes the usual one, KL from the NTP head without a temperature; any other is PyTorch's.
    Autocast is off: features already have the type of the products.
    """
    weights = {name: float(weight) for name, weight in position_weights.items()}
    divergences = {name: target.divergence for head in heads for name, target in head.targets.items()
                   if target.classes is None}
    in_c = {name for name, kind in divergences.items() if kind == PLAIN_KL}
    features = [head.readout.features.flatten(0, 1) for head in heads]
    N = len(features[0])
    matrices = {id(head.readout.weight): head.readout.weight for head in heads}
    packed = [pack(head, in_c, weights, list(matrices)) for head in heads]
    with torch.autocast("cpu", enabled=False):
        total, *results = HeadLosses.apply(packed, rows, guess, *that_may_learn([*features, *matrices.values()]))
    losses = {}
    for k, head in enumerate(heads):
        losses |= unpack(head, in_c, *results[3 * k : 3 * k + 2])
    others = divergences.keys() - in_c
    if others:
        rest = [head._replace(targets={name: t for name, t in head.targets.items() if name in others})
                for head in heads]
        rest = [heads[0]._replace(targets={}), *(head for head in rest[1:] if head.targets)]
        more, of_rest, _ = in_pytorch(rest, chunk_rows(N, len(heads[0].readout.weight)), weights)
        total, losses = total + more, losses | of_rest
    return total, losses, [None if best is None else best.long() for best in results[2::3]]


# ---------------------------------------------------------------------------------------------
# the update

def clip_gradients(parameters: list[Tensor], most: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ of float32 parameters: the norm of all gradients, before it is at most `most`."""
    gradients, norm = [], torch.empty(())
    for p in parameters:
        if p.grad is not None:
            p.grad = p.grad.contiguous()
            gradients.append(p.grad)
    _call("clip", _pointers(gradients), _sizes(gradients), len(gradients), most, norm)
    return norm


def adamw(parameters: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: list[Tensor], *, lr: float,
          betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One step of torch.optim.AdamW, in place; steps: how many there were, by parameter, which are counted here."""
    gradients = [p.grad.contiguous() for p in parameters]
    _call("adamw", *map(_pointers, (parameters, gradients, means, squares, steps)), _sizes(parameters), len(parameters),
          lr, *betas, eps, weight_decay)
