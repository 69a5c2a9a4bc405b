"""What a step works on: heads, times and noise by its seed, and what the source makes of the heads.

With --select-layers also which layers learn in it.

A run may use heads several times (--targets.reuse): what the source and the frozen networks make of
them is then made once, the prior's own pictures above all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from config import SCORE_DISTILLATION, Config
from guides import Guides
from harness import ranks
from models.generator import Draw, Generator, Outputs
from terms import Moment, Seen, needed, pull_back


class Pool:
    """The source's samples, kept for the steps that use them again.

    They are no part of a checkpoint: all follow from the numbers of the draws and from `shaper`.

    Attributes:
        shaper: The adapted generator as it was when this pool began, from whose depth the prior
            paints; None in the first pool, and without --targets.adapted-depth.
    """

    def __init__(self, cfg: Config, G_src: Generator, guides: Guides) -> None:
        """Take what samples are made with."""
        self.cfg, self.G_src, self.guides = cfg, G_src, guides
        self.wanted = needed(cfg) | {"adapted_depth", "adapted_mask", "noises"}
        self.shaper: Generator | None = None
        self._kept: dict[tuple[int, int], Seen] = {}  # By draw and place in the batch.

    def source(self, draw: int, first: int, ws: Tensor, c: Tensor, rays: Draw) -> Seen:
        """Return what the source makes of samples: those from `first` on of a draw."""
        oldest = (draw - 1) // self.cfg.targets.pool * self.cfg.targets.pool + 1
        self._kept = {key: seen for key, seen in self._kept.items() if key[0] >= oldest}
        if seen := self._kept.get((draw, first)):
            return seen
        with torch.no_grad():
            outputs = {"c": c} | draw_samples(self.G_src, ws, c, rays)
            if self.shaper is not None:
                adapted = self.shaper.synthesis(ws, c, rays=rays)
                outputs["adapted_depth"] = adapted["image_depth"]
                outputs["adapted_mask"] = adapted["mask"]
            if "prior" in self.wanted and self.cfg.targets.draws:
                outputs["noises"] = draw_edits(self.cfg, self.guides, draw).to(c.device)
        seen = Seen(self.guides, {name: x for name, x in outputs.items() if name in self.wanted})
        if self.cfg.targets.reuse > 1:
            self._kept[draw, first] = seen
        return seen


def reshapes(cfg: Config, step: int) -> bool:
    """Whether a step begins a pool that is painted from what heads have become: not the first."""
    length = cfg.targets.pool * cfg.targets.reuse
    return cfg.targets.adapted_depth and step > 1 and (step - 1) % length == 0


def draw_samples(
    G: Generator, ws: Tensor, c: Tensor, rays: Draw, force_fp32: bool = False
) -> Outputs:
    """Render samples, and return all that is made of them on the way."""
    if "planes" not in G.gives:
        return G.synthesis(ws, c, rays=rays, force_fp32=force_fp32)
    planes = G.planes(ws, force_fp32=force_fp32)
    own = {"own_planes": G.own_planes.expand_as(planes)} if "own_planes" in G.gives else {}
    return (
        own
        | {"planes": planes}
        | G.synthesis(ws, c, planes=planes, rays=rays, force_fp32=force_fp32)
    )


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


def draw_edits(cfg: Config, guides: Guides, draw: int) -> Tensor:
    """Draw the noises that a batch's edits average over, [steps, K, 1, 4, h, w].

    Others for each batch: what one noise happens to mean is no part of the domain.
    """
    generator = torch.Generator().manual_seed(step_seed(cfg.seed, draw, stream=3))
    shape = cfg.targets.steps, cfg.targets.draws, 1, *guides.prior.latent_shape
    return torch.randn(shape, generator=generator)


def draw_number(cfg: Config, step: int) -> int:
    """Return which heads a step uses: `pool` draws in turn, `reuse` times each, then new ones."""
    pool, reuse = cfg.targets.pool, cfg.targets.reuse
    rounds, place = divmod(step - 1, pool)
    return rounds // reuse * pool + place + 1


def select_layers(
    cfg: Config,
    G: Generator,
    pool: Pool,
    step: int,
    t: Tensor,
    learning: Mapping[str, nn.Parameter],
) -> dict[str, nn.Parameter]:
    """Return the parameters of the layers whose codes score distillation moves most.

    Layer selection of StyleGAN-Fusion (arXiv:2212.04473): a head of its own, at the diffusion time
    of the step's first, makes a gradient at ws; a layer's score is the mean size of its code's. As
    many layers as --select-layers learn, of those that have parameters in `learning`.

    Args:
        t: Diffusion times of the step, [B].
        learning: Parameters that may learn, by name.
    """
    guides, device = pool.guides, t.device
    torch.manual_seed(step_seed(cfg.seed, step, stream=2))
    z, c = torch.randn(1, G.z_dim).to(device), G.cameras.sample(1).to(device)
    noise = torch.randn(2, 1, *guides.prior.latent_shape).to(device)
    ws = G.mapping(z, G.cameras.frontal().to(device), cfg.trunc).detach().requires_grad_()
    rays = G.rays(c)
    source = {"c": c}
    if cfg.delta or cfg.depth_scale or cfg.mask:  # Else nothing looks at it.
        source |= draw_samples(pool.G_src, ws.detach(), c, rays)
    adapted = G.synthesis(ws, c, rays=rays, noise_mode="random", force_fp32=True)
    sds = {name: w for name, w in cfg.weights.on().items() if name in SCORE_DISTILLATION}
    gradients, _ = pull_back(
        adapted, sds, Moment(guides, Seen(guides, source), t[:1], noise), batch=1
    )
    (moves,) = torch.autograd.grad([adapted[n] for n in gradients], ws, list(gradients.values()))
    scores = moves.abs().mean((0, 2))  # [num_ws]
    ranks.add_up([scores], {})  # So that all processes choose alike.

    choices = layer_choices(cfg, G, learning)
    order = [i for i in scores.argsort(descending=True).tolist() if choices[i]]
    chosen: dict[str, nn.Parameter] = {}
    for i in order[: cfg.select_layers]:
        chosen |= choices[i]
    return chosen


def layer_choices(
    cfg: Config, G: Generator, learning: Mapping[str, nn.Parameter]
) -> list[dict[str, nn.Parameter]]:
    """Return for each of ws the parameters that learn if it is selected.

    Raises:
        ValueError: there are none for any.
    """
    layers = G.layers
    if cfg.scores.layer_before:  # As its code has it: conv1, torgb, then each layer a place late.
        layers = [layers[0], layers[1][:1], *(names[-1:] for names in layers[1:-1])]
    choices = []
    for names in layers:
        parts = tuple(f"{name}." for name in names)
        choices.append({n: p for n, p in learning.items() if n.startswith(parts)})
    if not any(choices):
        raise ValueError("--select-layers: no layer that codes feed may learn by --learns")
    return choices


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """Return the seed of a step's random draws; its streams are independent."""
    return (2 * (seed * 1_000_003 + step) + stream % 2 + (stream // 2 << 62)) % 2**63
