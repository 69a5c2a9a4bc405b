"""The committed checkpoints of the embedded world: their formats, and that they are good."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from files.generators import load_generator
from models.cameras import VIEW_WORDS
from models.diffusion import DiffusionPrior
from models.features import ClipFeatures, TokenFeatures
from models.noise import guided_noise
from puppets import heads
from puppets.data import DOMAIN_NAMES, FLAT_Z_DIM, ROUND_CAMERAS, split_code
from puppets.domains import DOMAINS, ODD_HAIR
from puppets.oracle import angle_deg, load_oracle

ROOT = Path(__file__).parents[1]
PUPPETS = ROOT / "checkpoints/puppets"
ROUND = ROOT / "checkpoints/puppets360"


def fresh_heads(G, count: int, seed: int):
    """Return latents and cameras that no training has drawn."""
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.standard_normal((count, heads.Z_DIM))).float()
    angles = torch.from_numpy(rng.uniform(-1, 1, (2, count)) * [[0.6], [0.3]]).float()
    return z, G.cameras.label(*angles)


@pytest.fixture(scope="module")
def generator():
    return load_generator(PUPPETS / "generator.safetensors")


@pytest.fixture(scope="module")
def prior():
    return DiffusionPrior.from_pretrained(PUPPETS / "diffusion")


def test_checkpoints_are_small():
    sizes = [p.stat().st_size for p in PUPPETS.rglob("*") if p.is_file()]
    assert sum(sizes) < 40e6 and max(sizes) < 15e6
    others = (ROUND, ROOT / "checkpoints/puppets2d")
    sizes = [p.stat().st_size for folder in others for p in folder.rglob("*") if p.is_file()]
    assert sum(sizes) < 30e6 and max(sizes) < 15e6


def test_generator_draws_the_person_that_the_latent_means(generator):
    z, c = fresh_heads(generator, 8, seed=31)
    truth, _, mask = heads.render(z, c)
    torch.manual_seed(0)
    ws = generator.mapping(z, generator.cameras.frontal(len(z)))
    out = generator.synthesis(ws, c)
    square = (out["image"].clamp(-1, 1) - truth).square().mean(1, keepdim=True)
    psnr = 10 * torch.log10(4 / square.mean((1, 2, 3)))
    assert psnr.mean() > 25
    front = 10 * torch.log10(4 * mask.sum((1, 2, 3)) / (square * mask).sum((1, 2, 3)))
    assert front.mean() > 22
    ours, theirs = out["mask"] > 0.5, F.avg_pool2d(mask, 2) > 0.5
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.95


def test_pictures_without_cameras_are_those_of_their_codes():
    G = load_generator(ROOT / "checkpoints/puppets2d/generator.safetensors")
    z = torch.from_numpy(np.random.default_rng(5).standard_normal((12, FLAT_Z_DIM))).float()
    own, c = split_code(z)
    truth, _, mask = heads.render(own, c)
    images = G.synthesis(G.mapping(z, None))["image"].clamp(-1, 1)
    square = (images - truth).square().mean(1, keepdim=True)
    front = 10 * torch.log10(4 * mask.sum((1, 2, 3)) / (square * mask).sum((1, 2, 3)))
    assert front.mean() > 21.5
    other = images.roll(1, 0) - truth  # Of other heads, seen from elsewhere.
    assert (other.square().mean((1, 2, 3)) > 2 * square.mean((1, 2, 3))).all()


def test_heads_are_drawn_from_all_sides_without_specks_or_a_seam():
    G = load_generator(ROUND / "generator.safetensors")
    rng = np.random.default_rng(6)
    z = torch.from_numpy(rng.standard_normal((12, heads.Z_DIM))).float()
    yaw = torch.linspace(-math.pi, math.pi, 13)[:12]
    c = ROUND_CAMERAS.label(yaw, torch.from_numpy(rng.uniform(-0.4, 0.4, 12)).float())
    truth, _, mask = heads.render(z, c)
    torch.manual_seed(0)
    ws = G.mapping(z, G.cameras.frontal(len(z)))
    out = G.synthesis(ws, c)
    square = (out["image"].clamp(-1, 1) - truth).square().mean(1, keepdim=True)
    front = 10 * torch.log10(4 * mask.sum((1, 2, 3)) / (square * mask).sum((1, 2, 3)))
    assert front.mean() > 24
    small = F.avg_pool2d(mask, 2)
    ours, theirs = out["mask"] > 0.5, small > 0.5
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.95
    beside = F.max_pool2d(small, 9, 1, 4) == 0
    assert (out["mask"] * beside).amax((1, 2, 3)).median() < 0.2
    turned = torch.tensor([math.pi - 0.01, -math.pi + 0.01])
    left, right = G.synthesis(ws[:1], ROUND_CAMERAS.label(turned, torch.zeros(2))[None])["image"]
    assert (left - right).abs().mean() < 0.02


@pytest.fixture(scope="module")
def round_prior():
    return DiffusionPrior.from_pretrained(ROUND / "diffusion")


@pytest.mark.parametrize("domain", ["bronze", "devil"])
def test_prior_of_all_sides_knows_from_where_it_looks(round_prior, domain):
    """Noise in true backs is told best by the words for a back, in fronts by those for a front."""
    assert round_prior.unknown_words(f"{DOMAINS[domain].phrases[0]}, {VIEW_WORDS[2]}") == []
    for yaw, side in ((math.pi, 2), (0.0, 0)):
        c = ROUND_CAMERAS.label(torch.full((4,), yaw), torch.zeros(4))
        phrases = [f"{DOMAINS[domain].phrases[0]}, {word}" for word in VIEW_WORDS]
        # Late: a little noise hides nothing that words could tell.
        errors = [
            noise_left(round_prior, domain, phrase, c, (800, 900)).mean() for phrase in phrases
        ]
        assert errors[side] == min(errors) < 0.95 * errors[2 - side], (yaw, errors)


def test_clip_names_the_domains():
    clip = ClipFeatures.from_pretrained(PUPPETS / "clip")
    prompts = clip.text([spec.phrases[0] for spec in DOMAINS.values()])
    rng = np.random.default_rng(8)
    right = []
    for i, name in enumerate(DOMAIN_NAMES):
        z = torch.from_numpy(rng.standard_normal((3, heads.Z_DIM))).float()
        c = torch.cat([heads_camera(rng) for _ in range(3)])
        found = (clip.images(heads.render(z, c, name)[0]) @ prompts.T).argmax(1)
        right.append((found == i).float().mean())
    assert torch.stack(right).mean() > 0.97


def heads_camera(rng: np.random.Generator) -> torch.Tensor:
    from puppets.data import CAMERAS

    return CAMERAS.label(*torch.from_numpy(rng.uniform(-1, 1, (2, 1)) * [[0.6], [0.3]]).float())


def test_prior_is_complete_and_knows_the_words_of_every_caption(prior):
    assert prior.controlnet is not None and prior.image_encoder is not None
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.standard_normal((40, heads.Z_DIM))).float()
    for name, spec in DOMAINS.items():
        hair = list(ODD_HAIR) if spec.attributes else [None]
        for i in range(40):
            text = heads.caption(z[i], name, rng, hair[i % len(hair)])
            assert prior.unknown_words(text) == [], text
    assert prior.unknown_words("a bronze chandelier") == ["chandelier"]


@pytest.mark.parametrize("domain", ["person", "bronze", "alien", "devil"])
def test_prior_denoises_true_pictures_and_best_with_their_own_prompt(prior, domain):
    """The noise left at t = 100, 300, 600: large if UNet and VAE are not of one training."""
    c = torch.cat([heads_camera(np.random.default_rng(i)) for i in range(4)])
    names = (domain, "marble")
    errors = {name: noise_left(prior, domain, DOMAINS[name].phrases[0], c) for name in names}
    assert (errors[domain] < torch.tensor([0.18, 0.07, 0.03])).all(), errors
    assert errors[domain][2] < 0.9 * errors["marble"][2]


def noise_left(prior, domain: str, prompt: str, c: torch.Tensor, times=(100, 300, 600)):
    """Return the mean squared error of the noise predicted in four heads of a domain, [T]."""
    torch.manual_seed(5)
    z = torch.randn(4, heads.Z_DIM)
    latents = prior.encode_images(heads.render(z, c, domain)[0]).repeat(len(times), 1, 1, 1)
    noise, t = torch.randn_like(latents), torch.tensor(times).repeat_interleave(4)
    abar = prior.alphas_cumprod[t].view(-1, 1, 1, 1)
    text = prior.encode_text([prompt]).repeat(len(t), 1, 1)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    return (
        (prior.predict_noise(noisy, t, text) - noise).square().mean((1, 2, 3)).view(-1, 4).mean(1)
    )


def test_vae_shows_colours_that_no_domain_has(prior):
    """Else distillation ends in pictures that only its encoder takes for the target's."""
    torch.manual_seed(3)
    z, rng = torch.randn(4, heads.Z_DIM), np.random.default_rng(3)
    images = heads.render(z, torch.cat([heads_camera(rng) for _ in z]), "person")[0]
    for channels, least in (([0, 1, 2], 28), ([1, 2, 0], 25)):
        odd = images[:, channels]
        back = prior.decode_latents(prior.encode_images(odd)).clamp(-1, 1)
        assert 10 * torch.log10(4 / (back - odd).square().mean()) > least


