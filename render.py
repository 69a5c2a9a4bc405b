"""Render a generator or a run: stills, source/adapted grids, depth.

    python render.py --ckpt runs/a-bronze-statue --seeds 0-7 --out renders
    python render.py --ckpt generator.safetensors --seeds 0,4-6 --trunc 0.7 --depth

Writes seed0000.png, ... (three views side by side), with --depth also seed0000_depth.png (near is
bright), and for a run grid.png: the source generator's pictures, below each the adapted one
(left out, with a warning, where the source generator is gone).
Seeds are EG3D's, so they show the same heads as in NVIDIA's scripts.
"""

import re
import sys
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from models.checkpoint import atomic_write, load_generator
from models.eg3d import TriPlaneGenerator
from runs import (
    check_folder,
    fingerprint_generator,
    locate,
    make_folder,
    pick_device,
    read_settings,
    run_cli,
)

VIEWS = (0.4, 0.0, -0.4)  # Yaw of the three views, as in EG3D's gen_samples.
PITCH = -0.2
GRID_COLUMNS = 8
REFERENCE_SIZE = 512  # Reference pictures are shrunk to this; CLIP looks at 224.
MOST_SEEDS = 100_000  # A guard against a slip such as 0-99999999.


@dataclass
class Config:
    """Options of render.py."""

    ckpt: str  # Run folder, or generator: .safetensors, EG3D's .pkl, hub id user/repo/file, URL.
    out: Path = Path("renders")  # Folder for the pictures; equal names are replaced.

    seeds: str = "0-7"  # Latent codes, such as 0-7,12 (ends included).
    trunc: float = 1.0  # Truncation psi: 1 is the full variety, 0 the average head.
    depth: bool = False  # Also write depth pictures.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


def main(cfg: Config) -> None:
    """Render what the module docstring lists.

    Raises:
        ValueError: an option cannot be used; nothing has been written.
    """
    seeds = parse_range(cfg.seeds)
    if not isfinite(cfg.trunc):
        raise ValueError(f"--trunc must be a number, got {cfg.trunc}")
    check_folder(cfg.out)
    G, G_src, _ = load_run(cfg.ckpt, pick_device(cfg.device))
    make_folder(cfg.out)

    for seed in tqdm(seeds, unit="seed"):
        views = render(G, seed, VIEWS, cfg.trunc)
        save_image(image_grid([views["image"]]), cfg.out / f"seed{seed:04d}.png")
        if cfg.depth:
            depth = depth_images(views["image_depth"], views["mask"])
            save_image(image_grid([depth]), cfg.out / f"seed{seed:04d}_depth.png")

    if G_src is not None:
        rows = [portraits(network, seeds, cfg.trunc) for network in (G_src, G)]
        save_image(image_grid(rows), cfg.out / "grid.png")
    print(f"{len(seeds)} seeds rendered to {cfg.out}")


def load_run(
    ckpt: str | Path, device: str | torch.device = "cpu"
) -> tuple[TriPlaneGenerator, TriPlaneGenerator | None, dict]:
    """Load what a run made and started from.

    Args:
        ckpt: Run folder, or a generator file, which has no source and no settings.

    Returns:
        The adapted generator; the source generator, None for a file, and with a warning where it
        is gone or no longer what the run started from; the run's settings.

    Raises:
        ValueError: see `load_generator`; or config.json cannot be read.
    """
    G = load_generator(ckpt, device)
    if not Path(ckpt).is_dir():
        return G, None, {}
    settings = read_settings(Path(ckpt))
    try:
        G_src = load_generator(locate(settings["generator"]), device)
        if fingerprint_generator(G_src) != settings.get("generator_weights"):
            raise ValueError(f"{settings['generator']} has changed since")
    except ValueError as error:
        print(f"warning: no source generator for {ckpt} ({error})", file=sys.stderr)
        return G, None, settings
    return G, G_src, settings


