"""The VAE: its own, another in its place, and what is refused."""

import json

import diffusers
import pytest
import torch
from prior_fixtures import edit_json, edit_weights, picture

from models.diffusion import DiffusionPrior


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
