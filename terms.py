"""What can be asked of a picture: the terms of the objective, and the networks they look with.

A term compares the adapted samples with the source's, seen by one frozen network: in latents, in
tokens, in embeddings. Several terms may share such a view; `pull_back` then goes back through the
network once for all of them. b samples at a time, one value for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from guides import HSC_GRIDS, Guides, resize, shrink
from harness import ranks
from losses import (
    clip_direction_loss,
    clip_to_quantile,
    coarse_to_fine,
    denoised_loss,
    dsds_loss,
    edit_mask,
    fusion_sds_loss,
    hsc_loss,
    keep_loss,
    opacity_loss,
    perceptual_loss,
    relative_distance_loss,
    score_direction_loss,
    score_reconstruction_loss,
    silhouette_loss,
    source_noise,
    structure_loss,
    target_loss,
    variation_loss,
)
from models.generator import Generator, Outputs

FEATURE_CELLS = 16  # Features are averaged to this many cells a side before pairs are compared.
# Diffusion times that show where an edit belongs. For "green hair" the mask covers 65 % of the true
# hair at 0.1 and 0.3, 50 % at 0.7.
EDIT_LEVELS = (0.1, 0.3)

Row = dict[str, float]  # A step's line of the log.


@dataclass(frozen=True)
class View:
    """A frozen network's look at one of a generator's outputs."""

    output: str  # The output that is looked at, such as "image".
    look: Callable[[Guides, Tensor], Tensor]  # (networks, output [b, ...]) -> what is seen [b, ...]
    summed: bool = False  # Whether losses there are sums over latent cells, so divided by them.


def _layers(guides: Guides, images: Tensor) -> Tensor:
    """Return a ViT's tokens after each quarter of its layers, [B, 4, g, g, D]."""
    quarters = [round(guides.vit.depth * part / 4) for part in range(1, 5)]
    return torch.stack(guides.vit.layers(images.clamp(-1, 1), quarters), dim=1)


def clip_gradients(guides: Guides, images: Tensor) -> Tensor:
    """Return images as the VAE takes them, whose gradients are clipped by --scores.clip."""
    images = resize(images, guides.prior.image_size).clamp(-1, 1)
    if images.requires_grad:
        images.register_hook(lambda g: clip_to_quantile(g, guides.cfg.scores.clip))
    return images


VIEWS = {
    "image": View("image", lambda guides, x: x),
    "pixels": View("image", lambda guides, x: shrink(x, guides.prior.image_size)),
    "planes": View("planes", lambda guides, x: x),
    "own planes": View("own_planes", lambda guides, x: x),
    "mask": View("mask", lambda guides, x: x),
    "features": View("features", lambda guides, x: F.adaptive_avg_pool2d(x, FEATURE_CELLS)),
    "latents": View("image", lambda guides, x: guides.encode(x), summed=True),
    # StyleGAN-Fusion clamps its images.
    "clamped latents": View("image", lambda guides, x: guides.encode(x.clamp(-1, 1)), summed=True),
    # Of StyleGAN2 it clips their gradients too, where the VAE is given them.
    "clipped latents": View(
        "image", lambda guides, x: guides.encode(clip_gradients(guides, x)), summed=True
    ),
    "tokens": View("image", lambda guides, x: guides.vit.tokens(x)),
    "layers": View("image", _layers),
    "clip tokens": View("image", lambda guides, x: guides.clip.tokens(x, guides.clip_layer)),
    "clip": View("image", lambda guides, x: guides.clip.images(x)),
}


@dataclass(frozen=True)
class Seen:
    """What samples are compared with: outputs of the source; views of them are made once each."""

    guides: Guides
    outputs: Outputs
    views: dict[str, Tensor] = field(default_factory=dict)

    def view(self, name: str) -> Tensor:
        """Return what is seen, without gradients."""
        if name not in self.views:
            view = VIEWS[name]
            with torch.no_grad():
                self.views[name] = view.look(self.guides, self.outputs[view.output])
        return self.views[name]

    @cached_property
    def painted(self) -> Seen:
        """The prior's own pictures of these samples."""
        return Seen(self.guides, self.guides.paint(self.outputs, self.view("latents")))

    @cached_property
    def grown(self) -> Tensor | None:
        """How much more heads fill in those pictures than here, [b, 1, n, n]; None: no masks."""
        if not all("mask" in seen.outputs for seen in (self, self.painted)):
            return None
        return (self.painted.view("mask") - self.view("mask")).clamp_min(0)


