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
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

import config
from harness.cli import exit_codes, merge_repeats, parse_options
from harness.run_folder import (
    AVATAR,
    check_run,
    check_source,
    claim_run,
    locate,
    portable,
    read_settings,
    sole_writer,
)
from harness.store import checksum, write_bytes, write_text
from harness.video import MOST_FRAMES, ending, hint, save_video

PACKAGES = {  # What meshes and their textures need, by what it is imported and installed as.
    "xatlas": "xatlas",
    "skimage": "scikit-image",
    "trimesh": "trimesh",
    "fast_simplification": "fast-simplification",
}
# Weights of terms for one head alone; the relative distance compares heads with each other.
OWN = {"variation": 300.0, "opacity": 0.1, "distance": 0.0}
SHARE = 0.46  # Of the steps of a whole generator.
POOL, REUSE = 12, 5  # Painted batches, and how often each is used before others come.

Training = Annotated[config.Config, tyro.conf.arg(name="")]  # Its options have no prefix.


# What a run's heads are textured with: its target, and the networks that it looks with.
TOLD = (
    *("base", "prompt", "negative_prompt", "edit", "source_prompt"),
    *("diffusion", "controlnet", "ip_adapter", "lora", "embedding", "vae", "features", "clip"),
    *("image_scale", "view_words", "trunc"),
)
PAINTING = ("method", "guidance", "depth_scale", "targets")  # Where the run painted targets, too.


@dataclass
class Config:
    """Options of avatar.py: train.py's, and these."""

    run: Training
    ckpt: str = ""  # Run or generator that the head of --seed is taken of; nothing is adapted.
    latents: Path | None = None  # A person that invert.py found, in place of the search.
    search: int = 96  # Heads that are looked through; 0: the head of --seed is taken.
    refine: bool = True  # Whether the prior paints over the texture.
    level: float = 0.75  # Diffusion time up to which the prior repaints: how much may change.
    views: int = 8  # Number of views that the texture is painted from: front, sides, back.
    voxels: int = 160  # Resolution of the mesh: voxels along a side.
    faces: int = 20_000  # Most triangles of the mesh.
    texture: int = 0  # Side of the texture, texels; 0: four times that of the generator's pictures.
    frames: int = 90  # Number of frames of the video.

    def __post_init__(self) -> None:
        """Replace the ~ of paths."""
        self.ckpt = portable(os.path.expanduser(self.ckpt))
        self.latents = self.latents and self.latents.expanduser()


def parse(argv: Sequence[str], description: str | None) -> Config:
    """Read the options of a command line, and refuse what cannot work.

    As in `config.parse`, base and method are read first: they set the defaults of all others. With
    --ckpt these are what the run was told.

    Raises:
        ValueError: see `check`.
        SystemExit: after --help (0), or an option that cannot be read (2).
    """
    argv = merge_repeats(list(argv), config.ADDITIVE)
    quiet = [word for word in argv if word not in ("-h", "--help")]
    read = parse_options(Config, quiet, "", Config(config.Config(base="puppets360")))
    given = {n: getattr(read.run, n) for n in ("base", "method", "prompt", "edit", "image")}
    if read.ckpt:
        name = (
            f"{Path(locate(read.ckpt)).name.removesuffix('.safetensors')}-seed{read.run.seed:04d}"
        )
        given |= {"generator": read.ckpt, "out": Path("runs", name)}
        run = run_of(read.ckpt)
        target = {"prompt": read.run.prompt, "image": read.run.image}
        given |= told(run) if run else {}
        if any(target.values()):
            given |= target | {"edit": ""}
        elif not (read.refine or given["prompt"] or given["image"]):
            given["prompt"] = read.run.source_prompt  # Nothing is painted.
    usual = settle(**given)
    cfg = parse_options(Config, argv, description, Config(usual))
    if cfg.run.base != usual.base:
        raise ValueError(f"--ckpt {cfg.ckpt} is a run on --base {usual.base}, got {cfg.run.base}")
    check(cfg)
    return cfg


def run_of(ckpt: str) -> Path | None:
    """Return the run folder that --ckpt names, or that its file lies in."""
    path = Path(locate(ckpt))
    folders = [path] if path.is_dir() else [path.parent] if path.is_file() else []
    return next((x for x in folders if x == path or (x / "config.json").is_file()), None)


