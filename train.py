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
import zlib
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import configure, help_text
from formats.checkpoint import has_another_vocabulary, load_weights, model_args_of, read_checkpoint
from losses import Objective, all_losses, loss_weights, scales
from model import ModelArgs, Transformer
from settings import Settings, check, shape_of
from step import kernels
from step.machine import Machine, StepPath, choose_path, find_machine, lost_a_process, note, out_of_memory
from step.optimizer import make_optimizer
from study.log import Log
from synthetic import Answers
from system.files import atomic_write
from text.letters import Letters, token_texts
from text.tokenizer import BOS, BYTE_VOCAB_SIZE, load_tokenizer, vocab_folder
from tinystories import TrainBatches, Windows, eval_batches, eval_windows


def make_objective(s: Settings, path: StepPath, texts: list[bytes] | None = None) -> Objective:
    """A new model with its losses, both of the kind that the path wants. texts: of the tokens, for spelling."""
    model = (kernels.KernelTransformer if path.fast else Transformer)(shape_of(s))
    if s.spelling_letters and texts is None:
        raise ValueError(f"spelling_letters={s.spelling_letters}: dataset={s.dataset} has no tokenizer.model, "
                         "so no letters")
    return Objective(model, BOS if s.mask_document_ends else None, kernels if path.fast else None,
                     consistency=(s.consistency_direction, s.consistency_temperature), teacher=s.consistency_teacher,
                     letters=(Letters(texts, s.spelling_case), s.spelling_letters) if s.spelling_letters else None,
                     order_window=s.order_window, bag=s.superposition,
                     neighbours=(s.soft_neighbours, s.soft_temperature) if s.soft_weight else None)


def losses_of(s: Settings) -> tuple[str, ...]:
    """The losses that a run with these settings has a use for, as evaluations report them."""
    return all_losses(s.n_future_heads, s.spelling_letters, s.order_window > 0, s.soft_weight > 0.0)


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
OF_HEADS = {"n_future_heads", "head", "spelling_letters", "spelling_case", "order_window"}
OF_TRAINING = {"dropout", "aux_grad_scale", "aux_grad_power"}  # in ModelArgs, but no part of a shape
SHAPE = {f.name for f in fields(ModelArgs)} - OF_TRAINING - {"alphabet_size"} | OF_HEADS


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
            then, now = checkpoint["config"].get(f.name, f.default), getattr(s, f.name)
            if f.name in SHAPE and then != now:
                raise ValueError(f"{f.name}={now}: the run in {path} has {then}; a resumed run keeps its shape")
            if f.name in checkpoint["config"] and then != now and f.name not in ("init_from", "eval_only"):
                note(f"resuming with {f.name}={now}, was {then}")
    else:
        theirs, ours = model_args_of(checkpoint, path), shape_of(s)
        drop_other_heads(checkpoint, theirs.head, s)
        kept = {"recurrence", "prelude_layers", "coda_layers"} if s.recurrence > 1 else set()
        for name in sorted(SHAPE - OF_HEADS - kept - {"max_seq_len", "multiple_of"}):
            then, now = getattr(theirs, name), getattr(ours, name)
            setattr(s, name, then)
            if then != now:
                note(f"{name}={then}, from {path}")
        folder = vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size)
        if has_another_vocabulary(path, checkpoint, s.vocab_size, folder):
            note(f"{path}: its {s.vocab_size} tokens are not those of {folder}: what it has learnt of them is lost")
    return checkpoint, path


def drop_other_heads(checkpoint: dict, head: str, s: Settings) -> None:
    """Leave out of a checkpoint's model heads of another kind, though their tensors may have the same names."""
    config = checkpoint["config"] if isinstance(checkpoint.get("config"), dict) else {}
    spells = all(config.get(name) == getattr(s, name) for name in ("spelling_letters", "spelling_case"))
    other = (*["future_heads."] * (head != s.head), *["spelling_heads."] * (not spells))
    checkpoint["model"] = {name: t for name, t in checkpoint["model"].items() if not name.startswith(other)}


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


def freeze(model: Transformer, s: Settings, it: int) -> bool:
    """Let learn what is to learn at iteration `it`; returns whether that is other than it was."""
    frozen, changed = s.freeze_trunk_iters < 0 or it < s.freeze_trunk_iters, False
    for p in model.trunk_parameters():
        learns = not frozen and not (s.freeze_embeddings and p is model.tok_embeddings.weight)
        changed |= p.requires_grad != learns
        p.requires_grad = learns
    return changed


