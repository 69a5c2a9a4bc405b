"""Training objectives: pure functions of tensors, one value per image out.

images [B, 3, H, W] in [-1, 1]; latents [B, 4, h, w] scaled; noise like latents; t [B] integer
steps of the diffusion schedule; tokens [B, g, g, D] of a frozen ViT; depth [B, 3, H, W] in [0, 1],
near = 1; mask [B, 1, n, n] in [0, 1], foreground = 1; planes [B, 3, C, P, P]; embeds [B, D] of
CLIP, unit length. `_src` is the source generator's. Frozen networks never receive gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from models.noise import (
    ALWAYS,
    NoisePredictor,
    Span,
    add_noise,
    ddim,
    guided_noise,
    noise_pair,
    signal,
)

if TYPE_CHECKING:
    from models.diffusion import Condition

CHANGE = (0.1, 1.2)  # A background pixel that changes by more, of 2, begins to be, and is, a head.
EMPHASIS = 4.0  # How much more a pixel counts that a head fills in a painted picture alone.
ROUNDING = 1e-4  # Ratios of squared distances that differ by less are equal.


def dsds_loss(
    prior: NoisePredictor,
    latents: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    guidance: float,
    depth: Tensor | None = None,
    mask: Tensor | None = None,
    baseline: Tensor | None = None,
) -> Tensor:
    """Depth-aware score distillation (GCA-3D, arXiv:2412.15491, L_DSDS).

    Score distillation sampling (DreamFusion, arXiv:2209.14988, Eq. 3) whose prior sees the depth of
    the *source* generator's image of the same latent and camera, and whose gradient acts on its
    foreground; without both it is plain SDS. GCA-3D's formula has no VAE; here, as in all latent
    SDS, the gradient passes through its encoder. GCA-3D gives no w(t): it is DreamFusion's.

    The U-Net Jacobian is left out on purpose: the value returned is only a carrier, built so that
    its gradient w.r.t. `latents` is w(t) * mask * (eps_hat - noise), w(t) = 1 - abar_t. It is
    summed over the latent, which the VAE's backward needs in order not to underflow.

    Args:
        depth: Condition of the prior; None goes without.
        mask: Where the gradient acts, averaged down to the latent's cells; None is everywhere.
        baseline: What eps_hat is compared with, [B, 4, h, w] (see `source_noise`); None is `noise`.

    Raises:
        ValueError: a tensor is of another shape than the module's docstring says, or a time step
            lies outside of the schedule.
    """
    _check_shape("latents", latents, (None, None, None, None))
    b, _, h, w = latents.shape
    text = condition.text
    _check_shape("condition.text", text, (2, b, None, None) if text.ndim == 4 else (2, None, None))
    _check_shape("t", t, (b,))
    _check_shape("noise", noise, tuple(latents.shape))
    if t.is_floating_point() or b and not 0 <= t.min() <= t.max() < len(prior.alphas_cumprod):
        raise ValueError(f"t must be steps from 0 to {len(prior.alphas_cumprod) - 1}, got {t}")

    with torch.no_grad():
        latents_t = add_noise(prior, latents, t, noise)
        if depth is not None:
            _check_shape("depth", depth, (b, 3, None, None))
        eps_hat = guided_noise(prior, latents_t, t, condition, guidance, depth)
        baseline = noise if baseline is None else baseline
        grad = (1 - signal(prior, t)) * (eps_hat - baseline)  # [B, 4, h, w]
        if mask is not None:
            _check_shape("mask", mask, (b, 1, None, None))
            grad = F.adaptive_avg_pool2d(mask.to(grad.dtype), (h, w)) * grad
    return _carrier(latents, grad)


@torch.no_grad()
def source_noise(
    prior: NoisePredictor,
    latents_src: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    guidance: float,
    depth: Tensor | None = None,
) -> Tensor:
    """Predict the noise in the source's latents (delta denoising score, arXiv:2304.07090, Eq. 4).

    A baseline of SDS: what the prior would change in the source image anyway, under the same noise
    and its own prompt, has nothing to do with the target prompt. Subtracting it removes most of
    the noise.

    Args:
        condition: The source's own domain.

    Returns:
        [B, 4, h, w].
    """
    latents_t = add_noise(prior, latents_src, t, noise)
    return guided_noise(prior, latents_t, t, condition, guidance, depth)


def hsc_loss(
    tokens: Tensor,
    tokens_src: Tensor,
    grids: Sequence[int | None] = (4, 8, None),
    weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    temperature: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """Hierarchical spatial consistency (GCA-3D, arXiv:2412.15491, L_HSC).

    At each level the token grids are averaged to g x g cells; then each adapted cell must find the
    source cell at its own place among all cells of its source image (InfoNCE). The paper's text
    is not public beyond "coarse-to-fine, patch-based contrastive": the features, levels and
    temperature follow the same group's UniHDA (arXiv:2401.12596).

    Args:
        tokens: Of the adapted images, [B, g, g, D], any length.
        tokens_src: Of the source images, likewise; no gradient reaches them.
        grids: Cells per side at each level; None is the full grid.
        weights: One per level.
        temperature: Divides the cosines.
        mask: Cells count by their share of it; None counts all alike. Background cells look
            alike, so without a mask the loss pushes the background to become distinguishable.

    Raises:
        ValueError: shapes differ, a level is finer than the tokens or has no weight, or the
            temperature is not positive.
    """
    side = tokens.shape[1]
    _check_shape("tokens", tokens, (None, side, side, None))
    _check_shape("tokens_src", tokens_src, tuple(tokens.shape))
    cells = [side if grid is None else grid for grid in grids]
    if len(weights) != len(cells) or not all(1 <= cell <= side for cell in cells):
        raise ValueError(f"levels {cells} with weights {weights} do not fit {side} x {side} tokens")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")

    if mask is None:
        mask = tokens.new_ones(len(tokens), 1, side, side)
    _check_shape("mask", mask, (len(tokens), 1, None, None))
    total = tokens.new_zeros(len(tokens))  # [B]
    for cell, weight in zip(cells, weights, strict=True):
        adapted, source = _pool(tokens, cell), _pool(tokens_src.detach(), cell)  # [B, cell^2, D]
        logits = adapted @ source.mT / temperature  # [B, cell^2 adapted, cell^2 source]
        own_place = torch.arange(cell * cell, device=tokens.device).expand(len(tokens), -1)
        losses = F.cross_entropy(logits.mT, own_place, reduction="none")  # [B, cell^2]
        share = F.adaptive_avg_pool2d(mask.to(losses.dtype), cell).flatten(1)  # [B, cell^2]
        total = total + weight * (losses * share).sum(1) / share.sum(1).clamp_min(1e-6)
    return total


@torch.no_grad()
def denoised_latents(
    prior: NoisePredictor,
    latents_src: Tensor,
    condition: Condition,
    condition_src: Condition,
    level: float,
    steps: int,
    guidance: float,
    depth: Tensor | None = None,
    noise: Tensor | None = None,
    depth_src: Tensor | None = None,
    guided: Span = ALWAYS,
    held: Span = ALWAYS,
) -> Tensor:
    """Return what the prior makes of the source's latents: a target to regress onto, [B, 4, h, w].

    Score distillation follows one noisy prediction a step; here the prior paints the picture to
    its end. The latents get the noise of a middle time, and are denoised under the target's prompt
    (SDEdit, arXiv:2108.01073). Targets that stay while the generator learns are the data set of
    Instruct-NeRF2NeRF (arXiv:2303.12789); HiFA (arXiv:2305.18766) has clean predictions of several
    steps as targets, and DATID-3D (arXiv:2211.16374) a data set of such pictures for a 3D GAN.

    Args:
        condition: Of the target domain.
        condition_src: Of the source's own, under which its latents are inverted.
        level: Where denoising begins, as a fraction of the schedule: how much may change.
        steps: DDIM steps down, and up if inverted.
        guidance: Of the steps down; inversion has none.
        depth: Condition of the prior; None goes without.
        noise: Of all heads, [1, 4, h, w]: what it happens to mean is the same change for all. None
            inverts the source's latents instead, and what the prior knows of each person stays.
        depth_src: The source's, for the inversion, where `depth` is another; None: `depth`.
        guided: Of the steps down, see `ddim`.
        held: Of the steps down, likewise.
    """
    last = round(level * (len(prior.alphas_cumprod) - 1))
    up = torch.linspace(0, last, steps + 1).round().int().tolist()
    if noise is None:
        end = 0  # Inversion begins there, so the way back ends there.
        depth_src = depth if depth_src is None else depth_src
        latents_t = ddim(prior, latents_src, condition_src, up, 1.0, depth_src)
    else:
        end = -1
        t = torch.full_like(latents_src[:, 0, 0, 0], last).long()
        latents_t = add_noise(prior, latents_src, t, noise)
    times = [*up[:0:-1], end]
    return ddim(prior, latents_t, condition, times, guidance, depth, guided, held)


def denoised_loss(
    images: Tensor, targets: Tensor, cells: int = 4, grown: Tensor | None = None
) -> Tensor:
    """Regress images onto fixed targets: L1 of the pixels, and of averages of cells x cells.

    The averages let colours settle where edges do not meet yet. Its counterpart in a ViT's tokens
    is `perceptual_loss`.

    Args:
        grown: How much more heads fill in the targets than in the source, [B, 1, n, n]; it counts
            there as `growth_weights` says.
    """
    difference = images - targets.detach()
    coarse = F.avg_pool2d(difference, cells)
    if grown is not None:
        weights = growth_weights(F.interpolate(grown, images.shape[2:], mode="bilinear"))
        difference, coarse = difference * weights, coarse * F.avg_pool2d(weights, cells)
    return difference.abs().flatten(1).mean(1) + coarse.abs().flatten(1).mean(1)


def growth_weights(grown: Tensor) -> Tensor:
    """Return what parts of a picture count, 1 where nothing grows.

    What some of the prior's pictures show whole, such as a horn, is not lost among the others, and
    what all show in part, such as blurred outlines, hardly counts more.

    Args:
        grown: How much more heads fill there than in the source, in [0, 1], any shape.
    """
    return 1 + EMPHASIS * grown.square()


def grown_mask(painted: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return the source's foreground, and what a painted picture shows on its background.

    An outline that is a head's in part changes with the head's colour, by that part of 2 at most:
    only what changes by more has grown.

    Args:
        painted: A picture of the same heads in another domain, [B, 3, H, W].
        image: The source's, likewise.
        mask: The source's foreground, [B, 1, n, n].
    """
    change = (painted - image).abs().amax(1, keepdim=True)
    new = ((change - CHANGE[0]) / (CHANGE[1] - CHANGE[0])).clamp(0, 1)
    colour = 2 * F.interpolate(mask, image.shape[2:], mode="bilinear")
    grown = torch.where(change > colour, new, 0)
    return torch.maximum(mask, F.adaptive_avg_pool2d(grown, mask.shape[-1]))


