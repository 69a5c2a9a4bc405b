"""Train the frozen side of the embedded world: CLIP, VAE, UNet with ControlNet, IP-Adapter, ViT.

Every network is of the class that its real counterpart has, only small, and is saved in the real
layout, in float16. All learn from the pictures of `puppets.data`, each picture on its own.
"""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Dinov2Model,
)

from models import features
from models.diffusion import DiffusionPrior, depth_condition
from models.renderer import pixel_rays
from puppets.data import CAMERAS, DOMAIN_NAMES, ROOT, load, to_bytes, to_images
from puppets.domains import DOMAINS
from puppets.pretrain import OUT, Config, fit, report

DIFFUSION = OUT / "diffusion"
LENGTH = 32  # Tokens a prompt can have.
WIDTH = 128  # Of text and picture embeddings.
EAGER = "eager"  # CPUs' fused attention is slow backwards in bfloat16.


# CLIP.


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
    from transformers import CLIPConfig

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


def train_clip(cfg: Config) -> None:
    """Train the CLIP pair (InfoNCE; captions that read the same count as the same)."""
    data = load(keys=("rgb", "caption"))
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    model = build_clip(tokenizer).to(cfg.device)
    names = data["caption"].astype(str)
    _, group = np.unique(names, return_inverse=True)
    group = torch.from_numpy(group)
    ids = tokenizer(
        names.tolist(),
        padding="max_length",
        max_length=LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(names), (96,))
        images = jitter(to_images(data["rgb"][rows.numpy()]).to(cfg.device))
        out = model(
            input_ids=ids[rows].to(cfg.device), pixel_values=features.clip_preprocess(images, 128)
        )
        same = (group[rows, None] == group[rows]).to(cfg.device, torch.float32)
        target = same / same.sum(1, keepdim=True)
        logits = out.logits_per_image.float()
        return {"nce": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2}

    minutes = fit("clip", model.parameters(), terms, cfg, steps=450, lr=1e-3, weight_decay=0.05)
    model = model.to("cpu").eval()
    for folder in (OUT / "clip", DIFFUSION):
        shutil.rmtree(folder, ignore_errors=True) if folder.name == "clip" else None
        folder.mkdir(parents=True, exist_ok=True)
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

    held_out = load(validation=True, keys=("rgb", "domain"))
    clip = features.ClipFeatures.from_pretrained(OUT / "clip")
    right = torch.from_numpy(held_out["domain"]) == classify(clip, to_images(held_out["rgb"]))
    figures = {
        "held-out renders whose domain CLIP picks among all": f"{100 * right.float().mean():.1f} %"
    }
    for i, name in enumerate(DOMAIN_NAMES):
        figures[f"of them {name}"] = (
            f"{100 * right[torch.from_numpy(held_out['domain']) == i].float().mean():.1f} %"
        )
    report("clip", cfg, minutes, figures)


