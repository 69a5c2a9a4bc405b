"""Whether pictures show a face: two-faced heads are told by the share of back views that do.

A ridge regression of CLIP's features (8 x 8 cells), fitted on true pictures of all domains, from
the front and from behind.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
from models.cameras import SIDES
from models.features import ClipFeatures
from puppets.data import DOMAIN_NAMES, ROUND_CAMERAS
from puppets.heads import Z_DIM, render

HEADS = 12  # Of each domain, seen from the front, and as many from behind.
SEED = 31  # Of their latents and cameras, which no score uses.
RIDGE = 0.01  # As a share of the kernel's mean diagonal.

Probe = Callable[[Tensor], Tensor]  # Features [N, F] -> values [N], above 0 with a face.


def back_views(c: Tensor) -> Tensor:
    """Return which labels [N, 25] are of views from behind, where no face is."""
    return torch.atan2(c[:, 3], c[:, 11]).abs() > SIDES[1]  # [N]


def share(clip: ClipFeatures, images: Tensor) -> float:
    """Return the share of pictures [N, 3, 128, 128] in [-1, 1] that show a face."""
    values = fit_probe(clip)(features(clip, images))
    return (values > 0).float().mean().item()


@functools.lru_cache(maxsize=1)
def fit_probe(clip: ClipFeatures) -> Probe:
    """Draw true pictures and fit the probe; it takes half a minute."""
    generator = torch.Generator().manual_seed(SEED)
    count = 2 * HEADS * len(DOMAIN_NAMES)
    z = torch.randn(count, Z_DIM, generator=generator)
    turn, pitch = 2 * torch.rand(2, count, generator=generator) - 1  # [count] each.
    behind = torch.arange(count) % 2 == 1
    yaw = turn * SIDES[0] + behind * math.pi
    c = ROUND_CAMERAS.label(yaw, pitch * ROUND_CAMERAS.pitch_range)
    pictures = [
        render(z[i : i + 1], c[i : i + 1], DOMAIN_NAMES[i // (2 * HEADS)])[0]
        for i in tqdm(range(count), desc="faces", unit="head", leave=False)
    ]
    x, y = features(clip, torch.cat(pictures)), 1.0 - 2.0 * behind
    mean = x.mean(0)
    kernel = (x - mean) @ (x - mean).T
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(count)
    weights = (x - mean).T @ torch.linalg.solve(kernel + ridge, y - y.mean())  # [F]
    return lambda features: (features - mean) @ weights + y.mean()


def features(clip: ClipFeatures, images: Tensor) -> Tensor:
    """Return what is where in pictures, [N, F]."""
    return evaluation.cells(clip, images, evaluation.Config(ckpt=()))
