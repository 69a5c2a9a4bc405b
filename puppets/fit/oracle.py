"""Train the oracle on true pictures of every domain: which domain, who, from where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from metrics import angle_deg
from puppets.data import load, to_images
from puppets.fit.pretrain import Config, fit, percent, report, warm_start
from puppets.heads import identity
from puppets.oracle import BATCH, ORACLE, Oracle, camera_direction, load_oracle


def train(cfg: Config) -> None:
    """Train and write the oracle."""
    pictures, people, cameras, domains = load_pictures(validation=False)
    torch.manual_seed(0)
    oracle = Oracle()
    warm_start(cfg, oracle, ORACLE)
    oracle.to(cfg.device).to(memory_format=torch.channels_last)

    def terms(step: int) -> dict[str, Tensor]:
        rows, which = torch.randint(len(people), (BATCH,)), step % 2
        images = to_images(pictures[which][rows.numpy()])  # [B, 3, 128, 128]
        images = images + 0.04 * torch.randn(images.shape)
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
    report_oracle(load_oracle(), cfg, minutes)


def load_pictures(
    validation: bool,
) -> tuple[list, Tensor, list[Tensor], Tensor]:
    """Read rendered heads: two views [N, 128, 128, 3] uint8, identity, two cameras, domain."""
    raw = load(validation, keys=("rgb", "view", "z", "c", "c2", "domain"))
    cameras = [camera_direction(torch.from_numpy(raw[key])) for key in ("c", "c2")]  # [N, 3] each
    people = identity(torch.from_numpy(raw["z"]))  # [N, 16]
    return [raw["rgb"], raw["view"]], people, cameras, torch.from_numpy(raw["domain"])


@torch.no_grad()
def report_oracle(oracle: Oracle, cfg: Config, minutes: float) -> None:
    """Write what the oracle reads off heads that it was not trained on to REPORT.md."""
    pictures, people, cameras, domains = load_pictures(validation=True)
    parts = [oracle(to_images(pictures[0][i : i + 64])) for i in range(0, len(people), 64)]
    domain, z, camera = (torch.cat(x) for x in zip(*parts, strict=True))
    match = (z @ people.T).argmax(1) == torch.arange(len(people))
    figures = {
        "held-out renders whose domain it names": percent(domain.argmax(1) == domains),
        f"whose person it finds among {len(people)}": percent(match),
        "cosine of the identity": f"{F.cosine_similarity(z, people).mean():.3f}",
        "camera error [deg]": f"{angle_deg(camera, cameras[0]).mean():.2f}",
    }
    report("oracle", cfg, minutes, figures)
