"""The layers of StyleGAN2 (arXiv:1912.04958): fully connected, modulated convolutions, resampling.

Weights are stored unscaled and multiplied by their gain at run time (equalised learning rate).
B batch, C channels, H W pixels, D = w_dim.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NoiseMode = Literal["const", "random", "none"]


class FullyConnected(nn.Module):
    """Linear layer with equalised learning rate, y = act(x W^T lr / sqrt(in) + b lr)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Literal["linear", "lrelu"] = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        """Create the layer; the bias starts at `bias_init`.

        Raises:
            ValueError: `lr_multiplier` is no gain.
        """
        super().__init__()
        if not 0 < lr_multiplier < math.inf:
            raise ValueError(f"lr_multiplier must be positive, got {lr_multiplier!r}")
        self.activation = activation
        self.weight = nn.Parameter(normal(out_features, in_features, std=1 / lr_multiplier))
        self.bias = nn.Parameter(torch.full([out_features], bias_init / lr_multiplier))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        with torch.autocast(x.device.type, enabled=False):  # Small, and styles need precision.
            y = F.linear(x.float(), self.weight * self.weight_gain, self.bias * self.bias_gain)
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.activation == "lrelu" else y


def normal(*shape: int, std: float = 1.0) -> Tensor:
    """Draw normal numbers, none on the meta device."""
    x = torch.empty(shape)
    return x if x.is_meta else x.normal_(0.0, std)  # Which on meta would import sympy.


