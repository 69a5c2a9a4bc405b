"""Training states on disk, written so that a kill never destroys what was there.

A run folder keeps the newest two ckpt-<step>.pt.
"""

import re
import sys
import zipfile
from pathlib import Path

import torch

from harness.store import atomic_write

KEPT_CHECKPOINTS = 2  # One more than a resume needs, should the newest prove unreadable.


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write a training state as `<run>/ckpt-<step>.pt`, and delete all but the newest two.

    Args:
        path: Where to; the digits in its name are the step.
        state: Nested dicts and lists of tensors, numbers and strings; `step` is in it.
    """
    atomic_write(path, lambda file: torch.save(state, file))
    for old in _checkpoints(Path(path).parent)[KEPT_CHECKPOINTS:]:
        old.unlink()


def load_checkpoint(folder: str | Path) -> dict | None:
    """Return the newest training state of a run that can be read, tensors on the CPU, or None.

    A file that cannot be read, or whose bytes have changed, is passed over with a line on stderr.
    """
    for path in _checkpoints(Path(folder)):
        try:
            with zipfile.ZipFile(path) as parts:
                if damaged := parts.testzip():  # By the checksum of each part.
                    raise ValueError(f"bytes of {damaged} have changed")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not (isinstance(state, dict) and isinstance(state.get("step"), int)):
                raise ValueError("no training state")
            return state
        # Depending on where a file is cut, torch raises OSError, EOFError, RuntimeError, ...
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"warning: {path} is damaged ({reason})", file=sys.stderr)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Return a run's ckpt-<step>.pt, newest first."""
    steps = {p: re.fullmatch(r"ckpt-(\d+)\.pt", p.name) for p in folder.glob("ckpt-*.pt")}
    return sorted((p for p in steps if steps[p]), key=lambda p: int(steps[p][1]), reverse=True)
