"""Measure a training step and its parts: time, floating-point operations, memory.

    python bench.py
    python bench.py --base ffhq --generator ffhqrebalanced512-128.pkl --batch 4 --json bench.json
    python bench.py --random full --parts generator generator_backward

Prints a table and what its columns mean, and writes both to --out, all numbers to --json. The whole
step is train.py's own, with its losses and Adam's update; the other parts are what it calls.
"""

import copy
import importlib.metadata
import inspect
import itertools
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import samples
import terms
import train
from config import Base
from files.generators import load_generator
from files.official import RELEASED, released_arguments, with_foreground
from guides import Guides, load_prior, load_vit, prior_dtype, resize
from harness.cli import run_cli
from harness.devices import flush_denormals, peak_gb, pick_device
from harness.measure import commit, count, cpu_name, stopwatch
from harness.run_folder import locate
from harness.store import write_text
from models.diffusion import Condition, DiffusionPrior
from models.eg3d import TriPlaneGenerator
from models.features import ClipFeatures, TokenFeatures
from models.full_size import random_clip, random_prior, random_vit
from models.generator import Generator
from models.noise import guided_noise

PROMPT = "a bronze statue"
TOKENIZER = locate("checkpoints/puppets/clip")  # The one at hand.
NETWORKS = ("base", "generator", "diffusion", "controlnet", "vae", "features", "clip")
SWITCHES = (
    "method",
    "batch",
    "micro_batch",
    "low_memory",
    "precision",
    "vae_precision",
    "compile",
    "device",
)
EXACT = {"precision": "fp32", "vae_precision": "fp32", "vae": "", "compile": False}
CHANNELS, SIDE, MATRIX = 256, 256, 2048  # Sizes of the convolution and of the square matrices.
CONV_GFLOP, MATMUL_GFLOP = 18 * CHANNELS**2 * SIDE**2 / 1e9, 2 * MATRIX**3 / 1e9
LONG = 60.0  # Seconds; a part that has taken longer is not timed again.
NOTES = f"""\
- *seconds*: median of the timed calls, after one that is counted.
- *TFLOP*: the operations of convolutions and matrix products, attention's included, 2 for a
  multiply-add. Plane lookups, element-wise work, normalisation, resizing and Adam's step are not
  counted.
- *units*: of the time of one float32 convolution, 3 x 3, {CHANNELS} -> {CHANNELS} channels,
  {SIDE} x {SIDE} px, done just before each timed call. *of conv*, *of matmul*: GFLOP/s, compared
  with that convolution's and with those of a float32 product of {MATRIX} x {MATRIX} matrices.
  A GPU does both as torch is set there, which is with TF32 for convolutions only.
- On a CPU, units and rates go by *CPU s*, the seconds of all threads together: other processes
  disturb them less than they disturb the clock.
- *GB*: the most that torch held beyond what it held before the counted call: activations,
  gradients, Adam's state, work space; not the networks' weights, nor what malloc loses between
  blocks, which made a process on a CPU grow by a fifth to a half more.
"""

Row = dict[str, float | None]  # What was measured of a part, by name.


@dataclass
class Config:
    """Options of bench.py; those named as train.py's are the same."""

    base: Base | None = None  # World whose presets; None: train.py's.
    generator: str | None = None  # Generator to adapt: file, run folder, hub id or URL.
    diffusion: str | None = None  # Frozen prior: diffusers folder or hub id.
    controlnet: str | None = None  # Depth ControlNet of the prior: folder or hub id.
    vae: str | None = None  # Other VAE of the prior, or TAESD: folder or hub id.
    features: str | None = None  # Frozen ViT that HSC compares: folder or hub id.
    clip: str | None = None  # CLIP that scores the log: folder or hub id.
    random: Literal["full", "taesd"] | None = None
    """Random networks of full size instead, made in memory: EG3D's for faces of 512 px, Stable
    Diffusion 1.5 with its depth ControlNet and its VAE or TAESD, DINOv2-small, CLIP ViT-B/32."""

    method: str | None = None  # Objective; None: train.py's own.
    batch: int = 1  # Samples in a step.
    micro_batch: int | None = None  # Samples that the step renders at once; None: all of them.
    low_memory: bool = False  # Compute the VAE's activations twice instead of keeping them.
    precision: Literal["fp32", "fp16", "bf16"] | None = None  # Of the prior except its VAE.
    vae_precision: Literal["fp32", "bf16"] = "fp32"  # Precision of the VAE itself.
    compile: bool = False  # Compile UNet, ControlNet and VAE.

    parts: tuple[str, ...] = ()  # Parts to measure, by their names in the table; none: all.
    repeats: int = 5  # Timed calls of each part; of those that take minutes there are fewer.
    device: str | None = None  # One of cpu, cuda, cuda:1, mps; None: cuda where there is one.
    json: Path | None = None  # File to write all numbers to.
    out: Path | None = None  # File to write the table to, such as docs/benchmarks.md.


