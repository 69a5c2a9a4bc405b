"""StyleGAN2 in rosinality's files and in state dicts, read by names and shapes.

`data/keys_rosinality64.json` lists that code's tensors: its name, shape and the official name;
`data/parity_rosinality.npz` what that code's generator of 64 px draws with the numbers that
`tiny_generator.fill_parameters` gives the official names (every fourth pixel).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_generator import fill_parameters
from video_fixtures import read_frames

import render
from files.generators import load_generator, save_generator
from models.stylegan2 import StyleGAN2Generator

DATA = Path(__file__).parent / "data"


def small_generator(**changes):
    torch.manual_seed(0)
    kwargs = dict(z_dim=12, c_dim=0, w_dim=12, img_resolution=32, img_channels=3)
    given = {"mapping_kwargs": {"num_layers": 3}, "synthesis_kwargs": {"channel_base": 256}}
    given["synthesis_kwargs"] |= {"channel_max": 24}
    return fill_parameters(StyleGAN2Generator(**kwargs | given | changes)).requires_grad_(False)


def renamed(G, table):
    """Return rosinality's state dict of a generator, by a table of names and shapes."""
    state = G.state_dict()
    return {
        name: torch.ones(size) if official is None else state[official].reshape(size).clone()
        for name, size, official in table
    }


def table_of(G):
    """Return the table of a generator: the one of 64 px, as far as it has such layers."""
    table, state = json.loads((DATA / "keys_rosinality64.json").read_text()), G.state_dict()
    rows = []
    for name, size, official in table:
        if official is None or official not in state:
            continue
        shape = list(state[official].shape)
        ones = len(size) - len(shape)  # Axes of one stand in front, of biases also behind.
        rows.append([name, [1] * ones + shape if size[0] == 1 else shape, official])
    return rows


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "parity_rosinality.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def official():
    kwargs = dict(z_dim=512, c_dim=0, w_dim=512, img_resolution=64, img_channels=3)
    given = {"mapping_kwargs": {"num_layers": 8}, "synthesis_kwargs": {"channel_base": 32768}}
    return fill_parameters(StyleGAN2Generator(**kwargs, **given)).requires_grad_(False)


@pytest.mark.parametrize("new_format", [True, False])
def test_pictures_are_those_of_rosinalitys_code(new_format, official, expected, tmp_path):
    table = json.loads((DATA / "keys_rosinality64.json").read_text())
    content = {
        "g_ema": renamed(official, table),
        "latent_avg": official.mapping.w_avg.clone(),
        "args": argparse.Namespace(size=64, n_mlp=8),
        "g_optim": {"state": {}, "param_groups": [{"lr": 0.002}]},
    }
    torch.save(content, tmp_path / "g.pt", _use_new_zipfile_serialization=new_format)
    G = load_generator(tmp_path / "g.pt")
    wanted = official.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in G.state_dict().items())
    ws = G.mapping(expected["in.z"], None, 0.7)

    def check(image, name):
        assert (image[..., ::4, ::4] - expected[name]).abs().max() < 5e-5

    check(G.synthesis(ws)["image"], "image_const")
    check(G.synthesis(expected["in.ws_random"])["image"], "image_ws_random")
    torch.manual_seed(1234)
    check(G.synthesis(ws, noise_mode="random")["image"], "image_random_seed1234")


def test_what_a_file_lacks_is_drawn_and_said(tmp_path, capsys):
    G = small_generator()
    state = {k: v for k, v in renamed(G, table_of(G)).items() if not k.startswith("noises.")}
    torch.save({"g_ema": state}, tmp_path / "nada.pt")
    found = load_generator(tmp_path / "nada.pt")
    assert "holds no noise buffers and average code" in capsys.readouterr().err
    assert torch.equal(found.synthesis.b8.conv0.weight, G.synthesis.b8.conv0.weight)
    again = load_generator(tmp_path / "nada.pt")
    assert torch.equal(found.synthesis.b8.conv0.noise_const, again.synthesis.b8.conv0.noise_const)
    torch.manual_seed(5)
    mean = G.mapping(torch.randn(4096, 12), None)[:, 0].mean(0)
    assert (found.mapping.w_avg - mean).norm() < 0.1 * G.mapping(torch.randn(99, 12), None).norm()


