"""Textures: atlas, what cameras see of it, and painting, on spheres of which all is known."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.cameras import CameraSetup
from models.mesh import Mesh
from models.renderer import pixel_rays
from models.texture import (
    blend,
    cuts,
    fit,
    look,
    sample_texture,
    see_texels,
    spread_seen,
    to_textured_glb,
    unwrap,
    vertex_normals,
)

RADIUS, SIZE = 0.2, 128
CAMERAS = CameraSetup(pivot=(0.0, 0.0, 0.0), yaw_range=math.pi)
FRONT, BACK = CAMERAS.label(torch.tensor([0.0, math.pi]), torch.zeros(2))


@pytest.fixture(autouse=True, scope="module")
def packages():
    for name in ("xatlas", "trimesh", "scipy"):
        pytest.importorskip(name)


def colours(points):
    """Return what the sphere looks like at points [..., 3], in [-1, 1]: linear, all different."""
    x, y, z = (points / RADIUS).unbind(-1)
    return torch.stack([0.8 * x, 0.5 * y - 0.4 * z, 0.6 * z], dim=-1)


def sphere(centre=(0.0, 0.0, 0.0), radius=RADIUS):
    """Return a sphere of 1280 triangles, all white."""
    import trimesh

    body = trimesh.creation.icosphere(3, radius)
    vertices = (body.vertices + np.array(centre)).astype(np.float32)
    return Mesh(vertices, np.asarray(body.faces), np.full((len(vertices), 3), 255, np.uint8))


@pytest.fixture(scope="module")
def atlas(packages):
    return unwrap(sphere(), SIZE)


@pytest.fixture(scope="module")
def texture(atlas):
    """The texture of `colours`."""
    return atlas.fill(colours(atlas.points))


def trace(c, n):
    """Return the distance to the sphere along the ray of each pixel, [n, n]; inf beside it."""
    origins, directions = pixel_rays(c[None], n)
    along = (origins * directions).sum(-1)
    inside = along.square() - origins.square().sum(-1) + RADIUS**2
    return torch.where(inside > 0, -along - inside.clamp_min(0).sqrt(), torch.inf).view(n, n)


def photo(c, n):
    """Return a picture of the sphere before black, [1, 3, n, n], as rays see it."""
    origins, directions = (x.view(n, n, 3) for x in pixel_rays(c[None], n))
    far = trace(c, n)[..., None]
    seen = torch.where(far.isfinite(), colours(origins + far.nan_to_num(posinf=0) * directions), -1)
    return seen.movedim(-1, 0)[None]


def towards(atlas, c):
    """Return the cosine between the sphere's own normals and the way to the camera, [N]."""
    normals = F.normalize(atlas.points, dim=1)
    return (F.normalize(c[:16].view(4, 4)[:3, 3] - atlas.points, dim=1) * normals).sum(1)


# The atlas.


def test_texels_lie_on_the_surface_and_normals_point_outwards(atlas):
    assert atlas.covered.sum() == len(atlas.points) > 0.3 * SIZE**2
    assert (atlas.points.norm(dim=1) - RADIUS).abs().max() < 1e-3  # As flat triangles do.
    assert (atlas.outwards * F.normalize(atlas.points, dim=1)).sum(1).min() > 0.999
    assert (atlas.normals * F.normalize(atlas.vertices, dim=1)).sum(1).min() > 0.999
    area = np.bincount(np.sign(atlas.points.numpy()).astype(int) @ [9, 3, 1] + 13, minlength=27)
    assert area[[0, 2, 6, 8, 18, 20, 24, 26]].min() > 0.1 * len(atlas.points)  # All octants.


def test_the_atlas_is_the_mesh_cut_open(atlas):
    mesh = sphere()
    assert len(atlas.triangles) == len(mesh.triangles) and len(atlas.vertices) > len(mesh.vertices)
    assert torch.equal(
        atlas.vertices[atlas.triangles], torch.from_numpy(mesh.vertices[mesh.triangles])
    )
    assert atlas.uv.min() >= 0 and atlas.uv.max() <= 1


def test_texels_are_where_uv_says(atlas):
    places = atlas.fill(atlas.points)
    found = F.grid_sample(places, atlas.uv[None, None] * 2 - 1, align_corners=False)[0, :, 0].mT
    texel = (4 * math.pi * RADIUS**2 / len(atlas.points)) ** 0.5
    error = (found - atlas.vertices).norm(dim=1) / texel
    assert error.median() < 0.2 and error.max() < 2.5  # At the rims of charts.


