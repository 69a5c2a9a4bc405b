"""Procedural heads: a closed world where identity, pose, depth and domain are known exactly.

A head is some twenty ellipsoids, intersected per ray in closed form (one quadratic each, the
nearest hit wins) and painted by position: lips, brows, irises. The sixteen numbers z / rms(z)
are its identity and keep their meaning in every domain, so the true picture of "this person as
a bronze statue, seen from there" always exists.

World: y up, the face looks along +z, lengths in EG3D's world units (the frame is 0.63 wide).
Light and highlights are fixed to the head, so a point has one colour from every side, as in
EG3D, whose decoder ignores the viewing direction. B heads, E ellipsoids, R rays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.renderer import pixel_rays
from puppets.domains import (
    DOMAINS,
    HAIR_TONES,
    HAIR_WORDS,
    ODD_HAIR,
    SKIN_TONES,
    SKIN_WORDS,
    SOURCE,
    Domain,
)

Z_DIM = 16
HEAD_Z = 0.10  # The head's centre lies in front of the origin, near FFHQ's pivot (0, 0, 0.2).
KEY_LIGHT = (-0.45, 0.60, 0.66)
BACKGROUND = 1.0  # White, in the [0, 1] of this file.

# Parts an ellipsoid can belong to.
SKIN, EYE, EAR, NECK, HAIR, SHIRT, EXTRA = range(7)


@dataclass
class Heads:
    """B heads ready to be traced: their ellipsoids and the numbers the painter needs."""

    center: Tensor  # [B, E, 3]
    radius: Tensor  # [B, E, 3]
    part: Tensor  # [E]
    face: dict[str, Tensor]  # Painted features, [B, 1] or [B, 1, 3] each.
    domain: Domain


def identity(z: Tensor) -> Tensor:
    """Return what a latent says about the person: z / rms(z), [B, 16] (EG3D's normalisation)."""
    return z * z.square().mean(dim=1, keepdim=True).add(1e-8).rsqrt()


def _palette(tones: list[tuple[float, float, float]], u: Tensor) -> Tensor:
    """Piecewise-linear walk through `tones` for u in [0, 1]; [B] -> [B, 3]."""
    table = torch.tensor(tones, device=u.device)
    x = u.clamp(0, 1) * (len(tones) - 1)
    low = x.floor().long().clamp(max=len(tones) - 2)
    return torch.lerp(table[low], table[low + 1], (x - low).unsqueeze(1))


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / 2**0.5))


