"""The README's experiments on the embedded world: which runs are compared, and their options."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from config import EDITS
from puppets import limits
from puppets.domains import DOMAINS, HELD_OUT, ODD_HAIR

RUNS = Path("runs/experiments")
DOCS = Path("docs")
TABLE = ("bronze", "clown", *HELD_OUT[:4])  # The first two were tuned on.
COMPARED = ("clown", "devil", "robot")  # In the ablations: one that was tuned on, two held out.
OURS = "Denoised targets"
SHAPES = f"{OURS}, shapes free"
# The same domains in other words, some of which the embedded prior has never read.
PARAPHRASES = {
    "bronze": "an old statue cast in bronze",
    "clown": "a sad clown from the circus",
    "marble": "a bust carved from white marble",
    "robot": "a shiny robot made of chrome",
    "devil": "an angry red demon with horns",
    "elf": "an elf who lives in the forest",
}
YAWS = {"left": -0.5, "front": 0.0, "right": 0.5}  # Of reference pictures, to see if heads follow.
GCA3D, PAPERS = "GCA-3D", "GCA-3D without delta"  # With delta, which is ours, and without.
COARSE, FINE, MIDDLE = (3.0, 2.0, 1.0), (1.0, 2.0, 3.0), (0.0, 1.0, 0.0)
FLAT = "Pictures:"  # Begins the labels of runs on a generator without cameras.
ROUND = "From all sides:"  # Begins those of heads that are seen from behind too.
NO_REGULARISER = {"score_direction": 0.0, "perceptual": 0.0}
MOST_SEEDS = 4


@dataclass(frozen=True)
class Group:
    """Runs that are compared in one table, on the same domains and seeds."""

    title: str
    rows: dict[str, dict]
    """Options of train.py by the row's label, and what `target` reads: yaw and paraphrase."""
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
            "StyleGAN-Fusion, delta 0.5": {"method": "stylegan-fusion", "delta": 0.5},
            "DiffusionGAN3D": {"method": "diffusiongan3d"},
            "DiffusionGAN3D, weights alone": {
                "method": "diffusiongan3d",
                "learns": (r"backbone\.synthesis\.(?!.*\.torgb\.).*\.weight",),
            },
            "DiffusionGAN3D, distance 0.2": {
                "method": "diffusiongan3d",
                "weights": {"distance": 0.2},
            },
            "StyleGAN-NADA": {"method": "nada"},
            "3D-Adapter, zero-shot": {"method": "3d-adapter"},
        },
        TABLE,
        (0, 1),
    ),
    "targets-parts": Group(
        "Denoised targets: what the targets bring, and what stands beside them",
        {
            OURS: {},
            f"{OURS} without HSC": {"weights": {"hsc": 0.0}},
            f"{OURS} with DSDS, 0.3": {"weights": {"dsds": 0.3}},
            f"{OURS} with StyleGAN-Fusion's perceptual term": {
                "weights": {"hsc": 0.0, "perceptual": 20 / 64**2}
            },
            f"{OURS} with DiffusionGAN3D's distance": {"weights": {"hsc": 0.0, "distance": 0.3}},
            f"{OURS} from one noise for all": {"targets": {"inverted": False}},
            f"{OURS} without momentum": {"momentum": 0.0},
        },
        COMPARED,
        (0,),
        method="denoised",
    ),
    "shapes": Group(
        "Shapes that may change, where the domain has others",
        {OURS: {}, SHAPES: {"method": "denoised-shapes"}},
        ("robot", "devil", "elf", "alien"),
        (0, 1),
        method="denoised",
    ),
    "shapes-everywhere": Group(
        "Shapes that may change",
        {OURS: {}, SHAPES: {"method": "denoised-shapes"}},
        TABLE,
        (0, 1),
        method="denoised",
    ),
    "paraphrases": Group(
        "Other words",
        {OURS: {}, f"{OURS}, paraphrased": {"paraphrase": True}},
        TABLE,
        (0,),
        method="denoised",
    ),
    "pictures": Group(
        "Methods, from one picture",
        {
            OURS: {"method": "denoised"},
            GCA3D: {},
            "3D-Adapter": {"method": "3d-adapter"},
            "StyleGAN-NADA": {"method": "nada"},
        },
        TABLE,
        (0, 1),
        "picture",
    ),
    "poses": Group(
        "From one picture, by the yaw of its camera",
        {f"{OURS}, from the {side}": {"yaw": yaw} for side, yaw in YAWS.items()}
        | {f"{GCA3D}, from the {side}": {"method": "gca3d", "yaw": y} for side, y in YAWS.items()},
        HELD_OUT[:4],
        (0,),
        "picture",
        method="denoised",
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
    "flat": Group(
        "Pictures of StyleGAN2, from a prompt",
        {
            f"{FLAT} {label}": {"base": "puppets2d", **options}
            for label, options in (
                ("denoised targets", {"method": "denoised"}),
                ("SDS", {"method": "sds"}),
                ("NADA", {"method": "nada"}),
                ("StyleGAN-Fusion, no regulariser", {"weights": NO_REGULARISER}),
                ("StyleGAN-Fusion, direction", {"weights": {"perceptual": 0.0}}),
                (
                    "StyleGAN-Fusion, reconstruction",
                    {"weights": NO_REGULARISER | {"score_reconstruction": 0.03}},
                ),
                ("StyleGAN-Fusion, perceptual", {"weights": {"score_direction": 0.0}}),
                ("StyleGAN-Fusion, direction and perceptual", {}),
                ("StyleGAN-Fusion, 3 layers", {"weights": NO_REGULARISER, "select_layers": 3}),
                ("StyleGAN-Fusion, 6 layers", {"weights": NO_REGULARISER, "select_layers": 6}),
            )
        },
        TABLE,
        (0,),
        method="stylegan-fusion",
    ),
    "round": Group(
        "Heads seen from all sides, from a prompt",
        {
            f"{ROUND} {label}": {"base": "puppets360", **options}
            for label, options in (
                ("denoised targets", {"method": "denoised"}),
                ("GCA-3D", {}),
                ("GCA-3D without view words", {"view_words": False}),
                ("GCA-3D without depth", {"depth_scale": 0.0}),
                ("SDS", {"method": "sds"}),
                ("SDS without view words", {"method": "sds", "view_words": False}),
            )
        },
        HELD_OUT[:4],
        (0,),
    ),
    "gallery": Group(
        "Other domains",
        {OURS: {"method": "denoised"}, GCA3D: {}},
        ("zombie", "alien", "wood", "sketch"),
        (0,),
    ),
    "gallery-pictures": Group(
        "Other domains, from one picture",
        {OURS: {"method": "denoised"}, GCA3D: {}},
        ("alien",),
        (0,),
        "picture",
    ),
}


