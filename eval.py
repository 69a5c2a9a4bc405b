"""Score runs: does the result look like the target, and is it still the same person and pose?

    python eval.py --ckpt runs/a-bronze-statue
    python eval.py --ckpt runs/* --out results.json

Source and adapted generator render the same latents from the same cameras. Features are those of
the frozen CLIP image tower, which no loss of GCA-3D uses. Writes JSON, prints one row per run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.checkpoint import atomic_write
from models.eg3d import TriPlaneGenerator
from models.features import ClipFeatures
from render import load_run, read_picture, to_image
from runs import check_folder, locate, pick_device, run_cli

CELLS = 4  # Feature maps are averaged to this many cells per side: where things are, roughly.
PROBE_SHARE = 2  # Source renders the pose probe is fitted on, per sample that is scored.
RIDGE = 1e-2  # Of the features' mean variance; the probe's error is flat within a decade of it.


@dataclass
class Config:
    """Options of eval.py."""

    ckpt: tuple[Path, ...]  # Run folders, as train.py writes them.
    out: Path = Path("results.json")  # Scores, one object per run; equal names are replaced.
    samples: int = 256  # Latents per run; identity is a retrieval among them.
    seed: int = 1_000_000  # Of the latents and cameras; training runs use small seeds.
    batch: int = 8  # Latents rendered at once.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


@dataclass(frozen=True)
class Renders:
    """What one generator shows of N latents, from a random camera each and from the front."""

    image: Tensor  # Random camera, [N, 3, R, R] in [-1, 1].
    depth: Tensor  # Of that camera, [N, 1, n, n].
    mask: Tensor  # [N, 1, n, n].
    front: Tensor  # Frontal camera, [N, 3, R, R].


def main(cfg: Config) -> None:
    """Score every run and write the table.

    Raises:
        ValueError: an option cannot be used, or a folder is no run.
    """
    if cfg.samples < 8 or cfg.batch < 1:
        raise ValueError(
            f"--samples must be at least 8 and --batch 1, got {cfg.samples}, {cfg.batch}"
        )
    check_folder(cfg.out.absolute().parent)
    device = pick_device(cfg.device)
    rows = {}
    for ckpt in cfg.ckpt:
        rows[str(ckpt)] = score_run(ckpt, cfg, device)
        text = json.dumps(rows, indent=2) + "\n"
        atomic_write(cfg.out, lambda file, text=text: file.write(text.encode()))
    print_table(rows)


def score_run(ckpt: Path, cfg: Config, device: torch.device) -> dict[str, float | str]:
    """Return the metrics of one run, by name (see `METRICS`)."""
    G, G_src, settings = load_run(ckpt, device)
    if G_src is None:
        raise ValueError(f"{ckpt} is no run folder, so there is no source to compare with")
    clip = ClipFeatures.from_pretrained(locate(settings["clip"]), device)

    torch.manual_seed(cfg.seed)
    z = torch.randn(cfg.samples, G.z_dim)
    yaw, pitch = views(G, cfg.samples)
    probe_yaw, probe_pitch = views(G, PROBE_SHARE * cfg.samples)
    probe_z = torch.randn(len(probe_yaw), G.z_dim)
    source = render_all(G_src, z, yaw, pitch, cfg, "source")
    adapted = render_all(G, z, yaw, pitch, cfg, "adapted")
    fitted = render_all(G_src, probe_z, probe_yaw, probe_pitch, cfg, "pose probe", front=False)

    row: dict[str, float | str] = {"method": settings["method"], "target": target_name(settings)}
    row |= fidelity(clip, settings, Path(ckpt), source, adapted, cfg)
    row |= pose(clip, fitted, (probe_yaw, probe_pitch), source, adapted, (yaw, pitch), cfg)
    row |= identity(clip, source, adapted, cfg)
    row["depth_corr"] = depth_correlation(source, adapted)
    log = [json.loads(line) for line in (Path(ckpt) / "log.jsonl").read_text().splitlines()]
    row["step_seconds"] = sum(entry["seconds"] for entry in log) / max(len(log), 1)
    row["total_minutes"] = sum(entry["seconds"] for entry in log) / 60
    return row


def target_name(settings: dict) -> str:
    """Return what a run was asked for."""
    parts = [settings["prompt"], settings["image"] and Path(settings["image"]).name]
    return " + ".join(part for part in parts if part)


def views(G: TriPlaneGenerator, count: int) -> tuple[Tensor, Tensor]:
    """Draw yaw and pitch uniformly over the generator's camera range, [count] each, radians."""
    u = 2 * torch.rand(2, count) - 1
    return u[0] * G.cameras.yaw_range, u[1] * G.cameras.pitch_range


