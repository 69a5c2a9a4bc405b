"""The parts of a Stable Diffusion 1.x or 2.x: loaded from where they are, and checked for fit.

A source is a local diffusers folder, a hub id `user/repo`, or a checkpoint in one file, which may
be `user/repo/file` on the hub.
"""

import json
import re
import warnings
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDPMScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from harness.download import check_downloaded
from models.controlnet import AS_THE_UNET, WANTED
from models.pretrained import (
    load_network,
    load_tokenizer,
    one_line_errors,
    quiet_loading,
    resolve_source,
)
from models.single_file import (
    OTHER_INPUTS,
    VAE,
    load_single_scheduler,
    load_single_text_encoder,
    load_single_tokenizer,
    load_single_unet,
    load_single_vae,
    read_single_file,
)
from models.vae import cell_size, check_images, load_other_vae, load_vae
from models.weight_files import fetch_file, is_file

SINGLE_FILES = (".safetensors", ".ckpt")
MAX_STEPS = 100_000  # In a noise schedule; Stable Diffusion has 1000.
MAX_CELLS = 512  # Along a side of latents; Stable Diffusion has 64 or 96.
CELLS_OF_VELOCITY = 96  # Version 2's model for 768 px is the one that predicts velocity.
OLD_VERSIONS = re.compile(r"0\.[0-8](?!\d)")  # Versions of diffusers that wrote 32 cells, not 64.
USUAL_CELLS = 64
TEXT_WIDTHS = {"768": " (Stable Diffusion 1.x)", "1024": " (Stable Diffusion 2.x)"}
# What a config must say, since anything else would be ignored here or fail in the first step.
UNET_CONFIG = {
    "time_cond_proj_dim": None,  # Guidance-distilled (LCM) networks have it, and give no scores.
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
}


def load_parts(
    source: str | Path, vae: str | Path | None, dtype: torch.dtype, vae_dtype: torch.dtype
) -> dict:
    """Load VAE, UNet, text encoder, tokenizer and scheduler.

    Args:
        source: Folder, hub id or file.
        vae: Folder, hub id or file of another VAE, or None.
        dtype: Of UNet and text encoder.
        vae_dtype: Of the VAE.

    Returns:
        {"vae", "unet", "text_encoder", "tokenizer", "scheduler"}.

    Raises:
        ValueError: a part is absent or unreadable; one line.
    """
    if is_file(source):
        parts = _load_single_file(str(source), vae is None, dtype, vae_dtype)
    else:
        source = resolve_source(source, "a file, ")
        if Path(source).is_dir():
            check_index(Path(source) / "model_index.json")
        parts = {
            "scheduler": load_scheduler(source),
            "unet": load_network(UNet2DConditionModel, source, "unet", dtype),
            "text_encoder": load_network(CLIPTextModel, source, "text_encoder", dtype),
            "tokenizer": load_tokenizer(source, "tokenizer"),
            "vae": load_vae(source, "vae", vae_dtype),
        }
        _repair_size(source, parts["unet"])
    if vae is not None:
        parts["vae"] = load_other_vae(vae, parts["vae"], vae_dtype)
    return parts


def check_index(path: Path) -> None:
    """Refuse a folder that is no diffusers pipeline, or one of another family.

    Raises:
        ValueError: so it is; one line.
    """
    if not path.is_file():
        files = [file.name for file in path.parent.glob("*") if file.suffix in SINGLE_FILES]
        hint = f"; a checkpoint in one file is given by its own path ({files[0]})" if files else ""
        raise ValueError(f"{path.parent}: not a diffusers folder, it has no model_index.json{hint}")
    with one_line_errors(str(path.parent), path.name):
        check_downloaded(path)
        pipeline = json.loads(path.read_text())["_class_name"]
        if not re.match("StableDiffusion(?!3|.*XL)", str(pipeline)):
            raise ValueError(f"holds a {pipeline}, not Stable Diffusion 1.x or 2.x")


def load_scheduler(source: str) -> DDPMScheduler:
    """Load the noise schedule of whatever scheduler the folder names, as DDPM's.

    Raises:
        ValueError: there is none, or none that can be calculated with; one line.
    """
    local = Path(source).is_dir()
    with one_line_errors(source, "scheduler"), quiet_loading():
        file = Path(source, "scheduler", "scheduler_config.json")
        if file.is_file():
            check_downloaded(file)
        config = DDPMScheduler.load_config(source, subfolder="scheduler", local_files_only=local)
        if "beta_start" not in config:
            raise ValueError(f"{config.get('_class_name')} has no noise schedule in betas")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type is {prediction}, not epsilon or v_prediction")
        steps = config.get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"num_train_timesteps is {steps!r}, no number from 1 to {MAX_STEPS}")
        scheduler = DDPMScheduler.from_config(config)
        shares = scheduler.alphas_cumprod
        if not shares.isfinite().all():
            raise ValueError("its noise schedule is not finite")
        falls = len(shares) and shares[0] <= 1 and (shares.diff() <= 0).all()
        # Nothing of the signal may be left at the last step, as in version 2.1, but not before.
        if not falls or (shares[:-1] <= 0).any() or not 0 <= shares[-1] < 1:
            raise ValueError("its noise schedule does not fall from at most 1 to at least 0")
    return scheduler


