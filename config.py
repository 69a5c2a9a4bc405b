"""What can be asked of train.py: its options, their bounds and checks; presets.py has the numbers.

Nothing in here imports torch: --help and most refusals come within a second.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from PIL import Image
from tyro.constructors import PrimitiveConstructorSpec

from harness.cli import merge_repeats, parse_options
from harness.pictures import read_picture, read_pictures
from harness.run_folder import check_folder, check_run, check_source, portable
from harness.store import checksum
from presets import BASES, EDITS, EDITS_2D, FLAT, FROM_PICTURE, METHODS, METHODS_2D, NUMBERS

# Options that name a file, a folder, a hub id or a URL.
SOURCES = ("generator", "diffusion", "controlnet", "ip_adapter", "vae", "features", "clip")
SCORE_DISTILLATION = ("dsds", "fusion", "fusion_clipped")  # Weights that select layers by.
ADDITIVE = ("image", "lora", "embedding", "learns")  # Given twice, both count.
# Generators that fit a base; NVIDIA's licence does not let others hand them out.
OFFICIAL_FILES = {
    "ffhq": "EG3D's ffhqrebalanced512-128.pkl",
    "afhq": "EG3D's afhqcats512-128.pkl",
    "stylegan2-ffhq": "stylegan2-ada-pytorch's ffhq.pkl",
    "stylegan2-afhq": "stylegan2-ada-pytorch's afhqcat.pkl",
    "panohead": "PanoHead's easy-khair-180-gpc0.8-trans10-025000.pkl",
}


@dataclass(frozen=True)
class Within:
    """Bounds of an option, both included unless `above`."""

    low: float
    high: float = inf
    above: bool = False  # Whether the value must be above `low`.

    def check(self, flag: str, value: float) -> None:
        """Refuse a value outside.

        Raises:
            ValueError: naming the flag, the rule and the value.
        """
        if self.above and not value > self.low:
            raise ValueError(f"{flag} must be above {self.low:g}, got {value}")
        if not value >= self.low:
            raise ValueError(f"{flag} must be at least {self.low:g}, got {value}")
        if not value <= self.high:
            raise ValueError(f"{flag} must be at most {self.high:g}, got {value}")


def read_loras(words: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Read `FILE [WEIGHT] FILE [WEIGHT] ...`; a file without a weight counts in full."""
    loras: list[tuple[str, float]] = []
    for word in words:
        try:
            weight = float(word)
        except ValueError:
            loras.append((word, 1.0))
        else:
            if not loras:
                raise ValueError(f"a file comes first, then its weight, got {word}")
            loras[-1] = (loras[-1][0], weight)
    return tuple(loras)


Base = Literal[
    "puppets",
    "puppets2d",
    "puppets360",
    "ffhq",
    "afhq",
    "stylegan2-ffhq",
    "stylegan2-afhq",
    "panohead",
]
Count = Annotated[int, Within(1)]
Fraction = Annotated[float, Within(0, 1)]
Scale = Annotated[float, Within(0, 10)]
Weight = Annotated[float, Within(0, 1e4)]
Loras = Annotated[
    tuple[tuple[str, float], ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="FILE [WEIGHT] ...",
        instance_from_str=read_loras,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda loras: [str(part) for lora in loras for part in lora],
    ),
]


@dataclass(frozen=True)
class Weights:
    """Weights of the objective's terms; 0: off."""

    dsds: Weight = 0.0  # Score distillation, depth-aware with --depth-scale and --mask (L_DSDS).
    hsc: Weight = 0.0  # GCA-3D's hierarchical spatial consistency (lambda).
    denoised: Weight = 0.0  # Distance to what the prior paints of the source's pictures.
    denoised_tokens: Weight = 0.0  # The same distance in a ViT's tokens.
    silhouette: Weight = 0.0  # Distance to their foreground, if the background is plain.
    fusion: Weight = 0.0  # StyleGAN-Fusion's score distillation.
    fusion_clipped: Weight = 0.0  # The same, its gradient clipped at the picture (StyleGAN2).
    score_direction: Weight = 0.0  # StyleGAN-Fusion's directional regulariser.
    score_reconstruction: Weight = 0.0  # StyleGAN-Fusion's reconstruction regulariser.
    perceptual: Weight = 0.0  # StyleGAN-Fusion's LPIPS-type distance to the source.
    distance: Weight = 0.0  # DiffusionGAN3D's relative distance (L_dis).
    keep: Weight = 0.0  # DiffusionGAN3D's reconstruction outside the region of an edit (L_diff).
    clip_direction: Weight = 0.0  # StyleGAN-NADA's direction in CLIP's space.
    target: Weight = 0.0  # 3D-Adapter's target distribution, from --image.
    structure: Weight = 0.0  # 3D-Adapter's structure of images.
    feature_structure: Weight = 0.0  # 3D-Adapter's structure of features, before super-resolution.
    variation: Weight = 0.0  # Total variation, at four scales, of one head's own planes.
    opacity: Weight = 0.0  # Fog: opacity that is neither 0 nor 1.

    def on(self) -> dict[str, float]:
        """Return the weights of the terms that are computed."""
        return {name: weight for name, weight in vars(self).items() if weight}


