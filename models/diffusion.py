"""The frozen diffusion prior: Stable Diffusion with text, depth and picture conditioning.

images [B, 3, H, W] in [-1, 1]; latents [B, 4, h, w], scaled to unit variance, h = H / 8 for Stable
Diffusion; text [N, L, D], token embeddings; depth [N, 3, H, W] in [0, 1], near = 1, background 0.
Everything that goes in or comes out is float32, whatever the networks' own precision.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDPMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from models.controlnet import load_controlnet
from models.embeddings import add_embedding
from models.features import clip_preprocess
from models.ip_adapter import is_plus, load_ip_adapter
from models.lora import fuse_loras
from models.pretrained import one_line_errors
from models.prompts import clip_tokenize, unknown_words
from models.stable_diffusion import check_fit, load_parts
from models.vae import cell_size, encode
from models.weight_files import weight_files

# Where the scale of depth ends on Stable Diffusion, untried: ears and hair stay well above the
# background's 0, and stray points are cut off.
PHOTO_FAR, PHOTO_OUTLIERS = 0.5, 0.02


@dataclass(frozen=True)
class Condition:
    """What the noise prediction is guided towards, each part in a pair, unconditional first.

    Attributes:
        text: Embedded prompts, [2, L, D], or one for each of B samples, [2, B, L, D].
        image_embeds: Reference pictures, [2, n, E] (IP-Adapter) or [2, n, L, E] (Plus), n of them;
            None leaves pictures out.
        image_scale: Weight of the pictures' attention; the text's is 1.
        depth_scale: Weight of the depth, where the prediction is given one.
    """

    text: Tensor
    image_embeds: Tensor | None = None
    image_scale: float = 1.0
    depth_scale: float = 1.0


class DiffusionPrior:
    """A frozen latent diffusion model as the losses use it.

    It is deliberately no nn.Module, so that it enters no state dict, average or wrapper of the
    model under training.

    Attributes:
        learned_words: {word: ids of its tokens} of the textual inversion embeddings.
        alphas_cumprod: Signal's share of the variance at each time step, [T], float32.
        vae_scale_factor: Pixels per latent cell and axis.
        image_size: Height and width of the images it was trained on, pixels.
        vocabulary: The words the prior knows, {"words": [...], ...}, or None if not declared. Its
            "depth_far" is the far end of the depth condition that the ControlNet has learnt.
    """

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDPMScheduler,
        controlnet: ControlNetModel | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        vocabulary: dict | None = None,
        learned_words: dict[str, list[int]] | None = None,
    ) -> None:
        """Take loaded parts that fit each other, and freeze them."""
        self.vae = vae
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.controlnet = controlnet
        self.image_encoder = image_encoder
        self.vocabulary = vocabulary
        self.learned_words = learned_words or {}
        # Last, since loading an IP-Adapter brings new parameters that want gradients.
        for network in (vae, unet, text_encoder, controlnet, image_encoder):
            if network is not None:
                network.eval().requires_grad_(False)

        self.predicts_velocity = scheduler.config.prediction_type == "v_prediction"
        self.alphas_cumprod = scheduler.alphas_cumprod.to(unet.device, torch.float32)
        self.vae_scale_factor = cell_size(vae)
        self.image_size = self.vae_scale_factor * unet.config.sample_size

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        controlnet: str | Path | None = None,
        ip_adapter: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        vae: str | Path | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        embeddings: Sequence[str | Path] = (),
        vae_dtype: torch.dtype = torch.float32,
        recompute_vae: bool = False,
    ) -> "DiffusionPrior":
        """Load Stable Diffusion 1.x or 2.x, optionally with a depth ControlNet and an IP-Adapter.

        An empty path counts as None.

        Args:
            source: Local diffusers folder (for instance of a DreamBooth), hub id, or a checkpoint
                in one file (.safetensors or .ckpt), which may be on the hub (user/repo/file).
                A local folder that holds `controlnet/` or `ip_adapter/models/ip-adapter*` next to
                its model_index.json supplies the default of that argument.
            controlnet: Local folder or hub id of a depth ControlNet; None: no depth.
            ip_adapter: Local folder or hub id in the layout of h94/IP-Adapter, or one weight file
                in it (base or Plus, .safetensors or .bin); None: no reference pictures.
            dtype: Of all networks but the VAE, whose gradients need float32. On CUDA prefer
                float16: bfloat16 drowns the small difference that guidance amplifies.
            device: Where to put the networks.
            vae: Local folder, hub id or file of another VAE, or of TAESD, nine times cheaper and
                coarser; a local diffusers folder gives its `vae/`. None: the model's own.
            loras: Files, folders or hub ids (user/repo or user/repo/file) of LoRAs in the format
                of kohya, LyCORIS, PEFT or diffusers, each with its weight. They are added to the
                weights; their order does not matter.
            embeddings: Files, folders or hub ids of textual inversion embeddings.
            vae_dtype: Precision of the VAE.
            recompute_vae: Compute the VAE's activations again when going back, block by block,
                instead of keeping them: less memory, the same gradients. TAESD stays as it is.

        Raises:
            ValueError: a source is missing, no such model, incomplete, or the parts do not fit
                each other. The message is one line, path and reason.
        """
        controlnet, ip_adapter, vae = map(_given, (controlnet, ip_adapter, vae))
        folder = Path(source)
        is_folder = os.path.isdir(source)  # os.path takes names that are too long; Path raises.
        parts = load_parts(source, vae, dtype, vae_dtype)
        if is_folder:
            if controlnet is None and (folder / "controlnet").is_dir():
                controlnet = folder / "controlnet"
            if ip_adapter is None and weight_files(folder / "ip_adapter/models", "ip-adapter*"):
                ip_adapter = folder / "ip_adapter"

        scheduler, tokenizer = parts.pop("scheduler"), parts.pop("tokenizer")
        # TAESD keeps little, and diffusers 0.42.1 forgets to scale its images when it recomputes.
        if recompute_vae and isinstance(parts["vae"], AutoencoderKL):
            parts["vae"].enable_gradient_checkpointing()
        if controlnet is not None:
            parts["controlnet"] = load_controlnet(controlnet, dtype)
        check_fit(str(source), controlnet, tokenizer, **parts)
        loras = [(lora, scale) for lora, scale in loras if _given(lora)]
        fuse_loras(loras, parts["unet"], parts["text_encoder"])
        learned_words = {}
        for embedding in filter(_given, embeddings):
            learned_words |= add_embedding(embedding, tokenizer, parts["text_encoder"])
        if ip_adapter is not None:
            parts["image_encoder"] = load_ip_adapter(ip_adapter, parts["unet"])
        parts = {name: network.to(device) for name, network in parts.items()}
        vocabulary = read_vocabulary(folder) if is_folder else None
        return cls(
            **parts,
            tokenizer=tokenizer,
            scheduler=scheduler,
            vocabulary=vocabulary,
            learned_words=learned_words,
        )

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        side = self.image_size // self.vae_scale_factor
        return self.unet.config.in_channels, side, side

    def compile(self) -> None:
        """Let torch.compile make UNet, ControlNet and VAE encoder faster, from the second call on.

        Raises:
            ValueError: there is no C++ compiler for it.
        """
        compilers = (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl")
        if not any(map(shutil.which, compilers)):
            raise ValueError("compiling needs a C++ compiler, and none was found")
        for network in (self.unet, self.controlnet, self.vae.encoder):
            if network is not None:
                network.compile()

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents of images, differentiable w.r.t. the images.

        The posterior's mode is taken, so the result is deterministic; nothing is clamped, since
        that would stop gradients.

        Args:
            images: [B, 3, H, W] in [-1, 1], H and W multiples of `vae_scale_factor`.

        Returns:
            Scaled latents, [B, 4, h, w].

        Raises:
            ValueError: H or W is no such multiple.
        """
        factor = self.vae_scale_factor
        if images.shape[-2] % factor or images.shape[-1] % factor:
            raise ValueError(
                f"sides of images must be multiples of {factor}, got {list(images.shape)}"
            )
        return encode(self.vae, images)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return the images of scaled latents [B, 4, h, w], roughly in [-1, 1], [B, 3, H, W]."""
        config = self.vae.config
        latents = latents.float() / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Return the token embeddings of prompts, [N, L, D].

        A learned word stands for all of its vectors. Words beyond the text encoder's length are
        cut off; that and the syntax of web UIs are warned of.
        """
        length = self.text_encoder.config.max_position_embeddings
        several = {ids[0]: ids for ids in self.learned_words.values()}
        ids = clip_tokenize(self.tokenizer, prompts, length, several)  # [N, L]
        return self.text_encoder(ids.to(self.device))[0].float()  # [N, L, D]

    @torch.no_grad()
    def encode_reference(self, images: Tensor) -> Tensor:
        """Return what the IP-Adapter attends to in pictures of any size.

        Args:
            images: [N, 3, H, W] in [-1, 1].

        Returns:
            [N, 1, E], or [N, 1, L, E] for an IP-Adapter Plus.

        Raises:
            ValueError: no IP-Adapter was loaded.
        """
        if self.image_encoder is None:
            raise ValueError("a reference picture needs an IP-Adapter, and none was loaded")
        pixels = clip_preprocess(images.to(self.device), self.image_encoder.config.image_size)
        return self._encode_pixels(pixels)

    def condition(
        self,
        prompt: str,
        reference: Tensor | None = None,
        image_scale: float = 1.0,
        depth_scale: float = 1.0,
        negative: str = "",
    ) -> Condition:
        """Return what to guide towards: a prompt, reference pictures, or both.

        The unconditional half drops text and pictures together.

        Args:
            prompt: May be empty where there is a reference.
            reference: [n, 3, H, W] in [-1, 1], any size; several pictures count as one condition.
            image_scale: Weight of the pictures; the text's is 1.
            depth_scale: Weight of the depth (ControlNet's conditioning scale).
            negative: Text of the unconditional half: what to guide away from.

        Raises:
            ValueError: a reference is given and no IP-Adapter was loaded.
        """
        text = self.encode_text([negative, prompt])
        if reference is None:
            return Condition(text, depth_scale=depth_scale)
        given = self.encode_reference(reference).transpose(0, 1)  # [1, n, E] or [1, n, L, E]
        dropped = torch.zeros_like(given)
        if is_plus(
            self.unet
        ):  # Trained with the tokens of black pixels (after normalisation: zeros).
            size = self.image_encoder.config.image_size
            dropped = self._encode_pixels(torch.zeros(1, 3, size, size, device=self.device))
            dropped = dropped.expand_as(given)
        return Condition(text, torch.cat([dropped, given]), image_scale, depth_scale)

    @torch.no_grad()
    def predict_noise(
        self,
        latents_t: Tensor,
        t: Tensor,
        text: Tensor,
        depth: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_scale: float = 1.0,
        depth_scale: float = 1.0,
    ) -> Tensor:
        """Return the noise the prior sees in noisy latents, without guidance and gradients.

        Args:
            latents_t: sqrt(abar_t) * latents + sqrt(1 - abar_t) * noise, [N, 4, h, w].
            t: Integer time steps, [N], or one for all.
            text: [N, L, D].
            depth: See `depth_condition`, [N, 3, H, W]; None leaves the ControlNet out.
            image_embeds: See `encode_reference`; None leaves the IP-Adapter out.
            image_scale: Weight of the pictures; the text's is 1.
            depth_scale: Weight of the depth.

        Returns:
            eps_hat, [N, 4, h, w], for velocity-predicting models too.

        Raises:
            ValueError: depth or pictures are given that no loaded part can use.
        """
        dtype = self.unet.dtype
        t = torch.as_tensor(t, device=latents_t.device).expand(len(latents_t))  # [N]
        extra = {}
        if depth is not None:
            if self.controlnet is None:
                raise ValueError("a depth condition needs a ControlNet, and none was loaded")
            extra = self._depth_residuals(latents_t, t, text, depth, depth_scale)
        if self.image_encoder is not None:
            extra["added_cond_kwargs"] = self._adapter_input(len(t), image_embeds, image_scale)
        elif image_embeds is not None:
            raise ValueError("a reference picture needs an IP-Adapter, and none was loaded")
        inputs = (latents_t.to(dtype), t, text.to(dtype))
        output = self.unet(*inputs, **extra, return_dict=False)[0].float()  # [N, 4, h, w]

        if self.predicts_velocity:
            abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
            output = abar.sqrt() * output + (1 - abar).sqrt() * latents_t.float()
        return output

    def depth_condition(self, depth: Tensor, mask: Tensor) -> Tensor:
        """Return rendered depth as this prior takes it; see `depth_condition`.

        Stable Diffusion's ControlNets have learnt from whole photographs, where a head and what is
        far behind it share the scale, and from estimates without stray points.
        """
        if self.vocabulary is not None and "depth_far" in self.vocabulary:
            return depth_condition(depth, mask, self.image_size, self.vocabulary["depth_far"])
        return depth_condition(depth, mask, self.image_size, PHOTO_FAR, PHOTO_OUTLIERS)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that are not in the declared vocabulary, if there is one."""
        if self.vocabulary is None:
            return []
        return unknown_words(prompt, self.vocabulary["words"], self.learned_words)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the embeddings, [N, 1, E] or [N, 1, L, E], of normalised pixels [N, 3, S, S]."""
        output = self.image_encoder(pixels.to(self.image_encoder.dtype), output_hidden_states=True)
        embeds = output.hidden_states[-2] if is_plus(self.unet) else output.image_embeds
        return embeds[:, None].float()

    def _depth_residuals(
        self, latents_t: Tensor, t: Tensor, text: Tensor, depth: Tensor, scale: float
    ) -> dict:
        """Return what the ControlNet makes of the depth, as the UNet's arguments."""
        latents_t, text, depth = (x.to(self.controlnet.dtype) for x in (latents_t, text, depth))
        down, mid = self.controlnet(latents_t, t, text, depth, scale, return_dict=False)
        return {
            "down_block_additional_residuals": [x.to(self.unet.dtype) for x in down],
            "mid_block_additional_residual": mid.to(self.unet.dtype),
        }

    def _adapter_input(self, batch: int, image_embeds: Tensor | None, scale: float) -> dict:
        """Return the IP-Adapter's input: zeros at scale 0 without a picture, since it wants one."""
        if image_embeds is None:
            scale = 0.0
            config = self.image_encoder.config
            shape = (1, 1, config.hidden_size) if is_plus(self.unet) else (1, config.projection_dim)
            image_embeds = torch.zeros(batch, *shape, device=self.device)
        for processor in self.unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [scale]
        return {"image_embeds": [image_embeds.to(self.unet.dtype)]}


