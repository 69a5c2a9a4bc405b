"""Run the README's experiments on the embedded world: train, score, write tables, draw figures.

    for i in 0 1; do python -m puppets.experiments --worker $i --workers 2 & done; wait
    python -m puppets.experiments

Runs go to `runs/experiments`; what is finished is not done again, so the same command resumes.
Scores go to `docs/results.json`. Several workers share the runs. Alone, the command does what is
left, then writes tables to `docs/results.md` and figures to `docs/figure-*.png` and
`docs/orbit.webp`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import bench
import eval as evaluation
import train
from config import EDITS, METHODS
from files.generators import load_generator
from harness.cli import run_cli
from harness.measure import stopwatch
from harness.pictures import image_grid, save_image, save_video, to_uint8
from harness.store import write_text
from harness.tables import Row, cell
from models.eg3d import TriPlaneGenerator
from puppets import limits, oracle
from puppets.data import CAMERAS
from puppets.domains import DOMAINS, HELD_OUT, ODD_HAIR
from puppets.heads import Z_DIM
from puppets.heads import render as draw_truth
from render import PITCH, orbit, seed_to_subject, views

RUNS = Path("runs/experiments")
DOCS = Path("docs")
SOURCE = "checkpoints/puppets/generator.safetensors"
TABLE = ("bronze", "clown", *HELD_OUT[:4])  # The first two were tuned on.
COMPARED = ("clown", "devil", "robot")  # In the ablations: one that was tuned on, two held out.
PICTURED = ("bronze", "alien", "devil", "elf")  # In the figure of reference pictures.
OURS = "Denoised targets"
GCA3D, PAPERS = "GCA-3D", "GCA-3D without delta"  # With delta, which is ours, and without.
COARSE, FINE, MIDDLE = (3.0, 2.0, 1.0), (1.0, 2.0, 3.0), (0.0, 1.0, 0.0)
COLUMNS = {  # Scores in the tables, and how they are called there.
    "oracle_head_l1": "L1 on the head ↓",
    "oracle_kid": "oracle KID ↓",
    "oracle_l1": "L1 to truth ↓",
    "oracle_background_l1": "L1 on the background ↓",
    "kid": "KID to truth ↓",
    "oracle_domain": "oracle domain ↑",
    "clip_share": "CLIP domain ↑",
    "clip_text": "CLIP text ↑",
    "clip_image": "CLIP image ↑",
    "oracle_pose_deg": "oracle pose [deg] ↓",
    "oracle_yaw_deg": "oracle yaw [deg] → 0",
    "pose_deg": "pose [deg] ↓",
    "oracle_id": "oracle identity ↑",
    "oracle_iou": "silhouette IoU ↑",
    "source_iou": "source's IoU",
    "oracle_flips": "flips ↓",
    "identity_top1": "identity top-1 ↑",
    "diversity": "diversity ↑",
    "depth_corr": "depth ↑",
    "multiview_px": "multiview [px] ↓",
    "edit_inside_l1": "L1 to truth in the region ↓",
    "edit_outside_l1": "L1 to source elsewhere ↓",
}
TURNING = ("bronze", "zombie", "clown", "alien", "robot", "devil", "marble")  # Beside the source.
TURNING_FRAMES = 48
MOST_SEEDS = 4
LABEL_HEIGHT = 22  # Above the columns [px].
HEADING = """# Results on the embedded world

Written by `python -m puppets.experiments`; all scores are in `results.json`, under the names that
eval.py gives them. In brackets: what the true pictures of the target domain get for the same score.
Where there are several seeds: mean ± standard deviation over them of the domains' mean. Settings
were chosen by bronze and clown; the other domains are held out, but their rows were seen while the
code grew. One setting of denoised targets is not quite clean: guidance was 2 when devil and elf
were scored first (seed 0), and became 2.5, by trials on bronze and clown, after CLIP had taken 81 %
of those elves for elves. All scores except L1, depth, multiview and the oracle's use CLIP features,
which NADA and 3D-Adapter optimise directly."""
TRIALS = f"""Settings were chosen by runs of seed 11, scored on 64 latents of seed 77, which no
table above uses; {", ".join(HELD_OUT)} were never among them. They were run one by one while the
code was growing, and this script does not make them again; what they did otherwise than today's
code stands in brackets. Before them, trials of GCA-3D on the same two domains, which were not kept,
had led to guidance 3 and HSC's 0.05. `tuning.json` has the numbers."""
LIMITS_NOTE = """The same scores against the same truth: the true pictures; what the prior paints of
the source's pictures, which are the denoised targets; the source as it is, and after the one affine
map of its heads' colours that fits the truth best; one true person for all; the same weights
trained on true pictures. The truth helps all of them but the second and the third."""
FIGURE_SEEDS, SIDES = (3, 14, 15, 92, 65, 35), (0.35, -0.35)


