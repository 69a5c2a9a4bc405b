"""Training objectives: pure functions of tensors, one value per image out.

images [B, 3, H, W] in [-1, 1]; latents [B, 4, h, w] scaled; noise like latents; t [B] integer
steps of the diffusion schedule; tokens [B, g, g, D] of a frozen ViT; depth [B, 3, H, W] in [0, 1],
near = 1; mask [B, 1, n, n] in [0, 1], foreground = 1. Frozen networks never receive gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from models.diffusion import Condition


class NoisePredictor(Protocol):
    """What a loss needs of a frozen diffusion model (see models/diffusion.py)."""

    alphas_cumprod: Tensor  # [T]

    def predict_noise(
        self,
        latents_t: Tensor,
        t: Tensor,
        text: Tensor,
        depth: Tensor | None,
        image_embeds: Tensor | None,
        image_scale: float,
        depth_scale: float,
    ) -> Tensor:
        """Return eps_hat [N, 4, h, w], without gradients."""


@torch.no_grad()
def guided_noise(
    prior: NoisePredictor,
    latents_t: Tensor,
    t: Tensor,
    condition: Condition,
    guidance: float,
    depth: Tensor | None = None,
) -> Tensor:
    """Predict noise with classifier-free guidance (arXiv:2207.12598, Eq. 6, in diffusers' form).

    eps_hat = eps(nothing) + guidance * (eps(condition) - eps(nothing)), both from one batch.
    "Nothing" drops text and pictures together; the depth is given to both.

    Args:
        latents_t: Noisy latents, [B, 4, h, w].
        guidance: 1 is the conditional prediction, 0 the unconditional one.

    Returns:
        eps_hat, [B, 4, h, w].
    """
    b = len(latents_t)
    embeds = condition.image_embeds
    eps = prior.predict_noise(
        latents_t.repeat(2, 1, 1, 1),
        t.repeat(2),
        condition.text.repeat_interleave(b, 0),  # [2B, L, D]
        None if depth is None else depth.repeat(2, 1, 1, 1),
        None if embeds is None else embeds.repeat_interleave(b, 0),
        condition.image_scale,
        condition.depth_scale,
    )  # [2B, 4, h, w]
    eps_nothing, eps_condition = eps.chunk(2)
    return eps_nothing + guidance * (eps_condition - eps_nothing)


def sds_loss(
    prior: NoisePredictor,
    latents: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    guidance: float,
    depth: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Score distillation sampling (DreamFusion, arXiv:2209.14988, Eq. 3).

    The U-Net Jacobian is left out on purpose: the value returned is only a carrier, built so that
    its gradient w.r.t. `latents` is w(t) * mask * (eps_hat - noise), w(t) = 1 - abar_t. It is
    summed over the latent, which the VAE's backward needs in order not to underflow.

    Args:
        depth: Condition of the prior; None goes without.
        mask: Where the gradient acts, averaged down to the latent's cells; None is everywhere.

    Raises:
        ValueError: a tensor is of another shape than the module's docstring says, or a time step
            lies outside of the schedule.
    """
    _check_shape("latents", latents, (None, None, None, None))
    b, _, h, w = latents.shape
    _check_shape("condition.text", condition.text, (2, None, None))
    _check_shape("t", t, (b,))
    _check_shape("noise", noise, tuple(latents.shape))
    if t.is_floating_point() or b and not 0 <= t.min() <= t.max() < len(prior.alphas_cumprod):
        raise ValueError(f"t must be steps from 0 to {len(prior.alphas_cumprod) - 1}, got {t}")
    abar = prior.alphas_cumprod[t].view(b, 1, 1, 1)

    with torch.no_grad():
        latents_t = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        if depth is not None:
            _check_shape("depth", depth, (b, 3, None, None))
        eps_hat = guided_noise(prior, latents_t, t, condition, guidance, depth)
        grad = (1 - abar) * (eps_hat - noise)  # [B, 4, h, w]
        if mask is not None:
            _check_shape("mask", mask, (b, 1, None, None))
            grad = F.adaptive_avg_pool2d(mask.to(grad.dtype), (h, w)) * grad

    target = (latents - grad).detach()
    return 0.5 * (latents - target).square().flatten(1).sum(1)


def dsds_loss(
    prior: NoisePredictor,
    latents: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    guidance: float,
    depth: Tensor,
    mask: Tensor,
) -> Tensor:
    """Depth-aware score distillation (GCA-3D, arXiv:2412.15491, L_DSDS).

    SDS whose prior sees the depth of the *source* generator's image of the same latent and camera,
    and whose gradient acts on its foreground. The paper's formula has no VAE; here, as in all
    latent SDS, the gradient passes through its encoder. w(t) is not given there: DreamFusion's.

    Raises:
        ValueError: a tensor is of another shape than the module's docstring says.
    """
    return sds_loss(prior, latents, condition, t, noise, guidance, depth, mask)


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
        mask: Cells count by their share of it; None counts all alike. Cells of an empty background
            cannot be told apart: without a mask the loss asks for a background that can.

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


def coarse_to_fine(progress: float, levels: int = 3) -> tuple[float, ...]:
    """Return the weights of a hierarchy's levels, coarse first, that sum to 1.

    They move linearly from (L, ..., 2, 1) at progress 0, over equal ones, to (1, 2, ..., L) at 1,
    up to their sum, so that every level always counts. The schedule is ours: GCA-3D names none.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    coarse = [(1 - progress) * (levels - level) for level in range(levels)]
    fine = [progress * (level + 1) for level in range(levels)]
    scale = levels * (levels + 1) / 2
    return tuple((a + b) / scale for a, b in zip(coarse, fine, strict=True))


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
