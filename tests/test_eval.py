import csv
import json
import re
import shlex
import shutil
from collections import Counter
from dataclasses import replace
from math import asin, degrees, pi, sin, tan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_run import RENDERING, build_generator, hurry, run, world

import config
import eval as evaluation
import metrics
import train
from eval import Config, Renders, Source, Views
from files.generators import load_generator, save_generator
from harness import tables
from harness.pictures import image_grid, save_image, to_uint8
from harness.run_folder import REPOSITORY
from models.cameras import orbit
from models.eg3d import TriPlaneGenerator
from models.fingerprints import fingerprint_generator
from models.renderer import pixel_rays
from puppets import experiments, heads, oracle
from puppets.data import CAMERAS, DOMAIN_NAMES
from puppets.domains import DOMAINS, HELD_OUT


class FakeClip:
    """A CLIP whose features are the picture itself, shrunk: what is where is all it knows."""

    model = SimpleNamespace(device=torch.device("cpu"))

    def images(self, images):
        return F.normalize(F.adaptive_avg_pool2d(images, 4).flatten(1), dim=1)

    def tokens(self, images):
        return F.adaptive_avg_pool2d(images, 8).permute(0, 2, 3, 1)


def renders(angles, people):
    """Pictures of a blob that lies where the camera's angles say, of as many patterns as people."""
    yaw, pitch = angles.T.reshape(2, -1, 1, 1)
    x, y = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="xy")
    blob = torch.exp(-((x - yaw) ** 2 + (y - pitch) ** 2) * 2)
    image = blob.unsqueeze(1).repeat(1, 3, 1, 1)
    depth = 2.5 + blob.unsqueeze(1)
    mask = torch.ones_like(depth)
    return Renders(image, depth, mask, people, depth, mask)


@pytest.fixture
def scene():
    """What a source shows of some views, and of others for the pose probe."""
    generator = torch.Generator().manual_seed(3)
    views, probe_views = (
        Views(torch.empty(0), torch.rand(n, 2, generator=generator) * 1.2 - 0.6) for n in (48, 96)
    )
    people = torch.randn(48, 3, 32, 32, generator=generator)
    probes = renders(probe_views.angles, people[:1])
    return Source(views, renders(views.angles, people), probe_views, probes)


PLOTS = {name: getattr(evaluation, name) for name in ("plot_bars", "plot_steps")}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Leave out what takes a second at each call."""
    for name in PLOTS:
        monkeypatch.setattr(evaluation, name, lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of two steps, only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        run(tmp_path_factory.mktemp("eval") / "run", steps=2)
    return tmp_path_factory.getbasetemp() / "eval0" / "run"


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of it that may be changed."""
    hurry(monkeypatch)
    return Path(shutil.copytree(finished, tmp_path / "run"))


def score(ckpt, out, **changes):
    """Run eval.py on eight samples and return the rows it wrote."""
    evaluation.main(Config(ckpt=(ckpt,), out=out, samples=8, device="cpu", **changes))
    return json.loads(out.read_text())


def change_settings(ckpt, **changes):
    path = ckpt / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def depth_corr(source, adapted):
    return metrics.depth_correlation(source.depth, adapted.depth, source.mask)


CFG = Config(ckpt=(), batch=16)


def test_direction_is_where_the_orbit_puts_the_camera():
    angles = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, -0.2], [-0.4, 0.3]])
    eye = F.normalize(orbit(*angles.T, radius=1.7, pivot=(0.0, 0.0, 0.0))[:, :3, 3], dim=1)
    torch.testing.assert_close(metrics.direction(angles), eye)
    turned = metrics.angle_deg(eye, eye[:1].expand(4, 3))
    torch.testing.assert_close(turned[1].item(), degrees(0.5), rtol=1e-4, atol=0)
    # Pitch is uniform in area: -0.2 is an elevation of asin(0.4 / pi), not 0.2.
    torch.testing.assert_close(turned[2].item(), degrees(asin(0.4 / pi)), rtol=1e-4, atol=0)


def test_angles_are_exact_where_arccos_is_not():
    a = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    b = torch.tensor([[1e-4, 0.0, 1.0], [0.0, 0.0, -1.0]])
    expected = torch.tensor([degrees(1e-4), 180.0])
    torch.testing.assert_close(metrics.angle_deg(a, b), expected)


def test_an_unchanged_generator_scores_perfectly(scene):
    source = scene.renders
    scores = evaluation.likeness(FakeClip(), scene, source, CFG)
    assert scores["pose_deg"] == pytest.approx(scores["pose_source_deg"], abs=1e-3)
    assert scores["pose_source_deg"] < 3
    assert scores["identity_top1"] == scores["identity_mrr"] == scores["diversity"] == 1
    assert depth_corr(source, source) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("picture", ["constant", "one head"])
def test_a_collapsed_generator_has_no_diversity_and_chance_identity(scene, picture, noise):
    source = scene.renders
    generator = torch.Generator().manual_seed(0)
    one = source.front[:1] if picture == "one head" else torch.full_like(source.front[:1], 0.25)
    front = one + noise * torch.randn(source.front.shape, generator=generator)
    scores = evaluation.likeness(FakeClip(), scene, replace(source, front=front), CFG)
    assert scores["diversity"] < 0.01 and (noise or scores["diversity"] == 0)
    # One of 48 is chance; among pictures that differ at least by noise, some more may be luck.
    assert scores["identity_top1"] <= (0.15 if noise else 1 / 48 + 1e-6)
    assert scores["identity_mrr"] < 0.2


def test_a_collapsed_source_and_infinite_pictures_are_refused(scene):
    source = scene.renders
    same = replace(source, front=source.front[:1].expand_as(source.front))
    with pytest.raises(ValueError, match="same picture"):
        evaluation.likeness(FakeClip(), replace(scene, renders=same), source, CFG)
    broken = replace(source, front=source.front / 0, depth=source.depth / 0)
    with pytest.raises(ValueError, match="not finite"):
        evaluation.likeness(FakeClip(), scene, broken, CFG)
    with pytest.raises(ValueError, match="not finite"):
        depth_corr(source, broken)