TOLD = ("yaw", "paraphrase")  # What rows say of the target beside train.py's options.
# What the tables are held against, and how long a generator is trained on true pictures.
LIMITS = (*limits.KINDS, *(f"supervised, {steps} steps" for steps in (50, 400)))


def plan() -> dict[str, dict]:
    """Return every run's options for train.py, by the run's name; groups may share runs."""
    return {
        run_name(group, label, domain, seed): {"method": group.method}
        | {option: value for option, value in options.items() if option not in TOLD}
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
    kinds.append((LIMITS[-1], "alien"))  # Whose shapes differ most.
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
        return {"image": reference(domain, options.get("yaw"))}
    if "paraphrase" in options:
        return {"prompt": PARAPHRASES[domain]}
    if group.told_by == "edit":
        local = options.get("method", group.method) in EDITS
        return {"edit" if local else "prompt": f"a person with {domain} hair"}
    return {"prompt": DOMAINS[domain].phrases[0]}


def command(name: str, options: dict) -> str:
    """Return the command line of a run."""
    words = ["python", "train.py"]
    for option, value in (options | {"out": RUNS / name}).items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, values in parts:  # Targets and weights have a flag each.
            *group, flag = f"{option}.{part}".rstrip(".").replace("_", "-").split(".")
            if isinstance(values, bool):  # Switches.
                words.append("--" + ".".join([*group, flag if values else f"no-{flag}"]))
                continue
            words += ["--" + ".".join([*group, flag])]
            words += np.ravel(np.array(values, object)).astype(str).tolist()
    return shlex.join(words)


def reference(domain: str, yaw: float | None = None) -> Path:
    """Return the file of the picture that stands for a domain."""
    if yaw is None:
        return DOCS / f"reference-{domain}.png"
    return RUNS.parent / "references" / f"{domain}-{yaw:g}.png"
