"""Train Stable Diffusion's autoencoder, small."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from puppets.data import DOMAIN_NAMES, load, to_images
from puppets.pretrain import DIFFUSION, Config, fit, report, save_sheet, warm_start

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

    With `--warm-start` the encoder, whose latents the UNet has learnt, is locked.
    """
    data = load(keys=("rgb", "domain"))
    pixels, domain = data["rgb"], torch.from_numpy(data["domain"])
    hard = torch.tensor([DOMAIN_NAMES.index(name) for name in HARD])
    odds = 1.0 + torch.isin(domain, hard)
    torch.manual_seed(0)
    vae = build_vae()
    warm_start(cfg, vae, DIFFUSION / "vae/diffusion_pytorch_model.safetensors")
    vae.to(cfg.device).to(memory_format=torch.channels_last)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not cfg.warm_start)

    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.diff(dim=2), x.diff(dim=3)

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.multinomial(odds, 12, replacement=True).numpy()
        top, left = torch.randint(0, 65, (2, 12)).tolist()
        crops = np.stack(
            [pixels[r, y : y + 64, x : x + 64] for r, y, x in zip(rows, top, left, strict=True)]
        )
        images = to_images(crops).to(cfg.device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        out = vae.decode(posterior.sample()).sample.float()
        grad = sum((a - b).abs().mean() for a, b in zip(edges(out), edges(images), strict=True))
        error = out - images
        return {
            "l1": error.abs().mean(),
            "l2": 8 * error.square().mean(),
            "edges": 0.5 * grad,
            "tone": 6 * F.avg_pool2d(error, 8).square().mean(),  # Colours are learnt last, else.
            "kl": 2e-4 * posterior.kl().float().mean() / (64 * 4),
        }

    params = [p for p in vae.parameters() if p.requires_grad]
    minutes = fit("vae", params, terms, cfg, steps=3300, lr=3e-3)
    vae = vae.to("cpu").float().eval()
    with torch.no_grad():
        pictures = to_images(pixels[:: len(pixels) // 256])
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in pictures.split(32)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    report_vae(vae, cfg, minutes)
    vae.half().save_pretrained(DIFFUSION / "vae")


@torch.no_grad()
def report_vae(vae: AutoencoderKL, cfg: Config, minutes: float) -> None:
    """Compare held-out pictures with what the latents keep of them."""
    held_out = load(validation=True, limit=3, keys=("rgb", "domain"))
    images, domain = to_images(held_out["rgb"]), torch.from_numpy(held_out["domain"])
    back = torch.cat([vae(x).sample for x in images.split(32)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (back - images).square().mean((1, 2, 3)))
    names = enumerate(DOMAIN_NAMES)
    figures = {f"PSNR {name} [dB]": f"{psnr[domain == i].mean():.1f}" for i, name in names}
    picks = [int((domain == i).nonzero()[0]) for i in range(len(DOMAIN_NAMES))]
    save_sheet("vae", [images[picks], back[picks]])
    report("vae", cfg, minutes, figures | {"scaling_factor": vae.config.scaling_factor})
