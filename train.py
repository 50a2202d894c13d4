"""Train a tiny Llama on next-token prediction, with or without objectives that look further ahead.

    python train.py config/quickstart.py                          # settings from a file
    python train.py config/stories260k_mtp.py --max_iters=50      # and from the command line
    python train.py config/stories260k_mtp.py --init_from=resume  # go on where out_dir stopped
    torchrun --standalone --nproc_per_node=2 train.py config/...  # several processes
    python train.py --help                                        # every setting

Writes out_dir/ckpt.pt (best by validation NTP loss), out_dir/last.pt (newest) and out_dir/log.jsonl
(one object a line; the same keys go to wandb). `export.py` turns a checkpoint into a file for run.c.

What this leaves out on purpose: model parallelism, data loading in worker processes (a batch costs
a thousandth of a step), and any loss (losses.py).
"""

import io
import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kernels
from configurator import (
    AtLeast0,
    AtLeast1,
    Fraction,
    FractionAbove0,
    FractionBelow1,
    NonNegative,
    Positive,
    Range,
    configure,
    help_text,
)
from export import load_weights, model_args_of, read_checkpoint
from files import atomic_write
from log import Log
from losses import Objective, all_losses, loss_weights, scales
from machine import Machine, StepPath, choose_path, find_machine, lost_a_process, note, out_of_memory
from model import FUTURE_HEADS, ModelArgs, Transformer
from optimizer import make_optimizer
from tinystories import TrainBatches, Windows, eval_batches
from tokenizer import BOS, BYTE_VOCAB_SIZE, MAX_VOCAB_SIZE, vocab_folder


@dataclass
class Settings:
    # where the run lives
    out_dir: str = "out"  # folder of ckpt.pt, last.pt and log.jsonl
    init_from: str = "scratch"  # scratch, resume (out_dir/last.pt), or the path of any llama2.c-style checkpoint
    eval_interval: AtLeast1 = 250  # iterations between evaluations; each saves last.pt
    eval_iters: AtLeast1 = 25  # validation batches of 32 rows an evaluation, the same ones in every run
    eval_only: bool = False  # evaluate once and stop; writes nothing
    log_interval: AtLeast1 = 1  # iterations between lines on the terminal and in log.jsonl
    # wandb
    wandb_log: bool = False  # send the log to wandb as well
    wandb_project: str = "lookahead"  # wandb project
    wandb_run_name: str = ""  # wandb run name; empty: the name of out_dir
    wandb_mode: Literal["online", "offline"] = "online"  # offline: keep it in ./wandb for `wandb sync`
    # data
    data_dir: str = "data"  # folder of all data sets
    dataset: str = "tinystories"  # reads data_dir/dataset/tok<vocab_size>/{train,val}.bin
    vocab_size: Annotated[int, Range(BYTE_VOCAB_SIZE, MAX_VOCAB_SIZE)] = 512  # tokens; 259 is the byte tokenizer
    max_seq_len: AtLeast1 = 512  # tokens in a row, and the longest context of the model
    batch_size: AtLeast1 = 16  # rows in a micro-batch of one process
    gradient_accumulation_steps: AtLeast1 = 1  # micro-batches an iteration
    # model
    dim: AtLeast1 = 64  # width of the residual stream
    n_layers: AtLeast1 = 5  # transformer blocks
    n_heads: AtLeast1 = 8  # query heads; dim must be an even multiple
    n_kv_heads: AtLeast1 = 4  # key/value heads; a divisor of n_heads
    hidden_dim: AtLeast0 = 0  # width of the feed-forward; 0: 2/3 of 4 dim, rounded up to multiple_of
    multiple_of: AtLeast1 = 4  # see hidden_dim
    norm_eps: Positive = 1e-5  # RMSNorm's epsilon; run.c uses 1e-5
    dropout: FractionBelow1 = 0.0  # share of activations dropped in training
    tie_embeddings: bool = True  # one matrix for the token embedding and the NTP head
    # looking ahead
    n_future_heads: AtLeast0 = 0  # head i predicts the token i further ahead than the next
    head: Literal[tuple(FUTURE_HEADS)] = "linear"  # type of the future heads
    nitp_weight: NonNegative = 0.0  # of the first head's cross-entropy loss
    consistency_weight: NonNegative = 0.0  # of the first head's KL from the NTP head that has seen more
    head_decay: FractionAbove0 = 1.0  # head i weighs head_decay^(i-1) of the above
    mask_document_ends: bool = False  # no target of a future head lies behind the next BOS
    aux_schedule: Literal["constant", "linear", "cosine"] = "constant"  # of these weights between aux_start and aux_end
    aux_start: FractionBelow1 = 0.0  # fraction of the run before which they are 0
    aux_end: Fraction = 1.0  # fraction of the run from which they are 0 (1: never)
    # optimisation
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the trunk's matrices, AdamW for the rest
    learning_rate: Positive = 5e-4  # peak of the learning rate
    max_iters: AtLeast1 = 100_000  # iterations of the whole run
    warmup_iters: AtLeast0 = 1000  # iterations in which the rate rises to its peak
    decay_lr: bool = True  # fall to min_lr in half a cosine by max_iters; false: stay at the peak
    min_lr: NonNegative = 0.0  # where the cosine ends
    weight_decay: NonNegative = 0.1  # on matrices only
    beta1: FractionBelow1 = 0.9  # AdamW's
    beta2: FractionBelow1 = 0.95  # AdamW's
    grad_clip: NonNegative = 1.0  # largest norm of the whole gradient; 0: no clipping
    # system
    seed: Annotated[int, Range(0, 2**32 - 1)] = 1337  # of initial weights, order of the data, dropout
    device: str = "auto"  # auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of products; auto: bfloat16 where it is fast
    path: Literal["auto", "plain", "fast"] = "auto"  # fast: kernels.c, for CPUs; plain: PyTorch; auto: the fastest
    compile: bool = False  # torch.compile the plain path


