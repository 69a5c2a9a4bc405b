"""Score runs: does the result look like the target, and is it still the same person and pose?

    python eval.py --ckpt runs/a-bronze-statue
    python eval.py --ckpt runs/clown-s0 runs/clown-s1 runs/robot-s0 --out results.json --quick
    python eval.py --ckpt runs/a-bronze-statue --real photos/bronze-statues

Source and adapted generator render the same latents from the same cameras, with the run's own
truncation. Features are those of the frozen CLIP image tower, which no loss of GCA-3D uses.

Writes JSON, one object per run; objects of other runs in the file stay. A run that has not changed
since is not scored again. Prints and writes tables of all rows in the file: results-table.md, where
runs that differ only by seed are one row, mean ± standard deviation; results-table.csv, every run
by itself; and with matplotlib results-bars.png and results-steps.png, the logged terms over the
steps.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from harness.cli import exit_codes, read_options
from harness.pictures import find_pictures, is_ours
from harness.run_folder import (
    AVATAR,
    FREE_TO_CHANGE,
    check_folder,
    locate,
    make_folder,
    read_log,
    read_settings,
    sole_writer,
)

CELLS = 8  # Feature maps are averaged to this many cells per side: where things are.
PROBE_SHARE, MOST_PROBES = 2, 256  # Source renders for the pose probe, per sample and in all.
TURNED = 1.6  # Yaw range from which on faces go out of sight [rad].
FEWEST, QUICK, MOST = 8, 64, 100_000  # Samples: the least, the most with --quick and without.
VERSION = 3  # Meaning of the scores; rows of other versions are scored again.
# Settings that may differ among the seeds of one row in the table.
NOT_COMPARED = FREE_TO_CHANGE | {"seed"}
# Files of a run that its scores depend on.
SCORED_FILES = ("config.json", "log.jsonl", "reference*.png", "generator.safetensors")
ADDITIVE = ("ckpt",)  # Given twice, both count.

Pictures = tuple[tuple[Path, int, int], ...]  # With size and time of the last change.


@dataclass
class Config:
    """Options of eval.py."""

    ckpt: tuple[Path, ...]  # Run folders, as train.py writes them.
    out: Path = Path("results.json")  # Scores, one object per run; rows of other runs are kept.
    real: Path | None = None  # Folder with pictures of the target domain, for fid and kid.

    samples: int = 256  # Latents per run; identity is a retrieval among them.
    quick: bool = False  # A first look, within a minute on puppets: 64 samples at most.
    seed: int = 1_000_000  # Fixes latents and cameras; training runs use small seeds.
    batch: int = 32  # Pictures that CLIP reads at once; no score depends on it.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


def check(cfg: Config) -> None:
    """Refuse options that cannot be used.

    Raises:
        ValueError: naming the option.
    """
    if not cfg.ckpt or not FEWEST <= cfg.samples <= MOST or cfg.batch < 1:
        raise ValueError(
            f"--ckpt must name a run, --samples be {FEWEST} to {MOST} and --batch at least 1, "
            f"got {len(cfg.ckpt)} runs, {cfg.samples}, {cfg.batch}"
        )
    if not 0 <= cfg.seed < 2**62:
        raise ValueError(f"--seed must be in 0 to 2^62, got {cfg.seed}")
    check_folder(cfg.out.absolute().parent)
    if cfg.real is not None:
        if find_spec("torchmetrics") is None:
            raise ValueError("--real needs torchmetrics: pip install torchmetrics")
        if len(found := pictures(cfg.real)) < FEWEST:
            raise ValueError(f"--real {cfg.real}: {len(found)} pictures, {FEWEST} are the least")
    read_rows(cfg.out)
    check_siblings(cfg.out)
    for ckpt in cfg.ckpt:
        run_settings(ckpt)


def pictures(folder: Path) -> Pictures:
    """Return the pictures of a folder and its subfolders, by name.

    Raises:
        ValueError: there is no such folder, or it may not be read.
    """
    try:
        return tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in find_pictures(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"--real {error}") from error


def read_rows(path: Path) -> dict[str, dict]:
    """Return the rows that an earlier call wrote, by run; none if there is no such file.

    Raises:
        ValueError: the file is a folder, or another program's.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--out {path} cannot be read ({error})") from error
    if not isinstance(rows, dict) or not all(map(_is_row, rows.values())):
        raise ValueError(f"--out {path} was not written by eval.py, so it stays as it is")
    return rows


