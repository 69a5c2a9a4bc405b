"""The methods that train.py knows: their presets, what learns, and the terms they are sums of.

A term compares what the copy makes of a batch with what the source makes of it, by a pure function
of losses.py; b heads at a time, a value for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import (
    clip_direction_loss,
    coarse_to_fine,
    dsds_loss,
    edit_mask,
    fusion_sds_loss,
    hsc_loss,
    keep_loss,
    perceptual_loss,
    relative_distance_loss,
    score_direction_loss,
    score_reconstruction_loss,
    sds_loss,
    source_noise,
    structure_loss,
    target_loss,
)
from models.diffusion import Condition, DiffusionPrior, depth_condition
from models.eg3d import TriPlaneGenerator
from models.features import ClipFeatures, TokenFeatures

if TYPE_CHECKING:
    from train import Config

# The terms that --weights knows; those that no row of the presets names have weight 0.
TERMS = {
    "sds": "score distillation, depth-aware with --depth-scale and --mask",
    "hsc": "hierarchical spatial consistency (lambda)",
    "fusion": "StyleGAN-Fusion's score distillation",
    "score_direction": "its directional regulariser",
    "score_reconstruction": "its reconstruction regulariser",
    "perceptual": "its LPIPS-type distance to the source",
    "distance": "DiffusionGAN3D's relative distance",
    "keep": "its reconstruction outside the region of an edit",
    "clip_direction": "StyleGAN-NADA's CLIP direction",
    "target": "3D-Adapter's target distribution, of --image",
    "structure": "its structure of images",
    "feature_structure": "its structure of features, before super-resolution",
}
DIFFUSION_TERMS = {"sds", "fusion", "score_direction", "score_reconstruction", "keep"}
VIT_TERMS = {"hsc", "perceptual"}
# Biases, constants and noise strengths would let every head drift alike (StyleGAN-Fusion, which
# freezes them).
WEIGHTS_LEARN = (r"(backbone\.synthesis|superresolution)\..*\.weight",)
METHODS = {
    # Depth-aware SDS with hierarchical spatial consistency.
    "gca3d": {
        "weights": {"sds": 1.0, "hsc": 1.0},
        "depth_scale": 1.0,
        "mask": True,
        "learns": WEIGHTS_LEARN,
    },
    # Plain score distillation, what GCA-3D is compared with.
    "sds": {"weights": {"sds": 1.0}, "learns": WEIGHTS_LEARN},
    # StyleGAN-Fusion (arXiv:2212.04473) as its code adapts EG3D's faces, whose weights are of
    # gradients summed over 64 x 64 latent cells: LPIPS * 2000 / 100.
    "stylegan-fusion": {
        "weights": {"fusion": 1.0, "score_direction": 0.5, "perceptual": 20 / 64**2},
        "learns": WEIGHTS_LEARN,
    },
    # DiffusionGAN3D (arXiv:2312.16837); its weights are not public.
    "diffusiongan3d": {
        "weights": {"sds": 1.0, "distance": 1.0},
        "learns": (r"backbone\.synthesis\.(?!.*\.torgb\.).*",),
    },
    # StyleGAN-NADA (arXiv:2108.00946), the baseline of all these papers.
    "nada": {"weights": {"clip_direction": 1.0}, "learns": (r"backbone\.synthesis\..*",)},
    # 3D-Adapter (arXiv:2410.08824); its weights are not public: those of DoRM, by its authors.
    "3d-adapter": {
        "weights": {
            "clip_direction": 0.5,
            "target": 1.0,
            "structure": 10.0,
            "feature_structure": 10.0,
        },
        "learns": (r"decoder\..*", r"superresolution\..*\.(weight|bias)"),
    },
}
# What --edit changes of a method; others have no local edits.
EDITS = {"diffusiongan3d": {"weights": {"keep": 20.0}, "learns": (r"backbone\.synthesis\..*",)}}

HSC_GRIDS = (4, 8, None)  # Cells per side of each level; None: the ViT's own.
CLIP_LAYER = 3 / 12  # Whose tokens 3D-Adapter compares: the third of ViT-B's twelve.
FEATURE_CELLS = 16  # Per side, to which features are averaged before their pairs are compared.
# Diffusion times that show where an edit belongs. Of hair that is to be green they find 65 % at 0.1
# and at 0.3, half at 0.7.
EDIT_LEVELS = (0.1, 0.3)
REFERENCE_HEADS = 64  # Of the source, whose mean a picture's CLIP direction starts from.


# What a generator makes of a batch: `planes` and all that `synthesis` returns.
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """What a term may look at besides the adapted outputs; `b` heads of a step's B."""

    source: Outputs  # The frozen generator's.
    t: Tensor  # Diffusion times, [b]; empty without a prior, like the noise.
    noise: Tensor  # [b, 4, h, w].
    noise_again: Tensor  # Another draw, likewise.
    progress: float  # Of the run, in (0, 1].
    first: int  # Where in the step's batch these heads begin.
    all_planes: Callable[[], tuple[Tensor, Tensor]]
    """Planes of all B heads, the copy's and the source's, without gradients."""


