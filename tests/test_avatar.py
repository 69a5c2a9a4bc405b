"""One head: its generator, its own planes' terms, the prior's brush, and all of avatar.py."""

import functools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_panohead import tiny as small_panohead
from test_rosinality import small_generator as flat_generator
from test_texture import CAMERAS, sphere
from tiny_generator import even_samples, small_generator
from tiny_prior import FakePrior
from tiny_run import build_generator, change_settings, hurry, run, world
from video_fixtures import read_frames

import avatar
import config
import eval as evaluation
import invert
import refine
import render
import subjects
import train
from files.generators import load_generator, save_generator
from harness.run_folder import AVATAR, REPOSITORY
from harness.video import MOST_FRAMES, ending
from losses import opacity_loss, variation_loss
from models.diffusion import Condition
from models.eg3d import OWN_GAIN
from models.noise import ddim, noise_errors, repaint, signal
from models.texture import look, unwrap
from refine import Textured, paint_over, yaws
from samples import draw_samples
from terms import Moment, pull_back

# A generator of one head.


BUILDERS = {"eg3d": small_generator, "panohead": small_panohead}


@pytest.fixture(params=BUILDERS)
def usual(request):
    return BUILDERS[request.param]()


def one_head(G, seed=3, own=0.0):
    """Have a generator keep the head of a seed, with random planes of its own."""
    G.keep_one_head(subjects.seed_to_ws(G, seed))
    generator = torch.Generator().manual_seed(0)
    G.own_planes.data = own * torch.randn(G.own_planes.shape, generator=generator)
    return G


def portrait(G, seed=0):
    with even_samples(), torch.no_grad():
        return G.synthesis(subjects.seed_to_ws(G, seed), G.cameras.frontal())["image"]


def test_all_codes_show_the_head_that_was_kept(usual):
    before, others = portrait(usual, 3), portrait(usual, 0)
    G = one_head(usual)
    assert G.z_dim == 0 and not torch.equal(before, others)
    assert torch.equal(portrait(G, 0), before) and torch.equal(portrait(G, 3), before)
    ws = G.mapping(torch.empty(2, 0), G.cameras.sample(2), 0.3)
    assert torch.equal(ws, G.own_ws.expand(2, -1, -1))


def test_planes_of_its_own_are_added_and_change_nothing_while_zero(usual):
    ws = subjects.seed_to_ws(usual, 3)
    planes, before = usual.planes(ws), portrait(usual, 3)
    G = one_head(usual)
    assert torch.equal(G.planes(ws), planes)
    G = one_head(usual, own=0.1)
    torch.testing.assert_close(G.planes(ws), planes + OWN_GAIN * planes.std() * G.own_planes)
    assert not torch.allclose(portrait(G), before)


def test_one_head_comes_back_from_its_file_bit_for_bit(usual, tmp_path):
    G = one_head(usual, own=0.1)
    save_generator(G, tmp_path / "one.safetensors")
    again = load_generator(tmp_path / "one.safetensors")
    assert (again.z_dim, again.gives) == (0, G.gives) and "own_planes" in again.gives
    state = again.state_dict()
    assert state.keys() == G.state_dict().keys() >= {"own_ws", "own_planes", "own_gain"}
    assert all(torch.equal(value, state[name]) for name, value in G.state_dict().items())
    assert not any(weight.requires_grad for weight in again.parameters())
    assert torch.equal(portrait(again), portrait(G))
    save_generator(again, tmp_path / "two.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def damage(G, how):
    if how == "own_ws short":
        G.own_ws = G.own_ws[:, 1:]
    if how == "own_ws twice":
        G.own_ws = G.own_ws.repeat(2, 1, 1)
    if how == "own_planes small":
        G.own_planes.data = G.own_planes.data[..., 1:]
    if how == "own_planes missing":
        G.own_planes = None
    if how == "own_gain missing":
        G.own_gain = None
    if how == "own_ws missing":
        G.own_ws = None


@pytest.mark.parametrize(
    "how",
    ["own_ws short", "own_ws twice", "own_planes small"]
    + [f"{name} missing" for name in ("own_ws", "own_planes", "own_gain")],
)
def test_a_head_that_does_not_fit_its_generator_is_refused_in_one_line(tmp_path, how):
    path = tmp_path / "one.safetensors"
    G = one_head(small_generator())
    damage(G, how)
    save_generator(G, path)
    with pytest.raises(ValueError, match=f"{path} holds no usable generator") as refused:
        load_generator(path)
    assert "\n" not in str(refused.value) and "own_" in str(refused.value)


def test_a_damaged_head_is_refused_in_one_line(tmp_path):
    path = tmp_path / "one.safetensors"
    G = one_head(small_generator())
    save_generator(G, path)
    content = path.read_bytes()
    place = content.index(G.own_ws.numpy().tobytes()[:64])
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match="damaged: its bytes have changed") as refused:
        load_generator(path)
    assert "\n" not in str(refused.value)
    G.own_ws[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="own_ws is not finite"):
        save_generator(G, path)


def test_random_heads_are_not_drawn_of_one_head():
    G = small_generator()
    assert subjects.draw_codes(G, 3, 0).std(0).min() > 0
    with pytest.raises(ValueError, match="one head alone"):
        subjects.draw_codes(one_head(G), 3, 0)


