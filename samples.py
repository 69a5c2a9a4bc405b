"""What a step works on: heads, times and noise by its seed, and what the source makes of the heads.

A run may use heads several times (--targets.reuse): what the source and the frozen networks make of
them is then made once, the prior's own pictures above all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import Config
from models.generator import Generator, Outputs
from models.renderer import Rays
from terms import Guides, Seen, needed


class Pool:
    """The source's samples, kept for the steps that use them again.

    It is no part of a checkpoint: all that is in it follows from the numbers of the draws.
    """

    def __init__(self, cfg: Config, G_src: Generator, guides: Guides) -> None:
        """Take what samples are made with."""
        self.cfg, self.G_src, self.guides = cfg, G_src, guides
        self.wanted = needed(cfg)
        self._kept: dict[tuple[int, int], Seen] = {}  # By draw and place in the batch.

    def source(self, draw: int, first: int, ws: Tensor, c: Tensor, rays: Rays) -> Seen:
        """Return what the source makes of samples: those from `first` on of a draw."""
        oldest = (draw - 1) // self.cfg.targets.pool * self.cfg.targets.pool + 1
        self._kept = {key: seen for key, seen in self._kept.items() if key[0] >= oldest}
        if seen := self._kept.get((draw, first)):
            return seen
        with torch.no_grad():
            outputs = draw_samples(self.G_src, ws, c, rays)
        seen = Seen(self.guides, {name: x for name, x in outputs.items() if name in self.wanted})
        if self.cfg.targets.reuse > 1:
            self._kept[draw, first] = seen
        return seen


def draw_samples(
    G: Generator, ws: Tensor, c: Tensor, rays: Rays, force_fp32: bool = False
) -> Outputs:
    """Render samples, and return all that is made of them on the way."""
    planes = G.planes(ws, force_fp32=force_fp32)
    return {"planes": planes} | G.synthesis(ws, c, planes=planes, rays=rays, force_fp32=force_fp32)


def draw_heads(cfg: Config, G: Generator) -> tuple[Tensor, Tensor]:
    """Draw latent codes [B, z_dim] and cameras [B, 25]."""
    return torch.randn(cfg.batch, G.z_dim), G.cameras.sample(cfg.batch)


def draw_times(cfg: Config, guides: Guides, step: int) -> Tensor:
    """Draw diffusion times [B], uniform over what `t_range` allows at this step.

    Stratified: each from another B-th of the range, which makes gradients less noisy. Empty where
    no term needs the prior.
    """
    if "prior" not in needed(cfg):
        return torch.empty(cfg.batch, 0)
    low, high = cfg.t_range
    high += ((cfg.t_end or high) - high) * step / cfg.steps
    last = len(guides.prior.alphas_cumprod) - 1
    lowest, steps = int(low * last), int(high * last) + 1 - int(low * last)
    strata = (torch.randperm(cfg.batch) + torch.rand(cfg.batch)) / cfg.batch  # In [0, 1).
    return lowest + (strata * steps).long().clamp_max(steps - 1)


def draw_noise(cfg: Config, guides: Guides) -> Tensor:
    """Draw noise for the latents of a batch twice, [2, B, 4, h, w]; empty as in `draw_times`."""
    if "prior" not in needed(cfg):
        return torch.empty(2, cfg.batch, 0)
    return torch.randn(2, cfg.batch, *guides.prior.latent_shape)


def draw_number(cfg: Config, step: int) -> int:
    """Return which heads a step uses: `pool` draws in turn, `reuse` times each, then new ones."""
    pool, reuse = cfg.targets.pool, cfg.targets.reuse
    rounds, place = divmod(step - 1, pool)
    return rounds // reuse * pool + place + 1


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """Return the seed of a step's random draws; its streams are independent."""
    return (2 * (seed * 1_000_003 + step) + stream) % 2**63
