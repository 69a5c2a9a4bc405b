"""The parts of a Stable Diffusion: what fits together, and what is refused."""

import json
import shutil
import warnings

import diffusers
import huggingface_hub.constants
import pytest
import torch
import transformers
from prior_fixtures import PLUS, drop_weight, edit_json, edit_weights, replace, spoil
from tiny_prior import build_prior

from models.diffusion import DiffusionPrior


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ],
)
def test_schedule_and_prediction_are_those_of_whatever_scheduler_a_folder_names(
    scheduler, options, copy
):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = getattr(diffusers, scheduler)(**betas, **options)
    theirs.save_pretrained(copy / "scheduler")
    prior = DiffusionPrior.from_pretrained(copy)
    torch.testing.assert_close(prior.alphas_cumprod, theirs.alphas_cumprod)
    assert prior.predicts_velocity == (options.get("prediction_type") == "v_prediction")


def test_schedule_is_the_folders_own(prior):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    torch.testing.assert_close(prior.alphas_cumprod, (1 - betas).cumprod(0).float())


DAMAGES = {
    "no_pipeline": (lambda d: (d / "model_index.json").unlink(), "model_index.json"),
    "no_unet": (lambda d: shutil.rmtree(d / "unet"), "unet"),
    "no_tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer"),
    "no_encoder": (lambda d: shutil.rmtree(d / "text_encoder"), "text_encoder"),
    "other_class": (lambda d: replace(d / "controlnet", d / "unet"), "UNet2DConditionModel"),
    "other_network": (lambda d: replace(d / "unet", d / "vae"), "AutoencoderKL"),
    "image_for_text": (
        lambda d: replace(d / "text_encoder", d / "ip_adapter/models/image_encoder"),
        "absent or misshapen",
    ),
    "text_for_image": (
        lambda d: replace(d / "ip_adapter/models/image_encoder", d / "text_encoder"),
        "absent or misshapen",
    ),
    "lost_weight": (
        lambda d: drop_weight(
            d / "unet/diffusion_pytorch_model.safetensors", "mid_block.resnets.0.conv1.weight"
        ),
        "mid_block.resnets.0.conv1.weight",
    ),
    "lost_text_weight": (
        lambda d: drop_weight(d / "text_encoder/model.safetensors", "final_layer_norm.weight"),
        "final_layer_norm.weight",
    ),
    "lost_adapter_weight": (
        lambda d: drop_weight(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors", "ip_adapter.3.to_k_ip.weight"
        ),
        "3.to_k_ip",
    ),
    "lost_projection_weight": (
        lambda d: drop_weight(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors", "image_proj.norm.weight"
        ),
        "norm.weight",
    ),
    "truncated": (
        lambda d: (d / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x08\0\0\0"),
        "vae",
    ),
    "fewer_layers_than_weights": (
        lambda d: edit_json(d / "text_encoder/config.json", num_hidden_layers=1),
        "leaves out",
    ),
    "no_middle": (lambda d: edit_json(d / "unet/config.json", mid_block_type=None), "mid_block"),
    "fewer_layers_of_the_image_encoder": (
        lambda d: edit_json(d / "ip_adapter/models/image_encoder/config.json", num_hidden_layers=1),
        "leaves out",
    ),
    "no_projection": (
        lambda d: edit_weights(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors",
            lambda s: {k: v for k, v in s.items() if not k.startswith("image_proj.")},
        ),
        "holds no projection",
    ),
    "no_projecting_weight": (
        lambda d: drop_weight(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors", "image_proj.proj.weight"
        ),
        "holds no projection",
    ),
    "surplus_weight": (
        lambda d: edit_weights(
            d / "vae/diffusion_pytorch_model.safetensors",
            lambda s: s | {"encoder.extra.weight": torch.ones(1)},
        ),
        "encoder.extra.weight",
    ),
    "surplus_adapter_weight": (
        lambda d: edit_weights(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors",
            lambda s: s | {"ip_adapter.99.to_k_ip.weight": torch.ones(1)},
        ),
        "no place for ip_adapter.99",
    ),
    "nan_adapter": (
        lambda d: edit_weights(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors",
            lambda s: {key: value * torch.nan for key, value in s.items()},
        ),
        "is not finite",
    ),
    "nan_unet": (lambda d: spoil(d / "unet", "nan"), "is not finite"),
    "nan_vae": (lambda d: spoil(d / "vae", "nan"), "is not finite"),
    "infinite_text_encoder": (lambda d: spoil(d / "text_encoder", "inf"), "is not finite"),
    "infinite_controlnet": (lambda d: spoil(d / "controlnet", "-inf"), "is not finite"),
    "sizes": (lambda d: edit_json(d / "unet/config.json", sample_size=[8, 8]), "sample_size"),
    "no_size": (lambda d: edit_json(d / "unet/config.json", sample_size=None), "sample_size"),
    "no_index": (lambda d: (d / "model_index.json").write_text("{"), "model_index.json"),
    "xl": (
        lambda d: edit_json(d / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "XL",
    ),
    "nan_schedule": (
        lambda d: edit_json(d / "scheduler/scheduler_config.json", beta_start=float("nan")),
        "not finite",
    ),
    "misshapen": (lambda d: edit_json(d / "vae/config.json", latent_channels=8), "vae"),
    "class_labels": (
        lambda d: edit_json(d / "unet/config.json", class_embed_type="identity"),
        "class_embed_type",
    ),
    "vae_of_no_kind": (lambda d: replace(d / "vae", d / "unet"), "UNet2DConditionModel"),
    "bad_json": (lambda d: (d / "unet/config.json").write_text("{"), "unet"),
    "bad_vocabulary": (lambda d: (d / "vocabulary.json").write_text("[]"), "vocabulary.json"),
    "flow": (
        lambda d: (d / "scheduler/scheduler_config.json").write_text(
            '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
        ),
        "FlowMatch",
    ),
    "sample": (
        lambda d: edit_json(d / "scheduler/scheduler_config.json", prediction_type="sample"),
        "prediction_type",
    ),
    "unnamed_adapter": (
        lambda d: (
            shutil.copy(d / PLUS, d / "ip_adapter/models/ip-adapter-other.bin")
            and (d / "ip_adapter/models/ip-adapter_sd15.safetensors").unlink()
        ),
        "ip-adapter-other.bin",
    ),
}


# What would be a traceback or NaNs in the first step: part, setting, value.
BAD_NUMBERS = [
    ("unet", "sample_size", 0),
    ("unet", "sample_size", 10**9),
    ("unet", "sample_size", True),
    *[("vae", "scaling_factor", bad) for bad in (None, 0, -1.0, "1", 1e30, torch.nan, torch.inf)],
    *[("vae", "shift_factor", bad) for bad in ("1", 1e30, torch.nan)],
    *[("scheduler", "num_train_timesteps", bad) for bad in (0, -1, 10**9, 1000.0, None)],
    *[("scheduler", "beta_end", bad) for bad in (5.0, 1.5, torch.nan)],
    ("scheduler", "trained_betas", [0.1, 1.0, 0.1]),
    ("scheduler", "trained_betas", [0.1, 0.1, 1.1]),
    ("scheduler", "trained_betas", [-0.1, 0.1, 0.1]),
    ("scheduler", "trained_betas", [0.0, 0.0, 0.0]),
    ("scheduler", "trained_betas", []),
]


@pytest.mark.parametrize(("part", "key", "value"), BAD_NUMBERS)
def test_number_that_cannot_be_calculated_with_is_refused_in_one_line(part, key, value, copy):
    name = "scheduler_config" if part == "scheduler" else "config"
    edit_json(copy / part / f"{name}.json", **{key: value})
    reason = "noise schedule" if "beta" in key else key
    with pytest.raises(ValueError, match=f"^{copy}/{part}: .*{reason}") as caught:
        DiffusionPrior.from_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pipeline", ["FluxPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline", None]
)
def test_folder_of_another_pipeline_is_refused(pipeline, copy):
    edit_json(copy / "model_index.json", _class_name=pipeline)
    with pytest.raises(ValueError, match=f"^{copy}/model_index.json: holds a {pipeline}, not"):
        DiffusionPrior.from_pretrained(copy)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_in_one_line(damage, copy):
    change, reason = DAMAGES[damage]
    change(copy)
    with pytest.raises(ValueError) as caught:
        DiffusionPrior.from_pretrained(copy)
    message = str(caught.value)
    assert message.startswith(str(copy)) and "\n" not in message and len(message) < 500
    assert reason in message.removeprefix(str(copy))


