"""Pictures: from files to images [B, 3, H, W] in [-1, 1], and back to grids."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from harness.store import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

GRID_COLUMNS = 8
REFERENCE_SIZE = 512  # Reference pictures are shrunk to this; CLIP looks at 224.
MOST_REFERENCES = 64  # The IP-Adapter attends to every one of them.
ORIENTATION = 0x0112  # In EXIF; 5 and above lie on their sides.
SOFTWARE = "GCA-3D"  # Stands in every picture and video that these scripts write.
# Formats that Pillow can name but not always read: data, videos, and what needs other programs.
NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF"}
HEIF_ENDINGS = {".heic", ".heif", ".avif"}  # Phones' formats.
# Colour spaces of profiles, and the mode of the pictures that they describe.
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


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
    """Write a PNG that `is_ours` will know, completely or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", SOFTWARE)
    atomic_write(path, lambda file: image.save(file, format="PNG", pnginfo=info))


def is_ours(path: Path) -> bool:
    """Return whether a file is a PNG that one of these scripts wrote."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, Image.DecompressionBombError):  # Missing, no picture, or too large.
        return False


def save_pictures(pictures: Iterable[Image.Image], path: Path) -> None:
    """Write PNGs as <path>, <path stem>-2.png, <path stem>-3.png, ..."""
    for number, picture in enumerate(pictures, 1):
        name = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        save_image(picture, name)


def find_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder and its subfolders, by name; hidden files do not count.

    Raises:
        ValueError: there is no such folder, or it may not be read.
    """
    kinds = Image.registered_extensions().items()
    endings = {end for end, kind in kinds if kind in Image.OPEN and kind not in NO_PICTURES}
    endings |= HEIF_ENDINGS
    try:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        next(folder.iterdir(), None)  # Fails where reading is not allowed; rglob finds nothing.
        paths = [path for path in folder.rglob("*") if path.suffix.lower() in endings]
        # On disks of other systems macOS leaves a ._0.JPG next to each 0.JPG.
        hidden = {p for p in paths if any(x[0] == "." for x in p.relative_to(folder).parts)}
        return sorted(path for path in paths if path not in hidden and path.is_file())
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from error


def read_pictures(paths: Iterable[Path]) -> list[Image.Image]:
    """Read pictures, and all pictures of folders.

    Raises:
        ValueError: one is missing or no picture, a folder holds none, or there are too many.
    """
    files: list[Path] = []
    for path in paths:
        found = find_pictures(path) if os.path.isdir(path) else [path]
        if not found:
            raise ValueError(f"{path}: no pictures in this folder")
        files += found
    if len(files) > MOST_REFERENCES:
        raise ValueError(
            f"{len(files)} reference pictures, of which the prior would attend to every one at "
            f"every step: give at most {MOST_REFERENCES}"
        )
    return [read_picture(path) for path in files]


def upright_size(path: Path) -> tuple[int, int]:
    """Return the width and height of a picture as it is seen, pixels; see `read_picture`."""
    with _open(path) as file:
        turned = file.getexif().get(ORIENTATION, 1) >= 5
        return file.size[::-1] if turned else file.size


def read_picture(path: Path, most: int = REFERENCE_SIZE, alpha: bool = False) -> Image.Image:
    """Read any picture as an upright RGB square, in sRGB.

    Transparency becomes white. The largest square is kept, from the middle of a wide picture and
    nearer to the top of a tall one, where a portrait has its face: bars would be seen as style.

    Args:
        path: The file.
        most: Height and width of the largest result; larger ones are shrunk to it.
        alpha: Show what is opaque as white and the rest as black, where there is transparency.

    Raises:
        ValueError: the file is missing or no picture.
    """
    try:
        with _open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    # Damaged pictures make Pillow's decoders raise nearly anything.
    except Exception as error:
        raise ValueError(f"{path}: no readable picture ({error})") from error

    if picture.mode.startswith(("I", "F")):  # Which convert() would clip instead of scale.
        values, info = np.asarray(picture, dtype=np.float64), picture.info
        tops = (65535,) if picture.mode.startswith("I;16") else (1, 255, 65535)
        top = next((top for top in tops if values.max() <= top), values.max())
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
        picture.info = {"icc_profile": info.get("icc_profile")}
    picture = to_srgb(picture, path)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if alpha:
            picture = Image.merge("RGBA", [picture.getchannel("A")] * 4)
            picture.putalpha(255)
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    side = min(*picture.size, most)
    return ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC, centering=(0.5, 0.25))


def to_srgb(picture: Image.Image, path: Path) -> Image.Image:
    """Convert a picture that has a colour profile to sRGB, and drop the profile.

    If it stayed, a copy that is written and read again would be converted twice. One that cannot
    be used is dropped with a warning.
    """
    profile = picture.info.pop("icc_profile", None)
    if not profile:
        return picture
    opaque = not picture.has_transparency_data
    whole = picture if opaque else picture.convert("RGBA")
    of_picture = {"1": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, picture.mode)
    of_picture = of_picture if of_picture in ("L", "CMYK") else "RGB"
    try:
        own = ImageCms.getOpenProfile(io.BytesIO(profile))
        mode = PROFILE_MODES.get(own.profile.xcolor_space.strip())
        if mode != of_picture and (mode, of_picture) != ("RGB", "L"):
            raise ValueError(f"made for {own.profile.xcolor_space.strip()}, not {picture.mode}")
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(whole.convert(mode), own, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        print(f"warning: {path}: its colour profile is left out ({error})", file=sys.stderr)
        return picture
    converted.info.pop("icc_profile", None)
    if not opaque:
        converted.putalpha(whole.getchannel("A"))
    return converted


def _open(path: Path) -> Image.Image:
    """Open a picture, also one as phones write them if pillow-heif is installed.

    Raises:
        ValueError: it is such a picture, and cannot be read without pillow-heif.
    """
    try:
        return Image.open(path)
    except Image.UnidentifiedImageError as error:
        with open(path, "rb") as file:
            start = file.read(12)
        if start[4:8] != b"ftyp":  # As all files of this family begin, after a length.
            raise
        try:
            import pillow_heif
        except ImportError:
            raise ValueError("HEIC needs pillow-heif: pip install pillow-heif") from error
        pillow_heif.register_heif_opener()
        return Image.open(path)