def check(s: Settings) -> None:
    """Refuse settings that contradict each other; ValueError names them."""
    shape_of(s)
    if (s.nitp_weight or s.consistency_weight) and not s.n_future_heads:
        name = "nitp_weight" if s.nitp_weight else "consistency_weight"
        raise ValueError(f"{name}={getattr(s, name)}: needs a future head, found n_future_heads=0")
    if s.n_future_heads >= s.max_seq_len:
        raise ValueError(f"n_future_heads={s.n_future_heads}: expected less than max_seq_len={s.max_seq_len}")
    if s.aux_start >= s.aux_end:
        raise ValueError(f"aux_start={s.aux_start}: expected less than aux_end={s.aux_end}")
    if s.min_lr > s.learning_rate:
        raise ValueError(f"min_lr={s.min_lr}: expected at most learning_rate={s.learning_rate}")
    if not s.out_dir:
        raise ValueError("out_dir: expected the name of a folder, found nothing")
    if s.eval_only and s.init_from == "scratch":
        raise ValueError("eval_only: nothing to evaluate with init_from=scratch; give resume or a checkpoint's path")


def shape_of(s: Settings) -> ModelArgs:
    return ModelArgs(**{f.name: getattr(s, f.name) for f in fields(ModelArgs)})


def make_objective(s: Settings, path: StepPath) -> Objective:
    """A new model with its losses, both of the kind that the path wants."""
    model = (kernels.KernelTransformer if path.fast else Transformer)(shape_of(s))
    return Objective(model, BOS if s.mask_document_ends else None, kernels if path.fast else None)


# ---------------------------------------------------------------------------------------------
# stopping