@dataclass(frozen=True)
class Everyone:
    """The planes of a step's whole batch, of all processes, without gradients."""

    planes: Tensor  # Adapted, [B, 3, C, P, P].
    planes_src: Tensor  # The source's, likewise.
    first: int = 0  # Where in the batch the b samples begin.


@dataclass(frozen=True)
class Moment:
    """One step as the terms see it; b of its B samples."""

    guides: Guides
    source: Seen
    t: Tensor  # Diffusion times, integer steps [b]; empty without a prior, like the noise.
    noise: Tensor  # Two draws, [2, b, 4, h, w].
    progress: float = 1.0  # Part of the run that is over, in (0, 1].
    everyone: Everyone | None = None  # Only where a term needs the batch.


@dataclass(frozen=True)
class Term:
    """A part of the objective."""

    view: str  # A key of VIEWS: what the loss is differentiated by.
    loss: Callable[[Tensor, Moment], Tensor]  # (view of the adapted samples, all else) -> [b]
    needs: frozenset[str] = frozenset()
    """Networks ("prior", "vit"), outputs of the generator ("mask", ...), or the whole "batch"."""


def dsds(latents: Tensor, now: Moment) -> Tensor:
    """L_DSDS, as far as --depth-scale and --mask are on; without both it is plain SDS."""
    guides, cfg, source = now.guides, now.guides.cfg, now.source.outputs
    depth, noise = guides.depth(source), now.noise[0]
    return dsds_loss(
        guides.prior,
        latents,
        guides.condition_of(source),
        now.t,
        noise,
        cfg.guidance,
        depth=depth,
        mask=source["mask"] if cfg.mask else None,
        baseline=delta(now, "latents", depth),
    )


def delta(now: Moment, view: str, depth: Tensor | None = None) -> Tensor | None:
    """Return what score distillation subtracts from the prediction; None: the noise.

    With --delta a part of it is what the prior predicts on the source, seen by the same view.
    """
    guides, cfg, noise = now.guides, now.guides.cfg, now.noise[0]
    if not cfg.delta:
        return None
    condition = guides.condition_src_of(now.source.outputs)
    inputs = (condition, now.t, noise, cfg.guidance, depth)
    return noise.lerp(source_noise(guides.prior, now.source.view(view), *inputs), cfg.delta)


def hsc(tokens: Tensor, now: Moment) -> Tensor:
    """L_HSC, whose levels move from coarse to fine over the run."""
    cfg = now.guides.cfg
    levels = coarse_to_fine(now.progress, *cfg.hsc_levels)
    mask = now.source.outputs["mask"] if cfg.mask else None
    tokens_src = now.source.view("tokens")
    return hsc_loss(tokens, tokens_src, HSC_GRIDS, levels, cfg.hsc_temperature, mask)


def denoised(images: Tensor, now: Moment) -> Tensor:
    """Distance to the prior's own pictures, at the size at which it paints them."""
    return denoised_loss(images, now.source.painted.view("pixels"), grown=now.source.grown)


def denoised_tokens(layers: Tensor, now: Moment) -> Tensor:
    """Distance of ViT layers to those of the prior's own pictures, [b, 4, g, g, D]."""
    return perceptual_loss(layers.unbind(1), now.source.painted.view("layers").unbind(1))


def silhouette(mask: Tensor, now: Moment) -> Tensor:
    """Distance to the foreground of the prior's own pictures."""
    return silhouette_loss(mask, now.source.painted.view("mask"), now.source.grown)


def fusion(latents: Tensor, now: Moment) -> Tensor:
    """StyleGAN-Fusion's score distillation."""
    cfg, scores = now.guides.cfg, now.guides.cfg.scores
    inputs = (now.guides.condition_of(now.source.outputs), now.t, now.noise[0], cfg.guidance)
    baseline = delta(now, "clamped latents")
    return fusion_sds_loss(
        now.guides.prior, latents, *inputs, baseline, scores.unit, scores.divisor
    )


