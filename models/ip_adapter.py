"""IP-Adapters, which make pictures a condition of Stable Diffusion: base and Plus."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from models.pretrained import load_network, one_line_errors, quiet_loading
from models.weight_files import fetch_weights, find_weights, kind_of_weights, read_weights

FILE = "ip-adapter_sd15.safetensors"  # The usual one of several in a folder.


def load_ip_adapter(
    source: str | Path, unet: UNet2DConditionModel
) -> CLIPVisionModelWithProjection:
    """Put an IP-Adapter into the UNet and return its image encoder.

    No attention processor may be set on the UNet afterwards: that would remove the adapter.

    Raises:
        ValueError: it is absent, incomplete or of another model; one line.
    """
    folder, subfolder, file = find_weights(source, "models", "ip-adapter*", FILE)
    inside = f"{subfolder}/{file}".lstrip("/")
    with one_line_errors(folder, inside):
        weights = _read_adapter(fetch_weights(folder, subfolder, file), unet)
    encoder_folder = f"{subfolder}/image_encoder".lstrip("/")
    encoder = load_network(CLIPVisionModelWithProjection, folder, encoder_folder, unet.dtype)
    with one_line_errors(folder, encoder_folder):
        if encoder.config.num_channels != 3:
            raise ValueError(f"takes images of {encoder.config.num_channels} channels, not 3")
    with one_line_errors(folder, inside), quiet_loading():
        _put_into(unet, weights)
        projection = unet.encoder_hid_proj.image_projection_layers[0]
        if isinstance(projection, ImageProjection):
            takes, gives = projection.image_embeds.in_features, encoder.config.projection_dim
        elif isinstance(projection, IPAdapterPlusImageProjection):
            takes, gives = projection.proj_in.in_features, encoder.config.hidden_size
        else:
            raise ValueError(f"{type(projection).__name__}: only base and Plus are supported")
        if takes != gives:
            raise ValueError(f"takes embeddings of width {takes}, its encoder gives {gives}")
    return encoder


def is_plus(unet: UNet2DConditionModel) -> bool:
    """Whether the IP-Adapter in a UNet attends to all tokens of a picture, not to one embedding."""
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    return isinstance(projection, IPAdapterPlusImageProjection)


def _put_into(unet: UNet2DConditionModel, weights: dict[str, dict[str, Tensor]]) -> None:
    """Let diffusers add the adapter's layers to a UNet."""
    from diffusers.loaders import IPAdapterMixin  # Here, since its import logs warnings.

    loader = IPAdapterMixin()  # What pipelines inherit; of a pipeline it needs the UNet only.
    loader.unet = unet
    options = {"image_encoder_folder": None, "low_cpu_mem_usage": False}
    # Low memory use would leave weights that the file lacks empty instead of raising.
    try:
        loader.load_ip_adapter(weights, None, None, **options)
    except RuntimeError as error:  # What torch makes of weights that do not fit.
        raise ValueError(f"is incomplete or of another model: {error}") from error


def _read_adapter(file: str, unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """Read an IP-Adapter, and refuse one of which diffusers would leave something out, or NaNs."""
    content, _ = read_weights(file)
    if not isinstance(content, dict):
        raise ValueError("holds something else than named tensors")
    weights = content
    if "ip_adapter" in weights:  # A .bin, which nests what a .safetensors names with a dot.
        weights = {f"{part}.{key}": w for part, ws in weights.items() for key, w in ws.items()}
    if not weights.keys() & {"image_proj.proj.weight", "image_proj.latents"}:
        kind = kind_of_weights(weights)
        of = f" but {kind}" if kind and kind != "an IP-Adapter" else ""
        raise ValueError(f"holds no projection of a base or Plus IP-Adapter (image_proj){of}")
    count = sum(name.endswith("attn2.processor") for name in unet.attn_processors)
    known = {f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight" for i in range(count) for side in "kv"}
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, weight in weights.items():
        part, _, name = key.partition(".")
        if part != "image_proj" and key not in known:
            raise ValueError(f"is of another kind or model: no place for {key}")
        if not torch.as_tensor(weight).isfinite().all():
            raise ValueError(f"{key} is not finite")
        parts[part][name] = weight
    return parts
