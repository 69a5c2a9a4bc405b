"""Triangles to pixels, against brute force, and points to pixels, against the renderer's rays."""

import pytest
import torch

import models.raster
from models.cameras import camera_label, intrinsics, orbit
from models.raster import Fragments, project, rasterise
from models.renderer import pixel_rays

HEIGHT, WIDTH = 9, 13


def soup(count=40, seed=0):
    """Return triangles of random corners, some outside of the image, float64."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(3 * count, 3, generator=generator, dtype=torch.double)
    points = points * torch.tensor([24.0, 20.0, 3.0]) - torch.tensor([6.0, 6.0, -0.5])
    triangles = torch.randperm(3 * count, generator=generator).view(count, 3)
    return points, triangles


def brute_force(points, triangles, height=HEIGHT, width=WIDTH):
    """Return triangle, weights and depth of every pixel, from the planes through the corners.

    A pixel's ray from (0, 0, 0) through (x, y, 1) meets a corner at (x z, y z, z): the weights
    solve for the point on the ray that lies in the triangle.
    """
    chosen = torch.full((height, width), -1)
    weights = torch.zeros(height, width, 3, dtype=torch.double)
    depth = torch.full((height, width), torch.inf, dtype=torch.double)
    for number, triangle in enumerate(triangles):
        x, y, z = points[triangle].T
        corners = torch.stack([x * z, y * z, z])  # In columns.
        if corners.det().abs() < 1e-9:
            continue
        for i in range(height):
            for j in range(width):
                ray = torch.tensor([j + 0.5, i + 0.5, 1.0], dtype=torch.double)
                shares = torch.linalg.solve(corners, ray)
                if (shares >= 0).all() and 1 / shares.sum() < depth[i, j]:
                    chosen[i, j], depth[i, j] = number, 1 / shares.sum()
                    weights[i, j] = shares / shares.sum()
    return Fragments(chosen, weights, depth)


def assert_alike(found, wanted):
    assert torch.equal(found.triangle, wanted.triangle)
    torch.testing.assert_close(found.weights, wanted.weights)
    torch.testing.assert_close(found.depth, wanted.depth)


@pytest.mark.parametrize(("count", "seed"), [(4, 1), (12, 2), (25, 0)])
def test_every_pixel_shows_what_brute_force_finds_nearest(count, seed):
    points, triangles = soup(count, seed)
    wanted = brute_force(points, triangles)
    assert len(wanted.triangle.unique()) > 2
    assert_alike(rasterise(points, triangles, HEIGHT, WIDTH), wanted)


@pytest.mark.parametrize("pairs", [1, 100, 1000])
def test_several_chunks_equal_one(monkeypatch, pairs):
    points, triangles = soup()
    whole = rasterise(points, triangles, HEIGHT, WIDTH)
    monkeypatch.setattr(models.raster, "CHUNK", pairs)
    for one, other in zip(rasterise(points, triangles, HEIGHT, WIDTH), whole, strict=True):
        assert torch.equal(one, other)


def test_the_nearest_wins_whatever_the_order_and_the_turn(monkeypatch):
    points, triangles = soup()
    whole = rasterise(points, triangles, HEIGHT, WIDTH)
    order = torch.randperm(len(triangles), generator=torch.Generator().manual_seed(0))
    for pairs in (models.raster.CHUNK, 50):
        monkeypatch.setattr(models.raster, "CHUNK", pairs)
        mixed = rasterise(points, triangles[order].flip(1), HEIGHT, WIDTH)
        assert torch.equal(mixed.covered, whole.covered) and whole.covered.any()
        number = torch.where(mixed.covered, order[mixed.triangle], -1)
        assert_alike(Fragments(number, mixed.weights.flip(2), mixed.depth), whole)


def test_of_two_at_one_place_the_last_counts_in_one_chunk_and_in_several(monkeypatch):
    points, triangles = soup(1)
    twice = torch.cat([triangles] * 3)
    for pairs in (models.raster.CHUNK, 1):
        monkeypatch.setattr(models.raster, "CHUNK", pairs)
        found = rasterise(points, twice, HEIGHT, WIDTH)
        assert found.covered.any() and (found.triangle[found.covered] == 2).all()


def test_triangles_that_meet_leave_no_pixel_between_them():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.rand(60, 2, generator=generator) * 64, torch.ones(60, 1)], dim=1)
    points[:4, :2] = torch.tensor([[0, 0], [64, 0], [0, 64], [64, 64]])
    triangles = torch.from_numpy(
        pytest.importorskip("scipy.spatial").Delaunay(points[:, :2]).simplices
    ).long()
    found = rasterise(points, triangles, 64, 64)
    assert found.covered.all()
    # A fan whose centre and edges go through centres of pixels.
    points = torch.tensor([[32.5, 32.5], [0, 0], [65, 0], [65, 65], [0, 65]])
    points = torch.cat([points, torch.ones(5, 1)], dim=1)
    fan = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1]])
    assert rasterise(points, fan, 65, 65).covered.all()


def test_weights_are_right_in_perspective():
    points = torch.tensor([[0.5, 0.0, 1.0], [0.5, 9.0, 1.0], [9.5, 0.0, 3.0]])
    found = rasterise(points, torch.tensor([[0, 1, 2]]), 1, 9)
    share = torch.arange(9) / 9
    depth = 1 / ((1 - share) + share / 3)
    torch.testing.assert_close(found.depth[0], depth)
    torch.testing.assert_close(found.weights[0, :, 2], share / 3 * depth)
    torch.testing.assert_close(found.weights[0].sum(1), torch.ones(9))


def test_in_a_plane_weights_lead_to_the_pixels_centres():
    points, triangles = soup()
    points[:, 2] = 1
    found = rasterise(points, triangles, HEIGHT, WIDTH)
    places = found.interpolate(points, triangles)[found.covered]
    rows, columns = found.covered.nonzero().T
    centres = torch.stack([columns, rows], dim=1).double() + 0.5
    torch.testing.assert_close(places[:, :2], centres)


def test_what_has_no_area_or_is_outside_shows_nothing():
    points = torch.tensor(
        [[1.0, 1, 1], [5, 5, 1], [9, 9, 1], [1, 1, 1], [-9, 2, 1], [-2, 2, 1], [-2, 8, 1]]
        + [[20, 2, 1], [30, 2, 1], [20, 8, 1], [2.6, 2.6, 1], [3.4, 2.6, 1], [3.4, 3.4, 1]]
    )
    nothing = [[0, 1, 2], [0, 3, 1], [2, 2, 2], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    found = rasterise(points, torch.tensor(nothing), HEIGHT, WIDTH)  # The last: between centres.
    assert not found.covered.any() and (found.triangle == -1).all()
    assert found.depth.isinf().all() and not found.weights.any()
    behind = torch.tensor([[0.0, 0, 2], [20, 0, 2], [0, 20, 2]])
    both = torch.tensor([*nothing, [13, 14, 15]])
    alone = rasterise(behind, torch.tensor([[0, 1, 2]]), HEIGHT, WIDTH)
    found = rasterise(torch.cat([points, behind]), both, HEIGHT, WIDTH)
    assert torch.equal(found.covered, alone.covered) and alone.covered.any()
    assert torch.equal(found.depth, alone.depth)


@pytest.mark.parametrize(("height", "width"), [(0, 0), (0, 5), (3, 4)])
def test_an_image_without_triangles_or_pixels_is_empty(height, width):
    points, triangles = soup(2)
    found = rasterise(points, triangles[: 2 if height == 0 else 0], height, width)
    assert found.triangle.shape == found.depth.shape == (height, width)
    assert found.weights.shape == (height, width, 3) and not found.covered.any()


def test_interpolation_mixes_the_corners_values_and_is_zero_beside_them():
    points, triangles = soup(3)
    found = rasterise(points, triangles, HEIGHT, WIDTH)
    values = torch.rand(len(points), 2, generator=torch.Generator().manual_seed(1)).double()
    image = found.interpolate(values, triangles)
    assert image.shape == (HEIGHT, WIDTH, 2) and 0 < found.covered.sum() < HEIGHT * WIDTH
    assert not image[~found.covered].any()
    for i, j in found.covered.nonzero().tolist():
        corners = zip(found.weights[i, j], triangles[found.triangle[i, j]], strict=True)
        wanted = sum(weight * values[corner] for weight, corner in corners)
        torch.testing.assert_close(image[i, j], wanted)


INTRINSICS = {
    "centred": [[4.26, 0.0, 0.5], [0.0, 4.26, 0.5], [0.0, 0.0, 1.0]],
    "off centre": [[3.1, 0.0, 0.42], [0.0, 2.2, 0.61], [0.0, 0.0, 1.0]],
    "skew": [[3.1, 0.7, 0.42], [0.0, 2.2, 0.61], [0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("kind", INTRINSICS)
def test_points_along_the_ray_of_a_pixel_project_to_its_centre(kind):
    cam2world = orbit(*torch.tensor([[0.7], [-0.3]], dtype=torch.double))
    c = camera_label(cam2world, torch.tensor(INTRINSICS[kind]))
    n = 7
    origins, directions = pixel_rays(c, n)
    far = torch.linspace(1.5, 4, n * n, dtype=torch.double)
    points = origins[0] + far[:, None] * directions[0]
    seen = project(points, c[0], n)
    rows, columns = torch.arange(n * n) // n, torch.arange(n * n) % n
    centres = torch.stack([columns, rows], dim=1).double() + 0.5
    torch.testing.assert_close(seen[:, :2], centres)
    axis = c[0, :16].view(4, 4)[:3, 2]
    torch.testing.assert_close(seen[:, 2], far * (directions[0] @ axis))


def test_projecting_from_another_precision_or_size_agrees():
    c = camera_label(orbit(torch.tensor([0.2]), torch.tensor([0.1])), intrinsics())[0]
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) * 0.4 - 0.2
    small, large = project(points, c, 10), project(points.double(), c, 40)
    torch.testing.assert_close(4 * small[:, :2].double(), large[:, :2], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(small[:, 2].double(), large[:, 2], atol=1e-5, rtol=1e-5)
