"""Run the README's experiments on the embedded world: train, score, draw the figures.

    python -m puppets.experiments

Runs go to `runs/experiments`, one at a time; what is finished is not done again. Scores go to
`docs/results.json`, tables to `docs/results.md`, figures to `docs/figure-*.png` and
`docs/orbit.webp`. A call with another --seed adds its runs to those of the seeds before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
import train
from models.checkpoint import atomic_write, load_generator
from models.eg3d import TriPlaneGenerator
from puppets import oracle
from puppets.data import CAMERAS
from puppets.domains import DOMAINS, HELD_OUT
from puppets.heads import Z_DIM, render
from render import image_grid, orbit, save_image, save_video, to_uint8
from render import render as render_views
from tables import cell

RUNS = Path("runs/experiments")
DOCS = Path("docs")
SOURCE = "checkpoints/puppets/generator.safetensors"
TEXT = ("bronze", "zombie", "clown", "alien", "wood", "sketch", *HELD_OUT)
PICTURE = ("bronze", "alien", "devil")
COMPARED = ("clown", "devil", "robot")  # One that was tuned on, two held out.
ABLATIONS = {
    "gca3d": {},
    "without depth": {"depth_scale": 0.0},
    "without mask": {"mask": False},
    "without HSC": {"hsc_weight": 0.0},
    "plain SDS": {"method": "sds"},
}
COLUMNS = {  # Scores in the tables, and how they are called there.
    "clip_share": "CLIP domain",
    "oracle_domain": "oracle domain",
    "oracle_l1": "L1 to truth",
    "pose_deg": "pose [deg]",
    "identity_top1": "identity top-1",
    "oracle_id": "oracle identity",
    "diversity": "diversity",
    "depth_corr": "depth",
}
TURNING = ("bronze", "zombie", "clown", "alien", "robot", "devil", "marble")  # Beside the source.
TURNING_FRAMES = 48
FIGURE_SEEDS = (3, 14, 15, 92, 65, 35)


@dataclass
class Config:
    """Options of puppets.experiments."""

    only: str = ""  # Part of the names of the runs to do; empty: all.
    seed: int = 0  # Of the training runs.
    samples: int = 64  # Latents that each run is scored on.
    threads: int = 1  # CPU threads; two workers of one thread are faster than one of two.
    worker: int = 0  # Which of `workers` this process is.
    workers: int = 1  # Processes that share the runs.


def plan(seed: int) -> dict[str, dict]:
    """Return every run's options for train.py, by the run's name: objective-domain-s<seed>."""
    runs = {f"text-{d}": {"prompt": DOMAINS[d].phrases[0]} for d in TEXT}
    runs |= {f"image-{d}": {"image": DOCS / f"reference-{d}.png"} for d in PICTURE}
    for label, options in ABLATIONS.items():
        if options:
            prompts = {d: {"prompt": DOMAINS[d].phrases[0]} for d in COMPARED}
            runs |= {f"{prefix(label)}-{d}": prompts[d] | options for d in COMPARED}
    return {f"{name}-s{seed}": options | {"seed": seed} for name, options in runs.items()}


def prefix(label: str) -> str:
    """Return how the names of an objective's runs begin."""
    return "text" if label == "gca3d" else label.lower().replace(" ", "-")


def main(cfg: Config) -> None:
    """Train and score what is missing, then write tables and figures."""
    torch.set_num_threads(cfg.threads)
    DOCS.mkdir(exist_ok=True)
    for domain in PICTURE:
        draw_reference(domain)
    path = DOCS / "results.json"
    eye, sources, truths = oracle.load_oracle(), {}, {}
    runs = {name: options for name, options in plan(cfg.seed).items() if cfg.only in name}
    for name, options in tqdm(list(runs.items())[cfg.worker :: cfg.workers], unit="run"):
        train.main(train.Config(out=RUNS / name, **options))
        if evaluation.read_rows(path).get(name, {}).get("samples") != cfg.samples:
            settings = evaluation.Config(ckpt=(), samples=cfg.samples)
            row = evaluation.score_run(RUNS / name, settings, torch.device("cpu"), sources)
            row |= oracle.score_run(RUNS / name, row, eye, sources, truths)
            evaluation.write_rows(path, evaluation.read_rows(path) | {name: row})
    write_tables(evaluation.read_rows(path))
    draw_figures(cfg.seed)
    draw_orbit(cfg.seed)


