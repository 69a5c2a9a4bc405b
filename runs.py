"""Run folders and command lines: what train.py, render.py and eval.py have in common.

A run folder holds config.json (what the run was made with), log.jsonl (a row per step),
grid-<step>.png, reference.png (if a picture was given), and what models/checkpoint.py writes.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import tyro

from models.checkpoint import atomic_write

REPOSITORY = Path(__file__).resolve().parent
RUN_FILES = (
    "config.json",
    "log.jsonl",
    "reference.png",
    "grid-*.png",
    "ckpt-*.pt",
    "generator.safetensors",
)
# Settings that scripts read back from config.json, and the types they may have.
TEXT, MAYBE_TEXT = (str,), (str, type(None))
SETTINGS_READ = {
    "prompt": MAYBE_TEXT,
    "image": MAYBE_TEXT,
    "method": TEXT,
    "generator": TEXT,
    "clip": TEXT,
}


def run_cli(config: type, main: Callable, description: str) -> None:
    """Parse the command line and call `main`; what a user can mend becomes one line, no traceback.

    Exit codes: 2 for options that cannot be used, 1 for a run that failed, 130 after Ctrl+C.
    """
    try:
        main(tyro.cli(config, description=description))
    except (ValueError, FloatingPointError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def options_settled() -> Iterator[None]:
    """Mark the part of a script where a ValueError is no option's fault: it keeps its traceback."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError("a bug, since every option had been checked") from error


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl+C and SIGTERM in a list, to be read between two steps; a second one kills."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[number])
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pick_device(name: str | None) -> torch.device:
    """Return the device of this name; None is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):  # torch knows more, such as meta.
        raise ValueError(f"--device must be cpu, cuda, cuda:<n> or mps, got {name}")
    try:
        return torch.empty(0, device=name).device
    # Without such a device torch raises RuntimeError, without CUDA also AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from error


def portable(source: str) -> str:
    """Name a local file or folder so that it is found again from any working directory.

    The repository's own files are named relative to it, so that run folders can be moved with it
    to another machine; other files get their absolute path; hub ids and URLs stay.
    """
    path = Path(source).resolve()
    if not os.path.exists(path):  # False for names too long for the system; Path raises.
        return source
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


def locate(source: str) -> str:
    """Return the path, hub id or URL that `portable` named."""
    path = REPOSITORY / source
    return str(path) if os.path.exists(path) else source


def check_folder(folder: Path) -> None:
    """Refuse a folder for results that cannot be made or written to, without making it.

    Raises:
        ValueError: the path names or leads through a file, or may not be written.
    """
    try:
        candidates = (folder, *folder.absolute().parents)
        nearest = next(path for path in candidates if path.exists() or path.is_symlink())
    except OSError as error:
        raise ValueError(f"--out {folder}: {error.strerror}") from error
    if not nearest.is_dir():
        raise ValueError(f"--out {folder}: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: no permission to write in {nearest}")


def make_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        ValueError: the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: {error.strerror}") from error


def read_settings(folder: Path) -> dict:
    """Return a run's config.json, with at least the settings of `SETTINGS_READ`.

    Raises:
        ValueError: it cannot be read, or is another program's.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} was not written by train.py")
    for name, types in SETTINGS_READ.items():
        if not isinstance(settings.get(name, ...), types):
            raise ValueError(f"{path} was not written by train.py: no usable {name!r} in it")
    return settings


def check_run(folder: Path, settings: dict, free: set[str]) -> None:
    """Refuse a run folder that was made with other settings.

    Args:
        folder: The run folder, which need not exist.
        settings: What the run is to be made with, as JSON knows it.
        free: Settings that may change between a run and its resume.

    Raises:
        ValueError: naming the settings that differ.
    """
    if not (folder / "config.json").exists():
        if any(folder.glob("ckpt-*.pt")):
            raise ValueError(f"--out {folder} holds checkpoints of a run but no config.json")
        return
    then = read_settings(folder)
    changed = [key for key in settings if key not in free and settings[key] != then.get(key)]
    if changed:
        differences = ", ".join(f"{key} ({then.get(key)}, now {settings[key]})" for key in changed)
        raise ValueError(f"--out {folder} was started with another {differences}")


def claim_run(folder: Path, settings: dict, free: set[str]) -> None:
    """Make a run folder and note its settings, or take over one that was made with them.

    Raises:
        ValueError: see `check_run`; or the folder cannot be made.
    """
    check_run(folder, settings, free)
    make_folder(folder)
    remove_leftovers(folder)
    text = json.dumps(settings, indent=2) + "\n"
    atomic_write(folder / "config.json", lambda file: file.write(text.encode()))


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill in the middle of an `atomic_write` left of a run's files."""
    for name in RUN_FILES:
        for temporary in folder.glob(f".{name}.tmp"):
            temporary.unlink()


def trim_log(folder: Path, step: int) -> None:
    """Drop the rows of log.jsonl that follow a step, and what a kill left of a row."""
    path = folder / "log.jsonl"
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
    atomic_write(path, lambda file: file.write("".join(kept).encode()))
