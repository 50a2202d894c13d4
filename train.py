"""Train a tiny Llama on next-token prediction, with or without objectives that look further ahead.

    python train.py config/quickstart.py                          # settings from a file
    python train.py config/stories260k_mtp.py --max_iters=50      # and from the command line
    python train.py config/stories260k_mtp.py --init_from=resume  # go on where out_dir stopped
    python train.py --out_dir=out/x --init_from=resume            # the same with the settings of its checkpoint
    torchrun --standalone --nproc_per_node=2 train.py config/...  # several processes (doc/several-machines.md)
    python train.py --help                                        # every setting

Writes out_dir/ckpt.pt (best by validation NTP loss), out_dir/last.pt (newest) and out_dir/log.jsonl
(one object a line; the same keys go to wandb). `export.py` turns a checkpoint into a file for run.c.

`train` at the end of this file is the whole run: data, model, then the loop; `training_step`, above it, is one
update. Losses are in losses.py, settings in settings.py, validation in evaluation.py.
"""

from system.program import program

import math
import sys
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, help_text
from evaluation import Validation, evaluate, load_validation, losses_of, target_tokens, write_story
from formats.checkpoint import load_weights
from formats.resume import Progress, fingerprints, load_start, restore, save, saved_settings
from losses import Objective, loss_weights, position_weights
from model import Transformer
from settings import NEED_TEXT, Settings, check, shape_of
from step import kernels
from step.chunks import chunk_rows, limits_of
from step.machine import Machine, StepPath, choose_path, find_machine, is_first, lost_a_process, note, out_of_memory
from step.memory import check_memory
from step.optimizer import clip_gradients, make_optimizer
from study.log import Log, wandb_settings
from study.terminal import show_evaluation, show_step, show_story
from system.lock import hold
from system.origin import origin
from system.shown import shown, shown_message
from system.signals import Stop, handlers_restored
from system.streams import tell
from text.letters import Letters, Prefixes, token_texts
from text.tokenizer import BOS, BYTE_VOCAB_SIZE, load_tokenizer, vocab_folder
from text.tokenizer_json import TOKENIZER
from tinystories import Resident, TrainBatches, Windows

# ---------------------------------------------------------------------------------------------
# settings and data

def settings_from(argv: list[str]) -> Settings:
    """The settings of a run. Resumed without a config file it has those of its checkpoint, which argv may change."""
    s = configure(Settings, argv)
    last = Path(s.out_dir) / "last.pt"
    if s.init_from == "auto":
        s.init_from = "resume" if last.exists() else "scratch"
    if s.init_from == "resume" and all(word.startswith("-") for word in argv):
        s = configure(Settings, [*argv, "--init_from=resume"], saved_settings(last), str(last))
        note(f"without a config file: settings are those in {last} and on the command line")
    if s.max_epochs and any(word.startswith("--max_iters") for word in argv):
        note(f"max_epochs={s.max_epochs:g} decides the length, not max_iters; --max_epochs=0 goes by iterations")
    return s


class Data(NamedTuple):
    """What a run reads."""

    train: Windows  # the rows of train.bin
    resident: Resident | None  # its tokens in the device's memory, if there is room
    batches: TrainBatches  # of those rows
    bags: TrainBatches  # while tokens are in superposition: each row has max_seq_len bags instead of tokens
    validation: Validation
    texts: list[bytes] | None  # what each token spells; None where tokens are no text
    bos: int  # the token before each story


def load_data(s: Settings, machine: Machine) -> Data:
    """Errors: ValueError naming the file."""
    folder = vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size)

    def rows_of(length: int) -> Windows:
        return Windows(folder / "train.bin", s.vocab_size, length, s.train_fraction, s.pack)

    rows = rows_of(s.max_seq_len)
    free = machine.free_bytes()
    resident = Resident(rows, machine) if free and Resident.size(rows) <= free // 4 else None
    batches = bags = TrainBatches(rows, s.batch_size, s.seed, machine.rank, machine.world, resident)
    if s.superposition > 1:
        rows_of_bags = rows_of(s.max_seq_len * s.superposition)
        bags = TrainBatches(rows_of_bags, s.batch_size, s.seed, machine.rank, machine.world, resident)
    texts, bos = None, BOS
    is_text = (folder / "tokenizer.model").exists() or s.vocab_size == BYTE_VOCAB_SIZE
    if is_text and (folder / "tokenizer.bin").exists() or (folder / TOKENIZER).exists():
        tokenizer = load_tokenizer(folder, s.vocab_size)
        texts, bos = token_texts(tokenizer), tokenizer.bos
    validation_rows = Windows(folder / "val.bin", s.vocab_size, s.max_seq_len, pack=s.pack)
    return Data(rows, resident, batches, bags, load_validation(s, validation_rows, texts), texts, bos)


