"""What train.py, render.py and eval.py ask of a generator: the protocol every base implements.

z [B, z_dim], c [B, 25] camera labels, ws [B, num_ws, w_dim] style codes, planes [B, 3, C, P, P];
images [B, 3, R, R] in [-1, 1]. A generator of pictures without cameras has labels [B, 0].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from models.cameras import CameraSetup, NoCameras

# What a generator makes, by name: "image" and whatever else it `gives`.
Outputs = dict[str, Tensor]


class Draw(Protocol):
    """All that is random in the render of a batch."""

    @property
    def leak(self) -> Tensor | None:
        """See `renderer.Rays`."""
        ...

    def cut(self, rows: slice) -> Draw:
        """Return that of a part of the batch."""
        ...


class Generator(Protocol):
    """A pretrained generator; a new base is a class with these.

    Attributes:
        z_dim: Width of the latent code; 0 if there is one head alone.
        gives: Which of "image", "image_depth", "mask", "features", "planes" and, if it shows one
            head alone, "own_planes" its outputs hold. A term that needs another is refused for it.
        img_resolution: Height and width of its images, R.
    """

    z_dim: int
    img_resolution: int
    img_channels: int
    gives: frozenset[str]
    own_planes: Tensor | None  # Planes that one head alone has, [1, 3, C, P, P].
    init_kwargs: dict[str, Any]
    rendering_kwargs: dict[str, Any]

    @property
    def cameras(self) -> CameraSetup | NoCameras:
        """The cameras it was trained with."""
        ...

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """Names of the layers that each of ws feeds."""
        ...

    def mapping(self, z: Tensor, c: Tensor, truncation_psi: float = 1.0) -> Tensor:
        """Return ws for latent codes and the camera c that conditions them."""
        ...

    def planes(self, ws: Tensor, *, force_fp32: bool = False) -> Tensor:
        """Return the tri-planes of ws; asked of generators that give planes alone."""
        ...

    def rays(self, c: Tensor) -> Draw:
        """Draw all that is random in a render, such as the rays' jitter, for the whole batch."""
        ...

    def synthesis(
        self,
        ws: Tensor,
        c: Tensor,
        *,
        planes: Tensor | None = None,
        rays: Draw | None = None,
        force_fp32: bool = False,
        **options: Any,
    ) -> Outputs:
        """Render ws from the cameras c; planes and rays that are given are not made again."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights and buffers by their official names."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what may learn."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what may learn, by name."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter by name."""
        ...
