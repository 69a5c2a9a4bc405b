"""Find a photo's person in a generator: style codes, the camera and, with --tune, tuned weights.

    python invert.py --image me.jpg --out me.safetensors
    python invert.py --image me.jpg --out me.safetensors --tune 200
    python render.py --ckpt runs/a-clown --latents me.safetensors --orbit 120

Codes and camera are read off the photo by a linear probe, which is fitted to the generator's own
pictures, so no face model is needed. Then they are optimised together: the code first in W, then
for each layer (W+). --tune goes on with the weights (PTI, arXiv:2106.05744).
Writes --out, which render.py and others take as --latents, and beside it a picture: the photo as
it was cropped, its inversion, and three views. The same command goes on where it was stopped.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from harness.cli import exit_codes, read_options
from harness.pictures import is_ours, read_picture, upright_size
from harness.run_folder import check_folder, check_source, make_folder
from harness.store import check_replaced

PHOTO_SIZE = 2048  # Photos are shrunk to this; the head may be a small part of them.
GOOD_DB = 20.0  # PSNR of the head below which a photo and its inversion look apart.


@dataclass
class Config:
    """Options of invert.py."""

    image: Path  # The photo; its largest square is taken.
    out: Path  # The file to write, .safetensors; one that exists is replaced.
    ckpt: str = "checkpoints/puppets/generator.safetensors"
    """Generator: .safetensors, official .pkl, hub id user/repo/file, URL."""
    mask: Path | None = None
    """Picture of the photo's size, white or opaque where the person is; None: it is guessed."""
    align: bool = True  # Whether to look for the head in the photo, and crop it as in training.
    steps: int = 120  # Steps that optimise code and camera.
    tune: int = 0  # Steps that tune weights after that; 0: none.
    heads: int = 300  # Number of the generator's own pictures, by which it learns to read photos.
    features: str = "checkpoints/puppets/dino"  # Frozen ViT that compares: folder or hub id.
    seed: int = 0  # Fixes all random draws.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


