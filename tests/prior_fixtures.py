"""Fixtures and helpers for tests of the diffusion prior: tiny folders and ways to damage them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_prior import build_prior, build_sd2, build_taesd, write_lora

from models.diffusion import DiffusionPrior
from models.noise import guided_noise

PLUS = "ip_adapter/models/ip-adapter-plus_sd15.bin"
WEIGHTS = "**/*.safetensors"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return build_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="session")
def prior(folder):
    return DiffusionPrior.from_pretrained(folder)


@pytest.fixture(scope="session")
def plus(folder):
    return DiffusionPrior.from_pretrained(folder, ip_adapter=folder / PLUS)


@pytest.fixture(scope="session")
def sd2_folder(tmp_path_factory):
    return build_sd2(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="session")
def sd2(sd2_folder):
    return DiffusionPrior.from_pretrained(sd2_folder)


@pytest.fixture(scope="session")
def taesd_folder(folder, tmp_path_factory):
    return build_taesd(tmp_path_factory.mktemp("taesd"), folder)


@pytest.fixture(scope="session")
def taesd(folder, taesd_folder):
    return DiffusionPrior.from_pretrained(folder, vae=taesd_folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of one's own to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def noisy(batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, 4, 8, 8), torch.tensor([30, 700, 500])[:batch]


def picture(seed=0, height=50, width=70):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def predict(prior, condition, depth=None):
    """The conditional prediction for two fixed noisy latents."""
    latents_t, t = noisy()
    return guided_noise(prior, latents_t, t, condition, 1.0, depth)


@pytest.fixture
def lora(folder, tmp_path):
    write_lora(tmp_path / "style.safetensors", folder)
    return tmp_path / "style.safetensors"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weight(path, key):
    state = load_file(path)
    del state[key]
    save_file(state, path, metadata={"format": "pt"})


def replace(target, source):
    shutil.rmtree(target)
    shutil.copytree(source, target)


def edit_weights(path, change):
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def spoil(folder, bad):
    """Put one number that is none into the last weight of a network's file."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    state[max(state)].view(-1)[-1] = float(bad)
    save_file(state, file, metadata={"format": "pt"})
