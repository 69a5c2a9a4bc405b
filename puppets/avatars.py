"""Score avatar.py on the embedded world: what each of its parts brings, on eight prompts.

    for i in 0 1; do python -m puppets.avatars --worker $i --workers 2 & done; wait
    python -m puppets.avatars

Every prompt names a domain and a length of hair, so what is true is known: the heads of the domain
whose numbers the oracle reads off the avatar. Rows go to docs/avatars.json; what is there is not
made again. Alone, the command makes what is left, prints the table of docs/avatar.md and draws
docs/figure-avatars.png.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import pi
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import avatar
import eval as evaluation
from files.generators import save_generator
from harness.cli import run_cli
from harness.devices import flush_denormals, keep_freed_memory
from harness.pictures import save_image
from harness.run_folder import sole_writer
from harness.store import write_text
from harness.tables import Row
from metrics import distances
from models.features import ClipFeatures
from models.texture import cuts, look, sample_texture
from puppets import faces, oracle
from puppets.data import DOMAIN_NAMES, ROUND_CAMERAS
from puppets.domains import DOMAINS
from puppets.experiments import sheet
from puppets.plan import DOCS, slug
from refine import LARGER, Textured, refine, texture_head
from subjects import Subject

RUNS = Path("runs/avatars")
ROWS = DOCS / "avatars.json"
# The domain of each prompt, and the sign of the length of hair that it asks for.
PROMPTS = {
    "a zombie with long hair": ("zombie", 1),
    "an alien with short hair": ("alien", -1),
    "a bronze statue with long hair": ("bronze", 1),
    "a marble statue with short hair": ("marble", -1),
    "a robot with long hair": ("robot", 1),
    "an elf with short hair": ("elf", -1),
    "a devil with long hair": ("devil", 1),
    "a yellow toy figure with short hair": ("toy", -1),
}
SEEDS = (0, 1)
RIM = 4  # Pixels from a head's outline that are not inside of it.
LENGTH = 14  # Which of the numbers that make a head is the length of its hair.
NEAR, ROUND = 12, 16  # Views as in the oracle's pictures, and from all sides.
ALONE = {"variation": 0.0, "opacity": 0.0}
WEIGHTS = (r"(backbone\.synthesis|superresolution)\..*\.weight",)
# What a part's row is trained with; the rows after "+ total variation" are textured meshes.
PARTS: dict[str, dict | None] = {
    "search alone": None,
    "StyleGAN-Fusion of one head": {"method": "stylegan-fusion", "learns": WEIGHTS, **ALONE},
    "without search": {},
    "weights": {"learns": WEIGHTS, **ALONE},
    "+ planes of its own": ALONE,
    "+ total variation": {},
    "+ mesh": {},
    "+ refinement": {},
}
LAST = "+ total variation"
COLUMNS = {
    "domain": "oracle domain",
    "hair": "hair as asked",
    "clip": "CLIP share",
    "l1": "L1",
    "kid": "oracle KID",
    "faces": "faces on backs",
    "gradient": "gradient",
}
SHEET = ("a clown with long hair", "a robot with long hair")
TURN = tuple(-i * pi / 3 for i in range(6))

See = Callable[[Tensor, int], Tensor]  # (cameras [N, 25], size) -> pictures [N, 3, size, size].


@dataclass
class Config:
    """Options of puppets.avatars."""

    worker: int = 0  # Which of `workers` this process is.
    workers: int = 1  # Processes that share the prompts.


class Judges(NamedTuple):
    """The frozen networks that score."""

    eye: oracle.Oracle
    clip: ClipFeatures
    names: Tensor  # CLIP's embeddings of the domains' own prompts, [D, E].


def main(cfg: Config) -> None:
    """Make and score what is not in docs/avatars.json."""
    flush_denormals()
    keep_freed_memory()
    torch.set_num_threads(1 if cfg.workers > 1 else 2)
    clip = ClipFeatures.from_pretrained("checkpoints/puppets/clip")
    names = clip.text([DOMAINS[name].phrases[0] for name in DOMAIN_NAMES])
    judges = Judges(oracle.load_oracle(), clip, names)
    pairs = [(prompt, seed) for seed in SEEDS for prompt in PROMPTS]
    for prompt, seed in pairs[cfg.worker :: cfg.workers]:
        for part in PARTS:
            if row_name(part, prompt, seed) not in read_rows():
                add_row(
                    row_name(part, prompt, seed), score(make(part, prompt, seed), prompt, judges)
                )
    if cfg.workers == 1:
        print("\n".join(table(read_rows())))
        print(SHEET[0], texture_scores(make_mesh("+ refinement", SHEET[0], 0)))
        draw_figure()


def read_rows() -> dict[str, Row]:
    """Return the scores that there are, by the name of their row."""
    return json.loads(ROWS.read_text()) if ROWS.exists() else {}


def add_row(name: str, row: Row) -> None:
    """Add a row to those of others, which other processes may be writing."""
    with sole_writer(ROWS, wait=True):
        write_text(ROWS, json.dumps(read_rows() | {name: row}, indent=1) + "\n")


def row_name(part: str, prompt: str, seed: int) -> str:
    """Return the name of a row."""
    return f"{part}, {prompt}, seed {seed}"


def options(part: str, prompt: str, seed: int) -> avatar.Config:
    """Return avatar.py's options for a row."""
    given = dict(PARTS[part] or {})
    weights = {name: given.pop(name) for name in ALONE if name in given}
    same = LAST if part in ("search alone", "+ mesh", "+ refinement") else part
    name = slug(f"{same.removeprefix('+ ')} {prompt} {seed}")
    usual = avatar.settle(
        base="puppets360", method=given.pop("method", "denoised"), prompt=prompt, seed=seed
    )
    run = replace(
        usual,
        out=RUNS / name,
        device="cpu",
        weights=replace(usual.weights, **weights),
        save_every=1000,
        grid_every=1000,
        **given,
    )
    return avatar.Config(run, search=0 if part == "without search" else 96)


