"""Render a generator or a run: stills, grids, depth, turning videos, meshes; edit and mix heads.

    python render.py --ckpt runs/a-bronze-statue --seeds 0-7 --out renders
    python render.py --ckpt generator.safetensors --seeds 0,4-6 --trunc 0.7 --depth
    python render.py --ckpt runs/a-bronze-statue --seeds 0-3 --orbit 120 --mesh 256
    python render.py --ckpt runs/a-bronze-statue --latents me.safetensors --edit hair=2
    python render.py --mix runs/a-clown=0.5 runs/a-devil=0.5 --seeds 0-7 --interpolate 60

Writes seed0000.png, ... (three views side by side; five of a generator that sees heads from all
sides, one of a generator without cameras), with --depth also seed0000_depth.png (near is bright),
and for a run grid.png: the source generator's pictures, below each the adapted one (left out, with
a warning, where the source generator is gone). Files of --latents are named like these.
--orbit writes seed0000.mp4 (.webp without PyAV): the head turning; of a run source and adapted side
by side, with --depth the depth beside them. --together writes orbit.mp4, all heads in a grid,
instead. --interpolate writes interpolation.mp4: from head to head and back to the first. --mesh
writes seed0000.ply and .glb: the surface with colours.
Seeds are EG3D's, so they show the same heads as in NVIDIA's scripts.
"""

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, isfinite, pi, sqrt
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from harness.cli import exit_codes, read_options
from harness.pictures import is_ours
from harness.run_folder import check_folder, check_source, make_folder
from harness.video import ENDINGS, MOST_FRAMES, ending, hint, is_our_video, save_video

MOST_SEEDS = 100_000  # A guard against a slip such as 0-99999999.
VOXELS = (16, 512)  # Fewest and most per side; 512 take up to 0.5 GB.
PARTS = ("all", "shape", "colour")  # What a run can give to a mixture.
NEEDS = {  # Packages that options ask for, by what they are imported and installed as.
    "mesh": ("skimage", "scikit-image"),
    "faces": ("fast_simplification", "fast-simplification"),
}


@dataclass
class Config:
    """Options of render.py."""

    ckpt: str = ""
    """Run folder, or generator: .safetensors, official .pkl, hub id user/repo/file, URL."""
    mix: tuple[str, ...] = ()
    """In place of --ckpt: runs of one source with their shares, such as runs/a=0.5 runs/b=0.5;
    runs/a=1:shape runs/b=1:colour take the coarse layers of one and all others of the other."""
    out: Path = Path("renders")  # Folder for the files; those of the same names are replaced.

    seeds: str | None = None
    """Latent codes, such as 0-7,12 (ends included); None: 0-7, or none beside --latents."""
    latents: tuple[Path, ...] = ()  # People that invert.py found.
    trunc: float = 1.0  # Truncation psi of seeds: 1 is the full variety, 0 the average head.
    edit: tuple[str, ...] = ()  # Directions and how far to go, such as hair=2.5 width=-1.
    directions: Path = Path("directions.safetensors")  # File of directions.py, for --edit.

    depth: bool = False  # Also write depth pictures.
    orbit: int = 0  # Also write videos of so many frames, at 30 a second; 0 writes none.
    together: bool = False  # Show all heads in one video of --orbit.
    interpolate: int = 0  # Also write a video of so many frames from each head to the next.
    mesh: int = 0  # Also write meshes, from so many voxels per side (say 256); 0 writes none.
    mesh_format: tuple[Literal["ply", "obj", "glb"], ...] = ("ply", "glb")  # .glb needs trimesh.
    keep: Literal["largest", "all"] = "largest"  # Pieces of a mesh.
    faces: int = 0  # Most triangles of a mesh (small ones are merged); 0: any number.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


