"""The diffusion prior on tiny diffusers folders: what it computes, and which parts it takes."""

import logging
import shutil
import socket
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from prior_fixtures import PLUS, edit_json, noisy, picture, predict
from tiny_prior import build_prior, write_lora

from losses import dsds_loss
from models.diffusion import DiffusionPrior, depth_condition
from models.features import clip_preprocess
from models.noise import guided_noise

# What it computes.


def pipeline_step(folder, controlnet, depth, adapter=None, pictures=None, negative=None):
    """What the UNet sees and gives in the first step of diffusers' own pipeline."""
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=controlnet, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {}
    if adapter:
        pipeline.load_ip_adapter(folder / "ip_adapter", subfolder="models", weight_name=adapter)
        pipeline.set_ip_adapter_scale(0.6)
        options["ip_adapter_image"] = clip_preprocess(pictures, 32)
    seen = []
    pipeline.unet.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output[0])))
    pipeline(
        "a bronze statue",
        depth,
        num_inference_steps=2,
        controlnet_conditioning_scale=0.7,
        guidance_scale=7.5,
        output_type="latent",
        negative_prompt=negative,
        **options,
    )
    latents_t, t, output = seen[0]
    return latents_t[:1], t.view(1), output.chunk(2)


@pytest.mark.parametrize("kind", ["prior", "plus"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_guided_noise_is_exactly_that_of_the_diffusers_pipeline(kind, count, folder, request):
    prior = request.getfixturevalue(kind)
    file = "ip-adapter_sd15.safetensors" if kind == "prior" else Path(PLUS).name
    depth, pictures = torch.rand(1, 3, 64, 64), torch.cat([picture(i) for i in range(count)])
    latents_t, t, (nothing, given) = pipeline_step(
        folder, prior.controlnet, depth, file, pictures, "a clown"
    )
    condition = prior.condition(
        "a bronze statue", pictures, 0.6, depth_scale=0.7, negative="a clown"
    )
    ours = guided_noise(prior, latents_t, t, condition, 7.5, depth)
    assert torch.equal(ours, nothing + 7.5 * (given - nothing))


def test_guided_noise_of_version_2_is_that_of_the_velocity_in_the_pipeline(sd2_folder, sd2):
    depth = torch.rand(1, 3, 64, 64)
    latents_t, t, (nothing, given) = pipeline_step(sd2_folder, sd2.controlnet, depth)
    velocity = nothing + 7.5 * (given - nothing)
    scheduler = DDPMScheduler.from_pretrained(sd2_folder, subfolder="scheduler")
    abar = scheduler.alphas_cumprod[t]
    condition = sd2.condition("a bronze statue", depth_scale=0.7)
    ours = guided_noise(sd2, latents_t, t, condition, 7.5, depth)
    torch.testing.assert_close(ours, abar.sqrt() * velocity + (1 - abar).sqrt() * latents_t)
    assert (t, abar) == (999, 0)  # Trailing steps begin where no signal is left.


def test_every_condition_has_an_effect_on_the_noise(prior):
    depth = torch.rand(2, 3, 64, 64)
    base = predict(prior, prior.condition("a bronze statue"))
    for other in (
        predict(prior, prior.condition("an elf")),
        predict(prior, prior.condition("a bronze statue"), depth),
        predict(prior, prior.condition("a bronze statue", picture())),
    ):
        assert (other - base).abs().mean() > 1e-3


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


def test_latents_are_the_scaled_mode_and_decode_inverts_the_scale(prior):
    images = picture(height=64, width=64)
    latents = prior.encode_images(images)
    mode = prior.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(latents, 0.18215 * mode)
    decoded = prior.vae.decode(mode).sample
    torch.testing.assert_close(prior.decode_latents(latents), decoded, atol=1e-4, rtol=1e-4)
    assert latents.shape == (1, 4, 8, 8)
    assert (prior.image_size, prior.vae_scale_factor) == (64, 8)


@pytest.mark.parametrize("kind", ["prior", "taesd"])
def test_noisy_latents_are_those_of_the_diffusers_pipeline(kind, request):
    prior = request.getfixturevalue(kind)
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionImg2ImgPipeline(
        prior.vae, prior.text_encoder, prior.tokenizer, prior.unet, scheduler, None, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    images, t, draws = picture(height=64, width=64), torch.tensor([300]), torch.Generator()
    theirs = pipeline.prepare_latents(images, t, 1, 1, torch.float32, "cpu", draws.manual_seed(0))
    latents = prior.encode_images(images)
    draws.manual_seed(0)
    if kind == "prior":  # The pipeline draws from the posterior.
        deviation = prior.vae.encode(images).latent_dist.std
        latents = latents + 0.18215 * deviation * torch.randn(1, 4, 8, 8, generator=draws)
    noise = torch.randn(1, 4, 8, 8, generator=draws)
    torch.testing.assert_close(scheduler.add_noise(latents, noise, t), theirs)


def test_taesd_works_on_scaled_latents_and_keeps_the_rest_of_the_model(taesd, prior):
    images = picture(height=64, width=64).requires_grad_()
    latents = taesd.encode_images(images)
    latents.square().sum().backward()
    assert torch.equal(latents, taesd.vae.encode(images).latents)
    assert (images.grad != 0).any()
    assert torch.equal(taesd.decode_latents(latents), taesd.vae.decode(latents).sample)
    assert (taesd.image_size, taesd.vae_scale_factor) == (64, 8)
    condition = prior.condition("an elf", picture())
    assert torch.equal(predict(taesd, condition), predict(prior, condition))


def test_shift_of_latents_is_taken_off_before_they_are_scaled(prior, copy):
    edit_json(copy / "vae/config.json", shift_factor=0.5, scaling_factor=2.0)
    shifted = DiffusionPrior.from_pretrained(copy)
    images = picture(height=64, width=64)
    latents = shifted.encode_images(images)
    torch.testing.assert_close(latents, 2 * (prior.encode_images(images) / 0.18215 - 0.5))
    mode = prior.vae.encode(images).latent_dist.mode()
    decoded = prior.vae.decode(mode).sample
    torch.testing.assert_close(shifted.decode_latents(latents), decoded, atol=1e-4, rtol=1e-4)


def test_images_that_do_not_divide_into_latent_cells_are_refused(prior):
    with pytest.raises(ValueError, match="multiples of 8"):
        prior.encode_images(torch.zeros(1, 3, 64, 60))


def test_encoding_has_a_gradient_beyond_the_range_of_images_too(prior):
    images = (3 * picture(height=64, width=64)).requires_grad_()
    prior.encode_images(images).square().sum().backward()
    assert (images.grad[images.abs() > 1] != 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["kl", "taesd"])
def test_recomputed_vae_has_the_same_gradient_and_keeps_less(kind, folder, taesd_folder):
    vae, kept, gradients = taesd_folder if kind == "taesd" else None, [0, 0], []
    for recompute in (False, True):

        def weigh(tensor, recompute=recompute):
            kept[recompute] += tensor.numel()
            return tensor

        prior = DiffusionPrior.from_pretrained(folder, vae=vae, recompute_vae=recompute)
        images = picture(height=64, width=64).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
            latents = prior.encode_images(images)
        gradients += torch.autograd.grad(latents.square().sum(), images)
    assert torch.equal(*gradients)
    assert kind == "taesd" or kept[True] < kept[False] / 2


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


def test_every_network_is_spoken_to_in_its_own_precision(prior, copy):
    mixed = DiffusionPrior.from_pretrained(copy)
    mixed.controlnet.to(torch.bfloat16)
    mixed.text_encoder.to(torch.bfloat16)
    mixed.vae.to(torch.bfloat16)
    depth = torch.rand(2, 3, 64, 64)
    exact, rounded = (predict(p, p.condition("an elf"), depth) for p in (prior, mixed))
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)
    latents = mixed.encode_images(picture(height=64, width=64))
    assert mixed.decode_latents(latents).dtype == latents.dtype == rounded.dtype == torch.float32


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
    folder, taesd_folder, tmp_path, monkeypatch, capfd, caplog, recwarn
):
    write_lora(tmp_path / "style.safetensors", folder)
    options = {"vae": taesd_folder, "loras": [(tmp_path, 1.0)]}
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: calls.append(args))
    for library in ("diffusers", "transformers"):  # Their loggers do not propagate.
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    capfd.readouterr()
    DiffusionPrior.from_pretrained(folder, **options)
    assert not calls
    assert capfd.readouterr() == ("", "")
    assert not caplog.records and not recwarn.list


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


