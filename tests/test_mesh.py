"""Meshes: closed, facing outwards, where the pictures show the surface, readable by others."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_generator import small_generator

import models.mesh
from files.generators import load_generator
from harness import store
from harness.run_folder import REPOSITORY
from models.mesh import Mesh, extract_mesh, largest_piece, save_mesh, visible_box
from puppets import heads
from subjects import seed_to_ws, seed_to_z

PLY = b"""ply
format binary_little_endian 1.0
element vertex 3
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
element face 1
property list uchar int vertex_indices
end_header
"""


def ball_mesh(monkeypatch, centre, voxels=64, others=(), **options):
    """Return the mesh of a ball of radius 0.2, red above its centre and green below.

    Other balls are given by centre and radius.
    """
    pytest.importorskip("skimage")
    G, centre = small_generator(), torch.tensor(centre)
    balls = [(centre, 0.2), *((torch.tensor(place), radius) for place, radius in others)]

    def field(coordinates, directions, ws, planes):
        above = ((coordinates - centre)[..., 1:2] > 0).float()
        rgb = torch.cat([above, 1 - above, 0 * above, above], dim=-1)
        inside = [r - (coordinates - place).norm(dim=-1, keepdim=True) for place, r in balls]
        return {"sigma": 7 + 300 * torch.stack(inside).amax(0), "rgb": rgb}

    monkeypatch.setattr(G, "sample_mixed", field)
    monkeypatch.setattr(models.mesh, "surface_density", lambda *_: torch.tensor(7.0))
    return extract_mesh(G, torch.zeros(1, G.backbone.num_ws, G.w_dim), voxels, **options)


def volume(mesh):
    """Return the volume inside; it is positive if triangles are counterclockwise from outside."""
    a, b, c = (mesh.vertices[mesh.triangles[:, i]] for i in range(3))
    return (a * np.cross(b, c)).sum() / 6


def is_closed(mesh):
    edges = np.concatenate([mesh.triangles[:, pair] for pair in ([0, 1], [1, 2], [2, 0])])
    forth, back = ({tuple(edge) for edge in direction} for direction in (edges, edges[:, ::-1]))
    return forth == back and len(forth) == len(edges)


def test_ball_becomes_a_ball_in_world_units(monkeypatch):
    mesh = ball_mesh(monkeypatch, centre=[0.02, -0.05, 0.1])
    offset = mesh.vertices - np.array([0.02, -0.05, 0.1])
    np.testing.assert_allclose(np.linalg.norm(offset, axis=1), 0.2, atol=1e-3)
    assert is_closed(mesh)
    assert volume(mesh) == pytest.approx(4 / 3 * np.pi * 0.2**3, rel=0.01)
    assert mesh.colors[offset[:, 1] > 0.01].mean(0).tolist() == [255, 0, 0]
    assert mesh.colors[offset[:, 1] < -0.01].mean(0).tolist() == [0, 255, 0]


@pytest.mark.parametrize(("axis", "side"), [(0, -1), (1, -1), (2, -1), (0, 1), (1, 1), (2, 1)])
def test_what_no_camera_sees_is_cut_off_flat(monkeypatch, axis, side):
    limit = visible_box(small_generator())[(side + 1) // 2][axis].item()
    centre = np.zeros(3)
    centre[axis] = limit
    mesh = ball_mesh(monkeypatch, centre.tolist(), voxels=48)
    depth = (limit - mesh.vertices[:, axis]) * side
    assert -1e-5 < depth.min() < 1 / 48  # Within a voxel.
    assert (depth < depth.min() + 1e-4).mean() > 0.2  # The cut.
    assert is_closed(mesh) and volume(mesh) > 0


def test_nothing_in_the_visible_box_is_no_mesh(monkeypatch):
    assert ball_mesh(monkeypatch, centre=[2.0, 0.0, 0.0]) is None


def test_visible_box_follows_the_cameras():
    half = 2.7 / 4.2647 / 2
    low, high = visible_box(small_generator())
    torch.testing.assert_close(low, torch.tensor([-half, -half, -0.5]))
    torch.testing.assert_close(high, torch.tensor([half, half, 0.45]))
    low, _ = visible_box(small_generator({"foreground_depth": 2.85}))
    torch.testing.assert_close(low[2], torch.tensor(-0.15))
    low, high = visible_box(small_generator({"ray_start": "auto", "ray_end": "auto"}))
    torch.testing.assert_close(torch.stack([low[2], high[2]]), torch.tensor([-0.5, 0.5]))


def test_mesh_takes_one_pass_of_the_backbone(monkeypatch):
    pytest.importorskip("skimage")
    G, passes = small_generator(), []
    G.decoder.net[2].bias.data[0] += 20  # Density.
    forward = G.backbone.synthesis.forward
    monkeypatch.setattr(
        G.backbone.synthesis, "forward", lambda ws, *a: passes.append(len(ws)) or forward(ws, *a)
    )
    mesh = extract_mesh(G, seed_to_ws(G, 0), 32)
    assert passes == [1]
    assert is_closed(mesh) and volume(mesh) > 0


def test_mesh_of_an_embedded_head_is_where_the_head_is():
    pytest.importorskip("skimage")
    G = load_generator(REPOSITORY / "checkpoints/puppets/generator.safetensors")
    torch.manual_seed(0)
    points = torch.from_numpy(extract_mesh(G, seed_to_ws(G, 0), 64).vertices)
    points = points[points[:, 2] > 0.1]  # The front.
    eye = torch.tensor([0.0, 0.0, 2.7])
    rays = F.normalize(points - eye, dim=1)[None]
    truth, _ = heads.trace(heads.build(seed_to_z(0, G.z_dim)), eye.expand_as(rays), rays)
    error = (points - eye).norm(dim=1) - truth[0]
    assert error[error.isfinite()].abs().median() < 0.012  # EG3D's density of 10 is 0.018 off.


def test_ply_holds_what_its_header_says(tmp_path):
    corners = np.arange(9, dtype=np.float32).reshape(3, 3)
    colors = np.arange(9, dtype=np.uint8).reshape(3, 3)
    save_mesh(Mesh(corners, np.array([[0, 1, 2]], np.int32), colors), tmp_path / "x.ply")
    content = (tmp_path / "x.ply").read_bytes()
    assert content.startswith(PLY)
    body = content[len(PLY) :]
    assert len(body) == 3 * (12 + 3) + 1 * (1 + 12)
    assert np.frombuffer(body[15:27], "<f4").tolist() == [3, 4, 5]
    assert list(body[27:30]) == [3, 4, 5]
    assert body[45] == 3 and np.frombuffer(body[46:], "<i4").tolist() == [0, 1, 2]


# Pieces, and fewer triangles.


TETRAHEDRON = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
OCTAHEDRON = np.array(
    [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float32
)
OCTANTS = np.array([[x, y, z] for x in (0, 1) for y in (2, 3) for z in (4, 5)], np.int32)


def two_pieces():
    """Return a tetrahedron and an octahedron, of 4 and 8 triangles, with vertices shuffled."""
    few = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    vertices = np.concatenate([100 * TETRAHEDRON, OCTAHEDRON])
    triangles = np.concatenate([few, OCTANTS + len(TETRAHEDRON)])
    order = np.random.RandomState(0).permutation(len(vertices))
    rank = np.argsort(order)
    return vertices[order], rank[triangles][[4, 0, 5, 1, 6, 7, 2, 8, 3, 9, 10, 11]]


def corners_of(vertices, triangles):
    """Return each triangle as the places of its corners, sorted."""
    return sorted(map(tuple, vertices[triangles].reshape(len(triangles), -1).tolist()))


def test_largest_piece_is_the_one_of_most_triangles_and_numbered_anew():
    vertices, triangles = two_pieces()
    kept, renamed = largest_piece(vertices, triangles)
    assert len(kept) == 6 and sorted(map(tuple, kept)) == sorted(map(tuple, OCTAHEDRON))
    assert np.array_equal(np.unique(renamed), np.arange(6)) and len(renamed) == 8
    octahedron = [t for t in triangles if np.abs(vertices[t]).max() == 1]
    assert corners_of(kept, renamed) == corners_of(vertices, np.array(octahedron))


def test_largest_piece_of_one_piece_is_all_of_it():
    vertices, triangles = two_pieces()
    once = largest_piece(vertices, triangles)
    for one, again in zip(once, largest_piece(*once), strict=True):
        assert np.array_equal(one, again)


def test_what_floats_beside_a_head_is_left_out_unless_all_is_kept(monkeypatch):
    ball = {"centre": [0.0, -0.08, 0.0], "voxels": 48}
    crumbs = [([0.22, 0.22, 0.2], 0.06), ([-0.2, 0.24, -0.3], 0.04)]
    alone = ball_mesh(monkeypatch, **ball)
    for one, other in zip(alone, ball_mesh(monkeypatch, **ball, others=crumbs), strict=True):
        assert np.array_equal(one, other)
    whole = ball_mesh(monkeypatch, **ball, others=crumbs, whole=True)
    crumbs_volume = sum(4 / 3 * np.pi * radius**3 for _, radius in crumbs)
    assert volume(whole) - volume(alone) == pytest.approx(crumbs_volume, rel=0.15)
    assert is_closed(whole) and len(whole.triangles) > len(alone.triangles)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("faces", [100, 1000])
def test_a_mesh_of_fewer_triangles_keeps_its_form_and_colours(monkeypatch, faces, whole):
    pytest.importorskip("fast_simplification")
    centre = [0.02, -0.05, 0.1]
    mesh = ball_mesh(monkeypatch, centre, faces=faces, whole=whole)
    assert 0.9 * faces <= len(mesh.triangles) <= 1.05 * faces
    assert len(mesh.vertices) == len(mesh.colors) <= faces
    assert volume(mesh) == pytest.approx(4 / 3 * np.pi * 0.2**3, rel=0.1)
    offset = mesh.vertices - np.array(centre)
    assert mesh.colors[offset[:, 1] > 0].mean(0).tolist() == [255, 0, 0]
    assert mesh.colors[offset[:, 1] < 0].mean(0).tolist() == [0, 255, 0]


def test_a_mesh_of_fewer_triangles_has_the_types_of_any_other(monkeypatch):
    pytest.importorskip("fast_simplification")
    mesh = ball_mesh(monkeypatch, [0.0] * 3, voxels=24, faces=100)
    assert (mesh.vertices.dtype, mesh.colors.dtype) == (np.float32, np.uint8)
    assert mesh.triangles.dtype.kind == "i"


def test_a_mesh_of_fewer_triangles_than_asked_for_is_left_as_it_is(monkeypatch):
    plenty = ball_mesh(monkeypatch, [0.0, 0.0, 0.0], voxels=24, faces=10**6)
    for one, other in zip(plenty, ball_mesh(monkeypatch, [0.0] * 3, voxels=24), strict=True):
        assert np.array_equal(one, other)


def test_fewer_triangles_of_a_head_have_the_colours_of_its_field():
    pytest.importorskip("skimage")
    pytest.importorskip("fast_simplification")
    G = load_generator(REPOSITORY / "checkpoints/puppets/generator.safetensors")
    ws = seed_to_ws(G, 0)
    mesh = extract_mesh(G, ws, 48, faces=400)
    assert 300 < len(mesh.triangles) <= 420
    rgb = G.sample_mixed(torch.from_numpy(mesh.vertices)[None].float(), None, ws)["rgb"]
    wanted = (G.colours(rgb, ws)[0] * 255 + 0.5).clamp(0, 255).to(torch.uint8).numpy()
    assert np.abs(mesh.colors.astype(int) - wanted).max() <= 1
    assert mesh.colors.std(0).min() > 20


# Files.


def painted():
    """Return an octahedron of many colours, with one more triangle at the place of its first."""
    colors = np.array(
        [[0, 1, 2], [10, 11, 12], [64, 128, 192], [255, 254, 253], [188, 0, 255], [3, 30, 77]]
        + [[9, 99, 199], [50, 60, 70], [4, 4, 4]]
    )
    vertices = np.concatenate([OCTAHEDRON, OCTAHEDRON[[0, 2, 4]]]) * np.float32(0.3217)
    triangles = np.concatenate([OCTANTS, [[6, 7, 8]]]).astype(np.int32)
    return Mesh(vertices + np.float32(0.0123), triangles, colors.astype(np.uint8))


def read_ply(path):
    """Return what `to_ply` wrote."""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    counts = [int(line.split()[-1]) for line in header.splitlines() if line.startswith(b"element")]
    vertices = np.frombuffer(body, [("place", "<f4", 3), ("color", "u1", 3)], counts[0])
    faces = np.frombuffer(
        body, [("count", "u1"), ("corners", "<i4", 3)], counts[1], vertices.nbytes
    )
    assert vertices.nbytes + faces.nbytes == len(body)
    return Mesh(vertices["place"], faces["corners"], vertices["color"])


def read_glb(path):
    """Return the JSON of a binary glTF 2.0, and its accessors as arrays."""
    content = path.read_bytes()
    magic, version, length = content[:4], *np.frombuffer(content[4:12], "<u4").tolist()
    assert (magic, version, length) == (b"glTF", 2, len(content))
    chunks, start = {}, 12
    while start < length:
        size = int.from_bytes(content[start : start + 4], "little")
        assert size % 4 == 0
        chunks[content[start + 4 : start + 8]] = content[start + 8 : start + 8 + size]
        start += 8 + size
    assert list(chunks) == [b"JSON", b"BIN\0"]
    tree, arrays = json.loads(chunks[b"JSON"]), []
    kinds, widths = {5125: "<u4", 5126: "<f4"}, {"SCALAR": 1, "VEC3": 3, "VEC4": 4}
    for accessor in tree["accessors"]:
        view = tree["bufferViews"][accessor["bufferView"]]
        offset = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
        width = widths[accessor["type"]]
        numbers = np.frombuffer(
            chunks[b"BIN\0"],
            kinds[accessor["componentType"]],
            accessor["count"] * width,
            offset,
        ).reshape(-1, width)
        assert "byteStride" not in view and view["byteLength"] >= numbers.nbytes
        arrays.append(numbers)
    return tree, arrays


def test_glb_holds_the_mesh_with_colours_as_linear_light(tmp_path):
    pytest.importorskip("trimesh")
    mesh = painted()
    save_mesh(mesh, tmp_path / "x.glb")
    save_mesh(mesh, tmp_path / "x.ply")
    tree, arrays = read_glb(tmp_path / "x.glb")
    (part,) = tree["meshes"][0]["primitives"]
    assert part.get("mode", 4) == 4 and part["attributes"].keys() == {"POSITION", "COLOR_0"}
    places, colors = (arrays[part["attributes"][name]] for name in ("POSITION", "COLOR_0"))
    assert np.array_equal(places, read_ply(tmp_path / "x.ply").vertices)
    assert np.array_equal(arrays[part["indices"]].reshape(-1, 3), mesh.triangles)
    (node,) = tree["scenes"][tree["scene"]]["nodes"]
    assert not {"matrix", "scale", "rotation", "translation"} & tree["nodes"][node].keys()

    assert colors.dtype == np.float32 and (colors[:, 3] == 1).all()
    linear = colors[:, :3].astype(float)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(encoded * 255, mesh.colors, atol=1e-2)
    assert linear[4, 0] == pytest.approx(0.503, abs=0.002)  # 188 is half of the light.


def test_glb_is_as_the_format_asks_and_shown_unlit(tmp_path):
    pytest.importorskip("trimesh")
    save_mesh(painted(), tmp_path / "x.glb")
    tree, arrays = read_glb(tmp_path / "x.glb")
    assert tree["asset"]["version"] == "2.0"
    (part,) = tree["meshes"][0]["primitives"]
    for number in (*part["attributes"].values(), part["indices"]):
        view = tree["bufferViews"][tree["accessors"][number]["bufferView"]]
        assert view["target"] == (34963 if number == part["indices"] else 34962)
    bounds = tree["accessors"][part["attributes"]["POSITION"]]
    places = arrays[part["attributes"]["POSITION"]]
    np.testing.assert_allclose(bounds["min"], places.min(0))
    np.testing.assert_allclose(bounds["max"], places.max(0))
    assert "KHR_materials_unlit" in tree["materials"][part["material"]]["extensions"]
    assert tree["extensionsUsed"] == ["KHR_materials_unlit"]


def test_glb_of_a_large_mesh_is_read_by_trimesh_as_the_ply_is(monkeypatch, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    mesh = ball_mesh(monkeypatch, [0.0, 0.0, 0.0])
    assert len(mesh.vertices) > 1000
    for end in ("ply", "glb"):
        save_mesh(mesh, tmp_path / f"x.{end}")
        found = trimesh.load_mesh(tmp_path / f"x.{end}", process=False)
        assert np.array_equal(found.vertices.astype(np.float32), mesh.vertices)
        assert np.array_equal(found.faces, mesh.triangles)
        assert found.volume == pytest.approx(volume(mesh), rel=1e-3)


def test_obj_holds_what_the_ply_does(tmp_path):
    mesh = painted()
    for end in ("obj", "ply"):
        save_mesh(mesh, tmp_path / f"x.{end}")
    other = read_ply(tmp_path / "x.ply")
    rows = [line.split() for line in (tmp_path / "x.obj").read_text().splitlines()]
    assert {row[0] for row in rows} == {"v", "f"}
    numbers = np.array([row[1:] for row in rows if row[0] == "v"], float)
    np.testing.assert_allclose(numbers[:, :3], other.vertices, atol=1e-6)
    assert np.array_equal((numbers[:, 3:] * 255).round(), other.colors)
    faces = np.array([row[1:] for row in rows if row[0] == "f"], int)
    assert np.array_equal(faces - 1, other.triangles)  # Counted from one.


@pytest.mark.parametrize("end", ["ply", "obj", "glb"])
def test_a_mesh_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch, end):
    if end == "glb":
        pytest.importorskip("trimesh")
    path = tmp_path / f"x.{end}"
    save_mesh(painted(), path)
    before = path.read_bytes()
    monkeypatch.setattr(store.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_mesh(painted()._replace(vertices=-painted().vertices), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_a_mesh_seen_by_the_camera_has_the_depth_of_the_render():
    pytest.importorskip("skimage")
    G = load_generator(REPOSITORY / "checkpoints/puppets/generator.safetensors")
    ws = seed_to_ws(G, 3)
    mesh = extract_mesh(G, ws, 160)
    c = G.cameras.label(torch.tensor([0.25]), torch.tensor([-0.1]))
    out = G.synthesis(ws, c, superresolve=False)
    n = out["mask"].shape[-1]
    cam2world, K = c[0, :16].view(4, 4).numpy(), c[0, 16:].view(3, 3).numpy()
    local = (mesh.vertices - cam2world[:3, 3]) @ cam2world[:3, :3]  # [V, 3]
    column, row = ((local[:, :2] / local[:, 2:]) @ K[:2, :2].T + K[:2, 2]).T * n
    inside = (np.minimum(column, row) >= 0) & (np.maximum(column, row) < n)
    nearest = np.full((n, n), np.inf)
    cells = row[inside].astype(int), column[inside].astype(int)
    np.minimum.at(nearest, cells, np.linalg.norm(local[inside], axis=1))
    head = out["mask"][0, 0].numpy() > 0.95
    assert np.isfinite(nearest[head]).mean() > 0.98
    seen = head & np.isfinite(nearest)
    error = np.abs(nearest - out["image_depth"][0, 0].numpy())[seen]
    # The surface lies before the mean depth of the rays (see SURFACE_QUANTILE); a head is 0.4 deep.
    assert np.median(error) < 0.02 and np.quantile(error, 0.9) < 0.04