def sibling(out: Path, name: str) -> Path:
    """Return the table or plot of this name that belongs to --out."""
    return out.with_name(f"{out.stem}-{name}")


def check_siblings(out: Path) -> None:
    """Refuse tables and plots of others in the place of those that belong to --out.

    Raises:
        ValueError: naming them.
    """
    if out.exists():  # It is ours (see `read_rows`), and so are they.
        return
    begins = {"table.md": b"| run | method | target |", "table.csv": b"run,"}
    for name in (*begins, "bars.png", "steps.png"):
        path = sibling(out, name)
        if path.exists():
            start = begins.get(name)
            if not (path.read_bytes().startswith(start) if start else is_ours(path)):
                raise ValueError(f"--out {out}: {path} was not written by eval.py: move it away")


def _is_row(row: object) -> bool:
    """Tell whether tables can be made of what stands where a row should."""
    return (
        isinstance(row, dict)
        and all(isinstance(value, (int, float, str)) for value in row.values())
        and all(isinstance(row.get(name), str) for name in ("method", "target"))
        and ("run_seed" in row or "config" not in row)  # Seeds of one config are one row.
    )


def run_settings(ckpt: Path) -> dict:
    """Return the settings of a run that can be scored.

    Raises:
        ValueError: the path is no run folder, or the run has no result yet.
    """
    if (ckpt / AVATAR).is_file():
        raise ValueError(f"--ckpt {ckpt} holds one head alone, which cannot be scored")
    if not ckpt.is_dir():
        raise ValueError(f"--ckpt {ckpt} is no run folder, so there is no source to compare with")
    settings = read_settings(ckpt)
    if not (settings["prompt"] or settings["image"]):
        raise ValueError(f"{ckpt / 'config.json'} has neither 'prompt' nor 'image'")
    if not (ckpt / "generator.safetensors").exists():
        raise ValueError(f"--ckpt {ckpt} holds no generator.safetensors yet")
    return settings


if __name__ == "__main__":
    CFG = read_options(Config, __doc__, check, ADDITIVE)

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import metrics
from harness.devices import pick_device
from harness.pictures import read_picture, to_image
from harness.store import checksum, write_text
from harness.tables import Row, csv_table, markdown_table, plot_bars, plot_steps
from models.features import ClipFeatures
from models.fingerprints import fingerprint_generator
from models.generator import Generator
from subjects import load_run


@dataclass(frozen=True)
class Views:
    """N latents and a random camera for each."""

    z: Tensor  # [N, z_dim]
    angles: Tensor  # Yaw and pitch as `cameras.orbit` takes them, [N, 2].
    c: Tensor  # The cameras' labels, [N, 25], empty where a generator has none.


@dataclass(frozen=True)
class Renders:
    """What one generator shows of N latents, from a random camera each and from the front."""

    image: Tensor  # Random camera, [N, 3, R, R] in [-1, 1].
    depth: Tensor  # Seen by that camera, [N, 1, n, n]; empty where there is none, like the masks.
    mask: Tensor  # [N, 1, n, n].
    front: Tensor  # Frontal camera, [N, 3, R, R].
    front_depth: Tensor  # [N, 1, n, n].
    front_mask: Tensor  # [N, 1, n, n].


@dataclass(frozen=True)
class Source:
    """What the source generator shows of the latents that are scored, and of others."""

    views: Views
    renders: Renders
    probe_views: Views  # Those that the pose probe is fitted on.
    probes: Renders | None  # None where no linear probe could read a pose.