def test_depth_condition_has_the_far_end_and_the_outliers_asked_for():
    depth = 1 / torch.linspace(0.2, 1.2, 101).view(1, 1, 1, 101)
    depth[..., 50] = 1e4  # Stray points.
    condition = depth_condition(depth, torch.ones_like(depth), 101, far=0.5, outliers=0.02)
    row = condition[0, 0, 0]  # Resized to a square, each row as it was.
    assert row[50] == 0.5 and row[0] == 0.5 and row[100] == 1  # Clamped to the ends.
    # The disparities of ranks 2 and 98 of 0 to 100 are the ends; the stray point has the lowest.
    inverse = (1 / depth).flatten().sort().values
    expected = 0.5 + 0.5 * (inverse[60] - inverse[2]) / (inverse[98] - inverse[2])
    torch.testing.assert_close(row[60], expected)


def test_a_prior_says_how_far_the_depth_reaches_that_its_controlnet_learnt(prior, monkeypatch):
    depth, mask = torch.rand(1, 1, 16, 16) + 2, torch.ones(1, 1, 16, 16)
    size = prior.image_size
    monkeypatch.setattr(prior, "vocabulary", {"words": [], "depth_far": 0.1})
    assert torch.equal(prior.depth_condition(depth, mask), depth_condition(depth, mask, size))
    monkeypatch.setattr(prior, "vocabulary", None)
    photo = prior.depth_condition(depth, mask)
    assert torch.equal(photo, depth_condition(depth, mask, size, 0.5, 0.02)) and photo.min() >= 0.5


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


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([7])])
def test_one_time_counts_for_all(prior, t):
    latents, text = torch.randn(2, 4, 8, 8), prior.encode_text(["a", "b"])
    each = prior.predict_noise(latents, torch.tensor([7, 7]), text)
    assert torch.equal(prior.predict_noise(latents, t, text), each)
