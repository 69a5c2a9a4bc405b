"""Both formats of videos for tests, and a reader of their frames."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(params=[".mp4", ".webp"])
def ending(request, monkeypatch):
    """How videos end: with PyAV, and on a machine without it."""
    if request.param == ".mp4":
        pytest.importorskip("av")
    else:
        monkeypatch.setitem(sys.modules, "av", None)
    return request.param


def read_frames(path: Path) -> np.ndarray:
    """Return the frames of a video, bytes [N, H, W, 3]."""
    if path.suffix == ".mp4":
        import av

        with av.open(path) as container:
            return np.stack([x.to_ndarray(format="rgb24") for x in container.decode(video=0)])
    frames = []
    with Image.open(path) as video:
        for number in range(video.n_frames):
            video.seek(number)
            frames.append(np.asarray(video.convert("RGB")))
    return np.stack(frames)
