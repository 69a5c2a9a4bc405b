"""The frozen diffusion prior: Stable Diffusion with text, depth and picture conditioning.

images [B, 3, H, W] in [-1, 1]; latents [B, 4, h, w], scaled to unit variance, h = H / 8 for Stable
Diffusion; text [N, L, D], token embeddings; depth [N, 3, H, W] in [0, 1], near = 1, background 0.
Everything that goes in or comes out is float32, whatever the networks' own precision.
"""

import json
import os
import re
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
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from diffusers.models.modeling_utils import load_state_dict
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from models.features import clip_preprocess, clip_tokenize
from models.limits import is_number
from models.lora import fuse_lora
from models.pretrained import (
    fetch_weights,
    find_weights,
    load_network,
    load_tokenizer,
    one_line_errors,
    quiet_loading,
    resolve_source,
    weight_files,
)

IP_ADAPTER_FILE = "ip-adapter_sd15.safetensors"  # The usual one of several in a folder.
VAE_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
MAX_STEPS = 100_000  # Of a noise schedule; Stable Diffusion has 1000.
MAX_CELLS = 512  # Of latents along a side; Stable Diffusion has 64 or 96.
TEXT_WIDTHS = {"768": " (Stable Diffusion 1.x)", "1024": " (Stable Diffusion 2.x)"}
# What a config must say, since anything else would be ignored here or fail in the first step.
UNET_CONFIG = {
    "time_cond_proj_dim": None,  # Of guidance-distilled (LCM) networks, which give no scores.
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim_type": None,
}
CONTROLNET_CONFIG = {
    "conditioning_channels": 3,
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "global_pool_conditions": False,
    "controlnet_conditioning_channel_order": "rgb",
}
AS_THE_UNET = ("cross_attention_dim", "in_channels", "block_out_channels", "layers_per_block")


