"""Progressive texture refinement (DiffusionGAN3D, arXiv:2312.16837, stage 2): a head, a sharp mesh.

A mesh gets a texture from the generator's own views. Then from the front, to both sides in turn and
to the back: the textured mesh is rendered, the prior paints it over, the less a place is already
refined, and the result is painted onto the texture. Last, all pictures are blended, and the texture
is optimised until its renders are these pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import pi

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from guides import Guides
from harness.pictures import image_grid
from models.cameras import BEYOND
from models.mesh import extract_mesh
from models.noise import repaint
from models.texture import Atlas, Look, blend, fit, look, see_texels, spread_seen, unwrap
from subjects import Subject

PITCH = -0.1  # Of the views [rad].
LARGER = 2  # Meshes are drawn so many times as large as pictures, then averaged.
SEEN = 0.77  # A texel seen at this cosine is refined: nothing more is painted there.
COLOURS = 0.26  # Share of a picture over which the prior keeps the mean colour.
UNSEEN = 0.05  # Weight of a refined view below which a texel keeps the generator's colour.


@dataclass(frozen=True)
class Textured:
    """A head as a mesh with a texture, and what it was made from."""

    atlas: Atlas
    first: Tensor  # Texture of the generator's own views, [1, 3, S, S].
    texture: Tensor  # The refined one; the first, if nothing was refined.
    cameras: Tensor  # Of the views, [N, 25].
    pictures: Tensor  # What the texture was made of: their pictures, [N, 3, R, R].

    def draw(self, c: Tensor, size: int, texture: Tensor | None = None) -> Tensor:
        """Render from a camera c [25], [1, 3, size, size]; with another texture, if it is given."""
        texture = self.texture if texture is None else texture
        view = look(self.atlas, c, LARGER * size)
        return F.avg_pool2d(view.draw(texture), LARGER)

    def turn(self, rim: Tensor, size: int) -> Iterator[Image.Image]:
        """Yield pictures from cameras [N, 25]."""
        for c in rim:
            yield image_grid([self.draw(c, size)])


def yaws(views: int, widest: float = pi) -> list[float]:
    """Return turns of the camera: the front, left and right in turn up to the widest.

    Args:
        views: How many, even. Turns less than all round have no back, and one view less.
        widest: Of the turns [rad]; pi ends with the back.
    """
    pairs = views // 2 - 1
    step = widest / (pairs + 1 if widest == pi else pairs)
    sides = [side * i * step for i in range(1, pairs + 1) for side in (1, -1)]
    return [0.0, *sides, *([pi] if widest == pi else [])]


def texture_head(subject: Subject, views: int, voxels: int, faces: int, size: int) -> Textured:
    """Return a head's mesh, textured by the generator's own pictures.

    A generator that was trained on fronts draws a second face behind. It is seen no further to the
    side than it can be, and what lies behind gets the colours at the border of that.

    Args:
        subject: The head.
        views: How many, even; see `yaws`.
        voxels: See `extract_mesh`.
        faces: Likewise.
        size: Of the texture, texels.

    Raises:
        ValueError: nothing is seen of the head.
    """
    G = subject.G
    subject = subject.settled()
    torch.manual_seed(subject.seed)
    mesh = extract_mesh(G, subject.ws, voxels, subject.planes, faces=faces)
    if mesh is None:
        raise ValueError("no mesh of this head: nothing to see")
    atlas = unwrap(mesh, size)
    widest = pi if G.cameras.all_round else BEYOND * G.cameras.yaw_range
    turns = torch.tensor(yaws(views, widest))
    cameras = G.cameras.label(turns, torch.full_like(turns, PITCH))
    pictures = torch.cat([subject.see(c)["image"].cpu() for c in cameras.split(1)]).clamp(-1, 1)
    looks = [look(atlas, c, LARGER * pictures.shape[-1]) for c in cameras]
    seen = [see_texels(atlas, *pair) for pair in zip(looks, pictures.split(1), strict=True)]
    first, best = blend(atlas, seen)
    if not G.cameras.all_round:
        atlas = spread_seen(replace(atlas, start=first), best > UNSEEN)
        first, _ = blend(atlas, seen)
    return Textured(atlas, first, first, cameras, pictures)


def refine(head: Textured, guides: Guides, level: float) -> Textured:
    """Return a head whose texture the prior has painted over, view by view.

    Args:
        head: Its `first` texture is where this begins.
        guides: The prior, and what it is guided towards.
        level: Diffusion time of places that are not refined yet, as a fraction of the schedule.
    """
    atlas, texture = head.atlas, head.first
    best = torch.zeros(len(atlas.points))
    size = head.pictures.shape[-1]
    looks, seen, pictures = [], [], []
    for c in tqdm(head.cameras, desc="refine", unit="view"):
        view = look(atlas, c, LARGER * size)
        picture = paint_over(guides, view, texture, atlas.fill(best[:, None] / SEEN), level)
        looks.append(view)
        pictures.append(picture)
        seen.append(see_texels(atlas, view, picture))
        painted, best = blend(atlas, seen)
        refined = torch.where(
            (best > UNSEEN)[:, None], atlas.texels(painted), atlas.texels(head.first)
        )
        texture = atlas.fill(refined)
    weights = [F.avg_pool2d(view.edge * view.mask, LARGER) for view in looks]
    texture = fit(atlas, texture, list(zip(looks, pictures, weights, strict=True)))
    return Textured(atlas, head.first, texture, head.cameras, torch.cat(pictures))


@torch.no_grad()
def paint_over(
    guides: Guides, view: Look, texture: Tensor, refined: Tensor, level: float
) -> Tensor:
    """Have the prior paint over what a camera sees, where it is not refined yet.

    Args:
        guides: The prior, and what it is guided towards.
        view: What the camera sees of the mesh.
        texture: The texture so far, [1, 3, S, S].
        refined: How far each texel is refined, 1 and above: wholly, [1, 1, S, S].
        level: See `refine`.

    Returns:
        The picture, [1, 3, R, R].
    """
    prior, device = guides.prior, guides.prior.device
    picture = F.avg_pool2d(view.draw(texture), LARGER)
    size, cells = picture.shape[-1], prior.latent_shape[-1]
    inside = F.adaptive_max_pool2d(view.mask, cells)
    strength = inside * (1 - F.adaptive_avg_pool2d(view.draw(refined, 1.0), cells).clamp(max=1))
    resized = F.interpolate(picture, (prior.image_size,) * 2, mode="bilinear", antialias=True)
    source = {"c": view.c[None], "image_depth": view.depth, "mask": view.mask}
    depth = guides.depth({name: x.to(device) for name, x in source.items()})
    latents = repaint(
        prior,
        prior.encode_images(resized.to(device)),
        guides.condition_of(source),
        strength.to(device),
        level,
        guides.cfg.targets.steps,
        guides.cfg.guidance,
        depth,
    )
    painted = prior.decode_latents(latents).clamp(-1, 1).cpu()
    painted = F.interpolate(painted, (size, size), mode="bilinear", antialias=True)
    mask = F.avg_pool2d(view.mask, LARGER)
    painted = (painted + mask * spread(picture - painted, mask)).clamp(-1, 1)  # Colours stay.
    share = F.interpolate(strength, (size, size), mode="bilinear")
    return torch.where(share > UNSEEN, painted, picture)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values [1, 3, R, R] around each pixel, of those on the mask alone."""
    window = int(COLOURS * values.shape[-1]) // 2 * 2 + 1

    def around(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (window // 2,) * 4, mode="replicate"), window, 1)

    return around(values * mask) / around(mask).clamp_min(1e-3)