def make(part: str, prompt: str, seed: int) -> See:
    """Make what a row is about, as far as it is not there."""
    if part in ("+ mesh", "+ refinement"):
        return see_mesh(make_mesh(part, prompt, seed))
    found, made = make_heads(part, prompt, seed)
    return see_subject(found if part == "search alone" else made)


def make_heads(part: str, prompt: str, seed: int) -> tuple[Subject, Subject]:
    """Return a head before and after its adaptation; parts with a search share it."""
    cfg = options(part, prompt, seed)
    cfg.run.out.mkdir(parents=True, exist_ok=True)
    first = options(LAST, prompt, seed).run.out / avatar.START
    start = cfg.run.out / avatar.START
    if cfg.search and first.exists() and not start.exists():
        shutil.copy(first, start)
    if not start.exists():
        save_generator(avatar.find(cfg, torch.device("cpu"))[0], start)
    heads = avatar.adapt(cfg, torch.device("cpu"))
    if cfg.search and not first.exists():
        first.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(start, first)
    return heads


def make_mesh(part: str, prompt: str, seed: int) -> Textured:
    """Return a head's textured mesh, refined if the part says so."""
    cfg, (_, made) = options(part, prompt, seed), make_heads(part, prompt, seed)
    head = texture_head(made, cfg.views, cfg.voxels, cfg.faces, 512)
    if part == "+ mesh":
        return head
    return refine(head, avatar.load_painter(cfg.run, made.G, torch.device("cpu")), cfg.level)


def see_subject(subject: Subject) -> See:
    """Return how a generator's head is seen."""
    subject = subject.settled()

    def see(c: Tensor, size: int) -> Tensor:
        pictures = torch.cat([subject.see(one)["image"] for one in c.split(1)]).clamp(-1, 1)
        if size == pictures.shape[-1]:
            return pictures
        return F.interpolate(pictures, (size, size), mode="bicubic").clamp(-1, 1)

    return see


def see_mesh(head: Textured) -> See:
    """Return how a textured mesh is seen."""
    return lambda c, size: torch.cat([head.draw(one, size) for one in c])


