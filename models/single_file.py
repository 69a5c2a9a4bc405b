"""Stable Diffusion in one file, as CivitAI and the web UIs keep it (.safetensors or .ckpt).

Such a file holds weights under the names of the first implementation: `model.diffusion_model.*`
(UNet), `first_stage_model.*` (VAE), `cond_stage_model.*` (text encoder). diffusers translates the
names. The architecture follows from the weights' shapes. What shapes cannot say is as in Stable
Diffusion 1.5 and 2.1: heads, normalisation groups, activations and the noise schedule.
"""

import itertools
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.pretrained import build_network, load_tokenizer, one_line_errors, quiet_loading
from models.weight_files import kind_of_weights, read_weights

UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)
# Stable Diffusion 2 takes the text from the last layer but one, so this one is not used.
LAST_OF_OPEN_CLIP = f"{OPEN_CLIP}transformer.resblocks.23."
TOKENIZER = "openai/clip-vit-large-patch14"
SCALING_FACTOR = 0.18215
MAX_GROUPS = 32  # In group normalisation.
HEAD_WIDTH = 64  # Channels of an attention head in CLIP, and in the UNet of version 2.
HEADS = 8  # In the UNet of version 1.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What a UNet with another number of input channels is.
OTHER_INPUTS = {
    5: "a depth model of version 2, whose UNet takes depth as a fifth channel",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
    9: "an inpainting model, whose UNet takes 9 channels",
}


@dataclass(frozen=True)
class SingleFile:
    """The content of a checkpoint, by the first implementation's names.

    Attributes:
        path: Where it is.
        weights: {name: tensor}, without the averages that training keeps in `model_ema.*`.
        header: The header of a .safetensors.
        is_v2: Whether it is of version 2.
    """

    path: str
    weights: dict[str, Tensor]
    header: dict[str, str]

    @property
    def is_v2(self) -> bool:
        """Whether it is Stable Diffusion 2.x, whose text encoder is OpenCLIP's."""
        return any(key.startswith(OPEN_CLIP) for key in self.weights)

    def shape(self, key: str) -> list[int]:
        """Return the shape of a weight."""
        return list(self.weights[key].shape)


def read_single_file(path: str) -> SingleFile:
    """Read a checkpoint.

    Raises:
        ValueError: it is no Stable Diffusion 1.x or 2.x for text to image; one line.
    """
    with one_line_errors(path):
        content, header = read_weights(path)
        nested = content.get("state_dict") if isinstance(content, dict) else None
        content = nested if isinstance(nested, dict) else content
        kind = kind_of_weights(content)
        if kind != "a whole Stable Diffusion" or not any(key.startswith(UNET) for key in content):
            raise ValueError(
                f"holds {kind or 'unknown things'}, not Stable Diffusion 1.x or 2.x in one file"
            )
        weights = {
            key: value
            for key, value in content.items()
            if isinstance(value, Tensor) and not key.startswith("model_ema.")
        }
        channels = weights[f"{UNET}input_blocks.0.0.weight"].shape[1]
        if channels != 4:
            kind = OTHER_INPUTS.get(channels, f"a model with {channels} channels")
            raise ValueError(f"is {kind}; needed is one for text to image with 4 channels")
        if not any(key.startswith((CLIP, OPEN_CLIP)) for key in weights):
            raise ValueError("holds no text encoder (cond_stage_model.*)")
        return SingleFile(path, weights, header)