def silhouette_loss(mask: Tensor, target: Tensor, grown: Tensor | None = None) -> Tensor:
    """L1 between a foreground and what it should be, quadratic below 0.1.

    Where both agree but for rounding, as nearly everywhere, L1 alone would pull as hard as ever.

    Args:
        grown: As in `denoised_loss`, of the same size as `mask`.
    """
    loss = F.smooth_l1_loss(mask, target.detach(), reduction="none", beta=0.1)
    return (loss if grown is None else loss * growth_weights(grown)).flatten(1).mean(1)


def fusion_sds_loss(
    prior: NoisePredictor,
    latents: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    guidance: float,
    baseline: Tensor | None = None,
    unit: bool = True,
    divisor: float = 100.0,
) -> Tensor:
    """SDS of clamped size (StyleGAN-Fusion, arXiv:2212.04473, by its code).

    The gradient is (1 - abar_t) * (unit(eps_hat) - unit(noise)) / divisor, clamped to +-1, where
    unit() scales a whole latent to an RMS of 1, so that a large guidance changes only directions.
    So it is for EG3D; for StyleGAN2 unit() is left out and the divisor 1. Theirs is of one image;
    here every image has its own t, RMS and clamp. Their nan -> 0 is left out.

    Args:
        baseline: What is subtracted instead of the noise, see `dsds_loss`.
        unit: Whether predictions are scaled to unit size.
        divisor: Divides the gradient before it is clamped.
    """
    with torch.no_grad():
        eps_hat = guided_noise(prior, add_noise(prior, latents, t, noise), t, condition, guidance)
        baseline = noise if baseline is None else baseline
        difference = _unit(eps_hat) - _unit(baseline) if unit else eps_hat - baseline
        grad = _fusion_gradient(prior, t, difference, divisor)
    return _carrier(latents, grad)