def check(cfg: Config) -> None:
    """Refuse options that cannot be used.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    if bool(cfg.ckpt) == bool(cfg.mix):
        raise ValueError("either --ckpt or --mix is needed")
    seeds = parse_seeds(cfg)
    check_numbers(cfg, len(seeds) + len(cfg.latents))
    parse_edits(cfg.edit)
    check_folder(cfg.out)
    if cfg.ckpt:
        check_source("--ckpt", cfg.ckpt)
    for run, _, _ in parse_mix(cfg.mix):
        check_source("--mix", run)
    for flag, paths in (
        ("--latents", cfg.latents),
        ("--directions", (cfg.directions,) if cfg.edit else ()),
    ):
        for path in paths:
            if not path.is_file():
                how = ": directions.py makes one" if flag == "--directions" else ""
                raise ValueError(f"{flag} {path} is no file{how}")
    check_pairs(cfg)
    names = [f"seed{seed:04d}" for seed in seeds] + [path.stem for path in cfg.latents]
    if twice := [name for name, count in Counter(written(cfg, names)).items() if count > 1]:
        raise ValueError(f"--latents: two would be written to {twice[0]}: rename a file")
    if cfg.out.exists():
        check_replaced(cfg, names)


def check_pairs(cfg: Config) -> None:
    """Refuse options that would do nothing without another one.

    Raises:
        ValueError: naming the flag.
    """
    if cfg.edit and (unknown := parse_edits(cfg.edit).keys() - names_in(cfg.directions)):
        known = ", ".join(sorted(names_in(cfg.directions)))
        raise ValueError(f"--edit {min(unknown)}: {cfg.directions} has {known}")
    for flag, wanted, needed in (
        ("--together", cfg.together, "orbit"),
        ("--faces", cfg.faces, "mesh"),
    ):
        if wanted and not getattr(cfg, needed):
            raise ValueError(f"{flag} needs --{needed}")
    if cfg.mesh and not cfg.mesh_format:
        raise ValueError("--mesh-format needs ply, obj or glb")


def written(cfg: Config, names: list[str]) -> list[str]:
    """Return the pictures and videos that are written of heads with these names."""
    files = [f"{name}.png" for name in names] + ["grid.png"]
    files += [f"{name}_depth.png" for name in names if cfg.depth]
    files += [f"{name}{ending()}" for name in names if cfg.orbit and not cfg.together]
    return files + videos_of_all(cfg)


def videos_of_all(cfg: Config) -> list[str]:
    """Return the names of the videos that show all heads."""
    asked = {"orbit": cfg.orbit and cfg.together, "interpolation": cfg.interpolate}
    return [f"{name}{ending()}" for name, frames in asked.items() if frames]


def check_numbers(cfg: Config, heads: int) -> None:
    """Refuse numbers out of bounds, and options whose packages are missing.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    if not isfinite(cfg.trunc):
        raise ValueError(f"--trunc must be a number, got {cfg.trunc}")
    frames = MOST_FRAMES[ending()]
    for flag, value, (least, most) in (
        ("--orbit", cfg.orbit, (2, frames)),
        ("--mesh", cfg.mesh, VOXELS),
        ("--faces", cfg.faces, (4, 10**9)),
    ):
        if value and not least <= value <= most:
            raise ValueError(f"{flag} must be {least} to {most}, or 0 for none, got {value}")
    if cfg.interpolate and cfg.interpolate < 2:
        raise ValueError(f"--interpolate must be at least 2, got {cfg.interpolate}")
    if cfg.interpolate and not 2 <= heads <= frames // cfg.interpolate:
        raise ValueError(
            f"--interpolate needs two --seeds or more, and {frames} frames in all at most, "
            f"got {heads} times {cfg.interpolate}"
        )
    for flag, (module, package) in NEEDS.items():
        if getattr(cfg, flag) and not has(module):
            raise ValueError(f"--{flag} needs {package}: pip install {package}")
    if cfg.mesh and cfg.mesh_format == ("glb",) and not has("trimesh"):
        raise ValueError("--mesh-format glb needs trimesh: pip install trimesh")