def main(cfg: Config) -> None:
    """Measure, print and write.

    Raises:
        ValueError: an option cannot be used; nothing has been measured.
    """
    check_options(cfg)
    run = run_options(cfg)
    device = pick_device(cfg.device)
    report = describe(cfg, device) | {"reuse": run.targets.reuse}
    torch.manual_seed(0)
    world = World(run, device, random=cfg.random is not None)
    # All networks first: what cannot be loaded is refused before anything is measured.
    calls = {name: world.call(PARTS[name]) for name in PARTS if name in (cfg.parts or PARTS)}
    yardsticks = [convolution(device), product(device)]
    for yardstick in yardsticks:
        yardstick()  # The first call is slower.
    for name, call in tqdm(calls.items(), unit="part"):
        report["parts"][name] = measure(call, yardsticks, device, cfg.repeats)
        tqdm.write(f"{name}: {report['parts'][name]['seconds']:.3g} s")
        report["process_peak_gb"] = peak_gb(device)
        write(report, cfg)  # What is measured so far, should it be stopped.
    if "dsds" in report["parts"] and not cfg.random:  # Random networks have no meaning.
        report["gradient"] = compare(world)
        write(report, cfg)
    print(markdown(report))


def write(report: dict, cfg: Config) -> None:
    """Write what has been measured to the files asked for."""
    if cfg.json:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_text(cfg.json, text)
    if cfg.out:
        write_text(cfg.out, markdown(report))


