"""Checkpoints of a run: what a run starts from, how it is saved, and how it goes on as if it had never stopped.

    checkpoint, source = load_start(s)        # s.init_from: a checkpoint to start from or to resume, or None
    progress = restore(checkpoint, source, run)
    save(["last.pt"], run, progress)

run: a train.Training, of which s, machine, objective, optimizer and scaler are used here.

A checkpoint holds plain tensors and built-in types, so torch.load(weights_only=True) reads it (doc/formats.md).
"""

import io
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist

from formats.checkpoint import has_another_vocabulary, model_args_of, read_checkpoint
from model import ModelArgs
from settings import Heads, Settings, Shape, names_of, shape_of
from step.machine import Machine, note
from system.files import atomic_write, fingerprint, read_text
from system.shown import shown
from text.tokenizer import vocab_folder
from text.tokenizer_json import TOKENIZER

RESUMED = {"optimizer": dict, "scaler": dict, "iter_num": int, "best_val_ntp": float, "config": dict, "rng": list,
           "seconds": float, "tokens": int}  # what a checkpoint needs besides the model to be resumed


@dataclass
class Progress:
    """How far a run has come."""

    iter_num: int = 0  # iterations done
    best_val_ntp: float = math.inf
    seconds: float = 0.0  # of training, without evaluations
    tokens: int = 0  # trained on
    compile_seconds: float = 0.0  # of steps that torch.compile compiled; not among `seconds`
    wandb_id: str | None = None
    data: dict[str, str] = field(default_factory=dict)  # {file: its fingerprint}


def load_start(s: Settings) -> tuple[dict | None, Path]:
    """The checkpoint a run starts from and its path; None for init_from=scratch.

    A resumed run must have the checkpoint's shape; a run from another checkpoint takes its trunk's
    shape (not its heads) into `s`. Errors: ValueError.
    """
    last = Path(s.out_dir) / "last.pt"
    if s.init_from != "resume" and not s.eval_only:
        refuse_to_overwrite(Path(s.out_dir))
    if s.init_from == "scratch":
        return None, last
    path = last if s.init_from == "resume" else Path(s.init_from)
    checkpoint = read_last(path) if s.init_from == "resume" else read_checkpoint(path)
    if s.init_from == "resume":
        check_resumable(checkpoint, path, s)
    else:
        take_shape(checkpoint, path, s)
    return checkpoint, path


def refuse_to_overwrite(out_dir: Path) -> None:
    """ValueError if a new run in out_dir would replace another's checkpoints or log, this lab's or llama2.c's."""
    last, best, log = (out_dir / name for name in ("last.pt", "ckpt.pt", "log.jsonl"))
    if last.exists():
        raise ValueError(f"{last}: this out_dir holds a run; --init_from=resume continues it, "
                         "or choose another --out_dir, or delete it")
    if best.exists() and not is_untrained(best):
        raise ValueError(f"{best}: this out_dir holds a run without the last.pt that continues it; "
                         f"--init_from={best} with another --out_dir starts from it; or delete it")
    if log.exists() and has_iterations(log):
        raise ValueError(f"{log}: this out_dir holds the log of a run; choose another --out_dir, or delete it")


def is_untrained(path: Path) -> bool:
    """Is a checkpoint that of iteration 0? A run that is killed between its first ckpt.pt and last.pt leaves it."""
    try:
        return read_checkpoint(path, mapped=True).get("iter_num") == 0
    except ValueError:  # whatever it is, it is not ours to replace
        return False


def has_iterations(log: Path) -> bool:
    """Does a log have more than the header, which is all that a run writes before its first checkpoint?"""
    lines = [line for line in read_text(log, errors="replace").splitlines() if line.strip()]
    return any('"config"' not in line for line in lines)


def read_last(path: Path, mapped: bool = False) -> dict:
    """The checkpoint in last.pt. Errors: ValueError, which names the best checkpoint if there is one."""
    try:
        return read_checkpoint(path, mapped)
    except ValueError as error:
        best = path.with_name("ckpt.pt")
        if not (path.exists() and best.exists()):
            raise
        raise ValueError(f"{error}; --init_from={best} with another --out_dir starts from the best one") from error


def saved_settings(path: Path) -> dict:
    """The settings of the run in a checkpoint. Errors: ValueError.

    Not its folder, which may have been moved; nor leave to go on with other data, which counts for one resume.
    """
    config = read_last(path, mapped=True).get("config")  # only this; the tensors stay on the disk
    if not isinstance(config, dict):
        return {}
    return {name: value for name, value in config.items() if name not in ("out_dir", "allow_other_data")}


def check_resumable(checkpoint: dict, path: Path, s: Settings) -> None:
    """Refuse a checkpoint that this run cannot go on from; note the settings that have changed.

    A shape that the command line does not mention is the run's.
    """
    if missing := [k for k, kind in RESUMED.items() if not isinstance(checkpoint.get(k), kind)]:
        raise ValueError(f"{path}: cannot be resumed, it has no {', '.join(missing)}; "
                         f"--init_from={path} with another --out_dir starts a new run from it")
    config = checkpoint["config"]
    if s.max_epochs:  # the data decides, as it did then
        s.max_iters = config.get("max_iters", s.max_iters)
    for f in fields(Settings):
        then, now = config.get(f.name, f.default), getattr(s, f.name)
        if f.name in names_of(Shape) and now == f.default != then:  # it may come from the model that the run began with
            setattr(s, f.name, then)
            note(f"{f.name}={then}, from {path}")
            now = then
        if f.name in names_of(Shape, Heads) and then != now:
            raise ValueError(f"{f.name}={now}: the run in {path} has {then}; a resumed run keeps its shape")
        if f.name in config and then != now and f.name not in ("init_from", "eval_only"):
            note(f"resuming with {f.name}={shown(now)}, was {shown(then)}")
    if not s.eval_only:
        check_data(checkpoint, path, s)


