"""Fit EG3D's generator to the heads: first to points in space, then to pictures.

Points need no rendering: where a ray meets the head there is this colour, just behind the surface
it is solid, in front of it empty. That gives features their place quickly. Pictures then train
the ray marcher's view of it and the super-resolution. Heads never repeat in either stage.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from files.generators import load_generator, save_generator
from harness.pictures import to_uint8
from harness.store import atomic_write
from models.cameras import CameraSetup
from models.eg3d import TriPlaneGenerator
from puppets import heads
from puppets.data import CAMERAS, ROOT, to_images
from puppets.fit.pretrain import OUT, Config, fit, report, save_sheet, warm_start

RENDERING = {  # Of heads on white, whichever generator draws them.
    "image_resolution": 128,
    "disparity_space_sampling": False,
    "clamp_mode": "softplus",
    "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
    "c_gen_conditioning_zero": True,
    "c_scale": 1.0,
    "superresolution_noise_mode": "none",
    "sr_antialias": True,
    "decoder_lr_mul": 1.0,
    "white_back": True,
    "avg_camera_radius": 2.7,
    "camera_focal": 4.2647,
    "camera_distribution": "uniform",
}
NEAR, FAR = 2.30, 2.85  # Where a camera's rays can meet a head.


def build_generator() -> TriPlaneGenerator:
    """Return EG3D's generator at a size for CPUs: planes of 128, 64 x 64 rays, 128 px."""
    rendering = RENDERING | {
        "depth_resolution": 8,
        "depth_resolution_importance": 8,
        "ray_start": NEAR,
        "ray_end": FAR,
        "box_warp": 0.7,
        "avg_camera_pivot": [0, 0, 0.2],
        "camera_yaw_range": 0.6,
        "camera_pitch_range": 0.3,
    }
    G = TriPlaneGenerator(
        z_dim=heads.Z_DIM,
        c_dim=25,
        w_dim=128,
        img_resolution=128,
        img_channels=3,
        mapping_kwargs={"num_layers": 2},
        rendering_kwargs=rendering,
        sr_kwargs={"channels": (48, 32)},
        plane_resolution=128,
        plane_channels=16,
        decoder_hidden=64,
        channel_base=4096,
        channel_max=128,
    )
    G.neural_rendering_resolution = 64
    with torch.no_grad():
        # Start with quiet planes, and a decoder that makes densities of hundreds from them: else
        # the planes grow until their colours drown.
        for block in G.backbone.synthesis.children():
            block.torgb.weight.mul_(0.1)
        G.decoder.net[2].weight[0].mul_(20)
    return G


def aim(head: heads.Heads, c: Tensor, rays: int) -> tuple[Tensor, Tensor]:
    """Rays from the cameras, half anywhere in the picture, half towards eyes, nose and mouth.

    Returns:
        Origins and unit directions, [B, rays, 3] each.
    """
    b, half = len(c), rays // 2
    f = head.face
    pose, focal = c[:, :16].view(-1, 4, 4), c[:, 16]
    device = c.device
    uv = (torch.rand(b, half, 2, device=device) - 0.5) / focal.view(-1, 1, 1)
    anywhere = F.pad(uv, (0, 1), value=1.0) @ pose[:, :3, :3].mT
    side = torch.randint(0, 2, (b, half), device=device) * 2.0 - 1
    kind = torch.randint(0, 5, (b, half), device=device)  # Eyes, eyes, brows, mouth, nose.
    along = side * f["mouth_w"] * torch.rand(b, half, device=device)
    x = torch.where(kind < 3, side * f["eye_x"], torch.where(kind == 3, along, 0.0))
    brow = (kind == 2) * (f["eye_r"] + 0.016)
    y = torch.where(kind < 3, f["eye_y"] + brow, torch.where(kind == 3, f["mouth_y"], -0.03))
    spot = torch.stack([x, y, torch.full_like(x, heads.HEAD_Z + 0.14)], -1)
    spot = spot + 0.022 * torch.randn_like(spot)
    origin = pose[:, None, :3, 3].expand(b, rays, 3)
    direction = torch.cat([anywhere, spot - origin[:, :half]], 1)
    return origin, F.normalize(direction, dim=-1)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)  # bfloat16 would round the truth itself to centimetres.