class Stop:
    """SIGINT and SIGTERM ask for a stop at the end of the step; a second one is not waited for."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.signal = number
        note("stopping after this step (again to stop at once)")

    def asked(self, machine: Machine) -> bool:
        """True in all processes as soon as it is in one; they must leave the loop together."""
        return self.signal > 0 if machine.world == 1 else machine.sum(torch.tensor(self.signal)).item() > 0


# ---------------------------------------------------------------------------------------------
# checkpoints

RESUMED = {"optimizer": dict, "scaler": dict, "iter_num": int, "best_val_ntp": float, "config": dict, "rng": list,
           "seconds": float, "tokens": int}  # what a checkpoint needs beside the model to be resumed
SHAPE = {f.name for f in fields(ModelArgs)} - {"dropout"}


def load_start(s: Settings) -> tuple[dict | None, Path]:
    """The checkpoint a run starts from and its path; None for init_from=scratch.

    A resumed run must have the checkpoint's shape; a run from another checkpoint takes its trunk's
    shape (not its heads) into `s`. Errors: ValueError.
    """
    last = Path(s.out_dir) / "last.pt"
    if s.init_from != "resume" and not s.eval_only and last.exists():
        raise ValueError(f"{last}: this out_dir holds a run; --init_from=resume continues it, "
                         "or choose another --out_dir, or delete it")
    if s.init_from == "scratch":
        return None, last
    path = last if s.init_from == "resume" else Path(s.init_from)
    checkpoint = read_checkpoint(path)
    if s.init_from == "resume":
        if missing := [k for k, kind in RESUMED.items() if not isinstance(checkpoint.get(k), kind)]:
            raise ValueError(f"{path}: cannot be resumed, it has no {', '.join(missing)}; "
                             f"--init_from={path} with another --out_dir starts a new run from it")
        if not 0 <= checkpoint["iter_num"] <= s.max_iters:
            raise ValueError(f"{path}: the run is at iteration {checkpoint['iter_num']}, max_iters={s.max_iters}")
        for f in fields(Settings):
            then, now = checkpoint["config"].get(f.name), getattr(s, f.name)
            if f.name in SHAPE and then != now:
                raise ValueError(f"{f.name}={now}: the run in {path} has {then}; a resumed run keeps its shape")
            if f.name in checkpoint["config"] and then != now and f.name not in ("init_from", "eval_only"):
                note(f"resuming with {f.name}={now}, was {then}")
    else:
        theirs, ours = model_args_of(checkpoint, path), shape_of(s)
        for name in sorted(SHAPE - {"n_future_heads", "head", "max_seq_len", "multiple_of"}):
            then, now = getattr(theirs, name), getattr(ours, name)
            setattr(s, name, then)
            if then != now:
                note(f"{name}={then}, from {path}")
    return checkpoint, path


def rng_states(machine: Machine) -> list[dict]:
    """Every process's random number generators, in the order of ranks."""
    state = {"cpu": torch.get_rng_state()}
    if machine.device.type != "cpu":
        state[machine.device.type] = torch.get_device_module(machine.device).get_rng_state()
    states = [state] * machine.world
    if machine.world > 1:
        dist.all_gather_object(states, state)
    return states


def restore_rng(states: list[dict], machine: Machine) -> None:
    if len(states) != machine.world:
        note(f"resuming with {machine.world} processes, was {len(states)}: dropout will differ")
    state = states[machine.rank % len(states)]
    torch.set_rng_state(state["cpu"])
    if machine.device.type != "cpu" and machine.device.type in state:
        torch.get_device_module(machine.device).set_rng_state(state[machine.device.type])


# ---------------------------------------------------------------------------------------------
# the parts of a step

def learning_rate(s: Settings, it: int) -> float:
    """Rate of iteration `it`: a straight rise to the peak, then half a cosine down to min_lr."""
    if it < s.warmup_iters:
        return s.learning_rate * (it + 1) / (s.warmup_iters + 1)
    if not s.decay_lr:
        return s.learning_rate
    done = (it - s.warmup_iters) / (s.max_iters - s.warmup_iters)
    return s.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (s.learning_rate - s.min_lr)


@torch.no_grad()
def evaluate(objective: Objective, batches: list, names: tuple[str, ...], machine: Machine, path: StepPath) -> dict:
    """{name: mean over all validation batches}, of the losses `names` and of acc_i; ranks share the work."""
    names_and_accuracy = (*names, *(f"acc_{i}" for i in range(objective.model.args.n_future_heads + 1)))
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in names_and_accuracy}  # of values, of positions
    objective.eval()
    mine = batches[machine.rank :: machine.world]
    for x, y in tqdm(mine, "validation", leave=False, disable=machine.rank > 0 or None):  # None: on terminals only
        with path.autocast():
            losses = objective.losses(*machine.put(x, y), names, accuracy=True)
        for name, loss in losses.items():
            count = loss.count.item()
            sums[name] += torch.tensor([loss.mean.item() * count, count])
    objective.train()
    totals = machine.sum(torch.stack(list(sums.values())))  # (losses, 2)
    return {name: value / max(count, 1.0) for name, (value, count) in zip(sums, totals.tolist(), strict=True)}


def check_finite(what: str, value: float | torch.Tensor, it: int, s: Settings) -> None:
    """Stop a run that diverged, before its weights replace better ones."""
    if not math.isfinite(value):
        raise ValueError(f"iter {it}: the {what} is {float(value)}; try a lower learning_rate or a grad_clip. "
                         f"What {s.out_dir} holds is from before")


def tokens_per_step(s: Settings, machine: Machine) -> int:
    """Tokens that all processes together train on in one iteration."""
    return s.batch_size * s.gradient_accumulation_steps * machine.world * s.max_seq_len


