"""The VAE: its own, another in its place, and what is refused."""

import json
import shutil
import time

import diffusers
import pytest
import torch
from prior_fixtures import edit_json, edit_weights, picture
from safetensors.torch import load_file, save_file
from single_file_writer import first_names
from tiny_prior import build_prior, build_taesd

from models.diffusion import DiffusionPrior
from models.vae import encode, latent_correlation, synthetic_pictures


def test_vae_of_no_scale_is_refused_in_place_of_the_models_own_too(folder, copy):
    edit_json(copy / "vae/config.json", scaling_factor=None)
    with pytest.raises(ValueError, match=f"^{copy}/vae: scaling_factor is None"):
        DiffusionPrior.from_pretrained(folder, vae=copy)


def tuned(file):
    """Change the weights of a VAE a little, as in one that was tuned further."""
    torch.manual_seed(0)
    edit_weights(file, lambda s: {k: v * (1 + 0.02 * torch.randn(v.shape)) for k, v in s.items()})


def test_vae_of_another_folder_replaces_the_models_own(folder, prior, copy):
    tuned(copy / "vae/diffusion_pytorch_model.safetensors")
    images = picture(height=64, width=64)
    expected = DiffusionPrior.from_pretrained(copy).encode_images(images)
    assert not torch.equal(expected, prior.encode_images(images))
    for source in (copy, copy / "vae", copy / "vae/diffusion_pytorch_model.safetensors"):
        mixed = DiffusionPrior.from_pretrained(folder, vae=source)
        assert torch.equal(mixed.encode_images(images), expected)
    assert torch.equal(mixed.unet.conv_in.weight, prior.unet.conv_in.weight)