def point_terms(
    G: TriPlaneGenerator, planes: Tensor, ws: Tensor, z: Tensor, c: Tensor, rays: int
) -> dict[str, Tensor]:
    """Losses of colour and occupancy at points along fresh rays, for the heads of `z`.

    Args:
        c: Cameras that the rays start from, [B, 25].
        rays: For each head.
    """
    planes = planes.float()
    near_end, far_end = G.rendering_kwargs["ray_start"], G.rendering_kwargs["ray_end"]
    with torch.no_grad():
        head = heads.build(z)
        origin, direction = aim(head, c, rays)
        t, index = heads.trace(head, origin, direction)
        hit = t.isfinite()
        t = torch.where(hit, t, near_end + (far_end - near_end) * torch.rand_like(t))
        surface = origin + t.unsqueeze(-1) * direction
        color = torch.where(hit.unsqueeze(-1), heads.shade(head, surface, index), 1.0)  # [B, R, 3]
        near = t + 0.005 * torch.randn_like(t)
        around = t + 0.025 * torch.randn_like(t)
        anywhere = near_end + (far_end - near_end) * torch.rand_like(t)
        where = torch.cat([near, around, anywhere], 1).unsqueeze(-1)  # [B, 3R, 1]
        points = origin.repeat(1, 3, 1) + where * direction.repeat(1, 3, 1)
        solid = heads.occupied(head, points)  # [B, 3R]
    out = G.sample_mixed(points, torch.zeros_like(points), ws, planes=planes)
    near_color = out["rgb"][:, :rays, :3].float()
    density = out["sigma"].float().squeeze(-1) - 1
    thickness = 0.010 * F.softplus(density)  # Optical thickness of one centimetre.
    # Cross entropy of the opacity 1 - exp(-thickness) with the truth; linear far on the wrong side.
    missing = -torch.log(-torch.expm1(-thickness.clamp(min=1e-6)))
    missing = torch.where(density < -8, 4.6 - density, missing)
    return {
        "color": ((near_color - color).abs().mean(-1) * hit).sum() / hit.sum(),
        "occupancy": 0.05 * torch.where(solid, missing, thickness).mean(),
    }


def source_pictures(
    count: int, seed: int, cameras: CameraSetup = CAMERAS, name: str = "source"
) -> dict[str, np.ndarray]:
    """Render source heads once and keep them in `.pretrain`; the same seed gives the same heads."""
    path = ROOT / f"{name}-{seed}-{count}.npz"
    if not path.exists():
        torch.manual_seed(seed)
        z, c = torch.randn(count, heads.Z_DIM), cameras.sample(count)
        parts = [
            heads.render(z[i : i + 1], c[i : i + 1])
            for i in tqdm(range(count), desc="source heads")
        ]
        rgb, depth, mask = (torch.cat(x) for x in zip(*parts, strict=True))
        arrays = {
            "rgb": to_uint8(rgb),
            "depth": depth[:, 0].half().numpy(),
            "mask": (mask[:, 0] * 255).byte().numpy(),
        }
        arrays |= {"z": z.numpy(), "c": c.numpy()}
        atomic_write(path, lambda file: np.savez(file, **arrays))
    return dict(np.load(path))