@pytest.mark.parametrize("changes", [{}, {"img_resolution": 4}, {"c_dim": 3}])
def test_a_state_dict_of_official_names_is_read_by_its_shapes(changes, tmp_path):
    G = small_generator(**changes)
    torch.save(G.state_dict(), tmp_path / "g.pth")
    found = load_generator(tmp_path / "g.pth")
    for name, value in G.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda s: s.pop("convs.1.conv.weight"), "synthesis.b8.conv1.weight is missing"),
        (lambda s: s.update({"to_rgbs.9.bias": torch.ones(3)}), "channels|missing|blocks"),
        (lambda s: s.update(extra=torch.ones(2)), "extra is no part of rosinality's"),
        (lambda s: s.update({"convs.0.conv.weight": torch.ones(1, 24, 9, 3, 3)}), "must be"),
        (lambda s: s.update({"style.1.weight": torch.ones(12, 2, 6)}), "two axes"),
        (lambda s: s.update({"style.1.bias": torch.full([12], torch.nan)}), "not finite"),
    ],
)
def test_a_state_dict_of_no_such_network_is_refused(change, reason, tmp_path):
    G = small_generator()
    state = renamed(G, table_of(G))
    change(state)
    torch.save({"g_ema": state}, tmp_path / "g.pt")
    with pytest.raises(ValueError, match=f"holds no usable generator.*({reason})"):
        load_generator(tmp_path / "g.pt")


def test_a_small_file_cannot_repeat_a_tensor_without_end(tmp_path):
    shared = torch.zeros(64, 64)
    state = {f"style.{i}.weight": shared for i in range(1, 61)}
    state |= {f"style.{i}.bias": torch.zeros(64) for i in range(1, 61)}
    G = small_generator(z_dim=64, w_dim=64)
    state = renamed(G, table_of(G)) | state
    one = shared.half()
    torch.save(
        {"g_ema": {n: one if v is shared else v for n, v in state.items()}}, tmp_path / "g.pt"
    )
    with pytest.raises(ValueError, match="repeats its tensors too often"):
        load_generator(tmp_path / "g.pt")


@pytest.mark.parametrize("key", ["conv_clamp", "num_fp16_res"])
@pytest.mark.parametrize("value", ["abc", [1], -1, 0.5])
def test_numbers_that_cannot_be_are_refused(key, value):
    if (key, value) == ("conv_clamp", 0.5):
        return
    with pytest.raises(ValueError, match=f"^{key} must be"):
        small_generator(synthesis_kwargs={key: value})


def test_names_that_files_go_by_otherwise_are_read(tmp_path):
    G = small_generator()
    state = renamed(G, table_of(G)) | {"latent_avg": G.mapping.w_avg}
    for wrapper in ("g", "params_ema", "state_dict"):
        torch.save({wrapper: state}, tmp_path / "g.pt")
        assert torch.equal(load_generator(tmp_path / "g.pt").mapping.w_avg, G.mapping.w_avg)


def test_our_files_hold_it_whole(tmp_path):
    G = small_generator()
    save_generator(G, tmp_path / "g.safetensors")
    found = load_generator(tmp_path / "g.safetensors")
    assert type(found) is StyleGAN2Generator and found.init_kwargs == G.init_kwargs
    ws = G.mapping(torch.randn(2, 12), None)
    assert torch.equal(found.synthesis(ws)["image"], G.synthesis(ws)["image"])


def test_stills_and_a_walk_of_a_generator_without_cameras(tmp_path, ending):
    save_generator(small_generator(), tmp_path / "g.safetensors")
    ckpt, out = str(tmp_path / "g.safetensors"), tmp_path / "out"
    render.main(render.Config(ckpt, out=out, seeds="0-2", interpolate=3, device="cpu"))
    names = {path.name for path in out.iterdir()}
    assert names == {"seed0000.png", "seed0001.png", "seed0002.png", f"interpolation{ending}"}
    with Image.open(out / "seed0000.png") as still:
        assert still.size == (32, 32)
    assert read_frames(out / f"interpolation{ending}").shape == (9, 32, 32, 3)
    for name in ("depth", "orbit", "mesh"):
        with pytest.raises(ValueError, match=f"--{name} needs a generator with cameras"):
            render.main(render.Config(ckpt, out=out, seeds="0", **{name: 16}, device="cpu"))


def test_classes_are_refused_in_one_line(tmp_path):
    save_generator(small_generator(c_dim=3), tmp_path / "g.safetensors")
    command = [sys.executable, "render.py", "--ckpt", tmp_path / "g.safetensors"]
    done = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.count("\n") == 1 and "one of 3 classes" in done.stderr
