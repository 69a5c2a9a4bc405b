"""The diffusion prior on tiny diffusers folders: what it computes and what it refuses to load."""

import json
import logging
import os
import shutil
import socket
import warnings
from pathlib import Path

import diffusers
import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from safetensors.torch import load_file, save_file
from tiny_prior import build_clip, build_prior, build_sd2, build_taesd, write_lora
from transformers import CLIPTextModel

from losses import dsds_loss, guided_noise
from models.diffusion import DiffusionPrior, depth_condition
from models.features import clip_preprocess, clip_tokenize
from models.pretrained import quiet_loading

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


@pytest.fixture(scope="module")
def sd2_folder(tmp_path_factory):
    return build_sd2(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def sd2(sd2_folder):
    return DiffusionPrior.from_pretrained(sd2_folder)


@pytest.fixture(scope="module")
def taesd_folder(tmp_path_factory):
    return build_taesd(tmp_path_factory.mktemp("taesd"))


@pytest.fixture(scope="module")
def taesd(folder, taesd_folder):
    return DiffusionPrior.from_pretrained(folder, vae=taesd_folder)


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


def pipeline_step(folder, controlnet, depth, adapter=None):
    """What the UNet sees and gives in the first step of diffusers' own pipeline."""
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        folder, controlnet=controlnet, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {}
    if adapter:
        pipeline.load_ip_adapter(folder / "ip_adapter", subfolder="models", weight_name=adapter)
        pipeline.set_ip_adapter_scale(0.6)
        options["ip_adapter_image"] = clip_preprocess(picture(), 32)
    seen = []
    pipeline.unet.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output[0])))
    pipeline(
        "a bronze statue",
        depth,
        num_inference_steps=2,
        controlnet_conditioning_scale=0.7,
        guidance_scale=7.5,
        output_type="latent",
        **options,
    )
    latents_t, t, output = seen[0]
    return latents_t[:1], t.view(1), output.chunk(2)


@pytest.mark.parametrize("kind", ["prior", "plus"])
def test_guided_noise_is_exactly_that_of_the_diffusers_pipeline(kind, folder, request):
    prior = request.getfixturevalue(kind)
    file = "ip-adapter_sd15.safetensors" if kind == "prior" else Path(PLUS).name
    depth = torch.rand(1, 3, 64, 64)
    latents_t, t, (nothing, given) = pipeline_step(folder, prior.controlnet, depth, file)
    condition = prior.condition("a bronze statue", picture(), 0.6, depth_scale=0.7)
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


def test_text_is_padded_as_the_folder_says(sd2, prior):
    ids = [clip_tokenize(p.tokenizer, ["an elf"], 32)[0] for p in (sd2, prior)]
    assert [len(set(row.tolist())) for row in ids] == [8, 7]  # Letters, start, end and padding.
    assert ids[0][-1] == 0  # An exclamation mark, in version 2.
    states = sd2.text_encoder(ids[0][None]).last_hidden_state
    torch.testing.assert_close(sd2.encode_text(["an elf"]), states)


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


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ],
)
def test_schedule_and_prediction_are_those_of_whatever_scheduler_a_folder_names(
    scheduler, options, copy
):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = getattr(diffusers, scheduler)(**betas, **options)
    theirs.save_pretrained(copy / "scheduler")
    prior = DiffusionPrior.from_pretrained(copy)
    torch.testing.assert_close(prior.alphas_cumprod, theirs.alphas_cumprod)
    assert prior.predicts_velocity == (options.get("prediction_type") == "v_prediction")


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


WEIGHTS = "**/*.safetensors"


