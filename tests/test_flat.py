"""Runs on a generator of pictures, which has no cameras, depth or planes; selected layers."""

import json

import pytest
import torch
from test_rosinality import small_generator
from test_train import Stopped, stop_after
from tiny_run import build_generator, hurry, options, run

import eval as evaluation
import samples
import terms
import train
from config import Config
from files.generators import load_generator, save_generator
from guides import resize
from losses import clip_to_quantile

WORKING = ("denoised", "gca3d", "sds", "stylegan-fusion", "nada", "diffusiongan3d")


@pytest.fixture(autouse=True, scope="module")
def short_runs():
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        yield


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Return options of a short run on a small StyleGAN2."""
    path = tmp_path_factory.mktemp("flat") / "g.safetensors"
    save_generator(small_generator(), path)
    return {"base": "puppets2d", "generator": str(path), "steps": 3}


@pytest.mark.parametrize("method", WORKING)
def test_methods_adapt_pictures(method, flat, tmp_path):
    run(tmp_path / "run", **flat, method=method)
    before, after = (load_generator(x) for x in (flat["generator"], tmp_path / "run"))
    pairs = ((name, before.get_parameter(name), w) for name, w in after.named_parameters())
    changed = {name for name, old, new in pairs if not torch.equal(old, new)}
    assert changed and not any(name.startswith("mapping.") for name in changed)
    if method == "stylegan-fusion":  # Its own choice: no constants, biases, torgb or 4 x 4 layers.
        parts = ("weight", "affine.weight", "noise_strength")
        assert changed == {
            f"synthesis.b{size}.conv{i}.{part}"
            for size in (8, 16, 32)
            for i in (0, 1)
            for part in parts
        }


def test_an_edit_of_pictures_has_a_region(flat, tmp_path):
    edit = {"method": "diffusiongan3d", "edit": "a person with green hair", "prompt": ""}
    rows = run(tmp_path / "run", **flat, **edit)["log.jsonl"]
    assert {"dsds", "keep"} < rows[0].keys() and "distance" not in rows[0]


def test_what_needs_more_than_pictures_is_refused_with_its_reason(flat, tmp_path):
    for changes, missing in (
        ({"method": "gca3d", "depth_scale": 1.0}, "no image_depth, mask"),
        ({"method": "denoised", "mask": True}, "no mask"),
        ({"method": "diffusiongan3d", "weights": {"distance": 1.0}}, "no planes"),
        ({"method": "3d-adapter"}, "no features"),
    ):
        with pytest.raises(ValueError, match=f"gives {missing}, which"):
            run(tmp_path / "run", **flat | changes)
    assert not (tmp_path / "run").exists()


SELECTED = {"method": "stylegan-fusion", "select_layers": 2, "steps": 4}


@pytest.fixture(scope="module")
def unbroken(flat, short_runs, tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken") / "run", **flat | SELECTED)


@pytest.mark.parametrize("steps", [1, 3])
def test_resumed_run_with_selected_layers_equals_unbroken_run(steps, flat, unbroken, tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        stop_after(monkeypatch, steps)
        run(tmp_path / "run", **flat | SELECTED)
    assert run(tmp_path / "run", **flat | SELECTED) == unbroken


def selected(cfg, step=1):
    """Return the layers that a step lets learn, and a function that measures all of them."""
    G = load_generator(cfg.generator)
    made = train.prepare(cfg, G, terms.load_guides(cfg, G, None, torch.device("cpu")))
    t = torch.tensor([300] * cfg.batch)
    chosen = samples.select_layers(cfg, made.G, made.pool, step, t, made.weights)
    return {name.rpartition(".weight")[0].removesuffix(".affine") or name for name in chosen}


@pytest.mark.parametrize("count", [1, 2, 99])
def test_as_many_layers_learn_as_were_asked_for(count, flat, tmp_path):
    given = options(tmp_path / "run", **flat | {"method": "stylegan-fusion"})
    cfg = Config(**given, select_layers=count)
    names = {name for name in selected(cfg) if not name.endswith("noise_strength")}
    assert len(names) == min(count, 6)
    assert selected(cfg) == selected(cfg)
    if count == 1:  # Which layers they are follows from the step.
        assert len({frozenset(selected(cfg, step)) for step in range(1, 9)}) > 1


def test_the_layer_before_is_the_one_its_code_takes(flat, tmp_path):
    given = options(tmp_path / "run", **flat | {"method": "stylegan-fusion"})
    order = [f"synthesis.b{size}.conv{i}" for size in (8, 16, 32) for i in (0, 1)]
    learns = (r"synthesis\.b\d+\.(conv\d|torgb)\.weight",)
    for step in range(1, 5):
        cfg = Config(**given | {"learns": learns}, select_layers=1)
        (right,) = (n for n in selected(cfg, step) if "torgb" not in n)
        (before,) = selected(
            Config(**given | {"learns": learns}, select_layers=1, scores={"layer_before": True}),
            step,
        )
        if right in order[1:]:
            assert before == order[order.index(right) - 1]


def test_layers_are_those_that_codes_feed():
    for G, prefix in ((small_generator(), ""), (build_generator(), "backbone.")):
        layers = G.layers
        assert layers[:4] == [
            (f"{prefix}synthesis.b4.conv1",),
            (f"{prefix}synthesis.b4.torgb", f"{prefix}synthesis.b8.conv0"),
            (f"{prefix}synthesis.b8.conv1",),
            (f"{prefix}synthesis.b8.torgb", f"{prefix}synthesis.b16.conv0"),
        ]
        names = [name for own in layers for name in own]
        assert len(set(names)) == len(names)
        for name in names:
            G.get_submodule(name)
    G = small_generator().requires_grad_(True)
    ws = G.mapping(torch.randn(1, 12), None).detach().requires_grad_()
    for place, own in enumerate(G.layers):  # Only they depend on it.
        for name in own:
            seen = codes_of(G, f"{name}.affine", ws)
            (gradient,) = torch.autograd.grad(seen.sum(), ws)
            assert gradient.abs().sum((0, 2)).nonzero().flatten().tolist() == [place]


def codes_of(G, name, ws):
    """Return what a module of the generator is given."""
    seen = []
    hook = G.get_submodule(name).register_forward_hook(lambda module, x, y: seen.append(x[0]))
    G.synthesis(ws)
    hook.remove()
    return seen[0]


def test_selection_needs_score_distillation(flat, tmp_path):
    with pytest.raises(ValueError, match="--select-layers goes by score distillation"):
        run(tmp_path / "run", **flat, method="nada", select_layers=2)


def test_clipping_is_at_the_quantile_of_each_picture():
    torch.manual_seed(0)
    gradient = torch.randn(3, 3, 8, 8) * torch.tensor([1.0, 10.0, 0.0]).view(3, 1, 1, 1)
    clipped = clip_to_quantile(gradient, 0.95)
    for one, cut in zip(gradient, clipped, strict=True):
        bound = one.abs().flatten().quantile(0.95)
        torch.testing.assert_close(cut, one.clamp(-bound, bound))
    assert torch.equal(clip_to_quantile(gradient, 1.0), gradient)


def test_score_distillation_is_clipped_and_regularisers_are_not(flat, tmp_path):
    given = options(tmp_path / "run", **flat | {"method": "stylegan-fusion"})
    whole, cut = (Config(**given, scores={"clip": clip}) for clip in (1.0, 0.5))
    gradients = []
    for cfg in (whole, cut):
        G = load_generator(cfg.generator)
        guides = terms.load_guides(cfg, G, None, torch.device("cpu"))
        torch.manual_seed(0)
        outputs = G.synthesis(G.mapping(torch.randn(2, 12), None))
        outputs = {"image": outputs["image"].tanh()}
        noise, t = torch.randn(2, 2, *guides.prior.latent_shape), torch.tensor([100, 700])
        source = terms.Seen(guides, {"image": outputs["image"].roll(1, 0)})
        now = terms.Moment(guides, source, t, noise)
        names = ("fusion_clipped", "score_direction")
        gradients.append([terms.pull_back(outputs, {n: 1.0}, now, 2)[0]["image"] for n in names])
    (whole_sds, whole_direction), (cut_sds, cut_direction) = gradients
    assert not torch.allclose(cut_sds, whole_sds, rtol=0.1)
    assert torch.equal(whole_direction, cut_direction)


def test_clipping_is_where_the_vae_is_given_pictures(flat, tmp_path):
    """After they were resized and clamped, as in StyleGAN-Fusion's code."""
    cfg = Config(**options(tmp_path / "run", **flat | {"method": "stylegan-fusion"}))
    G = load_generator(cfg.generator)
    guides = terms.load_guides(cfg, G, None, torch.device("cpu"))
    torch.manual_seed(0)
    images = (2 * torch.randn(2, 3, 48, 48)).requires_grad_()
    total = torch.randn(2, *guides.prior.latent_shape)
    latents = terms.VIEWS["clipped latents"].look(guides, images)
    (gradient,) = torch.autograd.grad(latents, images, total)

    given = resize(images, guides.prior.image_size).clamp(-1, 1)
    leaf = given.detach().requires_grad_()
    (at_vae,) = torch.autograd.grad(guides.prior.encode_images(leaf), leaf, total)
    clipped = clip_to_quantile(at_vae, cfg.scores.clip)
    (wanted,) = torch.autograd.grad(given, images, clipped)
    torch.testing.assert_close(gradient, wanted)
    assert (at_vae != clipped).any()


