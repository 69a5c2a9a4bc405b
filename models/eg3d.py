"""EG3D (arXiv:2112.07945): latent code and camera to image, depth and mask.

A StyleGAN2 backbone makes three feature planes, a small decoder turns plane features into density
and colour, rays are marched at a low resolution and a super-resolution network makes the image.
Public names and state-dict keys are EG3D's; optional constructor arguments allow smaller networks.
Shapes: z [B, z_dim], c [B, 25], ws [B, num_ws, w_dim], planes [B, 3, C, P, P]; n is the neural
rendering resolution, R the image's. Images are in [-1, 1], depths are distances along the ray.
"""

import copy
from math import inf, isqrt
from typing import Any

import torch
from torch import Tensor, nn

from models.cameras import FOCAL, FOCAL_CARS, CameraSetup
from models.field import Activation, Decoder, evaluate_points
from models.layers import NoiseMode
from models.limits import MAX_SIZE
from models.renderer import (
    RayOptions,
    Rays,
    draw_rays,
    pixel_rays,
    render,
)
from models.stylegan2 import Generator
from models.superres import SuperResolution

# EG3D's own axes: (x, y), (x, z) and, a known mistake all released weights live with, (z, x).
PLANE_AXES = (
    ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)),
    ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
)
# Our constructor arguments, with the values that make the network EG3D's.
EXTRAS = {
    "plane_resolution": 256,
    "plane_channels": 32,
    "decoder_hidden": 64,
    "feature_channels": 32,
    "plane_slices": 0,
    "decoder_activation": "sigmoid",
}
EXTRA_SIZES = ("plane_resolution", "plane_channels", "decoder_hidden", "feature_channels")
SIZES = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "channel_base", "channel_max")
DICTS = ("mapping_kwargs", "rendering_kwargs", "sr_kwargs")
OWN_GAIN = 10.0  # Deviations of a head's planes that planes of its own learn in units of.
MASK_SOFTNESS = 0.02  # Depth over which the foreground mask fades out at `foreground_depth`.