def test_folder_of_half_precision_files_alone_is_loaded(prior, copy):
    for file in [*copy.glob(WEIGHTS)]:
        if file.name.startswith("ip-adapter"):
            continue
        halves = {key: value.half() for key, value in load_file(file).items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    half = DiffusionPrior.from_pretrained(copy)
    for name in ("vae", "unet", "text_encoder", "controlnet", "image_encoder"):
        ours, theirs = (getattr(p, name).state_dict() for p in (half, prior))
        for key in theirs:
            adapter = "_ip." in key or key.startswith("encoder_hid_proj")
            expected = theirs[key] if adapter else theirs[key].half().float()
            torch.testing.assert_close(ours[key], expected, atol=0, rtol=0, msg=key)


def test_whole_precision_files_come_before_half_precision_ones(prior, copy):
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    halves = {key: value.half() for key, value in load_file(file).items()}
    save_file(halves, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    weight = DiffusionPrior.from_pretrained(copy).unet.conv_in.weight
    assert torch.equal(weight, prior.unet.conv_in.weight)


def pickle_files(folder):
    """Turn a folder's .safetensors into .bin, as older folders have."""
    for file in [*folder.glob(WEIGHTS)]:
        name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()


def test_folder_of_bin_files_alone_is_loaded(prior, copy):
    adapters = shutil.move(copy / "ip_adapter/models/ip-adapter_sd15.safetensors", copy / "kept")
    pickle_files(copy)
    shutil.move(adapters, copy / "ip_adapter/models/ip-adapter_sd15.safetensors")
    condition, depth = prior.condition("an elf", picture()), torch.rand(2, 3, 64, 64)
    pickled = DiffusionPrior.from_pretrained(copy)
    assert torch.equal(predict(pickled, condition, depth), predict(prior, condition, depth))
    assert torch.equal(pickled.encode_text(["an elf"]), prior.encode_text(["an elf"]))
    assert torch.equal(pickled.encode_reference(picture()), prior.encode_reference(picture()))


SHARDED = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "controlnet": diffusers.ControlNetModel,
    "text_encoder": CLIPTextModel,
}


@pytest.fixture
def shards(copy):
    """A folder whose networks are split among several .bin files."""
    for part, network in SHARDED.items():
        network = network.from_pretrained(copy / part)
        shutil.rmtree(copy / part)
        # transformers writes no .bin any more.
        pickled = {} if part == "text_encoder" else {"safe_serialization": False}
        network.save_pretrained(copy / part, max_shard_size="100KB", **pickled)
    return copy


def test_networks_in_several_bin_files_are_loaded(shards, prior):
    assert len([*shards.glob("unet/*-of-*.bin")]) > 2 and not [*shards.glob("unet/*.safetensors")]
    loaded = DiffusionPrior.from_pretrained(shards)
    for part in SHARDED:
        ours, theirs = (getattr(p, part).state_dict() for p in (loaded, prior))
        for key, weight in theirs.items():
            assert torch.equal(ours[key], weight), key


def test_networks_in_several_half_precision_bin_files_are_loaded(copy, prior):
    network = SHARDED["vae"].from_pretrained(copy / "vae").half()
    shutil.rmtree(copy / "vae")
    options = {"max_shard_size": "100KB", "safe_serialization": False, "variant": "fp16"}
    network.save_pretrained(copy / "vae", **options)
    weight = DiffusionPrior.from_pretrained(copy).vae.encoder.conv_in.weight
    assert torch.equal(weight, prior.vae.encoder.conv_in.weight.half().float())


def test_lost_bin_file_of_several_is_refused_by_name(shards):
    lost = min(shards.glob("unet/*.bin"))
    lost.unlink()
    with pytest.raises(ValueError, match=f"^{shards}/unet: .*{lost.name}") as caught:
        DiffusionPrior.from_pretrained(shards)
    assert "\n" not in str(caught.value)


class Attack:
    """A pickle of it makes the file `hacked` when it is read carelessly."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_code_hidden_in_a_bin_file_is_never_run(part, copy, tmp_path):
    pickle_files(copy / part)
    (file,) = (copy / part).glob("*.bin")
    torch.save({"weight": Attack(tmp_path / "hacked")}, file)
    with pytest.raises(ValueError, match=str(copy / part)):
        DiffusionPrior.from_pretrained(copy)
    assert not (tmp_path / "hacked").exists()


def test_code_hidden_in_one_of_several_bin_files_is_never_run(shards, tmp_path):
    for file in shards.glob("unet/*.bin"):
        torch.save({"weight": Attack(tmp_path / "hacked")}, file)
    with pytest.raises(ValueError, match=f"^{shards}/unet: "):
        DiffusionPrior.from_pretrained(shards)
    assert not (tmp_path / "hacked").exists()


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weight(path, key):
    state = load_file(path)
    del state[key]
    save_file(state, path, metadata={"format": "pt"})


def replace(target, source):
    shutil.rmtree(target)
    shutil.copytree(source, target)


def edit_weights(path, change):
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def spoil(folder, bad):
    """Put one number that is none into the last weight of a network's file."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    state[max(state)].view(-1)[-1] = float(bad)
    save_file(state, file, metadata={"format": "pt"})


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
    "fewer_layers_than_weights": (
        lambda d: edit_json(d / "text_encoder/config.json", num_hidden_layers=1),
        "leaves out",
    ),
    "no_middle": (lambda d: edit_json(d / "unet/config.json", mid_block_type=None), "mid_block"),
    "fewer_layers_of_the_image_encoder": (
        lambda d: edit_json(d / "ip_adapter/models/image_encoder/config.json", num_hidden_layers=1),
        "leaves out",
    ),
    "no_projection": (
        lambda d: edit_weights(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors",
            lambda s: {k: v for k, v in s.items() if not k.startswith("image_proj.")},
        ),
        "holds no projection",
    ),
    "no_projecting_weight": (
        lambda d: drop_weight(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors", "image_proj.proj.weight"
        ),
        "holds no projection",
    ),
    "surplus_weight": (
        lambda d: edit_weights(
            d / "vae/diffusion_pytorch_model.safetensors",
            lambda s: s | {"encoder.extra.weight": torch.ones(1)},
        ),
        "encoder.extra.weight",
    ),
    "surplus_adapter_weight": (
        lambda d: edit_weights(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors",
            lambda s: s | {"ip_adapter.99.to_k_ip.weight": torch.ones(1)},
        ),
        "no place for ip_adapter.99",
    ),
    "nan_adapter": (
        lambda d: edit_weights(
            d / "ip_adapter/models/ip-adapter_sd15.safetensors",
            lambda s: {key: value * torch.nan for key, value in s.items()},
        ),
        "is not finite",
    ),
    "nan_unet": (lambda d: spoil(d / "unet", "nan"), "is not finite"),
    "nan_vae": (lambda d: spoil(d / "vae", "nan"), "is not finite"),
    "infinite_text_encoder": (lambda d: spoil(d / "text_encoder", "inf"), "is not finite"),
    "infinite_controlnet": (lambda d: spoil(d / "controlnet", "-inf"), "is not finite"),
    "sizes": (lambda d: edit_json(d / "unet/config.json", sample_size=[8, 8]), "sample_size"),
    "no_size": (lambda d: edit_json(d / "unet/config.json", sample_size=None), "sample_size"),
    "no_index": (lambda d: (d / "model_index.json").write_text("{"), "model_index.json"),
    "xl": (
        lambda d: edit_json(d / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "XL",
    ),
    "nan_schedule": (
        lambda d: edit_json(d / "scheduler/scheduler_config.json", beta_start=float("nan")),
        "not finite",
    ),
    "misshapen": (lambda d: edit_json(d / "vae/config.json", latent_channels=8), "vae"),
    "class_labels": (
        lambda d: edit_json(d / "unet/config.json", class_embed_type="identity"),
        "class_embed_type",
    ),
    "vae_of_no_kind": (lambda d: replace(d / "vae", d / "unet"), "UNet2DConditionModel"),
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


# What would be a traceback or NaNs in the first step: part, setting, value.
BAD_NUMBERS = [
    ("unet", "sample_size", 0),
    ("unet", "sample_size", 10**9),
    ("unet", "sample_size", True),
    *[("vae", "scaling_factor", bad) for bad in (None, 0, -1.0, "1", 1e30, torch.nan, torch.inf)],
    *[("vae", "shift_factor", bad) for bad in ("1", 1e30, torch.nan)],
    *[("scheduler", "num_train_timesteps", bad) for bad in (0, -1, 10**9, 1000.0, None)],
    *[("scheduler", "beta_end", bad) for bad in (5.0, 1.5, torch.nan)],
    ("scheduler", "trained_betas", [0.1, 1.0, 0.1]),
    ("scheduler", "trained_betas", [0.1, 0.1, 1.1]),
    ("scheduler", "trained_betas", [-0.1, 0.1, 0.1]),
    ("scheduler", "trained_betas", [0.0, 0.0, 0.0]),
    ("scheduler", "trained_betas", []),
]


@pytest.mark.parametrize(("part", "key", "value"), BAD_NUMBERS)
def test_number_that_cannot_be_calculated_with_is_refused_in_one_line(part, key, value, copy):
    name = "scheduler_config" if part == "scheduler" else "config"
    edit_json(copy / part / f"{name}.json", **{key: value})
    reason = "noise schedule" if "beta" in key else key
    with pytest.raises(ValueError, match=f"^{copy}/{part}: .*{reason}") as caught:
        DiffusionPrior.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_vae_of_no_scale_is_refused_in_place_of_the_models_own_too(folder, copy):
    edit_json(copy / "vae/config.json", scaling_factor=None)
    with pytest.raises(ValueError, match=f"^{copy}/vae: scaling_factor is None"):
        DiffusionPrior.from_pretrained(folder, vae=copy)


@pytest.mark.parametrize(
    "pipeline", ["FluxPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline", None]
)
def test_folder_of_another_pipeline_is_refused(pipeline, copy):
    edit_json(copy / "model_index.json", _class_name=pipeline)
    with pytest.raises(ValueError, match=f"^{copy}/model_index.json: holds a {pipeline}, not"):
        DiffusionPrior.from_pretrained(copy)


def test_weights_too_large_for_the_precision_asked_for_are_refused(copy):
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    edit_weights(file, lambda s: s | {"conv_in.bias": 1e6 * torch.ones(16)})
    DiffusionPrior.from_pretrained(copy)
    with pytest.raises(ValueError, match=f"^{copy}/unet: conv_in.bias is not finite .*float16"):
        DiffusionPrior.from_pretrained(copy, dtype=torch.float16)


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


def test_other_tower_and_positions_in_a_file_of_clip_do_no_harm(copy, tmp_path):
    clip = build_clip(tmp_path / "clip")
    positions = {
        f"{part}_model.embeddings.position_ids": torch.ones(1) for part in ("text", "vision")
    }
    edit_weights(clip / "model.safetensors", lambda s: s | positions)
    replace(copy / "text_encoder", clip)
    replace(copy / "ip_adapter/models/image_encoder", clip)
    DiffusionPrior.from_pretrained(copy)


def test_adapters_of_version_1_are_refused_beside_version_2(folder, sd2_folder):
    with pytest.raises(ValueError, match=f"^{folder}/controlnet: .* is 32, but .* 48"):
        DiffusionPrior.from_pretrained(sd2_folder, controlnet=folder / "controlnet")
    with pytest.raises(ValueError, match=f"^{folder}/ip_adapter/models/.*48"):
        DiffusionPrior.from_pretrained(sd2_folder, ip_adapter=folder / "ip_adapter")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("conditioning_channels", 1),
        ("layers_per_block", 2),
        ("conditioning_embedding_out_channels", [16, 32, 96]),
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text"),
        ("global_pool_conditions", True),
        ("controlnet_conditioning_channel_order", "bgr"),
    ],
)
def test_controlnet_of_another_build_is_refused(key, value, folder, copy):
    config = copy / "controlnet/config.json"
    options = json.loads(config.read_text()) | {key: value}
    shutil.rmtree(copy / "controlnet")
    diffusers.ControlNetModel.from_config(options).save_pretrained(copy / "controlnet")
    with pytest.raises(ValueError, match=f"^{copy}/controlnet: "):
        DiffusionPrior.from_pretrained(copy)


