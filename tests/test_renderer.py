"""Rays, plane lookups, importance sampling and ray marching, against closed forms and loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_generator import RENDERING_KWARGS, even_samples

from models import renderer
from models.cameras import CameraSetup, camera_label, intrinsics, orbit
from models.eg3d import PLANE_AXES
from models.field import Decoder, evaluate_points, fold_planes, look_up, softplus2_
from models.renderer import (
    RayOptions,
    Rays,
    box_depths,
    coarse_depths,
    draw_rays,
    expected_depth,
    importance_depths,
    interval_to_sample_weights,
    march_weights,
    pixel_rays,
    render,
)

AXES = torch.tensor(PLANE_AXES)
FIXED_AXES = torch.tensor(
    [PLANE_AXES[0], PLANE_AXES[1], ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))]
)


def options(**changes):
    return RayOptions.from_kwargs(RENDERING_KWARGS | changes)


def scene(batch=2, resolution=6):
    torch.manual_seed(0)
    planes = torch.randn(batch, 3, 4, 16, 16)
    decoder = Decoder(4, 8, 5, lr_mul=1.0)
    c = CameraSetup(yaw_range=0.5, pitch_range=0.3, distribution="uniform").sample(batch)
    return planes, decoder, *pixel_rays(c, resolution)


def official_lookup(planes, plane_axes, points, box_warp):
    """One plane at a time, as EG3D states it: project, sample, average."""
    total = 0
    for plane, axes in zip(planes.unbind(1), plane_axes, strict=True):
        uv = (points * (2 / box_warp) @ torch.linalg.inv(axes))[..., :2]
        total = total + F.grid_sample(plane, uv[:, None], align_corners=False)[:, :, 0]
    return total / 3  # [B, C, N]


def test_central_pixel_looks_along_the_camera():
    c = camera_label(orbit(torch.tensor([0.3]), torch.tensor([-0.2])), intrinsics())
    origins, directions = pixel_rays(c, 5)
    torch.testing.assert_close(origins[0, 12], c[0, [3, 7, 11]])
    torch.testing.assert_close(directions[0, 12], c[0, [2, 6, 10]])


def test_projecting_points_of_rays_gives_their_pixels():
    c = camera_label(orbit(torch.tensor([0.4]), torch.tensor([0.1])), intrinsics(2.0))
    c[:, 17] = 0.1  # Skew.
    origins, directions = pixel_rays(c, 4)
    pose, K = c[0, :16].view(4, 4), c[0, 16:].view(3, 3)
    in_camera = (origins[0] + 1.7 * directions[0] - pose[:3, 3]) @ pose[:3, :3]
    pixels = in_camera @ K.T
    centres = (torch.arange(4) + 0.5) / 4
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    torch.testing.assert_close(pixels[:, 0] / pixels[:, 2], u.flatten())
    torch.testing.assert_close(pixels[:, 1] / pixels[:, 2], v.flatten())


@pytest.mark.parametrize(("axes", "lookups"), [(AXES, 2), (FIXED_AXES, 3), (None, 3)])
def test_folded_lookups_equal_the_mean_of_three(axes, lookups):
    torch.manual_seed(1)
    axes = torch.linalg.qr(torch.randn(3, 3, 3))[0] if axes is None else axes
    planes, points = torch.randn(2, 3, 4, 8, 8), torch.rand(2, 50, 3) * 1.6 - 0.8
    maps, projections = fold_planes(planes, axes, box_warp=1.3)
    assert maps.shape[1] == len(projections) == lookups
    coordinates = torch.einsum("bni,qij->bqnj", points, projections).unsqueeze(3)
    torch.testing.assert_close(
        look_up(maps, coordinates)[..., 0],
        official_lookup(planes, axes, points, 1.3),
        rtol=1e-4,
        atol=1e-5,
    )


def test_gradient_of_lookups_is_torchs():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 8, 8, 5, dtype=torch.float64).movedim(-1, 2).requires_grad_()
    coordinates = torch.rand(2, 3, 7, 9, 2, dtype=torch.float64) * 3 - 1.5  # Some outside.
    coordinates[0, 0, 0, :3, 0] = torch.tensor([-1, 1, torch.nan])
    gradient = torch.randn(2, 5, 7, 9, dtype=torch.float64)
    (ours,) = torch.autograd.grad(look_up(maps, coordinates), maps, gradient)
    samples = F.grid_sample(maps.flatten(0, 1), coordinates.flatten(0, 1), align_corners=False)
    total = samples.unflatten(0, (2, 3)).sum(1)
    (torchs,) = torch.autograd.grad(total, maps, gradient)
    torch.testing.assert_close(ours, torchs)
    assert ours.abs().sum() > 0


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (4, 16)])
def test_lookups_equal_torchs_inside_at_edges_and_outside(size):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 5, *size)
    coordinates = torch.rand(2, 3, 40, 9, 2) * 4 - 2
    coordinates[0, 0, 0, :6, 0] = torch.tensor([-1, 1, 1e9, -1e9, math.nan, 1 - 1 / size[1]])
    coordinates[0, 1, 0, :2, 1] = torch.tensor([-1.0, 1.0])
    samples = F.grid_sample(maps.flatten(0, 1), coordinates.flatten(0, 1), align_corners=False)
    total = samples.unflatten(0, (2, 3)).sum(1)
    values = look_up(maps, coordinates)
    torch.testing.assert_close(values, total, rtol=1e-5, atol=3e-6, equal_nan=True)
    assert look_up(maps, coordinates[:, :, :0]).shape == (2, 5, 0, 9)


def test_lookups_lead_gradients_to_cameras_too():
    maps = torch.randn(1, 1, 2, 4, 4)
    coordinates = torch.rand(1, 1, 1, 3, 2, requires_grad=True)
    look_up(maps, coordinates).sum().backward()
    assert coordinates.grad.abs().sum() > 0


def test_points_outside_of_the_box_see_the_decoder_of_zero():
    planes, decoder, _, _ = scene()
    sigma, rgb = evaluate_points(planes, decoder, torch.full((2, 3, 3), 4.0), AXES, 1.0)
    nothing, colour = decoder(torch.zeros(2, 4, 3))
    torch.testing.assert_close(sigma[..., 0], nothing)
    torch.testing.assert_close(rgb.mT, colour * 1.002 - 0.001)


@pytest.mark.parametrize("ends", [(-110, 60), (-160, 160), (-3000, 3000)])  # Two ways inside.
def test_softplus_in_powers_of_two_is_as_exact_as_torchs(ends):
    x = torch.cat([torch.linspace(*ends, 100_001), torch.linspace(-3, 3, 100_001)])
    truth = torch.logaddexp2(x.double(), torch.zeros((), dtype=torch.double))
    error = (softplus2_(x.clone()) - truth).abs() / truth.clamp(min=1)
    assert error.max() < 2e-7  # Of F.softplus(x, beta=ln 2): 1.5e-7.


def test_softplus_passes_on_what_is_no_number():
    x = torch.tensor([math.nan, -math.inf, math.inf])
    for values in (x, x[:2]):
        expected = F.softplus(values, beta=math.log(2))
        torch.testing.assert_close(softplus2_(values.clone()), expected, equal_nan=True)
    assert softplus2_(torch.empty(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softplus_in_half_precision_is_rounded_once(dtype):
    x = torch.linspace(-20, 60, 10_001).to(dtype)
    y = softplus2_(x.clone())
    assert y.dtype == dtype
    assert torch.equal(y, softplus2_(x.float()).to(dtype))


def test_gradients_of_softplus_are_right():
    torch.manual_seed(0)
    x = 10 * torch.randn(20, dtype=torch.double, requires_grad=True)
    for values in (x, x + 130):
        assert torch.autograd.gradcheck(lambda x: softplus2_(1 * x), values)
        assert torch.autograd.gradgradcheck(lambda x: softplus2_(1 * x), values)


def kept_bytes(call):
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(kept.values())


def test_decoder_keeps_less_than_with_torchs_softplus():
    decoder = Decoder(4, 16, 8, lr_mul=1)
    features = torch.randn(1, 4, 1000, requires_grad=True)

    def with_torchs():
        first, softplus, second = decoder.net
        return torch.sigmoid(second(softplus(first(features.mT))))

    assert kept_bytes(lambda: decoder(features)) <= kept_bytes(with_torchs) - 16 * 1000 * 4


def test_decoder_equals_its_layers():
    torch.manual_seed(0)
    decoder = Decoder(4, 16, 8, lr_mul=0.5)
    features = torch.randn(2, 4, 100)
    sigma, colour = decoder(features)
    expected = decoder.net(features.mT)
    torch.testing.assert_close(sigma, expected[..., 0])
    torch.testing.assert_close(colour, expected[..., 1:].sigmoid().mT)


def test_strata_hold_one_depth_each():
    shape = torch.zeros(2, 7, 3)
    depths = coarse_depths(shape, shape, options(depth_resolution=5))
    low = torch.linspace(2.25, 3.3, 5)
    width = (3.3 - 2.25) / 4
    assert (depths >= low).all() and (depths <= low + width).all()
    assert depths.diff(dim=-1).min() > 0


def test_disparity_sampling_is_even_in_inverse_depth():
    shape = torch.zeros(1, 1, 3)
    with even_samples():
        depths = coarse_depths(shape, shape, options(disparity_space_sampling=True))
    steps = (1 / depths).diff(dim=-1)
    torch.testing.assert_close(steps, steps[..., :1].expand_as(steps))


def test_box_depths_of_hits_and_misses():
    origins = torch.tensor([[[0.0, 0, 3], [0, 0, 5], [0, 0, 3]]])
    directions = F.normalize(torch.tensor([[[0.0, 0.01, -1], [0.01, 0, -1], [1, 0, -0.1]]]), dim=-1)
    start, end = (depth[0, :, 0] for depth in box_depths(origins, directions, side=2.0))
    torch.testing.assert_close(start[:2], torch.tensor([2.0, 4.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(end[:2], torch.tensor([4.0, 6.0]), rtol=1e-3, atol=0)
    # The ray that misses takes the least entry, and the greatest entry as its end.
    assert start[2] == start[:2].min() and end[2] == start[:2].max()


def test_box_depths_when_every_ray_misses():
    origins, directions = torch.tensor([[[0.0, 0, 3]]]), torch.tensor([[[0.6, 0.0, 0.8]]])
    assert [d.item() for d in box_depths(origins, directions, 1.0)] == [-1, -2]


def importance_by_loops(depths, weights, uniform):
    """EG3D's sampler for one ray, one number at a time."""
    count = len(depths)
    bins = [(depths[i] + depths[i + 1]) / 2 for i in range(count - 1)]
    padded = [-np.inf, *weights, -np.inf]
    peaks = [max(padded[i], padded[i + 1]) for i in range(count)]
    smooth = [(peaks[i] + peaks[i + 1]) / 2 + 0.01 for i in range(count - 1)]
    pdf = np.array(smooth[1:-1]) + 1e-5
    cdf = np.concatenate([[0], np.cumsum(pdf / pdf.sum())])
    drawn = []
    for u in uniform:
        i = int((cdf <= u).sum())
        low, high = max(i - 1, 0), min(i, len(pdf))
        span = cdf[high] - cdf[low]
        span = 1 if span < 1e-5 else span
        drawn.append(bins[low] + (u - cdf[low]) / span * (bins[high] - bins[low]))
    return drawn


