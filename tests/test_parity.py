"""The generator against numbers that the official EG3D computed.

`data/parity_tiny2x.npz` holds arrays named GROUP.NAME for parameters filled by
`tiny_generator.fill_parameters`: inputs `in.*`, mapping outputs `map.*`, planes, fields, renders
with even samples (`det*`) or torch.manual_seed(1234), the sampler and the ray marcher alone
(`unit.*`), gradients and cameras. To stay small it keeps a lattice of pixels and four of the
fourteen ws: `thin` says which. `data/keys_*.json` list the released networks' parameters.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from official_pickle import content_of, write_pickle
from tiny_generator import even_samples, fill_parameters

from files.generators import load_generator
from models.cameras import CameraSetup, fov_to_intrinsics, orbit
from models.eg3d import TriPlaneGenerator
from models.renderer import (
    expected_depth,
    importance_depths,
    interval_to_sample_weights,
    march_weights,
    pixel_rays,
)

DATA = Path(__file__).parent / "data"
SHAPENET = {"box_warp": 1.6, "white_back": True, "ray_start": 0.1, "ray_end": 2.6}
AUTO = {**SHAPENET, "ray_start": "auto", "ray_end": "auto"}
# Group of arrays: neural rendering resolution, noise mode, camera input, rendering_kwargs.
RENDERS = {
    "det": (32, "const", "in.c", {}),
    "det_nrr64": (64, "const", "in.c", {}),
    "det_nrr96": (96, "const", "in.c", {}),
    "det_noise_none": (32, "none", "in.c", {}),
    "det_srnoise_const": (32, "const", "in.c", {"superresolution_noise_mode": "const"}),
    "det_disparity": (32, "const", "in.c", {"disparity_space_sampling": True}),
    "det_noimportance": (32, "const", "in.c", {"depth_resolution_importance": 0}),
    "det_shapenet": (32, "const", "in.c_shapenet", SHAPENET),
    "det_auto": (32, "const", "in.c_shapenet", AUTO),
    "det_auto_miss": (32, "const", "in.c_auto_miss", AUTO),
}


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "parity_tiny2x.npz") as arrays:
        names = arrays["grad.param_names"].tolist()
        numbers = {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind != "U"}
        return {**numbers, "grad.param_names": names}


@pytest.fixture(scope="module")
def tiny():
    G = TriPlaneGenerator(**read_keys("tiny2x")["init_kwargs"])
    G.neural_rendering_resolution = 32
    return fill_parameters(G).requires_grad_(False)


@pytest.fixture
def G(tiny):
    kwargs = dict(tiny.rendering_kwargs)
    yield tiny
    tiny.rendering_kwargs = kwargs


@pytest.fixture(scope="module")
def ws(tiny, expected):
    return tiny.mapping(expected["in.z"], expected["in.c_cond"], 0.7, 14)


@pytest.fixture(scope="module")
def planes(tiny, ws):
    return tiny.planes(ws)


def read_keys(name):
    return json.loads((DATA / f"keys_{name}.json").read_text())


def thin(name, value):
    """Keep what the stored arrays keep: every image 32 pixels wide, four of the ws."""
    if name.startswith("map."):
        return value[:, [0, 6, 7, 13]]
    if ".image" in name:
        step = value.shape[-1] // 32
        return value[..., ::step, ::step]
    return value


def check(expected, name, value):
    error = (thin(name, value) - expected[name]).abs()
    assert error.max() < 5e-4 and error.mean() < 1e-5, f"{name}: {error.max()}, {error.mean()}"


def check_render(expected, group, out):
    raw = "image_raw_clean" if group == "det_nrr64" else "image_raw"
    check(expected, f"{group}.image", out["image"])
    check(expected, f"{group}.{raw}", out["image_raw"])
    check(expected, f"{group}.image_depth", out["image_depth"])


@pytest.mark.parametrize("name", ["tiny2x", "full", "afhqcats512-128", "shapenetcars128-64"])
def test_state_dict_is_that_of_the_released_network(name):
    info = read_keys(name)
    G = TriPlaneGenerator(**info["init_kwargs"])
    assert [[key, list(value.shape)] for key, value in G.state_dict().items()] == info["keys"]
    assert sum(p.numel() for p in G.parameters()) == info["num_parameters"]
    assert G.backbone.num_ws == info["num_ws"]
    assert G.init_kwargs == info["init_kwargs"]


def test_mapping(G, expected):
    z, c, c_cond = expected["in.z"], expected["in.c"], expected["in.c_cond"]
    check(expected, "map.ws_cond0_psi0.7_cut14", G.mapping(z, c_cond, 0.7, 14))
    check(expected, "map.ws_cond0_psi0.7_cutNone", G.mapping(z, c_cond, 0.7))
    check(expected, "map.ws_cond0_psi0.5_cut7", G.mapping(z, c_cond, 0.5, 7))
    check(expected, "map.ws_own_psi1", G.mapping(z, c))
    G.rendering_kwargs["c_scale"] = 0.5
    check(expected, "map.ws_cscale0.5_psi1", G.mapping(z, c))
    G.rendering_kwargs["c_gen_conditioning_zero"] = True
    check(expected, "map.ws_czero_psi1", G.mapping(z, c))


def test_planes(G, expected, ws, planes):
    flat = planes.flatten(1, 2)
    assert list(flat.shape) == expected["planes.shape"].tolist()
    check(expected, "planes.mean", flat.mean((2, 3)))
    check(expected, "planes.std", flat.std((2, 3), correction=0))
    check(expected, "planes.min", flat.amin((2, 3)))
    check(expected, "planes.max", flat.amax((2, 3)))
    check(expected, "planes[:, ::8, ::16, ::16]", flat[:, ::8, ::16, ::16])
    check(expected, "planes[0, :, 100:108, 60:68]", flat[0, :, 100:108, 60:68])
    quiet = G.planes(ws, noise_mode="none").flatten(1, 2)[:, ::8, ::16, ::16]
    check(expected, "planes_noise_none[:, ::8, ::16, ::16]", quiet)


def test_field(G, expected, ws, planes):
    points = expected["field.points"]
    field = G.sample_mixed(points, torch.zeros_like(points), ws, planes=planes)
    check(expected, "field.sigma", field["sigma"])
    check(expected, "field.rgb", field["rgb"])


def test_rays(expected):
    origins, directions = pixel_rays(expected["in.c"], 8)
    check(expected, "rays8.origins", origins)
    check(expected, "rays8.dirs", directions)


@pytest.mark.parametrize("group", RENDERS)
def test_render(G, expected, ws, planes, group):
    resolution, noise_mode, c, kwargs = RENDERS[group]
    G.rendering_kwargs = {**G.rendering_kwargs, **kwargs}
    planes = planes if noise_mode == "const" else None
    with even_samples():
        out = G.synthesis(ws, expected[c], resolution, noise_mode, planes=planes)
    check_render(expected, group, out)
    if group == "det":
        check(expected, "det.ray_weight_sum", out["acc"].flatten(2).mT)


def test_ray_features(G, expected, planes):
    with even_samples():
        features, _, _ = G.render_rays(planes, *pixel_rays(expected["in.c"], 32))
    check(expected, "det.ray_features[:, ::7]", features[:, ::7][:, ::3])


def test_forward_without_truncation(G, expected):
    with even_samples():
        check_render(expected, "det_psi1_own", G(expected["in.z"], expected["in.c"]))


def test_a_seed_gives_the_official_render(G, expected, ws, planes):
    torch.manual_seed(1234)
    check_render(expected, "seeded1234", G.synthesis(ws, expected["in.c"], planes=planes))


def test_an_official_pickle_gives_the_official_render(tmp_path, tiny, expected):
    G = load_generator(write_pickle(tmp_path / "tiny2x.pkl", content_of(tiny)))
    assert G.neural_rendering_resolution == 32
    ws = G.mapping(expected["in.z"], expected["in.c_cond"], 0.7, 14)
    with even_samples():
        check_render(expected, "det", G.synthesis(ws, expected["in.c"]))


def test_importance_sampler(expected):
    depths, weights = expected["unit.imp.z"][..., 0], expected["unit.imp.w"][..., 0]
    count = expected["unit.imp.out"].shape[2]
    uniform = ((torch.arange(count) + 0.5) / count).expand(*depths.shape[:2], count)
    drawn = importance_depths(depths, weights, uniform)
    check(expected, "unit.imp.out", drawn.unsqueeze(-1))


@pytest.mark.parametrize("white_back", [False, True])
def test_ray_marcher(expected, white_back):
    suffix = f"wb{int(white_back)}"
    depths, sigma = expected["unit.imp.z"][..., 0], expected["unit.march.densities"][..., 0]
    weights = march_weights(depths, sigma)
    check(expected, f"unit.march.weights_{suffix}", weights.unsqueeze(-1))
    shared = interval_to_sample_weights(weights)
    depth = expected_depth(depths, shared).clamp(depths.min(), depths.max())
    check(expected, f"unit.march.depth_{suffix}", depth)
    rgb = (shared.unsqueeze(-1) * expected["unit.march.colors"]).sum(dim=2)
    rgb = rgb + white_back * (1 - weights.sum(-1, keepdim=True))
    check(expected, f"unit.march.rgb_{suffix}", rgb * 2 - 1)


def test_gradients(G, expected):
    G.requires_grad_(True)
    z = expected["in.z"][:1].clone().requires_grad_()
    ws = G.mapping(z, expected["in.c_cond"][:1], 0.7, 14)
    ws.retain_grad()
    with even_samples():
        out = G.synthesis(ws, expected["in.c"][:1])
    target = np.random.RandomState(99).randn(*out["image"].shape).astype(np.float32)
    loss = (out["image"] * torch.from_numpy(target)).mean()
    loss = loss + out["image_raw"].square().mean() + out["image_depth"].mean()
    loss.backward()
    torch.testing.assert_close(z.grad, expected["grad.z"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ws.grad, expected["grad.ws"], rtol=1e-4, atol=1e-6)
    check(expected, "grad.loss", loss)
    norms = torch.stack(
        [G.get_parameter(name).grad.norm() for name in expected["grad.param_names"]]
    )
    torch.testing.assert_close(norms, expected["grad.param_norms"], rtol=1e-3, atol=1e-6)
    G.zero_grad()
    G.requires_grad_(False)


def test_cameras(expected):
    yaw, pitch = expected["cam.yaw_pitch"].unbind(1)
    check(expected, "cam.lookat_pivot[0,0,.2]_r2.7", orbit(yaw, pitch, 2.7, (0, 0, 0.2)))
    check(expected, "cam.origin_r1.7", orbit(yaw, pitch, 1.7, (0, 0, 0)))
    matrices = torch.stack([fov_to_intrinsics(fov) for fov in expected["cam.fovs"].tolist()])
    check(expected, "cam.intrinsics", matrices)


@pytest.mark.parametrize("distribution", ["gaussian", "uniform"])
def test_camera_draws(expected, distribution):
    setup = CameraSetup(2.7, (0, 0, 0), 4.2647, 0.3, 0.155, distribution)
    torch.manual_seed(3)
    poses = setup.sample(4)[:, :16].unflatten(1, (4, 4))
    check(expected, f"cam.{distribution}_seed3", poses)