def test_vae_of_another_folder_replaces_the_models_own(folder, prior, tmp_path):
    other = build_prior(tmp_path, seed=1)
    images = picture(height=64, width=64)
    expected = DiffusionPrior.from_pretrained(other).encode_images(images)
    for source in (other, other / "vae"):
        mixed = DiffusionPrior.from_pretrained(folder, vae=source)
        assert torch.equal(mixed.encode_images(images), expected)
    assert torch.equal(mixed.unet.conv_in.weight, prior.unet.conv_in.weight)


OTHER_VAES = {
    "scale": ({"scaling_factor": 0.13025}, "0.13025"),
    "channels": ({"latent_channels": 16}, "16 channels"),
    "cells": (
        {
            "block_out_channels": [4, 8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
        },
        "cells of 4 px",
    ),
}


@pytest.mark.parametrize("kind", OTHER_VAES)
def test_vae_of_another_kind_of_model_is_refused(kind, folder, tmp_path):
    changes, reason = OTHER_VAES[kind]
    config = json.loads((folder / "vae/config.json").read_text()) | changes
    diffusers.AutoencoderKL.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: .*{reason}"):
        DiffusionPrior.from_pretrained(folder, vae=tmp_path)


def test_vae_that_is_none_is_refused(folder, tmp_path):
    for source, reason in ((folder / "unet", "UNet2D"), (tmp_path, "config"), ("x", "neither")):
        with pytest.raises(ValueError, match=f"^{source}.*{reason}"):
            DiffusionPrior.from_pretrained(folder, vae=source)


@pytest.mark.parametrize(
    "source",
    ["no/such/folder", "nowhere", "../nothing", "a/..", "/no/folder", "x" * 300, f"x/{'y' * 300}"],
)
def test_source_that_is_neither_folder_nor_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        DiffusionPrior.from_pretrained(source)


@pytest.mark.parametrize(
    ("kind", "source"),
    [("ip_adapter", "nowhere"), ("ip_adapter", "/no/adapter.bin"), ("lora", "x" * 300)],
)
def test_weights_that_are_nowhere_are_refused_by_name(kind, source, folder):
    option = {"loras": [(source, 1.0)]} if kind == "lora" else {kind: source}
    with pytest.raises(ValueError, match=f"^{source} is neither a file, a folder nor a hub id"):
        DiffusionPrior.from_pretrained(folder, **option)


def test_hub_id_without_a_network_is_refused_in_one_line(folder, monkeypatch, capfd, recwarn):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sources = dict.fromkeys(["source", "controlnet", "ip_adapter", "vae"], "no-user/no-model")
    name = "no-user/no-model/loras/style.safetensors"
    sources |= {"loras": [(name, 1.0)], "embeddings": [name]}
    for kind, source in sources.items():
        with pytest.raises(ValueError, match="^no-user/no-model.*hub") as caught:
            DiffusionPrior.from_pretrained(**({"source": folder} | {kind: source}))
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_own_warnings_are_heard_while_loading_is_quiet(recwarn):
    with quiet_loading():
        warnings.warn("ours", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in recwarn.list] == ["ours"]


# LoRA.


@pytest.fixture
def lora(folder, tmp_path):
    write_lora(tmp_path / "style.safetensors", folder)
    return tmp_path / "style.safetensors"


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("kohya", "style.safetensors"),
        ("peft", "style.safetensors"),
        ("header", "style.safetensors"),
        ("processor", "style.bin"),
    ],
)
def test_lora_is_added_to_the_weights_it_names_and_to_no_other(
    layout, file, folder, prior, tmp_path
):
    changes = write_lora(tmp_path / file, folder, layout)
    assert len(changes) >= 6
    styled = DiffusionPrior.from_pretrained(folder, loras=[(tmp_path, 0.7)])
    for part in ("unet", "text_encoder"):
        ours, theirs = (getattr(p, part).state_dict() for p in (styled, prior))
        assert ours.keys() == theirs.keys()  # No wrapper is left, and the IP-Adapter is there.
        for key, weight in theirs.items():
            change = 0.7 * changes.get(f"{part}.{key}", torch.zeros(()))
            torch.testing.assert_close(ours[key], weight + change, msg=key)
        assert not any(p.requires_grad for p in getattr(styled, part).parameters())


