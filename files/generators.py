"""Generators on disk: our own format, and the way to all others.

A generator file is a .safetensors whose tensors have the official state-dict names and whose header
holds, as JSON, what the constructor needs. Of a run folder this module knows config.json and
generator.safetensors. Generators are also read from official files (files/official.py), and by hub
id or URL (harness/download.py).
"""

import json
import os
import pickle
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from files.official import read_official_pickle, read_saved_file
from harness.download import check_downloaded, fetch
from harness.run_folder import AVATAR
from harness.store import checksum, write_bytes
from models.cameras import LABEL_SIZE
from models.eg3d import TriPlaneGenerator
from models.generator import Generator
from models.limits import is_number
from models.panohead import PanoHeadGenerator
from models.stylegan2 import StyleGAN2Generator
from models.weight_files import kind_of_weights

# What the header of a format holds beside the constructor's arguments.
RENDERED = ("rendering_kwargs", "neural_rendering_resolution", "plane_axes")
FORMATS: dict[str, tuple[type, tuple[str, ...]]] = {
    "eg3d-safetensors": (TriPlaneGenerator, RENDERED),
    "panohead-safetensors": (PanoHeadGenerator, RENDERED),
    "stylegan2-safetensors": (StyleGAN2Generator, ()),
}
TORCH_BEGINS = (b"PK", b"\x80\x02\x8a\x0a")  # Files of torch.save, since and before version 1.6.
# What foreign and damaged files make readers and the constructor raise.
FILE_ERRORS = (
    ArithmeticError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
MAX_RENDER = 4096  # Pixels before super-resolution; a guard against files.


def load_generator(source: str | Path, device: str | torch.device = "cpu") -> Generator:
    """Load a generator: frozen, float32 and in eval mode, whatever precision it is stored in.

    Args:
        source: A .safetensors written by `save_generator`, a run folder, an official .pkl of EG3D,
            PanoHead or StyleGAN2 (nothing in it is executed), a state dict .pth of a released
            network, a whole generator that PTI saved as .pt, a StyleGAN2 of rosinality's as .pt, or
            one of these files by hub id `user/repo/file` or URL. What exists here wins over a hub
            id.
        device: Where to put it.

    Raises:
        ValueError: the file is missing, foreign, damaged or of an unsupported kind; one line.
    """
    path = _find_generator(source)
    try:
        G = _build_generator(*_read_generator(path))
    except FILE_ERRORS as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        if not os.path.exists(source):
            reason += "; delete it to download it again"
        raise ValueError(f"{path} holds no usable generator: {reason}") from error
    return G.eval().requires_grad_(False).to(device)


def save_generator(G: Generator, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a generator so that `load_generator` rebuilds it; equal weights give equal bytes.

    Args:
        G: The generator, which stays as it is.
        path: A .safetensors, usually `<run>/generator.safetensors`.
        dtype: Of the stored weights; float16 halves the file.

    Raises:
        ValueError: a weight is not finite, or too large for `dtype`.
    """
    name, (_, settings) = next(item for item in FORMATS.items() if type(G) is item[1][0])
    header = {key: getattr(G, key) for key in ("init_kwargs", *settings)}
    metadata = {"format": name}
    metadata |= {
        key: json.dumps(value.tolist() if isinstance(value, Tensor) else value)
        for key, value in header.items()
    }
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in G.state_dict().items()}
    _check_finite(tensors)
    metadata["checksum"] = json.dumps(_checksum(metadata, tensors))
    content = sort_header(safetensors.torch.save(tensors, metadata))
    write_bytes(path, content)


def _find_generator(source: str | Path) -> Path:
    """Return the file that holds the weights of a file, run folder, hub id or URL."""
    if not os.path.exists(source):  # False for names too long for the system; Path raises.
        return fetch(str(source))
    source = Path(source)
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(f"{source} is neither a file nor a folder")  # Pipes would be waited for.
    if (source / AVATAR).is_file():
        return source / AVATAR
    for name in ("config.json", "generator.safetensors"):
        if not (source / name).is_file():
            raise ValueError(f"{source}: a folder without {name} is no run to load from")
    return source / "generator.safetensors"


def _build_generator(header: dict, tensors: dict[str, Tensor]) -> Generator:
    """Return the generator of a header as `save_generator` writes it; it takes over the tensors."""
    cls, settings = FORMATS[header["format"]]
    kwargs = dict(header["init_kwargs"])
    if settings:
        kwargs["rendering_kwargs"] = header["rendering_kwargs"]
    with torch.device("meta"):  # Weights would take time and memory, only to be replaced.
        G = cls(**kwargs)
    if G.img_channels != 3:
        raise ValueError(f"img_channels must be 3, got {G.img_channels}")
    if settings:
        _settle_renderer(G, header)
        if "own_ws" in tensors:
            with torch.device("meta"):
                G.keep_one_head(torch.zeros(1, G.backbone.num_ws, G.w_dim), torch.zeros(()))
    if "dataset_label_std" in G.state_dict():  # Which only training adds.
        tensors.setdefault("dataset_label_std", torch.ones(LABEL_SIZE))
    _check_finite(tensors)
    G.load_state_dict(tensors, assign=True)
    return G


def _settle_renderer(G: TriPlaneGenerator, header: dict) -> None:
    """Give a generator with cameras what its header says of rendering.

    Raises:
        ValueError: it cannot be rendered so.
    """
    # The constructor takes others; cameras, losses and pictures do not.
    if G.c_dim != LABEL_SIZE or G.decoder.net[2].weight.shape[0] < 4:
        raise ValueError(
            f"c_dim must be {LABEL_SIZE} and feature_channels at least 3, got "
            f"{G.c_dim} and {G.decoder.net[2].weight.shape[0] - 1}"
        )
    size = header["neural_rendering_resolution"]
    if not (is_number(size) and size == int(size) and 1 <= size <= MAX_RENDER):
        raise ValueError(f"neural_rendering_resolution must be 1 to {MAX_RENDER}, got {size!r}")
    axes = header["plane_axes"]
    axes = torch.tensor(axes if isinstance(axes, list | tuple) else [], dtype=torch.float32)
    if axes.shape != (3, 3, 3) or not (axes.isfinite().all() and axes.det().abs().min() > 1e-6):
        raise ValueError("plane_axes must be three 3 x 3 matrices that can be inverted")
    G.neural_rendering_resolution, G.plane_axes = int(size), axes
    G.cameras.frontal()  # Fails for a set-up that no camera can have.


def _check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse weights with which every picture would be black, or none."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite, or too large for {tensor.dtype}")


def _read_generator(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the header and tensors of a file, whose kind its first bytes tell."""
    check_downloaded(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # After the header's length, which can be any bytes.
        return _read_safetensors(path)
    if start.startswith(TORCH_BEGINS):
        return read_saved_file(path)
    if start.startswith(pickle.PROTO):
        return read_official_pickle(path)
    raise ValueError("it is neither a .safetensors, a .pkl, a .pth nor a .pt")


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Return a checksum of all that a file holds, by which damage is noticed."""
    parts = [json.dumps(metadata, sort_keys=True).encode()]
    for name, tensor in sorted(tensors.items()):
        parts.append(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        parts.append(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return checksum(*parts)


def _read_safetensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the header that `save_generator` wrote and the tensors, float32."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") not in FORMATS:
            kind = kind_of_weights(dict.fromkeys(file.keys()))
            held = f"it holds {kind}" if kind else f"format is not {' or '.join(FORMATS)}"
            raise ValueError(f"not written by this project ({held})")
        # Copied, since the generator must not depend on the file any more.
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        noted = metadata.pop("checksum", None)  # Older files have none.
        if noted and json.loads(noted) != _checksum(metadata, tensors):
            raise ValueError("it is damaged: its bytes have changed since it was written")
        header = {key: json.loads(metadata[key]) for key in metadata.keys() - {"format"}}
        header["format"] = metadata["format"]
        return header, {name: t.to(torch.float32, copy=True) for name, t in tensors.items()}


def sort_header(content: bytes) -> bytes:
    """Sort the header of a safetensors file, whose order safetensors leaves to chance."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The format aligns the data that follow.
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
