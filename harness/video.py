"""Videos: H.264 in .mp4 where PyAV is installed, otherwise animations in .webp that loop."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from harness.pictures import SOFTWARE
from harness.store import atomic_write

SOFTWARE_TAG = 0x0131  # Of EXIF.
ENDINGS = (".mp4", ".webp")
FRAMES_A_SECOND = 30
FRAME_MS = 33  # WebP knows whole milliseconds.
QUALITY = "18"  # H.264's constant rate factor: hardly to be told from the frames.
MOST_FRAMES = {".mp4": 36_000, ".webp": 360}  # Pillow holds them all: 2.3 GB for pairs of 1024 px.


def ending() -> str:
    """Return how the files of videos end: .mp4 where PyAV is installed, otherwise .webp."""
    return ".mp4" if find_spec("av") else ".webp"


def hint() -> None:
    """Say how to get mp4, if there is none."""
    if ending() != ".mp4":
        print("hint: videos are .webp; for .mp4: pip install av", file=sys.stderr)


def save_video(frames: Iterable[Image.Image], path: Path) -> None:
    """Write a video that `is_our_video` will know, completely or not at all.

    Args:
        frames: RGB pictures of one size. Those of an .mp4 are taken one by one.
        path: Its ending says what is written.
    """
    write = _write_mp4 if path.suffix == ".mp4" else _write_webp
    atomic_write(path, lambda file: write(frames, file))


def is_our_video(path: Path) -> bool:
    """Return whether a file is a video that `save_video` wrote.

    Without PyAV no .mp4 is known.
    """
    try:
        if path.suffix == ".mp4":
            return _comment(path) == SOFTWARE
        with Image.open(path) as picture:
            return picture.getexif().get(SOFTWARE_TAG) == SOFTWARE
    # Missing, no video, damaged (Pillow's SyntaxError), or too large.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _comment(path: Path) -> str | None:
    """Return the comment in an .mp4, None if there is none or PyAV, which reads it, is missing."""
    try:
        import av
    except ImportError:
        return None
    try:
        with av.open(path) as container:
            return container.metadata.get("comment")
    except av.FFmpegError:
        return None


def _write_webp(frames: Iterable[Image.Image], file: BinaryIO) -> None:
    first, *others = frames
    exif = Image.Exif()
    exif[SOFTWARE_TAG] = SOFTWARE
    options = {"save_all": True, "append_images": others, "duration": FRAME_MS, "loop": 0}
    first.save(file, format="WEBP", quality=90, exif=exif, **options)


def _write_mp4(frames: Iterable[Image.Image], file: BinaryIO) -> None:
    import av

    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = SOFTWARE
        stream = container.add_stream("libx264", rate=FRAMES_A_SECOND, options={"crf": QUALITY})
        stream.pix_fmt = "yuv420p"  # The only one that browsers play.
        context = stream.codec_context  # Colours are BT.709's, and said to be.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(_even(picture), format="rgb24")
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
            frame = frame.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _even(picture: Image.Image) -> np.ndarray:
    """Return pixels [H, W, 3]; an odd last row or column stands twice, since H.264 pairs them."""
    pixels = np.asarray(picture.convert("RGB"))
    height, width, _ = pixels.shape
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
