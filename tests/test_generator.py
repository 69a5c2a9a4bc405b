"""The whole generator at small sizes: shapes, cameras, masks, gradients, precision, refusals."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from tiny_generator import even_samples, small_generator

from models.eg3d import TriPlaneGenerator
from models.layers import SynthesisLayer, ToRGB, modulated_conv2d


@pytest.fixture
def G():
    return small_generator()


def inputs(G, batch=2):
    torch.manual_seed(0)
    z, c = torch.randn(batch, G.z_dim), G.cameras.sample(batch)
    return G.mapping(z, G.cameras.frontal(batch)), c


def test_outputs_have_their_shapes_and_ranges(G):
    out = G.synthesis(*inputs(G))
    shapes = {name: tuple(value.shape) for name, value in out.items()}
    maps = dict.fromkeys(("image_depth", "acc", "mask"), (2, 1, 16, 16))
    sizes = {
        "image": (2, 3, 32, 32),
        "image_raw": (2, 3, 16, 16),
        "features": (2, 8, 16, 16),
    }
    assert shapes == sizes | maps
    assert out["image_raw"].abs().max() <= 1.01
    assert out["mask"].min() >= 0 and out["mask"].max() <= 1


@pytest.mark.parametrize(
    ("module", "size", "first_up"),
    [("8XDC", 512, 2), ("8X", 512, 2), ("4X", 256, 1), ("2X", 128, 1), ("Deepfp32", 256, 1)],
)
def test_every_super_resolution_class_makes_its_size(module, size, first_up):
    G = small_generator(
        {"superresolution_module": f"training.superresolution.SuperresolutionHybrid{module}"},
        img_resolution=size,
        sr_kwargs={"channel_base": 32768, "channels": (4, 4)},
    )
    assert G.synthesis(*inputs(G, 1))["image"].shape == (1, 3, size, size)
    assert G.superresolution.block0.up == first_up
    has_filter = "superresolution.resample_filter" in G.state_dict()
    assert has_filter == (module != "8XDC")


def test_default_super_resolution_widths_are_those_of_its_class():
    G = small_generator(
        {"superresolution_module": "SuperresolutionHybrid8XDC"}, img_resolution=512, sr_kwargs={}
    )
    blocks = (G.superresolution.block0, G.superresolution.block1)
    assert [block.conv1.weight.shape[0] for block in blocks] == [256, 128]


def test_larger_renders_are_low_passed_before_super_resolution(G):
    rgb, ws = torch.randn(1, 3, 48, 48), inputs(G, 1)[0]
    x = torch.randn(1, 8, 48, 48)
    shrink = dict(size=(16, 16), mode="bilinear", antialias=True)
    wanted = G.superresolution(F.interpolate(rgb, **shrink), F.interpolate(x, **shrink), ws, "none")
    torch.testing.assert_close(G.superresolution(rgb, x, ws, "none"), wanted)


def test_four_times_super_resolution_refuses_larger_renders():
    G = small_generator({"superresolution_module": "SuperresolutionHybrid4X"})
    ws, c = inputs(G, 1)
    with pytest.raises(ValueError, match="at most 16 px, got 20"):
        G.synthesis(ws, c, neural_rendering_resolution=20)


def test_raw_image_is_left_clean_by_super_resolution(G):
    ws, c = inputs(G)
    with even_samples():
        with_sr, without = G.synthesis(ws, c), G.synthesis(ws, c, superresolve=False)
    assert "image" not in without
    for name, value in without.items():
        assert torch.equal(value, with_sr[name]), name


def test_several_cameras_equal_separate_calls(G):
    ws, _ = inputs(G, 2)
    views = G.cameras.sample(6).unflatten(0, (2, 3))
    with even_samples():
        together = G.synthesis(ws, views)
        apart = G.synthesis(ws.repeat_interleave(3, dim=0), views.flatten(0, 1))
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_cameras_must_match_the_codes(G):
    ws, c = inputs(G)
    with pytest.raises(ValueError, match=r"with B = 1 as ws, got \[2, 25\]"):
        G.synthesis(ws[:1], c)


def test_several_cameras_run_the_backbone_once(G, monkeypatch):
    ws, _ = inputs(G, 2)
    batches = []
    forward = G.backbone.synthesis.forward
    monkeypatch.setattr(
        G.backbone.synthesis, "forward", lambda ws, *a: batches.append(len(ws)) or forward(ws, *a)
    )
    G.synthesis(ws, G.cameras.sample(6).unflatten(0, (2, 3)))
    assert batches == [2]


def test_given_planes_skip_the_backbone(G, monkeypatch):
    ws, c = inputs(G)
    planes = G.planes(ws)
    with even_samples():
        wanted = G.synthesis(ws, c)["image"]
        monkeypatch.delattr(G.backbone, "synthesis")
        assert torch.equal(G.synthesis(ws, c, planes=planes)["image"], wanted)
    assert G.sample_mixed(torch.zeros(2, 4, 3), None, ws, planes=planes)["rgb"].shape == (2, 4, 8)


@pytest.mark.parametrize(
    "rays", [{}, {"ray_start": "auto", "ray_end": "auto", "box_warp": 0.7}], ids=["", "auto"]
)
@pytest.mark.parametrize("views", [1, 2])
def test_rows_come_out_as_among_all(rays, views):
    G = small_generator(rays)
    ws, _ = inputs(G, 3)
    c = G.cameras.sample(3 * views).unflatten(0, (3, views))
    torch.manual_seed(1)
    whole = G.synthesis(ws, c)
    torch.manual_seed(1)
    drawn = G.rays(c)
    for rows in (slice(0, 2), slice(2, 3)):
        for name, part in G.synthesis(ws[rows], c[rows], rays=drawn.cut(rows)).items():
            wanted = whole[name].unflatten(0, (3, views))[rows].flatten(0, 1)
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_samples_of_a_ray_are_multiplied_for_a_call(G):
    ws, c = inputs(G)
    with even_samples():
        twice = G.synthesis(ws, c, sample_mult=2)["image_raw"]
        once = G.synthesis(ws, c)["image_raw"]
        G.rendering_kwargs.update(depth_resolution=12, depth_resolution_importance=12)
        assert torch.equal(twice, G.synthesis(ws, c)["image_raw"])
    assert not torch.equal(twice, once)


def test_resolution_of_a_call_is_not_kept(G):
    ws, c = inputs(G)
    assert G.synthesis(ws, c, neural_rendering_resolution=8)["image_raw"].shape[-1] == 8
    assert G.neural_rendering_resolution == 16
    assert G.synthesis(ws, c)["image_raw"].shape[-1] == 16


def test_mask_is_opacity_up_to_the_foreground_depth(G):
    ws, c = inputs(G)
    with even_samples():
        opaque = G.synthesis(ws, c)
        G.rendering_kwargs["foreground_depth"] = 2.8
        cut = G.synthesis(ws, c)
    torch.testing.assert_close(opaque["mask"], opaque["acc"])
    wanted = cut["acc"] * torch.sigmoid((2.8 - cut["image_depth"]) / 0.02)
    torch.testing.assert_close(cut["mask"], wanted)


def test_plane_axes_are_honoured(G):
    ws, c = inputs(G)
    with even_samples():
        before = G.synthesis(ws, c)["image_raw"]
        G.plane_axes = G.plane_axes[[0, 2, 1]]
        swapped = G.synthesis(ws, c, planes=G.planes(ws)[:, [0, 2, 1]])["image_raw"]
        other = G.synthesis(ws, c)["image_raw"]
    torch.testing.assert_close(swapped, before, rtol=1e-4, atol=1e-5)
    assert (other - before).abs().max() > 1e-2


def test_truncation_pulls_codes_to_the_average(G):
    z, c = torch.randn(2, G.z_dim), G.cameras.frontal(2)
    full = G.mapping(z, c)
    none = G.mapping(z, c, truncation_psi=0.0)
    torch.testing.assert_close(none, G.backbone.mapping.w_avg.expand_as(none))
    some = G.mapping(z, c, truncation_psi=0.0, truncation_cutoff=3)
    assert torch.equal(some[:, 3:], full[:, 3:]) and torch.equal(some[:, :3], none[:, :3])


def test_average_code_moves_only_when_asked(G):
    z, c = torch.randn(2, G.z_dim), G.cameras.frontal(2)
    before = G.backbone.mapping.w_avg.clone()
    w = G.mapping(z, c)[:, 0]
    assert torch.equal(G.backbone.mapping.w_avg, before)
    G.mapping(z, c, update_emas=True)
    torch.testing.assert_close(G.backbone.mapping.w_avg, 0.002 * w.mean(0) + 0.998 * before)


def test_label_does_not_matter_when_zeroed_or_unscaled(G):
    z, (a, b) = torch.randn(1, G.z_dim), G.cameras.sample(2).split(1)
    assert not torch.equal(G.mapping(z, a), G.mapping(z, b))
    G.rendering_kwargs["c_gen_conditioning_zero"] = True
    assert torch.equal(G.mapping(z, a), G.mapping(z, b))
    G.rendering_kwargs.update(c_gen_conditioning_zero=False)
    del G.rendering_kwargs["c_scale"]  # EG3D's default is 0.
    assert torch.equal(G.mapping(z, a), G.mapping(z, b))


def test_gradients_reach_every_parameter_that_matters(G):
    G.requires_grad_(True)
    out = G(torch.randn(2, G.z_dim), G.cameras.sample(2))
    sum(out[name].square().mean() for name in ("image", "image_depth", "mask")).backward()
    for name, parameter in G.named_parameters():
        if "superresolution" in name and "noise" in name:
            continue  # Without noise in super-resolution its strength has no effect.
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("channels", [4, 40])
@pytest.mark.parametrize("up", [1, 2])
def test_modulated_convolution_equals_its_definition(channels, up):
    torch.manual_seed(0)  # Few channels scale the weights, many the activations.
    layer = SynthesisLayer(channels, channels, 8, 8 * up, up=up)
    x, styles = torch.randn(2, channels, 8, 8), torch.rand(2, channels) + 0.5
    bias = torch.randn(channels)
    fir = layer.resample_filter if up == 2 else None
    got = modulated_conv2d(x, layer.weight, bias, styles, 1.0, fir)
    for i in range(2):
        w = layer.weight * styles[i][:, None, None]
        w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up == 1:
            y = F.conv2d(x[i : i + 1], w, padding=1)
        else:
            y = F.conv_transpose2d(x[i : i + 1], w.transpose(0, 1), stride=2)
            kernel = (layer.resample_filter * 4).expand(channels, 1, 4, 4)
            y = F.conv2d(F.pad(y, (1, 1, 1, 1)), kernel, groups=channels)
        torch.testing.assert_close(got[i : i + 1], y + bias[:, None, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_colours_equal_their_definition_and_keep_the_layout(layout):
    torch.manual_seed(0)
    layer = ToRGB(4, 3, 8)
    layer.bias.data.normal_()
    x, w = torch.randn(2, 4, 5, 5).to(memory_format=layout), torch.randn(2, 8)
    rgb = layer(x, w)
    styles = layer.affine(w) / 2
    expected = F.conv2d(x * styles[:, :, None, None], layer.weight, layer.bias)
    torch.testing.assert_close(rgb, expected)
    assert rgb.is_contiguous(memory_format=layout)


def test_noise_modes(G):
    ws, _ = inputs(G)
    const = G.planes(ws)
    assert torch.equal(const, G.planes(ws, noise_mode="const"))
    assert not torch.equal(const, G.planes(ws, noise_mode="none"))
    first = G.planes(ws, noise_mode="random")
    assert not torch.equal(first, G.planes(ws, noise_mode="random"))
    with pytest.raises(ValueError, match="got 'loud'"):
        G.planes(ws, noise_mode="loud")


def test_bfloat16_autocast_stays_close(G):
    G.requires_grad_(True)
    ws, c = (value.detach() for value in inputs(G))
    with even_samples():
        exact = G.synthesis(ws, c)
        with torch.autocast("cpu", torch.bfloat16):
            rough = G.synthesis(ws, c)
    for name in ("image", "image_raw"):
        error = (exact[name] - rough[name]).square().mean()
        assert 10 * torch.log10(4 / error) > 40, name
    rough["image"].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in G.parameters())


def test_init_kwargs_rebuild_the_generator(G):
    kwargs = json.loads(json.dumps(G.init_kwargs))
    again = TriPlaneGenerator(**kwargs).requires_grad_(False)
    again.load_state_dict(G.state_dict())
    again.neural_rendering_resolution = 16
    ws, c = inputs(G)
    with even_samples():
        assert torch.equal(again.synthesis(ws, c)["image"], G.synthesis(ws, c)["image"])


def test_init_kwargs_hold_ours_only_where_they_differ(G):
    assert "plane_resolution" in G.init_kwargs
    assert "plane_resolution" not in small_generator(plane_resolution=256).init_kwargs


def test_state_without_label_statistics_loads(G):
    state = G.state_dict()
    del state["dataset_label_std"]
    copy.deepcopy(G).load_state_dict(state)
    assert "dataset_label_std" not in state


def test_number_of_codes_follows_the_planes():
    assert small_generator(plane_resolution=64).backbone.num_ws == 10
    with pytest.raises(ValueError, match="power of 2 >= 4, got 48"):
        small_generator(plane_resolution=48)


def test_camera_setup_follows_the_rendering_kwargs():
    G = small_generator({"camera_yaw_range": 0.6, "camera_distribution": "uniform"})
    assert (G.cameras.yaw_range, G.cameras.distribution) == (0.6, "uniform")
    assert (G.cameras.radius, G.cameras.pivot, G.cameras.focal) == (2.7, (0, 0, 0.2), 4.2647)
    cars = small_generator({"avg_camera_radius": 1.7, "avg_camera_pivot": [0, 0, 0]})
    assert cars.cameras.focal == 1.7074


@pytest.mark.parametrize(
    ("rendering_kwargs", "changes", "message"),
    [
        ({"superresolution_module": "SuperresolutionHybrid16X"}, {}, "got 'SuperresolutionHyb"),
        ({"superresolution_module": None}, {}, "superresolution_module must be one of"),
        ({}, {"img_resolution": 64}, "makes images of 32 px, img_resolution is 64"),
        ({"ray_start": "auto"}, {}, "ray_start and ray_end must be"),
    ],
)
def test_bad_settings_are_refused_in_one_line(rendering_kwargs, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        small_generator(rendering_kwargs, **changes)
    assert "\n" not in str(error.value)


def test_codes_and_sizes_that_mean_nothing_are_refused(G):
    ws, c = inputs(G)
    for size in (0, -3):
        with pytest.raises(ValueError, match="neural_rendering_resolution must be at least 1"):
            G.synthesis(ws, c, neural_rendering_resolution=size)
    for codes in (ws[:, :1], ws.repeat(1, 2, 1), ws[:, 0]):
        with pytest.raises(ValueError, match="ws must be"):
            G.synthesis(codes, c)


def test_codes_of_double_precision_are_taken(G):
    ws, c = inputs(G)
    with even_samples():
        assert torch.equal(G.synthesis(ws.double(), c)["image"], G.synthesis(ws, c)["image"])
