"""Adapt a 3D generator to a new domain, given a sentence or one picture.

    python train.py --prompt "a bronze statue"
    python train.py --image statue.jpg --out runs/statue

The method is GCA-3D (arXiv:2412.15491) or, with --method, one it is compared with. Writes a run
folder: config.json, log.jsonl (a row per step), grid-<step>.png (source heads above adapted ones),
ckpt-<step>.pt (for a resume) and generator.safetensors (the result, for render.py). The same
command resumes a run that was stopped. Started by torchrun or accelerate launch, it trains on
several GPUs, which share every batch. Options that are None here are set by the presets of --base
and --method, which --help lists.
"""

import copy
import json
import os
import re
import shlex
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, reduce
from math import inf, isfinite
from operator import or_
from pathlib import Path
from typing import Literal, TextIO

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from files.generators import load_generator, save_generator
from harness import ranks
from harness.checkpoints import load_checkpoint, save_checkpoint
from harness.cli import options_settled, run_cli, stop_requests
from harness.devices import peak_gb, pick_device
from harness.pictures import image_grid, read_picture, save_image, to_image
from harness.run_folder import (
    check_folder,
    check_run,
    claim_run,
    locate,
    portable,
    sole_writer,
    trim_log,
)
from methods import (
    DIFFUSION_TERMS,
    EDITS,
    HSC_GRIDS,
    METHODS,
    TERMS,
    VIT_TERMS,
    Batch,
    Outputs,
    Term,
    objective,
)
from models.diffusion import DiffusionPrior
from models.eg3d import TriPlaneGenerator
from models.features import ClipFeatures, TokenFeatures
from models.fingerprints import fingerprint, fingerprint_generator
from render import portraits

STABLE_DIFFUSION = {
    "diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "adapters": ("lllyasviel/control_v11f1p_sd15_depth", "h94/IP-Adapter"),
    "features": "facebook/dinov2-small",
    "clip": "openai/clip-vit-base-patch32",
    # StyleGAN-Fusion's for EG3D (arXiv:2212.04473), but for the batch, which is 1 there.
    "steps": 5000,
    "batch": 4,
    "lr": 8e-4,
    "guidance": 100.0,
    "t_range": (0.01, 0.5),
    "save_every": 250,
    "grid_every": 250,
}
BASES = {
    "puppets": {
        "source_prompt": "a photo of a person",
        "generator": "checkpoints/puppets/generator.safetensors",
        "diffusion": "checkpoints/puppets/diffusion",
        "features": "checkpoints/puppets/dino",
        "clip": "checkpoints/puppets/clip",
        "steps": 50,
        "batch": 4,
        "lr": 2e-3,
        "guidance": 3.0,
        "t_range": (0.02, 0.98),
        "save_every": 25,
        "grid_every": 25,
    },
    "ffhq": STABLE_DIFFUSION | {"source_prompt": "a photo of a person"},
    # Cats as StyleGAN-Fusion turns them into dogs.
    "afhq": STABLE_DIFFUSION
    | {"source_prompt": "a photo of a cat", "steps": 2000, "t_range": (0.01, 0.3)},
}
# EG3D's generators that fit a base; NVIDIA's licence does not let others hand them out.
EG3D_FILES = {"ffhq": "ffhqrebalanced512-128.pkl", "afhq": "afhqcats512-128.pkl"}
# (base, method): what suits neither row alone.
TUNED: dict[tuple[str, str], dict] = {
    # A delta would double what UNet and ControlNet cost, which on real models is most of a step.
    ("puppets", "gca3d"): {"weights": {"hsc": 0.05}, "delta": 0.5},
    ("puppets", "sds"): {"guidance": 1.5, "lr": 3e-3},
    ("puppets", "stylegan-fusion"): {"weights": {"score_direction": 0.03}, "lr": 3e-3},
    ("puppets", "3d-adapter"): {
        "weights": {
            "clip_direction": 1.0,
            "target": 5.0,
            "structure": 0.1,
            "feature_structure": 0.1,
        },
        "lr": 1e-2,
    },
}