Sources = dict[tuple, Source]  # By generator, truncation, number of samples and seed.


def main(cfg: Config) -> None:
    """Score every run that is not scored yet, and write the tables and plots.

    Raises:
        ValueError: an option cannot be used, or a folder is no run; nothing has been scored.
    """
    check(cfg)
    device = pick_device(cfg.device)
    if cfg.quick:
        cfg = replace(cfg, samples=min(cfg.samples, QUICK))

    sources: Sources = {}
    for ckpt in tqdm(cfg.ckpt, unit="run"):
        if read_rows(cfg.out).get(str(ckpt), {}).get("inputs") == fingerprint_inputs(ckpt, cfg):
            tqdm.write(f"{ckpt} has not changed since it was scored", file=sys.stderr)
            continue
        row = score_run(ckpt, cfg, device, sources)
        make_folder(cfg.out.absolute().parent)
        add_row(cfg.out, str(ckpt), row)

    report(cfg.out, cfg.ckpt)


def fingerprint_inputs(ckpt: Path, cfg: Config) -> str:
    """Return a checksum of all that a run's scores follow from."""
    real = [(path.name, *stamp) for path, *stamp in pictures(cfg.real)] if cfg.real else None
    paths = [path for name in SCORED_FILES for path in sorted(ckpt.glob(name))]
    options = repr((VERSION, cfg.samples, cfg.seed, real)).encode()
    return checksum(options, *(path.read_bytes() for path in paths))


def write_rows(path: Path, rows: dict[str, Row]) -> None:
    """Write rows by run as JSON, completely or not at all."""
    write_text(path, json.dumps(rows, indent=2, allow_nan=False) + "\n")


def add_row(path: Path, run: str, row: Row) -> None:
    """Add a run's row to those of others, which other processes may be writing."""
    with sole_writer(path, wait=True):
        write_rows(path, read_rows(path) | {run: row})


def score_run(ckpt: Path, cfg: Config, device: torch.device, sources: Sources) -> Row:
    """Return the settings and scores of one run.

    What the scores mean is said where they are computed: `fidelity`, `likeness`, `geometry`,
    `cost`, and in metrics.py.

    Args:
        sources: Renders of the source that the run before was scored with, or nothing; they are
            used again if this run has the same source, else replaced.

    Raises:
        ValueError: the path is no run folder, or its generator draws what cannot be scored.
    """
    settings = run_settings(ckpt)
    inputs = fingerprint_inputs(ckpt, cfg)  # Before all else: a training may still be at work.
    G, G_src, _ = load_run(ckpt, device)
    if G_src is None:
        raise ValueError(f"--ckpt {ckpt}: without its source generator it cannot be scored")
    clip = load_clip(locate(settings["clip"]), device)
    real = embed_pictures(clip, pictures(cfg.real), cfg.batch) if cfg.real else None  # [K, D]
    source = render_source(G_src, settings["trunc"], cfg, sources)
    adapted = render_all(G, source.views, settings["trunc"], cfg, "adapted")

    row: Row = {"method": settings["method"], "target": target_name(settings)}
    row |= {"weights": fingerprint_generator(G), "steps": settings["steps"]}
    row |= {"run_seed": settings["seed"], "config": fingerprint_settings(settings)}
    row |= {"samples": cfg.samples, "seed": cfg.seed, "trunc": settings["trunc"]}
    row |= {"inputs": inputs}
    if real is not None:
        row |= {"real": str(cfg.real), "real_pictures": len(real)}
    try:
        row |= fidelity(clip, settings, ckpt, source.renders, adapted, cfg, real)
        row |= likeness(clip, source, adapted, cfg)
        if source.renders.depth.numel():
            row |= geometry(G, source, adapted)
    except ValueError as error:
        raise ValueError(f"{ckpt}: {error}") from error
    return row | cost(ckpt)