def test_every_texel_has_the_colour_of_the_nearest_that_is_covered(atlas):
    values = torch.arange(1.0, 1 + len(atlas.points))[:, None]
    filled = atlas.fill(values)
    assert filled.shape == (1, 1, SIZE, SIZE) and filled.min() == 1
    assert torch.equal(atlas.texels(filled), values)
    own = atlas.covered.nonzero().double()  # [N, 2], in the order of texels.
    holes = (~atlas.covered).nonzero()[::7]
    taken = own[filled[0, 0, holes[:, 0], holes[:, 1]].long() - 1]
    distance = (taken - holes).norm(dim=1)
    torch.testing.assert_close(distance, torch.cdist(holes.double(), own).amin(1))


def test_the_first_texture_has_the_meshs_own_colours():
    mesh = sphere()
    wanted = colours(torch.from_numpy(mesh.vertices))
    pixels = ((wanted + 1) * 127.5).round().byte().numpy()
    atlas = unwrap(mesh._replace(colors=pixels), SIZE)
    found = atlas.texels(atlas.start)
    assert (found - colours(atlas.points)).abs().max() < 1.5 / 127.5


def test_what_is_not_seen_gets_the_colour_of_the_nearest_that_is(atlas):
    seen = atlas.points[:, 2] > 0
    bright = replace(atlas, start=atlas.fill(atlas.points))
    spread = bright.texels(spread_seen(bright, seen).start)
    assert torch.equal(spread[seen], atlas.points[seen])
    points = atlas.points[~seen][::7]  # Colours are places, so the distance tells whose they are.
    distance = (spread[~seen][::7] - points).norm(dim=1)
    torch.testing.assert_close(distance, torch.cdist(points, atlas.points[seen]).amin(1))
    assert spread_seen(atlas, seen & False) is atlas


def test_normals_of_vertices_are_means_by_area():
    corners = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 3]])
    normals = vertex_normals(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]))
    wanted = torch.tensor([[3.0, 0, 2], [0, 0, 1], [3, 0, 2], [1, 0, 0]])
    torch.testing.assert_close(normals, F.normalize(wanted, dim=1))


def test_a_texture_too_small_for_its_mesh_is_refused():
    with pytest.raises(ValueError, match="--texture 2 is too small for this mesh"):
        unwrap(sphere(), 2)


# What cameras see.


@pytest.mark.parametrize(("yaw", "pitch"), [(0.0, 0.0), (0.9, -0.4), (3.0, 0.3)])
def test_depth_is_the_distance_along_the_ray(atlas, yaw, pitch):
    c = CAMERAS.label(torch.tensor([yaw]), torch.tensor([pitch]))[0]
    c[18], c[21] = 0.56, 0.47  # Off centre.
    view, truth = look(atlas, c, 96), trace(c, 96)
    mask, depth = view.mask[0, 0] > 0, view.depth[0, 0]
    assert (mask != truth.isfinite()).float().mean() < 0.005 and not depth[~mask].any()
    inner = F.max_pool2d((~mask)[None].float(), 7, 1, 3)[0] == 0
    assert inner.sum() > 1000
    assert (depth - truth)[inner].abs().max() < 3e-3


def test_a_look_trusts_pixels_less_towards_edges(atlas):
    view = look(atlas, FRONT, 96)
    far = trace(FRONT, 96).isfinite()
    rim = far & (F.max_pool2d((~far)[None].float(), 3, 1, 1)[0] > 0)
    assert view.edge[rim].max() < 0.3 and view.edge[48, 48] == 1
    middle = view.edge[48, 48:]  # From the middle outwards.
    assert (middle[:31].diff() <= 0).all() and middle[:31].unique().numel() >= 3


def test_a_drawn_texture_is_the_picture_that_rays_see(atlas, texture):
    c = CAMERAS.label(torch.tensor([0.9]), torch.tensor([-0.4]))[0]
    view = look(atlas, c, 96)
    picture, truth = view.draw(texture, background=-1.0), photo(c, 96)
    assert picture.shape == (1, 3, 96, 96)
    error = (picture - truth).abs().amax(1)[0]
    assert error[view.edge == 1].max() < 0.03 and (view.edge == 1).sum() > 1000
    beside = view.mask[0, 0] == 0
    assert (picture[0, :, beside] == -1).all() and (view.draw(texture)[0, :, beside] == 1).all()


