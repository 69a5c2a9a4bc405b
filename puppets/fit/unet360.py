"""Go on training UNet and ControlNet on heads seen from all sides, with words for the view.

They begin with the weights in `checkpoints/puppets/diffusion`, as does the text encoder, to which
front, side and back were the same. They get a folder of their own beside copies of the networks
that stay: `checkpoints/puppets360/diffusion`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.cameras import VIEW_WORDS
from models.diffusion import DiffusionPrior, depth_condition
from models.features import ClipFeatures
from puppets.data import load
from puppets.domains import DOMAINS
from puppets.fit.clip import classify
from puppets.fit.pretrain import DIFFUSION, OUT, Config, percent, report, save_sheet
from puppets.fit.unet import fit_prior, sample

FOLDER = Path("checkpoints/puppets360")
SHEET = ("person", "bronze", "devil", "elf")  # Domains in the contact sheet.
STAYS = ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")


def train(cfg: Config) -> None:
    """Train, and write the folder and its figures."""
    into = FOLDER / "diffusion"
    into.mkdir(parents=True, exist_ok=True)
    for name in STAYS:
        copy = shutil.copytree if (DIFFUSION / name).is_dir() else shutil.copy
        if not (into / name).exists():
            copy(DIFFUSION / name, into / name)
    vocabulary = json.loads((DIFFUSION / "vocabulary.json").read_text())
    words = {word for view in VIEW_WORDS for word in view.split()}
    vocabulary["words"] = sorted(words.union(vocabulary["words"]))
    (into / "vocabulary.json").write_text(json.dumps(vocabulary, indent=1))
    minutes = fit_prior(replace(cfg, warm_start=True), "unet360", into, 3000, "around", True)
    report_prior(cfg, minutes)


def report_prior(cfg: Config, minutes: float) -> None:
    """Sample every domain from every side, and count what came out as asked."""
    prior = DiffusionPrior.from_pretrained(FOLDER / "diffusion")
    clip = ClipFeatures.from_pretrained(OUT / "clip")
    held_out = load(validation=True, limit=1, keys=("depth", "mask"), folder="around")
    mask = torch.from_numpy(held_out["mask"][:4, None]).float() / 255
    depth = torch.from_numpy(held_out["depth"][:4, None]).float().clamp(min=1.0)
    hint = depth_condition(depth, mask, 128)

    def seen(prompt: str, seed: int, given: Tensor | None = None) -> Tensor:
        return sample(prior, prompt, 4, depth=given, seed=seed)

    right: dict[str, list[Tensor]] = {view: [] for view in VIEW_WORDS}
    rows = []
    for i, (name, spec) in enumerate(DOMAINS.items()):
        pictures = [seen(f"{spec.phrases[0]}, {view}", i) for view in VIEW_WORDS]
        for view, drawn in zip(VIEW_WORDS, pictures, strict=True):
            right[view].append(classify(clip, drawn) == i)
        if name in SHEET:
            rows.append(torch.cat([*pictures, seen(spec.phrases[0], i, hint)]))
    save_sheet("prior", [*rows, torch.cat([hint * 2 - 1] * 4)], FOLDER)
    figures = {
        f"samples of a {view} that CLIP finds in the prompted domain": percent(torch.cat(found))
        for view, found in right.items()
    }
    report("unet360", cfg, minutes, figures, FOLDER)