def fingerprint_settings(settings: dict) -> str:
    """Return a checksum of the settings that runs of one row in the table have in common."""
    common = {k: v for k, v in settings.items() if k not in NOT_COMPARED}
    return checksum(json.dumps(common, sort_keys=True).encode())


def target_name(settings: dict) -> str:
    """Return what a run was asked for."""
    parts = [settings["prompt"], *(Path(name).name for name in settings["image"])]
    return " + ".join(part for part in parts if part)


def cost(ckpt: Path) -> dict[str, float]:
    """Return a run's cost by its log.jsonl, whose last row may be cut off; nothing without a log.

    Returns:
        `step_seconds`, the mean of a step; `total_minutes`, the sum of all steps, without loading,
        grids and checkpoints; `peak_gb`, if the log has it.

    Raises:
        ValueError: the log is another program's.
    """
    log = read_log(ckpt)  # Whole rows only.
    if not log:
        return {}
    seconds = sum(entry["seconds"] for entry in log)
    row = {"step_seconds": seconds / len(log), "total_minutes": seconds / 60}
    peaks = [entry["peak_gb"] for entry in log if "peak_gb" in entry]
    return row | ({"peak_gb": max(peaks)} if peaks else {})


def draw_views(G: Generator, cfg: Config) -> tuple[Views, Views]:
    """Draw the latents and cameras that are scored, and those that the pose probe is fitted on.

    Cameras are uniform over the generator's range. The first N do not depend on the second.
    """
    torch.manual_seed(cfg.seed)
    width = torch.tensor([G.cameras.yaw_range, G.cameras.pitch_range])
    both = []
    for count in (cfg.samples, min(PROBE_SHARE * cfg.samples, MOST_PROBES)):
        z, angles = torch.randn(count, G.z_dim), (2 * torch.rand(count, 2) - 1) * width
        both.append(Views(z, angles, G.cameras.label(*angles.T)))
    return both[0], both[1]


def render_source(G_src: Generator, trunc: float, cfg: Config, sources: Sources) -> Source:
    """Render the source for a score, or return what `sources` kept of the last one."""
    key = (fingerprint_generator(G_src), trunc, cfg.samples, cfg.seed)
    if key not in sources:
        sources.clear()
        views, probe_views = draw_views(G_src, cfg)
        probed = 0 < G_src.cameras.yaw_range < TURNED
        probes = render_all(G_src, probe_views, trunc, cfg, "pose probe", False) if probed else None
        renders = render_all(G_src, views, trunc, cfg, "source")
        sources[key] = Source(views, renders, probe_views, probes)
    return sources[key]


@torch.no_grad()
def render_all(
    G: Generator, views: Views, trunc: float, cfg: Config, name: str, front: bool = True
) -> Renders:
    """Render latents from their cameras and from the front, or have the first stand for both.

    They are rendered one by one: the jitter of the rays is drawn, and depth is clamped, per call.
    """
    device = next(iter(G.parameters())).device
    frontal = G.cameras.frontal().to(device)  # [1, 25]
    labels = views.c.to(device)  # [N, 25]
    parts = []
    for i in tqdm(range(len(labels)), desc=name, unit="head", leave=False):
        ws = G.mapping(views.z[i : i + 1].to(device), frontal, truncation_psi=trunc)
        cameras = torch.cat([labels[i : i + 1], frontal])[: 1 + front]  # [K, 25]
        torch.manual_seed(cfg.seed + i)  # The same jitter for source and adapted.
        out = G.synthesis(ws, cameras[None])
        nothing = out["image"][:, :1, :0, :0]  # Where there is no depth.
        names = ("image", "image_depth", "mask")
        maps = [out.get(name, nothing).cpu() for name in names]  # Each [K, ...].
        parts.append([x[k] for k in range(1 + front) for x in maps])
    stacks = [torch.stack(part) for part in zip(*parts, strict=True)]
    sideways, frontal_maps = stacks[:3], stacks[3:] or stacks[:3]
    return Renders(*sideways, *frontal_maps)