def _strip(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Match the text tower's keys to CLIPTextModel, which newer transformers have flattened."""
    prefix = "text_model." if next(iter(module.state_dict())).startswith("text_model.") else ""
    return {prefix + k: v for k, v in state.items()}


@torch.no_grad()
def classify(clip: features.ClipFeatures, images: Tensor, batch: int = 64) -> Tensor:
    """Return the index of the domain whose canonical prompt CLIP finds closest, [B]."""
    prompts = clip.text([spec.phrases[0] for spec in DOMAINS.values()])  # [N, D]
    return torch.cat([(clip.images(x) @ prompts.T).argmax(1) for x in images.split(batch)])


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


# VAE.


def build_vae() -> AutoencoderKL:
    """Return Stable Diffusion's autoencoder, small: 8x down, 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def train_vae(cfg: Config) -> None:
    """Train the autoencoder on random crops: L1, gradient L1 and a little KL, no critic."""
    pixels = load(keys=("rgb",))["rgb"]
    torch.manual_seed(0)
    vae = build_vae().to(cfg.device).to(memory_format=torch.channels_last)

    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.diff(dim=2), x.diff(dim=3)

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(pixels), (12,)).numpy()
        top, left = torch.randint(0, 65, (2, 12)).tolist()
        crops = np.stack(
            [pixels[r, y : y + 64, x : x + 64] for r, y, x in zip(rows, top, left, strict=True)]
        )
        images = to_images(crops).to(cfg.device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        out = vae.decode(posterior.sample()).sample.float()
        grad = sum((a - b).abs().mean() for a, b in zip(edges(out), edges(images), strict=True))
        error = out - images
        return {
            "l1": error.abs().mean(),
            "l2": 2 * error.square().mean(),
            "edges": 0.5 * grad,
            "tone": 6 * F.avg_pool2d(error, 8).square().mean(),  # Colours are learnt last, else.
            "kl": 2e-4 * posterior.kl().float().mean() / (64 * 4),
        }

    minutes = fit("vae", vae.parameters(), terms, cfg, steps=3300, lr=3e-3)
    vae = vae.to("cpu").float().eval()
    with torch.no_grad():
        sample = to_images(pixels[:: len(pixels) // 256])
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in sample.split(32)])
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
        held_out = load(validation=True, limit=3, keys=("rgb", "domain"))
        images = to_images(held_out["rgb"])
        back = torch.cat([vae(x).sample for x in images.split(32)]).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (back - images).square().mean((1, 2, 3)))
    domain = torch.from_numpy(held_out["domain"])
    figures = {
        f"PSNR {n} [dB]": f"{psnr[domain == i].mean():.1f}" for i, n in enumerate(DOMAIN_NAMES)
    }
    vae.half().save_pretrained(DIFFUSION / "vae")
    picks = [int((domain == i).nonzero()[0]) for i in range(len(DOMAIN_NAMES))]
    save_sheet("vae", [images[picks], back[picks]])
    report("vae", cfg, minutes, figures | {"scaling_factor": vae.config.scaling_factor})


def save_sheet(name: str, rows: list[Tensor]) -> None:
    """Write a contact sheet: one row of pictures [N, 3, H, W] below the other."""
    from PIL import Image

    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    (OUT / "sheets").mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_bytes(sheet.unsqueeze(0))[0]).save(
        OUT / "sheets" / f"{name}.png", optimize=True
    )


# UNet and depth ControlNet.


def build_unet() -> UNet2DConditionModel:
    """Return Stable Diffusion's UNet, small: 16x16 latents, two levels that attend to the text."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDPMScheduler:
    """Return Stable Diffusion's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


def write_model_index() -> None:
    """Write what makes the folder a diffusers pipeline, and its scheduler."""
    scheduler().save_pretrained(DIFFUSION / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "requires_safety_checker": False,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (DIFFUSION / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def prepare_latents(vae: AutoencoderKL, pixels: np.ndarray) -> Tensor:
    """Encode pictures, [N, H, W, 3] uint8 -> [N, 4, h, w] scaled; kept for the same VAE."""
    path = ROOT / "latents.pt"
    key = [len(pixels), sum(p.double().abs().sum().item() for p in vae.parameters())]
    if path.exists() and (kept := torch.load(path, weights_only=True))["key"] == key:
        return kept["latents"]
    parts = [
        vae.encode(to_images(pixels[i : i + 32])).latent_dist.mode()
        for i in tqdm(range(0, len(pixels), 32), desc="latents")
    ]
    latents = torch.cat(parts) * vae.config.scaling_factor
    torch.save({"key": key, "latents": latents}, path)
    return latents


def rough_depth(depth: np.ndarray, mask: np.ndarray) -> Tensor:
    """Depth condition at the generator's ray resolution, sometimes as blurred as a generator's."""
    depth = torch.from_numpy(depth[:, None, ::2, ::2]).float()
    mask = torch.from_numpy(mask[:, None, ::2, ::2]).float() / 255
    if torch.rand(()) < 0.5:
        covered = mask > 0.5
        weight = F.avg_pool2d(covered.float(), 3, 1, 1)
        soft = F.avg_pool2d(depth * covered, 3, 1, 1) / weight.clamp(min=0.1)
        depth = torch.where(covered, soft + 0.003 * torch.randn_like(soft), depth)
    return depth_condition(depth.clamp(min=1.0), mask, 128)


def noise_loss(prediction: Tensor, noise: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """Squared error of the noise, weighted by min-SNR-5 (arXiv:2303.09556, Eq. 5)."""
    snr = abar[t] / (1 - abar[t])
    error = (prediction.float() - noise).square().mean((1, 2, 3))
    return (error * (snr.clamp(max=5) / snr)).mean()


def train_unet(cfg: Config) -> None:
    """Train UNet and ControlNet together: depth for 60 % of the samples, no text for 12 %."""
    data = load(keys=("rgb", "depth", "mask", "caption"))
    vae = AutoencoderKL.from_pretrained(DIFFUSION / "vae").float().eval()
    latents = prepare_latents(vae, data.pop("rgb"))
    text_encoder = CLIPTextModel.from_pretrained(
        DIFFUSION / "text_encoder", dtype=torch.float32
    ).eval()
    tokenizer = CLIPTokenizer.from_pretrained(DIFFUSION / "tokenizer")
    captions, which = np.unique(np.append(data["caption"].astype(str), ""), return_inverse=True)
    ids = tokenizer(
        captions.tolist(),
        padding="max_length",
        max_length=LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        embedded = torch.cat([text_encoder(part)[0] for part in ids.split(256)])  # [N, L, D]
    which, empty = torch.from_numpy(which), int((captions == "").nonzero()[0][0])

    torch.manual_seed(0)
    unet = build_unet()
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_channels=3, load_weights_from_unet=False
    )
    controlnet = ControlNetModel.from_config(
        dict(controlnet.config) | {"conditioning_embedding_out_channels": (8, 16, 32, 64)}
    )
    for network in (unet, controlnet):
        network.to(cfg.device)
        network.set_attn_processor(AttnProcessor())
    abar = scheduler().alphas_cumprod.to(cfg.device)
    params = [*unet.parameters(), *controlnet.parameters()]

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (32,))
        z0 = latents[rows].to(cfg.device)
        text = embedded[torch.where(torch.rand(32) < 0.12, empty, which[rows])].to(cfg.device)
        t = torch.randint(1000, (32,), device=cfg.device)
        noise = torch.randn_like(z0)
        a = abar[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z0 + (1 - a).sqrt() * noise
        with_depth = 19  # Of 32; the rest runs without the ControlNet.
        hint = rough_depth(
            data["depth"][rows[:with_depth].numpy()], data["mask"][rows[:with_depth].numpy()]
        ).to(cfg.device)
        down, mid = controlnet(
            noisy[:with_depth], t[:with_depth], text[:with_depth], hint, return_dict=False
        )
        pad = 32 - with_depth
        down = [F.pad(d, (0, 0, 0, 0, 0, 0, 0, pad)) for d in down]
        mid = F.pad(mid, (0, 0, 0, 0, 0, 0, 0, pad))
        out = unet(
            noisy, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
        return {
            "depth": noise_loss(out[:with_depth], noise[:with_depth], t[:with_depth], abar)
            * (with_depth / 32),
            "plain": noise_loss(out[with_depth:], noise[with_depth:], t[with_depth:], abar)
            * (pad / 32),
        }

    minutes = fit("unet", params, terms, cfg, steps=2400, lr=8e-4, weight_decay=0.01)
    unet.cpu().half().save_pretrained(DIFFUSION / "unet")
    controlnet.cpu().half().save_pretrained(DIFFUSION / "controlnet")
    write_model_index()
    report_prior("unet", cfg, minutes)


@torch.no_grad()
def sample(
    prior: DiffusionPrior,
    prompt: str,
    count: int,
    depth: Tensor | None = None,
    reference: Tensor | None = None,
    guidance: float = 4.0,
    steps: int = 25,
    seed: int = 0,
) -> Tensor:
    """Sample pictures with deterministic DDIM (arXiv:2010.02502), [count, 3, H, W] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 16, 16, generator=generator)
    condition = prior.condition(prompt, reference)
    text = condition.text.repeat_interleave(count, 0)
    embeds = None if reference is None else condition.image_embeds.repeat_interleave(count, 0)
    hint = None if depth is None else depth.repeat(2, 1, 1, 1)
    times = torch.linspace(980, 0, steps + 1).long()
    for now, then in zip(times[:-1], times[1:], strict=True):
        t = now.expand(2 * count)
        eps_uncond, eps = prior.predict_noise(x.repeat(2, 1, 1, 1), t, text, hint, embeds).chunk(2)
        eps = eps_uncond + guidance * (eps - eps_uncond)
        a, b = prior.alphas_cumprod[now], prior.alphas_cumprod[then]
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return prior.decode_latents(x).clamp(-1, 1)


