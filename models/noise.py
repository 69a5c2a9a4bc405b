"""What a frozen diffusion model predicts: noisy latents, guidance, and denoising with it.

latents [B, 4, h, w], scaled; noise alike; t [B], integer steps of the diffusion schedule; text
[2, L, D], unconditional first; depth [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.diffusion import Condition

Span = tuple[float, float]
ALWAYS: Span = (0.0, 1.0)


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
    if guidance == 1:  # Half the work.
        return _predict(prior, latents_t, t, condition, depth, halves=slice(1, 2))
    eps_nothing, eps_condition = noise_pair(prior, latents_t, t, condition, depth)
    return eps_nothing + guidance * (eps_condition - eps_nothing)


@torch.no_grad()
def noise_pair(
    prior: NoisePredictor,
    latents_t: Tensor,
    t: Tensor,
    condition: Condition,
    depth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict noise for both halves of a condition in one batch, [B, 4, h, w] each."""
    return _predict(prior, latents_t, t, condition, depth, slice(2)).chunk(2)


def _predict(
    prior: NoisePredictor,
    latents_t: Tensor,
    t: Tensor,
    condition: Condition,
    depth: Tensor | None,
    halves: slice,
) -> Tensor:
    """Predict noise for halves of a condition in one batch, [n * B, 4, h, w]."""
    b, text, embeds = len(latents_t), condition.text[halves], condition.image_embeds
    n = len(text)
    return prior.predict_noise(
        latents_t.repeat(n, 1, 1, 1),
        t.repeat(n),
        text.flatten(0, 1) if text.ndim == 4 else text.repeat_interleave(b, 0),  # [n * B, L, D]
        None if depth is None else depth.repeat(n, 1, 1, 1),
        None if embeds is None else embeds[halves].repeat_interleave(b, 0),
        condition.image_scale,
        condition.depth_scale,
    )


