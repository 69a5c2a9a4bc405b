"""Who is shown: heads of seeds or of photos, by a generator, a run or a mixture of runs; edits.

A person is a style code, and what tuning on a photo added to weights. Every generator adapted from
the one that it was found in can show it.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from files.generators import load_generator, sort_header
from harness.run_folder import AVATAR, locate, read_settings
from harness.store import write_bytes
from models.fingerprints import fingerprint_generator, fingerprint_mapping
from models.generator import Generator, Outputs

PUPPETS = 128  # Pixels of the pictures of the generators that come with the repository.
NARROW = 0.1  # Axes of codes below this share of the widest say nothing of heads.
LATENTS, DIRECTIONS = "latents-safetensors", "directions-safetensors"
# What a part of a mixture takes from a run: coarse layers make shapes, all else colours.
COARSE = r"synthesis\.b(4|8|16|32)\."
PARTS = {"shape": rf".*{COARSE}", "colour": rf"(?!.*{COARSE})", "all": ""}


@dataclass(frozen=True)
class Person:
    """Somebody whom any generator of one source can show."""

    name: str
    ws: Tensor  # Style codes, [1, num_ws, w_dim].
    seed: int = 0  # Fixes the jitter of the ray samples: frames with their own would flicker.
    c: Tensor | None = None  # The camera [1, 25] of the photo, if there is one.
    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    """What tuning on a photo added to the source's weights, by name."""


@dataclass(frozen=True)
class Subject:
    """One sample of a generator, which looks the same whenever it is seen."""

    G: Generator
    ws: Tensor  # [1, num_ws, w_dim].
    planes: Tensor | None = None  # Own or cached planes; None: those of ws.
    seed: int = 0  # See `Person`.

    @torch.no_grad()
    def see(self, c: Tensor, **options: Any) -> Outputs:
        """Render from K cameras c [K, 25]; options as in `G.synthesis`.

        Returns:
            What `G.synthesis` does: image [K, 3, R, R] in [-1, 1], image_depth, ...
        """
        torch.manual_seed(self.seed)
        return self.G.synthesis(self.ws, c[None].to(self.ws.device), planes=self.planes, **options)

    @torch.no_grad()
    def settled(self) -> Subject:
        """Return the same with its planes made, once for all cameras, if the generator has any."""
        planes = self.G.planes(self.ws) if "planes" in self.G.gives else None
        return replace(self, planes=planes)


def seed_to_z(seed: int, z_dim: int) -> Tensor:
    """Return the latent code [1, z_dim] that EG3D's scripts draw for a seed."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, z_dim)).float()


@torch.no_grad()
def seed_to_ws(G: Generator, seed: int, trunc: float = 1.0) -> Tensor:
    """Return the style codes [1, num_ws, w_dim] of a seed, conditioned on the frontal camera."""
    device = next(iter(G.parameters())).device
    z, c = seed_to_z(seed, G.z_dim).to(device), G.cameras.frontal().to(device)
    return G.mapping(z, c, truncation_psi=trunc)


@dataclass(frozen=True)
class Codes:
    """How the style codes w of a generator's heads vary."""

    mean: Tensor  # [w_dim].
    axes: Tensor  # Principal components, widest first, each a standard deviation long, [K, w_dim].

    @classmethod
    def measure(cls, G: Generator, count: int = 4000, seed: int = 0) -> Codes:
        """Measure random heads.

        Raises:
            ValueError: the generator shows one head alone.
        """
        w = draw_codes(G, count, seed)
        mean = w.mean(0)
        centred = (w - mean).cpu().double() / count**0.5  # In float32 it differs by chance.
        _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
        return cls(mean, (spread[:, None] * axes).to(w))

    def wide(self) -> Codes:
        """Return the same with its wide axes alone."""
        spread = self.axes.norm(dim=1)
        return Codes(self.mean, self.axes[spread > NARROW * spread[0]])

    def deviations(self, ws: Tensor) -> Tensor:
        """Return how far codes [..., w_dim] are from the mean, in deviations, [..., K]."""
        return (ws - self.mean) @ (self.axes / self.axes.square().sum(1, keepdim=True)).T

    def draw_near(self, ws: Tensor, before: Tensor) -> Tensor:
        """Pull codes [..., w_dim] towards the mean until they are as near as they were before.

        Or as near as heads are in the mean, sqrt(K) deviations, if they were nearer: so an edit of
        a mean head is not undone. Only along the axes; what is across them stays.
        """
        moved = self.deviations(ws)
        near = self.deviations(before).norm(dim=-1, keepdim=True).clamp_min(len(self.axes) ** 0.5)
        share = (near / moved.norm(dim=-1, keepdim=True)).clamp_max(1)
        return ws + (share - 1) * moved @ self.axes