class TriPlaneGenerator(nn.Module):
    """EG3D's generator.

    Attributes that may be changed after construction: `rendering_kwargs`, `plane_axes` [3, 3, 3]
    and `neural_rendering_resolution`.
    """

    gives = frozenset({"image", "image_depth", "mask", "features", "planes"})

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
        plane_resolution: int = 256,
        plane_channels: int = 32,
        decoder_hidden: int = 64,
        feature_channels: int = 32,
        plane_slices: int = 0,
        decoder_activation: Activation = "sigmoid",
    ) -> None:
        """Create the networks.

        Args:
            z_dim: Width of the latent code.
            c_dim: Width of the camera label, 25.
            w_dim: Width of the style codes.
            img_resolution: Final size R.
            img_channels: Channels of the final image.
            sr_num_fp16_res: Above 0, super-resolution runs in half precision on a GPU.
            mapping_kwargs: `num_layers`, `lr_multiplier`, `w_avg_beta` of the mapping network.
            rendering_kwargs: EG3D's, plus `foreground_depth` (see `synthesis`) and `camera_focal`,
                `camera_yaw_range`, `camera_pitch_range`, `camera_distribution` (see `cameras`).
            sr_kwargs: EG3D's (ignored), plus `channels` and `input_resolution` (see `superres`).
            channel_base: Backbone channels are min(channel_base / resolution, channel_max).
            channel_max: See `channel_base`.
            num_fp16_res: So many of the finest backbone blocks run in half precision on a GPU.
            conv_clamp: Bound of the backbone's activations, None for none.
            fused_modconv_default: EG3D's; accepted and without effect.
            plane_resolution: Size P of the planes, a power of 2.
            plane_channels: Channels C of a plane.
            decoder_hidden: Width of the decoder.
            feature_channels: Channels rendered for super-resolution.
            plane_slices: Depth slices D of a plane, which make tri-grids; 0 for none.
            decoder_activation: What bounds the decoder's colours.

        Raises:
            ValueError: arguments that no EG3D configuration can have.
        """
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        for name in (*SIZES, *EXTRA_SIZES, "plane_slices"):
            least = 0 if name == "plane_slices" else 1
            if not (isinstance(arguments[name], int) and least <= arguments[name] <= MAX_SIZE):
                raise ValueError(f"{name} must be {least} to {MAX_SIZE}, got {arguments[name]!r}")
        for name in DICTS:
            if not isinstance(arguments[name], dict | None):
                raise ValueError(f"{name} must be a dict, got {arguments[name]!r}")
        # Data for JSON; ours are left out where they equal EG3D's.
        self.init_kwargs = copy.deepcopy(
            {k: v for k, v in arguments.items() if k not in EXTRAS or v != EXTRAS[k]}
        )
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.neural_rendering_resolution = 64
        self.rendering_kwargs = copy.deepcopy(rendering_kwargs or {})
        self.plane_axes = torch.tensor(PLANE_AXES)
        slices = (plane_slices,) if plane_slices else ()
        self.plane_shape = (3, plane_channels, *slices, plane_resolution, plane_resolution)
        RayOptions.from_kwargs(self.rendering_kwargs)
        self.register_buffer("dataset_label_std", torch.ones(c_dim))

        self.backbone = Generator(
            z_dim,
            c_dim,
            w_dim,
            plane_resolution,
            3 * plane_channels * max(1, plane_slices),
            mapping_kwargs or {},
            {
                "channel_base": channel_base,
                "channel_max": channel_max,
                "num_fp16_res": num_fp16_res,
                "conv_clamp": conv_clamp,
            },
        )
        sr_kwargs = sr_kwargs or {}
        self.superresolution = SuperResolution(
            self.rendering_kwargs.get("superresolution_module"),
            feature_channels,
            w_dim,
            img_resolution,
            img_channels,
            use_fp16=sr_num_fp16_res > 0,
            antialias=self.rendering_kwargs.get("sr_antialias", True),
            channels=sr_kwargs.get("channels"),
            input_resolution=sr_kwargs.get("input_resolution"),
        )
        lr_mul = self.rendering_kwargs.get("decoder_lr_mul", 1)
        self.decoder = Decoder(
            plane_channels, decoder_hidden, feature_channels, lr_mul, decoder_activation
        )
        # Of a generator of one head; see `keep_one_head`.
        self.register_buffer("own_ws", None)
        self.register_buffer("own_gain", None)
        self.register_parameter("own_planes", None)

    @property
    def cameras(self) -> CameraSetup:
        """The camera set-up that rendering_kwargs describe; EG3D's for faces where silent.

        Released files hold no focal length; it follows from the radius.
        """
        kwargs = self.rendering_kwargs
        faces = CameraSetup()
        radius = kwargs.get("avg_camera_radius", faces.radius)
        pivot = kwargs.get("avg_camera_pivot", faces.pivot)
        return CameraSetup(
            radius=radius,
            pivot=tuple(pivot) if isinstance(pivot, list) else pivot,
            focal=kwargs.get("camera_focal", FOCAL_CARS if radius == 1.7 else FOCAL),
            yaw_range=kwargs.get("camera_yaw_range", faces.yaw_range),
            pitch_range=kwargs.get("camera_pitch_range", faces.pitch_range),
            distribution=kwargs.get("camera_distribution", faces.distribution),
        )

    @torch.no_grad()
    def keep_one_head(self, ws: Tensor, gain: Tensor | None = None) -> None:
        """Show one head from now on, whatever is asked for, and let planes of its own be learnt.

        They are zero at first, and added to those of ws (T_l of DiffusionGAN3D, arXiv:2312.16837),
        times a factor with which they learn as fast as weights do.

        Args:
            ws: The head's style codes, [1, num_ws, w_dim].
            gain: That factor, []; None: OWN_GAIN deviations of the head's planes.
        """
        self.own_ws = ws
        self.own_gain = OWN_GAIN * self.planes(ws).std() if gain is None else gain
        zeros = torch.zeros(1, *self.plane_shape, device=ws.device)
        self.own_planes = nn.Parameter(zeros, requires_grad=False)
        self.z_dim, self.gives = 0, type(self).gives | {"own_planes"}

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """Names of the layers that each of ws feeds; the last one feeds super-resolution too."""
        own = self.backbone.synthesis.layers
        names = [tuple(f"backbone.synthesis.{name}" for name in names) for names in own]
        return [*names[:-1], (*names[-1], "superresolution")]

    def mapping(
        self,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_emas: bool = False,
    ) -> Tensor:
        """Map z and the conditioning camera c to ws.

        The label is scaled by rendering_kwargs["c_scale"] (default 0, as in EG3D) and zeroed with
        rendering_kwargs["c_gen_conditioning_zero"].
        """
        if self.own_ws is not None:
            return self.own_ws.expand(len(z), -1, -1)
        kwargs = self.rendering_kwargs
        if kwargs.get("c_gen_conditioning_zero", False):
            c = torch.zeros_like(c)
        c = c * kwargs.get("c_scale", 0)
        return self.backbone.mapping(z, c, truncation_psi, truncation_cutoff, update_emas)

    def planes(
        self, ws: Tensor, noise_mode: NoiseMode = "const", force_fp32: bool = False
    ) -> Tensor:
        """Return the tri-planes [B, 3, C, P, P] of ws, or its tri-grids [B, 3, C, D, P, P]."""
        shape = self.plane_shape[:-2]
        planes = self.backbone.synthesis(ws, noise_mode, force_fp32).unflatten(1, shape)
        return planes if self.own_planes is None else planes + self.own_gain * self.own_planes

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
    ) -> dict[str, Tensor]:
        """Render ws from the cameras c.

        Args:
            ws: Style codes, [B, num_ws, w_dim].
            c: Camera labels, [B, 25], or K cameras for each of ws, [B, K, 25], which share one
                backbone pass; outputs then have a batch of B * K, K fastest.
            neural_rendering_resolution: n for this call; None is the generator's own.
            noise_mode: Noise of the backbone. Super-resolution has its own, in rendering_kwargs.
            superresolve: Make `image`.
            planes: What `planes(ws)` returned before, to skip the backbone.
            force_fp32: No half precision.
            rays: What `rays(c)` drew before, for two generators to see the same, or a part of it
                that belongs to these ws and c; then n and sample_mult are those of the draw.
            sample_mult: So many times as many samples on each ray; EG3D's videos take 2.

        Returns:
            `image` [B, 3, R, R] (if superresolve), `image_raw` [B, 3, n, n] before
            super-resolution, `image_depth` [B, 1, n, n], opacity `acc` [B, 1, n, n] and the
            foreground `mask` [B, 1, n, n]: acc, faded out beyond
            rendering_kwargs["foreground_depth"] if that is given; and the `features`
            [B, C, n, n] that super-resolution saw. EG3D's 2X and 4X models add a
            super-resolution term to their image_raw by mistake; here it is the clean one.

        Raises:
            ValueError: `c` does not hold cameras for each of ws, `ws` is of another shape, or n is
                no size.
        """
        features, depth, acc = self._render(
            ws, c, neural_rendering_resolution, noise_mode, planes, force_fp32, rays, sample_mult
        )
        out = {
            "image_raw": features[:, : self.img_channels],
            "image_depth": depth,
            "acc": acc,
            "mask": self._foreground(depth, acc),
            "features": features,
        }
        if superresolve:
            out["image"] = self._superresolve(out["image_raw"], features, ws, force_fp32)
        return out

    def _render(
        self,
        ws: Tensor,
        c: Tensor,
        n: int | None,
        noise_mode: NoiseMode,
        planes: Tensor | None,
        force_fp32: bool,
        rays: Rays | None,
        sample_mult: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [B * K, C, n, n], depth and acc [B * K, 1, n, n]; see `synthesis`."""
        views = c.unsqueeze(1) if c.ndim == 2 else c  # [B, K, 25]
        if views.ndim != 3 or len(views) != len(ws):
            raise ValueError(
                f"c must be [B, 25] or [B, K, 25] with B = {len(ws)} as ws, got {list(c.shape)}"
            )
        if ws.ndim != 3 or ws.shape[1] != self.backbone.num_ws:
            raise ValueError(
                f"ws must be [B, {self.backbone.num_ws}, {self.w_dim}], got {list(ws.shape)}"
            )
        if rays is None:
            n = self._side(n)  # A size that cannot be is refused first.
        if planes is None:
            planes = self.planes(ws, noise_mode, force_fp32)
        if rays is None:
            rays = self.rays(c, n, sample_mult)
        n = isqrt(rays.depths.shape[1] // views.shape[1])
        features, depth, acc = (
            m.unflatten(2, (views.shape[1], n, n)).transpose(1, 2).flatten(0, 1)
            for m in self._march(planes, rays)
        )  # [B * K, channels, n, n]
        return features, depth, acc

    def _superresolve(
        self, image_raw: Tensor, features: Tensor, ws: Tensor, force_fp32: bool
    ) -> Tensor:
        """Return the images [B * K, 3, R, R] of B codes seen from K cameras each."""
        return self.superresolution(
            image_raw,
            features,
            ws.repeat_interleave(len(features) // len(ws), dim=0),
            self.rendering_kwargs.get("superresolution_noise_mode", "none"),
            force_fp32,
        )

    def rays(
        self, c: Tensor, neural_rendering_resolution: int | None = None, sample_mult: int = 1
    ) -> Rays:
        """Draw the rays of a render: all that is random in it.

        Args:
            c: Camera labels, [B, 25] or [B, K, 25], as in `synthesis`.
            neural_rendering_resolution: n for this call; None is the generator's own.
            sample_mult: So many times as many samples on each ray.

        Returns:
            Rays of [B, K * n * n].

        Raises:
            ValueError: n is no size.
        """
        n = self._side(neural_rendering_resolution)
        views = c.unsqueeze(1) if c.ndim == 2 else c  # [B, K, 25]
        origins, directions = (
            rays.unflatten(0, views.shape[:2]).flatten(1, 2)
            for rays in pixel_rays(views.flatten(0, 1), n)
        )  # [B, K * n * n, 3]
        options = RayOptions.from_kwargs(self.rendering_kwargs).with_samples(sample_mult)
        return draw_rays(origins, directions, options)

    def render_rays(
        self, planes: Tensor, origins: Tensor, directions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Render single rays through tri-planes.

        Args:
            planes: Tri-planes, [B, 3, C, P, P].
            origins: Ray origins, [B, M, 3].
            directions: Unit directions, [B, M, 3].

        Returns:
            Features [B, M, 32], depth [B, M, 1] and opacity acc [B, M, 1]. Of EG3D features are in
            [-1, 1], and the first three are the colour.
        """
        options = RayOptions.from_kwargs(self.rendering_kwargs)
        features, depth, acc = self._march(planes, draw_rays(origins, directions, options))
        return features.mT, depth.mT, acc.mT

    def sample_mixed(
        self,
        coordinates: Tensor,
        directions: Tensor | None,
        ws: Tensor,
        noise_mode: NoiseMode = "const",
        planes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate the field at points.

        Args:
            coordinates: Points in world units, [B, N, 3].
            directions: View directions; EG3D ignores them.
            ws: Style codes, [B, num_ws, w_dim].
            noise_mode: Noise of the backbone.
            planes: What `planes(ws)` returned before, to skip the backbone.

        Returns:
            The channels `rgb` [B, N, 32], of EG3D in (-0.001, 1.001), and the raw `sigma`
            [B, N, 1].
        """
        planes = self.planes(ws, noise_mode) if planes is None else planes
        box_warp = self.rendering_kwargs["box_warp"]
        sigma, rgb = evaluate_points(planes, self.decoder, coordinates, self.plane_axes, box_warp)
        return {"rgb": rgb, "sigma": sigma}

    def colours(self, rgb: Tensor, ws: Tensor) -> Tensor:
        """Return what points look like, about [0, 1], [B, N, 3]: the first of their channels.

        Args:
            rgb: What `sample_mixed` returns by this name, [B, N, C].
            ws: Style codes, [B, num_ws, w_dim].
        """
        return rgb[..., : self.img_channels]

    def sample(
        self,
        coordinates: Tensor,
        directions: Tensor | None,
        z: Tensor,
        c: Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "const",
    ) -> dict[str, Tensor]:
        """Evaluate the field of z, conditioned on the camera c, at points (see `sample_mixed`)."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.sample_mixed(coordinates, directions, ws, noise_mode)

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
        """Render z with one camera c that conditions the identity too (see `synthesis`)."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff, update_emas)
        return self.synthesis(ws, c, neural_rendering_resolution, noise_mode)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any
    ) -> None:
        """Load a state dict that may lack `dataset_label_std`: only EG3D's training adds it."""
        state_dict.setdefault(f"{prefix}dataset_label_std", self.dataset_label_std)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _side(self, n: int | None) -> int:
        """Return the neural rendering resolution of a call; None is the generator's own."""
        n = self.neural_rendering_resolution if n is None else n
        if n < 1:
            raise ValueError(f"neural_rendering_resolution must be at least 1, got {n}")
        return n

    def _march(self, planes: Tensor, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        """Render rays [B, M, 3] to features [B, C, M], depth [B, 1, M], acc [B, 1, M]."""
        options = RayOptions.from_kwargs(self.rendering_kwargs)
        return render(planes, self.decoder, rays, self.plane_axes, options, self.bound)

    @property
    def bound(self) -> float:
        """Return where |x| and |z| are cut off: nowhere."""
        return inf

    def _foreground(self, depth: Tensor, acc: Tensor) -> Tensor:
        """Return the mask: acc where depth is less than the foreground's, softly."""
        limit = self.rendering_kwargs.get("foreground_depth")
        acc = acc.clamp(max=1)  # A sum of weights may exceed one by rounding.
        if limit is None:
            return acc
        return acc * torch.sigmoid((limit - depth) / MASK_SOFTNESS)
