"""Files of weights: what is read from them, what they are called, and what is refused."""

import os

import pytest
import torch
from safetensors.torch import save_file

from models.diffusion import DiffusionPrior
from models.weight_files import Inert, is_file, kind_of_weights, read_weights

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
POINTED = "a git-lfs pointer, the file itself was not downloaded .git lfs pull."


@pytest.mark.parametrize("option", ["source", "vae", "loras", "embeddings", "ip_adapter"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_pointer_of_git_lfs_given_as_a_file_is_named(option, suffix, folder, tmp_path):
    file = tmp_path / f"x.{suffix}"
    file.write_text(POINTER)
    given = {"loras": [(file, 1.0)], "embeddings": [file]}.get(option, file)
    with pytest.raises(ValueError, match=f"^{file}: {POINTED}$"):
        DiffusionPrior.from_pretrained(**{"source": folder} | {option: given})


NO_WEIGHTS = {
    "page": (b"<!DOCTYPE html><html>Sign in</html>", "is a web page, not a file of weights"),
    "zip": (b"PK\x05\x06" + bytes(18), "is damaged, or holds more than tensors and numbers"),
    "text": (b"hello world, I am no weights at all", "is damaged, or holds more than tensors"),
    "nothing": (b"", "is damaged, or holds more than tensors"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("option", ["source", "vae", "loras", "embeddings", "ip_adapter"])
def test_file_of_no_weights_is_refused_in_one_line(kind, option, folder, tmp_path):
    content, reason = NO_WEIGHTS[kind]
    file = tmp_path / "x.bin"
    file.write_bytes(content)
    given = {"loras": [(file, 1.0)], "embeddings": [file]}.get(option, file)
    with pytest.raises(ValueError, match=f"^{file}: {reason}") as caught:
        DiffusionPrior.from_pretrained(**{"source": folder} | {option: given})
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("new_format", [True, False])
def test_weights_are_read_in_every_format_whatever_the_files_name(new_format, tmp_path):
    weights, file = {"a": torch.randn(2, 3), "b": torch.arange(3)}, tmp_path / "weights"
    torch.save(weights, file, _use_new_zipfile_serialization=new_format)
    read, header = read_weights(file)
    assert read.keys() == weights.keys() and header == {}
    assert all(torch.equal(read[key], value) for key, value in weights.items())
    save_file(weights, file, metadata={"x": "y"})
    read, header = read_weights(file)
    assert all(torch.equal(read[key], value) for key, value in weights.items())
    assert header == {"x": "y"}


class Attack:
    """A pickle of it makes the file `hacked` when it is read carelessly."""

    def __init__(self, function, file):
        self.function, self.file = function, file

    def __reduce__(self):
        return self.function, (str(self.file),)


def touch(file):
    """Leave a file."""
    open(file, "w").close()


@pytest.mark.parametrize("function", [os.mkdir, touch, open])
@pytest.mark.parametrize("new_format", [True, False])
def test_what_a_file_calls_is_never_run(function, new_format, tmp_path):
    content = {"a": torch.ones(2), "x": Attack(function, tmp_path / "hacked")}
    torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=new_format)
    try:
        read, _ = read_weights(tmp_path / "x")
    except ValueError as error:
        assert "is never executed" in str(error)
    else:
        assert type(read["x"]) is Inert and torch.equal(read["a"], torch.ones(2))
    assert not (tmp_path / "hacked").exists()


KINDS = {
    "double_blocks.0.img_mod.lin.weight": "a Flux model",
    "conditioner.embedders.0.transformer.x": "a Stable Diffusion XL model",
    "model.diffusion_model.out.2.weight": "a whole Stable Diffusion",
    "unet.conv_in.lora_A.weight": "a LoRA",
    "base_model.model.conv_in.lora_A.weight": "a LoRA",
    "lora_unet_conv_in.hada_w1_a": "a LoRA",
    "mid_block.attentions.0.attn1.processor.to_q_lora.up.weight": "a LoRA",
    "image_proj.proj.weight": "an IP-Adapter",
    "string_to_param": "a textual inversion embedding",
    "emb_params": "a textual inversion embedding",
    "first_stage_model.encoder.conv_in.weight": "a VAE",
    "encoder.down_blocks.0.resnets.0.conv1.weight": None,
    "encoder.conv_in.weight": "a VAE",
    "encoder.layers.0.weight": "a VAE",
    "encoder.layers.0.self_attn.q_proj.weight": "a CLIP",
    "text_model.embeddings.token_embedding.weight": "a CLIP",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "backbone.mapping.fc0.weight": "an EG3D generator",
    "x.weight": None,
}


@pytest.mark.parametrize("key", KINDS)
def test_kind_of_a_file_is_told_from_the_names_in_it(key):
    assert kind_of_weights({key: torch.ones(2, 2, 2, 2), "other": 1}) == KINDS[key]


def test_one_matrix_of_any_name_is_an_embedding():
    assert kind_of_weights({"<it>": torch.ones(2, 3)}) == "a textual inversion embedding"
    assert kind_of_weights({"conv.weight": torch.ones(2, 3)}) is None
    assert kind_of_weights([1]) is kind_of_weights({1: 2}) is None


def test_files_here_win_over_files_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_file("user/repo/x.safetensors") and is_file("user/repo/a/b.ckpt")
    assert not is_file("user/repo") and not is_file("user/repo/folder") and not is_file("x" * 300)
    (tmp_path / "user/repo/x.safetensors").mkdir(parents=True)
    assert not is_file("user/repo/x.safetensors")
