"""Volume rendering of tri-planes and tri-grids: rays, importance sampling, ray marching.

Depths are distances along unit rays. Planes span the cube of side `box_warp` about the origin.
B batch, M rays of one batch element, S samples of a ray, C feature channels, P plane size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cameras import split_label
from models.field import Decoder, fold_planes, look_up, project, widen
from models.limits import is_number

# Samples evaluated at once [points]. On a CPU a chunk's activations should stay in the cache, but
# a chunk's backward pass makes a gradient of the planes' size. A GPU wants few launches.
CHUNK_POINTS = 2**14
CHUNK_POINTS_BACKWARD = 2**16
CHUNK_POINTS_GPU = 2**20
EMPTY = -1000.0  # Raw density of what is cut off.
MAX_DEPTHS = 4096  # A guard against files; EG3D's have 48 to 96.
# Settings that others than rays use: numbers, or yes and no.
OTHER_NUMBERS = (
    "c_gen_conditioning_zero",
    "c_scale",
    "decoder_lr_mul",
    "foreground_depth",
    "sr_antialias",
)


@dataclass(frozen=True)
class RayOptions:
    """The part of EG3D's rendering_kwargs that says how rays are sampled."""

    ray_start: float | Literal["auto"]
    ray_end: float | Literal["auto"]
    depth_resolution: int
    depth_resolution_importance: int
    disparity_space_sampling: bool
    box_warp: float
    white_back: bool = False

    @classmethod
    def from_kwargs(cls, kwargs: dict) -> "RayOptions":
        """Check EG3D's rendering_kwargs and keep what rays need.

        Raises:
            ValueError: a key is missing or its value is out of range; names both.
        """
        names = [name for name in cls.__dataclass_fields__ if name != "white_back"]
        missing = [name for name in [*names, "clamp_mode"] if name not in kwargs]
        if missing:
            raise ValueError(f"rendering_kwargs lacks {', '.join(missing)}")
        options = cls(
            **{name: kwargs[name] for name in names}, white_back=kwargs.get("white_back", False)
        )
        options.check()
        if kwargs["clamp_mode"] != "softplus":
            raise ValueError(f"clamp_mode must be 'softplus', got {kwargs['clamp_mode']!r}")
        if kwargs.get("density_noise", 0) != 0:
            raise ValueError(f"density_noise must be 0, got {kwargs['density_noise']}")
        noise = kwargs.get("superresolution_noise_mode", "none")
        if noise not in ("none", "const", "random"):
            raise ValueError(
                f"superresolution_noise_mode must be none, const or random, got {noise!r}"
            )
        for name in OTHER_NUMBERS:
            value = kwargs.get(name, 0)
            if not is_number(value) or name == "foreground_depth" and isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {value!r}")
        return options

    def with_samples(self, times: int) -> "RayOptions":
        """Return these options with so many times as many samples on a ray."""
        return replace(
            self,
            depth_resolution=self.depth_resolution * times,
            depth_resolution_importance=self.depth_resolution_importance * times,
        )

    def check(self) -> None:
        """Raise ValueError for values that no render can honour."""
        start, end = self.ray_start, self.ray_end
        numbers = is_number(start) and is_number(end)
        if not (start == end == "auto" or numbers and 0 <= start < end):
            raise ValueError(
                "ray_start and ray_end must be 0 <= ray_start < ray_end or both 'auto', "
                f"got {start!r} and {end!r}"
            )
        if not (is_number(self.disparity_space_sampling) and is_number(self.white_back)):
            raise ValueError("disparity_space_sampling and white_back must be True or False")
        if self.disparity_space_sampling and not (numbers and start > 0):
            raise ValueError(f"disparity_space_sampling needs ray_start > 0, got {start!r}")
        if not (is_number(self.box_warp) and self.box_warp > 0):
            raise ValueError(f"box_warp must be positive, got {self.box_warp!r}")
        coarse, fine = self.depth_resolution, self.depth_resolution_importance
        fewest = 4 if fine else 2
        whole = isinstance(coarse, int) and isinstance(fine, int)
        if not (whole and fewest <= coarse <= MAX_DEPTHS and 0 <= fine <= MAX_DEPTHS):
            raise ValueError(
                f"depth_resolution must be {fewest} to {MAX_DEPTHS} and "
                f"depth_resolution_importance 0 to {MAX_DEPTHS}, got {coarse!r}, {fine!r}"
            )