def check(cfg: Config) -> None:
    """Refuse options that cannot be used.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    for flag, value, least in (
        ("--steps", cfg.steps, 1),
        ("--tune", cfg.tune, 0),
        ("--heads", cfg.heads, 50),
    ):
        if value < least:
            raise ValueError(f"{flag} must be at least {least}, got {value}")
    if cfg.out.suffix != ".safetensors" or cfg.out.is_dir():
        raise ValueError(f"--out must be a file that ends in .safetensors, got {cfg.out}")
    check_folder(cfg.out.absolute().parent)
    strip = cfg.out.with_suffix(".png")
    if strip.exists() and not is_ours(strip):
        raise ValueError(f"--out: {strip} was not written by invert.py: move it away")
    for path in filter(None, (cfg.image, cfg.mask)):
        if Path(path).resolve() in (strip.resolve(), cfg.out.resolve()):
            raise ValueError(f"--out {cfg.out} would replace {path}: choose another name")
    check_replaced(cfg.out, "latents")
    check_source("--ckpt", cfg.ckpt)
    check_source("--features", cfg.features)
    read_photo(cfg)


def read_photo(cfg: Config) -> tuple[Image.Image, Image.Image | None]:
    """Return the photo and its mask, if there is one; squares.

    Raises:
        ValueError: a file is missing or no picture, or the mask does not fit the photo.
    """
    photo = read_picture(cfg.image, PHOTO_SIZE)
    if cfg.mask is None:
        return photo, None
    mask = read_picture(cfg.mask, PHOTO_SIZE, alpha=True)
    shapes = [upright_size(path) for path in (cfg.image, cfg.mask)]
    (w, h), (mask_w, mask_h) = shapes
    if abs(w * mask_h - h * mask_w) > 0.02 * w * mask_h:
        raise ValueError(
            f"--mask has {mask_w} x {mask_h} pixels, --image {w} x {h}: their shapes must be alike"
        )
    if mask.convert("L").getextrema()[1] < 128:
        raise ValueError(f"--mask {cfg.mask} is white nowhere, so there is no person")
    return photo, mask


if __name__ == "__main__":
    CFG = read_options(Config, __doc__, check)

import copy
import re
import shlex
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from files.generators import load_generator
from harness.devices import flush_denormals, keep_freed_memory, pick_device
from harness.pictures import image_grid, save_image, to_image
from harness.run_folder import locate
from harness.store import atomic_write, checksum
from models.features import TokenFeatures
from models.fingerprints import as_bytes, fingerprint_generator, fingerprint_mapping
from models.generator import Generator, Outputs
from render import sides, views
from subjects import Codes, Person, save_person, seed_to_ws, show, warn_of_puppets

# The probe: a ridge regression on the ViT's tokens, averaged to so many cells a side.
CELLS, RIDGE = 8, 0.03
ZOOMS, SHIFTS = 0.4, 0.15  # Of the crops it learns: log scale, places as shares of the size.
# A photo is not cropped if it reads smaller changes: the probe errs by as much. Else it is until
# they are small, or so many times.
SMALLEST, LARGEST = 0.1, 2.0  # Sides of a crop, as shares of the photo.
ALIGNED, STILL, LOOKS = (0.15, 0.06, 0.06), 0.03, 5
# Steps and rates.
IN_W = 0.4  # Share of the steps in which all layers have one code.
CODE_RATE, LAYER_RATE, TUNE_RATE = 0.08, 0.02, 2e-3
CAMERA_EVERY, CAMERA_UNTIL, TURN, MOST_TURN = 4, 0.8, 0.02, 0.1  # Steps; a share; [rad].
STARTS, TRIAL = (0.0, -0.15, 0.15), 10  # Pitches beside the probe's [rad], and steps from each.
# Weights of the losses beside the distance of the pictures.
TOKENS, TYPICAL, ALIKE, ELSEWHERE = 0.3, 0.01, 0.02, 1.0
FOREIGN = 0.1  # Distance of a photo's background to the generator's from which on it is masked.
TUNED = re.compile(r"((backbone\.)?synthesis|superresolution)\..*\.weight")
SAVE_SECONDS = 20


class Photo(NamedTuple):
    """What is compared with."""

    image: Tensor  # As it was cropped, [1, 3, R, R] in [-1, 1].
    mask: Tensor | None = None  # Where the person is, [1, 1, R, R] in [0, 1], if it is known.
    cropped: bool = False  # Whether the crop was found, and so is not quite right.


class Reading(NamedTuple):
    """What a probe reads off a picture."""

    w: Tensor  # [w_dim]
    angles: Tensor  # Yaw and pitch of the camera, [2].
    crop: Tensor  # Log scale of the head, and how far it is to the right and below, [3].


class Probe(NamedTuple):
    """A linear reader of pictures; see `fit_probe`."""

    vit: TokenFeatures
    mean: Tensor  # Of features, [F].
    weights: Tensor  # [F, 6 + w_dim]
    bias: Tensor  # [6 + w_dim]

    def read(self, image: Tensor) -> Reading:
        """Read a picture [1, 3, H, W] in [-1, 1]."""
        found = ((look(self.vit, image) - self.mean) @ self.weights + self.bias)[0]
        place = F.normalize(found[:3], dim=0)  # Of the camera, about the origin.
        angles = torch.stack([torch.atan2(place[0], place[2]), -torch.pi / 2 * place[1]])
        return Reading(found[6:], angles.cpu(), found[3:6].cpu())


def main(cfg: Config) -> None:
    """Invert a photo and write what was found.

    Raises:
        ValueError: an option cannot be used.
    """
    check(cfg)
    flush_denormals()
    keep_freed_memory()
    device, begun = pick_device(cfg.device), time.time()
    G = load_generator(locate(cfg.ckpt), device)
    if not G.z_dim:
        raise ValueError(f"--ckpt {cfg.ckpt} shows one head alone: nobody can be found in it")
    if cfg.features == Config.features:
        warn_of_puppets("--features", G)
    vit = TokenFeatures.from_pretrained(locate(cfg.features), device)
    make_folder(cfg.out.absolute().parent)
    probe = fit_probe(G, vit, cfg)
    photo, reading = align(G, probe, *read_photo(cfg), cfg)
    person, quality = optimise(G, vit, photo, reading, cfg)
    subject = show(G, person)
    seen = subject.see(person.c)["image"]
    pictures = [photo.image, seen, views(subject, sides(G))["image"]]
    notes = {"generator_weights": fingerprint_generator(G), "psnr": f"{quality:.2f}"}
    notes["mapping_weights"] = fingerprint_mapping(G)
    save_image(image_grid([torch.cat(pictures)]), cfg.out.with_suffix(".png"))
    save_person(person, cfg.out, **notes)
    state_path(cfg).unlink(missing_ok=True)
    if quality < GOOD_DB:
        print(
            f"warning: the inversion does not look like {cfg.image}: perhaps it shows nothing "
            "that this generator knows; or its crop failed (look at the first picture of "
            f"{cfg.out.with_suffix('.png')}): crop it yourself and give --no-align",
            file=sys.stderr,
        )
    seconds, name = time.time() - begun, shlex.quote(str(cfg.out))
    what = "head" if "mask" in G.gives or cfg.mask else "picture"
    print(f"{cfg.out} written: {quality:.1f} dB on the {what} after {seconds:.0f} seconds")
    print(f"  render  python render.py --ckpt RUN --latents {name}")


# Where to begin: a probe reads code, camera and crop.


@torch.no_grad()
def look(vit: TokenFeatures, images: Tensor) -> Tensor:
    """Return what is where in images [B, 3, H, W], [B, F]."""
    tokens = vit.tokens(images.clamp(-1, 1)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(tokens, CELLS).flatten(1)


@torch.no_grad()
def fit_probe(G: Generator, vit: TokenFeatures, cfg: Config) -> Probe:
    """Fit a ridge regression from a generator's own pictures to what made them.

    With `cfg.align` half of them are seen by cameras with other intrinsics, larger and elsewhere,
    so that it can tell how a photo is to be cropped.
    """
    device = next(iter(G.parameters())).device
    generator = torch.Generator().manual_seed(cfg.seed)
    z = torch.randn(cfg.heads, G.z_dim, generator=generator).to(device)
    crops = 2 * torch.rand(cfg.heads, 3, generator=generator) - 1
    crops = crops * torch.tensor([ZOOMS, SHIFTS, SHIFTS])
    crops[:: 2 if cfg.align else 1] = 0
    torch.manual_seed(cfg.seed)
    c, front = G.cameras.sample(cfg.heads), G.cameras.frontal().to(device)
    seen, targets = [], []
    for i in tqdm(range(cfg.heads), desc="probe", unit="head"):
        ws, place = G.mapping(z[i : i + 1], front), torch.zeros(3)
        if c.shape[1]:
            place = F.normalize(c[i, 3:12:4], dim=0)
        seen.append(look(vit, G.synthesis(ws, move(c[i : i + 1], crops[i]).to(device))["image"]))
        targets.append(torch.cat([place.to(device), crops[i].to(device), ws[0, 0]]))
    x, y = torch.cat(seen), torch.stack(targets)
    mean, bias = x.mean(0), y.mean(0)
    kernel = (x - mean) @ (x - mean).T  # [N, N]
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(x), device=device)
    weights = (x - mean).T @ torch.linalg.solve(kernel + ridge, y - bias)
    return Probe(vit, mean, weights, bias)


def move(c: Tensor, crop: Tensor) -> Tensor:
    """Return labels [1, 25] of cameras that see the head larger and elsewhere (see `Reading`)."""
    if not c.shape[1]:  # Pictures without cameras are never cropped.
        return c
    c, scale = c.clone(), crop[0].exp()
    c[:, [16, 20]] *= scale
    c[:, [18, 21]] += crop[1:]
    return c


def align(
    G: Generator, probe: Probe, picture: Image.Image, mask: Image.Image | None, cfg: Config
) -> tuple[Photo, Reading]:
    """Crop a picture as the probe says, until the head is where the generator has it.

    Args:
        G: The generator, whose pictures have the size of the result.
        probe: Reads crops.
        picture: The whole photo, a square.
        mask: White where the person is, likewise, or None.
        cfg: Whether to crop at all.

    Returns:
        The photo as it is compared with, and what the probe reads off it.
    """
    device = probe.mean.device
    middle, side = torch.tensor([0.5, 0.5]), 1.0  # Of the crop, as shares of the picture.

    def cut(whole: Image.Image) -> Tensor:
        return to_image(cut_out(whole, middle, side, G.img_resolution)).to(device)

    reading = probe.read(cut(picture))
    loose = (reading.crop.abs() > torch.tensor(ALIGNED)).any()
    for _ in range(LOOKS if cfg.align and loose and G.cameras.yaw_range else 0):
        change = reading.crop.clamp(-ZOOMS, ZOOMS)
        if change.abs().max() < STILL:
            break
        middle = middle + side * change[1:]
        side = min(max(side * change[0].exp().item(), SMALLEST), LARGEST)
        reading = probe.read(cut(picture))
    where = None if mask is None else (cut(mask).mean(1, keepdim=True) + 1) / 2
    if where is not None and where.mean() < 1e-3:
        raise ValueError("--mask is white nowhere in the crop that was found: give --no-align")
    return Photo(cut(picture), where, side != 1), reading


def cut_out(picture: Image.Image, middle: Tensor, side: float, size: int) -> Image.Image:
    """Cut a square out of a square picture, whose edge goes on outside, and resize it.

    Args:
        picture: RGB.
        middle: Of the square, right and below, as shares of the picture, [2].
        side: Of the square, likewise.
        size: Height and width of the result.
    """
    low, high = ((middle + sign * side / 2) * picture.width for sign in (-1, 1))
    outside = torch.cat([-low, high - picture.width]).max().item()
    margin = int(max(0.0, outside)) + 1
    wide = np.pad(np.asarray(picture), ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    box = (*(low + margin).tolist(), *(high + margin).tolist())
    return Image.fromarray(wide).resize((size, size), Image.Resampling.BICUBIC, box=box)


# The way to the photo.


@dataclass
class Search:
    """What an inversion has found so far."""

    G: Generator  # A copy, whose weights may be tuned.
    vit: TokenFeatures
    photo: Photo
    tokens: Tensor  # Of the photo, [1, g, g, D].
    mean: Tensor  # Of w, [w_dim]; w = mean + code @ axes with a normal code.
    axes: Tensor  # [w_dim, w_dim], rows.
    code: nn.Parameter  # [w_dim]
    layers: nn.Parameter  # What each layer has of its own, in deviations of w, [num_ws, w_dim].
    view: Tensor  # Yaw and pitch of the camera, and the head's crop (see `Reading`), [5].
    mask: Tensor | None  # See `Photo`; of the generator's own head, where that is needed.
    step: int = 0

    @property
    def ws(self) -> Tensor:
        """Style codes, [1, num_ws, w_dim]."""
        deviation = self.axes.square().sum(0).mean().sqrt()
        return (self.mean + self.code @ self.axes + deviation * self.layers)[None]

    @property
    def c(self) -> Tensor:
        """The camera's label, [1, 25]."""
        return self.label(self.view)

    def label(self, view: Tensor) -> Tensor:
        """Return the label [1, 25] of a view [5]."""
        return move(self.G.cameras.label(*view[:2].split(1)), view[2:]).to(self.mean)

    def see(self, view: Tensor | None = None, planes: Tensor | None = None) -> Outputs:
        """Render what was found, always with the same jitter; from elsewhere, if that is given."""
        torch.manual_seed(0)
        return self.G.synthesis(
            self.ws, self.c if view is None else self.label(view), planes=planes
        )


