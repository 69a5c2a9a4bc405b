"""Frozen features: CLIP's embeddings and a ViT's patch tokens."""

import shutil

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from tiny_prior import build_clip, build_dino
from transformers import CLIPImageProcessorPil, CLIPModel, ViTConfig, ViTModel

from models.features import ClipFeatures, TokenFeatures, _input_format, clip_preprocess


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return build_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    return build_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def clip(clip_folder):
    return ClipFeatures.from_pretrained(clip_folder)


@pytest.fixture(scope="module")
def dino(dino_folder):
    return TokenFeatures.from_pretrained(dino_folder)


def images(batch=2, height=40, width=56):
    """Smooth pictures in [-1, 1]."""
    torch.manual_seed(0)
    coarse = torch.rand(batch, 3, 5, 7) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


@pytest.mark.parametrize("shape", [(40, 56), (71, 33), (20, 20)])
def test_clip_preprocessing_agrees_with_the_official_processor(shape):
    pixels = images(1, *shape)
    picture = ((pixels[0] + 1) * 127.5).round().byte().movedim(0, -1).numpy()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    official = processor(Image.fromarray(np.asarray(picture)), return_tensors="np")["pixel_values"]
    difference = (clip_preprocess(pixels, 32) - torch.from_numpy(official)).abs()
    assert difference.mean() < 0.01 and difference.max() < 0.1


def test_clip_embeddings_are_unit_length_and_those_of_the_model(clip, clip_folder):
    model = CLIPModel.from_pretrained(clip_folder)
    pixels = images()
    ids = clip.tokenizer(["an elf", "a robot"], padding=True, return_tensors="pt").input_ids
    output = model(input_ids=ids, pixel_values=clip_preprocess(pixels, 32))
    torch.testing.assert_close(clip.images(pixels), output.image_embeds)
    torch.testing.assert_close(clip.text(["an elf", "a robot"]), output.text_embeds)
    torch.testing.assert_close(clip.images(pixels).norm(dim=1), torch.ones(2))


def test_long_sentence_is_cut_with_a_warning(clip):
    with pytest.warns(UserWarning, match="'tail'"):
        clip.text(["a " * 30 + "tail"])


def test_tokens_are_the_networks_own_patches_in_reading_order(dino):
    pixels = images(height=32, width=32)
    tokens = dino.tokens(pixels)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.25, 0.5]]).view(2, 3, 1, 1)
    states = dino.model(((pixels + 1) / 2 - mean) / std).last_hidden_state  # [2, 1 + 64, 32]
    assert tokens.shape == (2, 8, 8, 32)
    torch.testing.assert_close(tokens[:, 2, 5], states[:, 1 + 2 * 8 + 5])


def test_tokens_of_clip_are_those_of_the_layer_asked_for(clip):
    pixels = images(2, 32, 32)
    config = clip.model.config.vision_config
    inputs = clip_preprocess(pixels, config.image_size)
    states = clip.model.vision_model(inputs, output_hidden_states=True).hidden_states
    assert len(states) == clip.depth + 1
    for layer in (1, -2):
        tokens = clip.tokens(pixels, layer).flatten(1, 2)
        torch.testing.assert_close(tokens, states[layer][:, 1:])


def test_an_edit_in_one_corner_moves_the_token_there_most(dino):
    pixels = images(1, 64, 64)
    edited = pixels.clone()
    edited[:, :, :16, 48:] *= -1
    moved = (dino.layers(pixels, (0,))[0] - dino.layers(edited, (0,))[0]).norm(dim=-1)[0]
    assert (moved[:2, 6:] > 0.01).all() and moved[4:, :4].max() < 1e-5


def test_layers_are_the_networks_hidden_states(dino):
    pixels = images(height=32, width=32)
    first, last = dino.layers(pixels, (0, 2))
    assert first.shape == last.shape == (2, 8, 8, 32)
    torch.testing.assert_close(dino.model.layernorm(last), dino.tokens(pixels))