class Validation(NamedTuple):
    """The rows that every run is judged on, and what is known of them."""

    batches: list[tuple[torch.Tensor, torch.Tensor]]
    windows: list  # the numbers of each batch's rows in val.bin
    answers: Answers | None  # of a task with a known answer
    tokens_per_byte: float  # of the targets; 0 where tokens are no text


def load_validation(s: Settings, rows: Windows, texts: list[bytes] | None) -> Validation:
    """Errors: ValueError if answers are broken, or rows of a task not as long as the run's."""
    answers, batches = Answers.find(rows.path), eval_batches(rows, s.eval_iters)
    if answers and answers.length != s.max_seq_len:
        raise ValueError(f"max_seq_len={s.max_seq_len}: expected {answers.length}, the length of a row of {rows.path}")
    length = torch.tensor([len(text) for text in texts or [b""] * s.vocab_size])
    size = sum(length[y].sum().item() for _, y in batches)
    return Validation(batches, eval_windows(rows, s.eval_iters), answers,
                      sum(y.numel() for _, y in batches) / size if size else 0.0)


def evaluate(objective: Objective, validation: Validation, names: tuple[str, ...], machine: Machine,
             path: StepPath) -> dict[str, float]:
    """{name: mean over all validation rows}, of `names`, of the heads' guesses and of answers; ranks share the work."""
    n, answers = objective.model.args.n_future_heads, validation.answers
    guesses = (f"{kind}_{i}" for kind in ("acc", "agree", "kl") for i in range(kind != "acc", n + 1))
    exact = [f"exact_{group}" for group in answers.names.values()] if answers else []
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in (*names, *guesses, *exact)}  # of values, of positions
    objective.eval()
    mine = list(zip(validation.windows, validation.batches, strict=True))[machine.rank :: machine.world]
    for windows, (x, y) in tqdm(mine, "validation", leave=False, disable=machine.rank > 0 or None):  # terminals only
        with path.autocast():
            losses, best = objective.evaluate(*machine.put(x, y), names, n)
        for name, loss in losses.items():
            count = loss.count.item()
            sums[name] += torch.tensor([loss.mean.item() * count, count])
        for group, counts in answers.score(windows, y.shape[1], best.cpu(), y).items() if answers else ():
            sums[f"exact_{group}"] += torch.tensor(counts)
    objective.train()
    totals = machine.sum(torch.stack(list(sums.values())))  # (losses, 2)
    found = {name: value / max(count, 1.0) for name, (value, count) in zip(sums, totals.tolist(), strict=True)}
    if validation.tokens_per_byte:
        found["bits_per_byte"] = found["ntp"] / math.log(2.0) * validation.tokens_per_byte
    return found


def facts(s: Settings, model: Transformer, train: Windows, validation: Validation, machine: Machine,
          path: StepPath) -> dict:
    """What the log says of a run beside its settings; runs are comparable where these are the same (compare.py)."""
    vocabulary = train.path.parent / "tokenizer.bin"
    targets = b"".join(y.numpy().tobytes() for _, y in validation.batches)
    return machine.facts(path) | {
        "parameters": model.parameter_counts()["trunk"], "train_tokens": len(train.tokens),
        "val_tokens": sum(y.numel() for _, y in validation.batches),
        "val_crc32": f"{zlib.crc32(targets):08x}",
        "vocabulary_crc32": f"{zlib.crc32(vocabulary.read_bytes()):08x}" if vocabulary.exists() else None}


def check_finite(what: str, value: float | torch.Tensor, it: int, s: Settings) -> None:
    """Stop a run that diverged, before its weights replace better ones."""
    if not math.isfinite(value):
        raise ValueError(f"iter {it}: the {what} is {float(value)}; try a lower learning_rate or a grad_clip. "
                         f"What {s.out_dir} holds is from before")


def tokens_per_step(s: Settings, machine: Machine, it: int) -> int:
    """Tokens that all processes together train on in iteration `it`; a bag of them takes the place of one."""
    bag = s.superposition if it / s.max_iters < s.superposition_end else 1
    return s.batch_size * s.gradient_accumulation_steps * machine.world * s.max_seq_len * bag