@dataclass(frozen=True)
class Group:
    """Runs that are compared in one table, on the same domains and seeds."""

    title: str
    rows: dict[str, dict]  # Options of train.py by the row's label.
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    told_by: Literal["words", "picture", "edit"] = "words"  # What tells the domain.
    method: str = "gca3d"  # Of the rows that name none.


GROUPS = {
    "targets": Group(
        "Denoised targets, from a prompt",
        {OURS: {}},
        HELD_OUT,
        tuple(range(MOST_SEEDS)),
        method="denoised",
    ),
    "words": Group(
        "Methods, from a prompt",
        {
            OURS: {"method": "denoised"},
            GCA3D: {},
            PAPERS: {"delta": 0.0},
            "SDS": {"method": "sds"},
            "StyleGAN-Fusion": {"method": "stylegan-fusion"},
            "StyleGAN-Fusion, lr 0.002": {"method": "stylegan-fusion", "lr": 2e-3},
            "DiffusionGAN3D": {"method": "diffusiongan3d"},
            "DiffusionGAN3D, distance 0.2": {
                "method": "diffusiongan3d",
                "weights": {"distance": 0.2},
            },
            "StyleGAN-NADA": {"method": "nada"},
        },
        TABLE,
        (0, 1),
    ),
    "pictures": Group(
        "Methods, from one picture",
        {GCA3D: {}, "3D-Adapter": {"method": "3d-adapter"}},
        TABLE,
        (0, 1),
        "picture",
    ),
    "minutes": Group(
        "Methods, from a prompt, in about the minutes of 50 steps of GCA-3D",
        {
            GCA3D: {},
            "SDS, 67 steps": {"method": "sds", "steps": 67},
            "StyleGAN-Fusion": {"method": "stylegan-fusion"},  # Its steps cost as much.
            "DiffusionGAN3D, 54 steps": {"method": "diffusiongan3d", "steps": 54},
            "StyleGAN-NADA, 79 steps": {"method": "nada", "steps": 79},
        },
        HELD_OUT[:4],
        (0,),
    ),
    "minutes-pictures": Group(
        "Methods, from one picture, in about the minutes of 50 steps of GCA-3D",
        {GCA3D: {}, "3D-Adapter, 117 steps": {"method": "3d-adapter", "steps": 117}},
        HELD_OUT[:4],
        (0,),
        "picture",
    ),
    "parts": Group(
        "What each part and setting does (HSC coarse, fine: the levels of its first, last step)",
        {
            GCA3D: {},
            "without depth": {"depth_scale": 0.0},
            "without mask": {"mask": False},
            "without HSC": {"weights": {"hsc": 0.0}},
            PAPERS: {"delta": 0.0},
            "SDS alone": {"method": "sds", "guidance": 3.0, "lr": 2e-3},  # As GCA-3D has them.
            "one HSC level": {"hsc_levels": (MIDDLE, MIDDLE)},
            "HSC coarse": {"hsc_levels": (COARSE, COARSE)},
            "HSC fine": {"hsc_levels": (FINE, FINE)},
            "lambda / 4": {"weights": {"hsc": 0.0125}},
            "lambda x 4": {"weights": {"hsc": 0.2}},
            "guidance 1.5": {"guidance": 1.5},
            "guidance 7.5": {"guidance": 7.5},
            "t below 0.5": {"t_range": (0.02, 0.5)},
            "t above 0.5": {"t_range": (0.5, 0.98)},
            "t annealed": {"t_end": 0.5},
            "learns biases too": {"learns": (r"(backbone\.synthesis|superresolution)\..*",)},
            "learns planes alone": {"learns": (r"backbone\.synthesis\..*\.weight",)},
            "batch 2": {"batch": 2},
            "batch 8": {"batch": 8},
        },
        COMPARED,
        (0,),
    ),
    "edits": Group(
        "Local edits",
        {
            "DiffusionGAN3D": {"method": "diffusiongan3d", "guidance": 7.5},
            "without reconstruction": {
                "method": "diffusiongan3d",
                "guidance": 7.5,
                "weights": {"keep": 0.0},
            },
            GCA3D: {},
        },
        tuple(ODD_HAIR),
        (0,),
        "edit",
    ),
    "gallery": Group("Other domains", {GCA3D: {}}, ("zombie", "alien", "wood", "sketch"), (0,)),
    "gallery-pictures": Group(
        "Other domains, from one picture", {GCA3D: {}}, ("alien",), (0,), "picture"
    ),
}