def test_importance_sampler_equals_its_oracle():
    rng = np.random.RandomState(0)
    depths = np.sort(rng.rand(20, 9) + 2, axis=1)
    weights, uniform = rng.rand(20, 8) ** 4, rng.rand(20, 7)
    uniform[0, :2] = 0, 1 - 1e-9
    wanted = [importance_by_loops(*row) for row in zip(depths, weights, uniform, strict=True)]
    drawn = importance_depths(*map(torch.from_numpy, (depths, weights, uniform)))
    np.testing.assert_allclose(drawn.numpy(), wanted, rtol=1e-9)


def test_constant_density_is_absorbed_exponentially():
    depths = torch.linspace(1, 3, 9)
    sigma = torch.full([9], 1.5)
    weights = march_weights(depths, sigma)
    density = F.softplus(torch.tensor(0.5))
    passed = torch.exp(-density * (depths - 1))
    torch.testing.assert_close(weights, passed[:-1] - passed[1:])
    torch.testing.assert_close(weights.sum(), 1 - passed[-1])


def test_an_opaque_sample_hides_what_lies_behind():
    sigma = torch.tensor([-50.0, -50, 1e4, 1e4, -50])
    depths = torch.tensor([1.0, 2, 3, 4, 5])
    weights = march_weights(depths, sigma)
    torch.testing.assert_close(weights, torch.tensor([0.0, 1, 0, 0]))
    shared = interval_to_sample_weights(weights)
    torch.testing.assert_close(expected_depth(depths, shared), torch.tensor([2.5]))