# What may differ between a run and its resume. The picture itself is compared, not its name.
FREE_TO_CHANGE = {
    *("out", "image", "device", "save_every", "grid_every"),
    *("micro_batch", "low_memory", "compile"),  # Slower or faster; to rounding the same gradients.
}
POSITIVE = {"lr", "hsc_temperature"}
AT_LEAST = {
    "trunc": -10,
    **dict.fromkeys(("steps", "batch", "micro_batch", "save_every", "grid_every"), 1),
    **dict.fromkeys(("seed", "guidance", "image_scale", "depth_scale", "delta"), 0),
}
# Beyond these lie typing errors rather than wishes.
AT_MOST = {
    **{"batch": 1024, "lr": 1, "trunc": 10, "guidance": 1e4, "delta": 1},
    **dict.fromkeys(("image_scale", "depth_scale"), 10),
}
LARGEST_WEIGHT = 1e4
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EMA_HALF_LIFE = 0.05  # Of the run: long enough to calm the result, short enough to follow it.
GRID_SEEDS = list(range(8))


@dataclass
class Config:
    """Options of train.py; None is replaced by the preset of --base and --method."""

    prompt: str | None = None  # Target domain in words, such as "a bronze statue".
    image: Path | None = None  # Target domain as one picture; with a prompt, both count.
    edit: str | None = None
    """Local edit instead of a prompt, such as "a person with green hair" (--method diffusiongan3d):
    what it does not concern is kept."""
    out: Path | None = None  # Run folder; None: runs/ and the prompt's words.

    base: Literal["puppets", "ffhq", "afhq"] = "puppets"
    """World of the generator: its presets. Only puppets comes with a generator; for the others give
    one of EG3D's .pkl."""
    method: Literal["gca3d", "sds", "stylegan-fusion", "diffusiongan3d", "nada", "3d-adapter"] = (
        "gca3d"
    )
    """Objective and what learns: its presets."""
    generator: str | None = None
    """Generator to adapt: .safetensors or EG3D's .pkl (as a file, hub id user/repo/file or URL), or
    run folder."""
    diffusion: str | None = None  # Frozen prior: diffusers folder or hub id.
    adapters: tuple[str] | tuple[str, str] | None = None
    """Depth ControlNet of the prior and, for --image, its IP-Adapter: folders or hub ids, where its
    own folder does not hold them."""
    lora: tuple[str] | tuple[str, float] | None = None
    """LoRA added to the prior, a file, folder or hub id (user/repo/file), and its weight."""
    vae: str | None = None  # Other VAE of the prior, or TAESD (faster, coarser), folder or hub id.
    features: str | None = None
    """Frozen ViT (DINOv2 or ViT) that HSC and the perceptual term compare, folder or hub id."""
    clip: str | None = None
    """CLIP that scores the log, and that of NADA and 3D-Adapter; folder or hub id."""
    source_prompt: str | None = None  # The generator's own domain in words.

    steps: int | None = None  # Updates of the generator; schedules run over them.
    batch: int | None = None  # Heads per step.
    learns: tuple[str, ...] | None = None
    """Regular expressions of the names of the generator's parameters that learn; of several, each
    has an equal part of the run."""
    seed: int = 0  # Together with the step, fixes every random draw.
    lr: float | None = None  # Adam's learning rate.
    trunc: float = 1.0  # Truncation psi of the training heads; 1: the full variety.
    mapping_camera: Literal["frontal", "render"] = "frontal"
    """Camera that conditions the mapping network; render, as in StyleGAN-Fusion's code, leaks pose
    into identity."""

    guidance: float | None = None  # Classifier-free guidance scale; 1: none.
    t_range: tuple[float, float] | tuple[float, float, float] | None = None
    """Lowest and highest diffusion time drawn, as fractions of the schedule; a third number is
    where the highest arrives, linearly, at the last step."""
    image_scale: float | None = None
    """Weight of the picture in the prior; None: 1 with a picture alone, 0.6 beside a prompt."""
    depth_scale: float | None = None  # Weight of the source's depth in the prior; 0: off.
    mask: bool | None = None  # Whether only the source's foreground is adapted.
    delta: float | None = None
    """Share of the noise whose place the prior's prediction for the source's head takes, in score
    distillation (delta denoising score, arXiv:2304.07090); 0: off."""
    hsc_temperature: float = 0.1  # Softmax temperature of HSC (tau).
    hsc_levels: tuple[tuple[float, float, float], tuple[float, float, float]] = (
        (3.0, 2.0, 1.0),
        (1.0, 2.0, 3.0),
    )
    """Shares of HSC's three levels, 4 x 4 cells, 8 x 8 and all, in the first and last step."""

    weights: dict[str, float] | None = None
    """Weights of the objective's terms, as in: --weights hsc 0.1 perceptual 0 (0: off). Terms not
    named here have the preset's; all are listed at the head of --help."""

    save_every: int | None = None  # Steps between checkpoints.
    grid_every: int | None = None  # Steps between grids.
    device: str | None = None  # One of cpu, cuda, cuda:1, mps; None: cuda where there is one.
    micro_batch: int | None = None
    """Heads at once, of a process's share of a step; fewer need less memory. None: all of them."""
    low_memory: bool = False
    """Compute the VAE's activations twice instead of keeping them: slower, same gradients."""
    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Of the prior's networks except its VAE; None: fp16 on CUDA, else fp32."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"  # Of the VAE, whose gradients lead to images.
    compile: bool = False
    """Compile UNet, ControlNet and VAE (torch.compile): a faster step after a slow first one."""