def begin(G: Generator, vit: TokenFeatures, photo: Photo, reading: Reading, cfg: Config) -> Search:
    """Begin at a reading, or between it and the mean code where that is nearer to the photo."""
    codes = Codes.measure(G, seed=cfg.seed)
    code = torch.linalg.pinv(codes.axes.T, rtol=1e-3) @ (reading.w - codes.mean)
    layers = torch.zeros_like(seed_to_ws(G, 0)[0])
    with torch.no_grad():
        tokens = vit.tokens(photo.image)
    own = nn.Parameter(code), nn.Parameter(layers)
    view = torch.cat([reading.angles, torch.zeros(3)])
    variation = codes.mean, codes.axes
    search = Search(copy.deepcopy(G), vit, photo, tokens, *variation, *own, view, photo.mask)
    losses = {}
    with torch.no_grad():
        for share in (1.0, 0.5, 0.0):
            search.code.copy_(share * code)
            losses[share] = distance(search, search.see()["image"]).item()
        search.code.copy_(min(losses, key=losses.__getitem__) * code)
    return search


def try_starts(
    G: Generator, vit: TokenFeatures, photo: Photo, reading: Reading, cfg: Config
) -> Search:
    """Take some steps from the probe's camera and from others above and below it; keep the best."""
    searches: dict[float, Search] = {}
    for pitch in STARTS if G.cameras.yaw_range else (0.0,):
        search = begin(G, vit, photo, reading, cfg)
        search.view[1] += pitch
        adam = torch.optim.Adam([search.code], lr=CODE_RATE, betas=(0.9, 0.99))
        for step in tqdm(range(TRIAL), desc="starts", unit="step", leave=False):
            if step % 2 == 0:
                turn(search)
            adam.zero_grad(set_to_none=True)
            loss = objective(search, G, step, tuning=False)
            loss.backward()
            adam.step()
        searches[loss.item()] = search
    return searches[min(searches)]


