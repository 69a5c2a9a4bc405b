"""Score runs: does the result look like the target, and is it still the same person and pose?

    python eval.py --ckpt runs/a-bronze-statue
    python eval.py --ckpt runs/a-bronze-statue runs/a-clown --out results.json

Source and adapted generator render the same latents from the same cameras, with the run's own
truncation. Features are those of the frozen CLIP image tower, which no loss of GCA-3D uses. Writes
JSON, one object per run beside those that the file already holds, and prints all as a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.cameras import orbit
from models.checkpoint import atomic_write
from models.eg3d import TriPlaneGenerator
from models.features import ClipFeatures
from render import load_run, read_picture, to_image
from runs import (
    check_folder,
    fingerprint_generator,
    locate,
    make_folder,
    pick_device,
    read_settings,
    run_cli,
)

CELLS = 8  # Feature maps are averaged to this many cells per side: where things are.
PROBE_SHARE = 2  # Source renders the pose probe is fitted on, per sample that is scored.
RIDGE = 1e-2  # Of the features' mean variance; the probe's error is flat within a decade of it.
LEAST_SPREAD = 1e-2  # Of the features' mean spread; less is not scaled up.
FLAT = 1e-5  # Depth maps with less deviation than this are constant but for rounding.
# Read besides those of runs.SETTINGS_READ.
SETTINGS = {"diffusion": str, "steps": int, "trunc": (int, float)}

Row = dict[str, float | int | str]  # One run's settings and scores, by name.


@dataclass
class Config:
    """Options of eval.py."""

    ckpt: tuple[Path, ...]  # Run folders, as train.py writes them.
    out: Path = Path("results.json")  # Scores, one object per run; rows of other runs are kept.
    samples: int = 256  # Latents per run; identity is a retrieval among them.
    seed: int = 1_000_000  # Of the latents and cameras; training runs use small seeds.
    batch: int = 32  # Pictures that CLIP reads at once; no score depends on it.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


@dataclass(frozen=True)
class Views:
    """N latents and a random camera for each."""

    z: Tensor  # [N, z_dim]
    angles: Tensor  # Yaw and pitch as `cameras.orbit` takes them, [N, 2].


@dataclass(frozen=True)
class Renders:
    """What one generator shows of N latents, from a random camera each and from the front."""

    image: Tensor  # Random camera, [N, 3, R, R] in [-1, 1].
    depth: Tensor  # Of that camera, [N, 1, n, n].
    mask: Tensor  # [N, 1, n, n].
    front: Tensor  # Frontal camera, [N, 3, R, R].


@dataclass(frozen=True)
class Source:
    """What the source generator shows of the latents that are scored, and of others."""

    views: Views
    renders: Renders
    probe_views: Views  # Those that the pose probe is fitted on.
    probes: Renders


Sources = dict[tuple, Source]  # By what they hang on.


def main(cfg: Config) -> None:
    """Score every run and write the table.

    Raises:
        ValueError: an option cannot be used, or a folder is no run; nothing has been scored.
    """
    if not cfg.ckpt or cfg.samples < 8 or cfg.batch < 1:
        raise ValueError(
            f"--ckpt must name a run, --samples be at least 8 and --batch 1, "
            f"got {len(cfg.ckpt)} runs, {cfg.samples}, {cfg.batch}"
        )
    if not 0 <= cfg.seed < 2**62:
        raise ValueError(f"--seed must be in 0 to 2^62, got {cfg.seed}")
    check_folder(cfg.out.absolute().parent)
    rows = read_rows(cfg.out)
    for ckpt in cfg.ckpt:
        run_settings(ckpt)
    device = pick_device(cfg.device)
    make_folder(cfg.out.absolute().parent)
    sources: Sources = {}
    for ckpt in tqdm(cfg.ckpt, unit="run"):
        rows[str(ckpt)] = score_run(ckpt, cfg, device, sources)
        write_rows(cfg.out, rows)
    print_table(rows)


def read_rows(path: Path) -> dict[str, Row]:
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
    known = isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
    if not known or not all({"method", "target"} <= row.keys() for row in rows.values()):
        raise ValueError(f"--out {path} was not written by eval.py, so it is left alone")
    return rows


def write_rows(path: Path, rows: dict[str, Row]) -> None:
    """Write rows by run as JSON, completely or not at all."""
    text = json.dumps(rows, indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def run_settings(ckpt: Path) -> dict:
    """Return the settings of a run that can be scored.

    Raises:
        ValueError: the path is no run folder, or the run has no result yet.
    """
    if not ckpt.is_dir():
        raise ValueError(f"--ckpt {ckpt} is no run folder, so there is no source to compare with")
    settings = read_settings(ckpt)
    for name, types in SETTINGS.items():
        if not isinstance(settings.get(name), types):
            raise ValueError(f"{ckpt / 'config.json'} has no usable {name!r}")
    if not (ckpt / "generator.safetensors").exists():
        raise ValueError(f"--ckpt {ckpt} holds no generator.safetensors yet")
    return settings


def score_run(ckpt: Path, cfg: Config, device: torch.device, sources: Sources) -> Row:
    """Return the settings and scores of one run.

    What the scores mean is said where they are computed: `fidelity`, `pose`, `identity`,
    `depth_correlation`, `cost`.

    Args:
        sources: Renders of the source that the run before was scored with, or nothing; they are
            used again if this run has the same source, else replaced.

    Raises:
        ValueError: the path is no run folder, or its generator draws what cannot be scored.
    """
    settings = run_settings(ckpt)
    G, G_src, _ = load_run(ckpt, device)
    if G_src is None:
        raise ValueError(f"--ckpt {ckpt}: without its source generator it cannot be scored")
    clip = ClipFeatures.from_pretrained(locate(settings["clip"]), device)
    source = render_source(G_src, settings["trunc"], cfg, sources)
    adapted = render_all(G, source.views, settings["trunc"], cfg, "adapted")

    row: Row = {"method": settings["method"], "target": target_name(settings)}
    row |= {"weights": fingerprint_generator(G), "steps": settings["steps"]}
    row |= {"samples": cfg.samples, "seed": cfg.seed, "trunc": settings["trunc"]}
    try:
        row |= fidelity(clip, settings, ckpt, source.renders, adapted, cfg)
        row |= pose(clip, source, adapted, cfg) | identity(clip, source.renders, adapted, cfg)
        row["depth_corr"] = depth_correlation(source.renders, adapted)
    except ValueError as error:
        raise ValueError(f"{ckpt}: {error}") from error
    return row | cost(ckpt)


def target_name(settings: dict) -> str:
    """Return what a run was asked for."""
    parts = [settings["prompt"], settings["image"] and Path(settings["image"]).name]
    return " + ".join(part for part in parts if part)


def cost(ckpt: Path) -> dict[str, float]:
    """Return a run's cost by its log.jsonl, whose last row may be cut off; nothing without a log.

    Returns:
        `step_seconds`, the mean of a step; `steps_minutes`, the sum of all steps, without loading,
        grids and checkpoints; `peak_gb`, if the log has it.

    Raises:
        ValueError: the log is another program's.
    """
    path = ckpt / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        log = [json.loads(line) for line in lines if line.endswith("\n")]
        seconds = sum(entry["seconds"] for entry in log)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} was not written by train.py ({error})") from error
    if not log:
        return {}
    row = {"step_seconds": seconds / len(log), "steps_minutes": seconds / 60}
    peaks = [entry["peak_gb"] for entry in log if "peak_gb" in entry]
    return row | ({"peak_gb": max(peaks)} if peaks else {})


def draw_views(G: TriPlaneGenerator, cfg: Config) -> tuple[Views, Views]:
    """Draw the latents and cameras that are scored, and those that the pose probe is fitted on.

    Cameras are uniform over the generator's range. The first N do not depend on the second.
    """
    torch.manual_seed(cfg.seed)
    width = torch.tensor([G.cameras.yaw_range, G.cameras.pitch_range])
    scored, fitted = (
        Views(torch.randn(count, G.z_dim), (2 * torch.rand(count, 2) - 1) * width)
        for count in (cfg.samples, PROBE_SHARE * cfg.samples)
    )
    return scored, fitted


def render_source(G_src: TriPlaneGenerator, trunc: float, cfg: Config, sources: Sources) -> Source:
    """Render the source for a score, or return what `sources` kept of the last one."""
    key = (fingerprint_generator(G_src), trunc, cfg.samples, cfg.seed)
    if key not in sources:
        sources.clear()
        views, probe_views = draw_views(G_src, cfg)
        probes = render_all(G_src, probe_views, trunc, cfg, "pose probe", front=False)
        renders = render_all(G_src, views, trunc, cfg, "source")
        sources[key] = Source(views, renders, probe_views, probes)
    return sources[key]


@torch.no_grad()
def render_all(
    G: TriPlaneGenerator, views: Views, trunc: float, cfg: Config, name: str, front: bool = True
) -> Renders:
    """Render latents from their cameras and, unless it is not needed, from the front.

    They are rendered one by one: the jitter of the rays is drawn, and depth is clamped, per call.
    """
    device = G.backbone.mapping.w_avg.device
    frontal = G.cameras.frontal().to(device)  # [1, 25]
    labels = G.cameras.label(*views.angles.T).to(device)  # [N, 25]
    parts = []
    for i in tqdm(range(len(labels)), desc=name, unit="head", leave=False):
        ws = G.mapping(views.z[i : i + 1].to(device), frontal, truncation_psi=trunc)
        cameras = torch.cat([labels[i : i + 1], frontal])[: 1 + front]  # [K, 25]
        torch.manual_seed(cfg.seed + i)  # The same jitter for source and adapted.
        out = {k: v.cpu() for k, v in G.synthesis(ws, cameras[None]).items()}
        parts.append((out["image"][0], out["image_depth"][0], out["mask"][0], out["image"][-1]))
    return Renders(*(torch.stack(part) for part in zip(*parts, strict=True)))


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
    """Read features off images, [N, F]; refuse any that are not finite."""
    bar = tqdm(images.split(cfg.batch), desc="features", unit="batch", leave=False)
    features = torch.cat([read(part.to(clip.model.device)).cpu() for part in bar])
    if not features.isfinite().all():
        raise ValueError("the pictures or their features are not finite")
    return features


def fidelity(
    clip: ClipFeatures, settings: dict, ckpt: Path, source: Renders, adapted: Renders, cfg: Config
) -> Row:
    """Compare with the prompt or picture, and count which of the known domains CLIP finds.

    Returns:
        `clip_text` and `clip_image`, mean cosines to the prompt and the picture, and their
        `_gain` over the source; what `domain_share` returns.
    """
    before, after = embed(clip, source.image, cfg), embed(clip, adapted.image, cfg)  # [N, D]
    targets = {}
    if settings["prompt"]:
        targets["clip_text"] = clip.text([settings["prompt"]]).cpu()  # [1, D]
    if settings["image"]:
        picture = to_image(read_picture(ckpt / "reference.png"))
        targets["clip_image"] = embed(clip, picture, cfg)  # [1, D]
    row: Row = {}
    for name, target in targets.items():
        row[name] = (after @ target.T).mean().item()
        row[f"{name}_gain"] = row[name] - (before @ target.T).mean().item()
    return row | domain_share(clip, settings, next(iter(targets.values())), after)


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
    declared = json.loads(path.read_text()) if path.exists() else {}
    return declared.get("domains", {})


def pose(clip: ClipFeatures, source: Source, adapted: Renders, cfg: Config) -> dict[str, float]:
    """Read the camera off pictures by ridge regression, fitted on the source where it is known.

    Before the probe is asked, every feature of the adapted domain is given the mean and the spread
    that it has in the source's.

    Returns:
        `pose_deg` of the adapted pictures and `pose_source_deg`, the probe's error on source
        pictures it was not fitted on: mean angles between camera positions, degrees.
    """
    x, y = cells(clip, source.probes.image, cfg), source.probe_views.angles  # [M, F], [M, 2]
    mean, truth = x.mean(0), direction(source.views.angles)
    kernel = (x - mean) @ (x - mean).T  # [M, M]
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(x))
    dual = torch.linalg.solve(kernel + ridge, y - y.mean(0))  # [M, 2]

    def error_deg(features: Tensor) -> float:
        read = (features - mean) @ (x - mean).T @ dual + y.mean(0)  # [N, 2]
        return angle_deg(direction(read), truth).mean().item()

    before, after = cells(clip, source.renders.image, cfg), cells(clip, adapted.image, cfg)
    least = LEAST_SPREAD * before.std(0).mean()
    scale = before.std(0).clamp_min(least) / after.std(0).clamp_min(least)  # [F]
    return {
        "pose_deg": error_deg((after - after.mean(0)) * scale + before.mean(0)),
        "pose_source_deg": error_deg(before),
    }


def direction(angles: Tensor) -> Tensor:
    """Turn yaw and pitch [N, 2] into unit vectors from the origin to the camera, [N, 3]."""
    return F.normalize(orbit(*angles.T)[:, :3, 3], dim=1)


def angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle between unit vectors [N, 3], degrees, [N]."""
    return torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1)))