def fingerprints(s: Settings) -> dict[str, str]:
    """{file: its size and checksum}, of what a run reads of its data set; {} where there is no data set."""
    folder = vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size)
    names = ("train.bin", "train.mask.bin", "val.bin", "val.mask.bin", "tokenizer.bin", TOKENIZER)
    paths = [folder / name for name in names] + sorted(folder.glob("data*.bin"))  # the last are llama2.c's shards
    return {path.name: fingerprint(path) for path in paths if path.exists()}


def check_data(checkpoint: dict, path: Path, s: Settings) -> None:
    """Refuse to go on with other data than the run began with, unless allow_other_data says so."""
    then, now = checkpoint.get("data"), fingerprints(s)
    if not isinstance(then, dict):
        note(f"{path}: has no checksums of its data; expected {s.dataset} to be what it was trained on")
        return
    for name in sorted({*then, *now}):  # a file may have gone as well as changed
        before, found = (shown(files.get(name, "no such file")) for files in (then, now))
        if before == found:
            continue
        difference = f"{name} of {s.dataset} is not the run's: expected {before}, found {found}"
        if not s.allow_other_data:
            raise ValueError(f"{path}: {difference}; put it back, or add --allow_other_data")
        note(f"resuming although {difference}")
        if name.startswith(("val.", "data00.")):
            checkpoint["best_val_ntp"] = math.inf  # of other rows: the next evaluation is the best so far


def take_shape(checkpoint: dict, path: Path, s: Settings) -> None:
    """Give the run the trunk of a checkpoint: its shape goes into `s`, heads of another kind are left out."""
    theirs, ours = model_args_of(checkpoint, path), shape_of(s)
    drop_other_heads(checkpoint, theirs, s)
    ours_to_choose = {"max_seq_len", "multiple_of"}
    if s.recurrence > 1:
        ours_to_choose |= {"recurrence", "prelude_layers", "coda_layers"}
    for name in sorted(names_of(Shape) - ours_to_choose):
        then, now = getattr(theirs, name), getattr(ours, name)
        setattr(s, name, then)
        if then != now:
            note(f"{name}={then}, from {path}")
    folder = vocab_folder(Path(s.data_dir) / s.dataset, s.vocab_size)
    if has_another_vocabulary(path, checkpoint, s.vocab_size, folder):
        note(f"{path}: its {s.vocab_size} tokens are not those of {folder}: what it has learnt of them is lost")


def drop_other_heads(checkpoint: dict, theirs: ModelArgs, s: Settings) -> None:
    """Drop heads of another type from a checkpoint; their tensors may have the same names."""
    config = checkpoint["config"] if isinstance(checkpoint.get("config"), dict) else {}
    other = []
    if (theirs.head, theirs.head_input) != (s.head, s.head_input):
        other.append("future_heads.")
    if any(config.get(name) != getattr(s, name) for name in ("spelling_letters", "spelling_case")):
        other.append("spelling_heads.")
    checkpoint["model"] = {name: t for name, t in checkpoint["model"].items() if not name.startswith(tuple(other))}


# ---------------------------------------------------------------------------------------------
# saving and resuming

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


def restore(checkpoint: dict, path: Path, run) -> Progress:
    """Put everything but the weights back as it was saved; returns how far the run had come. Errors: ValueError."""
    if not 0 <= checkpoint["iter_num"] <= run.s.max_iters:
        raise ValueError(f"{path}: the run is at iteration {checkpoint['iter_num']}; expected one from 0 to "
                         f"max_iters={run.s.max_iters}")
    ours = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    try:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty unless the run was float16
            run.scaler.load_state_dict(checkpoint["scaler"])
        restore_rng(checkpoint["rng"], run.machine)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its optimizer or random state does not fit this run: {error!r}") from error
    for group, options in zip(run.optimizer.param_groups, ours, strict=True):
        group.update(options)  # weight_decay and betas are this run's, not the checkpoint's
    tables = checkpoint.get("objective")
    for name, table in run.objective.named_buffers(recurse=False):  # soft targets, as of their last refresh
        last = tables.get(name) if isinstance(tables, dict) else None
        if isinstance(last, torch.Tensor) and last.shape == table.shape:
            table.copy_(last)
        else:
            note(f"{path}: has no {name} for soft_neighbours={run.s.soft_neighbours}: made anew")
    compiled = checkpoint.get("compile_seconds")  # older checkpoints have none
    return Progress(*(checkpoint[k] for k in ("iter_num", "best_val_ntp", "seconds", "tokens")),
                    compiled if isinstance(compiled, float) else 0.0, checkpoint.get("wandb_id"), fingerprints(run.s))


def save(file_names: list[str], run, progress: Progress) -> None:
    """Write the run to these files of its out_dir; all processes must call this, the first one writes."""
    rng = rng_states(run.machine)
    if run.machine.rank > 0:
        return
    model = run.objective.model
    content = {"model": model.state_dict(), "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
               "model_args": model.args.as_dict(), "config": asdict(run.s),
               "objective": dict(run.objective.named_buffers(recurse=False)), "rng": rng} | asdict(progress)
    buffer = io.BytesIO()  # torch.save straight to a full disk would not say that the disk is full
    torch.save(content, buffer)
    for name in file_names:
        with atomic_write(Path(run.s.out_dir) / name) as f:
            f.write(buffer.getbuffer())