def draw_reference(domain: str) -> None:
    """Draw the picture that stands for a domain: one head that no training has seen."""
    path = DOCS / f"reference-{domain}.png"
    if not path.exists():
        z = torch.from_numpy(np.random.RandomState(4242).randn(1, Z_DIM)).float()
        c = CAMERAS.label(torch.tensor([0.25]), torch.tensor([-0.1]))
        save_image(Image.fromarray(to_uint8(render(z, c, domain, size=256)[0])[0]), path)


def write_tables(scores: dict[str, evaluation.Row]) -> None:
    """Write docs/results.md: every run, then the objectives' means over the compared domains."""
    lines = ["# Results on the embedded world", ""]
    lines += ["Written by `python -m puppets.experiments`; all scores are in `results.json`."]
    lines += ["In brackets: what the true pictures of the target domain get for the same score."]
    lines += ["Where there are several seeds: mean ± standard deviation over them."]
    lines += ["Domains that were never looked at while tuning are marked (held out).", ""]
    lines += table_of_runs(scores)
    compared = ", ".join(map(mark, COMPARED))
    lines += ["", f"## What each part does: means over {compared}", ""]
    lines += table_of_objectives(scores)
    text = "\n".join(lines) + "\n"
    atomic_write(DOCS / "results.md", lambda file: file.write(text.encode()))


def table_of_runs(scores: dict[str, evaluation.Row]) -> list[str]:
    """Return a Markdown row per objective and target, over its seeds."""
    seeds: dict[str, list[evaluation.Row]] = {}
    for run, row in scores.items():
        seeds.setdefault(run.rpartition("-s")[0], []).append(row)
    lines = [markdown_row(["run", *COLUMNS.values()]), "|---" * (len(COLUMNS) + 1) + "|"]
    for name, rows in seeds.items():
        lines.append(markdown_row([mark(name), *(cell(rows, column) for column in COLUMNS)]))
    return lines


def table_of_objectives(scores: dict[str, evaluation.Row]) -> list[str]:
    """Return a Markdown row per objective that was run on all compared domains."""
    lines = [markdown_row(["objective", *COLUMNS.values()]), "|---" * (len(COLUMNS) + 1) + "|"]
    seeds = sorted({run.rpartition("-s")[2] for run in scores}, key=int)
    for label in ABLATIONS:
        runs = [[f"{prefix(label)}-{d}-s{seed}" for d in COMPARED] for seed in seeds]
        means = [mean_row([scores[r] for r in row]) for row in runs if scores.keys() >= set(row)]
        if means:
            lines.append(markdown_row([label, *(cell(means, column) for column in COLUMNS)]))
    return lines


def mean_row(rows: list[evaluation.Row]) -> evaluation.Row:
    """Return the means of the numbers that all rows have."""
    names = [n for n in rows[0] if all(isinstance(row.get(n), float) for row in rows)]
    return {n: float(np.mean([row[n] for row in rows])) for n in names}


def markdown_row(cells: list[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def mark(name: str) -> str:
    """Return a domain, or a run's name that ends in one, marked if the domain is held out."""
    return f"{name} (held out)" if name.rpartition("-")[2] in HELD_OUT else name


def draw_figures(seed: int) -> None:
    """Draw source heads above the same heads of every text, every picture, every objective."""
    rows = {
        "text": {f"text-{domain}": DOMAINS[domain].phrases[0] for domain in TEXT},
        "image": {f"image-{domain}": "" for domain in PICTURE},
        "objective": {f"{prefix(label)}-{COMPARED[1]}": label for label in ABLATIONS},
    }
    source = show(load_generator(SOURCE))
    for figure, labels in rows.items():
        heads = [("source", None, source)]
        for name, label in labels.items():
            run = RUNS / f"{name}-s{seed}"
            if (run / "generator.safetensors").exists():
                picture = Image.open(run / "reference.png") if figure == "image" else None
                heads.append((label, picture, show(load_generator(run))))
        save_image(sheet(heads), DOCS / f"figure-{figure}.png")


def draw_orbit(seed: int) -> None:
    """Draw two heads that turn: the source's and, beside it, what they became."""
    runs = [RUNS / f"text-{domain}-s{seed}" for domain in TURNING]
    networks = [load_generator(SOURCE)]
    networks += [load_generator(run) for run in runs if (run / "generator.safetensors").exists()]
    heads = [
        zip(*(orbit(G, head, TURNING_FRAMES) for G in networks), strict=True)
        for head in FIGURE_SEEDS[:2]
    ]
    frames = [image_grid([torch.cat(row) for row in rows]) for rows in zip(*heads, strict=True)]
    save_video(frames, DOCS / "orbit.webp")


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