@torch.no_grad()
def depth_condition(
    depth: Tensor, mask: Tensor, size: int, far: float = 0.1, outliers: float = 0.0
) -> Tensor:
    """Turn rendered depth into what depth ControlNets are trained on: disparity, near = bright.

    Inverse depth is scaled to [far, 1] over each image's foreground, nearest point 1; the
    background is 0. An image without foreground is all 0.

    Args:
        depth: Distance along the ray, [B, 1, n, n]; ignored outside the mask.
        mask: Foreground where above 0.5, [B, 1, n, n].
        size: Height and width of the result, pixels.
        far: Value of the foreground's farthest point, in (0, 1).
        outliers: Share of the foreground beyond either end of the scale, which is clamped to it.

    Returns:
        [B, 3, size, size] in [0, 1].
    """
    foreground = mask > 0.5
    inverse = 1 / depth.float()
    ends = inverse.new_tensor([outliers, 1 - outliers])
    heads = [image[inside] for image, inside in zip(inverse, foreground, strict=True)]
    ranges = [head.quantile(ends) if head.numel() else ends for head in heads]
    farthest, nearest = torch.stack(ranges).view(-1, 2, 1, 1, 1).unbind(1)  # [B, 1, 1, 1]
    scaled = 1 - (1 - far) * (nearest - inverse) / (nearest - farthest).clamp_min(1e-8)
    scaled = scaled.clamp(far, 1)
    scaled = scaled.where(foreground, scaled.new_zeros(()))  # [B, 1, n, n]
    resized = F.interpolate(scaled, (size, size), mode="bilinear", antialias=True)
    return resized.expand(-1, 3, -1, -1)  # [B, 3, size, size]


def _given(path: str | Path | None) -> str | Path | None:
    """Return a path, or None for an empty one, which a Path spells "."."""
    return None if path is None or str(path) in ("", ".") else path


def read_vocabulary(folder: Path) -> dict | None:
    """Return the words a small prior declares to know in its folder, or None.

    Raises:
        ValueError: its vocabulary.json is damaged.
    """
    path = folder / "vocabulary.json"
    if not path.is_file():
        return None
    with one_line_errors(str(path)):
        vocabulary = json.loads(path.read_text())
        if not isinstance(vocabulary["words"], list):
            raise ValueError('"words" must be a list')
    return vocabulary
