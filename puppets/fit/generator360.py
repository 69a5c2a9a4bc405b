"""Fit PanoHead's generator to the heads seen from all sides: first to points, then to pictures.

As in generator.py. Half of the cameras see the face, where detail is; points anywhere in the box
say what is empty there, which no ray near the head would.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from files.generators import load_generator, save_generator
from models.panohead import PanoHeadGenerator
from puppets import heads
from puppets.data import ROUND_CAMERAS, to_images
from puppets.fit.generator import RENDERING, picture_terms, point_terms, source_pictures
from puppets.fit.pretrain import Config, fit, report, save_sheet, warm_start

FOLDER = Path("checkpoints/puppets360")
FACES = replace(ROUND_CAMERAS, yaw_range=0.8)
EMPTY_POINTS = 512  # Anywhere in the box, for each head.


def build_generator() -> PanoHeadGenerator:
    """Return PanoHead's generator at a size for CPUs: three slices of planes of 128, 128 px."""
    rendering = RENDERING | {
        "decoder_activation": "sigmoid",
        "triplane_size": 128,
        "triplane_depth": 3,
        "use_torgb_raw": False,
        "use_background": False,
        "depth_resolution": 10,
        "depth_resolution_importance": 10,
        "ray_start": 2.35,
        "ray_end": 3.0,
        "box_warp": 0.9,
        "avg_camera_pivot": [0, 0, 0],
        "camera_yaw_range": math.pi,
        "camera_pitch_range": 0.4,
    }
    G = PanoHeadGenerator(
        z_dim=heads.Z_DIM,
        c_dim=25,
        w_dim=128,
        img_resolution=128,
        img_channels=3,
        mapping_kwargs={"num_layers": 2},
        rendering_kwargs=rendering,
        sr_kwargs={"channels": (48, 32)},
        plane_channels=12,
        decoder_hidden=64,
        channel_base=4096,
        channel_max=128,
    )
    G.neural_rendering_resolution = 64
    with torch.no_grad():  # As in generator.py: quiet planes, dense matter.
        for block in G.backbone.synthesis.children():
            block.torgb.weight.mul_(0.1)
        G.decoder.net[2].weight[0].mul_(20)
    return G


