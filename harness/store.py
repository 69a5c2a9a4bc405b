"""Files that are written completely or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, completely or not at all."""
    atomic_write(path, lambda file: file.write(text.encode()))


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at any moment `path` is the old content or the new, never a part.

    Args:
        path: The file; its folder exists.
        write: Called with a binary file to write the content to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