def load_single_unet(file: SingleFile, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return the UNet of a checkpoint.

    Raises:
        ValueError: it is incomplete or of another build; one line.
    """
    with one_line_errors(file.path, "model.diffusion_model"), quiet_loading():
        config = unet_config(file)
        weights = convert_ldm_unet_checkpoint(file.weights, config)
        return build_network(UNet2DConditionModel, config, weights, dtype)


def load_single_vae(
    path: str,
    content: dict[str, Tensor],
    dtype: torch.dtype,
    scaling_factor: float = SCALING_FACTOR,
) -> AutoencoderKL:
    """Return a VAE from weights by the first implementation's names, or by those of diffusers.

    Args:
        path: The file they are of.
        content: The weights, with or without `first_stage_model.` before their names.
        dtype: Of the VAE.
        scaling_factor: Of its latents, which no such file tells.

    Raises:
        ValueError: they are none of a VAE, or incomplete; one line.
    """
    with one_line_errors(path), quiet_loading():
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if any(key.startswith(VAE) for key in tensors):
            tensors = {k.removeprefix(VAE): v for k, v in tensors.items() if k.startswith(VAE)}
        # A file may also hold training's loss and averages.
        parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        tensors = {key: value for key, value in tensors.items() if key.startswith(parts)}
        if "encoder.conv_in.weight" not in tensors or "decoder.conv_out.weight" not in tensors:
            kind = kind_of_weights(content)
            kind = "one half of a VAE" if kind == "a VAE" else kind or "unknown things"
            raise ValueError(f"holds {kind}, not the encoder and decoder of a VAE")
        config = vae_config(tensors) | {"scaling_factor": scaling_factor}
        if any(key.startswith("encoder.down.") for key in tensors):
            prefixed = {f"{VAE}{key}": value for key, value in tensors.items()}
            tensors = convert_ldm_vae_checkpoint(prefixed, config)
        return build_network(AutoencoderKL, config, linear_attention(tensors), dtype)


def load_single_text_encoder(file: SingleFile, dtype: torch.dtype) -> CLIPTextModel:
    """Return the text encoder of a checkpoint.

    Raises:
        ValueError: it is incomplete; one line.
    """
    with one_line_errors(file.path, "cond_stage_model"), quiet_loading():
        config = text_config(file)
        if file.is_v2:
            shell = torch.nn.Module()  # The conversion asks it for the width.
            shell.config = CLIPTextConfig(**config)
            used = {k: v for k, v in file.weights.items() if not k.startswith(LAST_OF_OPEN_CLIP)}
            weights = convert_open_clip_checkpoint(shell, used)
            weights = {k: v for k, v in weights.items() if not k.startswith("text_projection")}
        else:
            weights = convert_ldm_clip_checkpoint(file.weights)
            weights.pop("text_projection.weight", None)  # Which some files hold, unused.
        weights = {k.removeprefix("text_model."): v.contiguous() for k, v in weights.items()}
        return build_network(CLIPTextModel, config, weights, dtype)


def load_single_tokenizer(file: SingleFile) -> CLIPTokenizer:
    """Return CLIP's tokenizer, which no checkpoint holds.

    It is taken from a folder `tokenizer/` next to the checkpoint, else from the hub or its cache.

    Raises:
        ValueError: it is in neither place; one line.
    """
    near = Path(file.path).parent / "tokenizer"
    try:
        if near.is_dir():
            tokenizer = load_tokenizer(str(near))
        else:
            tokenizer = load_tokenizer(TOKENIZER)
    except ValueError as error:
        raise ValueError(
            f"{file.path}: a single file holds no tokenizer: put the folder tokenizer/ of a "
            f"Stable Diffusion next to it, or download {TOKENIZER} once ({str(error)[:200]})"
        ) from error
    if file.is_v2:
        tokenizer.pad_token = "!"
    return tokenizer


def load_single_scheduler(file: SingleFile, unet: UNet2DConditionModel) -> DDPMScheduler:
    """Return the noise schedule, and say on stderr how the prediction's kind was found out.

    The kind is the header's `modelspec.prediction_type`, or velocity where the file holds the mark
    `v_pred`. Without either it is the noise in version 1; in version 2 a test tells.
    """
    named = file.header.get("modelspec.prediction_type", "").lower()
    predicts_velocity = named.startswith("v") or "v_pred" in file.weights
    if file.is_v2 and not named and "v_pred" not in file.weights:
        predicts_velocity = seems_to_predict_velocity(unet)
        print(
            f"note: {file.path} does not say what it predicts; a test of its UNet says "
            f"{'velocity' if predicts_velocity else 'noise'}",
            file=sys.stderr,
        )
    return DDPMScheduler(
        **SCHEDULE,
        prediction_type="v_prediction" if predicts_velocity else "epsilon",
        rescale_betas_zero_snr="ztsnr" in file.weights,
    )


@torch.no_grad()
def seems_to_predict_velocity(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet of version 2 predicts velocity, by the test that A1111's web UI makes.

    At the last time step a network for noise returns about its input. One for velocity returns
    about minus the image, which for the constant input used here lies far below the input.
    """
    given = torch.full((1, 4, 8, 8), 0.5, dtype=unet.dtype, device=unet.device)
    text = torch.full((1, 2, unet.config.cross_attention_dim), 0.5).to(given)
    predicted = unet(given, torch.tensor([999], device=unet.device), text).sample
    return bool((predicted - given).float().mean() < -1)


def unet_config(file: SingleFile) -> dict:
    """Return the UNet's configuration by its weights' shapes."""
    levels = [[]]
    for i in itertools.count(1):
        block = f"{UNET}input_blocks.{i}."
        if not any(key.startswith(block) for key in file.weights):
            break
        if f"{block}0.op.weight" in file.weights:
            levels.append([])
        else:
            attends = any(key.startswith(f"{block}1.") for key in file.weights)
            levels[-1].append((file.shape(f"{block}0.out_layers.3.weight")[0], attends))
    attends = [level[0][1] for level in levels]
    channels = [level[0][0] for level in levels]
    to_k = next(key for key in file.weights if key.endswith("attn2.to_k.weight"))
    proj_in = next(key for key in file.weights if key.endswith(".proj_in.weight"))
    heads = [max(1, c // HEAD_WIDTH) for c in channels] if file.is_v2 else HEADS
    return {
        # Version 2.1 for 768 px cannot be told from the one for 512 px by shapes.
        "sample_size": 64,
        "in_channels": file.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": file.shape(f"{UNET}out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "cross_attention_dim": file.shape(to_k)[1],
        "attention_head_dim": heads,
        "use_linear_projection": len(file.shape(proj_in)) == 2,
        "upcast_attention": file.is_v2,
        "norm_num_groups": math.gcd(MAX_GROUPS, *channels),
    }


def vae_config(weights: dict[str, Tensor]) -> dict:
    """Return a VAE's configuration by its weights' shapes, under either kind of names."""
    block = re.compile(
        r"encoder\.down(?:\.(\d+)\.block|_blocks\.(\d+)\.resnets)\.(\d+)\.conv2\.weight"
    )
    channels, layers = {}, 0
    for key, weight in weights.items():
        if found := block.fullmatch(key):
            channels[int(found[1] or found[2])] = len(weight)
            layers = max(layers, 1 + int(found[3]))
    channels = [channels[level] for level in range(len(channels))]
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": len(weights["decoder.conv_out.weight"]),
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "norm_num_groups": math.gcd(MAX_GROUPS, *channels),
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }


def text_config(file: SingleFile) -> dict:
    """Return the text encoder's configuration by its weights' shapes."""
    if file.is_v2:
        words, places = f"{OPEN_CLIP}token_embedding.weight", f"{OPEN_CLIP}positional_embedding"
        layer, wide = rf"{re.escape(OPEN_CLIP)}transformer\.resblocks\.(\d+)\.", "mlp.c_fc.weight"
    else:
        words = next(key for key in file.weights if key.endswith("token_embedding.weight"))
        places = words.replace("token_", "position_")
        layer, wide = rf"{re.escape(CLIP)}(?:text_model\.)?encoder\.layers\.(\d+)\.", "fc1.weight"
    used = {key for key in file.weights if not key.startswith(LAST_OF_OPEN_CLIP)}
    layers = len({found[1] for found in (re.match(layer, key) for key in used) if found})
    inner = next(key for key in file.weights if re.match(layer, key) and key.endswith(wide))
    vocab_size, width = file.shape(words)
    return {
        "hidden_size": width,
        "vocab_size": vocab_size,
        "max_position_embeddings": file.shape(places)[0],
        "intermediate_size": file.shape(inner)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "hidden_act": "gelu" if file.is_v2 else "quick_gelu",
    }


def linear_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a VAE's weights by diffusers' present names, attention's as matrices.

    Older files have other names for them, or 1x1 convolutions [C, C, 1, 1] or [C, C, 1].
    """
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    converted = {}
    for key, value in weights.items():
        if found := re.fullmatch(r"(.*attentions\.\d+)\.([\w.]+)\.(weight|bias)", key):
            layer = names.get(found[2], found[2])
            key = f"{found[1]}.{layer}.{found[3]}"
            if layer in names.values() and found[3] == "weight":
                value = value.flatten(1)
        converted[key] = value
    return converted
