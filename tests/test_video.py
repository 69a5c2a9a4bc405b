"""Videos: all frames arrive, ours are known, and no file is ever half written."""

import os
import random
import sys
import weakref

import numpy as np
import pytest
from PIL import Image
from video_fixtures import read_frames

from harness import store, video


def gradients(count=6, width=48, height=32):
    """Return RGB pictures: red grows to the right, green downwards, blue from frame to frame."""
    y, x = np.mgrid[:height, :width]
    pictures = []
    for i in range(count):
        blue = np.full_like(x, 200 * i // max(1, count - 1))
        pixels = np.stack([x * 255 // width, y * 255 // height, blue], axis=-1)
        pictures.append(Image.fromarray(pixels.astype(np.uint8)))
    return pictures


@pytest.mark.parametrize("count", [1, 2, 31])
def test_every_frame_arrives_in_order(tmp_path, ending, count):
    path = tmp_path / f"x{ending}"
    video.save_video(gradients(count), path)
    frames = read_frames(path)
    assert len(frames) == count
    blue = frames[..., 2].mean((1, 2))
    wanted = [200 * i // max(1, count - 1) for i in range(count)]
    np.testing.assert_allclose(blue, wanted, atol=4)


@pytest.mark.parametrize("size", [(48, 32), (47, 32), (48, 31), (47, 31), (32, 17)])
def test_frames_are_near_to_what_was_written(tmp_path, ending, size):
    width, height = size
    path = tmp_path / f"x{ending}"
    video.save_video(gradients(4, width, height), path)
    frames = read_frames(path)
    odd = ending == ".mp4"  # H.264 has an even number of rows and columns.
    assert frames.shape[1:3] == (height + (height % 2) * odd, width + (width % 2) * odd)
    wanted = np.stack([np.asarray(picture, int) for picture in gradients(4, width, height)])
    error = np.abs(frames[:, :height, :width] - wanted)
    assert error.mean() < 5 and error.max() < 30


def test_an_odd_last_row_and_column_stand_twice(tmp_path):
    pytest.importorskip("av")
    video.save_video([Image.new("RGB", (15, 15), (200, 40, 90))] * 2, tmp_path / "x.mp4")
    frames = read_frames(tmp_path / "x.mp4")
    assert frames.shape == (2, 16, 16, 3)
    assert np.abs(frames.astype(int) - (200, 40, 90)).max() <= 4


def test_mp4_plays_everywhere_at_thirty_frames_a_second(tmp_path):
    av = pytest.importorskip("av")
    video.save_video(gradients(30), tmp_path / "x.mp4")
    with av.open(tmp_path / "x.mp4") as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 30
        assert container.duration == pytest.approx(av.time_base, rel=0.02)  # A second.


def test_webp_loops_at_about_thirty_frames_a_second(tmp_path):
    video.save_video(gradients(5), tmp_path / "x.webp")
    with Image.open(tmp_path / "x.webp") as found:
        assert (found.format, found.info["loop"]) == ("WEBP", 0)
        for number in range(found.n_frames):
            found.seek(number)
            found.load()
            assert found.info["duration"] == 33


def test_frames_of_an_mp4_are_let_go_one_by_one(tmp_path):
    pytest.importorskip("av")
    drawn, held = [], []

    def frames():
        for i in range(100):
            picture = Image.new("RGB", (16, 16), (2 * i, 0, 0))
            drawn.append(weakref.ref(picture))
            held.append(sum(ref() is not None for ref in drawn))
            yield picture

    video.save_video(frames(), tmp_path / "x.mp4")
    assert len(read_frames(tmp_path / "x.mp4")) == 100 and max(held) <= 3


# Ours and others'.


def test_our_own_videos_are_known(tmp_path, ending):
    video.save_video(gradients(2), tmp_path / f"ours{ending}")
    assert video.is_our_video(tmp_path / f"ours{ending}")
    (tmp_path / f"text{ending}").write_text("no video")
    (tmp_path / f"empty{ending}").touch()
    (tmp_path / f"folder{ending}").mkdir()
    for name in ("text", "empty", "folder", "nowhere"):
        assert not video.is_our_video(tmp_path / f"{name}{ending}"), name


def test_videos_of_others_are_not_ours(tmp_path, ending):
    path = tmp_path / f"theirs{ending}"
    if ending == ".webp":
        gradients(1)[0].save(path, save_all=True, append_images=gradients(2)[1:])
    else:
        import av

        with av.open(path, "w") as container:
            container.metadata["comment"] = "a holiday"
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for picture in gradients(3):
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
    assert len(read_frames(path)) >= 2 and not video.is_our_video(path)


def test_without_pyav_no_mp4_is_known(tmp_path, monkeypatch):
    pytest.importorskip("av")
    video.save_video(gradients(2), tmp_path / "x.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    assert not video.is_our_video(tmp_path / "x.mp4")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Of what is damaged.
def test_a_damaged_video_is_answered_and_no_error(tmp_path, ending):
    """Cut off, or with other bytes in it; where the mark is still read, it may be known."""
    path = tmp_path / f"x{ending}"
    video.save_video(gradients(3), path)
    content = path.read_bytes()
    draw = random.Random(0)
    for size in range(0, len(content) // 2, 23):
        path.write_bytes(content[:size])
        assert not video.is_our_video(path), size
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 3, 30])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        assert video.is_our_video(path) in (True, False)
    for _ in range(100):
        path.write_bytes(draw.randbytes(draw.randrange(300)))
        assert not video.is_our_video(path)


# Whole or not at all.


@pytest.mark.parametrize("fails_at", [0, 1, 5])
@pytest.mark.parametrize("before", [False, True])
def test_a_write_that_fails_leaves_the_old_file_or_none(tmp_path, ending, fails_at, before):
    def frames():
        for number, picture in enumerate(gradients(8)):
            if number == fails_at:
                raise RuntimeError("out of memory")
            yield picture

    path = tmp_path / f"x{ending}"
    if before:
        video.save_video(gradients(2), path)
    old = path.read_bytes() if before else None
    with pytest.raises(RuntimeError, match="out of memory"):
        video.save_video(frames(), path)
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if before else [])
    assert not before or path.read_bytes() == old


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(store, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/x{ending}'"):
        video.save_video(gradients(2), tmp_path / f"x{ending}")
    assert not (tmp_path / f"x{ending}").exists()


# With and without PyAV.


def test_without_pyav_videos_are_webp_and_a_hint_says_so(ending, capsys):
    assert video.ending() == ending
    video.hint()
    out, err = capsys.readouterr()
    lines = ["hint: videos are .webp; for .mp4: pip install av"] if ending == ".webp" else []
    assert (out, err.splitlines()) == ("", lines)
