"""Pictures of any kind are read alike, and written as they are shown."""

import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from harness import pictures
from harness.pictures import read_picture, upright_size


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


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_is_that_of_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "x.jpg", exif=exif)
    size = upright_size(tmp_path / "x.jpg")
    assert size == ((20, 30) if orientation in (6, 8) else (30, 20))


def test_a_cut_out_is_a_mask_by_its_transparency(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    picture.save(tmp_path / "x.png")
    mask = np.asarray(read_picture(tmp_path / "x.png", alpha=True))
    assert (mask[:, :4] == 255).all() and (mask[:, 4:] == 0).all()
    grey = Image.linear_gradient("L").resize((8, 8))
    grey.save(tmp_path / "grey.png")  # Without transparency it is what it shows.
    assert np.array_equal(np.asarray(read_picture(tmp_path / "grey.png", alpha=True))[..., 0], grey)


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


# Colour profiles.

XYZ_D50 = (0.9642, 1.0, 0.8249)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def icc_profile(space, tags):
    """Return a version 2 display profile of a colour space and these tags."""
    body, table, offset = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", name, offset + len(body), len(content))
        body += content
    pcs = b"Lab " if b"A2B0" in tags else b"XYZ "
    kind = b"prtr" if b"A2B0" in tags else b"mntr"
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s12s4s", size, b"", 0x02400000, kind, space, pcs, b"", b"acsp")
    header += bytes(28) + struct.pack(">3i", *(round(x * 65536) for x in XYZ_D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(x * 65536) for x in values))


def gamma(power):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(power * 256))


def adobe_rgb():
    curve = gamma(563 / 256)
    columns = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), (xyz(*c) for c in ADOBE_RGB), strict=True))
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return icc_profile(b"RGB ", {b"wtpt": xyz(*XYZ_D50), **columns, **curves})


def grey(power):
    return icc_profile(b"GRAY", {b"wtpt": xyz(*XYZ_D50), b"kTRC": gamma(power)})


def red_cyan():
    """Return a CMYK profile of a press that has its cyan ink replaced by red."""
    ramp = bytes(range(256))
    white, red, black = (255, 128, 128), (140, 190, 170), (0, 128, 128)
    lab = [black if inks & 1 else red if inks & 8 else white for inks in range(16)]  # C, M, Y, K.
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity
    table += ramp * 4 + b"".join(map(bytes, lab)) + ramp * 3
    return icc_profile(b"CMYK", {b"wtpt": xyz(*XYZ_D50), b"A2B0": table})


def centre(path):
    return pictures.read_picture(path).getpixel((4, 4))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_adobe_rgb_is_read_as_it_is_shown(tmp_path, suffix):
    shown, stored = (200, 40, 40), (172, 44, 44)
    path, options = tmp_path / f"x.{suffix}", {"quality": 100, "lossless": True}
    Image.new("RGB", (16, 16), stored).save(path, icc_profile=adobe_rgb(), **options)
    assert np.abs(np.subtract(centre(path), shown)).max() <= 3
    Image.new("RGB", (16, 16), stored).save(path, **options)  # Without a profile: sRGB.
    assert np.abs(np.subtract(centre(path), stored)).max() <= 2


def test_a_copy_of_what_was_read_is_not_converted_twice(tmp_path):
    Image.effect_noise((32, 32), 90).convert("RGB").save(
        tmp_path / "x.png", icc_profile=adobe_rgb()
    )
    once = pictures.read_picture(tmp_path / "x.png")
    pictures.save_image(once, tmp_path / "y.png")
    assert "icc_profile" not in Image.open(tmp_path / "y.png").info
    assert pictures.read_picture(tmp_path / "y.png").tobytes() == once.tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_is_read_by_its_own_curve(tmp_path, mode):
    if mode == "I;16":
        picture = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    else:
        picture = Image.new("L", (8, 8), 128).convert(mode)
    picture.save(tmp_path / "x.png", icc_profile=grey(1.0))
    assert centre(tmp_path / "x.png") == pytest.approx((188,) * 3, abs=2)  # 0.5 of the light.