def score_direction_loss(
    prior: NoisePredictor,
    latents: Tensor,
    latents_src: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    guidance: float,
    unit: bool = True,
    divisor: float = 100.0,
) -> Tensor:
    """Directional regulariser (StyleGAN-Fusion, arXiv:2212.04473, its Directional_loss 1).

    The gradient is (1 - abar_t) * (unit(eps_hat(latents_t)) - unit(eps_hat(latents_src_t))) /
    divisor, clamped to +-1, both latents under the same noise: 0 where nothing has been adapted
    yet. Without layer selection StyleGAN2 goes without unit().

    Args:
        noise: Another draw than that of SDS.
        unit: Whether predictions are scaled to unit size.
        divisor: Divides the gradient before it is clamped.
    """
    with torch.no_grad():
        eps_hat, eps_src = (
            guided_noise(prior, add_noise(prior, x, t, noise), t, condition, guidance)
            for x in (latents, latents_src)
        )
        difference = _unit(eps_hat) - _unit(eps_src) if unit else eps_hat - eps_src
        grad = _fusion_gradient(prior, t, difference, divisor)
    return _carrier(latents, grad)


def score_reconstruction_loss(
    prior: NoisePredictor,
    latents: Tensor,
    latents_src: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    guidance: float,
    divisor: float = 100.0,
) -> Tensor:
    """Reconstruction regulariser (StyleGAN-Fusion, arXiv:2212.04473, its Directional_loss 2).

    The gradient is (1 - abar_t) * (unit(eps_hat) - unit(r)) / divisor, clamped to +-1, where r is
    the gradient of |latents_0 - latents_src|^2 at eps_hat, latents_0 the clean latents that eps_hat
    leads back to: r points along latents_src - latents_0. Sizes are unit here for all generators.
    """
    with torch.no_grad():
        abar, latents_t = signal(prior, t), add_noise(prior, latents, t, noise)
        eps_hat = guided_noise(prior, latents_t, t, condition, guidance)
        latents_0 = (latents_t - (1 - abar).sqrt() * eps_hat) / abar.sqrt()
        difference = _unit(eps_hat) - _unit(latents_src - latents_0)
        grad = _fusion_gradient(prior, t, difference, divisor)
    return _carrier(latents, grad)


