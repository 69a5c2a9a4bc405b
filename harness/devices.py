"""The device that a script computes on, and the memory it used."""

import re
import sys

import torch


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
