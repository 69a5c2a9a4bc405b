"""What can be asked of a picture: the terms of the objective, and the networks they look with.

A term compares the adapted samples with the source's, seen by one frozen network: in latents, in
tokens, in embeddings. Several terms may share such a view; `pull_back` then goes back through the
network once for all of them. b samples at a time, one value for each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from harness import ranks
from harness.run_folder import locate
from losses import (
    clip_direction_loss,
    coarse_to_fine,
    denoised_latents,
    denoised_loss,
    dsds_loss,
    edit_mask,
    fusion_sds_loss,
    hsc_loss,
    keep_loss,
    perceptual_loss,
    relative_distance_loss,
    score_direction_loss,
    score_reconstruction_loss,
    source_noise,
    structure_loss,
    target_loss,
)
from models.diffusion import Condition, DiffusionPrior
from models.features import ClipFeatures, TokenFeatures
from models.fingerprints import fingerprint, fingerprint_generator
from models.generator import Generator, Outputs

HSC_GRIDS = (4, 8, None)  # Cells per side of each level; None: the ViT's own.
CLIP_LAYER = 3 / 12  # Depth of the tokens that 3D-Adapter compares: the third of ViT-B's twelve.
FEATURE_CELLS = 16  # Features are averaged to this many cells a side before pairs are compared.
# Diffusion times that show where an edit belongs. For "green hair" the mask covers 65 % of the true
# hair at 0.1 and 0.3, 50 % at 0.7.
EDIT_LEVELS = (0.1, 0.3)
REFERENCE_SAMPLES = 64  # Source samples whose mean a picture's CLIP direction starts from.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Row = dict[str, float]  # A step's line of the log.


class Guides:
    """The frozen networks that a run needs, and what they make of its prompt and pictures."""

    def __init__(
        self,
        cfg: Config,
        G_src: Generator,
        clip: ClipFeatures,
        prior: DiffusionPrior | None = None,
        vit: TokenFeatures | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Take loaded networks; the reference pictures are [n, 3, S, S] in [-1, 1]."""
        self.cfg, self.G_src, self.clip, self.reference = cfg, G_src, clip, reference
        self._prior, self._vit = prior, vit

    @classmethod
    def load(
        cls, cfg: Config, G_src: Generator, reference: Tensor | None, device: torch.device
    ) -> Guides:
        """Load the networks that the terms with a weight need, and CLIP for the log.

        Raises:
            ValueError: a network cannot be loaded, does not fit, or a term needs what is not there.
        """
        needs = needed(cfg)
        check_generator(cfg, G_src)
        clip = ClipFeatures.from_pretrained(locate(cfg.clip), device)
        prior = load_prior(cfg, device) if "prior" in needs else None
        vit = load_vit(cfg, device) if "vit" in needs else None
        reference = None if reference is None else reference.to(device)
        guides = cls(cfg, G_src, clip, prior, vit, reference)
        for name in ("condition", "condition_src") if prior else ():
            getattr(guides, name)  # What cannot be encoded is refused now, not in the first step.
        if "clip_direction" in cfg.weights.on():
            _ = guides.direction
        return guides

    @property
    def prior(self) -> DiffusionPrior:
        """The diffusion prior, of a run with a term that needs it."""
        assert self._prior is not None, "no term with a weight needs the prior"
        return self._prior

    @property
    def vit(self) -> TokenFeatures:
        """The ViT, of a run with a term that needs it."""
        assert self._vit is not None, "no term with a weight needs the ViT"
        return self._vit

    @property
    def pictures(self) -> Tensor:
        """The reference pictures, of a run with --image."""
        assert self.reference is not None, "no picture was given"
        return self.reference

    @cached_property
    def condition(self) -> Condition:
        """What the prior is guided towards: the prompt, the pictures or both."""
        cfg = self.cfg
        return self.prior.condition(
            cfg.prompt, self.reference, cfg.image_scale, cfg.depth_scale, cfg.negative_prompt
        )

    @cached_property
    def condition_src(self) -> Condition:
        """What the source is in words, for delta denoising score."""
        cfg = self.cfg
        return self.prior.condition(
            cfg.source_prompt, depth_scale=cfg.depth_scale, negative=cfg.negative_prompt
        )

    @cached_property
    def edit(self) -> Condition:
        """What the prompt says in addition to the source's prompt: an edit's region follows."""
        return Condition(self.prior.encode_text([self.cfg.source_prompt, self.cfg.prompt]))

    @cached_property
    def target(self) -> Tensor:
        """What the log's score compares with: the prompt, else the pictures, [1, D]."""
        if self.cfg.prompt:
            return self.clip.text([self.cfg.prompt])
        return F.normalize(self.clip.images(self.pictures).mean(0, keepdim=True))

    @cached_property
    @torch.no_grad()
    def direction(self) -> Tensor:
        """The direction from the source domain to the target in CLIP's space, [1, D].

        For words, from the source's prompt to the target's; for pictures, from the mean of source
        samples; for both, half-way between the two.

        Raises:
            ValueError: the prompt and the source's mean the same to CLIP.
        """
        directions = []
        if self.cfg.prompt:
            words = self.clip.text([self.cfg.source_prompt, self.cfg.prompt])
            directions.append(words[1:] - words[:1])
        if self.reference is not None:
            mean = self.clip.images(self.pictures).mean(0, keepdim=True)
            directions.append(mean - self.mean_embedding())
        if any(direction.norm() < 1e-4 for direction in directions):
            raise ValueError("the target is the source to CLIP: there is no direction between them")
        return F.normalize(torch.cat([F.normalize(d, dim=1) for d in directions]).sum(0), dim=0)[
            None
        ]

    def mean_embedding(self) -> Tensor:
        """Return the mean of CLIP's embeddings of the source's samples, [1, D]."""
        G, device, embeds = self.G_src, self.clip.model.device, []
        torch.manual_seed(0)  # Steps have seeds of their own.
        z, c = torch.randn(REFERENCE_SAMPLES, G.z_dim), G.cameras.sample(REFERENCE_SAMPLES)
        frontal = G.cameras.frontal().to(device)
        for one, camera in zip(z.to(device).split(1), c.to(device).split(1), strict=True):
            ws = G.mapping(one, frontal, self.cfg.trunc)
            embeds.append(self.clip.images(G.synthesis(ws, camera)["image"]))
        return torch.cat(embeds).mean(0, keepdim=True)

    @cached_property
    @torch.no_grad()
    def reference_tokens(self) -> Tensor:
        """CLIP's tokens of the reference pictures, [1, n * g, g, D]."""
        tokens = self.clip.tokens(self.pictures, self.clip_layer)  # [n, g, g, D]
        return tokens.flatten(0, 1).unsqueeze(0)

    def fingerprints(self) -> dict[str, str]:
        """Return checksums of the networks, so that a resume with others is refused."""
        parts = "vae", "unet", "text_encoder", "controlnet", "image_encoder"
        return {
            "generator_weights": fingerprint_generator(self.G_src),
            "diffusion_weights": fingerprint([getattr(self._prior, part, None) for part in parts]),
            "features_weights": fingerprint([self._vit and self._vit.model]),
            "clip_weights": fingerprint([self.clip.model]),
        }

    @property
    def clip_layer(self) -> int:
        """Layer of CLIP whose tokens 3D-Adapter's terms compare."""
        return max(1, round(CLIP_LAYER * self.clip.depth))

    @property
    def cells(self) -> int:
        """Number of latent cells, h * w."""
        return (self.prior.image_size // self.prior.vae_scale_factor) ** 2

    @cached_property
    def one_noise(self) -> Tensor:
        """The noise that all targets start from, unless inverted, [1, 4, h, w]."""
        generator = torch.Generator().manual_seed(self.cfg.seed)
        noise = torch.randn(1, *self.prior.latent_shape, generator=generator)
        return noise.to(self.prior.device)

    def depth(self, source: Outputs) -> Tensor | None:
        """Return the source's depth as the prior takes it, unless --depth-scale is 0."""
        if not self.cfg.depth_scale:
            return None
        return self.prior.depth_condition(source["image_depth"], source["mask"])

    @torch.no_grad()
    def paint(self, source: Outputs, latents_src: Tensor) -> Tensor:
        """Return what the prior makes of the source's pictures, [b, 3, R, R], clamped to [-1, 1].

        Outside of the foreground and its margin, with --mask, the source's picture stays as it is.
        """
        cfg, how, image = self.cfg, self.cfg.targets, source["image"]
        latents = denoised_latents(
            self.prior,
            latents_src,
            self.condition,
            self.condition_src,
            how.level,
            how.steps,
            cfg.guidance,
            self.depth(source),
            None if how.inverted else self.one_noise,
        )
        painted = resize(self.prior.decode_latents(latents), image.shape[-1]).clamp(-1, 1)
        if cfg.mask:
            margin = round(how.margin * source["mask"].shape[-1])
            mask = F.max_pool2d(source["mask"], 2 * margin + 1, 1, margin)
            mask = F.interpolate(mask, image.shape[2:], mode="bilinear")
            painted = image + mask * (painted - image)
        return painted

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images of any size, [B, 4, h, w]."""
        return self.prior.encode_images(resize(images, self.prior.image_size))


@dataclass(frozen=True)
class View:
    """A frozen network's look at one of a generator's outputs."""

    output: str  # The output that is looked at, such as "image".
    look: Callable[[Guides, Tensor], Tensor]  # (networks, output [b, ...]) -> what is seen [b, ...]
    summed: bool = False  # Whether losses there are sums over latent cells, so divided by them.


def _layers(guides: Guides, images: Tensor) -> Tensor:
    """Return a ViT's tokens after each quarter of its layers, [B, 4, g, g, D]."""
    quarters = [round(guides.vit.depth * part / 4) for part in range(1, 5)]
    return torch.stack(guides.vit.layers(images.clamp(-1, 1), quarters), dim=1)


VIEWS = {
    "image": View("image", lambda guides, x: x),
    "planes": View("planes", lambda guides, x: x),
    "features": View("features", lambda guides, x: F.adaptive_avg_pool2d(x, FEATURE_CELLS)),
    "latents": View("image", lambda guides, x: guides.encode(x), summed=True),
    # StyleGAN-Fusion clamps its images.
    "clamped latents": View("image", lambda guides, x: guides.encode(x.clamp(-1, 1)), summed=True),
    "tokens": View("image", lambda guides, x: guides.vit.tokens(x)),
    "layers": View("image", _layers),
    "clip tokens": View("image", lambda guides, x: guides.clip.tokens(x, guides.clip_layer)),
    "clip": View("image", lambda guides, x: guides.clip.images(x)),
}


@dataclass(frozen=True)
class Seen:
    """What samples are compared with: outputs of the source; views of them are made once each."""

    guides: Guides
    outputs: Outputs
    views: dict[str, Tensor] = field(default_factory=dict)

    def view(self, name: str) -> Tensor:
        """Return what is seen, without gradients."""
        if name not in self.views:
            view = VIEWS[name]
            with torch.no_grad():
                self.views[name] = view.look(self.guides, self.outputs[view.output])
        return self.views[name]

    @cached_property
    def painted(self) -> Seen:
        """The prior's own pictures of these samples."""
        return Seen(self.guides, {"image": self.guides.paint(self.outputs, self.view("latents"))})


@dataclass(frozen=True)
class Everyone:
    """The planes of a step's whole batch, of all processes, without gradients."""

    planes: Tensor  # Adapted, [B, 3, C, P, P].
    planes_src: Tensor  # The source's, likewise.
    first: int = 0  # Where in the batch the b samples begin.


@dataclass(frozen=True)
class Moment:
    """One step as the terms see it; b of its B samples."""

    guides: Guides
    source: Seen
    t: Tensor  # Diffusion times, integer steps [b]; empty without a prior, like the noise.
    noise: Tensor  # Two draws, [2, b, 4, h, w].
    progress: float = 1.0  # Part of the run that is over, in (0, 1].
    everyone: Everyone | None = None  # Only where a term needs the batch.


@dataclass(frozen=True)
class Term:
    """A part of the objective."""

    view: str  # A key of VIEWS: what the loss is differentiated by.
    loss: Callable[[Tensor, Moment], Tensor]  # (view of the adapted samples, all else) -> [b]
    needs: frozenset[str] = frozenset()
    """Networks ("prior", "vit"), outputs of the generator ("mask", ...), or the whole "batch"."""


def dsds(latents: Tensor, now: Moment) -> Tensor:
    """L_DSDS, as far as --depth-scale and --mask are on; without both it is plain SDS."""
    guides, cfg, source = now.guides, now.guides.cfg, now.source.outputs
    depth, noise = guides.depth(source), now.noise[0]
    return dsds_loss(
        guides.prior,
        latents,
        guides.condition,
        now.t,
        noise,
        cfg.guidance,
        depth=depth,
        mask=source["mask"] if cfg.mask else None,
        baseline=delta(now, "latents", depth),
    )


def delta(now: Moment, view: str, depth: Tensor | None = None) -> Tensor | None:
    """Return what score distillation subtracts from the prediction; None: the noise.

    With --delta a part of it is what the prior predicts on the source, seen by the same view.
    """
    guides, cfg, noise = now.guides, now.guides.cfg, now.noise[0]
    if not cfg.delta:
        return None
    inputs = (guides.condition_src, now.t, noise, cfg.guidance, depth)
    return noise.lerp(source_noise(guides.prior, now.source.view(view), *inputs), cfg.delta)


def hsc(tokens: Tensor, now: Moment) -> Tensor:
    """L_HSC, whose levels move from coarse to fine over the run."""
    cfg = now.guides.cfg
    levels = coarse_to_fine(now.progress, *cfg.hsc_levels)
    mask = now.source.outputs["mask"] if cfg.mask else None
    tokens_src = now.source.view("tokens")
    return hsc_loss(tokens, tokens_src, HSC_GRIDS, levels, cfg.hsc_temperature, mask)


def denoised(images: Tensor, now: Moment) -> Tensor:
    """Distance to the prior's own pictures."""
    return denoised_loss(images, now.source.painted.view("image"))


def denoised_tokens(layers: Tensor, now: Moment) -> Tensor:
    """Distance of ViT layers to those of the prior's own pictures, [b, 4, g, g, D]."""
    return perceptual_loss(layers.unbind(1), now.source.painted.view("layers").unbind(1))


def fusion(latents: Tensor, now: Moment) -> Tensor:
    """StyleGAN-Fusion's score distillation."""
    inputs = (now.guides.condition, now.t, now.noise[0], now.guides.cfg.guidance)
    baseline = delta(now, "clamped latents")
    return fusion_sds_loss(now.guides.prior, latents, *inputs, baseline)


def score_regulariser(loss: Callable[..., Tensor], latents: Tensor, now: Moment) -> Tensor:
    """One of StyleGAN-Fusion's two regularisers, which have a noise of their own."""
    inputs = (now.guides.condition, now.t, now.noise[1], now.guides.cfg.guidance)
    return loss(now.guides.prior, latents, now.source.view("clamped latents"), *inputs)


def perceptual(layers: Tensor, now: Moment) -> Tensor:
    """Distance of ViT layers, [b, 4, g, g, D]."""
    return perceptual_loss(layers.unbind(1), now.source.view("layers").unbind(1))


def distance(planes: Tensor, now: Moment) -> Tensor:
    """Relative distances to all samples of the batch."""
    everyone = now.everyone
    assert everyone is not None, "the step gathers the batch where a term needs it"
    planes_src = now.source.outputs["planes"]
    return relative_distance_loss(
        planes, planes_src, everyone.planes, everyone.planes_src, everyone.first
    )


def keep(images: Tensor, now: Moment) -> Tensor:
    """Distance to the source outside the region of an edit."""
    guides, latents_src = now.guides, now.source.view("latents")
    mask = edit_mask(guides.prior, latents_src, guides.edit, now.noise[0], EDIT_LEVELS)
    return keep_loss(images, now.source.outputs["image"], mask)


def clip_direction(embeds: Tensor, now: Moment) -> Tensor:
    """Angle between the change of CLIP's embeddings and the way to the target."""
    return clip_direction_loss(embeds, now.source.view("clip"), now.guides.direction)


def target(tokens: Tensor, now: Moment) -> Tensor:
    """Distance between CLIP's tokens and those of the reference pictures."""
    return target_loss(tokens, now.guides.reference_tokens)


def structure(tokens: Tensor, now: Moment) -> Tensor:
    """Change of the similarities between CLIP's tokens."""
    return structure_loss(tokens, now.source.view("clip tokens"))


def feature_structure(features: Tensor, now: Moment) -> Tensor:
    """Change of the similarities between the generator's features, [b, C, n, n]."""
    features_src = now.source.view("features")
    return structure_loss(features.movedim(1, -1), features_src.movedim(1, -1))


score_direction = partial(score_regulariser, score_direction_loss)
score_reconstruction = partial(score_regulariser, score_reconstruction_loss)
# Every term by its name in the log and in --weights (config.Weights says what they are).
TERMS = {
    "dsds": Term("latents", dsds, frozenset({"prior"})),
    "hsc": Term("tokens", hsc, frozenset({"vit"})),
    "denoised": Term("image", denoised, frozenset({"prior"})),
    "denoised_tokens": Term("layers", denoised_tokens, frozenset({"prior", "vit"})),
    "fusion": Term("clamped latents", fusion, frozenset({"prior"})),
    "score_direction": Term("clamped latents", score_direction, frozenset({"prior"})),
    "score_reconstruction": Term("clamped latents", score_reconstruction, frozenset({"prior"})),
    "perceptual": Term("layers", perceptual, frozenset({"vit"})),
    "distance": Term("planes", distance, frozenset({"batch"})),
    "keep": Term("image", keep, frozenset({"prior"})),
    "clip_direction": Term("clip", clip_direction),
    "target": Term("clip tokens", target),
    "structure": Term("clip tokens", structure),
    "feature_structure": Term("features", feature_structure),
}


def pull_back(
    outputs: Outputs, weights: Mapping[str, float], now: Moment, batch: int
) -> tuple[Outputs, Row]:
    """Sum the terms' weighted gradients at the generator's outputs, once back for each view.

    A view's graph is freed before the next is built, and none reaches into the generator.

    Args:
        outputs: What the adapted generator makes of b samples.
        weights: Weights of the terms to compute, by name.
        now: What the samples are compared with.
        batch: B, the samples of the whole step, over which the objective is a mean.

    Returns:
        The gradient at each output that a term looks at, and for the log each term's `<name>` and
        the norm of its gradient at its view `<name>_grad`: sums over the b samples, weights and
        1 / B included. Score distillation's value is half its squared gradient: a carrier.
    """
    totals: Outputs = {}
    row: Row = {}
    for name in dict.fromkeys(TERMS[term].view for term in weights):
        view = VIEWS[name]
        leaf = outputs[view.output].detach().requires_grad_()
        seen = view.look(now.guides, leaf)
        at = seen.detach().requires_grad_()
        total = torch.zeros_like(at)
        for term, weight in weights.items():
            if TERMS[term].view == name:
                # The only factor between a loss and its gradient.
                scale = weight / batch / (now.guides.cells if view.summed else 1)
                losses = TERMS[term].loss(at, now)  # [b]
                (gradient,) = torch.autograd.grad(losses.sum(), at)
                total += scale * gradient
                row[term] = scale * losses.sum().item()
                row[f"{term}_grad"] = scale * gradient.flatten(1).norm(dim=1).sum().item()
        (gradient,) = torch.autograd.grad(seen, leaf, total)
        totals[view.output] = totals.get(view.output, 0) + gradient
    return totals, row


def needed(cfg: Config) -> frozenset[str]:
    """Return what the terms with a weight need, all together."""
    needs: set[str] = {"mask"} if cfg.mask else set()
    for name in cfg.weights.on():
        needs |= TERMS[name].needs | {VIEWS[TERMS[name].view].output}
    if "prior" in needs and cfg.depth_scale:
        needs |= {"image_depth", "mask"}
    return frozenset(needs)


def check_generator(cfg: Config, G: Generator) -> None:
    """Refuse terms that need what a generator does not give, and a batch that cannot be shared out.

    Raises:
        ValueError: naming the terms, or the setting of the generator.
    """
    drawn = G.rendering_kwargs.get("superresolution_noise_mode") == "random"
    if drawn and (ranks.count() > 1 or cfg.micro_batch):
        raise ValueError(
            f"{cfg.generator} has superresolution_noise_mode random, which neither --micro-batch "
            "nor several processes can share out"
        )
    known = {"image", "image_depth", "mask", "features", "planes"}
    if missing := needed(cfg) & known - G.gives:
        raise ValueError(
            f"{cfg.generator} gives no {', '.join(sorted(missing))}, which --weights "
            f"{', '.join(cfg.weights.on())} with --depth-scale {cfg.depth_scale:g} and --mask "
            f"{cfg.mask} need"
        )


def load_prior(cfg: Config, device: torch.device) -> DiffusionPrior:
    """Load the diffusion prior with what this run uses, and warn of a prompt beyond its words.

    Raises:
        ValueError: it cannot be loaded, depth is wanted and it has no ControlNet, or a picture is
            given and it has no IP-Adapter.
    """
    source = locate(cfg.diffusion)
    prior = DiffusionPrior.from_pretrained(
        source,
        locate(cfg.controlnet) if cfg.controlnet and cfg.depth_scale else None,
        locate(cfg.ip_adapter) if cfg.ip_adapter and cfg.image else None,
        dtype=prior_dtype(cfg, device),
        device=device,
        vae=locate(cfg.vae) if cfg.vae else None,
        loras=tuple((locate(file), weight) for file, weight in cfg.lora),
        embeddings=tuple(map(locate, cfg.embedding)),
        vae_dtype=PRECISIONS[cfg.vae_precision],
        recompute_vae=cfg.low_memory,
    )
    if cfg.depth_scale and prior.controlnet is None:
        raise ValueError(
            f"{source} has no ControlNet for depth: name one with --controlnet, "
            "or go without by --depth-scale 0"
        )
    if cfg.image and prior.image_encoder is None:
        raise ValueError(f"{source} has no IP-Adapter for --image: name one with --ip-adapter")
    unknown = prior.unknown_words(cfg.prompt)
    if prior.vocabulary and unknown:
        domains = prior.vocabulary.get("domains", {}).values() or prior.vocabulary["words"]
        print(
            f"warning: the prior has never seen the words {', '.join(unknown)}; "
            f"the domains it knows are {', '.join(domains)}",
            file=sys.stderr,
        )
    if cfg.compile:
        prior.compile()
    return prior


def prior_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Return the precision of the prior's networks except its VAE.

    Half precision is what Stable Diffusion is always run in on a GPU.
    """
    usual = "fp16" if device.type == "cuda" else "fp32"
    return PRECISIONS[usual if cfg.precision == "auto" else cfg.precision]


def load_vit(cfg: Config, device: torch.device) -> TokenFeatures:
    """Load the ViT whose tokens HSC and the perceptual term compare.

    Raises:
        ValueError: it cannot be loaded, or has fewer tokens than HSC's finest level.
    """
    vit = TokenFeatures.from_pretrained(locate(cfg.features), device)
    finest = max(cells or 1 for cells in HSC_GRIDS)
    if cfg.weights.hsc and vit.grid < finest:
        raise ValueError(
            f"--features {cfg.features} gives {vit.grid} x {vit.grid} tokens, "
            f"and --weights.hsc needs at least {finest} x {finest}"
        )
    return vit


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to a square of this size, unless they have it."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
