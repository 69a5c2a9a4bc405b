"""Pictures: from files to images [B, 3, H, W] in [-1, 1], and back to grids and animations."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps

from harness.store import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

GRID_COLUMNS = 8


REFERENCE_SIZE = 512  # Reference pictures are shrunk to this; CLIP looks at 224.
MOST_REFERENCES = 64  # The IP-Adapter attends to every one of them.
HEIF_ENDINGS = {".heic", ".heif"}


FRAME_MS = 33  # About 30 frames a second; WebP knows whole milliseconds.


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images [B, 3, H, W] in [-1, 1] into bytes [B, H, W, 3], rounded as EG3D does."""
    return (images * 127.5 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def to_image(picture: Image.Image) -> Tensor:
    """Turn an RGB picture into an image [1, 3, H, W] in [-1, 1]."""
    import torch  # Here, since options are read before torch is imported.

    pixels = torch.from_numpy(np.array(picture))  # [H, W, 3]
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def image_grid(rows: list[Tensor], columns: int = GRID_COLUMNS) -> Image.Image:
    """Put rows of images under each other, wrapped together after some columns.

    Args:
        rows: Each [N, 3, H, W] in [-1, 1]; what is in one column stays together.
        columns: Images side by side.
    """
    count, _, height, width = rows[0].shape
    columns = min(columns, count)
    wraps = -(-count // columns)
    grid = Image.new("RGB", (columns * width, wraps * len(rows) * height))
    for r, row in enumerate(rows):
        for i, pixels in enumerate(to_uint8(row)):
            wrap, column = divmod(i, columns)
            grid.paste(Image.fromarray(pixels), (column * width, (wrap * len(rows) + r) * height))
    return grid


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, completely or not at all."""
    atomic_write(path, lambda file: image.save(file, format="PNG"))


def save_pictures(pictures: Iterable[Image.Image], path: Path) -> None:
    """Write PNGs as <path>, <path stem>-2.png, <path stem>-3.png, ..."""
    for number, picture in enumerate(pictures, 1):
        name = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        save_image(picture, name)


def save_video(frames: list[Image.Image], path: Path) -> None:
    """Write an animated WebP that loops, completely or not at all."""
    options = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MS, "loop": 0}
    atomic_write(path, lambda file: frames[0].save(file, format="WEBP", quality=90, **options))


def find_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder and its subfolders, by name; hidden files are none.

    Raises:
        ValueError: there is no such folder, or it may not be read.
    """
    known = Image.registered_extensions().items()
    endings = {ending for ending, kind in known if kind in Image.OPEN} | HEIF_ENDINGS
    try:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from error
    # On disks of other systems macOS leaves a ._0.JPG next to each 0.JPG.
    parts = {path: path.relative_to(folder).parts for path in found}
    return [p for p in found if p.is_file() and not any(x.startswith(".") for x in parts[p])]


def read_pictures(paths: Iterable[Path]) -> list[Image.Image]:
    """Read pictures, and all pictures of folders.

    Raises:
        ValueError: one is missing or no picture, a folder holds none, or there are too many.
    """
    files = []
    for path in paths:
        files += find_pictures(path) if os.path.isdir(path) else [path]
        if not files or (os.path.isdir(path) and not find_pictures(path)):
            raise ValueError(f"{path}: no pictures in it")
    if len(files) > MOST_REFERENCES:
        raise ValueError(f"{len(files)} reference pictures, at most {MOST_REFERENCES} are taken")
    return [read_picture(path) for path in files]


def to_srgb(picture: Image.Image, path: Path) -> Image.Image:
    """Convert a picture with a colour profile of its own to sRGB; most have none.

    A profile that cannot be used is left out, with a warning.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    try:
        mode = "RGBA" if picture.mode in ("RGBA", "LA", "PA") else "RGB"
        if picture.mode in ("P", "PA", "1"):  # Palettes are in the profile's colours too.
            picture = picture.convert(mode)
        own = ImageCms.getOpenProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            picture, own, ImageCms.createProfile("sRGB"), outputMode=mode
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        warnings.warn(f"{path}: its colour profile is left out ({error})", stacklevel=2)
        return picture
    return converted or picture


def read_picture(path: Path) -> Image.Image:
    """Read any picture as an upright RGB square of at most 512 px.

    Transparency becomes white. The largest square is kept, from the middle of a wide picture and
    nearer to the top of a tall one, where a portrait has its face: bars would be seen as style.

    Raises:
        ValueError: the file is missing or no picture.
    """
    if path.suffix.lower() in HEIF_ENDINGS:
        _register_heif(path)
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    # Damaged pictures make Pillow's decoders raise nearly anything.
    except Exception as error:
        raise ValueError(f"{path}: no readable picture ({error})") from error

    if picture.mode.startswith(("I", "F")):  # Which convert() would clip instead of scale.
        values = np.asarray(picture, dtype=np.float64)
        tops = (65535,) if picture.mode.startswith("I;16") else (1, 255, 65535)
        top = next((top for top in tops if values.max() <= top), values.max())
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    picture = to_srgb(picture, path)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    side = min(*picture.size, REFERENCE_SIZE)
    return ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC, centering=(0.5, 0.25))


def _register_heif(path: Path) -> None:
    """Let Pillow read HEIC, as phones write it.

    Raises:
        ValueError: pillow-heif is not installed.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise ValueError(f"{path}: HEIC needs pillow-heif: pip install pillow-heif") from error
    register_heif_opener()
