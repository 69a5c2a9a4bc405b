"""Train an IP-Adapter in the layout of h94/IP-Adapter, with the UNet frozen."""

from __future__ import annotations

import math
import shutil

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from models.diffusion import DiffusionPrior
from models.features import ClipFeatures
from puppets.data import DOMAIN_NAMES, ROOT, load, to_images
from puppets.fit.clip import WIDTH, classify
from puppets.fit.pretrain import DIFFUSION, OUT, Config, fit, percent, report, save_sheet
from puppets.fit.unet import embed_captions, noise_loss, prepare_latents, rough_depth, sample

WEIGHTS = "ip-adapter_sd15.safetensors"


def train(cfg: Config) -> None:
    """Train the IP-Adapter from another view of the same head, everything else frozen."""
    finished = DIFFUSION / "ip_adapter/models"
    folder = ROOT / "ip_adapter/models"  # The committed adapter stays whole until the end.
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    unet = UNet2DConditionModel.from_pretrained(DIFFUSION / "unet").float()
    torch.manual_seed(0)
    state = {
        "image_proj": {
            "proj.weight": torch.randn(4 * WIDTH, WIDTH) / math.sqrt(WIDTH),
            "proj.bias": torch.zeros(4 * WIDTH),
            "norm.weight": torch.ones(WIDTH),
            "norm.bias": torch.zeros(WIDTH),
        },
        "ip_adapter": {},
    }
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for key, source in (("to_k_ip", layer.to_k), ("to_v_ip", layer.to_v)):
                state["ip_adapter"][f"{i}.{key}.weight"] = source.weight.detach().clone()

    def write() -> None:
        flat = {
            f"{group}.{k}": v.half().contiguous()
            for group, part in state.items()
            for k, v in part.items()
        }
        save_file(flat, folder / WEIGHTS)

    if not cfg.warm_start:
        write()
    prior = DiffusionPrior.from_pretrained(DIFFUSION, ip_adapter=ROOT / "ip_adapter")
    # The trained tensors, in the order in which they were written.
    projection = prior.unet.encoder_hid_proj.image_projection_layers[0]
    live = [
        projection.image_embeds.weight,
        projection.image_embeds.bias,
        projection.norm.weight,
        projection.norm.bias,
    ]
    for name, processor in prior.unet.attn_processors.items():
        if "attn2" in name:
            processor.scale = [1.0]
            live += [processor.to_k_ip[0].weight, processor.to_v_ip[0].weight]
    for p in live:
        p.requires_grad_(True)

    data = load(keys=("rgb", "view", "caption", "depth", "mask"))
    latents = prepare_latents(prior.vae, data.pop("rgb"))
    views = to_images(data.pop("view")).split(64)
    embeds = torch.cat([prior.encode_reference(part) for part in views])
    text, which, empty = embed_captions(data["caption"])
    abar = prior.alphas_cumprod

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (24,))
        z0, noise = latents[rows], torch.randn(24, 4, 16, 16)
        t = torch.randint(1000, (24,))
        a = abar[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z0 + (1 - a).sqrt() * noise
        words = text[torch.where(torch.rand(24) < 0.7, empty, which[rows])]
        picture = embeds[rows] * (torch.rand(24, 1, 1) > 0.05)
        with torch.no_grad():
            hint = rough_depth(data["depth"][rows.numpy()], data["mask"][rows.numpy()])
            down, mid = prior.controlnet(noisy, t, words, hint, return_dict=False)
            on = (torch.rand(24) < 0.6).view(-1, 1, 1, 1)
        with torch.autocast("cpu", enabled=False):  # Fused attention is slow backwards in bfloat16.
            out = prior.unet(
                noisy,
                t,
                words,
                added_cond_kwargs={"image_embeds": [picture]},
                down_block_additional_residuals=[d.float() * on for d in down],
                mid_block_additional_residual=mid.float() * on,
            ).sample
        return {"noise": noise_loss(out, noise, t, abar)}

    minutes = fit("ip-adapter", live, terms, cfg, steps=500, lr=1e-3)
    targets = [(group, key) for group, part in state.items() for key in part]
    for (group, key), value in zip(targets, live, strict=True):
        state[group][key] = value.detach()
    write()
    shutil.copy(folder / WEIGHTS, finished / WEIGHTS)
    report_ip_adapter(cfg, minutes)


def report_ip_adapter(cfg: Config, minutes: float) -> None:
    """Sample from held-out pictures, without words, and count the domains that come back."""
    prior = DiffusionPrior.from_pretrained(DIFFUSION)
    clip = ClipFeatures.from_pretrained(OUT / "clip")
    held_out = load(validation=True, limit=2, keys=("rgb", "domain"))
    rows, right = [], {}
    for i, name in enumerate(DOMAIN_NAMES):
        picks = np.flatnonzero(held_out["domain"] == i)[:4]
        groups = []
        for k, picture in zip(picks, to_images(held_out["rgb"][picks]), strict=True):
            samples = sample(prior, "", 3, reference=picture[None], seed=int(k))
            groups.append(torch.cat([picture[None], samples]))
        right[name] = (classify(clip, torch.cat([g[1:] for g in groups])) == i).float()
        rows.append(torch.cat(groups[:2]))
    save_sheet("ip-adapter", rows)
    share = percent(torch.cat([*right.values()]))
    figures = {"samples in the reference's domain, no text": share}
    figures |= {f"of them {name}": percent(values) for name, values in right.items()}
    report("ip-adapter", cfg, minutes, figures)