def unit_rms(x: Tensor) -> Tensor:
    """Scale the rows of [B, N] to a root mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def lay_out(x: Tensor, weight: Tensor) -> Tensor:
    """Return activations [B, C, H, W] in the memory layout that convolutions with `weight` like.

    Channels-last makes strided convolutions on a CPU twice as fast, but the gradients of weights
    six times as slow (oneDNN with AVX2).
    """
    learns = torch.is_grad_enabled() and weight.requires_grad
    contiguous = learns and x.device.type == "cpu"
    return x.contiguous(
        memory_format=torch.contiguous_format if contiguous else torch.channels_last
    )


def fir_filter() -> Tensor:
    """Return the resampling filter of every layer, outer([1, 3, 3, 1]) / 64, [4, 4]."""
    taps = (1, 3, 3, 1)
    return torch.tensor([[a * b / 64 for b in taps] for a in taps])


def upsample2d(x: Tensor, fir: Tensor) -> Tensor:
    """Double the size of images [B, C, H, W] by zero insertion and the 4x4 filter `fir`."""
    kernel = (fir * 4).expand(x.shape[1], 1, 4, 4)
    with torch.autocast(x.device.type, enabled=False):  # The image so far stays in float32.
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, fir: Tensor | None) -> Tensor:
    """Convolve [B, C, H, W] with odd-sized `weight`; `fir` given, double the size on the way."""
    if fir is None:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [B, C', 2H + 1, 2W + 1]
    kernel = (fir * 4).to(y.dtype).expand(y.shape[1], 1, 4, 4)
    y = F.conv2d(y, kernel, padding=1, groups=y.shape[1])  # [B, C', 2H, 2W]
    # Not the convolution's own bias: its gradient takes ten times as long on a CPU.
    return y if bias is None else y.add_(bias[:, None, None].to(y.dtype))


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    styles: Tensor,
    gain: float = 1.0,
    fir: Tensor | None = None,
) -> Tensor:
    """Convolve with `weight`, modulated per sample and demodulated; times `gain`, plus `bias`.

    Scales the weights of every sample, or, where they are larger than the activations, those
    around one shared convolution.

    Args:
        x: Activations, [B, C, H, W].
        weight: Shared weights, [C', C, k, k].
        bias: Added to the result, [C'].
        styles: Scale of each input channel, [B, C].
        gain: Scale of the demodulated convolution.
        fir: Resampling filter [4, 4] to double the size with, or None to keep it.

    Returns:
        Activations [B, C', H, W] or [B, C', 2H, 2W].
    """
    if x.dtype == torch.float16:  # Keep weights and styles near one, as EG3D does.
        weight = weight / (math.sqrt(weight[0].numel()) * weight.abs().amax((1, 2, 3), True))
        styles = styles / styles.abs().amax(1, True)
    energy = styles.square()[:, None] * weight.square().sum((2, 3))  # [B, C', C]
    demodulation = gain * (energy.sum(dim=2) + 1e-8).rsqrt()  # [B, C']

    if len(x) * weight.numel() < x.numel():
        weights = weight * styles[:, None, :, None, None] * demodulation[:, :, None, None, None]
        images = x.split(1) if len(x) > 1 else [x]  # Saves one image a copy, here and below.
        pairs = zip(images, weights.to(x.dtype), strict=True)
        parts = [convolve(image, w, bias.to(x.dtype), fir) for image, w in pairs]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    y = convolve(x * styles[:, :, None, None].to(x.dtype), weight.to(x.dtype), None, fir)
    return y * demodulation[:, :, None, None].to(y.dtype) + bias.to(y.dtype)[:, None, None]


class SynthesisLayer(nn.Module):
    """Modulated convolution, noise, leaky ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: int = 1,
        conv_clamp: float | None = None,
    ) -> None:
        """Create the layer; `resolution` is its output's, `up` 1 or 2."""
        super().__init__()
        self.resolution, self.up, self.conv_clamp = resolution, up, conv_clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(normal(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", fir_filter())
        self.register_buffer("noise_const", normal(resolution, resolution))

    def forward(self, x: Tensor, w: Tensor, noise_mode: NoiseMode) -> Tensor:
        """Map [B, C, H, W] with styles from w [B, D] to [B, C', R, R], R = `resolution`."""
        # A leaky ReLU passes positive factors through: its gain sqrt(2) is applied before it.
        gain = math.sqrt(2)
        fir = self.resample_filter if self.up == 2 else None
        x = modulated_conv2d(x, self.weight, self.bias * gain, self.affine(w), gain, fir)
        if noise_mode == "const":
            x.add_((self.noise_const * self.noise_strength * gain).to(x.dtype))
        elif noise_mode == "random":
            noise = torch.randn(len(x), 1, self.resolution, self.resolution, device=x.device)
            x.add_((noise * self.noise_strength * gain).to(x.dtype))
        elif noise_mode != "none":
            raise ValueError(f"noise_mode must be const, random or none, got {noise_mode!r}")
        x = F.leaky_relu_(x, 0.2)
        if self.conv_clamp is None:
            return x
        return F.hardtanh(x, -self.conv_clamp, self.conv_clamp, inplace=not x.requires_grad)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to image channels, without demodulation."""

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, conv_clamp: float | None = None
    ) -> None:
        """Create the layer; results are clamped to +-conv_clamp unless that is None."""
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(normal(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Map [B, C, H, W] with styles from w [B, D] to float32 images [B, C', H, W]."""
        styles = self.affine(w) / math.sqrt(x.shape[1])  # [B, C]
        weight = (self.weight[:, :, 0, 0] * styles[:, None]).to(x.dtype)  # [B, C', C]
        bias = self.bias.to(x.dtype)
        # In the layout of x: across it, the last layer of a CPU's training took 30 times as long.
        if x.is_contiguous():
            rgb = torch.baddbmm(bias[:, None], weight, x.flatten(2))  # [B, C', HW]
            rgb = rgb.unflatten(2, x.shape[2:])  # [B, C', H, W]
        else:
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, HW, C]
            rgb = torch.baddbmm(bias, pixels, weight.transpose(1, 2))  # [B, HW, C']
            rgb = rgb.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # [B, C', H, W]
        if self.conv_clamp is not None:
            rgb = F.hardtanh_(rgb, -self.conv_clamp, self.conv_clamp)
        return rgb.float()
