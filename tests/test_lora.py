"""LoRA in all formats: what is added to which weights, and what is refused."""

import json
import shutil

import pytest
import torch
from prior_fixtures import picture, predict
from safetensors.torch import load_file, save_file
from tiny_prior import write_lora

from models.diffusion import DiffusionPrior


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
    "another format": (lambda s: {"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "lacks half"),
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