def announce(s: Settings, model: Transformer, train: Windows, machine: Machine, path: StepPath) -> None:
    """Say what follows from the settings."""
    counts = model.parameter_counts()
    per_step = tokens_per_step(s, machine)
    total = per_step * s.max_iters
    if s.n_future_heads and not (s.nitp_weight or s.consistency_weight):
        note(f"n_future_heads={s.n_future_heads}: no loss has a weight, so the heads stay as they start")
    if s.warmup_iters >= s.max_iters:
        note(f"warmup_iters={s.warmup_iters}: the run ends before the learning rate is at its peak")
    print(f"parameters: {counts['trunk']:,} in trunk and NTP head, "
          f"{counts['future heads']:,} in {s.n_future_heads} future heads\n"
          f"tokens: {per_step:,} a step, {total:,} in {s.max_iters:,} steps: "
          f"{total / (len(train) * s.max_seq_len):.2f} epochs of {len(train):,} rows in {train.path}\n"
          f"machine: {machine.world} x {machine.device}, {torch.get_num_threads()} threads; path: {path}", flush=True)


def show(line: dict, s: Settings, machine: Machine) -> str:
    """A line of the log for the terminal: losses, rate, speed, time left."""
    step_seconds = tokens_per_step(s, machine) / line["tok_per_s"]
    minutes, seconds = divmod(round((s.max_iters - line["iter"]) * step_seconds), 60)
    losses = "  ".join(f"{k.removeprefix('train/')} {v:.4f}" for k, v in line.items() if k.startswith("train/"))
    return (f"iter {line['iter']}/{s.max_iters} | {losses} | lr {line['lr']:.2e} | {step_seconds * 1000:.0f} ms | "
            f"{line['tok_per_s']:,.0f} tok/s | {minutes}:{seconds:02d} left")


def wandb_settings(s: Settings, run_id: str | None) -> dict | None:
    """What wandb.init is told; None where the run is not for wandb."""
    if not s.wandb_log:
        return None
    return {"project": s.wandb_project, "name": s.wandb_run_name or Path(s.out_dir).name, "mode": s.wandb_mode,
            "config": asdict(s), "id": run_id, "resume": "allow"}


# ---------------------------------------------------------------------------------------------
# one run