def names_in(path: Path) -> set[str]:
    """Return the names of the directions in a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with safe_open(path, "np") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--directions {path} cannot be read: {error}") from error


def has(module: str) -> bool:
    """Return whether an optional package is installed."""
    return importlib.util.find_spec(module) is not None


def check_replaced(cfg: Config, names: list[str]) -> None:
    """Refuse to replace files that render.py has not written.

    Every file of a head comes with its still. A text chunk in that tells who wrote them.

    Args:
        cfg: Where to write, and what.
        names: Of the heads.

    Raises:
        ValueError: naming one of them.
    """
    endings = (".png", "_depth.png", ".ply", ".obj", ".glb", *ENDINGS)
    groups = {
        cfg.out / f"{name}.png": [cfg.out / f"{name}{end}" for end in endings] for name in names
    }
    groups[cfg.out / "grid.png"] = [cfg.out / "grid.png"]
    foreign = [
        path
        for still, files in groups.items()
        if not is_ours(still)
        for path in files
        if path.exists()
    ]
    videos = [cfg.out / name for name in videos_of_all(cfg)]
    foreign += [path for path in videos if path.exists() and not is_our_video(path)]
    if foreign:
        raise ValueError(
            f"--out {cfg.out}: {foreign[0].name} was not written by render.py: move it away"
        )


def parse_seeds(cfg: Config) -> list[int]:
    """Return the seeds that are asked for."""
    if cfg.seeds is None:
        return [] if cfg.latents else list(range(8))
    return list(dict.fromkeys(parse_range(cfg.seeds)))


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


def parse_mix(words: Sequence[str]) -> list[tuple[str, float, str]]:
    """Return the run, the share and the part of words such as runs/a=0.5 or runs/a=1:shape.

    Raises:
        ValueError: one is no such word.
    """
    mix = []
    for word in words:
        run, equals, share = word.rpartition("=")
        share, _, part = share.partition(":")
        number = as_number(share)
        if not (run and equals) or number is None or (part or "all") not in PARTS:
            raise ValueError(
                f"--mix must look like runs/a=0.5 or runs/a=1:shape (or colour), got {word!r}"
            )
        mix.append((run, number, part or "all"))
    return mix


def parse_edits(words: Sequence[str]) -> dict[str, float]:
    """Return how far to go by direction, of words such as hair=2.5.

    Raises:
        ValueError: one is no such word.
    """
    edits = {}
    for word in words:
        name, _, amount = word.rpartition("=")
        number = as_number(amount)
        if not name or number is None:
            raise ValueError(f"--edit must look like hair=2.5, got {word!r}")
        edits[name] = edits.get(name, 0.0) + number
    return edits


def as_number(text: str) -> float | None:
    """Return a finite number, or None if the text is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None


if __name__ == "__main__":
    CFG = read_options(Config, __doc__, check)

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from harness.devices import pick_device
from harness.pictures import image_grid, save_image
from models.generator import Generator, Outputs
from models.mesh import extract_mesh, save_mesh
from subjects import (
    Person,
    Subject,
    blend,
    edit,
    load_mixture,
    load_person,
    load_run,
    seed_to_person,
    seed_to_subject,
    show,
    warn_of_others,
    wide_codes,
)

WIDEST = 16_384  # Pixels of a video.
VIEWS = (0.4, 0.0, -0.4)  # Yaw of the three views, as in EG3D's gen_samples.
VIEWS_ROUND = (0.0, -pi / 4, -pi / 2, -3 * pi / 4, -pi)  # As in PanoHead's.
PITCH = -0.2