def test_empty_rays_have_infinite_depth_and_finite_gradients():
    sigma = torch.full([2, 6], -80.0, requires_grad=True)
    depths = torch.linspace(1, 2, 6).expand(2, 6)
    depth = expected_depth(depths, interval_to_sample_weights(march_weights(depths, sigma)))
    assert depth.isinf().all()
    depth.clamp(max=2).sum().backward()
    assert sigma.grad.isfinite().all()


def official_render(planes, decoder, origins, directions, options):
    """EG3D's order of things: all samples evaluated, sorted with their colours, marched."""

    def field(depths):
        points = origins[:, :, None] + depths[..., None] * directions[:, :, None]
        features = official_lookup(planes, AXES, points.flatten(1, 2), options.box_warp)
        sigma, colour = decoder(features)
        return sigma.view_as(depths), (colour.mT * 1.002 - 0.001).unflatten(1, depths.shape[1:])

    depths = coarse_depths(origins, directions, options)
    uniform = torch.rand(depths.shape[0] * depths.shape[1], options.depth_resolution_importance)
    sigma, colour = field(depths)
    fine = importance_depths(depths, march_weights(depths, sigma), uniform.view_as(depths))
    sigma_fine, colour_fine = field(fine)
    depths, order = torch.cat([depths, fine], -1).sort(-1)
    sigma = torch.cat([sigma, sigma_fine], -1).gather(-1, order)
    colour = torch.cat([colour, colour_fine], -2)
    colour = colour.gather(-2, order.unsqueeze(-1).expand_as(colour))
    weights = march_weights(depths, sigma).unsqueeze(-1)
    rgb = (weights * (colour[..., 1:, :] + colour[..., :-1, :]) / 2).sum(-2)
    acc = weights.sum(-2)
    middle = (depths[..., 1:] + depths[..., :-1]).unsqueeze(-1) / 2
    depth = ((weights * middle).sum(-2) / acc).clamp(depths.min(), depths.max())
    return (rgb + options.white_back * (1 - acc)) * 2 - 1, depth, acc