def test_drawing_is_differentiable_and_reaches_what_is_seen_alone(atlas, texture):
    view = look(atlas, FRONT, 64)
    generator = torch.Generator().manual_seed(0)
    probe, step = (torch.randn(shape, generator=generator) for shape in ((1, 3, 64, 64), (1,)))
    learnt = texture.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((view.draw(learnt) * probe).sum(), learnt)
    change = step * torch.randn(texture.shape, generator=generator)
    moved = ((view.draw(texture + change) - view.draw(texture)) * probe).sum()
    torch.testing.assert_close(moved, (gradient * change).sum(), rtol=1e-3, atol=1e-3)
    reached = atlas.texels(gradient).abs().sum(1) > 0
    assert reached[towards(atlas, FRONT) > 0.3].float().mean() > 0.3
    assert not reached[towards(atlas, FRONT) < -0.1].any()


# Pictures onto the texture.


def test_texels_take_the_colours_of_the_points_that_a_picture_shows(atlas):
    c = CAMERAS.label(torch.tensor([0.5]), torch.tensor([-0.2]))[0]
    view = look(atlas, c, 192)
    seen, weight = see_texels(atlas, view, photo(c, 96))  # Half as large as the look.
    cosine = towards(atlas, c)
    assert (weight <= cosine.clamp_min(0) + 1e-2).all() and weight[cosine > 0.5].min() > 0.3
    torch.testing.assert_close(weight[cosine > 0.8], cosine[cosine > 0.8], atol=0.01, rtol=0.01)
    error = (seen - colours(atlas.points)).abs().amax(1)
    assert error[weight > 0.2].max() < 0.008


def test_pictures_from_all_sides_paint_the_whole_texture(atlas):
    turns = torch.arange(6) * (math.pi / 3)
    cameras = torch.cat([CAMERAS.label(turns, torch.full((6,), p)) for p in (-1.1, 0.0, 1.1)])
    seen = [see_texels(atlas, look(atlas, c, 192), photo(c, 96)) for c in cameras]
    painted, best = blend(atlas, seen)
    assert best.min() > 0.4
    assert (atlas.texels(painted) - colours(atlas.points)).abs().max() < 0.008


def test_the_front_does_not_paint_the_back(atlas):
    seen = [see_texels(atlas, look(atlas, FRONT, 128), photo(FRONT, 128))]
    painted, best = blend(atlas, seen)
    behind = towards(atlas, FRONT) < 0
    assert 0.4 < behind.float().mean() < 0.6 and not best[behind].any()
    white = atlas.texels(painted)[behind]
    torch.testing.assert_close(white, torch.ones_like(white))
    seen.append(see_texels(atlas, look(atlas, BACK, 128), photo(BACK, 128)))
    again, better = blend(atlas, seen)
    error = (atlas.texels(again) - colours(atlas.points)).abs().amax(1)
    assert behind[better > 0.3].any() and error[better > 0.3].max() < 0.008
    before = best > 0.7
    torch.testing.assert_close(atlas.texels(again)[before], atlas.texels(painted)[before])


def test_what_is_hidden_behind_something_takes_nothing():
    front, rear = sphere((0.0, 0.0, 0.3), 0.15), sphere((0.0, 0.0, -0.2), 0.1)
    both = Mesh(
        *map(
            np.concatenate,
            (
                (front.vertices, rear.vertices),
                (front.triangles, rear.triangles + len(front.vertices)),
                (front.colors, rear.colors),
            ),
        )
    )
    atlas = unwrap(both, SIZE)
    hidden = atlas.points[:, 2] < 0
    dark = torch.full((1, 3, 128, 128), -1.0)
    _, weight = see_texels(atlas, look(atlas, FRONT, 128), dark)
    assert not weight[hidden].any() and weight[~hidden].max() > 0.95
    _, weight = see_texels(atlas, look(atlas, BACK, 128), dark)
    assert weight[hidden].max() > 0.95
    side = CAMERAS.label(torch.tensor([math.pi / 2]), torch.zeros(1))[0]
    _, weight = see_texels(atlas, look(atlas, side, 128), dark)
    assert weight[hidden].max() > 0.95 and weight[~hidden].max() > 0.95


