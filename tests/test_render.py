"""Rendering: EG3D's seeds, equal pictures for equal seeds, and no file of others replaced."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_mesh import read_ply
from test_rosinality import small_generator as flat_generator
from tiny_generator import even_samples, small_generator
from tiny_run import build_generator, change_settings, hurry, run, world
from video_fixtures import read_frames

import render
import subjects
from files.generators import save_generator
from harness import pictures, video
from models.fingerprints import fingerprint_generator
from models.stylegan2 import SynthesisNetwork

RENDER = {"seeds": "3,5", "device": "cpu"}
MOST_FRAMES = video.MOST_FRAMES[video.ending()]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        run(out, steps=1)
    return out


# Pictures out.


def test_seeds_are_eg3d_s():
    z = subjects.seed_to_z(7, 512)
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
    alone = render.seed_portraits(G, [3])
    torch.rand(5)
    assert torch.equal(render.seed_portraits(G, [3, 4])[:1], alone)
    assert not torch.equal(render.seed_portraits(G, [4]), alone)


def test_portraits_turn_from_one_to_the_next():
    G = build_generator()
    people = [subjects.seed_to_subject(G, seed) for seed in (3, 4, 5, 6)]
    found = render.portraits(people)
    for image, subject, yaw in zip(found, people, (0.4, 0.0, -0.4, 0.4), strict=True):
        assert torch.equal(image, render.views(subject, (yaw,))["image"][0])
    assert torch.equal(found, render.seed_portraits(G, range(3, 7)))


def test_several_views_equal_single_views():
    G = build_generator()
    with even_samples():  # Else the jitter of the rays differs.
        subject = subjects.seed_to_subject(G, 1)
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
    frames = list(render.orbit(subjects.seed_to_subject(G, 1), 9))
    assert batches == [1]
    assert [frame["image"].shape for frame in frames] == [(1, 3, 32, 32)] * 9


def test_frames_of_an_orbit_equal_single_renders():
    G = build_generator()
    ws = subjects.seed_to_ws(G, 3, 0.7)
    angles = torch.arange(4) * torch.pi / 2
    for c, frame in zip(
        G.cameras.rim(angles).split(1),
        render.orbit(subjects.seed_to_subject(G, 3, 0.7), 4),
        strict=True,
    ):
        torch.manual_seed(3)
        single = G.synthesis(ws, c, sample_mult=2)
        for name in ("image", "image_depth", "mask"):
            assert torch.equal(frame[name], single[name])


def test_orbit_closes_without_a_jump():
    with even_samples():
        turn = list(render.orbit(subjects.seed_to_subject(build_generator(), 1), 32))
    frames = torch.cat([out["image"] for out in turn])
    steps = (frames - frames.roll(1, 0)).square().mean((1, 2, 3)).sqrt()
    assert steps.min() > 0 and steps[0] < 1.5 * steps[1:].max()


def test_no_variety_at_truncation_zero():
    G = build_generator()
    with even_samples():  # Else the jitter of the rays differs.
        for trunc, alike in ((0.0, True), (1.0, False)):
            a, b = (
                render.views(subjects.seed_to_subject(G, seed, trunc), (0.0,)) for seed in (1, 2)
            )
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
    render.main(render.Config(ckpt, out=tmp_path / "a", **RENDER))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["seed0003.png", "seed0005.png"]
    assert Image.open(tmp_path / "a/seed0003.png").size == (96, 32)
    render.main(render.Config(ckpt, out=tmp_path / "b", seeds="5", device="cpu"))
    seed = [(tmp_path / folder / "seed0005.png").read_bytes() for folder in "ab"]
    assert seed[0] == seed[1]


def test_run_gives_a_grid_of_source_above_adapted_too(tmp_path, adapted):
    render.main(render.Config(str(adapted), out=tmp_path, depth=True, **RENDER))
    names = {"grid.png", "seed0003.png", "seed0005.png", "seed0003_depth.png", "seed0005_depth.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert Image.open(tmp_path / "grid.png").size == (64, 64)
    assert Image.open(tmp_path / "seed0003_depth.png").size == (36, 12)
    G, G_src, settings = subjects.load_run(adapted)
    rows = [render.seed_portraits(network, [3, 5]) for network in (G_src, G)]
    assert np.array_equal(pictures.image_grid(rows), Image.open(tmp_path / "grid.png"))
    assert settings["prompt"] == "a bronze statue"


def test_orbit_of_a_run_is_a_pair(tmp_path, adapted, ending):
    render.main(render.Config(str(adapted), out=tmp_path, seeds="3", orbit=5, device="cpu"))
    networks = subjects.load_run(adapted)[1::-1]  # The source first.
    frames = read_frames(tmp_path / f"seed0003{ending}")
    assert frames.shape == (5, 32, 64, 3)
    turns = (render.orbit(subjects.seed_to_subject(G, 3), 5) for G in networks)
    for frame, pair in zip(frames, zip(*turns, strict=True), strict=True):
        wanted = np.asarray(pictures.image_grid([torch.cat([out["image"] for out in pair])]), int)
        assert np.abs(frame - wanted).mean() < 12
    assert video.is_our_video(tmp_path / f"seed0003{ending}")


def test_mesh_of_a_generator_file_is_reproducible(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("trimesh")
    ckpt = str(world() / "generator.safetensors")
    for out in (tmp_path / "a", tmp_path / "b"):
        render.main(render.Config(ckpt, out=out, seeds="5", mesh=24, device="cpu"))
        assert {p.name for p in out.iterdir()} == {"seed0005.png", "seed0005.ply", "seed0005.glb"}
    for name in ("seed0005.ply", "seed0005.glb"):
        files = [(tmp_path / out / name).read_bytes() for out in "ab"]
        assert files[0] == files[1]


def test_head_that_nobody_sees_has_no_mesh(tmp_path, capsys):
    pytest.importorskip("skimage")
    G = build_generator()
    G.decoder.net[2].bias.data[0] = -1000
    save_generator(G, tmp_path / "g.safetensors")
    out = tmp_path / "out"
    ckpt = str(tmp_path / "g.safetensors")
    render.main(render.Config(ckpt, out=out, seeds="5", mesh=24, device="cpu"))
    assert [p.name for p in out.iterdir()] == ["seed0005.png"]
    assert "no mesh of seed0005" in capsys.readouterr().err


def test_mesh_without_scikit_image_is_refused_with_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        render.main(render.Config("unread", out=tmp_path / "out", mesh=24))
    assert not (tmp_path / "out").exists()


def test_run_whose_source_is_gone_still_gives_stills(tmp_path, adapted, capsys):
    shutil.copytree(adapted, tmp_path / "run")
    change_settings(tmp_path / "run", generator=str(tmp_path / "gone.safetensors"))
    capsys.readouterr()
    render.main(render.Config(str(tmp_path / "run"), out=tmp_path / "out", **RENDER))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"seed0003.png", "seed0005.png"}
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "gone.safetensors" in warning


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seeds": "7-3"}, "--seeds"),
        ({"trunc": float("nan")}, "--trunc"),
        *(({"orbit": frames}, "--orbit") for frames in (-120, 1, MOST_FRAMES + 1)),
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
        render.main(render.Config("unread", out=tmp_path / "file" / "out", **RENDER))


@pytest.mark.parametrize(
    "name",
    ["seed0003.png", "seed0005_depth.png", "seed0005.mp4", "seed0005.webp", "grid.png"]
    + [f"seed0005.{end}" for end in ("ply", "obj", "glb")],
)
def test_a_file_that_render_did_not_write_is_refused_by_name(tmp_path, adapted, name):
    (tmp_path / "holiday.jpg").touch()  # Other names are in nobody's way.
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=f"--out {tmp_path}: {name} was not written by render.py"):
        render.main(render.Config(str(adapted), out=tmp_path, depth=True, **RENDER))
    assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_what_render_wrote_is_replaced(tmp_path, adapted):
    for seeds in ("3", "3,5"):
        cfg = render.Config(str(adapted), out=tmp_path, seeds=seeds, depth=True, device="cpu")
        render.main(cfg)
    assert Image.open(tmp_path / "grid.png").size == (64, 64)
    assert (tmp_path / "seed0005_depth.png").exists()


# Who is shown: seeds, people of files, edits, mixtures.


def save_heads(folder, *names, G=None):
    """Write files of people, seeds 11, 12, ...; return their paths."""
    G = G or build_generator()
    paths = [folder / f"{name}.safetensors" for name in names]
    for seed, path in enumerate(paths, 11):
        path.parent.mkdir(exist_ok=True)
        subjects.save_person(subjects.seed_to_person(G, seed), path)
    return tuple(paths)


def go(out, ckpt=None, **changes):
    """Render and return the names of what was written."""
    ckpt = world() / "generator.safetensors" if ckpt is None else ckpt
    render.main(render.Config(**{"ckpt": str(ckpt), "out": out, "device": "cpu"} | changes))
    return sorted(path.name for path in out.iterdir())


def pixels(path):
    return np.asarray(Image.open(path))


def test_seeds_are_eight_unless_latents_are_given(tmp_path):
    cfg = render.Config("unread")
    assert render.parse_seeds(cfg) == list(range(8))
    cfg.latents = (tmp_path / "me.safetensors",)
    assert render.parse_seeds(cfg) == []
    cfg.seeds = "4"
    assert render.parse_seeds(cfg) == [4]


def test_latents_are_rendered_under_the_names_of_their_files(tmp_path):
    paths = save_heads(tmp_path, "me", "my.friend")
    names = go(tmp_path / "out", latents=paths, depth=True)
    assert names == ["me.png", "me_depth.png", "my.friend.png", "my.friend_depth.png"]
    G = build_generator()
    for seed, name in ((11, "me"), (12, "my.friend")):
        subject = subjects.Subject(G, subjects.seed_to_ws(G, seed))
        wanted = pictures.image_grid([render.views(subject, render.VIEWS)["image"]])
        assert np.array_equal(pixels(tmp_path / f"out/{name}.png"), wanted)


def test_seeds_and_latents_are_rendered_together(tmp_path, adapted):
    paths = save_heads(tmp_path, "me")
    names = go(tmp_path / "out", adapted, latents=paths, seeds="3,5")
    assert names == ["grid.png", "me.png", "seed0003.png", "seed0005.png"]
    assert pixels(tmp_path / "out/grid.png").shape == (64, 96, 3)


def test_tuning_shows_in_the_source_and_in_what_was_adapted(tmp_path, adapted):
    name = "decoder.net.2.bias"
    person = subjects.seed_to_person(build_generator(), 3)
    tuned = replace(person, seed=0, offsets={name: torch.arange(9.0) - 4})
    subjects.save_person(replace(person, seed=0), tmp_path / "plain.safetensors")
    subjects.save_person(tuned, tmp_path / "tuned.safetensors")
    paths = tuple(tmp_path / f"{name}.safetensors" for name in ("plain", "tuned"))
    go(tmp_path / "out", adapted, latents=paths)
    grid = pixels(tmp_path / "out/grid.png")
    G, G_src, _ = subjects.load_run(adapted)
    people = [subjects.load_person(path, G) for path in paths]
    rows = [render.portraits([subjects.show(x, p) for p in people]) for x in (G_src, G)]
    assert np.array_equal(grid, pictures.image_grid(rows))
    plain = [render.portraits([subjects.show(x, people[0])] * 2) for x in (G_src, G)]
    for row in (0, 1):  # The tuned head differs, the other does not.
        differs = (rows[row] - plain[row]).abs().amax((1, 2, 3))
        assert differs[0] == 0 and differs[1] > 0.01


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("a/me", "b/me"), {}),
        (("seed0003",), {"seeds": "3"}),
        (("grid",), {}),
        (("me", "me_depth"), {"depth": True}),
        (("interpolation", "me"), {"orbit": 2, "interpolate": 2}),
    ],
)
def test_heads_of_one_name_are_refused(tmp_path, names, options):
    paths = save_heads(tmp_path, *names)
    with pytest.raises(ValueError, match="--latents: "):
        go(tmp_path / "out", latents=paths, **options)
    assert not (tmp_path / "out").exists()


def test_latents_that_cannot_be_read_leave_no_folder(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    for path in (tmp_path / "text.safetensors", tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            go(tmp_path / "out", latents=(path,))
    (other,) = save_heads(tmp_path, "flat", G=flat_generator())
    with pytest.raises(ValueError, match=f"{other} has codes"):
        go(tmp_path / "out", latents=(other,))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "mix"),
    [
        ([], []),
        (["runs/a=0.5"], [("runs/a", 0.5, "all")]),
        (["runs/a=1:shape", "b=-2e-1:colour"], [("runs/a", 1.0, "shape"), ("b", -0.2, "colour")]),
        (["runs/lr=0.1=3:all"], [("runs/lr=0.1", 3.0, "all")]),
        (["c:/runs/a=1"], [("c:/runs/a", 1.0, "all")]),
    ],
)
def test_mixtures_are_runs_with_shares(words, mix):
    assert render.parse_mix(words) == mix


@pytest.mark.parametrize(
    "word",
    ["", "runs/a", "=0.5", "runs/a=", "runs/a=half", "runs/a=nan", "runs/a=inf", "runs/a=1:hair"]
    + ["runs/a=1:shape:colour", "runs/a=:shape", "runs/a:shape", "runs/a=0,5"],
)
def test_a_word_that_is_no_share_of_a_run_is_refused(tmp_path, word):
    with pytest.raises(ValueError, match="--mix must look like .*got '"):
        go(tmp_path / "out", "", mix=("runs/a=0.5", word))


@pytest.mark.parametrize(
    ("words", "edits"),
    [
        ([], {}),
        (["hair=2.5", "width=-1"], {"hair": 2.5, "width": -1.0}),
        (["hair=1", "a=b=0", "hair=.5"], {"hair": 1.5, "a=b": 0.0}),
    ],
)
def test_edits_are_directions_with_amounts(words, edits):
    assert render.parse_edits(words) == edits


@pytest.mark.parametrize(
    "word", ["", "hair", "=2", "hair=", "hair=long", "hair=nan", "hair=-inf", "hair=1,5", "2=hair"]
)
def test_a_word_that_is_no_edit_is_refused(tmp_path, word):
    with pytest.raises(ValueError, match="--edit must look like .*got '"):
        go(tmp_path / "out", "unread", edit=("hair=1", word))


@pytest.mark.parametrize("both", [False, True])
def test_either_a_generator_or_a_mixture_is_rendered(tmp_path, adapted, both):
    given = (str(adapted), (f"{adapted}=1",)) if both else ("", ())
    with pytest.raises(ValueError, match="either --ckpt or --mix"):
        render.main(render.Config(*given, out=tmp_path / "out", device="cpu"))
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_mixture_that_is_nowhere_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=f"--mix {tmp_path}/nowhere: no such file"):
        go(tmp_path / "out", "", mix=(f"{tmp_path}/nowhere=1",))
    assert not (tmp_path / "out").exists()


def change_weights(G):
    """Change all that a run may change, and much."""
    torch.manual_seed(0)
    for name, parameter in G.named_parameters():
        if "mapping" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.fixture
def changed(tmp_path, adapted):
    """A run that differs much from its source."""
    folder = tmp_path / "changed=run"
    shutil.copytree(adapted, folder)
    G = build_generator()
    change_weights(G)
    save_generator(G, folder / "generator.safetensors")
    return folder


def test_a_mixture_is_rendered_below_its_source(tmp_path, changed):
    grids = {}
    for words in (("1",), ("0",), ("0.5", "0.5"), ("1:shape", "1:colour"), ("1:colour",)):
        out = tmp_path / "out" / "+".join(words)
        names = go(out, "", mix=tuple(f"{changed}={x}" for x in words), seeds="3,5")
        assert names == ["grid.png", "seed0003.png", "seed0005.png"]
        grids[words] = pixels(out / "grid.png").astype(int)
    go(tmp_path / "run", changed, seeds="3,5")
    whole = pixels(tmp_path / "run/grid.png").astype(int)
    for words in (("1",), ("0.5", "0.5"), ("1:shape", "1:colour")):
        assert np.abs(grids[words] - whole).max() <= 1, words
    source = grids[("0",)][32:]
    assert np.array_equal(source, whole[:32])
    for one in (whole[32:], grids[("1:colour",)][32:]):
        assert np.abs(one - source).mean() > 2
    assert np.abs(grids[("1:colour",)] - whole).mean() > 2


@pytest.fixture
def directions(tmp_path):
    torch.manual_seed(0)
    made = {"hair": torch.randn(16), "nose": torch.randn(16)}
    subjects.save_directions(made, tmp_path / "d.safetensors")
    return {"directions": tmp_path / "d.safetensors"}, made


def test_edits_move_seeds_and_people_alike(tmp_path, adapted, directions):
    option, made = directions
    paths = save_heads(tmp_path, "me")
    heads = {"latents": paths, "seeds": "3"} | option
    go(tmp_path / "out", adapted, edit=("hair=1.5", "nose=-2"), **heads)
    G, G_src, _ = subjects.load_run(adapted)
    people = [subjects.seed_to_person(G, 3), subjects.load_person(paths[0], G)]
    codes, step = subjects.wide_codes(G), 1.5 * made["hair"] - 2 * made["nose"]
    people = [replace(p, ws=codes.draw_near(p.ws + step, p.ws)) for p in people]
    rows = [render.portraits([subjects.show(x, p) for p in people]) for x in (G_src, G)]
    wanted = np.asarray(pictures.image_grid(rows), int)
    assert np.abs(pixels(tmp_path / "out/grid.png") - wanted).max() <= 1
    go(tmp_path / "plain", adapted, **heads)
    assert np.abs(pixels(tmp_path / "plain/grid.png") - wanted).mean() > 1


def test_an_edit_that_cannot_be_leaves_no_folder(tmp_path, directions):
    option, _ = directions
    with pytest.raises(ValueError, match="--edit beard: .* has hair, nose"):
        go(tmp_path / "out", seeds="3", edit=("beard=1",), **option)
    with pytest.raises(ValueError, match="nowhere.safetensors"):
        go(tmp_path / "out", edit=("hair=1",), directions=tmp_path / "nowhere.safetensors")
    assert not (tmp_path / "out").exists()


# Walks and turns.


def people_of(G, *seeds):
    return [subjects.seed_to_person(G, seed) for seed in seeds]


@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3, 4)])
def test_a_walk_passes_through_the_heads(seeds):
    G = build_generator()
    people = people_of(G, *seeds)
    with even_samples():
        walk = list(render.interpolation(G, people, 3))
        heads = [render.views(subjects.show(G, person), (0.0,))["image"] for person in people]
    assert len(walk) == 3 * len(seeds)
    for image, head in zip(walk[::3], heads, strict=True):
        torch.testing.assert_close(image, head, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(walk[1], walk[0], atol=1e-2)


def codes_of_a_walk(monkeypatch, people, frames):
    """Return the codes ws of all frames, [N, num_ws, w_dim]."""
    monkeypatch.setattr(render, "views", lambda subject, yaws: {"image": subject.ws})
    return torch.cat(list(render.interpolation(build_generator(), people, frames)))


def test_a_walk_closes_without_a_jump_and_has_no_corners(monkeypatch):
    people = people_of(build_generator(), 1, 2, 3)
    ws = codes_of_a_walk(monkeypatch, people, 40)
    steps = ws.roll(-1, 0) - ws  # The last one leads back to the first head.
    length = steps.flatten(1).norm(dim=1)
    assert length.min() > 0 and length[-1] < 1.5 * length[-2]
    turns = (steps - steps.roll(1, 0)).flatten(1).norm(dim=1) / length
    assert turns.max() < 0.3  # A corner would be about 1.


def test_a_walk_is_catmull_roms_spline(monkeypatch):
    people = people_of(build_generator(), 1, 2, 3, 4)
    ws = codes_of_a_walk(monkeypatch, people, 2)
    before, start, end, after = (people[i].ws[0] for i in (3, 0, 1, 2))
    torch.testing.assert_close(ws[1], (9 * (start + end) - before - after) / 16)


def test_all_frames_of_a_walk_have_the_same_jitter(monkeypatch):
    """Else noise would change at every head, and where the walk closes."""
    G, seeds, seed = build_generator(), [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    list(render.interpolation(G, people_of(G, 1, 2, 3), 2))
    assert len(seeds) == 6 and len(set(seeds)) == 1


def test_a_walk_blends_what_people_were_tuned_by(monkeypatch):
    G, name = build_generator(), "decoder.net.2.bias"
    a, b = people_of(G, 1, 2)
    a = replace(a, offsets={name: torch.ones(9)})
    found = []
    monkeypatch.setattr(
        render, "views", lambda subject, yaws: found.append(subject.G) or {"image": None}
    )
    list(render.interpolation(G, [a, b], 2))
    added = torch.stack([network.get_parameter(name) - G.get_parameter(name) for network in found])
    torch.testing.assert_close(added[:, 0], torch.tensor([1.0, 0.5, 0.0, 0.5]))


def test_a_walk_of_a_run_is_a_video_of_pairs(tmp_path, adapted, ending):
    paths = save_heads(tmp_path, "me")
    out = tmp_path / "out"
    names = go(out, adapted, latents=paths, seeds="3", interpolate=3)
    assert f"interpolation{ending}" in names and len(names) == 4
    frames = read_frames(out / f"interpolation{ending}")
    assert frames.shape == (6, 32, 64, 3)
    G, G_src, _ = subjects.load_run(adapted)
    people = [subjects.seed_to_person(G, 3), subjects.load_person(paths[0], G)]
    walks = (render.interpolation(network, people, 3) for network in (G_src, G))
    for frame, pair in zip(frames, zip(*walks, strict=True), strict=True):
        wanted = np.asarray(pictures.image_grid([torch.cat(pair)]), int)
        assert np.abs(frame - wanted).mean() < 12


@pytest.mark.parametrize(
    "options", [{"seeds": "3"}, {"seeds": "0-7", "interpolate": 10**5}, {"latents": 1}]
)
def test_a_walk_needs_two_heads_and_not_too_many_frames(tmp_path, options):
    if "latents" in options:
        options = {"latents": save_heads(tmp_path, "me")}
    with pytest.raises(ValueError, match="--interpolate needs two"):
        go(tmp_path / "out", **{"interpolate": 2} | options)


def test_together_shows_all_heads_in_one_video(tmp_path, ending):
    out = tmp_path / "out"
    names = go(out, seeds="3-5", orbit=4, together=True)
    stills = [f"seed000{seed}.png" for seed in (3, 4, 5)]
    assert names == sorted([*stills, f"orbit{ending}"])
    frames = read_frames(out / f"orbit{ending}")
    assert frames.shape == (4, 64, 64, 3)
    G = build_generator()
    for number, seed in enumerate((3, 4, 5)):
        row, column = 32 * (number // 2), 32 * (number % 2)
        turn = render.orbit(subjects.seed_to_subject(G, seed), 4)
        for frame, out in zip(frames, turn, strict=True):
            cell = frame[row : row + 32, column : column + 32]
            wanted = pictures.to_uint8(out["image"])[0].astype(int)
            assert np.abs(cell - wanted).mean() < 12
    assert frames[:, 36:, 36:].min() > 235  # Nobody.


def test_together_of_a_run_has_three_columns_a_head_with_depth(tmp_path, adapted):
    out = tmp_path / "out"
    go(out, adapted, seeds="3-4", orbit=2, together=True, depth=True)
    frames = read_frames(out / f"orbit{video.ending()}")
    assert frames.shape == (2, 32, 2 * 3 * 32, 3)


def test_depth_of_a_turning_head_stands_beside_it_on_one_scale(tmp_path):
    subject = subjects.seed_to_subject(build_generator(), 3)
    frames = list(render.frames_of([[subject]], 4, depth=True))
    turn = list(render.orbit(subject, 4))
    scale = render.depth_scale(turn[0]["image_depth"], turn[0]["mask"])
    for frame, out in zip(frames, turn, strict=True):
        picture = render.depth_images(out["image_depth"], out["mask"], scale)
        wanted = torch.cat([out["image"], render.resize_to(picture, out["image"])], dim=3)
        assert np.array_equal(frame, pictures.to_uint8(wanted)[0])
    own = render.depth_scale(turn[2]["image_depth"], turn[2]["mask"])
    assert own != scale


@pytest.mark.parametrize("together", [False, True])
def test_frames_of_an_orbit_cost_no_pass_of_the_backbone(tmp_path, monkeypatch, together):
    passes, forward = [], SynthesisNetwork.forward
    monkeypatch.setattr(
        SynthesisNetwork, "forward", lambda net, *a: passes.append(1) or forward(net, *a)
    )
    counts = []
    for frames in (0, 2, 7):
        passes.clear()
        go(
            tmp_path / "out",
            seeds="3-5",
            orbit=frames,
            together=together and frames > 0,
            depth=True,
        )
        counts.append(len(passes))
    assert counts[:1] == [3]  # One for each head.
    assert counts[1] == counts[2] == (6 if together else 3)


def test_a_head_with_all_its_files_takes_one_pass_of_the_backbone(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    passes, forward = [], SynthesisNetwork.forward
    monkeypatch.setattr(
        SynthesisNetwork, "forward", lambda net, *a: passes.append(1) or forward(net, *a)
    )
    names = go(tmp_path / "out", seeds="3", orbit=3, mesh=24, depth=True, mesh_format=("ply",))
    assert len(names) == 4 and len(passes) == 1


# Pictures without cameras.


@pytest.fixture
def flat(tmp_path, adapted):
    """A run on a generator of pictures, and its source."""
    G = flat_generator()
    save_generator(G, tmp_path / "flat.safetensors")
    shutil.copytree(adapted, tmp_path / "flat")
    changes = {"generator": str(tmp_path / "flat.safetensors")}
    change_settings(tmp_path / "flat", **changes, generator_weights=fingerprint_generator(G))
    change_weights(G)
    save_generator(G, tmp_path / "flat/generator.safetensors")
    return tmp_path / "flat"


def test_pictures_without_cameras_are_mixed_edited_and_walked_between(tmp_path, flat, ending):
    paths = save_heads(tmp_path, "me", G=flat_generator())
    subjects.save_directions({"pc0": torch.ones(12)}, tmp_path / "d.safetensors")
    given = {"latents": paths, "seeds": "3", "interpolate": 2, "edit": ("pc0=0.5",)}
    given["directions"] = tmp_path / "d.safetensors"
    out = tmp_path / "out"
    names = go(out, "", mix=(f"{flat}=0.5", f"{flat}=0.5"), **given)
    assert names == ["grid.png", f"interpolation{ending}", "me.png", "seed0003.png"]
    assert read_frames(out / f"interpolation{ending}").shape == (4, 32, 64, 3)
    go(tmp_path / "run", flat, **given)
    mixed, whole = (pixels(x / "grid.png").astype(int) for x in (out, tmp_path / "run"))
    assert np.abs(mixed - whole).max() <= 1
    assert np.abs(whole[32:] - whole[:32]).mean() > 2


@pytest.mark.parametrize("option", ["orbit", "depth", "mesh"])
def test_pictures_without_cameras_cannot_be_turned(tmp_path, flat, option):
    for given in ({"ckpt": str(flat)}, {"mix": (f"{flat}=1",)}):
        with pytest.raises(ValueError, match=f"--{option} needs .* cameras, and {flat}.* has none"):
            cfg = render.Config(**given, out=tmp_path / "out", seeds="3", device="cpu")
            render.main(replace(cfg, **{option: 16}))
    assert not (tmp_path / "out").exists()


# Packages that are missing, and files that are in the way.


def test_without_pyav_there_is_one_hint(tmp_path, ending, capsys):
    out = tmp_path / "out"
    names = go(out, seeds="3-4", orbit=2, interpolate=2)
    assert sum(name.endswith(ending) for name in names) == 3
    hints = [line for line in capsys.readouterr().err.splitlines() if "hint" in line]
    assert len(hints) == (ending == ".webp") and all("pip install av" in x for x in hints)
    go(tmp_path / "stills", seeds="3")
    assert "hint" not in capsys.readouterr().err


def test_without_trimesh_there_are_plys_and_a_hint(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    monkeypatch.setitem(sys.modules, "trimesh", None)
    assert go(tmp_path / "out", seeds="5", mesh=24) == ["seed0005.ply", "seed0005.png"]
    (hint,) = (line for line in capsys.readouterr().err.splitlines() if "hint" in line)
    assert "pip install trimesh" in hint
    go(tmp_path / "obj", seeds="5", mesh=24, mesh_format=("obj",))
    assert "hint" not in capsys.readouterr().err


def test_faces_without_their_package_are_refused_with_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(ValueError, match="pip install fast-simplification"):
        go(tmp_path / "out", seeds="5", mesh=24, faces=100)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("faces", [-1, 3])
def test_faces_out_of_bounds_are_refused(tmp_path, faces):
    with pytest.raises(ValueError, match="--faces must be 4 to"):
        go(tmp_path / "out", seeds="5", mesh=24, faces=faces)


def test_options_of_meshes_say_what_is_written(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("fast_simplification")
    G = small_generator()
    G.decoder.net[2].bias.data[0] += 20  # Density.
    save_generator(G, tmp_path / "g.safetensors")
    options = {"plain": {}, "all": {"keep": "all"}, "few": {"faces": 5000}}
    count = {}
    for name, changes in options.items():
        out, given = tmp_path / name, {"mesh": 32, "mesh_format": ("ply", "obj"), **changes}
        names = go(out, tmp_path / "g.safetensors", seeds="0", **given)
        assert names == ["seed0000.obj", "seed0000.ply", "seed0000.png"]
        count[name] = len(read_ply(out / "seed0000.ply").triangles)
    assert count["all"] > count["plain"] > 6000 and 4500 < count["few"] <= 5250


@pytest.mark.parametrize("name", ["interpolation", "orbit"])
def test_a_video_that_render_did_not_write_is_refused_by_name(tmp_path, ending, name):
    path = tmp_path / f"{name}{ending}"
    path.write_text("a holiday")
    options = {"seeds": "3-4", "orbit": 2, "together": True, "interpolate": 2}
    with pytest.raises(ValueError, match=f"{path.name} was not written by render.py"):
        go(tmp_path, **options)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "a holiday"


def test_videos_that_render_wrote_are_replaced(tmp_path, ending):
    options = {"seeds": "3-4", "together": True}
    first = go(tmp_path, orbit=2, interpolate=2, **options)
    assert go(tmp_path, orbit=3, interpolate=3, **options) == first
    for name, count in (("orbit", 3), ("interpolation", 6)):
        assert len(read_frames(tmp_path / f"{name}{ending}")) == count


def test_an_mp4_of_ours_is_in_nobodys_way_where_pyav_is_gone(tmp_path, monkeypatch):
    pytest.importorskip("av")
    go(tmp_path, seeds="3-4", interpolate=2)
    before = (tmp_path / "interpolation.mp4").read_bytes()
    monkeypatch.setitem(sys.modules, "av", None)
    assert "interpolation.webp" in go(tmp_path, seeds="3-4", interpolate=2)
    assert (tmp_path / "interpolation.mp4").read_bytes() == before
