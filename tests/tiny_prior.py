"""Tiny pretrained folders with random weights, in the very formats the real ones have.

`build_prior` writes a diffusers folder (Stable Diffusion for 64 px images, a depth ControlNet, an
IP-Adapter and its Plus form), `build_sd2` one like version 2.1, `build_taesd` a TAESD, `write_lora`
a LoRA, `build_clip` and `build_dino` the two feature extractors. The weights follow from a seed;
building all of them takes about a second. `FakePrior` needs no folder.
"""

import json
import shutil
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
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from models.vae import encode, synthetic_pictures

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 514,
    "max_position_embeddings": 32,
    "projection_dim": 24,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
LORA_LAYERS = [
    ("unet", f"{BLOCK}.attn1.to_q"),
    ("unet", f"{BLOCK}.attn2.to_k"),
    ("unet", f"{BLOCK}.attn2.to_out.0"),
    ("unet", f"{BLOCK}.ff.net.0.proj"),
    ("unet", "down_blocks.1.attentions.0.proj_in"),
    ("unet", "mid_block.resnets.0.conv1"),
    ("text_encoder", "encoder.layers.0.self_attn.q_proj"),
    ("text_encoder", "encoder.layers.1.self_attn.out_proj"),
    ("text_encoder", "encoder.layers.1.mlp.fc1"),
]


class FakePrior:
    """A diffusion model whose noise prediction is known in closed form.

    eps_hat = mean(text) * x_t, plus the mean of the depth and of the picture's embedding.
    """

    alphas_cumprod = torch.linspace(0.999, 0.01, 1000)

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
        """Return eps_hat, [N, 4, h, w]."""
        eps_hat = latents_t * _mean(text)
        if depth is not None:
            eps_hat = eps_hat + depth_scale * _mean(depth)
        if image_embeds is not None:
            eps_hat = eps_hat + image_scale * _mean(image_embeds)
        return eps_hat


def build_prior(
    folder: Path,
    prediction_type: str = "epsilon",
    text_width: int = 32,
    seed: int = 0,
    unet_config: dict | None = None,
    text_config: dict | None = None,
    scheduler_config: dict | None = None,
) -> Path:
    """Write a diffusers folder with controlnet/ and ip_adapter/ inside, and return it."""
    torch.manual_seed(seed)
    defaults = {"sample_size": 8, "attention_head_dim": 4, "norm_num_groups": 8}
    unet_config = defaults | (unet_config or {})
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        **unet_config,
    )
    controlnet = ControlNetModel.from_unet(unet)
    _wake_controlnet(controlnet)
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        **(scheduler_config or {}),
    )
    text_config = TEXT | {"hidden_size": text_width} | (text_config or {})
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
    for name, part in {
        "unet": unet,
        "controlnet": controlnet,
        "vae": vae,
        "scheduler": scheduler,
        "text_encoder": text_encoder,
    }.items():
        part.save_pretrained(folder / name)
    write_tokenizer(folder / "tokenizer")
    write_ip_adapters(folder / "ip_adapter" / "models", unet)

    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vocabulary.json").write_text(json.dumps({"words": ["a", "bronze", "statue"]}))
    return folder


