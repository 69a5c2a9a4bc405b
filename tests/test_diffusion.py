"""The diffusion prior on a tiny diffusers folder: what it computes and what it refuses to load."""

import json
import logging
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionControlNetPipeline
from safetensors.torch import load_file, save_file
from tiny_prior import build_prior

from losses import dsds_loss, guided_noise
from models.diffusion import DiffusionPrior, depth_condition
from models.features import clip_preprocess

PLUS = "ip_adapter/models/ip-adapter-plus_sd15.bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_prior(tmp_path_factory.mktemp("prior"))


@pytest.fixture(scope="module")
def prior(folder):
    return DiffusionPrior.from_pretrained(folder)


@pytest.fixture(scope="module")
def plus(folder):
    return DiffusionPrior.from_pretrained(folder, ip_adapter=folder / PLUS)


@pytest.fixture
def copy(folder, tmp_path):
    """A folder of one's own to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def noisy(batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, 4, 8, 8), torch.tensor([30, 700, 500])[:batch]


def picture(seed=0, height=50, width=70):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def predict(prior, condition, depth=None):
    """The conditional prediction for two fixed noisy latents."""
    latents_t, t = noisy()
    return guided_noise(prior, latents_t, t, condition, 1.0, depth)


# What it computes.


@pytest.mark.parametrize("kind", ["prior", "plus"])
def test_guided_noise_is_exactly_that_of_the_diffusers_pipeline(kind, folder, request):
    prior = request.getfixturevalue(kind)
    file = "ip-adapter_sd15.safetensors" if kind == "prior" else Path(PLUS).name
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=prior.controlnet, safety_checker=None
    )
    pipeline.load_ip_adapter(folder / "ip_adapter", subfolder="models", weight_name=file)
    pipeline.set_ip_adapter_scale(0.6)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    pipeline.unet.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output[0])))
    depth = torch.rand(1, 3, 64, 64)
    pipeline(
        "a bronze statue",
        depth,
        num_inference_steps=2,
        controlnet_conditioning_scale=0.7,
        guidance_scale=7.5,
        ip_adapter_image=clip_preprocess(picture(), 32),
        output_type="latent",
    )

    condition = prior.condition("a bronze statue", picture(), 0.6, depth_scale=0.7)
    (latents_t, t), eps = seen[0]
    eps_nothing, eps_condition = eps.chunk(2)
    ours = guided_noise(prior, latents_t[:1], t.view(1), condition, 7.5, depth)
    assert torch.equal(ours, eps_nothing + 7.5 * (eps_condition - eps_nothing))


def test_every_condition_has_an_effect_on_the_noise(prior):
    depth = torch.rand(2, 3, 64, 64)
    base = predict(prior, prior.condition("a bronze statue"))
    for other in (
        predict(prior, prior.condition("an elf")),
        predict(prior, prior.condition("a bronze statue"), depth),
        predict(prior, prior.condition("a bronze statue", picture())),
    ):
        assert (other - base).abs().mean() > 1e-3


@pytest.mark.parametrize("kind", ["prior", "plus"])
def test_adapter_without_a_picture_changes_nothing(kind, folder, request, copy):
    shutil.rmtree(copy / "ip_adapter")
    bare = DiffusionPrior.from_pretrained(copy)
    prior = request.getfixturevalue(kind)
    torch.testing.assert_close(
        predict(prior, prior.condition("an elf")), predict(bare, bare.condition("an elf"))
    )
    off = prior.condition("an elf", picture(), image_scale=0.0)
    torch.testing.assert_close(predict(prior, off), predict(bare, bare.condition("an elf")))


def test_depth_of_scale_zero_changes_nothing(prior):
    off = prior.condition("an elf", depth_scale=0.0)
    torch.testing.assert_close(
        predict(prior, off, torch.rand(2, 3, 64, 64)), predict(prior, prior.condition("an elf"))
    )


def test_conditions_of_different_scales_do_not_disturb_each_other(prior):
    strong = prior.condition("an elf", picture(), image_scale=1.0)
    before = predict(prior, strong)
    predict(prior, prior.condition("an elf", picture(), image_scale=0.2))
    predict(prior, prior.condition("an elf"))
    assert torch.equal(predict(prior, strong), before)


def test_several_pictures_make_one_condition(prior, plus):
    pictures = torch.cat([picture(0), picture(1)])
    assert prior.condition("", pictures).image_embeds.shape == (2, 2, 24)
    assert plus.condition("", pictures).image_embeds.shape == (2, 2, 17, 32)
    assert prior.encode_reference(pictures).shape == (2, 1, 24)
    for kind in (prior, plus):
        both = predict(kind, kind.condition("", pictures))
        assert (both - predict(kind, kind.condition("", picture(0)))).abs().max() > 1e-6


def test_unconditional_half_is_empty_text_with_no_picture(prior, plus):
    condition = prior.condition("an elf", picture())
    assert torch.equal(condition.text, prior.encode_text(["", "an elf"]))
    assert (condition.image_embeds[0] == 0).all()
    black = plus.image_encoder(torch.zeros(1, 3, 32, 32), output_hidden_states=True)
    assert torch.equal(plus.condition("", picture()).image_embeds[0], black.hidden_states[-2])


def test_velocity_models_give_their_noise(folder, tmp_path, prior):
    velocity = DiffusionPrior.from_pretrained(build_prior(tmp_path, "v_prediction"))
    z_t, t = noisy()
    text = prior.encode_text(["an elf"] * 2)
    v = prior.predict_noise(z_t, t, text)  # Same weights, so the same raw output.
    eps = velocity.predict_noise(z_t, t, text)
    abar = prior.alphas_cumprod[t].view(-1, 1, 1, 1)
    clean = abar.sqrt() * z_t - (1 - abar).sqrt() * v
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    torch.testing.assert_close(scheduler.get_velocity(clean, eps, t), v)
    torch.testing.assert_close(scheduler.add_noise(clean, eps, t), z_t)


def test_prompts_in_a_batch_equal_prompts_alone(prior):
    prompts = ["", "a bronze statue", "an elf"]
    alone = torch.cat([prior.encode_text([prompt]) for prompt in prompts])
    torch.testing.assert_close(prior.encode_text(prompts), alone)
    assert alone.shape == (3, 32, 32)


def test_prompt_beyond_the_limit_is_cut_with_a_warning_that_names_what_is_lost(prior):
    long = "a " * 30 + "tail"  # Every letter is a token; 30 of them fit.
    with pytest.warns(UserWarning, match="'tail'"):
        cut = prior.encode_text([long])
    assert torch.equal(cut, prior.encode_text(["a " * 30]))


def test_latents_are_the_scaled_mode_and_decode_inverts_the_scale(prior):
    images = picture(height=64, width=64)
    latents = prior.encode_images(images)
    mode = prior.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(latents, 0.18215 * mode)
    decoded = prior.vae.decode(mode).sample
    torch.testing.assert_close(prior.decode_latents(latents), decoded, atol=1e-4, rtol=1e-4)
    assert latents.shape == (1, 4, 8, 8)
    assert (prior.image_size, prior.vae_scale_factor) == (64, 8)


def test_images_that_do_not_divide_into_latent_cells_are_refused(prior):
    with pytest.raises(ValueError, match="multiples of 8"):
        prior.encode_images(torch.zeros(1, 3, 64, 60))


def test_encoding_has_a_gradient_beyond_the_range_of_images_too(prior):
    images = (3 * picture(height=64, width=64)).requires_grad_()
    prior.encode_images(images).square().sum().backward()
    assert (images.grad[images.abs() > 1] != 0).float().mean() > 0.9


def test_distillation_gradient_reaches_the_image_and_no_parameter(prior):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    latents = prior.encode_images(images)
    depth = depth_condition(torch.rand(2, 1, 16, 16) + 2, torch.ones(2, 1, 16, 16), 64)
    condition = prior.condition("an elf", picture())
    t, noise = torch.tensor([30, 700]), torch.randn_like(latents)
    mask = torch.ones(2, 1, 16, 16)
    loss = dsds_loss(prior, latents, condition, t, noise, 7.5, depth, mask)
    loss.sum().backward()
    assert loss.shape == (2,) and images.grad.abs().sum() > 0
    networks = (prior.vae, prior.unet, prior.text_encoder, prior.controlnet, prior.image_encoder)
    for parameter in (p for network in networks for p in network.parameters()):
        assert parameter.grad is None and not parameter.requires_grad


def test_half_precision_networks_still_speak_float32(folder, prior):
    half = DiffusionPrior.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.unet.dtype == half.controlnet.dtype == half.image_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == half.alphas_cumprod.dtype == torch.float32
    depth = torch.rand(2, 3, 64, 64)
    exact, rounded = (predict(p, p.condition("an elf", picture()), depth) for p in (prior, half))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)


def test_schedule_is_the_folders_own(prior):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    torch.testing.assert_close(prior.alphas_cumprod, (1 - betas).cumprod(0).float())


def test_unknown_words_are_those_outside_the_declared_vocabulary(prior, copy):
    assert prior.unknown_words("A Bronze statue, smiling") == ["smiling"]
    (copy / "vocabulary.json").unlink()
    assert DiffusionPrior.from_pretrained(copy).unknown_words("anything at all") == []


# What it loads, and what it refuses.


def test_parts_beside_the_model_are_the_default_and_optional(prior, copy):
    assert prior.controlnet is not None and prior.image_encoder is not None
    for part in ("controlnet", "ip_adapter"):
        shutil.rmtree(copy / part)
    bare = DiffusionPrior.from_pretrained(copy)
    condition = bare.condition("an elf")
    assert condition.image_embeds is None
    with pytest.raises(ValueError, match="needs a ControlNet"):
        predict(bare, condition, torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match="needs an IP-Adapter"):
        bare.condition("an elf", picture())


def test_folder_with_only_an_image_encoder_is_no_adapter(copy):
    for file in (copy / "ip_adapter" / "models").glob("ip-adapter*"):
        file.unlink()
    prior = DiffusionPrior.from_pretrained(copy)
    assert prior.image_encoder is None and prior.controlnet is not None


def test_parts_named_explicitly_win_over_those_beside_the_model(folder, prior, tmp_path):
    other = build_prior(tmp_path, seed=1)
    mixed = DiffusionPrior.from_pretrained(
        folder, controlnet=other / "controlnet", ip_adapter=other / "ip_adapter"
    )
    name = "conv_in.weight"
    assert torch.equal(mixed.unet.state_dict()[name], prior.unet.state_dict()[name])
    assert not torch.equal(mixed.controlnet.state_dict()[name], prior.controlnet.state_dict()[name])
    assert (mixed.encode_reference(picture()) != prior.encode_reference(picture())).any()


def test_loading_is_silent_and_never_looks_for_a_network(
    folder, monkeypatch, capfd, caplog, recwarn
):
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: calls.append(args))
    for library in ("diffusers", "transformers"):  # Their loggers do not propagate.
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    DiffusionPrior.from_pretrained(folder)
    assert not calls
    assert capfd.readouterr() == ("", "")
    assert not caplog.records and not recwarn.list


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weight(path, key):
    state = load_file(path)
    del state[key]
    save_file(state, path, metadata={"format": "pt"})


def replace(target, source):
    shutil.rmtree(target)
    shutil.copytree(source, target)


DAMAGES = {
    "no_pipeline": (lambda d: (d / "model_index.json").unlink(), "model_index.json"),
    "no_unet": (lambda d: shutil.rmtree(d / "unet"), "unet"),
    "no_tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer"),
    "no_encoder": (lambda d: shutil.rmtree(d / "text_encoder"), "text_encoder"),
    "other_class": (lambda d: replace(d / "controlnet", d / "unet"), "UNet2DConditionModel"),
    "other_network": (lambda d: replace(d / "unet", d / "vae"), "AutoencoderKL"),
    "image_for_text": (
        lambda d: replace(d / "text_encoder", d / "ip_adapter/models/image_encoder"),
        "absent or misshapen",
    ),
    "text_for_image": (
        lambda d: replace(d / "ip_adapter/models/image_encoder", d / "text_encoder"),
        "absent or misshapen",
    ),
    "lost_weight": (
        lambda d: drop_weight(
            d / "unet/diffusion_pytorch_model.safetensors", "mid_block.resnets.0.conv1.weight"
        ),
        "mid_block.resnets.0.conv1.weight",
    ),
    "lost_text_weight": (
        lambda d: drop_weight(d / "text_encoder/model.safetensors", "final_layer_norm.weight"),
        "final_layer_norm.weight",
    ),
    "lost_adapter_weight": (
        lambda d: drop_weight(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors", "ip_adapter.3.to_k_ip.weight"
        ),
        "3.to_k_ip",
    ),
    "lost_projection_weight": (
        lambda d: drop_weight(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors", "image_proj.norm.weight"
        ),
        "norm.weight",
    ),
    "truncated": (
        lambda d: (d / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x08\0\0\0"),
        "vae",
    ),
    "misshapen": (lambda d: edit_json(d / "vae/config.json", latent_channels=8), "vae"),
    "bad_json": (lambda d: (d / "unet/config.json").write_text("{"), "unet"),
    "bad_vocabulary": (lambda d: (d / "vocabulary.json").write_text("[]"), "vocabulary.json"),
    "flow": (
        lambda d: (d / "scheduler/scheduler_config.json").write_text(
            '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
        ),
        "FlowMatch",
    ),
    "sample": (
        lambda d: edit_json(d / "scheduler/scheduler_config.json", prediction_type="sample"),
        "prediction_type",
    ),
    "unnamed_adapter": (
        lambda d: (
            shutil.copy(d / PLUS, d / "ip_adapter/models/ip-adapter-other.bin")
            and (d / "ip_adapter/models/ip-adapter_sd15.safetensors").unlink()
        ),
        "ip-adapter-other.bin",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_in_one_line(damage, copy):
    change, reason = DAMAGES[damage]
    change(copy)
    with pytest.raises(ValueError) as caught:
        DiffusionPrior.from_pretrained(copy)
    message = str(caught.value)
    assert message.startswith(str(copy)) and "\n" not in message and len(message) < 500
    assert reason in message.removeprefix(str(copy))


@pytest.mark.parametrize("part", ["text_encoder", "controlnet", "ip_adapter"])
def test_parts_of_different_attention_widths_are_refused(part, folder, copy, tmp_path):
    wide = build_prior(tmp_path / "wide", text_width=48)
    replace(copy / part, wide / part)
    with pytest.raises(ValueError, match="48") as caught:
        DiffusionPrior.from_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["no/such/folder", "nowhere", "/no/folder", "x" * 300, f"x/{'y' * 300}"]
)
def test_source_that_is_neither_folder_nor_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        DiffusionPrior.from_pretrained(source)


def test_hub_id_without_a_network_is_refused_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for kind in ("source", "controlnet", "ip_adapter"):
        with pytest.raises(ValueError, match="^no-user/no-model.*hub") as caught:
            DiffusionPrior.from_pretrained(**({"source": folder} | {kind: "no-user/no-model"}))
        assert "\n" not in str(caught.value)


def test_deleted_stable_diffusion_is_refused_with_the_living_ones(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="^runwayml/.*hub.*living.* CompVis/stable-diffusion-v1-4"):
        DiffusionPrior.from_pretrained("runwayml/stable-diffusion-v1-5")


# Depth as a condition.


def test_depth_condition_is_inverse_depth_over_the_foreground():
    depth = torch.tensor([[2.0, 4.0], [2.5, 9.0]]).view(1, 1, 2, 2)
    mask = torch.tensor([[1.0, 1.0], [0.9, 0.1]]).view(1, 1, 2, 2)
    condition = depth_condition(depth, mask, 2)
    # 1/2 -> 1 and 1/4 -> 0.1; 1/2.5 = 0.4 is 0.15 of 0.25 above the far end; outside is 0.
    expected = torch.tensor([[1.0, 0.1], [0.1 + 0.9 * 0.6, 0.0]]).expand(1, 3, 2, 2)
    torch.testing.assert_close(condition, expected)


def test_depth_condition_scales_every_image_by_itself_and_ignores_the_background():
    torch.manual_seed(0)
    depth = torch.rand(2, 1, 8, 8) + torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:6, 2:6] = 1
    depth[:, :, 0] = torch.tensor([0.0, torch.inf, torch.nan, 0.1, 1, 2, 3, 99])
    condition = depth_condition(depth, mask, 8)
    foreground = condition[:, 0, 2:6, 2:6].flatten(1)
    torch.testing.assert_close(foreground.amax(1), torch.ones(2))
    torch.testing.assert_close(foreground.amin(1), torch.full((2,), 0.1))
    nearest = depth[:, 0, 2:6, 2:6].flatten(1).argmin(1)
    assert torch.equal(foreground.argmax(1), nearest)
    assert (condition[mask.expand_as(condition) == 0] == 0).all()


def test_depth_condition_without_foreground_is_black_and_of_one_distance_is_white():
    depth = torch.full((2, 1, 4, 4), 2.7)
    mask = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    condition = depth_condition(depth, mask, 4)
    assert (condition[0] == 0).all() and (condition[1] == 1).all()


def test_depth_condition_has_the_size_asked_for_and_stays_in_range():
    torch.manual_seed(0)
    depth, mask = torch.rand(2, 1, 16, 16) + 2, torch.rand(2, 1, 16, 16)
    for size in (8, 64):
        condition = depth_condition(depth, mask, size)
        assert condition.shape == (2, 3, size, size)
        assert condition.min() >= 0 and condition.max() <= 1
        assert torch.equal(condition[:, 0], condition[:, 2])