def draw_cameras(count: int) -> Tensor:
    """Draw labels [count, 25], half of them of the face."""
    return torch.cat([FACES.sample(count // 2), ROUND_CAMERAS.sample(count - count // 2)])


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def empty_term(G: PanoHeadGenerator, planes: Tensor, ws: Tensor, z: Tensor) -> Tensor:
    """Loss of matter at points anywhere in the box, outside of the heads of `z`."""
    half = G.rendering_kwargs["box_warp"] / 2
    with torch.no_grad():
        points = (2 * torch.rand(len(z), EMPTY_POINTS, 3, device=z.device) - 1) * half
        outside = ~heads.occupied(heads.build(z), points)  # [B, N]
    sigma = G.sample_mixed(points, None, ws, planes=planes.float())["sigma"].squeeze(-1)
    return 0.005 * (F.softplus(sigma - 1) * outside).mean()


def train(cfg: Config) -> None:
    """Train points, then pictures and points together; write the generator and its figures.

    A warm start goes on with the pictures.
    """
    torch.manual_seed(0)
    G = build_generator()
    warm_start(cfg, G, FOLDER / "generator.safetensors")
    G.to(cfg.device).train().requires_grad_(True)
    for name, p in G.named_parameters():
        p.requires_grad_("noise_strength" not in name and "t_mapping" not in name)
    named = [(n, p) for n, p in G.named_parameters() if p.requires_grad]
    groups = {
        1.0: [p for n, p in named if "mapping" not in n and "superresolution" not in n],
        10.0: [p for n, p in named if "mapping" in n],
    }
    upper = [p for n, p in named if "superresolution" in n]

    def styles(z: Tensor) -> tuple[Tensor, Tensor]:
        ws = G.mapping(z, G.cameras.frontal(len(z)).to(z.device))
        return ws, G.planes(ws, noise_mode="none")

    def space(planes: Tensor, ws: Tensor, z: Tensor, rays: int) -> dict[str, Tensor]:
        c = draw_cameras(len(z)).to(z.device)
        terms = point_terms(G, planes, ws, z, c, rays)
        return terms | {"empty": empty_term(G, planes, ws, z)}

    def points(step: int) -> dict[str, Tensor]:
        z = torch.randn(8, heads.Z_DIM).to(cfg.device)
        ws, planes = styles(z)
        return space(planes, ws, z, rays=768)

    minutes = 0.0
    if not cfg.warm_start:
        minutes = fit("generator360-points", groups, points, cfg, steps=2800, lr=5e-3)

    faces = source_pictures(3000, 11, FACES, "faces360")
    around = source_pictures(3000, 12, ROUND_CAMERAS, "around360")

    def pictures(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(faces["z"]), (4,)).numpy()
        parts = zip((faces, around), (rows[::2], rows[1::2]), strict=True)
        one, other = (as_batch({k: data[k][half] for k in data}) for data, half in parts)
        batch = {k: torch.cat([one[k], other[k]]).to(cfg.device) for k in one}
        ws, planes = styles(batch["z"])
        terms = picture_terms(G, planes, ws, batch)
        near = space(planes, ws, batch["z"], rays=384)
        return terms | {f"points_{k}": 0.3 * v for k, v in near.items()}

    groups[1.0] = groups[1.0] + upper
    minutes += fit("generator360", groups, pictures, cfg, steps=9500, lr=3e-3)
    G = G.cpu().eval()
    with torch.no_grad():  # w_avg, which truncation pulls towards.
        ws = G.mapping(torch.randn(10_000, heads.Z_DIM), G.cameras.frontal(10_000))
        G.backbone.mapping.w_avg.copy_(ws[:, 0].mean(0))
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_generator(G, FOLDER / "generator.safetensors", dtype=torch.float16)
    report_generator(cfg, minutes)


def as_batch(data: dict) -> dict[str, Tensor]:
    """Return rows of `source_pictures` as tensors."""
    return {
        "z": torch.from_numpy(data["z"]),
        "c": torch.from_numpy(data["c"]),
        "rgb": to_images(data["rgb"]),
        "depth": torch.from_numpy(data["depth"][:, None]).float(),
        "mask": torch.from_numpy(data["mask"][:, None]).float() / 255,
    }


@torch.no_grad()
def report_generator(cfg: Config, minutes: float) -> None:
    """Compare held-out heads with their true pictures, by the side they are seen from."""
    G = load_generator(FOLDER / "generator.safetensors")
    truth = as_batch(source_pictures(192, 999, ROUND_CAMERAS, "around360"))
    parts = []
    for z, c in zip(truth["z"].split(8), truth["c"].split(8), strict=True):
        torch.manual_seed(0)
        parts.append(G.synthesis(G.mapping(z, G.cameras.frontal(len(z))), c))
    out = {k: torch.cat([p[k] for p in parts]) for k in ("image", "mask")}
    square = (out["image"].clamp(-1, 1) - truth["rgb"]).square().mean(1, keepdim=True)
    mask = truth["mask"]
    front = 10 * torch.log10(4 * mask.sum((1, 2, 3)) / (square * mask).sum((1, 2, 3)))
    small = F.avg_pool2d(mask, 2) > 0.5
    iou = ((out["mask"] > 0.5) & small).sum() / ((out["mask"] > 0.5) | small).sum()
    yaw = torch.atan2(truth["c"][:, 3], truth["c"][:, 11]).abs()
    seen = {
        "face": yaw < math.pi / 3,
        "side": (yaw >= math.pi / 3) & (yaw <= 2 * math.pi / 3),
        "back": yaw > 2 * math.pi / 3,
    }
    turn = ROUND_CAMERAS.label(torch.linspace(0, -2 * math.pi, 17)[:16], torch.full((16,), -0.1))
    rows = []
    for k in range(3):
        ws = G.mapping(truth["z"][k : k + 1], G.cameras.frontal())
        true = torch.cat([heads.render(truth["z"][k : k + 1], c[None])[0] for c in turn])
        rows += [true, G.synthesis(ws, turn[None])["image"].clamp(-1, 1)]
    save_sheet("generator", rows, FOLDER)
    figures = {"PSNR over the foreground, all yaws [dB]": f"{front.mean():.2f}"}
    figures |= {f"of views of the {k} [dB]": f"{front[at].mean():.2f}" for k, at in seen.items()}
    figures |= {"worst of 192 heads [dB]": f"{front.min():.2f}"}
    figures |= {"mask IoU at ray resolution": f"{iou:.4f}"}
    report("generator360", cfg, minutes, figures, FOLDER)