@dataclass(frozen=True)
class Training:
    """What the steps of a run work with and, from `G` on, what they change."""

    G_src: TriPlaneGenerator
    prior: DiffusionPrior | None  # None: no term needs it.
    terms: dict[str, Term]
    clip: ClipFeatures
    target: Tensor  # What the log's scores compare with, [1, D].
    G: TriPlaneGenerator
    G_ema: TriPlaneGenerator
    phases: list[dict[str, nn.Parameter]]  # Of G: those that learn, one after the other.
    weights: dict[str, nn.Parameter]  # Of all phases.
    averages: dict[str, nn.Parameter]  # The same of G_ema.
    optimizer: torch.optim.Optimizer


def main(cfg: Config) -> None:
    """Adapt a generator, or go on adapting it.

    Raises:
        ValueError: an option cannot be used; nothing has been written.
        FloatingPointError: a loss or gradient was not finite; the last checkpoint is intact.
        SystemExit: after Ctrl+C (130) or SIGTERM (143), once a checkpoint is saved.
    """
    with ranks.joined(cfg.device):
        # Settle every option, and refuse what cannot work before anything is loaded or written.
        cfg = resolve(cfg)
        check_options(cfg)
        with sole_writer(cfg.out) if ranks.first() else nullcontext():
            adapt(cfg)


def adapt(cfg: Config) -> None:
    """Do what `main` promises, with settled options and nobody else in the run folder."""
    picture = read_reference(cfg)
    settings = describe_run(cfg, picture)
    check_run(cfg.out, settings, FREE_TO_CHANGE)
    state = load_checkpoint(cfg.out)
    if is_finished(cfg, state):
        print_result(cfg)
        return

    # The frozen networks: the source, the prior, the ViT, CLIP for the log; the copy that learns.
    device = pick_device(cfg.device)
    G_src = load_generator(locate(cfg.generator), device)
    check_noise(cfg, G_src)
    prior = load_prior(cfg, device) if DIFFUSION_TERMS & cfg.weights.keys() else None
    vit = load_vit(cfg, device) if VIT_TERMS & cfg.weights.keys() else None
    clip = ClipFeatures.from_pretrained(locate(cfg.clip), device)
    reference = to_image(picture).to(device) if picture else None  # [1, 3, S, S]
    training = prepare(cfg, G_src, prior, vit, clip, reference)

    # Heads to look at, the same in every grid.
    source_row = portraits(G_src, GRID_SEEDS, cfg.trunc)  # [N, 3, R, R]

    # The run folder; nothing is written before every process is ready, and all of it by the first.
    ranks.meet()
    start = state["step"] if state else 0
    if ranks.first():
        claim_run(cfg.out, settings | fingerprints(G_src, prior, vit, clip), FREE_TO_CHANGE)
        if picture:
            save_image(picture, cfg.out / "reference.png")
        trim_log(cfg.out, start)
        if start == 0:
            save_grid(cfg, 0, source_row, G_src)
    log_file = cfg.out / "log.jsonl" if ranks.first() else os.devnull

    if state:
        restore(state, training)
    del state  # Four times the size of what learns.

    bar = tqdm(range(start + 1, cfg.steps + 1), initial=start, total=cfg.steps, unit="step")
    with open(log_file, "a") as log, stop_requests() as signals, options_settled():
        for step in bar:
            began = time.perf_counter()
            row = take_step(cfg, step, training)
            row["seconds"] = round(time.perf_counter() - began, 3)
            row["peak_gb"] = round(peak_gb(device), 3)
            log.write(json.dumps({"step": step, **row}) + "\n")
            log.flush()
            bar.set_postfix_str(f"clip {row['clip']:.3f}, gradient {row['grad_norm']:.2g}")

            # Once in a while: a grid, a checkpoint, an orderly stop of all processes.
            stop = sum(ranks.meet(signals), [])
            if ranks.first() and step % cfg.grid_every == 0 and step < cfg.steps:
                save_grid(cfg, step, source_row, training.G_ema)
            if ranks.first() and (stop or (step % cfg.save_every == 0 and step < cfg.steps)):
                save_run(cfg, step, log, training)
            if stop:
                bar.close()
                print(f"stopped after step {step} of {cfg.steps}; the same command goes on")
                raise SystemExit(128 + stop[0])

        if ranks.first():
            save_grid(cfg, cfg.steps, source_row, training.G_ema)
            save_run(cfg, cfg.steps, log, training)
    print_result(cfg)