def clip_to_quantile(gradient: Tensor, quantile: float) -> Tensor:
    """Clip each gradient of a batch to +- a quantile of its own sizes (StyleGAN-Fusion's code).

    Args:
        gradient: [B, ...].
        quantile: In (0, 1]; 1 clips nothing.
    """
    sizes = gradient.abs().flatten(1)  # [B, N]
    # torch.quantile refuses more than 2^24 numbers, and sorts them all.
    place = quantile * (sizes.shape[1] - 1)
    low, high = (sizes.kthvalue(int(k) + 1, dim=1).values for k in (place, math.ceil(place)))
    bound = low.lerp(high, place - int(place)).view(-1, *[1] * (gradient.ndim - 1))
    return gradient.clamp(-bound, bound)


def perceptual_loss(layers: Sequence[Tensor], layers_src: Sequence[Tensor]) -> Tensor:
    """LPIPS-type distance (arXiv:1801.03924, Eq. 1) between tokens of several layers, in [0, 4].

    StyleGAN-Fusion (arXiv:2212.04473) takes LPIPS itself, of VGG, with learned channel weights;
    here tokens of unit length of a frozen ViT, all weights 1, and the mean over layers.

    Args:
        layers: Of the adapted images, [B, g, g, D] each.
        layers_src: Of the source images, likewise; no gradient reaches them.
    """
    distances = [
        (F.normalize(a, dim=-1) - F.normalize(b.detach(), dim=-1)).square().sum(-1).mean((1, 2))
        for a, b in zip(layers, layers_src, strict=True)
    ]
    return torch.stack(distances).mean(0)


