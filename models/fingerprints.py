"""Checksums of networks."""

import json
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from harness.store import checksum


def fingerprint(networks: Iterable[nn.Module | None], settings: object = None) -> str:
    """Return a checksum of networks' weights and of settings that JSON knows."""
    tensors = (x for network in networks if network for x in network.state_dict().values())
    return checksum(json.dumps(settings, sort_keys=True).encode(), *map(as_bytes, tensors))


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's numbers as bytes, without a copy where it is on the CPU."""
    return memoryview(tensor.detach().cpu().flatten().view(torch.uint8).numpy())


def fingerprint_mapping(G: Any) -> str:
    """Return a checksum of the mapping network, by which codes and directions belong together.

    Runs share it with their source. It is taken in half precision, so a rounded copy has the same.
    """
    own = (x for name, x in G.state_dict().items() if re.match(r"(backbone\.)?mapping\.", name))
    return checksum(*(as_bytes(x.half()) for x in own))


def fingerprint_generator(G: Any) -> str:
    """Return a checksum of all that decides what a generator draws."""
    return fingerprint([G], [G.rendering_kwargs, G.neural_rendering_resolution])