@pytest.mark.parametrize("part", ["text_encoder", "controlnet", "ip_adapter"])
def test_parts_of_different_attention_widths_are_refused(part, folder, copy, tmp_path):
    wide = build_prior(tmp_path / "wide", text_width=48)
    replace(copy / part, wide / part)
    with pytest.raises(ValueError, match="48") as caught:
        DiffusionPrior.from_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "source"),
    [("ip_adapter", "nowhere"), ("ip_adapter", "/no/adapter.bin"), ("lora", "x" * 300)],
)
def test_weights_that_are_nowhere_are_refused_by_name(kind, source, folder):
    option = {"loras": [(source, 1.0)]} if kind == "lora" else {kind: source}
    with pytest.raises(ValueError, match=f"^{source} is neither a file, a folder nor a hub id"):
        DiffusionPrior.from_pretrained(folder, **option)


def test_hub_id_without_a_network_is_refused_in_one_line(folder, monkeypatch, capfd, recwarn):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sources = dict.fromkeys(["source", "controlnet", "ip_adapter", "vae"], "no-user/no-model")
    name = "no-user/no-model/loras/style.safetensors"
    sources |= {"loras": [(name, 1.0)], "embeddings": [name]}
    for kind, source in sources.items():
        with pytest.raises(ValueError, match="^no-user/no-model.*hub") as caught:
            DiffusionPrior.from_pretrained(**({"source": folder} | {kind: source}))
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize(
    ("version", "cells", "used"),
    [("0.6.0", 8, 64), ("0.8.1", 32, 64), ("0.9.0", 8, 8), ("0.10.2", 8, 8), ("0.6.0", 96, 96)],
)
def test_size_in_old_folders_is_repaired_as_in_diffusers_pipelines(
    version, cells, used, copy, recwarn
):
    edit_json(copy / "unet/config.json", sample_size=cells, _diffusers_version=version)
    prior = DiffusionPrior.from_pretrained(copy)
    said = [str(warning.message) for warning in recwarn.list]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(copy, safety_checker=None)
    assert prior.image_size == 8 * theirs.unet.config.sample_size == 8 * used
    line = f"{copy}/unet: sample_size {cells} is a mistake of diffusers {version}; 64 is used"
    assert [message.startswith(line) for message in said] == [True] * (used != cells)