@dataclass(frozen=True)
class Condition:
    """What the noise prediction is guided towards, each part in a pair, unconditional first.

    Attributes:
        text: Embedded prompts, [2, L, D].
        image_embeds: Reference pictures, [2, n, E] (IP-Adapter) or [2, n, L, E] (Plus), n of them;
            None leaves pictures out.
        image_scale: Weight of the pictures' attention beside the text's.
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
        alphas_cumprod: Signal's share of the variance at each time step, [T], float32.
        vae_scale_factor: Pixels per latent cell and axis.
        image_size: Height and width of the images it was trained on, pixels.
        vocabulary: The words the prior knows, {"words": [...], ...}, or None if not declared.
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
    ) -> None:
        """Take loaded parts that fit each other, and freeze them."""
        self.vae = vae
        self.unet = unet
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.controlnet = controlnet
        self.image_encoder = image_encoder
        self.vocabulary = vocabulary
        # Last, since loading an IP-Adapter brings new parameters that want gradients.
        for network in (vae, unet, text_encoder, controlnet, image_encoder):
            if network is not None:
                network.eval().requires_grad_(False)

        self.predicts_velocity = scheduler.config.prediction_type == "v_prediction"
        self.alphas_cumprod = scheduler.alphas_cumprod.to(unet.device, torch.float32)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
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
        vae_dtype: torch.dtype = torch.float32,
        recompute_vae: bool = False,
    ) -> "DiffusionPrior":
        """Load Stable Diffusion 1.x or 2.x, optionally with a depth ControlNet and an IP-Adapter.

        Args:
            source: Local diffusers folder (of a DreamBooth, say) or hub id. A local folder that
                holds `controlnet/` or `ip_adapter/models/ip-adapter*` beside its model_index.json
                supplies the default of that argument.
            controlnet: Local folder or hub id of a depth ControlNet; None: no depth.
            ip_adapter: Local folder or hub id in the layout of h94/IP-Adapter, or one weight file
                in it (base or Plus, .safetensors or .bin); None: no reference pictures.
            dtype: Of all networks but the VAE, whose gradients need float32. On CUDA prefer
                float16: bfloat16 drowns the small difference that guidance amplifies.
            vae: Local folder or hub id of another VAE, or of TAESD, nine times cheaper and
                coarser; a local diffusers folder gives its `vae/`. None: the model's own.
            loras: Files, folders or hub ids (user/repo or user/repo/file) of LoRAs in kohya's or
                diffusers' format, which are added to the weights, each with its weight.
            vae_dtype: Precision of the VAE.
            recompute_vae: Compute the VAE's activations again when going back, block by block,
                instead of keeping them: less memory, the same gradients. TAESD stays as it is.

        Raises:
            ValueError: a source is missing, no such model, incomplete, or the parts do not fit
                each other. The message is one line, path and reason.
        """
        source = resolve_source(source)
        folder = Path(source)
        if folder.is_dir():
            _check_index(folder / "model_index.json")
            if controlnet is None and (folder / "controlnet").is_dir():
                controlnet = folder / "controlnet"
            if ip_adapter is None and weight_files(folder / "ip_adapter/models", "ip-adapter*"):
                ip_adapter = folder / "ip_adapter"

        scheduler = _load_scheduler(source)
        parts = {
            "vae": _load_other_vae(vae, source, vae_dtype)
            if vae is not None
            else _load_vae(source, "vae", vae_dtype),
            "unet": load_network(UNet2DConditionModel, source, "unet", dtype),
            "text_encoder": load_network(CLIPTextModel, source, "text_encoder", dtype),
        }
        # TAESD keeps little, and diffusers 0.42.1 forgets to scale its images when it recomputes.
        if recompute_vae and isinstance(parts["vae"], AutoencoderKL):
            parts["vae"].enable_gradient_checkpointing()
        if controlnet is not None:
            controlnet = resolve_source(controlnet)
            parts["controlnet"] = load_network(ControlNetModel, controlnet, dtype=dtype)
        tokenizer = load_tokenizer(source, "tokenizer")
        _check_fit(source, controlnet, tokenizer, **parts)
        for lora, scale in loras:
            fuse_lora(lora, scale, parts["unet"], parts["text_encoder"])
        if ip_adapter is not None:
            parts["image_encoder"] = _load_ip_adapter(ip_adapter, parts["unet"])
        parts = {name: network.to(device) for name, network in parts.items()}
        vocabulary = _read_vocabulary(folder / "vocabulary.json")
        return cls(**parts, tokenizer=tokenizer, scheduler=scheduler, vocabulary=vocabulary)

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
        output = self.vae.encode(images.to(self.vae.dtype))
        # TAESD gives latents, which its factor of 1 leaves as they are; a VAE their distribution.
        latents = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
        config = self.vae.config
        return (latents.float() - (config.shift_factor or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return the images of scaled latents [B, 4, h, w], roughly in [-1, 1], [B, 3, H, W]."""
        config = self.vae.config
        latents = latents.float() / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Return the token embeddings of prompts, [N, L, D].

        Words beyond the tokenizer's limit are cut off, which is warned of.
        """
        length = self.text_encoder.config.max_position_embeddings
        ids = clip_tokenize(self.tokenizer, prompts, length)  # [N, L]
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
            image_scale: Weight of the pictures beside the text.
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
        if self._is_plus:  # Trained with the tokens of black pixels (after normalisation: zeros).
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
            image_scale: Weight of the pictures beside the text.
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

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that are not in the declared vocabulary, if there is one."""
        if self.vocabulary is None:
            return []
        words = re.findall(r"[\w']+", prompt.lower()) or prompt.split()
        return [word for word in dict.fromkeys(words) if word not in self.vocabulary["words"]]

    @property
    def _is_plus(self) -> bool:
        """Whether the IP-Adapter attends to all tokens of the picture, not to one embedding."""
        projection = self.unet.encoder_hid_proj.image_projection_layers[0]
        return isinstance(projection, IPAdapterPlusImageProjection)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the embeddings, [N, 1, E] or [N, 1, L, E], of normalised pixels [N, 3, S, S]."""
        output = self.image_encoder(pixels.to(self.image_encoder.dtype), output_hidden_states=True)
        embeds = output.hidden_states[-2] if self._is_plus else output.image_embeds
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
        """Return the IP-Adapter's input: without a picture, zeros at scale 0 for it insists."""
        if image_embeds is None:
            scale = 0.0
            config = self.image_encoder.config
            shape = (1, 1, config.hidden_size) if self._is_plus else (1, config.projection_dim)
            image_embeds = torch.zeros(batch, *shape, device=self.device)
        for processor in self.unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [scale]
        return {"image_embeds": [image_embeds.to(self.unet.dtype)]}


@torch.no_grad()
def depth_condition(depth: Tensor, mask: Tensor, size: int) -> Tensor:
    """Turn rendered depth into what depth ControlNets are trained on: disparity, near = bright.

    Inverse depth is scaled to [0.1, 1] over each image's foreground, nearest point 1; the
    background is 0. An image without foreground is all 0.

    Args:
        depth: Distance along the ray, [B, 1, n, n]; ignored outside the mask.
        mask: Foreground where above 0.5, [B, 1, n, n].
        size: Height and width of the result, pixels.

    Returns:
        [B, 3, size, size] in [0, 1].
    """
    foreground = mask > 0.5
    inverse = 1 / depth.float()
    near = inverse.where(foreground, inverse.new_tensor(-torch.inf)).amax((2, 3), keepdim=True)
    far = inverse.where(foreground, inverse.new_tensor(torch.inf)).amin((2, 3), keepdim=True)
    scaled = 1 - 0.9 * (near - inverse) / (near - far).clamp_min(1e-8)
    scaled = scaled.where(foreground, scaled.new_zeros(()))  # [B, 1, n, n]
    resized = F.interpolate(scaled, (size, size), mode="bilinear", antialias=True)
    return resized.expand(-1, 3, -1, -1)  # [B, 3, size, size]


