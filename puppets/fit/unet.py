"""Train Stable Diffusion's UNet and a depth ControlNet, small, together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from harness.store import atomic_write
from models.diffusion import DiffusionPrior, depth_condition
from models.features import ClipFeatures, clip_tokenize
from models.noise import ddim
from puppets.data import ROOT, load, to_images
from puppets.domains import DOMAINS
from puppets.fit.clip import LENGTH, WIDTH, classify
from puppets.fit.pretrain import (
    DIFFUSION,
    OUT,
    Config,
    fit,
    percent,
    report,
    save_sheet,
    warm_start,
)

TEXT_RATE = 0.5  # Times the learning rate of the others.


def build_unet() -> UNet2DConditionModel:
    """Return Stable Diffusion's UNet, small: 16x16 latents, two levels that attend to the text."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDPMScheduler:
    """Return Stable Diffusion's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


def write_model_index() -> None:
    """Write what makes the folder a diffusers pipeline, and its scheduler."""
    scheduler().save_pretrained(DIFFUSION / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "requires_safety_checker": False,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (DIFFUSION / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def prepare_latents(vae: AutoencoderKL, pixels: np.ndarray) -> Tensor:
    """Encode pictures, [N, H, W, 3] uint8 -> [N, 4, h, w] scaled; kept for the same encoder."""
    path = ROOT / "latents.pt"
    weights = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    key = [len(pixels), sum(p.double().abs().sum().item() for p in weights)]
    if path.exists() and (kept := torch.load(path, weights_only=True))["key"] == key:
        return kept["latents"]
    parts = [
        vae.encode(to_images(pixels[i : i + 32])).latent_dist.mode()
        for i in tqdm(range(0, len(pixels), 32), desc="latents")
    ]
    latents = torch.cat(parts) * vae.config.scaling_factor
    atomic_write(path, lambda file: torch.save({"key": key, "latents": latents}, file))
    return latents


def tokenize_captions(captions: np.ndarray) -> tuple[Tensor, Tensor, int]:
    """Turn captions into what the prior's text encoder reads, each wording once.

    Returns:
        Tokens [M, L], the row of each caption [N], the row of the empty one.
    """
    tokenizer = CLIPTokenizer.from_pretrained(DIFFUSION / "tokenizer")
    wordings, which = np.unique(np.append(captions.astype(str), ""), return_inverse=True)
    ids = clip_tokenize(tokenizer, wordings.tolist(), LENGTH)
    return ids, torch.from_numpy(which[:-1]), int(which[-1])


def rough_depth(depth: np.ndarray, mask: np.ndarray) -> Tensor:
    """Depth condition at the generator's ray resolution, sometimes as blurred as a generator's."""
    depth = torch.from_numpy(depth[:, None, ::2, ::2]).float()
    mask = torch.from_numpy(mask[:, None, ::2, ::2]).float() / 255
    if torch.rand(()) < 0.5:
        covered = mask > 0.5
        weight = F.avg_pool2d(covered.float(), 3, 1, 1)
        soft = F.avg_pool2d(depth * covered, 3, 1, 1) / weight.clamp(min=0.1)
        depth = torch.where(covered, soft + 0.003 * torch.randn_like(soft), depth)
    return depth_condition(depth.clamp(min=1.0), mask, 128)


def noise_loss(prediction: Tensor, noise: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """Squared error of the noise, weighted by min-SNR-5 (arXiv:2303.09556, Eq. 5)."""
    snr = abar[t] / (1 - abar[t])
    error = (prediction.float() - noise).square().mean((1, 2, 3))
    return (error * (snr.clamp(max=5) / snr)).mean()


def train(cfg: Config) -> None:
    """Train the prior, and write it and its figures."""
    minutes = fit_prior(cfg, "unet", DIFFUSION, steps=2400)
    write_model_index()
    report_prior(cfg, minutes)


def fit_prior(
    cfg: Config,
    name: str,
    into: Path,
    steps: int,
    pictures: str = "data",
    text_learns: bool = False,
) -> float:
    """Train UNet and ControlNet together: depth for 60 % of the samples, no text for 12 %.

    Args:
        name: Of the training's state.
        into: Folder that both are written to.
        steps: Optimiser steps.
        pictures: Folder of the shards.
        text_learns: Whether the text encoder learns words that it has never read, too.

    Returns:
        Minutes spent.
    """
    data = load(keys=("rgb", "depth", "mask", "caption"), folder=pictures)
    vae = AutoencoderKL.from_pretrained(DIFFUSION / "vae").float().eval()
    latents = prepare_latents(vae, data.pop("rgb"))
    ids, which, empty = tokenize_captions(data["caption"])
    text_encoder = CLIPTextModel.from_pretrained(DIFFUSION / "text_encoder", dtype=torch.float32)
    text_encoder.to(cfg.device).eval().requires_grad_(text_learns)
    with torch.no_grad():
        embedded = torch.cat([text_encoder(x.to(cfg.device))[0] for x in ids.split(256)])

    torch.manual_seed(0)
    unet = build_unet()
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_channels=3, load_weights_from_unet=False
    )
    controlnet = ControlNetModel.from_config(
        dict(controlnet.config) | {"conditioning_embedding_out_channels": (8, 16, 32, 64)}
    )
    for network, folder in ((unet, "unet"), (controlnet, "controlnet")):
        warm_start(cfg, network, DIFFUSION / folder / "diffusion_pytorch_model.safetensors")
        network.to(cfg.device)
        network.set_attn_processor(AttnProcessor())
    abar = scheduler().alphas_cumprod.to(cfg.device)
    groups = {1.0: [*unet.parameters(), *controlnet.parameters()]}
    if text_learns:
        groups[TEXT_RATE] = list(text_encoder.parameters())

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (32,))
        z0 = latents[rows].to(cfg.device)
        captions = torch.where(torch.rand(32) < 0.12, empty, which[rows])
        text = embedded[captions]  # [32, L, D]
        if text_learns:
            text = text_encoder(ids[captions].to(cfg.device))[0]
        t = torch.randint(1000, (32,), device=cfg.device)
        noise = torch.randn_like(z0)
        a = abar[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z0 + (1 - a).sqrt() * noise
        with_depth = 19  # The other 13 of 32 run without the ControlNet.
        hint = rough_depth(
            data["depth"][rows[:with_depth].numpy()], data["mask"][rows[:with_depth].numpy()]
        ).to(cfg.device)
        down, mid = controlnet(
            noisy[:with_depth], t[:with_depth], text[:with_depth], hint, return_dict=False
        )
        pad = 32 - with_depth
        down = [F.pad(d, (0, 0, 0, 0, 0, 0, 0, pad)) for d in down]
        mid = F.pad(mid, (0, 0, 0, 0, 0, 0, 0, pad))
        out = unet(
            noisy, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        return {
            "depth": noise_loss(out[:with_depth], noise[:with_depth], t[:with_depth], abar)
            * (with_depth / 32),
            "plain": noise_loss(out[with_depth:], noise[with_depth:], t[with_depth:], abar)
            * (pad / 32),
        }

    minutes = fit(name, groups, terms, cfg, steps=steps, lr=8e-4, weight_decay=0.01)
    if text_learns:
        text_encoder.cpu().half().save_pretrained(into / "text_encoder")
    unet.cpu().half().save_pretrained(into / "unet")
    controlnet.cpu().half().save_pretrained(into / "controlnet")
    return minutes


@torch.no_grad()
def sample(
    prior: DiffusionPrior,
    prompt: str,
    count: int,
    depth: Tensor | None = None,
    reference: Tensor | None = None,
    guidance: float = 4.0,
    steps: int = 25,
    seed: int = 0,
) -> Tensor:
    """Sample pictures with deterministic DDIM (arXiv:2010.02502), [count, 3, H, W] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 16, 16, generator=generator)
    condition = prior.condition(prompt, reference)
    times = torch.linspace(980, 0, steps + 1).long().tolist()
    x = ddim(prior, x, condition, times, guidance, depth)
    return prior.decode_latents(x).clamp(-1, 1)