def test_a_folder_of_one_head_is_loaded_and_rendered_once(tmp_path, capsys):
    G = one_head(build_generator(), own=0.1)
    save_generator(G, tmp_path / AVATAR)
    loaded, source, settings = subjects.load_run(tmp_path)
    assert source is None and settings == {} and not capsys.readouterr().err
    assert torch.equal(loaded.own_planes, G.own_planes)
    options = {"ckpt": str(tmp_path), "device": "cpu"}
    render.main(render.Config(out=tmp_path / "a", seeds="5-8", **options))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["seed0005.png"]
    wanted = render.views(subjects.seed_to_subject(G, 5), render.VIEWS)["image"]
    picture = np.asarray(Image.open(tmp_path / "a/seed0005.png"), int)
    assert np.abs(picture - np.asarray(render.image_grid([wanted]), int)).max() == 0


# What its own planes cost.


@pytest.mark.parametrize(("size", "sums"), [(16, 1 + 4 + 16 + 64), (8, 1 + 4 + 16), (2, 1)])
def test_variation_of_a_ramp_is_its_slope_squared_at_every_scale(size, sums):
    """Cells of averages are twice as far apart from scale to scale."""
    slopes = torch.tensor([0.0, 0.5, -2.0]).view(3, 1, 1, 1, 1)
    ramp = torch.arange(float(size)).expand(3, 3, 2, size, size)
    for planes in (slopes * ramp, (slopes * ramp).mT):
        torch.testing.assert_close(variation_loss(planes + 7), sums * slopes.flatten() ** 2)


def test_variation_of_the_finest_pattern_is_seen_at_the_finest_scale_alone():
    checks = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    planes = checks.expand(1, 3, 4, 16, 16)
    assert variation_loss(planes).item() == pytest.approx(8)  # 2^2 across, and 2^2 down.


def test_variation_compares_the_means_of_neighbouring_blocks():
    planes = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(2)
    for size in (1, 2, 4):
        n = 16 // size
        means = planes.view(2, 12, n, size, n, size).mean((3, 5))
        across, down = means[..., 1:] - means[..., :-1], means[..., 1:, :] - means[..., :-1, :]
        wanted += across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))
    torch.testing.assert_close(variation_loss(planes, scales=3), wanted)


def test_variation_of_tri_grids_is_the_mean_over_their_slices():
    grids = torch.randn(2, 3, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    slices = torch.stack([variation_loss(grids[:, :, :, i]) for i in range(5)])
    torch.testing.assert_close(variation_loss(grids), slices.mean(0))


def test_opacity_that_is_neither_there_nor_not_is_fog():
    masks = torch.stack(
        [torch.ones(1, 4, 4), torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.5)]
        + [torch.full((1, 4, 4), 0.1), torch.ones(1, 4, 4)]
    )
    masks[4, 0, :2] = 0.5
    torch.testing.assert_close(opacity_loss(masks), torch.tensor([0, 0, 1, 0.36, 0.5]))
    fog = torch.tensor([[[[0.4, 0.6]]]], requires_grad=True)
    opacity_loss(fog).sum().backward()
    assert fog.grad.flatten().tolist() == pytest.approx([0.4, -0.4])  # 2 - 4 a: away from half.


def test_the_terms_reach_the_planes_of_its_own():
    G = one_head(build_generator(), own=0.1)
    G.own_planes.requires_grad_()
    c = G.cameras.sample(2)
    ws = G.mapping(torch.empty(2, 0), c)
    torch.manual_seed(0)
    outputs = draw_samples(G, ws, c, G.rays(c))
    assert "own_planes" in outputs
    now = Moment(None, None, torch.empty(2, 0), torch.empty(2, 2, 0))
    weights = {"variation": 3.0, "opacity": 2.0}
    gradients, row = pull_back(outputs, weights, now, batch=2)
    own = G.own_planes.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(3.0 * variation_loss(own).sum(), own)
    torch.testing.assert_close(gradients["own_planes"].sum(0, keepdim=True), wanted)
    assert row["variation"] == pytest.approx(3 * variation_loss(own).item(), rel=1e-4)
    assert row["opacity"] == pytest.approx(2 * opacity_loss(outputs["mask"]).mean().item())
    torch.autograd.backward([outputs[name] for name in gradients], list(gradients.values()))
    assert not torch.allclose(G.own_planes.grad, wanted)  # Opacity comes on top.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": {"variation": 1.0}}, "gives no own_planes, which --weights .*variation"),
        ({"flat": True, "weights": {"opacity": 1.0}}, "gives no mask, which --weights .*opacity"),
    ],
)
def test_a_generator_without_what_the_terms_need_is_refused(tmp_path, changes, reason, short_runs):
    if changes.pop("flat", False):
        save_generator(flat_generator(), tmp_path / "flat.safetensors")
        changes |= {"generator": str(tmp_path / "flat.safetensors"), "method": "nada"}
    with pytest.raises(ValueError, match=reason) as refused:
        run(tmp_path / "run", **changes)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


# The prior's brush, and its ear.


WORDS = torch.stack([torch.full((5, 8), 0.1), torch.full((5, 8), 0.3)])
LATENTS = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def brush(strength, steps=4, prior=None, level=0.6):
    """Paint over with guidance 2."""
    strength = torch.as_tensor(strength).expand(2, 1, 6, 6)
    return repaint(prior or FakePrior(), LATENTS, Condition(WORDS), strength, level, steps, 2.0)


def path(steps, level=0.6):
    return torch.linspace(0, round(level * 999), steps + 1).round().int().tolist()


