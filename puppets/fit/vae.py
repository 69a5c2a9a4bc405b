"""Train Stable Diffusion's autoencoder, small."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from puppets.data import DOMAIN_NAMES, load, to_images
from puppets.fit.pretrain import DIFFUSION, Config, fit, report, save_sheet, warm_start

HARD = ("sketch", "clown", "elf")  # Thin lines: drawn twice as often as the others.


def build_vae() -> AutoencoderKL:
    """Return Stable Diffusion's autoencoder, small: 8x down, 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def train(cfg: Config) -> None:
    """Train the autoencoder on random crops: L1, L2, gradient L1 and a little KL, no critic.

    Half of the crops are recoloured. An autoencoder that knew only the domains would give any
    picture the latents of the nearest one, and distillation, which goes through the encoder, would
    end in pictures that only the encoder takes for the target. With `--warm-start` the latents of
    the others, which the UNet has learnt, are held.
    """
    data = load(keys=("rgb", "domain"))
    pixels, domain = data["rgb"], torch.from_numpy(data["domain"])
    hard = torch.tensor([DOMAIN_NAMES.index(name) for name in HARD])
    odds = 1.0 + torch.isin(domain, hard)
    torch.manual_seed(0)
    vae = build_vae()
    warm_start(cfg, vae, DIFFUSION / "vae/diffusion_pytorch_model.safetensors")
    vae.to(cfg.device).to(memory_format=torch.channels_last)
    learnt = copy.deepcopy(vae).requires_grad_(False)

    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.diff(dim=2), x.diff(dim=3)

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.multinomial(odds, 12, replacement=True).numpy()
        top, left = torch.randint(0, 65, (2, 12)).tolist()
        crops = np.stack(
            [pixels[r, y : y + 64, x : x + 64] for r, y, x in zip(rows, top, left, strict=True)]
        )
        clean = to_images(crops).to(cfg.device)
        images = torch.cat([clean[:6], recolour(clean[6:])])
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        out = vae.decode(posterior.sample()).sample.float()
        grad = sum((a - b).abs().mean() for a, b in zip(edges(out), edges(images), strict=True))
        error = out - images
        hold = images.new_zeros(())
        if cfg.warm_start:
            before = learnt.encode(images[:6]).latent_dist.mode()
            hold = (posterior.mode()[:6] - before).square().mean()
        return {
            "hold": hold,
            "l1": error.abs().mean(),
            "l2": 8 * error.square().mean(),
            "edges": 0.5 * grad,
            "tone": 6 * F.avg_pool2d(error, 8).square().mean(),  # Colours are learnt last, else.
            "kl": 2e-4 * posterior.kl().float().mean() / (64 * 4),
        }

    minutes = fit("vae", vae.parameters(), terms, cfg, steps=3300, lr=3e-3)
    vae = vae.to("cpu").float().eval()
    with torch.no_grad():
        pictures = to_images(pixels[:: len(pixels) // 256])
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in pictures.split(32)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    report_vae(vae, cfg, minutes)
    vae.half().save_pretrained(DIFFUSION / "vae")


def recolour(images: Tensor) -> Tensor:
    """Change the colours of images [B, 3, H, W] by channel and by place, and blur some."""
    b, _, h, w = images.shape
    device = images.device
    order = torch.rand(b, 3, device=device).argsort(1)  # [B, 3]
    swapped = images.gather(1, order[:, :, None, None].expand_as(images))
    changed = torch.where(torch.rand(b, 1, 1, 1, device=device) < 0.4, swapped, images)
    blurred = F.avg_pool2d(changed, 5, 1, 2, count_include_pad=False)
    changed = torch.where(torch.rand(b, 1, 1, 1, device=device) < 0.3, blurred, changed)
    for cells, most in ((3, 0.8), (8, 0.35), (24, 0.12)):  # From tints of regions to textures.
        strength = most * torch.rand(b, 1, 1, 1, device=device).square()
        field = torch.randn(b, 3, cells, cells, device=device)
        changed = changed + strength * F.interpolate(field, (h, w), mode="bilinear")
    return changed.clamp(-1, 1)


@torch.no_grad()
def report_vae(vae: AutoencoderKL, cfg: Config, minutes: float) -> None:
    """Compare held-out pictures with what the latents keep of them."""
    held_out = load(validation=True, limit=3, keys=("rgb", "domain"))
    images, domain = to_images(held_out["rgb"]), torch.from_numpy(held_out["domain"])
    back = torch.cat([vae(x).sample for x in images.split(32)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (back - images).square().mean((1, 2, 3)))
    torch.manual_seed(1)
    odd = recolour(images[::4])
    odd_back = torch.cat([vae(x).sample for x in odd.split(32)]).clamp(-1, 1)
    odd_psnr = 10 * torch.log10(4 / (odd_back - odd).square().mean((1, 2, 3)))
    names = enumerate(DOMAIN_NAMES)
    figures = {f"PSNR {name} [dB]": f"{psnr[domain == i].mean():.1f}" for i, name in names}
    picks = [int((domain == i).nonzero()[0]) for i in range(len(DOMAIN_NAMES))]
    save_sheet("vae", [images[picks], back[picks], odd[:13], odd_back[:13]])
    figures["PSNR of recoloured pictures [dB]"] = f"{odd_psnr.mean():.1f}"
    report("vae", cfg, minutes, figures | {"scaling_factor": vae.config.scaling_factor})
