"""LoRA: small changes of a Stable Diffusion's weights, added to them for good.

Files are in the format of kohya, of LyCORIS (LoCon, LoHa and LoKr), of PEFT or of diffusers, old
and new. Names and sums are our own, since ranks and scales may differ from layer to layer.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from harness.download import check_downloaded
from models.limits import is_number
from models.pretrained import one_line_errors, quiet_loading
from models.weight_files import (
    are_named_tensors,
    fetch_weights,
    find_weights,
    kind_of_weights,
    read_weights,
)

# The usual files of a folder, as diffusers and PEFT call them.
FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
CONFIG = "adapter_config.json"  # PEFT's settings, next to its weights.
METADATA = "lora_adapter_metadata"  # diffusers' settings, in the header of a .safetensors.
# How names of weights end, in each format, and what the weight is.
ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # In diffusers' attention processors.
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
LYCORIS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LYCORIS += ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ENDINGS |= {f".{name}": name for name in LYCORIS}
# Kinds of files that cannot be added as a product of such factors, by names in them.
OTHER_KINDS = {
    r".*(dora_scale|lora_magnitude_vector)": "a DoRA, which scales weights too",
    r".*\.(on_input$|ia3_l\b)": "an (IA)3, which scales weights",
    r".*\b(oft_diag|oft_blocks|oft_r|boft_\w+)\b": "an OFT, which rotates weights",
    r".*\.(b1|b2|a1|a2)\.weight$": "a GLoRA",
    r".*\.(diff|diff_b|w_norm|b_norm)$": "a LyCORIS of whole weights (full, norm)",
    r".*vera_lambda": "a VeRA",
    r".*lora_embedding_[AB]": "a LoRA of an embedding",
}
# How names of layers begin in LoRAs of other models.
STRANGERS = {
    r"lora_te2_|text_encoder_2\.|lora_unet_(input|output|middle)_block": "Stable Diffusion XL",
    r"lora_unet_joint_blocks|lora_te3_": "Stable Diffusion 3",
    r"lora_unet_(double|single)_blocks|transformer\.": "Flux or Stable Diffusion 3",
}
FACTORS = (
    {"up", "down"},
    {"up", "mid", "down"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
)


class Settings(NamedTuple):
    """What a file says of its scales in a header or an adapter_config.json."""

    alpha: object  # None: the rank.
    alpha_pattern: dict  # {pattern of layers' names: alpha}
    use_rslora: bool


def fuse_loras(
    loras: Sequence[tuple[str | Path, float]],
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
) -> None:
    """Add LoRAs to the weights of a UNet and a text encoder. Their order does not matter.

    Args:
        loras: Files, folders or hub ids (user/repo or user/repo/file), each with the weight of its
            change; 1 is as trained.
        unet: What they change.
        text_encoder: What they change.

    Raises:
        ValueError: one cannot be found or read, or was not made for these networks; one line.
    """
    layers = _named_layers(unet, text_encoder)
    changes: dict[nn.Module, list] = {}
    # Sorted, so that sums do not depend on the order in which they are given.
    for source, scale in sorted(loras, key=lambda lora: (str(lora[0]), lora[1])):
        root, subfolder, name = find_weights(source, "", "*", *FILES)
        where = (root, os.path.join(subfolder, name))
        with one_line_errors(*where), quiet_loading():
            for layer, (label, parts, ratio) in _read_lora(root, subfolder, name, layers).items():
                changes.setdefault(layer, []).append((where, label, parts, scale * ratio))
    for layer, own in changes.items():
        _add_changes(layer, own)


def change_of(parts: dict[str, Tensor], weight: Tensor, label: str) -> Tensor:
    """Return a layer's change before scaling, in the shape of its weight [out, in, ...].

    Args:
        parts: The factors: up and down (LoRA), with mid (LoCon), hada_* (LoHa) or lokr_* (LoKr).
        weight: The layer's weight, of which the shape counts.
        label: The layer's name, for messages.

    Raises:
        ValueError: the factors have other shapes, or are not all there; the message names no file.
    """
    factors = {k: v.float() for k, v in parts.items() if k != "alpha"}
    if not any(name.startswith("lokr_") for name in factors):
        given = factors.keys() - {"hada_t1", "hada_t2"}
        if not any(given == wanted for wanted in FACTORS):
            raise ValueError(f"lacks half of the weights for {label}")
    shapes = ", ".join(f"{name} {list(factor.shape)}" for name, factor in factors.items())
    misfit = f"is of another model: {label} has {shapes}, the layer's weight {list(weight.shape)}"
    if any(0 in factor.shape for factor in factors.values()):
        raise ValueError(f"has rank 0 in {label}")
    try:
        change = _product(factors)
    except (RuntimeError, IndexError, KeyError) as error:  # What torch makes of other shapes.
        raise ValueError(misfit) from error
    # Flat factors of a convolution are its weight's in the same order.
    if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
        raise ValueError(misfit)
    if change.ndim == weight.ndim and change.shape != weight.shape:
        raise ValueError(misfit)
    return change.reshape(weight.shape)


def _product(factors: dict[str, Tensor]) -> Tensor:
    """Return the product of a layer's factors."""
    if "mid" in factors:  # LoCon with a kernel between two 1x1 convolutions.
        up, down = factors["up"].flatten(1), factors["down"].flatten(1)
        return torch.einsum("or,rs...,si->oi...", up, factors["mid"], down)
    if "up" in factors:
        up, down = factors["up"], factors["down"]
        if down.ndim < 2 or up.ndim < 2 or up[0, 0].numel() != 1:
            raise IndexError
        return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
    if "hada_w1_a" in factors:
        return _hadamard_side(factors, 1) * _hadamard_side(factors, 2)
    w1, w2 = _kronecker_side(factors, 1), _kronecker_side(factors, 2)
    return torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())


