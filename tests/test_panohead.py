"""PanoHead's generator against numbers that the official code computed, and its files.

`data/parity_panohead.npz` holds arrays named GROUP.NAME for parameters filled by
`tiny_generator.fill_parameters`: inputs `in.*`, mapping `map.*`, points of the field, renders with
even samples (`det*`) or torch.manual_seed(1234), the crop and the grid's lookup alone (`unit.*`),
gradients. To stay small it keeps a lattice of pixels, some ws and some points: `thin` says which.
`data/keys_panohead_*.json` list the parameters of the tiny and of the released network.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from official_pickle import content_of, write_pickle
from tiny_generator import even_samples, fill_parameters

from files.generators import load_generator, save_generator
from models.field import fold_planes, look_up, project
from models.mesh import extract_mesh
from models.panohead import PanoHeadGenerator
from render import orbit, sides
from subjects import seed_to_subject

DATA = Path(__file__).parent / "data"
N32 = {"neural_rendering_resolution": 32}
# Group of arrays: changes of rendering_kwargs, options of synthesis.
RENDERS = {
    "det": ({}, {}),
    "det_nrr32": ({}, N32),
    "det_wsbcg_flip": ({}, {"ws_bcg": lambda ws: ws.flip(0)}),
    "det_wsbcg_short": ({}, {"ws_bcg": lambda ws: ws.flip(0)[:, :3]}),
    "det_sigmoid_nrr32": ({"decoder_activation": "sigmoid"}, N32),
    "det_lrelu_nrr32": ({"decoder_activation": "lrelu"}, N32),
    "det_notorgb_nrr32": ({"use_torgb_raw": False}, N32),
    "det_nobackground_nrr32": ({"use_background": False}, N32),
}
BOUNDS = {"image": 5e-4, "image_raw": 5e-4, "image_depth": 7e-4, "image_mask": 4e-5}


def keys_of(name):
    return json.loads((DATA / f"keys_panohead_{name}.json").read_text())


def tiny(**changes):
    kwargs = keys_of("tiny")["init_kwargs"]
    kwargs["rendering_kwargs"] |= changes
    return fill_parameters(PanoHeadGenerator(**kwargs)).requires_grad_(False)


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "parity_panohead.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def G():
    return tiny()


@pytest.fixture(scope="module")
def ws(G, expected):
    return G.mapping(expected["in.z"], expected["in.c_cond"], 0.7, 14)


def thin(name, value):
    """Keep what the stored arrays keep."""
    if name.startswith("map.ws"):
        return value[:, [0, 3, 9]]
    if name.startswith("grad.") and value.numel() > 3000:
        return value[::8, ::8]
    if name.startswith(("det", "seeded")):
        step = value.shape[-1] // 16
        return value[..., ::step, ::step]
    return value


def check(expected, name, value, bound):
    value, wanted = thin(name, value), expected[name]
    assert (value.reshape(wanted.shape) - wanted).abs().max() < bound, name


def check_render(expected, group, out):
    official = out | {"image_mask": out["acc"] * 1.002 - 0.001}
    names = [name for name in BOUNDS if f"{group}.{name}" in expected]
    for name in names:
        check(expected, f"{group}.{name}", official[name], BOUNDS[name])
    assert names


@pytest.mark.parametrize("name", ["tiny", "512"])
def test_parameters_have_the_official_names_shapes_and_order(name):
    wanted = keys_of(name)
    with torch.device("meta"):
        G = PanoHeadGenerator(**wanted["init_kwargs"])
    assert [[key, list(value.shape)] for key, value in G.state_dict().items()] == wanted["keys"]
    assert sum(parameter.numel() for parameter in G.parameters()) == wanted["num_parameters"]
    assert G.backbone.num_ws == wanted["num_ws"] and G.init_kwargs == wanted["init_kwargs"]


def test_mapping_and_camera_correction_are_the_official_ones(G, expected, ws):
    z, c, conditioning = (expected[f"in.{name}"] for name in ("z", "c", "c_cond"))
    check(expected, "map.ws_cond0_psi0.7_cut14", ws, 3e-6)
    check(expected, "map.ws_own_psi1", G.mapping(z, c), 3e-6)
    check(expected, "map.delta_c", G.delta_c(z, conditioning), 3e-6)
    check(expected, "map.delta_c_own_psi0.7", G.delta_c(z, c, 0.7, 14), 3e-6)


def test_field_and_background_are_the_official_ones(G, expected, ws):
    planes = G.planes(ws)
    assert planes.shape == (3, 3, 32, 3, 64, 64)
    lattice = planes.flatten(1, 3)[0, ::16, ::8, ::8][:, ::2, ::2]
    check(expected, "planes[0,::16,::8,::8]", lattice, 2e-5)
    field = G.sample_mixed(expected["field.points"], None, ws, planes=planes)
    check(expected, "field.sigma", field["sigma"], 2e-4)
    check(expected, "field.rgb", field["rgb"], 2e-4)
    behind = G._background(ws, "const", False)[:, ::4, ::8, ::8]
    check(expected, "bcg[:,::4,::4,::4]", behind, 2e-5)


@pytest.mark.parametrize("group", RENDERS)
def test_renders_are_the_official_ones(group, G, expected, ws):
    changes, options = RENDERS[group]
    network = tiny(**changes) if changes else G
    network.neural_rendering_resolution = 64
    options = {k: v(ws) if callable(v) else v for k, v in options.items()}
    with even_samples():
        out = network.synthesis(ws, expected["in.c"], **options)
    check_render(expected, group, out)
    if group == "det":
        assert torch.equal(out["mask"], out["acc"].clamp(max=1))


def test_render_of_a_seed_and_of_a_moved_camera(G, expected, ws):
    G.neural_rendering_resolution = 64
    torch.manual_seed(1234)
    check_render(expected, "seeded1234", G.synthesis(ws, expected["in.c"]))
    with even_samples():
        out = G(expected["in.z"], expected["in.c"], 0.1, 14)
    check_render(expected, "det_forward_psi0.1", out)


def test_crop_leaves_its_sides_empty_and_can_be_switched_off(G, expected, ws, monkeypatch):
    points = expected["unit.crop.points"]
    cropped = (points[..., ::2].abs() > G.bound).any(-1, keepdim=True)
    assert torch.equal(cropped.float(), expected["unit.crop.cropped"])
    monkeypatch.setattr(G, "crop", -1.0)
    G.neural_rendering_resolution = 64
    with even_samples():
        check_render(expected, "det_nocrop", G.synthesis(ws, expected["in.c"]))


def test_lookup_in_a_grid_is_the_official_one(G, expected):
    maps, projections = fold_planes(
        expected["unit.grid.planes"].unflatten(2, (4, 3)), G.plane_axes, 1.0
    )
    coordinates = project(0.9 * expected["unit.crop.points"][:, :40], projections)
    for plane in range(3):
        part = slice(plane, plane + 1)
        found = look_up(maps[:, part], coordinates[:, part].unsqueeze(3)).squeeze(3).mT * 3
        assert (found - expected["unit.grid.features"][:, plane]).abs().max() < 1e-5


@pytest.mark.parametrize("slices", [1, 2, 3, 5])
def test_lookup_in_a_grid_is_that_of_torch(slices):
    """On a CPU texels are gathered, elsewhere grid_sample does it: values and gradients agree."""
    torch.manual_seed(0)
    planes = torch.randn(2, 3, 4, slices, 8, 8, dtype=torch.float64)
    points = torch.rand(2, 50, 3, dtype=torch.float64) * 3 - 1.5
    axes = torch.tensor(((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0))).repeat(3, 1, 1)
    grid = points[:, None, None]  # [B, 1, 1, N, 3]

    def of_torch(planes):
        sampled = [
            torch.nn.functional.grid_sample(plane, grid, align_corners=False)[:, :, 0, 0]
            for plane in planes.unbind(1)
        ]
        return sum(sampled) / 3

    def ours(planes):
        maps, projections = fold_planes(planes, axes, 2.0)
        coordinates = torch.einsum("bni,qij->bqnj", points, projections.double())
        return look_up(maps, coordinates.unsqueeze(3)).squeeze(3)

    results = []
    for function in (of_torch, ours):
        leaf = planes.clone().requires_grad_()
        values = function(leaf)
        (gradient,) = torch.autograd.grad(values.square().sum(), leaf)
        results.append((values, gradient))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_gradients_are_the_official_ones(expected, ws):
    G = tiny().requires_grad_(True)
    codes = ws[:1].detach().requires_grad_()
    with even_samples():
        out = G.synthesis(codes, expected["in.c"][:1], **N32)
    pattern = torch.from_numpy(np.random.RandomState(99).randn(*out["image"].shape)).float()
    mask = out["acc"] * 1.002 - 0.001
    terms = (out["image"] * pattern, out["image_raw"].square(), out["image_depth"], mask)
    sum(term.mean() for term in terms).backward()
    names = [name for name in expected if name.startswith("grad.")]
    assert len(names) == 10
    for name in names:
        gradient = G.get_parameter(name.removeprefix("grad.")).grad
        check(expected, name, gradient, 1e-3 * gradient.abs().max())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("parts", [{}, {"use_torgb_raw": False, "use_background": False}])
def test_official_pickle_is_read_bit_for_bit(parts, protocol, tmp_path):
    G = tiny(**parts)
    G.plane_axes = G.plane_axes.flip(0)
    G.register_buffer("dataset_label_std", torch.arange(25.0))
    path = write_pickle(tmp_path / "g.pkl", content_of(G), protocol)
    for loaded in (load_generator(path), saved_again(load_generator(path), tmp_path)):
        assert type(loaded) is PanoHeadGenerator and loaded.init_kwargs == G.init_kwargs
        state = loaded.state_dict()
        assert state.keys() == G.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in G.state_dict().items())
        assert torch.equal(loaded.plane_axes, G.plane_axes)
        assert loaded.rendering_kwargs == G.rendering_kwargs
        assert loaded.neural_rendering_resolution == 64
    assert not Path("executed").exists()


def saved_again(G, folder):
    save_generator(G, folder / "g.safetensors")
    return load_generator(folder / "g.safetensors")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"triplane_depth": 0}, "triplane_depth must be at least 1, got 0"),
        ({"triplane_size": 100}, "power of 2"),
        ({"decoder_activation": "tanh"}, "decoder_activation must be sigmoid, lrelu, none"),
        ({"density_noise": 1.0}, "density_noise must be 0"),
        ({"camera_yaw_range": "wide"}, "yaw_range must be a number"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, reason, tmp_path):
    G = tiny()
    G.rendering_kwargs |= change
    path = write_pickle(tmp_path / "g.pkl", content_of(G))
    with pytest.raises(ValueError, match=reason):
        load_generator(path)


def test_a_head_is_seen_from_all_sides(G):
    G.neural_rendering_resolution = 8
    assert len(sides(G)) == 5 and sides(G)[-1] == pytest.approx(-torch.pi)
    turn = torch.arange(4) * (torch.pi / 2)
    eyes = G.cameras.rim(turn)[:, [3, 7, 11]]  # Front, right, back, left.
    assert eyes[0, 2] > 2.5 and eyes[2, 2] < -2.5 and eyes[1, 0] * eyes[3, 0] < -4
    yaws = G.cameras.sample(400)[:, [3, 11]]
    assert (yaws[:, 1] < 0).float().mean() == pytest.approx(0.5, abs=0.1)
    frames = list(orbit(seed_to_subject(G, 0), 3))
    assert [frame["image"].shape for frame in frames] == [(1, 3, 128, 128)] * 3


def test_meshes_have_a_back():
    G = tiny()
    G.neural_rendering_resolution = 8
    G.decoder.net[2].bias.data[0] += 8.0
    mesh = extract_mesh(G, G.mapping(torch.randn(1, 64), G.cameras.frontal()), 24)
    depths = mesh.vertices[:, 2]
    assert depths.min() < -0.25 and depths.max() > 0.25


@pytest.mark.parametrize(
    "changes", [{}, {"use_torgb_raw": False}, {"decoder_activation": "sigmoid"}]
)
def test_meshes_have_the_colours_of_the_render(changes):
    """Where all of space looks alike, a render shows what a mesh is painted with."""
    G = tiny(use_background=False, **changes)
    G.neural_rendering_resolution = 8
    G.decoder.net[2].weight.data.zero_()
    G.decoder.net[2].bias.data[0] = 500.0  # Solid.
    ws = G.mapping(torch.randn(1, 64), G.cameras.frontal())
    image = G.synthesis(ws, G.cameras.frontal(), superresolve=False)["image_raw"]
    shown = (image[0, :, 4, 4] + 1) / 2
    rgb = G.sample_mixed(torch.zeros(1, 5, 3), None, ws)["rgb"]
    torch.testing.assert_close(G.colours(rgb, ws)[0, 0], shown, atol=2e-3, rtol=1e-3)
