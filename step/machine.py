"""Where and how a step is computed: the device, the processes, the type of matrix products, the path.

One device a process, any number of processes (torchrun's). The path is one of three ways through
the same mathematics: plain is PyTorch as it comes, compiled is that under torch.compile, fast is
kernels.py on a CPU.

What this leaves out on purpose: settings of what is learned; none here changes it beyond rounding.
"""

import importlib
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from step import kernels
from system.memory import machine_bytes
from system.streams import tell


def note(text: str) -> None:
    """Print a line on standard error, once however many processes there are."""
    if is_first():
        tell(text, sys.stderr)


def is_first() -> bool:
    """True in the only process, or in the first of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Machine:
    """Where this process computes and which of how many processes it is."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x summed over all processes."""
        if self.world > 1:
            x = x.to(self.device)
            dist.all_reduce(x)
        return x

    def sum_and_ask(self, x: torch.Tensor, stop: bool) -> tuple[torch.Tensor, Callable[[], int]]:
        """x (k,) int64 summed over all processes, and how many of them say `stop`: both in one collective.

        The second is a function. Called a step later, it does not wait for the work queued since.
        """
        if self.world == 1:
            return x, lambda: int(stop)
        *_, stops = x = self.sum(torch.cat([x, x.new_full((1,), stop)]))
        if self.device.type != "cuda":
            return x[:-1], stops.item
        copy, copied = stops.to("cpu", non_blocking=True), torch.Event(self.device)
        copied.record()

        def read() -> int:
            copied.synchronize()  # so long ago that it is done
            return copy.item()

        return x[:-1], read

    def read(self, x: torch.Tensor) -> list:
        """The numbers in x. Waits for the device and all that it was given: a training step does so only to be logged.
        """
        return x.tolist()

    def memory_bytes(self) -> int | None:
        """Memory of the device; None where that is not known."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return machine_bytes()  # mps shares it with the processor

    def free_bytes(self) -> int | None:
        """Free memory, the least that any process has; None where none is set aside for the device."""
        if self.device.type != "cuda":
            return None
        free = torch.tensor(torch.cuda.mem_get_info(self.device)[0], device=self.device)
        if self.world > 1:
            dist.all_reduce(free, dist.ReduceOp.MIN)
        return free.item()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next counts its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def peak_mib(self) -> float:
        """This process's peak memory so far on its device, in MiB; 0 where that is not reported."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return memory("VmHWM") if self.device.type == "cpu" else 0.0

    def facts(self, path: "StepPath") -> dict:
        """What the log reports about where and how a run is computed."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        return {"device": self.device.type, "device_name": name, "processes": self.world,
                "threads": torch.get_num_threads(), "cores": cores, "path": path.kind,
                "dtype": str(path.dtype).removeprefix("torch."), "torch": torch.__version__}

    def put(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Copies on the device, unless they are there; from pinned memory and without waiting where that helps."""
        if self.device.type == "cuda":
            return [t if t.is_cuda else t.pin_memory().to(self.device, non_blocking=True) for t in tensors]
        return [t.to(self.device) for t in tensors]


def memory(what: str) -> float:
    """This process's memory in MiB: VmRSS: now, VmHWM: the peak; 0 where the system does not report it."""
    status = Path("/proc/self/status")
    found = re.search(what + r":\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) / 1024 if found else 0.0


def processor() -> str:
    """The name of the CPU."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> str:
    """This machine in a line, for tables of measurements."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}"


def find_machine(wanted: str) -> Machine:
    """The device called `wanted`, and torchrun's process group if there is one. Errors: ValueError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if wanted == "auto":
        mps = torch.backends.mps.is_available() and world == 1  # several processes need gloo, which has no mps
        wanted = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if wanted.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device={wanted}: expected auto, cpu, cuda, cuda:N or mps")
    try:
        device = torch.device(wanted)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if world > 1 else device.index or 0)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # synchronize and random numbers mean the current device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(f"device={wanted}: not on this machine: {reason}") from error
    if world > 1:
        # DDP imports it, and if there is a group by then it keeps the group, with gloo's threads, past
        # destroy_process_group. One that wants the interpreter's lock while the interpreter ends aborts the process.
        importlib.import_module("torch._dynamo")
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # machines of several count their restarts apart
            # torchrun keeps its store over restarts: without this, processes would find addresses of ones that are gone
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return Machine(device, rank, world)


def lost_a_process(error: Exception) -> bool:
    """True for what torch.distributed raises when another process has died or does not answer."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def out_of_memory(error: Exception) -> bool:
    """True for an allocation that failed, on any device."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


@dataclass
class StepPath:
    """How a step is computed, and why."""

    kind: str  # plain, compiled or fast
    dtype: torch.dtype  # of matrix products
    device: torch.device
    why: str

    @property
    def fast(self) -> bool:
        return self.kind == "fast"

    def autocast(self):
        """The context in which a model and its losses run."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.kind} ({self.why}), products in {str(self.dtype).removeprefix('torch.')}"


def choose_path(s, device: torch.device) -> StepPath:
    """The one place that decides; s: path, dtype, compile. Errors: ValueError if path=fast is impossible here."""
    dtype = getattr(torch, s.dtype) if s.dtype != "auto" else torch.bfloat16 if has_bfloat16(device) else torch.float32
    otherwise = "compiled" if s.compile else "plain"
    if s.path == "plain":
        return StepPath(otherwise, dtype, device, "asked for")
    if s.path == "fast" and s.compile:
        raise ValueError("path=fast: is not compiled; take away compile, or path")
    obstacle = (f"kernels.c is for the CPU, this is {device.type}" if device.type != "cpu" else
                "kernels.c has no float16" if dtype == torch.float16 else "")
    if not obstacle:
        try:
            threads = "" if kernels.library().threads else ", one thread: this compiler has no OpenMP"
            compiled = ", in place of compile" if s.compile else ""
            return StepPath("fast", dtype, device, f"kernels.c{compiled}{threads}")
        except ValueError as error:
            obstacle = str(error)
    if s.path == "fast":
        raise ValueError(f"path=fast: {obstacle}")
    return StepPath(otherwise, dtype, device, obstacle)


def has_bfloat16(device: torch.device) -> bool:
    """True if the device multiplies bfloat16 matrices in hardware, and so faster than float32."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()  # bf16: ARM's
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
