"""Writes a diffusers folder as a checkpoint in one file, under the first implementation's names."""

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def single_file_weights(prior: Path, is_v2: bool = False) -> dict[str, Tensor]:
    """Return the weights of what `build_prior` or `build_sd2` wrote, by their first names."""
    unet = UNet2DConditionModel.from_pretrained(prior / "unet")
    vae = AutoencoderKL.from_pretrained(prior / "vae")
    text = CLIPTextModel.from_pretrained(prior / "text_encoder").state_dict()
    unet_weights, vae_weights = first_names(unet, vae)
    weights = {f"model.diffusion_model.{name}": value for name, value in unet_weights.items()}
    for name, value in vae_weights.items():
        convolved = "attn_1" in name and value.ndim == 2
        weights[f"first_stage_model.{name}"] = value[:, :, None, None] if convolved else value
    if is_v2:
        weights |= {f"cond_stage_model.model.{k}": v for k, v in _open_clip(text).items()}
    else:
        prefix = "cond_stage_model.transformer.text_model."
        weights |= {f"{prefix}{key}": value for key, value in text.items()}
        places = text["embeddings.position_embedding.weight"]
        weights[f"{prefix}embeddings.position_ids"] = torch.arange(len(places))[None]
    return {key: value.contiguous() for key, value in weights.items()}


def first_names(
    unet: UNet2DConditionModel, vae: AutoencoderKL
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of a UNet and of a VAE by their first names."""
    layers, levels = unet.config.layers_per_block, len(vae.config.block_out_channels)
    return (
        {_unet_name(key, layers): value for key, value in unet.state_dict().items()},
        {_vae_name(key, levels): value for key, value in vae.state_dict().items()},
    )


def write_single_file(
    file: Path,
    prior: Path,
    is_v2: bool = False,
    header: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Tensor] | None = None,
    without: str = "nothing",
) -> Path:
    """Write a .safetensors, or with another suffix a file of torch.save with "state_dict" in it."""
    weights = single_file_weights(prior, is_v2) | (extra or {})
    weights = {k: v for k, v in weights.items() if not k.startswith(without)}
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    if file.suffix == ".safetensors":
        save_file(weights, file, metadata={"format": "pt"} | (header or {}))
    else:
        torch.save({"state_dict": weights, "global_step": 7}, file)
    return file


def _unet_name(key: str, layers: int) -> str:
    """Return the first name of a UNet's weight."""
    key = _resnet(key)
    for new, old in UNET.items():
        if key.startswith(f"{new}."):
            return key.replace(new, old, 1)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        number = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{number}.{found[3]}"
    level, kind, number, rest = re.fullmatch(
        r"(?:down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key
    ).groups()
    level, number = int(level), int(number)
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        # Behind the attention, where there is one: all levels but the last have it.
        return f"output_blocks.{level * (layers + 1) + layers}.2.{rest}"
    slot = 0 if kind == "resnets" else 1
    if key.startswith("down"):
        return f"input_blocks.{1 + level * (layers + 1) + number}.{slot}.{rest}"
    return f"output_blocks.{level * (layers + 1) + number}.{slot}.{rest}"


def _resnet(key: str) -> str:
    """Return the name of a residual block's weight with the first names of its layers."""
    if ".resnets." in key:
        for new, old in RESNET.items():
            key = key.replace(f".{new}.", f".{old}.")
    return key


def _vae_name(key: str, levels: int) -> str:
    """Return the first name of a VAE's weight."""
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if found := re.fullmatch(r"(.+)\.mid_block\.resnets\.(\d)\.(.+)", key):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
    if found := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        return f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d)\.(.+)", key):
        return f"encoder.down.{found[1]}.{_vae_layer(found[2])}"
    if found := re.fullmatch(r"decoder\.up_blocks\.(\d)\.(.+)", key):
        return f"decoder.up.{levels - 1 - int(found[1])}.{_vae_layer(found[2])}"
    return key


def _vae_layer(name: str) -> str:
    """Return the first name of a weight within a level."""
    name = name.replace("resnets.", "block.")
    return re.sub(r"(down|up)samplers\.0\.", r"\1sample.", name)


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text encoder's weights by OpenCLIP's names, with a last layer that is not used."""
    weights = {}
    for key, value in text.items():
        if found := re.fullmatch(r"(.+)\.self_attn\.q_proj\.(weight|bias)", key):
            names = [key.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            value = torch.cat([text[name] for name in names])
            key = f"{found[1]}.attn.in_proj_{found[2]}"
        elif re.search(r"self_attn\.[kv]_proj", key):
            continue
        for new, old in OPEN_CLIP.items():
            key = key.replace(new, old)
        weights[key] = value
    weights["transformer.resblocks.23.ln_1.weight"] = torch.ones(3)
    width = weights["ln_final.weight"].numel()
    weights["text_projection"] = torch.ones(width, width)
    weights["logit_scale"] = torch.tensor(1.0)
    return weights
