"""The frozen networks that a run looks with, and what they make of its prompt and pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from harness.run_folder import locate
from losses import denoised_latents, grown_mask
from models.cameras import VIEW_WORDS, sides_of
from models.diffusion import Condition, DiffusionPrior
from models.features import ClipFeatures, TokenFeatures
from models.fingerprints import fingerprint, fingerprint_generator
from models.generator import Generator, Outputs
from models.noise import edited_latents

HSC_GRIDS = (4, 8, None)  # Cells per side of each level; None: the ViT's own.
CLIP_LAYER = 3 / 12  # Depth of the tokens that 3D-Adapter compares: the third of ViT-B's twelve.
REFERENCE_SAMPLES = 64  # Source samples whose mean a picture's CLIP direction starts from.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        self._texts: dict[str, Tensor] = {}  # By prompt: of no view, then of each, [4, L, D].

    @classmethod
    def load(
        cls,
        cfg: Config,
        needs: frozenset[str],
        G_src: Generator,
        reference: Tensor | None,
        device: torch.device,
    ) -> Guides:
        """Load the networks that the terms need, among "prior" and "vit", and CLIP for the log.

        Raises:
            ValueError: a network cannot be loaded, or does not fit.
        """
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

    def condition_of(self, source: Outputs) -> Condition:
        """What the prior is guided towards on samples: with --view-words also from where it looks.

        Heads whose backs are called so have no second face there. A picture without a prompt has no
        words to add to.
        """
        if not (self.cfg.view_words and self.cfg.prompt):
            return self.condition
        return self._from_sides(self.cfg.prompt, self.condition, source)

    def condition_src_of(self, source: Outputs) -> Condition:
        """What the source is in words, with --view-words also from where it is seen."""
        if not self.cfg.view_words:
            return self.condition_src
        return self._from_sides(self.cfg.source_prompt, self.condition_src, source)

    def _from_sides(self, prompt: str, condition: Condition, source: Outputs) -> Condition:
        """Return a condition whose words say from where each sample is seen."""
        if prompt not in self._texts:
            words = [f"{prompt}, {name}" for name in VIEW_WORDS]
            self._texts[prompt] = self.prior.encode_text([self.cfg.negative_prompt, *words])
        none, *sides = self._texts[prompt]  # [L, D] each.
        text = torch.stack([sides[side] for side in sides_of(source["c"])])  # [b, L, D]
        return replace(condition, text=torch.stack([none.expand_as(text), text]))

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
    def paint(self, source: Outputs, latents_src: Tensor) -> Outputs:
        """Return what the prior makes of the source's pictures.

        Pictures larger than the prior's own are shrunk to its size. Outside of the foreground and
        its margin, with --mask, the source's picture stays as it is.

        Args:
            source: Its outputs; with "adapted_depth" and "adapted_mask", heads are painted as those
                say they have become. With --targets.draws also "noises", see `edited_latents`.

        Returns:
            "image" [b, 3, R, R], clamped to [-1, 1], and if the source has one its foreground,
            "mask" [b, 1, n, n]: the source's, which may have grown into the margin.
        """
        cfg, how = self.cfg, self.cfg.targets
        image = shrink(source["image"], self.prior.image_size)
        shape = source
        if "adapted_mask" in source:
            shape = {"image_depth": source["adapted_depth"], "mask": source["adapted_mask"]}
        conditions = self.condition_of(source), self.condition_src_of(source)
        inputs = (self.prior, latents_src, *conditions, how.level)
        if how.inverted and how.draws:
            latents = edited_latents(
                *inputs, cfg.guidance, source["noises"], self.depth(shape), how.guided, how.held
            )
        else:
            latents = denoised_latents(
                *inputs,
                how.steps,
                cfg.guidance,
                self.depth(shape),
                None if how.inverted else self.one_noise,
                self.depth(source),
                how.guided,
                how.held,
            )
        painted = resize(self.prior.decode_latents(latents), image.shape[-1]).clamp(-1, 1)
        if "mask" not in source:
            return {"image": painted}
        mask, margin = source["mask"], round(how.margin * source["mask"].shape[-1])
        if cfg.mask:
            within = F.max_pool2d(torch.maximum(mask, shape["mask"]), 2 * margin + 1, 1, margin)
            within = F.interpolate(within, image.shape[2:], mode="bilinear")
            painted = image + within * (painted - image)
        grows = margin or not cfg.mask
        return {"image": painted, "mask": grown_mask(painted, image, mask) if grows else mask}

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images of any size, [B, 4, h, w]."""
        return self.prior.encode_images(resize(images, self.prior.image_size))


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
    words = ", ".join(VIEW_WORDS) if cfg.view_words else ""
    unknown = prior.unknown_words(f"{cfg.prompt} {words}".strip())
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


def shrink(images: Tensor, size: int) -> Tensor:
    """Resize images that are larger than a square of this size to it."""
    return resize(images, size) if images.shape[-1] > size else images


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to a square of this size, unless they have it."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
