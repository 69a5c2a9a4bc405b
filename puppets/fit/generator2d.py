"""Fit StyleGAN2 to pictures of the heads: person and view are both in its code.

It has no cameras. Pictures, with the code that each of them shows, are drawn in shards; the loss
compares pixels and their differences, since every code has one true picture. The coarse blocks
learn first, from small pictures: where things are takes thousands of steps, which cost little
there. Last, a discriminator tells pictures that are too smooth (as in pix2pixHD, 1711.11585).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from files.generators import load_generator, save_generator
from harness.pictures import to_uint8
from harness.store import atomic_write
from models.stylegan2 import StyleGAN2Generator
from puppets import heads
from puppets.data import FLAT_Z_DIM, ROOT, SHARD, VALIDATION, split_code, to_images
from puppets.fit.pretrain import Config, fit, report, save_sheet, warm_start

FOLDER = Path("checkpoints/puppets2d")
SHARDS = 120  # Of 128 pictures each.
HELD_OUT = 2  # Shards that are never trained on.
# Size of the pictures [px], steps, pictures in a step, learning rate; the last with DISCERNED.
STAGES = ((32, 5000, 16, 5e-3), (64, 2000, 8, 4e-3), (128, 2200, 8, 3e-3), (128, 5000, 8, 3e-3))
# What weighs how much beside the pixels: what the discriminator says, and its layers' features.
DISCERNED, FEATURES = 0.03, 2.0


def build_generator() -> StyleGAN2Generator:
    """Return StyleGAN2 at a size for CPUs, 128 px."""
    return StyleGAN2Generator(
        z_dim=FLAT_Z_DIM,
        c_dim=0,
        w_dim=256,
        img_resolution=128,
        img_channels=3,
        mapping_kwargs={"num_layers": 4},
        synthesis_kwargs={"channel_base": 3072, "channel_max": 128},
    )


def draw_shard(index: int) -> dict[str, np.ndarray]:
    """Draw and render the heads of one shard; the same index always gives the same shard.

    Returns:
        Codes z [128, 18], rgb [128, 128, 128, 3] uint8 and mask [128, 128, 128] uint8.
    """
    rng = np.random.default_rng([2_026, index])
    z = torch.from_numpy(rng.standard_normal((SHARD, FLAT_Z_DIM))).float()
    own, c = split_code(z)
    parts = [heads.render(own[i : i + 1], c[i : i + 1]) for i in range(SHARD)]
    rgb, _, mask = (torch.cat(x) for x in zip(*parts, strict=True))
    return {"z": z.numpy(), "rgb": to_uint8(rgb), "mask": (mask[:, 0] * 255).byte().numpy()}


def pictures(indices: range) -> dict[str, np.ndarray]:
    """Return the pictures of shards, which are drawn once and kept in `.pretrain/flat`."""
    folder = ROOT / "flat"
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for index in tqdm(indices, desc="source heads", unit="shard"):
        path = folder / f"{index:05d}.npz"
        if not path.exists():
            shard = draw_shard(index)
            atomic_write(path, lambda file, shard=shard: np.savez(file, **shard))
        shards.append(np.load(path))
    return {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0].files}


def picture_loss(image: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return losses of pixels and of their differences to the next ones, heads counting more.

    Args:
        image: Pictures, [B, 3, R, R].
        target: The true ones, likewise.
        mask: Foreground, [B, 1, R, R].
    """
    weight, error = 0.6 + 0.8 * mask, image.float() - target
    losses = {"pixels": (weight * (error.abs() + 4 * error.square())).mean()}
    for name, size in (("edges", 1), ("coarse", 4)):
        part, w = F.avg_pool2d(error, size), F.avg_pool2d(weight, size)
        losses[name] = sum(
            (w.narrow(d, 1, w.shape[d] - 1) * part.diff(dim=d).abs()).mean() for d in (2, 3)
        )
    return losses


class Discriminator(nn.Module):
    """Says of each patch of a picture whether it is a true one (PatchGAN, arXiv:1611.07004)."""

    def __init__(self, widths: tuple[int, ...] = (3, 32, 64, 96)) -> None:
        """Build a layer of half the size for each width, and the verdict."""
        super().__init__()
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, 2, 1)) for a, b in pairwise(widths)
        )
        self.verdict = spectral_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each layer's features [B, D, r, r] of pictures [B, 3, R, R]; last, the verdict."""
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return [*features, self.verdict(x)]