def repainted(times):
    """Return latents after inversion up to the last of the times and denoising down again."""
    prior, condition = FakePrior(), Condition(WORDS)
    noisy = ddim(prior, LATENTS, condition, times, 1.0)
    return ddim(prior, noisy, condition, times[::-1], 2.0)


def test_no_strength_leaves_latents_as_they_are():
    assert torch.equal(brush(0.0), LATENTS) and torch.equal(brush(0.2), LATENTS)
    assert not torch.allclose(brush(0.3), LATENTS, atol=1e-2)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("level", [0.3, 0.9])
def test_full_strength_is_inversion_and_denoising(steps, level):
    wanted = repainted(path(steps, level))
    assert (wanted - LATENTS).abs().max() > 0.01
    torch.testing.assert_close(brush(1.0, steps, level=level), wanted)


@pytest.mark.parametrize(("strength", "last"), [(0.3, 2), (0.45, 2), (0.6, 3), (0.9, 4)])
def test_part_of_the_strength_is_painted_from_the_step_above_it(strength, last):
    torch.testing.assert_close(brush(strength), repainted(path(4)[: last + 1]))


def test_every_cell_has_its_own_strength():
    """The fake prior's prediction works cell by cell."""
    last = torch.randint(1, 5, (2, 1, 6, 6), generator=torch.Generator().manual_seed(1))
    found = brush((last - 0.4) / 4)
    for steps in range(1, 5):
        wanted = repainted(path(4)[: steps + 1]) if steps > 1 else LATENTS  # Less than one step.
        cells = (last == steps).expand_as(found)
        assert cells.any()
        torch.testing.assert_close(found[cells], wanted[cells])


class Believer(FakePrior):
    """Believes that all latents are the mean of its text."""

    image_size = 8
    latent_shape = (4, 2, 2)
    means = {"a photo of a person": 0.0, "a photo of a person with long hair": 1.5}

    def predict_noise(self, latents_t, t, text, *_):
        abar = signal(self, t)
        clean = text.mean((1, 2)).view(-1, 1, 1, 1)
        return (latents_t - abar.sqrt() * clean) / (1 - abar).sqrt()

    def condition(self, prompt, *_, **__):
        return Condition(torch.full((2, 5, 8), self.means[prompt]))


def test_a_condition_explains_best_what_the_prior_builds_under_it():
    prior = Believer()
    built = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1).expand(2, 4, 6, 6)
    times = torch.tensor([300, 600, 900])
    noise = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    abar = prior.alphas_cumprod[times]
    for mean in (0.5, -1.0, 2.0):
        condition = Condition(torch.full((2, 5, 8), mean))
        errors = noise_errors(prior, built, condition, times, noise)
        wanted = (abar / (1 - abar))[:, None] * (torch.tensor([0.5, -1.0]) - mean) ** 2
        torch.testing.assert_close(errors, wanted, atol=1e-5, rtol=1e-4)


# The search.


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a clown with long hair", "a photo of a person with long hair"),
        ("a clown with a hat with a bell", "a photo of a person with a hat with a bell"),
        ("a clown", "a clown"),
        ("a devil without horns", "a devil without horns"),
        ("", ""),
    ],
)
def test_what_a_prompt_says_beyond_its_domain_is_said_of_the_source(prompt, said):
    assert avatar.said_of_source(prompt, "a photo of a person") == said


def believing(clip=None):
    """Return guides whose prior believes in means, and that encode pictures as they are."""
    cfg = config.Config(prompt="a clown with long hair", base="puppets")
    return SimpleNamespace(
        cfg=cfg, prior=Believer(), encode=lambda images: images, G_src=None, clip=clip
    )


def test_the_words_are_the_prompt_and_what_it_says_of_the_source_as_captions():
    heard = []
    clip = SimpleNamespace(text=lambda words: heard.extend(words) or torch.eye(6, 9) + 1)
    target = avatar.wordings(believing(clip))
    prompts = ("a clown with long hair", "a photo of a person with long hair")
    assert sorted(heard) == sorted(
        start + prompt for prompt in prompts for start in ("", "a photo of ", "a portrait of ")
    )
    mean = torch.tensor([7.0] * 6 + [6.0] * 3)
    torch.testing.assert_close(target, (mean / mean.norm())[None])


def test_a_head_is_explained_better_by_words_that_it_shows():
    c = build_generator().cameras.frontal(2)
    times = torch.linspace(*avatar.LEVELS, 8) * 999
    abar = FakePrior.alphas_cumprod[times.long()]
    for shown in (1.0, 0.5, -1.0):
        images = torch.full((2, 4, 2, 2), shown)
        wanted = (abar / (1 - abar)).mean().item() * (shown**2 - (shown - 1.5) ** 2)
        assert avatar.explained(believing(), images, c, 8) == pytest.approx(wanted, rel=1e-3)


def test_heads_are_compared_from_all_cameras_under_the_same_jitter():
    G = build_generator()
    ws, c = torch.cat([subjects.seed_to_ws(G, seed) for seed in (1, 2)]), G.cameras.sample(3)
    first = avatar.see(G, ws, c)
    torch.rand(5)
    assert first.shape == (6, 3, 32, 32) and torch.equal(avatar.see(G, ws, c), first)
    torch.manual_seed(0)
    wanted = G.synthesis(ws.repeat_interleave(3, 0), c.repeat(2, 1))["image"]
    torch.testing.assert_close(first, wanted)  # Heads are slow, cameras fast.


