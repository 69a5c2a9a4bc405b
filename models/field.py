"""What is where in space: feature planes, their lookup, and the decoder that reads them.

Planes span the cube of side `box_warp` about the origin.
B batch, N points, C feature channels, P plane size, D slices of a tri-grid's plane.
"""

import math
from functools import reduce
from itertools import product
from operator import mul
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.layers import FullyConnected

Activation = Literal["sigmoid", "lrelu", "none"]  # Of the decoder's colours: EG3D's, PanoHead's.


class Decoder(nn.Module):
    """Plane features to raw density and colour channels (EG3D's OSGDecoder).

    Its products are all of rendering that torch.autocast does in half precision.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        lr_mul: float,
        activation: Activation = "sigmoid",
    ) -> None:
        """Create the two layers; `lr_mul` scales their learning rate.

        Raises:
            ValueError: the colours' activation is none of the three.
        """
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(
                f"decoder_activation must be {', '.join(get_args(Activation))}, got {activation!r}"
            )
        self.activation = activation
        self.net = nn.Sequential(
            FullyConnected(in_channels, hidden, lr_multiplier=lr_mul),
            nn.Softplus(),
            FullyConnected(hidden, 1 + out_channels, lr_multiplier=lr_mul),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features [B, C, N] to raw densities [B, N] and colours [B, C', N], both float32.

        Colours are in (0, 1) where the activation is a sigmoid; else they have no bounds.
        """
        first, _, second = self.net
        # softplus(x) = ln 2 * softplus2(x / ln 2); the small weights take the factors.
        weight, bias = _scaled(first, 1 / math.log(2))
        hidden = softplus2_(_channel_linear(features, weight, bias))  # [B, hidden, N]
        weight, bias = _scaled(second)
        y = _channel_linear(hidden, weight * math.log(2), bias).float()  # [B, 1 + C', N]
        sigma, colour = y.split([1, y.shape[1] - 1], dim=1)
        if self.activation == "sigmoid":
            colour = colour.sigmoid()
        elif self.activation == "lrelu":
            colour = F.leaky_relu(colour, 0.2) * math.sqrt(2)
        return sigma.squeeze(1), colour


