"""Files that are written completely or not at all, and checksums of what is in them."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def checksum(*parts: bytes | memoryview) -> str:
    """Return a checksum of bytes, the same however they are cut into parts."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"crc32 {crc:08x}"


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, completely or not at all."""
    atomic_write(path, lambda file: file.write(content))


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, completely or not at all."""
    write_bytes(path, text.encode())


def check_replaced(path: Path, *kinds: str) -> None:
    """Refuse to replace a .safetensors that holds something else than what is written.

    Args:
        path: The file, which need not exist.
        kinds: What it may hold, such as latents: its header's format begins so.

    Raises:
        ValueError: it holds something else, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return
    try:
        with safe_open(path, "np") as file:
            held = (file.metadata() or {}).get("format", "")
    except (SafetensorError, OSError):
        held = ""
    if held.removesuffix("-safetensors") not in kinds:
        raise ValueError(f"--out {path} holds no {kinds[0]}, and would be lost: name another file")


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at any moment `path` is the old content or the new, never a part.

    Args:
        path: The file; its folder exists.
        write: Called with a binary file to write the content to.

    Raises:
        OSError: naming the file, such as one for which the disk has no space.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save ends with a RuntimeError of its own ("unexpected pos") where the disk is full.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and cause.errno:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
