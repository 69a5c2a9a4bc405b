"""metrics.py: closed forms, and changes whose size is known."""

from math import asin, degrees, pi, sin, tan

import pytest
import torch
import torch.nn.functional as F

import metrics
from models.cameras import orbit
from models.renderer import pixel_rays
from puppets import heads
from puppets.data import CAMERAS


def test_direction_is_where_the_orbit_puts_the_camera():
    angles = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, -0.2], [-0.4, 0.3]])
    eye = F.normalize(orbit(*angles.T, radius=1.7, pivot=(0.0, 0.0, 0.0))[:, :3, 3], dim=1)
    torch.testing.assert_close(metrics.direction(angles), eye)
    turned = metrics.angle_deg(eye, eye[:1].expand(4, 3))
    torch.testing.assert_close(turned[1].item(), degrees(0.5), rtol=1e-4, atol=0)
    # Pitch is uniform in area: -0.2 is an elevation of asin(0.4 / pi), not 0.2.
    torch.testing.assert_close(turned[2].item(), degrees(asin(0.4 / pi)), rtol=1e-4, atol=0)


def test_angles_are_exact_where_arccos_is_not():
    a = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    b = torch.tensor([[1e-4, 0.0, 1.0], [0.0, 0.0, -1.0]])
    expected = torch.tensor([degrees(1e-4), 180.0])
    torch.testing.assert_close(metrics.angle_deg(a, b), expected)


def test_gain_is_what_the_adapted_pictures_have_beyond_the_source():
    target, other = torch.eye(4)[:1], torch.eye(4)[1:2]
    assert metrics.cosine_gain(target, other.repeat(3, 1), target.repeat(3, 1)) == (1, 1)
    same = F.normalize(torch.randn(8, 4), dim=1)
    assert metrics.cosine_gain(target, same, same)[1] == 0


def features(count, seed, width=16):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def test_equal_sets_have_no_distance_and_shifted_ones_their_shift():
    pytest.importorskip("torchmetrics")
    real = features(96, seed=0)
    same = metrics.distances(real, real.flip(0))
    assert same["fid"] == pytest.approx(0, abs=1e-6) and -0.2 < same["kid"] <= 0
    scores = [metrics.distances(real, real + shift) for shift in (0.1, 0.2, 0.4)]
    # Of 16 features scaled by 4, each is shifted by 4 times the shift.
    expected = [16 * (4 * shift) ** 2 for shift in (0.1, 0.2, 0.4)]
    assert [score["fid"] for score in scores] == pytest.approx(expected, rel=1e-4)
    kid = [same["kid"], *(score["kid"] for score in scores)]
    assert kid == sorted(kid) and kid[1] - kid[0] > 0.01


def test_distances_are_the_same_at_every_call_and_draw_nothing():
    pytest.importorskip("torchmetrics")
    real, after = features(96, seed=0), features(40, seed=1)
    torch.manual_seed(1)
    first = metrics.distances(real, after)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn and metrics.distances(real, after) == first
    assert abs(first["kid"]) < 0.2  # Both are of one distribution.


SIDE = 0.3  # Angle of the view from the side, radians.


def plane_views(n=32):
    """Return depth, mask and cameras of two views of the plane z = 0: from the side, from front."""
    c = CAMERAS.label(torch.tensor([SIDE, 0.0]), torch.zeros(2))
    origins, rays = pixel_rays(c, n)
    depth = (-origins[..., 2] / rays[..., 2]).view(1, 2, n, n)
    return depth, torch.ones_like(depth), c[None]


def test_two_views_of_one_plane_agree_at_every_resolution():
    for n in (16, 64):
        assert metrics.multiview(*plane_views(n), size=128)["multiview_px"] < 0.01


@pytest.mark.parametrize("error", [0.01, 0.02, -0.02])
def test_depth_that_is_wrong_by_a_known_amount_moves_pixels_by_a_known_amount(error):
    depth, mask, c = plane_views()
    depth[:, 1] += error  # Of the frontal view, whose rays meet the plane at right angles.
    moved = metrics.multiview(depth, mask, c, size=128)["multiview_px"]
    # From the front the error shows as error * tan along the plane, from the side as error * sin.
    px = CAMERAS.focal * 128 / CAMERAS.radius
    assert moved == pytest.approx(abs(error) * px * (tan(SIDE) + sin(SIDE)) / 2, rel=0.1)


def test_true_heads_agree_but_for_what_the_other_view_does_not_see():
    z, c = torch.randn(2, heads.Z_DIM, generator=torch.Generator().manual_seed(0)), []
    views = CAMERAS.label(torch.tensor([0.5, 0.0]), torch.tensor([0.2, 0.0]))  # [2, 25]
    drawn = [heads.render(x.expand(2, -1), views, size=64, supersample=1)[1:] for x in z]
    depth, mask = (torch.stack(maps)[:, :, 0] for maps in zip(*drawn, strict=True))
    c = views.expand(2, -1, -1)
    true = metrics.multiview(depth, mask, c, size=128)["multiview_px"]
    mixed = (torch.stack([x[:, 0], x.roll(1, 0)[:, 1]], dim=1) for x in (depth, mask))
    assert true < 0.5 < 2 * true < metrics.multiview(*mixed, c, size=128)["multiview_px"]


def test_views_without_foreground_have_no_multiview_score():
    depth, mask, c = plane_views()
    assert metrics.multiview(depth, torch.zeros_like(mask), c, size=128) == {}


def test_reversed_depth_correlates_negatively_and_flat_depth_not_at_all():
    depth = 2.5 + torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mask, flat = torch.ones_like(depth), torch.full_like(depth, 2.7)
    half = torch.cat([depth[:24], flat[24:]])
    for after, inside, expected in (
        (-depth, mask, -1),
        (flat, mask, 0),
        (half, mask, 0.5),
        (depth, 0 * mask, 0),
    ):
        found = metrics.depth_correlation(depth, after, inside)
        assert found == pytest.approx(expected, abs=1e-5)
