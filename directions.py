"""Find directions along which a generator's heads change: those that words name, and the widest.

    python directions.py --words "red=red hair/black hair" --out directions.safetensors
    python render.py --ckpt runs/a-clown --edit hair=2 dark=-1.5 red=1 --seeds 0-3

CLIP says of a thousand heads how much more they look like the words before the slash than like
those behind it. The direction is how codes vary with that: every head counts, where the difference
of the best and the worst tenth would see a fifth of them. Where CLIP confuses two pairs of words
(to many a CLIP long hair is dark skin), the diffusion prior is asked about the one that CLIP sees
less clearly: which words explain the picture? Then all directions are turned away from each other,
as little as can be, and those least that CLIP confuses least. So some pairs are always there
(--apart); other words are turned away from them, unless they are mostly the same.
The directions pc0, pc1, ... are the principal components of the codes (GANSpace, arXiv:2004.02546),
found without words. render.py moves heads along them by standard deviations, in the source and in
every run from it.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.cli import exit_codes, read_options
from harness.run_folder import check_folder, check_source, make_folder
from harness.store import check_replaced


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
    diffusion: str = "checkpoints/puppets/diffusion"
    """Prior that is asked where CLIP confuses words: folder, file or hub id; empty: none."""
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
    check_replaced(cfg.out, "directions")
    check_source("--ckpt", cfg.ckpt)
    if pairs:
        check_source("--clip", cfg.clip)
    if pairs and cfg.diffusion:
        check_source("--diffusion", cfg.diffusion)


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
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from files.generators import load_generator
from harness.devices import pick_device
from harness.run_folder import locate
from models.diffusion import DiffusionPrior, read_vocabulary
from models.features import ClipFeatures
from models.fingerprints import fingerprint_mapping
from models.generator import Generator
from models.noise import noise_errors
from models.prompts import unknown_words
from subjects import Codes, draw_codes, save_directions, seed_to_ws, warn_of_puppets

CODES = 10_000  # Of which the principal components are taken.
CONFUSED = 0.8  # Correlation of two pairs of words from which on CLIP takes one for the other.
BATCH = 8  # Heads that are seen at once.
TIMES, LEVELS = 8, (0.15, 0.98)  # Noise levels at which it is, as fractions.
MOSTLY = 0.5  # Length that others leave of a direction; below, it is mostly theirs.
SAME = 1e-4  # Distance of two sentences in CLIP's space: to it they are one.
DOUBLE = 1e-3  # Added to correlations of 1, so that they can be inverted.


def main(cfg: Config) -> None:
    """Find directions and write them.

    Raises:
        ValueError: an option cannot be used.
    """
    check(cfg)
    device = pick_device(cfg.device)
    G = load_generator(locate(cfg.ckpt), device)
    if not G.z_dim:
        raise ValueError(f"--ckpt {cfg.ckpt} shows one head alone: it has no directions")
    codes = Codes.measure(G, CODES, cfg.seed)
    directions: dict[str, Tensor] = {}
    if pairs := parse_words(cfg.words + cfg.apart):
        for flag in ("clip", "diffusion"):
            if getattr(cfg, flag) == getattr(Config, flag):
                warn_of_puppets(f"--{flag}", G)
        warn_of_words(pairs, cfg)
        clip = ClipFeatures.from_pretrained(locate(cfg.clip), device)
        directions |= from_words(G, clip, pairs, codes.wide(), cfg)
    directions |= from_codes(codes, cfg)
    make_folder(cfg.out.absolute().parent)
    save_directions(directions, cfg.out, mapping_weights=fingerprint_mapping(G))
    print(f"{cfg.out} has {', '.join(directions)}")


def warn_of_words(pairs: dict[str, tuple[str, str]], cfg: Config) -> None:
    """Warn of words that are new to a prior which declares the ones it knows."""
    vocabulary = read_vocabulary(Path(locate(cfg.diffusion))) if cfg.diffusion else None
    for name, phrases in pairs.items() if vocabulary else ():
        sentences = " ".join(cfg.template.format(phrase) for phrase in phrases)
        if unknown := unknown_words(sentences, vocabulary["words"]):
            print(
                f"warning: the prior has never seen the words {', '.join(unknown)}; "
                f"{name} may mean something else",
                file=sys.stderr,
            )


def from_codes(codes: Codes, cfg: Config) -> dict[str, Tensor]:
    """Return the principal components of w as directions pc0, pc1, ... [w_dim], widest first."""
    axes = codes.axes[: cfg.components]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * largest.sign()  # Else the sign would be the library's.
    return {f"pc{k}": axis for k, axis in enumerate(axes)}


@torch.no_grad()
def from_words(
    G: Generator,
    clip: ClipFeatures,
    pairs: dict[str, tuple[str, str]],
    codes: Codes,
    cfg: Config,
) -> dict[str, Tensor]:
    """Return directions [w_dim] towards heads that look like words, away from those of others.

    Args:
        G: The generator.
        clip: CLIP, which ranks the heads.
        pairs: Two phrases by the name of their direction.
        codes: How the generator's codes vary, along their wide axes.
        cfg: How many heads, the sentence around the words, and the prior.

    Raises:
        ValueError: two phrases of a pair are the same to CLIP.
    """
    asks = {}
    for name, phrases in pairs.items():
        these, those = clip.text([cfg.template.format(phrase) for phrase in phrases])  # [D] each.
        asks[name] = these - those
        if asks[name].norm() < SAME:
            raise ValueError(f"--words {name}: {' and '.join(phrases)} are the same to this CLIP")
    w, c = draw_codes(G, cfg.samples, cfg.seed), draw_cameras(G, cfg)
    x = codes.deviations(w)[:, : max(1, cfg.samples // 20)]  # [N, K]; more would be noise.
    images = torch.cat([clip.images(image) for image in see(G, w, c)])  # [N, D]
    scores = {name: without_cameras(images @ ask, c) for name, ask in asks.items()}
    # Those that others are told apart from, clearest first; then the others.
    always = [name for name in parse_words(cfg.apart) if name in pairs] or list(pairs)
    ways: dict[str, Tensor] = {}
    for name in sorted(always, key=lambda name: -scores[name].std()):
        known = torch.stack([scores[x] for x in (*ways, name)])
        alike = torch.corrcoef(known).reshape(len(known), -1)[-1, :-1].abs()
        if not (alike > CONFUSED).any():
            ways[name] = way(x, scores[name])
        elif cfg.diffusion:
            ways[name] = way(x, ask_prior(G, w, c, pairs[name], cfg))
        else:  # What the clearer ones do not tell.
            told = known[:-1].T
            ways[name] = way(x, scores[name] - told @ least_squares(told, scores[name]))
    turned = apart(ways, own_shares({name: scores[name] for name in ways}))
    firmly = dict(turned)
    for name in [name for name in pairs if name not in firmly]:
        # One of them under another name, or what CLIP sees beyond them.
        same = [firmly[other] for other in firmly if pairs[other] == pairs[name]]
        turned[name] = same[0] if same else away(name, way(x, scores[name]), firmly)
    axes = codes.axes[: x.shape[1]]
    return {name: in_deviations(turned[name].to(axes) @ axes, w) for name in pairs}


def draw_cameras(G: Generator, cfg: Config) -> Tensor:
    """Return the cameras [N, 25] that heads are seen from."""
    torch.manual_seed(cfg.seed)
    return G.cameras.sample(cfg.samples).to(next(iter(G.parameters())).device)


def see(G: Generator, w: Tensor, c: Tensor, words: str = "") -> Iterator[Tensor]:
    """Yield pictures [B, 3, R, R] of codes w [N, w_dim] from their cameras, some at a time."""
    layers = seed_to_ws(G, 0).shape[1]
    with tqdm(total=len(w), desc=words, unit="head") as bar:
        for some, own in zip(w.split(BATCH), c.split(BATCH), strict=True):
            ws = some[:, None].expand(-1, layers, -1)
            yield G.synthesis(ws, own)["image"].clamp(-1, 1)
            bar.update(len(some))


def ask_prior(G: Generator, w: Tensor, c: Tensor, phrases: tuple[str, str], cfg: Config) -> Tensor:
    """Return how much better the prior explains heads by these words than by those, [N].

    See `noise_errors`. Each noise level counts alike, whatever its errors are.

    Args:
        G: The generator.
        w: Codes of the heads, [N, w_dim].
        c: Their cameras, [N, 25].
        phrases: These words and those.
        cfg: The prior, the sentence around the words, and the seed of the noise.
    """
    prior = DiffusionPrior.from_pretrained(locate(cfg.diffusion), None, None, device=w.device)
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(TIMES, *prior.latent_shape, generator=generator).to(w)
    times = (torch.linspace(*LEVELS, TIMES) * (len(prior.alphas_cumprod) - 1)).long().to(w.device)
    conditions = [prior.condition(cfg.template.format(phrase)) for phrase in phrases]
    size, differences = (prior.image_size,) * 2, []
    for images in see(G, w, c, phrases[0]):
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
        latents = prior.encode_images(images)
        these, those = (noise_errors(prior, latents, x, times, noise) for x in conditions)
        differences.append(those - these)  # [TIMES, B]
    levels = [without_cameras(level, c) for level in torch.cat(differences, dim=1)]
    return torch.stack([level / level.std() for level in levels]).sum(0)


def way(x: Tensor, scores: Tensor) -> Tensor:
    """Return how much scores [N] change with each of x [N, K], by least squares, [K]."""
    ones = torch.ones(len(x), 1, device=x.device)
    known = torch.cat([ones, x], dim=1).cpu().double()
    wanted = scores[:, None].cpu().double()
    return torch.linalg.lstsq(known, wanted, driver="gels").solution[1:, 0]  # Alike every time.


def own_shares(scores: dict[str, Tensor]) -> dict[str, float]:
    """Return for each of some scores [N] which share of its variance the others do not tell."""
    rows = torch.stack(list(scores.values())).cpu().double()
    together = torch.corrcoef(rows).reshape(len(rows), -1)  # One number of one score.
    alike = DOUBLE * torch.eye(len(rows)).to(together)  # Two pairs may be the same.
    shares = 1 / torch.linalg.inv(together + alike).diagonal()
    return dict(zip(scores, shares.tolist(), strict=True))


def apart(ways: dict[str, Tensor], shares: dict[str, float]) -> dict[str, Tensor]:
    """Return directions that are nearest to some, in deviations, and at right angles, [K] each.

    Löwdin's symmetric orthogonalisation, weighted: the larger a direction's share, the less it is
    turned. What the rest tell least is least mixed with them.
    """
    units = F.normalize(torch.stack(list(ways.values())), dim=1)  # [M, K]
    weighted = units * units.new_tensor([shares[name] for name in ways])[:, None]
    left, _, right = torch.linalg.svd(weighted, full_matrices=False)
    return dict(zip(ways, left @ right, strict=True))


def away(name: str, own: Tensor, others: dict[str, Tensor]) -> Tensor:
    """Turn a direction [K] away from others, which are at right angles; all are in deviations.

    What is mostly theirs stays as it is, with a warning: it may mean the same.
    """
    unit = F.normalize(own, dim=0)
    left = unit - sum((unit @ other) * other for other in others.values())
    if left.norm() > MOSTLY:
        return F.normalize(left, dim=0)
    print(f"warning: {name} is mostly what {', '.join(others)} say, and stays so", file=sys.stderr)
    return unit


def without_cameras(scores: Tensor, c: Tensor) -> Tensor:
    """Return scores [N] less what the cameras c [N, 25] tell of them, by least squares."""
    position = c[:, 3:12:4]  # Of the camera, [N, 3]; none without cameras.
    ones = torch.ones(len(scores), 1, device=scores.device)
    known = torch.cat([ones, position, position.square()], dim=1)
    return scores - known @ least_squares(known, scores)


def least_squares(known: Tensor, wanted: Tensor) -> Tensor:
    """Return the shares [K] of known columns [N, K] that come nearest to the wanted one, [N].

    Of equally near ones the smallest, alike every time: torch's own choice, gelsy, is not.
    """
    columns = known.cpu().double(), wanted[:, None].cpu().double()
    return torch.linalg.lstsq(*columns, driver="gelsd").solution[:, 0].to(wanted)


def in_deviations(direction: Tensor, w: Tensor) -> Tensor:
    """Scale a direction [w_dim] so that codes w [N, w_dim] have deviation one along it."""
    unit = torch.nn.functional.normalize(direction, dim=0)
    return unit * ((w - w.mean(0)) @ unit).std()


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