def seed_to_z(seed: int, z_dim: int) -> Tensor:
    """Return the latent code [1, z_dim] that EG3D's scripts draw for a seed."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, z_dim)).float()


@torch.no_grad()
def render(
    G: TriPlaneGenerator, seed: int, yaws: tuple[float, ...], trunc: float = 1.0
) -> dict[str, Tensor]:
    """Render one head from several sides; a seed always gives the same pictures.

    Args:
        yaws: K turns of the camera about the head, radians (see `cameras.orbit`).
        trunc: Truncation psi.

    Returns:
        What `G.synthesis` does, for K cameras: image [K, 3, R, R] in [-1, 1], image_depth, ...
    """
    device = G.backbone.mapping.w_avg.device
    ws = G.mapping(
        seed_to_z(seed, G.z_dim).to(device), G.cameras.frontal().to(device), truncation_psi=trunc
    )  # [1, num_ws, w_dim]
    c = G.cameras.label(torch.tensor(yaws), torch.full((len(yaws),), PITCH))  # [K, 25]
    torch.manual_seed(seed)  # The jitter of the ray samples.
    return G.synthesis(ws, c[None].to(device))


def portraits(G: TriPlaneGenerator, seeds: list[int], trunc: float = 1.0) -> Tensor:
    """Render each seed once, turning from column to column, [N, 3, R, R] in [-1, 1]."""
    pictures = [
        render(G, seed, (VIEWS[i % len(VIEWS)],), trunc)["image"] for i, seed in enumerate(seeds)
    ]
    return torch.cat(pictures)


def depth_images(depth: Tensor, mask: Tensor) -> Tensor:
    """Picture depth on one scale for all views: near is white, the background black.

    Args:
        depth: Distance along the ray, [K, 1, n, n].
        mask: Foreground in [0, 1], [K, 1, n, n].

    Returns:
        [K, 3, n, n] in [-1, 1].
    """
    head = depth[mask > 0.5] if (mask > 0.5).any() else depth
    near, far = head.min(), head.max()
    brightness = ((far - depth) / (far - near).clamp_min(1e-8)).clamp(0, 1) * mask
    return (brightness * 2 - 1).expand(-1, 3, -1, -1)


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images [B, 3, H, W] in [-1, 1] into bytes [B, H, W, 3], rounded as EG3D does."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_image(picture: Image.Image) -> Tensor:
    """Turn an RGB picture into an image [1, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture))  # [H, W, 3]
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def image_grid(rows: list[Tensor], columns: int = GRID_COLUMNS) -> Image.Image:
    """Put rows of images under each other, wrapped together after some columns.

    Args:
        rows: Each [N, 3, H, W] in [-1, 1]; what is in one column stays together.
        columns: Images side by side.
    """
    count, _, height, width = rows[0].shape
    columns = min(columns, count)
    wraps = -(-count // columns)
    grid = Image.new("RGB", (columns * width, wraps * len(rows) * height))
    for r, row in enumerate(rows):
        for i, pixels in enumerate(to_uint8(row)):
            wrap, column = divmod(i, columns)
            grid.paste(Image.fromarray(pixels), (column * width, (wrap * len(rows) + r) * height))
    return grid


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, completely or not at all."""
    atomic_write(path, lambda file: image.save(file, format="PNG"))


def read_picture(path: Path) -> Image.Image:
    """Read any picture as an upright RGB square of at most 512 px.

    Transparency becomes white. The largest square is kept, from the middle of a wide picture and
    nearer to the top of a tall one, where a portrait has its face: bars would be seen as style.

    Raises:
        ValueError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    # Damaged pictures make Pillow's decoders raise nearly anything.
    except Exception as error:
        raise ValueError(f"{path}: no readable picture ({error})") from error

    if picture.mode.startswith("I"):  # 16 bits, which convert() would clip instead of scale.
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    side = min(*picture.size, REFERENCE_SIZE)
    return ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC, centering=(0.5, 0.25))


def parse_range(text: str) -> list[int]:
    """Return the seeds of a list such as 0-7,12; the ends of a range are included.

    Raises:
        ValueError: the text is no such list.
    """
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part, re.ASCII)
        if not match:
            raise ValueError(f"--seeds must look like 0-7,12, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last - first >= MOST_SEEDS:
            raise ValueError(f"--seeds {part} must rise, by less than {MOST_SEEDS}")
        seeds += range(first, last + 1)
    return seeds


if __name__ == "__main__":
    run_cli(Config, main, __doc__)
