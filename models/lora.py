"""LoRA: small changes of a Stable Diffusion's weights, added to them for good.

Files are in kohya's or diffusers' format. diffusers translates their names; the sum is ours, since
ranks and scales may differ from layer to layer.
"""

import json
import os
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_utils import load_state_dict
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor, nn
from transformers import CLIPTextModel

from models.limits import is_number
from models.pretrained import fetch_weights, find_weights, one_line_errors, quiet_loading

LORA_FILE = "pytorch_lora_weights.safetensors"  # The usual one of several in a folder.
SIDES = (".lora_A.weight", ".lora_B.weight")
KOHYA_SIDES = (".lora_down.weight", ".lora_up.weight")


def fuse_lora(
    source: str | Path, scale: float, unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> None:
    """Add a LoRA to the weights of a UNet and a text encoder.

    Args:
        source: File, folder or hub id (user/repo or user/repo/file).
        scale: Weight of the change; 1 is as trained.

    Raises:
        ValueError: it cannot be found or read, or was not made for these networks; one line.
    """
    root, subfolder, name = find_weights(source, "", "*", LORA_FILE)
    with one_line_errors(root, os.path.join(subfolder, name)), quiet_loading():
        from diffusers.loaders import StableDiffusionLoraLoaderMixin  # Its import logs warnings.

        file = fetch_weights(root, subfolder, name)
        _check_file(load_state_dict(file))
        try:
            weights, alphas, header = StableDiffusionLoraLoaderMixin.lora_state_dict(
                file, return_lora_metadata=True
            )
        except json.JSONDecodeError as error:
            raise ValueError(f"its header is no JSON ({error})") from error
        names = _peft_names(weights)
        for layer_name, layer in _find_layers(names, unet, text_encoder).items():
            down, up = (weights[names[layer_name + side]].float() for side in SIDES)
            change = _change(layer_name, layer.weight, down, up)
            # By kohya's names, those of diffusers' attention processors ending in another way.
            alpha = (alphas or {}).get(names[layer_name + SIDES[0]].split(".lora.")[0] + ".alpha")
            if alpha is None:
                alpha = _header_alpha(layer_name, len(down), {} if header is None else header)
            with torch.no_grad():
                layer.weight.copy_(layer.weight.float() + scale * alpha / len(down) * change)
            if not layer.weight.isfinite().all():
                raise ValueError(f"makes NaNs or infinities of {layer_name}")


def _check_file(state: dict[str, Tensor]) -> None:
    """Refuse what diffusers would leave out, or stumble over without saying why."""
    pairs = state.items() if isinstance(state, dict) else [(None, state)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs):
        raise ValueError("holds something else than named tensors")
    if any("dora_scale" in key or "magnitude" in key for key in state):
        raise ValueError("is a DoRA, which scales weights too; only LoRA is supported")
    down, up = ({k.removesuffix(s) for k in state if k.endswith(s)} for s in KOHYA_SIDES)
    if down != up:
        raise ValueError(f"lacks half of the weights for {min(down ^ up)}")
    for key, value in state.items():
        if key.endswith(".alpha") and value.numel() != 1:
            raise ValueError(f"{key} is no number, its shape is {list(value.shape)}")


def _peft_names(weights: dict[str, Tensor]) -> dict[str, str]:
    """Return {<network>.<layer>.lora_{A, B}.weight: the weight's key}, both sides of each layer."""
    of_unet = {key: key for key in weights if key.startswith("unet.")}
    of_text = {key: key for key in weights if key.startswith("text_encoder.")}
    others = weights.keys() - of_unet.keys() - of_text.keys()
    if others:
        raise ValueError(f"is of another model: no layer for {min(others)}")
    names = convert_unet_state_dict_to_peft(of_unet)
    # Of the oldest names all others are part, and which they are cannot be told from a few layers.
    names |= convert_state_dict_to_peft(of_text, StateDictType.DIFFUSERS_OLD)
    unknown = [name for name in names if not name.endswith(SIDES)]
    if unknown:
        raise ValueError(f"holds more than LoRA weights: {min(unknown)}")
    a, b = ({name.removesuffix(s) for name in names if name.endswith(s)} for s in SIDES)
    if a != b:
        raise ValueError(f"lacks half of the weights for {min(a ^ b)}")
    if not a:
        raise ValueError("holds no LoRA weights")
    return names


def _find_layers(
    names: dict[str, str], unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that weights of these names belong to, by <network>.<layer>."""
    layers = {f"unet.{name}": layer for name, layer in unet.named_modules()}
    for name, layer in text_encoder.named_modules():
        # Files have the prefix that transformers' own names had once.
        layers[f"text_encoder.{name}"] = layers[f"text_encoder.text_model.{name}"] = layer
    found = {}
    for name in names:
        layer_name = name.partition(".lora_")[0]
        found[layer_name] = layers.get(layer_name)
        if not isinstance(found[layer_name], nn.Linear | nn.Conv2d):
            raise ValueError(f"is of another model: no layer for {name}")
    return found


def _change(name: str, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return up times down in the shape of a layer's weight [out, in, ...].

    `down` is [rank, in, ...], `up` [out, rank, ...] with nothing but ones at the end.
    """
    fits = down.ndim > 1 and down.shape[1:] == weight.shape[1:] and up.ndim > 1
    if not fits or up.flatten(1).shape != (len(weight), len(down)):
        raise ValueError(
            f"is of another model: {name}.lora_A.weight is {list(down.shape)}, "
            f"lora_B.weight {list(up.shape)}, the layer's weight {list(weight.shape)}"
        )
    if not len(down):
        raise ValueError(f"has rank 0 in {name}")
    return (up.flatten(1) @ down.flatten(1)).view(weight.shape)


def _header_alpha(layer_name: str, rank: int, header: dict) -> float:
    """Return a layer's alpha by the header of diffusers' files; without one it is the rank."""
    part, _, layer = layer_name.partition(".")
    patterns = (header.get(f"{part}.alpha_pattern") or {}) if isinstance(header, dict) else None
    if not isinstance(patterns, dict):
        raise ValueError("its header is no table of settings")
    if header.get(f"{part}.use_rslora") or header.get(f"{part}.use_dora"):
        raise ValueError("is a DoRA or rank-stabilised; only plain LoRA is supported")
    own = (patterns[pattern] for pattern in patterns if f".{layer}".endswith(f".{pattern}"))
    alpha = next(own, header.get(f"{part}.lora_alpha", rank))
    if not is_number(alpha):
        raise ValueError(f"its header's alpha of {layer_name} is {alpha!r}, no number")
    return alpha