@dataclass(frozen=True)
class Targets:
    """How the prior paints the pictures of the denoised terms, and how often heads are used."""

    level: Annotated[float, Within(0, 1, above=True)] = 0.6
    """Diffusion time where denoising begins, as a fraction: how much may change."""
    steps: Annotated[int, Within(1, 1000)] = 8  # DDIM steps down, and up if inverted.
    inverted: bool = True
    """Start from the source's picture inverted, which keeps persons; else from noise for all."""
    draws: Annotated[int, Within(0, 64)] = 0
    """Instead of inverting, edit the picture (FlowEdit): noises that each step averages over."""
    guided: tuple[float, float] = (0.0, 1.0)
    """Diffusion times between which guidance acts, as fractions; elsewhere it is 1."""
    held: tuple[float, float] = (0.0, 1.0)
    """Diffusion times between which the prior sees the depth, as fractions."""
    margin: Fraction = 0.0
    """Width around the foreground where shapes may grow, as a fraction of the picture's."""
    adapted_depth: bool = False
    """From the second pool on, paint from the depth of what heads have become, not the source's."""
    pool: Count = 25  # Batches of heads that are used in turn.
    reuse: Count = 1  # Steps that use each of them, before others take their place.


@dataclass(frozen=True)
class Scores:
    """How StyleGAN-Fusion sizes its scores, and which layers of StyleGAN2 it lets learn."""

    unit: bool = True  # Scale the predictions of its score distillation to unit size.
    unit_direction: bool = True  # Scale those of its directional regulariser to unit size.
    divisor: Annotated[float, Within(0, 1e4, above=True)] = 100.0
    """Divides its scores before they are clamped to +-1."""
    clip: Annotated[float, Within(0, 1, above=True)] = 1.0
    """Quantile of a picture's gradient beyond which that of fusion-clipped is cut; 1: nothing."""
    layer_before: bool = False
    """Let the layer before each selected one learn, which its code does by mistake."""


