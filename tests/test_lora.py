"""LoRA in all formats: what is added to which weights, and what is refused."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from prior_fixtures import picture, predict
from safetensors.torch import load_file, save_file
from tiny_prior import write_lora

from models.diffusion import DiffusionPrior
from models.lora import fuse_loras


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
    "no pattern": ({"unet.alpha_pattern": {"to_(q": 1.0}}, "'to_(q' is no pattern"),
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


# One layer, whose change is known in closed form.

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"


def draw(*shape):
    return 0.3 * torch.randn(*shape)


def fused(prior, *loras):
    """The change of every weight of the UNet and text encoder that LoRAs change."""
    plain = {"unet": prior.unet, "text_encoder": prior.text_encoder}
    styled = deepcopy(plain)
    fuse_loras(loras, **styled)
    changes = {}
    for part in plain:
        ours, theirs = (networks[part].state_dict() for networks in (styled, plain))
        for key, weight in theirs.items():
            if not torch.equal(ours[key], weight):
                changes[key.removesuffix(".weight")] = ours[key].double() - weight.double()
    return changes


def assert_change(changes, expected):
    assert changes.keys() == expected.keys()
    for key, change in expected.items():
        torch.testing.assert_close(changes[key], change.double(), atol=1e-6, rtol=1e-5, msg=key)


def write_peft(folder, config, layer=LAYER, ending="", **weights):
    """Write an adapter of PEFT, and return its path."""
    folder.mkdir(exist_ok=True)
    names = {f"base_model.model.{layer}.{k}{ending}.weight": v for k, v in weights.items()}
    save_file(names, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


PEFT_SCALES = {
    "alpha": ({"r": 4, "lora_alpha": 8}, 2.0),
    "alpha of the rank": ({"r": 4, "lora_alpha": 4}, 1.0),
    "own alpha": ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 32}}, 8.0),
    "own rank": ({"r": 2, "lora_alpha": 8, "rank_pattern": {"attn1.to_q": 4}}, 2.0),
    "stabilised": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
    "no alpha": ({"r": 4}, 1.0),
}


@pytest.mark.parametrize("case", PEFT_SCALES)
@pytest.mark.parametrize("layer", [LAYER, TEXT, f"text_model.{TEXT}"])
def test_adapter_of_peft_is_scaled_as_its_config_says(case, layer, prior, tmp_path):
    config, scale = PEFT_SCALES[case]
    if layer != LAYER:
        config = json.loads(json.dumps(config).replace("attn1.to_q", "q_proj"))
    down, up = draw(4, 32), draw(32, 4)
    adapter = write_peft(tmp_path / "peft", config, layer, lora_A=down, lora_B=up)
    expected = {layer.removeprefix("text_model."): 0.7 * scale * up @ down}
    for source in (adapter, adapter / "adapter_model.safetensors"):
        assert_change(fused(prior, (source, 0.7)), expected)


PEFT_REFUSALS = {
    "config": (None, "needs its adapter_config.json"),
    "loha": ({"peft_type": "LOHA"}, "is a LOHA of PEFT; only LORA is supported"),
    "dora": ({"use_dora": True}, "is a DoRA"),
    "number": ({"lora_alpha": "x"}, "alpha is 'x', no number"),
}


@pytest.mark.parametrize("case", PEFT_REFUSALS)
def test_adapter_of_peft_that_cannot_be_added_is_refused(case, folder, tmp_path):
    config, reason = PEFT_REFUSALS[case]
    adapter = write_peft(tmp_path / "peft", config or {}, lora_A=draw(4, 32), lora_B=draw(32, 4))
    if config is None:
        (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=f"^{adapter}/adapter_model.safetensors: .*{reason}"):
        DiffusionPrior.from_pretrained(folder, loras=[(adapter, 1.0)])


PATTERN_HEADERS = {
    "pattern": ({"unet.alpha_pattern": {r"mid_block\..*to_q": 32}}, 8.0, 2.0),
    "end of the name": ({"unet.alpha_pattern": {"attn1.to_q": 32}}, 8.0, 8.0),
    "part of a word": ({"unet.alpha_pattern": {"n1.to_q": 32}}, 2.0, 2.0),
    "first of two": ({"unet.alpha_pattern": {"to_q": 16, r"mid_block\..*": 32}}, 4.0, 4.0),
    "other network": ({"text_encoder.alpha_pattern": {"to_q": 32}}, 2.0, 2.0),
    "plain pattern": ({"alpha_pattern": {".*": 16}}, 4.0, 4.0),
    "own before plain": ({"lora_alpha": 1}, 2.0, 2.0),
}


@pytest.mark.parametrize("case", PATTERN_HEADERS)
def test_alpha_of_a_header_is_that_of_the_first_pattern_that_means_the_layer(case, prior, tmp_path):
    header, of_middle, of_other = PATTERN_HEADERS[case]
    header = {"unet.r": 4, "unet.lora_alpha": 8} | header
    middle = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = draw(4, 32), draw(32, 4)
    state = {}
    for layer in (middle, LAYER):
        sides = {"A": down.clone(), "B": up.clone()}
        state |= {f"unet.{layer}.lora_{side}.weight": weight for side, weight in sides.items()}
    file = tmp_path / "style.safetensors"
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(header)})
    expected = {middle: of_middle * up @ down, LAYER: of_other * up @ down}
    assert_change(fused(prior, (file, 1.0)), expected)


def test_alpha_that_a_header_names_by_itself_counts(prior, tmp_path):
    down, up = draw(4, 32), draw(32, 4)
    state = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    save_file(state, tmp_path / "style.safetensors", metadata={"lora_alpha": "8"})
    changes = fused(prior, (tmp_path / "style.safetensors", 1.0))
    assert_change(changes, {LAYER: 2 * up @ down})


def test_oldest_form_names_attention_processors_of_the_unet_with_no_prefix(prior, tmp_path):
    block, _, name = LAYER.rpartition(".")
    state, expected = {}, {}
    for kind, layer in ((name, LAYER), ("to_out", f"{block}.to_out.0")):
        down, up = draw(4, 32), draw(32, 4)
        key = f"{block}.processor.{kind}_lora"
        state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        expected[layer] = 0.7 * up @ down
    torch.save(state, tmp_path / "pytorch_lora_weights.bin")
    assert_change(fused(prior, (tmp_path, 0.7)), expected)


def loha(out, deep, rank=4, kernel=()):
    """A LoHa's factors, and their product by its definition."""
    a1, a2, b1, b2 = draw(out, rank), draw(out, rank), draw(rank, deep), draw(rank, deep)
    sides = [torch.zeros(out, deep).double(), torch.zeros(out, deep).double()]
    for side, a, b in zip(sides, (a1, a2), (b1, b2), strict=True):
        for r in range(rank):
            side += torch.outer(a[:, r].double(), b[r].double())
    factors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return factors, sides[0] * sides[1]


