"""Networks and frozen priors; nothing in here knows about training.

The five names below are stable. Each module is imported when first asked for: rendering needs no
diffusers, and cameras need no network.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "load_generator": "files.generators",
    "TriPlaneGenerator": "models.eg3d",
    "DiffusionPrior": "models.diffusion",
    "ClipFeatures": "models.features",
    "TokenFeatures": "models.features",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import one of the five names."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
