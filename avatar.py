"""Make one head from a sentence: found in a 3D generator, adapted, as a mesh with a sharp texture.

    python avatar.py --prompt "a clown with long hair"
    python avatar.py --prompt "a clown" --latents me.safetensors
    python avatar.py --ckpt runs/a-clown --seed 3

DiffusionGAN3D's avatars (arXiv:2312.16837). Of many heads the one is taken that the prompt fits
best; --latents takes a person that invert.py found instead, --search 0 the head of --seed. Then the
generator's weights and planes of the head's own are trained, as train.py does (all of its options
are there). Last, a mesh gets a texture, which the prior paints over view by view. --ckpt gives a
head of a run such a mesh.
Writes avatar.safetensors, a generator of this head alone, for render.py and view.py as --ckpt;
avatar.glb, the mesh; avatar.mp4, in which it turns; avatar.png: the head as found, adapted,
and its mesh, from all sides; search.png, the best heads; reference.png, if a picture was given; and
fit, a run folder. The same command
resumes what was stopped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

import config
from harness.cli import exit_codes, merge_repeats, parse_options
from harness.run_folder import check_source, read_settings
from harness.video import MOST_FRAMES, ending, hint, save_video

PACKAGES = {  # What meshes and their textures need, by what it is imported and installed as.
    "xatlas": "xatlas",
    "skimage": "scikit-image",
    "trimesh": "trimesh",
    "fast_simplification": "fast-simplification",
}
OWN = {"variation": 300.0, "opacity": 0.1}  # Weights of what only one head's own planes need.
SHARE = 0.46  # Of the steps of a whole generator.
POOL, REUSE = 12, 5  # Painted batches, and how often each is used before others come.

Training = Annotated[config.Config, tyro.conf.arg(name="")]  # Its options have no prefix.


@dataclass
class Config:
    """Options of avatar.py: train.py's, and these."""

    run: Training
    ckpt: str = ""  # Run or generator of which the head of --seed is taken, in place of a new one.
    latents: Path | None = None  # A person that invert.py found, in place of the search.
    search: int = 96  # Heads that are looked through; 0: the head of --seed is taken.
    refine: bool = True  # Whether the prior paints over the texture.
    level: float = 0.75  # Diffusion time at which it does: how much may change.
    views: int = 8  # From which the texture is painted: front, sides, back.
    voxels: int = 160  # Of the mesh, per side.
    faces: int = 20_000  # Most triangles of the mesh.
    texture: int = 0  # Side of the texture, texels; 0: four times that of the generator's pictures.
    frames: int = 90  # Of the video.

    def __post_init__(self) -> None:
        """Replace the ~ of paths."""
        self.ckpt = os.path.expanduser(self.ckpt)
        self.latents = self.latents and self.latents.expanduser()


def parse(argv: Sequence[str], description: str | None) -> Config:
    """Read the options of a command line, and refuse what cannot work.

    As in `config.parse`, base and method are read first: they set the defaults of all others.

    Raises:
        ValueError: see `check`.
        SystemExit: after --help (0), or an option that cannot be read (2).
    """
    argv = merge_repeats(list(argv), config.ADDITIVE)
    quiet = [word for word in argv if word not in ("-h", "--help")]
    read = parse_options(Config, quiet, "", Config(config.Config(base="puppets360")))
    given: dict[str, Any] = {
        name: getattr(read.run, name) for name in ("base", "method", "prompt", "edit", "image")
    }
    if read.ckpt and Path(read.ckpt).is_dir() and not (given["prompt"] or given["image"]):
        given |= told(Path(read.ckpt))
    usual = settle(**given)
    if read.ckpt:  # Its own folder, which the words would name too, stays as it is.
        name = f"{Path(read.ckpt).resolve().stem}-seed{read.run.seed:04d}"
        usual = replace(usual, out=Path("runs", name))
    cfg = parse_options(Config, argv, description, Config(usual))
    check(cfg)
    return cfg


def told(run: Path) -> dict[str, Any]:
    """Return the target of a run, which is its heads' too.

    Raises:
        ValueError: it is no run.
    """
    settings = read_settings(run)
    kept = sorted(run.glob("reference*.png"))
    known = {name: settings[name] for name in ("base", "method") if name in settings}
    return known | {"prompt": settings["prompt"], "image": tuple(kept) if settings["image"] else ()}


