"""Train the ViT whose tokens HSC compares, in DINOv2's format: structure, whatever the domain."""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from models.features import IMAGENET_MEAN, IMAGENET_STD, TokenFeatures
from models.renderer import pixel_rays
from puppets.data import CAMERAS, DOMAIN_NAMES, load, to_images
from puppets.fit.pretrain import EAGER, OUT, Config, fit, percent, report
from puppets.heads import Z_DIM, render


def build_vit() -> Dinov2Model:
    """Return DINOv2's architecture, small: 8 px patches, a 16 x 16 grid of 96-wide tokens."""
    return Dinov2Model._from_config(
        Dinov2Config(
            image_size=128,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=3,
        ),
        attn_implementation=EAGER,
    )


def train(cfg: Config) -> None:
    """Train the ViT without labels of domain or person: masked grey patches, and where they lie.

    Half the tokens are hidden. Each token tells the head-centred position of its four quarters
    (known from depth and camera) and its locally normalised grey values: structure, not colour.
    """
    data = load(keys=("rgb", "depth", "mask", "c"))
    torch.manual_seed(0)
    vit = build_vit().to(cfg.device)
    head = nn.Linear(96, 4 * 4 + 64).to(cfg.device)
    place = positions(data.pop("depth"), data.pop("mask"), data.pop("c"))  # [N, 256, 16]
    pixels = data["rgb"]

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(pixels), (32,))
        images = to_images(pixels[rows.numpy()])
        grey = F.unfold(images.mean(1, keepdim=True), 8, stride=8).mT  # [B, 256, 64]
        grey = (grey - grey.mean(2, keepdim=True)) / (grey.std(2, keepdim=True) + 0.08)
        gain = 1 + 0.3 * (2 * torch.rand(32, 3, 1, 1) - 1)
        tinted = ((images + 1) * gain / 2).clamp(0, 1)
        pixels_in = (tinted - mean) / std
        hidden = torch.rand(32, 256) < (0.5 if step % 2 else 0.0)
        tokens = vit(
            pixels_in.to(cfg.device), bool_masked_pos=hidden.to(cfg.device)
        ).last_hidden_state[:, 1:]
        out = head(tokens).float()
        target = place[rows].to(cfg.device)
        where = out[..., :16].unflatten(2, (4, 4))
        goal = target.unflatten(2, (4, 4))
        xyz = (
            ((where[..., :3] - goal[..., :3]).abs() * goal[..., 3:]).sum() / goal[..., 3:].sum() / 3
        )
        cover = F.binary_cross_entropy_with_logits(where[..., 3], goal[..., 3])
        return {
            "place": 8 * xyz,
            "cover": 0.3 * cover,
            "grey": (out[..., 16:] - grey.to(cfg.device)).abs().mean(),
        }

    minutes = fit(
        "dino",
        [*vit.parameters(), *head.parameters()],
        terms,
        cfg,
        steps=1000,
        lr=1e-3,
        weight_decay=0.02,
    )
    vit.cpu().half().save_pretrained(OUT / "dino")
    preprocess = {
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "image_processor_type": "BitImageProcessor",
    }
    (OUT / "dino/preprocessor_config.json").write_text(json.dumps(preprocess, indent=2) + "\n")
    report_dino(cfg, minutes)


def positions(depth: np.ndarray, mask: np.ndarray, c: np.ndarray) -> Tensor:
    """Head-centred x, y, z (x 4 to be near 1) and coverage of each 4 px cell, [N, 256, 4 * 4]."""
    out = []
    for i in range(len(depth)):
        origin, direction = pixel_rays(torch.from_numpy(c[i : i + 1]), 32)
        inside = torch.from_numpy(mask[i]).float()[2::4, 2::4].flatten() > 127  # [1024]
        t = torch.from_numpy(depth[i]).float()[2::4, 2::4].flatten()
        point = 4 * (origin[0] + t[:, None] * direction[0]) * inside[:, None]
        cells = torch.cat([point, inside[:, None].float()], 1).T.view(4, 16, 2, 16, 2)
        out.append(cells.permute(1, 3, 2, 4, 0).reshape(256, 16).half())
    return torch.stack(out).float()


def report_dino(cfg: Config, minutes: float) -> None:
    """Check that a token finds its own place in the same head of another domain."""
    vit = TokenFeatures.from_pretrained(OUT / "dino")
    torch.manual_seed(77)
    z = torch.randn(16, Z_DIM)
    c = CAMERAS.sample(16)
    source, _, mask = render(z, c)
    ours = F.normalize(vit.tokens(source), dim=-1).flatten(1, 2)  # [B, 256, D]
    inside = F.avg_pool2d(mask, 8).flatten(1) > 0.5
    figures = {}
    for name in DOMAIN_NAMES[1:]:
        theirs = F.normalize(vit.tokens(render(z, c, name)[0]), dim=-1).flatten(1, 2)
        found = (theirs @ ours.mT).argmax(2) == torch.arange(256)
        figures[f"{name}: foreground tokens nearest to the source's same place"] = percent(
            found[inside].float()
        )
    report("dino", cfg, minutes, figures)