@dataclass(init=False)
class Config:
    """Options of train.py. Those without a value here have that of the base and method."""

    prompt: str = ""  # Target domain in words, such as "a bronze statue".
    negative_prompt: str = ""  # What the prior is guided away from, in words.
    image: tuple[Path, ...] = ()
    """Target domain as pictures, or a folder of them; with a prompt, both count."""
    edit: str = ""
    """Local edit, such as "a person with green hair", in place of a prompt (diffusiongan3d)."""
    out: Path = Path("runs/unnamed")  # Run folder; by default runs/ and the words of the prompt.

    base: Base = "puppets"
    """World of the generator; sets defaults. The puppets', also as pictures (2d) and seen from all
    sides (360), come with the repository."""
    method: Literal[
        "denoised",
        "denoised-shapes",
        "gca3d",
        "sds",
        "stylegan-fusion",
        "diffusiongan3d",
        "nada",
        "3d-adapter",
    ] = "denoised"
    """Objective, and which parameters learn; sets defaults."""
    generator: str
    """Generator to adapt: .safetensors, official .pkl, hub id user/repo/file, URL or run folder."""
    diffusion: str  # Frozen prior: diffusers folder, single-file checkpoint or hub id.
    controlnet: str
    """Depth ControlNet: folder or hub id; empty: the one in the prior's own folder."""
    ip_adapter: str
    """IP-Adapter for --image: folder, file or hub id; empty: the one in the prior's own folder."""
    lora: Loras = ()  # LoRAs added to the prior: files, folders or hub ids, each with its weight.
    embedding: tuple[str, ...] = ()  # Textual inversions the prompt may name: files or hub ids.
    vae: str = ""  # Other VAE of the prior, or TAESD (faster, coarser); empty: the prior's own.
    features: str  # Frozen ViT (DINOv2 or ViT) for HSC and the perceptual term: folder or hub id.
    clip: str  # CLIP for the log's score, NADA and 3D-Adapter: folder or hub id.
    source_prompt: str  # The generator's own domain in words.

    steps: Count  # Updates of the generator; schedules run over them.
    batch: Annotated[int, Within(1, 1024)]  # Samples in a step.
    learns: tuple[str, ...]
    """Name patterns of the parameters that learn; several: each has an equal part of the run."""
    select_layers: Annotated[int, Within(0)] = 0
    """Layers that learn in a step: those whose codes score distillation moves most; 0: all."""
    seed: Annotated[int, Within(0)] = 0  # Fixes every random draw, together with the step.
    lr: Annotated[float, Within(0, 1, above=True)]  # Adam's learning rate.
    momentum: Annotated[float, Within(0, 0.999)] = 0.0
    """Adam's first beta; score distillation, whose gradients are mostly noise, goes without."""
    trunc: Annotated[float, Within(-10, 10)] = 1.0
    """Truncation psi of the training samples; 1: the full variety."""
    mapping_camera: Literal["frontal", "render"] = "frontal"
    """Camera for the mapping network; render (StyleGAN-Fusion's) leaks pose into identity."""

    guidance: Annotated[float, Within(0, 1e4)]  # Classifier-free guidance scale; 1: none.
    t_range: tuple[float, float]
    """Lowest and highest diffusion time drawn, as fractions of the schedule."""
    t_end: Fraction = 0.0
    """Where the highest diffusion time arrives, linearly, at the last step; 0: it stays."""
    image_scale: Scale = 1.0
    """Weight of the pictures in the prior; by default 1 without a prompt, 0.6 with one."""
    depth_scale: Scale = 0.0  # Weight of the source's depth in the prior; 0: off.
    view_words: bool = False
    """Whether the prior's words say from where it looks: front, side or back view."""
    mask: bool = False  # Whether only the source's foreground is adapted.
    delta: Fraction = 0.0
    """Fraction of the SDS baseline that the prior predicts on the source image; 0: plain SDS."""
    hsc_temperature: Annotated[float, Within(0, above=True)] = 0.1  # Softmax temperature (tau).
    hsc_levels: tuple[tuple[float, float, float], tuple[float, float, float]] = (
        (3.0, 2.0, 1.0),
        (1.0, 2.0, 3.0),
    )
    """Shares of HSC's levels, 4 x 4 cells, 8 x 8 and all, in the first and in the last step."""

    targets: Targets
    scores: Scores
    weights: Weights

    save_every: Count  # Steps between checkpoints.
    grid_every: Count  # Steps between grids.
    device: str = "auto"  # One of cpu, cuda, cuda:1, mps; auto: cuda where there is one.
    micro_batch: Annotated[int, Within(0)] = 0
    """Samples that a process computes at once: fewer need less memory; 0: all it has."""
    low_memory: bool = False
    """Compute the VAE's activations twice instead of keeping them: slower, same gradients."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the prior's networks except its VAE; auto: fp16 on CUDA, else fp32."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the VAE, through which the gradients go."""
    compile: bool = False
    """Compile UNet, ControlNet and VAE (torch.compile): a faster step after a slow first one."""
    dry_run: bool = False  # Print the settings of the run and stop.

    def __init__(self, **given: Any) -> None:
        """Take options; those not given, or None, have the preset of the base and method.

        Raises:
            TypeError: there is no such option.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if unknown := given.keys() - {field.name for field in fields(Config)}:
            raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
        for name in ("prompt", "edit", "negative_prompt"):
            given[name] = given.get(name, "").strip()
        given["prompt"] = given["prompt"] or given["edit"]  # An edit is the prompt as well.
        images = given.get("image", ())
        images = (images,) if isinstance(images, str | Path) else images
        given["image"] = tuple(Path(image).expanduser() for image in images)
        for name in SOURCES:
            if name in given:
                given[name] = portable(os.path.expanduser(given[name]))
        given["lora"] = tuple(
            (portable(os.path.expanduser(file)), weight) for file, weight in given.get("lora", ())
        )
        given["embedding"] = tuple(
            portable(os.path.expanduser(file)) for file in given.get("embedding", ())
        )
        if "out" in given:
            given["out"] = Path(given["out"]).expanduser()

        base, method = given.get("base", Config.base), given.get("method", Config.method)
        settled = _defaults(base, method, given["prompt"], given["edit"], given["image"])
        for name in ("targets", "scores", "weights"):
            if isinstance(given.get(name), Mapping):
                given[name] = dataclasses.replace(settled[name], **given[name])
        vars(self).update(settled | given)


def preset(base: str, method: str, **given: Any) -> Config:
    """Return the options of a method on a base, with those given instead of the preset's."""
    return Config(base=base, method=method, **given)


