"""The oracle: a small network that reads domain, identity and camera off a picture, to measure by.

It is trained on true pictures of every domain and takes no part in any adaptation, so no loss is
its own judge.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from puppets.data import DOMAIN_NAMES, load, to_images
from puppets.heads import Z_DIM, identity
from puppets.pretrain import OUT, Config, fit, report

ORACLE = OUT / "oracle.safetensors"


class Oracle(nn.Module):
    """Convolutions at half the resolution each, then one linear layer."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__()
        widths = (3, 24, 48, 96, 128, 160)
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
            layers += [nn.Conv2d(b, b, 3, 1, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(160 * 16, len(DOMAIN_NAMES) + Z_DIM + 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read images.

        Args:
            images: [B, 3, 128, 128] in [-1, 1].

        Returns:
            Domain logits [B, 13]; identity [B, 16], of unit RMS; direction from the origin to the
            camera, [B, 3], of unit length.
        """
        out = self.head(self.trunk(images).flatten(1)).float()
        domain, z, camera = out.split([len(DOMAIN_NAMES), Z_DIM, 3], dim=1)
        return domain, identity(z), F.normalize(camera, dim=1)


def load_oracle(path: Path = ORACLE) -> Oracle:
    """Load the committed oracle, frozen, in float32."""
    oracle = Oracle()
    oracle.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return oracle.eval().requires_grad_(False)


def angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """Angle between unit vectors, degrees, [B]."""
    return torch.rad2deg((a * b).sum(1).clamp(-1, 1).arccos())


def train_oracle(cfg: Config) -> None:
    """Train and write the oracle."""
    pictures = {}
    for validation in (False, True):
        raw = load(validation, keys=("rgb", "view", "z", "c", "c2", "domain"))
        camera = torch.from_numpy(raw["c"][:, 3:16:4][:, :3])
        second = torch.from_numpy(raw["c2"][:, 3:16:4][:, :3])
        pictures[validation] = (
            [raw["rgb"], raw["view"]],
            identity(torch.from_numpy(raw["z"])),
            [F.normalize(camera, dim=1), F.normalize(second, dim=1)],
            torch.from_numpy(raw["domain"]),
        )
    views, people, cameras, domains = pictures[False]
    torch.manual_seed(0)
    oracle = Oracle().to(cfg.device).to(memory_format=torch.channels_last)

    def terms(step: int) -> dict[str, Tensor]:
        rows, which = torch.randint(len(people), (48,)), step % 2
        images = to_images(views[which][rows.numpy()]) + 0.04 * torch.randn(48, 3, 128, 128)
        domain, z, camera = oracle(
            images.contiguous(memory_format=torch.channels_last).to(cfg.device)
        )
        return {
            "domain": 0.3 * F.cross_entropy(domain, domains[rows].to(cfg.device)),
            "identity": (z - people[rows].to(cfg.device)).square().mean(),
            "camera": 20 * (camera - cameras[which][rows].to(cfg.device)).square().sum(1).mean(),
        }

    minutes = fit(
        "oracle", oracle.parameters(), terms, cfg, steps=1200, lr=1.5e-3, weight_decay=0.05
    )
    save_file({k: v.half().contiguous() for k, v in oracle.cpu().state_dict().items()}, ORACLE)

    oracle = load_oracle()
    views, people, cameras, domains = pictures[True]
    with torch.no_grad():
        parts = [oracle(to_images(views[0][i : i + 64])) for i in range(0, len(people), 64)]
    domain, z, camera = (torch.cat(x) for x in zip(*parts, strict=True))
    named = domain.argmax(1) == domains
    match = (z @ people.T).argmax(1) == torch.arange(len(people))
    report(
        "oracle",
        cfg,
        minutes,
        {
            "held-out renders whose domain it names": f"{100 * named.float().mean():.1f} %",
            f"whose person it finds among {len(people)}": f"{100 * match.float().mean():.1f} %",
            "cosine of the identity": f"{F.cosine_similarity(z, people).mean():.3f}",
            "camera error [deg]": f"{angle_deg(camera, cameras[0]).mean():.2f}",
        },
    )