def check_options(cfg: Config) -> None:
    """Refuse what cannot be measured or written.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    unknown = ", ".join(sorted(set(cfg.parts) - PARTS.keys()))
    if unknown:
        raise ValueError(f"--parts must be among {', '.join(PARTS)}, got {unknown}")
    if cfg.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {cfg.repeats}")
    given = ", ".join(f"--{name}" for name in NETWORKS if getattr(cfg, name) is not None)
    if cfg.random and given:
        raise ValueError(f"--random replaces all networks, so no {given} with it")
    if cfg.json and cfg.out and cfg.json.absolute() == cfg.out.absolute():
        raise ValueError(f"--json and --out must be two files, got {cfg.json} twice")
    for flag, path in (("--json", cfg.json), ("--out", cfg.out)):
        if path and (os.path.isdir(path) or not os.access(path.absolute().parent, os.W_OK)):
            raise ValueError(f"{flag} {path} is no file that can be written")


def run_options(cfg: Config) -> train.Config:
    """Return the settled options of the run whose step is measured.

    Raises:
        ValueError: train.py would refuse them.
    """
    given = {name: getattr(cfg, name) for name in (*NETWORKS, *SWITCHES)}
    given["base"] = cfg.base or train.Config.base
    if cfg.random:
        taesd = "taesd" if cfg.random == "taesd" else None
        given |= {"base": "ffhq", "generator": "random", "vae": taesd}
    run = train.Config(prompt=PROMPT, out=Path(tempfile.gettempdir(), "gca3d-bench"), **given)
    train.check(replace(run, generator=locate("bench.py")) if cfg.random else run)
    return run


class World:
    """Networks and inputs of one step of B heads at once, each made when first asked for."""

    def __init__(self, cfg: train.Config, device: torch.device, random: bool = False) -> None:
        """Take settled options; `random` networks are of full size, whatever `cfg` names."""
        self.cfg, self.device, self.random = cfg, device, random
        self.numbers = itertools.count(1)  # Numbers of the steps.
        flush_denormals()  # As train.py does.

    def call(self, part: Callable[..., object]) -> Callable[[], object]:
        """Return a part as a call without arguments: each gets what here has its name."""
        return partial(part, *(getattr(self, name) for name in inspect.signature(part).parameters))

    @cached_property
    def G_src(self) -> Generator:
        """The frozen source."""
        G = random_generator() if self.random else load_generator(locate(self.cfg.generator))
        if "planes" not in G.gives:
            raise ValueError(f"{self.cfg.generator} has no planes, and parts here measure them")
        return G.to(self.device)

    @cached_property
    def G(self) -> Generator:
        """A copy that learns."""
        G = copy.deepcopy(self.G_src)
        train.learning_weights(G, self.cfg.learns[0])
        return G

    @cached_property
    def prior(self) -> DiffusionPrior:
        """The frozen prior."""
        if not self.random:
            return load_prior(self.cfg, self.device)
        cfg, dtype = self.cfg, prior_dtype(self.cfg, self.device)
        prior = random_prior(
            TOKENIZER,
            self.device,
            dtype,
            vae_dtype=terms.PRECISIONS[cfg.vae_precision],
            taesd=bool(cfg.vae),
            recompute_vae=cfg.low_memory,
        )
        if cfg.compile:
            prior.compile()
        return prior

    @cached_property
    def vit(self) -> TokenFeatures:
        """The frozen ViT."""
        return random_vit(self.device) if self.random else load_vit(self.cfg, self.device)

    @cached_property
    def clip(self) -> ClipFeatures:
        """The frozen CLIP."""
        if self.random:
            return random_clip(TOKENIZER, self.device)
        return ClipFeatures.from_pretrained(locate(self.cfg.clip), self.device)

    @cached_property
    def guides(self) -> Guides:
        """The frozen networks, as the terms see them."""
        return Guides(self.cfg, self.G_src, self.clip, self.prior, self.vit)

    @cached_property
    def run(self) -> train.Run:
        """All of them, as train.py prepares them for a run."""
        return train.prepare(self.cfg, self.G_src, self.guides)

    @cached_property
    def later(self) -> train.Run:
        """The run once the heads of its first step come again."""
        cfg = replace(self.cfg, targets=replace(self.cfg.targets, reuse=2))
        run = replace(self.run, pool=samples.Pool(cfg, self.G_src, self.guides))
        train.take_step(run, 1)
        return run

    @cached_property
    def z(self) -> Tensor:
        """Latents, [B, z_dim]."""
        return torch.randn(self.cfg.batch, self.G_src.z_dim).to(self.device)

    @cached_property
    def frontal(self) -> Tensor:
        """The frontal camera for each of them, [B, 25]."""
        return self.G_src.cameras.frontal(self.cfg.batch).to(self.device)

    @cached_property
    def c(self) -> Tensor:
        """Cameras, [B, 25]."""
        return self.G_src.cameras.sample(self.cfg.batch).to(self.device)

    @cached_property
    def ws(self) -> Tensor:
        """Style codes, [B, num_ws, w_dim]."""
        return self.G_src.mapping(self.z, self.frontal)

    @cached_property
    def planes(self) -> Tensor:
        """Planes of the source, [B, 3, C, P, P]."""
        return self.G_src.planes(self.ws)

    @cached_property
    def features(self) -> Tensor:
        """What super-resolution is given, [B, C, n, n]."""
        n = self.G_src.neural_rendering_resolution
        channels = self.G_src.superresolution.block0.conv0.weight.shape[1]
        return torch.randn(self.cfg.batch, channels, n, n).to(self.device)

    @cached_property
    def now(self) -> terms.Moment:
        """The source's renders, times and noise, half-way through a run."""
        rays = self.G_src.rays(self.c)
        source = samples.draw_samples(self.G_src, self.ws, self.c, rays)
        times = samples.draw_times(self.cfg, self.guides, self.cfg.steps // 2).to(self.device)
        noise = samples.draw_noise(self.cfg, self.guides).to(self.device)
        seen = terms.Seen(self.guides, {"c": self.c} | source)
        return terms.Moment(self.guides, seen, times, noise, 0.5)

    @cached_property
    def images(self) -> Tensor:
        """Images that want gradients, [B, 3, R, R]."""
        return self.G_src.synthesis(self.ws, self.c)["image"].requires_grad_()

    @cached_property
    def condition(self) -> Condition:
        """The embedded prompt."""
        return self.prior.condition(PROMPT)

    @cached_property
    def controlnet_inputs(self) -> tuple[Tensor, ...]:
        """Latents, times, text and depth of one batch for both halves of guidance."""
        source = self.now.source.outputs
        depth = self.prior.depth_condition(source["image_depth"], source["mask"])
        text = self.condition.text.repeat_interleave(len(depth), 0)  # [2B, L, D]
        latents, depth = (x.repeat(2, 1, 1, 1) for x in (self.now.noise[0], depth))
        latents, text, depth = (x.to(self.prior.controlnet.dtype) for x in (latents, text, depth))
        return latents, self.now.t.repeat(2), text, depth


# The parts: functions of what World has under their arguments' names, which is made beforehand.


@torch.no_grad()
def backbone(G_src: Generator, z: Tensor, frontal: Tensor) -> None:
    """Map latents to planes."""
    G_src.planes(G_src.mapping(z, frontal))


@torch.no_grad()
def rendering(G_src: Generator, ws: Tensor, c: Tensor, planes: Tensor) -> None:
    """March the rays of an image through planes."""
    G_src.synthesis(ws, c, planes=planes, superresolve=False)


@torch.no_grad()
def superresolution(G_src: Generator, ws: Tensor, features: Tensor) -> None:
    """Make an image of what was rendered."""
    G_src.superresolution(features[:, :3], features, ws, "none")


@torch.no_grad()
def generator(G_src: Generator, z: Tensor, frontal: Tensor, c: Tensor) -> None:
    """Make the source's image: backbone, rendering and super-resolution."""
    G_src.synthesis(G_src.mapping(z, frontal), c)


@torch.no_grad()
def generator_bf16(G_src: Generator, z: Tensor, frontal: Tensor, c: Tensor) -> None:
    """Make it in bfloat16. A CPU without instructions for that emulates them, slowly."""
    with torch.autocast(c.device.type, torch.bfloat16):
        G_src.synthesis(G_src.mapping(z, frontal), c)


def generator_backward(G: Generator, ws: Tensor, c: Tensor) -> None:
    """Make an image and go back to the weights that learn."""
    G.zero_grad()
    images = G.synthesis(ws, c, force_fp32=True)["image"]
    images.backward(torch.ones_like(images))


@torch.no_grad()
def vae(prior: DiffusionPrior, images: Tensor) -> None:
    """Encode images."""
    prior.encode_images(resize(images, prior.image_size))


def vae_backward(prior: DiffusionPrior, images: Tensor) -> None:
    """Encode images and go back to them."""
    latents = prior.encode_images(resize(images, prior.image_size))
    torch.autograd.grad(latents.sum(), images)


@torch.no_grad()
def controlnet(prior: DiffusionPrior, controlnet_inputs: tuple[Tensor, ...]) -> None:
    """Look at the depth, for both halves of guidance."""
    prior.controlnet(*controlnet_inputs, return_dict=False)


def unet(cfg: train.Config, prior: DiffusionPrior, now: terms.Moment, condition: Condition) -> None:
    """Predict noise with guidance, both halves in one batch, without depth."""
    guided_noise(prior, now.noise[0], now.t, condition, cfg.guidance)


@torch.no_grad()
def vit(vit: TokenFeatures, images: Tensor) -> None:
    """Make the tokens that HSC compares."""
    vit.tokens(images)


def vit_backward(vit: TokenFeatures, images: Tensor) -> None:
    """Make the tokens and go back to the images."""
    torch.autograd.grad(vit.tokens(images).sum(), images)


@torch.no_grad()
def clip(clip: ClipFeatures, images: Tensor) -> None:
    """Score images for the log."""
    clip.images(images)


def dsds(images: Tensor, now: terms.Moment) -> Tensor:
    """Take the gradient of DSDS at the images: VAE, ControlNet, UNet."""
    return terms.pull_back({"image": images}, {"dsds": 1.0}, now, len(images))[0]["image"]


def hsc(images: Tensor, now: terms.Moment) -> None:
    """Take the gradient of HSC at the images: the ViT, for source and adapted ones."""
    source = terms.Seen(now.guides, now.source.outputs)  # Whose views are not made yet.
    terms.pull_back({"image": images}, {"hsc": 1.0}, replace(now, source=source), len(images))


@torch.no_grad()
def paint(now: terms.Moment) -> Tensor:
    """Let the prior paint the source's pictures: encode, invert, denoise, decode."""
    return terms.Seen(now.guides, now.source.outputs).painted.view("image")


def step(run: train.Run, numbers: Iterator[int]) -> dict[str, float]:
    """Take a whole step of training on new heads, and return its row of the log."""
    return train.take_step(run, next(numbers))


def reused_step(later: train.Run) -> dict[str, float]:
    """Take a whole step on heads that an earlier step has seen."""
    return train.take_step(later, 1)


PARTS = {
    part.__name__: part
    for part in (
        *(backbone, rendering, superresolution, generator, generator_bf16, generator_backward),
        *(vae, vae_backward, controlnet, unet, vit, vit_backward, clip),
        *(dsds, hsc, paint, step, reused_step),
    )
}


def convolution(device: torch.device) -> Callable[[], object]:
    """Return the convolution whose time is the unit."""
    x = torch.randn(1, CHANNELS, SIDE, SIDE).to(device)
    return partial(F.conv2d, x, torch.randn(CHANNELS, CHANNELS, 3, 3).to(device), padding=1)


def product(device: torch.device) -> Callable[[], object]:
    """Return the product of two matrices."""
    return partial(torch.mm, *torch.randn(2, MATRIX, MATRIX).to(device))


def measure(
    call: Callable[[], object],
    yardsticks: Sequence[Callable[[], object]],
    device: torch.device,
    repeats: int,
) -> Row:
    """Count a call, then time it, each time after a convolution and a product.

    Returns:
        What the columns of the table show (see `NOTES`), and what it was compared with,
        `conv_seconds` and `matmul_seconds`, by the same clock as units and rates.
    """
    gflop, memory = count(call, device)
    clock = 1 if device.type == "cpu" else 0  # Which of the two that `stopwatch` reads.
    times: list[list[tuple[float, float]]] = []  # Convolution, product and call.
    while len(times) < repeats and sum(row[-1][clock] for row in times) < LONG:
        times.append([stopwatch(run, device) for run in (*yardsticks, call)])
    conv, matmul, spent = ([row[i][clock] for row in times] for i in range(3))
    units = median(part / unit for part, unit in zip(spent, conv, strict=True))
    products = median(part / unit for part, unit in zip(spent, matmul, strict=True))
    return {
        "repeats": len(times),
        "seconds": median(row[-1][0] for row in times),
        "cpu_seconds": median(row[-1][1] for row in times),
        "conv_seconds": median(conv),
        "matmul_seconds": median(matmul),
        "gflop": gflop,
        "gflop_per_second": gflop / median(spent),
        "units": units,
        "of_conv": gflop / CONV_GFLOP / units,
        "of_matmul": gflop / MATMUL_GFLOP / products,
        "peak_gb": memory,
    }


def compare(world: World) -> dict[str, float] | None:
    """Compare DSDS's gradient at the images with that of the prior as it is, in float32.

    Returns:
        Their cosine and the ratio of their lengths, means over the samples; None if it is the same.
    """
    dtype = prior_dtype(world.cfg, world.device)
    cfg = replace(world.cfg, **EXACT)
    if replace(cfg, precision=world.cfg.precision) == world.cfg and dtype == torch.float32:
        return None
    exact = World(cfg, world.device)
    for shared in ("G_src", "vit", "clip", "images"):
        setattr(exact, shared, getattr(world, shared))
    exact.now = replace(
        world.now, guides=exact.guides, source=terms.Seen(exact.guides, world.now.source.outputs)
    )
    ours, theirs = (dsds(w.images, w.now).flatten(1) for w in (world, exact))
    ratios = ours.norm(dim=1) / theirs.norm(dim=1)
    return {
        "cosine": F.cosine_similarity(ours, theirs).mean().item(),
        "ratio": ratios.mean().item(),
    }


def describe(cfg: Config, device: torch.device) -> dict:
    """Return what decides the numbers, as JSON knows it, with room for them."""
    packages = ("torch", "diffusers", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "type": device.type,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        },
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | versions,
        "commit": commit(),
        "settings": json.loads(json.dumps(asdict(cfg), default=str)),
        "parts": {},
    }


