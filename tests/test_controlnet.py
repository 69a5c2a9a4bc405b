"""The ControlNet for depth: which builds are refused, and which names warned of."""

import json
import shutil

import diffusers
import pytest

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
