"""Pictures: from files to images [B, 3, H, W] in [-1, 1], and back to grids and animations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from harness.store import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

GRID_COLUMNS = 8


REFERENCE_SIZE = 512  # Reference pictures are shrunk to this; CLIP looks at 224.


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


def read_pictures(paths: Iterable[Path]) -> list[Image.Image]:
    """Read pictures, and all pictures of folders.

    Raises:
        ValueError: one is missing or no picture.
    """
    return [read_picture(path) for path in paths]


def read_picture(path: Path) -> Image.Image:
    """Read any picture as an upright RGB square of at most 512 px.

    Transparency becomes white. The largest square is kept, from the middle of a wide picture and
    nearer to the top of a tall one, where a portrait has its face: bars would be seen as style.

    Raises:
        ValueError: the file is missing or no picture.
    """
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
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    side = min(*picture.size, REFERENCE_SIZE)
    return ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC, centering=(0.5, 0.25))
