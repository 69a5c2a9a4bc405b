"""A tiny generator and the command line that adapts it with the tiny networks of tiny_prior."""

from pathlib import Path

import torch

from models.checkpoint import save_generator
from models.eg3d import TriPlaneGenerator
from tiny_prior import build_clip, build_dino, build_prior

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


def build_generator(seed: int = 0, **rendering: object) -> TriPlaneGenerator:
    """Return a generator of 32 px images with random weights and something to see in them."""
    torch.manual_seed(seed)
    G = TriPlaneGenerator(
        8,
        25,
        16,
        32,
        3,
        mapping_kwargs={"num_layers": 2},
        rendering_kwargs=RENDERING | rendering,
        sr_kwargs={"channels": (4, 4), "input_resolution": 16},
        channel_base=128,
        channel_max=8,
        plane_resolution=16,
        plane_channels=4,
        decoder_hidden=8,
        feature_channels=8,
    )
    G.neural_rendering_resolution = 12
    return G.eval().requires_grad_(False)


def build_world(folder: Path) -> Path:
    """Write all that a run reads: generator.safetensors, diffusion/, dino/ and clip/."""
    save_generator(build_generator(), folder / "generator.safetensors")
    build_prior(folder / "diffusion")
    build_dino(folder / "dino")
    build_clip(folder / "clip")
    return folder


def options(world: Path, out: Path, **changes: object) -> dict:
    """Return the fields of a train.Config for a short run in that world."""
    return {
        "prompt": "a bronze statue",
        "generator": str(world / "generator.safetensors"),
        "diffusion": str(world / "diffusion"),
        "features": str(world / "dino"),
        "clip": str(world / "clip"),
        "out": out,
        "steps": 6,
        "batch": 2,
        "save_every": 2,
        "grid_every": 3,
        "device": "cpu",
    } | changes