def _hadamard_side(factors: dict[str, Tensor], side: int) -> Tensor:
    """Return one of the two matrices whose product by elements LoHa is."""
    a, b = factors[f"hada_w{side}_a"], factors[f"hada_w{side}_b"]
    if f"hada_t{side}" in factors:  # A convolution's: a [rank, out], b [rank, in].
        return torch.einsum("ij...,jr,ip->pr...", factors[f"hada_t{side}"], b, a)
    return a @ b


def _kronecker_side(factors: dict[str, Tensor], side: int) -> Tensor:
    """Return one of the two matrices whose Kronecker product LoKr is."""
    name = f"lokr_w{side}"
    if name in factors:
        return factors[name]
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    if side == 2 and "lokr_t2" in factors:
        return torch.einsum("ij...,ip,jr->pr...", factors["lokr_t2"], a, b)
    return a @ b


def _rank(parts: dict[str, Tensor]) -> int | None:
    """Return the rank of a layer's factors; a LoKr of two whole matrices has none."""
    for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in parts:
            return len(parts[name])
    return None


def _add_changes(layer: nn.Module, changes: list) -> None:
    """Add the changes that several files make of one layer."""
    total = 0.0
    for _, label, parts, scale in changes:
        total = total + scale * change_of(parts, layer.weight, label).double()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.double() + total.to(layer.weight.device))
    if not layer.weight.isfinite().all():
        (root, name), label = changes[-1][:2]
        with one_line_errors(root, name):
            raise ValueError(f"makes NaNs or infinities of {label}")


def _read_lora(root: str, subfolder: str, name: str, layers: dict[str, tuple]) -> dict:
    """Return {layer: (its name, its factors, the factor of its change)} of a file."""
    file = fetch_weights(root, subfolder, name)
    content, header = read_weights(file)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    kind = kind_of_weights(content)
    if kind not in ("a LoRA", None):
        raise ValueError(f"holds {kind}, not a LoRA")
    if not are_named_tensors(content):
        raise ValueError("holds something else than named tensors")
    for pattern, kind in OTHER_KINDS.items():
        if any(re.match(pattern, key) for key in content):
            raise ValueError(f"is {kind}; only LoRA, LoCon, LoHa and LoKr are supported")
    found: dict[nn.Module, tuple[str, dict]] = {}
    for key, value in content.items():
        layer, label, part = _place(key, layers)
        if part == "alpha" and value.numel() != 1:
            raise ValueError(f"{key} is no number, its shape is {list(value.shape)}")
        found.setdefault(layer, (label, {}))[1][part] = value
    if not found:
        raise ValueError("holds no LoRA weights")
    config = _read_config(root, subfolder, name)
    settings = {part: _settings(part, header, config) for part in ("unet", "text_encoder")}
    read = {}
    for layer, (label, parts) in found.items():
        if not all(part.isfinite().all() for part in parts.values()):
            raise ValueError(f"{label} holds NaNs or infinities")
        # Shapes are checked before anything is changed.
        change_of({key: part.to("meta") for key, part in parts.items()}, layer.weight, label)
        ratio = _ratio(label, parts, settings[label.partition(".")[0]])
        read[layer] = (label, parts, ratio)
    return read


