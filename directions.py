"""Find directions along which a generator's heads change: those that words name, and the widest.

    python directions.py --words "red=red hair/black hair" --out directions.safetensors
    python render.py --ckpt runs/a-clown --edit hair=2 dark=-1.5 red=1 --seeds 0-3

CLIP says of a thousand heads how much more they look like the words before the slash than like
those behind it. The direction is how codes vary with that: every head counts, where the difference
of the best and the worst tenth would see a fifth of them. What it shares with directions that CLIP
sees more clearly is taken out: to many a CLIP long hair is dark hair. So some pairs of words are
always there. The directions pc0, pc1, ... are the principal components of the codes (GANSpace,
arXiv:2004.02546), found without words.
render.py moves heads along them by standard deviations, in the source and in every run from it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from harness.cli import exit_codes, read_options
from harness.run_folder import check_folder, check_source, make_folder


@dataclass
class Config:
    """Options of directions.py."""

    ckpt: str = "checkpoints/puppets/generator.safetensors"  # Generator, or run folder.
    out: Path = Path("directions.safetensors")  # The file to write; one that exists is replaced.
    words: tuple[str, ...] = ()  # Each NAME=THESE/THOSE, such as "red=red hair/black hair".
    apart: tuple[str, ...] = (
        "hair=long hair/short hair",
        "dark=black hair/blond hair",
        "skin=dark skin/pale skin",
    )
    """Other pairs that these are told apart from; their directions are written, too."""
    template: str = "a photo of a person with {}"  # Sentence that the words are put into.
    components: int = 10  # How many principal components are kept.
    samples: int = 1000  # Heads that CLIP looks at.
    seed: int = 0  # Fixes heads and cameras.
    clip: str = "checkpoints/puppets/clip"  # CLIP for --words: folder or hub id.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


def check(cfg: Config) -> None:
    """Refuse options that cannot be used.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    pairs = parse_words(cfg.words + cfg.apart)
    if "{}" not in cfg.template:
        raise ValueError(f"--template must hold {{}}, where the words go, got {cfg.template!r}")
    if cfg.samples < 100:
        raise ValueError(f"--samples must be at least 100, got {cfg.samples}")
    if cfg.components < 0 or not (cfg.components or pairs):
        raise ValueError(f"--components must be at least 1 without words, got {cfg.components}")
    if cfg.out.suffix != ".safetensors" or cfg.out.is_dir():
        raise ValueError(f"--out must be a file that ends in .safetensors, got {cfg.out}")
    check_folder(cfg.out.absolute().parent)
    check_source("--ckpt", cfg.ckpt)
    if pairs:
        check_source("--clip", cfg.clip)


def parse_words(words: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Return two phrases by the name of their direction; the first of a name counts.

    Raises:
        ValueError: a word is no NAME=THESE/THOSE.
    """
    pairs: dict[str, tuple[str, str]] = {}
    for word in words:
        match = re.fullmatch(r"\s*([\w-]+)\s*=\s*([^/]*[^/\s])\s*/\s*([^/]*[^/\s])\s*", word)
        if not match or re.fullmatch(r"pc\d+", match[1]):
            raise ValueError(f"--words must look like red=red hair/black hair, got {word!r}")
        pairs.setdefault(match[1], (match[2], match[3]))
    return pairs


if __name__ == "__main__":
    CFG = read_options(Config, __doc__, check)

import torch
from torch import Tensor
from tqdm import tqdm

from files.generators import load_generator
from harness.devices import pick_device
from harness.run_folder import locate
from models.features import ClipFeatures
from models.generator import Generator
from subjects import draw_codes, save_directions, seed_to_ws

CODES = 10_000  # Of which the principal components are taken.


def main(cfg: Config) -> None:
    """Find directions and write them.

    Raises:
        ValueError: an option cannot be used.
    """
    check(cfg)
    device = pick_device(cfg.device)
    G = load_generator(locate(cfg.ckpt), device)
    directions: dict[str, Tensor] = {}
    if pairs := parse_words(cfg.words + cfg.apart):
        clip = ClipFeatures.from_pretrained(locate(cfg.clip), device)
        directions |= from_words(G, clip, pairs, cfg)
    directions |= from_codes(G, cfg)
    make_folder(cfg.out.absolute().parent)
    save_directions(directions, cfg.out)
    print(f"{cfg.out} has {', '.join(directions)}")


def from_codes(G: Generator, cfg: Config) -> dict[str, Tensor]:
    """Return the principal components of w as directions pc0, pc1, ... [w_dim], widest first."""
    w = draw_codes(G, CODES, cfg.seed)
    axes = torch.linalg.svd((w - w.mean(0)).double(), full_matrices=False).Vh[: cfg.components]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = (axes * largest.sign()).float()  # Else the sign would be the library's.
    return {f"pc{k}": in_deviations(axis, w) for k, axis in enumerate(axes)}


@torch.no_grad()
def from_words(
    G: Generator, clip: ClipFeatures, pairs: dict[str, tuple[str, str]], cfg: Config
) -> dict[str, Tensor]:
    """Return directions [w_dim] towards heads that look like words, away from those of others.

    Args:
        G: The generator.
        clip: CLIP, which ranks the heads.
        pairs: Two phrases by the name of their direction.
        cfg: How many heads, and the sentence around the words.
    """
    w = draw_codes(G, cfg.samples, cfg.seed)
    torch.manual_seed(cfg.seed)
    c = G.cameras.sample(cfg.samples).to(w.device)
    ws = w[:, None].expand(-1, seed_to_ws(G, 0).shape[1], -1)  # [N, num_ws, w_dim].
    seen = [
        clip.images(G.synthesis(ws[i : i + 1], c[i : i + 1])["image"].clamp(-1, 1))
        for i in tqdm(range(cfg.samples), unit="head")
    ]
    images = torch.cat(seen)  # [N, D]
    scores = {}
    for name, phrases in pairs.items():
        these, those = clip.text([cfg.template.format(phrase) for phrase in phrases])
        scores[name] = without_cameras(images @ (these - those), c)
    directions: dict[str, Tensor] = {}
    for name in sorted(scores, key=lambda name: -scores[name].std()):  # The clearest first.
        direction = (w - w.mean(0)).T @ scores[name]  # Their covariance.
        for other in directions.values():
            direction = direction - (direction @ other) / (other @ other) * other
        directions[name] = in_deviations(direction, w)
    return {name: directions[name] for name in pairs}


def without_cameras(scores: Tensor, c: Tensor) -> Tensor:
    """Return scores [N] less what the cameras c [N, 25] tell of them, by least squares."""
    position = c[:, 3:12:4]  # Of the camera, [N, 3]; none without cameras.
    ones = torch.ones(len(scores), 1, device=scores.device)
    known = torch.cat([ones, position, position.square()], dim=1)
    told = torch.linalg.lstsq(known.double(), scores[:, None].double()).solution[:, 0]
    return scores - known @ told.to(scores)


def in_deviations(direction: Tensor, w: Tensor) -> Tensor:
    """Scale a direction [w_dim] so that codes w [N, w_dim] have deviation one along it."""
    unit = torch.nn.functional.normalize(direction, dim=0)
    return unit * ((w - w.mean(0)) @ unit).std()


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
