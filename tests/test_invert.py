"""Inversion: the probe, the crop, the camera, and what is found of the generator's own pictures."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_rosinality import small_generator as flat_generator
from tiny_run import build_generator, world

import invert
import subjects
from files.generators import load_generator, save_generator
from harness.pictures import image_grid, save_image
from invert import Config
from models.features import TokenFeatures
from render import seed_portraits

FEW = {"steps": 6, "heads": 50, "device": "cpu"}


@pytest.fixture
def photo(tmp_path):
    """A picture of the generator's own."""
    path = tmp_path / "photo.png"
    save_image(image_grid([seed_portraits(build_generator(), [3])]), path)
    return path


def options(photo, **changes):
    given = {
        "image": photo,
        "out": photo.with_name("me.safetensors"),
        "ckpt": str(world() / "generator.safetensors"),
        "features": str(world() / "dino"),
    }
    return Config(**given | FEW | changes)


def test_a_photo_becomes_a_person_and_a_picture(photo, capsys):
    invert.main(options(photo, tune=3))
    G = build_generator()
    person = subjects.load_person(photo.with_name("me.safetensors"), G)
    assert person.name == "me" and person.c.shape == (1, 25)
    assert person.offsets and all(name.endswith(".weight") for name in person.offsets)
    with Image.open(photo.with_name("me.png")) as strip:
        assert strip.size == (5 * 32, 32)
    assert "dB on the head" in capsys.readouterr().out
    assert sorted(p.name for p in photo.parent.iterdir()) == [
        "me.png",
        "me.safetensors",
        "photo.png",
    ]


def save_mask(path, size):
    Image.new("L", size, "white").save(path)
    return path


def test_photos_and_models_are_never_replaced(photo, tmp_path):
    beside = photo.with_suffix(".safetensors")
    image = photo.read_bytes()
    with pytest.raises(ValueError, match="would replace .*photo.png: choose another name"):
        invert.check(options(photo, out=beside))
    masked = options(photo, mask=save_mask(tmp_path / "me.png", (32, 32)))
    with pytest.raises(ValueError, match="was not written by invert.py"):
        invert.check(masked)
    shutil.copy(world() / "generator.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no latents, and would be lost"):
        invert.check(options(photo, out=tmp_path / "model.safetensors"))
    assert photo.read_bytes() == image


def test_masks_that_do_not_fit_are_refused(photo, tmp_path):
    with Image.open(photo) as picture:
        width, height = picture.size
    mask = tmp_path / "mask.png"
    save_mask(mask, (width, 2 * height))
    with pytest.raises(ValueError, match=f"--mask has {width} x {2 * height} pixels, --image"):
        invert.check(options(photo, mask=mask))
    Image.new("L", (2 * width, 2 * height)).save(mask)
    with pytest.raises(ValueError, match="is white nowhere, so there is no person"):
        invert.check(options(photo, mask=mask))
    save_mask(mask, (2 * width, 2 * height))
    invert.check(options(photo, mask=mask))


def test_a_mask_that_the_crop_misses_is_refused(photo, tmp_path, monkeypatch):
    G, vit = build_generator(), TokenFeatures.from_pretrained(world() / "dino")
    cfg = options(photo)
    probe = invert.fit_probe(G, vit, cfg)
    picture = Image.new("RGB", (64, 64), "grey")
    black = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="white nowhere in the crop that was found"):
        invert.align(G, probe, picture, black, cfg)


def test_an_inversion_that_was_stopped_goes_on_to_the_same(photo, monkeypatch):
    monkeypatch.setattr(invert, "SAVE_SECONDS", -1)
    unbroken = options(photo, tune=4)
    invert.main(unbroken)
    expected = unbroken.out.read_bytes()
    take_objective = invert.objective

    def stops_at(last):
        def objective(search, G, step, tuning):
            if step == last:
                raise KeyboardInterrupt
            return take_objective(search, G, step, tuning)

        return objective

    for last in (3, 8):  # While the code is looked for, and while weights are tuned.
        unbroken.out.unlink()
        monkeypatch.setattr(invert, "objective", stops_at(last))
        with pytest.raises(KeyboardInterrupt):
            invert.main(unbroken)
        assert not unbroken.out.exists()
        monkeypatch.setattr(invert, "objective", take_objective)
        invert.main(unbroken)
        assert unbroken.out.read_bytes() == expected
    invert.main(dataclasses.replace(unbroken, seed=1))
    assert unbroken.out.read_bytes() != expected