# (outputs, batch) -> losses [b], each of one head.
Term = Callable[[Outputs, Batch], Tensor]


def objective(
    cfg: Config,
    G_src: TriPlaneGenerator,
    prior: DiffusionPrior | None,
    vit: TokenFeatures | None,
    clip: ClipFeatures,
    reference: Tensor | None,
) -> dict[str, Term]:
    """Return the terms of all methods, under the names they are logged by."""
    condition = None
    if prior:
        condition = prior.condition(cfg.prompt or "", reference, cfg.image_scale, cfg.depth_scale)
    return (
        gca3d_terms(cfg, prior, condition, vit)
        | fusion_terms(cfg, prior, condition, vit)
        | diffusiongan3d_terms(cfg, prior)
        | clip_terms(cfg, G_src, clip, reference)
    )


def gca3d_terms(
    cfg: Config,
    prior: DiffusionPrior | None,
    condition: Condition | None,
    vit: TokenFeatures | None,
) -> dict[str, Term]:
    """Return L = L_DSDS + lambda L_HSC."""
    # Without depth, mask or both, L_DSDS is plain SDS with what is left of them.
    distillation = dsds_loss if cfg.depth_scale and cfg.mask else sds_loss
    if prior:
        condition_src = prior.condition(cfg.source_prompt, depth_scale=cfg.depth_scale)

    def sds(adapted: Outputs, batch: Batch) -> Tensor:
        latents, t, noise = encode(prior, adapted["image"]), batch.t, batch.noise
        depth, mask = batch.source["image_depth"], batch.source["mask"]  # [b, 1, n, n]
        depth = depth_condition(depth, mask, prior.image_size) if cfg.depth_scale else None
        baseline = noise
        if cfg.delta:
            latents_src = encode(prior, batch.source["image"])
            inputs = (condition_src, t, noise, cfg.guidance, depth)
            baseline = noise.lerp(source_noise(prior, latents_src, *inputs), cfg.delta)
        inputs = (condition, t, noise, cfg.guidance, depth, mask if cfg.mask else None, baseline)
        return distillation(prior, latents, *inputs) / cells(prior)

    def hsc(adapted: Outputs, batch: Batch) -> Tensor:
        tokens, tokens_src = vit.tokens(adapted["image"]), vit.tokens(batch.source["image"])
        level_weights = coarse_to_fine(batch.progress, *cfg.hsc_levels)
        mask = batch.source["mask"] if cfg.mask else None
        return hsc_loss(tokens, tokens_src, HSC_GRIDS, level_weights, cfg.hsc_temperature, mask)

    return {"sds": sds, "hsc": hsc}