def test_lora_of_weight_zero_changes_nothing(folder, prior, lora):
    plain = DiffusionPrior.from_pretrained(folder, loras=[(lora, 0.0)])
    condition = prior.condition("an elf", picture())
    assert torch.equal(plain.encode_text(["an elf"]), prior.encode_text(["an elf"]))
    assert torch.equal(predict(plain, condition), predict(prior, condition))


def test_lora_of_version_2_fits_version_2_alone(folder, sd2_folder, sd2, lora):
    changes = write_lora(lora, sd2_folder, "kohya")
    styled = DiffusionPrior.from_pretrained(sd2_folder, loras=[(lora, 1.0)])
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    change = styled.unet.state_dict()[name] - sd2.unet.state_dict()[name]
    torch.testing.assert_close(change, changes[f"unet.{name}"], atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=f"^{lora}: is of another model: "):
        DiffusionPrior.from_pretrained(folder, loras=[(lora, 1.0)])


def rename(state, old, new):
    return {key.replace(old, new): value for key, value in state.items()}


TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SDXL = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
KOHYA = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def kohya(state, name=KOHYA, **changes):
    """Return one layer of a text encoder as kohya's files name it, in place of all the others."""
    down = torch.linspace(-1, 1, 64).view(2, 32)
    parts = {"lora_down.weight": down, "lora_up.weight": down.mT.contiguous()}
    parts = parts | {"alpha": torch.tensor(1.0)} | changes
    return {f"{name}.{part}": weight for part, weight in parts.items() if weight is not None}


