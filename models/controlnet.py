"""The ControlNet that makes depth a condition of Stable Diffusion."""

import os
import re
import warnings
from pathlib import Path

import torch
from diffusers import ControlNetModel

from models.pretrained import load_network, one_line_errors, quiet_loading, resolve_source

# What a config must say, since anything else would be ignored here or fail in the first step.
WANTED = {
    "conditioning_channels": 3,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "global_pool_conditions": False,
    "controlnet_conditioning_channel_order": "rgb",
}
AS_THE_UNET = ("cross_attention_dim", "in_channels", "block_out_channels", "layers_per_block")
DEPTH = re.compile("depth|midas|zoe|leres", re.IGNORECASE)
OTHER_CONDITIONS = re.compile(
    "canny|openpose|dwpose|pose|scribble|sketch|seg(?![a-z])|segmentation|normal(?:bae)?(?![a-z])"
    "|line_?art|hed(?![a-z])|pidi|mlsd|tile|inpaint|shuffle|ip2p|pix2pix|soft_?edge|qr(?![a-z])"
    "|qrcode|brightness|recolor|landmark",
    re.IGNORECASE,
)


def load_controlnet(source: str | Path, dtype: torch.dtype) -> ControlNetModel:
    """Load a ControlNet, and warn of one whose name says that it is for another condition.

    Raises:
        ValueError: it is absent, incomplete or no ControlNet; one line.
    """
    if os.path.isfile(source):
        raise ValueError(
            f"{source} is a file; a ControlNet is given as a diffusers folder or hub id, such as "
            "lllyasviel/control_v11f1p_sd15_depth"
        )
    source = resolve_source(source)
    controlnet = load_network(ControlNetModel, source, dtype=dtype)
    with one_line_errors(source), quiet_loading():  # The network's own config names the source.
        saved = ControlNetModel.load_config(source, local_files_only=Path(source).is_dir())
    if condition := other_condition(source, str(saved.get("_name_or_path") or "")):
        warnings.warn(
            f"{source} seems to be a ControlNet for {condition}, and is given depth here",
            stacklevel=3,
        )
    return controlnet


def other_condition(source: str, name_or_path: str) -> str | None:
    """Return which condition other than depth the names of a ControlNet speak of, or None.

    Args:
        source: Its folder or hub id, of which the last part counts.
        name_or_path: Where it was trained or saved, by its config.
    """
    for name in (source, name_or_path):
        name = Path(name).name
        if DEPTH.search(name):
            return None
        if found := re.search(rf"(?<![a-zA-Z])({OTHER_CONDITIONS.pattern})", name, re.IGNORECASE):
            return found[1].lower()
    return None