# What the tables are held against, and how long a generator is trained on true pictures.
LIMITS = (*limits.KINDS, *(f"supervised, {steps} steps" for steps in (50, 400)))


@dataclass
class Config:
    """Options of puppets.experiments."""

    only: str = ""  # Regular expression of the names of the runs to do; empty: all.
    samples: int = 64  # Latents that each run is scored on.
    threads: int = 1  # CPU threads; two workers of one thread are faster than one of two.
    device: str = "cpu"  # Where generators are trained and rendered.
    worker: int = 0  # Which of `workers` this process is.
    workers: int = 1  # Processes that share the runs.


def main(cfg: Config) -> None:
    """Train and score what is missing; write tables and figures, unless others are at work too."""
    torch.set_num_threads(cfg.threads)
    DOCS.mkdir(exist_ok=True)
    for domain in {*TABLE, *PICTURED}:
        draw_reference(domain)
    eye, sources, truths = oracle.load_oracle(), {}, {}
    settings = evaluation.Config(ckpt=(), samples=cfg.samples)
    names = [name for name in (*plan(), *limit_plan()) if re.search(cfg.only, name)]
    for name in tqdm(names[cfg.worker :: cfg.workers], unit="run"):
        score(name, cfg, settings, eye, sources, truths)
    if cfg.workers == 1:
        measure_costs()
        write_tables(read_scores())
        draw_figures()
        draw_orbit()


def score(
    name: str,
    cfg: Config,
    settings: evaluation.Config,
    eye: oracle.Oracle,
    sources: evaluation.Sources,
    truths: oracle.Truths,
) -> None:
    """Train what a row of the tables needs, score it and add its row, as far as it is not there."""
    device, known = torch.device(cfg.device), read_scores().get(name, {})
    kind, domain = limit_plan().get(name, ("", ""))
    if kind in limits.KINDS:
        if known.get("samples") != cfg.samples:
            row = limits.score(kind, domain, eye, settings, sources, truths)
            evaluation.add_row(DOCS / "results.json", name, row)
        return
    if kind:
        limits.supervise(domain, int(kind.split()[1]), RUNS / name, cfg.device)
    else:
        train.main(train.Config(out=RUNS / name, device=cfg.device, **plan()[name]))
    if known.get("inputs") != evaluation.fingerprint_inputs(RUNS / name, settings):
        row = evaluation.score_run(RUNS / name, settings, device, sources)
        row |= oracle.score_run(RUNS / name, row, eye, sources, truths, device)
        evaluation.add_row(DOCS / "results.json", name, row)


def plan() -> dict[str, dict]:
    """Return every run's options for train.py, by the run's name; groups may share runs."""
    return {
        run_name(group, label, domain, seed): {"method": group.method}
        | options
        | target(group, options, domain)
        | {"seed": seed}
        for seed in range(MOST_SEEDS)  # First everything once.
        for group in GROUPS.values()
        if seed in group.seeds
        for domain in group.domains
        for label, options in group.rows.items()
    }