def markdown(report: dict) -> str:
    """Return a report as a page of Markdown."""
    machine, settings, parts = report["machine"], report["settings"], report["parts"]
    on_cpu = machine["type"] == "cpu"
    settings = {k: v for k, v in settings.items() if v and k not in ("json", "out")}
    given = [f"{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in settings.items()]
    versions = [f"{name} {version}" for name, version in report["versions"].items() if version]
    load = machine["load"]
    busy = f" (busy: load {load:.1f} at the start)" if load and load > machine["cores"] / 2 else ""
    conv, matmul = (
        median(gflop / row[f"{name}_seconds"] for row in parts.values())
        for name, gflop in (("conv", CONV_GFLOP), ("matmul", MATMUL_GFLOP))
    )
    lines = [
        "# Benchmarks",
        "",
        "Written by `bench.py --out`, which measures a step of train.py and its parts.",
        *(["", "**Not measured on a GPU yet**: all figures are a CPU's."] if on_cpu else []),
        "",
        f"- machine: {machine['device']}, cores: {machine['cores']}, threads: {machine['threads']}"
        f"{busy}",
        f"- versions: {', '.join(versions)}; commit {report['commit'] or 'unknown'}",
        f"- settings: {', '.join(given)}",
        f"- yardsticks: convolution {conv:.1f} GFLOP/s, matrix product {matmul:.1f} GFLOP/s",
        f"- most memory of the process: {report['process_peak_gb']:.2f} GB",
        "",
        "| part | seconds | CPU s | TFLOP | GFLOP/s | of conv | of matmul | units | GB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in parts.items():
        memory = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        lines.append(
            f"| {name} | {row['seconds']:.3g} | {row['cpu_seconds']:.3g} "
            f"| {row['gflop'] / 1e3:.4g} | {row['gflop_per_second']:.3g} | {row['of_conv']:.0%} "
            f"| {row['of_matmul']:.0%} | {row['units']:.3g} | {memory} |"
        )
    if {"step", "reused_step"} <= parts.keys():
        new, again = (parts[name] for name in ("step", "reused_step"))
        mean = again["gflop"] + (new["gflop"] - again["gflop"]) / report["reuse"]
        lines += [
            "",
            f"A step of the run, {report['reuse']} on the same heads: {mean / 1e3:.3f} TFLOP.",
        ]
    if report.get("gradient"):
        cosine, ratio = report["gradient"].values()
        lines += [
            "",
            "DSDS's gradient at the images, compared with float32 and the prior's own VAE: "
            f"cosine {cosine:.5f}, {ratio:.4f} times as long.",
        ]
    return "\n".join([*lines, "", NOTES])


def random_generator() -> TriPlaneGenerator:
    """Return EG3D's generator for faces of 512 px, with random weights."""
    img_resolution, n, rendering_kwargs = RELEASED["ffhq512-128"]
    rendering_kwargs = with_foreground(rendering_kwargs)
    G = TriPlaneGenerator(**released_arguments(img_resolution), rendering_kwargs=rendering_kwargs)
    G.neural_rendering_resolution = n
    return G.eval().requires_grad_(False)


if __name__ == "__main__":
    run_cli(Config, main, __doc__)
