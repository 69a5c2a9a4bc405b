"""The device that a script computes on, and the memory it used."""

import ctypes
import os
import re
import sys
from contextlib import suppress

import torch

# glibc's mallopt: its numbers of the options, and what they are set to [bytes].
MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = (-3, 2**25), (-1, 2**30), (-2, 2**26)


def pick_device(name: str | None) -> torch.device:
    """Return the device of this name; None and auto are a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):  # torch knows more, such as meta.
        raise ValueError(f"--device must be cpu, cuda, cuda:<n> or mps, got {name}")
    try:
        return torch.empty(0, device=name).device
    # Without such a device torch raises RuntimeError, without CUDA also AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error


def peak_gb(device: torch.device) -> float:
    """Return the most memory used so far: a GPU's own, else the whole process's; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows.
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # Bytes on a Mac, else kilobytes.


def flush_denormals() -> None:
    """Let the CPU take numbers below 1e-38 for 0, in this thread and those that it starts from now.

    The gradients of samples that hardly show are that small, and a CPU computes with them a hundred
    times as slowly: they made runs of GCA-3D on puppets 1.6 times as long.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Let malloc keep what a step frees for the next one, instead of giving it back to the system.

    Else every tensor of a megabyte is zeroed anew, page by page: 5 to 10 % of a puppets run on a
    CPU, at the price of 4 % more memory. Blocks of more than 32 MB are still given back. Only glibc
    has this switch. MALLOC_... variables in the environment win.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(AttributeError, OSError, TypeError):  # Another C library, another system.
        for option in (MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD):
            ctypes.CDLL(None).mallopt(*option)