def rebuild(folder, cls, **changes):
    """Write a network of a changed config with random weights in place of the folder's."""
    config = json.loads((folder / "config.json").read_text()) | changes
    shutil.rmtree(folder)
    if hasattr(cls, "from_config"):
        cls.from_config(config).save_pretrained(folder)
    else:
        cls(cls.config_class(**config)).save_pretrained(folder)


KL, UNET = diffusers.AutoencoderKL, diffusers.UNet2DConditionModel
VISION = transformers.CLIPVisionModelWithProjection
MISFITS = {
    "LDM3D's VAE": ("vae", KL, {"in_channels": 6, "out_channels": 6}, "6 channels and gives 6"),
    "VAE in": ("vae", KL, {"in_channels": 1}, "1 channels and gives 3"),
    "VAE out": ("vae", KL, {"out_channels": 4}, "3 channels and gives 4"),
    "latents": ("vae", KL, {"latent_channels": 16}, "in_channels of its UNet.* is 4, but .* 16"),
    "inpainting": ("unet", UNET, {"in_channels": 9}, "is an inpainting model"),
    "depth": ("unet", UNET, {"in_channels": 5}, "is a depth model of version 2"),
    "pix2pix": ("unet", UNET, {"in_channels": 8}, "is an InstructPix2Pix model"),
    "learned variance": ("unet", UNET, {"out_channels": 8}, "out_channels of its UNet.* is 8"),
    "text width": ("unet", UNET, {"cross_attention_dim": 64}, "is 64, but hidden_size .* 32"),
    "image channels": (
        "ip_adapter/models/image_encoder",
        VISION,
        {"num_channels": 4},
        "takes images of 4 channels, not 3",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_parts_that_load_but_do_not_fit_are_refused_at_once(misfit, copy):
    part, cls, changes, reason = MISFITS[misfit]
    rebuild(copy / part, cls, **changes)
    shutil.rmtree(copy / "controlnet")
    with pytest.raises(ValueError, match=f"^{copy}.*{reason}") as caught:
        DiffusionPrior.from_pretrained(copy)
    assert "\n" not in str(caught.value)
