"""A texture for a mesh: an atlas, what cameras see of it, and pictures painted onto it.

V vertices, F triangles, S the texture's side in texels, n a picture's in pixels. Texels and pixels
are [.., 3] or [1, 3, S, S] in [-1, 1]. Needs xatlas for the atlas, scipy, and trimesh for files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.cameras import split_label
from models.mesh import Mesh, settle_tree
from models.raster import Fragments, project, rasterise

PADDING = 2  # Texels between charts.
TOLERANCE = 0.012  # Depth behind the surface that a camera sees at which a texel is hidden.
JUMP = 0.03  # Between pixels: an edge, at which pictures show what is in front and behind mixed.
FEATHER = 0.04  # Share of a picture over which a view counts less towards edges.


@dataclass(frozen=True)
class Atlas:
    """A mesh cut into charts, and where its texels lie in the world."""

    vertices: Tensor  # [V, 3], those on cuts several times.
    triangles: Tensor  # [F, 3]
    uv: Tensor  # [V, 2] in [0, 1]; v points down, as rows do.
    normals: Tensor  # Outwards, [V, 3].
    size: int  # S.
    covered: Tensor  # Texels that triangles have, [S, S].
    nearest: Tensor  # For every texel the nearest covered one, by row and column, [2, S, S].
    points: Tensor  # Of the covered texels, [N, 3].
    outwards: Tensor  # Their normals, [N, 3].
    start: Tensor  # The colours that the mesh came with, [1, 3, S, S].

    def fill(self, texels: Tensor) -> Tensor:
        """Return a texture [1, C, S, S] of covered texels [N, C]; the nearest colour elsewhere."""
        image = texels.new_zeros(self.size, self.size, texels.shape[1])
        image[self.covered] = texels
        rows, columns = self.nearest
        return image[rows, columns].movedim(-1, 0)[None]

    def texels(self, texture: Tensor) -> Tensor:
        """Return the covered texels [N, C] of a texture [1, C, S, S]."""
        return texture[0].movedim(0, -1)[self.covered]


@dataclass(frozen=True)
class Look:
    """What one camera sees of a mesh, at n x n pixels."""

    c: Tensor  # The camera's label, [25].
    fragments: Fragments
    uv: Tensor  # Where in the texture each pixel is, [n, n, 2].

    @cached_property
    def edge(self) -> Tensor:
        """Pixels beside an edge, 0, to those far from any, 1, [n, n]."""
        from scipy.ndimage import distance_transform_edt

        depth = self.fragments.depth.nan_to_num(posinf=1e3)[None, None]
        most = F.max_pool2d(depth, 3, 1, 1)
        smooth = (most + F.max_pool2d(-depth, 3, 1, 1) < JUMP)[0, 0]
        edge = torch.from_numpy(distance_transform_edt(smooth.numpy())).float()
        return (edge / (FEATHER * len(edge))).clamp(max=1)

    @property
    def mask(self) -> Tensor:
        """Where the mesh is, [1, 1, n, n]."""
        return self.fragments.covered[None, None].float()

    @property
    def depth(self) -> Tensor:
        """Distance along the ray, [1, 1, n, n]; 0 beside the mesh."""
        z = self.fragments.depth.nan_to_num(posinf=0.0)
        n = z.shape[-1]
        _, K = split_label(self.c)
        at = (torch.arange(n, device=z.device) + 0.5) / n
        x, y = (at - K[0, 2]) / K[0, 0], (at - K[1, 2]) / K[1, 1]
        return (z * (1 + x[None] ** 2 + y[:, None] ** 2).sqrt())[None, None]

    def draw(self, texture: Tensor, background: float = 1.0) -> Tensor:
        """Return the picture of a texture [1, C, S, S], [1, C, n, n]; differentiable."""
        grid = self.uv[None] * 2 - 1
        seen = F.grid_sample(texture, grid, padding_mode="border", align_corners=False)
        return torch.where(self.fragments.covered, seen, background)


def unwrap(mesh: Mesh, size: int) -> Atlas:
    """Cut a mesh into charts, and lay them out in a square of size x size texels.

    Raises:
        ValueError: no triangle has a texel: the texture is too small.
    """
    import xatlas
    from scipy.ndimage import distance_transform_edt

    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices, mesh.triangles.astype(np.uint32))
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding, packing.bilinear = size, PADDING, True
    atlas.generate(pack_options=packing)
    origin, triangles, uv = atlas[0]
    normals = vertex_normals(
        torch.from_numpy(mesh.vertices), torch.from_numpy(mesh.triangles.astype(np.int64))
    )
    origin = torch.from_numpy(origin.astype(np.int64))
    vertices = torch.from_numpy(mesh.vertices)[origin]
    normals = normals[origin]
    colors = torch.from_numpy(mesh.colors).float()[origin] / 127.5 - 1
    triangles, uv = torch.from_numpy(triangles.astype(np.int64)), torch.from_numpy(uv)

    flat = torch.cat([uv * size, torch.ones(len(uv), 1)], dim=1)
    fragments = rasterise(flat, triangles, size, size)
    covered = fragments.covered
    if not covered.any():
        raise ValueError(f"--texture {size} is too small for this mesh")
    nearest = distance_transform_edt(~covered.numpy(), return_distances=False, return_indices=True)
    points, outwards, start = (
        fragments.interpolate(values, triangles)[covered] for values in (vertices, normals, colors)
    )
    made = Atlas(
        vertices,
        triangles,
        uv,
        normals,
        size,
        covered,
        torch.from_numpy(nearest.astype(np.int64)),
        points,
        F.normalize(outwards, dim=1),
        start,
    )
    return replace(made, start=made.fill(start))


def spread_seen(atlas: Atlas, seen: Tensor) -> Atlas:
    """Give texels that are not seen [N] the start of the nearest one that is, in the world."""
    from scipy.spatial import cKDTree

    if not seen.any():
        return atlas
    start = atlas.texels(atlas.start)
    _, nearest = cKDTree(atlas.points[seen].numpy()).query(atlas.points[~seen].numpy())
    start[~seen] = start[seen][torch.from_numpy(nearest)]
    return replace(atlas, start=atlas.fill(start))


def vertex_normals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """Return the mean of the triangles' normals around each vertex, by area, [V, 3]."""
    a, b, c = vertices[triangles].unbind(1)
    faces = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for corner in triangles.unbind(1):
        total.index_add_(0, corner, faces)
    return F.normalize(total, dim=1)