def prepare(
    cfg: Config,
    G_src: TriPlaneGenerator,
    prior: DiffusionPrior | None,
    vit: TokenFeatures | None,
    clip: ClipFeatures,
    reference: Tensor | None,
) -> Training:
    """Return a run before its first step; the reference picture is [1, 3, S, S]."""
    target = clip.text([cfg.prompt]) if cfg.prompt else clip.images(reference)  # [1, D]
    terms = objective(cfg, G_src, prior, vit, clip, reference)

    # The copy that learns and its moving average.
    G, G_ema = copy.deepcopy(G_src), copy.deepcopy(G_src)
    phases = [learning_weights(G, pattern) for pattern in cfg.learns]
    weights = {name: weight for phase in phases for name, weight in phase.items()}
    averages = {name: G_ema.get_parameter(name) for name in weights}
    # StyleGAN's betas: no momentum, since the gradients of a step are mostly noise.
    optimizer = torch.optim.Adam(weights.values(), cfg.lr, betas=(0.0, 0.99))
    return Training(
        *(G_src, prior, terms, clip, target),
        *(G, G_ema, phases, weights, averages, optimizer),
    )


def take_step(cfg: Config, step: int, training: Training) -> dict[str, float]:
    """Update the generator and its average once, and return the step's row of the log.

    Raises:
        FloatingPointError: a loss or gradient was not finite; nothing has been updated.
    """
    G, G_src, prior, weights = training.G, training.G_src, training.prior, training.weights
    device = training.target.device

    # Draw from the step's own seed, so that a resumed run draws what an unbroken one would;
    # on the CPU, so that a GPU draws the same (but for the jitter of the rays).
    torch.manual_seed(step_seed(cfg.seed, step))
    z = torch.randn(cfg.batch, G.z_dim).to(device)
    c = G.cameras.sample(cfg.batch).to(device)  # [B, 25]
    t = draw_times(cfg, step, prior).to(device)  # [B]
    noise, noise_again = (draw_noise(cfg, prior).to(device) for _ in range(2))  # [B, 4, h, w]
    # Mapping sees the frontal camera: the render camera would leak pose into identity.
    conditioning = {"frontal": G.cameras.frontal(cfg.batch).to(device), "render": c}
    ws = G.mapping(z, conditioning[cfg.mapping_camera], cfg.trunc)

    @cache
    @torch.no_grad()
    def all_planes() -> tuple[Tensor, Tensor]:
        own = ws[ranks.share(cfg.batch)]
        return ranks.gather(G.planes(own, force_fp32=True)), ranks.gather(G_src.planes(own))

    learning = training.phases[(step - 1) * len(training.phases) // cfg.steps]
    for name, weight in weights.items():
        weight.requires_grad_(name in learning)
    row: dict[str, float] = {}  # Means over the batch.
    training.optimizer.zero_grad()
    for rows in ranks.slices(cfg.batch, cfg.micro_batch):
        # Render the same heads before and after, with one ws and one jitter of the rays.
        # What learns is in float32, for gradients too small for half precision.
        with torch.no_grad():
            torch.manual_seed(step_seed(cfg.seed, step, stream=1))
            source = draw_heads(G_src, ws, c, rows)
        torch.manual_seed(step_seed(cfg.seed, step, stream=1))
        adapted = draw_heads(G, ws, c, rows, force_fp32=True)

        # Sum the terms' gradients at the outputs, then go back through the generator once.
        draws = (t[rows], noise[rows], noise_again[rows])
        batch = Batch(source, *draws, step / cfg.steps, rows.start, all_planes)
        gradients, scores = output_gradients(training.terms, cfg.weights, adapted, batch)
        # What hangs on nothing that learns now has no way back.
        reached = [name for name in gradients if adapted[name].requires_grad]
        torch.autograd.backward(
            [adapted[name] for name in reached], [gradients[name] / cfg.batch for name in reached]
        )
        with torch.no_grad():
            embeds = training.clip.images(adapted["image"])
            scores["clip"] = (embeds @ training.target.T).mean().item()
        for name, score in scores.items():
            row[name] = row.get(name, 0.0) + score * len(embeds) / cfg.batch

    # Add up the processes' gradients, and refuse what is no number.
    gradients = [weight.grad for weight in learning.values() if weight.grad is not None]
    ranks.add_up(gradients, row)
    row["grad_norm"] = nn.utils.get_total_norm(gradients).item()
    if not all(map(isfinite, row.values())):
        raise FloatingPointError(f"not finite at step {step}, t = {t.tolist()}: {row}")

    # Update the weights and their average.
    training.optimizer.step()
    update_averages(training.averages, weights, half_life=EMA_HALF_LIFE * cfg.steps)
    return row


def draw_heads(
    G: TriPlaneGenerator, ws: Tensor, c: Tensor, rows: slice, force_fp32: bool = False
) -> Outputs:
    """Render some heads of a batch, and return all that is made of them on the way."""
    planes = G.planes(ws[rows], force_fp32=force_fp32)
    out = G.synthesis(ws, c, planes=planes, force_fp32=force_fp32, rows=rows)
    return out | {"planes": planes}


def resolve(cfg: Config) -> Config:
    """Fill in what the user left open: user > (base, method) > base > edit > method.

    A blank prompt or edit counts as none; an edit is the prompt as well.
    """
    prompt, edit = (x if x and x.strip() else None for x in (cfg.prompt, cfg.edit))
    cfg = replace(cfg, prompt=prompt or edit, edit=edit)
    given = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in {"generator", "diffusion", "vae", "features", "clip"} & given.keys():
        given[name] = portable(given[name])
    if cfg.adapters:
        given["adapters"] = tuple(map(portable, cfg.adapters))
    if cfg.lora:
        file, scale = (*cfg.lora, 1.0)[:2]
        given["lora"] = (portable(file), scale)
    words = re.findall(r"\w+", cfg.prompt or (cfg.image.stem if cfg.image else ""))
    computed = {
        "depth_scale": 0.0,
        "mask": False,
        "delta": 0.0,
        "out": Path("runs", "-".join(words).lower()[:80] or "unnamed"),
        "image_scale": 0.6 if cfg.prompt and cfg.image else 1.0,
    }
    edited = EDITS.get(cfg.method, {}) if cfg.edit else {}
    tuned = TUNED.get((cfg.base, cfg.method), {})
    rows = METHODS[cfg.method], edited, BASES[cfg.base], tuned, given
    weights = {name: x for row in rows for name, x in row.get("weights", {}).items()}
    if cfg.image is None and "target" not in (cfg.weights or {}):
        weights.pop("target", None)  # Words have no tokens to compare with.
    settled = reduce(or_, rows, computed) | {
        "weights": {n: x for n, x in weights.items() if x or n not in TERMS}
    }
    return replace(cfg, **settled)


def describe_presets() -> str:
    """Return the terms of --weights and what --base and --method set, a line each, for --help."""
    presets = {"base": BASES, "method": METHODS}
    rows = {f"--{kind} {name}": row for kind in presets for name, row in presets[kind].items()}
    rows |= {f"--method {method} --edit": row for method, row in EDITS.items()}
    rows |= {f"--base {base} --method {method}": row for (base, method), row in TUNED.items()}
    lines = [f"--weights {name}: {meaning}" for name, meaning in TERMS.items()]
    for flags, row in rows.items():
        weights = (f"weights {name} {x:.3g}" for name, x in row.get("weights", {}).items())
        others = (f"{option} {value}" for option, value in row.items() if option != "weights")
        lines.append(f"{flags}: " + ", ".join((*weights, *others)))
    return "\n".join(lines)


def check_options(cfg: Config) -> None:
    """Refuse options that no run can have, and a folder that cannot be written.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    if cfg.prompt is None and cfg.image is None:
        raise ValueError("no target domain: give --prompt TEXT, --image FILE or both")
    if cfg.edit is not None and cfg.method not in EDITS:
        raise ValueError(f"--edit needs --method {' or '.join(EDITS)}, got {cfg.method}")
    if cfg.edit not in (None, cfg.prompt):
        raise ValueError(f"--edit stands for a prompt, so no --prompt with it, got {cfg.prompt!r}")
    check_weights(cfg)
    if cfg.generator is None:
        raise ValueError(
            f"--base {cfg.base} comes without a generator: give --generator with EG3D's "
            f"{EG3D_FILES[cfg.base]} or another .pkl or .safetensors"
        )
    for name, value in vars(cfg).items():
        flag = f"--{name.replace('_', '-')}"
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str | Path) and re.search("[\ud800-\udfff]", str(part)):
                raise ValueError(f"{flag} is no UTF-8 text: {ascii(str(part))}")
            if isinstance(part, float) and not isfinite(part):
                raise ValueError(f"{flag} must be a finite number, got {part}")
        if name in AT_LEAST and value is not None and value < AT_LEAST[name]:
            raise ValueError(f"{flag} must be at least {AT_LEAST[name]}, got {value}")
        if name in AT_MOST and value is not None and value > AT_MOST[name]:
            raise ValueError(f"{flag} must be at most {AT_MOST[name]:g}, got {value}")
        if name in POSITIVE and value is not None and value <= 0:
            raise ValueError(f"{flag} must be above 0, got {value}")
    if cfg.batch % ranks.count():
        raise ValueError(f"--batch must divide among {ranks.count()} processes, got {cfg.batch}")
    if not all(0 <= cfg.t_range[0] < high <= 1 for high in cfg.t_range[1:]):
        raise ValueError(f"--t-range must rise within 0 to 1, got {cfg.t_range}")
    if not all(0 < sum(shares) < inf and min(shares) >= 0 for shares in cfg.hsc_levels):
        raise ValueError(f"--hsc-levels must be at least 0 and not all 0, got {cfg.hsc_levels}")
    check_folder(cfg.out)


def check_weights(cfg: Config) -> None:
    """Refuse weights, settled or not, that no objective can have.

    Raises:
        ValueError: naming the term, the rule and the value.
    """
    for name, weight in cfg.weights.items():
        if name not in TERMS:
            raise ValueError(f"--weights must name {', '.join(TERMS)}, got {name!r}")
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise ValueError(f"--weights {name} must be 0 to {LARGEST_WEIGHT:g}, got {weight}")
    if not cfg.weights:
        raise ValueError("nothing to learn: all --weights are 0")
    if "keep" in cfg.weights and cfg.prompt is None:
        raise ValueError("--weights keep needs words that tell the region: --edit or --prompt")
    if "target" in cfg.weights and cfg.image is None:
        raise ValueError("--weights target needs the picture of --image")
    if "distance" in cfg.weights and cfg.batch < 2:
        raise ValueError(f"--weights distance needs a --batch of at least 2, got {cfg.batch}")


def check_noise(cfg: Config, G_src: TriPlaneGenerator) -> None:
    """Refuse to share out a batch among whose heads noise is drawn.

    Raises:
        ValueError: naming the setting of the generator.
    """
    drawn = G_src.rendering_kwargs.get("superresolution_noise_mode") == "random"
    if drawn and (ranks.count() > 1 or cfg.micro_batch):
        raise ValueError(
            f"{cfg.generator} has superresolution_noise_mode random, which neither --micro-batch "
            "nor several processes can share out"
        )


def read_reference(cfg: Config) -> Image.Image | None:
    """Read the reference picture, or the run's own copy of it once the original is gone.

    Raises:
        ValueError: it is no picture.
    """
    if cfg.image is None:
        return None
    kept = cfg.out / "reference.png"
    return read_picture(kept if kept.exists() and not cfg.image.exists() else cfg.image)


def describe_run(cfg: Config, picture: Image.Image | None) -> dict:
    """Return the settings of a run as JSON knows them; of a picture, what it shows."""
    settings = json.loads(json.dumps(asdict(cfg), default=str))
    return settings | {"image_pixels": picture and f"crc32 {zlib.crc32(picture.tobytes()):08x}"}


def fingerprints(
    G_src: TriPlaneGenerator,
    prior: DiffusionPrior | None,
    vit: TokenFeatures | None,
    clip: ClipFeatures,
) -> dict[str, str]:
    """Return checksums of what a run hangs on, for a resume to be refused with anything else."""
    parts = "vae", "unet", "text_encoder", "controlnet", "image_encoder"
    return {
        "generator_weights": fingerprint_generator(G_src),
        "diffusion_weights": fingerprint([getattr(prior, part, None) for part in parts]),
        "features_weights": fingerprint([vit and vit.model]),
        "clip_weights": fingerprint([clip.model]),
    }


def load_prior(cfg: Config, device: torch.device) -> DiffusionPrior:
    """Load the diffusion prior with what this run uses, and warn of a prompt beyond its words.

    Raises:
        ValueError: it cannot be loaded, depth is wanted and it has no ControlNet, or a picture is
            given and it has no IP-Adapter.
    """
    source = locate(cfg.diffusion)
    controlnet, ip_adapter = (*map(locate, cfg.adapters or ()), None, None)[:2]
    lora, lora_scale = cfg.lora or (None, 1.0)
    prior = DiffusionPrior.from_pretrained(
        source,
        controlnet if cfg.depth_scale else None,
        ip_adapter if cfg.image else None,
        dtype=prior_dtype(cfg, device),
        device=device,
        vae=cfg.vae and locate(cfg.vae),
        lora=lora and locate(lora),
        lora_scale=lora_scale,
        vae_dtype=PRECISIONS[cfg.vae_precision],
        recompute_vae=cfg.low_memory,
    )
    if cfg.depth_scale and prior.controlnet is None:
        raise ValueError(
            f"{source} has no ControlNet for depth: name one with --adapters, "
            "or go without by --depth-scale 0"
        )
    if cfg.image and prior.image_encoder is None:
        raise ValueError(f"{source} has no IP-Adapter for --image: name one with --adapters")
    unknown = prior.unknown_words(cfg.prompt or "")
    if unknown:
        domains = prior.vocabulary.get("domains", {}).values() or prior.vocabulary["words"]
        print(
            f"warning: the prior has never seen the words {', '.join(unknown)}; "
            f"the domains it knows are {', '.join(domains)}",
            file=sys.stderr,
        )
    if cfg.compile:
        prior.compile()
    return prior


def prior_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Return the precision of the prior's networks except its VAE.

    Half precision is what Stable Diffusion is always run in on a GPU.
    """
    return PRECISIONS[cfg.precision or ("fp16" if device.type == "cuda" else "fp32")]


def load_vit(cfg: Config, device: torch.device) -> TokenFeatures:
    """Load the ViT whose tokens HSC and the perceptual term compare.

    Raises:
        ValueError: it cannot be loaded, or has fewer tokens than HSC's finest level.
    """
    vit = TokenFeatures.from_pretrained(locate(cfg.features), device)
    finest = max(cells or 1 for cells in HSC_GRIDS)
    if "hsc" in cfg.weights and vit.grid < finest:
        raise ValueError(
            f"--features {cfg.features} gives {vit.grid} x {vit.grid} tokens, "
            f"and --weights hsc needs at least {finest} x {finest}"
        )
    return vit


def output_gradients(
    terms: dict[str, Term], weights: dict[str, float], outputs: Outputs, batch: Batch
) -> tuple[Outputs, dict[str, float]]:
    """Sum the weighted gradients of terms at the outputs; those without a weight are left out.

    Each term's graph is freed before the next is built, and none reaches into the generator.

    Returns:
        The gradient at each output that a term looks at, and for the log each term's mean `<name>`
        and the mean norm of its gradient `<name>_grad`, weights included.
    """
    leaves = {name: output.detach().requires_grad_() for name, output in outputs.items()}
    totals: Outputs = {}
    row: dict[str, float] = {}
    for name, weight in weights.items():
        losses = terms[name](leaves, batch)  # [b]
        found = torch.autograd.grad(losses.sum(), leaves.values(), allow_unused=True)
        gradients = {k: weight * g for k, g in zip(leaves, found, strict=True) if g is not None}
        for output, gradient in gradients.items():
            totals[output] = totals.get(output, 0) + gradient
        flat = torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)
        row[name] = weight * losses.mean().item()
        row[f"{name}_grad"] = flat.norm(dim=1).mean().item()
    return totals, row