def report_prior(part: str, cfg: Config, minutes: float) -> None:
    """Sample every domain without and with depth, and count what came out as asked."""
    prior = DiffusionPrior.from_pretrained(DIFFUSION)
    clip = features.ClipFeatures.from_pretrained(OUT / "clip")
    held_out = load(validation=True, limit=1, keys=("depth", "mask", "rgb"))
    count = 8
    mask = torch.from_numpy(held_out["mask"][:count, None]).float() / 255
    hint = depth_condition(
        torch.from_numpy(held_out["depth"][:count, None]).float().clamp(min=1.0), mask, 128
    )
    plain, guided, right, iou = [], [], [], []
    for i, spec in enumerate(DOMAINS.values()):
        a = sample(prior, spec.phrases[0], count, seed=i)
        b = sample(prior, spec.phrases[0], count, depth=hint, seed=i)
        right.append((classify(clip, torch.cat([a, b])) == i).float().mean())
        if (
            spec.shape.get("horn", 0)
            + spec.shape.get("antenna", 0)
            + spec.shape.get("hair_volume", 0)
            == 0
        ):
            drawn = (b.amin(1, keepdim=True) < 0.80).float()
            iou.append((drawn * (mask > 0.5)).sum() / (drawn + (mask > 0.5)).clamp(max=1).sum())
        plain.append(a[:6])
        guided.append(b[:6])
    sheet = [torch.cat([p, g]) for p, g in zip(plain, guided, strict=True)]
    save_sheet("prior", [*sheet, torch.cat([hint[:6] * 2 - 1] * 2)])
    figures = {
        "samples CLIP finds in the prompted domain": f"{100 * torch.stack(right).mean():.1f} %"
    }
    figures |= {
        f"of them {n}": f"{100 * r:.0f} %" for n, r in zip(DOMAIN_NAMES, right, strict=True)
    }
    figures["foreground IoU with the given depth"] = f"{torch.stack(iou).mean():.3f}"
    report(part, cfg, minutes, figures)


