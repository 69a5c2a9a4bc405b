"""Measure on a GPU what only a GPU can show, and write docs/benchmarks.md.

    sh tests/gpu.sh                       # the tests marked gpu, then this; 6 minutes on one H100
    GPU_TEST_DEVICE=cpu sh tests/gpu.sh   # the same at tiny sizes, to try the script itself

Full-size steps at 512 px with random networks: batches, precisions, compiled or not; the options
for little memory; the share of the machine's matrix products; where the time of a step goes. What
fails is printed and written into the page, and ends with exit code 1.
"""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

import bench
import train
from harness.devices import pick_device
from harness.measure import commit, count, finish
from harness.store import write_text

DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
TINY = DEVICE == "cpu"
PAGE = Path(tempfile.gettempdir(), "benchmarks.md") if TINY else Path("docs/benchmarks.md")
SECONDS = 330  # Variants that would begin later are left out, and said.
STEPS = 3  # Timed, after one that is not.
MATRIX = 512 if TINY else 8192
BATCHES = (1, 2) if TINY else (1, 4, 8)
HALVES = ("bf16",) if TINY else ("fp16", "bf16")
# Name: options of train.py. The step that training runs by default on a GPU is fp16.
VARIANTS = {
    f"{precision}, batch {batch}": {"precision": precision, "batch": batch}
    for precision in (*HALVES, "fp32")
    for batch in BATCHES
}
VARIANTS |= {
    f"{HALVES[0]}, batch {BATCHES[1]}, {name}": {
        "precision": HALVES[0],
        "batch": BATCHES[1],
        **options,
    }
    for name, options in {
        "compiled": {"compile": True},
        "8 GB (micro-batch 1, TAESD)": {"micro_batch": 1, "vae": "taesd"},
        "12 GB (micro-batch 1, low memory)": {"micro_batch": 1, "low_memory": True},
        "24 GB (micro-batch 2)": {"micro_batch": 2},
        "VAE in bf16": {"vae_precision": "bf16"},
    }.items()
}


def settled(options: dict) -> train.Config:
    """Return the options of a run with random networks of full size, or of the puppets if tiny."""
    base = {} if TINY else {"base": "ffhq", "generator": "random"}
    if TINY:
        options = {k: v for k, v in options.items() if k not in ("compile", "vae")}
    return train.Config(prompt=bench.PROMPT, device=DEVICE, **base | options)


def measure(options: dict, device: torch.device) -> dict[str, float]:
    """Return what a step costs: seconds, GB, TFLOP."""
    world = bench.World(settled(options), device, random=not TINY)
    step = world.call(bench.step)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    finish(device)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        finish(device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return {"seconds": median(seconds), "gb": peak, "batch": world.cfg.batch}


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Return the TFLOP/s of a large matrix product."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        finish(device)
        began = time.perf_counter()
        torch.mm(a, b)
        finish(device)
        seconds.append(time.perf_counter() - began)
    return 2 * MATRIX**3 / min(seconds) / 1e12


def where_the_time_goes(device: torch.device) -> str:
    """Return torch's profile of one default step: the operations that take longest."""
    world = bench.World(settled({"batch": BATCHES[1], "precision": HALVES[0]}), device, not TINY)
    step = world.call(bench.step)
    step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiler:
        step()
        finish(device)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60)
    return f"```\n{table.strip()}\n```"


def main() -> int:
    """Measure, print, write the page; return the exit code."""
    began, device = time.perf_counter(), pick_device(DEVICE)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else bench.cpu_name()
    ceilings = {d: ceiling(d, device) for d in (torch.float32, torch.bfloat16)}
    one = bench.World(settled({"batch": 1, "precision": "fp32"}), device, random=not TINY)
    tflop = count(one.call(bench.step), device)[0] / 1e3
    del one
    lines = [
        "# Benchmarks",
        "",
        "Written by `sh tests/gpu.sh`: a step of train.py with random networks of full size."
        if not TINY
        else "A trial of `tests/gpu.sh` at tiny sizes on a CPU; no number in here means anything.",
        "",
        f"- machine: {name}; torch {torch.__version__}, commit {commit()}",
        f"- matrix products of {MATRIX}: {ceilings[torch.float32]:.0f} TFLOP/s in float32, "
        f"{ceilings[torch.bfloat16]:.0f} in bfloat16",
        f"- a sample of a step: {tflop:.2f} TFLOP",
        "",
        "| step | seconds | samples/s | GB | TFLOP/s | of the matrix product's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    failed = []
    for variant, options in VARIANTS.items():
        if time.perf_counter() - began > SECONDS:
            failed.append(f"{variant}: left out, {SECONDS} s are over")
            continue
        try:
            row = measure(options, device)
        except Exception as error:  # Reported below; the others go on.
            failed.append(f"{variant}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        exact = options["precision"] == "fp32"
        most = ceilings[torch.float32 if exact else torch.bfloat16]
        rate = tflop * row["batch"] / row["seconds"]
        lines.append(
            f"| {variant} | {row['seconds']:.3f} | {row['batch'] / row['seconds']:.2f} "
            f"| {row['gb']:.1f} | {rate:.1f} | {rate / most:.0%} |"
        )
        print(lines[-1], flush=True)
    lines += ["", "## Where the time of a step goes", "", where_the_time_goes(device)]
    if failed:
        lines += ["", "## Failed", "", *(f"- {line}" for line in failed)]
        print("FAILED", *failed, sep="\n  ")
    write_text(PAGE, "\n".join(lines) + "\n")
    print(f"{PAGE} written after {time.perf_counter() - began:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
