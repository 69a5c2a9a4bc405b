"""The oracle: a small network that reads domain, identity and camera off a picture, to measure by.

    python -m puppets.oracle --ckpt runs/a-bronze-statue --out results.json

Adds to the rows that eval.py wrote how near the adapted pictures are to the true ones: the same
latents from the same cameras, drawn in the target domain. As two sets of pictures they also give
`fid` and `kid`, unless eval.py had --real. A row that has all this is left alone. The oracle is
trained on true pictures of every domain and takes no part in any adaptation, so no loss is its own
judge. A score `true_NAME` is what the true pictures get for NAME: what the measure itself leaves to
be reached.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import eval as evaluation
from harness.cli import run_cli
from harness.pictures import read_picture, to_image
from harness.run_folder import locate
from metrics import angle_deg, distances
from models.cameras import CameraSetup, split_label
from models.features import ClipFeatures
from models.fingerprints import fingerprint_generator
from puppets import faces
from puppets.data import CAMERAS, DOMAIN_NAMES, FLAT_Z_DIM, split_code
from puppets.domains import ODD_HAIR
from puppets.heads import Z_DIM, identity, render
from subjects import load_run

ORACLE = Path("checkpoints/puppets/oracle.safetensors")
# Numbers of a latent that people name, and so may take over from a reference picture.
ATTRIBUTES = {"brow": 11, "hair_length": 14, "skin": 15}
REFERENCE_SEED = 4242  # Of the head in the reference pictures (docs/reference-*.png).
SIZE = 128  # Height and width of the pictures it reads, pixels.
BATCH = 48


@dataclass(frozen=True)
class Truth:
    """True pictures of N latents."""

    image: Tensor  # From the cameras that are scored, [N, 3, 128, 128] in [-1, 1].
    mask: Tensor  # The share of each pixel that the head covers there, [N, 1, 128, 128] in [0, 1].
    front: Tensor  # From the front, [N, 3, 128, 128].


Truths = dict[tuple, Truth]  # By domain, hair, latents and seed.


@dataclass
class Config:
    """Options of puppets.oracle."""

    ckpt: tuple[Path, ...]  # Run folders that eval.py has scored.
    out: Path = Path("results.json")  # The file that eval.py wrote; scores are added to its rows.
    oracle: Path = ORACLE  # Weights of the oracle.


class Oracle(nn.Module):
    """Convolutions at half the resolution each, then one linear layer."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__()
        widths = (3, 24, 48, 96, 128, 160)
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
            layers += [nn.Conv2d(b, b, 3, 1, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(160 * 16, len(DOMAIN_NAMES) + Z_DIM + 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read images.

        Args:
            images: [B, 3, 128, 128] in [-1, 1].

        Returns:
            Domain logits [B, 13]; identity [B, 16], of unit RMS; direction from the origin to the
            camera, [B, 3], of unit length.
        """
        out = self.head(self.trunk(images).flatten(1)).float()
        domain, z, camera = out.split([len(DOMAIN_NAMES), Z_DIM, 3], dim=1)
        return domain, identity(z), F.normalize(camera, dim=1)


def main(cfg: Config) -> None:
    """Add the oracle's scores to rows of eval.py, and print the table.

    Raises:
        ValueError: eval.py has not scored a run, or the run's generator draws no puppets.
    """
    rows = evaluation.read_rows(cfg.out)
    unknown = [str(ckpt) for ckpt in cfg.ckpt if str(ckpt) not in rows]
    if unknown:
        raise ValueError(f"--out {cfg.out} has no row of {', '.join(unknown)}: run eval.py first")
    oracle = load_oracle(cfg.oracle)
    names = {"oracle_l1"} | ({"fid"} if find_spec("torchmetrics") else set())
    sources: evaluation.Sources = {}
    truths: Truths = {}
    for ckpt in tqdm(cfg.ckpt, unit="run"):
        row = evaluation.read_rows(cfg.out)[str(ckpt)]
        if not names <= row.keys():
            row |= score_run(ckpt, row, oracle, sources, truths)
            evaluation.add_row(cfg.out, str(ckpt), row)
    evaluation.report(cfg.out, cfg.ckpt)


def score_run(
    ckpt: Path,
    row: evaluation.Row,
    oracle: Oracle,
    sources: evaluation.Sources,
    truths: Truths,
    device: str | torch.device = "cpu",
) -> evaluation.Row:
    """Return the oracle's scores of one run, on the latents and cameras of its row.

    Args:
        row: What eval.py wrote; its samples and seed are used.
        sources: See `eval.score_run`.
        truths: See `true_pictures`.
        device: Where the generators render; the rest is done on the CPU.

    Returns:
        `oracle_target`, the domain that the truth is drawn in; what `judge` returns, without `fid`
        and `kid` if the row has those of other pictures; what `flips` returns, of the run's picture
        or, without one, of this repository's; of a prompt such as "a person with green hair", what
        `compare_edit` returns; where heads are seen from behind, `oracle_faces`, the share of these
        views that show a face all the same, and the oracle's readings are of `own_views`.

    Raises:
        ValueError: the run has changed since eval.py scored it, its generator draws no puppets, its
            pictures are not finite, or its source is gone.
    """
    settings = evaluation.run_settings(ckpt)
    G, G_src, _ = load_run(ckpt, device)
    if G_src is None:
        raise ValueError(f"--ckpt {ckpt}: without its source generator it cannot be scored")
    known = G.z_dim in (Z_DIM, FLAT_Z_DIM) and G.img_resolution == SIZE
    if not known or settings["trunc"] != 1:
        raise ValueError(f"{ckpt}: the truth is known only of puppets with --trunc 1")
    if fingerprint_generator(G) != row.get("weights"):
        raise ValueError(f"{ckpt} has changed since eval.py scored it: run eval.py again")
    domain, hair = target_domain(ckpt, settings, oracle), target_hair(settings)
    cfg = evaluation.Config(ckpt=(ckpt,), samples=row["samples"], seed=row["seed"])
    source = evaluation.render_source(G_src, 1.0, cfg, sources)
    adapted = evaluation.render_all(G, source.views, 1.0, cfg, "adapted", front=False)
    if not adapted.image.isfinite().all():
        raise ValueError(f"{ckpt}: the pictures are not finite")
    truth = true_pictures(source.views, domain, hair, cfg, truths, G.cameras)
    clip = ClipFeatures.from_pretrained(locate(settings["clip"]))
    scores = judge(oracle, clip, adapted, source, truth, domain, cfg)
    if (behind := faces.back_views(heads_seen(source.views)[1])).any():
        pictures = {"oracle_faces": adapted.image.clamp(-1, 1), "true_oracle_faces": truth.image}
        scores |= {name: faces.share(clip, x[behind]) for name, x in pictures.items()}
    if "real" in row:
        scores = {name: score for name, score in scores.items() if name not in ("fid", "kid")}
    (z, c), seen = heads_seen(source.views), adapted.image
    if G.cameras.all_round:
        views = own_views(z, cfg)
        seen = evaluation.render_all(G, views, 1.0, cfg, "adapted", front=False).image
        true, _ = draw_truth(z, views.c, domain, hair)
        scores |= readings(oracle, seen.clamp(-1, 1), true, z, views.c, domain)
    people = people_read(oracle, seen.clamp(-1, 1))
    scores |= flips(people, z, reference_identity(ckpt, settings, oracle))
    if hair:
        region = edited_region(truth.image, draw_truth(z, c, domain)[0])
        scores |= compare_edit(adapted.image, source.renders, truth.image, region)
    return {"oracle_target": domain} | scores


def judge(
    oracle: Oracle,
    clip: ClipFeatures,
    adapted: evaluation.Renders,
    source: evaluation.Source,
    truth: Truth,
    domain: str,
    cfg: evaluation.Config,
) -> dict[str, float]:
    """Compare pictures with the true ones, and say what the true ones themselves get.

    Args:
        adapted: The pictures and their silhouettes; those from the front are not looked at.
        source: What the source shows of the same latents.
        domain: A key of DOMAINS.

    Returns:
        What `compare` returns; `oracle_iou` (see `silhouette_iou`) and `source_iou`, the source's,
        where there are masks;
        of the scores of eval.py that the true pictures cannot all reach, theirs: `true_pose_deg`,
        `true_identity_top1`, `true_identity_mrr`, `true_diversity`; if torchmetrics is installed,
        the distances between the two sets: `oracle_kid` by the oracle's own features, `fid` and
        `kid` by CLIP's.
    """
    images, (z, c) = adapted.image.clamp(-1, 1), heads_seen(source.views)
    scores = compare(oracle, images, truth.image, truth.mask, z, c, domain)
    if adapted.mask.numel():
        scores["oracle_iou"] = silhouette_iou(adapted.mask, truth.mask)
        scores["source_iou"] = silhouette_iou(source.renders.mask, truth.mask)
    if find_spec("torchmetrics"):
        pair = (features(oracle, pictures) for pictures in (truth.image, images))
        scores["oracle_kid"] = distances(*pair)["kid"]
        pair = (evaluation.embed(clip, pictures, cfg) for pictures in (truth.image, images))
        scores |= distances(*pair)
    true = replace(source.renders, image=truth.image, front=truth.front)
    floor = evaluation.likeness(clip, source, true, cfg)
    floor.pop("pose_source_deg", None)
    return scores | {f"true_{name}": value for name, value in floor.items()}


def true_pictures(
    views: evaluation.Views,
    domain: str,
    hair: str | None,
    cfg: evaluation.Config,
    truths: Truths,
    cameras: CameraSetup = CAMERAS,
) -> Truth:
    """Draw the truth of the views that are scored, or return what `truths` keeps of it.

    Args:
        cameras: Of the generator, for the view from the front.
    """
    key = (domain, hair, cfg.samples, cfg.seed, views.c.sum().item())
    if key not in truths:
        z, c = heads_seen(views)
        image, mask = draw_truth(z, c, domain, hair)
        front = image  # Pictures without cameras have no other side.
        if views.angles.any():
            front, _ = draw_truth(z, cameras.frontal(len(c)), domain, hair)
        truths[key] = Truth(image, mask, front)
    return truths[key]


def heads_seen(views: evaluation.Views) -> tuple[Tensor, Tensor]:
    """Return the heads' own codes [N, 16] and the cameras [N, 25] of what is scored."""
    if views.z.shape[1] == FLAT_Z_DIM:
        return split_code(views.z)
    return views.z, views.c


def own_views(z: Tensor, cfg: evaluation.Config) -> evaluation.Views:
    """Return cameras as in the oracle's pictures for latents [N, 16], uniform over their range.

    Of heads that are seen from all sides: their own cameras look elsewhere, which it would misread.
    """
    turns = 2 * torch.rand(len(z), 2, generator=torch.Generator().manual_seed(cfg.seed)) - 1
    angles = turns * torch.tensor([CAMERAS.yaw_range, CAMERAS.pitch_range])
    return evaluation.Views(z, angles, CAMERAS.label(*angles.T))


def target_domain(ckpt: Path, settings: dict, oracle: Oracle) -> str:
    """Return the domain that a run was asked for, a key of DOMAINS.

    A prompt, but for what it says of hair, stands for the domain whose own prompt CLIP finds
    nearest, a picture without words for the one that the oracle reads.

    Raises:
        ValueError: the prior lists no domains, or others than those of puppets.
    """
    if not settings["prompt"]:
        picture = to_image(read_picture(ckpt / "reference.png"))  # [1, 3, S, S]
        picture = F.interpolate(picture, (SIZE, SIZE), mode="bilinear", antialias=True)
        return DOMAIN_NAMES[oracle(picture)[0].argmax()]
    known = evaluation.known_domains(settings)
    if not known or not known.keys() <= set(DOMAIN_NAMES):
        raise ValueError(f"{settings['diffusion']} has no vocabulary.json with puppets' domains")
    clip = ClipFeatures.from_pretrained(locate(settings["clip"]))
    # To CLIP "a person with green hair" is a zombie.
    prompt = re.sub(r" with .*\bhair", "", settings["prompt"])
    similarity = clip.text([prompt]) @ clip.text(list(known.values())).T  # [1, D]
    return list(known)[similarity.argmax()]


def target_hair(settings: dict) -> str | None:
    """Return the odd colour of hair that a prompt asks for, a key of ODD_HAIR."""
    return next((hair for hair in ODD_HAIR if f"{hair} hair" in (settings["prompt"] or "")), None)


def reference_identity(ckpt: Path, settings: dict, oracle: Oracle) -> Tensor:
    """Return who is in a run's reference picture or, without one, in this repository's, [16]."""
    if settings["image"]:
        picture = to_image(read_picture(min(ckpt.glob("reference*.png"))))
        picture = F.interpolate(picture, (SIZE, SIZE), mode="bilinear", antialias=True)
        return people_read(oracle, picture)[0]
    z = np.random.RandomState(REFERENCE_SEED).randn(1, Z_DIM)
    return identity(torch.from_numpy(z).float())[0]


def flips(people: Tensor, z: Tensor, reference: Tensor) -> dict[str, float]:
    """Count heads that took over what a reference picture happens to show: the identity bias.

    Args:
        people: Identities read off the adapted pictures, [N, 16].
        z: Their latents, [N, 16].
        reference: Identity of the reference, [16].

    Returns:
        `oracle_flips`, the mean over ATTRIBUTES of the share of heads read as on the reference's
        side of the middle, among those whose latent is on the other; attributes that nobody has
        otherwise are left out. What the oracle misreads counts too: compare with a run from words.
    """
    shares = []
    for number in ATTRIBUTES.values():
        side = reference[number] > 0
        others = (z[:, number] > 0) != side
        if others.any():
            shares.append(((people[others, number] > 0) == side).float().mean().item())
    return {"oracle_flips": sum(shares) / len(shares)} if shares else {}


def draw_truth(z: Tensor, c: Tensor, domain: str, hair: str | None = None) -> tuple[Tensor, Tensor]:
    """Draw heads [N, 16] from cameras [N, 25] in a domain; pictures and masks as in `Truth`."""
    rows = zip(z.split(1), c.split(1), strict=True)
    bar = tqdm(rows, desc="truth", total=len(z), unit="head", leave=False)
    drawn = [render(*row, domain, size=SIZE, hair=hair) for row in bar]
    return torch.cat([image for image, _, _ in drawn]), torch.cat([mask for _, _, mask in drawn])


def edited_region(after: Tensor, before: Tensor, margin: int = 2) -> Tensor:
    """Return where true pictures [N, 3, H, W] differ, and `margin` pixels around, [N, 1, H, W]."""
    changed = (after - before).abs().amax(1, keepdim=True) > 0.05
    return F.max_pool2d(changed.float(), 2 * margin + 1, 1, margin) > 0


def compare_edit(
    images: Tensor, source: evaluation.Renders, truth: Tensor, region: Tensor
) -> dict[str, float]:
    """Compare an edit with the true one, where it belongs and where it does not.

    Args:
        images: Adapted pictures, [N, 3, H, W] in [-1, 1].
        source: The source's, of the same latents and cameras.
        truth: The true edited ones, likewise.
        region: Where the edit belongs, [N, 1, H, W].

    Returns:
        `edit_inside_l1`, the mean difference to the truth in the region, and what the source has,
        `source_inside_l1`; `edit_outside_l1`, that to the source on the rest of the head.
    """
    images, head = images.clamp(-1, 1), F.interpolate(source.mask, images.shape[2:]) > 0.5

    def l1(a: Tensor, b: Tensor, where: Tensor) -> float:
        return (a - b).abs().mean(1, keepdim=True)[where].mean().item()

    return {
        "edit_inside_l1": l1(images, truth, region),
        "source_inside_l1": l1(source.image.clamp(-1, 1), truth, region),
        "edit_outside_l1": l1(images, source.image.clamp(-1, 1), head & ~region),
    }


def compare(
    oracle: Oracle,
    images: Tensor,
    truth: Tensor,
    mask: Tensor,
    z: Tensor,
    c: Tensor,
    domain: str,
) -> dict[str, float]:
    """Compare pictures with the true ones of the same latents, cameras and domain.

    Args:
        images: Adapted pictures, [N, 3, 128, 128] in [-1, 1].
        truth: The true ones, likewise.
        mask: The share of each true pixel that the head covers, [N, 1, 128, 128].
        z: Their latents, [N, 16].
        c: Their camera labels, [N, 25].
        domain: A key of DOMAINS.

    Returns:
        `oracle_l1`, the mean difference, and its parts `oracle_head_l1`, on the true head, and
        `oracle_background_l1`, beside it; `oracle_id`, the mean cosine of the
        identity read to the latent's; `oracle_pose_deg`, the mean angle of the camera read to the
        true one; `oracle_domain`, the share read as the domain; and the last three of the true
        pictures, `true_oracle_...`.
    """
    images = images.clamp(-1, 1)
    difference, head = (images - truth).abs().mean(1, keepdim=True), mask > 0.5
    scores = {
        "oracle_l1": difference.mean().item(),
        "oracle_head_l1": difference[head].mean().item(),
        "oracle_background_l1": difference[~head].mean().item(),
    }
    return scores | readings(oracle, images, truth, z, c, domain)


def readings(
    oracle: Oracle, images: Tensor, truth: Tensor, z: Tensor, c: Tensor, domain: str
) -> dict[str, float]:
    """Return what `read` does of pictures, `oracle_...`, and of the true ones, `true_oracle_...`.

    Arguments as in `compare`.
    """
    adapted, floor = (read(oracle, pictures, z, c, domain) for pictures in (images, truth))
    scores = {f"oracle_{name}": value for name, value in adapted.items()}
    return scores | {f"true_oracle_{name}": value for name, value in floor.items()}


def silhouette_iou(mask: Tensor, truth: Tensor) -> float:
    """Return the mean intersection over union of silhouettes with the true ones.

    Args:
        mask: Foreground of the pictures, [N, 1, n, n] in [0, 1].
        truth: Of the true ones, [N, 1, 128, 128].
    """
    mask = F.interpolate(mask, truth.shape[2:], mode="bilinear") > 0.5
    truth = truth > 0.5
    both, either = ((x.flatten(1).sum(1)) for x in (mask & truth, mask | truth))
    return (both / either.clamp_min(1)).mean().item()


@torch.no_grad()
def features(oracle: Oracle, images: Tensor) -> Tensor:
    """Return unit features of pictures [N, 3, 128, 128], where the last convolution ends, [N, 160].

    Their mean over the picture: what is there counts, not where.
    """
    maps = torch.cat([oracle.trunk(part) for part in images.clamp(-1, 1).split(BATCH)])
    return F.normalize(maps.mean((2, 3)), dim=1)


@torch.no_grad()
def people_read(oracle: Oracle, images: Tensor) -> Tensor:
    """Return the identities read off pictures [N, 3, 128, 128], [N, 16]."""
    return torch.cat([oracle(part)[1] for part in images.split(BATCH)])


@torch.no_grad()
def read(oracle: Oracle, images: Tensor, z: Tensor, c: Tensor, domain: str) -> dict[str, float]:
    """Return how well pictures show their latents `id`, cameras `pose_deg` and the `domain`.

    And `yaw_deg`, the mean turn to the side, signed: what all pictures share of a reference's pose.
    """
    parts = [oracle(part) for part in images.split(BATCH)]
    logits, people, cameras = (torch.cat(x) for x in zip(*parts, strict=True))
    named = logits.argmax(1) == DOMAIN_NAMES.index(domain)
    return {
        "id": F.cosine_similarity(people, z).mean().item(),
        "pose_deg": angle_deg(cameras, camera_direction(c)).mean().item(),
        "domain": named.float().mean().item(),
        "yaw_deg": (yaw_deg(cameras) - yaw_deg(camera_direction(c))).mean().item(),
    }


def yaw_deg(direction: Tensor) -> Tensor:
    """Return the yaw of unit vectors [N, 3] from the origin to cameras, degrees, [N]."""
    return torch.rad2deg(torch.atan2(direction[:, 0], direction[:, 2]))


def camera_direction(c: Tensor) -> Tensor:
    """Return unit vectors [N, 3] from the origin to the cameras of labels [N, 25]."""
    return F.normalize(split_label(c)[0][:, :3, 3], dim=1)


def load_oracle(path: Path = ORACLE) -> Oracle:
    """Load the committed oracle, frozen, in float32.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: python -m puppets.fit.pretrain oracle makes it")
    oracle = Oracle()
    oracle.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return oracle.eval().requires_grad_(False)


if __name__ == "__main__":
    run_cli(Config, main, __doc__)