def settle(**given: Any) -> config.Config:
    """Return train.py's options for one head, whose own planes learn as well."""
    usual = config.Config(**given)
    return replace(
        usual,
        steps=max(1, round(SHARE * usual.steps)),
        learns=tuple(f"own_planes|{pattern}" for pattern in usual.learns),
        targets=replace(usual.targets, pool=POOL, reuse=REUSE),
        weights=replace(usual.weights, **OWN),
    )


def check(cfg: Config) -> None:
    """Refuse what cannot work, before any network is loaded and anything is written.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    if missing := [x for name, x in PACKAGES.items() if not importlib.util.find_spec(name)]:
        raise ValueError(f"avatar.py needs more packages: pip install {' '.join(missing)}")
    if "RANK" in os.environ:
        raise ValueError("avatar.py makes one head in one process: start it without torchrun")
    if cfg.run.base in config.FLAT:
        raise ValueError(f"--base {cfg.run.base} makes pictures without a shape: name another")
    if cfg.ckpt and cfg.latents:
        raise ValueError("--ckpt takes the head of --seed: --latents is for a head to be adapted")
    for flag, value, low, high in (
        ("--search", cfg.search, 0, 100_000),
        ("--level", cfg.level, 0.02, 0.98),
        ("--views", cfg.views, 4, 64),
        ("--voxels", cfg.voxels, 16, 512),
        ("--faces", cfg.faces, 100, 1_000_000),
        ("--texture", cfg.texture, 0, 8192),
        ("--frames", cfg.frames, 2, MOST_FRAMES[ending()]),
    ):
        if not low <= value <= high:
            raise ValueError(f"{flag} must be {low} to {high}, got {value}")
    if cfg.views % 2:
        raise ValueError(f"--views must be even, for the front and the back, got {cfg.views}")
    if cfg.ckpt:
        check_source("--ckpt", cfg.ckpt)
    if cfg.latents and not cfg.latents.is_file():
        raise ValueError(f"--latents {cfg.latents} is no file")
    config.check(cfg.run)


if __name__ == "__main__":
    with exit_codes():
        CFG = parse(sys.argv[1:], __doc__)

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train
from files.generators import AVATAR, load_generator, save_generator
from guides import Guides
from harness.devices import flush_denormals, keep_freed_memory, pick_device
from harness.pictures import image_grid, save_image, save_pictures, to_image
from harness.run_folder import claim_run, locate, sole_writer
from harness.store import write_bytes
from models.generator import Generator
from models.noise import noise_error
from models.texture import to_textured_glb
from refine import Textured, refine, texture_head
from subjects import Subject, draw_codes, load_person, seed_to_subject, seed_to_ws, show
from terms import load_guides

TEMPLATES = ("{}", "a photo of {}", "a portrait of {}")
TURNS = (0.0, 0.7)  # Yaws at which heads are compared with the prompt [rad].
# What the prior is asked: one of so many heads is left each time, and shown with so much noise.
ROUNDS = (2, 8), (4, 32)
LEVELS = (0.7, 0.98)  # Of the noise, as diffusion times: shapes show late.
SHOWN = 8  # Heads in search.png.
# The way from the best code on: steps; rate, in deviations of w; weight of being a typical head.
WAY, RATE, TYPICAL, CODES = 12, 0.02, 0.005, 1000


def main(cfg: Config) -> None:
    """Make one head, or go on making it.

    Raises:
        ValueError: an option cannot be used.
        FloatingPointError: see train.py.
        SystemExit: after Ctrl+C, once a checkpoint is saved.
    """
    check(cfg)
    if cfg.run.dry_run:
        train.main(cfg.run)
        return
    flush_denormals()
    keep_freed_memory()
    run, device = cfg.run, pick_device(cfg.run.device)
    with sole_writer(run.out):
        head = {name: str(getattr(cfg, name) or "") for name in ("ckpt", "latents", "search")}
        settings = config.settings(run) | {"avatar": head}  # Its mesh may be made anew.
        claim_run(run.out, settings, config.usual_settings(run))
        save_pictures(config.references(run), run.out / "reference.png")
        found, made = adapt(cfg, device) if not cfg.ckpt else (None, take(cfg, device))
        head = texture_head(
            made, cfg.views, cfg.voxels, cfg.faces, cfg.texture or 4 * made.G.img_resolution
        )
        if cfg.refine:
            head = refine(head, load_painter(run, made.G, device), cfg.level)
        write_results(cfg, found, made, head)


def adapt(cfg: Config, device: torch.device) -> tuple[Subject, Subject]:
    """Find the head and adapt it; return it before and after."""
    run = cfg.run
    start = run.out / "start.safetensors"
    if not start.exists():
        G = load_generator(locate(run.generator), device)
        if "planes" not in G.gives or not G.z_dim:
            raise ValueError(f"{run.generator} cannot be adapted to one head: no planes, or no z")
        if cfg.latents:
            person = load_person(cfg.latents, G)
            G, ws = show(G, person).G, person.ws
        elif cfg.search:
            ws = search(cfg, G, device)
        else:
            ws = seed_to_ws(G, run.seed, run.trunc)
        G.keep_one_head(ws)
        save_generator(G, start)
    fit = replace(run, generator=str(start), out=run.out / "fit")
    train.main(fit)
    before, after = load_generator(start, device), load_generator(fit.out, device)
    save_generator(after, run.out / AVATAR)
    return seed_to_subject(before, 0), seed_to_subject(after, 0)


def take(cfg: Config, device: torch.device) -> Subject:
    """Return the head of --seed of --ckpt, and write it as a generator of this head alone."""
    G = load_generator(cfg.ckpt, device)
    if "planes" not in G.gives:
        raise ValueError(f"--ckpt {cfg.ckpt} makes pictures without a shape")
    if G.z_dim:  # Else it is one head already.
        G.keep_one_head(seed_to_ws(G, cfg.run.seed, cfg.run.trunc))
    save_generator(G, cfg.run.out / AVATAR)
    return seed_to_subject(G, 0)


def load_painter(run: config.Config, G: Generator, device: torch.device) -> Guides:
    """Load the prior as the texture needs it, with CLIP."""
    alone = replace(run, weights=config.Weights(denoised=1.0))
    pictures = config.references(run)
    reference = torch.cat([to_image(picture) for picture in pictures]) if pictures else None
    return load_guides(alone, G, reference, device)


# The search.


def search(cfg: Config, G: Generator, device: torch.device) -> Tensor:
    """Return the code [1, num_ws, w_dim] of the head that fits best, and draw the best ones.

    CLIP ranks heads seen from the front and from the side, for several wordings. Of the better
    half the prior tells which it explains better with the prompt's words than without them, and
    of the best of these once more, with more noise. Then the best code is moved along CLIP's
    gradient, as long as the prior agrees.
    """
    guides = load_painter(cfg.run, G, device)
    layers = seed_to_ws(G, 0).shape[1]
    codes = draw_codes(G, cfg.search, cfg.run.seed)[:, None].expand(-1, layers, -1)
    turns = torch.tensor(TURNS)
    c = G.cameras.label(turns, torch.zeros_like(turns)).to(device)  # [K, 25]
    with torch.no_grad():
        bar = tqdm(codes.split(1), desc="search", unit="head")
        pictures = [see(G, ws, c).cpu() for ws in bar]  # [K, 3, R, R] each.
        target = wordings(guides)
        fits = [clip_fit(guides, images.to(device), target).item() for images in pictures]
    best = sorted(range(len(fits)), key=lambda i: fits[i], reverse=True)
    if cfg.run.prompt:
        left = len(best)
        for share, draws in ROUNDS:
            left = -(-left // share)
            for i in tqdm(best[:left], desc="ask the prior", unit="head"):
                fits[i] = explained(guides, pictures[i].to(device), c, draws)
            best[:left] = sorted(best[:left], key=lambda i: fits[i], reverse=True)
    ws = codes[best[:1]]
    moved = climb(G, guides, ws, c, target)
    if cfg.run.prompt and explained(guides, see(G, moved, c).detach(), c, draws) < fits[best[0]]:
        moved = ws
    rows = torch.stack([pictures[i] for i in best[:SHOWN]], dim=1)  # [K, N, 3, R, R]
    save_image(image_grid(list(rows)), cfg.run.out / "search.png")
    return moved.clone()


def see(G: Generator, ws: Tensor, c: Tensor) -> Tensor:
    """Return pictures of heads, each from all cameras, [B * K, 3, R, R]; always the same jitter."""
    torch.manual_seed(0)
    return G.synthesis(ws, c[None].expand(len(ws), -1, -1))["image"]


def said_of_source(prompt: str, source_prompt: str) -> str:
    """Return what a prompt says beyond its domain, said of the source's.

    "a clown with long hair" is "a photo of a person with long hair": the generator has no clowns.
    """
    _, _, beyond = prompt.partition(" with ")
    return f"{source_prompt} with {beyond}" if beyond else prompt


@torch.no_grad()
def wordings(guides: Guides) -> Tensor:
    """Return what heads are compared with in CLIP's space, [1, D]."""
    cfg = guides.cfg
    if not cfg.prompt:
        return guides.target
    prompts = {cfg.prompt, said_of_source(cfg.prompt, cfg.source_prompt)}
    words = [template.format(prompt) for prompt in sorted(prompts) for template in TEMPLATES]
    return F.normalize(guides.clip.text(words).mean(0, keepdim=True))