def draw_times(cfg: Config, step: int, prior: DiffusionPrior | None) -> Tensor:
    """Draw diffusion times [B], uniform over what `t_range` allows at this step.

    Stratified: each from another B-th of the range, which makes gradients less noisy.
    """
    if prior is None:
        return torch.empty(cfg.batch, 0)
    low, high, final = cfg.t_range[0], cfg.t_range[1], cfg.t_range[-1]
    high += (final - high) * step / cfg.steps
    last = len(prior.alphas_cumprod) - 1
    lowest, steps = int(low * last), int(high * last) + 1 - int(low * last)
    strata = (torch.randperm(cfg.batch) + torch.rand(cfg.batch)) / cfg.batch  # In [0, 1).
    return lowest + (strata * steps).long().clamp_max(steps - 1)


def draw_noise(cfg: Config, prior: DiffusionPrior | None) -> Tensor:
    """Draw noise for the latents of a batch, [B, 4, h, w]."""
    if prior is None:
        return torch.empty(cfg.batch, 0)
    side = prior.image_size // prior.vae_scale_factor
    return torch.randn(cfg.batch, prior.unet.config.in_channels, side, side)


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """Return the seed of a step's random draws; its streams are independent."""
    return (2 * (seed * 1_000_003 + step) + stream) % 2**63


