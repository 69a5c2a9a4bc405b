"""LoRA: small changes of a Stable Diffusion's weights, added to them for good.

Files are in kohya's or diffusers' format and read as diffusers reads them, with the package peft.
"""

import importlib.util
import os
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.models.modeling_utils import load_state_dict
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import CLIPTextModel

from models.pretrained import find_weights, one_line_errors, quiet_loading

LORA_FILE = "pytorch_lora_weights.safetensors"  # The usual one of several in a folder.


def fuse_lora(
    source: str | Path, scale: float, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> None:
    """Add a LoRA to the weights of a UNet and a text encoder, which stay plain networks.

    An IP-Adapter is to be loaded after it, so that neither meets the other's layers.

    Args:
        source: File, folder or hub id (user/repo or user/repo/file).
        scale: Weight of the change; 1 is as trained.

    Raises:
        ValueError: it cannot be found or read, or was not made for these networks; one line.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{source}: to read a LoRA, install peft: pip install peft")
    root, subfolder, name = find_weights(source, "", "*", LORA_FILE)
    with one_line_errors(root, os.path.join(subfolder, name)), quiet_loading():
        from diffusers.loaders import StableDiffusionLoraLoaderMixin  # Its import logs warnings.

        file = os.path.join(root, name)
        if not os.path.isdir(root):
            file = hf_hub_download(root, name, subfolder=subfolder or None)
        if any("dora_scale" in key for key in load_state_dict(file)):
            raise ValueError("is a DoRA in kohya's format, whose scales diffusers leaves out")
        loader = StableDiffusionLoraLoaderMixin()  # What pipelines inherit.
        weights, alphas, metadata = loader.lora_state_dict(file, return_lora_metadata=True)
        _check_fit(weights, unet, text_encoder)
        loader.load_lora_into_unet(weights, alphas, unet, metadata=metadata)
        loader.load_lora_into_text_encoder(weights, alphas, text_encoder, metadata=metadata)
        loader.unet, loader.text_encoder = unet, text_encoder
        loader.fuse_lora(lora_scale=scale, safe_fusing=True)
        loader.unload_lora_weights()


def _check_fit(
    weights: dict[str, Tensor], unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> None:
    """Refuse weights that fit no layer: diffusers would pass over some of them with a warning."""
    layers = {f"unet.{name}": layer for name, layer in unet.named_modules()}
    for name, layer in text_encoder.named_modules():
        # Files have the prefix that transformers' own names had once.
        layers[f"text_encoder.{name}"] = layers[f"text_encoder.text_model.{name}"] = layer

    for key, weight in _peft_names(weights).items():
        layer_name, _, side = key.partition(".lora_")
        if layer_name not in layers:
            raise ValueError(f"is of another model: no layer for {key}")
        shape = layers[layer_name].weight.shape
        # A is [r, in, ...]; B is [out, r, ...], and what there may be besides is [out].
        ours, theirs = (weight.shape[1:], shape[1:]) if side[0] == "A" else (len(weight), shape[0])
        if ours != theirs:
            shapes = f"{list(weight.shape)}, the layer's weight {list(shape)}"
            raise ValueError(f"is of another model: {key} is {shapes}")


def _peft_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names <network>.<layer>.lora_{A, B}.weight, each with both sides."""
    of_unet = {key: value for key, value in weights.items() if key.startswith("unet.")}
    of_text = {key: value for key, value in weights.items() if key.startswith("text_encoder.")}
    others = weights.keys() - of_unet.keys() - of_text.keys()
    if others:
        raise ValueError(f"is of another model: no layer for {min(others)}")
    named = convert_unet_state_dict_to_peft(of_unet)
    if of_text:
        named |= convert_state_dict_to_peft(convert_state_dict_to_diffusers(of_text))
    a, b = ({key.split(s)[0] for key in named if s in key} for s in (".lora_A.", ".lora_B."))
    if a != b:
        raise ValueError(f"lacks half of the weights for {min(a ^ b)}")
    if not a:
        raise ValueError("holds no LoRA weights")
    return named