def optimise(
    G: Generator, vit: TokenFeatures, photo: Photo, reading: Reading, cfg: Config
) -> tuple[Person, float]:
    """Optimise code, camera and then weights; go on where a call with the same photo stopped.

    Args:
        G: The generator, which stays as it is.
        vit: Compares.
        photo: What is to be shown.
        reading: Where to begin.
        cfg: How many steps.

    Returns:
        The person, and the PSNR of the head [dB].
    """
    search = try_starts(G, vit, photo, reading, cfg)
    weights = {n: p.requires_grad_() for n, p in search.G.named_parameters() if TUNED.match(n)}
    groups = [
        {"params": [search.code]},
        {"params": [search.layers]},
        {"params": list(weights.values())},
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    path = state_path(cfg)
    learnt = {"code": search.code, "layers": search.layers, **weights}
    key = checksum(repr(cfg).encode(), as_bytes(photo.image), fingerprint_generator(G).encode())
    if path.exists():
        restore(path, key, search, learnt, adam)
    saved = time.time()
    steps = range(search.step, cfg.steps + cfg.tune)
    bar = tqdm(steps, initial=search.step, total=cfg.steps + cfg.tune, unit="step")
    for step in bar:
        rates = rates_at(step, cfg)
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate
        for p, rate in zip((search.code, search.layers), rates, strict=False):
            p.requires_grad_(rate > 0)
        for p in weights.values():
            p.requires_grad_(rates[2] > 0)
        if step % CAMERA_EVERY == 0 and step < CAMERA_UNTIL * cfg.steps:
            turn(search)
        adam.zero_grad(set_to_none=True)
        loss = objective(search, G, step, tuning=rates[2] > 0)
        loss.backward()
        adam.step()
        search.step = step + 1
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if time.time() - saved > SAVE_SECONDS:
            save(path, key, search, learnt, adam)
            saved = time.time()
    with torch.no_grad():
        quality = psnr(search, search.see())
        source = dict(G.named_parameters())
        offsets = {n: p.detach() - source[n] for n, p in weights.items()} if cfg.tune else {}
        return Person(cfg.out.stem, search.ws.detach(), 0, search.c, offsets), quality


def rates_at(step: int, cfg: Config) -> tuple[float, float, float]:
    """Return the learning rates of the code, of the layers' own ones and of the weights."""
    if step >= cfg.steps:
        left = 1 - (step - cfg.steps) / cfg.tune
        return 0.0, 0.0, TUNE_RATE * min(1, 2 * left)
    fade = min(1, 2 * (1 - step / cfg.steps))
    return CODE_RATE * fade, LAYER_RATE * fade * (step >= IN_W * cfg.steps), 0.0


def objective(search: Search, G: Generator, step: int, tuning: bool) -> Tensor:
    """Return what a step makes smaller, [].

    Tuned weights shall draw other views of the person as before: they are compared from a random
    side, before super-resolution (PTI's locality, in space).
    """
    planes = search.G.planes(search.ws) if "planes" in search.G.gives else None
    torch.manual_seed(1000 + step)
    image = search.G.synthesis(search.ws, search.c, planes=planes)["image"]
    loss = distance(search, image)
    if not tuning:
        typical, own = search.code.square().mean(), search.layers.square().mean()
        return loss + TYPICAL * typical + ALIKE * own
    if planes is None:
        return loss
    c = G.cameras.sample(1).to(image.device)
    rays = G.rays(c)
    with torch.no_grad():
        before = G.synthesis(search.ws, c, rays=rays, superresolve=False)
    after = search.G.synthesis(search.ws, c, planes=planes, rays=rays, superresolve=False)
    return loss + ELSEWHERE * sum(
        (after[name] - before[name]).abs().mean() for name in ("image_raw", "mask")
    )


def distance(search: Search, image: Tensor) -> Tensor:
    """Return how far an image is from the photo, in pixels and in the ViT's tokens, []."""
    photo, mask = search.photo.image, search.mask
    share = 1.0
    if mask is not None:
        image, share = torch.lerp(photo, image, mask), mask.mean()
    error = image - photo
    tokens = (search.vit.tokens(image) - search.tokens).square().mean()
    return (error.abs().mean() + 4 * error.square().mean() + TOKENS * tokens) / share


@torch.no_grad()
def turn(search: Search) -> None:
    """Move the camera to where the photo fits best: a robust step of Gauss and Newton.

    Where the crop was found, it moves as well. Also say where the person is, if the photo's
    background is not the generator's.
    """
    if not search.c.shape[1]:
        return
    planes = search.G.planes(search.ws)
    here = search.see(planes=planes)
    if search.photo.mask is None:
        search.mask = own_mask(search.photo.image, here)
    image = here["image"].clamp(-1, 1)
    axes = TURN * torch.eye(5)[: 5 if search.photo.cropped else 2]
    slopes = [
        (search.see(search.view + axis, planes)["image"].clamp(-1, 1) - image).flatten() / TURN
        for axis in axes
    ]
    slope = torch.stack(slopes, 1)  # [3 R^2, 2 or 5]
    error = search.photo.image - image
    trust = 1 / (error.abs() + 0.1) * (1.0 if search.mask is None else search.mask)
    weighted = slope * trust.flatten()[:, None]
    square = weighted.T @ slope
    square = square + 1e-4 * square.trace() * torch.eye(len(axes), device=square.device)
    change = torch.linalg.solve(square, weighted.T @ error.flatten()).cpu()
    search.view[: len(axes)] += 0.7 * change.clamp(-MOST_TURN, MOST_TURN)


def own_mask(photo: Tensor, drawn: Outputs) -> Tensor | None:
    """Return the generator's own foreground, a little wider, or None.

    None where the background is alike too, and so tells the outline of the head.
    """
    image = drawn["image"]
    mask = F.interpolate(drawn["mask"], image.shape[2:], mode="bilinear")
    wide = F.max_pool2d(mask, 5, 1, 2)
    beside = (wide < 0.1).expand_as(image)
    if not beside.any() or (photo - image)[beside].abs().mean() < FOREIGN:
        return None
    return wide


def psnr(search: Search, drawn: Outputs) -> float:
    """Return the PSNR of the head [dB], of the whole picture where no head is told apart."""
    error = (drawn["image"].clamp(-1, 1) - search.photo.image).square().mean(1, keepdim=True)
    where = torch.ones_like(error) if search.photo.mask is None else search.photo.mask
    if "mask" in drawn:
        where = where * (F.interpolate(drawn["mask"], error.shape[2:], mode="bilinear") > 0.5)
    return (10 * torch.log10(4 * where.sum() / (error * where).sum().clamp_min(1e-9))).item()


# An inversion that was stopped.


def state_path(cfg: Config) -> Path:
    """Return the file that an unfinished inversion is kept in."""
    return cfg.out.with_name(f".{cfg.out.stem}.state.pt")


def save(
    path: Path, key: str, search: Search, learnt: dict[str, Tensor], adam: torch.optim.Adam
) -> None:
    """Write all that a resume needs."""
    state = {
        "key": key,
        "step": search.step,
        "view": search.view,
        "mask": search.mask,
        "learnt": {name: x.detach() for name, x in learnt.items()},
        "adam": adam.state_dict(),
    }
    atomic_write(path, lambda file: torch.save(state, file))


def restore(
    path: Path, key: str, search: Search, learnt: dict[str, Tensor], adam: torch.optim.Adam
) -> None:
    """Go on from a state, unless it is of another photo or of other options."""
    state = torch.load(path, weights_only=True, map_location=search.mean.device)
    if state["key"] != key:
        return
    search.step, search.view, search.mask = state["step"], state["view"].cpu(), state["mask"]
    with torch.no_grad():
        for name, x in learnt.items():
            x.copy_(state["learnt"][name])
    adam.load_state_dict(state["adam"])


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
