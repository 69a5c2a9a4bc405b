"""Random networks of the real sizes, made in memory: to measure where no weights are at hand.

Words become tokens by the tokenizer in `tokenizer_source`, a folder: one with fewer tokens than
CLIP's will do.
"""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDPMScheduler,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
)

from models.diffusion import DiffusionPrior
from models.features import ClipFeatures, TokenFeatures
from models.pretrained import load_tokenizer, quiet_loading


def random_prior(
    tokenizer_source: str,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
    taesd: bool = False,
    recompute_vae: bool = False,
) -> DiffusionPrior:
    """Return Stable Diffusion 1.5 with a depth ControlNet, and its VAE or TAESD."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    text_config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    # Made where they are used, since a GPU draws a billion weights in a second; quietly, since a
    # change of precision is warned of.
    with torch.device(device), quiet_loading():
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        controlnet = ControlNetModel.from_unet(unet)
        if taesd:
            vae = AutoencoderTiny()  # By default TAESD.
        else:
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            )
            if recompute_vae:
                vae.enable_gradient_checkpointing()
        return DiffusionPrior(
            vae.to(device, vae_dtype),
            unet.to(device, dtype),
            CLIPTextModel(text_config).to(device, dtype),
            load_tokenizer(tokenizer_source),
            DDPMScheduler(**schedule),
            controlnet.to(device, dtype),
        )


def random_vit(device: torch.device) -> TokenFeatures:
    """Return DINOv2-small, for images of 224 px."""
    shape = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    return TokenFeatures(Dinov2Model(Dinov2Config(**shape)).to(device), size=224)


def random_clip(tokenizer_source: str, device: torch.device) -> ClipFeatures:
    """Return CLIP ViT-B/32, which has the size of transformers' default."""
    return ClipFeatures(CLIPModel(CLIPConfig()).to(device), load_tokenizer(tokenizer_source))