@torch.no_grad()
def draw_codes(G: Generator, count: int, seed: int, trunc: float = 1.0) -> Tensor:
    """Return style codes w [count, w_dim] of random heads, seen from the front.

    Raises:
        ValueError: the generator shows one head alone.
    """
    if not G.z_dim:
        raise ValueError("this generator shows one head alone: there are no others to draw")
    device = next(iter(G.parameters())).device
    z = torch.randn(count, G.z_dim, generator=torch.Generator().manual_seed(seed))
    parts = [
        G.mapping(part.to(device), G.cameras.frontal(len(part)).to(device), trunc)[:, 0]
        for part in z.split(1000)
    ]
    return torch.cat(parts)


def wide_codes(G: Generator) -> Codes | None:
    """Return how a generator's codes vary along their wide axes; None if it shows one head."""
    return Codes.measure(G).wide() if G.z_dim else None


def seed_to_person(G: Generator, seed: int, trunc: float = 1.0) -> Person:
    """Return whom a generator, and all that share its mapping, see in a seed."""
    return Person(f"seed{seed:04d}", seed_to_ws(G, seed, trunc), seed)


def seed_to_subject(G: Generator, seed: int, trunc: float = 1.0) -> Subject:
    """Return what a generator makes of a seed."""
    return show(G, seed_to_person(G, seed, trunc))


def show(G: Generator, person: Person) -> Subject:
    """Return what a generator makes of a person, its weights tuned where they have the offsets'."""
    return Subject(add_weights(G, person.offsets), person.ws, seed=person.seed)


@torch.no_grad()
def add_weights(G: Generator, offsets: Mapping[str, Tensor], scale: float = 1.0) -> Generator:
    """Return a copy of a generator with something added to weights of the same name and shape."""
    known = {
        name: weight
        for name, weight in G.named_parameters()
        if name in offsets and offsets[name].shape == weight.shape
    }
    if not known:
        return G
    G = copy.deepcopy(G)
    for name in known:
        weight = G.get_parameter(name)
        weight.add_(offsets[name].to(weight), alpha=scale)
    return G


def blend(people: Sequence[Person], shares: Sequence[float]) -> Person:
    """Return the weighted sum of people, their tuning included."""
    pairs = list(zip(people, shares, strict=True))
    offsets: dict[str, Tensor] = {}
    for person, share in pairs:
        for name, value in person.offsets.items():
            offsets[name] = offsets.get(name, 0) + share * value
    ws = sum(share * person.ws for person, share in pairs)
    return Person("blend", ws, people[0].seed, offsets=offsets)


# Runs and mixtures.


def load_run(
    ckpt: str | Path, device: str | torch.device = "cpu"
) -> tuple[Generator, Generator | None, dict]:
    """Load what a run made and started from.

    Args:
        ckpt: Run folder, or a generator file or a folder of avatar.py, which have no source and no
            settings.

    Returns:
        The adapted generator; the source generator, None for a file, and with a warning where it
        is gone or no longer what the run started from; the run's settings.

    Raises:
        ValueError: see `load_generator`; or config.json cannot be read.
    """
    ckpt = locate(str(ckpt))
    G = load_generator(ckpt, device)
    if not Path(ckpt).is_dir() or (Path(ckpt) / AVATAR).is_file():
        return G, None, {}
    settings = read_settings(Path(ckpt))
    try:
        G_src = load_generator(locate(settings["generator"]), device)
        if fingerprint_generator(G_src) != settings.get("generator_weights"):
            raise ValueError(f"{settings['generator']} has changed since")
    except ValueError as error:
        print(f"warning: no source generator for {ckpt} ({error})", file=sys.stderr)
        return G, None, settings
    return G, G_src, settings


def load_mixture(
    mix: Sequence[tuple[str, float, str]], device: str | torch.device = "cpu"
) -> tuple[Generator, Generator]:
    """Add what several runs changed of one source to it, each by its share.

    Args:
        mix: A run folder, its share, and what it gives, a key of PARTS, of each.

    Returns:
        The mixture and the source.

    Raises:
        ValueError: a run has no source, or they have different ones.
    """
    G_mix = first = first_print = None
    for run, share, part in mix:
        G, G_src, settings = load_run(run, device)
        if G_src is None:
            raise ValueError(f"--mix {run} is no run of train.py, or its source is gone")
        if first is None:
            G_mix, first, first_print = G_src, G_src, settings["generator_weights"]
        if settings["generator_weights"] != first_print:
            raise ValueError(f"--mix {run} started from another generator than {mix[0][0]}")
        source = dict(G_src.named_parameters())
        changed = {
            name: weight - source[name]
            for name, weight in G.named_parameters()
            if re.match(PARTS[part], name)
        }
        G_mix = add_weights(G_mix, changed, share)
    return G_mix, first