def relative_distance_loss(
    planes: Tensor, planes_src: Tensor, others: Tensor, others_src: Tensor, first: int = 0
) -> Tensor:
    """Relative distance (DiffusionGAN3D, arXiv:2312.16837, L_dis): heads stay as far apart.

    The mean over j of | |planes_i - planes_j|^2 / |planes_src_i - planes_src_j|^2 - 1 |. Pairs and
    norms are not public: here all pairs of a batch, and whole planes, since a ratio per pixel is
    unstable where planes agree. The others are held fixed, so that any part of a batch has the
    same gradient: half that of the mean over pairs.

    Args:
        planes: Adapted, [b, 3, C, P, P].
        planes_src: The source's, likewise.
        others: Adapted planes of the whole batch, [B, 3, C, P, P], B at least 2.
        others_src: The source's, likewise.
        first: Where in the batch `planes` begins.
    """
    distances = _square_distances(planes, others.detach())  # [b, B]
    distances_src = _square_distances(planes_src, others_src).detach()
    itself = torch.arange(first, first + len(planes), device=planes.device).unsqueeze(1)  # [b, 1]
    ratios = distances / (distances_src + 1e-8)
    # The sign of a rounding error is no direction: as yet equal planes have no gradient.
    changes = F.hardshrink(ratios - 1, ROUNDING).abs()
    return changes.scatter(1, itself, 0).sum(1) / (len(others) - 1)


@torch.no_grad()
def edit_mask(
    prior: NoisePredictor,
    latents: Tensor,
    condition: Condition,
    noise: Tensor,
    levels: Sequence[float],
    threshold: float = 0.4,
    softness: float = 0.1,
) -> Tensor:
    """Find where a local edit belongs (DiffusionGAN3D, arXiv:2312.16837, for L_diff).

    The paper reads the region off the SDS gradient at different noise levels; formula, levels and
    threshold are not public. Here, as in DiffEdit (arXiv:2210.11427), the size of the difference
    that the prompt makes to the predicted noise, against a prompt for what is there: each level
    over its largest value, their mean smoothed over 3 x 3 cells, and a soft threshold.

    Args:
        latents: Of the source's images.
        condition: The source's prompt in the place of the unconditional half.
        levels: Diffusion times, as fractions of the schedule.
        threshold: Share of the largest response at which the mask is 0.5.
        softness: Width of the threshold.

    Returns:
        [B, 1, h, w] in [0, 1], 1 where the edit belongs.
    """
    total = latents.new_zeros(len(latents), 1, *latents.shape[2:])
    for level in levels:
        t = torch.full_like(noise[:, 0, 0, 0], level * (len(prior.alphas_cumprod) - 1)).long()
        before, after = noise_pair(prior, add_noise(prior, latents, t, noise), t, condition)
        response = (after - before).norm(dim=1, keepdim=True)  # [B, 1, h, w]
        total += response / response.amax((1, 2, 3), keepdim=True).clamp_min(1e-8)
    smooth = F.avg_pool2d(total, 3, 1, 1, count_include_pad=False)
    share = smooth / smooth.amax((1, 2, 3), keepdim=True).clamp_min(1e-8)
    return torch.sigmoid((share - threshold) / softness)


def keep_loss(images: Tensor, images_src: Tensor, mask: Tensor) -> Tensor:
    """Diffusion-guided reconstruction (DiffusionGAN3D, arXiv:2312.16837, L_diff).

    The mean squared difference to the source's images outside the region of an edit.

    Args:
        mask: 1 where the edit belongs, any size.
    """
    mask = F.interpolate(mask, images.shape[2:], mode="bilinear")
    return ((1 - mask) * (images - images_src.detach()).square()).flatten(1).mean(1)


def clip_direction_loss(
    embeds: Tensor, embeds_src: Tensor, direction: Tensor, shortest: float = 0.1
) -> Tensor:
    """CLIP direction (StyleGAN-NADA, arXiv:2108.00946, Eq. 3): 1 - cos(embeds - embeds_src, v).

    Args:
        direction: v, from the source domain to the target, [1, D], unit length.
        shortest: Differences below this length count as that long: at the first step they are 0,
            where the cosine has no gradient.
    """
    change = embeds - embeds_src.detach()
    lengths = change.norm(dim=1).clamp_min(shortest)
    return 1 - (change * direction).sum(1) / lengths


