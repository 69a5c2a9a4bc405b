"""Networks in folders: which files are read, and what is refused."""

import os
import shutil
import warnings

import diffusers
import huggingface_hub.constants
import pytest
import torch
from prior_fixtures import WEIGHTS, edit_weights, picture, predict, replace
from safetensors.torch import load_file, save_file
from tiny_prior import build_clip
from transformers import CLIPTextModel

from models.diffusion import DiffusionPrior
from models.pretrained import quiet_loading


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


def test_weights_too_large_for_the_precision_asked_for_are_refused(copy):
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    edit_weights(file, lambda s: s | {"conv_in.bias": 1e6 * torch.ones(16)})
    DiffusionPrior.from_pretrained(copy)
    with pytest.raises(ValueError, match=f"^{copy}/unet: conv_in.bias is not finite .*float16"):
        DiffusionPrior.from_pretrained(copy, dtype=torch.float16)


def test_other_tower_and_positions_in_a_file_of_clip_do_no_harm(copy, tmp_path):
    clip = build_clip(tmp_path / "clip")
    positions = {
        f"{part}_model.embeddings.position_ids": torch.ones(1) for part in ("text", "vision")
    }
    edit_weights(clip / "model.safetensors", lambda s: s | positions)
    replace(copy / "text_encoder", clip)
    replace(copy / "ip_adapter/models/image_encoder", clip)
    DiffusionPrior.from_pretrained(copy)


@pytest.mark.parametrize(
    "source",
    ["no/such/folder", "nowhere", "../nothing", "a/..", "/no/folder", "x" * 300, f"x/{'y' * 300}"],
)
def test_source_that_is_neither_folder_nor_hub_id_is_refused(source):
    with pytest.raises(ValueError, match="neither a file, a folder nor a hub id"):
        DiffusionPrior.from_pretrained(source)


def test_own_warnings_are_heard_while_loading_is_quiet(recwarn):
    with quiet_loading():
        warnings.warn("ours", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in recwarn.list] == ["ours"]


def test_deleted_stable_diffusion_is_refused_with_the_living_ones(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="^runwayml/.*hub.*living.* CompVis/stable-diffusion-v1-4"):
        DiffusionPrior.from_pretrained("runwayml/stable-diffusion-v1-5")


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
POINTED = "a git-lfs pointer, the file itself was not downloaded .git lfs pull."


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "controlnet/diffusion_pytorch_model.safetensors",
        "ip_adapter/models/ip-adapter_sd15.safetensors",
        "ip_adapter/models/image_encoder/model.safetensors",
    ],
)
def test_pointer_of_git_lfs_in_a_folder_is_named(file, copy):
    (copy / file).write_text(POINTER)
    with pytest.raises(ValueError, match=f"^{copy}/.*: .*{POINTED}$") as caught:
        DiffusionPrior.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def rename_variants(folder, variant, dtype):
    for file in [*folder.glob(WEIGHTS)]:
        if not file.name.startswith("ip-adapter"):
            state = {key: value.to(dtype) for key, value in load_file(file).items()}
            save_file(state, file.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
            file.unlink()


def test_folder_of_bf16_files_only_is_loaded(prior, copy):
    rename_variants(copy, "bf16", torch.bfloat16)
    loaded = DiffusionPrior.from_pretrained(copy)
    for part in ("unet", "vae", "text_encoder", "controlnet"):
        ours, theirs = (getattr(p, part).state_dict() for p in (loaded, prior))
        for key in ours:
            if "_ip." not in key and not key.startswith("encoder_hid_proj"):
                assert torch.equal(ours[key], theirs[key].bfloat16().float()), key


@pytest.mark.parametrize("variant", ["non_ema", "ema", "fp8", "fp8_e4m3fn", "int8"])
def test_folder_of_other_variants_only_is_refused_by_their_name(variant, copy):
    rename_variants(copy / "unet", variant, torch.float32)
    with pytest.raises(ValueError, match=f"^{copy}/unet: has weights of the kind {variant} only"):
        DiffusionPrior.from_pretrained(copy)


def test_folder_of_fp8_numbers_is_loaded(prior, copy):
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    edit_weights(file, lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()})
    weight = DiffusionPrior.from_pretrained(copy).unet.conv_in.weight
    assert torch.equal(weight, prior.unet.conv_in.weight.to(torch.float8_e4m3fn).float())


def test_hub_id_of_which_only_half_precision_is_kept_is_loaded(prior, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    home, commit = tmp_path / "models--user--sd", "0123456789" * 4
    rename_variants(copy, "fp16", torch.float16)
    shutil.copytree(copy, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit)
    half = DiffusionPrior.from_pretrained("user/sd")
    assert torch.equal(half.unet.conv_in.weight, prior.unet.conv_in.weight.half().float())
    assert torch.equal(
        half.vae.encoder.conv_in.weight, prior.vae.encoder.conv_in.weight.half().float()
    )