def learning_weights(G: TriPlaneGenerator, pattern: str) -> dict[str, nn.Parameter]:
    """Let the parameters with matching names learn, and return them by name.

    Raises:
        ValueError: there are none, or some are of the mapping network, which the source shares.
    """
    try:
        weights = {name: w for name, w in G.named_parameters() if re.fullmatch(pattern, name)}
    except re.error as error:
        raise ValueError(f"--learns {pattern!r} is no regular expression ({error})") from error
    if not weights or any(name.startswith("backbone.mapping.") for name in weights):
        raise ValueError(
            f"--learns {pattern!r} must match parameters, and none of backbone.mapping"
        )
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


@torch.no_grad()
def update_averages(
    averages: dict[str, Tensor], weights: dict[str, Tensor], half_life: float
) -> None:
    """Move moving averages towards the weights; `half_life` is in steps."""
    for name, average in averages.items():
        average.lerp_(weights[name], 1 - 0.5 ** (1 / half_life))


def save_run(cfg: Config, step: int, log: TextIO, training: Training) -> None:
    """Write the result so far and, last since resumes go by it, the checkpoint."""
    os.fsync(log.fileno())
    save_generator(training.G_ema, cfg.out / "generator.safetensors")
    state = {
        "step": step,
        "weights": {name: weight.detach() for name, weight in training.weights.items()},
        "averages": training.averages,
        "optimizer": training.optimizer.state_dict(),
    }
    save_checkpoint(cfg.out / f"ckpt-{step:06d}.pt", state)


