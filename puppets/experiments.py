"""Run the README's experiments on the embedded world: train, score, draw the figures.

    python -m puppets.experiments

Runs go to `runs/experiments`, one at a time; what is finished is not done again. Scores go to
`docs/results.json`, tables to `docs/results.md`, figures to `docs/figure-*.png`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import eval as evaluation
import train
from models.checkpoint import atomic_write, load_generator
from models.eg3d import TriPlaneGenerator
from puppets.data import CAMERAS
from puppets.domains import DOMAINS
from puppets.heads import Z_DIM, render
from render import render as render_views
from render import save_image, to_uint8

RUNS = Path("runs/experiments")
DOCS = Path("docs")
TEXT = ("bronze", "zombie", "clown", "alien", "wood", "sketch", "devil", "marble", "robot")
PICTURE = ("bronze", "alien", "devil")
COMPARED = ("bronze", "clown", "devil")
ABLATIONS = {
    "gca3d": {},
    "without depth": {"depth_scale": 0.0},
    "without mask": {"mask": False},
    "without HSC": {"hsc_weight": 0.0},
    "plain SDS": {"method": "sds"},
}
FIGURE_SEEDS = (3, 14, 15, 92, 65, 35)


@dataclass
class Config:
    """Options of puppets.experiments."""

    only: str = ""  # Part of the names of the runs to do; empty: all.
    seed: int = 0  # Of the training runs.
    samples: int = 256  # Latents that each run is scored on.
    threads: int = 2  # CPU threads.


def plan(seed: int) -> dict[str, dict]:
    """Return every run's options for train.py, by name."""
    runs = {f"text-{d}": {"prompt": DOMAINS[d].phrases[0]} for d in TEXT}
    runs |= {f"image-{d}": {"image": DOCS / f"reference-{d}.png"} for d in PICTURE}
    for label, options in ABLATIONS.items():
        if options:
            name = label.lower().replace(" ", "-")
            prompts = {d: {"prompt": DOMAINS[d].phrases[0]} for d in COMPARED}
            runs |= {f"{name}-{d}": prompts[d] | options for d in COMPARED}
    return {name: options | {"seed": seed} for name, options in runs.items()}


def main(cfg: Config) -> None:
    """Train and score what is missing, then write tables and figures."""
    torch.set_num_threads(cfg.threads)
    DOCS.mkdir(exist_ok=True)
    for domain in PICTURE:
        draw_reference(domain)
    path = DOCS / "results.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    runs = {name: options for name, options in plan(cfg.seed).items() if cfg.only in name}
    for name, options in runs.items():
        train.main(train.Config(out=RUNS / name, **options))
        if name not in scores:
            settings = evaluation.Config(ckpt=(), samples=cfg.samples)
            scores[name] = evaluation.score_run(RUNS / name, settings, torch.device("cpu"))
            text = json.dumps(scores, indent=2) + "\n"
            atomic_write(path, lambda file, text=text: file.write(text.encode()))
    write_tables(scores)
    draw_figures()


def draw_reference(domain: str) -> None:
    """Draw the picture that stands for a domain: one head that no training has seen."""
    path = DOCS / f"reference-{domain}.png"
    if not path.exists():
        z = torch.from_numpy(np.random.RandomState(4242).randn(1, Z_DIM)).float()
        c = CAMERAS.label(torch.tensor([0.25]), torch.tensor([-0.1]))
        save_image(Image.fromarray(to_uint8(render(z, c, domain, size=256)[0])[0]), path)


def write_tables(scores: dict[str, dict]) -> None:
    """Write docs/results.md: every run, then the ablations' means over the compared domains."""
    names = [n for n in next(iter(scores.values())) if n not in ("method", "target")]
    lines = [
        "# Results on the embedded world",
        "",
        "Written by `python -m puppets.experiments`.",
        "",
    ]
    lines += ["| run | target | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for run, row in scores.items():
        shown = [f"{row[n]:.3f}" if n in row else "" for n in names]
        lines.append(f"| {run} | {row['target']} | " + " | ".join(shown) + " |")
    lines += ["", f"## What each part does: means over {', '.join(COMPARED)}", ""]
    lines += ["| objective | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label in ABLATIONS:
        prefix = "text" if label == "gca3d" else label.lower().replace(" ", "-")
        rows = [scores[f"{prefix}-{d}"] for d in COMPARED if f"{prefix}-{d}" in scores]
        if len(rows) == len(COMPARED):
            means = [f"{np.mean([row[n] for row in rows]):.3f}" for n in names]
            lines.append(f"| {label} | " + " | ".join(means) + " |")
    text = "\n".join(lines) + "\n"
    atomic_write(DOCS / "results.md", lambda file: file.write(text.encode()))


def draw_figures() -> None:
    """Draw source heads above the same heads in every domain, for text and for pictures."""
    source = load_generator("checkpoints/puppets/generator.safetensors")
    for kind, domains in (("text", TEXT), ("image", PICTURE)):
        rows = [("source", None, show(source))]
        for domain in domains:
            run = RUNS / f"{kind}-{domain}"
            if not (run / "generator.safetensors").exists():
                continue
            picture = Image.open(run / "reference.png") if kind == "image" else None
            label = DOMAINS[domain].phrases[0] if kind == "text" else ""
            rows.append((label, picture, show(load_generator(run))))
        save_image(sheet(rows), DOCS / f"figure-{kind}.png")


def show(G: TriPlaneGenerator) -> Tensor:
    """Render two views of each figure head, [2 N, 3, R, R]."""
    return torch.cat([render_views(G, seed, (0.35, -0.35))["image"] for seed in FIGURE_SEEDS])


def sheet(rows: list[tuple[str, Image.Image | None, Tensor]], margin: int = 150) -> Image.Image:
    """Put labelled rows of pictures under each other on white."""
    size = rows[0][2].shape[-1]
    page = Image.new("RGB", (margin + size * len(rows[0][2]), size * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for y, (label, picture, images) in enumerate(rows):
        for x, pixels in enumerate(to_uint8(images)):
            page.paste(Image.fromarray(pixels), (margin + x * size, y * size))
        if picture is not None:
            page.paste(picture.resize((size, size)), (margin - size - 11, y * size))
        pen.text((8, (y + 0.5) * size), label, fill="black", font=font, anchor="lm")
    return page


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