def test_climbing_moves_all_layers_alike_towards_the_words():
    G, redness = build_generator(), torch.tensor([[1.0, 0.0, 0.0]])
    guides = believing(SimpleNamespace(images=lambda images: images.mean((2, 3))))
    ws, c = subjects.seed_to_ws(G, 1), G.cameras.frontal()
    moved = avatar.climb(G, guides, ws, c, redness)
    before, after = (avatar.see(G, x, c)[:, 0].mean() for x in (ws, moved))
    assert after > before and not moved.requires_grad
    step = moved - ws
    torch.testing.assert_close(step, step[:, :1].expand_as(step))
    deviation = subjects.draw_codes(G, avatar.CODES, 0).std(0).mean()
    assert 0 < step.abs().max() < 1.1 * avatar.WAY * avatar.RATE * deviation


def darkness(images):
    return -images[:, :, :12].mean()


@pytest.mark.parametrize("climbed", ["better", "worse"])
def test_the_search_takes_of_clips_better_half_what_the_prior_explains_best(
    tmp_path, monkeypatch, climbed
):
    cfg, G = small_config(tmp_path, search=7), build_generator()
    codes = subjects.draw_codes(G, 7, cfg.run.seed)
    c = G.cameras.label(torch.tensor(avatar.TURNS), torch.zeros(2))
    heads = [avatar.see(G, code.expand(1, layers(G), -1), c) for code in codes]
    red, dark = (
        torch.stack([x[:, 0].mean() for x in heads]),
        torch.stack(list(map(darkness, heads))),
    )
    half = red.argsort(descending=True)[:4]
    best = half[dark[half].argmax()]
    assert best not in (red.argmax(), dark.argmax())  # Neither CLIP nor the prior alone.

    there = codes[dark.argmax() if climbed == "better" else dark.argmin()]

    monkeypatch.setattr(avatar, "wordings", lambda _: None)
    monkeypatch.setattr(avatar, "clip_fit", lambda guides, images, target: images[:, 0].mean())
    asked = []

    def explained(guides, images, c, draws):
        asked.append(draws)
        return darkness(images).item()

    monkeypatch.setattr(avatar, "explained", explained)
    monkeypatch.setattr(avatar, "ROUNDS", ((2, 1), (2, 5)))
    monkeypatch.setattr(avatar, "climb", lambda *_: there.expand(1, layers(G), -1))
    found, shown = avatar.search(cfg, G, believing())
    wanted = there if climbed == "better" else codes[best]
    assert torch.equal(found, wanted.expand(1, layers(G), -1))
    assert shown.size == (7 * 32, 2 * 32)
    assert asked == [1] * 4 + [5] * 2 + [5]  # The half, its half, and the code after the climb.


# The texture, painted over.


@pytest.mark.parametrize(("views", "turns"), [(4, [0, 2, -2, 4]), (8, [0, 1, -1, 2, -2, 3, -3, 4])])
def test_views_go_from_the_front_to_both_sides_in_turn_and_to_the_back(views, turns):
    assert yaws(views) == pytest.approx([turn * np.pi / 4 for turn in turns])


def test_views_of_what_has_a_front_alone_go_as_far_as_it_turns():
    assert yaws(4, 0.6) == pytest.approx([0, 0.6, -0.6])
    assert yaws(8, 0.6) == pytest.approx([0, 0.2, -0.2, 0.4, -0.4, 0.6, -0.6])


@pytest.fixture(scope="module")
def ball():
    """A white ball seen from four sides, as `texture_head` returns a head."""
    for name in avatar.PACKAGES:
        pytest.importorskip(name)
    atlas = unwrap(sphere(), 64)
    cameras = CAMERAS.label(torch.tensor(yaws(4)), torch.zeros(4))
    return Textured(atlas, atlas.start, atlas.start, cameras, torch.ones(4, 3, 64, 64))


class Painter(FakePrior):
    """Makes everything black, but for what keeps its latents."""

    image_size, latent_shape, device = 64, (4, 16, 16), torch.device("cpu")

    def encode_images(self, images):
        return torch.zeros(1, *self.latent_shape)

    def decode_latents(self, latents):
        return torch.full((1, 3, 64, 64), -1.0)


def painting():
    settings = SimpleNamespace(targets=SimpleNamespace(steps=2), guidance=2.0)
    return SimpleNamespace(
        prior=Painter(),
        cfg=settings,
        condition_of=lambda source: Condition(WORDS),
        depth=lambda source: None,
    )


def test_the_prior_paints_where_nothing_is_refined_and_the_head_is(ball, monkeypatch):
    monkeypatch.setattr(refine, "spread", lambda values, mask: torch.zeros_like(values))
    upper = ball.atlas.points[:, 1:2] > 0
    refined = ball.atlas.fill(upper.float())
    view = look(ball.atlas, ball.cameras[0], 128)
    bright = torch.full((1, 3, 64, 64), 0.5)
    picture = paint_over(painting(), view, bright, refined, 0.5)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    far = ((rows - 31.5) ** 2 + (columns - 31.5) ** 2).sqrt()
    below = (far < 16) & (rows > 38)
    above = (far < 16) & (rows < 24)  # World's y points up, rows down.
    assert below.sum() > 100 and (picture[0, :, below] == -1).all()
    torch.testing.assert_close(picture[0, :, above], torch.full((3, int(above.sum())), 0.5))
    assert (picture[0, :, far > 30] == 1).all()  # The background.


