"""StyleGAN2 for pictures against numbers that the official code computed.

`data/parity_stylegan2.npz` holds arrays named NETWORK/NAME for parameters filled by
`tiny_generator.fill_parameters`: inputs `in.*`, mapping outputs `map.*`, images thinned out by
`thin`, gradients. `data/keys_stylegan2_*.json` list the parameters of four networks.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_generator import fill_parameters

from models.stylegan2 import StyleGAN2Generator

DATA = Path(__file__).parent / "data"
NETWORKS = ("tiny", "cond")


def keys_of(name):
    return json.loads((DATA / f"keys_stylegan2_{name}.json").read_text())


def filled(name, **changes):
    kwargs = keys_of(name)["init_kwargs"]
    kwargs["synthesis_kwargs"] |= changes
    return fill_parameters(StyleGAN2Generator(**kwargs)).requires_grad_(False)


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "parity_stylegan2.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request, expected):
    """A network, and what the official one gives, by name."""
    name = request.param
    arrays = {k.removeprefix(f"{name}/"): v for k, v in expected.items() if k.startswith(name)}
    return filled(name), arrays


def thin(image):
    step = image.shape[-1] // 16
    return image[..., ::step, ::step]


def check(value, wanted, bound):
    assert value.shape == wanted.shape
    assert (value - wanted).abs().max() < bound


@pytest.mark.parametrize("name", [*NETWORKS, "ffhq1024", "cifar10"])
def test_parameters_have_the_official_names_shapes_and_order(name):
    wanted = keys_of(name)
    with torch.device("meta"):
        G = StyleGAN2Generator(**wanted["init_kwargs"])
    assert [[key, list(value.shape)] for key, value in G.state_dict().items()] == wanted["keys"]
    assert G.num_ws == G.mapping.num_ws == wanted["num_ws"]
    assert sum(parameter.numel() for parameter in G.parameters()) == wanted["num_parameters"]
    assert G.init_kwargs == wanted["init_kwargs"]


def test_mapping_is_the_official_one(network):
    G, arrays = network
    z, c = arrays["in.z"], arrays["in.c"]
    # A bound for all kinds of matrix products; float64 is 7e-7 from the official float32.
    check(G.mapping(z, c, 0.7, 8), arrays["map.ws_psi0.7_cut8"], 3e-6)
    check(G.mapping(z, c), arrays["map.ws_psi1"], 3e-6)
    check(G.mapping(z, c, 0.5), arrays["map.ws_psi0.5"], 3e-6)


def test_labels_count_where_there_are_classes_and_only_there(network, expected):
    G, arrays = network
    z, c = arrays["in.z"], arrays["in.c"]
    if G.c_dim:
        check(G.mapping(z, 0 * c), arrays["map.ws_czero_psi1"], 3e-6)
    else:
        assert torch.equal(G.mapping(z, None), G.mapping(z, c))


def test_the_average_code_follows_new_ones(expected):
    G = filled("cond")
    G.mapping(expected["cond/in.z"], expected["cond/in.c"], update_emas=True)
    check(G.mapping.w_avg, expected["cond/map.w_avg_after_update"], 1e-7)


def test_images_are_the_official_ones(network):
    G, arrays = network
    ws = arrays["map.ws_psi0.7_cut8"]
    for mode in ("const", "none"):
        check(thin(G.synthesis(ws, noise_mode=mode)["image"]), arrays[f"image_{mode}"], 5e-5)
    torch.manual_seed(1234)
    image = G.synthesis(ws, noise_mode="random")["image"]
    check(thin(image), arrays["image_random_seed1234"], 5e-5)
    check(thin(G.synthesis(arrays["in.ws_random"])["image"]), arrays["image_ws_random"], 5e-5)
    check(thin(G(arrays["in.z"], arrays["in.c"])), arrays["image_const_psi1"], 5e-5)


def test_the_clamp_acts_in_float32_too(expected):
    image = filled("tiny", conv_clamp=1.0).synthesis(expected["tiny/map.ws_psi0.7_cut8"])["image"]
    check(thin(image), expected["tiny/image_const_conv_clamp1"], 5e-5)


def test_gradients_are_the_official_ones(expected):
    G = filled("tiny").requires_grad_(True)
    ws = expected["tiny/map.ws_psi0.7_cut8"][:1].requires_grad_(True)
    pattern = torch.from_numpy(np.random.RandomState(99).randn(1, 3, 64, 64)).float()
    (G.synthesis(ws)["image"] * pattern).mean().backward()
    kept = {
        "synthesis.b4.const": lambda g: g[::8],
        "synthesis.b8.conv0.weight": lambda g: g[::8, ::8],
        "synthesis.b8.conv0.affine.weight": lambda g: g[::8, ::8],
    }
    names = [name for name in expected if name.startswith("tiny/grad.")]
    assert len(names) == 7
    for name in names:
        key, wanted = name.removeprefix("tiny/grad."), expected[name]
        gradient = ws.grad if key == "ws" else G.get_parameter(key).grad
        gradient = kept.get(key, lambda g: g)(gradient).reshape(wanted.shape)
        check(gradient, wanted, 1e-3 * wanted.abs().max())


def test_arguments_may_stand_for_themselves_as_in_the_files_of_stylegan3(expected):
    kwargs = keys_of("tiny")["init_kwargs"]
    given = kwargs.pop("synthesis_kwargs")
    G = StyleGAN2Generator(**kwargs, **given, fused_modconv_default=True)
    fill_parameters(G).requires_grad_(False)
    ws = expected["tiny/map.ws_psi0.7_cut8"]
    assert torch.equal(G.synthesis(ws)["image"], filled("tiny").synthesis(ws)["image"])
    with torch.device("meta"):
        of_ada = StyleGAN2Generator(**kwargs, synthesis_kwargs={})
        of_stylegan3 = StyleGAN2Generator(**kwargs)
    blocks = [[m.use_fp16 for m in G.synthesis.children()] for G in (of_ada, of_stylegan3)]
    assert blocks == [[False] * 5, [False] + [True] * 4]
    assert of_ada.synthesis.b4.conv1.conv_clamp is None
    assert of_stylegan3.synthesis.b4.conv1.conv_clamp == 256


@pytest.mark.parametrize(
    "part, name, fits, other",
    [
        ("synthesis_kwargs", "architecture", "skip", "resnet"),
        ("synthesis_kwargs", "resample_filter", [1, 3, 3, 1], [1, 2, 1]),
        ("synthesis_kwargs", "use_noise", True, False),
        ("synthesis_kwargs", "activation", "lrelu", "relu"),
        ("mapping_kwargs", "activation", "lrelu", "linear"),
        ("mapping_kwargs", "layer_features", 40, 64),
        ("mapping_kwargs", "embed_features", None, 64),
    ],
)
def test_arguments_of_one_value_are_taken_at_that_value_alone(part, name, fits, other):
    kwargs = keys_of("cond")["init_kwargs"]
    with torch.device("meta"):
        StyleGAN2Generator(**kwargs | {part: kwargs[part] | {name: fits}})
        with pytest.raises(ValueError, match=f"^{name} must be"):
            StyleGAN2Generator(**kwargs | {part: kwargs[part] | {name: other}})


def test_codes_of_another_number_and_arguments_said_twice_are_refused():
    kwargs = keys_of("cond")["init_kwargs"]
    with pytest.raises(ValueError, match=r"ws must be \[B, 6, w_dim\], got \[1, 5, 40\]"):
        StyleGAN2Generator(**kwargs).synthesis(torch.zeros(1, 5, 40))
    with pytest.raises(ValueError, match="channel_max must be in synthesis_kwargs"):
        StyleGAN2Generator(**kwargs, channel_max=8)