def main(cfg: Config) -> None:
    """Render what the module docstring lists.

    Raises:
        ValueError: an option cannot be used; nothing has been written.
    """
    check(cfg)
    networks = load_networks(cfg)
    G = networks[-1]
    sides(G)  # Before anything is written, since it refuses what cannot be seen.
    seeds = parse_seeds(cfg)
    if not G.z_dim:
        seeds = seeds[:1]  # All show the one head that there is.
    people = [seed_to_person(G, seed, cfg.trunc) for seed in seeds]
    people += [load_person(path, G) for path in cfg.latents]
    warn_of_others([*cfg.latents, *([cfg.directions] if cfg.edit else [])], G)
    if cfg.interpolate and len(people) < 2:
        raise ValueError("--interpolate needs two heads, and this generator shows one alone")
    wide = ceil(sqrt(len(people))) * (len(networks) + cfg.depth) * G.img_resolution
    if cfg.together and wide > WIDEST:
        raise ValueError(f"--together would be {wide} pixels wide, at most {WIDEST}: fewer heads")
    if cfg.edit:
        people = edit(people, cfg.directions, parse_edits(cfg.edit), wide_codes(G))
    make_folder(cfg.out)
    if cfg.orbit or cfg.interpolate:
        hint()
    if cfg.mesh and "glb" in cfg.mesh_format and not has("trimesh"):
        print("hint: for meshes as .glb: pip install trimesh", file=sys.stderr)
        cfg = replace(cfg, mesh_format=tuple(x for x in cfg.mesh_format if x != "glb"))

    for person in tqdm(people, unit="head"):
        write_head(cfg, [show(network, person).settled() for network in networks], person.name)
    if cfg.orbit and cfg.together:
        cast = [[show(network, person).settled() for network in networks] for person in people]
        frames = tqdm(frames_of(cast, cfg.orbit, cfg.depth), total=cfg.orbit, unit="frame")
        save_video(frames, cfg.out / f"orbit{ending()}")
    if cfg.interpolate:
        walks = [interpolation(network, people, cfg.interpolate) for network in networks]
        pairs = tqdm(zip(*walks, strict=True), total=len(people) * cfg.interpolate, unit="frame")
        pictures = (image_grid([torch.cat(pair)]) for pair in pairs)
        save_video(pictures, cfg.out / f"interpolation{ending()}")
    if len(networks) > 1:
        rows = [portraits(show(network, x) for x in people) for network in networks]
        save_image(image_grid(rows), cfg.out / "grid.png")
    print(f"{len(people)} heads rendered to {cfg.out}")


def load_networks(cfg: Config) -> list[Generator]:
    """Return the generator that is shown, its source before it where there is one.

    Raises:
        ValueError: it cannot be loaded, or has no cameras and shall be turned.
    """
    device = pick_device(cfg.device)
    if cfg.mix:
        G, G_src = load_mixture(parse_mix(cfg.mix), device)
    else:
        G, G_src, _ = load_run(cfg.ckpt, device)
    for name in ("depth", "orbit", "mesh"):
        if getattr(cfg, name) and "image_depth" not in G.gives:
            what = cfg.ckpt or cfg.mix[0]
            raise ValueError(f"--{name} needs a generator with cameras, and {what} has none")
    return [G] if G_src is None else [G_src, G]


def write_head(cfg: Config, subjects: Sequence[Subject], name: str) -> None:
    """Write all files of one head.

    Args:
        cfg: What is asked for.
        subjects: The head in the source and adapted, or alone.
        name: How the files begin.
    """
    last = subjects[-1]
    stills = views(last, sides(last.G))
    save_image(image_grid([stills["image"]]), cfg.out / f"{name}.png")
    if cfg.depth:
        depth = depth_images(stills["image_depth"], stills["mask"])
        save_image(image_grid([depth]), cfg.out / f"{name}_depth.png")
    if cfg.orbit and not cfg.together:
        save_video(frames_of([subjects], cfg.orbit, cfg.depth), cfg.out / f"{name}{ending()}")
    if cfg.mesh:
        torch.manual_seed(last.seed)
        whole = cfg.keep == "all"
        mesh = extract_mesh(last.G, last.ws, cfg.mesh, last.planes, whole, cfg.faces)
        if mesh is None:
            tqdm.write(f"warning: no mesh of {name}: nothing to see", file=sys.stderr)
            return
        for kind in cfg.mesh_format:
            save_mesh(mesh, cfg.out / f"{name}.{kind}")


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


def portraits(subjects: Iterable[Subject]) -> Tensor:
    """Render each subject once, turning from one to the next, [N, 3, R, R] in [-1, 1]."""
    pictures = []
    for i, subject in enumerate(subjects):
        yaws = sides(subject.G)
        pictures.append(views(subject, (yaws[i % len(yaws)],))["image"])
    return torch.cat(pictures)