def test_a_blend_is_the_closed_form(atlas):
    generator = torch.Generator().manual_seed(0)
    count = len(atlas.points)
    seen = [
        (torch.rand(count, 3, generator=generator), torch.rand(count, generator=generator))
        for _ in range(3)
    ]
    texture, best = blend(atlas, seen, sharp=3, floor=0.1)
    parts = [(torch.ones(count, 3), torch.full((count,), 0.1)), *seen]  # The mesh is white.
    total = sum(weight[:, None] ** 3 * colour for colour, weight in parts)
    share = sum(weight[:, None] ** 3 for _, weight in parts)
    torch.testing.assert_close(atlas.texels(texture), total / share)
    assert torch.equal(best, torch.stack([weight for _, weight in seen]).amax(0))


def test_fitting_brings_renders_to_the_pictures_and_leaves_alone_what_nobody_sees(atlas):
    cameras = CAMERAS.label(torch.tensor([-0.4, 0.4]), torch.zeros(2))
    looks = [look(atlas, c, 96) for c in cameras]
    given = [
        (view, photo(c, 96), view.edge[None, None] * view.mask)
        for view, c in zip(looks, cameras, strict=True)
    ]
    start = torch.zeros(1, 3, SIZE, SIZE)
    fitted = fit(atlas, start, given, grain=0, seam=0)

    def error(texture):
        return sum(
            ((view.draw(texture) - image).square() * weight).sum() / weight.sum()
            for view, image, weight in given
        )

    assert error(fitted) < 0.02 * error(start)
    unseen = (torch.stack([towards(atlas, c) for c in cameras]) < -0.1).all(0)
    assert unseen.sum() > 1000 and not atlas.texels(fitted)[unseen].any()
    held = fit(atlas, start, given, stay=1e3, grain=0, seam=0)
    assert error(start) > error(held) > 10 * error(fitted)


def test_fitting_goes_by_the_weights_alone_and_stays_in_range(atlas):
    view = look(atlas, FRONT, 96)
    left = torch.zeros(1, 1, 96, 96)
    left[..., :48] = 1
    bright = torch.full((1, 3, 96, 96), 3.0)  # Brighter than colours can be.
    given = [(view, bright, left * view.mask)]
    fitted = fit(atlas, torch.zeros(1, 3, SIZE, SIZE), given, steps=80, grain=0, seam=0)
    picture = view.draw(fitted)[0, 0]
    inner = (view.edge == 1) & (view.mask[0, 0] > 0)
    columns = torch.arange(96).expand(96, 96)
    assert (picture[inner & (columns < 44)] > 0.9).all() and fitted.max() <= 1
    assert not picture[inner & (columns >= 52)].any()


def test_pictures_may_be_smaller_and_grain_is_smoothed(atlas):
    view = look(atlas, FRONT, 96)
    small = torch.nn.functional.avg_pool2d(photo(FRONT, 96), 2)
    given = [(view, small, torch.nn.functional.avg_pool2d(view.edge * view.mask, 2))]
    start = torch.zeros(1, 3, SIZE, SIZE)
    rough, smooth = (fit(atlas, start, given, steps=120, grain=grain) for grain in (0, 1))
    for texture in (rough, smooth):
        drawn = torch.nn.functional.avg_pool2d(view.draw(texture), 2)
        error = ((drawn - small).square() * given[0][2]).sum() / given[0][2].sum()
        assert error < 0.02 * small.square().mean()
    rough, smooth = (x.diff(dim=3).diff(dim=3).square().mean() for x in (rough, smooth))
    assert rough > 2 * smooth  # Second differences: noise from texel to texel.


def test_cuts_are_the_same_places_on_both_sides(atlas):
    here, there = cuts(atlas, points=3)
    assert len(here) == len(there) > 100 and not (here == there).all(1).any()
    places = atlas.fill(atlas.points)
    texel = (4 * math.pi * RADIUS**2 / len(atlas.points)) ** 0.5
    gap = (sample_texture(places, here) - sample_texture(places, there)).norm(dim=1)
    assert gap.median() < texel and gap.max() < 4 * texel
    # Every vertex that the atlas has more than once is the end of one.
    _, place, times = torch.unique(atlas.vertices, dim=0, return_inverse=True, return_counts=True)
    ends = torch.cat(cuts(atlas, points=1))
    twice = atlas.uv[times[place] > 1]
    assert torch.cdist(twice, ends).amin(1).max() < 0.05 and len(twice) > 50


