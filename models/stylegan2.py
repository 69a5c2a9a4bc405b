"""StyleGAN2 (arXiv:1912.04958): mapping network, synthesis blocks, generator of pictures.

Names, shapes and order of all parameters and buffers are those of the official checkpoints.
B batch, C channels, H W pixels, D = w_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.cameras import NoCameras
from models.layers import (
    FullyConnected,
    NoiseMode,
    SynthesisLayer,
    ToRGB,
    fir_filter,
    lay_out,
    normal,
    unit_rms,
    upsample2d,
)
from models.limits import MAX_SIZE, is_number

FP16_CLAMP = 256.0  # EG3D clamps the activations of blocks that may run in half precision.
SIZES = {"z_dim": 1, "c_dim": 0, "w_dim": 1, "img_resolution": 4, "img_channels": 1}  # At least.
MAX_MAPPING_LAYERS = 64  # A guard against files; StyleGAN2 has 8, EG3D 2.
ANY = object()  # An argument that changes nothing here.
# Arguments of official files that have one value here.
WIDTHS = ("embed_features", "layer_features")  # Of the mapping network: w_dim.
FIXED_MAPPING: dict[str, Any] = {"activation": "lrelu"}
FIXED_SYNTHESIS: dict[str, Any] = {
    "architecture": "skip",
    "resample_filter": [1, 3, 3, 1],
    "use_noise": True,
    "activation": "lrelu",
    "fused_modconv_default": ANY,
    "fp16_channels_last": ANY,
}


class MappingNetwork(nn.Module):
    """z and the label c, of a camera or a class, to the style codes ws."""

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float = 0.998,
        last_activation: Literal["lrelu", "linear"] = "lrelu",
    ) -> None:
        """Create the layers; w_avg follows new codes with a decay of `w_avg_beta`.

        With a `c_dim` of 0 there are no labels. The last layer can be
        linear.

        Raises:
            ValueError: there are too many or too few layers.
        """
        super().__init__()
        if not 1 <= num_layers <= MAX_MAPPING_LAYERS:
            raise ValueError(f"num_layers must be 1 to {MAX_MAPPING_LAYERS}, got {num_layers}")
        self.num_ws, self.num_layers, self.w_avg_beta = num_ws, num_layers, w_avg_beta
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.embed = FullyConnected(c_dim, w_dim) if c_dim else None
        for i in range(num_layers):
            in_features = w_dim if i else z_dim + (w_dim if c_dim else 0)
            activation = last_activation if i == num_layers - 1 else "lrelu"
            setattr(self, f"fc{i}", FullyConnected(in_features, w_dim, activation, lr_multiplier))

    def forward(
        self,
        z: Tensor,
        c: Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """Map z [B, z_dim] and c [B, c_dim] to ws [B, num_ws, D].

        Args:
            z: Latent codes; only their direction matters, they are scaled to unit RMS.
            c: Labels that condition the identity; without effect where there are none.
            truncation_psi: 1 keeps ws, 0 gives the average code w_avg.
            truncation_cutoff: Truncate only the first so many codes; None truncates all.
            update_emas: Move w_avg towards this batch's mean.
        """
        x = unit_rms(z.float())
        if self.embed is not None:
            x = torch.cat([x, unit_rms(self.embed(c.float()))], dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)  # [B, D]
        if update_emas:
            self.w_avg.copy_(x.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))

        ws = x.unsqueeze(1).repeat(1, self.num_ws, 1)  # [B, num_ws, D]
        if truncation_psi != 1:
            truncated = self.w_avg.lerp(ws[:, :truncation_cutoff], truncation_psi)
            ws = torch.cat([truncated, ws[:, truncated.shape[1] :]], dim=1)
        return ws


class SynthesisBlock(nn.Module):
    """One resolution: two layers and a contribution to the image (StyleGAN2's skip design)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        up: int = 2,
        use_fp16: bool = False,
        conv_clamp: float | None = None,
    ) -> None:
        """Create the layers; without `in_channels` the block starts from a constant."""
        super().__init__()
        self.up, self.use_fp16 = up, use_fp16
        if in_channels == 0:  # The first block starts from a learned constant.
            self.const = nn.Parameter(normal(out_channels, resolution, resolution))
        self.register_buffer("resample_filter", fir_filter())
        if in_channels:
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, w_dim, resolution, up, conv_clamp
            )
        self.conv1 = SynthesisLayer(
            out_channels, out_channels, w_dim, resolution, conv_clamp=conv_clamp
        )
        self.torgb = ToRGB(out_channels, img_channels, w_dim, conv_clamp)

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        ws: list[Tensor],
        noise_mode: NoiseMode,
        force_fp32: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the block's activations [B, C, R, R] and the image so far [B, C', R, R].

        Args:
            x: Activations of the block before, or None for the first block.
            img: The image so far, or None.
            ws: One code [B, D] for each layer: conv0 (unless first), conv1, torgb.
            noise_mode: Per-pixel noise: stored, drawn afresh, or none.
            force_fp32: Stay in float32 where the block would run in half precision on a GPU.
        """
        *ws_conv0, w_conv1, w_rgb = ws
        if x is None:
            x = lay_out(self.const.expand(len(w_conv1), -1, -1, -1), self.conv1.weight)
        if self.use_fp16 and x.is_cuda and not force_fp32:
            x = x.half()
        if ws_conv0:
            x = self.conv0(x, ws_conv0[0], noise_mode)
        x = self.conv1(x, w_conv1, noise_mode)

        rgb = self.torgb(x, w_rgb)
        if img is not None:
            rgb = rgb + (upsample2d(img, self.resample_filter) if self.up == 2 else img)
        return x, rgb


class SynthesisNetwork(nn.Module):
    """Style codes to an image of any number of channels: blocks of 4, 8, ... pixels."""

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        conv_clamp: float | None = None,
    ) -> None:
        """Create the blocks; the finest `num_fp16_res` run in half precision on a GPU.

        Raises:
            ValueError: `img_resolution` is not a power of 2.
        """
        super().__init__()
        if conv_clamp is not None and not (is_number(conv_clamp) and conv_clamp > 0):
            raise ValueError(f"conv_clamp must be positive or None, got {conv_clamp!r}")
        if not (isinstance(num_fp16_res, int) and num_fp16_res >= 0):
            raise ValueError(f"num_fp16_res must be a number from 0, got {num_fp16_res!r}")
        log2_resolution = int(math.log2(img_resolution))
        if img_resolution < 4 or 2**log2_resolution != img_resolution:
            raise ValueError(f"resolution must be a power of 2 >= 4, got {img_resolution}")
        self.resolutions = [2**i for i in range(2, log2_resolution + 1)]
        self.num_ws = 2 * len(self.resolutions)

        in_channels = 0
        for i, resolution in enumerate(self.resolutions):
            out_channels = min(channel_base // resolution, channel_max)
            use_fp16 = i >= max(1, len(self.resolutions) - num_fp16_res)
            block = SynthesisBlock(
                in_channels,
                out_channels,
                w_dim,
                resolution,
                img_channels,
                use_fp16=use_fp16,
                conv_clamp=conv_clamp,
            )
            setattr(self, f"b{resolution}", block)
            in_channels = out_channels

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """Names of the layers that each of ws feeds."""
        names: list[tuple[str, ...]] = [()] * self.num_ws
        first = 0
        for resolution in self.resolutions:
            for i, layer in enumerate(("conv0", "conv1", "torgb")[resolution == 4 :], first):
                names[i] += (f"b{resolution}.{layer}",)
            first = i
        return names

    def forward(self, ws: Tensor, noise_mode: NoiseMode, force_fp32: bool = False) -> Tensor:
        """Map ws [B, num_ws, D] to an image [B, img_channels, R, R]."""
        x = img = None
        codes = list(ws.unbind(1))
        first = 0
        for resolution in self.resolutions:
            layers = 2 if x is None else 3  # torgb shares its code with the next block's conv0.
            block = getattr(self, f"b{resolution}")
            x, img = block(x, img, codes[first : first + layers], noise_mode, force_fp32)
            first += layers - 1
        return img


class Generator(nn.Module):
    """StyleGAN2: mapping and synthesis network."""

    synthesis_class = SynthesisNetwork

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: dict,
        synthesis_kwargs: dict,
    ) -> None:
        """Create both networks, each from its dict of keyword arguments."""
        super().__init__()
        network = self.synthesis_class
        self.synthesis = network(w_dim, img_resolution, img_channels, **synthesis_kwargs)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **mapping_kwargs)


class ImageSynthesis(SynthesisNetwork):
    """Style codes to what the scripts ask of a generator: outputs by name."""

    def forward(
        self,
        ws: Tensor,
        c: Tensor | None = None,
        noise_mode: NoiseMode = "const",
        force_fp32: bool = False,
        rays: NoRays | None = None,
        planes: None = None,
    ) -> dict[str, Tensor]:
        """Map ws to pictures.

        Args:
            ws: Style codes, [B, num_ws, D].
            c: Empty labels, [B, 0], or K for each of ws, [B, K, 0]: so many equal pictures.
            noise_mode: Per-pixel noise: stored, drawn afresh, or none.
            force_fp32: No half precision.
            rays: Of generators with cameras; without effect here, like `planes`.
            planes: See `rays`.

        Returns:
            `image` [B, 3, R, R], which may leave [-1, 1], or [B * K, 3, R, R].

        Raises:
            ValueError: `ws` is of another shape.
        """
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"ws must be [B, {self.num_ws}, w_dim], got {list(ws.shape)}")
        image = super().forward(ws, noise_mode, force_fp32)
        copies = c.shape[1] if c is not None and c.ndim == 3 else 1
        return {"image": image.repeat_interleave(copies, dim=0) if copies > 1 else image}


@dataclass(frozen=True)
class NoRays:
    """What is random in pictures without cameras: nothing, in any part of a batch."""

    leak: float = 0.0

    def cut(self, rows: slice) -> NoRays:
        """Return itself."""
        return self


class StyleGAN2Generator(Generator):
    """StyleGAN2 for pictures, with the keys and arguments of its official files.

    `mapping(z, c, truncation_psi, truncation_cutoff)` returns ws, `synthesis(ws, noise_mode=...)`
    the pictures by name, and a call does both.
    """

    synthesis_class = ImageSynthesis
    gives = frozenset({"image"})
    own_planes = None

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: dict[str, Any] | None = None,
        synthesis_kwargs: dict[str, Any] | None = None,
        **flat: Any,
    ) -> None:
        """Create the networks.

        Args:
            z_dim: Width of the latent code.
            c_dim: Number of classes, 0 for none; labels are one-hot.
            w_dim: Width of the style codes.
            img_resolution: Size R, a power of 2.
            img_channels: Channels of the image.
            mapping_kwargs: `num_layers`, `lr_multiplier`, `w_avg_beta` of the mapping network.
            synthesis_kwargs: `channel_base`, `channel_max`, `num_fp16_res` and `conv_clamp` as
                stylegan2-ada-pytorch has them, which computes all in float32 without clamping
                unless told otherwise.
            flat: The same where they stand for themselves, as in the files of stylegan3, whose
                four finest resolutions are in half precision, clamped to +-256, unless told
                otherwise.

        Raises:
            ValueError: an argument has a value that no network here can have.
        """
        arguments = {k: v for k, v in locals().items() if k not in ("self", "flat", "__class__")}
        for name, least in SIZES.items():
            value = arguments[name]
            if not (isinstance(value, int) and least <= value <= MAX_SIZE):
                raise ValueError(f"{name} must be {least} to {MAX_SIZE}, got {value!r}")
        for name in ("mapping_kwargs", "synthesis_kwargs"):
            if not isinstance(arguments[name], dict | None):
                raise ValueError(f"{name} must be a dict, got {arguments[name]!r}")
        if synthesis_kwargs is None:
            synthesis = {"num_fp16_res": 4, "conv_clamp": FP16_CLAMP} | flat
        elif flat:
            raise ValueError(f"{', '.join(flat)} must be in synthesis_kwargs or without it")
        else:
            synthesis = synthesis_kwargs
        super().__init__(
            z_dim,
            c_dim,
            w_dim,
            img_resolution,
            img_channels,
            _without(mapping_kwargs or {}, FIXED_MAPPING | dict.fromkeys(WIDTHS, w_dim)),
            _without(synthesis, FIXED_SYNTHESIS),
        )
        # Data for JSON.
        self.init_kwargs = {k: v for k, v in (arguments | flat).items() if v is not None}
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.neural_rendering_resolution = img_resolution
        self.rendering_kwargs: dict[str, Any] = {}

    @property
    def cameras(self) -> NoCameras:
        """It has none.

        Raises:
            ValueError: the network wants a class in their place.
        """
        if self.c_dim:
            raise ValueError(
                f"the generator wants one of {self.c_dim} classes with every code; only networks "
                "without classes can be used here"
            )
        return NoCameras()

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """Names of the layers that each of ws feeds."""
        return [tuple(f"synthesis.{name}" for name in names) for names in self.synthesis.layers]

    def rays(self, c: Tensor) -> NoRays:
        """Draw all that is random in a picture: nothing."""
        return NoRays()

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "const",
        force_fp32: bool = False,
    ) -> Tensor:
        """Map z [B, z_dim] and labels c [B, c_dim] to images [B, 3, R, R]."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, noise_mode=noise_mode, force_fp32=force_fp32)["image"]


def _without(given: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """Return arguments less those that have but one value here.

    Raises:
        ValueError: one has another value.
    """
    for name, value in fixed.items():
        if value is not ANY and given.get(name) not in (None, value):
            raise ValueError(f"{name} must be {value!r}, got {given[name]!r}")
    return {name: value for name, value in given.items() if name not in fixed}