# Files of people and of directions.


def save_person(person: Person, path: Path, **notes: str) -> None:
    """Write a person so that `load_person` knows it; notes go to the file's header."""
    tensors = {"ws": person.ws} | ({} if person.c is None else {"c": person.c})
    tensors |= {f"offsets.{name}": offset.half() for name, offset in person.offsets.items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_bytes(path, sort_header(safetensors.torch.save(tensors, {"format": LATENTS} | notes)))


def load_person(path: Path, G: Generator) -> Person:
    """Read a person that invert.py found.

    Args:
        path: The file; its name becomes the person's.
        G: A generator that is to show it.

    Raises:
        ValueError: there is no such file, or it fits another generator.
    """
    if not G.z_dim:
        raise ValueError(f"--latents {path}: this generator shows one head alone, and nobody else")
    tensors, header = read_tensors(path, LATENTS)
    device = next(iter(G.parameters())).device
    tensors = {name: x.float().to(device) for name, x in tensors.items()}
    expected = list(seed_to_ws(G, 0).shape)
    found = list(tensors["ws"].shape) if "ws" in tensors else None
    if found != expected:
        raise ValueError(
            f"--latents {path} has codes {found}, this generator {expected}: "
            "invert.py makes others with --ckpt and the generator that the run started from"
        )
    if "c" in tensors and tensors["c"].shape != G.cameras.frontal().shape:
        raise ValueError(f"--latents {path} is damaged: its camera is no label")
    offsets = {n.removeprefix("offsets."): x for n, x in tensors.items() if n.startswith("offsets")}
    return Person(path.stem, tensors["ws"], 0, tensors.get("c"), offsets)


def warn_of_others(paths: Sequence[Path], G: Generator) -> None:
    """Warn of people and directions of another generator, whose codes mean something else here.

    Raises:
        ValueError: a file cannot be read.
    """
    for path in paths:
        known = header_of(path).get("mapping_weights")
        if known and known != fingerprint_mapping(G):
            print(f"warning: {path} was made with another generator", file=sys.stderr)


def warn_of_puppets(flag: str, G: Generator) -> None:
    """Warn that a network is the puppets' own, if the generator is not: it was not named."""
    if G.img_resolution > PUPPETS:
        print(
            f"warning: {flag} is the one of the puppets, and knows nothing of this generator",
            file=sys.stderr,
        )


def header_of(path: Path) -> dict[str, str]:
    """Return the notes in the header of one of our .safetensors.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def save_directions(directions: Mapping[str, Tensor], path: Path, **notes: str) -> None:
    """Write directions of ws, each [w_dim] or [num_ws, w_dim]."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in directions.items()}
    write_bytes(path, sort_header(safetensors.torch.save(tensors, {"format": DIRECTIONS} | notes)))


def edit(
    people: Sequence[Person], path: Path, edits: Mapping[str, float], codes: Codes | None
) -> list[Person]:
    """Move people along directions of a file, each by a number of its standard deviations.

    Then draw them near again: heads farther from the mean than a generator has seen are not only
    what was asked for.

    Args:
        people: Whom to move.
        path: The file.
        edits: How far, by direction.
        codes: What `wide_codes` says of the generator.

    Raises:
        ValueError: the file has no such direction, or is of another generator.
    """
    directions, _ = read_tensors(path, DIRECTIONS)
    shape = people[0].ws.shape[1:]  # [num_ws, w_dim]
    total = torch.zeros(shape, device=people[0].ws.device)
    for name, amount in edits.items():
        if name not in directions:
            raise ValueError(f"--edit {name}: {path} has {', '.join(directions)}")
        if directions[name].shape not in (shape, shape[1:]):
            raise ValueError(
                f"--directions {path} fits another generator: directions.py makes others with "
                "--ckpt and this run"
            )
        total = total + amount * directions[name].to(total)
    moved = [person.ws + total for person in people]
    if codes is not None:
        moved = [codes.draw_near(ws, x.ws) for ws, x in zip(moved, people, strict=True)]
    return [replace(person, ws=ws) for person, ws in zip(people, moved, strict=True)]


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read one of our .safetensors.

    Args:
        path: The file.
        kind: The format that its header must name.

    Returns:
        Its tensors and its header.

    Raises:
        ValueError: it is missing, damaged, not finite or of another kind; one line.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if header.get("format") != kind:
        raise ValueError(f"{path} holds no {kind.partition('-')[0]}")
    if not all(x.isfinite().all() for x in tensors.values()):
        raise ValueError(f"{path} is damaged: its numbers are not finite")
    return tensors, header