def clip_fit(guides: Guides, images: Tensor, target: Tensor) -> Tensor:
    """Return the mean cosine of a head's views [K, 3, R, R] to the target, []."""
    return (guides.clip.images(images) @ target.T).mean()


@torch.no_grad()
def explained(guides: Guides, images: Tensor, c: Tensor, draws: int) -> float:
    """Return how much better the prior explains a head by the prompt's words than without them.

    Args:
        guides: The prior; see `noise_error`.
        images: Views of the head, [K, 3, R, R].
        c: Their cameras, [K, 25].
        draws: How much noise is drawn.
    """
    cfg, prior = guides.cfg, guides.prior
    latents = guides.encode(images.clamp(-1, 1))
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(draws, *prior.latent_shape, generator=generator).to(latents)
    times = (torch.linspace(*LEVELS, draws) * (len(prior.alphas_cumprod) - 1)).long()
    errors = []
    for prompt in (cfg.source_prompt, said_of_source(cfg.prompt, cfg.source_prompt)):
        told = replace(cfg, prompt=prompt, image=(), depth_scale=0.0)
        condition = Guides(told, guides.G_src, guides.clip, prior).condition_of({"c": c})
        errors.append(noise_error(prior, latents, condition, times.to(c.device), noise).mean())
    return (errors[0] - errors[1]).item()