def report_prior(cfg: Config, minutes: float) -> None:
    """Sample every domain without and with depth, and count what came out as asked."""
    prior = DiffusionPrior.from_pretrained(DIFFUSION)
    clip = ClipFeatures.from_pretrained(OUT / "clip")
    held_out = load(validation=True, limit=1, keys=("depth", "mask"))
    mask = torch.from_numpy(held_out["mask"][:8, None]).float() / 255
    depth = torch.from_numpy(held_out["depth"][:8, None]).float().clamp(min=1.0)
    hint = depth_condition(depth, mask, 128)
    rows, right, overlap = [], {}, []
    for i, (name, spec) in enumerate(DOMAINS.items()):
        plain = sample(prior, spec.phrases[0], 8, seed=i)
        guided = sample(prior, spec.phrases[0], 8, depth=hint, seed=i)
        right[name] = (classify(clip, torch.cat([plain, guided])) == i).float()
        drawn, wanted = guided.amin(1, keepdim=True) < 0.8, mask > 0.5
        overlap.append((drawn & wanted).sum() / (drawn | wanted).sum())
        rows.append(torch.cat([plain[:6], guided[:6]]))
    save_sheet("prior", [*rows, torch.cat([hint[:6] * 2 - 1] * 2)])
    figures = {"samples CLIP finds in the prompted domain": percent(torch.cat([*right.values()]))}
    figures |= {f"of them {name}": percent(share) for name, share in right.items()}
    figures["foreground IoU with the given depth, mean"] = f"{torch.stack(overlap).mean():.3f}"
    figures["the worst domain's"] = f"{torch.stack(overlap).min():.3f}"
    report("unet", cfg, minutes, figures)
