"""The pictures that the embedded world's networks learn from, rendered in shards.

`python -m puppets.data` draws heads of every domain with depth, mask, caption and a second view,
and writes 128 of them a file to `.pretrain/data`; an interrupted run goes on with the next shard.
With --around they are seen from all sides, which most captions tell, without a second view, and go
to `.pretrain/around`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from harness.pictures import to_uint8
from harness.store import atomic_write
from models.cameras import VIEW_WORDS, CameraSetup, sides_of
from models.layers import unit_rms
from puppets.domains import DOMAINS, ODD_HAIR, SOURCE, TARGETS
from puppets.heads import Z_DIM, caption, render

ROOT = Path(".pretrain")  # Ignored by git.
SHARD = 128
VALIDATION = 10_000  # Shards from this number on are never trained on.
CAMERAS = CameraSetup(yaw_range=0.6, pitch_range=0.3, distribution="uniform")
ROUND_CAMERAS = CameraSetup(
    pivot=(0.0, 0.0, 0.0), yaw_range=math.pi, pitch_range=0.4, distribution="uniform"
)
DOMAIN_NAMES = tuple(DOMAINS)
FLAT_Z_DIM = Z_DIM + 2  # Of a generator of pictures without cameras: the view is in its code too.


@dataclass
class Config:
    """Options of puppets.data."""

    shards: int = 73  # Training shards of 128 heads each.
    validation: int = 6  # Validation shards.
    around: bool = False  # Heads seen from all sides, for the prior of puppets360.
    worker: int = 0  # Which of `workers` this process is.
    workers: int = 1  # Processes that share the work.


def draw_shard(index: int) -> dict[str, np.ndarray]:
    """Draw and render the heads of one shard; the same index always gives the same shard.

    Returns:
        rgb, view [128, 128, 128, 3] uint8 (two cameras of each head); depth float16 and mask uint8
        [128, 128, 128]; z [128, 16], c [128, 25] and its second view's c2; domain [128]; captions.
    """
    rng = np.random.default_rng([20_241, index])
    z = torch.from_numpy(rng.standard_normal((SHARD, Z_DIM))).float()
    c, c2 = (
        CAMERAS.label(*torch.from_numpy(rng.uniform(-1, 1, (2, SHARD)) * [[0.6], [0.3]]).float())
        for _ in range(2)
    )
    rows = []
    for i in range(SHARD):
        domain = SOURCE if rng.random() < 0.14 else str(rng.choice(TARGETS))
        odd = (
            str(rng.choice(list(ODD_HAIR)))
            if DOMAINS[domain].attributes and rng.random() < 0.2
            else None
        )
        rgb, depth, mask = render(z[i : i + 1], c[i : i + 1], domain, hair=odd)
        view, _, _ = render(z[i : i + 1], c2[i : i + 1], domain, hair=odd)
        rows.append(
            {
                "rgb": to_uint8(rgb)[0],
                "view": to_uint8(view)[0],
                "depth": depth[0, 0].half().numpy(),
                "mask": (mask[0, 0] * 255).byte().numpy(),
                "domain": np.int64(DOMAIN_NAMES.index(domain)),
                "caption": caption(z[i], domain, rng, odd),
            }
        )
    shard = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return shard | {"z": z.numpy(), "c": c.numpy(), "c2": c2.numpy()}


def draw_round_shard(index: int) -> dict[str, np.ndarray]:
    """Draw and render heads from all sides; the same index always gives the same shard.

    Returns:
        rgb [128, 128, 128, 3] uint8, depth float16 and mask uint8 [128, 128, 128], captions, four
        fifths of which end with the view's words.
    """
    rng = np.random.default_rng([20_265, index])
    z = torch.from_numpy(rng.standard_normal((SHARD, Z_DIM))).float()
    turns = torch.from_numpy(rng.uniform(-1, 1, (2, SHARD))).float()
    c = ROUND_CAMERAS.label(
        turns[0] * ROUND_CAMERAS.yaw_range, turns[1] * ROUND_CAMERAS.pitch_range
    )
    sides = sides_of(c)
    rows = []
    for i in range(SHARD):
        domain = SOURCE if rng.random() < 0.14 else str(rng.choice(TARGETS))
        rgb, depth, mask = render(z[i : i + 1], c[i : i + 1], domain)
        words = caption(z[i], domain, rng)
        words += f", {VIEW_WORDS[sides[i]]}" if rng.random() < 0.8 else ""
        rows.append(
            {
                "rgb": to_uint8(rgb)[0],
                "depth": depth[0, 0].half().numpy(),
                "mask": (mask[0, 0] * 255).byte().numpy(),
                "caption": words,
            }
        )
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def to_images(pixels: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def split_code(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a code of pictures without cameras means: a head, and where it is seen from.

    Args:
        z: Normal numbers, of which only the direction matters, [B, 18].

    Returns:
        The head's own code [B, 16], and camera labels [B, 25], uniform over the range of CAMERAS.
    """
    z = unit_rms(z)
    share = torch.special.ndtr(z[:, Z_DIM:]) * 2 - 1  # [B, 2] in (-1, 1).
    width = torch.tensor([CAMERAS.yaw_range, CAMERAS.pitch_range])
    return z[:, :Z_DIM], CAMERAS.label(*(share * width).T)


def load(
    validation: bool = False,
    limit: int | None = None,
    keys: tuple[str, ...] | None = None,
    folder: str = "data",
) -> dict:
    """Read the rendered shards into memory, concatenated.

    Raises:
        ValueError: nothing has been rendered yet.
    """
    files = sorted((ROOT / folder).glob("*.npz"))
    files = [f for f in files if (int(f.stem) >= VALIDATION) == validation][:limit]
    if not files:
        raise ValueError(f"{ROOT / folder} holds no shards: run python -m puppets.data first")
    shards = [np.load(f) for f in files]
    return {k: np.concatenate([s[k] for s in shards]) for k in keys or shards[0].files}


def main(cfg: Config) -> None:
    """Render what is missing."""
    torch.set_num_threads(1)
    folder = ROOT / ("around" if cfg.around else "data")
    folder.mkdir(parents=True, exist_ok=True)
    draw = draw_round_shard if cfg.around else draw_shard
    wanted = [*range(VALIDATION, VALIDATION + cfg.validation), *range(cfg.shards)]
    for index in tqdm(wanted[cfg.worker :: cfg.workers]):
        path = folder / f"{index:05d}.npz"
        if not path.exists():
            shard = draw(index)
            atomic_write(path, lambda file, shard=shard: np.savez(file, **shard))
    if cfg.around:
        return  # The vocabulary is that of `data`, and the words of views.
    words = sorted({w for s in load(keys=("caption",))["caption"] for w in str(s).split()})
    domains = {name: spec.phrases[0] for name, spec in DOMAINS.items()}
    (ROOT / "vocabulary.json").write_text(
        json.dumps({"words": words, "domains": domains, "depth_far": 0.1}, indent=1)
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