def test_pictures_larger_than_the_priors_are_compared_at_its_size(flat, tmp_path):
    cfg = Config(**options(tmp_path / "run", **flat | {"method": "denoised"}))
    guides = terms.load_guides(cfg, load_generator(cfg.generator), None, torch.device("cpu"))
    size = guides.prior.image_size
    torch.manual_seed(0)
    source = terms.Seen(guides, {"image": torch.rand(1, 3, 2 * size, 2 * size)})
    assert source.painted.outputs["image"].shape[-1] == size
    latents = torch.empty(1, 0)
    now = terms.Moment(guides, source, latents, latents)
    images = torch.rand(1, 3, 2 * size, 2 * size)
    gradients, row = terms.pull_back({"image": images}, {"denoised": 1.0}, now, 1)
    assert gradients["image"].shape == images.shape and row["denoised"] > 0


def test_view_words_and_selection_are_refused_where_they_mean_nothing(flat, tmp_path):
    with pytest.raises(ValueError, match="--view-words needs cameras"):
        run(tmp_path / "run", **flat, method="sds", view_words=True)
    with pytest.raises(ValueError, match="--select-layers: no layer"):
        run(tmp_path / "run", **flat, method="sds", select_layers=1, learns=(r"synthesis.*const",))
    assert not (tmp_path / "run").exists()


