"""Generator files: round trips, refusals, damage."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_generator import small_generator
from tiny_run import build_generator

from files.generators import load_generator, save_generator


@pytest.fixture
def saved(tmp_path):
    save_generator(build_generator(), tmp_path / "g.safetensors")
    return tmp_path / "g.safetensors"


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_generator_comes_back_as_it_was(saved):
    G, loaded = build_generator(), load_generator(saved)
    for name, value in G.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.neural_rendering_resolution == 12
    assert loaded.rendering_kwargs == G.rendering_kwargs
    assert loaded.cameras == G.cameras
    c = G.cameras.frontal()
    ws = G.mapping(torch.ones(1, 8), c)
    images = []
    for network in (G, loaded):
        torch.manual_seed(0)
        images.append(network.synthesis(ws, c)["image"])
    assert torch.equal(*images)


def test_changes_after_construction_are_kept(tmp_path):
    G = build_generator()
    G.plane_axes = G.plane_axes.flip(0)
    G.rendering_kwargs["foreground_depth"] = 2.85
    save_generator(G, tmp_path / "g.safetensors")
    loaded = load_generator(tmp_path / "g.safetensors")
    assert torch.equal(loaded.plane_axes, G.plane_axes)
    assert loaded.rendering_kwargs["foreground_depth"] == 2.85


def test_half_precision_file_loads_as_float32_and_frozen(tmp_path, saved):
    save_generator(build_generator(), tmp_path / "half.safetensors", torch.float16)
    assert os.path.getsize(tmp_path / "half.safetensors") < 0.7 * os.path.getsize(saved)
    G = load_generator(tmp_path / "half.safetensors")
    assert {value.dtype for value in G.state_dict().values()} == {torch.float32}
    assert not G.training and not any(w.requires_grad for w in G.parameters())
    for name, value in build_generator().state_dict().items():
        torch.testing.assert_close(G.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_equal_generators_make_equal_files(tmp_path, saved):
    save_generator(build_generator(), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_header_holds_what_design_names(saved):
    header = metadata(saved)
    assert header.pop("format") == "eg3d-safetensors"
    values = {key: json.loads(value) for key, value in header.items()}
    assert values["init_kwargs"]["z_dim"] == 8
    assert values["rendering_kwargs"]["ray_start"] == 2.25
    assert values["neural_rendering_resolution"] == 12
    assert torch.tensor(values["plane_axes"]).shape == (3, 3, 3)
    assert values["rendering_kwargs"]["camera_distribution"] == "uniform"
    assert len(values) == 5  # And the checksum.


def test_run_folder_is_a_generator(tmp_path, saved):
    saved.rename(tmp_path / "generator.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert load_generator(tmp_path).z_dim == 8


def missing(path: Path, _):
    return path / "none.safetensors"


def hub_id(*_):
    return "user/repository/generator.safetensors"


def eg3d_pickle(path, _):
    (path / "ffhq512-128.pkl").write_bytes(pickle.dumps({"G_ema": None}))
    return path / "ffhq512-128.pkl"


def folder_without_run(path, _):
    return path


def unfinished_run(path, _):
    (path / "config.json").write_text("{}")
    return path


def empty_file(path, _):
    (path / "empty.safetensors").write_bytes(b"")
    return path / "empty.safetensors"


def random_bytes(path, _):
    (path / "noise.safetensors").write_bytes(bytes(range(256)) * 40)
    return path / "noise.safetensors"


def truncated(path, saved):
    (path / "cut.safetensors").write_bytes(saved.read_bytes()[:-100])
    return path / "cut.safetensors"


def cut_header(path, saved):
    (path / "cut.safetensors").write_bytes(saved.read_bytes()[:200])
    return path / "cut.safetensors"


def other_project(path, saved):
    save_file(load_file(saved), path / "foreign.safetensors", {"format": "pt"})
    return path / "foreign.safetensors"


def no_header(path, saved):
    save_file(load_file(saved), path / "foreign.safetensors")
    return path / "foreign.safetensors"


def tampered(path, saved, drop=(), **changes):
    tensors = {k: v for k, v in load_file(saved).items() if k not in drop}
    header = {k: v for k, v in metadata(saved).items() if k != "checksum"} | changes
    save_file(tensors, path / "tampered.safetensors", header)
    return path / "tampered.safetensors"


def lacking_tensor(path, saved):
    return tampered(path, saved, drop=["decoder.net.0.bias"])


def other_widths(path, saved):
    kwargs = json.loads(metadata(saved)["init_kwargs"]) | {"w_dim": 12}
    return tampered(path, saved, init_kwargs=json.dumps(kwargs))


def unknown_argument(path, saved):
    return tampered(path, saved, init_kwargs='{"depth": 3}')


def list_for_arguments(path, saved):
    return tampered(path, saved, init_kwargs="[1, 2]")


def broken_json(path, saved):
    return tampered(path, saved, plane_axes="[[1, 0")


def strange_axes(path, saved):
    return tampered(path, saved, plane_axes='"xyz"')


def other_axes(path, saved):
    return tampered(path, saved, plane_axes="[1, 2, 3]")


def singular_axes(path, saved):
    return tampered(path, saved, plane_axes=json.dumps(torch.ones(3, 3, 3).tolist()))


def nan_weight(path, saved):
    tensors = load_file(saved)
    tensors["decoder.net.0.bias"][0] = torch.nan
    header = {k: v for k, v in metadata(saved).items() if k != "checksum"}
    save_file(tensors, path / "nan.safetensors", header)
    return path / "nan.safetensors"


def no_pixels(path, saved):
    return tampered(path, saved, neural_rendering_resolution="-3")


def other_rendering(path, saved, **changes):
    kwargs = json.loads(metadata(saved)["rendering_kwargs"]) | changes
    return tampered(path, saved, rendering_kwargs=json.dumps(kwargs))


def unknown_cameras(path, saved):
    return other_rendering(path, saved, camera_distribution="foo")


def pivot_in_a_plane(path, saved):
    return other_rendering(path, saved, avg_camera_pivot=[0.0, 0.2])


def overlong_name(*_):
    return "x" * 300


@pytest.mark.parametrize(
    "make",
    [
        missing,
        hub_id,
        eg3d_pickle,
        folder_without_run,
        unfinished_run,
        empty_file,
        random_bytes,
        truncated,
        cut_header,
        other_project,
        no_header,
        lacking_tensor,
        other_widths,
        unknown_argument,
        list_for_arguments,
        broken_json,
        strange_axes,
        other_axes,
        singular_axes,
        nan_weight,
        no_pixels,
        unknown_cameras,
        pivot_in_a_plane,
        overlong_name,
    ],
)
def test_foreign_generator_is_refused_in_one_line(tmp_path, saved, make):
    source = make(tmp_path, saved)
    with pytest.raises(ValueError) as refusal:
        load_generator(source)
    assert str(refusal.value).startswith(str(source))
    assert "\n" not in str(refusal.value)


def test_what_is_no_file_is_refused_unopened(tmp_path, saved):
    os.mkfifo(tmp_path / "pipe.pkl")
    pipe = os.open(tmp_path / "pipe.pkl", os.O_RDWR)
    os.write(pipe, b"\x80" * 9)  # Whoever opens it needs not wait.
    for source in (tmp_path / "pipe.pkl", Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{source} is neither a file nor a folder"):
            load_generator(source)
    os.close(pipe)
    (tmp_path / "generator.safetensors").symlink_to(tmp_path / "pipe.pkl")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a folder without generator.safetensors"):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"c_dim": 7}, {"img_channels": 1}, {"img_channels": 4}, {"feature_channels": 2}]
)
def test_generator_that_no_script_can_use_is_refused(changes, tmp_path):
    save_generator(small_generator(**changes), tmp_path / "g.safetensors")
    with pytest.raises(ValueError, match="c_dim must be 25|img_channels must be 3"):
        load_generator(tmp_path / "g.safetensors")


def test_a_flipped_byte_is_refused_in_one_line(tmp_path, saved):
    whole, path = saved.read_bytes(), tmp_path / "flipped.safetensors"
    data = 8 + int.from_bytes(whole[:8], "little")
    places = [part * (len(whole) - 1) // 20 for part in range(21)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="flipped.safetensors holds no usable gen") as refusal:
            load_generator(path)
        assert "\n" not in str(refusal.value)
        assert place < data or "it is damaged" in str(refusal.value)
    assert max(places) >= data


def test_files_without_a_checksum_load_as_before(tmp_path, saved):
    path = tampered(tmp_path, saved)
    assert "checksum" not in metadata(path)
    for name, value in load_generator(path).state_dict().items():
        assert torch.equal(value, load_generator(saved).state_dict()[name]), name


def test_a_changed_header_is_damage_too(tmp_path, saved):
    header = metadata(saved) | {"neural_rendering_resolution": "13"}
    save_file(load_file(saved), tmp_path / "g.safetensors", header)
    with pytest.raises(ValueError, match="it is damaged"):
        load_generator(tmp_path / "g.safetensors")