def test_the_probe_reads_the_generators_own_pictures(photo):
    G, vit = build_generator(), TokenFeatures.from_pretrained(world() / "dino")
    cfg = options(photo, heads=150)
    probe = invert.fit_probe(G, vit, cfg)
    generator = torch.Generator().manual_seed(cfg.seed)
    z = torch.randn(cfg.heads, G.z_dim, generator=generator)
    torch.manual_seed(cfg.seed)
    c = G.cameras.sample(cfg.heads)
    ws = G.mapping(z, G.cameras.frontal(len(z)))
    uncropped = range(0, cfg.heads, 2)
    read = [probe.read(G.synthesis(ws[i : i + 1], c[i : i + 1])["image"]) for i in uncropped]
    codes = torch.stack([reading.w for reading in read])
    spread = ws[:, 0].std(0).mean()
    assert (codes - ws[::2, 0]).abs().mean() < 0.7 * spread
    found = torch.cat([G.cameras.label(*reading.angles.split(1)) for reading in read])
    error = (F.normalize(found[:, 3:12:4]) - F.normalize(c[::2, 3:12:4])).norm(dim=1)
    straight = G.cameras.frontal()[:, 3:12:4]
    guess = (F.normalize(straight) - F.normalize(c[::2, 3:12:4])).norm(dim=1)
    assert error.mean() < 0.6 * guess.mean()


def test_a_crop_is_what_a_camera_with_other_intrinsics_sees():
    G = build_generator()
    c = G.cameras.frontal()
    crop = torch.tensor([0.2, 0.1, -0.05])
    moved = invert.move(c, crop)
    points = torch.tensor([[0.1, 0.05, 0.0], [-0.1, 0.1, 0.1]])
    for before, after in zip(places(points, c), places(points, moved), strict=True):
        torch.testing.assert_close(after, 0.5 + crop[1:] + (before - 0.5) * crop[0].exp())


def places(points, c):
    """Return where points [N, 3] are in the picture of a camera c [1, 25], in its sizes."""
    cam2world, K = c[0, :16].view(4, 4), c[0, 16:].view(3, 3)
    local = (points - cam2world[:3, 3]) @ cam2world[:3, :3]
    return (local / local[:, 2:] @ K.T)[:, :2]


def test_cutting_out_is_exact_and_goes_on_outside():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))
    whole = Image.fromarray(ramp)
    part = np.asarray(invert.cut_out(whole, torch.tensor([0.6, 0.5]), 0.25, 50))
    assert np.abs(part[:, :, 0].astype(float) - (95.5 + np.arange(50) - 0.5)).max() <= 1
    same = invert.cut_out(whole, torch.tensor([0.5, 0.5]), 1.0, 200)
    assert np.array_equal(np.asarray(same), ramp)
    outside = np.asarray(invert.cut_out(whole, torch.tensor([0.5, 0.5]), 2.0, 100))
    assert (outside[:, :20] == 0).all() and (outside[:, -20:] == 199).all()


class Says:
    """Stands for a probe that sees a bright square: its size and place against the picture's."""

    mean = torch.zeros(1)

    def read(self, image):
        bright = (image[0, 0] > 0).float()
        size = bright.sum().sqrt() / 32
        rows, columns = bright.mean(1), bright.mean(0)
        at = (torch.arange(64) + 0.5) / 64
        place = torch.stack([(columns * at).sum(), (rows * at).sum()]) / columns.sum()
        return invert.Reading(
            torch.zeros(3), torch.zeros(2), torch.cat([size.log()[None], place - 0.5])
        )