def limit_plan() -> dict[str, tuple[str, str]]:
    """Return the kind and the domain of every ceiling and floor, by the name of its row."""
    kinds = [(kind, domain) for domain in HELD_OUT for kind in LIMITS]
    return {f"{slug(kind)}-{domain}-s0": (kind, domain) for kind, domain in kinds}


def run_name(group: Group, label: str, domain: str, seed: int) -> str:
    """Return a run's name: label-domain-s<seed>."""
    told_by = "" if group.told_by == "words" else f"-{group.told_by}"
    return f"{slug(label)}{told_by}-{domain}-s{seed}"


def slug(label: str) -> str:
    """Return a label as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower())


def target(group: Group, options: dict, domain: str) -> dict:
    """Return the option that tells the domain or, of an edit, the colour of the hair."""
    if group.told_by == "picture":
        return {"image": DOCS / f"reference-{domain}.png"}
    if group.told_by == "edit":
        local = options.get("method", group.method) in EDITS
        return {"edit" if local else "prompt": f"a person with {domain} hair"}
    return {"prompt": DOMAINS[domain].phrases[0]}


def command(name: str, options: dict) -> str:
    """Return the command line of a run."""
    words = ["python", "train.py"]
    for option, value in (options | {"out": RUNS / name}).items():
        flag = f"--{option.replace('_', '-')}"
        if value is False:
            words.append(f"--no-{flag[2:]}")
            continue
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, values in parts:  # Weights have a flag each.
            words += [f"{flag}.{part}".rstrip("."), *np.ravel(np.array(values, object)).astype(str)]
    return shlex.join(words)


def read_scores() -> dict[str, Row]:
    """Return the rows of all runs that have been scored."""
    return evaluation.read_rows(DOCS / "results.json")


def measure_costs() -> None:
    """Measure what a step costs, CPU seconds of one thread by method, unless it is known."""
    if (DOCS / "costs.json").exists():
        return
    steps, device = {}, torch.device("cpu")
    for method in METHODS:
        settings = train.Config(prompt="a clown", method=method, out=RUNS)
        steps[method] = bench.World(settings, device).call(bench.step)
    # In turn, so that a slow minute of the machine slows all; the first step of each is slower.
    rounds = [{m: stopwatch(step, device)[1] for m, step in steps.items()} for _ in range(8)]
    costs = {m: median(seconds[m] for seconds in rounds[1:]) for m in steps}
    write_text(DOCS / "costs.json", json.dumps(costs, indent=2) + "\n")


def draw_reference(domain: str) -> None:
    """Draw the picture that stands for a domain: one head that no training has seen."""
    path = DOCS / f"reference-{domain}.png"
    if not path.exists():
        z = torch.from_numpy(np.random.RandomState(oracle.REFERENCE_SEED).randn(1, Z_DIM)).float()
        c = CAMERAS.label(torch.tensor([0.25]), torch.tensor([-0.1]))
        save_image(Image.fromarray(to_uint8(draw_truth(z, c, domain, size=256)[0])[0]), path)


def write_tables(scores: dict[str, Row]) -> None:
    """Write docs/results.md: a table per group, then every run and its command."""
    lines = [*HEADING.splitlines()]
    for group in GROUPS.values():
        held_out = tuple(domain for domain in group.domains if domain in HELD_OUT)
        for domains in dict.fromkeys(filter(None, (held_out, group.domains))):
            table = table_of_means(group, domains, scores)
            if len(table) > 2 + (group.method == "gca3d"):  # More than one row to compare.
                lines += ["", f"## {group.title}: means over {', '.join(domains)}", "", *table]
    if len(table := table_of_limits(scores)) > 2:
        lines += ["", f"## Ceilings and floors: means over {', '.join(HELD_OUT)}", ""]
        lines += [*LIMITS_NOTE.splitlines(), "", *table]
    lines += ["", "## Cost", "", *table_of_costs()]
    lines += ["", "## Every run", "", *table_of_runs(scores)]
    lines += ["", "## Trials", "", *table_of_trials(), "", "## Commands", "", "```sh"]
    lines += [command(name, options) for name, options in plan().items() if name in scores]
    text = "\n".join([*lines, "```"]) + "\n"
    write_text(DOCS / "results.md", text)


def table_of_means(group: Group, domains: tuple[str, ...], scores: dict[str, Row]) -> list[str]:
    """Return a Markdown row per label that was run on all these domains."""
    rows = {}
    for label in group.rows:
        runs = [[run_name(group, label, d, seed) for d in domains] for seed in group.seeds]
        means = [mean_row([scores[r] for r in row]) for row in runs if scores.keys() >= set(row)]
        if means:
            rows[label] = means
    return markdown_table(rows)


def table_of_limits(scores: dict[str, Row]) -> list[str]:
    """Return a Markdown row per ceiling and floor that was scored on all held-out domains."""
    rows = {}
    for kind in LIMITS:
        runs = [f"{slug(kind)}-{domain}-s0" for domain in HELD_OUT]
        if scores.keys() >= set(runs):
            rows[kind] = [mean_row([scores[run] for run in runs])]
    return markdown_table(rows)


def table_of_runs(scores: dict[str, Row]) -> list[str]:
    """Return a Markdown row per label and domain, over its seeds."""
    seeds: dict[str, list[Row]] = {}
    for run, row in scores.items():
        seeds.setdefault(run.rpartition("-s")[0], []).append(row)
    return markdown_table({mark(name): rows for name, rows in seeds.items()})


def table_of_costs() -> list[str]:
    """Return a Markdown row per method: what a step costs, and what that makes of 50 steps."""
    costs = json.loads((DOCS / "costs.json").read_text())
    lines = ["| method | CPU seconds of a step, one thread | steps in the time of 50 of gca3d |"]
    lines += ["| --- | --- | --- |"]
    return lines + [f"| {m} | {s:.2f} | {50 * costs['gca3d'] / s:.0f} |" for m, s in costs.items()]


def table_of_trials() -> list[str]:
    """Return what was tried while tuning, as docs/tuning.json keeps it."""
    trials = evaluation.read_rows(DOCS / "tuning.json")
    return [
        *TRIALS.splitlines(),
        "",
        *markdown_table({name: [row] for name, row in trials.items()}),
    ]


def markdown_table(rows: dict[str, list[Row]]) -> list[str]:
    """Return a Markdown row per label, over its seeds, of the scores that some of them have."""
    names = [n for n in COLUMNS if any(n in row for seeds in rows.values() for row in seeds)]
    lines = [["", *(COLUMNS[name] for name in names)], ["---"] * (len(names) + 1)]
    lines += [[label, *(cell(seeds, name) for name in names)] for label, seeds in rows.items()]
    return ["| " + " | ".join(line) + " |" for line in lines]


def mean_row(rows: list[Row]) -> Row:
    """Return the means of the numbers that all rows have."""
    names = [n for n in rows[0] if all(isinstance(row.get(n), float) for row in rows)]
    return {n: float(np.mean([row[n] for row in rows])) for n in names}


def mark(name: str) -> str:
    """Return a domain, or a run's name that ends in one, marked if the domain is held out."""
    return f"{name} (held out)" if name.rpartition("-")[2] in HELD_OUT else name