def fusion_terms(
    cfg: Config,
    prior: DiffusionPrior | None,
    condition: Condition | None,
    vit: TokenFeatures | None,
) -> dict[str, Term]:
    """Return StyleGAN-Fusion's SDS, its two regularisers and its perceptual term."""
    quarters = [round(vit.depth * part / 4) for part in range(1, 5)] if vit else []

    def images(adapted: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        return tuple(out["image"].clamp(-1, 1) for out in (adapted, batch.source))

    def fusion(adapted: Outputs, batch: Batch) -> Tensor:
        latents = encode(prior, adapted["image"].clamp(-1, 1))
        losses = fusion_sds_loss(prior, latents, condition, batch.t, batch.noise, cfg.guidance)
        return losses / cells(prior)

    def regulariser(loss: Callable[..., Tensor], adapted: Outputs, batch: Batch) -> Tensor:
        latents = (encode(prior, x) for x in images(adapted, batch))  # Adapted, source.
        losses = loss(prior, *latents, condition, batch.t, batch.noise_again, cfg.guidance)
        return losses / cells(prior)

    def perceptual(adapted: Outputs, batch: Batch) -> Tensor:
        return perceptual_loss(*(vit.layers(x, quarters) for x in images(adapted, batch)))

    direction, reconstruction = (
        partial(regulariser, loss) for loss in (score_direction_loss, score_reconstruction_loss)
    )
    return {
        "fusion": fusion,
        "score_direction": direction,
        "score_reconstruction": reconstruction,
        "perceptual": perceptual,
    }


def diffusiongan3d_terms(cfg: Config, prior: DiffusionPrior | None) -> dict[str, Term]:
    """Return DiffusionGAN3D's relative distance and, for local edits, its reconstruction."""
    if "keep" in cfg.weights:  # What the prompt says beside what is there.
        edit = Condition(prior.encode_text([cfg.source_prompt, cfg.prompt]))

    def distance(adapted: Outputs, batch: Batch) -> Tensor:
        planes, planes_src = adapted["planes"], batch.source["planes"]  # [b, 3, C, P, P]
        return relative_distance_loss(planes, planes_src, *batch.all_planes(), batch.first)

    def keep(adapted: Outputs, batch: Batch) -> Tensor:
        latents_src = encode(prior, batch.source["image"])
        mask = edit_mask(prior, latents_src, edit, batch.noise, EDIT_LEVELS)  # [b, 1, h, w]
        return keep_loss(adapted["image"], batch.source["image"], mask)

    return {"distance": distance, "keep": keep}


def clip_terms(
    cfg: Config, G_src: TriPlaneGenerator, clip: ClipFeatures, reference: Tensor | None
) -> dict[str, Term]:
    """Return StyleGAN-NADA's CLIP direction and 3D-Adapter's other terms."""
    if "clip_direction" in cfg.weights:
        way = clip_direction(cfg, G_src, clip, reference)  # [1, D]
    layer = max(1, round(CLIP_LAYER * clip.depth))
    if "target" in cfg.weights:
        reference_tokens = clip.tokens(reference, layer)  # [1, g, g, D]

    def direction(adapted: Outputs, batch: Batch) -> Tensor:
        embeds, embeds_src = clip.images(adapted["image"]), clip.images(batch.source["image"])
        return clip_direction_loss(embeds, embeds_src, way)

    def target(adapted: Outputs, batch: Batch) -> Tensor:
        return target_loss(clip.tokens(adapted["image"], layer), reference_tokens)

    def structure(adapted: Outputs, batch: Batch) -> Tensor:
        outputs = (adapted, batch.source)
        return structure_loss(*(clip.tokens(out["image"], layer) for out in outputs))

    def feature_structure(adapted: Outputs, batch: Batch) -> Tensor:
        outputs = (adapted, batch.source)
        pooled = [F.adaptive_avg_pool2d(out["features"], FEATURE_CELLS) for out in outputs]
        return structure_loss(*(features.movedim(1, -1) for features in pooled))

    return {
        "clip_direction": direction,
        "target": target,
        "structure": structure,
        "feature_structure": feature_structure,
    }


def encode(prior: DiffusionPrior, images: Tensor) -> Tensor:
    """Return the latents of images of any size, [B, 4, h, w]."""
    return prior.encode_images(resize(images, prior.image_size))


def cells(prior: DiffusionPrior) -> int:
    """Return h * w of the latents, by which weights are divided to mean the same at every size."""
    return (prior.image_size // prior.vae_scale_factor) ** 2


@torch.no_grad()
def clip_direction(
    cfg: Config, G_src: TriPlaneGenerator, clip: ClipFeatures, reference: Tensor | None
) -> Tensor:
    """Return the direction from the source domain to the target in CLIP's space, [1, D].

    Of words, from the source's prompt to the target's; of a picture, from the mean of source heads;
    of both, half-way between the two.
    """
    directions = []
    if cfg.prompt:
        directions.append(clip.text([cfg.prompt]) - clip.text([cfg.source_prompt]))
    if reference is not None:
        directions.append(clip.images(reference) - mean_embedding(cfg, G_src, clip))
    return F.normalize(sum(F.normalize(d, dim=1) for d in directions), dim=1)


def mean_embedding(cfg: Config, G_src: TriPlaneGenerator, clip: ClipFeatures) -> Tensor:
    """Return the mean of CLIP's embeddings of the source's heads, [1, D]."""
    device, embeds = clip.model.device, []
    torch.manual_seed(0)  # Steps have seeds of their own.
    z, c = torch.randn(REFERENCE_HEADS, G_src.z_dim), G_src.cameras.sample(REFERENCE_HEADS)
    frontal = G_src.cameras.frontal().to(device)
    for one, camera in zip(z.to(device).split(1), c.to(device).split(1), strict=True):
        ws = G_src.mapping(one, frontal, cfg.trunc)
        embeds.append(clip.images(G_src.synthesis(ws, camera)["image"]))
    return torch.cat(embeds).mean(0, keepdim=True)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to a square of this size, unless they have it."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
