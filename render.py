"""Render a generator or a run: stills, source/adapted grids, depth, turning videos, meshes.

    python render.py --ckpt runs/a-bronze-statue --seeds 0-7 --out renders
    python render.py --ckpt generator.safetensors --seeds 0,4-6 --trunc 0.7 --depth
    python render.py --ckpt runs/a-bronze-statue --seeds 0-3 --orbit 120 --mesh 256
    python render.py --ckpt stylegan2-ffhq.pkl --seeds 0-7 --interpolate 30

Writes seed0000.png, ... (three views side by side; five of a generator that sees heads from all
sides, one of a generator without cameras), with --depth also seed0000_depth.png (near is bright),
and for a run grid.png: the source generator's pictures, below each the adapted one (left out, with
a warning, where the source generator is gone).
--orbit writes seed0000.webp: the head turning, an animation that loops; of a run source and
adapted side by side. --interpolate writes interpolation.webp: from seed to seed and back to the
first. --mesh writes seed0000.ply: the surface with colours, in world units.
Seeds are EG3D's, so they show the same heads as in NVIDIA's scripts.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite, pi
from pathlib import Path
from typing import Any

from harness.cli import exit_codes, read_options
from harness.pictures import is_our_video, is_ours
from harness.run_folder import check_folder, check_source, locate, make_folder, read_settings

MOST_SEEDS = 100_000  # A guard against a slip such as 0-99999999.
VIDEO = "interpolation.webp"
MOST_FRAMES = 360  # Pillow wants them all before it encodes: 2.3 GB for pairs of 1024 px.
VOXELS = (16, 512)  # Fewest and most per side; 512 take up to 0.5 GB.


@dataclass
class Config:
    """Options of render.py."""

    ckpt: str  # Run folder, or generator: .safetensors, official .pkl, hub id user/repo/file, URL.
    out: Path = Path("renders")  # Folder for the pictures; those of earlier calls are replaced.

    seeds: str = "0-7"  # Latent codes, such as 0-7,12 (ends included).
    trunc: float = 1.0  # Truncation psi: 1 is the full variety, 0 the average head.
    depth: bool = False  # Also write depth pictures.
    orbit: int = 0  # Also write videos of so many frames, at 30 a second; 0 writes none.
    interpolate: int = 0  # Also write a video of so many frames from each seed to the next.
    mesh: int = 0  # Also write meshes, from so many voxels per side (say 256); 0 writes none.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


def check(cfg: Config) -> None:
    """Refuse options that cannot be used.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    seeds = parse_range(cfg.seeds)
    if not isfinite(cfg.trunc):
        raise ValueError(f"--trunc must be a number, got {cfg.trunc}")
    for flag, value, (least, most) in (
        ("--orbit", cfg.orbit, (2, MOST_FRAMES)),
        ("--mesh", cfg.mesh, VOXELS),
    ):
        if value and not least <= value <= most:
            raise ValueError(f"{flag} must be {least} to {most}, or 0 for none, got {value}")
    if cfg.interpolate and cfg.interpolate < 2:
        raise ValueError(f"--interpolate must be at least 2, got {cfg.interpolate}")
    if cfg.interpolate and not 2 <= len(seeds) <= MOST_FRAMES // cfg.interpolate:
        raise ValueError(
            f"--interpolate needs two --seeds or more, and {MOST_FRAMES} frames in all at most, "
            f"got {len(seeds)} times {cfg.interpolate}"
        )
    if cfg.mesh and importlib.util.find_spec("skimage") is None:
        raise ValueError("--mesh needs scikit-image: pip install scikit-image")
    check_folder(cfg.out)
    check_source("--ckpt", cfg.ckpt)
    if cfg.out.exists():
        check_replaced(cfg.out, seeds)
        if cfg.interpolate and (cfg.out / VIDEO).exists() and not is_our_video(cfg.out / VIDEO):
            raise ValueError(f"--out {cfg.out}: {VIDEO} was not written by render.py: move it away")


def check_replaced(out: Path, seeds: list[int]) -> None:
    """Refuse to replace files that render.py has not written.

    Every file of a seed comes with its still. A text chunk in that tells who wrote them.

    Raises:
        ValueError: naming one of them.
    """
    endings = (".png", "_depth.png", ".webp", ".ply")
    stills = [out / still_name(seed) for seed in seeds]
    groups = {still: [still.with_name(still.stem + end) for end in endings] for still in stills}
    groups[out / "grid.png"] = [out / "grid.png"]
    for still, files in groups.items():
        there = [path.name for path in files if path.exists()]
        if there and not is_ours(still):
            raise ValueError(f"--out {out}: {there[0]} was not written by render.py: move it away")


def still_name(seed: int) -> str:
    """Return the name of the picture of a seed."""
    return f"seed{seed:04d}.png"


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
    CFG = read_options(Config, __doc__, check)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from files.generators import load_generator
from harness.devices import pick_device
from harness.pictures import image_grid, save_image, save_video
from models.fingerprints import fingerprint_generator
from models.generator import Generator, Outputs
from models.mesh import extract_mesh, save_mesh

VIEWS = (0.4, 0.0, -0.4)  # Yaw of the three views, as in EG3D's gen_samples.
VIEWS_ROUND = (0.0, -pi / 4, -pi / 2, -3 * pi / 4, -pi)  # As in PanoHead's.
PITCH = -0.2