def score_direction(latents: Tensor, now: Moment) -> Tensor:
    """StyleGAN-Fusion's directional regulariser, which has a noise of its own."""
    cfg, scores = now.guides.cfg, now.guides.cfg.scores
    inputs = (now.guides.condition_of(now.source.outputs), now.t, now.noise[1], cfg.guidance)
    latents_src = now.source.view("clamped latents")
    return score_direction_loss(
        now.guides.prior, latents, latents_src, *inputs, scores.unit_direction, scores.divisor
    )


def score_reconstruction(latents: Tensor, now: Moment) -> Tensor:
    """StyleGAN-Fusion's reconstruction regulariser, with the same noise as the other."""
    cfg = now.guides.cfg
    inputs = (now.guides.condition_of(now.source.outputs), now.t, now.noise[1], cfg.guidance)
    latents_src = now.source.view("clamped latents")
    return score_reconstruction_loss(
        now.guides.prior, latents, latents_src, *inputs, cfg.scores.divisor
    )


def perceptual(layers: Tensor, now: Moment) -> Tensor:
    """Distance of ViT layers, [b, 4, g, g, D]."""
    return perceptual_loss(layers.unbind(1), now.source.view("layers").unbind(1))


def distance(planes: Tensor, now: Moment) -> Tensor:
    """Relative distances to all samples of the batch."""
    everyone = now.everyone
    assert everyone is not None, "the step gathers the batch where a term needs it"
    planes_src = now.source.outputs["planes"]
    return relative_distance_loss(
        planes, planes_src, everyone.planes, everyone.planes_src, everyone.first
    )


def keep(images: Tensor, now: Moment) -> Tensor:
    """Distance to the source outside the region of an edit."""
    guides, latents_src = now.guides, now.source.view("latents")
    mask = edit_mask(guides.prior, latents_src, guides.edit, now.noise[0], EDIT_LEVELS)
    return keep_loss(images, now.source.outputs["image"], mask)


def clip_direction(embeds: Tensor, now: Moment) -> Tensor:
    """Angle between the change of CLIP's embeddings and the way to the target."""
    return clip_direction_loss(embeds, now.source.view("clip"), now.guides.direction)


def target(tokens: Tensor, now: Moment) -> Tensor:
    """Distance between CLIP's tokens and those of the reference pictures."""
    return target_loss(tokens, now.guides.reference_tokens)


def structure(tokens: Tensor, now: Moment) -> Tensor:
    """Change of the similarities between CLIP's tokens."""
    return structure_loss(tokens, now.source.view("clip tokens"))


def feature_structure(features: Tensor, now: Moment) -> Tensor:
    """Change of the similarities between the generator's features, [b, C, n, n]."""
    features_src = now.source.view("features")
    return structure_loss(features.movedim(1, -1), features_src.movedim(1, -1))


def variation(planes: Tensor, now: Moment) -> Tensor:
    """Total variation of the planes that one head has of its own."""
    return variation_loss(planes)


def opacity(mask: Tensor, now: Moment) -> Tensor:
    """Fog, which is neither there nor not."""
    return opacity_loss(mask)


# Every term by its name in the log and in --weights (config.Weights says what they are).
TERMS = {
    "dsds": Term("latents", dsds, frozenset({"prior"})),
    "hsc": Term("tokens", hsc, frozenset({"vit"})),
    "denoised": Term("pixels", denoised, frozenset({"prior"})),
    "denoised_tokens": Term("layers", denoised_tokens, frozenset({"prior", "vit"})),
    "silhouette": Term("mask", silhouette, frozenset({"prior"})),
    "fusion": Term("clamped latents", fusion, frozenset({"prior"})),
    "fusion_clipped": Term("clipped latents", fusion, frozenset({"prior"})),
    "score_direction": Term("clamped latents", score_direction, frozenset({"prior"})),
    "score_reconstruction": Term("clamped latents", score_reconstruction, frozenset({"prior"})),
    "perceptual": Term("layers", perceptual, frozenset({"vit"})),
    "distance": Term("planes", distance, frozenset({"batch"})),
    "keep": Term("image", keep, frozenset({"prior"})),
    "clip_direction": Term("clip", clip_direction),
    "target": Term("clip tokens", target),
    "structure": Term("clip tokens", structure),
    "feature_structure": Term("features", feature_structure),
    "variation": Term("own planes", variation),
    "opacity": Term("mask", opacity),
}