def check_fit(
    source: str,
    controlnet_source: str | None,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL | AutoencoderTiny,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    controlnet: ControlNetModel | None = None,
) -> None:
    """Refuse parts that load but cannot work together, or with the losses.

    Raises:
        ValueError: they do not fit; one line.
    """
    check_images(f"{source}/vae", vae)
    kind = OTHER_INPUTS.get(unet.config.in_channels)
    if kind and unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(f"{source} is {kind}; needed is one for text to image with 4 channels")
    pairs = [
        (source, "cross_attention_dim", unet, "hidden_size", text_encoder),
        (source, "in_channels", unet, "latent_channels", vae),
        (source, "out_channels", unet, "in_channels", unet),
    ]
    wanted = [(source, unet, UNET_CONFIG)]
    if controlnet is not None:
        pairs += [(controlnet_source, key, controlnet, key, unet) for key in AS_THE_UNET]
        wanted += [(controlnet_source, controlnet, WANTED)]

    for where, network, config in wanted:
        for key, value in config.items():
            if network.config.get(key, value) != value:
                name, given = type(network).__name__, network.config[key]
                raise ValueError(f"{where}: {key} of its {name} is {given!r}, not {value!r}")
    for where, key, network, other_key, other in pairs:
        ours, theirs = str(getattr(network.config, key)), str(getattr(other.config, other_key))
        if ours != theirs:
            raise ValueError(
                f"{where}: {key} of its {type(network).__name__} is "
                f"{ours}{TEXT_WIDTHS.get(ours, '')}, but {other_key} of the "
                f"{type(other).__name__} {theirs}{TEXT_WIDTHS.get(theirs, '')}"
            )
    cells = unet.config.sample_size
    if type(cells) is not int or not 1 <= cells <= MAX_CELLS:
        raise ValueError(
            f"{source}/unet: sample_size is {cells!r}, no number of cells from 1 to {MAX_CELLS}"
        )
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {len(tokenizer)} words, the text encoder "
            f"{text_encoder.config.vocab_size}"
        )
    if controlnet is not None:
        given = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
        if given != cell_size(vae):
            raise ValueError(
                f"{controlnet_source}: shrinks depth to 1 / {given}, "
                f"latents are 1 / {cell_size(vae)} of an image"
            )


def _load_single_file(
    source: str, with_vae: bool, dtype: torch.dtype, vae_dtype: torch.dtype
) -> dict:
    """Load the parts of a checkpoint; its VAE is None if it has none and another one is given."""
    with one_line_errors(source):
        path = fetch_file(source)
    file = read_single_file(path)
    unet = load_single_unet(file, dtype)
    parts = {
        "tokenizer": load_single_tokenizer(file),
        "scheduler": load_single_scheduler(file, unet),
        "unet": unet,
        "text_encoder": load_single_text_encoder(file, dtype),
        "vae": None,
    }
    if any(key.startswith(VAE) for key in file.weights):
        parts["vae"] = load_single_vae(path, file.weights, vae_dtype)
    elif with_vae:
        raise ValueError(f"{source}: holds no VAE (first_stage_model.*); name one with --vae")
    if file.is_v2 and parts["scheduler"].config.prediction_type == "v_prediction":
        unet.register_to_config(sample_size=CELLS_OF_VELOCITY)
    return parts


def _repair_size(source: str, unet: UNet2DConditionModel) -> None:
    """Correct the size in folders that diffusers before 0.9.0 wrote, as its pipelines do."""
    config, cells = unet.config, unet.config.sample_size
    version = str(config.get("_diffusers_version", ""))
    if OLD_VERSIONS.match(version) and type(cells) is int and 0 < cells < USUAL_CELLS:
        unet.register_to_config(sample_size=USUAL_CELLS)
        warnings.warn(
            f"{source}/unet: sample_size {cells} is a mistake of diffusers {version}; "
            f"{USUAL_CELLS} is used, as in diffusers' pipelines",
            stacklevel=4,
        )