def test_what_is_painted_keeps_the_mean_colours_of_the_head(ball):
    nothing = torch.zeros_like(ball.atlas.fill(ball.atlas.points[:, 1:2]))
    view = look(ball.atlas, ball.cameras[0], 128)
    bright = torch.full((1, 3, 64, 64), 0.5)
    picture = paint_over(painting(), view, bright, nothing, 0.5)  # The prior paints all black.
    inside = torch.nn.functional.avg_pool2d(view.mask, 2)[0, 0] == 1
    # Pixels at the border have some of the white beside the head in their mean.
    assert (picture[0, :, inside] - 0.5).abs().max() < 0.03


def test_values_spread_on_the_mask_alone():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    values = torch.where(mask > 0, 2.0, -50.0).expand(-1, 3, -1, -1).clone()
    values[:, :, 8, 8] = 10.0
    around = refine.spread(values, mask)
    window = int(refine.COLOURS * 32) // 2 * 2 + 1
    assert around[0, 0, 8, 8] == pytest.approx(2 + 8 / window**2, rel=1e-4)
    torch.testing.assert_close(around[0, :, 25:, :16], torch.full((3, 7, 16), 2.0))


def test_a_refined_texture_is_what_was_painted_and_keeps_what_no_view_sees(ball, monkeypatch):
    asked = []

    def paint(guides, view, texture, refined, level):
        asked.append(refined)
        return torch.zeros(1, 3, 64, 64)

    monkeypatch.setattr(refine, "paint_over", paint)
    front = replace(ball, cameras=ball.cameras[[0, 3]], pictures=ball.pictures[:2])
    made = refine.refine(front, None, 0.3)
    texels = ball.atlas.texels(made.texture).abs().amax(1)
    facing = ball.atlas.points[:, 2] / 0.2  # To the front and to the back.
    assert texels[facing.abs() > 0.7].max() < 0.02 and made.pictures.shape == (2, 3, 64, 64)
    assert texels[facing.abs() < 0.05].mean() > 0.95 and torch.equal(made.first, ball.first)
    first, second = (ball.atlas.texels(refined)[:, 0] for refined in asked)
    assert not first.any()  # Nothing was refined at first; then the front was.
    assert second[facing > 0.85].min() >= 1 and not second[facing < 0].any()


# What is refused.


def refusal(argv):
    with pytest.raises(ValueError) as refused:
        avatar.parse(argv, "")
    assert "\n" not in str(refused.value)
    return str(refused.value)