def build_sd2(
    folder: Path, unet_config: dict | None = None, text_config: dict | None = None
) -> Path:
    """Write a folder with what sets Stable Diffusion 2.1 apart, with controlnet/, and return it."""
    build_prior(
        folder,
        prediction_type="v_prediction",
        text_width=48,
        unet_config={
            "attention_head_dim": [2, 4, 4],
            "use_linear_projection": True,
            "upcast_attention": True,
        }
        | (unet_config or {}),
        text_config={"hidden_act": "gelu", "num_hidden_layers": 3} | (text_config or {}),
        scheduler_config={"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    )
    (folder / "tokenizer/special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    shutil.rmtree(folder / "ip_adapter")  # There is none for its text width.
    return folder


def build_taesd(folder: Path, prior: Path | None = None) -> Path:
    """Write an AutoencoderTiny folder, and return it.

    Its latents resemble those of the VAE that `build_prior` or `build_sd2` wrote to `prior`.
    """
    torch.manual_seed(0)
    taesd = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    if prior is not None:
        _imitate(taesd, AutoencoderKL.from_pretrained(prior / "vae"))
    taesd.save_pretrained(folder)
    return folder


@torch.no_grad()
def _imitate(taesd: AutoencoderTiny, vae: AutoencoderKL) -> None:
    """Make the latents of a TAESD like a VAE's, by least squares for the encoder's last layer."""
    images = synthetic_pictures()
    wanted = encode(vae, images).transpose(0, 1).flatten(1).T  # [N, 4]
    *layers, last = taesd.encoder.layers
    features = nn.Sequential(*layers)((images + 1) / 2)
    patches = F.unfold(features, 3, padding=1).transpose(1, 2).flatten(0, 1)  # [N, C * 9]
    patches = torch.cat([patches, torch.ones(len(patches), 1)], 1)
    solution = torch.linalg.lstsq(patches, wanted, driver="gelsd").solution.T
    last.weight.copy_(solution[:, :-1].view_as(last.weight))
    last.bias.copy_(solution[:, -1])


def write_lora(file: Path, prior: Path, layout: str = "peft") -> dict:
    """Write a LoRA for some layers of each kind, and return what it adds to weights.

    Ranks differ from layer to layer, and so do alphas, which scale a change by alpha / rank.

    Args:
        file: A .safetensors, or a .bin.
        prior: What `build_prior` or `build_sd2` wrote.
        layout: How weights are named: "kohya", "peft", "processor" as diffusers did before, or
            "header", as peft's with alphas in the file's header. "peft" and "processor" cannot
            tell them: they are the ranks.

    Returns:
        {"unet.<layer>.weight" or "text_encoder.<layer>.weight": change}.
    """
    networks = {
        "unet": UNet2DConditionModel.from_pretrained(prior / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(prior / "text_encoder"),
    }
    torch.manual_seed(0)
    state, changes, header = {}, {}, {}
    for i, (part, name) in enumerate(LORA_LAYERS):
        rank, alpha = 2 + i % 3, 1.0 + i % 4
        scale = alpha / rank if layout in ("kohya", "header") else 1.0
        if layout == "processor" and ".attn" not in name and part == "unet":
            continue  # That format had no others.
        weight = networks[part].get_submodule(name).weight
        down = 0.3 * torch.randn(rank, *weight.shape[1:])
        up = 0.3 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2))
        change = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        changes[f"{part}.{name}.weight"] = scale * change
        state.update(LORA_NAMES[layout](part, name, down, up, alpha))
        header |= {f"{part}.r": 2, f"{part}.lora_alpha": 1.0}
        header.setdefault(f"{part}.target_modules", []).append(name)
        if alpha != 1:
            header.setdefault(f"{part}.alpha_pattern", {})[name] = alpha
    if file.suffix == ".safetensors":
        metadata = {"lora_adapter_metadata": json.dumps(header)} if layout == "header" else {}
        save_file(state, file, metadata={"format": "pt"} | metadata)
    else:
        torch.save(state, file)
    return changes


def build_clip(folder: Path, seed: int = 0) -> Path:
    """Write a CLIPModel folder with its tokenizer, and return it."""
    torch.manual_seed(seed)
    CLIPModel(
        CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    ).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def build_dino(folder: Path, seed: int = 0) -> Path:
    """Write a Dinov2Model folder with its image statistics, and return it."""
    torch.manual_seed(seed)
    shape = {
        key: VISION[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    }
    Dinov2Model(Dinov2Config(**shape, image_size=32, patch_size=4)).save_pretrained(folder)
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's byte-level tokenizer without a single merge: every letter is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # GPT-2's alphabet: printable bytes stand for themselves, the others for 256 onwards.
    letters = [chr(byte) for byte in printable] + [
        chr(256 + i) for i in range(256 - len(printable))
    ]
    words = letters + [letter + "</w>" for letter in letters]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"model_max_length": 32, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_ip_adapters(folder: Path, unet: UNet2DConditionModel) -> None:
    """Write the base adapter (.safetensors), the Plus one (.bin) and their image encoder."""
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).save_pretrained(
        folder / "image_encoder"
    )
    width = unet.config.cross_attention_dim
    keys_values = {}  # Numbered as the attention layers; odd ones attend to the text.
    attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(attentions):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for letter in "kv":
            weight = nn.Linear(width, hidden, bias=False).weight.detach()
            keys_values[f"{2 * number + 1}.to_{letter}_ip.weight"] = weight

    projection = nn.Sequential()
    projection.proj = nn.Linear(VISION["projection_dim"], 4 * width)
    projection.norm = nn.LayerNorm(width)
    base = {f"image_proj.{key}": value for key, value in projection.state_dict().items()}
    base |= {f"ip_adapter.{key}": value for key, value in keys_values.items()}
    save_file(base, folder / "ip-adapter_sd15.safetensors")

    resampler = IPAdapterPlusImageProjection(
        VISION["hidden_size"], width, hidden_dims=32, heads=1, num_queries=4
    )
    plus = {"image_proj": _plus_keys(resampler.state_dict()), "ip_adapter": keys_values}
    torch.save(plus, folder / "ip-adapter-plus_sd15.bin")


def _kohya(part: str, name: str, down: Tensor, up: Tensor, alpha: float) -> list:
    """Return a layer's LoRA under kohya's names."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part]
    key = prefix + name.replace(".", "_")
    sides = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return [(f"{key}.{side}", value) for side, value in sides.items()]


def _peft(part: str, name: str, down: Tensor, up: Tensor, _: float) -> list:
    """Return a layer's LoRA under the names that diffusers' training scripts write."""
    key = {"unet": "unet", "text_encoder": "text_encoder.text_model"}[part] + f".{name}"
    return [(f"{key}.lora_A.weight", down), (f"{key}.lora_B.weight", up)]


def _processor(part: str, name: str, down: Tensor, up: Tensor, _: float) -> list:
    """Return a layer's LoRA under the names of the first attention processors."""
    parent, layer = name.removesuffix(".0").rsplit(".", 1)
    if part == "unet":
        key = f"unet.{parent}.processor.{layer}_lora"
    elif "attn" in parent:
        key = f"text_encoder.text_model.{parent}.to_{layer.removesuffix('_proj')}_lora"
    else:
        key = f"text_encoder.text_model.{name}.lora_linear_layer"
    return [(f"{key}.down.weight", down), (f"{key}.up.weight", up)]


LORA_NAMES = {"kohya": _kohya, "peft": _peft, "header": _peft, "processor": _processor}


def _plus_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return diffusers' names of a Plus projection as the published files spell them."""
    published = {}
    for key, value in state.items():
        for ours, theirs in (
            (".ln0.", ".0.norm1."),
            (".ln1.", ".0.norm2."),
            (".ff.0.", ".1.0."),
            (".ff.1.net.0.proj.", ".1.1."),
            (".ff.1.net.2.", ".1.3."),
            (".attn.to_q.", ".0.to_q."),
            (".attn.to_out.0.", ".0.to_out."),
            (".attn.to_k.", ".0.to_kv."),
        ):
            key = key.replace(ours, theirs)
        if ".to_kv." in key:
            value = torch.cat([value, state[key.replace(".0.to_kv.", ".attn.to_v.")]])
        if ".to_v." not in key:
            published[key] = value
    return published


def _wake_controlnet(controlnet: ControlNetModel) -> None:
    """Redraw the layers that `from_unet` leaves at zero, so that depth has a visible effect."""
    embedding = controlnet.controlnet_cond_embedding.conv_out
    zero = [embedding, *controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
    for conv in zero:
        nn.init.normal_(conv.weight, std=0.3)


def _mean(values: Tensor) -> Tensor:
    """Return the mean of each entry of a batch, [N, 1, 1, 1]."""
    return values.flatten(1).mean(1).view(-1, 1, 1, 1)
