"""How near inversions and directions come to the truth, which is known of puppets.

    python -m puppets.people --ckpt runs/a-devil

Inverts true pictures of people whom no training has seen, from cameras at random, with and without
tuning, and looks at them in the run's domain. Reads what edits along directions change. Writes
docs/people.json, head by head, so that the same command goes on where it was stopped; then draws
docs/figure-people.png: a photo, its inversion, the person in the runs' domains, and edited; and
docs/figure-edits.png: heads of the source and of the first run, along the directions of words.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import directions
import invert
from files.generators import load_generator
from harness.cli import run_cli
from harness.pictures import image_grid, read_picture, save_image, to_image, to_uint8
from harness.store import write_text
from metrics import angle_deg
from models.generator import Generator
from puppets.data import CAMERAS
from puppets.experiments import label_columns, sheet
from puppets.heads import Z_DIM, identity, render
from puppets.oracle import camera_direction, load_oracle, people_read, target_domain
from render import PITCH, portraits, views
from subjects import (
    DIRECTIONS,
    Person,
    edit,
    load_person,
    load_run,
    read_tensors,
    seed_to_person,
    show,
    wide_codes,
)

OUT = Path("docs/people.json")
SOURCE = Path("checkpoints/puppets/generator.safetensors")
SEED = 5000  # Of the first of the people.
TUNED = 200  # Steps of weights.
EDITED, MOVE = 24, 2.0  # Heads that are edited, and by how many deviations.
FIGURE_EDIT = {"hair": -1.5, "dark": -2.0}
FIGURE_EDITS = ({}, {"hair": 2.5}, {"hair": -2.5}, {"skin": 2.5}, {"dark": 2.5}, {"dark": -2.5})
FIGURE_SEEDS = range(1, 5)
# The number of a latent that each of the words is about, and its sign.
NUMBERS = {"hair": (14, 1), "dark": (12, -1), "skin": (15, 1)}


@dataclass
class Config:
    """Options of puppets.people."""

    ckpt: tuple[str, ...] = ()  # Runs in whose domains the people are looked at.
    count: int = 20  # People who are inverted.
    tuned: int = 20  # How many of them once more, with tuned weights.
    threads: int = 2  # CPU threads.


def main(cfg: Config) -> None:
    """Measure what is not measured yet, and print the means."""
    torch.set_num_threads(cfg.threads)
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    rows = known.setdefault("inversions", {})
    for tune, count in ((0, cfg.count), (TUNED, cfg.tuned)):
        for seed in range(SEED, SEED + count):
            if (name := f"{seed}, tune {tune}") not in rows:
                rows[name] = invert_one(seed, tune, cfg)
                write_text(OUT, json.dumps(known, indent=1) + "\n")
    if "directions" not in known:
        known["directions"] = measure_directions()
        write_text(OUT, json.dumps(known, indent=1) + "\n")
    print("\n".join(tables(known)))
    if cfg.ckpt:
        draw_figure(cfg)


def draw_person(seed: int) -> tuple[Tensor, Tensor]:
    """Return a latent [1, 16] and a camera [1, 25] of somebody whom no training has seen."""
    rng = np.random.default_rng([77, seed])
    z = torch.from_numpy(rng.standard_normal((1, Z_DIM))).float()
    turn, pitch = rng.uniform(-1, 1, 2)
    angles = torch.tensor([turn * CAMERAS.yaw_range, pitch * CAMERAS.pitch_range]).float()
    return z, CAMERAS.label(*angles.split(1))


def invert_one(seed: int, tune: int, cfg: Config) -> dict[str, float | bool]:
    """Invert the true picture of one person, and compare with the truth.

    Returns:
        `seconds` of the whole; `pose_deg`, the angle to the true camera; `psnr` over the true
        foreground [dB]; `right_<run>`, whether the person in a run's domain is nearer to their own
        true picture there than to that of anybody else.
    """
    z, c = draw_person(seed)
    image, _, mask = render(z, c)
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "photo.png")
        save_image(Image.fromarray(to_uint8(image)[0]), photo)
        out, begun = Path(folder, "person.safetensors"), time.time()
        invert.main(invert.Config(image=photo, out=out, tune=tune, device="cpu"))
        seconds = time.time() - begun
        G = load_generator(SOURCE)
        person = load_person(out, G)
    drawn = show(G, person).see(person.c)["image"].clamp(-1, 1)
    square = (drawn - image).square().mean(1, keepdim=True)
    row: dict[str, float | bool] = {
        "seconds": round(seconds, 1),
        "pose_deg": angle_deg(camera_direction(person.c), camera_direction(c)).item(),
        "psnr": (10 * torch.log10(4 * mask.sum() / (square * mask).sum())).item(),
    }
    for ckpt in cfg.ckpt:
        row[f"right_{Path(ckpt).name}"] = is_nearest(ckpt, person, seed, cfg)
    return row


def is_nearest(ckpt: str, person: Person, seed: int, cfg: Config) -> bool:
    """Return whether a person in a run is nearest to their own true picture, of all people's."""
    adapted, _, settings = load_run(ckpt)
    domain = target_domain(Path(ckpt), settings, load_oracle())
    _, c = draw_person(seed)
    seen = show(adapted, person).see(c)["image"].clamp(-1, 1)
    people = [draw_person(s)[0] for s in range(SEED, SEED + cfg.count)]
    true = torch.cat([render(z, c, domain)[0] for z in people])
    return (seen - true).abs().mean((1, 2, 3)).argmin().item() == seed - SEED