PROMPT = ["--prompt", "a clown"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--base", "puppets2d"], "--base puppets2d makes pictures without a shape"),
        (["--ckpt", "{file}", "--latents", "{file}"], "--latents is for a head to be adapted"),
        (["--views", "5"], "--views must be even, for the front and the back, got 5"),
        (["--level", "nan"], "--level must be 0.02 to 0.98, got nan"),
        (["--ckpt", "nowhere.safetensors"], "--ckpt nowhere.safetensors: no such file"),
        (["--latents", "nowhere.safetensors"], "--latents nowhere.safetensors is no file"),
        (["--generator", "nowhere.pkl"], "--generator nowhere.pkl: no such file"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--device", "cpu", "--device", "cuda"], "--device is given twice: cpu and cuda"),
        (["--ckpt", "{folder}", "--prompt", ""], "config.json cannot be read"),
        (["--prompt", ""], "no target domain: give --prompt TEXT"),
        (["--weights.distance", "1"], "--weights.distance compares heads with each other"),
        (["--seed", "5000000000"], "--seed must be 0 to 4294967295, got 5000000000"),
    ],
)
def test_what_cannot_work_is_refused_in_one_clear_line(tmp_path, monkeypatch, argv, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").touch()
    places = {"file": "there.safetensors", "folder": str(tmp_path)}
    argv = [word.format(**places) for word in argv]
    assert reason in refusal(argv if "--prompt" in argv else PROMPT + argv)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


@pytest.mark.parametrize(
    ("name", "bounds", "values"),
    [
        ("views", "4 to 64", (2, 66)),
        ("search", "0 to 100000", (-1, 100_001)),
        ("level", "0.02 to 0.98", (0.0, 1.0)),
        ("voxels", "16 to 512", (15, 513)),
        ("faces", "100 to 1000000", (99, 1_000_001)),
        ("texture", "64 to 4096", (-1, 63, 4097)),
        ("frames", f"2 to {MOST_FRAMES[ending()]}", (1, MOST_FRAMES[ending()] + 1)),
    ],
)
def test_numbers_out_of_bounds_are_refused(tmp_path, name, bounds, values):
    for value in values:
        with pytest.raises(ValueError, match=f"--{name} must be {bounds}, got {value}"):
            avatar.main(small_config(tmp_path, **{name: value}))
    assert not any(tmp_path.iterdir())


def test_missing_packages_and_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "start it without torchrun" in refusal(PROMPT)
    monkeypatch.setitem(avatar.PACKAGES, "not_there", "not-there")
    assert "pip install not-there" in refusal(PROMPT)


def test_refusals_and_help_come_before_torch_is_imported():
    code = """
import runpy, sys
for argv in (["--help"], ["--prompt", "a clown", "--views", "5"]):
    sys.argv = ["avatar.py", *argv]
    try:
        runpy.run_path("avatar.py", run_name="__main__")
    except SystemExit as stop:
        print("stopped with", stop.code or 0)
assert not {"torch", "diffusers", "transformers"} & sys.modules.keys()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--search" in done.stdout and "stopped with 0" in done.stdout
    assert done.stdout.endswith("stopped with 2\n")
    assert done.stderr == "error: --views must be even, for the front and the back, got 5\n"


def test_one_heads_own_planes_learn_with_what_the_method_lets_learn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = avatar.parse([*PROMPT, "--method", "3d-adapter"], "").run
    usual = config.Config(prompt="a clown", base="puppets360", method="3d-adapter")
    assert cfg.weights == replace(usual.weights, **avatar.OWN)
    assert min(cfg.weights.variation, cfg.weights.opacity) > 0
    assert 0 < cfg.steps < usual.steps and cfg.out == Path("runs/a-clown")
    # There are no other heads to keep at their distance.
    assert avatar.settle(prompt="a clown", method="diffusiongan3d").weights.distance == 0
    G = one_head(build_generator())
    for own, pattern in zip(cfg.learns, usual.learns, strict=True):
        names = train.learning_weights(G, own).keys()
        assert names == {"own_planes", *train.learning_weights(G, pattern)}


# The whole.


class Stopped(BaseException):
    """A kill, as far as one process can imitate it."""


@pytest.fixture(scope="module")
def short_runs():
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        for name, few in {"WAY": 2, "CODES": 50, "ROUNDS": ((2, 1), (2, 2))}.items():
            monkeypatch.setattr(avatar, name, few)
        yield


def layers(G):
    return G.backbone.num_ws


@functools.cache
def all_round():
    """Write the small generator with cameras on all sides, and return its file."""
    G = build_generator()
    G.rendering_kwargs = G.rendering_kwargs | {"camera_yaw_range": np.pi}
    save_generator(G, world() / "round.safetensors")
    return world() / "round.safetensors"


def small_config(folder, changes=None, prompt="a bronze statue", **options):
    """Return options for a small head in folder / "out"."""
    usual = avatar.settle(base="puppets360", method="denoised", prompt=prompt)
    parts = {part: str(world() / part) for part in ("diffusion", "clip")}
    parts |= {"features": str(world() / "dino"), "ip_adapter": ""}
    changed = replace(
        usual,
        generator=str(all_round()),
        out=folder / "out",
        device="cpu",
        **{"steps": 4, "batch": 2, "save_every": 2, "grid_every": 4, **parts},
        targets=replace(usual.targets, steps=2, pool=2, reuse=2),
    )
    few = {"search": 4, "views": 4, "voxels": 24, "faces": 400, "texture": 64, "frames": 3}
    return avatar.Config(replace(changed, **(changes or {})), **few | options)


def result(out):
    return [(out / name).read_bytes() for name in (AVATAR, "avatar.glb")]


@pytest.fixture(scope="module")
def made(tmp_path_factory, short_runs):
    """A folder of avatar.py, only to be read."""
    for name in avatar.PACKAGES:
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("made")
    avatar.main(small_config(folder))
    return folder / "out"


def copy_of(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_a_sentence_becomes_a_head_a_mesh_pictures_and_a_video(made):
    names = {AVATAR, "avatar.glb", "avatar.png", f"avatar{ending()}", "search.png"}
    assert {path.name for path in made.iterdir()} == names | {
        "config.json",
        "start.safetensors",
        "fit",
    }
    start, G = load_generator(made / "start.safetensors"), load_generator(made)
    assert torch.equal(start.own_ws, G.own_ws) and not start.own_planes.any()
    assert G.own_planes.any() and not torch.equal(portrait(start), portrait(G))
    assert (made / AVATAR).read_bytes() == (made / "fit/generator.safetensors").read_bytes()
    assert Image.open(made / "avatar.png").size == (4 * 32, 3 * 32)  # Found, adapted, its mesh.
    assert Image.open(made / "search.png").size == (4 * 32, 2 * 32)
    frames = read_frames(made / f"avatar{ending()}")
    assert frames.shape == (3, 64, 64, 3) and np.ptp(frames.astype(int)) > 30
    rows = [json.loads(row) for row in (made / "fit/log.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[0]["variation"] == 0 < rows[3]["variation"]
    assert all(row["opacity"] > 0 for row in rows)


def test_the_pictures_are_of_the_head_before_and_after(made):
    rows = np.asarray(Image.open(made / "avatar.png"), int).reshape(3, 32, 4, 32, 3)
    for row, name in ((0, "start.safetensors"), (1, AVATAR)):
        G = load_generator(made / name)
        for column, yaw in enumerate((0.0, np.pi / 2, -np.pi / 2, np.pi)):
            c = G.cameras.label(torch.tensor([yaw]).float(), torch.tensor([-0.1]))
            image = subjects.seed_to_subject(G, 0).see(c)["image"]
            wanted = np.asarray(render.image_grid([image]), int)
            assert np.abs(rows[row, :, column] - wanted).max() <= 1


def test_the_mesh_has_a_texture_of_the_size_asked_for(made):
    import trimesh

    found = trimesh.load(made / "avatar.glb", process=False, force="mesh")
    assert 100 < len(found.faces) and found.visual.material.baseColorTexture.size == (64, 64)
    assert np.abs(found.vertices).max() < 0.6


def test_the_same_command_gives_the_same_bytes(made, tmp_path, monkeypatch):
    copy_of(made, tmp_path)
    monkeypatch.setattr(train, "take_step", None)  # What is adapted is not adapted again.
    (tmp_path / "out/avatar.glb").unlink()
    avatar.main(small_config(tmp_path))
    assert result(tmp_path / "out") == result(made)


@pytest.mark.parametrize("steps", [None, 0, 3])
def test_a_head_that_was_stopped_goes_on_to_the_same_bytes(made, tmp_path, steps):
    """After the search, or when the fit begins the step after `steps`."""
    draw = train.draw_times

    def die(*_):
        raise Stopped

    def draw_or_die(cfg, guides, step):
        return die() if step > steps else draw(cfg, guides, step)

    cfg = small_config(tmp_path)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        what = ("main", die) if steps is None else ("draw_times", draw_or_die)
        monkeypatch.setattr(train, *what)
        avatar.main(cfg)
    assert (cfg.run.out / "start.safetensors").exists() and not (cfg.run.out / AVATAR).exists()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(avatar, "search", die)
        avatar.main(cfg)
    assert result(cfg.run.out) == result(made)


@pytest.mark.parametrize(
    "changed", [{"search": 5}, {"search": 0}, {"changes": {"seed": 1}}, {"changes": {"steps": 5}}]
)
def test_another_head_in_the_same_folder_is_refused(made, tmp_path, changed):
    out = copy_of(made, tmp_path)
    with pytest.raises(ValueError, match="name another folder with --out"):
        avatar.main(small_config(tmp_path, **changed))
    assert result(out) == result(made)


def test_the_mesh_may_be_made_anew_without_the_prior(made, tmp_path, monkeypatch):
    out = copy_of(made, tmp_path)
    monkeypatch.setattr(avatar, "load_painter", None)
    avatar.main(small_config(tmp_path, refine=False, texture=128))
    weights, mesh = result(out)
    assert weights == result(made)[0] and mesh != result(made)[1]


def test_a_head_is_rendered_and_textured_again(made, tmp_path):
    options = {"ckpt": str(made), "device": "cpu", "depth": True}
    render.main(render.Config(out=tmp_path / "renders", seeds="0-7", **options))
    names = {path.name for path in (tmp_path / "renders").iterdir()}
    assert names == {"seed0000.png", "seed0000_depth.png"}
    avatar.main(small_config(tmp_path, ckpt=str(made)))
    assert result(tmp_path / "out") == result(made)
    assert Image.open(tmp_path / "out/avatar.png").size == (4 * 32, 2 * 32)  # Nothing was found.


def test_a_run_gives_the_head_of_a_seed(made, tmp_path, short_runs):
    run(tmp_path / "run", steps=1, method="nada")
    cfg = small_config(tmp_path, {"seed": 3}, ckpt=str(tmp_path / "run"), refine=False)
    avatar.main(cfg)
    G, head = load_generator(tmp_path / "run"), load_generator(tmp_path / "out")
    assert torch.equal(portrait(head), portrait(G, 3)) and not head.own_planes.any()
    assert not (tmp_path / "out/fit").exists()
    # It was trained on fronts: three views, none of them from behind.
    assert Image.open(tmp_path / "out/avatar.png").size == (3 * 32, 2 * 32)


def test_a_texture_is_painted_as_the_run_painted_targets(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "fit", tmp_path / "run")
    lora = str(tmp_path / "mine.safetensors")
    Path(lora).touch()
    given = {"guidance": 9.0, "lora": [[lora, 0.5]], "negative_prompt": "blur", "seed": 8}
    usual = config.preset("ffhq", "denoised").guidance
    for method, guidance in (("denoised", 9.0), ("nada", usual)):
        change_settings(tmp_path / "run", method=method, base="ffhq", **given)
        for ckpt in ("run", "run/", "run/generator.safetensors"):
            run = avatar.parse(["--ckpt", ckpt], "").run
            painted = (run.base, run.method, run.lora, run.negative_prompt, run.seed)
            assert painted == ("ffhq", "denoised", ((lora, 0.5),), "blur", 0)
            assert run.guidance == guidance
    told = avatar.parse(["--ckpt", "run", "--prompt", "a clown"], "").run
    assert told.prompt == "a clown" and told.base == "ffhq" and told.lora
    assert "run is a run on --base ffhq, got panohead" in refusal(
        ["--ckpt", "run", "--base", "panohead"]
    )
    assert usual not in (9.0, config.preset("ffhq", "nada").guidance)


def test_other_methods_paint_with_the_numbers_of_denoised_targets(short_runs, tmp_path):
    G = load_generator(all_round())
    for method in ("nada", "denoised"):
        run = small_config(tmp_path, {"method": method, "guidance": 33.0, "depth_scale": 0.0}).run
        painter = avatar.load_painter(run, G, torch.device("cpu")).cfg
        usual = config.preset("puppets360", "denoised", prompt=run.prompt)
        wanted = (33.0, 0.0) if method == "denoised" else (usual.guidance, usual.depth_scale)
        assert (painter.guidance, painter.depth_scale) == wanted and usual.depth_scale


def test_a_file_alone_needs_no_words_if_nothing_is_painted(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / AVATAR, tmp_path / "mine.safetensors")
    cfg = avatar.parse(["--ckpt", "mine.safetensors", "--no-refine"], "")
    assert cfg.run.out == Path("runs/mine-seed0000")
    assert "no target domain" in refusal(["--ckpt", "mine.safetensors"])


def test_dry_run_shows_all_settings_and_writes_nothing(tmp_path, capsys):
    cfg = small_config(tmp_path, {"dry_run": True})
    avatar.main(cfg)
    shown = json.loads(capsys.readouterr().out)
    assert shown["views"] == 4 and shown["prompt"] == cfg.run.prompt
    assert not any(tmp_path.iterdir())


def test_another_search_is_refused_before_anything_is_loaded(made, tmp_path, monkeypatch):
    copy_of(made, tmp_path)
    monkeypatch.setattr(avatar, "load_generator", None)
    with pytest.raises(ValueError, match="another avatar .*'search': 4.*: name another folder"):
        avatar.main(small_config(tmp_path, search=5))


def test_the_head_of_a_run_goes_to_a_folder_of_its_own(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "fit", tmp_path / "runs/a-bronze-statue")
    cfg = avatar.parse(["--ckpt", "runs/a-bronze-statue", "--seed", "3"], "")
    assert cfg.run.prompt == "a bronze statue" and cfg.run.method == "denoised"
    assert cfg.run.out == Path("runs/a-bronze-statue-seed0003")
    cfg = avatar.parse(["--ckpt", str(made), "--out", "mine"], "")
    assert cfg.run.prompt == "a bronze statue" and cfg.run.out == Path("mine")


@pytest.fixture
def first_steps(short_runs, monkeypatch):
    """Stop before anything is adapted."""

    def stop(_):
        raise Stopped

    monkeypatch.setattr(train, "main", stop)


def found(cfg):
    """Return the head that is going to be adapted."""
    with pytest.raises(Stopped):
        avatar.main(cfg)
    return load_generator(cfg.run.out / "start.safetensors")


def test_a_person_takes_the_place_of_the_search(tmp_path, first_steps, capsys):
    G = build_generator()
    name = "decoder.net.2.bias"
    person = replace(subjects.seed_to_person(G, 7), offsets={name: torch.arange(9.0) - 4})
    subjects.save_person(person, tmp_path / "me.safetensors", mapping_weights="crc32 00000000")
    head = found(small_config(tmp_path, latents=tmp_path / "me.safetensors"))
    assert torch.equal(head.own_ws, person.ws)
    tuned = G.get_parameter(name) + torch.arange(9.0) - 4
    assert torch.equal(head.get_parameter(name), tuned)  # What tuning on the photo added.
    assert "me.safetensors was made with another generator" in capsys.readouterr().err


def test_without_a_search_the_seeds_head_is_taken(tmp_path, first_steps):
    head = found(small_config(tmp_path, {"seed": 5, "trunc": 0.7}, search=0))
    assert torch.equal(head.own_ws, subjects.seed_to_ws(build_generator(), 5, 0.7))


def test_what_has_no_shape_or_is_one_head_already_is_refused(tmp_path, first_steps):
    save_generator(flat_generator(), tmp_path / "flat.safetensors")
    save_generator(one_head(build_generator()), tmp_path / "one.safetensors")
    for name in ("flat", "one"):
        changes = {"generator": str(tmp_path / f"{name}.safetensors"), "out": tmp_path / name}
        with pytest.raises(ValueError, match="cannot be adapted to one head"):
            avatar.main(small_config(tmp_path, changes))
        assert not (tmp_path / name).exists()
    with pytest.raises(ValueError, match="flat.safetensors makes pictures without a shape"):
        avatar.main(small_config(tmp_path, ckpt=str(tmp_path / "flat.safetensors")))
    with pytest.raises(ValueError, match="flat.safetensors holds no latents"):
        avatar.main(small_config(tmp_path, latents=tmp_path / "flat.safetensors"))
    assert not (tmp_path / "out").exists()


def test_one_head_alone_cannot_be_inverted_scored_or_shown_as_another(made, tmp_path):
    with pytest.raises(ValueError, match="shows one head alone: nobody can be found in it"):
        photo, vit = REPOSITORY / "docs/photo.png", str(world() / "dino")
        out = tmp_path / "me.safetensors"
        invert.main(invert.Config(image=photo, ckpt=str(made), features=vit, out=out))
    with pytest.raises(ValueError, match="holds one head alone, which cannot be scored"):
        evaluation.run_settings(made)
    person = subjects.seed_to_person(build_generator(), 7)
    subjects.save_person(person, tmp_path / "me.safetensors")
    with pytest.raises(ValueError, match="this generator shows one head alone"):
        subjects.load_person(tmp_path / "me.safetensors", load_generator(made))


def test_the_search_draws_truncated_codes():
    G = build_generator()
    wide, narrow = (subjects.draw_codes(G, 5, 1, trunc) for trunc in (1.0, 0.4))
    centre = G.backbone.mapping.w_avg
    torch.testing.assert_close(narrow - centre, 0.4 * (wide - centre))


def test_a_picture_alone_is_looked_for_by_clip_alone(tmp_path, first_steps, monkeypatch):
    Image.linear_gradient("L").convert("RGB").resize((40, 40)).save(tmp_path / "me.png")
    monkeypatch.setattr(avatar, "explained", None)
    monkeypatch.setattr(avatar, "climb", lambda G, guides, ws, c, target: ws)
    changes = {"prompt": "", "image": (tmp_path / "me.png",), "depth_scale": 0.0}
    head = found(small_config(tmp_path, changes, search=3))
    codes = subjects.draw_codes(build_generator(), 3, 0)
    assert (head.own_ws[0, 0] == codes).all(1).any()
    assert Image.open(tmp_path / "out/search.png").size == (3 * 32, 2 * 32)
    (tmp_path / "me.png").unlink()  # The folder has a copy.
    assert torch.equal(found(small_config(tmp_path, changes, search=3)).own_ws, head.own_ws)
    cfg = avatar.parse(["--ckpt", str(tmp_path / "out"), "--out", str(tmp_path / "again")], "")
    assert cfg.run.image == (tmp_path / "out/reference.png",)