def march(planes, decoder, origins, directions, options):
    """Draw rays and render them."""
    rays = draw_rays(origins, directions, options)
    return render(planes, decoder, rays, AXES, options)


@pytest.mark.parametrize("white_back", [False, True])
def test_render_equals_its_oracle(white_back, monkeypatch):
    monkeypatch.setattr(renderer, "CHUNK_POINTS", 100)  # Several chunks, the last one smaller.
    inputs = scene()
    with torch.no_grad():
        torch.manual_seed(2)
        wanted = official_render(*inputs, options(white_back=white_back))
        torch.manual_seed(2)
        got = march(*inputs, options(white_back=white_back))
    for name, a, b in zip(("features", "depth", "acc"), got, wanted, strict=True):
        torch.testing.assert_close(a.mT, b, rtol=1e-4, atol=1e-5, msg=name)


def test_random_numbers_are_drawn_once_before_chunking(monkeypatch):
    calls = []
    rand_like, rand = torch.rand_like, torch.rand
    monkeypatch.setattr(renderer, "CHUNK_POINTS", 64)
    monkeypatch.setattr(
        torch, "rand_like", lambda x: calls.append(("rand_like", tuple(x.shape))) or rand_like(x)
    )
    monkeypatch.setattr(
        torch, "rand", lambda *size, **kw: calls.append(("rand", size)) or rand(*size, **kw)
    )
    with torch.no_grad():
        march(*scene(), options(depth_resolution_importance=5))
    assert calls[-2:] == [("rand_like", (2, 36, 6, 1)), ("rand", (72, 5))]
    assert [name for name, _ in calls].count("rand_like") == 1


