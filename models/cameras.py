"""Cameras of the 3D generator: poses, intrinsics and the 25-number label c.

World: y up, subject near the origin, a face looks along +z. Camera: x right, y down, z forward
(OpenCV, as EG3D). Angles are radians, distances are EG3D's world units, intrinsics are normalised
by the image size. c = [cam2world 4x4 row-major | intrinsics 3x3 row-major]. B is the batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.limits import is_number

FOCAL = 4.2647  # Labels of EG3D's faces and cats: 2985.29 / 700.
FOCAL_CARS = 1.7074  # Labels of its cars, whose cameras are 1.7 away.
ELLIPSE_PITCH = -0.05  # Middle of the ellipse of views [rad]: a little above the face.
VIEW_WORDS = ("front view", "side view", "back view")
SIDES = (math.pi / 3, 2 * math.pi / 3)  # Yaws where side views begin and end [rad].
ALL_ROUND = 3.1  # A yaw range above means every side [rad].
BEYOND = 1.3  # Times the range of training views: as far as heads can be turned.
LABEL_SIZE = 25  # Numbers in a camera label.


def look_at(eye: Tensor, target: Tensor) -> Tensor:
    """Return the poses of cameras that sit at `eye` and look at `target`, without roll.

    Args:
        eye: Camera centres, [B, 3]. Must not lie straight above or below `target`.
        target: Points looked at, [B, 3] or [3].

    Returns:
        Camera-to-world matrices, [B, 4, 4].

    Raises:
        ValueError: `eye` is not [B, 3].
    """
    if eye.ndim != 2 or eye.shape[1] != 3:
        raise ValueError(f"eye must be [B, 3], got {list(eye.shape)}")
    forward = F.normalize(target - eye, dim=-1)  # [B, 3]
    up = forward.new_tensor([0.0, 1.0, 0.0]).expand_as(forward)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)  # [B, 3]
    down = torch.linalg.cross(forward, right)  # [B, 3]

    cam2world = torch.eye(4).to(eye).repeat(len(eye), 1, 1)
    cam2world[:, :3] = torch.stack([right, down, forward, eye], dim=-1)
    return cam2world


def orbit(
    yaw: Tensor,
    pitch: Tensor,
    radius: float = 2.7,
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2),
) -> Tensor:
    """Return poses on a sphere about the origin, all looking at `pivot` (EG3D's LookAt sampler).

    EG3D's angles are kept: positive yaw moves the camera towards +x, negative pitch moves it up,
    and pitch is uniform in area rather than in angle (polar angle = arccos(-2 * pitch / pi)), so
    that pitch -0.2 is an elevation of 0.128 rad.

    Args:
        yaw: Offsets from the frontal view, [B].
        pitch: Offsets from the frontal view, [B], clamped to stay within +-pi/2.
        radius: Distance of the cameras from the origin.
        pivot: The point looked at. The orbit itself stays centred on the origin.

    Returns:
        Camera-to-world matrices, [B, 4, 4].
    """
    h = math.pi / 2 + yaw
    v = (math.pi / 2 + pitch).clamp(1e-5, math.pi - 1e-5)
    phi = torch.arccos(1 - 2 * v / math.pi)
    eye = radius * torch.stack(
        [phi.sin() * torch.cos(math.pi - h), phi.cos(), phi.sin() * torch.sin(math.pi - h)], dim=-1
    )  # [B, 3]
    return look_at(eye, eye.new_tensor(pivot))


def intrinsics(focal: float = FOCAL) -> Tensor:
    """Return the normalised intrinsics [3, 3] of a centred camera; `focal` in image sizes."""
    return torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]])


def fov_to_intrinsics(fov_deg: float) -> Tensor:
    """Return the normalised intrinsics [3, 3] for a field of view, with EG3D's rounded constants.

    The angle spans the image's diagonal; 18.837 degrees give 4.26339, not the labels' 4.2647.
    """
    return intrinsics(1 / (math.tan(fov_deg * 3.14159 / 360) * 1.414))


def camera_label(cam2world: Tensor, K: Tensor) -> Tensor:
    """Join poses [B, 4, 4] and intrinsics [3, 3] or [B, 3, 3] to labels c [B, 25]."""
    K = K.to(cam2world).expand(len(cam2world), 3, 3)
    return torch.cat([cam2world.flatten(1), K.flatten(1)], dim=1)


def split_label(c: Tensor) -> tuple[Tensor, Tensor]:
    """Split labels c [..., 25] into poses [..., 4, 4] and intrinsics [..., 3, 3].

    Raises:
        ValueError: the last axis of `c` is not 25.
    """
    if c.shape[-1] != 25:
        raise ValueError(f"camera labels must be [..., 25], got {list(c.shape)}")
    return c[..., :16].unflatten(-1, (4, 4)), c[..., 16:].unflatten(-1, (3, 3))


def sides_of(c: Tensor) -> list[int]:
    """Return the places in VIEW_WORDS of what views are called, for labels [B, 25].

    Front and back are 120 degrees wide each (DreamFusion's words, arXiv:2209.14988, section 3.2).
    """
    yaws = torch.atan2(c[:, 3], c[:, 11]).abs()  # Where the camera stands.
    return [(yaw > SIDES[0]) + (yaw > SIDES[1]) for yaw in yaws.tolist()]


@dataclass(frozen=True)
class CameraSetup:
    """Where a generator's cameras stand and how training views are drawn."""

    radius: float = 2.7  # Distance of the cameras from the origin.
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)  # Point looked at.
    focal: float = FOCAL  # Focal length in image sizes.
    yaw_range: float = 0.35  # Half width, semi-axis or standard deviation [rad].
    pitch_range: float = 0.25  # Half width, semi-axis or standard deviation [rad].
    distribution: Literal["uniform", "gaussian", "ellipse"] = "ellipse"
    """Ellipse is StyleGAN-Fusion's (arXiv:2212.04473): with u uniform on the circle,
    yaw = yaw_range sin u, pitch = -0.05 + pitch_range cos u."""

    def __post_init__(self) -> None:
        """Refuse a distribution that `sample` does not know, and places where nothing can be."""
        for name in ("radius", "focal", "yaw_range", "pitch_range"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"camera {name} must be a number, got {getattr(self, name)!r}")
        if self.radius <= 0 or self.focal <= 0:
            raise ValueError(
                f"camera radius and focal must be positive, got {self.radius}, {self.focal}"
            )
        point = isinstance(self.pivot, tuple) and len(self.pivot) == 3
        if not (point and all(map(is_number, self.pivot))):
            raise ValueError(f"camera pivot must be three numbers, got {self.pivot!r}")
        if self.distribution not in ("uniform", "gaussian", "ellipse"):
            raise ValueError(
                f"camera distribution must be uniform, gaussian or ellipse, "
                f"got {self.distribution!r}"
            )

    @property
    def all_round(self) -> bool:
        """Whether views are from every side."""
        return self.yaw_range > ALL_ROUND

    def label(self, yaw: Tensor, pitch: Tensor) -> Tensor:
        """Return the labels c [B, 25] of views at `yaw` [B] and `pitch` [B]."""
        return camera_label(orbit(yaw, pitch, self.radius, self.pivot), intrinsics(self.focal))

    def frontal(self, batch: int = 1) -> Tensor:
        """Return the frontal view's label, [batch, 25]: the mapping network's conditioning."""
        return self.label(torch.zeros(batch), torch.zeros(batch))

    def rim(self, angle: Tensor) -> Tensor:
        """Return the labels c [B, 25] of views around the rim of the range, a closed path.

        For EG3D's faces it is the path of its videos, once around as `angle` [B] goes to 2 pi. Of
        views from every side it is once around the head, up and down once on the way.
        """
        middle = ELLIPSE_PITCH if self.distribution == "ellipse" else 0.0
        if self.all_round:
            return self.label(angle, middle + self.pitch_range * angle.sin())
        return self.label(self.yaw_range * angle.sin(), middle + self.pitch_range * angle.cos())

    def sample(self, batch: int) -> Tensor:
        """Draw labels c [batch, 25] from the set-up's distribution (torch's global CPU stream)."""
        if self.distribution == "ellipse":
            return self.rim(2 * math.pi * torch.rand(batch))
        if self.distribution == "gaussian":
            yaw, pitch = torch.randn(batch, 1), torch.randn(batch, 1)
        else:
            yaw, pitch = torch.rand(batch, 1) * 2 - 1, torch.rand(batch, 1) * 2 - 1
        return self.label(self.yaw_range * yaw[:, 0], self.pitch_range * pitch[:, 0])


@dataclass(frozen=True)
class NoCameras:
    """In place of a set-up, of a generator of pictures: it cannot turn, and labels are empty."""

    yaw_range: float = 0.0
    pitch_range: float = 0.0
    all_round: bool = False

    def label(self, yaw: Tensor, pitch: Tensor) -> Tensor:
        """Return as many empty labels as there are views, [B, 0]."""
        return torch.empty(len(yaw), 0)

    def frontal(self, batch: int = 1) -> Tensor:
        """Return empty labels, [batch, 0]."""
        return torch.empty(batch, 0)

    def sample(self, batch: int) -> Tensor:
        """Return empty labels, [batch, 0]; nothing is drawn."""
        return torch.empty(batch, 0)