def _defaults(
    base: str, method: str, prompt: str, edit: str, image: tuple[Path, ...]
) -> dict[str, Any]:
    """Return every option's default; the only place where the tables of presets.py are merged.

    Raises:
        ValueError: there is no such base or method.
    """
    for flag, name, known in (("--base", base, BASES), ("--method", method, METHODS)):
        if name not in known:
            raise ValueError(f"{flag} must be one of {', '.join(known)}, got {name!r}")
    methods, edits = (METHODS_2D, EDITS_2D) if base in FLAT else (METHODS, EDITS)
    tables = [BASES[base], methods[method], NUMBERS[base][method]]
    tables += [edits.get(method, {})] if edit else []
    row = {name: value for table in tables for name, value in table.items()}
    targets, scores = (
        {name: value for table in tables for name, value in table.get(group, {}).items()}
        for group in ("targets", "scores")
    )
    targets |= FROM_PICTURE if image and not prompt else {}
    weights = {field.name: row.pop(field.name, 0.0) for field in fields(Weights)}
    if not image:
        weights["target"] = 0.0  # Words have no tokens to compare with.
    words = re.findall(r"\w+", prompt or (image[0].stem if image else ""))
    computed = {
        "out": Path("runs", "-".join(words).lower()[:80] or "unnamed"),
        "image_scale": 0.6 if prompt and image else 1.0,
        "targets": Targets(**targets),
        "scores": Scores(**scores),
        "weights": Weights(**weights),
    }
    plain = {f.name: f.default for f in fields(Config) if f.default is not dataclasses.MISSING}
    return plain | row | computed


def parse(argv: Sequence[str], description: str | None) -> Config:
    """Read the options of a command line, and refuse what cannot work.

    The base and method set the defaults of all others, so they are read first: --help shows the
    numbers that a run would have.

    Raises:
        ValueError: an option that must be given once is repeated; or see `check`.
        SystemExit: after --help (0), or an option that cannot be read (2).
    """
    argv = merge_repeats(list(argv), ADDITIVE)
    read = parse_options(Config, [x for x in argv if x not in ("-h", "--help")], "", Config())
    names = ("base", "method", "prompt", "edit", "image")
    default = Config(**{name: getattr(read, name) for name in names})
    cfg = parse_options(Config, argv, description, default)
    if "RANK" not in os.environ:  # Processes of one launch refuse together, once they have met.
        check(cfg)
    return cfg


