"""Super-resolution: rendered features and their first three channels to the final image.

EG3D's variants differ in sizes only: two synthesis blocks, the first of which may keep the size.
B batch, C feature channels, n rendered size, R final size, D = w_dim.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import NoiseMode, fir_filter, lay_out
from models.stylegan2 import FP16_CLAMP, SynthesisBlock


@dataclass(frozen=True)
class Variant:
    """What distinguishes one of EG3D's super-resolution classes."""

    input_resolution: int  # Size at which the first block takes its input.
    first_up: int  # Factor of the first block; the second always doubles.
    channels: tuple[int, int]  # Widths of the two blocks.
    own_filter: bool = True  # The state dict holds an (unused) `superresolution.resample_filter`.
    shrinks: bool = True  # Larger renders are resized down rather than refused.
    antialias: bool = True  # Honours rendering_kwargs["sr_antialias"].


VARIANTS = {
    "SuperresolutionHybrid8XDC": Variant(128, 2, (256, 128), own_filter=False),
    "SuperresolutionHybrid8X": Variant(128, 2, (128, 64)),
    "SuperresolutionHybrid4X": Variant(128, 1, (128, 64), shrinks=False),
    "SuperresolutionHybrid2X": Variant(64, 1, (128, 64)),
    "SuperresolutionHybridDeepfp32": Variant(128, 1, (128, 64), shrinks=False, antialias=False),
}


class SuperResolution(nn.Module):
    """Two synthesis blocks, both styled by the last code of ws."""

    def __init__(
        self,
        module: str,
        in_channels: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        use_fp16: bool,
        antialias: bool,
        channels: tuple[int, int] | None = None,
        input_resolution: int | None = None,
    ) -> None:
        """Create the networks.

        Args:
            module: Name of EG3D's class, with or without its module path.
            in_channels: Feature channels rendered.
            w_dim: Width of ws.
            img_resolution: Final size; must be what the variant makes of its input.
            img_channels: Channels of the image.
            use_fp16: Run in half precision on a GPU; clamps activations everywhere, as EG3D does.
            antialias: Low-pass a render before it is shrunk to the input size.
            channels: Widths of the two blocks, instead of the variant's.
            input_resolution: Input size, instead of the variant's.

        Raises:
            ValueError: `module` is unknown, or `img_resolution` does not fit.
        """
        super().__init__()
        name = str(module).rsplit(".", 1)[-1]
        if name not in VARIANTS:
            raise ValueError(
                f"superresolution_module must be one of {', '.join(VARIANTS)}, got {module!r}"
            )
        variant = VARIANTS[name]
        self.variant = variant = replace(
            variant,
            input_resolution=input_resolution or variant.input_resolution,
            channels=tuple(channels or variant.channels),
        )
        self.antialias = antialias and variant.antialias
        first_resolution = variant.input_resolution * variant.first_up
        if img_resolution != first_resolution * 2:
            raise ValueError(
                f"{name} at input resolution {variant.input_resolution} makes images of "
                f"{first_resolution * 2} px, img_resolution is {img_resolution}"
            )

        clamp = FP16_CLAMP if use_fp16 else None
        width0, width1 = variant.channels
        if variant.own_filter:
            self.register_buffer("resample_filter", fir_filter())
        self.block0 = SynthesisBlock(
            in_channels,
            width0,
            w_dim,
            first_resolution,
            img_channels,
            up=variant.first_up,
            use_fp16=use_fp16,
            conv_clamp=clamp,
        )
        self.block1 = SynthesisBlock(
            width0,
            width1,
            w_dim,
            img_resolution,
            img_channels,
            use_fp16=use_fp16,
            conv_clamp=clamp,
        )

    def forward(
        self,
        rgb: Tensor,
        x: Tensor,
        ws: Tensor,
        noise_mode: NoiseMode,
        force_fp32: bool = False,
    ) -> Tensor:
        """Return images [B, 3, R, R]; `rgb` is left as it is.

        Args:
            rgb: Rendered colours, [B, 3, n, n].
            x: Rendered features, [B, C, n, n].
            ws: Style codes, [B, num_ws, D].
            noise_mode: Noise of the synthesis layers.
            force_fp32: No half precision.

        Raises:
            ValueError: n is too large for a variant that only enlarges (EG3D asserts).
        """
        size, wanted = x.shape[-1], self.variant.input_resolution
        if size > wanted and not self.variant.shrinks:
            raise ValueError(
                f"this super-resolution takes renders of at most {wanted} px, got {size}"
            )
        if size != wanted:
            x, rgb = (
                F.interpolate(
                    image,
                    size=(wanted, wanted),
                    mode="bilinear",
                    align_corners=False,
                    antialias=self.antialias,
                )
                for image in (x, rgb)
            )
        x = lay_out(x, self.block0.conv0.weight)
        codes = [ws[:, -1]] * 3
        x, rgb = self.block0(x, rgb, codes, noise_mode, force_fp32)
        x, rgb = self.block1(x, rgb, codes, noise_mode, force_fp32)
        return rgb