def train(s: Settings) -> int:
    """Run from settings to the last checkpoint; returns the exit code: 0, or 128 + the signal that stopped it."""
    check(s)
    checkpoint, source = load_start(s)
    machine = find_machine(s.device)
    first, accumulate = machine.rank == 0, s.gradient_accumulation_steps
    folder = vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size)
    train_rows, val_rows = (Windows(folder / f"{split}.bin", s.vocab_size, s.max_seq_len) for split in ("train", "val"))
    batches = TrainBatches(train_rows, s.batch_size, s.seed, machine.rank, machine.world)
    val_batches = eval_batches(val_rows, s.eval_iters)

    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    path = choose_path(s, machine.device)
    objective = raw = make_objective(s, path)
    model = raw.model
    if checkpoint and (fresh := load_weights(model, checkpoint["model"], source)):
        note(f"{source}: has no {', '.join(fresh)}: random at the start")
    model.to(machine.device)
    torch.manual_seed(s.seed + 1 + machine.rank)  # dropout: a stream of its own, whatever the weights drew
    if path.kind == "compiled":
        objective = torch.compile(objective)
    if machine.world > 1:  # heads whose losses weigh 0 at a step get no gradient there
        objective = DistributedDataParallel(objective, find_unused_parameters=s.n_future_heads > 0)
    optimizer = make_optimizer(s, model)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=path.dtype == torch.float16)

    start, best, seconds, tokens, wandb_id = 0, math.inf, 0.0, 0, None
    if s.init_from == "resume":
        fresh_groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:  # empty unless the run was float16
                scaler.load_state_dict(checkpoint["scaler"])
            restore_rng(checkpoint["rng"], machine)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{source}: its optimizer or random state does not fit this run: {error!r}") from error
        for group, fresh_group in zip(optimizer.param_groups, fresh_groups, strict=True):
            group.update(fresh_group)  # weight_decay and betas are this run's, not the checkpoint's
        start, best, seconds, tokens = (checkpoint[k] for k in ("iter_num", "best_val_ntp", "seconds", "tokens"))
        wandb_id = checkpoint.get("wandb_id")
    del checkpoint
    if first:
        announce(s, model, train_rows, machine, path)
    if s.eval_only:
        val = evaluate(raw, val_batches, all_losses(s.n_future_heads), machine, path)
        if first:
            print("\n".join(f"val/{name} {value:.6f}" for name, value in val.items()))
        return 0
    log = Log(Path(s.out_dir), start, wandb_settings(s, wandb_id)) if first else None

    def save(*names: str) -> None:
        rng = rng_states(machine)
        if not first:
            return
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                   "model_args": model.args.as_dict(), "iter_num": it, "best_val_ntp": best, "config": asdict(s),
                   "rng": rng, "seconds": seconds, "tokens": tokens, "wandb_id": log.wandb_id or wandb_id}
        buffer = io.BytesIO()  # torch.save straight to a full disk would not say that the disk is full
        torch.save(content, buffer)
        for name in names:
            with atomic_write(Path(s.out_dir) / name) as f:
                f.write(buffer.getbuffer())

    stop, last_shown = Stop(), (tokens, seconds)
    for it in range(start, s.max_iters + 1):
        line: dict = {"iter": it, "tokens": tokens, "seconds": seconds}
        evaluates = it % s.eval_interval == 0 or it == s.max_iters
        if evaluates:
            val = evaluate(raw, val_batches, all_losses(s.n_future_heads), machine, path)
            line |= {f"val/{name}": value for name, value in val.items()}
            if first:
                print(f"iter {it}/{s.max_iters} | val", *(f" {k} {v:.4f}" for k, v in val.items()), flush=True)
            check_finite("validation loss", val["ntp"], it, s)
            better, best = val["ntp"] < best, min(best, val["ntp"])
            save(*(["ckpt.pt"] if better else []), "last.pt")
        if it == s.max_iters:
            if first:
                log.write(line)
            break
        if stop.asked(machine):
            largest = torch.stack([p.detach().abs().max() for p in model.parameters()]).max()
            check_finite("largest weight", largest, it, s)
            save("last.pt")
            break

        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, it)
        weights = loss_weights(s, it / s.max_iters)
        micro = [machine.put(*batches[it * accumulate + m]) for m in range(accumulate)]
        micro_counts = [raw.counts(y, tuple(weights)) for _, y in micro]
        counts = {name: machine.sum(sum(c[name] for c in micro_counts)) for name in weights}  # of the whole iteration
        means = dict.fromkeys(weights, 0.0)
        for m, (x, y) in enumerate(micro):
            with nullcontext() if machine.world == 1 or m == accumulate - 1 else objective.no_sync():
                with path.autocast():
                    total, losses = objective(x, y, scales(weights, counts))
                # DDP averages gradients over processes; positions are counted over all of them
                scaler.scale(total * machine.world).backward()
            for name, loss in losses.items():
                means[name] += loss.mean * (loss.count / counts[name].clamp(min=1))
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        tokens += tokens_per_step(s, machine)

        due = evaluates or it % s.log_interval == 0
        if due or (it + 1) % s.eval_interval == 0 or it + 1 == s.max_iters:
            machine.synchronize()
        seconds += time.perf_counter() - began
        if due:
            means = {name: machine.sum(mean).item() for name, mean in means.items()}
            means["total"] = sum(weights[name] * mean for name, mean in means.items())
            norm = grad_norm.item()  # not finite where float16 overflows, and the scaler skips the step
            line |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm if math.isfinite(norm) else None,
                     "tok_per_s": (tokens - last_shown[0]) / (seconds - last_shown[1])}
            line |= {f"train/{name}": mean for name, mean in means.items()}
            line |= {f"weight/{name}": weights.get(name, 0.0) for name in all_losses(s.n_future_heads)[1:]}
            last_shown = tokens, seconds
            check_finite("training loss", means["total"], it, s)
            if first:
                log.write(line)
                print(show(line, s, machine), flush=True)
    if first:
        log.close()
        if stop.signal and it < s.max_iters:
            note(f"stopped at iter {it}, saved {s.out_dir}/last.pt; --init_from=resume continues")
    return 128 + stop.signal if stop.signal and it < s.max_iters else 0


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(help_text(Settings, __doc__))
        return 0
    try:
        s = configure(Settings, argv)
        return train(s)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        what = (str(error).splitlines() or [""])[0][:300]
        if lost_a_process(error):
            print(f"train.py: rank {dist.get_rank()}: another process is gone ({what}). "
                  f"{s.out_dir}/last.pt is from the last evaluation; --init_from=resume continues it", file=sys.stderr)
        elif out_of_memory(error):
            print(f"train.py: out of memory ({what}); try a smaller batch_size and more gradient_accumulation_steps",
                  file=sys.stderr)
        else:
            raise
        return 1
    except KeyboardInterrupt:  # before the loop, where there is nothing to save
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