def _scaled(layer: FullyConnected, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a layer's weight and bias at run time, so many times as large."""
    return layer.weight * (layer.weight_gain * gain), layer.bias * (layer.bias_gain * gain)


def _channel_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer to the channels of [B, C, N]: no transposed copies of the samples."""
    return torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), x)


def softplus2_(x: Tensor) -> Tensor:
    """Return log2(1 + 2^x), on a CPU in place of x: softplus in powers of two."""
    if x.device.type == "cpu":
        return _Softplus2OnCPU.apply(x)
    return F.softplus(x, beta=math.log(2))


class _Softplus2OnCPU(torch.autograd.Function):
    """`softplus2_` in vectorised steps, which keeps only its result for the gradient.

    Torch's softplus goes through log1p: for 2M values it took 7.1 ms instead of 4.7 with AVX2, 7.4
    instead of 4.0 with AVX-512, and it keeps x as well. The absolute error is as torch's, a
    rounding of max(1, y); so is the gradient's, one of 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Overwrite x; half precision is computed in float32."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.numel() and x.amax() > 126:  # 2^x overflows at 128; from 54 on, y = x in any type.
            y = y.clamp(max=126).exp2_().add_(1).log2_().maximum(y)
        else:
            y.exp2_().add_(1).log2_()
        x.copy_(y)  # Itself, or, if y is another, its values.
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Multiply by the slope 1 - 2^-y, which is the sigmoid of x ln 2."""
        (y,) = ctx.saved_tensors
        return torch.addcmul(gradient, gradient, (-y).exp2_(), value=-1)


def widen(colour: Tensor, total: Tensor | float = 1.0) -> Tensor:
    """Stretch colours from (0, 1) to EG3D's (-0.001, 1.001); of weighted sums, `total` weighs."""
    return colour * (1 + 2 * 0.001) - 0.001 * total


def fold_planes(planes: Tensor, plane_axes: Tensor, box_warp: float) -> tuple[Tensor, Tensor]:
    """Prepare tri-planes for lookups: the fewest maps whose samples sum to the planes' mean.

    A bilinear lookup is linear in its map, so planes read at the same coordinates are added
    beforehand. EG3D's own axes read one plane at (x, z) and another at (z, x): these become one
    map, and every point needs two lookups instead of three.

    A tri-grid (PanoHead, arXiv:2303.13071) has D slices of each plane along its third axis, between
    which lookups are linear too; beyond the outermost, features fade to zero.

    Args:
        planes: Tri-planes, [B, 3, C, P, P], or tri-grids, [B, 3, C, D, P, P].
        plane_axes: Rows are the axes of each plane, [3, 3, 3].
        box_warp: Side of the cube that the planes span.

    Returns:
        Maps [B, Q, C, P, P] or [B, Q, C, D, P, P], channels last, and matrices [Q, 3, 2 or 3] from
        points to coordinates.
    """
    axes = planes.ndim - 3  # Of a map.
    to_plane = torch.linalg.inv(plane_axes.float().cpu())[:, :, :axes] * (2 / box_warp)
    if axes == 3 and planes.shape[3] == 1:  # A single slice fades on both sides, in D = 3 zeros.
        planes = F.pad(planes, (0, 0, 0, 0, 1, 1))
        to_plane = to_plane * torch.tensor([1, 1, 1 / 3])
    swap = [1, 0, 2][:axes]
    maps: list[Tensor] = []
    projections: list[Tensor] = []
    for plane, projection in zip(planes.unbind(1), to_plane, strict=True):
        for i, known in enumerate(projections):
            if torch.equal(projection, known):
                maps[i] = maps[i] + plane
                break
            if torch.equal(projection[:, swap], known):
                maps[i] = maps[i] + plane.mT
                break
        else:
            maps.append(plane)
            projections.append(projection)
    channels_last = torch.stack([m.movedim(1, -1) for m in maps], dim=1)  # [B, Q, ..., P, P, C]
    folded = channels_last.movedim(-1, 2) / planes.shape[1]
    return folded, torch.stack(projections).to(planes.device)


def project(points: Tensor, projections: Tensor) -> Tensor:
    """Return coordinates on maps [B, Q, N, k] of points [B, N, 3], by matrices [Q, 3, k]."""
    with torch.autocast(points.device.type, enabled=False):
        return torch.einsum("bni,qij->bqnj", points.float(), projections)


def look_up(maps: Tensor, coordinates: Tensor) -> Tensor:
    """Sample maps [B, Q, C, P, P] at [B, Q, H, W, 2] in [-1, 1]; sum over Q to [B, C, H, W].

    Maps [B, Q, C, D, P, P] are sampled at [B, Q, H, W, 3]. Outside of [-1, 1] maps are zero. P and
    D are at least 2.
    """
    if maps.device.type == "cpu" and not coordinates.requires_grad:
        return _LookUpOnCPU.apply(maps, coordinates)
    flat = coordinates.flatten(0, 1)  # [B * Q, H, W, k]
    flat = flat.unsqueeze(1) if flat.shape[-1] == 3 else flat
    samples = F.grid_sample(maps.flatten(0, 1), flat, padding_mode="zeros", align_corners=False)
    samples = samples.unflatten(0, maps.shape[:2]).sum(1)
    return samples.squeeze(2) if maps.ndim == 6 else samples


class _LookUpOnCPU(torch.autograd.Function):
    """`look_up` as weighted sums of texels, 4 or 8 Q for each point, all channels of one at once.

    Torch's grid_sample goes from channel to channel: on Zen 3, 131k points on two maps of 32
    channels took 36 ms, and take 10. Their gradient took 107 ms by `index_put_` for each corner,
    and takes 45 as weighted sums again: of the points around each texel, which sorting finds.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, coordinates: Tensor) -> Tensor:
        """Sample, and keep what the gradient needs; C is the innermost axis of the result."""
        ctx.save_for_backward(coordinates)
        ctx.maps_shape = maps.shape
        texels, weights = _texels_around(coordinates, *maps.shape[3:])
        table = maps.movedim(2, -1).flatten(0, -2)  # [B * Q * ... * P * P, C]
        sums = F.embedding_bag(texels, table, mode="sum", per_sample_weights=weights.to(maps))
        size = (len(maps), *coordinates.shape[2:4], maps.shape[2])
        return sums.view(size).movedim(-1, 1)  # [B, C, H, W]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Add up the gradients [B, C, H, W] of the points around each texel, weighted."""
        batch, count, channels, *sizes = ctx.maps_shape
        (coordinates,) = ctx.saved_tensors
        texels, weights = _texels_around(coordinates, *sizes)
        if weights.sum().isnan():
            weights = weights.masked_fill(weights.isnan(), 0)  # As torch has it.
        places = texels.flatten()
        order = places.argsort().int()
        uses = places.bincount(minlength=batch * count * math.prod(sizes))
        sums = F.embedding_bag(
            order.div(texels.shape[1], rounding_mode="floor"),  # The point of each use.
            gradient.movedim(1, -1).flatten(0, 2).contiguous(),  # [B * H * W, C]
            (uses.cumsum(0) - uses).int(),
            mode="sum",
            per_sample_weights=weights.flatten().index_select(0, order).to(gradient),
        )  # [B * Q * ... * P * P, C]
        return sums.view(batch, count, *sizes, channels).movedim(-1, 2), None


def _texels_around(coordinates: Tensor, *sizes: int) -> tuple[Tensor, Tensor]:
    """Return the texels around points [B, Q, H, W, k] and their weights, [B * H * W, Q * 2^k] each.

    Texels are rows of [B * Q * ... * height * width], whose `sizes` are given in this order. At an
    edge they are the two outermost of an axis: those too far away weigh nothing, which spares all
    comparisons. NaN has weights NaN.
    """
    batch, count, *points, axes = coordinates.shape
    first = math.prod(sizes) * torch.arange(batch * count, dtype=torch.int32)
    low = first.view(batch, count, 1, 1)
    stride, strides, weights = 1, [], []  # Of each axis, x first.
    for position, size in zip(coordinates.unbind(-1), reversed(sizes), strict=True):
        texel = position * (size / 2) + (size - 1) / 2
        lower = texel.floor().clamp_(0, size - 2)
        share = texel - lower
        weights.append([(1 - distance.abs()).clamp_(min=0) for distance in (share, share - 1)])
        low = low + stride * lower.int().clamp_(0, size - 2)  # Again for NaN.
        strides.append(stride)
        stride *= size

    corners = 2**axes
    around = torch.empty(batch, *points, count, corners, dtype=torch.int32)
    shares = torch.empty(batch, *points, count, corners, dtype=coordinates.dtype)
    for k, corner in enumerate(product(range(2), repeat=axes)):  # The last axis first.
        steps = corner[::-1]
        around[..., k] = (low + sum(map(mul, steps, strides))).movedim(1, -1)
        share = reduce(mul, (pair[step] for pair, step in zip(weights, steps, strict=True)))
        shares[..., k] = share.movedim(1, -1)
    return around.view(-1, count * corners), shares.view(-1, count * corners)


def evaluate_points(
    planes: Tensor, decoder: Decoder, points: Tensor, plane_axes: Tensor, box_warp: float
) -> tuple[Tensor, Tensor]:
    """Return raw densities [B, N, 1] and colours [B, N, C'] at points.

    Colours are in (-0.001, 1.001) where the decoder's are bounded.

    Args:
        planes: Tri-planes, [B, 3, C, P, P], or tri-grids, [B, 3, C, D, P, P].
        decoder: Plane features to density and colours.
        points: World coordinates, [B, N, 3]; outside of the box all features are zero.
        plane_axes: Rows are the axes of each plane, [3, 3, 3].
        box_warp: Side of the cube that the planes span.
    """
    maps, projections = fold_planes(planes.float(), plane_axes, box_warp)
    coordinates = project(points, projections)  # [B, Q, N, 2]
    features = look_up(maps, coordinates.unsqueeze(3))  # [B, C, N, 1]
    sigma, colour = decoder(features.squeeze(3))  # [B, N], [B, C', N]
    colour = widen(colour) if decoder.activation == "sigmoid" else colour
    return sigma.unsqueeze(-1), colour.mT