def _check_index(path: Path) -> None:
    """Refuse a folder that is no diffusers pipeline, or one of another family."""
    if not path.is_file():
        raise ValueError(f"{path.parent}: not a diffusers folder, it has no model_index.json")
    with one_line_errors(str(path.parent), path.name):
        pipeline = json.loads(path.read_text())["_class_name"]
        if not re.match("StableDiffusion(?!3|.*XL)", str(pipeline)):
            raise ValueError(f"holds a {pipeline}, not Stable Diffusion 1.x or 2.x")


def _read_vocabulary(path: Path) -> dict | None:
    """Return the words a small prior declares to know, or None."""
    if not path.is_file():
        return None
    with one_line_errors(str(path)):
        vocabulary = json.loads(path.read_text())
        if not isinstance(vocabulary["words"], list):
            raise ValueError('"words" must be a list')
    return vocabulary


def _load_scheduler(source: str) -> DDPMScheduler:
    """Load the noise schedule of whatever scheduler the folder names, as DDPM's."""
    local = Path(source).is_dir()
    with one_line_errors(source, "scheduler"), quiet_loading():
        config = DDPMScheduler.load_config(source, subfolder="scheduler", local_files_only=local)
        if "beta_start" not in config:
            raise ValueError(f"{config.get('_class_name')} has no noise schedule in betas")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type is {prediction}, not epsilon or v_prediction")
        steps = config.get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"num_train_timesteps is {steps!r}, no number from 1 to {MAX_STEPS}")
        scheduler = DDPMScheduler.from_config(config)
        shares = scheduler.alphas_cumprod
        if not shares.isfinite().all():
            raise ValueError("its noise schedule is not finite")
        falls = len(shares) and shares[0] <= 1 and (shares.diff() <= 0).all()
        # Nothing of the signal may be left at the last step, as in version 2.1, but not before.
        if not falls or (shares[:-1] <= 0).any() or not 0 <= shares[-1] < 1:
            raise ValueError("its noise schedule does not fall from at most 1 to at least 0")
    return scheduler


def _load_vae(source: str, subfolder: str, dtype: torch.dtype) -> AutoencoderKL | AutoencoderTiny:
    """Load a VAE of either class."""
    saved_class = _vae_config(source, subfolder)["_class_name"]
    return load_network(VAE_CLASSES[saved_class], source, subfolder, dtype)


def _load_other_vae(
    source: str | Path, model: str, dtype: torch.dtype
) -> AutoencoderKL | AutoencoderTiny:
    """Load a VAE in place of a model's own, and refuse one whose latents are another model's."""
    source = resolve_source(source)
    vae = _load_vae(source, "vae" if Path(source, "model_index.json").is_file() else "", dtype)
    own = _vae_config(model, "vae")
    levels = own.get("block_out_channels", own.get("decoder_block_out_channels", ()))
    ours = (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
    theirs = (own.get("latent_channels", 4), 2 ** (len(levels) - 1))
    if ours != theirs:
        raise ValueError(
            f"{source}: its latents have {ours[0]} channels and cells of {ours[1]} px, "
            f"those of {model} {theirs[0]} and {theirs[1]} px"
        )
    ours, theirs = vae.config.scaling_factor, own.get("scaling_factor", 0.18215)
    if ours != theirs and type(vae).__name__ == own["_class_name"]:
        raise ValueError(f"{source}: scales its latents by {ours}, {model} by {theirs}")
    return vae


def _vae_config(source: str, subfolder: str) -> dict:
    """Return the config.json of a VAE, which names its class."""
    options = {"subfolder": subfolder, "local_files_only": Path(source).is_dir()}
    with one_line_errors(source, subfolder), quiet_loading():
        config = AutoencoderKL.load_config(source, **options)
        saved_class = config.get("_class_name")
        if saved_class not in VAE_CLASSES:
            raise ValueError(f"holds {saved_class}, not {' or '.join(VAE_CLASSES)}")
        scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
        if not is_number(scale) or scale <= 0:
            raise ValueError(f"scaling_factor is {scale!r}, no positive number")
        if not is_number(shift or 0.0):
            raise ValueError(f"shift_factor is {shift!r}, no number")
    return config


def _check_fit(
    source: str,
    controlnet_source: str | None,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL | AutoencoderTiny,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    controlnet: ControlNetModel | None = None,
) -> None:
    """Refuse parts that load but cannot work together, or with the losses."""
    pairs = [
        (source, "cross_attention_dim", unet, "hidden_size", text_encoder),
        (source, "in_channels", unet, "latent_channels", vae),
    ]
    wanted = [(source, unet, UNET_CONFIG)]
    if controlnet is not None:
        pairs += [(controlnet_source, key, controlnet, key, unet) for key in AS_THE_UNET]
        wanted += [(controlnet_source, controlnet, CONTROLNET_CONFIG)]

    for where, network, config in wanted:
        for key, value in config.items():
            if network.config.get(key, value) != value:
                name, given = type(network).__name__, network.config[key]
                raise ValueError(f"{where}: {key} of its {name} is {given!r}, not {value!r}")
    for where, key, network, other_key, other in pairs:
        ours, theirs = str(getattr(network.config, key)), str(getattr(other.config, other_key))
        if ours != theirs:
            raise ValueError(
                f"{where}: {key} of its {type(network).__name__} is "
                f"{ours}{TEXT_WIDTHS.get(ours, '')}, but {other_key} of the "
                f"{type(other).__name__} {theirs}{TEXT_WIDTHS.get(theirs, '')}"
            )
    cells = unet.config.sample_size
    if type(cells) is not int or not 1 <= cells <= MAX_CELLS:
        raise ValueError(
            f"{source}/unet: sample_size is {cells!r}, no number of cells from 1 to {MAX_CELLS}"
        )
    if len(tokenizer) > text_encoder.config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {len(tokenizer)} words, the text encoder "
            f"{text_encoder.config.vocab_size}"
        )
    levels = len(vae.config.block_out_channels)
    if controlnet is not None:
        given = len(controlnet.config.conditioning_embedding_out_channels)
        if given != levels:
            raise ValueError(
                f"{controlnet_source}: shrinks depth to 1 / {2 ** (given - 1)}, "
                f"latents are 1 / {2 ** (levels - 1)} of an image"
            )


