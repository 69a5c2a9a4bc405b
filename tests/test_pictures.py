"""Pictures of any kind are read alike, and written as they are shown."""

import numpy as np
import pytest
import torch
from PIL import Image

from harness import pictures


def test_bytes_are_rounded_as_eg3d_does():
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(1, 3, 1, 5)
    assert pictures.to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_picture_and_image_are_inverse():
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    assert np.array_equal(pictures.to_uint8(pictures.to_image(picture))[0], np.asarray(picture))


def test_grid_keeps_columns_together_when_it_wraps():
    above = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    grid = np.asarray(pictures.image_grid([above, -above], columns=3))
    assert grid.shape == (8, 6, 3)
    assert grid[::2, ::2, 0].tolist() == [[0, 64, 128], [255, 191, 128], [191, 255, 0], [64, 0, 0]]


def gradient(mode):
    pixels = np.linspace(0, 255, 24 * 24).reshape(24, 24).astype(np.uint8)
    return Image.fromarray(np.stack([pixels] * 3, -1)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    if mode == "CMYK":
        suffix = "tif"
    gradient(mode).save(tmp_path / f"x.{suffix}")
    picture = pictures.read_picture(tmp_path / f"x.{suffix}")
    assert (picture.mode, picture.size) == ("RGB", (24, 24))
    expected = gradient(mode).convert("RGB")
    assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    pixels = (np.asarray(gradient("L"), np.uint16) * 257).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    picture = pictures.read_picture(tmp_path / "x.png")
    assert np.array_equal(np.asarray(picture)[..., 0], np.asarray(gradient("L")))


def test_transparency_becomes_white(tmp_path):
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    picture.putpixel((0, 0), (200, 0, 0, 255))
    picture.save(tmp_path / "x.png")
    picture = pictures.read_picture(tmp_path / "x.png")
    assert picture.getpixel((0, 0)) == (200, 0, 0)
    assert picture.getpixel((5, 5)) == (255, 255, 255)


def test_transparent_palette_becomes_white(tmp_path):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 0, 90, 0])
    picture.putpixel((3, 3), 0)
    picture.save(tmp_path / "x.gif", transparency=0)
    assert pictures.read_picture(tmp_path / "x.gif").getpixel((3, 3)) == (255, 255, 255)


def test_exif_orientation_is_undone(tmp_path):
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # Upside down.
    picture.save(tmp_path / "x.png", exif=exif)
    upright = pictures.read_picture(tmp_path / "x.png")
    assert upright.getpixel((8, 2)) == (0, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (700, 1), (3, 900), (1400, 1100), (512, 512)])
def test_any_size_becomes_a_square(tmp_path, size):
    Image.new("RGB", size, "teal").save(tmp_path / "x.png")
    picture = pictures.read_picture(tmp_path / "x.png")
    assert picture.size == (min(*size, 512),) * 2
    assert picture.getpixel((0, 0)) == (0, 128, 128)


def test_tall_picture_keeps_more_of_its_top(tmp_path):
    picture = Image.new("RGB", (10, 20), "black")
    picture.paste("white", (0, 0, 10, 4))
    picture.save(tmp_path / "x.png")
    assert pictures.read_picture(tmp_path / "x.png").getpixel((5, 0)) == (255, 255, 255)


def test_reading_what_was_read_changes_nothing(tmp_path):
    Image.effect_noise((800, 600), 50).save(tmp_path / "x.png")
    once = pictures.read_picture(tmp_path / "x.png")
    once.save(tmp_path / "y.png")
    assert pictures.read_picture(tmp_path / "y.png").tobytes() == once.tobytes()


@pytest.mark.parametrize("content", [None, b"", b"no picture at all", "cut"])
def test_unreadable_picture_is_refused(tmp_path, content):
    if content == "cut":
        gradient("RGB").save(tmp_path / "x.png")
        content = (tmp_path / "x.png").read_bytes()[:60]
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="x.png"):
        pictures.read_picture(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("mode", "dtype", "top"),
    [("F", "float32", 1), ("F", "float32", 255), ("I", "int32", 255), ("I;16", "uint16", 65535)],
)
def test_pictures_of_many_bits_keep_their_brightness(tmp_path, mode, dtype, top):
    values = (np.linspace(0, 1, 64).reshape(8, 8) * top).astype(dtype)
    picture = Image.fromarray(values)
    assert picture.mode == mode
    picture.save(tmp_path / "x.tiff")
    read = np.asarray(pictures.read_picture(tmp_path / "x.tiff"))
    assert np.allclose(read[..., 0], values / top * 255, atol=1.5)
