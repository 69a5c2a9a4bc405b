"""The scores of eval.py as pure functions: features, cameras and depth in, numbers out.

N latents, F features of a picture. "Before" is what the source generator draws of the latents,
"after" what the adapted one draws. Angles are yaw and pitch as `cameras.orbit` takes them.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cameras import orbit, split_label
from models.renderer import pixel_rays

# As a fraction of the mean feature variance; within a decade the error of the probe is the same.
RIDGE = 1e-2
FLAT = 1e-5  # Depth maps with less deviation than this are constant but for rounding.
HIDDEN = 0.02  # A point this fraction of the distance behind what a camera sees is occluded.
KID_PICTURES = 1000  # In a subset, as everywhere.


def cosine_gain(target: Tensor, before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the mean cosine of unit features [N, F] to a target [1, F], and its gain."""
    cosine = (after @ target.T).mean().item()
    return cosine, cosine - (before @ target.T).mean().item()


def distances(real: Tensor, after: Tensor) -> dict[str, float]:
    """Compare the distributions of two sets of pictures, through torchmetrics.

    The first shrinks with the number of pictures, so only scores of equal numbers can be compared.
    Features are scaled to a mean square of 1: the kernel, (x y / F + 1)^3, then sees cosines.

    Args:
        real: Unit features of the target domain's pictures, [K, F].
        after: Unit features of the adapted pictures, [N, F].

    Returns:
        `fid`, the Frechet distance; `kid`, the kernel distance, which for equal sets is a little
        below 0.

    Raises:
        ValueError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ValueError("fid and kid need torchmetrics: pip install torchmetrics") from error
    given = nn.Identity()  # The features are there already.
    given.num_features = real.shape[1]
    with warnings.catch_warnings():  # That it keeps all features, which is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        size = min(len(real), len(after), KID_PICTURES)
        scores = FrechetInceptionDistance(given), KernelInceptionDistance(given, 20, size)
    for score in scores:
        score.update(real.double() * given.num_features**0.5, real=True)
        score.update(after.double() * given.num_features**0.5, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # Fixes the subsets.
        return {"fid": scores[0].compute().item(), "kid": scores[1].compute()[0].item()}


def pose(
    fitted: Tensor, fitted_angles: Tensor, before: Tensor, after: Tensor, angles: Tensor
) -> dict[str, float]:
    """Read the camera off pictures by ridge regression, fitted on the source where it is known.

    Before the probe is asked, the features of the adapted domain are given the mean that they have
    in the source's. A turn that all pictures share goes unseen with it; a domain of less contrast
    looks turned to the front, as the score of its true pictures tells.

    Args:
        fitted: Features of source pictures that the probe is fitted on, [M, F].
        fitted_angles: Their cameras, [M, 2].
        before: Features of other source pictures, [N, F].
        after: Features of the adapted pictures of the same latents and cameras, [N, F].
        angles: Their cameras, [N, 2].

    Returns:
        `pose_deg` of the adapted pictures and `pose_source_deg`, the probe's error on source
        pictures it was not fitted on: mean angles between camera positions, degrees.
    """
    x, y, truth = fitted, fitted_angles, direction(angles)
    mean = x.mean(0)
    kernel = (x - mean) @ (x - mean).T  # [M, M]
    ridge = RIDGE * kernel.diagonal().mean() * torch.eye(len(x))
    dual = torch.linalg.solve(kernel + ridge, y - y.mean(0))  # [M, 2]

    def error_deg(features: Tensor) -> float:
        read = (features - mean) @ (x - mean).T @ dual + y.mean(0)  # [N, 2]
        return angle_deg(direction(read), truth).mean().item()

    return {
        "pose_deg": error_deg(after - after.mean(0) + before.mean(0)),
        "pose_source_deg": error_deg(before),
    }


def direction(angles: Tensor) -> Tensor:
    """Turn yaw and pitch [N, 2] into unit vectors from the origin to the camera, [N, 3]."""
    return F.normalize(orbit(*angles.T)[:, :3, 3], dim=1)


def angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle between unit vectors [N, 3], degrees, [N]."""
    return torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1)))