def adversarial_losses(D: Discriminator, image: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the hinge losses of both sides; the generator's do not reach the discriminator.

    Args:
        D: The discriminator.
        image: The generator's pictures, [B, 3, R, R].
        target: The true ones of the same codes, likewise.
    """
    true, false = D(target), D(image.detach())[-1]
    frozen = {name: p.detach() for name, p in D.named_parameters()}
    *features, verdict = torch.func.functional_call(D, frozen, image)
    apart = [(a - b.detach()).abs().mean() for a, b in zip(features, true, strict=False)]
    return {
        "discriminator": F.relu(1 - true[-1]).mean() + F.relu(1 + false).mean(),
        "verdict": -DISCERNED * verdict.mean(),
        "features": FEATURES * sum(apart) / len(apart),
    }


def train(cfg: Config) -> None:
    """Train on pictures; write the generator and its figures.

    A warm start goes on with the last stage.
    """
    torch.manual_seed(0)
    G, D = build_generator(), Discriminator().to(cfg.device)
    warm_start(cfg, G, FOLDER / "generator.safetensors")
    G.to(cfg.device).train().requires_grad_(True)
    for name, p in G.named_parameters():
        p.requires_grad_("noise_strength" not in name)
    named = [(n, p) for n, p in G.named_parameters() if p.requires_grad]
    # The mapping stores its weights times 100 (its learning-rate multiplier is 0.01).
    groups = {
        1.0: [p for n, p in named if "mapping" not in n],
        10.0: [p for n, p in named if "mapping" in n],
    }
    data = pictures(range(SHARDS))
    minutes, blocks = 0.0, G.synthesis.resolutions
    for stage in STAGES[-1:] if cfg.warm_start else STAGES:
        size, steps, batch, lr = stage
        last = stage == STAGES[-1]
        G.synthesis.resolutions = [block for block in blocks if block <= size]

        def terms(
            step: int, size: int = size, batch: int = batch, last: bool = last
        ) -> dict[str, Tensor]:
            rows = torch.randint(len(data["z"]), (batch,)).numpy()
            target = F.adaptive_avg_pool2d(to_images(data["rgb"][rows]), size)
            mask = torch.from_numpy(data["mask"][rows, None]).float() / 255
            ws = G.mapping(torch.from_numpy(data["z"][rows]).to(cfg.device), None)
            image = G.synthesis(ws, noise_mode="none")["image"]
            mask = F.adaptive_avg_pool2d(mask, size)
            target = target.to(cfg.device)
            losses = picture_loss(image, target, mask.to(cfg.device))
            return losses | (adversarial_losses(D, image, target) if last else {})

        name = "generator2d" if last else f"generator2d-{size}"
        learnt = {**groups, 0.1: list(D.parameters())} if last else groups
        minutes += fit(name, learnt, terms, cfg, steps=steps, lr=lr)
    G = G.cpu().eval()
    with torch.no_grad():  # w_avg, which truncation pulls towards.
        ws = G.mapping(torch.randn(10_000, FLAT_Z_DIM), None)
        G.mapping.w_avg.copy_(ws[:, 0].mean(0))
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_generator(G, FOLDER / "generator.safetensors", dtype=torch.float16)
    report_generator(cfg, minutes)


@torch.no_grad()
def report_generator(cfg: Config, minutes: float) -> None:
    """Compare held-out heads with their true pictures."""
    G = load_generator(FOLDER / "generator.safetensors")
    data = pictures(range(VALIDATION, VALIDATION + HELD_OUT))
    z, target = torch.from_numpy(data["z"]), to_images(data["rgb"])
    mask = torch.from_numpy(data["mask"][:, None]).float() / 255
    images = torch.cat([G.synthesis(G.mapping(part, None))["image"] for part in z.split(8)])
    square = (images.clamp(-1, 1) - target).square().mean(1, keepdim=True)
    psnr = 10 * torch.log10(4 / square.mean((1, 2, 3)))
    front = 10 * torch.log10(4 * mask.sum((1, 2, 3)) / (square * mask).sum((1, 2, 3)))
    turned = z[:1].repeat(8, 1)
    turned[:, heads.Z_DIM] = torch.linspace(-1.5, 1.5, 8)
    mixed = G.synthesis(G.mapping(turned, None))["image"]
    save_sheet("generator", [target[:8], images[:8].clamp(-1, 1), mixed.clamp(-1, 1)], FOLDER)
    report(
        "generator2d",
        cfg,
        minutes,
        {
            "PSNR over the picture [dB]": f"{psnr.mean():.2f}",
            "PSNR over the foreground [dB]": f"{front.mean():.2f}",
            f"worst of {len(z)} heads, picture [dB]": f"{psnr.min():.2f}",
        },
        FOLDER,
    )