def tables(known: dict[str, dict]) -> list[str]:
    """Return what docs/people.md says of the measurements, in Markdown."""
    lines = ["|  | people | median | worst |", "| --- | --- | --- | --- |"]
    for tune, how in ((0, "codes alone"), (TUNED, f"with --tune {TUNED}")):
        rows = [row for name, row in known["inversions"].items() if name.endswith(f" {tune}")]
        for name, title, worst in (
            ("psnr", "PSNR of the head [dB]", min),
            ("pose_deg", "angle of the camera [deg]", max),
        ):
            values = [row[name] for row in rows]
            if values:
                middle = f"{np.median(values):.2f} | {worst(values):.2f}"
                lines.append(f"| {title}, {how} | {len(rows)} | {middle} |")
        for name in [name for name in (rows or [{}])[0] if name.startswith("right_")]:
            right = sum(row[name] for row in rows)
            title = f"nearest to their own true picture as {name.removeprefix('right_')}"
            lines.append(f"| {title}, {how} | {len(rows)} | {right / len(rows):.0%} | |")
    lines += ["", "| direction | cosine to the known one | its number | most of another |"]
    lines += ["| --- | --- | --- | --- |"]
    for name, row in known["directions"].items():
        numbers = " | ".join(f"{row[x]:.2f}" for x in ("cosine", "change", "worst_other"))
        lines.append(f"| {name} | {numbers} |")
    return lines


def draw_figure(cfg: Config) -> None:
    """Draw what becomes of a photo, from left to right."""
    photo = Path("docs/photo.png")
    with tempfile.TemporaryDirectory() as folder:
        out, found = Path(folder, "me.safetensors"), Path(folder, "directions.safetensors")
        invert.main(invert.Config(image=photo, out=out, tune=TUNED, device="cpu"))
        directions.main(directions.Config(out=found, device="cpu"))
        G_src = load_generator(SOURCE)
        draw_edits(G_src, load_generator(cfg.ckpt[0]), found)
        person = load_person(out, G_src)
        (edited,) = edit([person], found, FIGURE_EDIT, wide_codes(G_src))
    picture = to_image(read_picture(photo))
    columns = {"photo": F.interpolate(picture, (128, 128), mode="bilinear", antialias=True)}
    c = person.c
    columns["inverted"] = show(G_src, person).see(c)["image"]
    for ckpt in cfg.ckpt:
        G, _, settings = load_run(ckpt)
        columns[settings["prompt"]] = show(G, person).see(c)["image"]
    words = ", ".join(f"{name} {amount:+g}" for name, amount in FIGURE_EDIT.items())
    columns[words] = show(G_src, edited).see(c)["image"]
    columns["the same, turned"] = views(show(G, edited), (-0.4,))["image"]
    large = [
        F.interpolate(x.clamp(-1, 1), scale_factor=1.5, mode="bicubic") for x in columns.values()
    ]
    strip = image_grid([torch.cat(large)], len(large))
    save_image(label_columns(strip, list(columns)), Path("docs/figure-people.png"))


def draw_edits(G_src: Generator, G: Generator, found: Path) -> None:
    """Draw heads of the source and of a run, before and after edits, a row each."""
    people, codes = [seed_to_person(G_src, seed) for seed in FIGURE_SEEDS], wide_codes(G_src)
    rows = []
    for moves in FIGURE_EDITS:
        moved = edit(people, found, moves, codes)
        label = ", ".join(f"{name} {amount:+g}" for name, amount in moves.items())
        images = [portraits([show(network, x) for x in moved]) for network in (G_src, G)]
        rows.append((label or "not edited", None, torch.cat(images).clamp(-1, 1)))
    save_image(sheet(rows, margin=90), Path("docs/figure-edits.png"))


def known_direction(w: Tensor, z: Tensor, number: int) -> Tensor:
    """Return the direction [w_dim] of one of the numbers that make a head (see heads.py)."""
    order = identity(z)[:, number].argsort()
    tenth = len(z) // 10
    change = w[order[-tenth:]].mean(0) - w[order[:tenth]].mean(0)
    return directions.in_deviations(change, w)


@torch.no_grad()
def measure_directions() -> dict[str, dict]:
    """Find the directions of directions.py, and compare them with the known ones.

    Returns:
        For each of NUMBERS `cosine` to the known direction; `change` of the number that the oracle
        reads, after an edit of MOVE, and `worst_other`, the largest change of another.
    """
    G, eye = load_generator(SOURCE), load_oracle()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "directions.safetensors")
        directions.main(directions.Config(out=out, device="cpu"))
        found, _ = read_tensors(out, DIRECTIONS)
        people = [seed_to_person(G, SEED + i) for i in range(EDITED)]
        codes = wide_codes(G)
        moved = {name: edit(people, out, {name: MOVE}, codes) for name in NUMBERS}
    z = torch.randn(10_000, Z_DIM, generator=torch.Generator().manual_seed(SEED))
    w = torch.cat([G.mapping(part, CAMERAS.frontal(len(part)))[:, 0] for part in z.split(1000)])
    before = readings(G, eye, people)
    result = {}
    for name, (number, sign) in NUMBERS.items():
        known = sign * known_direction(w, z, number)
        change = (readings(G, eye, moved[name]) - before).mean(0)  # [16]
        others = change.abs()
        others[number] = 0
        result[name] = {
            "cosine": F.cosine_similarity(found[name], known, dim=0).item(),
            "change": sign * change[number].item(),
            "worst_other": others.max().item(),
        }
    return result


def readings(G: Generator, eye: torch.nn.Module, people: list[Person]) -> Tensor:
    """Return what the oracle reads of people seen from the front, [N, 16]."""
    c = CAMERAS.label(torch.zeros(1), torch.full((1,), PITCH))
    images = torch.cat([show(G, person).see(c)["image"] for person in people])
    return people_read(eye, images.clamp(-1, 1))


if __name__ == "__main__":
    run_cli(Config, main, __doc__)