def test_empty_rays_of_some_rows_have_the_depth_of_the_whole_batch():
    planes, decoder, origins, directions = scene()
    decoder.net[2].bias.data[0] = -1e4
    torch.manual_seed(2)
    rays = draw_rays(origins, directions, options())
    wanted = render(planes, decoder, rays, AXES, options())[1]
    for row in range(2):
        rows = slice(row, row + 1)
        depth = render(planes[rows], decoder, rays.cut(rows), AXES, options())[1]
        assert torch.equal(depth, wanted[rows])


def test_depth_lies_within_the_samples_and_opacity_within_one():
    _, depth, acc = march(*scene(), options())
    assert depth.min() >= 2.25 and depth.max() <= 3.3 + 1.05 / 5
    assert acc.min() >= 0 and acc.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ray_start": "auto"}, "both 'auto', got 'auto' and 3.3"),
        ({"ray_start": 4.0}, "got 4.0 and 3.3"),
        ({"ray_end": "far"}, "got 2.25 and 'far'"),
        ({"ray_start": "auto", "ray_end": "auto", "disparity_space_sampling": True}, "disparity"),
        ({"ray_start": 0, "disparity_space_sampling": True}, "ray_start > 0, got 0"),
        ({"box_warp": 0}, "box_warp must be positive, got 0"),
        ({"depth_resolution": 3}, "depth_resolution must be 4 to 4096 .* got 3, 6"),
        ({"depth_resolution_importance": -1}, "got 6, -1"),
        ({"clamp_mode": "relu"}, "clamp_mode must be 'softplus', got 'relu'"),
        ({"density_noise": 0.5}, "density_noise must be 0, got 0.5"),
    ],
)
def test_bad_options_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        options(**changes)
    assert "\n" not in str(error.value)


def test_missing_options_are_named():
    kwargs = {k: v for k, v in RENDERING_KWARGS.items() if k not in ("box_warp", "ray_end")}
    with pytest.raises(ValueError, match="lacks ray_end, box_warp"):
        RayOptions.from_kwargs(kwargs)


def test_leak_of_each_ray_goes_with_it_through_cuts_and_splits():
    rays = Rays(*torch.rand(4, 3, 6, 3), torch.tensor(0.0), torch.tensor(1.0), torch.rand(3, 6))
    assert torch.equal(rays.cut(slice(1, 3)).leak, rays.leak[1:3])
    parts = list(rays.split(4))
    assert [part.leak.shape[1] for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part.leak for part in parts], dim=1), rays.leak)
    assert replace(rays, leak=None).cut(slice(1)).leak is None
    assert all(part.leak is None for part in replace(rays, leak=None).split(4))


def test_leak_changes_no_weight_and_lets_gradients_into_empty_space():
    depths = torch.linspace(1, 2, 8)
    sigma = torch.tensor([-30.0] * 4 + [2.0] * 4, requires_grad=True)
    plain, leaky = (march_weights(depths, sigma, x) for x in (None, torch.tensor(0.05)))
    assert torch.equal(plain, leaky)
    (without,), (with_leak,) = (
        torch.autograd.grad(w[0], sigma) for w in (plain, leaky)
    )  # The first interval lies in empty space.
    assert without.abs().max() < 1e-10
    slope = 0.05 * (depths[1] - depths[0]) / 2  # Of its opacity, at each end.
    torch.testing.assert_close(with_leak[:2], slope.expand(2))
    solid = torch.tensor([2.0] * 8, requires_grad=True)
    slopes = [
        torch.autograd.grad(march_weights(depths, solid, leak).sum(), solid)
        for leak in (None, torch.tensor(0.05))
    ]
    torch.testing.assert_close(*slopes)
