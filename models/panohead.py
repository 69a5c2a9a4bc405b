"""PanoHead (arXiv:2303.13071): heads seen from all sides.

What differs from EG3D: planes have depth slices (tri-grids), the decoder's colours may have no
bounds, the box is cropped at its sides, a StyleGAN2 of its own paints a background behind the head,
and the render's colours come from its features by a layer. Names and state-dict keys are
PanoHead's. Shapes as in models/eg3d.py; D depth slices.
"""

import copy
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cameras import CameraSetup
from models.eg3d import TriPlaneGenerator
from models.layers import NoiseMode, ToRGB
from models.renderer import Rays
from models.stylegan2 import MappingNetwork, SynthesisNetwork

# PanoHead's own axes: (x, y, z), (x, z, y) and (y, z, x); the third is where slices lie.
GRID_AXES = (
    ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)),
    ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)),
)
CROP = 0.1  # Width of the empty space at the sides of the box [world units].
NEEDED = ("triplane_size", "triplane_depth", "decoder_activation")  # In rendering_kwargs.
FIXED = {"architecture": "skip"}  # Arguments of official files that have one value here.


class PanoHeadGenerator(TriPlaneGenerator):
    """PanoHead's generator; `t_mapping` corrects cameras, `bcg_synthesis` paints what is behind.

    Attributes that may be changed after construction: TriPlaneGenerator's, and `crop`, the width of
    the empty space at the box's sides, negative for none.
    """

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        sr_num_fp16_res: int = 0,
        mapping_kwargs: dict[str, Any] | None = None,
        rendering_kwargs: dict[str, Any] | None = None,
        sr_kwargs: dict[str, Any] | None = None,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        conv_clamp: float | None = None,
        fused_modconv_default: bool | str = "inference_only",
        architecture: str = "skip",
        plane_channels: int = 32,
        decoder_hidden: int = 64,
        feature_channels: int = 32,
    ) -> None:
        """Create the networks; arguments as for TriPlaneGenerator.

        rendering_kwargs also hold `triplane_size` P, `triplane_depth` D, `decoder_activation`
        (sigmoid, lrelu or none), `use_torgb_raw` and `use_background`.

        Raises:
            ValueError: arguments that no PanoHead configuration can have.
        """
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        kwargs = rendering_kwargs if isinstance(rendering_kwargs, dict) else {}
        if missing := [name for name in NEEDED if name not in kwargs]:
            raise ValueError(f"rendering_kwargs lacks {', '.join(missing)}")
        if architecture != FIXED["architecture"]:
            raise ValueError(f"architecture must be 'skip', got {architecture!r}")
        size, slices = kwargs["triplane_size"], kwargs["triplane_depth"]
        if not (isinstance(slices, int) and slices >= 1):
            raise ValueError(f"triplane_depth must be at least 1, got {slices!r}")
        super().__init__(
            **{name: value for name, value in given.items() if name not in FIXED},
            plane_resolution=size,
            plane_slices=slices,
            decoder_activation=kwargs["decoder_activation"],
        )
        del self._buffers["dataset_label_std"]  # Which only training adds.
        extras = {"plane_channels": 32, "decoder_hidden": 64, "feature_channels": 32}
        self.init_kwargs = copy.deepcopy(
            {k: v for k, v in given.items() if k not in extras or v != extras[k]}
        )
        self.plane_axes = torch.tensor(GRID_AXES)
        self.crop = CROP

        synthesis = {
            "channel_base": channel_base // 2,
            "channel_max": channel_max,
            "num_fp16_res": num_fp16_res,
            "conv_clamp": conv_clamp,
        }
        self.torgb = self.bcg_synthesis = None
        if kwargs.get("use_torgb_raw", False):
            self.torgb = ToRGB(feature_channels, img_channels, w_dim)
        if kwargs.get("use_background", False):
            size = self.superresolution.variant.input_resolution
            self.bcg_synthesis = SynthesisNetwork(w_dim, size, feature_channels, **synthesis)
        mapping = {**(mapping_kwargs or {}), "lr_multiplier": 1.0, "last_activation": "linear"}
        self.t_mapping = MappingNetwork(z_dim, c_dim, 3, 1, **mapping)

    @property
    def cameras(self) -> CameraSetup:
        """The camera set-up that rendering_kwargs describe; PanoHead's where silent.

        Its scripts look at the origin, whatever `avg_camera_pivot` says, from every yaw.
        """
        kwargs, known = self.rendering_kwargs, CameraSetup()
        pivot = kwargs.get("camera_pivot", (0.0, 0.0, 0.0))
        return CameraSetup(
            radius=kwargs.get("avg_camera_radius", known.radius),
            pivot=tuple(pivot) if isinstance(pivot, list) else pivot,
            focal=kwargs.get("camera_focal", known.focal),
            yaw_range=kwargs.get("camera_yaw_range", torch.pi),
            pitch_range=kwargs.get("camera_pitch_range", known.pitch_range),
            distribution=kwargs.get("camera_distribution", "uniform"),
        )

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """Names of the layers that each of ws feeds."""
        names = [list(names) for names in super().layers]
        if self.bcg_synthesis is not None:
            for own, behind in zip(names, self.bcg_synthesis.layers, strict=False):
                own += [f"bcg_synthesis.{name}" for name in behind]
        names[-1] += ["torgb"] if self.torgb is not None else []
        return [tuple(own) for own in names]

    def delta_c(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """Return how far the camera c of z should be moved [world units], [B, 3].

        The self-adaptive camera of training; published pictures go without it.
        """
        c = c * self.rendering_kwargs.get("c_scale", 0)
        return self.t_mapping(z, c, truncation_psi, truncation_cutoff)[:, 0]

    def synthesis(
        self,
        ws: Tensor,
        c: Tensor,
        neural_rendering_resolution: int | None = None,
        noise_mode: NoiseMode = "const",
        superresolve: bool = True,
        planes: Tensor | None = None,
        force_fp32: bool = False,
        rays: Rays | None = None,
        sample_mult: int = 1,
        ws_bcg: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Render ws from the cameras c; as TriPlaneGenerator's, but for one argument.

        Args:
            ws: Style codes, [B, num_ws, w_dim].
            c: Camera labels, [B, 25] or [B, K, 25].
            neural_rendering_resolution: n for this call; None is the generator's own.
            noise_mode: Noise of the backbone and the background.
            superresolve: Make `image`.
            planes: What `planes(ws)` returned before.
            force_fp32: No half precision.
            rays: What `rays(c)` drew before.
            sample_mult: So many times as many samples on each ray.
            ws_bcg: Codes of the background, [B, L, w_dim]; too few are repeated at the end. None:
                ws.

        Returns:
            What TriPlaneGenerator's does. `mask` and `acc` are the opacity (PanoHead's image_mask
            is acc * 1.002 - 0.001); `image_raw` is not bounded.
        """
        features, depth, acc = self._render(
            ws, c, neural_rendering_resolution, noise_mode, planes, force_fp32, rays, sample_mult
        )
        views = len(features) // len(ws)
        if self.bcg_synthesis is not None:
            behind = self._background(ws if ws_bcg is None else ws_bcg, noise_mode, force_fp32)
            size = features.shape[2:]
            if behind.shape[2:] != size:
                antialias = self.rendering_kwargs.get("sr_antialias", True)
                behind = F.interpolate(behind, size, mode="bilinear", antialias=antialias)
            features = features + (1 - acc) * behind.repeat_interleave(views, dim=0)
        image_raw = features[:, : self.img_channels]
        if self.torgb is not None:
            image_raw = self.torgb(features, ws[:, -1].repeat_interleave(views, dim=0))
        out = {
            "image_raw": image_raw,
            "image_depth": depth,
            "acc": acc,
            "mask": acc.clamp(max=1),  # A sum of weights may exceed one by rounding.
            "features": features,
        }
        if superresolve:
            out["image"] = self._superresolve(image_raw, features, ws, force_fp32)
        return out

    def colours(self, rgb: Tensor, ws: Tensor) -> Tensor:
        """Return what points look like, about [0, 1], [B, N, 3]: as the render's colours are made.

        Args:
            rgb: What `sample_mixed` returns by this name, [B, N, C].
            ws: Style codes, [B, num_ws, w_dim].
        """
        features = rgb * 2 - 1 if self.decoder.activation == "sigmoid" else rgb
        image = features[..., : self.img_channels]
        if self.torgb is not None:
            image = self.torgb(features.mT.unsqueeze(3), ws[:, -1]).squeeze(3).mT
        return (image + 1) / 2

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        neural_rendering_resolution: int | None = None,
        update_emas: bool = False,
        noise_mode: NoiseMode = "const",
    ) -> dict[str, Tensor]:
        """Render z with one camera c that conditions the identity too, moved by `delta_c`."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas)
        moved = c.clone()
        moved[:, [3, 7, 11]] += self.delta_c(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, moved, neural_rendering_resolution, noise_mode)

    def _background(self, ws: Tensor, noise_mode: NoiseMode, force_fp32: bool) -> Tensor:
        """Return the background's features, [B, C, m, m]."""
        assert self.bcg_synthesis is not None
        wanted = self.bcg_synthesis.num_ws
        codes = ws[:, :wanted]
        if codes.shape[1] < wanted:
            missing = wanted - codes.shape[1]
            codes = torch.cat([codes, codes[:, -1:].repeat(1, missing, 1)], dim=1)
        return self.bcg_synthesis(codes, noise_mode, force_fp32)

    @property
    def bound(self) -> float:
        """Return where |x| and |z| are cut off."""
        return inf if self.crop < 0 else self.rendering_kwargs["box_warp"] / 2 - self.crop

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any
    ) -> None:
        """Load a state dict with or without `dataset_label_std`, which only training adds."""
        if f"{prefix}dataset_label_std" in state_dict:
            self.register_buffer("dataset_label_std", torch.ones(self.c_dim))
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *arguments)