@torch.no_grad()
def score(see: See, prompt: str, judges: Judges) -> Row:
    """Return the scores of one head.

    Returns:
        Of views as in the oracle's pictures `domain`, the share that it reads as the prompt's;
        `hair`, the share whose hair it reads as long or short as asked; `clip`, the share that CLIP
        takes for the domain. From all sides, against the true pictures of the person that it reads:
        `l1`; `kid`, by its features; `faces`, the share of backs with a face. `gradient`, the mean
        difference of neighbouring pixels at 256 px inside of that person's outline, whose edge
        would count most, and is in every picture.
    """
    domain, sign = PROMPTS[prompt]
    z = torch.randn(NEAR, 16, generator=torch.Generator().manual_seed(0))
    views = oracle.own_views(z, evaluation.Config(ckpt=(), samples=NEAR))
    near = see(views.c, oracle.SIZE)
    logits, people, _ = judges.eye(near)
    called = (judges.clip.images(near) @ judges.names.T).argmax(1)
    right = DOMAIN_NAMES.index(domain)

    turns = torch.arange(ROUND) * (2 * pi / ROUND) - pi
    pitches = ROUND_CAMERAS.pitch_range * torch.linspace(-1, 1, ROUND).roll(5)
    c = ROUND_CAMERAS.label(turns, pitches)
    images = see(c, oracle.SIZE)
    person = F.normalize(people.mean(0), dim=0).expand(ROUND, -1)
    truth, mask = oracle.draw_truth(person, c, domain)
    pair = (oracle.features(judges.eye, x) for x in (truth, images))
    inside = F.interpolate(-F.max_pool2d(1 - mask.float(), 2 * RIM + 1, 1, RIM) + 1, scale_factor=2)
    large = see(c, 2 * oracle.SIZE)
    return {
        "domain": (logits.argmax(1) == right).float().mean().item(),
        "hair": (sign * people[:, LENGTH] > 0).float().mean().item(),
        "clip": (called == right).float().mean().item(),
        "l1": (images - truth).abs().mean().item(),
        "kid": distances(*pair)["kid"],
        "faces": faces.share(judges.clip, images[faces.back_views(c)]),
        "gradient": gradient(large, inside),
    }


def gradient(images: Tensor, where: Tensor) -> float:
    """Return the mean difference of neighbouring pixels of [N, 3, H, W], where [N, 1, H, W] is 1.

    Differences along both axes are added.
    """
    down = F.pad(images.diff(dim=2), (0, 0, 0, 1)).abs()
    right = F.pad(images.diff(dim=3), (0, 1)).abs()
    change = (down + right).mean(1, keepdim=True)
    return ((change * where).sum() / where.sum()).item()


@torch.no_grad()
def texture_scores(head: Textured) -> Row:
    """Return what a refined texture loses and whether its cuts are seen.

    Returns:
        `psnr_db` of the mesh's renders against the pictures that the texture was made of, on the
        head; `cut`, the mean difference of colour between the two sides of all cuts, and `inside`,
        that between neighbouring texels elsewhere.
    """
    atlas, size = head.atlas, head.pictures.shape[-1]
    square, pixels = 0.0, 0.0
    for c, picture in zip(head.cameras, head.pictures, strict=True):
        mask = F.avg_pool2d(look(atlas, c, LARGER * size).mask, LARGER) > 0.99
        error = (head.draw(c, size) - picture).square().mean(1, keepdim=True)[mask]
        square, pixels = square + error.sum().item(), pixels + len(error)
    here, there = (sample_texture(head.texture, uv) for uv in cuts(atlas))
    both = atlas.covered[:, 1:] & atlas.covered[:, :-1]
    return {
        "psnr_db": float(10 * np.log10(4 * pixels / square)),
        "cut": (here - there).abs().mean().item(),
        "inside": head.texture[0].diff(dim=2).abs().mean(0)[both].mean().item(),
    }


def table(rows: dict[str, Row]) -> list[str]:
    """Return a Markdown table of means over prompts and seeds, of parts that have all of them."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("| --- " * (len(COLUMNS) + 1) + "|")
    for part in PARTS:
        own = [rows[name] for name in rows if name.startswith(f"{part}, ")]
        if len(own) == len(PROMPTS) * len(SEEDS):
            means = (np.mean([row[name] for row in own]) for name in COLUMNS)
            lines.append(f"| {part} | " + " | ".join(f"{x:.3f}" for x in means) + " |")
    return lines


def draw_figure() -> None:
    """Draw some heads from six sides: as found, adapted, and as a mesh with a refined texture."""
    c = ROUND_CAMERAS.label(torch.tensor(TURN), torch.full((len(TURN),), -0.2))
    parts = {"search alone": "found", LAST: "adapted", "+ refinement": "mesh, refined"}
    rows = [
        (f"{prompt},\n{label}", None, make(part, prompt, 0)(c, oracle.SIZE))
        for prompt in SHEET
        for part, label in parts.items()
    ]
    save_image(sheet(rows, margin=190), DOCS / "figure-avatars.png")


if __name__ == "__main__":
    run_cli(Config, main, __doc__)
