"""Small generators for tests, and the rule that fills one with reproducible parameters."""

import re
import zlib
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

from models.eg3d import TriPlaneGenerator

# First match of a key decides the offset and scale of its normal numbers.
FILL_RULE = [
    (r"t_mapping\.fc\d+\.weight$", 0.0, 1.0),  # Its learning-rate multiplier is 1.
    (r"t_mapping\.fc\d+\.bias$", 0.0, 0.2),
    (r"mapping\.fc\d+\.weight$", 0.0, 100.0),
    (r"mapping\.fc\d+\.bias$", 0.0, 20.0),
    (r"mapping\.embed\.weight$", 0.0, 1.0),
    (r"mapping\.embed\.bias$", 0.0, 0.2),
    (r"w_avg$", 0.0, 0.3),
    (r"affine\.weight$", 0.0, 0.5),
    (r"affine\.bias$", 1.0, 0.1),
    (r"noise_strength$", 0.0, 0.1),
    (r"decoder\.net\.0\.bias$", 0.0, 0.2),
    (r"decoder\.net\.2\.weight$", 0.0, 8.0),
    (r"decoder\.net\.2\.bias$", 0.0, 0.5),
    (r"weight$|noise_const$|\.const$|dataset_label_std$", 0.0, 1.0),
    (r"bias$", 0.0, 0.1),
]


def fill_parameters(G: TriPlaneGenerator) -> TriPlaneGenerator:
    """Fill every tensor but the filters with numbers that follow from its name and shape."""
    state = G.state_dict()
    for key, value in state.items():
        if key.endswith("resample_filter"):
            continue
        offset, scale = next((o, s) for rule, o, s in FILL_RULE if re.search(rule, key))
        rng = np.random.RandomState(zlib.crc32(key.encode()))
        numbers = np.asarray(offset + scale * rng.randn(*value.shape), dtype=np.float32)
        state[key] = torch.from_numpy(numbers)
    G.load_state_dict(state)
    return G


@contextmanager
def even_samples():
    """Replace a render's two random draws: jitter 0.5, uniforms (i + 0.5) / S2 on every ray."""

    def rand(rows: int, count: int, device: torch.device | None = None) -> torch.Tensor:
        return ((torch.arange(count, device=device) + 0.5) / count).repeat(rows, 1)

    half = mock.patch("torch.rand_like", lambda x: torch.full_like(x, 0.5))
    with half, mock.patch("torch.rand", rand):
        yield


RENDERING_KWARGS = {
    "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
    "superresolution_noise_mode": "none",
    "sr_antialias": True,
    "clamp_mode": "softplus",
    "disparity_space_sampling": False,
    "c_gen_conditioning_zero": False,
    "c_scale": 1.0,
    "depth_resolution": 6,
    "depth_resolution_importance": 6,
    "ray_start": 2.25,
    "ray_end": 3.3,
    "box_warp": 1.0,
    "avg_camera_radius": 2.7,
    "avg_camera_pivot": [0, 0, 0.2],
}


def small_generator(rendering_kwargs: dict | None = None, **changes) -> TriPlaneGenerator:
    """Return a generator of 16 px renders and 32 px images, filled, float32, without gradients."""
    arguments = {
        "z_dim": 8,
        "c_dim": 25,
        "w_dim": 24,
        "img_resolution": 32,
        "img_channels": 3,
        "mapping_kwargs": {"num_layers": 2},
        "sr_kwargs": {"channels": (12, 8), "input_resolution": 16},
        "channel_base": 256,
        "channel_max": 16,
        "plane_resolution": 32,
        "plane_channels": 8,
        "decoder_hidden": 16,
        "feature_channels": 8,
        **changes,
    }
    G = TriPlaneGenerator(**arguments, rendering_kwargs=RENDERING_KWARGS | (rendering_kwargs or {}))
    G.neural_rendering_resolution = 16
    return fill_parameters(G).requires_grad_(False)
