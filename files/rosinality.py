"""StyleGAN2 in the files of rosinality's stylegan2-pytorch, and of what was trained from them.

A .pt of that code holds a state dict `g_ema` and often `latent_avg`. The network is the official
one under other names: nothing is flipped or scaled. StyleGAN-NADA and StyleGAN-Fusion write
`g_ema` alone. A state dict with the official names, which holds no configuration either, is read by
its shapes too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from files.pickles import Stored
from models.layers import fir_filter
from models.stylegan2 import MappingNetwork, StyleGAN2Generator

MEAN_OF = 4096  # Codes whose mean stands for a missing w_avg, as in StyleGAN-Fusion.
MAX_RESOLUTION = 2048  # A guard against files.
LAYER = {  # Parts of a layer there, and what they are called here.
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength",
    "activate.bias": "bias",
}
TO_RGB = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "bias": "bias",
}
FILTERS = r".*\.(blur|upsample)\.kernel"  # The resampling filter, which all networks share.

State = Mapping[str, Stored]


def is_stylegan2(content: State) -> bool:
    """Whether a state dict is one of StyleGAN2, under its own names or rosinality's."""
    return "synthesis.b4.const" in content or {"input.input", "style.1.weight"} <= content.keys()


def read_stylegan2(
    path: Path, content: State, average: Stored | None
) -> tuple[dict, dict[str, Tensor]]:
    """Read a state dict of StyleGAN2, and say on stderr what it does not hold.

    Args:
        path: The file, for its name.
        content: Its tensors, under the official names or rosinality's.
        average: What stood beside them as `latent_avg`.

    Returns:
        The header and the tensors (see `generators.save_generator`).

    Raises:
        ValueError: the tensors are not those of such a network; the message names no file.
    """
    content = dict(content)
    inner = content.pop("latent_avg", None)
    average = inner if average is None else average
    if "synthesis.b4.const" not in content:
        content = {official_name(k): v for k, v in content.items() if not re.fullmatch(FILTERS, k)}
    content |= {} if average is None else {"mapping.w_avg": average}
    kwargs = arguments(content)
    with torch.device("meta"):
        wanted = StyleGAN2Generator(**kwargs).state_dict()
    if unknown := sorted(content.keys() - wanted.keys()):
        raise ValueError(f"{unknown[0]} belongs to no StyleGAN2 of {kwargs['img_resolution']} px")

    tensors, missing, most = {}, [], path.stat().st_size
    generator = torch.Generator().manual_seed(0)
    for name, like in wanted.items():
        if name in content:
            size = content[name].shape()
            if [n for n in size if n != 1] != [n for n in like.shape if n != 1]:
                raise ValueError(f"{name} must be {list(like.shape)}, got {list(size)}")
            most -= prod(size)  # A small file can repeat a tensor without end.
            if most < 0:
                raise ValueError("it repeats its tensors too often for a file of its size")
            tensors[name] = content[name].load().float().reshape(like.shape)
        elif name.endswith("resample_filter"):
            tensors[name] = fir_filter()
        elif name.endswith("noise_const"):
            missing.append("noise buffers")
            tensors[name] = torch.randn(like.shape, generator=generator)
        elif name != "mapping.w_avg":
            raise ValueError(f"{name} is missing")
    if "mapping.w_avg" not in tensors:
        missing.append("average code")
        tensors["mapping.w_avg"] = mean_code(kwargs, tensors)
    if missing:
        names = " and ".join(dict.fromkeys(missing))
        print(f"note: {path} holds no {names}; made from a fixed seed", file=sys.stderr)
    return {"format": "stylegan2-safetensors", "init_kwargs": kwargs}, tensors


def official_name(name: str) -> str:
    """Return the official name of a tensor of rosinality's.

    Raises:
        ValueError: there is none.
    """
    if name == "mapping.w_avg":
        return name
    if match := re.fullmatch(r"style\.(\d{1,2})\.(weight|bias)", name):
        return f"mapping.fc{int(match[1]) - 1}.{match[2]}"
    if name == "input.input":
        return "synthesis.b4.const"
    if match := re.fullmatch(r"noises\.noise_(\d{1,2})", name):
        return f"synthesis.{layer_name(int(match[1]))}.noise_const"
    if match := re.fullmatch(r"(?:conv1|convs\.(\d{1,2}))\.(.+)", name):
        if match[2] in LAYER:
            number = 0 if match[1] is None else int(match[1]) + 1
            return f"synthesis.{layer_name(number)}.{LAYER[match[2]]}"
    if match := re.fullmatch(r"to_rgb(?:1|s\.(\d{1,2}))\.(.+)", name):
        if match[2] in TO_RGB:
            block = 0 if match[1] is None else int(match[1]) + 1
            return f"synthesis.b{4 << block}.torgb.{TO_RGB[match[2]]}"
    raise ValueError(f"{name[:100]} is no part of rosinality's generator")


def layer_name(number: int) -> str:
    """Return the official name of a 3x3 layer by its number, from coarse to fine."""
    return f"b{4 << (number + 1) // 2}.conv{(number + 1) % 2}"


def arguments(content: State) -> dict:
    """Return the constructor arguments of a network by the shapes of its official names.

    Raises:
        ValueError: some are missing, or have no shape that fits.
    """
    blocks = [re.match(r"synthesis\.b(\d{1,5})\.", name) for name in content]
    resolution = max((int(match[1]) for match in blocks if match), default=0)
    if not 4 <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"it has blocks to {resolution} px; a generator has 4 to {MAX_RESOLUTION}")
    layers = sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in content)
    z, fine = shape(content, "mapping.fc0.weight"), f"synthesis.b{resolution}"
    if len(z) != 2:
        raise ValueError(f"mapping.fc0.weight must have two axes, got {list(z)}")
    labels = shape(content, "mapping.embed.weight") if "mapping.embed.weight" in content else ()
    coarse = prod(shape(content, "synthesis.b4.const")) // 16
    channels = prod(shape(content, f"{fine}.conv1.bias"))
    return {
        "z_dim": z[1] - (z[0] if labels else 0),
        "c_dim": labels[1] if len(labels) == 2 else 0,
        "w_dim": z[0],
        "img_resolution": resolution,
        "img_channels": prod(shape(content, f"{fine}.torgb.bias")),
        "mapping_kwargs": {"num_layers": layers},
        "synthesis_kwargs": {"channel_base": channels * resolution, "channel_max": coarse},
    }


def shape(content: State, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor.

    Raises:
        ValueError: it is missing, or no shape.
    """
    if name not in content:
        raise ValueError(f"{name} is missing")
    return content[name].shape()


@torch.no_grad()
def mean_code(kwargs: dict, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the codes that a mapping network makes of random latents, [D]."""
    z_dim, c_dim, w_dim = kwargs["z_dim"], kwargs["c_dim"], kwargs["w_dim"]
    if c_dim:
        return torch.zeros(w_dim)  # Every class has its own.
    with torch.device("meta"):
        mapping = MappingNetwork(z_dim, 0, w_dim, 1, **kwargs["mapping_kwargs"])
    own = {k.removeprefix("mapping."): v for k, v in tensors.items() if k.startswith("mapping.")}
    mapping.load_state_dict(own | {"w_avg": torch.zeros(w_dim)}, assign=True)
    z = torch.randn(MEAN_OF, z_dim, generator=torch.Generator().manual_seed(0))
    return mapping(z, None)[:, 0].mean(0)