def pixel_rays(c: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Return origins and unit directions, [B, n * n, 3] each, through the pixels' centres.

    Args:
        c: Camera labels, [B, 25].
        resolution: Image size n; rays are row-major, ray i * n + j is row i, column j.
    """
    cam2world, K = split_label(c)
    fx, skew, cx = K[:, 0, 0, None], K[:, 0, 1, None], K[:, 0, 2, None]  # [B, 1]
    fy, cy = K[:, 1, 1, None], K[:, 1, 2, None]
    centres = (torch.arange(resolution, device=c.device, dtype=c.dtype) + 0.5) / resolution
    v, u = (grid.flatten()[None] for grid in torch.meshgrid(centres, centres, indexing="ij"))

    x = (u - cx + cy * skew / fy - skew * v / fy) / fx  # [B, M]
    y = ((v - cy) / fy).expand_as(x)
    in_camera = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [B, M, 3]
    with torch.autocast(c.device.type, enabled=False):
        directions = in_camera @ cam2world[:, :3, :3].mT
    origins = cam2world[:, None, :3, 3].expand_as(directions)
    return origins, F.normalize(directions, dim=-1)


def box_depths(origins: Tensor, directions: Tensor, side: float) -> tuple[Tensor, Tensor]:
    """Return where rays [B, M, 3] enter and leave the cube of that side, [B, M, 1] each.

    A ray that misses takes the least entry of the whole batch, and its greatest *entry* as the
    end: EG3D's rule, kept for parity. If all miss, they get -1 and -2. A camera inside the cube
    starts behind itself.
    """
    inverse = 1 / directions.detach()
    near = (-side / 2 - origins.detach()) * inverse
    far = (side / 2 - origins.detach()) * inverse
    start = torch.minimum(near, far).amax(dim=-1, keepdim=True)  # [B, M, 1]
    end = torch.maximum(near, far).amin(dim=-1, keepdim=True)
    hit = end > start
    if not hit.any():
        return torch.full_like(start, -1), torch.full_like(end, -2)
    entries = start[hit]
    return torch.where(hit, start, entries.min()), torch.where(hit, end, entries.max())


def coarse_depths(origins: Tensor, directions: Tensor, options: RayOptions) -> Tensor:
    """Draw one depth in each of S strata of each ray, [B, M, S].

    Calls `torch.rand_like` on [B, M, S, 1]. The jitter only moves forward, so the last depth may
    lie beyond `ray_end`.
    """
    count = options.depth_resolution
    steps = torch.linspace(0, 1, count, device=origins.device)[:, None]  # [S, 1]
    steps = steps.repeat(*origins.shape[:2], 1, 1)  # [B, M, S, 1]
    t = (steps + torch.rand_like(steps) / (count - 1)).squeeze(-1)  # [B, M, S]

    start, end = options.ray_start, options.ray_end
    if options.disparity_space_sampling:
        return 1 / (1 / start * (1 - t) + 1 / end * t)
    if start == "auto":
        start, end = box_depths(origins, directions, options.box_warp)
    return start + t * (end - start)


def importance_depths(depths: Tensor, weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw depths where a coarse march found weight, by inverting its cumulative distribution.

    EG3D's pairing is kept: weights belong to bins half an interval too near, and the last bin is
    never drawn.

    Args:
        depths: Coarse depths, ascending, [..., S].
        weights: Weight of each interval between them, [..., S - 1].
        uniform: Random numbers in [0, 1), [..., S2].

    Returns:
        Depths [..., S2], not sorted.
    """
    bins = (depths[..., :-1] + depths[..., 1:]) / 2  # [..., S - 1]
    padded = F.pad(weights, (1, 1))
    peaks = torch.maximum(padded[..., :-1], padded[..., 1:])  # [..., S]
    smooth = (peaks[..., :-1] + peaks[..., 1:]) / 2 + 0.01  # [..., S - 1]

    pdf = smooth[..., 1:-1] + 1e-5  # [..., S - 3]
    cdf = F.pad((pdf / pdf.sum(-1, keepdim=True)).cumsum(-1), (1, 0))  # [..., S - 2]
    index = torch.searchsorted(cdf, uniform.contiguous(), right=True)
    low = (index - 1).clamp(min=0)
    high = index.clamp(max=pdf.shape[-1])
    cdf_low, cdf_high = cdf.gather(-1, low), cdf.gather(-1, high)
    span = cdf_high - cdf_low
    span = torch.where(span < 1e-5, 1.0, span)
    bins_low, bins_high = bins.gather(-1, low), bins.gather(-1, high)
    return bins_low + (uniform - cdf_low) / span * (bins_high - bins_low)


def march_weights(depths: Tensor, sigma: Tensor, leak: Tensor | None = None) -> Tensor:
    """Return the weight of each interval between neighbouring samples, [..., S - 1].

    Raw densities are averaged over an interval before the softplus; nothing lies behind the last.

    Args:
        depths: Ascending depths, [..., S].
        sigma: Raw densities, [..., S].
        leak: See `Rays`, [...].
    """
    raw = (sigma[..., :-1] + sigma[..., 1:]) / 2 - 1
    density = F.softplus(raw)
    if leak is not None and raw.requires_grad:
        missing = (leak.unsqueeze(-1) - raw.detach().sigmoid()).clamp_min(0)
        density = density + missing * (raw - raw.detach())  # Adds 0, and its slope.
    optical = density * depths.diff(dim=-1)  # [..., S - 1]
    transmitted = torch.exp(optical - optical.cumsum(-1))  # Exclusive: up to the interval's start.
    return (1 - torch.exp(-optical)) * transmitted


def interval_to_sample_weights(weights: Tensor) -> Tensor:
    """Share each interval's weight [..., S - 1] between the samples at its ends, [..., S].

    Colours and depths of an interval are the mean of its ends, so these weights composite the
    samples themselves.
    """
    return (F.pad(weights, (1, 0)) + F.pad(weights, (0, 1))) / 2


def expected_depth(depths: Tensor, weights: Tensor) -> Tensor:
    """Return the mean depth of each ray, [..., 1]; infinite for an empty one.

    Args:
        depths: Sample depths, [..., S].
        weights: Sample weights (`interval_to_sample_weights`), [..., S].
    """
    acc = weights.sum(-1, keepdim=True)
    empty = acc == 0
    mean = (weights * depths).sum(-1, keepdim=True) / torch.where(empty, 1.0, acc)
    return torch.where(empty, torch.inf, mean)


@dataclass(frozen=True)
class Rays:
    """The rays of a render with all random numbers in it; a part of a batch can be cut out.

    Attributes:
        origins: [B, M, 3].
        directions: Unit length, [B, M, 3].
        depths: Coarse sample depths, ascending, [B, M, S].
        uniform: Random numbers that place the fine samples, [B, M, S2].
        nearest: Least depth among the whole batch's samples.
        farthest: Greatest of them. EG3D gives it to empty rays.
        leak: Least slope of the density's softplus that each ray's gradients see, [B, M]; None is
            the true one. In empty space that vanishes, and nothing can grow there; what is
            rendered stays the same.
    """

    origins: Tensor
    directions: Tensor
    depths: Tensor
    uniform: Tensor
    nearest: Tensor
    farthest: Tensor
    leak: Tensor | None = None

    def cut(self, rows: slice) -> "Rays":
        """Return the rays of a part of the batch, which render as they would among all."""
        parts = (self.origins, self.directions, self.depths, self.uniform)
        leak = None if self.leak is None else self.leak[rows]
        return Rays(*(part[rows] for part in parts), self.nearest, self.farthest, leak)

    def split(self, count: int) -> Iterator["Rays"]:
        """Yield so many rays of every batch element at a time."""
        parts = (self.origins, self.directions, self.depths, self.uniform)
        leak = () if self.leak is None else (self.leak,)
        for chunk in zip(*(part.split(count, 1) for part in (*parts, *leak)), strict=True):
            yield Rays(*chunk[:4], self.nearest, self.farthest, *chunk[4:])


def draw_rays(origins: Tensor, directions: Tensor, options: RayOptions) -> Rays:
    """Draw all random numbers of a render: `rand_like` [B, M, S, 1], then `rand` [B * M, S2].

    Args:
        origins: Ray origins, [B, M, 3].
        directions: Unit ray directions, [B, M, 3].
        options: How rays are sampled.
    """
    origins, directions = origins.float(), directions.float()
    depths = coarse_depths(origins, directions, options)  # [B, M, S]
    uniform = depths.new_empty(*depths.shape[:2], 0)
    if options.depth_resolution_importance:
        size = depths[..., 0].numel(), options.depth_resolution_importance
        uniform = torch.rand(*size, device=depths.device)
        uniform = uniform.unflatten(0, depths.shape[:2])  # [B, M, S2]
    return Rays(origins, directions, depths, uniform, depths.min(), depths.max())


def render(
    planes: Tensor,
    decoder: Decoder,
    rays: Rays,
    plane_axes: Tensor,
    options: RayOptions,
    bound: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Render rays through tri-planes, coarse samples first, then importance samples.

    Args:
        planes: Tri-planes, [B, 3, C, P, P], or tri-grids, [B, 3, C, D, P, P].
        decoder: Plane features to density and colours.
        rays: What `draw_rays` drew, or a part of it.
        plane_axes: Rows are the axes of each plane, [3, 3, 3].
        options: How rays are sampled.
        bound: Space is empty where |x| or |z| is more; not above or below (PanoHead).

    Returns:
        Features [B, C', M], depth [B, 1, M] and opacity acc [B, 1, M] in [0, 1]. Features are in
        (-1, 1) if the decoder's colours are bounded. Empty rays have the greatest depth that the
        batch sampled.
    """
    maps, projections = fold_planes(planes.float(), plane_axes, options.box_warp)
    field = Field(maps, projections, decoder, bound)
    points = CHUNK_POINTS_GPU
    if maps.device.type == "cpu":
        points = CHUNK_POINTS_BACKWARD if maps.requires_grad else CHUNK_POINTS
    count = max(1, points // (len(rays.depths) * rays.depths.shape[-1]))  # Rays at once.
    parts = [_render_chunk(field, chunk) for chunk in rays.split(count)]
    features, depth, acc = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))

    # EG3D bounds depths by the whole batch's samples; the fine ones lie within the coarse.
    depth = depth.clamp(rays.nearest, rays.farthest)
    bounded = decoder.activation == "sigmoid"
    if bounded:
        features = widen(features, acc)
    if options.white_back:
        features = features + (1 - acc)
    return features * 2 - 1 if bounded else features, depth, acc


@dataclass(frozen=True)
class Field:
    """Density and colours in space.

    Attributes:
        maps: See `fold_planes`, like `projections`.
        projections: From points to coordinates on the maps.
        decoder: Features to density and colours.
        bound: See `render`.
    """

    maps: Tensor
    projections: Tensor
    decoder: Decoder
    bound: float

    def along(self, rays: Rays, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw densities [B, M, S] and colours [B, C', S, M] at depths [B, M, S] of rays.

        Neighbouring rays, not neighbouring depths, are next to each other in memory: on a CPU that
        makes the plane lookups and the sums over samples twice as fast.
        """
        # Coordinates on a map are linear along a ray: rays are projected, not points.
        start, slope = (
            project(vectors, self.projections).unsqueeze(2)
            for vectors in (rays.origins, rays.directions)
        )  # [B, Q, 1, M, k]
        at = depths.mT[:, None, :, :, None]  # [B, 1, S, M, 1]
        coordinates = torch.addcmul(start, slope, at)  # [B, Q, S, M, k]
        sigma, colour = self.decoder(look_up(self.maps, coordinates).flatten(2))
        sigma = sigma.unflatten(1, at.shape[2:4]).mT  # [B, M, S]
        if self.bound < math.inf:
            sideways = (
                rays.origins[..., None, ::2] + rays.directions[..., None, ::2] * depths[..., None]
            )
            sigma = sigma.masked_fill((sideways.abs() > self.bound).any(-1), EMPTY)
        return sigma, colour.unflatten(2, at.shape[2:4])


def _render_chunk(field: Field, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    """Return summed colours [B, C', M], depths [B, 1, M] (not bounded) and acc [B, 1, M]."""
    depths, leak, coarse = rays.depths, rays.leak, rays.depths.shape[-1]
    sigma, colour = field.along(rays, depths)
    if rays.uniform.shape[-1] == 0:
        weights = interval_to_sample_weights(march_weights(depths, sigma, leak))  # [B, M, S]
        features = _composite(colour, weights)
    else:
        with torch.no_grad():
            fine = importance_depths(depths, march_weights(depths, sigma), rays.uniform)
        sigma_fine, colour_fine = field.along(rays, fine)
        depths, order = torch.cat([depths, fine], dim=-1).sort(dim=-1)
        sigma = torch.cat([sigma, sigma_fine], dim=-1).gather(-1, order)
        per_interval = march_weights(depths, sigma, leak)  # [B, M, S + S2 - 1]
        weights = interval_to_sample_weights(per_interval)  # [B, M, S + S2]
        # Weights go back to the order of evaluation, so that the wide colours stay in place.
        unsorted = torch.empty_like(weights).scatter(-1, order, weights)
        features = _composite(colour, unsorted[..., :coarse])
        features = features + _composite(colour_fine, unsorted[..., coarse:])
    return features, expected_depth(depths, weights).mT, weights.sum(-1, keepdim=True).mT


def _composite(colour: Tensor, weights: Tensor) -> Tensor:
    """Sum colours [B, C', S, M] over each ray with weights [B, M, S] to [B, C', M]."""
    return (colour * weights.mT.contiguous().unsqueeze(1)).sum(dim=2)