def draw_figures() -> None:
    """Draw source heads above the same heads adapted, a figure for each comparison."""
    words, pictures, parts = (GROUPS[name] for name in ("words", "pictures", "parts"))
    source = [("source", None, show(load_generator(SOURCE)))]
    gallery = (*TABLE, *GROUPS["gallery"].domains)
    rows = [(DOMAINS[d].phrases[0], None, run_name(words, OURS, d, 0)) for d in gallery]
    save_sheet(DOCS / "figure-text.png", source, rows)
    rows = [("", DOCS / f"reference-{d}.png", run_name(pictures, OURS, d, 0)) for d in PICTURED]
    save_sheet(DOCS / "figure-image.png", source, rows)
    truth = [("true elf", None, show_truth("elf"))]
    one_of_each = [label for label in words.rows if "," not in label]
    rows = [(label, None, run_name(words, label, "elf", 0)) for label in one_of_each]
    save_sheet(DOCS / "figure-methods.png", source, rows, truth)
    rows = [(label, None, run_name(parts, label, "devil", 0)) for label in list(parts.rows)[:6]]
    save_sheet(DOCS / "figure-parts.png", source, rows)
    edits = GROUPS["edits"]
    edited, *others = edits.rows
    rows = [
        (f"{colour} hair,\n{edited}", None, run_name(edits, edited, colour, 0))
        for colour in ODD_HAIR
    ]
    rows += [(f"blue hair,\n{label}", None, run_name(edits, label, "blue", 0)) for label in others]
    truth = [("true blue hair", None, show_truth("person", "blue"))]
    save_sheet(DOCS / "figure-edit.png", source, rows, truth)


