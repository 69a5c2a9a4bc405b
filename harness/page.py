"""The page that a run folder explains itself with: one file, which needs no server and no other."""

from __future__ import annotations

import base64
import html
import io
import json
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from harness.run_folder import read_log, read_settings
from harness.store import write_text

NAME = "index.html"
WIDEST = 1600  # Pictures are shrunk to this many pixels.
MOST_POINTS = 400  # Of a curve.
CURVE = (300, 90)  # Width and height of a curve.
SHOWN = ("prompt", "image", "method", "base", "steps", "batch", "lr", "guidance", "seed")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
img { max-width: 100%; border-radius: 6px; } pre { background: #f4f4f4; padding: .8rem 1rem;
      border-radius: 6px; overflow-x: auto; }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
figure { display: inline-block; margin: 0 1rem 1rem 0; }
figcaption { color: #666; font-size: .9rem; }
polyline { fill: none; stroke: #2a6fdb; stroke-width: 1.5; } summary { cursor: pointer; }
.quiet { color: #666; margin-top: 0; }
"""


def write_page(folder: Path, grid: Path, turns: bool = True) -> None:
    """Write a run's index.html: heads before and after, curves, settings, what comes next.

    Args:
        folder: The run's; its config.json and log.jsonl are read.
        grid: The newest grid, the source's heads above the adapted ones.
        turns: Whether the generator has cameras, and heads so meshes.
    """
    settings, log = read_settings(folder), read_log(folder)
    goal = settings.get("prompt") or "what the picture shows"
    done = f"{log[-1]['step'] if log else 0} of {settings['steps']} steps"
    seconds = sum(row["seconds"] for row in log)
    parts = [
        f"<h1>{html.escape(str(goal))}</h1>",
        f'<p class="quiet">{html.escape(str(settings["method"]))}, {done}, '
        f"{seconds / 60:.1f} minutes in steps</p>",
        *(f"<p>{picture(path)}</p>" for path in sorted(folder.glob("reference*.png"))),
        "<h2>Before, and below after</h2>",
        f"<p>{picture(grid)}</p>",
        "<h2>Next</h2>",
        f"<pre>{html.escape(chr(10).join(next_commands(folder, turns)))}</pre>",
        "<h2>Curves</h2>",
        *curves(log),
        "<h2>Settings</h2>",
        table({name: settings.get(name) for name in SHOWN if settings.get(name)}),
        f"<details><summary>all of them</summary>{table(settings)}</details>",
    ]
    title = f"<title>{html.escape(str(goal))}</title>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{title}'
    body = "\n".join(parts)
    text = f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
    write_text(folder / NAME, f"{text}<body>\n{body}\n</body></html>\n")


def next_commands(folder: Path, turns: bool = True) -> list[str]:
    """Return what is mostly done with a run."""
    run = shlex.quote(str(folder))
    more = "--orbit 120 --mesh 128" if turns else "--interpolate 60"
    return [
        f"python render.py --ckpt {run} --seeds 0-7 --out {run}/renders",
        f"python render.py --ckpt {run} --seeds 0-3 {more} --out {run}/renders",
        f"python view.py --ckpt {run}",
        f"python eval.py --ckpt {run} --out {run}/scores.json",
    ]


def picture(path: Path) -> str:
    """Return an <img> that holds the picture itself."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((WIDEST, WIDEST * 4))
        content = io.BytesIO()
        image.save(content, "WEBP", quality=90)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(path.name)}" src="data:image/webp;base64,{data}">'


def curves(log: list[dict[str, float]]) -> list[str]:
    """Return a small figure for every number in the log."""
    names = dict.fromkeys(name for row in log for name in row)
    return [curve(name, log) for name in names if name != "step"]


def curve(name: str, log: list[dict[str, float]]) -> str:
    """Return one number over the steps as a figure, the mean of some neighbours at each point."""
    values = [(row["step"], float(row[name])) for row in log if name in row]
    size = -(-len(values) // MOST_POINTS)
    points = [np.mean(values[i : i + size], axis=0).tolist() for i in range(0, len(values), size)]
    steps, heights = zip(*points, strict=True)
    low, high = min(heights), max(heights)
    width, height = CURVE
    line = " ".join(
        f"{width * (step - steps[0]) / max(steps[-1] - steps[0], 1):.1f},"
        f"{height - 4 - (height - 8) * (value - low) / max(high - low, 1e-12):.1f}"
        for step, value in points
    )
    return (
        f'<figure><svg width="{width}" height="{height}"><polyline points="{line}"/></svg>'
        f"<figcaption>{html.escape(name)}: {low:.3g} to {high:.3g}, "
        f"last {heights[-1]:.3g}</figcaption></figure>"
    )


def table(values: dict) -> str:
    """Return names and values as a <table>."""
    rows = (
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(shown(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def shown(value: object) -> str:
    """Return a setting as people read it."""
    return value if isinstance(value, str) else json.dumps(value)