def _place(key: str, layers: dict[str, tuple]) -> tuple[nn.Module, str, str]:
    """Return the layer that a weight of a file is for, the layer's name, and what the weight is."""
    for ending, part in ENDINGS.items():
        if not key.endswith(ending):
            continue
        name = key.removesuffix(ending).replace(".processor.", ".")
        if name in layers:
            return *layers[name], part
        of = next((f" ({name})" for start, name in STRANGERS.items() if re.match(start, key)), "")
        raise ValueError(f"is of another model{of}: no layer for {key}")
    raise ValueError(f"holds more than LoRA weights: {key}")


def _named_layers(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> dict[str, tuple[nn.Module, str]]:
    """Return {name in a file: (layer, <network>.<layer>)}, for all names that formats have."""
    layers = {}

    def note(layer: nn.Module, label: str, *names: str) -> None:
        layers.update({name: (layer, label) for name in names})

    for name, layer in text_encoder.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        name = name.removeprefix("text_model.")
        label = f"text_encoder.{name}"
        # Attention's layers had the UNet's names in the first format.
        processor = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", name)
        for alias in (name, processor):
            full = f"text_model.{alias}"
            note(layer, label, f"text_encoder.{alias}", f"text_encoder.{full}", full)
            note(layer, label, f"base_model.model.{alias}", f"base_model.model.{full}")
        kohya = f"text_model.{name}".replace(".", "_")
        note(layer, label, f"lora_te_{kohya}", f"lora_te1_{kohya}")
    for name, layer in unet.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        label = f"unet.{name}"
        for alias in {name, name.replace(".to_out.0", ".to_out")}:
            note(layer, label, alias, f"unet.{alias}", f"base_model.model.{alias}")
            note(layer, label, f"base_model.model.unet.{alias}")
        note(layer, label, f"lora_unet_{name.replace('.', '_')}")
    return layers


def _read_config(root: str, subfolder: str, name: str) -> dict:
    """Return PEFT's settings next to its weights, or {}."""
    if not name.startswith("adapter_model"):
        return {}
    file = Path(root, subfolder, CONFIG)
    if not os.path.isdir(root):
        file = Path(fetch_weights(root, subfolder, CONFIG))
    if not file.is_file():
        raise ValueError(f"needs its {CONFIG}, which is not next to it")
    check_downloaded(file)
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its {CONFIG} is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"its {CONFIG} is no table of settings")
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"is a {config['peft_type']} of PEFT; only LORA is supported")
    return config


def _settings(part: str, header: dict[str, str], config: dict) -> Settings:
    """Return what a header and adapter_config.json say of a network, "unet" or "text_encoder"."""
    try:
        plain = {key: json.loads(header[key]) for key in ("lora_alpha",) if key in header}
        given = json.loads(header.get(METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON ({error})") from error
    if not isinstance(given, dict):
        raise ValueError("its header is no table of settings")
    given = config | plain | given
    start = f"{part}."  # Settings of one network begin with it, and win over those of all.
    own = {key.removeprefix(start): given[key] for key in given if key.startswith(start)}
    own = given | own
    if own.get("use_dora"):
        raise ValueError("is a DoRA, which scales weights too; only LoRA is supported")
    patterns = own.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("its header is no table of settings")
    alphas = [own["lora_alpha"]] if "lora_alpha" in own else []
    for alpha in [*alphas, *patterns.values()]:
        if not is_number(alpha):
            raise ValueError(f"its header's alpha is {alpha!r}, no number")
    return Settings(alphas[0] if alphas else None, patterns, bool(own.get("use_rslora")))


def _ratio(label: str, parts: dict[str, Tensor], settings: Settings) -> float:
    """Return the factor of a layer's change: alpha / rank, where alpha is the rank by default."""
    rank = _rank(parts)
    if rank is None:
        return 1.0
    layer = label.partition(".")[2]
    own = [alpha for key, alpha in settings.alpha_pattern.items() if _matches(key, layer)]
    alpha = own[0] if own else rank if settings.alpha is None else settings.alpha
    if "alpha" in parts:
        alpha = parts["alpha"].item()
    if not is_number(alpha):
        raise ValueError(f"its alpha of {label} is {alpha!r}, no number to scale with")
    return alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def _matches(pattern: str, layer: str) -> bool:
    """Whether a layer's name is one that a pattern means, by PEFT's rule."""
    names = {layer, f"text_model.{layer}"}  # The latter as CLIP's layers were called.
    try:
        return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
    except re.error as error:
        raise ValueError(f"its alpha pattern {pattern[:80]!r} is no pattern ({error})") from error
