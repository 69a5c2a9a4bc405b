"""Meshes: closed, facing outwards, where the pictures show the surface, readable by others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_generator import small_generator

import models.mesh
from files.generators import load_generator
from harness.run_folder import REPOSITORY
from models.mesh import Mesh, extract_mesh, save_mesh, visible_box
from puppets import heads
from render import seed_to_ws, seed_to_z

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


def ball_mesh(monkeypatch, centre, voxels=64):
    """Return the mesh of a ball of radius 0.2, red above its centre and green below."""
    pytest.importorskip("skimage")
    G, centre = small_generator(), torch.tensor(centre)

    def field(coordinates, directions, ws, planes):
        offset = coordinates - centre
        above = (offset[..., 1:2] > 0).float()
        rgb = torch.cat([above, 1 - above, 0 * above, above], dim=-1)
        return {"sigma": 7 + 300 * (0.2 - offset.norm(dim=-1, keepdim=True)), "rgb": rgb}

    monkeypatch.setattr(G, "sample_mixed", field)
    monkeypatch.setattr(models.mesh, "surface_density", lambda *_: torch.tensor(7.0))
    return extract_mesh(G, torch.zeros(1, G.backbone.num_ws, G.w_dim), voxels)


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