# ---------------------------------------------------------------------------------------------
# the model

@dataclass
class Training:
    """Everything that a training step works on."""

    s: Settings
    machine: Machine
    path: StepPath
    objective: Objective  # the model and its losses
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    # once `wrap` has been called
    wrapped: nn.Module | None = None  # the objective under DDP and torch.compile
    counted_targets: Callable | None = None  # the objective's
    losses: tuple[str, ...] = ()  # that they are wrapped for

    @property
    def model(self) -> Transformer:
        return self.objective.model

    @property
    def logit_rows(self) -> int | None:
        """How many rows of a micro-batch have their logits at the same time; None: all."""
        return chunk_rows(self.s.batch_size * self.s.max_seq_len, self.s.vocab_size, self.path.fast,
                          self.objective.limits)

    def wrap(self, losses: tuple[str, ...]) -> None:
        """Call again when losses or trainable parameters change: DDP and torch.compile inspect them only once."""
        self.losses = losses
        self.wrapped, self.counted_targets = self.objective, self.objective.counted_targets
        if self.path.kind == "compiled":
            self.wrapped, self.counted_targets = torch.compile(self.wrapped), torch.compile(self.counted_targets)
        if self.machine.world > 1:
            idle = self.objective.has_idle_heads(losses)  # parameters without a gradient, which DDP is to look for
            self.wrapped = DistributedDataParallel(self.wrapped, find_unused_parameters=idle)


def make_objective(s: Settings, path: StepPath, texts: list[bytes] | None = None, bos: int = BOS) -> Objective:
    """A new model with its losses, both of the kind that the path needs. texts: of the tokens, where they are text."""
    if s.param_dtype == "bfloat16" != str(path.dtype).removeprefix("torch."):
        raise ValueError(f"param_dtype=bfloat16: needs products in bfloat16 (--dtype=bfloat16), found {path}")
    model = (kernels.KernelTransformer if path.fast else Transformer)(shape_of(s))
    for name in NEED_TEXT:
        if getattr(s, name) and texts is None:
            raise ValueError(f"{name}={getattr(s, name)}: dataset={s.dataset} has no tokenizer.model, so no letters")
    return Objective(model, bos if s.mask_document_ends else None, kernels if path.fast else None,
                     consistency=(s.consistency_direction, s.consistency_temperature), teacher=s.consistency_teacher,
                     letters=(Letters(texts, s.spelling_case), s.spelling_letters) if s.spelling_letters else None,
                     order_window=s.order_window, bag=s.superposition,
                     neighbours=(s.soft_neighbours, s.soft_temperature) if s.soft_weight else None,
                     prefixes=Prefixes(texts) if s.prefix_weight else None)


def build(s: Settings, machine: Machine, texts: list[bytes] | None = None, checkpoint: dict | None = None,
          source: Path | None = None, bos: int = BOS) -> Training:
    """A model with its losses and optimizer; weights from a checkpoint where there is one, else random."""
    torch.manual_seed(s.seed)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    path = choose_path(s, machine.device)
    objective = make_objective(s, path, texts, bos)
    model = objective.model
    fresh = [name for name, _ in model.named_parameters()]
    if checkpoint and (fresh := load_weights(model, checkpoint["model"], source)):
        more = f" and {len(fresh) - 3} more" if len(fresh) > 3 else ""
        note(f"{source}: has no {', '.join(fresh[:3])}{more}: initialised as in a new model")
    if s.head_init == "last_block":
        model.start_as_last_block(i for i in range(1, s.n_future_heads + 1)
                                  if any(name.startswith(f"future_heads.{i - 1}.") for name in fresh))
    objective.to(machine.device)
    if free := machine.free_bytes():
        objective.limits = limits_of(free, 1 + s.n_future_heads + (s.order_window > 0))
    if s.soft_weight:
        objective.refresh_neighbours()
    torch.manual_seed(s.seed + 1 + machine.rank)  # dropout: a stream of its own, whatever the weights drew
    scaler = torch.amp.GradScaler(machine.device.type, enabled=path.dtype == torch.float16)
    return Training(s, machine, path, objective, make_optimizer(s, model), scaler)


