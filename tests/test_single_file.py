"""Checkpoints in one file: the same networks as in the folder they were written from."""

import shutil

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from prior_fixtures import predict
from safetensors.torch import save_file
from single_file_writer import first_names, single_file_weights, write_single_file
from tiny_prior import build_prior, build_sd2

from models.diffusion import DiffusionPrior
from models.single_file import (
    SingleFile,
    seems_to_predict_velocity,
    unet_config,
    vae_config,
)

# What no file tells, as it is in the real versions.
V1 = {
    "unet_config": {"attention_head_dim": 8, "norm_num_groups": 16, "sample_size": 64},
    "text_config": {"num_attention_heads": 1},
}
VELOCITY = {"modelspec.prediction_type": "v"}


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    folder = build_prior(tmp_path_factory.mktemp("v1"), **V1)
    shutil.rmtree(folder / "ip_adapter")  # It would add weights to the UNet.
    return folder


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    unet = {"attention_head_dim": [1, 1, 1], "norm_num_groups": 16, "sample_size": 96}
    return build_sd2(tmp_path_factory.mktemp("v2"), unet, {"num_attention_heads": 1})


@pytest.fixture
def home(v1, tmp_path):
    """A folder with a tokenizer, for a file to lie beside."""
    shutil.copytree(v1 / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


def assert_same_networks(ours, theirs):
    for part in ("unet", "vae", "text_encoder"):
        a, b = (getattr(prior, part).state_dict() for prior in (ours, theirs))
        assert a.keys() == b.keys()
        for key, weight in b.items():
            assert torch.equal(a[key], weight), key
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.predicts_velocity == theirs.predicts_velocity
    assert ours.latent_shape == theirs.latent_shape


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_file_of_version_1_is_the_folder_it_was_written_from(name, v1, home):
    averages = {f"model_ema.x{i}": torch.ones(1) for i in range(101)}
    file = write_single_file(home / name, v1, extra=averages | {"betas": torch.ones(3)})
    ours, theirs = (DiffusionPrior.from_pretrained(source) for source in (file, v1))
    assert_same_networks(ours, theirs)
    condition = ours.condition("a bronze statue")
    assert torch.equal(condition.text, theirs.encode_text(["", "a bronze statue"]))
    assert torch.equal(predict(ours, condition), predict(theirs, condition))


def test_networks_of_a_file_are_those_of_diffusers_own_loader(v1, home):
    file = write_single_file(home / "model.safetensors", v1)
    ours = DiffusionPrior.from_pretrained(file)
    for cls, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        theirs = cls.from_single_file(str(file), config=str(v1), subfolder=part).state_dict()
        weights = getattr(ours, part).state_dict()
        assert weights.keys() == theirs.keys()
        assert all(torch.equal(weights[key], value) for key, value in theirs.items())


def test_file_of_half_precision_is_loaded_in_single(v1, home):
    file = write_single_file(home / "model.safetensors", v1, dtype=torch.float16)
    ours, theirs = (DiffusionPrior.from_pretrained(source) for source in (file, v1))
    assert ours.unet.dtype == torch.float32
    weight = theirs.unet.conv_in.weight.half().float()
    assert torch.equal(ours.unet.conv_in.weight, weight)


def test_file_of_fp8_is_loaded(v1, home):
    file = write_single_file(home / "model.safetensors", v1, dtype=torch.float8_e4m3fn)
    ours, theirs = (DiffusionPrior.from_pretrained(source) for source in (file, v1))
    torch.testing.assert_close(
        ours.unet.conv_in.weight, theirs.unet.conv_in.weight, atol=0.02, rtol=0.1
    )


def test_file_of_version_2_is_the_folder_it_was_written_from(v2, home, capfd):
    extra = {"ztsnr": torch.ones(1)}
    file = write_single_file(home / "model.safetensors", v2, True, VELOCITY, extra=extra)
    capfd.readouterr()
    ours, theirs = (DiffusionPrior.from_pretrained(source) for source in (file, v2))
    assert capfd.readouterr() == ("", "")  # The header says what is predicted.
    assert_same_networks(ours, theirs)
    condition = ours.condition("a bronze statue")
    torch.testing.assert_close(condition.text, theirs.encode_text(["", "a bronze statue"]))
    assert torch.equal(predict(ours, condition), predict(theirs, condition))


def test_prediction_is_that_of_the_header_then_of_a_mark_then_of_a_test(v1, v2, home, capsys):
    file, mark = home / "model.safetensors", {"v_pred": torch.ones(1)}
    cases = [
        (v1, None, {}, False),
        (v1, VELOCITY, {}, True),
        (v1, None, mark, True),
        (v2, {"modelspec.prediction_type": "epsilon"}, {}, False),
        (v2, None, mark, True),
    ]
    for folder, header, extra, expected in cases:
        write_single_file(file, folder, folder == v2, header, extra=extra)
        assert DiffusionPrior.from_pretrained(file).predicts_velocity == expected
    assert "note" not in capsys.readouterr().err
    key = "model.diffusion_model.out.2.bias"
    for shift, expected in ((0.0, False), (-3.0, True)):  # Far below the input, as a velocity is.
        write_single_file(file, v2, True, extra={key: torch.full((4,), shift)})
        prior = DiffusionPrior.from_pretrained(file)
        assert prior.predicts_velocity == expected == seems_to_predict_velocity(prior.unet)
        assert prior.image_size == (768 if expected else 512)
        said = capsys.readouterr().err
        assert f"a test of its UNet says {'velocity' if expected else 'noise'}" in said


def test_trainers_objects_in_a_checkpoint_are_passed_over(v1, home, tmp_path):
    class Callback:
        def __init__(self):
            self.best = 1

    Callback.__module__, Callback.__qualname__ = "pytorch_lightning.callbacks", "Callback"
    file = home / "model.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        module = type(torch)("pytorch_lightning.callbacks")
        module.Callback = Callback
        patch.setitem(__import__("sys").modules, "pytorch_lightning", module)
        patch.setitem(__import__("sys").modules, "pytorch_lightning.callbacks", module)
        content = {"state_dict": single_file_weights(v1), "callbacks": {Callback: Callback()}}
        torch.save(content, file)
    ours, theirs = (DiffusionPrior.from_pretrained(source) for source in (file, v1))
    assert_same_networks(ours, theirs)


UNET, VAE = "model.diffusion_model.", "first_stage_model."
OTHERS = {
    "inpainting": (
        lambda w: w | {f"{UNET}input_blocks.0.0.weight": torch.ones(16, 9, 3, 3)},
        "is an inpainting model",
    ),
    "pix2pix": (
        lambda w: w | {f"{UNET}input_blocks.0.0.weight": torch.ones(16, 8, 3, 3)},
        "is an InstructPix2Pix model",
    ),
    "xl": (
        lambda w: w | {"conditioner.embedders.1.model.ln_final.bias": torch.ones(2)},
        "holds a Stable Diffusion XL model",
    ),
    "sd3": (
        lambda w: w | {f"{UNET}joint_blocks.0.x_block.mlp.fc1.bias": torch.ones(2)},
        "holds a Stable Diffusion 3 model",
    ),
    "flux": (
        lambda w: w | {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(2)},
        "holds a Flux model",
    ),
    "no text": (
        lambda w: {k: v for k, v in w.items() if not k.startswith("cond_stage")},
        "holds no text encoder (cond_stage_model.*)",
    ),
    "no vae": (
        lambda w: {k: v for k, v in w.items() if not k.startswith(VAE)},
        "holds no VAE (first_stage_model.*); name one with --vae",
    ),
    "no unet": (lambda w: {k: v for k, v in w.items() if not k.startswith(UNET)}, "holds a whole"),
    "lora": (lambda w: {"lora_unet_conv_in.alpha": torch.ones(1)}, "holds a LoRA, not Stable"),
    "embedding": (lambda w: {"my-style": torch.ones(2, 32)}, "holds a textual inversion embedding"),
    "vae": (lambda w: {k.removeprefix(VAE): v for k, v in w.items() if VAE in k}, "holds a VAE"),
    "half a unet": (
        lambda w: {k: v for k, v in w.items() if "middle_block.0" not in k},
        "absent or misshapen",
    ),
    "unknown": (lambda w: {"x": torch.ones(2, 2, 2)}, "holds unknown things"),
    "nan": (lambda w: w | {f"{UNET}out.2.bias": torch.full((4,), torch.nan)}, "is not finite"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_file_of_something_else_is_refused_by_its_name_in_one_line(other, v1, home):
    change, reason = OTHERS[other]
    file = home / "model.safetensors"
    save_file(change(single_file_weights(v1)), file)
    with pytest.raises(ValueError) as caught:
        DiffusionPrior.from_pretrained(file)
    message = str(caught.value)
    assert message.startswith(str(file)) and "\n" not in message and len(message) < 500
    assert reason in message


def test_file_without_a_vae_is_loaded_with_another(v1, home):
    file = write_single_file(home / "model.safetensors", v1, without=VAE)
    ours, theirs = DiffusionPrior.from_pretrained(file, vae=v1), DiffusionPrior.from_pretrained(v1)
    assert_same_networks(ours, theirs)


def test_file_without_a_tokenizer_near_it_is_refused_with_where_to_get_one(
    v1, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    file = write_single_file(tmp_path / "model.safetensors", v1)
    reason = "a single file holds no tokenizer: put .*tokenizer/.* openai/clip-vit-large-patch14"
    with pytest.raises(ValueError, match=f"^{file}: {reason}") as caught:
        DiffusionPrior.from_pretrained(file)
    assert "\n" not in str(caught.value)


def test_file_on_the_hub_is_taken_from_its_cache(v1, home, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--user--repo/snapshots/0123"
    shutil.copytree(home / "tokenizer", snapshot / "tokenizer")
    (tmp_path / "models--user--repo/refs").mkdir()
    (tmp_path / "models--user--repo/refs/main").write_text("0123")
    write_single_file(snapshot / "model.safetensors", v1)
    ours = DiffusionPrior.from_pretrained("user/repo/model.safetensors")
    assert_same_networks(ours, DiffusionPrior.from_pretrained(v1))
    with pytest.raises(ValueError, match="^user/repo/other.safetensors.*hub"):
        DiffusionPrior.from_pretrained("user/repo/other.safetensors")


REAL = {
    "1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}


@pytest.mark.parametrize("version", REAL)
def test_architecture_of_the_real_versions_follows_from_their_shapes(version):
    vae_blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    vae_blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2}
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **REAL[version])
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), **vae_blocks)
    unet_weights, vae_weights = first_names(unet, vae)
    mark = {"cond_stage_model.model.ln_final.bias": torch.ones(1)} if version == "2" else {}
    file = SingleFile("x", {f"{UNET}{k}": v for k, v in unet_weights.items()} | mark, {})
    for network, config in ((unet, unet_config(file)), (vae, vae_config(vae_weights))):
        for key, value in config.items():
            given = network.config[key]
            assert value == (list(given) if isinstance(given, tuple) else given), key
