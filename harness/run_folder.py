"""Run folders: what is in them, who may write, and whose they are.

A run folder holds config.json (what the run was made with), log.jsonl (a row per step),
grid-<step>.png, reference.png (if a picture was given), ckpt-<step>.pt, generator.safetensors and
index.html, which shows all that.
"""

import getpass
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout

from harness.download import HUB_ID, MIRRORS
from harness.store import checksum, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
AVATAR = "avatar.safetensors"  # In a folder of avatar.py: a generator of one head.
RUN_FILES = (
    "config.json",
    "log.jsonl",
    "reference*.png",
    "grid-*.png",
    "ckpt-*.pt",
    "generator.safetensors",
    "index.html",
)
# Settings that may differ between a run and its resume. What pictures show is compared, not where
# they are.
FREE_TO_CHANGE = {"out", "image", "device", "save_every", "grid_every", "dry_run"}
# These make a run slower or faster; its gradients are the same, to rounding.
FREE_TO_CHANGE |= {"micro_batch", "low_memory", "compile"}
# Settings that scripts read back from config.json, and the types they may have.
SETTINGS_READ = {
    "prompt": (str, type(None)),
    "image": (str, list, type(None)),
    "method": str,
    "generator": str,
    "diffusion": str,
    "clip": str,
    "steps": int,
    "seed": int,
    "trunc": (int, float),
}


@contextmanager
def sole_writer(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes of this user and machine from the same path, until this block ends.

    Args:
        path: A run folder, or a file of results.
        wait: Whether to wait for a process that is at work on it.

    Raises:
        ValueError: another process is at work on it.
    """
    name = checksum(os.fsencode(path.resolve())).replace(" ", "-") + ".lock"
    folder = Path(tempfile.gettempdir(), f"gca3d-locks-{getattr(os, 'getuid', getpass.getuser)()}")
    folder.mkdir(exist_ok=True)
    try:
        # The system drops the lock with the process, also when that is killed.
        with FileLock(folder / name, timeout=-1 if wait else 0):
            yield
    except Timeout as error:
        raise ValueError(f"--out {path}: another process is training there") from error


def portable(source: str) -> str:
    """Name a local file or folder so that it is found again from any working directory.

    The repository's own files are named relative to it, so that run folders can be moved with it
    to another machine; other files get their absolute path; hub ids and URLs stay.
    """
    path = Path(source).resolve()
    # os.path takes names that are too long for the system, where Path raises.
    if not source or not os.path.exists(path):
        return source
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


def locate(source: str) -> str:
    """Return the path, hub id or URL that `portable` named."""
    path = REPOSITORY / source
    return str(path) if os.path.exists(path) else source


def check_source(flag: str, source: str) -> None:
    """Refuse a path at which nothing is; hub ids and URLs are looked up when they are loaded.

    Raises:
        ValueError: naming the flag and the path.
    """
    path = locate(source)
    if os.path.exists(path):
        return
    # In a folder that exists here, a missing file is a slip and no hub id.
    elsewhere = re.match(rf"https?://|{HUB_ID}(/|$)", source, re.IGNORECASE)
    if not elsewhere or os.path.isdir(os.path.dirname(path)):
        hint = f". {MIRRORS}" if source.endswith(".pkl") else ""
        raise ValueError(f"{flag} {source[:300]}: no such file or folder, and no hub id{hint}")


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

    `image` is a list of names: none, the one that older runs name, or several.

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
    image = settings["image"]
    if image is None or isinstance(image, str):
        image = [image] if image else []
    if not all(isinstance(name, str) for name in image):
        raise ValueError(f"{path} was not written by train.py: no usable 'image' in it")
    return settings | {"image": image}


def check_run(folder: Path, settings: dict, usual: Mapping = MappingProxyType({})) -> None:
    """Refuse a run folder that was made with other settings.

    Args:
        folder: The run folder, which need not exist.
        settings: What the run is to be made with, as JSON knows it.
        usual: Settings that options have which a folder knows nothing of, since they came later.

    Raises:
        ValueError: naming the settings that differ, or another program's files in the way.
    """
    if not (folder / "config.json").exists():
        found = sorted(path.name for name in RUN_FILES for path in folder.glob(name))
        if found:
            raise ValueError(f"--out {folder} is no run, and its {', '.join(found)} would be lost")
        # Hidden files do not count, such as .DS_Store or what a kill left of config.json; except
        # where a slip leads, such as an unset variable in --out "$RUN" or --out ~/$RUN.
        others = sorted(path.name for path in folder.glob("*"))
        if not any(x.resolve().is_relative_to(folder.resolve()) for x in (Path(), Path.home())):
            others = [name for name in others if not name.startswith(".")]
        if others:
            some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise ValueError(
                f"--out {folder.absolute()} is no run and not empty (it holds {some}): name a new "
                "folder, and a run's files will not get mixed up with others"
            )
        return
    then = {**usual, **read_settings(folder)}
    for name, value in usual.items():
        if isinstance(value, dict) and isinstance(then[name], dict):
            then[name] = value | then[name]
    changed = [
        key for key in settings if key not in FREE_TO_CHANGE and settings[key] != then.get(key)
    ]
    if changed:
        differences = ", ".join(f"{key} ({then.get(key)}, now {settings[key]})" for key in changed)
        raise ValueError(
            f"{folder} was started with another {differences}: name another folder with --out"
        )


def claim_run(folder: Path, settings: dict, usual: Mapping = MappingProxyType({})) -> None:
    """Make a run folder and note its settings, or take over one that was made with them.

    Raises:
        ValueError: see `check_run`; or the folder cannot be made.
    """
    check_run(folder, settings, usual)
    make_folder(folder)
    remove_leftovers(folder)
    text = json.dumps(settings, indent=2) + "\n"
    write_text(folder / "config.json", text)


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill in the middle of an `atomic_write` left of a run's files."""
    for name in RUN_FILES:
        for temporary in folder.glob(f".{name}.tmp"):
            temporary.unlink()


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's log.jsonl, without one that a kill cut off; none without a log.

    Raises:
        ValueError: the log is another program's.
    """
    path = folder / "log.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        # Fails where a row has no such number.
        sum(row["step"] + row["seconds"] + row.get("peak_gb", 0) for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} was not written by train.py ({error})") from error
    return rows


def trim_log(folder: Path, step: int) -> None:
    """Drop the rows of log.jsonl that follow a step, and what a kill left of a row."""
    kept = [json.dumps(row) + "\n" for row in read_log(folder) if row["step"] <= step]
    write_text(folder / "log.jsonl", "".join(kept))


def grid_path(folder: Path, step: int) -> Path:
    """Return where a step's grid is."""
    return folder / f"grid-{step:06d}.png"


def is_finished(folder: Path, steps: int, state: dict | None) -> bool:
    """Return whether a run, by its newest checkpoint, has taken all steps and has its results."""
    results = (folder / "generator.safetensors", grid_path(folder, steps))
    return bool(state and state["step"] == steps and all(path.exists() for path in results))


def print_result(folder: Path, steps: int) -> None:
    """Say where the result of a finished run is, and what to do with it."""
    out = shlex.quote(str(folder))
    print(f"{folder} is finished after {steps} steps.")
    print(f"  generator  {folder / 'generator.safetensors'}")
    print(f"  grid       {grid_path(folder, steps)}")
    print(f"  page       {folder / 'index.html'}")
    print(f"  render     python render.py --ckpt {out} --seeds 0-7 --out {out}/renders")
    print("  resume     the same command, if a run was stopped; new settings want another --out")