@functools.lru_cache(maxsize=1)
def load_clip(source: str, device: torch.device) -> ClipFeatures:
    """Load CLIP, or return it if it is what the run before was scored with."""
    return ClipFeatures.from_pretrained(source, device)


@functools.lru_cache(maxsize=1)
def embed_pictures(clip: ClipFeatures, files: Pictures, batch: int) -> Tensor:
    """Return CLIP's unit embeddings of the pictures of --real that can be read, [K, D].

    Says how many were found and used, and why others were not.

    Raises:
        ValueError: too few can be read.
    """
    size = clip.model.config.vision_config.image_size
    images, parts, failed = [], [], []
    for number, (path, *_) in enumerate(tqdm(files, desc="real", unit="picture", leave=False), 1):
        try:
            image = to_image(read_picture(path))
            images.append(F.interpolate(image, (size, size), mode="bicubic", antialias=True))
        except ValueError as error:
            failed.append(str(error))
        if images and (len(images) == batch or number == len(files)):
            with torch.no_grad():
                parts.append(clip.images(torch.cat(images).to(clip.model.device)).cpu())
            images = []
    used = len(files) - len(failed)
    found = f"--real: {len(files)} pictures found, {used} used"
    found += f"; {len(failed)} cannot be read, such as {failed[0]}" if failed else ""
    if used < FEWEST:
        raise ValueError(f"{found}; {FEWEST} are the least")
    tqdm.write(found, file=sys.stderr)
    return torch.cat(parts)


def embed(clip: ClipFeatures, images: Tensor, cfg: Config) -> Tensor:
    """Return CLIP's unit embeddings of images, [N, D]."""
    return _in_batches(clip.images, clip, images, cfg)


def cells(clip: ClipFeatures, images: Tensor, cfg: Config) -> Tensor:
    """Return CLIP's patch tokens averaged to 8 x 8 cells, [N, 64 D]: what is where."""

    def pooled(images: Tensor) -> Tensor:
        tokens = clip.tokens(images).permute(0, 3, 1, 2)  # [B, D, g, g]
        return F.adaptive_avg_pool2d(tokens, CELLS).flatten(1)  # [B, 64 D]

    return _in_batches(pooled, clip, images, cfg)


@torch.no_grad()
def _in_batches(
    read: Callable[[Tensor], Tensor], clip: ClipFeatures, images: Tensor, cfg: Config
) -> Tensor:
    """Read features off images, clamped to [-1, 1], [N, F]; refuse any that are not finite."""
    bar = tqdm(images.split(cfg.batch), desc="features", unit="batch", leave=False)
    clamped = (part.to(clip.model.device).clamp(-1, 1) for part in bar)
    features = torch.cat([read(part).cpu() for part in clamped])
    if not (images.isfinite().all() and features.isfinite().all()):
        raise ValueError("the pictures or their features are not finite")
    return features


def fidelity(
    clip: ClipFeatures,
    settings: dict,
    ckpt: Path,
    source: Renders,
    adapted: Renders,
    cfg: Config,
    real: Tensor | None = None,
) -> Row:
    """Compare with the prompt or picture, and with true pictures if there are any.

    Args:
        real: Embeddings of pictures of the target domain, [K, D].

    Returns:
        `clip_text` and `clip_image`, mean cosines to the prompt and the picture, and their
        `_gain` over the source; what `domain_share` and `metrics.distances` return.
    """
    before, after = embed(clip, source.image, cfg), embed(clip, adapted.image, cfg)  # [N, D]
    targets = {}
    if settings["prompt"]:
        targets["clip_text"] = clip.text([settings["prompt"]]).cpu()  # [1, D]
    if settings["image"]:
        pictures = [to_image(read_picture(path)) for path in sorted(ckpt.glob("reference*.png"))]
        mean = embed(clip, torch.cat(pictures), cfg).mean(0, keepdim=True)
        targets["clip_image"] = F.normalize(mean)  # [1, D]
    row: Row = {}
    for name, target in targets.items():
        row[name], row[f"{name}_gain"] = metrics.cosine_gain(target, before, after)
    row |= domain_share(clip, settings, next(iter(targets.values())), after)
    return row | (metrics.distances(real, after) if real is not None else {})


