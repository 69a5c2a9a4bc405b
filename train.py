"""Adapt a 3D generator to a new domain, given a sentence or one picture.

    python train.py --prompt "a bronze statue"
    python train.py --image statue.jpg --out runs/statue

The method is GCA-3D (arXiv:2412.15491) or, with --method, one it is compared with. Writes a run
folder: config.json, log.jsonl (a row per step), grid-<step>.png (source samples above adapted
ones), ckpt-<step>.pt (for a resume) and generator.safetensors (the result, for render.py). The same
command resumes a run that was stopped. Started by torchrun or accelerate launch, it trains on
several GPUs, which share every batch. Defaults are those of --base and --method: with them, --help
shows the numbers of that run.
"""

import sys

from config import Config, check, parse, references, settings, usual_settings
from harness.cli import exit_codes

if __name__ == "__main__":
    # Before torch is imported, which takes seconds: --help and refusals come at once.
    with exit_codes(alike=True):
        CFG = parse(sys.argv[1:], __doc__)

import copy
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import isfinite
from typing import TextIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from files.generators import load_generator, save_generator
from guides import Guides
from harness import ranks
from harness.checkpoints import load_checkpoint, save_checkpoint
from harness.cli import is_first, options_settled, stop_requests
from harness.devices import flush_denormals, keep_freed_memory, peak_gb, pick_device
from harness.page import write_page
from harness.pictures import image_grid, save_image, save_pictures, to_image
from harness.run_folder import (
    claim_run,
    grid_path,
    is_finished,
    locate,
    print_result,
    sole_writer,
    trim_log,
)
from models.generator import Generator
from render import seed_portraits
from samples import (
    Pool,
    draw_heads,
    draw_noise,
    draw_number,
    draw_samples,
    draw_times,
    layer_choices,
    reshapes,
    select_layers,
    step_seed,
)
from terms import Everyone, Moment, Row, load_guides, needed, pull_back

EMA_HALF_LIFE = 0.05  # As a fraction of the run: long enough to calm the result, short to follow.
GROWTH = 0.02  # Least slope of the density for gradients, where shapes grow into empty space.
GRID_SEEDS = list(range(8))


@dataclass
class Run:
    """What the steps of a run work with and, from `G` on, what they change."""

    cfg: Config
    G_src: Generator
    guides: Guides
    G: Generator
    G_ema: Generator
    phases: list[dict[str, nn.Parameter]]  # Parameters of G that learn, one phase after the other.
    weights: dict[str, nn.Parameter]  # Those of all phases.
    averages: dict[str, nn.Parameter]  # The same of G_ema.
    optimizer: torch.optim.Optimizer
    pool: Pool  # The source's samples; no part of a checkpoint, since it follows from the seeds.


def main(cfg: Config) -> None:
    """Adapt a generator, or go on adapting it.

    Raises:
        ValueError: an option cannot be used; nothing has been written.
        FloatingPointError: a loss or gradient was not finite; the last checkpoint is intact.
        SystemExit: after Ctrl+C (130), SIGTERM (143) or SIGHUP (129), once a checkpoint is saved.
    """
    with ranks.joined(cfg.device):
        check(cfg)
        if cfg.dry_run:
            print(json.dumps(settings(cfg), indent=2))
            return
        with sole_writer(cfg.out) if is_first() else nullcontext():
            adapt(cfg)


def adapt(cfg: Config) -> None:
    """Do what `main` promises, with nobody else in the run folder."""
    flush_denormals()
    keep_freed_memory()
    state = load_checkpoint(cfg.out)
    if is_finished(cfg.out, cfg.steps, state):
        print_result(cfg.out, cfg.steps)
        return

    # The frozen networks, and the copy that learns.
    device = pick_device(cfg.device)
    G_src = load_generator(locate(cfg.generator), device)
    pictures = references(cfg)
    reference = torch.cat([to_image(picture) for picture in pictures]) if pictures else None
    guides = load_guides(cfg, G_src, reference, device)
    run = prepare(cfg, G_src, guides)

    # Samples to look at, the same in every grid.
    source_row = seed_portraits(G_src, GRID_SEEDS, cfg.trunc)  # [N, 3, R, R]

    # The run folder; nothing is written before every process is ready, and all of it by the first.
    ranks.meet()
    start = state["step"] if state else 0
    if is_first():
        claim_run(cfg.out, settings(cfg) | guides.fingerprints(), usual_settings(cfg))
        save_pictures(pictures, cfg.out / "reference.png")
        trim_log(cfg.out, start)
        if start == 0:
            save_grid(cfg, 0, source_row, G_src)
    log_file = cfg.out / "log.jsonl" if is_first() else os.devnull

    if state:
        restore(state, run)
    del state  # Four times the size of what learns.

    bar = tqdm(range(start + 1, cfg.steps + 1), initial=start, total=cfg.steps, unit="step")
    with open(log_file, "a") as log, stop_requests() as signals, options_settled():
        for step in bar:
            began = time.perf_counter()
            row = take_step(run, step)
            row["seconds"] = round(time.perf_counter() - began, 3)
            row["peak_gb"] = round(peak_gb(device), 3)
            log.write(json.dumps({"step": step, **row}) + "\n")
            log.flush()
            bar.set_postfix_str(f"clip {row['clip']:.3f}, gradient {row['grad_norm']:.2g}")

            # Once in a while: a grid, a checkpoint, an orderly stop of all processes.
            stop = [number for received in ranks.meet(signals) for number in received]
            if is_first() and step % cfg.grid_every == 0 and step < cfg.steps:
                save_grid(cfg, step, source_row, run.G_ema)
            if is_first() and (stop or (step % cfg.save_every == 0 and step < cfg.steps)):
                save_run(run, step, log)
            if stop:
                bar.close()
                print(f"stopped after step {step} of {cfg.steps}; the same command goes on")
                raise SystemExit(128 + stop[0])

        if is_first():
            save_grid(cfg, cfg.steps, source_row, run.G_ema)
            save_run(run, cfg.steps, log)
    print_result(cfg.out, cfg.steps)


