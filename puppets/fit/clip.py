"""Train CLIP, small: its byte-pair encoding, and the towers of text and pictures."""

from __future__ import annotations

import json
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from models.features import ClipFeatures, clip_preprocess, clip_tokenize
from puppets.data import DOMAIN_NAMES, ROOT, load, to_images
from puppets.domains import DOMAINS
from puppets.fit.pretrain import DIFFUSION, EAGER, OUT, Config, fit, percent, report, warm_start

LENGTH = 32  # Tokens a prompt can have.
WIDTH = 128  # Width of text and picture embeddings.


def train_tokenizer() -> CLIPTokenizer:
    """Learn CLIP's byte-pair encoding from the captions and return the tokenizer."""
    captions = sorted(set(load(keys=("caption",))["caption"].tolist()))
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    # CLIP's own order: bytes, bytes that end a word, merges, the two special tokens.
    pieces = sorted(alphabet) + [b + "</w>" for b in sorted(alphabet)]
    pieces += [p for p in learnt["vocab"] if p not in set(pieces)]
    vocab = {p: i for i, p in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [" ".join(m) if isinstance(m, list) else m for m in learnt["merges"]]
    folder = ROOT / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return CLIP, small: two transformers of width 128 over 16 px patches and 32 tokens."""
    common = {
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
        "hidden_size": 128,
    }
    text = common | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = common | {"image_size": 128, "patch_size": 16, "num_hidden_layers": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    return CLIPModel._from_config(config, attn_implementation=EAGER)


def train(cfg: Config) -> None:
    """Train the CLIP pair: InfoNCE over captions and over the domains' own prompts.

    Captions that read the same count as the same. With `--warm-start` the text tower, which the
    UNet has learnt to read, is locked, and only the picture tower learns (LiT, arXiv:2111.07991).
    """
    data = load(keys=("rgb", "caption", "domain"))
    # Learnt again, ties between pairs could fall otherwise under the locked tower.
    committed = CLIPTokenizer.from_pretrained(OUT / "clip") if cfg.warm_start else None
    tokenizer = committed or train_tokenizer()
    torch.manual_seed(0)
    model = build_clip(tokenizer)
    warm_start(cfg, model, OUT / "clip/model.safetensors")
    model.to(cfg.device)
    for part in (model.text_model, model.text_projection):
        part.requires_grad_(not cfg.warm_start)
    names, domain = data["caption"].astype(str), torch.from_numpy(data["domain"])
    _, group = np.unique(names, return_inverse=True)
    group = torch.from_numpy(group)
    ids = clip_tokenize(tokenizer, names.tolist(), LENGTH)
    prompts = [spec.phrases[0] for spec in DOMAINS.values()]
    prompt_ids = clip_tokenize(tokenizer, prompts, LENGTH).to(cfg.device)  # [K, L]

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(names), (96,))
        images = augment(to_images(data["rgb"][rows.numpy()]).to(cfg.device))
        words = torch.cat([ids[rows].to(cfg.device), prompt_ids])
        out = model(input_ids=words, pixel_values=clip_preprocess(images, 128))
        same = (group[rows, None] == group[rows]).to(cfg.device, torch.float32)
        target = same / same.sum(1, keepdim=True)
        logits, among_domains = out.logits_per_image.float().split([96, len(prompts)], dim=1)
        nce = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"nce": nce, "domain": F.cross_entropy(among_domains, domain[rows].to(cfg.device))}

    params = [p for p in model.parameters() if p.requires_grad]
    minutes = fit("clip", params, terms, cfg, steps=450, lr=1e-3, weight_decay=0.05)
    model = model.to("cpu").eval()
    model.half().save_pretrained(OUT / "clip")
    tokenizer.save_pretrained(OUT / "clip")
    tokenizer.save_pretrained(DIFFUSION / "tokenizer")
    text = CLIPTextModel(model.config.text_config)
    text.load_state_dict(_strip(model.text_model.state_dict(), text))
    text.half().save_pretrained(DIFFUSION / "text_encoder")
    vision = CLIPVisionModelWithProjection(model.config.vision_config)
    state = {f"vision_model.{k}": v for k, v in model.vision_model.state_dict().items()}
    vision.load_state_dict(state | {"visual_projection.weight": model.visual_projection.weight})
    vision.half().save_pretrained(DIFFUSION / "ip_adapter/models/image_encoder")
    shutil.copy(ROOT / "vocabulary.json", DIFFUSION / "vocabulary.json")
    report_clip(cfg, minutes)


def _strip(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Match the text tower's keys to CLIPTextModel, which newer transformers have flattened."""
    prefix = "text_model." if next(iter(module.state_dict())).startswith("text_model.") else ""
    return {prefix + k: v for k, v in state.items()}


def report_clip(cfg: Config, minutes: float) -> None:
    """Count the held-out pictures whose domain CLIP picks among all."""
    held_out = load(validation=True, keys=("rgb", "domain"))
    domain = torch.from_numpy(held_out["domain"])
    clip = ClipFeatures.from_pretrained(OUT / "clip")
    right = (domain == classify(clip, to_images(held_out["rgb"]))).float()
    figures = {"held-out renders whose domain CLIP picks among all": percent(right)}
    figures |= {f"of them {n}": percent(right[domain == i]) for i, n in enumerate(DOMAIN_NAMES)}
    report("clip", cfg, minutes, figures)


@torch.no_grad()
def classify(clip: ClipFeatures, images: Tensor, batch: int = 64) -> Tensor:
    """Return the index of the domain whose canonical prompt CLIP finds closest, [B]."""
    prompts = clip.text([spec.phrases[0] for spec in DOMAINS.values()])  # [N, D]
    return torch.cat([(clip.images(x) @ prompts.T).argmax(1) for x in images.split(batch)])


def augment(images: Tensor) -> Tensor:
    """Change images [B, 3, H, W] as adapted generators do: paler, gaudier, blurred, a part missing.

    CLIP shall judge pictures that no domain holds, so it must not go by one garment or one tone.
    """
    b, _, h, w = images.shape
    gray = images.mean(1, keepdim=True)
    saturation = 0.5 + 1.3 * torch.rand(b, 1, 1, 1, device=images.device)
    tint = 0.12 * torch.randn(b, 3, 1, 1, device=images.device)
    contrast = 0.75 + 0.5 * torch.rand(b, 1, 1, 1, device=images.device)
    # White stays white: the background is empty in every domain.
    changed = 1 - (1 - gray - saturation * (images - gray)) * contrast * (1 + tint)
    blurred = F.avg_pool2d(changed, 3, 1, 1, count_include_pad=False)
    noise = 0.06 * torch.rand(b, 1, 1, 1, device=images.device) * torch.randn_like(images)
    changed = torch.where(torch.rand(b, 1, 1, 1, device=images.device) < 0.4, blurred, changed)
    changed = jitter((changed + noise).clamp(-1, 1))
    # A window of any colour hides up to half of the height and width, the shirt in every third.
    size = 0.5 * torch.rand(b, 2, 1, 1, device=images.device)
    corner = torch.rand(b, 2, 1, 1, device=images.device) * (1 - size)
    y = torch.linspace(0, 1, h, device=images.device).view(1, h, 1)
    x = torch.linspace(0, 1, w, device=images.device).view(1, 1, w)
    inside = [(v >= corner[:, i]) & (v < corner[:, i] + size[:, i]) for i, v in enumerate((y, x))]
    shirt = (y > 0.75) & (torch.rand(b, 1, 1, device=images.device) < 0.33)
    colour = 2 * torch.rand(b, 3, 1, 1, device=images.device) - 1
    hidden = (inside[0] & inside[1]) | shirt  # [B, H, W]
    return torch.where(hidden[:, None], colour, changed)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)  # bfloat16 would round the sampling grid.
def jitter(images: Tensor) -> Tensor:
    """Shift, scale and recolour images [B, 3, H, W] a little, each differently."""
    b = len(images)
    scale = 1 + 0.12 * (2 * torch.rand(b, device=images.device) - 1)
    move = 0.10 * (2 * torch.rand(b, 2, device=images.device) - 1)
    theta = torch.zeros(b, 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = move
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1  # White comes in.
    gain = 1 + 0.10 * (2 * torch.rand(b, 1, 1, 1, device=images.device) - 1)
    return (moved * gain + 0.06 * (2 * torch.rand(b, 1, 1, 1, device=images.device) - 1)).clamp(
        -1, 1
    )
