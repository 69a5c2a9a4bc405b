"""Frozen image and text features: CLIP embeddings and the patch tokens of a self-supervised ViT.

images [B, 3, H, W] in [-1, 1], of any size; gradients flow to the images, never to the networks.
"""

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocess(images: Tensor, size: int) -> Tensor:
    """Resize, crop and normalise images as CLIP's image processor does.

    The shorter side becomes `size` (bicubic, antialiased), the centre square is kept.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        size: Height and width of the network's input, pixels.

    Returns:
        [B, 3, size, size].
    """
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, int(height * scale)), max(size, int(width * scale)))
    images = F.interpolate(images.float(), shape, mode="bicubic", antialias=True)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    images = images[..., top : top + size, left : left + size]  # [B, 3, size, size]
    return _normalise((images + 1) / 2, CLIP_MEAN, CLIP_STD)


def _normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract the channels' mean and divide by their deviation."""
    mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (mean, std))
    return (images - mean) / std