OTHER_VAES = {
    "scale": ({"scaling_factor": 0.13025}, "0.13025"),
    "channels": ({"latent_channels": 16}, "16 channels"),
    "cells": (
        {
            "block_out_channels": [4, 8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        "cells of 4 px",
    ),
}


@pytest.mark.parametrize("kind", OTHER_VAES)
def test_vae_of_another_kind_of_model_is_refused(kind, folder, tmp_path):
    changes, reason = OTHER_VAES[kind]
    config = json.loads((folder / "vae/config.json").read_text()) | changes
    diffusers.AutoencoderKL.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*{reason}"):
        DiffusionPrior.from_pretrained(folder, vae=tmp_path)


def test_vae_that_is_none_is_refused(folder, tmp_path):
    for source, reason in ((folder / "unet", "UNet2D"), (tmp_path, "config"), ("x", "neither")):
        with pytest.raises(ValueError, match=f"^{source}.*{reason}"):
            DiffusionPrior.from_pretrained(folder, vae=source)


RENAMED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def convolved(state, old_names=True):
    """A VAE's weights with attention as 1x1 convolutions, as old files have it."""
    for new, old in RENAMED.items():
        for key in [key for key in state if f".attentions.0.{new}." in key]:
            value = state.pop(key)
            name = key.replace(f".{new}.", f".{old}.") if old_names else key
            state[name] = value[:, :, None, None] if key.endswith("weight") else value
    return {key: value.contiguous() for key, value in state.items()}


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_vae_with_attention_as_convolutions_encodes_bit_for_bit(
    suffix, old_names, folder, prior, copy
):
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    state = convolved(load_file(file), old_names)
    file.unlink()
    file = file.with_suffix(suffix)
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    images = picture(height=64, width=64)
    alone = shutil.copy(file, copy / f"vae{suffix}")
    for options in ({"source": copy}, {"source": folder, "vae": copy / "vae"}):
        latents = DiffusionPrior.from_pretrained(**options).encode_images(images)
        assert torch.equal(latents, prior.encode_images(images))
    latents = DiffusionPrior.from_pretrained(folder, vae=alone).encode_images(images)
    assert torch.equal(latents, prior.encode_images(images))


SINGLE = {
    "diffusers": ("vae.safetensors", lambda s, names: s),
    "first names": ("vae.safetensors", lambda s, names: names),
    "in a checkpoint": (
        "vae.pt",
        lambda s, names: {"state_dict": {f"first_stage_model.{k}": v for k, v in names.items()}},
    ),
    "with training's": (
        "vae.ckpt",
        lambda s, names: {"state_dict": names | {"loss.logvar": torch.ones(1)}},
    ),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_vae_in_one_file_is_the_folders(kind, folder, prior, tmp_path):
    name, content = SINGLE[kind]
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    state = vae.state_dict()
    _, names = first_names(diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"), vae)
    content = content(state, names)
    file = tmp_path / name
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
    mixed = DiffusionPrior.from_pretrained(folder, vae=file)
    images = picture(height=64, width=64)
    latents = mixed.encode_images(images)
    assert torch.equal(latents, prior.encode_images(images))
    assert torch.equal(mixed.decode_latents(latents), prior.decode_latents(latents))


NO_VAES = {
    "encoder": (lambda s: {k: v for k, v in s.items() if "decoder" not in k}, "one half of a VAE"),
    "lora": (lambda s: {"lora_unet_x.alpha": torch.ones(1)}, "holds a LoRA, not the encoder and"),
    "six channels": (
        lambda s: s | {"encoder.conv_in.weight": torch.ones(4, 6, 3, 3)},
        "takes images of 6 channels and gives 3",
    ),
    "incomplete": (lambda s: {k: v for k, v in s.items() if "mid_block" not in k}, "absent or"),
}


@pytest.mark.parametrize("kind", NO_VAES)
def test_file_that_is_no_vae_is_refused_in_one_line(kind, folder, tmp_path):
    change, reason = NO_VAES[kind]
    file = tmp_path / "vae.safetensors"
    state = diffusers.AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    save_file(change(state), file)
    with pytest.raises(ValueError, match=f"^{file}: .*{reason}") as caught:
        DiffusionPrior.from_pretrained(folder, vae=file)
    assert "\n" not in str(caught.value)


def test_vae_with_the_latents_of_another_model_is_refused(folder, tmp_path):
    stranger = build_prior(tmp_path / "stranger", seed=1)
    for vae in (stranger, build_taesd(tmp_path / "taesd"), build_taesd(tmp_path / "xl", stranger)):
        reason = "its latents are another model's: .* is -?0.[0-4]., not 0.5 or more"
        with pytest.raises(ValueError, match=f"^{vae}: {reason}") as caught:
            DiffusionPrior.from_pretrained(folder, vae=vae)
        assert "\n" not in str(caught.value)


def test_comparing_two_vaes_takes_no_second(folder, taesd_folder):
    vae = diffusers.AutoencoderTiny.from_pretrained(taesd_folder)
    began = time.process_time()
    encode(vae, synthetic_pictures())
    assert time.process_time() - began < 1


def test_correlation_of_latents_is_that_of_each_channel():
    torch.manual_seed(0)
    ours = torch.randn(3, 4, 5, 5)
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0]).view(4, 1, 1)
    assert latent_correlation(ours, 3 * ours + 7) == pytest.approx(1, abs=1e-5)
    assert latent_correlation(ours, signs * ours) == pytest.approx(0.5, abs=1e-5)
    theirs = ours + torch.randn(3, 4, 5, 5)
    rows = [x.transpose(0, 1).flatten(1) for x in (ours, theirs)]
    expected = sum(torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows, strict=True)) / 4
    assert latent_correlation(ours, theirs) == pytest.approx(expected.item(), abs=1e-5)


def test_half_precision_vae_is_compared_too_and_stays_as_it_is(folder, taesd_folder):
    mixed = DiffusionPrior.from_pretrained(folder, vae=taesd_folder, vae_dtype=torch.bfloat16)
    assert mixed.vae.dtype == torch.bfloat16