def pull_back(
    outputs: Outputs, weights: Mapping[str, float], now: Moment, batch: int
) -> tuple[Outputs, Row]:
    """Sum the terms' weighted gradients at the generator's outputs, once back for each view.

    A view's graph is freed before the next is built, and none reaches into the generator.

    Args:
        outputs: What the adapted generator makes of b samples.
        weights: Weights of the terms to compute, by name.
        now: What the samples are compared with.
        batch: B, the samples of the whole step, over which the objective is a mean.

    Returns:
        The gradient at each output that a term looks at, and for the log each term's `<name>` and
        the norm of its gradient at its view `<name>_grad`: sums over the b samples, weights and
        1 / B included. Score distillation's value is half its squared gradient: a carrier.
    """
    totals: Outputs = {}
    row: Row = {}
    for name in dict.fromkeys(TERMS[term].view for term in weights):
        view = VIEWS[name]
        leaf = outputs[view.output].detach().requires_grad_()
        seen = view.look(now.guides, leaf)
        at = seen.detach().requires_grad_()
        total = torch.zeros_like(at)
        for term, weight in weights.items():
            if TERMS[term].view == name:
                # The only factor between a loss and its gradient.
                scale = weight / batch / (now.guides.cells if view.summed else 1)
                losses = TERMS[term].loss(at, now)  # [b]
                (gradient,) = torch.autograd.grad(losses.sum(), at)
                total += scale * gradient
                row[term] = scale * losses.sum().item()
                row[f"{term}_grad"] = scale * gradient.flatten(1).norm(dim=1).sum().item()
        (gradient,) = torch.autograd.grad(seen, leaf, total)
        totals[view.output] = totals.get(view.output, 0) + gradient
    return totals, row


def needed(cfg: Config) -> frozenset[str]:
    """Return what the terms with a weight need, all together."""
    needs: set[str] = {"mask"} if cfg.mask else set()
    needs |= {"c"} if cfg.view_words else set()
    for name in cfg.weights.on():
        needs |= TERMS[name].needs | {VIEWS[TERMS[name].view].output}
    if "prior" in needs and cfg.depth_scale or cfg.targets.adapted_depth:
        needs |= {"image_depth", "mask"}
    return frozenset(needs)


def load_guides(
    cfg: Config, G_src: Generator, reference: Tensor | None, device: torch.device
) -> Guides:
    """Load the networks that the terms with a weight need, and CLIP for the log.

    Raises:
        ValueError: a network cannot be loaded, does not fit, or a term needs what is not there.
    """
    check_generator(cfg, G_src)
    return Guides.load(cfg, needed(cfg), G_src, reference, device)


def check_generator(cfg: Config, G: Generator) -> None:
    """Refuse terms that need what a generator does not give, and a batch that cannot be shared out.

    Raises:
        ValueError: naming the terms, or the setting of the generator.
    """
    turns = G.cameras.yaw_range > 0  # Networks that want a class are refused here.
    if cfg.view_words and not turns:
        raise ValueError(f"--view-words needs cameras, and {cfg.generator} has none")
    drawn = G.rendering_kwargs.get("superresolution_noise_mode") == "random"
    if drawn and (ranks.count() > 1 or cfg.micro_batch):
        raise ValueError(
            f"{cfg.generator} has superresolution_noise_mode random, which neither --micro-batch "
            "nor several processes can share out"
        )
    known = {"image", "image_depth", "mask", "features", "planes", "own_planes"}
    if missing := needed(cfg) & known - G.gives:
        raise ValueError(
            f"{cfg.generator} gives no {', '.join(sorted(missing))}, which --weights "
            f"{', '.join(cfg.weights.on())} with --depth-scale {cfg.depth_scale:g}, --mask "
            f"{cfg.mask} and --targets.adapted-depth {cfg.targets.adapted_depth} need"
        )