MISFITS = {
    "layer 99 of kohya's": (
        lambda s: kohya(s, KOHYA.replace("_0_", "_99_")),
        f"no layer for {KOHYA.replace('_0_', '_99_')}",
    ),
    "rank 0": (
        lambda s: kohya(
            s, **{"lora_down.weight": torch.ones(0, 32), "lora_up.weight": torch.ones(32, 0)}
        ),
        "has rank 0",
    ),
    "three alphas": (lambda s: kohya(s, alpha=torch.ones(3)), f"{KOHYA}.alpha is no number"),
    "no up": (
        lambda s: kohya(s, **{"lora_up.weight": None}),
        "lacks half of the weights for text_encoder.encoder.layers.0.self_attn.q_proj",
    ),
    "no down": (
        lambda s: kohya(s, **{"lora_down.weight": None}),
        "lacks half of the weights for text_encoder.encoder.layers.0.self_attn.q_proj",
    ),
    "no matrix": (
        lambda s: s | {f"{TO_Q}.lora_A.weight": torch.ones(32)},
        "down [32]",
    ),
    "no matrices": (
        lambda s: s | {f"{TO_Q}.lora_{side}.weight": torch.tensor(1.0) for side in "AB"},
        "down []",
    ),
    "no layer": (lambda s: rename(s, "mid_block", "end_block"), "no layer for unet.end_block"),
    "nothing": (lambda s: rename(s, "unet.", "other_model."), "no layer for other_model"),
    "two text encoders": (lambda s: s | {SDXL: torch.zeros(2, 32)}, "no layer for text_encoder_2"),
    "text width": (
        lambda s: {k: v[:, :16].contiguous() if "q_proj.lora_A" in k else v for k, v in s.items()},
        "q_proj has down [2, 16]",
    ),
    "one side": (lambda s: {k: v for k, v in s.items() if "conv1.lora_B" not in k}, "lacks half"),
    "no number": (lambda s: {k: v * torch.nan for k, v in s.items()}, "NaNs"),
    "whole weights": (lambda s: {"unet.conv_in.weight": torch.zeros(2)}, "more than LoRA"),
    "magnitudes": (lambda s: {"lora_unet_conv_in.dora_scale": torch.ones(1)}, "DoRA"),
    "peft's magnitudes": (
        lambda s: s | {f"{TO_Q}.lora_magnitude_vector": torch.ones(32)},
        "DoRA",
    ),
    "biases": (lambda s: s | {f"{TO_Q}.lora_B.bias": torch.ones(32)}, "lora_B.bias"),
    "no weight": (lambda s: rename(s, TO_Q, "unet.mid_block"), "no layer for unet.mid_block.lora"),
    "ranks": (
        lambda s: s | {f"{TO_Q}.lora_B.weight": torch.ones(32, 7)},
        "up [32, 7]",
    ),
    "another format": (lambda s: {"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "hada_w1_a"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_lora_that_does_not_fit_is_refused_in_one_line(misfit, folder, lora, capfd, recwarn):
    change, reason = MISFITS[misfit]
    save_file(change(load_file(lora)), lora)
    with pytest.raises(ValueError) as caught:
        DiffusionPrior.from_pretrained(folder, loras=[(lora, 1.0)])
    message = str(caught.value)
    assert message.startswith(f"{lora}: ") and "\n" not in message and len(message) < 500
    assert reason in message
    assert capfd.readouterr() == ("", "") and not recwarn.list


HEADERS = {
    "list": ([], "no table"),
    "number": (1, "no table"),
    "patterns": ({"unet.alpha_pattern": ["to_q"]}, "no table"),
    "alpha": ({"unet.lora_alpha": "1"}, "is '1', no number"),
    "no alpha": ({"unet.lora_alpha": None}, "is None, no number"),
    "alpha of a layer": ({"unet.alpha_pattern": {"attn1.to_q": [1]}}, "is [1], no number"),
    "no JSON": ("{", "header is no JSON"),
}


@pytest.mark.parametrize("header", HEADERS)
def test_lora_with_a_broken_header_is_refused_in_one_line(header, folder, lora):
    content, reason = HEADERS[header]
    content = content if header == "no JSON" else json.dumps(content)
    metadata = {"format": "pt", "lora_adapter_metadata": content}
    save_file(load_file(lora), lora, metadata=metadata)
    with pytest.raises(ValueError) as caught:
        DiffusionPrior.from_pretrained(folder, loras=[(lora, 1.0)])
    message = str(caught.value)
    assert message.startswith(f"{lora}: ") and "\n" not in message
    assert reason in message.removeprefix(str(lora))


@pytest.mark.parametrize("content", [[1], torch.ones(2), {1: torch.ones(2)}, {"x.alpha": 1.0}])
def test_file_of_other_things_is_no_lora(content, folder, tmp_path):
    torch.save(content, tmp_path / "style.bin")
    with pytest.raises(ValueError, match=f"^{tmp_path}/style.bin: .* than named tensors"):
        DiffusionPrior.from_pretrained(folder, loras=[(tmp_path, 1.0)])


@pytest.mark.parametrize("layer", ["q_proj", "v_proj", "out_proj"])
def test_lora_of_one_attention_layer_is_the_same_in_both_spellings(layer, folder, tmp_path):
    ours = kohya({}, KOHYA.replace("q_proj", layer))
    down, up, _ = ours.values()
    key = f"text_encoder.text_model.encoder.layers.0.self_attn.{layer}"
    theirs = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    # With an alpha of half the rank.
    header = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 1.0})}
    save_file(ours, tmp_path / "kohya.safetensors")
    save_file(theirs, tmp_path / "peft.safetensors", metadata=header)
    a, b = (
        DiffusionPrior.from_pretrained(folder, loras=[(tmp_path / f"{name}.safetensors", 1.0)])
        for name in ("kohya", "peft")
    )
    weights = a.text_encoder.state_dict()
    assert all(torch.equal(weights[k], w) for k, w in b.text_encoder.state_dict().items())
    plain = DiffusionPrior.from_pretrained(folder).text_encoder.state_dict()
    name = next(k for k in weights if k.endswith(f"layers.0.self_attn.{layer}.weight"))
    change = 0.5 * up @ down
    torch.testing.assert_close(weights[name] - plain[name], change, atol=1e-6, rtol=1e-5)
    assert sum(not torch.equal(weights[k], plain[k]) for k in weights) == 1