def add_noise(prior: NoisePredictor, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return sqrt(abar_t) * latents + sqrt(1 - abar_t) * noise."""
    abar = signal(prior, t)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


@torch.no_grad()
def ddim(
    prior: NoisePredictor,
    latents: Tensor,
    condition: Condition,
    times: Sequence[int],
    guidance: float,
    depth: Tensor | None = None,
    guided: Span = ALWAYS,
    held: Span = ALWAYS,
) -> Tensor:
    """Move latents along the schedule, deterministically (DDIM, arXiv:2010.02502, Eq. 12, sigma 0).

    Falling times denoise. Rising times add the noise that leads back to the latents under the same
    condition at guidance 1: DDIM inversion (ibid., section 4.3), the better the more steps.

    Args:
        latents: Latents with the noise of the first time, [B, 4, h, w].
        condition: What to guide towards.
        times: Steps of the schedule, such as 980, 940, ..., 0, -1; -1 is without any noise, and
            can only come last.
        guidance: See `guided_noise`.
        depth: Condition of the prior, [B, 3, H, W]; None goes without.
        guided: Times between which guidance acts, as fractions of the schedule; elsewhere it is 1
            (Guidance in a Limited Interval, arXiv:2404.07724).
        held: Times between which the depth acts, likewise.

    Returns:
        Latents of the last time, [B, 4, h, w].
    """
    for now, then in pairwise(times):
        t = torch.full((len(latents),), now, device=latents.device)
        leads = _leads(prior, now, guidance, depth, guided, held)
        eps_hat = guided_noise(prior, latents, t, condition, *leads)
        abar = signal(prior, t)
        clean = (latents - (1 - abar).sqrt() * eps_hat) / abar.sqrt()
        latents = add_noise(prior, clean, t - now + then, eps_hat) if then >= 0 else clean
    return latents


def signal(prior: NoisePredictor, t: Tensor) -> Tensor:
    """Return abar_t, the signal's share of the variance, as [B, 1, 1, 1]."""
    return prior.alphas_cumprod[t].view(-1, 1, 1, 1)


@torch.no_grad()
def edited_latents(
    prior: NoisePredictor,
    latents_src: Tensor,
    condition: Condition,
    condition_src: Condition,
    level: float,
    guidance: float,
    noise: Tensor,
    depth: Tensor | None = None,
    guided: Span = ALWAYS,
    held: Span = ALWAYS,
) -> Tensor:
    """Return what an edit makes of the source's latents, without inversion, [B, 4, h, w].

    The source's latents and those edited so far get the same noise; the edit moves by the
    difference of what the prior predicts of the two (FlowEdit, arXiv:2412.08629, here in DDIM's
    schedule). What the prior would change in any picture drops out, so more of the person stays
    than with inversion, which is inexact in a few steps.

    Args:
        condition: Of the target domain.
        condition_src: Of the source's own; its predictions have neither guidance nor depth.
        level: Where denoising begins, as a fraction of the schedule: how much may change.
        guidance: Of the target's predictions.
        noise: Each step averages over K draws, the same for all B, [steps, K, 1, 4, h, w].
        depth: Condition of the prior for the target; None goes without.
        guided: See `ddim`.
        held: See `ddim`.
    """
    last = round(level * (len(prior.alphas_cumprod) - 1))
    times = torch.linspace(last, 0, len(noise) + 1).round().int().tolist()
    latents, draws = latents_src, noise.shape[1]
    depth = None if depth is None else depth.repeat(draws, 1, 1, 1)
    condition, condition_src = _repeated(condition, draws), _repeated(condition_src, draws)
    for (now, then), eps in zip(pairwise(times), noise, strict=True):
        t = torch.full((draws * len(latents),), now, device=latents.device)
        eps = eps.expand(-1, len(latents), -1, -1, -1).flatten(0, 1)  # [K * B, 4, h, w]
        noisy, noisy_src = (
            add_noise(prior, x.repeat(draws, 1, 1, 1), t, eps) for x in (latents, latents_src)
        )
        leads = _leads(prior, now, guidance, depth, guided, held)
        change = guided_noise(prior, noisy, t, condition, *leads)
        change = change - guided_noise(prior, noisy_src, t, condition_src, 1.0)
        change = change.unflatten(0, (draws, -1)).mean(0)  # [B, 4, h, w]
        latents = latents + (_sigma(prior, then) - _sigma(prior, now)) * change
    return latents


def _repeated(condition: Condition, times: int) -> Condition:
    """Return a condition for so many copies of a batch."""
    if condition.text.ndim == 3:  # The same for all samples.
        return condition
    return replace(condition, text=condition.text.repeat(1, times, 1, 1))


def _leads(
    prior: NoisePredictor,
    time: int,
    guidance: float,
    depth: Tensor | None,
    guided: Span,
    held: Span,
) -> tuple[float, Tensor | None]:
    """Return the guidance and the depth of one step of the schedule."""
    at = time / (len(prior.alphas_cumprod) - 1)
    return (
        guidance if guided[0] <= at <= guided[1] else 1.0,
        depth if held[0] <= at <= held[1] else None,
    )


def _sigma(prior: NoisePredictor, t: int) -> Tensor:
    """Return the noise's share at a time over the signal's, a scalar."""
    abar = prior.alphas_cumprod[t]
    return ((1 - abar) / abar).sqrt()


@torch.no_grad()
def repaint(
    prior: NoisePredictor,
    latents: Tensor,
    condition: Condition,
    strength: Tensor,
    level: float,
    steps: int,
    guidance: float,
    depth: Tensor | None = None,
) -> Tensor:
    """Paint over latents where they may change, and as far as they may.

    They are inverted step by step (see `ddim`), and denoised under guidance; on the way down a cell
    takes its inverted value until the noise is as low as its strength (Differential Diffusion,
    arXiv:2306.00950). At strength 0 it comes back as it was.

    Args:
        latents: What is painted over, [B, 4, h, w].
        condition: What it shall show.
        strength: Of each cell, as a fraction of `level`, [B, 1, h, w] in [0, 1].
        level: Diffusion time of full strength, as a fraction of the schedule.
        steps: DDIM steps up, and down again.
        guidance: Of the steps down.
        depth: Condition of the prior, [B, 3, H, W]; None goes without.

    Returns:
        [B, 4, h, w].
    """
    last = round(level * (len(prior.alphas_cumprod) - 1))
    times = torch.linspace(0, last, steps + 1).round().int().tolist()
    path = [latents]
    for pair in pairwise(times):
        path.append(ddim(prior, path[-1], condition, pair, 1.0, depth))
    latents_t = path[-1]
    for step in range(steps, 0, -1):
        latents_t = torch.where(strength * steps >= step, latents_t, path[step])
        pair = times[step], times[step - 1]
        latents_t = ddim(prior, latents_t, condition, pair, guidance, depth)
    return torch.where(strength * steps >= 1, latents_t, latents)


@torch.no_grad()
def noise_errors(
    prior: NoisePredictor,
    latents: Tensor,
    condition: Condition,
    times: Tensor,
    noise: Tensor,
) -> Tensor:
    """Return how badly a condition explains latents: errors of the predicted noise, [K, B].

    The less under one condition than under another, the more the picture shows it: a classifier
    that needs no training (arXiv:2303.16203). On puppets it tells short hair where CLIP does not.

    Args:
        latents: Of the pictures, [B, 4, h, w].
        condition: What they may show; guidance is 1.
        times: Integer steps of the schedule, [K].
        noise: For each of them, the same for all pictures, [K, 4, h, w].
    """
    errors = []
    for t, eps in zip(times, noise, strict=True):
        steps, eps = t.expand(len(latents)), eps.expand_as(latents)
        eps_hat = guided_noise(prior, add_noise(prior, latents, steps, eps), steps, condition, 1.0)
        errors.append((eps_hat - eps).square().mean((1, 2, 3)))
    return torch.stack(errors)