def test_loha_is_the_product_by_elements_of_two_matrices(prior, tmp_path):
    factors, product = loha(32, 32)
    conv, conv_product = loha(32, 32 * 9)
    state = {f"lora_unet_{LAYER.replace('.', '_')}.{k}": v for k, v in factors.items()}
    state |= {f"lora_unet_{CONV.replace('.', '_')}.{k}": v for k, v in conv.items()}
    state[f"lora_unet_{LAYER.replace('.', '_')}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "loha.safetensors")
    expected = {LAYER: 0.7 * 0.5 * product, CONV: 0.7 * conv_product.view(32, 32, 3, 3)}
    assert_change(fused(prior, (tmp_path / "loha.safetensors", 0.7)), expected)


def test_loha_of_convolutions_may_have_kernels_of_their_own(prior, tmp_path):
    rank, sides, factors = 2, [], {}
    for side in (1, 2):
        t, a, b = draw(rank, rank, 3, 3), draw(rank, 32), draw(rank, 32)
        factors |= {f"hada_t{side}": t, f"hada_w{side}_a": a, f"hada_w{side}_b": b}
        change = torch.zeros(32, 32, 3, 3).double()
        for i in range(rank):
            for j in range(rank):
                outer = torch.outer(a[i].double(), b[j].double())
                change += outer[:, :, None, None] * t[i, j].double()
        sides.append(change)
    state = {f"lora_unet_{CONV.replace('.', '_')}.{k}": v for k, v in factors.items()}
    save_file(state, tmp_path / "loha.safetensors")
    changes = fused(prior, (tmp_path / "loha.safetensors", 1.0))
    assert_change(changes, {CONV: sides[0] * sides[1]})


def kron(a, b):
    """The Kronecker product of matrices, b's further axes as they are."""
    a, b = a.double(), b.double()
    out = torch.zeros(len(a) * len(b), a.shape[1] * b.shape[1], *b.shape[2:]).double()
    for i in range(len(a)):
        for j in range(a.shape[1]):
            rows, columns = slice(i * len(b), (i + 1) * len(b)), j * b.shape[1]
            out[rows, columns : columns + b.shape[1]] = a[i, j] * b
    return out


def lokr_cases():
    """{case: (layer, factors, alpha, change)} of LoKr."""
    w1, w2, b, kernel = draw(4, 4), draw(8, 8), draw(2, 8), draw(8, 8, 3, 3)
    a, c, d = draw(8, 2), draw(4, 3), draw(3, 4)
    core = draw(2, 2, 3, 3)
    mid = torch.einsum("ijkl,ip,jr->prkl", core.double(), a.T.double(), b.double())
    return {
        "whole": (LAYER, {"lokr_w1": w1, "lokr_w2": w2}, 16.0, kron(w1, w2)),
        "one split": (
            LAYER,
            {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b},
            4.0,
            2 * kron(w1, a @ b),
        ),
        "other split": (
            LAYER,
            {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2": w2},
            6.0,
            2 * kron(c @ d, w2),
        ),
        "convolution": (CONV, {"lokr_w1": w1, "lokr_w2": kernel}, 16.0, kron(w1, kernel)),
        "flat convolution": (
            CONV,
            {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": (flat := draw(2, 72))},
            2.0,
            kron(w1, (a @ flat).view(8, 8, 3, 3)),
        ),
        "core": (
            CONV,
            {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a.T.contiguous(), "lokr_w2_b": b},
            2.0,
            kron(w1, mid),
        ),
    }


@pytest.mark.parametrize("case", lokr_cases())
def test_lokr_is_a_kronecker_product(case, prior, tmp_path):
    torch.manual_seed(0)
    layer, factors, alpha, expected = lokr_cases()[case]
    state = {f"lora_unet_{layer.replace('.', '_')}.{k}": v for k, v in factors.items()}
    state[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    save_file(state, tmp_path / "lokr.safetensors")
    assert_change(fused(prior, (tmp_path / "lokr.safetensors", 1.0)), {layer: expected})


def test_locon_has_a_kernel_between_two_matrices(prior, tmp_path):
    down, mid, up = draw(3, 32, 1, 1), draw(3, 3, 3, 3), draw(32, 3, 1, 1)
    key = f"lora_unet_{CONV.replace('.', '_')}"
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    state |= {f"{key}.lora_mid.weight": mid, f"{key}.alpha": torch.tensor(1.5)}
    save_file(state, tmp_path / "locon.safetensors")
    # As layers one after the other: down, then the kernel, then up.
    seen = torch.randn(1, 32, 5, 5).double()
    convolve = torch.nn.functional.conv2d
    wanted = convolve(seen, down.double())
    wanted = convolve(convolve(wanted, mid.double()), up.double())
    change = fused(prior, (tmp_path / "locon.safetensors", 1.0))[CONV]
    torch.testing.assert_close(convolve(seen, change), 0.5 * wanted, atol=1e-4, rtol=1e-4)


OTHER_KINDS = {
    "dora": ("lora_unet_conv_in.dora_scale", "is a DoRA"),
    "ia3": ("lora_unet_mid_block_attentions_0_proj_in.on_input", "is an (IA)3"),
    "oft": ("lora_unet_conv_in.oft_blocks", "is an OFT"),
    "full": ("lora_unet_conv_in.diff", "is a LyCORIS of whole weights"),
    "checkpoint": ("model.diffusion_model.out.2.weight", "holds a whole Stable Diffusion, not a"),
    "embedding": ("my-style", "holds a textual inversion embedding, not a LoRA"),
    "adapter": ("image_proj.norm.weight", "holds an IP-Adapter, not a LoRA"),
    "generator": ("backbone.mapping.fc0.weight", "holds an EG3D generator, not a LoRA"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_is_no_lora_is_refused_by_its_own_name(kind, folder, tmp_path):
    key, reason = OTHER_KINDS[kind]
    save_file({key: torch.ones(2)}, tmp_path / "style.safetensors")
    with pytest.raises(ValueError) as caught:
        DiffusionPrior.from_pretrained(folder, loras=[(tmp_path, 1.0)])
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/style.safetensors: ") and reason in message


def test_several_loras_add_up_in_any_order(folder, tmp_path):
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    changes = [
        write_lora(file, folder, kind)
        for file, kind in zip(files, ("kohya", "peft", "header"), strict=True)
    ]
    loras = list(zip(files, (0.7, -0.3, 1.1), strict=True))
    a, b = (DiffusionPrior.from_pretrained(folder, loras=order) for order in (loras, loras[::-1]))
    plain = DiffusionPrior.from_pretrained(folder)
    for part in ("unet", "text_encoder"):
        ours, theirs, before = (getattr(p, part).state_dict() for p in (a, b, plain))
        for key, weight in before.items():
            assert torch.equal(ours[key], theirs[key])
            for (_, scale), change in zip(loras, changes, strict=True):
                weight = weight + scale * change.get(f"{part}.{key}", torch.zeros(()))
            torch.testing.assert_close(ours[key], weight, msg=key)


def test_lora_twice_counts_twice(prior, lora):
    twice, double = fused(prior, (lora, 0.5), (lora, 0.5)), fused(prior, (lora, 1.0))
    assert_change(twice, double)


def test_empty_path_is_no_lora(folder, prior):
    plain = DiffusionPrior.from_pretrained(
        folder, "", "", vae="", loras=[("", 1.0)], embeddings=[""]
    )
    assert torch.equal(plain.encode_text(["an elf"]), prior.encode_text(["an elf"]))