def test_gradients_reach_the_image_and_no_parameter(clip, dino):
    for features, model in ((clip.images, clip.model), (dino.tokens, dino.model)):
        pixels = images().requires_grad_()
        features(pixels)[..., 0].sum().backward()
        assert pixels.grad.abs().sum() > 0
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_original_dino_loads_without_its_pooler(tmp_path):
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    assert TokenFeatures.from_pretrained(tmp_path).tokens(images()).shape == (2, 4, 4, 16)
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 24}')
    with pytest.raises(ValueError, match="takes 32 px"):
        TokenFeatures.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "grid"),
    [(None, 8), ("{}", 8), ('{"crop_size": 16}', 4), ('{"crop_size": {"height": 24}}', 6)],
)
def test_input_size_is_the_preprocessors_crop(dino_folder, tmp_path, content, grid):
    folder = copy_with(dino_folder, tmp_path, content)
    features = TokenFeatures.from_pretrained(folder)
    assert features.grid == grid
    assert features.tokens(images()).shape == (2, grid, grid, 32)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"crop_size": {"width": 8}}', '{"image_mean": "grey"}']
)
def test_damaged_preprocessor_is_refused_rather_than_ignored(dino_folder, tmp_path, content):
    folder = copy_with(dino_folder, tmp_path, content)
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        TokenFeatures.from_pretrained(folder)


def test_preprocessor_that_cannot_be_fetched_is_refused_rather_than_ignored(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="^no-user/no-model/preprocessor_config.json"):
        _input_format("no-user/no-model", 224)


def test_preprocessor_that_the_hub_does_not_have_is_optional(monkeypatch):
    def absent(*_):
        raise EntryNotFoundError("404")

    monkeypatch.setattr("models.features.hf_hub_download", absent)
    assert _input_format("user/model", 224)["size"] == 224


def copy_with(dino_folder, folder, content):
    """Copy a ViT, with other content in its preprocessor_config.json, or without that file."""
    shutil.copytree(dino_folder, folder, dirs_exist_ok=True)
    (folder / "preprocessor_config.json").unlink()
    if content is not None:
        (folder / "preprocessor_config.json").write_text(content)
    return folder


def test_loading_is_silent(clip_folder, dino_folder, capfd, recwarn):
    ClipFeatures.from_pretrained(clip_folder)
    TokenFeatures.from_pretrained(dino_folder)
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_foreign_folders_are_refused_in_one_line(clip_folder, dino_folder, tmp_path):
    for load, folder in (
        (ClipFeatures.from_pretrained, dino_folder),
        (TokenFeatures.from_pretrained, clip_folder),
        (ClipFeatures.from_pretrained, tmp_path),
        (TokenFeatures.from_pretrained, tmp_path),
        (TokenFeatures.from_pretrained, tmp_path / "absent"),
    ):
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_networks_that_take_no_colour_images_are_refused_at_once(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTModel(ViTConfig(**shape, num_channels=1, image_size=32)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=f"^{tmp_path}/vit: takes images of 1 channels, not 3$"):
        TokenFeatures.from_pretrained(tmp_path / "vit")
    clip = build_clip(tmp_path / "clip")
    config = CLIPModel.from_pretrained(clip).config
    config.vision_config.num_channels = 4
    CLIPModel(config).save_pretrained(clip)
    with pytest.raises(ValueError, match=f"^{clip}: takes images of 4 channels, not 3$"):
        ClipFeatures.from_pretrained(clip)


def test_clip_with_fewer_words_than_its_tokenizer_is_refused_at_once(tmp_path):
    clip = build_clip(tmp_path)
    config = CLIPModel.from_pretrained(clip).config
    config.text_config.vocab_size = 500
    CLIPModel(config).save_pretrained(clip)
    with pytest.raises(ValueError, match="the tokenizer has 514 words, the text encoder 500$"):
        ClipFeatures.from_pretrained(clip)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_pointer_of_git_lfs_is_named(name, tmp_path):
    clip = build_clip(tmp_path)
    (clip / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=f"^{clip}: {name} is a git-lfs pointer, .*lfs pull.$"):
        ClipFeatures.from_pretrained(clip)


def test_clip_warns_of_the_syntax_of_web_uis(clip):
    with pytest.warns(UserWarning, match="^BREAK in the prompt is read as plain words"):
        clip.text(["an elf BREAK a robot"])
