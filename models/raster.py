"""Triangles to pixels, in PyTorch alone: which triangle each pixel shows, and where on it.

Slow beside a rasteriser for graphics cards, but it needs no compiler: a head of 20 000 triangles at
256 px takes a tenth of a second on a CPU. Images are [H, W], pixel centres lie at halves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.cameras import split_label

CHUNK = 2**22  # Pairs of a triangle and a pixel that are looked at at once.


class Fragments(NamedTuple):
    """What the pixels show."""

    triangle: Tensor  # Index of the nearest triangle, [H, W]; -1 where there is none.
    weights: Tensor  # Of its corners, [H, W, 3]; they sum to 1.
    depth: Tensor  # Its z, [H, W]; inf where there is none.

    @property
    def covered(self) -> Tensor:
        """Where there is a triangle, [H, W]."""
        return self.triangle >= 0

    def interpolate(self, values: Tensor, triangles: Tensor) -> Tensor:
        """Return values of vertices [V, C] at the pixels, [H, W, C]; 0 where there is nothing."""
        corners = values[triangles[self.triangle.clamp_min(0)]]  # [H, W, 3, C]
        mixed = (self.weights.unsqueeze(-1) * corners).sum(2)
        return mixed * self.covered.unsqueeze(-1)


def project(points: Tensor, c: Tensor, size: int) -> Tensor:
    """Return where a camera sees points: x and y in pixels, z along its axis, [N, 3].

    Args:
        points: In world units, [N, 3].
        c: The camera's label, [25].
        size: Height and width of its picture, pixels.
    """
    cam2world, K = split_label(c.to(points))
    x, y, z = ((points - cam2world[:3, 3]) @ cam2world[:3, :3]).unbind(1)
    z = z.clamp_min(1e-4)  # Nothing is behind a camera that looks at a head from outside.
    u = (K[0, 0] * x + K[0, 1] * y) / z + K[0, 2]
    v = K[1, 1] * y / z + K[1, 2]
    return torch.stack([u * size, v * size, z], dim=1)


@torch.no_grad()
def rasterise(points: Tensor, triangles: Tensor, height: int, width: int) -> Fragments:
    """Find the nearest triangle of every pixel, by a depth buffer.

    Args:
        points: x and y in pixels, z > 0, [V, 3]; see `project`. Weights are right in perspective;
            in a plane, z is 1 for all.
        triangles: Indices of points, [T, 3]; which way they turn does not matter.
        height: Of the image, pixels.
        width: Likewise.
    """
    corners = points[triangles]  # [T, 3, 3]
    size = points.new_tensor([width, height]).long()
    low = (corners[..., :2].amin(1) - 0.5).ceil().long().clamp_min(0)  # [T, 2]
    high = (corners[..., :2].amax(1) - 0.5).floor().long().minimum(size - 1)
    spans = (high - low + 1).clamp_min(0)
    counts = spans.prod(1)  # Pixels in each triangle's box, [T].

    nearest = points.new_full((height * width,), torch.inf)
    chosen = torch.full((height * width,), -1, device=points.device)
    weights = points.new_zeros(height * width, 3)
    for part in _parts(counts):
        first, own = part[0], counts[part]
        which = torch.repeat_interleave(part, own)  # [M], a triangle for each pair.
        place = torch.arange(len(which), device=points.device)
        place -= torch.repeat_interleave(own.cumsum(0) - own, own)
        x = low[which, 0] + place % spans[which, 0]
        y = low[which, 1] + place // spans[which, 0]
        shares, depth = _weigh(corners[part], which - first, x + 0.5, y + 0.5)
        inside = (shares >= 0).all(1) & depth.isfinite()
        which, shares, depth = which[inside], shares[inside], depth[inside]
        pixel = (y * width + x)[inside]

        nearest.scatter_reduce_(0, pixel, depth, "amin")
        front = depth <= nearest[pixel]
        which, shares, pixel = which[front], shares[front], pixel[front]
        # Of several at one depth the last counts, wherever this runs; of earlier parts none does.
        winner = torch.full_like(chosen, -1).scatter_reduce_(0, pixel, which, "amax")
        wins = which == winner[pixel]
        chosen[pixel[wins]], weights[pixel[wins]] = which[wins], shares[wins]
    return Fragments(
        chosen.view(height, width), weights.view(height, width, 3), nearest.view(height, width)
    )


def _parts(counts: Tensor) -> list[Tensor]:
    """Split triangles so that each part has few pairs with pixels."""
    group = (counts.cumsum(0) - 1).clamp_min(0) // CHUNK
    sizes = torch.bincount(group).tolist()
    whole = torch.arange(len(counts), device=counts.device)
    return [part for part in whole.split(sizes) if len(part)]


def _weigh(corners: Tensor, which: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the corners' weights [M, 3] at pixels and the depth [M] there.

    Weights are negative outside of a triangle; a triangle without area has none.
    """
    a, b, c = corners[which].unbind(1)  # [M, 3] each.

    def area(p: Tensor, q: Tensor) -> Tensor:
        return (p[:, 0] - x) * (q[:, 1] - y) - (p[:, 1] - y) * (q[:, 0] - x)

    flat = torch.stack([area(b, c), area(c, a), area(a, b)], dim=1)
    flat = flat / flat.sum(1, keepdim=True)
    by_depth = flat / torch.stack([a[:, 2], b[:, 2], c[:, 2]], dim=1)
    depth = 1 / by_depth.sum(1)
    shares = by_depth * depth.unsqueeze(1)
    return torch.where(flat.isfinite().all(1, keepdim=True), shares, -1), depth