@torch.no_grad()
def restore(state: dict, training: Training) -> None:
    """Put back what `save_run` saved.

    Raises:
        ValueError: the checkpoint is of another run.
    """
    shapes = {name: weight.shape for name, weight in training.weights.items()}
    for kept in (state.get("weights", {}), state.get("averages", {})):
        if {name: weight.shape for name, weight in kept.items()} != shapes:
            raise ValueError("the newest checkpoint is of another run: other weights learn there")
    for name, weight in training.weights.items():
        weight.copy_(state["weights"][name])
        training.averages[name].copy_(state["averages"][name])
    training.optimizer.load_state_dict(state["optimizer"])


def save_grid(cfg: Config, step: int, source_row: Tensor, G_ema: TriPlaneGenerator) -> None:
    """Write a grid of source heads [N, 3, R, R] above the same heads adapted."""
    adapted_row = portraits(G_ema, GRID_SEEDS, cfg.trunc)
    save_image(image_grid([source_row, adapted_row]), grid_path(cfg, step))


def grid_path(cfg: Config, step: int) -> Path:
    """Return where a step's grid is."""
    return cfg.out / f"grid-{step:06d}.png"


def is_finished(cfg: Config, state: dict | None) -> bool:
    """Return whether a run has taken its last step and written its results."""
    results = (cfg.out / "generator.safetensors", grid_path(cfg, cfg.steps))
    return bool(state and state["step"] == cfg.steps and all(path.exists() for path in results))


def print_result(cfg: Config) -> None:
    """Say where the result is, and what to do with it."""
    out = shlex.quote(str(cfg.out))
    print(f"{cfg.out} is finished after {cfg.steps} steps.")
    print(f"  generator  {cfg.out / 'generator.safetensors'}")
    print(f"  grid       {grid_path(cfg, cfg.steps)}")
    print(f"  render     python render.py --ckpt {out} --seeds 0-7 --out {out}/renders")
    print("  resume     the same command, if a run was stopped; new settings want another --out")


if __name__ == "__main__":
    run_cli(Config, main, f"{__doc__}\n{describe_presets()}")
