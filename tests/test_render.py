"""Rendering: EG3D's seeds, equal pictures for equal seeds, and no file of others replaced."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_generator import even_samples
from tiny_run import build_generator, hurry, run, world

import render
from files.generators import save_generator
from harness import pictures

RENDER = {"seeds": "3,5", "device": "cpu"}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        run(out, steps=1)
    return out


# Pictures out.


def test_seeds_are_eg3d_s():
    z = render.seed_to_z(7, 512)
    assert z.dtype == torch.float32
    assert np.array_equal(z.numpy(), np.random.RandomState(7).randn(1, 512).astype(np.float32))


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("0-1,12", [0, 1, 12]), ("5, 4-4", [5, 4])],
)
def test_range_includes_its_ends(text, seeds):
    assert render.parse_range(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "-1", "1-2-3", "7-3", "1,,2", "0.5", "²", "0-99999999", "9" * 10]
)
def test_bad_range_is_refused(text):
    with pytest.raises(ValueError, match="--seeds"):
        render.parse_range(text)


def test_seed_looks_the_same_whatever_else_is_rendered():
    G = build_generator()
    alone = render.portraits(G, [3])
    torch.rand(5)
    assert torch.equal(render.portraits(G, [3, 4])[:1], alone)
    assert not torch.equal(render.portraits(G, [4]), alone)


def test_several_views_equal_single_views():
    G = build_generator()
    with even_samples():  # Else the jitter of the rays differs.
        subject = render.seed_to_subject(G, 1)
        views = render.views(subject, (0.4, 0.0, -0.4))["image"]
        single = render.views(subject, (0.4,))["image"]
    assert views.shape == (3, 3, 32, 32)
    assert not torch.equal(views[0], views[1])
    torch.testing.assert_close(views[:1], single)


def backbone_passes(G, monkeypatch):
    """Return a list that grows by the batch of every pass of the backbone."""
    batches, forward = [], G.backbone.synthesis.forward
    monkeypatch.setattr(
        G.backbone.synthesis, "forward", lambda ws, *a: batches.append(len(ws)) or forward(ws, *a)
    )
    return batches


def test_orbit_runs_the_backbone_once(monkeypatch):
    G = build_generator()
    batches = backbone_passes(G, monkeypatch)
    frames = list(render.orbit(render.seed_to_subject(G, 1), 9))
    assert batches == [1]
    assert [frame.shape for frame in frames] == [(1, 3, 32, 32)] * 9


def test_frames_of_an_orbit_equal_single_renders():
    G = build_generator()
    ws = render.seed_to_ws(G, 3, 0.7)
    angles = torch.arange(4) * torch.pi / 2
    for c, frame in zip(
        G.cameras.rim(angles).split(1),
        render.orbit(render.seed_to_subject(G, 3, 0.7), 4),
        strict=True,
    ):
        torch.manual_seed(3)
        assert torch.equal(frame, G.synthesis(ws, c, sample_mult=2)["image"])


def test_orbit_closes_without_a_jump():
    with even_samples():
        frames = torch.cat(list(render.orbit(render.seed_to_subject(build_generator(), 1), 32)))
    steps = (frames - frames.roll(1, 0)).square().mean((1, 2, 3)).sqrt()
    assert steps.min() > 0 and steps[0] < 1.5 * steps[1:].max()


def test_no_variety_at_truncation_zero():
    G = build_generator()
    with even_samples():  # Else the jitter of the rays differs.
        for trunc, alike in ((0.0, True), (1.0, False)):
            a, b = (render.views(render.seed_to_subject(G, seed, trunc), (0.0,)) for seed in (1, 2))
            for name in ("image", "image_depth", "mask"):
                assert torch.equal(a[name], b[name]) == alike, (name, trunc)


def test_depth_picture_is_bright_where_near():
    depth = torch.tensor([2.4, 2.6, 3.0, 9.0]).view(1, 1, 1, 4)
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 1, 1, 4)
    picture = render.depth_images(depth, mask)
    assert picture.shape == (1, 3, 1, 4)
    torch.testing.assert_close(picture[0, 0, 0], torch.tensor([1.0, 1 / 3, -1.0, -1.0]))
    assert render.depth_images(depth, mask * 0).isfinite().all()


# The script.


def test_generator_file_gives_three_views_a_seed(tmp_path):
    ckpt = str(world() / "generator.safetensors")
    render.main(render.Config(ckpt, tmp_path / "a", **RENDER))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["seed0003.png", "seed0005.png"]
    assert Image.open(tmp_path / "a/seed0003.png").size == (96, 32)
    render.main(render.Config(ckpt, tmp_path / "b", seeds="5", device="cpu"))
    seed = [(tmp_path / folder / "seed0005.png").read_bytes() for folder in "ab"]
    assert seed[0] == seed[1]


def test_run_gives_a_grid_of_source_above_adapted_too(tmp_path, adapted):
    render.main(render.Config(str(adapted), tmp_path, depth=True, **RENDER))
    names = {"grid.png", "seed0003.png", "seed0005.png", "seed0003_depth.png", "seed0005_depth.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert Image.open(tmp_path / "grid.png").size == (64, 64)
    assert Image.open(tmp_path / "seed0003_depth.png").size == (36, 12)
    G, G_src, settings = render.load_run(adapted)
    rows = [render.portraits(network, [3, 5]) for network in (G_src, G)]
    assert np.array_equal(pictures.image_grid(rows), Image.open(tmp_path / "grid.png"))
    assert settings["prompt"] == "a bronze statue"


def test_orbit_of_a_run_is_a_looping_pair(tmp_path, adapted):
    render.main(render.Config(str(adapted), tmp_path, "3", orbit=5, device="cpu"))
    networks = render.load_run(adapted)[1::-1]  # The source first.
    with Image.open(tmp_path / "seed0003.webp") as video:
        assert (video.n_frames, video.info["loop"], video.size) == (5, 0, (64, 32))
        for pair in zip(
            *(render.orbit(render.seed_to_subject(G, 3), 5) for G in networks), strict=True
        ):
            wanted = np.asarray(pictures.image_grid([torch.cat(pair)]), int)
            assert np.abs(np.asarray(video.convert("RGB"), int) - wanted).mean() < 12
            assert video.info.get("duration", 33) == 33
            video.seek((video.tell() + 1) % 5)


def test_mesh_of_a_generator_file_is_reproducible(tmp_path):
    pytest.importorskip("skimage")
    ckpt = str(world() / "generator.safetensors")
    for out in (tmp_path / "a", tmp_path / "b"):
        render.main(render.Config(ckpt, out, "5", mesh=24, device="cpu"))
        assert {p.name for p in out.iterdir()} == {"seed0005.png", "seed0005.ply"}
    files = [(tmp_path / out / "seed0005.ply").read_bytes() for out in "ab"]
    assert files[0] == files[1]


def test_head_that_nobody_sees_has_no_mesh(tmp_path, capsys):
    pytest.importorskip("skimage")
    G = build_generator()
    G.decoder.net[2].bias.data[0] = -1000
    save_generator(G, tmp_path / "g.safetensors")
    out = tmp_path / "out"
    render.main(render.Config(str(tmp_path / "g.safetensors"), out, "5", mesh=24, device="cpu"))
    assert [p.name for p in out.iterdir()] == ["seed0005.png"]
    assert "no mesh of seed 5" in capsys.readouterr().err


def test_mesh_without_scikit_image_is_refused_with_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        render.main(render.Config("unread", tmp_path / "out", mesh=24))
    assert not (tmp_path / "out").exists()


def test_run_whose_source_is_gone_still_gives_stills(tmp_path, adapted, capsys):
    shutil.copytree(adapted, tmp_path / "run")
    settings = json.loads((tmp_path / "run/config.json").read_text())
    settings["generator"] = str(tmp_path / "gone.safetensors")
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    render.main(render.Config(str(tmp_path / "run"), tmp_path / "out", **RENDER))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"seed0003.png", "seed0005.png"}
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "gone.safetensors" in warning


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seeds": "7-3"}, "--seeds"),
        ({"trunc": float("nan")}, "--trunc"),
        *(({"orbit": frames}, "--orbit") for frames in (-120, 1, 361)),
        *(({"mesh": voxels}, "--mesh") for voxels in (-1, 3, 100_000)),
        ({"ckpt": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"device": "abacus"}, "--device"),
        ({"ckpt": "x" * 300}, "no such file"),
    ],
)
def test_bad_option_leaves_no_folder(tmp_path, changes, reason):
    options = {"ckpt": str(world() / "generator.safetensors"), **RENDER, **changes}
    with pytest.raises(ValueError, match=reason):
        render.main(render.Config(out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_result_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out"):
        render.main(render.Config("unread", tmp_path / "file" / "out", **RENDER))


@pytest.mark.parametrize("name", ["seed0003.png", "seed0005_depth.png", "seed0005.ply", "grid.png"])
def test_a_file_that_render_did_not_write_is_refused_by_name(tmp_path, adapted, name):
    (tmp_path / "holiday.jpg").touch()  # Other names are in nobody's way.
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=f"--out {tmp_path}: {name} was not written by render.py"):
        render.main(render.Config(str(adapted), tmp_path, depth=True, **RENDER))
    assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_what_render_wrote_is_replaced(tmp_path, adapted):
    for seeds in ("3", "3,5"):
        render.main(render.Config(str(adapted), tmp_path, seeds, depth=True, device="cpu"))
    assert Image.open(tmp_path / "grid.png").size == (64, 64)
    assert (tmp_path / "seed0005_depth.png").exists()