def look(atlas: Atlas, c: Tensor, size: int) -> Look:
    """Return what the camera c [25] sees of a mesh, at size x size pixels."""
    fragments = rasterise(project(atlas.vertices, c, size), atlas.triangles, size, size)
    return Look(c, fragments, fragments.interpolate(atlas.uv, atlas.triangles))


def see_texels(atlas: Atlas, view: Look, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a picture says of the covered texels.

    Args:
        atlas: The mesh.
        view: What the picture's camera sees of it.
        image: The picture, [1, C, m, m], any size.

    Returns:
        Colours [N, C], and how well each texel is seen there [N]: the cosine between its normal and
        the way to the camera, less towards edges, 0 where it is hidden.
    """
    size = len(view.uv)
    seen = project(atlas.points, view.c, size)  # [N, 3]
    grid = (seen[:, :2] / size * 2 - 1)[None, None]  # [1, 1, N, 2]

    def sample(values: Tensor, mode: str = "bilinear") -> Tensor:
        return F.grid_sample(values, grid, mode=mode, align_corners=False)[0, :, 0].mT

    surface = view.fragments.depth.nan_to_num(posinf=0.0)[None, None]
    visible = seen[:, 2] < sample(surface, "nearest")[:, 0] + TOLERANCE
    eye = split_label(view.c)[0][:3, 3]
    facing = (F.normalize(eye - atlas.points, dim=1) * atlas.outwards).sum(1).clamp_min(0)
    weight = visible * facing * sample(view.edge[None, None])[:, 0]
    return sample(image), weight


def blend(
    atlas: Atlas, seen: Sequence[tuple[Tensor, Tensor]], sharp: float = 6.0, floor: float = 0.02
) -> tuple[Tensor, Tensor]:
    """Return the adaptive mean of what pictures say of a texture, and how well it is seen.

    A texel is mostly of the view that sees it best; the colours that the mesh came with count where
    nobody sees it.

    Args:
        atlas: The mesh.
        seen: What each picture says; see `see_texels`.
        sharp: Power of the weights: the greater, the less views mix.
        floor: Weight of the mesh's own colours.

    Returns:
        The texture [1, 3, S, S], and the greatest weight of each covered texel [N].
    """
    start = atlas.texels(atlas.start)
    total, share = start * floor**sharp, torch.full_like(start[:, :1], floor**sharp)
    best = torch.zeros_like(start[:, 0])
    for colours, weight in seen:
        own = weight[:, None] ** sharp
        total, share = total + own * colours, share + own
        best = torch.maximum(best, weight)
    return atlas.fill(total / share), best


def cuts(atlas: Atlas, points: int = 4) -> tuple[Tensor, Tensor]:
    """Return where the two sides of all cuts lie in the texture, [M, 2] each, as `Atlas.uv`.

    Args:
        atlas: The mesh.
        points: On each edge along which it is cut.
    """
    _, place = torch.unique(atlas.vertices, dim=0, return_inverse=True)
    edges = atlas.triangles[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)  # Inner ones stand there twice.
    turned = place[edges[:, :1]] > place[edges[:, 1:]]
    edges = torch.where(turned, edges.flip(1), edges)
    ends = place[edges]
    name, order = (ends[:, 0] * len(place) + ends[:, 1]).sort()
    twice = name[1:] == name[:-1]
    sides = torch.stack([edges[order[:-1]][twice], edges[order[1:]][twice]])  # [2, E, 2]
    sides = sides[:, (sides[0] != sides[1]).any(1)]
    share = (torch.arange(points) + 0.5)[:, None, None] / points
    one, other = (atlas.uv[side] for side in sides)  # [E, 2, 2] each.
    first, second = (torch.lerp(x[:, 0], x[:, 1], share).flatten(0, 1) for x in (one, other))
    return first, second


def sample_texture(texture: Tensor, uv: Tensor) -> Tensor:
    """Return the colours [M, C] of a texture [1, C, S, S] at places [M, 2]; differentiable."""
    grid = uv[None, None] * 2 - 1
    return F.grid_sample(texture, grid, padding_mode="border", align_corners=False)[0, :, 0].mT


def fit(
    atlas: Atlas,
    texture: Tensor,
    pictures: Sequence[tuple[Look, Tensor, Tensor]],
    steps: int = 40,
    rate: float = 0.02,
    stay: float = 0.05,
    grain: float = 0.2,
    seam: float = 0.3,
) -> Tensor:
    """Optimise a texture until its pictures are the given ones, where these are to be trusted.

    A pixel of a picture is the mean of what the camera sees there at n x n, so that a texture may
    become sharper than the pictures are.

    Args:
        atlas: The mesh.
        texture: Where to begin, [1, 3, S, S].
        pictures: What the camera sees at n x n, the picture [1, 3, m, m], whose size m divides n,
            and its pixels' weights [1, 1, m, m].
        steps: Of Adam.
        rate: Its learning rate.
        stay: Weight of staying at the beginning, which holds texels that no pixel shows.
        grain: Weight of smooth changes: no picture tells of noise between its pixels.
        seam: Weight of the same colours on both sides of a cut.
    """
    here, there = cuts(atlas)
    learnt = texture.clone().requires_grad_()
    adam = torch.optim.Adam([learnt], lr=rate, betas=(0.9, 0.99))
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        change = learnt - texture
        loss = stay * change.square().mean()
        loss = loss + grain * sum(change.diff(dim=d).square().mean() for d in (2, 3))
        if len(here):
            jump = sample_texture(learnt, here) - sample_texture(learnt, there)
            loss = loss + seam * jump.square().mean()
        for view, image, weight in pictures:
            drawn = F.avg_pool2d(view.draw(learnt), len(view.uv) // image.shape[-1])
            error = (drawn - image).square() * weight
            loss = loss + error.sum() / weight.sum().clamp_min(1) / len(pictures)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return learnt.detach().clamp(-1, 1)


def to_textured_glb(atlas: Atlas, texture: Tensor) -> bytes:
    """Return a binary glTF 2.0 with the texture [1, 3, S, S] as its base colour."""
    from trimesh import Trimesh
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    pixels = ((texture[0].movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).byte()
    material = PBRMaterial(
        baseColorTexture=Image.fromarray(pixels.cpu().numpy()),
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    u, v = atlas.uv.unbind(1)
    body = Trimesh(
        atlas.vertices.numpy(),
        atlas.triangles.numpy(),
        visual=TextureVisuals(torch.stack([u, 1 - v], dim=1).numpy(), material=material),
        process=False,
    )
    return body.export(file_type="glb", include_normals=False, tree_postprocessor=settle_tree)