def check(cfg: Config) -> None:
    """Refuse what no run can have, before any network is loaded and anything is written.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    _check_bounds(cfg)
    if not cfg.prompt and not cfg.image:
        raise ValueError("no target domain: give --prompt TEXT, --image FILE or both")
    if cfg.edit and cfg.method not in EDITS:
        raise ValueError(f"--edit needs --method {' or '.join(EDITS)}, got {cfg.method}")
    if cfg.edit and cfg.prompt != cfg.edit:
        raise ValueError(f"--edit takes the place of --prompt, got both ({cfg.prompt!r})")
    if not cfg.generator:
        raise ValueError(
            f"--base {cfg.base} comes without a generator: give --generator with "
            f"{OFFICIAL_FILES.get(cfg.base, 'a file of its own')} or another .pkl or .safetensors"
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", cfg.device):
        raise ValueError(f"--device must be cpu, cuda, cuda:<n> or mps, got {cfg.device}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch % processes:
        raise ValueError(f"--batch must divide among {processes} processes, got {cfg.batch}")
    if not 0 <= cfg.t_range[0] < min(cfg.t_range[1], cfg.t_end or 1) or cfg.t_range[1] > 1:
        end = f" and end above {cfg.t_range[0]}, got {cfg.t_end}" if cfg.t_end else ""
        raise ValueError(f"--t-range must rise within 0 to 1, got {cfg.t_range}{end}")
    if not all(0 < sum(shares) < inf and min(shares) >= 0 for shares in cfg.hsc_levels):
        raise ValueError(f"--hsc-levels must be at least 0 and not all 0, got {cfg.hsc_levels}")
    _check_weights(cfg)
    _check_sources(cfg)
    check_folder(cfg.out)
    check_run(cfg.out, settings(cfg), usual_settings(cfg))


def _check_bounds(cfg: Config) -> None:
    """Refuse numbers outside of the bounds at their fields, and texts that are not UTF-8."""
    groups = (
        (cfg, "--"),
        (cfg.targets, "--targets."),
        (cfg.scores, "--scores."),
        (cfg.weights, "--weights."),
    )
    for options, prefix in groups:
        hints = get_type_hints(type(options), include_extras=True)
        for name, value in vars(options).items():
            flag = prefix + name.replace("_", "-")
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, str | Path) and re.search("[\ud800-\udfff]", str(part)):
                    raise ValueError(f"{flag} is not UTF-8 text: {ascii(str(part))}")
                if isinstance(part, float) and not isfinite(part):
                    raise ValueError(f"{flag} must be a finite number, got {part}")
            for bounds in getattr(hints[name], "__metadata__", ()):
                if isinstance(bounds, Within):
                    bounds.check(flag, value)


def _check_weights(cfg: Config) -> None:
    """Refuse weights that no objective can have."""
    on = cfg.weights.on()
    if not on:
        raise ValueError("nothing to learn: all --weights are 0")
    if "keep" in on and not cfg.prompt:
        raise ValueError("--weights.keep needs words for the region: --edit or --prompt")
    if cfg.select_layers and not on.keys() & set(SCORE_DISTILLATION):
        raise ValueError(
            f"--select-layers goes by score distillation: one of --weights "
            f"{', '.join(SCORE_DISTILLATION)} must be on"
        )
    for name in ("guided", "held"):
        low, high = getattr(cfg.targets, name)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"--targets.{name} must rise within 0 to 1, got {low:g} {high:g}")
    if cfg.targets.draws and not cfg.targets.inverted:
        raise ValueError("--targets.draws edits the source, so it needs --targets.inverted")
    if cfg.base in FLAT and ("silhouette" in on or cfg.targets.adapted_depth):
        flag = "--weights.silhouette" if "silhouette" in on else "--targets.adapted-depth"
        raise ValueError(f"{flag} needs depth and masks, and --base {cfg.base} has none")
    if "target" in on and not cfg.image:
        raise ValueError("--weights.target needs the picture of --image")
    if "distance" in on and cfg.batch < 2:
        raise ValueError(f"--weights.distance needs a --batch of at least 2, got {cfg.batch}")
    same = cfg.prompt.casefold() == cfg.source_prompt.strip().casefold()
    if "clip_direction" in on and same and not cfg.image:
        raise ValueError(
            f"--prompt {cfg.prompt!r} is the --source-prompt: --weights.clip-direction has nowhere "
            "to go"
        )


def _check_sources(cfg: Config) -> None:
    """Refuse paths at which nothing is."""
    given = [(name, getattr(cfg, name)) for name in SOURCES if getattr(cfg, name)]
    given += [("lora", file) for file, _ in cfg.lora] + [("embedding", f) for f in cfg.embedding]
    for name, source in given:
        check_source(f"--{name.replace('_', '-')}", source)


def references(cfg: Config) -> list[Image.Image]:
    """Read the reference pictures, or the run's own copies once the originals are gone.

    Raises:
        ValueError: one is missing or no picture.
    """
    kept = sorted(cfg.out.glob("reference*.png"))
    if kept and not all(path.exists() for path in cfg.image):
        return [read_picture(path) for path in kept]
    return read_pictures(cfg.image)


def usual_settings(cfg: Config) -> dict[str, Any]:
    """Return the settings of a run if no option beyond its target were given."""
    usual = preset(cfg.base, cfg.method, prompt=cfg.prompt, edit=cfg.edit, image=cfg.image)
    return json.loads(json.dumps(asdict(usual), default=str))


def settings(cfg: Config) -> dict[str, Any]:
    """Return the settings of a run as JSON knows them; of pictures, also what they show."""
    pixels = (picture.tobytes() for picture in references(cfg))
    shown = checksum(*pixels) if cfg.image else None
    return json.loads(json.dumps(asdict(cfg), default=str)) | {"image_pixels": shown}