def climb(G: Generator, guides: Guides, ws: Tensor, c: Tensor, target: Tensor) -> Tensor:
    """Move a code [1, num_ws, w_dim] a little along CLIP's gradient, held to the mean code."""
    codes = draw_codes(G, CODES, 0)
    mean, deviation = codes.mean(0), codes.std(0).mean()
    change = torch.zeros_like(ws[:, :1], requires_grad=True)  # The same for all layers.
    adam = torch.optim.Adam([change], lr=RATE)
    for _ in tqdm(range(WAY), desc="climb", unit="step"):
        moved = ws + deviation * change
        typical = ((moved - mean) / deviation).square().mean()
        loss = TYPICAL * typical - clip_fit(guides, see(G, moved, c), target)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return (ws + deviation * change).detach()


# What is written.


def write_results(cfg: Config, found: Subject | None, made: Subject, head: Textured) -> None:
    """Write the mesh, the video and the pictures of a head."""
    out, size = cfg.run.out, made.G.img_resolution
    write_bytes(out / "avatar.glb", to_textured_glb(head.atlas, head.texture))
    rows = [
        torch.cat([x.see(c[None])["image"].cpu() for c in head.cameras]) for x in (found, made) if x
    ]
    rows.append(torch.cat([head.draw(c, size) for c in head.cameras]))
    save_image(image_grid(rows), out / "avatar.png")
    hint()
    rim = made.G.cameras.rim(torch.arange(cfg.frames) * (2 * torch.pi / cfg.frames))
    frames = tqdm(head.turn(rim, 2 * size), total=cfg.frames, desc="video", unit="frame")
    save_video(frames, out / f"avatar{ending()}")
    print(f"{out / 'avatar.glb'} written: {len(head.atlas.triangles)} triangles")
    print(f"  look    {out / 'avatar.png'}, {out / f'avatar{ending()}'}")
    print(f"  render  python render.py --ckpt {out / 'avatar.safetensors'} --seeds 0 --orbit 120")
    print(f"  play    python view.py --ckpt {out / 'avatar.safetensors'}")


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
