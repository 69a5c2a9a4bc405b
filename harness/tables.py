"""Rows of scores as tables and plots: Markdown, CSV, PNG."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from math import ceil
from pathlib import Path

import numpy as np

from harness.pictures import SOFTWARE
from harness.store import atomic_write

PANELS = 4  # Side by side in a plot.
BAR, LETTER = 0.25, 0.08  # Height of a bar and width of a letter, inches.
MARK = {"Software": SOFTWARE}  # By which `pictures.is_ours` knows a plot.

Row = dict[str, float | int | str]  # One run's settings and scores, by name.
Log = list[dict[str, float]]  # A run's log.jsonl.


def group_rows(rows: dict[str, Row]) -> dict[str, list[Row]]:
    """Return rows that differ only in the run's seed together, under one name.

    Names are written together as shells expand them: runs/clown-s{0,1}.
    """
    groups: dict[tuple, list[str]] = {}
    for run, row in rows.items():
        same = tuple(row.get(name) for name in ("config", "samples", "seed", "real"))
        seeds = [rows[other]["run_seed"] for other in groups.get(same, [])]
        single = "config" not in row or row["run_seed"] in seeds  # A copy is no other seed.
        groups.setdefault((run,) if single else same, []).append(run)
    named = {}
    for runs in groups.values():
        start = len(os.path.commonprefix(runs)) if len(runs) > 1 else len(runs[0])
        ends = ",".join(run[start:] for run in runs)
        named[runs[0][:start] + (f"{{{ends}}}" if ends else "")] = [rows[run] for run in runs]
    return named


def score_names(rows: Iterable[Row]) -> list[str]:
    """Return the names of all scores in rows, without those of true pictures (`true_...`)."""
    names = dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, float))
    return [name for name in names if name != "trunc" and not name.startswith("true_")]


def spread(values: list[float]) -> str:
    """Return the mean of some seeds' values and, of several, their standard deviation."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{np.mean(values):.3g} ± {np.std(values, ddof=1):.2g}"


def cell(rows: list[Row], name: str) -> str:
    """Return a score over its seeds and, in brackets, what the true pictures get for it."""
    values, true = (_numbers(rows, name) for name in (name, f"true_{name}"))
    return spread(values) + (f" ({np.mean(true):.3g})" if true else "")


def _numbers(rows: list[Row], name: str) -> list[float]:
    """Return the numbers of this name that rows have."""
    return [row[name] for row in rows if isinstance(row.get(name), float)]


def markdown_table(rows: dict[str, Row]) -> str:
    """Return a Markdown row per run; runs that differ only in their seed share one."""
    names = score_names(rows.values())
    lines = [["run", "method", "target", *names], ["---"] * (len(names) + 3)]
    for run, group in group_rows(rows).items():
        words = (run, group[0]["method"], group[0]["target"])
        words = (" ".join(word.split()).replace("|", "\\|") for word in words)
        lines.append([*words, *(cell(group, name) for name in names)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def csv_table(rows: dict[str, Row]) -> str:
    """Return a line of comma-separated values per run, with all that its row has."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    text = io.StringIO()
    table = csv.DictWriter(text, ["run", *names], lineterminator="\n")
    table.writeheader()
    table.writerows({"run": run} | row for run, row in rows.items())
    return text.getvalue()


def plot_bars(rows: dict[str, Row], path: Path) -> None:
    """Draw every score of every row in the table as a bar, with the deviation over seeds."""
    groups, names = group_rows(rows), score_names(rows.values())
    size = 1 + BAR * len(groups), LETTER * max(map(len, groups))
    figure, axes = _panels(names, *size)
    for name, axis in zip(names, axes, strict=True):
        for run, group in groups.items():
            values = _numbers(group, name)
            deviation = np.std(values, ddof=1) if len(values) > 1 else None
            axis.barh(run, np.mean(values) if values else 0.0, xerr=deviation)
    axes[0].invert_yaxis()  # The first row on top.
    atomic_write(path, lambda file: figure.savefig(file, format="png", metadata=MARK))


def plot_steps(logs: dict[str, Log], path: Path) -> None:
    """Draw the terms in the logs of runs over the steps."""
    names = dict.fromkeys(name for log in logs.values() for entry in log for name in entry)
    names = [name for name in names if name != "step"]
    if not names:
        return
    figure, axes = _panels(names, height=2.5)
    for name, axis in zip(names, axes, strict=True):
        for run, log in logs.items():
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=run)
    axes[0].legend(fontsize="x-small")
    atomic_write(path, lambda file: figure.savefig(file, format="png", metadata=MARK))


def _panels(names: list[str], height: float, margin: float = 0.0) -> tuple:
    """Return a matplotlib figure and its axes, one for each name, titled.

    Args:
        names: Titles.
        height: Height of a panel, inches.
        margin: Inches for what stands left of the y axes, which then are the same in all panels.
    """
    from matplotlib.figure import Figure

    columns = min(PANELS, len(names))
    lines = ceil(len(names) / columns)
    figure = Figure(figsize=(margin + 4 * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=margin > 0).flatten()
    for axis in axes[len(names) :]:
        axis.remove()
    for name, axis in zip(names, axes, strict=False):
        axis.set_title(name)
    return figure, axes[: len(names)]