# ---------------------------------------------------------------------------------------------
# one step

def learning_rate(s: Settings, it: int) -> float:
    """Rate of iteration `it`: a straight rise to the peak, then lr_schedule.

    cosine: half a cosine down to min_lr. wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395): the peak, and
    over the last decay_fraction of the run a straight line down to min_lr (Hägele et al. 2024, arXiv 2405.18392).
    """
    if it < s.warmup_iters:
        return s.learning_rate * (it + 1) / (s.warmup_iters + 1)
    begin = s.warmup_iters
    if s.lr_schedule == "wsd":
        begin = max(begin, (1.0 - s.decay_fraction) * s.max_iters)
    if s.lr_schedule == "constant" or it < begin:
        return s.learning_rate
    done = (it - begin) / (s.max_iters - begin)
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if s.lr_schedule == "cosine" else 1.0 - done
    return s.min_lr + share * (s.learning_rate - s.min_lr)


def set_trainable(model: Transformer, s: Settings, it: int) -> bool:
    """Set requires_grad for iteration `it`; returns whether anything changed."""
    frozen, changed = s.freeze_trunk_iters < 0 or it < s.freeze_trunk_iters, False
    for p in model.trunk_parameters():
        learns = not frozen and not (s.freeze_embeddings and p is model.tok_embeddings.weight)
        changed |= p.requires_grad != learns
        p.requires_grad = learns
    return changed


class Step(NamedTuple):
    """What a training step did. Nothing here has waited for the device."""

    means: dict[str, Tensor]  # {loss: its sum over this process's positions / all processes' number of positions}
    grad_norm: Tensor
    compiled: bool  # torch.compile took most of its time
    stopping: Callable[[], int]  # how many processes were asked to stop when it began