@torch.no_grad()
def render_all(
    G: TriPlaneGenerator,
    z: Tensor,
    yaw: Tensor,
    pitch: Tensor,
    cfg: Config,
    name: str,
    front: bool = True,
) -> Renders:
    """Render latents [N, z_dim] from their cameras and, unless it is not needed, from the front."""
    device = G.backbone.mapping.w_avg.device
    parts = []
    rows = range(0, len(z), cfg.batch)
    for i in tqdm(rows, desc=name, unit="batch", leave=False):
        one = slice(i, i + cfg.batch)
        frontal = G.cameras.frontal(len(z[one])).to(device)
        ws = G.mapping(z[one].to(device), frontal)
        c = G.cameras.label(yaw[one], pitch[one]).to(device)
        torch.manual_seed(cfg.seed + i)  # The same jitter of rays for source and adapted.
        cameras = torch.stack([c, frontal], 1) if front else c[:, None]  # [B, K, 25]
        out = {
            k: v.unflatten(0, cameras.shape[:2]).cpu() for k, v in G.synthesis(ws, cameras).items()
        }
        parts.append(
            (out["image"][:, 0], out["image_depth"][:, 0], out["mask"][:, 0], out["image"][:, -1])
        )
    return Renders(*(torch.cat(part) for part in zip(*parts, strict=True)))


def embed(clip: ClipFeatures, images: Tensor, cfg: Config) -> Tensor:
    """Return CLIP's unit embeddings of images, [N, D]."""
    device = clip.model.device
    with torch.no_grad():
        return torch.cat([clip.images(x.to(device)).cpu() for x in images.split(4 * cfg.batch)])


def cells(clip: ClipFeatures, images: Tensor, cfg: Config) -> Tensor:
    """Return CLIP's patch tokens averaged to 4 x 4 cells, [N, 16 D]: what is where."""
    device = clip.model.device
    maps = []
    with torch.no_grad():
        for x in images.split(4 * cfg.batch):
            tokens = clip.tokens(x.to(device)).permute(0, 3, 1, 2)  # [B, D, g, g]
            maps.append(F.adaptive_avg_pool2d(tokens, CELLS).flatten(1).cpu())
    return torch.cat(maps)


def fidelity(
    clip: ClipFeatures, settings: dict, ckpt: Path, source: Renders, adapted: Renders, cfg: Config
) -> dict[str, float]:
    """Compare with the prompt or picture, and count which of the known domains CLIP finds."""
    before, after = embed(clip, source.image, cfg), embed(clip, adapted.image, cfg)  # [N, D]
    row = {}
    if settings["prompt"]:
        target = clip.text([settings["prompt"]]).cpu()
        row["clip_text"] = (after @ target.T).mean().item()
        row["clip_text_gain"] = row["clip_text"] - (before @ target.T).mean().item()
    if settings["image"]:
        picture = embed(clip, to_image(read_picture(ckpt / "reference.png")), cfg)
        row["clip_image"] = (after @ picture.T).mean().item()
        row["clip_image_gain"] = row["clip_image"] - (before @ picture.T).mean().item()
        target = picture if not settings["prompt"] else target

    known = known_domains(settings)
    if known:
        prompts = clip.text(known).cpu()
        wanted = (target @ prompts.T).argmax()
        if settings["prompt"]:  # The user's own words stand for the domain they are nearest to.
            prompts[wanted] = target[0]
        row["clip_share"] = ((after @ prompts.T).argmax(1) == wanted).float().mean().item()
    return row