def prepare(cfg: Config, G_src: Generator, guides: Guides) -> Run:
    """Return a run before its first step."""
    G, G_ema = copy.deepcopy(G_src), copy.deepcopy(G_src)
    phases = [learning_weights(G, pattern) for pattern in cfg.learns]
    for phase in phases if cfg.select_layers else ():
        layer_choices(cfg, G, phase)  # Refuses what could never be selected.
    weights = {name: weight for phase in phases for name, weight in phase.items()}
    averages = {name: G_ema.get_parameter(name) for name in weights}
    pool = Pool(cfg, G_src, guides)
    optimizer = torch.optim.Adam(weights.values(), cfg.lr, betas=(cfg.momentum, 0.99))
    return Run(cfg, G_src, guides, G, G_ema, phases, weights, averages, optimizer, pool)


def take_step(run: Run, step: int) -> Row:
    """Update the generator and its average once, and return the step's row of the log.

    Raises:
        FloatingPointError: a loss or gradient was not finite; nothing has been updated.
    """
    cfg, G, guides = run.cfg, run.G, run.guides
    device = guides.target.device
    active = cfg.weights.on()
    needs = needed(cfg)

    # Draw from the step's own seed, so that a resumed run draws what an unbroken one would;
    # on the CPU, so that a GPU draws the same (but for the jitter of the rays).
    torch.manual_seed(step_seed(cfg.seed, step))
    z, c = draw_heads(cfg, G)  # [B, z_dim], [B, 25]
    t = draw_times(cfg, guides, step).to(device)  # [B]
    noise = draw_noise(cfg, guides).to(device)  # [2, B, 4, h, w]
    draw = draw_number(cfg, step)
    if draw != step:  # Heads of the pool, with this step's own times and noise.
        torch.manual_seed(step_seed(cfg.seed, draw))
        z, c = draw_heads(cfg, G)
    z, c = z.to(device), c.to(device)
    # Mapping sees the frontal camera: the render camera would leak pose into identity.
    conditioning = {"frontal": G.cameras.frontal(cfg.batch).to(device), "render": c}
    ws = G.mapping(z, conditioning[cfg.mapping_camera], cfg.trunc)
    # One jitter of the rays for both generators, drawn for the whole batch.
    torch.manual_seed(step_seed(cfg.seed, draw, stream=1))
    rays = G.rays(c)
    everyone = gather_planes(run, ws) if "batch" in needs else None

    learning = run.phases[(step - 1) * len(run.phases) // cfg.steps]
    if cfg.select_layers:
        learning = select_layers(cfg, G, run.pool, step, t, learning)
    for name, weight in run.weights.items():
        weight.requires_grad_(name in learning)
    if reshapes(cfg, step):
        run.pool.shaper = copy.deepcopy(run.G_ema)
    row: Row = {}  # Means over the batch.
    run.optimizer.zero_grad()
    for part in ranks.slices(cfg.batch, cfg.micro_batch):
        # Render the same samples before and after.
        # What learns is in float32, for gradients too small for half precision.
        cut = rays.cut(part)
        source = run.pool.source(draw, part.start, ws[part], c[part], cut)
        if cfg.targets.margin and "silhouette" in active and source.grown is not None:
            cut = replace(cut, leak=GROWTH * (source.grown > 0).flatten(1))
        adapted = draw_samples(G, ws[part], c[part], cut, force_fp32=True)

        # Sum the terms' gradients at the outputs, then go back through the generator once.
        now = Moment(
            guides,
            source,
            t[part],
            noise[:, part],
            step / cfg.steps,
            everyone and replace(everyone, first=part.start),
        )
        gradients, scores = pull_back(adapted, active, now, cfg.batch)
        # Outputs that do not depend on this phase's weights have no graph.
        reached = [name for name in gradients if adapted[name].requires_grad]
        torch.autograd.backward(
            [adapted[name] for name in reached], [gradients[name] for name in reached]
        )
        with torch.no_grad():
            embeds = guides.clip.images(adapted["image"])
            scores["clip"] = (embeds @ guides.target.T).sum().item() / cfg.batch
        for name, score in scores.items():
            row[name] = row.get(name, 0.0) + score

    # Add up the processes' gradients, and refuse what is no number.
    gradients = [weight.grad for weight in learning.values() if weight.grad is not None]
    ranks.add_up(gradients, row)
    row["grad_norm"] = nn.utils.get_total_norm(gradients).item()
    if not all(map(isfinite, row.values())):
        raise FloatingPointError(f"not finite at step {step}, t = {t.tolist()}: {row}")

    # Update the weights and their average.
    run.optimizer.step()
    update_averages(run.averages, run.weights, half_life=EMA_HALF_LIFE * cfg.steps)
    return row


@torch.no_grad()
def gather_planes(run: Run, ws: Tensor) -> Everyone:
    """Return the planes of all samples of a step, which the processes share out."""
    own = ws[ranks.share(len(ws))]
    planes, planes_src = run.G.planes(own, force_fp32=True), run.G_src.planes(own)
    return Everyone(ranks.gather(planes), ranks.gather(planes_src))


def learning_weights(G: Generator, pattern: str) -> dict[str, nn.Parameter]:
    """Let the parameters with matching names learn, and return them by name.

    Raises:
        ValueError: there are none, or some are of the mapping network, which the source shares.
    """
    try:
        weights = {name: w for name, w in G.named_parameters() if re.fullmatch(pattern, name)}
    except re.error as error:
        raise ValueError(f"--learns {pattern!r} is no regular expression ({error})") from error
    if not weights or any(re.match(r"(backbone\.)?mapping\.", name) for name in weights):
        raise ValueError(f"--learns {pattern!r} must match parameters, and none of the mapping")
    for weight in weights.values():
        weight.requires_grad_(True)
    return weights


@torch.no_grad()
def update_averages(
    averages: Mapping[str, Tensor], weights: Mapping[str, Tensor], half_life: float
) -> None:
    """Move moving averages towards the weights; `half_life` is in steps."""
    for name, average in averages.items():
        average.lerp_(weights[name], 1 - 0.5 ** (1 / half_life))


def save_run(run: Run, step: int, log: TextIO) -> None:
    """Write the result so far and, last since resumes go by it, the checkpoint."""
    os.fsync(log.fileno())
    save_generator(run.G_ema, run.cfg.out / "generator.safetensors")
    state = {
        "step": step,
        "weights": {name: weight.detach() for name, weight in run.weights.items()},
        "averages": run.averages,
        "optimizer": run.optimizer.state_dict(),
    }
    if shaper := run.pool.shaper:
        state["shapes"] = {name: shaper.get_parameter(name) for name in run.weights}
    save_checkpoint(run.cfg.out / f"ckpt-{step:06d}.pt", state)


@torch.no_grad()
def restore(state: dict, run: Run) -> None:
    """Put back what `save_run` saved.

    Raises:
        ValueError: the checkpoint is of another run.
    """
    shapes = {name: weight.shape for name, weight in run.weights.items()}
    shaped = state.get("shapes", run.weights)
    for kept in (state.get("weights", {}), state.get("averages", {}), shaped):
        if {name: weight.shape for name, weight in kept.items()} != shapes:
            raise ValueError("the newest checkpoint is of another run: other weights learn there")
    for name, weight in run.weights.items():
        weight.copy_(state["weights"][name])
        run.averages[name].copy_(state["averages"][name])
    run.optimizer.load_state_dict(state["optimizer"])
    if "shapes" in state:
        run.pool.shaper = copy.deepcopy(run.G_src)
        for name, weight in state["shapes"].items():
            run.pool.shaper.get_parameter(name).copy_(weight)


def save_grid(cfg: Config, step: int, source_row: Tensor, G_ema: Generator) -> None:
    """Write a grid of source samples [N, 3, R, R] above the same ones adapted, and the page."""
    adapted_row = seed_portraits(G_ema, GRID_SEEDS, cfg.trunc)
    path = grid_path(cfg.out, step)
    save_image(image_grid([source_row, adapted_row]), path)
    write_page(cfg.out, path, turns="planes" in G_ema.gives)


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