def main(cfg: Config) -> None:
    """Render what the module docstring lists.

    Raises:
        ValueError: an option cannot be used; nothing has been written.
    """
    check(cfg)
    seeds = parse_range(cfg.seeds)
    G, G_src, _ = load_run(cfg.ckpt, pick_device(cfg.device))
    for name in ("depth", "orbit", "mesh"):
        if getattr(cfg, name) and "image_depth" not in G.gives:
            raise ValueError(f"--{name} needs a generator with cameras, and {cfg.ckpt} has none")
    yaws = sides(G)  # Before anything is written, since it refuses what cannot be seen.
    make_folder(cfg.out)
    networks = [G] if G_src is None else [G_src, G]

    for seed in tqdm(seeds, unit="seed"):
        subjects = [seed_to_subject(network, seed, cfg.trunc) for network in networks]
        stills = views(subjects[-1], yaws)
        save_image(image_grid([stills["image"]]), cfg.out / still_name(seed))
        if cfg.depth:
            depth = depth_images(stills["image_depth"], stills["mask"])
            save_image(image_grid([depth]), cfg.out / f"seed{seed:04d}_depth.png")
        if cfg.orbit:
            turns = [orbit(subject, cfg.orbit) for subject in subjects]
            frames = [image_grid([torch.cat(pair)]) for pair in zip(*turns, strict=True)]
            save_video(frames, cfg.out / f"seed{seed:04d}.webp")
        if cfg.mesh:
            torch.manual_seed(seed)
            mesh = extract_mesh(G, subjects[-1].ws, cfg.mesh)
            if mesh is None:
                tqdm.write(f"warning: no mesh of seed {seed}: nothing to see", file=sys.stderr)
            else:
                save_mesh(mesh, cfg.out / f"seed{seed:04d}.ply")

    if cfg.interpolate:
        walks = [interpolation(network, seeds, cfg.interpolate, cfg.trunc) for network in networks]
        pairs = tqdm(zip(*walks, strict=True), total=len(seeds) * cfg.interpolate, unit="frame")
        save_video([image_grid([torch.cat(pair)]) for pair in pairs], cfg.out / VIDEO)
    if G_src is not None:
        rows = [portraits(network, seeds, cfg.trunc) for network in networks]
        save_image(image_grid(rows), cfg.out / "grid.png")
    print(f"{len(seeds)} seeds rendered to {cfg.out}")


def load_run(
    ckpt: str | Path, device: str | torch.device = "cpu"
) -> tuple[Generator, Generator | None, dict]:
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


@dataclass(frozen=True)
class Subject:
    """One sample of a generator, which looks the same whenever it is seen."""

    G: Generator
    ws: Tensor  # [1, num_ws, w_dim].
    planes: Tensor | None = None  # Own or cached planes; None: those of ws.
    seed: int = 0  # Fixes the jitter of the ray samples: frames with their own would flicker.

    @torch.no_grad()
    def see(self, c: Tensor, **options: Any) -> Outputs:
        """Render from K cameras c [K, 25]; options as in `G.synthesis`.

        Returns:
            What `G.synthesis` does: image [K, 3, R, R] in [-1, 1], image_depth, ...
        """
        torch.manual_seed(self.seed)
        return self.G.synthesis(self.ws, c[None].to(self.ws.device), planes=self.planes, **options)


def seed_to_ws(G: Generator, seed: int, trunc: float = 1.0) -> Tensor:
    """Return the style codes [1, num_ws, w_dim] of a seed, conditioned on the frontal camera."""
    device = next(iter(G.parameters())).device
    z, c = seed_to_z(seed, G.z_dim).to(device), G.cameras.frontal().to(device)
    return G.mapping(z, c, truncation_psi=trunc)


@torch.no_grad()
def seed_to_subject(G: Generator, seed: int, trunc: float = 1.0) -> Subject:
    """Return what a generator makes of a seed."""
    return Subject(G, seed_to_ws(G, seed, trunc), seed=seed)


def views(subject: Subject, yaws: tuple[float, ...]) -> Outputs:
    """Render a subject from several sides.

    Args:
        yaws: K turns of the camera about it, radians (see `cameras.orbit`).
    """
    return subject.see(subject.G.cameras.label(torch.tensor(yaws), torch.full((len(yaws),), PITCH)))


def sides(G: Generator) -> tuple[float, ...]:
    """Return the yaws of the views in a still: three, five all round, one of what cannot turn."""
    if G.cameras.all_round:
        return VIEWS_ROUND
    return VIEWS if G.cameras.yaw_range else (0.0,)


def portraits(G: Generator, seeds: list[int], trunc: float = 1.0) -> Tensor:
    """Render each seed once, turning from column to column, [N, 3, R, R] in [-1, 1]."""
    yaws = sides(G)
    pictures = [
        views(seed_to_subject(G, seed, trunc), (yaws[i % len(yaws)],))["image"]
        for i, seed in enumerate(seeds)
    ]
    return torch.cat(pictures)


@torch.no_grad()
def interpolation(
    G: Generator, seeds: list[int], frames: int, trunc: float = 1.0
) -> Iterator[Tensor]:
    """Yield images [1, 3, R, R] on the way from seed to seed, straight in ws, back to the first."""
    codes = [seed_to_ws(G, seed, trunc) for seed in seeds]
    for start, end in zip(codes, [*codes[1:], codes[0]], strict=True):
        for frame in range(frames):
            yield views(Subject(G, start.lerp(end, frame / frames)), (0.0,))["image"]


@torch.no_grad()
def orbit(subject: Subject, frames: int) -> Iterator[Tensor]:
    """Yield images [1, 3, R, R] of a subject that turns once around `cameras.rim`.

    As in EG3D's videos rays have twice the samples of stills, else grazing surfaces have holes.
    """
    subject = replace(subject, planes=subject.G.planes(subject.ws))
    angles = torch.arange(frames) * (2 * pi / frames)
    for c in subject.G.cameras.rim(angles).split(1):
        yield subject.see(c, sample_mult=2)["image"]


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


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
