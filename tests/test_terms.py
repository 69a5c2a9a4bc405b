"""The objective: what each term compares, what it needs, and how gradients come back."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_run import build_generator, hurry, options, run, world

import losses
import terms
import train
from config import Config, Weights
from files.generators import load_generator, save_generator
from guides import Guides, load_prior, resize
from harness.pictures import read_picture, to_image
from models.cameras import NoCameras
from models.diffusion import Condition, DiffusionPrior
from models.features import ClipFeatures, TokenFeatures
from terms import Term, View

DATA = Path(__file__).parent / "data"
# Runs whose gradients at the weights were stored at 5c470a9, when each term still went back through
# its network by itself; together they have all twelve terms.
STORED = {
    "gca3d": {"method": "gca3d"},
    "sds": {"method": "sds"},
    "stylegan-fusion": {"method": "stylegan-fusion", "weights": {"score_reconstruction": 1.0}},
    "diffusiongan3d": {
        "method": "diffusiongan3d",
        "edit": "a person with green hair",
        "prompt": None,
    },
    "nada": {"method": "nada"},
    "3d-adapter": {
        "method": "3d-adapter",
        "image": "picture.png",
        "learns": (r"(decoder|backbone\.synthesis|superresolution)\..*\.weight",),
    },
    "delta": {"method": "gca3d", "delta": 0.3, "mask": False, "micro_batch": 1},
}


@pytest.fixture(autouse=True, scope="module")
def short_runs():
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        yield


def prepared(cfg):
    """Return a run of the tiny world before its first step."""
    G = load_generator(cfg.generator)
    reference = torch.cat([to_image(read_picture(path)) for path in cfg.image] or [torch.empty(0)])
    guides = terms.load_guides(cfg, G, reference if cfg.image else None, torch.device("cpu"))
    return train.prepare(cfg, G, guides)


def probe(name, weight):
    """Return a fixed direction for the gradient of a weight."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("name", STORED)