def _load_ip_adapter(
    source: str | Path, unet: UNet2DConditionModel
) -> CLIPVisionModelWithProjection:
    """Put an IP-Adapter into the UNet and return its image encoder.

    No attention processor may be set on the UNet afterwards: that would remove the adapter.
    """
    folder, subfolder, file = find_weights(source, "models", "ip-adapter*", IP_ADAPTER_FILE)
    encoder_folder = f"{subfolder}/image_encoder".lstrip("/")
    encoder = load_network(CLIPVisionModelWithProjection, folder, encoder_folder, unet.dtype)
    with one_line_errors(folder, f"{subfolder}/{file}".lstrip("/")), quiet_loading():
        from diffusers.loaders import IPAdapterMixin  # Here, since its import logs warnings.

        _check_adapter(fetch_weights(folder, subfolder, file), unet)
        loader = IPAdapterMixin()  # What pipelines inherit; of a pipeline it needs the UNet only.
        loader.unet = unet
        # Low memory use would leave weights that the file lacks empty instead of raising.
        try:
            loader.load_ip_adapter(folder, subfolder, file, low_cpu_mem_usage=False)
        except RuntimeError as error:  # What torch makes of weights that do not fit.
            raise ValueError(f"is incomplete or of another model: {error}") from error
        projection = unet.encoder_hid_proj.image_projection_layers[0]
        if isinstance(projection, ImageProjection):
            takes, gives = projection.image_embeds.in_features, encoder.config.projection_dim
        elif isinstance(projection, IPAdapterPlusImageProjection):
            takes, gives = projection.proj_in.in_features, encoder.config.hidden_size
        else:
            raise ValueError(f"{type(projection).__name__}: only base and Plus are supported")
        if takes != gives:
            raise ValueError(f"takes embeddings of width {takes}, its encoder gives {gives}")
    return encoder


def _check_adapter(file: str, unet: UNet2DConditionModel) -> None:
    """Refuse an IP-Adapter of which diffusers would leave something out, or with NaNs."""
    weights = load_state_dict(file)
    if "ip_adapter" in weights:  # A .bin, which nests what a .safetensors names with a dot.
        weights = {f"{part}.{key}": w for part, ws in weights.items() for key, w in ws.items()}
    if not weights.keys() & {"image_proj.proj.weight", "image_proj.latents"}:
        raise ValueError("holds no projection of a base or Plus IP-Adapter (image_proj)")
    count = sum(name.endswith("attn2.processor") for name in unet.attn_processors)
    known = {f"ip_adapter.{2 * i + 1}.to_{side}_ip.weight" for i in range(count) for side in "kv"}
    for key, weight in weights.items():
        if not key.startswith("image_proj.") and key not in known:
            raise ValueError(f"is of another kind or model: no place for {key}")
        if not weight.isfinite().all():
            raise ValueError(f"{key} is not finite")
