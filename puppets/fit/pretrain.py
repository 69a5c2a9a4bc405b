"""Train the networks of the embedded world, one part a command, each resumable.

First `python -m puppets.data`, then `python -m puppets.fit.pretrain PART` with PART one of clip,
vae, unet, ip-adapter, dino, oracle, generator, generator2d, generator360, unet360. The UNet needs
CLIP and VAE, the IP-Adapter the UNet, unet360 both and `python -m puppets.data --around`; all
others need none. Optimiser state goes to `.pretrain/PART.pt` every three minutes. The finished part
is written in the formats of real checkpoints to `checkpoints/puppets`, those of pictures and of
heads seen from all sides to `checkpoints/puppets2d` and `checkpoints/puppets360`, its validation
figures to REPORT.md there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from harness.pictures import image_grid, save_image
from harness.store import atomic_write
from puppets.data import ROOT

OUT = Path("checkpoints/puppets")
DIFFUSION = OUT / "diffusion"
EAGER = "eager"  # CPUs' fused attention is slow backwards in bfloat16.
SAVE_SECONDS = 180
WARM_RATE = 0.4  # Times the learning rate: the full one would undo what a warm start knows.
Part = Literal[
    "clip",
    "vae",
    "unet",
    "ip-adapter",
    "dino",
    "oracle",
    "generator",
    "generator2d",
    "generator360",
    "unet360",
]


@dataclass
class Config:
    """Options of puppets.fit.pretrain."""

    part: tyro.conf.Positional[Part]  # Which network to train.
    steps: int | None = None  # Optimiser steps; each part knows its own default.
    minutes: float = 150.0  # Stop after this long all the same, and export what there is.
    device: str = "cpu"  # "cpu" or "cuda".
    threads: int = 1  # CPU threads; two single-threaded parts side by side beat one with two.
    export_only: bool = False  # Write the checkpoint and its figures from the saved state.
    warm_start: bool = False  # Begin with the weights in checkpoints/puppets, not with fresh ones.


class Averages:
    """Exponential moving average of some parameters, kept next to them."""

    def __init__(self, params: list[nn.Parameter], decay: float = 0.998) -> None:
        """Start at the parameters' values."""
        self.params, self.decay = params, decay
        self.values = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters, faster in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self.params, 1 - decay)

    @torch.no_grad()
    def copy_to_params(self) -> None:
        """Overwrite the parameters with their averages."""
        for p, v in zip(self.params, self.values, strict=True):
            p.copy_(v)


def fit(
    name: str,
    params: Iterable[nn.Parameter] | dict[float, list[nn.Parameter]],
    loss_terms: Callable[[int], dict[str, Tensor]],
    cfg: Config,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
) -> float:
    """Minimise the sum of the terms with AdamW, a cosine rate and EMA; resume if interrupted.

    Args:
        name: The state goes to `.pretrain/NAME.pt`.
        params: Parameters to train; they end as their moving averages. A dict gives groups by
            the factor of their learning rate.
        loss_terms: Step number -> named scalar losses; draws from torch's generator, which is
            seeded by the step.

    Returns:
        Minutes spent training, over all runs.
    """
    groups = params if isinstance(params, dict) else {1.0: list(params)}
    params = [p for group in groups.values() for p in group]
    steps = cfg.steps or steps
    lr = lr * WARM_RATE if cfg.warm_start else lr
    path = ROOT / f"{name}.pt"
    optimizer = torch.optim.AdamW(
        [{"params": group, "factor": factor} for factor, group in groups.items()],
        lr=lr,
        betas=(0.9, 0.98),
        weight_decay=weight_decay,
    )
    average = Averages(params)
    start, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=cfg.device)
        if state["warm_start"] != cfg.warm_start:
            raise ValueError(f"{path} is of a training with another --warm-start: delete it first")
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, saved in zip(params, state["params"], strict=True):
                p.copy_(saved)
        average.values, start, spent = state["ema"], state["step"], state["minutes"]
    begun = saved_at = time.time()

    def save(step: int) -> None:
        state = {
            "params": [p.detach() for p in params],
            "optimizer": optimizer.state_dict(),
            "ema": average.values,
            "step": step,
            "warm_start": cfg.warm_start,
            "minutes": spent + (time.time() - begun) / 60,
        }
        atomic_write(path, lambda file: torch.save(state, file))

    # A CPU without these instructions would be ten times slower than in float32.
    fast_bfloat16 = cfg.device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    step = start
    bar = tqdm(range(start, 0 if cfg.export_only else steps), initial=start, total=steps, desc=name)
    for step in bar:
        torch.manual_seed(7_000_003 + step)
        warm = min(1.0, (step + 1) / 100)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"] * warm * decay
        with torch.autocast(cfg.device, torch.bfloat16, enabled=fast_bfloat16):
            terms = loss_terms(step)
        total = sum(terms.values())
        if not torch.isfinite(total):
            raise FloatingPointError(f"{name}: {terms} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        average.update(step)
        if step % 25 == 0:
            values = {k: f"{v.item():.4f}" for k, v in terms.items()}
            bar.set_postfix(values)
            with open(ROOT / f"{name}.log", "a") as log:
                print(step, f"{spent + (time.time() - begun) / 60:.1f} min", values, file=log)
        if time.time() - saved_at > SAVE_SECONDS:
            save(step + 1)
            saved_at = time.time()
        if (time.time() - begun) / 60 + spent > cfg.minutes:
            break
    if not cfg.export_only and start < steps:
        save(step + 1)
    average.copy_to_params()
    return spent + (time.time() - begun) / 60


def warm_start(cfg: Config, module: nn.Module, file: Path) -> None:
    """Begin with the weights that an earlier training wrote, if `--warm-start` asks for it."""
    if cfg.warm_start:
        module.load_state_dict({k: v.float() for k, v in load_file(file).items()})


def report(
    part: str, cfg: Config, minutes: float, figures: dict[str, float | str], folder: Path = OUT
) -> None:
    """Replace one part's section of a folder's REPORT.md."""
    path = folder / "REPORT.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else "# How the embedded checkpoints were made\n"
    sections = {s.split("\n", 1)[0]: s for s in text.split("\n## ")}
    options = " --warm-start" if cfg.warm_start else ""
    options += f" --steps {cfg.steps}" if cfg.steps else ""
    command = f"python -m puppets.fit.pretrain {part}{options}"
    lines = [f"{part}\n", f"`{command}`, seed 0, {minutes:.0f} minutes on {cfg.device}", ""]
    lines += ["| figure | value |", "|---|---|"]
    lines += [
        f"| {k} | {v if isinstance(v, str) else format(v, '.4g')} |" for k, v in figures.items()
    ]
    sections[part] = "\n".join(lines) + "\n"
    path.write_text("\n## ".join(sections.values()))
    print(sections[part])


def percent(right: Tensor) -> str:
    """Return the mean of zeros and ones as a percentage."""
    return f"{100 * right.float().mean():.1f} %"


def save_sheet(name: str, rows: list[Tensor], folder: Path = OUT) -> None:
    """Write a contact sheet: rows of pictures [N, 3, H, W] below each other."""
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    save_image(image_grid(rows, columns=len(rows[0])), folder / "sheets" / f"{name}.png")


def main(cfg: Config) -> None:
    """Train one part and write it."""
    torch.set_num_threads(cfg.threads)
    ROOT.mkdir(exist_ok=True)
    import_module(f"puppets.fit.{cfg.part.replace('-', '_')}").train(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