def announce(s: Settings, model: Transformer, train: Windows, machine: Machine, path: StepPath) -> None:
    """Say what follows from the settings."""
    counts = model.parameter_counts()
    per_step = tokens_per_step(s, machine, s.max_iters)
    total = sum(tokens_per_step(s, machine, it) for it in range(s.max_iters))
    if s.n_future_heads and not (s.nitp_weight or s.consistency_weight):
        note(f"n_future_heads={s.n_future_heads}: no loss has a weight, so the heads stay as they start")
    if s.warmup_iters >= s.max_iters:
        note(f"warmup_iters={s.warmup_iters}: the run ends before the learning rate is at its peak")
    print(f"parameters: {counts['trunk']:,} in trunk and NTP head, "
          f"{counts['future heads']:,} in {s.n_future_heads} future heads"
          + " and others" * (s.spelling_letters + s.order_window > 0) + "\n"
          f"tokens: {per_step:,} a step, {total:,} in {s.max_iters:,} steps: "
          f"{total / (len(train) * s.max_seq_len):.2f} epochs of {len(train):,} rows in {train.path}\n"
          f"machine: {machine.world} x {machine.device}, {torch.get_num_threads()} threads; path: {path}", flush=True)


def show(line: dict, s: Settings, step_seconds: float) -> str:
    """A line of the log for the terminal: losses, rate, speed, time left."""
    minutes, seconds = divmod(round((s.max_iters - line["iter"]) * step_seconds), 60)
    losses = "  ".join(f"{k.removeprefix('train/')} {v:.4f}" for k, v in line.items() if k.startswith("train/"))
    return (f"iter {line['iter']}/{s.max_iters} | {losses} | lr {line['lr']:.2e} | {step_seconds * 1000:.0f} ms | "
            f"{line['tok_per_s']:,.0f} tok/s | {minutes}:{seconds:02d} left")


def wandb_settings(s: Settings, header: dict, run_id: str | None) -> dict | None:
    """What wandb.init is told; None where the run is not for wandb."""
    if not s.wandb_log:
        return None
    return {"project": s.wandb_project, "name": s.wandb_run_name or Path(s.out_dir).name, "mode": s.wandb_mode,
            "config": header["config"] | {"facts": header["facts"]}, "id": run_id, "resume": "allow"}


# ---------------------------------------------------------------------------------------------
# one run

