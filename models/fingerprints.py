"""Checksums of networks."""

import json
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def fingerprint(networks: Iterable[nn.Module | None], settings: object = None) -> str:
    """Return a checksum of networks' weights and of settings that JSON knows."""
    crc = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    for network in networks:
        for tensor in network.state_dict().values() if network else ():
            crc = zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy(), crc)
    return f"crc32 {crc:08x}"


def fingerprint_generator(G: Any) -> str:
    """Return a checksum of all that decides what a generator draws."""
    return fingerprint([G], [G.rendering_kwargs, G.neural_rendering_resolution])