def told(run: Path) -> dict[str, Any]:
    """Return the options of a run that its heads are textured with.

    Raises:
        ValueError: it is no run.
    """
    settings = read_settings(run)
    names = TOLD + PAINTING * (settings["method"] == "denoised")
    kept = sorted(run.glob("reference*.png"))
    known = {name: settings[name] for name in names if name in settings}
    return known | {"image": tuple(kept) if settings["image"] else ()}


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
        ("--texture", cfg.texture or 64, 64, 4096),
        ("--frames", cfg.frames, 2, MOST_FRAMES[ending()]),
        ("--seed", cfg.run.seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise ValueError(f"{flag} must be {low} to {high}, got {value}")
    if cfg.views % 2:
        raise ValueError(f"--views must be even, for the front and the back, got {cfg.views}")
    if cfg.run.weights.distance:
        raise ValueError("--weights.distance compares heads with each other: here is only one")
    if cfg.ckpt:
        check_source("--ckpt", cfg.ckpt)
    if cfg.latents and not cfg.latents.is_file():
        raise ValueError(f"--latents {cfg.latents} is no file")
    config.check(cfg.run)
    check_run(cfg.run.out, settings(cfg), config.usual_settings(cfg.run))


def settings(cfg: Config) -> dict[str, Any]:
    """Return what a folder was made with, as JSON knows it; its mesh may be made anew."""
    person = checksum(cfg.latents.read_bytes()) if cfg.latents else ""
    head = {"ckpt": cfg.ckpt, "latents": person, "search": cfg.search}
    return config.settings(cfg.run) | {"avatar": head}


if __name__ == "__main__":
    with exit_codes():
        CFG = parse(sys.argv[1:], __doc__)

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import train
from files.generators import load_generator, save_generator
from guides import Guides
from harness.devices import flush_denormals, keep_freed_memory, pick_device
from harness.pictures import image_grid, save_image, save_pictures, to_image
from models.generator import Generator
from models.noise import noise_errors
from models.texture import to_textured_glb
from refine import Textured, refine, texture_head
from subjects import (
    Subject,
    draw_codes,
    load_person,
    seed_to_subject,
    seed_to_ws,
    show,
    warn_of_others,
)
from terms import load_guides

TEMPLATES = ("{}", "a photo of {}", "a portrait of {}")
TURNS = (0.0, 0.7)  # Yaws at which heads are compared with the prompt [rad].
# What the prior is asked: one of so many heads is left each time, and shown with so much noise.
ROUNDS = (2, 8), (4, 32)
LEVELS = (0.7, 0.98)  # Of the noise, as diffusion times: shapes show late.
SHOWN = 8  # Heads in search.png.
START = "start.safetensors"  # In a folder: a generator of the head that was found.
VIDEO = 512  # Pixels up to which the video is twice as large as the generator's pictures.
# The way from the best code on: steps; rate, in deviations of w; weight of being a typical head.
WAY, RATE, TYPICAL, CODES = 12, 0.02, 0.005, 1000


def main(cfg: Config) -> None:
    """Make one head, or go on making it.

    Raises:
        ValueError: an option cannot be used; nothing has been written.
        FloatingPointError: see train.py.
        SystemExit: after Ctrl+C, once a checkpoint is saved.
    """
    check(cfg)
    if cfg.run.dry_run:
        own = {name: value for name, value in vars(cfg).items() if name != "run"}
        print(json.dumps(settings(cfg) | own, indent=2, default=str))
        return
    flush_denormals()
    keep_freed_memory()
    run, device = cfg.run, pick_device(cfg.run.device)
    start, shown = run.out / START, None
    with sole_writer(run.out):
        if cfg.ckpt:
            G = take(cfg, device)
        elif not start.exists():
            G, shown = find(cfg, device)
        claim_run(run.out, settings(cfg), config.usual_settings(run))
        save_pictures(config.references(run), run.out / "reference.png")
        if shown:
            save_image(shown, run.out / "search.png")
        if cfg.ckpt:
            save_generator(G, run.out / AVATAR)
            found, made = None, seed_to_subject(G, 0)
        else:
            if not start.exists():
                save_generator(G, start)
            found, made = adapt(cfg, device)
        head = texture_head(
            made, cfg.views, cfg.voxels, cfg.faces, cfg.texture or 4 * made.G.img_resolution
        )
        if cfg.refine:
            head = refine(head, load_painter(run, made.G, device), cfg.level)
        write_results(cfg, found, made, head)


def find(cfg: Config, device: torch.device) -> tuple[Generator, Image.Image | None]:
    """Return a generator of the one head that is going to be adapted, and what was looked through.

    Raises:
        ValueError: a network cannot be loaded, or does not fit the others.
    """
    run, shown = cfg.run, None
    G = load_generator(locate(run.generator), device)
    if "planes" not in G.gives or not G.z_dim:
        raise ValueError(f"{run.generator} cannot be adapted to one head: no planes, or no z")
    guides = load_painter(run, G, device)
    if cfg.latents:
        person = load_person(cfg.latents, G)
        warn_of_others([cfg.latents], G)
        G, ws = show(G, person).G, person.ws
    elif cfg.search:
        ws, shown = search(cfg, G, guides)
    else:
        ws = seed_to_ws(G, run.seed, run.trunc)
    G.keep_one_head(ws)
    return G, shown


def adapt(cfg: Config, device: torch.device) -> tuple[Subject, Subject]:
    """Adapt the head that was found; return it before and after."""
    start, fit = cfg.run.out / START, cfg.run.out / "fit"
    if (fit / "config.json").exists():  # If the folder was moved, its generator moved with it.
        then = read_settings(fit) | {"generator": portable(str(start))}
        write_text(fit / "config.json", json.dumps(then, indent=2) + "\n")
    train.main(replace(cfg.run, generator=portable(str(start)), out=fit))
    before, after = load_generator(start, device), load_generator(fit, device)
    save_generator(after, cfg.run.out / AVATAR)
    return seed_to_subject(before, 0), seed_to_subject(after, 0)


def take(cfg: Config, device: torch.device) -> Generator:
    """Return a generator of the head of --seed of --ckpt alone.

    Raises:
        ValueError: see `find`.
    """
    G = load_generator(locate(cfg.ckpt), device)
    if "planes" not in G.gives:
        raise ValueError(f"--ckpt {cfg.ckpt} makes pictures without a shape")
    if cfg.refine:
        load_painter(cfg.run, G, device)  # What is wrong with it is said now.
    if G.z_dim:  # Else it is one head already.
        G.keep_one_head(seed_to_ws(G, cfg.run.seed, cfg.run.trunc))
    return G


def load_painter(run: config.Config, G: Generator, device: torch.device) -> Guides:
    """Load the prior as painting needs it, with CLIP.

    Other methods than denoised targets have a guidance and a depth for other purposes: to distil,
    or to let shapes change. Those of denoised targets take their place.
    """
    alone = replace(run, weights=config.Weights(denoised=1.0))
    if run.method != "denoised":
        usual = config.preset(run.base, "denoised", prompt=run.prompt, image=run.image)
        painting = {name: getattr(usual, name) for name in PAINTING}
        alone = replace(alone, **painting)
    pictures = config.references(run)
    reference = torch.cat([to_image(picture) for picture in pictures]) if pictures else None
    return load_guides(alone, G, reference, device)


# The search.


def search(cfg: Config, G: Generator, guides: Guides) -> tuple[Tensor, Image.Image]:
    """Return the code [1, num_ws, w_dim] of the head that fits best, and a picture of the best.

    CLIP ranks heads seen from the front and from the side, for several wordings. Of the better
    half the prior tells which it explains better with the prompt's words than without them, and
    of the best of these once more, with more noise. Then the best code is moved along CLIP's
    gradient, as long as the prior agrees.
    """
    layers = seed_to_ws(G, 0).shape[1]
    codes = draw_codes(G, cfg.search, cfg.run.seed, cfg.run.trunc)[:, None].expand(-1, layers, -1)
    turns = torch.tensor(TURNS)
    c = G.cameras.label(turns, torch.zeros_like(turns)).to(codes.device)  # [K, 25]

    def look(ws: Tensor) -> Tensor:
        with torch.no_grad():
            return see(G, ws, c)  # [K, 3, R, R]

    target = wordings(guides)
    bar = tqdm(codes.split(1), desc="search", unit="head")
    fits = [clip_fit(guides, look(ws), target).item() for ws in bar]
    best = sorted(range(len(fits)), key=lambda i: fits[i], reverse=True)
    if cfg.run.prompt:
        left = len(best)
        for share, draws in ROUNDS:
            left = -(-left // share)
            for i in tqdm(best[:left], desc="ask the prior", unit="head"):
                fits[i] = explained(guides, look(codes[i : i + 1]), c, draws)
            best[:left] = sorted(best[:left], key=lambda i: fits[i], reverse=True)
    ws = codes[best[:1]]
    moved = climb(G, guides, ws, c, target)
    if cfg.run.prompt and explained(guides, look(moved), c, draws) < fits[best[0]]:
        moved = ws
    rows = torch.stack([look(codes[i : i + 1]).cpu() for i in best[:SHOWN]], dim=1)
    return moved.clone(), image_grid(list(rows))  # Rows are [K, N, 3, R, R].


def see(G: Generator, ws: Tensor, c: Tensor, **options: Any) -> Tensor:
    """Return pictures of heads, each from all cameras, [B * K, 3, R, R]; always the same jitter."""
    torch.manual_seed(0)
    return G.synthesis(ws, c[None].expand(len(ws), -1, -1), **options)["image"]


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
        guides: The prior; see `noise_errors`.
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
        errors.append(noise_errors(prior, latents, condition, times.to(c.device), noise).mean())
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
        images = see(G, moved, c, force_fp32=True)  # Half precision would lose small gradients.
        loss = TYPICAL * typical - clip_fit(guides, images, target)
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
    frames = head.turn(rim, max(size, min(2 * size, VIDEO)))
    bar = tqdm(frames, total=cfg.frames, desc="video", unit="frame")
    save_video(bar, out / f"avatar{ending()}")
    name = shlex.quote(str(out))
    print(f"{out / 'avatar.glb'} written: {len(head.atlas.triangles)} triangles")
    print(f"  look    {out / 'avatar.png'}, {out / f'avatar{ending()}'}")
    print(f"  render  python render.py --ckpt {name} --orbit 120 --out {name}/renders")
    print(f"  play    python view.py --ckpt {name}")


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
