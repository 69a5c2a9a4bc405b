"""What the tables are held against: ceilings that know the truth, floors that adapt nothing.

A method that is no better than the source with other colours has learnt colours alone; a score that
one person seen from all sides wins is no score. What training on the true pictures reaches, the
generator and the learning weights can; what the prior itself paints bounds all that learn from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
import train
from config import settings
from files.generators import load_generator, save_generator
from guides import Guides
from harness.run_folder import claim_run, locate
from models.features import ClipFeatures
from models.generator import Generator
from models.renderer import Rays
from puppets import oracle
from puppets.data import CAMERAS
from puppets.domains import DOMAINS
from puppets.heads import render
from samples import Pool, draw_heads, draw_samples, step_seed
from terms import Seen, load_guides

BATCH = 8  # Pictures that the prior paints at once.


class TruePool(Pool):
    """Samples whose target pictures are the true ones, instead of what the prior paints."""

    def __init__(self, cfg: train.Config, G_src: Generator, guides: Guides, domain: str) -> None:
        """Take a key of DOMAINS beside what samples are made with."""
        super().__init__(cfg, G_src, guides)
        self.domain = domain

    def source(self, draw: int, first: int, ws: Tensor, c: Tensor, rays: Rays) -> Seen:
        """Return what the source makes of samples, with the truth as what is painted of them."""
        seen = super().source(draw, first, ws, c, rays)
        if "painted" not in vars(seen):
            with torch.random.fork_rng():
                torch.manual_seed(step_seed(self.cfg.seed, draw))
                z, _ = draw_heads(self.cfg, self.G_src)
            heads = z[first : first + len(c)].split(1), c.cpu().split(1)
            true = [render(*head, self.domain)[0] for head in zip(*heads, strict=True)]
            vars(seen)["painted"] = Seen(self.guides, {"image": torch.cat(true).to(c.device)})
        return seen


def supervise(domain: str, steps: int, out: Path, device: str = "cpu") -> None:
    """Train a generator on true pictures, by the denoised terms; write its run folder.

    Raises:
        ValueError: the folder is of another run.
    """
    if (out / "generator.safetensors").exists():
        return
    cfg = train.Config(
        prompt=DOMAINS[domain].phrases[0], steps=steps, out=out, device=device, weights={"hsc": 0.0}
    )
    G_src = load_generator(locate(cfg.generator), device)
    guides = load_guides(cfg, G_src, None, torch.device(device))
    run = train.prepare(cfg, G_src, guides)
    run.pool = TruePool(cfg, G_src, guides, domain)
    claim_run(cfg.out, settings(cfg) | guides.fingerprints())
    for step in tqdm(range(1, cfg.steps + 1), desc=cfg.out.name, unit="step"):
        train.take_step(run, step)
    save_generator(run.G_ema, cfg.out / "generator.safetensors")


def score(
    kind: str,
    domain: str,
    eye: oracle.Oracle,
    cfg: evaluation.Config,
    sources: evaluation.Sources,
    truths: oracle.Truths,
) -> evaluation.Row:
    """Return the scores that pictures get which no method made.

    Args:
        kind: A key of KINDS.
        domain: A key of DOMAINS.
        sources: See `eval.score_run`.
        truths: See `oracle.true_pictures`.
    """
    run = train.Config(prompt=DOMAINS[domain].phrases[0])
    source = evaluation.render_source(load_generator(locate(run.generator)), 1.0, cfg, sources)
    truth = oracle.true_pictures(source.views, domain, None, cfg, truths)
    pictures = KINDS[kind](source, truth, domain)
    clip = ClipFeatures.from_pretrained(locate(run.clip))
    row = {"method": kind, "target": run.prompt, "samples": cfg.samples, "seed": cfg.seed}
    row |= evaluation.fidelity(clip, settings(run), Path(), source.renders, pictures, cfg)
    row |= evaluation.likeness(clip, source, pictures, cfg)
    return row | oracle.judge(eye, clip, pictures, source, truth, domain, cfg)


def true_pictures(
    source: evaluation.Source, truth: oracle.Truth, domain: str
) -> evaluation.Renders:
    """Return the truth itself."""
    return replace(source.renders, image=truth.image, front=truth.front, mask=truth.mask)


def unadapted(source: evaluation.Source, truth: oracle.Truth, domain: str) -> evaluation.Renders:
    """Return the source's pictures as they are."""
    return source.renders


def recoloured(source: evaluation.Source, truth: oracle.Truth, domain: str) -> evaluation.Renders:
    """Return the source's pictures after the one affine map of colours that fits the truth best."""
    renders = source.renders
    inside = F.interpolate(renders.mask, truth.mask.shape[2:]).minimum(truth.mask)[:, 0] > 0.5
    before, after = (x.movedim(1, -1)[inside] for x in (renders.image, truth.image))  # [P, 3]
    ones = torch.ones_like(before[:, :1])
    colours = torch.linalg.lstsq(torch.cat([before, ones], 1), after).solution  # [4, 3]

    def paint(image: Tensor, mask: Tensor) -> Tensor:
        pixels = image.movedim(1, -1)
        new = (pixels @ colours[:3] + colours[3]).movedim(-1, 1).clamp(-1, 1)
        return image.lerp(new, F.interpolate(mask, image.shape[2:], mode="bilinear"))

    image, front = paint(renders.image, renders.mask), paint(renders.front, renders.front_mask)
    return replace(renders, image=image, front=front)


def one_person(source: evaluation.Source, truth: oracle.Truth, domain: str) -> evaluation.Renders:
    """Return the truth of the first latent alone, from everyone's camera."""
    views = source.views
    z = views.z[:1].expand_as(views.z)
    image, mask = oracle.draw_truth(z, views.c, domain)
    front = truth.front[:1].expand_as(truth.front)
    return replace(source.renders, image=image, front=front, mask=mask)


def painted(source: evaluation.Source, truth: oracle.Truth, domain: str) -> evaluation.Renders:
    """Return what the prior paints of the source's pictures: the targets of the default method."""
    cfg = train.Config(prompt=DOMAINS[domain].phrases[0])
    G_src = load_generator(locate(cfg.generator))
    guides = load_guides(cfg, G_src, None, torch.device("cpu"))
    views = source.views
    ws = G_src.mapping(views.z, CAMERAS.frontal(len(views.z)))

    def paint(c: Tensor, name: str) -> Tensor:
        parts = []
        for part in tqdm(torch.arange(len(c)).split(BATCH), desc=name, unit="batch", leave=False):
            torch.manual_seed(part[0].item())
            outputs = draw_samples(G_src, ws[part], c[part], G_src.rays(c[part]))
            parts.append(Seen(guides, outputs).painted.outputs["image"])
        return torch.cat(parts)

    with torch.no_grad():
        image = paint(views.c, "painted")
        front = paint(CAMERAS.frontal(len(views.z)), "painted from the front")
    return replace(source.renders, image=image, front=front)


KINDS: dict[str, Callable[[evaluation.Source, oracle.Truth, str], evaluation.Renders]] = {
    "true pictures": true_pictures,
    "the prior's pictures": painted,
    "the source": unadapted,
    "the source recoloured": recoloured,
    "one person for all": one_person,
}