def target_loss(tokens: Tensor, reference: Tensor) -> Tensor:
    """Target distribution (3D-Adapter, arXiv:2410.08824, L_dis) as relaxed earth mover's distance.

    C_ij = 1 - cos of tokens i of the image and j of the reference; the larger of the means of its
    columns' and rows' minima, in [0, 2]. The formula is that of DiFa, on which the paper builds.

    Args:
        tokens: Of the adapted images, [B, g, g, D].
        reference: Of the one reference picture, [1, g, g, D].
    """
    a, b = (F.normalize(x.flatten(1, 2), dim=-1) for x in (tokens, reference))
    costs = 1 - a @ b.mT  # [B, L, L]
    return torch.maximum(costs.amin(2).mean(1), costs.amin(1).mean(1))


def structure_loss(tokens: Tensor, tokens_src: Tensor) -> Tensor:
    """Source structure maintenance (3D-Adapter, arXiv:2410.08824, L_I-str and L_F-str).

    The mean squared difference between the cosines of all pairs of tokens within the adapted image
    and those within the source's. The formula is that of DoRM, by the same authors.
    """
    units = (F.normalize(x.flatten(1, 2), dim=-1) for x in (tokens, tokens_src.detach()))
    cosines, cosines_src = (x @ x.mT for x in units)  # [B, L, L]
    return (cosines - cosines_src).square().mean((1, 2))


def variation_loss(planes: Tensor, scales: int = 4) -> Tensor:
    """Multi-scale total variation (DiffusionGAN3D, arXiv:2312.16837, L_mstv).

    Mean squares of the differences between neighbours, of the planes and of their averages over
    2 x 2, 4 x 4, ... cells. The formula is ours: the paper names the loss alone.

    Args:
        planes: Those of one head, [B, 3, C, P, P], or tri-grids [B, 3, C, D, P, P].
        scales: The planes' own size is the first.
    """
    part = planes.flatten(1, -3)  # [B, channels, P, P]
    total = part.new_zeros(len(part))
    for _ in range(scales):
        for dim in (2, 3):
            total = total + part.diff(dim=dim).square().flatten(1).mean(1)
        if part.shape[-1] < 4:
            break
        part = F.avg_pool2d(part, 2)
    return total


def opacity_loss(mask: Tensor) -> Tensor:
    """How foggy a picture is: the mean of 4 a (1 - a), 0 where all is either there or not."""
    return (4 * mask * (1 - mask)).flatten(1).mean(1)


def coarse_to_fine(
    progress: float, first: Sequence[float] = (3, 2, 1), last: Sequence[float] = (1, 2, 3)
) -> tuple[float, ...]:
    """Return the weights of a hierarchy's levels, coarse first, that sum to 1.

    They move linearly from `first` at progress 0 to `last` at 1, both up to their sums. By default
    every level always counts. The schedule is ours: GCA-3D names none.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    levels = zip(first, last, strict=True)
    return tuple((1 - progress) * a / sum(first) + progress * b / sum(last) for a, b in levels)


def _carrier(latents: Tensor, grad: Tensor) -> Tensor:
    """Return values [B] whose gradient w.r.t. `latents` is `grad`: half its square."""
    target = (latents - grad).detach()
    return 0.5 * (latents - target).square().flatten(1).sum(1)


def _unit(noise: Tensor) -> Tensor:
    """Scale each entry of a batch to an RMS of 1."""
    return noise / noise.square().mean((1, 2, 3), keepdim=True).sqrt()


def _fusion_gradient(
    prior: NoisePredictor, t: Tensor, difference: Tensor, divisor: float
) -> Tensor:
    """Weigh, scale and clamp as StyleGAN-Fusion does."""
    return ((1 - signal(prior, t)) * difference / divisor).clamp(-1, 1)


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances of all pairs of tensors [M, ...] and [N, ...], [M, N].

    By a matrix product, which needs no room for differences; centred, lest it cancels.
    """
    center = b.mean(0)
    a, b = (a - center).flatten(1), (b - center).flatten(1)
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)  # [M, N]
    return (squares - 2 * a @ b.mT).clamp_min(0)


def _pool(tokens: Tensor, cells: int) -> Tensor:
    """Average tokens [B, g, g, D] to cells x cells -> unit vectors [B, cells^2, D]."""
    pooled = F.adaptive_avg_pool2d(tokens.movedim(-1, 1), cells)  # [B, D, cells, cells]
    return F.normalize(pooled.flatten(2).mT, dim=-1)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Refuse a tensor of another shape; None matches any length."""
    if tensor.ndim != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must be [{wanted}], got {list(tensor.shape)}")
