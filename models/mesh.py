"""Meshes: the surface of a generator's density as coloured triangles, and the files they go to.

V vertices, F triangles. Vertices are in world units (y up, the face looks along +z); in glTF, whose
axes are the same, one of them is a metre.
"""

import io
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.store import write_bytes
from models.eg3d import TriPlaneGenerator
from models.renderer import pixel_rays

SURFACE_QUANTILE = 0.1  # See `surface_density`; above it thin hair is lost, below it all swells.
EMPTY = -1e6  # Raw density around the box: so low that cuts are flat.
CHUNK_POINTS = 2**18  # Vertices coloured at once.
ARRAY_BUFFER, INDEX_BUFFER = 34962, 34963  # As glTF numbers what a part of its buffer is for.


class Mesh(NamedTuple):
    """A closed surface."""

    vertices: np.ndarray  # [V, 3], float32.
    triangles: np.ndarray  # [F, 3], indices of vertices, counterclockwise from outside.
    colors: np.ndarray  # [V, 3], bytes.


@torch.no_grad()
def extract_mesh(
    G: TriPlaneGenerator,
    ws: Tensor,
    voxels: int,
    planes: Tensor | None = None,
    whole: bool = False,
    faces: int = 0,
) -> Mesh | None:
    """Return the surface of one head, or None if nothing is seen of it; needs scikit-image.

    Draws one render's random numbers.

    Args:
        G: The generator.
        ws: Style codes, [1, num_ws, w_dim].
        voxels: How many make up a side of the cube `box_warp`.
        planes: Those of ws, if they are there already.
        whole: Keep what floats beside the largest piece.
        faces: Merge triangles until so many are left, with fast-simplification; 0: keep all.
    """
    from skimage.measure import marching_cubes

    planes = G.planes(ws) if planes is None else planes
    level = surface_density(G, ws, planes)
    if not level.isfinite():
        return None

    # Read the density in the visible box; empty points around it close all ends.
    low, high = visible_box(G)
    step = G.rendering_kwargs["box_warp"] / voxels
    axes = [
        torch.arange(start, end, step, device=ws.device)
        for start, end in zip(low.tolist(), high.tolist(), strict=True)
    ]
    density = np.full([len(axis) + 2 for axis in axes], EMPTY, np.float32)  # [X, Y, Z]
    for i, x in enumerate(axes[0], start=1):
        points = torch.cartesian_prod(x[None], axes[1], axes[2])  # [(Y - 2) * (Z - 2), 3]
        sigma = G.sample_mixed(points[None], None, ws, planes=planes)["sigma"] - level
        density[i, 1:-1, 1:-1] = sigma.view(len(axes[1]), len(axes[2])).cpu()
    if not density.max() > 0:
        return None

    corners, triangles, _, _ = marching_cubes(density, 0.0, gradient_direction="ascent")
    corners = ((corners - 1) * step + low.numpy()).astype(np.float32)  # [V, 3]
    if not whole:
        corners, triangles = largest_piece(corners, triangles)
    if 0 < faces < len(triangles):
        from fast_simplification import simplify

        corners, triangles = simplify(corners, triangles, target_count=faces)
        corners = corners.astype(np.float32)
    vertices = torch.from_numpy(corners).to(ws.device)
    colors = [
        G.colours(G.sample_mixed(points[None], None, ws, planes=planes)["rgb"], ws)[0]
        for points in vertices.split(CHUNK_POINTS)
    ]
    colors = (torch.cat(colors) * 255 + 0.5).clamp(0, 255).to(torch.uint8)  # [V, 3]
    return Mesh(corners, triangles, colors.cpu().numpy())