def test_scores_that_need_no_camera_are_given(flat, tmp_path):
    run(tmp_path / "run", **flat, method="sds")
    cfg = evaluation.Config((tmp_path / "run",), tmp_path / "scores.json", samples=8, device="cpu")
    evaluation.main(cfg)
    (row,) = json.loads((tmp_path / "scores.json").read_text()).values()
    assert {"clip_text", "identity_top1", "diversity", "step_seconds"} < row.keys()
    assert not {"pose_deg", "depth_corr", "multiview_px"} & row.keys()


# Words of views.


def test_prompts_say_from_where_the_prior_looks(tmp_path):
    cfg = Config(**options(tmp_path / "run"), view_words=True)
    G = load_generator(cfg.generator)
    guides = terms.load_guides(cfg, G, None, torch.device("cpu"))
    yaws = torch.tensor([0.0, 1.0, -1.2, 2.0, -2.5, torch.pi])
    c = G.cameras.label(yaws, torch.zeros(6))
    condition = guides.condition_of({"c": c})
    words = ("front", "front", "side", "side", "back", "back")
    wanted = guides.prior.encode_text([f"a bronze statue, {word} view" for word in words])
    torch.testing.assert_close(condition.text[1], wanted)
    torch.testing.assert_close(condition.text[0], guides.condition.text[:1].expand_as(wanted))
    source = guides.condition_src_of({"c": c}).text[1]
    assert not torch.equal(source, wanted)

    # In one batch every sample has its own words, as it has alone.
    noise, t = torch.randn(2, 6, *guides.prior.latent_shape), torch.tensor([500] * 6)
    image = torch.rand(6, 3, 32, 32) * 2 - 1
    outputs = {
        "image": image,
        "c": c,
        "image_depth": torch.ones(6, 1, 8, 8) + image[:, :1, ::4, ::4],
    }
    outputs["mask"] = torch.ones(6, 1, 8, 8)
    now = terms.Moment(guides, terms.Seen(guides, outputs), t, noise)
    latents = torch.randn(6, *guides.prior.latent_shape)
    together = terms.dsds(latents, now)
    for i in range(6):
        part = slice(i, i + 1)
        seen = terms.Seen(guides, {name: x[part] for name, x in outputs.items()})
        alone = terms.dsds(latents[part], terms.Moment(guides, seen, t[part], noise[:, part]))
        torch.testing.assert_close(alone, together[part], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["denoised", "gca3d"])
def test_a_run_with_view_words_goes_on(method, tmp_path):
    given = {"method": method, "view_words": True, "steps": 2}
    unbroken = run(tmp_path / "whole", **given)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        stop_after(monkeypatch, 1)
        run(tmp_path / "run", **given)
    assert run(tmp_path / "run", **given) == unbroken
    assert run(tmp_path / "other", **given | {"view_words": False}) != unbroken