def test_picture_without_text_guides_towards_its_domain(prior):
    torch.manual_seed(6)
    z, c = torch.randn(1, heads.Z_DIM), heads_camera(np.random.default_rng(1))
    z_ref, c_ref = torch.randn(1, heads.Z_DIM), heads_camera(np.random.default_rng(2))
    latents = prior.encode_images(heads.render(z, c, "alien")[0]).repeat(4, 1, 1, 1)
    noise, t = torch.randn_like(latents), torch.full((4,), 600)
    abar = prior.alphas_cumprod[600]
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    error = {}
    for domain in ("alien", "clown"):
        condition = prior.condition("", heads.render(z_ref, c_ref, domain)[0])
        eps_hat = guided_noise(prior, noisy, t, condition, guidance=1.0)
        error[domain] = (eps_hat - noise).square().mean()
    assert error["alien"] < 0.9 * error["clown"]


def test_default_command_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(train.Config(prompt="a bronze statue", steps=2, batch=1, device="cpu"))
    run = tmp_path / "runs/a-bronze-statue"
    assert load_generator(run).img_resolution == 128
    rows = [json.loads(row) for row in (run / "log.jsonl").read_text().splitlines()]
    assert all(row["denoised"] > 0 and row["hsc"] > 0 for row in rows) and len(rows) == 2


