"""Frozen image and text features: CLIP embeddings and the patch tokens of a self-supervised ViT.

images [B, 3, H, W] in [-1, 1], of any size; D is a feature's width, g the side of a token grid.
Gradients flow to the images, never to the networks.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
    Dinov2WithRegistersModel,
    ViTModel,
)

from models.pretrained import (
    load_network,
    load_tokenizer,
    model_type,
    one_line_errors,
    quiet_loading,
    resolve_source,
)
from models.prompts import clip_tokenize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VIT_CLASSES = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "vit": ViTModel,  # The first DINO's.
}


class ClipFeatures:
    """Embeddings of images and sentences in CLIP's common space."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        """Take both parts of one CLIP, and freeze them."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device = "cpu"
    ) -> "ClipFeatures":
        """Load a CLIPModel with its tokenizer from a local folder or hub id.

        Raises:
            ValueError: it cannot be found, is no CLIPModel or is incomplete.
        """
        source = resolve_source(source)
        model_type(source, ["clip"])
        model, tokenizer = load_network(CLIPModel, source), load_tokenizer(source)
        _check_channels(source, model.config.vision_config.num_channels)
        words = model.config.text_config.vocab_size
        if len(tokenizer) > words:
            raise ValueError(
                f"{source}: the tokenizer has {len(tokenizer)} words, the text encoder {words}"
            )
        return cls(model.to(device), tokenizer)

    @property
    def depth(self) -> int:
        """Number of layers of the image tower."""
        return self.model.config.vision_config.num_hidden_layers

    def images(self, images: Tensor) -> Tensor:
        """Return unit-length embeddings [B, D] of images [B, 3, H, W]."""
        pixels = clip_preprocess(images, self.model.config.vision_config.image_size)
        embeds = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        return F.normalize(embeds, dim=-1)

    def tokens(self, images: Tensor, layer: int = -2) -> Tensor:
        """Return the patch tokens [B, g, g, D] of images [B, 3, H, W], one layer before the last.

        They tell where things are, which the embedding of the whole image does not. Another layer
        may be asked for; 0 is the embedding of the patches.
        """
        config = self.model.config.vision_config
        pixels = clip_preprocess(images, config.image_size)
        states = self.model.vision_model(pixels, output_hidden_states=True).hidden_states
        side = config.image_size // config.patch_size
        return states[layer][:, 1:].unflatten(1, (side, side))

    @torch.no_grad()
    def text(self, sentences: list[str]) -> Tensor:
        """Return unit-length embeddings [N, D] of sentences."""
        length = self.model.config.text_config.max_position_embeddings
        ids = clip_tokenize(self.tokenizer, sentences, length).to(self.model.device)
        embeds = self.model.text_projection(self.model.text_model(ids).pooler_output)
        return F.normalize(embeds, dim=-1)


class TokenFeatures:
    """Patch tokens of a DINO-type ViT: what is where in an image, little of its style."""

    def __init__(
        self,
        model: Dinov2Model | Dinov2WithRegistersModel | ViTModel,
        size: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        """Take a ViT, the size of its input in pixels and its image statistics in [0, 1]."""
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self.mean = mean
        self.std = std

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device = "cpu"
    ) -> "TokenFeatures":
        """Load a DINOv2 (with or without registers) or ViT from a local folder or hub id.

        The input size and the image statistics are those of its preprocessor_config.json; without
        one, the size that its position embeddings have and ImageNet's statistics.

        Raises:
            ValueError: it cannot be found, is another kind of model or is incomplete.
        """
        source = resolve_source(source)
        model_class = VIT_CLASSES[model_type(source, VIT_CLASSES)]
        model = load_network(model_class, source, optional=("pooler.",)).to(device)
        _check_channels(source, model.config.num_channels)
        own_size = model.config.image_size
        given = _input_format(source, own_size)
        if model_class is ViTModel and given["size"] != own_size:  # DINOv2 adapts to any size.
            raise ValueError(f"{source}: takes {own_size} px, its preprocessor gives {given}")
        return cls(model, **given)

    @property
    def grid(self) -> int:
        """Tokens per side, g."""
        return self.size // self.model.config.patch_size

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.model.config.num_hidden_layers

    def tokens(self, images: Tensor) -> Tensor:
        """Return the final, layer-normalised patch tokens [B, g, g, D] of images [B, 3, H, W].

        Images are squeezed to the network's square input, so that cells keep their places.
        """
        return self._grid(self.model(self._preprocess(images)).last_hidden_state)

    def layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Return the patch tokens [B, g, g, D] after the layers `indices`; 0 is the embedding."""
        states = self.model(self._preprocess(images), output_hidden_states=True).hidden_states
        return [self._grid(states[index]) for index in indices]

    def _preprocess(self, images: Tensor) -> Tensor:
        """Return resized, normalised images [B, 3, size, size]."""
        shape = (self.size, self.size)
        images = F.interpolate(images.float(), shape, mode="bicubic", antialias=True)
        return _normalise((images + 1) / 2, self.mean, self.std)

    def _grid(self, tokens: Tensor) -> Tensor:
        """Drop class and register tokens [B, k + g * g, D], which come first -> [B, g, g, D]."""
        return tokens[:, -(self.grid**2) :].unflatten(1, (self.grid, self.grid))


def clip_preprocess(images: Tensor, size: int) -> Tensor:
    """Resize, crop and normalise images as CLIP's image processor does.

    The shorter side becomes `size` (bicubic, antialiased), then the centre square is kept.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        size: Height and width of the network's input, pixels.

    Returns:
        [B, 3, size, size].
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    images = F.interpolate(images.float(), shape, mode="bicubic", antialias=True)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    images = images[..., top : top + size, left : left + size]  # [B, 3, size, size]
    return _normalise((images + 1) / 2, CLIP_MEAN, CLIP_STD)


def _check_channels(source: str, channels: int) -> None:
    """Refuse a network for anything but images of three channels."""
    if channels != 3:
        raise ValueError(f"{source}: takes images of {channels} channels, not 3")


def _input_format(source: str, image_size: int) -> dict:
    """Return `size`, `mean` and `std` of a ViT's input from its preprocessor_config.json.

    The file may be absent; one that cannot be fetched or read is a ValueError.
    """
    name = "preprocessor_config.json"
    with one_line_errors(source, name), quiet_loading():
        path = Path(source, name) if Path(source).is_dir() else _fetch(source, name)
        given = json.loads(path.read_text()) if path and path.is_file() else {}
        crop = given.get("crop_size", image_size)
        return {
            "size": int(crop["height"] if isinstance(crop, dict) else crop),
            "mean": tuple(map(float, given.get("image_mean", IMAGENET_MEAN))),
            "std": tuple(map(float, given.get("image_std", IMAGENET_STD))),
        }


def _fetch(hub_id: str, name: str) -> Path | None:
    """Return the local copy of a file on the hub, or None if the hub says that it has none."""
    try:
        return Path(hf_hub_download(hub_id, name))
    except LocalEntryNotFoundError:  # The hub could not be asked. It is an EntryNotFoundError too.
        raise
    except EntryNotFoundError:
        return None


def _normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the channels' mean and divide by their deviation."""
    mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (mean, std))
    return (images - mean) / std
