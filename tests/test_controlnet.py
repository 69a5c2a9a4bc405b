"""The ControlNet for depth: which builds are refused, and which names warned of."""

import json
import shutil

import diffusers
import pytest
from prior_fixtures import edit_json

from models.controlnet import other_condition
from models.diffusion import DiffusionPrior


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("conditioning_channels", 1),
        ("layers_per_block", 2),
        ("conditioning_embedding_out_channels", [16, 32, 96]),
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text"),
        ("global_pool_conditions", True),
        ("controlnet_conditioning_channel_order", "bgr"),
    ],
)
def test_controlnet_of_another_build_is_refused(key, value, folder, copy):
    config = copy / "controlnet/config.json"
    options = json.loads(config.read_text()) | {key: value}
    shutil.rmtree(copy / "controlnet")
    diffusers.ControlNetModel.from_config(options).save_pretrained(copy / "controlnet")
    with pytest.raises(ValueError, match=f"^{copy}/controlnet: "):
        DiffusionPrior.from_pretrained(copy)


NAMES = {
    "sd-controlnet-canny": "canny",
    "lllyasviel/control_v11p_sd15_openpose": "openpose",
    "control_v11p_sd15_normalbae": "normalbae",
    "control_v11p_sd15_seg": "seg",
    "control_v11f1e_sd15_tile": "tile",
    "control_v11p_sd15s2_lineart_anime": "lineart",
    "control_v11e_sd15_ip2p": "ip2p",
    "monster-labs/control_v1p_sd15_qrcode_monster": "qrcode",
    "lllyasviel/control_v11f1p_sd15_depth": None,
    "sd-controlnet-depth-and-normal": None,
    "controlnet": None,
    "canny/my-controlnet": None,
    "compose": None,
    "shed": None,
    "normalized": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_tell_what_a_controlnet_is_for(name):
    assert other_condition(name, "") == NAMES[name]
    assert other_condition("my/controlnet", name) == NAMES[name]
    assert other_condition("my-depth-net", name) is None


def test_controlnet_for_another_condition_is_warned_of_in_one_line(folder, tmp_path, recwarn):
    canny = shutil.copytree(folder / "controlnet", tmp_path / "sd-controlnet-canny")
    with pytest.warns(UserWarning, match=f"^{canny} seems to be a ControlNet for canny") as caught:
        DiffusionPrior.from_pretrained(folder, controlnet=canny)
    assert "\n" not in str(caught[0].message)
    plain = shutil.copytree(folder / "controlnet", tmp_path / "mine")
    edit_json(plain / "config.json", _name_or_path="lllyasviel/sd-controlnet-mlsd")
    with pytest.warns(UserWarning, match=f"^{plain} seems to be a ControlNet for mlsd"):
        DiffusionPrior.from_pretrained(folder, controlnet=plain)


def test_controlnet_in_one_file_is_refused_with_what_is_needed(folder, tmp_path):
    file = tmp_path / "control_v11f1p_sd15_depth.pth"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"^{file} is a file; a ControlNet is given as a diff"):
        DiffusionPrior.from_pretrained(folder, controlnet=file)