def domain_share(clip: ClipFeatures, settings: dict, target: Tensor, after: Tensor) -> Row:
    """Count the pictures that CLIP takes for the wanted domain, if the prior lists domains.

    Args:
        target: Embedding of the prompt or, without one, of the picture, [1, D].
        after: Embeddings of the adapted pictures, [N, D].

    Returns:
        `clip_share` of the pictures, and `clip_domain`, the listed prompt counted as wanted: the
        one nearest to `target`.
    """
    known = list(known_domains(settings).values())
    if not known:
        return {}
    prompts = clip.text(known).cpu()  # [K, D]
    wanted = (target @ prompts.T).argmax().item()
    if settings["prompt"]:  # The user's own words stand for the domain they are nearest to.
        prompts[wanted] = target[0]
    found = (after @ prompts.T).argmax(1)  # [N]
    return {"clip_share": (found == wanted).float().mean().item(), "clip_domain": known[wanted]}


def known_domains(settings: dict) -> dict[str, str]:
    """Return the domains that the prior's vocabulary.json lists: name -> prompt, or nothing."""
    path = Path(locate(settings["diffusion"])) / "vocabulary.json"
    try:
        declared = json.loads(path.read_text()) if path.exists() else {}
        return {str(name): str(prompt) for name, prompt in declared.get("domains", {}).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} lists no domains ({error})") from error


def likeness(clip: ClipFeatures, source: Source, adapted: Renders, cfg: Config) -> Row:
    """Return what `metrics.pose` and, from the front, `metrics.identity` do, of CLIP's cells.

    A generator that cannot turn has no pose, and a linear probe cannot read angles all round.
    """
    row: Row = {}
    if source.probes is not None:
        fitted, fitted_angles = cells(clip, source.probes.image, cfg), source.probe_views.angles
        before, after = (cells(clip, x.image, cfg) for x in (source.renders, adapted))
        row = metrics.pose(fitted, fitted_angles, before, after, source.views.angles)
    before, after = (cells(clip, x.front, cfg) for x in (source.renders, adapted))
    return row | metrics.identity(before, after)


def geometry(G: Generator, source: Source, adapted: Renders) -> Row:
    """Return `depth_corr` (see `metrics.depth_correlation`) and what `metrics.multiview` does.

    The two views are the random camera and the frontal one.
    """
    before = source.renders
    label = source.views.c  # [N, 25]
    c = torch.stack([label, G.cameras.frontal(len(label))], dim=1)  # [N, 2, 25]
    depth = torch.cat([adapted.depth, adapted.front_depth], dim=1)  # [N, 2, n, n]
    mask = torch.cat([adapted.mask, adapted.front_mask], dim=1)
    row = {"depth_corr": metrics.depth_correlation(before.depth, adapted.depth, before.mask)}
    return row | metrics.multiview(depth, mask, c, G.img_resolution)


def report(out: Path, ckpts: tuple[Path, ...]) -> None:
    """Print all rows of --out as a table; write them as tables and plots, and the runs' logs."""
    rows = read_rows(out)
    write_text(sibling(out, "table.csv"), csv_table(rows))
    write_text(sibling(out, "table.md"), markdown_table(rows))
    if find_spec("matplotlib") is None:
        print("warning: no plots without matplotlib: pip install matplotlib", file=sys.stderr)
    else:
        plot_bars(rows, sibling(out, "bars.png"))
        plot_steps({str(ckpt): read_log(ckpt) for ckpt in ckpts}, sibling(out, "steps.png"))
    print(markdown_table(rows), end="")


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