def seed_portraits(G: Generator, seeds: Sequence[int], trunc: float = 1.0) -> Tensor:
    """Render what a generator makes of seeds, each once (see `portraits`)."""
    return portraits(seed_to_subject(G, seed, trunc) for seed in seeds)


@torch.no_grad()
def interpolation(G: Generator, people: Sequence[Person], frames: int) -> Iterator[Tensor]:
    """Yield images [1, 3, R, R] on the way from head to head, and back to the first.

    The way is a spline (Catmull-Rom's) through their codes, so that it has no corners.
    """
    for start in range(len(people)):
        near = [people[(start + i) % len(people)] for i in (-1, 0, 1, 2)]
        for frame in range(frames):
            t = frame / frames
            shares = (
                -0.5 * t + t**2 - 0.5 * t**3,
                1 - 2.5 * t**2 + 1.5 * t**3,
                0.5 * t + 2 * t**2 - 1.5 * t**3,
                -0.5 * t**2 + 0.5 * t**3,
            )
            yield views(show(G, replace(blend(near, shares), seed=0)), (0.0,))["image"]


@torch.no_grad()
def orbit(subject: Subject, frames: int) -> Iterator[Outputs]:
    """Yield a subject, K = 1, that turns once around `cameras.rim`.

    As in EG3D's videos rays have twice the samples of stills, else grazing surfaces have holes.
    """
    subject = subject if subject.planes is not None else subject.settled()
    angles = torch.arange(frames) * (2 * pi / frames)
    for c in subject.G.cameras.rim(angles).split(1):
        yield subject.see(c, sample_mult=2)


def frames_of(
    cast: Sequence[Sequence[Subject]], count: int, depth: bool = False
) -> Iterator[Image.Image]:
    """Yield the frames of a video of turning heads.

    Args:
        cast: For each head the same person in the source and adapted, or adapted alone.
        count: Frames in all.
        depth: Whether the depth of the last of these stands beside them.
    """
    turns = [[orbit(subject, count) for subject in head] for head in cast]
    columns = ceil(sqrt(len(cast)))
    scales: dict[int, tuple[float, float]] = {}  # Of depth, by head: the same in all frames.
    for _ in range(count):
        cells = []
        for number, head in enumerate(turns):
            seen = [next(turn) for turn in head]
            images = [out["image"] for out in seen]
            if depth:
                last = seen[-1]
                scales.setdefault(number, depth_scale(last["image_depth"], last["mask"]))
                picture = depth_images(last["image_depth"], last["mask"], scales[number])
                images.append(resize_to(picture, images[-1]))
            cells.append(torch.cat([x[0] for x in images], dim=2)[None])  # [1, 3, R, n R]
        blank = torch.ones_like(cells[0])
        cells += [blank] * (-len(cells) % columns)
        yield image_grid([torch.cat(cells)], columns)


def resize_to(images: Tensor, like: Tensor) -> Tensor:
    """Return images [B, 3, n, n] at the size of others."""
    return torch.nn.functional.interpolate(images, like.shape[2:], mode="nearest")


def depth_scale(depth: Tensor, mask: Tensor) -> tuple[float, float]:
    """Return the least and the greatest depth of the head, of all pixels if there is none."""
    head = depth[mask > 0.5] if (mask > 0.5).any() else depth
    return head.min().item(), head.max().item()


def depth_images(depth: Tensor, mask: Tensor, scale: tuple[float, float] | None = None) -> Tensor:
    """Picture depth on one scale for all views: near is white, the background black.

    Args:
        depth: Distance along the ray, [K, 1, n, n].
        mask: Foreground in [0, 1], [K, 1, n, n].
        scale: What is white and black; None: the `depth_scale` of these views.

    Returns:
        [K, 3, n, n] in [-1, 1].
    """
    near, far = scale or depth_scale(depth, mask)
    brightness = ((far - depth) / max(far - near, 1e-8)).clamp(0, 1) * mask
    return (brightness * 2 - 1).expand(-1, 3, -1, -1)


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
