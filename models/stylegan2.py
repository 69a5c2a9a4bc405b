"""StyleGAN2 (arXiv:1912.04958): mapping network, modulated convolutions, synthesis blocks.

Names, shapes and order of all parameters and buffers are those of EG3D's checkpoints. Weights are
stored unscaled and multiplied by their gain at run time (equalised learning rate).
B batch, C channels, H W pixels, D = w_dim.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NoiseMode = Literal["const", "random", "none"]
FP16_CLAMP = 256.0  # EG3D clamps the activations of blocks that may run in half precision.
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
        self.weight = nn.Parameter(_normal(out_features, in_features, std=1 / lr_multiplier))
        self.bias = nn.Parameter(torch.full([out_features], bias_init / lr_multiplier))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        with torch.autocast(x.device.type, enabled=False):  # Small, and styles need precision.
            y = F.linear(x.float(), self.weight * self.weight_gain, self.bias * self.bias_gain)
        return F.leaky_relu(y, 0.2) * math.sqrt(2) if self.activation == "lrelu" else y


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
    ) -> None:
        """Create the layers; w_avg follows new codes with a decay of `w_avg_beta`.

        With a `c_dim` of 0 there are no labels.

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
            setattr(self, f"fc{i}", FullyConnected(in_features, w_dim, "lrelu", lr_multiplier))

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


def _normal(*shape: int, std: float = 1.0) -> Tensor:
    """Draw normal numbers, on the meta device none."""
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
        self.weight = nn.Parameter(_normal(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", fir_filter())
        self.register_buffer("noise_const", _normal(resolution, resolution))

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
        self.weight = nn.Parameter(_normal(out_channels, in_channels, 1, 1))
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
            self.const = nn.Parameter(_normal(out_channels, resolution, resolution))
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
        log2_resolution = int(math.log2(img_resolution))
        if img_resolution < 4 or 2**log2_resolution != img_resolution:
            raise ValueError(f"plane resolution must be a power of 2 >= 4, got {img_resolution}")
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
        self, ws: Tensor, noise_mode: NoiseMode = "const", force_fp32: bool = False
    ) -> dict[str, Tensor]:
        """Map ws [B, num_ws, D] to `image` [B, 3, R, R], which may leave [-1, 1]."""
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"ws must be [B, {self.num_ws}, w_dim], got {list(ws.shape)}")
        return {"image": super().forward(ws, noise_mode, force_fp32)}


class StyleGAN2Generator(Generator):
    """StyleGAN2 for pictures, with the keys and arguments of its official files.

    `mapping(z, c, truncation_psi, truncation_cutoff)` returns ws, `synthesis(ws, noise_mode)` the
    pictures by name, and a call does both.
    """

    synthesis_class = ImageSynthesis
    gives = frozenset({"image"})

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
        return self.synthesis(ws, noise_mode, force_fp32)["image"]


def _without(given: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """Return arguments less those that have but one value here.

    Raises:
        ValueError: one has another value.
    """
    for name, value in fixed.items():
        if value is not ANY and given.get(name) not in (None, value):
            raise ValueError(f"{name} must be {value!r}, got {given[name]!r}")
    return {name: value for name, value in given.items() if name not in fixed}
