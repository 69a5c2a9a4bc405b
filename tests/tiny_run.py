"""A tiny generator, and short runs that adapt it with the tiny networks of tiny_prior."""

import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_prior import build_clip, build_dino, build_prior, build_taesd, write_lora

import train
from files.generators import save_generator
from harness.checkpoints import load_checkpoint
from models.diffusion import DiffusionPrior
from models.eg3d import TriPlaneGenerator
from models.features import ClipFeatures, TokenFeatures

RENDERING = {
    "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
    "superresolution_noise_mode": "none",
    "ray_start": 2.25,
    "ray_end": 3.3,
    "box_warp": 1.0,
    "depth_resolution": 4,
    "depth_resolution_importance": 4,
    "clamp_mode": "softplus",
    "disparity_space_sampling": False,
    "white_back": False,
    "avg_camera_radius": 2.7,
    "avg_camera_pivot": [0.0, 0.0, 0.2],
    "camera_distribution": "uniform",
}


def build_generator(seed: int = 0) -> TriPlaneGenerator:
    """Return a generator of 32 px images with random weights, whose masks lie around 0.5."""
    torch.manual_seed(seed)
    G = TriPlaneGenerator(
        z_dim=8,
        c_dim=25,
        w_dim=16,
        img_resolution=32,
        img_channels=3,
        mapping_kwargs={"num_layers": 2},
        rendering_kwargs=RENDERING,
        sr_kwargs={"channels": (4, 4), "input_resolution": 16},
        channel_base=128,
        channel_max=8,
        plane_resolution=16,
        plane_channels=4,
        decoder_hidden=8,
        feature_channels=8,
    )
    G.neural_rendering_resolution = 12
    G.decoder.net[2].bias.data[0] = 2.0  # Density.
    return G.eval().requires_grad_(False)


@functools.cache
def world() -> Path:
    """Return a folder with all that a run reads: generator.safetensors, diffusion/, dino/, clip/.

    And with what it may read besides: taesd/ and lora.safetensors.

    It is built once, and removed when Python ends.
    """
    world.folder = tempfile.TemporaryDirectory()
    folder = Path(world.folder.name)
    save_generator(build_generator(), folder / "generator.safetensors")
    build_prior(folder / "diffusion")
    build_dino(folder / "dino")
    build_clip(folder / "clip")
    build_taesd(folder / "taesd", folder / "diffusion")
    write_lora(folder / "lora.safetensors", folder / "diffusion")
    return folder


def options(out: Path, **changes: object) -> dict:
    """Return the fields of a train.Config for a short run on the CPU."""
    return {
        "prompt": "a bronze statue",
        "method": "gca3d",  # Whose terms and switches are the most.
        "generator": str(world() / "generator.safetensors"),
        "diffusion": str(world() / "diffusion"),
        "features": str(world() / "dino"),
        "clip": str(world() / "clip"),
        "out": out,
        "steps": 6,
        "batch": 2,
        "save_every": 2,
        "grid_every": 3,
        "device": "cpu",
    } | changes


def run(out: Path, **changes: object) -> dict:
    """Run train.main in this process and return `contents` of the run folder."""
    train.main(train.Config(**options(out, **changes)))
    return contents(out)


def arguments(out: Path, **changes: object) -> list[str]:
    """Return the command line of `options`."""
    argv = []
    for name, value in options(out, **changes).items():
        flag = f"--{name.replace('_', '-')}"
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, given in parts if value is not None else []:
            values = () if given is True else given if isinstance(given, tuple) else (given,)
            argv += [f"{flag}.{part}".rstrip("."), *map(str, values)]
    return argv


def change_settings(folder: Path, **changes: object) -> None:
    """Change a run's config.json by hand."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def contents(out: Path) -> dict:
    """Return what must be equal in equal runs: every file's bytes, but for what tells costs."""
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}
    rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
    costs = {"seconds", "peak_gb"}
    found["log.jsonl"] = [{k: v for k, v in row.items() if k not in costs} for row in rows]
    found["checkpoint"] = _flat(load_checkpoint(out))
    varies = ("config.json", "index.html")
    return {k: v for k, v in found.items() if not k.endswith(".pt") and k not in varies}


def _flat(value: object) -> object:
    """Return a nested state with its tensors as bytes, so that == compares it."""
    if isinstance(value, dict):
        return {k: _flat(v) for k, v in value.items()}
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save what takes most of a short run: loading networks, grids, waiting for the disk."""
    for network, load in LOADERS.items():
        monkeypatch.setattr(network, "from_pretrained", load)
    monkeypatch.setattr(train, "GRID_SEEDS", [0])
    monkeypatch.setattr(os, "fsync", lambda _: None)


LOADERS = {
    network: functools.cache(network.from_pretrained)
    for network in (DiffusionPrior, TokenFeatures, ClipFeatures)
}