def picture_terms(
    G: TriPlaneGenerator, planes: Tensor, ws: Tensor, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Losses of the rendered and the super-resolved picture, of depth and of opacity."""
    out = G.synthesis(ws, batch["c"], planes=planes)
    raw_target = F.avg_pool2d(batch["rgb"], 2)
    mask = F.avg_pool2d(batch["mask"], 2)
    depth = F.avg_pool2d(batch["depth"] * batch["mask"], 2) / mask.clamp(min=1e-3)
    weight, fine = 0.8 + 0.4 * mask, 0.8 + 0.4 * batch["mask"]
    error = out["image"].float() - batch["rgb"]
    raw_error = out["image_raw"].float() - raw_target
    solid = (mask > 0.95).float()
    grad = sum((fine.narrow(d, 1, 127) * error.diff(dim=d).abs()).mean() for d in (2, 3))
    raw_grad = sum((weight.narrow(d, 1, 63) * raw_error.diff(dim=d).abs()).mean() for d in (2, 3))
    return {
        "image": (fine * (error.abs() + 4 * error.square())).mean() + 0.5 * grad,
        "raw": 0.5 * (weight * (raw_error.abs() + 4 * raw_error.square())).mean() + 0.25 * raw_grad,
        "depth": 2.0
        * (solid * (out["image_depth"].float() - depth).abs()).sum()
        / solid.sum().clamp(min=1),
        "acc": 4.0 * (out["acc"].float() - mask).square().mean(),
    }


def train(cfg: Config) -> None:
    """Train points, then pictures and points together; write the generator and its figures.

    A warm start goes on with the pictures.
    """
    torch.manual_seed(0)
    G = build_generator()
    warm_start(cfg, G, OUT / "generator.safetensors")
    G.to(cfg.device).train().requires_grad_(True)
    for name, p in G.named_parameters():
        p.requires_grad_("noise_strength" not in name)
    named = [(n, p) for n, p in G.named_parameters() if p.requires_grad]
    # The mapping stores its weights times 100 (its learning-rate multiplier is 0.01).
    groups = {
        1.0: [p for n, p in named if "mapping" not in n and "superresolution" not in n],
        10.0: [p for n, p in named if "mapping" in n],
    }
    upper = [p for n, p in named if "superresolution" in n]

    def styles(z: Tensor) -> tuple[Tensor, Tensor]:
        ws = G.mapping(z, CAMERAS.frontal(len(z)).to(z.device))
        return ws, G.planes(ws, noise_mode="none")

    def points(step: int) -> dict[str, Tensor]:
        z = torch.randn(8, heads.Z_DIM).to(cfg.device)
        ws, planes = styles(z)
        return point_terms(G, planes, ws, z, CAMERAS.sample(8).to(cfg.device), rays=768)

    minutes = 0.0
    if not cfg.warm_start:
        minutes = fit("generator-points", groups, points, cfg, steps=3500, lr=5e-3)

    data = source_pictures(4000, seed=11)

    def pictures(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(data["z"]), (4,)).numpy()
        batch = {
            "z": torch.from_numpy(data["z"][rows]),
            "c": torch.from_numpy(data["c"][rows]),
            "rgb": to_images(data["rgb"][rows]),
            "depth": torch.from_numpy(data["depth"][rows, None]).float(),
            "mask": torch.from_numpy(data["mask"][rows, None]).float() / 255,
        }
        batch = {k: v.to(cfg.device) for k, v in batch.items()}
        ws, planes = styles(batch["z"])
        terms = picture_terms(G, planes, ws, batch)
        near = point_terms(G, planes, ws, batch["z"], CAMERAS.sample(4).to(cfg.device), rays=384)
        return terms | {f"points_{k}": 0.3 * v for k, v in near.items()}

    groups[1.0] = groups[1.0] + upper
    minutes += fit("generator", groups, pictures, cfg, steps=4000, lr=3e-3)
    G = G.cpu().eval()
    with torch.no_grad():  # w_avg, which truncation pulls towards.
        ws = G.mapping(torch.randn(10_000, heads.Z_DIM), CAMERAS.frontal(10_000))
        G.backbone.mapping.w_avg.copy_(ws[:, 0].mean(0))
    save_generator(G, OUT / "generator.safetensors", dtype=torch.float16)
    report_generator(cfg, minutes)


@torch.no_grad()
def report_generator(cfg: Config, minutes: float) -> None:
    """Compare held-out heads with their true pictures."""

    G = load_generator(OUT / "generator.safetensors")
    held_out = source_pictures(192, seed=999)
    z, c = torch.from_numpy(held_out["z"]), torch.from_numpy(held_out["c"])
    target, mask = (
        to_images(held_out["rgb"]),
        torch.from_numpy(held_out["mask"][:, None]).float() / 255,
    )
    parts = []
    for zi, ci in zip(z.split(8), c.split(8), strict=True):
        torch.manual_seed(0)
        parts.append(G.synthesis(G.mapping(zi, CAMERAS.frontal(8)), ci))
    out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
    square = (out["image"].clamp(-1, 1) - target).square().mean(1, keepdim=True)
    psnr = 10 * torch.log10(4 / square.mean((1, 2, 3)))
    front = 10 * torch.log10(4 * mask.sum((1, 2, 3)) / (square * mask).sum((1, 2, 3)))
    small = F.avg_pool2d(mask, 2)
    iou = ((out["mask"] > 0.5) & (small > 0.5)).sum() / ((out["mask"] > 0.5) | (small > 0.5)).sum()
    depth = torch.from_numpy(held_out["depth"][:, None, ::2, ::2]).float()
    solid = (F.avg_pool2d(mask, 2) > 0.99) & (out["mask"] > 0.5)
    off = (out["image_depth"] - depth).abs()[solid].mean()
    turns = torch.stack([torch.linspace(-0.6, 0.6, 8), torch.zeros(8)])
    frontal = G.mapping(z[:1], CAMERAS.frontal(1))
    turned = G.synthesis(frontal, CAMERAS.label(*turns).unsqueeze(0))
    near = F.interpolate(
        1 - (turned["image_depth"] - NEAR) / (FAR - NEAR) * 2, scale_factor=2
    ).expand(-1, 3, -1, -1)
    save_sheet(
        "generator",
        [
            target[:8],
            out["image"][:8].clamp(-1, 1),
            turned["image"].clamp(-1, 1),
            near.clamp(-1, 1),
        ],
    )
    report(
        "generator",
        cfg,
        minutes,
        {
            "PSNR over the picture [dB]": f"{psnr.mean():.2f}",
            "PSNR over the foreground [dB]": f"{front.mean():.2f}",
            "worst of 192 heads, picture [dB]": f"{psnr.min():.2f}",
            "mask IoU at ray resolution": f"{iou:.4f}",
            "depth error over the foreground [world units]": f"{off:.4f}",
        },
    )