def identity(before: Tensor, after: Tensor) -> dict[str, float]:
    """Let every adapted picture look for its own source; and compare spreads.

    Ties count against it: in a collapsed generator nobody is found.

    Args:
        before: Features of the source pictures, [N, F].
        after: Features of the adapted pictures, [N, F].

    Returns:
        `identity_top1`, whose chance is 1 / N, and `identity_mrr`, the mean reciprocal rank, whose
        chance is (1 + 1/2 + ... + 1/N) / N; `diversity`, the mean distance between adapted pictures
        over that between source pictures.

    Raises:
        ValueError: all source pictures are the same.
    """
    spread = torch.pdist(before).mean()
    if spread == 0:
        raise ValueError("the source generator draws the same picture for every latent")
    a, b = (F.normalize(x - x.mean(0), dim=1) for x in (after, before))
    similarity = a @ b.T  # [N, N]
    rank = (similarity >= similarity.diagonal().unsqueeze(1)).sum(1)
    return {
        "identity_top1": (rank == 1).float().mean().item(),
        "identity_mrr": (1 / rank).mean().item(),
        "diversity": (torch.pdist(after).mean() / spread).item(),
    }


def depth_correlation(before: Tensor, after: Tensor, mask: Tensor) -> float:
    """Return the mean correlation of depth maps [N, 1, n, n] over the foreground of the source.

    A latent with a constant map, or without foreground, counts as 0.

    Raises:
        ValueError: a depth is not finite.
    """
    if not (before.isfinite().all() and after.isfinite().all()):
        raise ValueError("the depth is not finite")
    values = []
    for a, b, inside in zip(after, before, mask > 0.5, strict=True):
        pair = torch.stack([a[inside], b[inside]])  # [2, P]
        flat = pair.shape[1] < 2 or pair.std(1).min() < FLAT
        values.append(0.0 if flat else torch.corrcoef(pair)[0, 1].item())
    return sum(values) / len(values)


def multiview(depth: Tensor, mask: Tensor, c: Tensor, size: int) -> dict[str, float]:
    """Compare the surfaces that two views of one latent show.

    Every foreground pixel of a view is lifted to the depth it has there, and followed into the
    other view; what lies there, at the depth that *that* view has, is brought back. The pixel and
    its return are the same where both depths show one surface. Each view starts once. Points that
    the other view does not show, outside its foreground or behind what it sees, are left out; a
    point in front of what it sees is no occlusion, and counts.

    Args:
        depth: Distance along the ray, [N, 2, n, n].
        mask: Foreground in [0, 1], [N, 2, n, n].
        c: Camera labels, [N, 2, 25].
        size: Height and width of the generator's pictures, whose pixels are the unit.

    Returns:
        `multiview_px`, the mean distance of a pixel and its return, over pixels, views, latents;
        nothing if no pixel is seen twice.
    """
    means = []
    for depths, masks, cameras in zip(depth, mask, c, strict=True):
        there, back = (
            _return_px(*(x[order] for x in (depths, masks, cameras)), size)
            for order in ([0, 1], [1, 0])
        )
        moved = torch.cat([there, back])  # [P]
        if len(moved):
            means.append(moved.mean().item())
    return {"multiview_px": sum(means) / len(means)} if means else {}


def _return_px(depth: Tensor, mask: Tensor, c: Tensor, size: int) -> Tensor:
    """Return how far pixels of view 0 move on their way over view 1 and back, [P] pixels."""
    n = depth.shape[-1]
    origins, rays = pixel_rays(c, n)  # [2, n * n, 3]
    points = origins[0] + rays[0] * depth[0].reshape(-1, 1)  # [n * n, 3]
    start, place = project(points, c[0]), project(points, c[1])  # [n * n, 2]

    # What view 1 sees where the points are; between pixels of which one is background, nothing.
    maps = torch.stack([depth[1], (mask[1] > 0.5).float()])[None]  # [1, 2, n, n]
    seen, inside = F.grid_sample(maps, place[None, None] * 2 - 1, align_corners=False)[0, :, 0]
    away = points - origins[1, :1]
    distance = away.norm(dim=1)
    back = project(origins[1, :1] + away / distance[:, None] * seen[:, None], c[0])
    counted = (mask[0].flatten() > 0.5) & (inside > 0.999) & (seen > (1 - HIDDEN) * distance)
    return ((back - start).norm(dim=1) * size)[counted]


def project(points: Tensor, c: Tensor) -> Tensor:
    """Return where a camera [25] sees points [P, 3] of the world, [P, 2] in [0, 1], x first."""
    cam2world, K = split_label(c)
    in_camera = (points - cam2world[:3, 3]) @ cam2world[:3, :3]  # [P, 3]
    pixels = in_camera @ K.T
    return pixels[:, :2] / pixels[:, 2:]