def train(s: Settings) -> int:
    """Run from settings to the last checkpoint; returns the exit code: 0, or 128 + the signal that stopped it."""
    check(s)
    checkpoint, source = load_start(s)
    check(s)  # once more, with what the checkpoint has decided
    machine = find_machine(s.device)
    first, accumulate = machine.rank == 0, s.gradient_accumulation_steps
    folder = vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size)
    train_rows = Windows(folder / "train.bin", s.vocab_size, s.max_seq_len, s.train_fraction)
    val_rows = Windows(folder / "val.bin", s.vocab_size, s.max_seq_len)
    batches = TrainBatches(train_rows, s.batch_size, s.seed, machine.rank, machine.world)
    bags = batches
    if s.superposition > 1:  # as many bags in a row as else tokens
        longer = Windows(folder / "train.bin", s.vocab_size, s.max_seq_len * s.superposition, s.train_fraction)
        bags = TrainBatches(longer, s.batch_size, s.seed, machine.rank, machine.world)
    has_text = (folder / "tokenizer.bin").exists() and ((folder / "tokenizer.model").exists() or
                                                       s.vocab_size == BYTE_VOCAB_SIZE)
    texts = token_texts(load_tokenizer(folder, s.vocab_size)) if has_text else None
    validation = load_validation(s, val_rows, texts)

    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    path = choose_path(s, machine.device)
    raw = make_objective(s, path, texts)
    model = raw.model
    fresh = [name for name, _ in model.named_parameters()]
    if checkpoint and (fresh := load_weights(model, checkpoint["model"], source)):
        note(f"{source}: has no {', '.join(fresh)}: at the start as in a new model")
    if s.head_init == "last_block":
        model.start_as_last_block(i for i in range(1, s.n_future_heads + 1)
                                  if any(name.startswith(f"future_heads.{i - 1}.") for name in fresh))
    raw.to(machine.device)
    if s.soft_weight:
        raw.refresh_neighbours()
    torch.manual_seed(s.seed + 1 + machine.rank)  # dropout: a stream of its own, whatever the weights drew
    optimizer = make_optimizer(s, model)

    def wrapped() -> torch.nn.Module:
        """The objective as it runs; anew whenever other parameters learn."""
        objective = torch.compile(raw) if path.kind == "compiled" else raw
        if machine.world > 1:  # heads whose losses weigh 0 at a step get no gradient there
            has_heads = len(model.trunk_parameters()) < len(list(model.parameters()))
            objective = DistributedDataParallel(objective, find_unused_parameters=has_heads)
        return objective

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
        for name, table in raw.named_buffers(recurse=False):  # soft targets, as of their last refresh
            tables = checkpoint.get("objective")
            last = tables.get(name) if isinstance(tables, dict) else None
            if isinstance(last, torch.Tensor) and last.shape == table.shape:
                table.copy_(last)
            else:
                note(f"{source}: has no {name} for soft_neighbours={s.soft_neighbours}: made anew")
        for group, fresh_group in zip(optimizer.param_groups, fresh_groups, strict=True):
            group.update(fresh_group)  # weight_decay and betas are this run's, not the checkpoint's
        start, best, seconds, tokens = (checkpoint[k] for k in ("iter_num", "best_val_ntp", "seconds", "tokens"))
        wandb_id = checkpoint.get("wandb_id")
    del checkpoint
    if first:
        announce(s, model, train_rows, machine, path)

    if s.eval_only:
        val = evaluate(raw, validation, losses_of(s), machine, path)
        if first:
            print("\n".join(f"val/{name} {value:.6f}" for name, value in val.items()))
        return 0
    header = {"config": asdict(s), "facts": facts(s, model, train_rows, validation, machine, path)}
    log = Log(Path(s.out_dir), start, header, wandb_settings(s, header, wandb_id)) if first else None

    def save(*names: str) -> None:
        rng = rng_states(machine)
        if not first:
            return
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                   "model_args": model.args.as_dict(), "iter_num": it, "best_val_ntp": best, "config": asdict(s),
                   "objective": dict(raw.named_buffers(recurse=False)), "rng": rng, "seconds": seconds,
                   "tokens": tokens, "wandb_id": log.wandb_id or wandb_id}
        buffer = io.BytesIO()  # torch.save straight to a full disk would not say that the disk is full
        torch.save(content, buffer)
        for name in names:
            with atomic_write(Path(s.out_dir) / name) as f:
                f.write(buffer.getbuffer())

    stop, last_shown = Stop(), (start, tokens, seconds)
    freeze(model, s, start)
    objective = wrapped()
    for it in range(start, s.max_iters + 1):
        line: dict = {"iter": it, "tokens": tokens, "seconds": seconds}
        evaluates = it % s.eval_interval == 0 or it == s.max_iters
        if evaluates:
            val = evaluate(raw, validation, losses_of(s), machine, path)
            line |= {f"val/{name}": value for name, value in val.items()} | {"peak_mib": machine.peak_mib()}
            if first:
                print(f"iter {it}/{s.max_iters} | val", *(f" {k} {v:.4f}" for k, v in val.items()), flush=True)
            check_finite("validation loss", val["ntp"], it, s)
            better, best = val["ntp"] <= best, min(best, val["ntp"])  # a frozen trunk's stays; its heads get better
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
        if freeze(model, s, it):
            objective = wrapped()
        weights = loss_weights(s, it / s.max_iters)
        if "soft" in weights and it % s.soft_refresh == 0:
            raw.refresh_neighbours()
        rows = bags if "superposition" in weights else batches
        micro = [machine.put(*rows[it * accumulate + m]) for m in range(accumulate)]
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
        tokens += tokens_per_step(s, machine, it)

        due = evaluates or it % s.log_interval == 0
        if due or (it + 1) % s.eval_interval == 0 or it + 1 == s.max_iters:
            machine.synchronize()
        seconds += time.perf_counter() - began
        if due:
            means = {name: machine.sum(mean).item() for name, mean in means.items()}
            means["total"] = sum(weights[name] * mean for name, mean in means.items())
            norm = grad_norm.item()  # not finite where float16 overflows, and the scaler skips the step
            line |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm if math.isfinite(norm) else None,
                     "tok_per_s": (tokens - last_shown[1]) / (seconds - last_shown[2])}
            line |= {f"train/{name}": mean for name, mean in means.items()}
            line |= {f"weight/{name}": weights.get(name, 0.0)
                     for name in (*losses_of(s)[1:], *["superposition"] * (s.superposition > 1))}
            step_seconds = (seconds - last_shown[2]) / (it + 1 - last_shown[0])
            last_shown = it + 1, tokens, seconds
            check_finite("training loss", means["total"], it, s)
            if first:
                log.write(line)
                print(show(line, s, step_seconds), flush=True)
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