def test_gradients_are_those_of_one_pass_per_term(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").resize((40, 40)).save("picture.png")
    run = prepared(Config(**options(tmp_path / "run", **STORED[name])))
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in run.weights.values():
            weight.add_(0.3 * torch.randn_like(weight))  # So that no term is at its zero.
    run.optimizer.step = lambda: None
    row = train.take_step(run, 3)
    products = [
        (w.grad * probe(name, w)).sum() for name, w in run.weights.items() if w.grad is not None
    ]
    stored = json.loads((DATA / "gradients.json").read_text())[name]
    assert row["grad_norm"] == pytest.approx(stored["grad_norm"], rel=1e-4)
    assert sum(products).item() == pytest.approx(
        stored["probe"], rel=1e-3, abs=1e-4 * stored["grad_norm"]
    )
    assert {term: row[term] for term in stored["terms"]} == pytest.approx(stored["terms"], rel=1e-4)
    assert row["clip"] == pytest.approx(stored["clip"], abs=1e-5)


@pytest.mark.parametrize("mask", [True, False])
def test_the_prior_paints_the_foreground_alone(tmp_path, mask):
    run = prepared(Config(**options(tmp_path / "run", mask=mask, weights={"denoised": 1.0})))
    torch.manual_seed(0)
    ws = run.G.mapping(torch.randn(2, run.G.z_dim), run.G.cameras.frontal(2))
    source = run.G_src.synthesis(ws, run.G.cameras.sample(2))
    source["mask"] = torch.zeros_like(source["mask"])
    half = source["mask"].shape[-1] // 2
    source["mask"][..., :half] = 1.0  # The left half of the picture, and a soft edge.
    painted = terms.Seen(run.guides, source).painted.view("image")
    changed = (painted - source["image"]).abs().amax((0, 1, 2))  # [R], a value per column.
    quarter = len(changed) // 4
    assert changed[:quarter].min() > 0.01
    assert (changed[-quarter:].max() == 0) == mask


def test_silhouette_of_a_painted_picture_grows_into_its_margin_alone(tmp_path):
    given = options(
        tmp_path / "run", method="denoised-shapes", targets={"margin": 0.25, "draws": 0}
    )
    run = prepared(Config(**given))
    torch.manual_seed(0)
    ws = run.G.mapping(torch.randn(2, run.G.z_dim), run.G.cameras.frontal(2))
    source = run.G_src.synthesis(ws, run.G.cameras.sample(2))
    source["mask"] = torch.zeros_like(source["mask"])
    n = source["mask"].shape[-1]
    source["mask"][..., : n // 4] = 1.0  # The left quarter of the picture.
    # What was painted is far from the source, and beyond the margin it is the source.
    run.guides.prior.decode_latents = lambda latents: -source["image"].sign().expand(2, 3, -1, -1)
    seen = terms.Seen(run.guides, source)
    mask = seen.painted.view("mask")
    assert mask.shape == source["mask"].shape and (mask >= source["mask"]).all()
    assert mask[..., n // 4 : n // 2 - 1].mean() > 0.9 and (mask[..., n // 2 + 1 :] == 0).all()
    torch.testing.assert_close(seen.grown, mask - source["mask"])
    run.guides.cfg = Config(**given | {"targets": {"margin": 0.0, "draws": 0}})
    still = terms.Seen(run.guides, source)
    assert torch.equal(still.painted.view("mask"), source["mask"]) and not still.grown.any()


def test_silhouette_pulls_the_foreground_towards_the_painted_one(tmp_path):
    run = prepared(Config(**options(tmp_path / "run", method="denoised-shapes")))
    target = torch.rand(2, 1, 12, 12)
    source = terms.Seen(run.guides, {})
    vars(source)["painted"] = terms.Seen(run.guides, {"mask": target})
    now = terms.Moment(run.guides, source, torch.zeros(2), torch.zeros(2, 2))
    mask = torch.rand(2, 1, 12, 12)
    gradients, row = terms.pull_back({"mask": mask}, {"silhouette": 2.0}, now, batch=2)
    assert gradients.keys() == {"mask"}
    slope = ((mask - target) / 0.1).clamp(-1, 1)  # Of an L1 that is quadratic below 0.1.
    torch.testing.assert_close(gradients["mask"], slope / 144)
    loss = losses.silhouette_loss(mask, target).mean().item()
    assert row["silhouette"] == pytest.approx(2 * loss)


def test_targets_from_noise_start_all_alike(tmp_path):
    given = options(tmp_path / "run", weights={"denoised": 1.0}, targets={"inverted": False})
    noise, again = (prepared(Config(**given)).guides.one_noise for _ in range(2))
    assert noise.shape[0] == 1 and torch.equal(noise, again)
    other = prepared(Config(**given | {"seed": 5})).guides.one_noise
    assert not torch.equal(noise, other)


def test_every_term_has_a_weight_and_every_weight_a_term():
    assert [field.name for field in fields(Weights)] == list(terms.TERMS)
    assert all(term.view in terms.VIEWS for term in terms.TERMS.values())


@pytest.mark.parametrize(
    ("changes", "depth", "mask"),
    [({}, True, True), ({"mask": False}, True, False), ({"method": "sds"}, False, False)],
)
def test_dsds_sees_depth_and_mask_where_they_are_on(monkeypatch, tmp_path, changes, depth, mask):
    given = []
    loss = terms.dsds_loss
    monkeypatch.setattr(terms, "dsds_loss", lambda *a, **k: given.append(k) or loss(*a, **k))
    run(tmp_path, steps=1, **changes)
    assert [(k["depth"] is not None, k["mask"] is not None) for k in given] == [(depth, mask)]


def test_depth_condition_shows_a_foreground(monkeypatch, tmp_path):
    conditions = []
    condition = DiffusionPrior.depth_condition

    def spy(prior, depth, mask):
        assert (mask > 0.5).any() and (mask < 0.5).any()
        conditions.append(condition(prior, depth, mask))
        return conditions[-1]

    monkeypatch.setattr(DiffusionPrior, "depth_condition", spy)
    run(tmp_path, steps=2)
    assert len(conditions) == 2
    assert all(shown.amax((1, 2, 3)).min() > 0.5 for shown in conditions)


@pytest.fixture
def small_terms(monkeypatch):
    """Three terms in closed form, on two views of the same pictures and on planes."""
    looks = []
    views = {
        "twice": View("image", lambda guides, x: looks.append("twice") or 2 * x),
        "planes": View("planes", lambda guides, x: looks.append("planes") or x),
    }
    monkeypatch.setattr(terms, "VIEWS", views)
    small = {
        "a": Term("twice", lambda x, now: x.square().flatten(1).sum(1)),
        "b": Term("twice", lambda x, now: x.flatten(1).sum(1)),
        "c": Term("planes", lambda x, now: x.sum(1)),
        "off": Term("twice", None),  # Not even called.
    }
    monkeypatch.setattr(terms, "TERMS", small)
    return looks


def test_gradients_are_weighted_sums_and_stop_at_the_outputs(small_terms):
    images, planes = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 9)
    outputs = {"image": images, "planes": planes, "mask": planes}
    weights = {"a": 0.5, "c": 2.0, "b": 3.0}
    now = terms.Moment(None, None, torch.zeros(2), torch.zeros(2))
    gradients, row = terms.pull_back(outputs, weights, now, batch=4)
    assert list(gradients) == ["image", "planes"]
    # Of 0.5 (2 x)^2 + 3 (2 x), over a batch of four.
    torch.testing.assert_close(gradients["image"], (4 * images.detach() + 6) / 4)
    torch.testing.assert_close(gradients["planes"], torch.full((2, 9), 0.5))
    assert images.grad is None
    assert row["a"] == pytest.approx(0.5 / 4 * (2 * images).square().sum().item())
    assert row["c_grad"] == pytest.approx(2 * 2.0 / 4 * 3)  # Two samples; norm of nine ones.
    assert row.keys() == {"a", "a_grad", "b", "b_grad", "c", "c_grad"}
    assert small_terms == ["twice", "planes"]  # Each view once.


def test_stylegan_fusion_goes_through_the_vae_twice(tmp_path, monkeypatch):
    """Once for the adapted images, of which two terms ask, and once for the source's."""
    encode, calls = DiffusionPrior.encode_images, []
    spy = lambda self, x: calls.append(x.requires_grad) or encode(self, x)  # noqa: E731
    monkeypatch.setattr(DiffusionPrior, "encode_images", spy)
    run(tmp_path, steps=1, method="stylegan-fusion", weights={"score_reconstruction": 1.0})
    assert sorted(calls) == [False, True]


@pytest.fixture
def moment():
    """Return what the terms see of two samples of one picture's domain, and the adapted outputs."""
    torch.manual_seed(0)
    prior = DiffusionPrior.from_pretrained(world() / "diffusion")
    vit = TokenFeatures.from_pretrained(world() / "dino")
    clip = ClipFeatures.from_pretrained(world() / "clip")
    picture = torch.rand(1, 3, 40, 40) * 2 - 1
    G_src = build_generator()
    ws = G_src.mapping(torch.randn(2, G_src.z_dim), G_src.cameras.frontal(2))
    c = G_src.cameras.sample(2)
    source, adapted = (
        {"planes": G.planes(ws)} | G.synthesis(ws, c) for G in (G_src, build_generator(1))
    )
    for out in (source, adapted):
        out["image"] = 3 * out["image"]  # Beyond -1 and 1.
    noise, t = torch.randn(2, 2, *prior.latent_shape), torch.tensor([100, 700])

    def make(**changes):
        cfg = Config(**changes)
        reference = picture if cfg.image else None
        guides = Guides(cfg, G_src, clip, prior, vit, reference)
        everyone = terms.Everyone(adapted["planes"], source["planes"])
        now = terms.Moment(guides, terms.Seen(guides, source), t, noise, 0.5, everyone)
        return now, adapted, picture

    return make


def check_terms(now, adapted, expected):
    """Compare the values and gradients at the outputs with those of losses put together by hand."""
    for name, loss in expected.items():
        leaves = {k: x.detach().requires_grad_() for k, x in adapted.items()}
        value = loss(leaves)
        wanted = torch.autograd.grad(value.sum(), leaves.values(), allow_unused=True)
        gradients, row = terms.pull_back(adapted, {name: 1.0}, now, batch=len(value))
        assert row[name] == pytest.approx(value.mean().item(), rel=1e-4), name
        for output, gradient in zip(leaves, wanted, strict=True):
            if gradient is not None:
                torch.testing.assert_close(gradients.pop(output) * len(value), gradient, msg=name)
        assert not gradients


def test_terms_of_stylegan_fusion_are_the_losses_of_its_paper(moment):
    now, adapted, picture = moment(
        image=Path("x"), prompt="a bronze statue", guidance=3.0, method="stylegan-fusion"
    )
    prior, vit = now.guides.prior, now.guides.vit
    condition = prior.condition("a bronze statue", picture, 0.6, 0.0)
    cells, source = 64, now.source.outputs
    quarters = [round(vit.depth * share) for share in (0.25, 0.5, 0.75, 1)]

    def latents(images):
        return prior.encode_images(resize(images.clamp(-1, 1), prior.image_size))

    def noisy(out, noise):
        pair = (prior, latents(out["image"]), latents(source["image"]))
        return (*pair, condition, now.t, noise, 3.0)

    def fusion(out):
        given = (prior, latents(out["image"]), condition, now.t, now.noise[0], 3.0)
        return losses.fusion_sds_loss(*given) / cells

    check_terms(
        now,
        adapted,
        {
            "fusion": fusion,
            "score_direction": lambda out: (
                losses.score_direction_loss(*noisy(out, now.noise[1])) / cells
            ),
            "score_reconstruction": lambda out: (
                losses.score_reconstruction_loss(*noisy(out, now.noise[1])) / cells
            ),
            "perceptual": lambda out: losses.perceptual_loss(
                *(vit.layers(x["image"].clamp(-1, 1), quarters) for x in (out, source))
            ),
        },
    )


def test_terms_of_diffusiongan3d_are_the_losses_of_its_paper(moment):
    now, adapted, _ = moment(edit="a person with green hair", method="diffusiongan3d")
    prior, source = now.guides.prior, now.source.outputs
    words = Condition(prior.encode_text(["a photo of a person", "a person with green hair"]))
    latents_src = prior.encode_images(resize(source["image"], prior.image_size))
    mask = losses.edit_mask(prior, latents_src, words, now.noise[0], (0.1, 0.3))
    planes = adapted["planes"], source["planes"]
    check_terms(
        now,
        adapted,
        {
            "keep": lambda out: losses.keep_loss(out["image"], source["image"], mask),
            "distance": lambda out: losses.relative_distance_loss(
                out["planes"], source["planes"], *planes
            ),
        },
    )


def test_terms_of_nada_and_3d_adapter_are_the_losses_of_their_papers(moment):
    now, adapted, picture = moment(image=Path("x"), method="3d-adapter")
    clip, source = now.guides.clip, now.source.outputs
    layer = max(1, round(clip.depth / 4))  # 3 of 12.

    def tokens(out):
        return clip.tokens(out["image"], layer)

    def pooled(out):
        return F.adaptive_avg_pool2d(out["features"], 16).movedim(1, 3)

    wanted = clip.tokens(picture, layer)
    check_terms(
        now,
        adapted,
        {
            "clip_direction": lambda out: losses.clip_direction_loss(
                clip.images(out["image"]), clip.images(source["image"]), now.guides.direction
            ),
            "target": lambda out: losses.target_loss(tokens(out), wanted),
            "structure": lambda out: losses.structure_loss(tokens(out), tokens(source)),
            "feature_structure": lambda out: losses.structure_loss(pooled(out), pooled(source)),
        },
    )


def test_a_term_is_refused_for_a_generator_without_what_it_needs():
    flat = SimpleNamespace(gives=frozenset({"image"}), rendering_kwargs={}, cameras=NoCameras())
    terms.check_generator(Config(prompt="x", method="nada"), flat)
    terms.check_generator(Config(prompt="x", method="sds"), flat)
    for changes, missing in (
        ({}, "image_depth, mask"),
        ({"method": "diffusiongan3d"}, "planes"),
        ({"method": "nada", "weights": {"feature_structure": 1.0}}, "features"),
        ({"method": "sds", "targets": {"adapted_depth": True}}, "image_depth, mask"),
        ({"depth_scale": 0.0, "mask": False, "weights": {"silhouette": 1.0}}, "mask"),
    ):
        with pytest.raises(ValueError, match=f"gives no {missing}, which --weights"):
            terms.check_generator(Config(prompt="x", **changes), flat)


def test_noise_drawn_among_samples_is_not_shared_out(tmp_path):
    G = build_generator()
    G.rendering_kwargs["superresolution_noise_mode"] = "random"
    save_generator(G, tmp_path / "G.safetensors")
    changes = {"generator": str(tmp_path / "G.safetensors"), "steps": 1}
    run(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match="superresolution_noise_mode random"):
        run(tmp_path / "parts", **changes, micro_batch=1)


@pytest.mark.parametrize(
    ("changes", "loaded"),
    [
        ({"prompt": "x"}, ["depth", None]),
        ({"image": Path("x.png")}, ["depth", "picture"]),
        ({"prompt": "x", "depth_scale": 0.0}, [None, None]),
        ({"image": Path("x.png"), "ip_adapter": ""}, ["depth", None]),
    ],
    ids=str,
)
def test_adapters_are_loaded_where_a_run_uses_them(changes, loaded, monkeypatch):
    def load(source, *adapters, **_):
        assert list(adapters) == loaded
        raise InterruptedError

    monkeypatch.setattr(DiffusionPrior, "from_pretrained", load)
    cfg = Config(**{"controlnet": "depth", "ip_adapter": "picture"} | changes)
    with pytest.raises(InterruptedError):
        load_prior(cfg, torch.device("cpu"))


def test_picture_needs_an_adapter_for_it(tmp_path):
    Image.new("L", (30, 30), 200).save(tmp_path / "grey.png")
    shutil.copytree(world() / "diffusion", tmp_path / "diffusion")
    shutil.rmtree(tmp_path / "diffusion/ip_adapter")
    with pytest.raises(ValueError, match=f"^{tmp_path}/diffusion has no IP-Adapter.*--ip-adapter"):
        run(tmp_path / "run", image=tmp_path / "grey.png", diffusion=tmp_path / "diffusion")


@pytest.mark.parametrize("targets", ["words", "picture", "pictures", "both"])
def test_clip_direction_leads_from_the_source_to_the_target(targets):
    G, clip = build_generator(), ClipFeatures.from_pretrained(world() / "clip")
    count = {"words": 0, "pictures": 2}.get(targets, 1)
    pictures = torch.rand(count, 3, 40, 40) * 2 - 1
    prompt = "a bronze statue" if targets in ("words", "both") else ""
    cfg = Config(prompt=prompt, image=("x",) * count, method="nada")
    guides = Guides(cfg, G, clip, reference=pictures if count else None)
    assert guides.direction.norm().item() == pytest.approx(1)
    ways = []
    if prompt:
        ways.append(clip.text([prompt]) - clip.text([cfg.source_prompt]))
    if count:
        ways.append(clip.images(pictures).mean(0, keepdim=True) - guides.mean_embedding())
    cosines = [F.cosine_similarity(guides.direction, way).item() for way in ways]
    assert min(cosines) > (0.999 if len(ways) == 1 else 0.1)
    assert cosines[0] == pytest.approx(cosines[-1], abs=1e-4)


def test_a_target_that_means_the_source_is_refused(monkeypatch):
    clip = ClipFeatures.from_pretrained(world() / "clip")
    monkeypatch.setattr(clip, "text", lambda texts: torch.ones(len(texts), 4))
    guides = Guides(Config(prompt="a photo of persons", method="nada"), None, clip)
    with pytest.raises(ValueError, match="the target is the source"):
        _ = guides.direction


def test_mean_embedding_is_that_of_many_samples(monkeypatch):
    clip = ClipFeatures.from_pretrained(world() / "clip")
    guides = Guides(Config(prompt="x"), build_generator(), clip)
    means = [guides.mean_embedding() for _ in range(2)]
    assert torch.equal(*means) and means[0].norm() < 1
    monkeypatch.setattr("guides.REFERENCE_SAMPLES", 2)
    assert not torch.equal(guides.mean_embedding(), means[0])


def test_unknown_words_are_warned_of(tmp_path, capsys):
    run(tmp_path, prompt="a chrome statue", steps=1)
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("warning"))
    assert "chrome" in line and "statue" in line.split(";")[1]