def build(z: Tensor, domain: str = SOURCE, hair: str | None = None) -> Heads:
    """Turn latents into ellipsoids and paint.

    Args:
        z: Latents, [B, 16].
        domain: A key of DOMAINS.
        hair: A key of ODD_HAIR, to override the person's hair colour.
    """
    spec = DOMAINS[domain]
    p = identity(z)
    s = torch.tanh(0.8 * p)  # [B, 16] in (-1, 1): no head is degenerate.
    b = len(z)
    zero = torch.zeros(b, device=z.device)

    def factor(name: str, default: float = 1.0) -> float:
        return spec.shape.get(name, default)

    width = 0.158 * (1 + 0.11 * s[:, 0]) * factor("skull")
    height = (1 + 0.08 * s[:, 1]) * factor("skull")
    jaw = 0.098 * (1 + 0.22 * s[:, 2])
    chin = 0.022 * s[:, 3]
    eye_x = 0.066 * (1 + 0.17 * s[:, 4])
    eye_r = 0.0295 * (1 + 0.22 * s[:, 5]) * factor("eye")
    nose = 0.0265 * (1 + 0.32 * s[:, 6]) * factor("nose")
    nose_y = -0.030 + 0.016 * s[:, 7]
    ear = 0.036 * (1 + 0.33 * s[:, 8]) * factor("ear")
    mouth_w = 0.052 * (1 + 0.28 * s[:, 9]) * factor("mouth")
    volume = 0.020 + 0.013 * s[:, 13] + factor("hair_volume", 0.0)
    length = torch.sigmoid(2.2 * p[:, 14])  # 0 short, 1 long

    center: list[Tensor] = []
    radius: list[Tensor] = []
    part: list[int] = []

    def add(kind: int, c: tuple, r: tuple) -> None:
        stack = [torch.stack([zero + v for v in xyz], dim=1) for xyz in (c, r)]
        center.append(stack[0])
        radius.append(stack[1].clamp(min=1e-3))
        part.append(kind)

    def surface_z(x: Tensor, y: Tensor | float) -> Tensor:
        """How far forward the skull and the face reach at (x, y)."""
        fronts = []
        for c, r in zip(center[:2], radius[:2], strict=True):
            inside = 1 - ((x - c[:, 0]) / r[:, 0]) ** 2 - ((y - c[:, 1]) / r[:, 1]) ** 2
            fronts.append(c[:, 2] + r[:, 2] * inside.clamp(min=0.05).sqrt())
        return torch.maximum(*fronts)

    # Skull, face, jaw, cheeks.
    hz = HEAD_Z
    add(SKIN, (0, 0.058, hz), (width, 0.158 * height, 0.172))
    add(SKIN, (0, -0.022, hz + 0.030), (0.88 * width, 0.150 * height, 0.146))
    add(SKIN, (0, -0.112 * height - chin, hz + 0.062), (jaw, 0.068 + 0.4 * chin, 0.090))
    for side in (-1, 1):
        add(SKIN, (side * 0.072, -0.052, hz + 0.098), (0.050, 0.044, 0.055))
    # Nose: bridge and tip.
    tip_z = surface_z(zero, nose_y) + 0.30 * nose + 0.030 * factor("nose_long", 0.0)
    add(SKIN, (0, 0.5 * (nose_y + 0.02), tip_z - 0.012), (0.50 * nose, 0.045, 0.75 * nose))
    add(
        SKIN, (0, nose_y, tip_z), (nose, 0.86 * nose, nose * (1.1 + 0.9 * factor("nose_long", 0.0)))
    )
    # Eyes, ears, neck, shoulders.
    eye_y = 0.034
    eye_z = surface_z(eye_x, eye_y) - 0.42 * eye_r
    for side in (-1, 1):
        add(EYE, (side * eye_x, eye_y, eye_z), (eye_r, eye_r, eye_r))
    point, flat = factor("ear_point", 0.0), factor("ear_flat", 0.0)
    for side in (-1, 1):
        add(
            EAR,
            (
                side * (0.97 * width + 0.022 * point),
                0.004 + 0.048 * point,
                hz + 0.010 * point - 0.015,
            ),
            (
                0.017 + 0.010 * flat + 0.016 * point,
                ear * (1.25 + 1.15 * point - 0.2 * flat),
                ear * (0.75 + 0.3 * flat),
            ),
        )
    add(NECK, (0, -0.215, hz - 0.035), (0.078, 0.150, 0.078))
    add(SHIRT, (0, -0.380, hz - 0.045), (0.245, 0.150, 0.130))
    # Hair: a cap cut by a plane, the back, two locks.
    lock = factor("lock")
    add(HAIR, (0, 0.070, hz - 0.012), (width + volume, 0.160 * height + volume, 0.178 + volume))
    add(
        HAIR,
        (0, -0.010 - 0.130 * length, hz - 0.085),
        (width + 0.6 * volume, 0.105 + 0.120 * length, 0.085),
    )
    for side in (-1, 1):
        add(
            HAIR,
            (side * (0.98 * width + 0.35 * volume), 0.045 - 0.130 * length, hz - 0.020),
            (
                0.024 * lock + 0.4 * volume,
                (0.040 + 0.135 * length) * (0.75 + 0.25 * lock),
                0.052 + 0.4 * volume,
            ),
        )
    # Horns, antenna or circlet, as the domain asks; a vanished radius hides the others.
    horn, antenna, circlet = (factor(k, 0.0) for k in ("horn", "antenna", "circlet"))
    top = 0.058 + 0.158 * height
    for side in (-1, 1):
        add(
            EXTRA,
            (side * 0.082, top + 0.012 * horn - 0.05 * (1 - horn), hz + 0.055 * horn),
            (0.022 * horn, 0.062 * horn, 0.022 * horn),
        )
    add(
        EXTRA,
        (0, top + 0.035 * antenna - 0.05 * (1 - antenna), hz + 0.02 * antenna),
        (0.008 * antenna, 0.060 * antenna, 0.008 * antenna),
    )
    add(
        EXTRA,
        (0, top + 0.080 * antenna - 0.05 * (1 - antenna), hz + 0.02 * antenna),
        (0.021 * antenna,) * 3,
    )
    add(
        EXTRA,
        (0, 0.118 * circlet, hz - 0.005 * circlet),
        ((width + volume + 0.006) * circlet, 0.011 * circlet, (0.186 + volume) * circlet),
    )

    own_skin = _palette(SKIN_TONES, _cdf(p[:, 15]))
    own_hair = _palette(HAIR_TONES, _cdf(p[:, 12]))
    if hair is not None:
        own_hair = torch.tensor(ODD_HAIR[hair], device=z.device).expand(b, 3)
    skin = own_skin if spec.skin is None else _mix(spec.skin, own_skin, spec.keep_skin)
    hair_rgb = own_hair if spec.hair is None else _mix(spec.hair, own_hair, spec.keep_hair)
    own_lips = skin * torch.tensor([0.82, 0.50, 0.50], device=z.device)
    face = {
        "eye_x": eye_x,
        "eye_r": eye_r,
        "eye_y": zero + eye_y,
        "mouth_w": mouth_w,
        "mouth_y": -0.090 * height - 0.4 * chin,
        "smile": 0.020 * s[:, 10],
        "lips_h": (0.0125 + zero) * factor("lips"),
        "brow_tilt": 0.45 * s[:, 11] + factor("brow", 0.0),
        "hairline": 0.118 + 0.014 * s[:, 13],
    }
    face = {k: v.view(b, 1) for k, v in face.items()}
    face["skin"] = skin.view(b, 1, 3)
    face["hair"] = hair_rgb.view(b, 1, 3)
    face["lips"] = (own_lips if spec.lips is None else _mix(spec.lips, own_lips, 0.0)).view(b, 1, 3)
    part_ids = torch.tensor(part, device=z.device)
    return Heads(torch.stack(center, 1), torch.stack(radius, 1), part_ids, face, spec)


