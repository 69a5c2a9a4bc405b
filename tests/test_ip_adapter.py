"""IP-Adapters: what they change, which pictures they take, and what is refused."""

import shutil

import pytest
import torch
from prior_fixtures import PLUS, edit_weights, picture, predict
from safetensors.torch import load_file, save_file

from models.diffusion import DiffusionPrior


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


def test_several_pictures_make_one_condition(prior, plus):
    pictures = torch.cat([picture(0), picture(1)])
    assert prior.condition("", pictures).image_embeds.shape == (2, 2, 24)
    assert plus.condition("", pictures).image_embeds.shape == (2, 2, 17, 32)
    assert prior.encode_reference(pictures).shape == (2, 1, 24)
    for kind in (prior, plus):
        both = predict(kind, kind.condition("", pictures))
        assert (both - predict(kind, kind.condition("", picture(0)))).abs().max() > 1e-6


def test_folder_with_only_an_image_encoder_is_no_adapter(copy):
    for file in (copy / "ip_adapter" / "models").glob("ip-adapter*"):
        file.unlink()
    prior = DiffusionPrior.from_pretrained(copy)
    assert prior.image_encoder is None and prior.controlnet is not None


def test_adapters_of_version_1_are_refused_beside_version_2(folder, sd2_folder):
    with pytest.raises(ValueError, match=f"^{folder}/controlnet: .* is 32, but .* 48"):
        DiffusionPrior.from_pretrained(sd2_folder, controlnet=folder / "controlnet")
    with pytest.raises(ValueError, match=f"^{folder}/ip_adapter/models/.*48"):
        DiffusionPrior.from_pretrained(sd2_folder, ip_adapter=folder / "ip_adapter")


def test_adapter_is_the_same_in_both_formats(folder, prior, copy):
    file = copy / "ip_adapter/models/ip-adapter_sd15.safetensors"
    nested = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(file).items():
        part, _, name = key.partition(".")
        nested[part][name] = value
    file.unlink()
    torch.save(nested, file.with_suffix(".bin"))
    pickled = DiffusionPrior.from_pretrained(copy, ip_adapter=file.with_suffix(".bin"))
    condition = prior.condition("an elf", picture())
    assert torch.equal(predict(pickled, condition), predict(prior, condition))


OTHERS = {
    "lora": (lambda s: {"lora_unet_conv_in.alpha": torch.ones(1)}, "but a LoRA"),
    "embedding": (lambda s: {"<it>": torch.ones(2, 3)}, "but a textual inversion embedding"),
    "face": (
        lambda s: (
            {k: v for k, v in s.items() if "image_proj" not in k}
            | {"image_proj.proj.0.weight": torch.ones(2, 3)}
        ),
        "holds no projection of a base or Plus IP-Adapter",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_file_of_another_kind_is_refused_by_its_name(kind, folder, copy):
    change, reason = OTHERS[kind]
    file = copy / "ip_adapter/models/ip-adapter_sd15.safetensors"
    edit_weights(file, change)
    with pytest.raises(ValueError, match=f"^{file}: .*{reason}") as caught:
        DiffusionPrior.from_pretrained(folder, ip_adapter=file)
    assert "\n" not in str(caught.value)


def test_adapter_in_half_precision_is_loaded(folder, copy):
    file = copy / "ip_adapter/models" / PLUS.rpartition("/")[2]
    content = torch.load(file, weights_only=True)
    halves = {part: {k: v.half() for k, v in ws.items()} for part, ws in content.items()}
    flat = {f"{part}.{k}": v for part, ws in halves.items() for k, v in ws.items()}
    save_file(flat, file.with_suffix(".safetensors"))
    half = DiffusionPrior.from_pretrained(folder, ip_adapter=file.with_suffix(".safetensors"))
    whole = DiffusionPrior.from_pretrained(folder, ip_adapter=file)
    condition = whole.condition("an elf", picture())
    ours, theirs = (predict(prior, condition) for prior in (half, whole))
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