def test_grey_in_a_profile_of_colours_is_converted_too(tmp_path):
    Image.new("L", (8, 8), 44).save(tmp_path / "x.png", icc_profile=adobe_rgb())
    red, green, blue = centre(tmp_path / "x.png")
    assert red == green == blue and abs(red - 40) <= 1  # (44 / 255) ** 2.2 of the light.


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_read_by_its_profile(tmp_path, suffix):
    picture = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    picture.save(tmp_path / f"x.{suffix}", icc_profile=red_cyan())
    red, green, blue = centre(tmp_path / f"x.{suffix}")
    assert red > 180 and max(green, blue) < 110  # Without the profile it would be cyan.


def test_transparency_and_palettes_keep_their_profile(tmp_path):
    picture = Image.new("RGBA", (8, 8), (172, 44, 44, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "x.png", icc_profile=adobe_rgb())
    assert pictures.read_picture(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)
    assert centre(tmp_path / "x.png") == pytest.approx((200, 40, 40), abs=3)
    picture.convert("RGB").quantize(4).save(tmp_path / "y.png", icc_profile=adobe_rgb())
    assert centre(tmp_path / "y.png") == pytest.approx((200, 40, 40), abs=3)


@pytest.mark.parametrize("profile", [b"no profile", adobe_rgb()[:200], grey(1.0), red_cyan()])
def test_a_profile_that_does_not_fit_is_left_out_with_one_line(tmp_path, capsys, profile):
    Image.new("RGB", (8, 8), (172, 44, 44)).save(tmp_path / "x.png", icc_profile=profile)
    assert centre(tmp_path / "x.png") == (172, 44, 44)
    assert "icc_profile" not in pictures.read_picture(tmp_path / "x.png").info
    line, _ = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "x.png: its colour profile" in line


# Formats and folders.


def test_heic_without_pillow_heif_has_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("x.heic", "named.jpg"):  # Phones' backups mix up the endings.
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
        with pytest.raises(ValueError, match=f"{name}.*pip install pillow-heif"):
            pictures.read_picture(tmp_path / name)


def test_heic_is_read_where_pillow_heif_is(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 40, 40))).save(tmp_path / "x.HEIC")
    assert centre(tmp_path / "x.HEIC") == pytest.approx((200, 40, 40), abs=6)
    assert pictures.find_pictures(tmp_path) == [tmp_path / "x.HEIC"]


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(path.suffix[1:].lower(), path.suffix[1:])
        Image.new("RGB", (8, 8), (10, 20, 30)).save(path, format=kind)


def test_a_folder_is_its_pictures_of_every_format_in_order(tmp_path):
    wanted = ["A.PNG", "b.tif", "c.JPG", "d.webp", "e.gif", "f.bmp", "sub/deep/g.jpg", "sub/h.TIF"]
    fill(tmp_path, wanted)
    fill(tmp_path, [".hidden.png", "._c.JPG", ".thumbs/x.png", "sub/._h.TIF"])
    for name in ("notes.txt", "data.h5", "film.mpg", "print.eps"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = pictures.find_pictures(tmp_path)
    assert found == sorted(tmp_path / name for name in wanted)
    read = pictures.read_pictures([tmp_path / "sub", tmp_path / "A.PNG"])
    assert [picture.size for picture in read] == [(8, 8)] * 3


@pytest.mark.parametrize("case", ["empty", "missing", "too many"])
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, case):
    if case == "too many":
        fill(tmp_path, [f"{i}.png" for i in range(pictures.MOST_REFERENCES + 1)])
    path = tmp_path / "nowhere.png" if case == "missing" else tmp_path
    reason = {"empty": f"{tmp_path}: no pictures", "missing": "nowhere.png", "too many": "at most"}
    with pytest.raises(ValueError, match=reason[case]) as refusal:
        pictures.read_pictures([path])
    assert "\n" not in str(refusal.value)


def test_our_own_pictures_are_known(tmp_path):
    pictures.save_image(Image.new("RGB", (8, 8)), tmp_path / "ours.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png")
    (tmp_path / "text.png").write_text("no picture")
    known = [path.name for path in sorted(tmp_path.iterdir()) if pictures.is_ours(path)]
    assert known == ["ours.png"] and not pictures.is_ours(tmp_path / "nowhere.png")