# IP-Adapter.


def train_ip_adapter(cfg: Config) -> None:
    """Train the IP-Adapter from another view of the same head, everything else frozen."""
    folder = DIFFUSION / "ip_adapter/models"
    unet = UNet2DConditionModel.from_pretrained(DIFFUSION / "unet").float()
    torch.manual_seed(0)
    state = {
        "image_proj": {
            "proj.weight": torch.randn(4 * WIDTH, WIDTH) / math.sqrt(WIDTH),
            "proj.bias": torch.zeros(4 * WIDTH),
            "norm.weight": torch.ones(WIDTH),
            "norm.bias": torch.zeros(WIDTH),
        },
        "ip_adapter": {},
    }
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for key, source in (("to_k_ip", layer.to_k), ("to_v_ip", layer.to_v)):
                state["ip_adapter"][f"{i}.{key}.weight"] = source.weight.detach().clone()

    def write() -> None:
        flat = {
            f"{group}.{k}": v.half().contiguous()
            for group, part in state.items()
            for k, v in part.items()
        }
        save_file(flat, folder / "ip-adapter_sd15.safetensors")

    if not (ROOT / "ip-adapter.pt").exists():
        write()
    prior = DiffusionPrior.from_pretrained(DIFFUSION)
    # The trained tensors, in the order in which they were written.
    projection = prior.unet.encoder_hid_proj.image_projection_layers[0]
    live = [
        projection.image_embeds.weight,
        projection.image_embeds.bias,
        projection.norm.weight,
        projection.norm.bias,
    ]
    for name, processor in prior.unet.attn_processors.items():
        if "attn2" in name:
            processor.scale = [1.0]
            live += [processor.to_k_ip[0].weight, processor.to_v_ip[0].weight]
    for p in live:
        p.requires_grad_(True)

    data = load(limit=40, keys=("rgb", "view", "caption", "depth", "mask"))
    latents = prepare_latents(prior.vae, data.pop("rgb"))
    with torch.no_grad():
        embeds = torch.cat(
            [
                prior.encode_reference(to_images(data["view"][i : i + 64]))
                for i in range(0, len(latents), 64)
            ]
        )
    captions, which = np.unique(np.append(data["caption"].astype(str), ""), return_inverse=True)
    text = torch.cat(
        [
            prior.encode_text(part.tolist())
            for part in np.array_split(captions, len(captions) // 256 + 1)
        ]
    )
    which, empty = torch.from_numpy(which), int((captions == "").nonzero()[0][0])
    abar = prior.alphas_cumprod

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (24,))
        z0, noise = latents[rows], torch.randn(24, 4, 16, 16)
        t = torch.randint(1000, (24,))
        a = abar[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * z0 + (1 - a).sqrt() * noise
        words = text[torch.where(torch.rand(24) < 0.7, empty, which[rows])]
        picture = embeds[rows] * (torch.rand(24, 1, 1) > 0.05)
        with torch.no_grad():
            hint = rough_depth(data["depth"][rows.numpy()], data["mask"][rows.numpy()])
            down, mid = prior.controlnet(noisy, t, words, hint, return_dict=False)
            on = (torch.rand(24) < 0.6).view(-1, 1, 1, 1)
        out = prior.unet(
            noisy,
            t,
            words,
            added_cond_kwargs={"image_embeds": [picture]},
            down_block_additional_residuals=[d * on for d in down],
            mid_block_additional_residual=mid * on,
        ).sample
        return {"noise": noise_loss(out, noise, t, abar)}

    minutes = fit("ip-adapter", live, terms, cfg, steps=1500, lr=1e-3)
    targets = [(group, key) for group, part in state.items() for key in part]
    for (group, key), value in zip(targets, live, strict=True):
        state[group][key] = value.detach()
    write()
    report_ip_adapter(cfg, minutes)


def report_ip_adapter(cfg: Config, minutes: float) -> None:
    """Sample from held-out pictures alone and count the domains that come back."""
    prior = DiffusionPrior.from_pretrained(DIFFUSION)
    clip = features.ClipFeatures.from_pretrained(OUT / "clip")
    held_out = load(validation=True, limit=2, keys=("rgb", "domain"))
    rows, right = [], {}
    for i, name in enumerate(DOMAIN_NAMES):
        picks = np.flatnonzero(held_out["domain"] == i)[:4]
        references = to_images(held_out["rgb"][picks])
        samples = [
            sample(prior, "", 3, reference=r[None], seed=int(k))
            for k, r in zip(picks, references, strict=True)
        ]
        right[name] = (classify(clip, torch.cat(samples)) == i).float().mean()
        rows.append(
            torch.cat(
                [torch.cat([r[None], s]) for r, s in zip(references[:2], samples[:2], strict=True)]
            )
        )
    save_sheet("ip-adapter", rows)
    mean = torch.stack(list(right.values())).mean()
    figures = {"samples in the reference's domain, no text": f"{100 * mean:.1f} %"}
    report(
        "ip-adapter",
        cfg,
        minutes,
        figures | {f"of them {k}": f"{100 * v:.0f} %" for k, v in right.items()},
    )


# The ViT of the HSC term.


def build_vit() -> Dinov2Model:
    """Return DINOv2's architecture, small: 8 px patches, a 16 x 16 grid of 96-wide tokens."""
    from transformers import Dinov2Config

    return Dinov2Model._from_config(
        Dinov2Config(
            image_size=128,
            patch_size=8,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=3,
        ),
        attn_implementation=EAGER,
    )


def train_dino(cfg: Config) -> None:
    """Train the ViT without labels of domain or person: masked grey patches, and where they lie.

    Half the tokens are hidden. Each token tells the head-centred position of its four quarters
    (known from depth and camera) and its locally normalised grey values: structure, not colour.
    """
    data = load(keys=("rgb", "depth", "mask", "c"))
    torch.manual_seed(0)
    vit = build_vit().to(cfg.device)
    head = nn.Linear(96, 4 * 4 + 64).to(cfg.device)
    place = positions(data.pop("depth"), data.pop("mask"), data.pop("c"))  # [N, 256, 16]
    pixels = data["rgb"]

    def terms(step: int) -> dict[str, Tensor]:
        rows = torch.randint(len(pixels), (32,))
        images = to_images(pixels[rows.numpy()])
        grey = F.unfold(images.mean(1, keepdim=True), 8, stride=8).mT  # [B, 256, 64]
        grey = (grey - grey.mean(2, keepdim=True)) / (grey.std(2, keepdim=True) + 0.08)
        gain = 1 + 0.3 * (2 * torch.rand(32, 3, 1, 1) - 1)
        images = (
            ((images + 1) / 2 * gain).clamp(0, 1)
            - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        hidden = torch.rand(32, 256) < (0.5 if step % 2 else 0.0)
        tokens = vit(
            images.to(cfg.device), bool_masked_pos=hidden.to(cfg.device)
        ).last_hidden_state[:, 1:]
        out = head(tokens).float()
        target = place[rows].to(cfg.device)
        inside = target[..., 3::4].repeat_interleave(3, 2)
        where = out[..., :16].unflatten(2, (4, 4))
        goal = target.unflatten(2, (4, 4))
        xyz = (
            ((where[..., :3] - goal[..., :3]).abs() * goal[..., 3:]).sum() / goal[..., 3:].sum() / 3
        )
        cover = F.binary_cross_entropy_with_logits(where[..., 3], goal[..., 3])
        assert inside.shape[-1] == 12
        return {
            "place": 8 * xyz,
            "cover": 0.3 * cover,
            "grey": (out[..., 16:] - grey.to(cfg.device)).abs().mean(),
        }

    minutes = fit(
        "dino",
        [*vit.parameters(), *head.parameters()],
        terms,
        cfg,
        steps=1000,
        lr=1e-3,
        weight_decay=0.02,
    )
    vit.cpu().half().save_pretrained(OUT / "dino")
    preprocess = {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_processor_type": "BitImageProcessor",
    }
    (OUT / "dino/preprocessor_config.json").write_text(json.dumps(preprocess, indent=2) + "\n")
    report_dino(cfg, minutes)


def positions(depth: np.ndarray, mask: np.ndarray, c: np.ndarray) -> Tensor:
    """Head-centred x, y, z (x 4 to be near 1) and coverage of each 4 px cell, [N, 256, 4 * 4]."""
    out = []
    for i in range(len(depth)):
        origin, direction = pixel_rays(torch.from_numpy(c[i : i + 1]), 32)
        inside = torch.from_numpy(mask[i]).float()[2::4, 2::4].flatten() > 127  # [1024]
        t = torch.from_numpy(depth[i]).float()[2::4, 2::4].flatten()
        point = 4 * (origin[0] + t[:, None] * direction[0]) * inside[:, None]
        cells = torch.cat([point, inside[:, None].float()], 1).T.view(4, 16, 2, 16, 2)
        out.append(cells.permute(1, 3, 2, 4, 0).reshape(256, 16).half())
    return torch.stack(out).float()


def report_dino(cfg: Config, minutes: float) -> None:
    """Check that a token finds its own place in the same head of another domain."""
    from puppets.heads import render

    vit = features.TokenFeatures.from_pretrained(OUT / "dino")
    generator = torch.Generator().manual_seed(77)
    z = torch.randn(16, 16, generator=generator)
    c = CAMERAS.label(
        *(torch.rand(2, 16, generator=generator) * 2 - 1) * torch.tensor([[0.6], [0.3]])
    )
    source, _, mask = render(z, c)
    ours = F.normalize(vit.tokens(source), dim=-1).flatten(1, 2)  # [B, 256, D]
    inside = F.avg_pool2d(mask, 8).flatten(1) > 0.5
    figures = {}
    for name in DOMAIN_NAMES[1:]:
        theirs = F.normalize(vit.tokens(render(z, c, name)[0]), dim=-1).flatten(1, 2)
        found = (theirs @ ours.mT).argmax(2) == torch.arange(256)
        figures[f"foreground tokens of {name} whose nearest source token is the same place"] = (
            f"{100 * found[inside].float().mean():.0f} %"
        )
    report("dino", cfg, minutes, figures)