def _mix(color: tuple[float, float, float], own: Tensor, keep: float) -> Tensor:
    return torch.lerp(torch.tensor(color, device=own.device).expand_as(own), own, keep)


def _hair_cut(heads: Heads, point: Tensor) -> Tensor:
    """Signed height above the hairline plane, [B, R]: hair grows where it is positive."""
    x, y, z = point.unbind(-1)
    strands = 0.006 * torch.sin(55 * x) + 0.004 * torch.sin(117 * x + 1)
    return 0.80 * (y - heads.face["hairline"]) - 0.60 * (z - (HEAD_Z + 0.120)) + strands


def trace(heads: Heads, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Intersect rays with every ellipsoid and keep the nearest hit.

    Args:
        origin: Ray origins, [B, R, 3].
        direction: Unit directions, [B, R, 3].

    Returns:
        t: Distance along the ray, [B, R], inf where nothing is hit.
        index: The ellipsoid hit, [B, R].
    """
    inv2 = heads.radius.square().reciprocal()  # [B, E, 3]
    # |(o + t d - c) / r|^2 = 1, expanded into products that are matrix multiplications.
    a = direction.square() @ inv2.mT  # [B, R, E]
    cross = (origin * direction) @ inv2.mT - direction @ (heads.center * inv2).mT
    const = (
        origin.square() @ inv2.mT
        - 2 * origin @ (heads.center * inv2).mT
        + (heads.center.square() * inv2).sum(-1).unsqueeze(1)
        - 1
    )
    disc = cross.square() - a * const
    root = disc.clamp(min=0).sqrt()
    t = torch.where(disc > 0, (-cross - root) / a, torch.inf)  # [B, R, E]
    # The cap, the first of the hair, ends at the hairline; below it its inside shows.
    cap = int((heads.part == HAIR).nonzero()[0])
    enter = (-cross - root)[..., cap] / a[..., cap]
    leave = (-cross + root)[..., cap] / a[..., cap]
    grows = [_hair_cut(heads, origin + s.unsqueeze(-1) * direction) > 0 for s in (enter, leave)]
    t_cap = torch.where(grows[0], enter, torch.where(grows[1], leave, torch.inf))
    t[..., cap] = torch.where(disc[..., cap] > 0, t_cap, torch.inf)
    return t.min(dim=-1)


def occupied(heads: Heads, point: Tensor) -> Tensor:
    """Return whether points [B, R, 3] lie inside the head, [B, R] bool; the cap is a thin shell."""
    q = (point.unsqueeze(2) - heads.center.unsqueeze(1)) / heads.radius.unsqueeze(1)
    size = q.square().sum(-1)
    inside = size < 1  # [B, R, E]
    cap = int((heads.part == HAIR).nonzero()[0])
    inside[..., cap] &= (size[..., cap] > 0.94) & (_hair_cut(heads, point) > 0)
    return inside.any(-1)


def _blended_normal(
    heads: Heads, point: Tensor, parts: tuple[int, ...], sharpness: float
) -> Tensor:
    """Normal of the soft union of some parts, [B, R, 3]: seams between ellipsoids vanish."""
    chosen = torch.isin(heads.part, torch.tensor(parts, device=point.device)).nonzero().flatten()
    normal = torch.zeros_like(point)
    total = torch.zeros_like(point[..., :1])
    for e in chosen.tolist():
        r = heads.radius[:, e].unsqueeze(1)
        q = (point - heads.center[:, e].unsqueeze(1)) / r  # [B, R, 3]
        k0, g = q.norm(dim=-1, keepdim=True), q / r
        k1 = g.norm(dim=-1, keepdim=True)
        distance = k0 * (k0 - 1) / k1
        weight = torch.exp(-sharpness * distance.clamp(min=-0.01))
        normal += weight * g / k1
        total += weight
    return F.normalize(normal / total, dim=-1)


def _noise(point: Tensor, frequency: float) -> Tensor:
    """A cheap smooth pattern in [-1, 1], [B, R]."""
    x, y, z = (point * frequency).unbind(-1)
    return torch.sin(x + 1.7 * torch.sin(0.9 * y + 0.5)) * torch.sin(
        y + 1.3 * torch.sin(1.1 * z)
    ) + 0.4 * torch.sin(2.3 * x + 3.1 * y - 1.9 * z)


def shade(heads: Heads, point: Tensor, index: Tensor) -> Tensor:
    """Colour surface points.

    Args:
        point: Hits, [B, R, 3].
        index: The ellipsoid each lies on, [B, R].

    Returns:
        Colours in [0, 1], [B, R, 3].
    """
    f, spec = heads.face, heads.domain
    x, y, z = point.unbind(-1)
    kind = heads.part[index]  # [B, R]
    gather = index.unsqueeze(-1).expand(*index.shape, 3)
    q = (point - heads.center.gather(1, gather)) / heads.radius.gather(1, gather)  # unit sphere
    own = F.normalize(q / heads.radius.gather(1, gather), dim=-1)

    def rgb(color: tuple[float, float, float]) -> Tensor:
        return torch.tensor(color, device=point.device)

    def paint(base: Tensor, where: Tensor, color: Tensor) -> Tensor:
        return torch.where(where.unsqueeze(-1), color, base)

    # Normals: soft within skin and within hair, exact elsewhere.
    is_skin = (kind == SKIN) | (kind == NECK)
    is_hair = kind == HAIR
    normal = torch.where(
        is_skin.unsqueeze(-1), _blended_normal(heads, point, (SKIN, NECK), 110.0), own
    )
    normal = torch.where(
        is_hair.unsqueeze(-1), _blended_normal(heads, point, (HAIR,), 90.0), normal
    )

    # Skin with blush, sockets, lips and brows.
    skin = f["skin"].expand_as(point).clone()
    front = (z > HEAD_Z + 0.03) & (kind == SKIN)
    ax = x.abs()
    if spec.texture == "" and spec.skin is None or spec.attributes:
        blush = (
            0.30 * torch.exp(-(((ax - 0.078) / 0.032) ** 2 + ((y + 0.048) / 0.026) ** 2)) * front
        )
        skin = skin * (1 - blush.unsqueeze(-1) * rgb((0.05, 0.45, 0.45)))
    eye_d = (((ax - f["eye_x"]) / f["eye_r"]) ** 2 + ((y - f["eye_y"]) / f["eye_r"]) ** 2).sqrt()
    if spec.socket is not None:
        skin = paint(skin, front & (eye_d < 1.55), rgb(spec.socket))
    if spec.stripe is not None:
        band = ((ax - f["eye_x"]).abs() < 0.014) & (
            (y - f["eye_y"]).abs() < 0.085 - 0.9 * (ax - f["eye_x"]).abs()
        )
        skin = paint(skin, front & band, rgb(spec.stripe))
    skin = torch.where(
        (front & (eye_d < 1.16) & (spec.texture != "rot")).unsqueeze(-1), skin * 0.80, skin
    )
    u = x / f["mouth_w"]
    mouth = y - f["mouth_y"] - f["smile"] * (u.square() - 0.4)
    lips_h = f["lips_h"] * (1 - u.square()).clamp(min=0) ** 0.7
    skin = paint(skin, front & (u.abs() < 1) & (mouth.abs() < lips_h), f["lips"])
    skin = paint(skin, front & (u.abs() < 0.92) & (mouth.abs() < 0.0028), f["lips"] * 0.35)
    brow_y = f["eye_y"] + f["eye_r"] + 0.016 - f["brow_tilt"] * (f["eye_x"] - ax)
    brow = ((ax - f["eye_x"]).abs() < 0.036) & (
        (y - brow_y + 9.0 * (ax - f["eye_x"]) ** 2).abs() < 0.0068
    )
    skin = paint(skin, front & brow, f["hair"] * 0.72)
    if spec.nose is not None:
        tip = int((heads.part == SKIN).nonzero()[6])
        skin = paint(skin, index == tip, rgb(spec.nose))
    # Skin darkens below the hairline and below the chin.
    near_hair = torch.sigmoid(-_hair_cut(heads, point) / 0.006 - 2.5)
    skin = skin * (0.80 + 0.20 * near_hair).unsqueeze(-1)
    skin = skin * torch.where(
        kind == NECK, 0.62 + 0.30 * torch.sigmoid((-0.20 - y) / 0.02), 1.0
    ).unsqueeze(-1)

    # Eyes: white, iris, pupil, a glint, and the upper lid with its lash line.
    eye = rgb(spec.eye).expand_as(point)
    eye = paint(eye, q[..., 2] > 0.70, rgb(spec.iris))
    eye = paint(eye, q[..., 2] > 0.90, rgb(spec.pupil))
    glint = ((q[..., 0] + 0.22) ** 2 + (q[..., 1] - 0.25) ** 2 < 0.018) & (q[..., 2] > 0)
    eye = paint(eye, glint, torch.ones(3, device=point.device))
    eye = paint(eye, q[..., 1] > 0.50, f["skin"] * 0.30)
    eye = paint(eye, q[..., 1] > 0.64, f["skin"] * 0.86)

    # Hair with strands.
    strand = (
        1 + 0.13 * torch.sin(70 * x + 25 * y) * torch.sin(45 * z + 2) + 0.05 * torch.sin(160 * x)
    )
    hair = f["hair"] * strand.unsqueeze(-1)

    base = skin
    base = paint(base, kind == EAR, f["skin"] * 0.92)
    base = paint(base, kind == EYE, eye)
    base = paint(base, is_hair, hair)
    base = paint(base, kind == SHIRT, rgb(spec.shirt) * (1 - 0.25 * (y > -0.243).unsqueeze(-1)))
    base = paint(base, kind == EXTRA, rgb(spec.extra))
    base = _textured(base, point, kind, spec)
    return _light(base, normal, kind, point, spec)


def _textured(base: Tensor, point: Tensor, kind: Tensor, spec: Domain) -> Tensor:
    """Multiply the pattern of the domain's material into the base colour."""
    x, y, z = point.unbind(-1)
    solid = (kind != EYE).unsqueeze(-1)
    if spec.texture == "veins":
        vein = torch.exp(-8 * _noise(point, 17.0).abs()).unsqueeze(-1)
        return base * (1 - 0.16 * vein)
    if spec.texture == "wood":
        ring = torch.sin(190 * (x + 0.35 * y + 0.10 * _noise(point, 6.0)))
        return torch.where(solid, base * (1 + 0.11 * ring.unsqueeze(-1)), base)
    if spec.texture == "rot":
        patch = torch.sigmoid(6 * (_noise(point, 26.0) - 0.45)).unsqueeze(-1)
        tint = torch.tensor([0.72, 0.62, 0.55], device=point.device)
        return torch.where(solid, base * torch.lerp(torch.ones_like(tint), tint, patch), base)
    if spec.texture == "panels":
        seam = ((y - 0.088).abs() < 0.0028) | (
            ((x.abs() - 0.088).abs() < 0.0028) & (y < 0.088) & (y > -0.11)
        )
        seam = seam & (kind == SKIN) & (z > HEAD_Z)
        return torch.where(seam.unsqueeze(-1), base * 0.45, base)
    if spec.texture == "ice":
        crack = torch.exp(-10 * _noise(point, 13.0).abs()).unsqueeze(-1)
        return base + 0.15 * crack * (1 - base)
    return base


def _light(base: Tensor, normal: Tensor, kind: Tensor, point: Tensor, spec: Domain) -> Tensor:
    """Hemisphere ambient, wrapped Lambert key, weak fill, and a highlight fixed to the head."""
    key = F.normalize(torch.tensor(KEY_LIGHT, device=base.device), dim=0)
    fill = F.normalize(torch.tensor((0.8, 0.1, 0.5), device=base.device), dim=0)
    half = F.normalize(key + torch.tensor((0.0, 0.0, 1.0), device=base.device), dim=0)
    lambert = ((normal @ key + 0.15) / 1.15).clamp(min=0)
    ambient = spec.ambient * (0.80 + 0.20 * normal[..., 1])
    light = ambient + spec.diffuse * lambert + 0.13 * (normal @ fill).clamp(min=0)  # [B, R]
    if spec.texture == "sketch":
        return _sketch(base, light, kind, point)
    gloss = torch.where((kind == EYE) & (spec.texture == ""), 0.35, spec.specular)
    shine = gloss * (normal @ half).clamp(min=0) ** spec.shininess
    color = base * light.unsqueeze(-1) + shine.unsqueeze(-1) * (0.35 + 0.65 * base)
    if spec.texture == "bronze":  # A dark patina in the hollows, a second warm reflection.
        below = F.normalize(torch.tensor((0.7, -0.3, 0.5), device=base.device), dim=0)
        rim = (normal @ below).clamp(min=0) ** 6
        color = color + 0.20 * rim.unsqueeze(-1) * base
    return color.clamp(0, 1)


def _sketch(base: Tensor, light: Tensor, kind: Tensor, point: Tensor) -> Tensor:
    """Grey tones in three steps, hatched where it is dark, on white paper."""
    x, y, _ = point.unbind(-1)
    value = (base @ torch.tensor([0.3, 0.59, 0.11], device=base.device)) * (0.55 + 0.45 * light)
    paper = torch.full_like(value, 0.97)
    hatch = 0.07 * torch.sin(190 * (x + y))
    tone = torch.where(value < 0.55, 0.84 + 0.5 * hatch, paper)
    tone = torch.where(value < 0.33, 0.66 + hatch, tone)
    tone = torch.where(value < 0.16, 0.40 + hatch, tone)
    tone = torch.where((kind == EYE) & (value < 0.25), 0.12, tone)
    return tone.unsqueeze(-1).expand_as(base)


def outline(t: Tensor, index: Tensor) -> Tensor:
    """Pencil lines of a picture: jumps of depth or of part, [B, S, S] bool."""
    d = torch.where(t.isfinite(), t, 4.0)  # Where nothing is hit, a wall far behind.
    edge = torch.zeros_like(index, dtype=torch.bool)
    for dim in (1, 2):
        jump = (d.diff(dim=dim).abs() > 0.018) | (
            (index.diff(dim=dim) != 0) & (d.diff(dim=dim).abs() > 0.004)
        )
        pad = [0, 1, 0, 0] if dim == 2 else [0, 0, 0, 1]
        edge |= F.pad(jump, pad)
    return F.max_pool2d(edge.float().unsqueeze(1), 3, 1, 1).squeeze(1) > 0


@torch.no_grad()
def render(
    z: Tensor,
    c: Tensor,
    domain: str = SOURCE,
    size: int = 128,
    hair: str | None = None,
    supersample: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the true picture of some latents in a domain.

    Args:
        z: Latents, [B, 16].
        c: Camera labels, [B, 25].
        domain: A key of DOMAINS.
        size: Picture height and width in pixels.
        hair: A key of ODD_HAIR overrides the hair colour.
        supersample: Rays per pixel and axis.

    Returns:
        rgb [B, 3, size, size] in [-1, 1]; depth along the ray [B, 1, size, size], 0 where empty;
        mask [B, 1, size, size] in [0, 1], the share of the pixel that is covered.
    """
    b, s = len(z), size * supersample
    heads = build(z, domain, hair)
    origin, direction = pixel_rays(c, s)
    t, index = trace(heads, origin, direction)
    hit = t.isfinite()
    point = origin + torch.where(hit, t, 0.0).unsqueeze(-1) * direction
    color = torch.where(hit.unsqueeze(-1), shade(heads, point, index), BACKGROUND)  # [B, R, 3]
    if heads.domain.texture == "sketch":
        lines = outline(t.view(b, s, s), index.where(hit, -1).view(b, s, s)).view(b, -1, 1)
        color = torch.where(lines, 0.12, color)

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.mT.reshape(b, -1, s, s), supersample)

    mask = pool(hit.unsqueeze(-1).float())
    depth = pool(torch.where(hit, t, 0.0).unsqueeze(-1)) / mask.clamp(min=1e-6)
    return pool(color) * 2 - 1, depth, mask


def caption(z: Tensor, domain: str, rng: np.random.Generator, hair: str | None = None) -> str:
    """Describe one head as a user would: a phrase of its domain, often with attributes.

    Args:
        z: One latent, [16].
        domain: A key of DOMAINS.
        rng: Chooses the phrase and which attributes are named.
        hair: The odd hair colour it is drawn with, always named.
    """
    spec = DOMAINS[domain]
    p = identity(z.unsqueeze(0))[0]
    text = str(rng.choice(spec.phrases))
    tone = HAIR_WORDS[min(int(_cdf(p[12]) * 5), 4)]
    length = "long" if p[14] > 0.3 else "short" if p[14] < -0.3 else ""
    color = hair or (tone if spec.attributes else "")
    parts = []
    if hair or rng.random() < 0.5:
        words = " ".join(w for w in (length, color) if w)
        if words:
            parts.append(f"{words} hair")
    if spec.attributes and spec.skin is None and rng.random() < 0.35:
        parts.append(SKIN_WORDS[min(int(_cdf(p[15]) * 5), 4)])
    joint = " and " if " with " in text else " with "
    return text + (joint + " and ".join(parts) if parts else "")