def identity(
    clip: ClipFeatures, source: Renders, adapted: Renders, cfg: Config
) -> dict[str, float]:
    """Let every adapted picture look for its own source, all from the front; and compare spreads.

    Ties count against it: in a collapsed generator nobody is found.

    Returns:
        `identity_top1` and `identity_mrr` (mean reciprocal rank), chance 1 / N; `diversity`, the
        mean distance between adapted pictures over that between source pictures.

    Raises:
        ValueError: all source pictures are the same.
    """
    before, after = cells(clip, source.front, cfg), cells(clip, adapted.front, cfg)  # [N, F]
    spread = torch.pdist(before).mean()
    if spread == 0:
        raise ValueError("the source generator draws the same picture for every latent")
    a, b = (F.normalize(x - x.mean(0), dim=1) for x in (after, before))
    similarity = a @ b.T  # [N, N]
    rank = (similarity >= similarity.diagonal().unsqueeze(1)).sum(1)
    return {
        "identity_top1": (rank == 1).float().mean().item(),
        "identity_mrr": (1 / rank).mean().item(),
        "diversity": (torch.pdist(after).mean() / spread).item(),
    }


def depth_correlation(source: Renders, adapted: Renders) -> float:
    """Return the mean correlation of the depth maps over the source's foreground.

    A latent with a constant map, or without foreground, counts as 0.

    Raises:
        ValueError: a depth is not finite.
    """
    if not (source.depth.isfinite().all() and adapted.depth.isfinite().all()):
        raise ValueError("the depth is not finite")
    values = []
    for a, b, mask in zip(adapted.depth, source.depth, source.mask, strict=True):
        pair = torch.stack([a[mask > 0.5], b[mask > 0.5]])  # [2, P]
        flat = pair.shape[1] < 2 or pair.std(1).min() < FLAT
        values.append(0.0 if flat else torch.corrcoef(pair)[0, 1].item())
    return sum(values) / len(values)


def print_table(rows: dict[str, Row]) -> None:
    """Print the runs as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print("| run | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for run, row in rows.items():
        values = [row.get(name, "") for name in names]
        shown = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in values]
        print(f"| {run} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    run_cli(Config, main, __doc__)