def test_a_mesh_of_one_chart_has_no_cuts():
    corners = np.array([[-0.1, -0.1, 0], [0.1, -0.1, 0], [0.1, 0.1, 0], [-0.1, 0.1, 0]], np.float32)
    triangles = np.array([[0, 1, 2], [0, 2, 3]])
    flat = unwrap(Mesh(corners, triangles, np.full((4, 3), 9, np.uint8)), 64)
    here, there = cuts(flat)
    assert here.shape == there.shape == (0, 2)
    texture = torch.zeros(1, 3, 64, 64)
    assert torch.equal(fit(flat, texture, [], steps=2), texture)


def test_fitting_closes_the_seams(atlas):
    """Charts of different brightness, of which pictures say nothing."""
    here, there = cuts(atlas)
    start = torch.linspace(-0.5, 0.5, SIZE).expand(1, 3, SIZE, SIZE)
    jumps = [
        (sample_texture(x, here) - sample_texture(x, there)).abs().mean()
        for x in (start, fit(atlas, start, [], seam=0), fit(atlas, start, []))
    ]
    assert jumps[0] == jumps[1] > 0.1 and jumps[2] < 0.3 * jumps[0]


# The file.


def read_parts(content):
    """Return the JSON of a binary glTF and the bytes of its bufferViews."""
    size = int.from_bytes(content[12:16], "little")
    tree, body = json.loads(content[20 : 20 + size]), content[28 + size :]
    views = []
    for view in tree["bufferViews"]:
        start = view.get("byteOffset", 0)
        views.append(body[start : start + view["byteLength"]])
    return tree, views


def test_a_file_shows_each_vertex_in_its_colour(atlas, texture):
    import trimesh

    content = to_textured_glb(atlas, texture)
    found = trimesh.load(io.BytesIO(content), file_type="glb", process=False, force="mesh")
    assert np.array_equal(found.faces, atlas.triangles.numpy())
    assert np.array_equal(found.vertices.astype(np.float32), atlas.vertices.numpy())
    picture = np.asarray(found.visual.material.baseColorTexture.convert("RGB"), int)
    u, v = found.visual.uv.T  # trimesh's v points up.
    column, row = ((x * SIZE).astype(int) for x in (u, 1 - v))
    wanted = (colours(atlas.vertices).numpy() + 1) * 127.5
    error = np.abs(picture[row, column] - wanted)
    assert error.max() < 8 and wanted.std(0).min() > 30
    for other in ((SIZE - 1 - row, column), (column, row)):  # Upside down, or transposed.
        assert np.abs(picture[other] - wanted).mean() > 10 * error.mean()


def test_a_file_is_as_the_format_asks_and_shown_unlit(atlas, texture):
    tree, views = read_parts(to_textured_glb(atlas, texture))
    (part,) = tree["meshes"][0]["primitives"]
    assert part["attributes"].keys() == {"POSITION", "TEXCOORD_0"}
    accessor = tree["accessors"][part["attributes"]["TEXCOORD_0"]]
    uv = np.frombuffer(views[accessor["bufferView"]], "<f4").reshape(-1, 2)
    np.testing.assert_allclose(uv, atlas.uv.numpy(), atol=1e-6)  # glTF's v points down.
    material = tree["materials"][part["material"]]
    assert material["extensions"] == {"KHR_materials_unlit": {}}
    assert tree["extensionsUsed"] == ["KHR_materials_unlit"]
    place = material["pbrMetallicRoughness"]["baseColorTexture"]["index"]
    image = tree["images"][tree["textures"][place]["source"]]
    picture = Image.open(io.BytesIO(views[image["bufferView"]]))
    assert picture.size == (SIZE, SIZE) and picture.mode == "RGB"
    pixels = np.asarray(picture).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(pixels - texture[0].numpy()).max() <= 0.5 / 127.5 + 1e-6


def test_equal_textures_give_equal_bytes(atlas, texture):
    assert to_textured_glb(unwrap(sphere(), SIZE), texture) == to_textured_glb(atlas, texture)