def test_shuffled_people_are_found_by_chance_only(scene):
    source = scene.renders
    rolled = replace(source, front=source.front.roll(1, 0))
    scores = evaluation.likeness(FakeClip(), scene, rolled, CFG)
    assert scores["identity_top1"] == 0 and scores["diversity"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("change", ["mirrored", "swapped"])
def test_wrong_views_score_the_angle_between_them(scene, change):
    source, angles = scene.renders, scene.views.angles
    wrong = {
        "mirrored": (source.image.flip(-1), angles * torch.tensor([-1, 1])),
        "swapped": (source.image.roll(1, 0), angles.roll(1, 0)),
    }
    image, shown = wrong[change]
    pose = evaluation.likeness(FakeClip(), scene, replace(source, image=image), CFG)
    known = metrics.angle_deg(metrics.direction(shown), metrics.direction(angles))
    assert pose["pose_deg"] == pytest.approx(known.mean().item(), rel=0.15)


def test_a_turn_that_all_pictures_share_is_taken_for_the_domain(scene):
    turned = renders(scene.views.angles + torch.tensor([0.2, 0.0]), scene.renders.front)
    pose = evaluation.likeness(FakeClip(), scene, turned, CFG)
    assert pose["pose_deg"] < 3 < degrees(0.2)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_views_that_are_drawn_to_the_front_score_what_is_missing(scene, share):
    source, angles = scene.renders, scene.views.angles
    less = renders(angles * share, source.front)
    scores = evaluation.likeness(FakeClip(), scene, less, CFG)
    known = metrics.angle_deg(metrics.direction(angles * share), metrics.direction(angles))
    assert scores["pose_deg"] == pytest.approx(known.mean().item(), rel=0.1, abs=1)


def test_a_recoloured_domain_keeps_pose_and_a_paler_one_identity(scene):
    source = scene.renders
    tint = torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    tinted = replace(source, image=source.image + tint, front=source.front / 3 + tint)
    scores = evaluation.likeness(FakeClip(), scene, tinted, CFG)
    assert scores["pose_deg"] == pytest.approx(scores["pose_source_deg"], abs=0.05)
    assert scores["identity_top1"] == 1


def test_views_to_be_scored_fill_the_range_of_the_cameras():
    G = build_generator()
    cfg = Config(ckpt=(), samples=512)
    for views in evaluation.draw_views(G, cfg):
        low, high = views.angles.amin(0), views.angles.amax(0)
        width = torch.tensor([G.cameras.yaw_range, G.cameras.pitch_range])
        assert (high <= width).all() and (low >= -width).all()
        torch.testing.assert_close(torch.stack([-low, high]), width.expand(2, 2), rtol=0.05, atol=0)
        assert (views.angles.mean(0).abs() < 0.1 * width).all()
        assert abs(views.z.mean()) < 0.05 and views.z.std() == pytest.approx(1, abs=0.05)


def test_reversed_depth_correlates_negatively_and_flat_depth_not_at_all(scene):
    source = scene.renders
    turned = replace(source, depth=-source.depth)
    assert depth_corr(source, turned) == pytest.approx(-1, abs=1e-5)
    flat = replace(source, depth=torch.full_like(source.depth, 2.7))
    assert depth_corr(source, flat) == 0
    half = replace(source, depth=torch.cat([source.depth[:24], flat.depth[24:]]))
    assert depth_corr(source, half) == pytest.approx(0.5, abs=1e-5)
    empty = replace(source, mask=torch.zeros_like(source.mask))
    assert depth_corr(empty, source) == 0


def test_gain_is_what_the_adapted_pictures_have_beyond_the_source():
    target, other = torch.eye(4)[:1], torch.eye(4)[1:2]
    assert metrics.cosine_gain(target, other.repeat(3, 1), target.repeat(3, 1)) == (1, 1)
    same = F.normalize(torch.randn(8, 4), dim=1)
    assert metrics.cosine_gain(target, same, same)[1] == 0


class NamingClip(FakeClip):
    """A CLIP that knows brightness as words."""

    model = SimpleNamespace(device=torch.device("cpu"))
    brightness = {"a person": [1.0, 0.0], "a clown": [0.0, 1.0]}

    def images(self, images):
        bright = (images.mean((1, 2, 3)) > 0).float()
        return torch.stack([1 - bright, bright], dim=1)

    def text(self, prompts):
        return torch.tensor([self.brightness[prompt] for prompt in prompts])


def test_fidelity_is_of_the_adapted_pictures_and_gains_over_the_source(scene, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(
        evaluation, "known_domains", lambda _: {n: n for n in NamingClip.brightness}
    )
    dark = replace(scene.renders, image=-scene.renders.image)
    settings = {"prompt": "a clown", "image": None}
    bright_ones = NamingClip().text(["a clown"]).expand(48, 2)
    scores = evaluation.fidelity(
        NamingClip(), settings, None, dark, scene.renders, CFG, real=bright_ones
    )
    assert (scores["clip_text"], scores["clip_text_gain"]) == (1, 1)
    assert (scores["clip_share"], scores["clip_domain"]) == (1, "a clown")
    assert scores["fid"] == pytest.approx(0, abs=1e-6)
    scores = evaluation.fidelity(
        NamingClip(), settings, None, scene.renders, dark, CFG, real=bright_ones
    )
    assert (scores["clip_text"], scores["clip_text_gain"], scores["clip_share"]) == (0, -1, 0)
    assert scores["fid"] > 1


def test_depth_is_compared_on_the_foreground_of_the_source(finished):
    G = build_generator()
    views, _ = evaluation.draw_views(G, cfg := replace(CFG, samples=2))
    source = evaluation.render_all(G, views, 1.0, cfg, "")
    adapted = replace(source, mask=torch.zeros_like(source.mask))
    scores = evaluation.geometry(G, Source(views, source, views, source), adapted)
    assert scores["depth_corr"] == pytest.approx(1, abs=1e-5)


def features(count, seed, width=16):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def test_equal_sets_have_no_distance_and_shifted_ones_their_shift():
    pytest.importorskip("torchmetrics")
    real = features(96, seed=0)
    same = metrics.distances(real, real.flip(0))
    assert same["fid"] == pytest.approx(0, abs=1e-6) and -0.2 < same["kid"] <= 0
    scores = [metrics.distances(real, real + shift) for shift in (0.1, 0.2, 0.4)]
    # Of 16 features scaled by 4, each is shifted by 4 times the shift.
    expected = [16 * (4 * shift) ** 2 for shift in (0.1, 0.2, 0.4)]
    assert [score["fid"] for score in scores] == pytest.approx(expected, rel=1e-4)
    kid = [same["kid"], *(score["kid"] for score in scores)]
    assert kid == sorted(kid) and kid[1] - kid[0] > 0.01


def test_distances_are_the_same_at_every_call_and_draw_nothing():
    pytest.importorskip("torchmetrics")
    real, after = features(96, seed=0), features(40, seed=1)
    torch.manual_seed(1)
    first = metrics.distances(real, after)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn and metrics.distances(real, after) == first
    assert abs(first["kid"]) < 0.2  # Both are of one distribution.


SIDE = 0.3  # Angle of the view from the side, radians.


def plane_views(n=32):
    """Return depth, mask and cameras of two views of the plane z = 0: from the side, from front."""
    c = CAMERAS.label(torch.tensor([SIDE, 0.0]), torch.zeros(2))
    origins, rays = pixel_rays(c, n)
    depth = (-origins[..., 2] / rays[..., 2]).view(1, 2, n, n)
    return depth, torch.ones_like(depth), c[None]


def test_two_views_of_one_plane_agree_at_every_resolution():
    for n in (16, 64):
        assert metrics.multiview(*plane_views(n), size=128)["multiview_px"] < 0.01


@pytest.mark.parametrize("error", [0.01, 0.02, -0.02])
def test_depth_that_is_wrong_by_a_known_amount_moves_pixels_by_a_known_amount(error):
    depth, mask, c = plane_views()
    depth[:, 1] += error  # Of the frontal view, whose rays meet the plane at right angles.
    moved = metrics.multiview(depth, mask, c, size=128)["multiview_px"]
    # From the front the error shows as error * tan along the plane, from the side as error * sin.
    px = CAMERAS.focal * 128 / CAMERAS.radius
    assert moved == pytest.approx(abs(error) * px * (tan(SIDE) + sin(SIDE)) / 2, rel=0.1)


def test_true_heads_agree_but_for_what_the_other_view_does_not_see():
    z, c = torch.randn(2, heads.Z_DIM, generator=torch.Generator().manual_seed(0)), []
    views = CAMERAS.label(torch.tensor([0.5, 0.0]), torch.tensor([0.2, 0.0]))  # [2, 25]
    drawn = [heads.render(x.expand(2, -1), views, size=64, supersample=1)[1:] for x in z]
    depth, mask = (torch.stack(maps)[:, :, 0] for maps in zip(*drawn, strict=True))
    c = views.expand(2, -1, -1)
    true = metrics.multiview(depth, mask, c, size=128)["multiview_px"]
    mixed = (torch.stack([x[:, 0], x.roll(1, 0)[:, 1]], dim=1) for x in (depth, mask))
    assert true < 0.5 < 2 * true < metrics.multiview(*mixed, c, size=128)["multiview_px"]


def test_views_without_foreground_have_no_multiview_score():
    depth, mask, c = plane_views()
    assert metrics.multiview(depth, torch.zeros_like(mask), c, size=128) == {}


def test_geometry_compares_a_random_view_with_the_frontal_one(finished):
    G = build_generator()
    cfg = replace(CFG, samples=2)
    views, _ = evaluation.draw_views(G, cfg)
    drawn = evaluation.render_all(G, views, 1.0, cfg, "")
    scores = evaluation.geometry(G, Source(views, drawn, views, drawn), drawn)
    assert scores["depth_corr"] == pytest.approx(1, abs=1e-5)
    assert 0 <= scores["multiview_px"] < 32
    torch.manual_seed(cfg.seed + 1)
    ws = G.mapping(views.z[1:], G.cameras.frontal())
    c = torch.cat([G.cameras.label(*views.angles[1:].T), G.cameras.frontal()])
    out = G.synthesis(ws, c[None])
    assert torch.equal(drawn.front_depth[1], out["image_depth"][1])
    assert torch.equal(drawn.front_mask[1], out["mask"][1])


def test_eval_scores_a_run_and_writes_json(finished, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "results.json"
    row = score(finished, out)[str(finished)]
    names = {"clip_text", "pose_deg", "identity_top1", "identity_mrr", "diversity", "depth_corr"}
    names |= {"multiview_px"}
    assert names < set(row) and 0.1 < row["peak_gb"] < 50
    assert (row["samples"], row["seed"], row["trunc"]) == (8, 1_000_000, 1.0)
    assert row["total_minutes"] == pytest.approx(2 * row["step_seconds"] / 60)
    assert f"{row['diversity']:.3g}" in capsys.readouterr().out


def test_tables_and_plots_stand_beside_the_json(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, plot in PLOTS.items():
        monkeypatch.setattr(evaluation, name, plot)
    row = score(finished, tmp_path / "results.json")[str(finished)]
    with open(tmp_path / "results-table.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["run"] == str(finished) and float(line["diversity"]) == row["diversity"]
    assert set(line) == {"run", *row}
    text = (tmp_path / "results-table.md").read_text()
    assert len(text.splitlines()) == 3 and f"| {row['pose_deg']:.3g} |" in text
    for name in ("bars", "steps"):
        with Image.open(tmp_path / f"results-{name}.png") as plot:
            plot.load()
    assert len(list(tmp_path.iterdir())) == 5


def test_without_matplotlib_there_is_a_hint_and_no_plot(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "plot_bars", None)
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    monkeypatch.setattr(evaluation, "score_run", lambda *_: ROW)
    score(finished, tmp_path / "results.json")
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "results-table.md").exists()


ROW = {"method": "gca3d", "target": "a clown", "diversity": 0.5}


def test_what_has_not_changed_is_not_scored_again(copied, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    before = score(copied, out)
    monkeypatch.setattr(evaluation, "render_all", None)
    assert score(copied, out) == before
    scored = []
    monkeypatch.setattr(evaluation, "score_run", lambda ckpt, cfg, *_: scored.append(cfg) or ROW)
    for change in (
        lambda: score(copied, out, seed=7),
        lambda: [change_settings(copied, steps=9), score(copied, out)],
        lambda: (
            [save_generator(build_generator(3), copied / "generator.safetensors")]
            + [score(copied, out)]
        ),
        lambda: [(copied / "log.jsonl").unlink(), score(copied, out)],
    ):
        out.write_text(json.dumps(before))
        change()
    assert len(scored) == 4


def test_a_run_that_changes_while_it_is_scored_is_scored_again(copied, tmp_path, monkeypatch):
    render_all = evaluation.render_all

    def train_meanwhile(*args, **options):
        save_generator(build_generator(3), copied / "generator.safetensors")
        return render_all(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "render_all", train_meanwhile)
        before = score(copied, tmp_path / "results.json")[str(copied)]
    after = score(copied, tmp_path / "results.json")[str(copied)]
    assert before["weights"] != after["weights"] == fingerprint_generator(load_generator(copied))


def test_rows_that_another_process_wrote_meanwhile_are_kept(finished, tmp_path, monkeypatch):
    out = tmp_path / "results.json"

    def score_run(*_):
        evaluation.write_rows(out, {"runs/other": ROW})
        return ROW

    monkeypatch.setattr(evaluation, "score_run", score_run)
    assert score(finished, out).keys() == {"runs/other", str(finished)}


def test_quick_scores_fewer_samples(finished, tmp_path, monkeypatch):
    samples = []
    monkeypatch.setattr(evaluation, "score_run", lambda _, cfg, *__: samples.append(cfg) or ROW)
    for count in (256, 8):
        cfg = Config(ckpt=(finished,), out=tmp_path / "x.json", samples=count, quick=True)
        evaluation.main(cfg)
    assert [cfg.samples for cfg in samples] == [evaluation.QUICK, 8]


def test_runs_that_differ_in_their_seed_alone_are_one_row():
    row = ROW | {"samples": 8, "seed": 5, "config": "a", "run_seed": 0}
    rows = {
        "runs/clown-s0": row | {"diversity": 0.4, "true_diversity": 0.9},
        "runs/robot": row | {"config": "b"},
        "runs/clown-s1": row | {"diversity": 0.6, "true_diversity": 0.9, "run_seed": 1},
        "runs/copy": row,
        "runs/more": row | {"samples": 16, "run_seed": 2},
        "old": ROW,
        "older": ROW | {"target": "a |\nb"},
    }
    assert {name: len(group) for name, group in tables.group_rows(rows).items()} == {
        **{"runs/clown-s{0,1}": 2, "runs/robot": 1, "runs/copy": 1, "runs/more": 1},
        **{"old": 1, "older": 1},
    }
    text = tables.markdown_table(rows)
    assert "| runs/clown-s{0,1} | gca3d | a clown | 0.5 ± 0.14 (0.9) |" in text
    assert "a \\| b" in text and len(text.splitlines()) == 8


def test_seed_and_machine_are_no_other_configuration():
    settings = {"prompt": "a clown", "seed": 0, "out": "a", "device": None, "lr": 1e-3}
    same = settings | {"seed": 1, "out": "b", "device": "cuda"}
    first, second, third = map(
        evaluation.fingerprint_settings, (settings, same, settings | {"lr": 1e-4})
    )
    assert first == second != third


@pytest.fixture
def photos(finished, tmp_path):
    """A folder of what the adapted generator of `finished` shows of the latents scored."""
    G = load_generator(finished)
    views, _ = evaluation.draw_views(G, cfg := replace(CFG, samples=8))
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(evaluation.render_all(G, views, 1.0, cfg, "").image):
        save_image(image_grid([image[None]]), folder / f"{i}.PNG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_real_pictures_that_are_the_adapted_ones_have_no_distance(finished, tmp_path, photos):
    pytest.importorskip("torchmetrics")
    near = score(finished, tmp_path / "a.json", real=photos)[str(finished)]
    for i, path in enumerate(photos.glob("*.PNG")):
        Image.new("RGB", (40, 30), (0, 25 * i, 255)).save(path)
    far = score(finished, tmp_path / "a.json", real=photos)[str(finished)]
    assert near["fid"] < 0.1 * far["fid"] and near["kid"] < far["kid"]
    assert far["real"] == str(photos) and far["pose_deg"] == near["pose_deg"]


@pytest.mark.parametrize("case", ["missing", "few", "broken", "no torchmetrics"])
def test_real_pictures_that_cannot_be_used_are_refused(
    finished, tmp_path, photos, monkeypatch, case
):
    if case == "missing":
        shutil.rmtree(photos)
    elif case == "few":
        (photos / "0.PNG").unlink()
    elif case == "broken":
        (photos / "0.PNG").write_bytes(b"no picture")
    else:
        monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    word = {"few": "7 pictures", "broken": "0.PNG", "no torchmetrics": "pip install"}
    out = tmp_path / "new" / "results.json"
    with pytest.raises(ValueError, match=word.get(case, "--real")):
        score(finished, out, real=photos)
    assert not out.parent.exists()


def test_scores_do_not_depend_on_the_batch(finished, tmp_path):
    first = score(finished, tmp_path / "a.json", batch=1)[str(finished)]
    second = score(finished, tmp_path / "b.json", batch=8)[str(finished)]
    numbers = {k: v for k, v in first.items() if isinstance(v, float)}
    assert {k: second[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)


def test_runs_share_the_renders_of_one_source_but_not_of_another(finished, copied, tmp_path):
    alone = score(finished, tmp_path / "a.json")[str(finished)]
    drawn, render_all = [], evaluation.render_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation, "render_all", lambda *a, **k: drawn.append(a[4]) or render_all(*a, **k)
        )
        cfg = Config(ckpt=(finished, copied), out=tmp_path / "b.json", samples=8, device="cpu")
        evaluation.main(cfg)
        assert drawn == ["pose probe", "source", "adapted", "adapted"]
        change_settings(copied, trunc=0.5)
        cfg.out.unlink()
        evaluation.main(cfg)
        assert drawn[4:] == ["pose probe", "source", "adapted"] * 2
    row = json.loads(cfg.out.read_text())[str(finished)]
    assert row == alone


def test_a_run_is_rendered_with_its_own_truncation(copied, tmp_path):
    change_settings(copied, trunc=0.5)
    views, _ = evaluation.draw_views(build_generator(), cfg := replace(CFG, samples=2))
    G = build_generator()
    half, full = (evaluation.render_all(G, views, trunc, cfg, "").image for trunc in (0.5, 1.0))
    assert not torch.allclose(half, full)
    trunc, render_all = [], evaluation.render_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation, "render_all", lambda *a, **k: trunc.append(a[2]) or render_all(*a, **k)
        )
        row = score(copied, tmp_path / "results.json")[str(copied)]
    assert trunc == [0.5, 0.5, 0.5] and row["trunc"] == 0.5


def test_share_names_the_domain_that_counted(copied, tmp_path):
    prior = Path(shutil.copytree(world() / "diffusion", tmp_path / "diffusion"))
    domains = {"bronze": "a bronze statue", "clown": "a clown"}
    (prior / "vocabulary.json").write_text(json.dumps({"words": [], "domains": domains}))
    change_settings(copied, diffusion=str(prior))
    row = score(copied, tmp_path / "results.json")[str(copied)]
    assert row["clip_domain"] == "a bronze statue" and 0 <= row["clip_share"] <= 1


def test_a_second_call_keeps_the_rows_of_other_runs(finished, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    other = {"method": "sds", "target": "a clown", "diversity": 0.5}
    out.write_text(json.dumps({"runs/other": other, str(finished): other}))
    monkeypatch.setattr(evaluation, "score_run", lambda *_: other | {"diversity": 0.75})
    assert score(finished, out) == {"runs/other": other, str(finished): other | {"diversity": 0.75}}


def test_a_score_that_is_no_number_is_not_written(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_run", lambda *_: {"diversity": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        score(finished, tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


ROWS_OF_OTHERS = (
    *('{"a": 1}', '[{"method": 1}]', '{"a": {"b": 1}}', "no json", '{"a": null}'),
    *(
        json.dumps({"a": {"method": "m", "target": "t"} | change})
        for change in ({"target": 3}, {"method": None}, {"config": "c"}, {"diversity": [1]})
    ),
)


@pytest.mark.parametrize("text", ROWS_OF_OTHERS)
def test_a_foreign_file_is_left_alone(finished, tmp_path, text):
    out = tmp_path / "results.json"
    out.write_text(text)
    with pytest.raises(ValueError, match="results.json"):
        score(finished, out)
    assert out.read_text() == text


def test_a_folder_as_output_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        score(finished, tmp_path)


def test_every_run_is_checked_before_any_is_scored(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_run", None)
    file, out = finished / "generator.safetensors", tmp_path / "new" / "results.json"
    with pytest.raises(ValueError, match="no run folder"):
        evaluation.main(Config(ckpt=(finished, file), out=out))
    with pytest.raises(ValueError, match="name a run"):
        evaluation.main(Config(ckpt=(), out=out))
    assert not out.parent.exists()


@pytest.mark.parametrize("name", ["clip", "diffusion", "method", "prompt", "seed", "trunc"])
def test_settings_without_a_key_are_refused_by_name(copied, tmp_path, name):
    path = copied / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != name}))
    with pytest.raises(ValueError, match=f"config.json.*'{name}'"):
        score(copied, tmp_path / "results.json")


def test_a_run_without_result_is_refused(copied, tmp_path):
    (copied / "generator.safetensors").unlink()
    with pytest.raises(ValueError, match="no generator.safetensors"):
        score(copied, tmp_path / "results.json")


def test_a_generator_of_infinite_pictures_is_refused_by_name(copied, tmp_path):
    G = build_generator()
    for weight in G.superresolution.parameters():
        weight.data.fill_(1e30)
    save_generator(G, copied / "generator.safetensors")
    with pytest.raises(ValueError, match=f"{copied}.*not finite"):
        score(copied, tmp_path / "results.json")


def test_settings_without_a_target_are_refused(copied, tmp_path):
    change_settings(copied, prompt=None, image=None)
    with pytest.raises(ValueError, match="neither 'prompt' nor 'image'"):
        score(copied, tmp_path / "results.json")


def test_a_log_cut_off_by_a_kill_still_tells_the_cost(copied):
    log = copied / "log.jsonl"
    whole = evaluation.cost(copied)
    with log.open("a") as file:
        file.write('{"step": 3, "seco')
    assert evaluation.cost(copied) == whole
    log.write_text(
        '{"step": 1, "seconds": 1, "peak_gb": 2.5}\n{"step": 2, "seconds": 3, "peak_gb": 4.5}\n'
    )
    assert evaluation.cost(copied) == pytest.approx(
        {"step_seconds": 2, "total_minutes": 4 / 60, "peak_gb": 4.5}
    )
    for foreign in (
        "[]",
        '{"step": 1, "seconds": "1"}',
        '{"step": 1, "seconds": 1, "peak_gb": "2"}',
    ):
        log.write_text(f"{foreign}\n")
        with pytest.raises(ValueError, match="log.jsonl"):
            evaluation.cost(copied)
    log.unlink()
    assert evaluation.cost(copied) == {}


def people(count, seed=0):
    """Return latents and camera labels of puppets."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, heads.Z_DIM, generator=generator)
    return z, CAMERAS.label(*(torch.rand(2, count, generator=generator) - 0.5))


class TrueOracle:
    """An oracle that reads everything right off pictures in the order of `people`."""

    def __init__(self, z, c, domain):
        logits = F.one_hot(torch.tensor(DOMAIN_NAMES.index(domain)), len(DOMAIN_NAMES)).float()
        self.answer = logits.expand(len(z), -1), heads.identity(z), oracle.camera_direction(c)

    def __call__(self, images):
        return self.answer


def test_true_pictures_score_perfectly():
    z, c = people(1)
    truth = heads.render(z, c, "bronze")[0]
    scores = oracle.compare(TrueOracle(z, c, "bronze"), truth, truth, z, c, "bronze")
    expected = {"id": 1, "pose_deg": 0, "domain": 1}
    expected = {f"oracle_{name}": value for name, value in expected.items()}
    expected |= {f"true_{name}": value for name, value in expected.items()} | {"oracle_l1": 0}
    assert scores == pytest.approx(expected, abs=1e-4)


def test_another_domain_person_and_camera_are_told_from_the_truth():
    (z, c), (other_z, other_c) = people(1), people(1, seed=1)
    eye = TrueOracle(other_z, other_c, "clown")
    black = -torch.ones(1, 3, oracle.SIZE, oracle.SIZE)
    truth = heads.render(z, c, "bronze")[0]
    scores = oracle.compare(eye, black, truth, z, c, "bronze")
    known = metrics.angle_deg(oracle.camera_direction(c), oracle.camera_direction(other_c))
    assert scores["oracle_pose_deg"] == pytest.approx(known.mean().item(), abs=1e-3)
    assert scores["oracle_domain"] == 0 and scores["oracle_id"] < 0.9
    assert scores["oracle_l1"] == pytest.approx((truth + 1).mean().item(), abs=1e-5)


class EyeForBlack(TrueOracle):
    """An oracle that is right about the truth, and wrong about black pictures."""

    def __call__(self, images):
        domains, z, camera = super().__call__(images)
        wrong = (images.mean((1, 2, 3)) == -1).float()[:, None]
        return domains * (1 - wrong), z * (1 - 2 * wrong), camera * (1 - 2 * wrong)


def test_what_the_truth_gets_is_told_from_what_the_pictures_get():
    z, c = people(2)
    truth = heads.render(z, c, "bronze", size=oracle.SIZE)[0]
    black = -torch.ones_like(truth)
    scores = oracle.compare(EyeForBlack(z, c, "bronze"), black, truth, z, c, "bronze")
    assert scores["oracle_id"] == pytest.approx(-1) and scores["true_oracle_id"] == pytest.approx(1)
    assert scores["oracle_pose_deg"] == pytest.approx(180)
    assert scores["true_oracle_pose_deg"] == pytest.approx(0, abs=1e-3)
    assert (scores["oracle_domain"], scores["true_oracle_domain"]) == (0, 1)


def puppet_generator(seed=0):
    """Return a generator of 128 px pictures of puppets' latents, with random weights."""
    torch.manual_seed(seed)
    G = TriPlaneGenerator(
        z_dim=heads.Z_DIM,
        c_dim=25,
        w_dim=8,
        img_resolution=oracle.SIZE,
        img_channels=3,
        mapping_kwargs={"num_layers": 1},
        rendering_kwargs=RENDERING,
        sr_kwargs={"channels": (4, 4), "input_resolution": 64},
        channel_base=64,
        channel_max=4,
        plane_resolution=8,
        plane_channels=4,
        decoder_hidden=4,
        feature_channels=4,
    )
    G.neural_rendering_resolution = 8
    return G.eval().requires_grad_(False)


@pytest.fixture
def puppet_run(copied, tmp_path):
    """A run that adapted puppets to bronze, its row of eval.py, and a file of an oracle."""
    save_generator(puppet_generator(), copied / "generator.safetensors")
    save_generator(source := puppet_generator(seed=1), tmp_path / "source.safetensors")
    prior = Path(shutil.copytree(world() / "diffusion", tmp_path / "diffusion"))
    domains = {name: spec.phrases[0] for name, spec in DOMAINS.items()}
    (prior / "vocabulary.json").write_text(json.dumps({"words": [], "domains": domains}))
    weights = fingerprint_generator(source)
    generator = str(tmp_path / "source.safetensors")
    change_settings(copied, diffusion=str(prior), generator=generator, generator_weights=weights)
    out, weights = tmp_path / "results.json", tmp_path / "oracle.safetensors"
    row = {"method": "gca3d", "target": "a bronze statue", "samples": 3, "seed": 5}
    row["weights"] = fingerprint_generator(puppet_generator())
    out.write_text(json.dumps({str(copied): row}))
    torch.manual_seed(0)
    save_file(oracle.Oracle().state_dict(), weights)
    return oracle.Config(ckpt=(copied,), out=out, oracle=weights)


def test_oracle_adds_its_scores_to_the_row(puppet_run, capsys):
    before = json.loads(puppet_run.out.read_text())[str(puppet_run.ckpt[0])]
    oracle.main(puppet_run)
    row = json.loads(puppet_run.out.read_text())[str(puppet_run.ckpt[0])]
    assert before.items() < row.items() and row["oracle_target"] == "bronze"
    assert 0 < row["oracle_l1"] < 2 and 0 < row["true_oracle_pose_deg"] < 180
    assert 0 < row["true_pose_deg"] < 180 and 1 / 3 <= row["true_identity_mrr"] <= 1
    assert f"{row['oracle_l1']:.3g}" in capsys.readouterr().out


def test_oracle_scores_a_row_once_and_only_of_the_run_it_describes(puppet_run, monkeypatch):
    pytest.importorskip("torchmetrics")
    oracle.main(puppet_run)
    row = json.loads(puppet_run.out.read_text())[str(puppet_run.ckpt[0])]
    assert row["fid"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(oracle, "score_run", None)
        oracle.main(puppet_run)
    del row["fid"]
    puppet_run.out.write_text(json.dumps({str(puppet_run.ckpt[0]): row | {"weights": "other"}}))
    with pytest.raises(ValueError, match="run eval.py again"):
        oracle.main(puppet_run)


def test_oracle_leaves_the_distance_to_other_pictures(puppet_run):
    run = str(puppet_run.ckpt[0])
    row = json.loads(puppet_run.out.read_text())[run]
    puppet_run.out.write_text(json.dumps({run: row | {"real": "photos", "fid": 7.0}}))
    oracle.main(puppet_run)
    row = json.loads(puppet_run.out.read_text())[run]
    assert row["fid"] == 7 and "kid" not in row and row["oracle_l1"] > 0


def test_oracle_looks_at_the_views_that_eval_scored(puppet_run, monkeypatch):
    seen = {}
    monkeypatch.setattr(oracle, "compare", lambda _, i, t, z, c, d: seen.update(z=z, c=c) or {})
    oracle.main(puppet_run)
    G = puppet_generator()
    views, _ = evaluation.draw_views(G, Config(ckpt=(), samples=3, seed=5))
    assert torch.equal(seen["z"], views.z)
    assert torch.equal(seen["c"], G.cameras.label(*views.angles.T))


def test_oracle_judges_the_truth_from_both_views_and_the_sets_against_it(puppet_run, monkeypatch):
    pytest.importorskip("torchmetrics")
    judged, sets = [], []
    likeness, distances = evaluation.likeness, oracle.distances
    monkeypatch.setattr(evaluation, "likeness", lambda *a: judged.append(a[2]) or likeness(*a))
    monkeypatch.setattr(oracle, "distances", lambda *a: sets.append(a) or distances(*a))
    monkeypatch.setattr(evaluation, "embed", lambda clip, images, cfg: images.flatten(1)[:, :64])
    drawn = []
    compare = oracle.compare
    monkeypatch.setattr(oracle, "compare", lambda *a: drawn.append(a[1:3]) or compare(*a))
    oracle.main(puppet_run)
    (images, truth), (true,) = drawn[0], judged
    assert torch.equal(true.image, truth)
    G = puppet_generator()
    views, _ = evaluation.draw_views(G, Config(ckpt=(), samples=3, seed=5))
    front = oracle.draw_truth(views.z, G.cameras.frontal(3), "bronze")
    assert torch.equal(true.front, front) and not torch.equal(true.front, truth)
    of_truth, of_images = (x.flatten(1)[:, :64] for x in (truth, images))
    assert torch.equal(sets[0][0], of_truth) and torch.equal(sets[0][1], of_images)


def test_oracle_reads_the_domain_of_a_picture(tmp_path):
    z, c = people(1)
    picture = Image.fromarray(to_uint8(heads.render(z, c, "devil", size=64)[0])[0])
    save_image(picture, tmp_path / "reference.png")
    eye = TrueOracle(z, c, "devil")
    assert oracle.target_domain(tmp_path, {"prompt": None}, eye) == "devil"


@pytest.mark.parametrize("prompt", ["a person with green hair", "a person with long pink hair"])
def test_oracle_takes_an_edit_for_an_edit_of_a_person(prompt):
    puppets = REPOSITORY / "checkpoints/puppets"
    settings = {"prompt": prompt, "diffusion": str(puppets / "diffusion")}
    assert oracle.target_domain(None, settings | {"clip": str(puppets / "clip")}, None) == "person"


def test_edits_are_compared_where_they_belong_and_where_they_do_not():
    z, c = torch.randn(2, heads.Z_DIM), CAMERAS.sample(2)
    before, after = (oracle.draw_truth(z, c, "person", hair) for hair in (None, "green"))
    region = oracle.edited_region(after, before)
    assert 0.02 < region.float().mean() < 0.5
    assert torch.equal(before.masked_fill(region, 0), after.masked_fill(region, 0))
    mask = heads.render(z, c, "person", size=64)[2]
    source = Renders(before, mask, mask, before, mask, mask)
    perfect = oracle.compare_edit(after, source, after, region)
    assert perfect["edit_inside_l1"] == perfect["edit_outside_l1"] == 0
    nothing = oracle.compare_edit(before, source, after, region)
    assert nothing["edit_inside_l1"] == nothing["source_inside_l1"] > 0.1
    shifted = oracle.compare_edit((after + 0.1).clamp(-1, 1), source, after, region)
    assert shifted["edit_outside_l1"] == pytest.approx(0.1, abs=0.02)


def test_hair_to_draw_is_that_of_the_prompt():
    for prompt, hair in (
        ("a person with pink hair", "pink"),
        ("a green zombie", None),
        (None, None),
    ):
        assert oracle.target_hair({"prompt": prompt}) == hair


def test_oracle_refuses_what_it_cannot_judge(puppet_run, finished):
    with pytest.raises(ValueError, match="run eval.py first"):
        oracle.main(replace(puppet_run, ckpt=(finished,)))
    with pytest.raises(ValueError, match="is missing"):
        oracle.main(replace(puppet_run, oracle=finished / "oracle.safetensors"))
    shutil.copy(finished / "generator.safetensors", puppet_run.ckpt[0])
    with pytest.raises(ValueError, match="only of puppets"):
        oracle.main(puppet_run)


def read_tables(path):
    """Return the rows of each Markdown table without a heading in the first column."""
    found, names = [], None
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if line.startswith("|  |"):
            names = cells
            found.append([])
        elif names and line.startswith("| ") and "---" not in line:
            found[-1].append(dict(zip(names, cells, strict=True)))
        elif not line.startswith("|"):
            names = None
    return found


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "DOCS", tmp_path)
    for name in ("tuning", "costs"):
        shutil.copy(REPOSITORY / f"docs/{name}.json", tmp_path)
    return tmp_path


def test_plan_covers_every_held_out_domain_and_method():
    runs = experiments.plan()
    words, parts = experiments.GROUPS["words"], experiments.GROUPS["parts"]
    assert len(experiments.TABLE) >= 6 and set(HELD_OUT) <= set(experiments.TABLE)
    assert len(set(parts.domains) & set(HELD_OUT)) >= 2 and set(parts.domains) - set(HELD_OUT)
    told = {options.get("method", "gca3d") for options in runs.values()}
    assert told == set(config.METHODS)
    assert set(words.domains) >= set(parts.domains)  # So that the first row is there already.
    for name, options in runs.items():
        assert name.endswith(f"-s{options['seed']}")
        config.check(train.Config(out=experiments.RUNS / name, **options))


def test_steps_at_equal_minutes_follow_from_what_a_step_costs():
    costs = json.loads((REPOSITORY / "docs/costs.json").read_text())
    assert costs.keys() == config.METHODS.keys()
    for name in ("minutes", "minutes-pictures"):
        for options in experiments.GROUPS[name].rows.values():
            steps, cost = options.get("steps", 50), costs[options.get("method", "gca3d")]
            assert steps * cost == pytest.approx(50 * costs["gca3d"], rel=0.2)


def test_commands_in_the_tables_are_those_of_the_plan():
    for name, options in experiments.plan().items():
        argv = shlex.split(experiments.command(name, options))[2:]
        planned = train.Config(**{"out": experiments.RUNS / name} | options)
        assert config.parse(argv, "") == planned


def test_tables_of_no_scores_and_of_rows_with_different_names(docs):
    experiments.write_tables({})
    row = {"method": "gca3d", "target": "x", "samples": 8, "seed": 5, "trunc": 1.0}
    experiments.write_tables(
        {
            "gca-3d-bronze-s0": row | {"pose_deg": 5.25, "true_pose_deg": 4.0},
            "gca-3d-picture-devil-s0": row | {"diversity": 0.25},
        }
    )
    (bronze, devil), *_ = read_tables(docs / "results.md")
    assert (bronze[""], bronze["pose [deg] ↓"]) == ("gca-3d-bronze", "5.25 (4)")
    assert (devil[""], devil["pose [deg] ↓"]) == ("gca-3d-picture-devil (held out)", "")
    assert devil["diversity ↑"] == "0.25"


def test_tables_give_mean_over_domains_and_deviation_over_seeds(docs):
    row = {"method": "gca3d", "target": "x", "samples": 8}
    scores = {}
    for seed, shift in ((0, 0.1), (1, 0.3)):
        for number, name in enumerate(experiments.TABLE):
            scores[f"gca-3d-{name}-s{seed}"] = row | {"pose_deg": number + shift}
            scores[f"sds-{name}-s{seed}"] = row | {"pose_deg": 4 + shift}
    experiments.write_tables(scores)
    text = (docs / "results.md").read_text()
    held_out, every = text.split("## Methods, from a prompt: ")[1:3]
    assert held_out.startswith("means over marble, robot, devil, elf\n")
    ours = next(line for line in held_out.splitlines() if line.startswith("| GCA-3D"))
    assert "| 3.7 ± 0.14 |" in ours  # Of 2, 3, 4 and 5.
    assert "| GCA-3D |" in every and "| 2.7 ± 0.14 |" in every and "| 4.2 ± 0.14 |" in every
    assert "StyleGAN-Fusion |" not in text and "python train.py --method sds" in text


def test_experiments_score_again_what_has_changed(docs, monkeypatch, tmp_path):
    scored = []

    def score_run(ckpt, cfg, device, sources):
        scored.append((ckpt.name, cfg.samples))
        row = {"method": "gca3d", "target": "x", "samples": cfg.samples}
        return row | {"inputs": evaluation.fingerprint_inputs(ckpt, cfg)}

    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    (tmp_path / "sds-bronze-s0").mkdir()
    monkeypatch.setattr(experiments.train, "main", lambda cfg: None)
    monkeypatch.setattr(experiments.evaluation, "score_run", score_run)
    monkeypatch.setattr(experiments.oracle, "load_oracle", lambda: None)
    monkeypatch.setattr(experiments.oracle, "score_run", lambda *_: {"oracle_l1": 0.1})
    monkeypatch.setattr(experiments, "draw_reference", lambda _: None)
    for name in ("draw_figures", "draw_orbit"):
        monkeypatch.setattr(experiments, name, lambda: None)
    for samples, trained in ((8, "a"), (8, "a"), (16, "a"), (16, "b")):
        (tmp_path / "sds-bronze-s0/config.json").write_text(trained)
        experiments.main(experiments.Config(only="sds-bronze-s0", samples=samples))
    assert scored == [("sds-bronze-s0", 8), ("sds-bronze-s0", 16), ("sds-bronze-s0", 16)]
    row = json.loads((docs / "results.json").read_text())["sds-bronze-s0"]
    assert row["samples"] == 16 and row["oracle_l1"] == 0.1


def test_true_heads_are_seen_as_the_adapted_ones_are():
    """Of the source's own domain they are what the source generator draws."""
    true = experiments.show_truth("person")
    drawn = experiments.show(load_generator(REPOSITORY / experiments.SOURCE))
    error = (true - drawn).abs().mean((1, 2, 3))
    assert true.shape == drawn.shape and error.max() < 0.15
    assert (true.roll(2, 0) - drawn).abs().mean() > 2 * error.mean()


def test_numbers_of_the_readme_are_those_that_the_experiments_wrote():
    shown, written = (read_tables(REPOSITORY / name) for name in ("README.md", "docs/results.md"))
    assert [len(table) for table in shown] == [8, 2, 6, 3]
    for table in shown:
        assert any(
            all(any(row.items() <= other.items() for other in rows) for row in table)
            for rows in written
        ), table


def test_readme_counts_the_trials():
    trials = evaluation.read_rows(REPOSITORY / "docs/tuning.json")
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    names = {"gca3d": "GCA-3D", "sds": "SDS", "nada": "NADA", "3d-adapter": "3D-Adapter"}
    names |= {"stylegan-fusion": "StyleGAN-Fusion", "diffusiongan3d": "DiffusionGAN3D"}
    counts = Counter(row["method"] for row in trials.values())
    assert counts.keys() == names.keys()
    for method, count in counts.items():
        assert re.search(rf"\b{count} (runs )?of {names[method]}\b", readme), method


def test_committed_scores_are_still_read():
    rows = evaluation.read_rows(REPOSITORY / "docs/results.json")
    over_seeds = {name.rpartition("-s")[0] for name in rows}
    assert len(tables.markdown_table(rows).splitlines()) == len(over_seeds) + 2


def test_results_are_those_of_the_committed_scores(docs):
    scores = json.loads((REPOSITORY / "docs/results.json").read_text())
    experiments.write_tables(scores)
    written = (docs / "results.md").read_text().replace(str(docs), "docs")
    assert written == (REPOSITORY / "docs/results.md").read_text()