def known_domains(settings: dict) -> list[str]:
    """Return one prompt for each domain that the prior's vocabulary.json lists, if there is one."""
    path = Path(locate(settings["diffusion"])) / "vocabulary.json"
    declared = json.loads(path.read_text()) if path.exists() else {}
    return list(declared.get("domains", {}).values())


def pose(
    clip: ClipFeatures,
    fitted: Renders,
    fitted_at: tuple[Tensor, Tensor],
    source: Renders,
    adapted: Renders,
    truth: tuple[Tensor, Tensor],
    cfg: Config,
) -> dict[str, float]:
    """Read the camera off pictures by ridge regression, fitted on the source where it is known.

    The adapted domain's mean shift of the features is removed before the probe is asked.

    Returns:
        `pose_deg` of the adapted pictures and `pose_floor_deg`, the probe's error on source
        pictures it was not fitted on: mean angles, degrees.
    """
    x, y = cells(clip, fitted.image, cfg), torch.stack(fitted_at, 1)  # [M, F], [M, 2]
    mean, goal = x.mean(0), torch.stack(truth, 1)
    kernel = (x - mean) @ (x - mean).T  # [M, M]
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(x))
    dual = torch.linalg.solve(kernel + ridge, y - y.mean(0))  # [M, 2]

    def error_deg(features: Tensor) -> float:
        read = (features - mean) @ (x - mean).T @ dual + y.mean(0)  # [N, 2]
        return angle_deg(direction(read), direction(goal)).mean().item()

    before, after = cells(clip, source.image, cfg), cells(clip, adapted.image, cfg)
    return {
        "pose_deg": error_deg(after - after.mean(0) + before.mean(0)),
        "pose_floor_deg": error_deg(before),
    }


def direction(angles: Tensor) -> Tensor:
    """Turn yaw and pitch [N, 2] into unit vectors [N, 3]."""
    yaw, pitch = angles.unbind(1)
    return torch.stack([yaw.sin() * pitch.cos(), pitch.sin(), yaw.cos() * pitch.cos()], 1)


def angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle between unit vectors [N, 3], degrees, [N]."""
    return torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1)))


def identity(
    clip: ClipFeatures, source: Renders, adapted: Renders, cfg: Config
) -> dict[str, float]:
    """Let every adapted picture look for its own source, all from the front; and compare spreads.

    Returns:
        `identity_top1` and `identity_mrr` (mean reciprocal rank), chance 1 / N; `diversity`, the
        mean distance between adapted pictures over that between source pictures.
    """
    before, after = cells(clip, source.front, cfg), cells(clip, adapted.front, cfg)  # [N, F]
    a, b = (F.normalize(x - x.mean(0), dim=1) for x in (after, before))
    similarity = a @ b.T
    own = similarity.diagonal().unsqueeze(1)
    rank = 1 + (similarity > own).sum(1)
    return {
        "identity_top1": (rank == 1).float().mean().item(),
        "identity_mrr": (1 / rank).mean().item(),
        "diversity": (torch.pdist(after).mean() / torch.pdist(before).mean()).item(),
    }


def depth_correlation(source: Renders, adapted: Renders) -> float:
    """Return the mean correlation of the depth maps over the source's foreground; 0 without one."""
    values = [torch.tensor(0.0)] if source.mask.max() <= 0.5 else []
    for a, b, mask in zip(adapted.depth, source.depth, source.mask, strict=True):
        inside = mask > 0.5
        if inside.sum() > 1:
            values.append(torch.corrcoef(torch.stack([a[inside], b[inside]]))[0, 1])
    return torch.stack(values).mean().item()


def print_table(rows: dict[str, dict[str, float | str]]) -> None:
    """Print the runs as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print("| run | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for run, row in rows.items():
        values = [row.get(name, "") for name in names]
        shown = [v if isinstance(v, str) else f"{v:.3f}" for v in values]
        print(f"| {Path(run).name} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    run_cli(Config, main, __doc__)