def largest_piece(vertices: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices and triangles of the connected piece with most triangles."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    start, end = triangles[:, [0, 1, 1, 2]].reshape(-1, 2).T  # Two edges join three corners.
    size = (len(vertices), len(vertices))
    _, piece = connected_components(coo_array((np.ones_like(start), (start, end)), size), False)
    largest = np.bincount(piece[triangles[:, 0]]).argmax()
    kept = piece == largest  # [V]
    renamed = np.cumsum(kept) - 1
    return vertices[kept], renamed[triangles[kept[triangles[:, 0]]]]


def surface_density(G: TriPlaneGenerator, ws: Tensor, planes: Tensor) -> Tensor:
    """Return the raw density of the surface that the frontal picture shows, inf if it is empty.

    Where the rays of the foreground end on average, nine tenths of them are in denser matter.
    EG3D's scripts take 10 for all networks; the embedded heads would swell by 0.016 of their 0.4.
    """
    c = G.cameras.frontal().to(ws.device)
    out = G.synthesis(ws, c, planes=planes, superresolve=False)
    seen = out["mask"].flatten() > 0.5  # [n * n]
    if not seen.any():
        return ws.new_tensor(inf)
    origins, directions = pixel_rays(c, out["mask"].shape[-1])  # [1, n * n, 3]
    points = origins + directions * out["image_depth"].flatten(2).mT
    sigma = G.sample_mixed(points[:, seen], None, ws, planes=planes)["sigma"]
    return sigma.quantile(SURFACE_QUANTILE)


def visible_box(G: TriPlaneGenerator) -> tuple[Tensor, Tensor]:
    """Return two corners [3], lowest and highest, of what the generator's cameras see of the head.

    Outside of it nothing was ever trained: there are walls, and mirror images of the face.
    """
    kwargs, cameras = G.rendering_kwargs, G.cameras
    half = kwargs["box_warp"] / 2
    side = min(half, cameras.radius / cameras.focal / 2)  # Half a picture's, at the origin.
    near, far = kwargs["ray_start"], kwargs["ray_end"]
    if near == "auto":
        near, far = 0.0, inf
    far = min(far, kwargs.get("foreground_depth") or inf)
    back, front = max(-half, cameras.radius - far), min(half, cameras.radius - near)
    if cameras.all_round:
        back, front = -side, side
    low = torch.tensor([-side, -side, back])
    high = torch.tensor([side, side, front])
    cut = torch.tensor([G.bound, inf, G.bound])  # Sideways and in depth.
    return low.maximum(-cut), high.minimum(cut)


def save_mesh(mesh: Mesh, path: Path) -> None:
    """Write a mesh with a colour per vertex, completely or not at all.

    A binary .ply, an .obj with colours behind the coordinates, or a .glb, which needs trimesh. Its
    ending tells the format.
    """
    write_bytes(path, {".ply": to_ply, ".obj": to_obj, ".glb": to_glb}[path.suffix](mesh))


def to_ply(mesh: Mesh) -> bytes:
    """Return a binary PLY."""
    header = f"""ply
format binary_little_endian 1.0
element vertex {len(mesh.vertices)}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
element face {len(mesh.triangles)}
property list uchar int vertex_indices
end_header
"""
    vertices = np.empty(len(mesh.vertices), [("position", "<f4", 3), ("color", "u1", 3)])
    vertices["position"], vertices["color"] = mesh.vertices, mesh.colors
    faces = np.empty(len(mesh.triangles), [("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, mesh.triangles
    return header.encode() + vertices.tobytes() + faces.tobytes()


def to_obj(mesh: Mesh) -> bytes:
    """Return a Wavefront OBJ; vertices are `v x y z r g b`, colours in [0, 1]."""
    rows = np.hstack([mesh.vertices, mesh.colors / 255])
    text = io.StringIO()
    np.savetxt(text, rows, "v %.6g %.6g %.6g %.4g %.4g %.4g")
    np.savetxt(text, mesh.triangles + 1, "f %d %d %d")
    return text.getvalue().encode()


def to_glb(mesh: Mesh) -> bytes:
    """Return a binary glTF 2.0 with colours as linear light, as its COLOR_0 asks for.

    They are float, since bytes of linear light would show steps in the dark.
    """
    from trimesh import Trimesh

    encoded = mesh.colors.astype(np.float32) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    body = Trimesh(mesh.vertices, mesh.triangles, process=False)
    body.vertex_attributes["colors"] = np.pad(linear, ((0, 0), (0, 1)), constant_values=1)
    return body.export(file_type="glb", include_normals=False, tree_postprocessor=settle_tree)


def settle_tree(tree: dict) -> None:
    """Have a glTF's colours shown as they are, and name them as glTF does.

    They hold the light that the generator painted, so viewers shall add none. trimesh gives colours
    of vertices an application's own name.
    """
    plain = {"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}
    (material,) = tree.setdefault("materials", [plain])
    material["extensions"] = {"KHR_materials_unlit": {}}
    tree["extensionsUsed"] = ["KHR_materials_unlit"]
    (part,) = tree["meshes"][0]["primitives"]
    if "_colors" in part["attributes"]:
        part["attributes"]["COLOR_0"] = part["attributes"].pop("_colors")
    part["material"] = 0
    for number in part["attributes"].values():
        tree["bufferViews"][tree["accessors"][number]["bufferView"]]["target"] = ARRAY_BUFFER
    tree["bufferViews"][tree["accessors"][part["indices"]]["bufferView"]]["target"] = INDEX_BUFFER
