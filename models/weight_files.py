"""Files of weights: found, downloaded and read. Nothing in them is executed.

A source is a file, a local folder, a hub id `user/repo`, or a hub id and a file in it.
"""

import os
import re
import zipfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from harness.download import HUB_ID, check_downloaded

WEIGHT_SUFFIXES = (".safetensors", ".bin")
WEB_PAGE = re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE)
MORE_THAN_TENSORS = "is damaged, or holds more than tensors and numbers, which is never executed"
# How the names of weights begin, and what holds such names. The first that fits counts.
KINDS = (
    (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux model"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"conditioner\.embedders\.", "a Stable Diffusion XL model"),
    (r"(control_model|controlnet_cond_embedding|input_hint_block)\.", "a ControlNet"),
    (r"model\.diffusion_model\.|cond_stage_model\.", "a whole Stable Diffusion"),
    (r"lora_|lycoris_|.*[._](lora|lora_[A-Za-z]+|lora_linear_layer|hada_\w+|lokr_\w+)\b", "a LoRA"),
    (r"(image_proj|ip_adapter)\b", "an IP-Adapter"),
    (r"(string_to_param|emb_params|clip_[lg])$", "a textual inversion embedding"),
    (r"((text|vision)_model\.)?(encoder\.layers\.\d+\.self_attn|embeddings)\.", "a CLIP"),
    (r"(first_stage_model|vae)\.|(en|de)coder\.(conv_in|mid|mid_block|layers)\.", "a VAE"),
    (r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)\.", "a UNet"),
    (r"(backbone|superresolution)\.", "an EG3D generator"),
)


class Inert:
    """Stands for an object of a class that a file of torch.save names; it ignores its content."""

    def __init__(self, *_: object) -> None:
        """Ignore the arguments."""

    def __setstate__(self, _: object) -> None:
        """Ignore the state."""


def weight_files(
    folder: Path, pattern: str, suffixes: tuple[str, ...] = WEIGHT_SUFFIXES
) -> list[str]:
    """Return the names of a folder's weight files that match a pattern."""
    return sorted(file.name for file in folder.glob(pattern) if file.suffix in suffixes)


def find_weights(
    source: str | Path,
    subfolder: str,
    pattern: str,
    *usual: str,
    suffixes: tuple[str, ...] = WEIGHT_SUFFIXES,
) -> tuple[str, str, str]:
    """Find a weight file.

    Args:
        source: The file itself, a local folder, a hub id or a hub id and a file in it.
        subfolder: Where in a folder or hub id it is.
        pattern: What its name in a local folder looks like.
        usual: Its names if a folder holds several, most usual first; the first one on the hub.
        suffixes: How its name in a local folder may end.

    Returns:
        The folder or hub id, the subfolder in it and the file's name.

    Raises:
        ValueError: there is none, or several and none has a usual name.
    """
    path = Path(source)
    if os.path.isfile(source):  # os.path takes names that are too long, where Path raises.
        return str(path.parent), "", path.name
    if os.path.isdir(source):
        names = weight_files(path / subfolder, pattern, suffixes)
        known = [name for name in usual if name in names] or names
        if not known or (known is names and len(names) > 1):
            raise ValueError(f"{path / subfolder}: no {usual[0]} there; name one of {names}")
        return str(path), subfolder, known[0]
    on_hub = re.fullmatch(rf"({HUB_ID})(?:/(.+))?", str(source))
    if not on_hub:
        raise ValueError(f"{source} is neither a file, a folder nor a hub id (user/repo[/file])")
    folder, name = os.path.split(on_hub[2] or os.path.join(subfolder, usual[0]))
    return on_hub[1], folder, name


def is_file(source: str | Path) -> bool:
    """Whether a source is a file here, or else by its name a file of weights on the hub."""
    if os.path.exists(source):
        return os.path.isfile(source)
    pattern = rf"{HUB_ID}/.+\.(safetensors|ckpt|pt|pth|bin)"
    return re.fullmatch(pattern, str(source)) is not None


def fetch_file(source: str | Path) -> str:
    """Return the path of a file for which `is_file` holds, downloading it if need be."""
    return fetch_weights(*find_weights(source, "", "*", "model.safetensors"))


def fetch_weights(root: str, subfolder: str, name: str) -> str:
    """Return the path of a file that `find_weights` found, downloading it if need be."""
    if os.path.isdir(root):
        return os.path.join(root, subfolder, name)
    return hf_hub_download(root, name, subfolder=subfolder or None)


def read_weights(file: str | Path) -> tuple[dict, dict[str, str]]:
    """Read a .safetensors or a file of torch.save, whatever its name.

    Returns:
        What the file holds, usually {name: tensor}, and the header of a .safetensors.

    Raises:
        ValueError: it is none of both or damaged; the message names no file.
        OSError: it cannot be opened.
        SafetensorError: a .safetensors is damaged.
    """
    check_downloaded(file)
    with open(file, "rb") as opened:
        start = opened.read(64)
    if WEB_PAGE.match(start):
        raise ValueError("is a web page, not a file of weights")
    if start[8:9] == b"{":  # After the header's length, which can be any bytes.
        with safe_open(file, "pt") as weights:
            return {key: weights.get_tensor(key) for key in weights.keys()}, (
                weights.metadata() or {}
            )
    try:
        # Old checkpoints name classes of their trainer, which need not be known here.
        foreign = get_unsafe_globals_in_checkpoint(file) if zipfile.is_zipfile(file) else []
        with safe_globals([(Inert, name) for name in foreign]):
            options = {"map_location": "cpu", "mmap": zipfile.is_zipfile(file)}
            return torch.load(file, weights_only=True, **options), {}
    # torch raises a dozen types for damaged files, and advises to execute them.
    except Exception as error:
        raise ValueError(MORE_THAN_TENSORS) from error


def are_named_tensors(content: object) -> bool:
    """Whether what a file holds is {name: tensor}."""
    pairs = content.items() if isinstance(content, dict) else [(None, content)]
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in pairs)


def kind_of_weights(content: object) -> str | None:
    """Return what a file with this content is, in words, or None for an unknown kind."""
    if not isinstance(content, dict):
        return None
    keys = [key for key in content if isinstance(key, str)]
    for pattern, kind in KINDS:
        if any(re.match(pattern, key) for key in keys):
            return kind
    if len(content) == len(keys) == 1 and not keys[0].endswith((".weight", ".bias", ".alpha")):
        only = content[keys[0]]
        if isinstance(only, Tensor) and only.ndim <= 2:
            return "a textual inversion embedding"
    return None