def test_vit_gives_a_grid_of_tokens():
    vit = TokenFeatures.from_pretrained(PUPPETS / "dino")
    assert vit.tokens(torch.zeros(1, 3, 128, 128)).shape[:3] == (1, 16, 16)


def test_oracle_reads_domain_and_camera():
    oracle = load_oracle()
    rng = np.random.default_rng(4)
    z = torch.from_numpy(rng.standard_normal((6, heads.Z_DIM))).float()
    c = torch.cat([heads_camera(rng) for _ in range(6)])
    domain, _, camera = oracle(heads.render(z, c, "bronze")[0])
    assert (domain.argmax(1) == DOMAIN_NAMES.index("bronze")).float().mean() > 0.8
    assert angle_deg(camera, F.normalize(c[:, 3:12:4], dim=1)).mean() < 4


def test_report_has_every_part():
    report = (PUPPETS / "REPORT.md").read_text()
    for part in ("clip", "vae", "unet", "ip-adapter", "dino", "oracle", "generator"):
        assert f"\n## {part}\n" in report, part
    json.loads((PUPPETS / "diffusion/vocabulary.json").read_text())


def test_nothing_outside_the_world_imports_it():
    for path in [*ROOT.glob("*.py"), *(ROOT / "models").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "puppets" for name in names), path
