"""The image autoencoder of Stable Diffusion: its own, or another in its place.

images [B, 3, H, W] in [-1, 1]; latents [B, 4, h, w], scaled to unit variance.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from models.limits import is_number
from models.pretrained import (
    build_network,
    load_network,
    one_line_errors,
    quiet_loading,
    resolve_source,
)
from models.single_file import SCALING_FACTOR, linear_attention, load_single_vae
from models.weight_files import fetch_file, fetch_weights, is_file, read_weights, weight_files

VAE_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICTURES, SIDE = 4, 128  # With which two VAEs are compared; 1/16 of the work of 512 px.
# TAESD was trained to give the latents of its model: their correlation is above 0.9. Latents of
# another model are as good as unrelated, about 0. Halfway nothing is known to lie.
LEAST_CORRELATION = 0.5


def load_vae(source: str, subfolder: str, dtype: torch.dtype) -> AutoencoderKL | AutoencoderTiny:
    """Load a VAE of either class from a folder or hub id.

    Raises:
        ValueError: it is absent, incomplete or of another kind; one line.
    """
    config = vae_config_file(source, subfolder)
    cls = VAE_CLASSES[config["_class_name"]]
    try:
        return load_network(cls, source, subfolder, dtype)
    except ValueError:
        weights = _convolutions(source, subfolder) if cls is AutoencoderKL else None
        if weights is None:
            raise
    with one_line_errors(source, subfolder), quiet_loading():
        return build_network(cls, config, linear_attention(weights), dtype)


def load_other_vae(
    source: str | Path, own: AutoencoderKL | AutoencoderTiny | None, dtype: torch.dtype
) -> AutoencoderKL | AutoencoderTiny:
    """Load a VAE in place of a model's own.

    Args:
        source: Local folder, hub id or file.
        own: The model's own, where it has one: the other's latents must be like its.
        dtype: Of the VAE.

    Raises:
        ValueError: it is absent, incomplete or of another kind, or its latents are those of
            another model; one line.
    """
    path = Path(source)
    if path.stem == Path(WEIGHTS).stem and path.with_name("config.json").is_file():
        source = path.parent  # The config next to it says what it is.
    if is_file(source):
        source = str(source)
        with one_line_errors(source):
            content, _ = read_weights(fetch_file(source))
            content = content if isinstance(content, dict) else {}
            nested = content.get("state_dict")
            content = nested if isinstance(nested, dict) else content
        scale = SCALING_FACTOR if own is None else own.config.scaling_factor
        vae = load_single_vae(source, content, dtype, scale)
    else:
        source = resolve_source(source, "a file, ")
        vae = load_vae(source, "vae" if Path(source, "model_index.json").is_file() else "", dtype)
    if own is not None:
        _check_latents(source, vae, own)
    return vae


def encode(vae: AutoencoderKL | AutoencoderTiny, images: Tensor) -> Tensor:
    """Return the scaled latents of images, the mode where the VAE gives a distribution."""
    output = vae.encode(images.to(vae.device, vae.dtype))
    # TAESD gives latents, which its factor of 1 leaves as they are; a VAE their distribution.
    latents = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
    return (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def cell_size(vae: AutoencoderKL | AutoencoderTiny) -> int:
    """Return how many pixels a latent cell has along an axis."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_config_file(source: str, subfolder: str) -> dict:
    """Return the config.json of a VAE, which names its class.

    Raises:
        ValueError: there is none, or it is another network's or has no usable scale; one line.
    """
    options = {"subfolder": subfolder, "local_files_only": Path(source).is_dir()}
    with one_line_errors(source, subfolder), quiet_loading():
        config = AutoencoderKL.load_config(source, **options)
        saved_class = config.get("_class_name")
        if saved_class not in VAE_CLASSES:
            raise ValueError(f"holds {saved_class}, not {' or '.join(VAE_CLASSES)}")
        scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
        if not is_number(scale) or scale <= 0:
            raise ValueError(f"scaling_factor is {scale!r}, no positive number")
        if not is_number(shift or 0.0):
            raise ValueError(f"shift_factor is {shift!r}, no number")
    return config


def latent_correlation(ours: Tensor, theirs: Tensor) -> float:
    """Return the correlation of two sets of latents [B, C, h, w], the mean over their channels."""
    ours, theirs = (x.float().transpose(0, 1).flatten(1) for x in (ours, theirs))  # [C, N]
    ours, theirs = (x - x.mean(1, keepdim=True) for x in (ours, theirs))
    return F.cosine_similarity(ours, theirs, dim=1).mean().item()


def synthetic_pictures() -> Tensor:
    """Return coloured noise of all sizes, the coarse strongest as in photographs, [4, 3, S, S]."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.zeros(PICTURES, 3, SIDE, SIDE)
    for cells in (2, 4, 8, 16, 32, 64):
        noise = torch.randn(PICTURES, 3, cells, cells, generator=generator) / cells**0.5
        pictures += F.interpolate(noise, (SIDE, SIDE), mode="bicubic")
    return pictures.clamp(-1, 1)


def _convolutions(source: str, subfolder: str) -> dict[str, Tensor] | None:
    """Return a VAE's weights if their attention is of 1x1 convolutions, otherwise None."""
    folder = Path(source, subfolder)
    names = weight_files(folder, "*") if Path(source).is_dir() else [WEIGHTS]
    if len(names) != 1:
        return None
    try:
        weights, _ = read_weights(fetch_weights(source, subfolder, names[0]))
    except Exception:  # Then the first error says more.
        return None
    attention = [v for k, v in weights.items() if ".attentions." in k and k.endswith("weight")]
    return weights if any(weight.ndim > 2 for weight in attention) else None


def _check_latents(
    source: str, vae: AutoencoderKL | AutoencoderTiny, own: AutoencoderKL | AutoencoderTiny
) -> None:
    """Refuse a VAE whose latents are another model's."""
    ours, theirs = ((x.config.latent_channels, cell_size(x)) for x in (vae, own))
    if ours != theirs:
        raise ValueError(
            f"{source}: its latents have {ours[0]} channels and cells of {ours[1]} px, "
            f"those of the model {theirs[0]} and {theirs[1]} px"
        )
    check_images(source, vae)
    ours, theirs = vae.config.scaling_factor, own.config.scaling_factor
    if ours != theirs and type(vae) is type(own):
        raise ValueError(f"{source}: scales its latents by {ours}, the model by {theirs}")
    latents = []
    for network in (vae, own):
        dtype = network.dtype
        with torch.no_grad(), quiet_loading():  # In float32, since a CPU may know nothing else.
            latents.append(encode(network.float(), synthetic_pictures()))
            network.to(dtype)
    ours, theirs = latents
    correlation = latent_correlation(ours, theirs)
    if not correlation >= LEAST_CORRELATION:
        raise ValueError(
            f"{source}: its latents are another model's: on test pictures their correlation with "
            f"those of the model's own VAE is {correlation:.2f}, not {LEAST_CORRELATION} or more"
        )


def check_images(source: str, vae: AutoencoderKL | AutoencoderTiny) -> None:
    """Refuse a VAE for anything but images of three channels.

    Raises:
        ValueError: it takes or gives another number; one line.
    """
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels != (3, 3):
        raise ValueError(
            f"{source}: the VAE takes images of {channels[0]} channels and gives {channels[1]}, "
            "not 3 and 3"
        )