def test_photos_are_cropped_until_the_probe_finds_the_head_in_its_place(photo):
    pixels = np.zeros((400, 400, 3), np.uint8)
    pixels[60:140, 210:290] = 255
    G = dataclasses.make_dataclass("G", ["img_resolution", "cameras"])(
        64, build_generator().cameras
    )
    found, reading = invert.align(G, Says(), Image.fromarray(pixels), None, options(photo))
    assert reading.crop.abs().max() < 0.06
    bright = (found.image[0, 0] > 0).nonzero().float()
    assert (bright.mean(0) - 31.5).abs().max() < 3 and abs(len(bright) ** 0.5 - 32) < 3
    whole, _ = invert.align(G, Says(), Image.fromarray(pixels), None, options(photo, align=False))
    assert (whole.image[0, 0] > 0).float().mean() < 0.06


def test_the_camera_turns_to_where_the_photo_was_taken(photo):
    G, vit = build_generator(), TokenFeatures.from_pretrained(world() / "dino")
    ws = subjects.seed_to_ws(G, 5)
    true = torch.tensor([0.12, -0.08])
    torch.manual_seed(0)
    image = G.synthesis(ws, G.cameras.label(*true.split(1)))["image"].clamp(-1, 1)
    cfg = options(photo)
    reading = invert.Reading(ws[0, 0], torch.tensor([0.0, 0.0]), torch.zeros(3))
    search = invert.begin(G, vit, invert.Photo(image), reading, cfg)
    with torch.no_grad():  # The code is known, to see the camera alone.
        search.code.copy_(torch.linalg.lstsq(search.axes.T, ws[0, 0] - search.mean).solution)
        assert (search.ws - ws).abs().max() < 1e-3
    for _ in range(8):
        invert.turn(search)
    assert (search.view[:2] - true).abs().max() < 0.02 and not search.view[2:].any()


def test_what_is_outside_of_the_mask_does_not_count(photo):
    G, vit = build_generator(), TokenFeatures.from_pretrained(world() / "dino")
    image, other = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    reading = invert.Reading(subjects.seed_to_ws(G, 5)[0, 0], torch.zeros(2), torch.zeros(3))
    search = invert.begin(G, vit, invert.Photo(image, mask), reading, options(photo))
    outside = torch.where(mask > 0, image, other)
    inside = torch.where(mask > 0, other, image)
    assert invert.distance(search, outside) == 0 < invert.distance(search, inside)


def test_pictures_without_cameras_are_inverted(tmp_path):
    save_generator(flat_generator(), tmp_path / "flat.safetensors")
    G = load_generator(tmp_path / "flat.safetensors")
    save_image(image_grid([seed_portraits(G, [1])]), tmp_path / "photo.png")
    invert.main(options(tmp_path / "photo.png", ckpt=str(tmp_path / "flat.safetensors"), tune=2))
    person = subjects.load_person(tmp_path / "me.safetensors", G)
    assert person.c.shape == (1, 0) and person.offsets


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"tune": -1}, "--tune must be at least 0"),
        ({"heads": 3}, "--heads must be at least 50"),
        ({"mask": "nowhere.png"}, "nowhere.png: no readable picture"),
        ({"ckpt": "nowhere.pkl"}, "nowhere.pkl"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(change, reason, photo):
    with pytest.raises(ValueError, match=reason):
        invert.main(options(photo, **change))
    assert [p.name for p in photo.parent.iterdir()] == ["photo.png"]


def test_what_is_no_picture_and_files_of_others_are_refused(photo):
    (photo.parent / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="no readable picture"):
        invert.main(options(photo.parent / "text.png"))
    Image.new("RGB", (8, 8)).save(photo.with_name("me.png"))
    with pytest.raises(ValueError, match="was not written by invert.py"):
        invert.main(options(photo))
    with pytest.raises(ValueError, match="--out must be a file that ends in .safetensors"):
        invert.main(options(photo, out=photo.with_name("me.png")))


def test_a_picture_unlike_all_heads_brings_a_warning(tmp_path, capsys):
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    invert.main(options(tmp_path / "noise.png"))
    assert "warning: the inversion does not look like" in capsys.readouterr().err