def test_one_of_several_loras_in_a_folder_must_be_named(folder, lora):
    shutil.copy(lora, lora.with_name("other.safetensors"))
    with pytest.raises(ValueError, match=f"^{lora.parent}: .*other.safetensors"):
        DiffusionPrior.from_pretrained(folder, loras=[(lora.parent, 1.0)])
    lora.rename(lora.with_name("pytorch_lora_weights.safetensors"))
    DiffusionPrior.from_pretrained(folder, loras=[(lora.parent, 1.0)])


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


def test_words_beyond_the_vocabulary_are_named_once_and_signs_count_too(prior, monkeypatch):
    monkeypatch.setattr(prior, "vocabulary", {"words": ["a"]})
    assert prior.unknown_words("A clown a clown, a robot") == ["clown", "robot"]
    assert prior.unknown_words("\N{ROBOT FACE} !!!") == ["\N{ROBOT FACE}", "!!!"]
    assert prior.unknown_words("a") == prior.unknown_words(" ") == []


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([7])])
def test_one_time_counts_for_all(prior, t):
    latents, text = torch.randn(2, 4, 8, 8), prior.encode_text(["a", "b"])
    each = prior.predict_noise(latents, torch.tensor([7, 7]), text)
    assert torch.equal(prior.predict_noise(latents, t, text), each)