def save_sheet(
    path: Path,
    above: list[tuple[str, None, Tensor]],
    runs: list[tuple[str, Path | None, str]],
    below: list[tuple[str, None, Tensor]] | None = None,
) -> None:
    """Draw a figure: rows of heads, each with a label, a picture or both, those of runs by name."""
    rows = list(above)
    for label, picture, name in runs:
        if (RUNS / name / "generator.safetensors").exists():
            heads = show(load_generator(RUNS / name))
            rows.append((label, picture and Image.open(picture), heads))
    save_image(sheet(rows + (below or [])), path)


def draw_orbit() -> None:
    """Draw two heads that turn: the source's and, next to it, what each prompt made of them."""
    domains = [d for d in TURNING if (orbit_run(d) / "generator.safetensors").exists()]
    networks = [load_generator(SOURCE), *(load_generator(orbit_run(d)) for d in domains)]
    heads = [
        zip(*(orbit(seed_to_subject(G, head), TURNING_FRAMES) for G in networks), strict=True)
        for head in FIGURE_SEEDS[:2]
    ]
    frames = [image_grid([torch.cat(row) for row in rows]) for rows in zip(*heads, strict=True)]
    titles = ["source", *(DOMAINS[domain].phrases[0] for domain in domains)]
    save_video([label_columns(frame, titles) for frame in frames], DOCS / "orbit.webp")


def orbit_run(domain: str) -> Path:
    """Return the run whose heads turn in the figure."""
    return RUNS / run_name(GROUPS["words"], OURS, domain, 0)


def label_columns(picture: Image.Image, titles: Sequence[str]) -> Image.Image:
    """Write a title above each of the columns of a picture."""
    page = Image.new("RGB", (picture.width, picture.height + LABEL_HEIGHT), "white")
    page.paste(picture, (0, LABEL_HEIGHT))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    width = picture.width / len(titles)
    for i, title in enumerate(titles):
        pen.text(((i + 0.5) * width, LABEL_HEIGHT / 2), title, "black", font, anchor="mm")
    return page


def show(G: TriPlaneGenerator) -> Tensor:
    """Render two views of each figure head, [2 N, 3, R, R]."""
    return torch.cat([views(seed_to_subject(G, seed), SIDES)["image"] for seed in FIGURE_SEEDS])


def show_truth(domain: str, hair: str | None = None) -> Tensor:
    """Draw the same views of the same heads as a domain's truth, [2 N, 3, 128, 128]."""
    z = torch.cat(
        [torch.from_numpy(np.random.RandomState(s).randn(1, Z_DIM)) for s in FIGURE_SEEDS]
    )
    c = CAMERAS.label(torch.tensor(SIDES), torch.full((len(SIDES),), PITCH))  # [2, 25]
    heads = z.float().repeat_interleave(len(SIDES), 0)
    return draw_truth(heads, c.repeat(len(FIGURE_SEEDS), 1), domain, 128, hair)[0]


def sheet(rows: list[tuple[str, Image.Image | None, Tensor]], margin: int = 150) -> Image.Image:
    """Put labelled rows of pictures under each other on white."""
    size = rows[0][2].shape[-1]
    page = Image.new("RGB", (margin + size * len(rows[0][2]), size * len(rows)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for y, (label, picture, images) in enumerate(rows):
        for x, pixels in enumerate(to_uint8(images)):
            page.paste(Image.fromarray(pixels), (margin + x * size, y * size))
        if picture is not None:
            page.paste(picture.resize((size, size)), (margin - size - 11, y * size))
        pen.text((8, (y + 0.5) * size), label, fill="black", font=font, anchor="lm")
    return page


if __name__ == "__main__":
    run_cli(Config, main, __doc__)