def training_step(run: Training, it: int, weights: dict[str, float], micro_batches: list[tuple[Tensor, ...]],
                  stop: bool = False) -> Step:
    """One update from all micro-batches together.

    weights: {loss: weight}, as loss_weights gives them. micro_batches: x and y, (B, T) int64 each, and `answers`
    where the data has a mask (Windows.rows).
    stop: was this process asked to? All processes hear of it with the step's counts, and leave the loop together.
    """
    s, machine, model = run.s, run.machine, run.model
    # the rate, and what learns
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(s, it)
    other_parameters, other_losses = set_trainable(model, s, it), tuple(weights) != run.losses
    compiles = False
    if other_parameters or other_losses:
        run.wrap(tuple(weights))
        compiles = run.path.kind == "compiled"
    if compiles:
        note("compiling, about a minute")

    # targets, counted over the whole iteration: micro-batches and processes add up to one big batch
    counted = [run.counted_targets(y, tuple(weights), *answers, sample=s.aux_rows(len(y)))
               for _, y, *answers in micro_batches]
    counts, stopping = machine.sum_and_ask(sum(of_micro for _, of_micro in counted), stop)  # (losses,)
    of_position = position_weights(*machine.put(torch.tensor(list(weights.values()))), counts)

    # forward and backward
    means = torch.zeros_like(of_position)
    for m, (x, *_) in enumerate(micro_batches):
        targets, of_micro = counted[m]
        last = m == len(micro_batches) - 1
        with nullcontext() if last or machine.world == 1 else run.wrapped.no_sync():
            with run.path.autocast():
                total, losses = run.wrapped(x, targets, of_position)
            # DDP averages gradients over processes; positions are counted over all of them
            run.scaler.scale(total * machine.world).backward()
        means += torch.stack([loss.mean for loss in losses.values()]) * (of_micro / counts.clamp(min=1))

    # clip and update
    run.scaler.unscale_(run.optimizer)
    grad_norm = clip_gradients(run.optimizer, s.grad_clip or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return Step(dict(zip(losses, means.unbind(), strict=True)), grad_norm, compiles, stopping)


def step_on_random_tokens(s: Settings, texts: list[bytes] | None = None) -> Callable[[float], None]:
    """A training step on the CPU for whoever times it (ablate.py, bench/): step(progress of the run, 0 to 1)."""
    run = build(s, Machine(torch.device("cpu")), texts)
    rows = torch.randint(s.vocab_size, (2, s.batch_size, s.superposition * s.max_seq_len))

    def step(progress: float = 0.5) -> None:
        weights = loss_weights(s, progress)
        x, y = rows if "superposition" in weights else rows[..., : s.max_seq_len]
        training_step(run, round(progress * s.max_iters), weights, [(x, y)])

    return step


# ---------------------------------------------------------------------------------------------
# the log and the terminal

def tokens_per_step(s: Settings, machine: Machine, it: int) -> int:
    """Tokens that all processes together train on in iteration `it`; a bag of them takes the place of one."""
    bag = s.superposition if it / s.max_iters < s.superposition_end else 1
    return s.batch_size * s.gradient_accumulation_steps * machine.world * s.max_seq_len * bag


def tokens_of_run(s: Settings, machine: Machine) -> int:
    """The sum of tokens_per_step over all iterations."""
    in_bags = bisect_left(range(s.max_iters), s.superposition_end, key=lambda it: it / s.max_iters)  # iterations
    return in_bags * tokens_per_step(s, machine, 0) + (s.max_iters - in_bags) * tokens_per_step(s, machine, s.max_iters)


def iterations_of(s: Settings, rows: int, world: int) -> int:
    """How many iterations are max_epochs passes over `rows` rows; while tokens are in bags each step reads more."""
    per_step = s.batch_size * s.gradient_accumulation_steps * world
    bag = 1 + (s.superposition - 1) * s.superposition_end if s.superposition > 1 else 1
    iterations = max(1, math.ceil(s.max_epochs * rows / (per_step * bag)))
    if iterations > 10**9:
        raise ValueError(f"max_epochs={s.max_epochs}: {iterations:,} iterations, expected at most {10**9:,}")
    return iterations


def announce(run: Training, data: Data) -> None:
    """Print what follows from the settings."""
    s, machine, train, counts = run.s, run.machine, data.train, run.model.parameter_counts()
    per_step, total = tokens_per_step(s, machine, s.max_iters), tokens_of_run(s, machine)
    if s.n_future_heads and not (s.nitp_weight or s.consistency_weight):
        note(f"n_future_heads={s.n_future_heads}: no loss has a weight, so the heads stay as they start")
    if s.warmup_iters >= s.max_iters:
        note(f"warmup_iters={s.warmup_iters}: the run ends before the learning rate is at its peak")
    others = " and others" if s.spelling_letters or s.order_window else ""
    epochs = total / (len(train) * s.max_seq_len)
    tell(f"parameters: {counts['trunk']:,} in trunk and NTP head, "
         f"{counts['future heads']:,} in {s.n_future_heads} future heads{others}\n"
         f"tokens: {per_step:,} a step, {total:,} in {s.max_iters:,} steps: "
         f"{epochs:.2f} epochs of {len(train):,} rows in {train.path}\n"
         f"machine: {machine.world} x {machine.device}, {torch.get_num_threads()} threads; path: {run.path}")
    if run.objective.limits:  # free memory has decided
        at_a_time = f"{run.logit_rows:,} rows at a time" if run.logit_rows else "of all rows at once"
        tell(f"{machine.device}: logits {at_a_time}; tokens {'copied there' if data.resident else 'on the host'}")


def step_figures(run: Training, weights: dict[str, float], step: Step) -> dict:
    """What the log says of a step. Waits for the device, once."""
    s, machine = run.s, run.machine
    means = machine.sum(torch.stack(list(step.means.values())))  # over processes
    norm, *means = machine.read(torch.cat([step.grad_norm[None], means]))
    losses = dict(zip(step.means, means, strict=True))
    # the norm is not finite where float16 overflows, and the scaler skips the step
    line = {"lr": run.optimizer.param_groups[0]["lr"], "grad_norm": norm if math.isfinite(norm) else None}
    losses["total"] = sum(weights[name] * loss for name, loss in losses.items())
    line |= {f"train/{name}": loss for name, loss in losses.items()}
    weighted = [*losses_of(s)[1:], "superposition"] if s.superposition > 1 else losses_of(s)[1:]
    return line | {f"weight/{name}": weights.get(name, 0.0) for name in weighted}


def facts(run: Training, data: Data) -> dict:
    """What the log says of a run besides its settings; runs are comparable where these are the same (compare.py)."""
    vocabulary = data.train.path.parent / TOKENIZER
    if not vocabulary.exists():
        vocabulary = data.train.path.parent / "tokenizer.bin"
    targets = target_tokens(data.validation.batches)
    return run.machine.facts(run.path) | origin() | {
        "parameters": run.model.parameter_counts()["trunk"], "logit_rows": run.logit_rows,
        "train_tokens": len(data.train.tokens), "val_tokens": len(targets),
        "val_crc32": f"{zlib.crc32(targets.numpy().tobytes()):08x}",
        "vocabulary_crc32": f"{zlib.crc32(vocabulary.read_bytes()):08x}" if vocabulary.exists() else None}


def check_finite(what: str, value: float | torch.Tensor, it: int, s: Settings) -> None:
    """Stop a run that diverged, before its weights replace better ones."""
    if not math.isfinite(value):
        raise ValueError(f"iter {it}: the {what} is {float(value)}; try a lower learning_rate or a grad_clip. "
                         f"What {s.out_dir} holds is from before")


# ---------------------------------------------------------------------------------------------
# one run

def next_batches(run: Training, data: Data, it: int, weights: dict[str, float]) -> list[tuple[Tensor, ...]]:
    """The micro-batches of iteration `it`, on the device, which still works on the step before while they are made."""
    s, rows = run.s, data.batches
    if "superposition" in weights:
        rows = data.bags
    first = it * s.gradient_accumulation_steps
    return [run.machine.put(*rows[first + m]) for m in range(s.gradient_accumulation_steps)]


def evaluate_and_save(run: Training, data: Data, progress: Progress) -> dict:
    """An evaluation's part of a line of the log; saves last.pt, and ckpt.pt if validation NTP is no worse than ever."""
    s, it, first = run.s, progress.iter_num, run.machine.rank == 0
    val = evaluate(run, data.validation)
    line = {f"val/{name}": value for name, value in val.items()} | {"peak_mib": run.machine.peak_mib()}
    if first:
        tell(show_evaluation(it, s, val))
    check_finite("validation loss", val["ntp"], it, s)
    if first and s.sample_tokens and data.texts:
        line["sample"] = write_story(run, data.texts, data.bos)
        tell(show_story(line["sample"]))
    file_names = ["last.pt"]
    if val["ntp"] <= progress.best_val_ntp:  # or equal: while the trunk is frozen only the heads get better
        progress.best_val_ntp = val["ntp"]
        file_names.insert(0, "ckpt.pt")
    save(file_names, run, progress)
    return line


def count(progress: Progress, last_shown: Progress, step: Step, seconds: float, tokens: int) -> None:
    """Add a step to the progress. Compiling is no part of training time, nor of the speed since the last line shown."""
    progress.iter_num += 1
    progress.tokens += tokens
    if step.compiled:
        progress.compile_seconds += seconds
        last_shown.iter_num += 1
        last_shown.tokens += tokens
    else:
        progress.seconds += seconds


def train(s: Settings) -> int:
    """Run from settings to the last checkpoint; returns the exit code: 0, or 128 + the signal that stopped it."""
    # the checkpoint that the run starts from
    checkpoint, source = load_start(s)
    check(s)  # with what the checkpoint has decided
    machine = find_machine(s.device)
    first = machine.rank == 0
    check_memory(s, shape_of(s), machine)

    # data; the model, its losses and optimizer
    data = load_data(s, machine)
    if s.max_epochs:
        s.max_iters = iterations_of(s, len(data.train), machine.world)
        check(s)
        note(f"max_epochs={s.max_epochs:g}: a run of {s.max_iters:,} iterations")
    run = build(s, machine, data.texts, checkpoint, source, data.bos)
    progress = Progress(data=fingerprints(s))
    if s.init_from == "resume":
        progress = restore(checkpoint, source, run)
    del checkpoint
    if first:
        announce(run, data)

    if s.eval_only:
        val = evaluate(run, data.validation)
        if first:
            print("\n".join(f"val/{name} {value:.6f}" for name, value in val.items()))
        return 0

    # the log; only the first of several processes has one
    if first:
        header = {"config": asdict(s), "facts": facts(run, data)}
        log = Log(Path(s.out_dir), progress.iter_num, header, wandb_settings(s, header, progress.wandb_id),
                  s.tensorboard_log)
        progress.wandb_id = log.wandb_id or progress.wandb_id
    stop = Stop("stopping after this step (again to stop at once)\n" if first else "")
    step = None  # the last one
    last_shown = replace(progress)  # at the last line on the terminal

    for it in range(progress.iter_num, s.max_iters + 1):
        if first:
            log.check()  # an out_dir that was removed or replaced ends the run
        line = {"iter": it, "tokens": progress.tokens, "seconds": progress.seconds}
        if run.path.kind == "compiled":
            line["compile_seconds"] = progress.compile_seconds

        # evaluate on the validation rows, and save
        evaluates = it % s.eval_interval == 0 or it == s.max_iters
        if evaluates:
            line |= evaluate_and_save(run, data, progress)

        # the end, or a signal
        if it == s.max_iters:
            if first:
                log.write(line)
            break
        if stop.signal if machine.world == 1 else step and step.stopping():
            largest = torch.stack([p.detach().abs().max() for p in run.model.parameters()]).max()  # keeps a NaN
            check_finite("largest weight", largest, it, s)
            save(["last.pt"], run, progress)
            if first and evaluates:  # else ckpt.pt may be chosen by a figure that no line has
                log.write(line)
            break

        # one step
        began = time.perf_counter()
        weights = loss_weights(s, it / s.max_iters)
        if "soft" in weights and it % s.soft_refresh == 0:
            run.objective.refresh_neighbours()
        step = training_step(run, it, weights, next_batches(run, data, it, weights), stop.signal > 0)
        logs = evaluates or it % s.log_interval == 0
        if logs:
            line |= step_figures(run, weights, step)
        elif step.compiled or stop.signal or (it + 1) % s.eval_interval == 0 or it + 1 == s.max_iters:
            machine.synchronize()
        count(progress, last_shown, step, time.perf_counter() - began, tokens_per_step(s, machine, it))

        # log
        if logs:
            seconds, tokens = progress.seconds - last_shown.seconds, progress.tokens - last_shown.tokens
            line["tok_per_s"] = tokens / seconds if tokens else None  # None: nothing but a step that compiled
            check_finite("training loss", line["train/total"], it, s)
            if first:
                log.write(line)
                tell(show_step(line, s, seconds / max(progress.iter_num - last_shown.iter_num, 1)))
            last_shown = replace(progress)

    if first:
        if it == s.max_iters and s.wandb_artifact:
            log.keep(Path(s.out_dir) / "ckpt.pt")
        log.close()
    if it == s.max_iters:
        length = "max_epochs" if s.max_epochs else "max_iters"
        note(f"complete at {it:,}; raise --{length} to go on")
        return 0
    note(f"stopped at iter {it}, saved {s.out_dir}/last.pt; --init_from=resume continues")
    return 128 + stop.signal if stop.signal else 0  # 0: another process got the signal


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(help_text(Settings, __doc__))
        return 0
    try:
        return outcome(argv)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def outcome(argv: list[str]) -> int:
    """The exit status of a run; what stopped it is told, before a group whose other end is gone is given up."""
    try:
        s = settings_from(argv)
        check(s)
        writes = is_first() and not s.eval_only
        with handlers_restored(), hold(Path(s.out_dir) / "lock") if writes else nullcontext():
            return train(s)
    except ValueError as error:
        complaint = str(error)
    except (MemoryError, RuntimeError) as error:
        what = (str(error).splitlines() or [""])[0]
        if lost_a_process(error):
            complaint = (f"rank {dist.get_rank()}: another process is gone ({shown(what)}). "
                         f"{s.out_dir}/last.pt is from the last evaluation; --init_from=resume continues it")
        elif out_of_memory(error):
            complaint = f"out of memory ({shown(what)}); try a smaller batch_size and more gradient_accumulation_steps"
        else:
            raise
    tell(f"train.py: {shown_message(complaint)}", sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(program(main))
