"""What a call costs: seconds, floating-point operations, memory; and on which machine."""

import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from harness.run_folder import REPOSITORY


def stopwatch(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the seconds of a call by the clock, and of all its threads on CPUs."""
    finish(device)
    began = time.perf_counter(), time.process_time()
    call()
    finish(device)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def finish(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def count(call: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Return the GFLOP of a call, and the most memory [GB] it adds; None where it is not known."""
    with Operations() as operations:
        if device.type == "cpu":
            peak = cpu_peak(call)
        elif device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call()
            peak = torch.cuda.max_memory_allocated(device) - held
        else:
            call()
            peak = None
    return operations.flops / 1e9, None if peak is None else peak / 1e9


def cpu_peak(call: Callable[[], object]) -> int:
    """Return the most bytes that torch's allocations in a call add up to at any moment.

    The process's own size would tell little: malloc keeps what was freed for the next part.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # The profiler would announce itself.
    with profile(profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


class Operations(TorchDispatchMode):
    """Count floating-point operations by torch's formulas.

    FlopCounterMode has the same formulas, but cannot watch `autograd.grad`, and counts no
    attention on a CPU (torch 2.13).
    """

    formulas = flop_registry | {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *given, **_: (
            sdpa_flop_count(*(x.shape for x in given[:3]))
        ),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *given, **_: sdpa_backward_flop_count(*(x.shape for x in given[:4]))
        ),
    }

    def __init__(self) -> None:
        """Start the count."""
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Do what torch was about to do, and add its operations."""
        kwargs = kwargs or {}
        formula = self.formulas.get(func.overloadpacket)
        if formula is None:
            with self:  # Inference mode shows operations before they are taken apart.
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=out)
        return out


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return this repository's commit, with -dirty if files differ from it, or None."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
