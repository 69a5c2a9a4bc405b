"""Textual inversion: learned words in every format, as diffusers adds and reads them."""

import shutil

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from models.diffusion import DiffusionPrior


def vectors(count=2, width=32):
    return 0.5 * torch.randn(count, width, generator=torch.Generator().manual_seed(count))


# Name of the file, its content, and the word it teaches.
FORMATS = {
    "a1111": ("x.pt", lambda v: {"string_to_param": {"*": v}, "name": "my-style"}, "my-style"),
    "a1111, parameter": (
        "x.pt",
        lambda v: {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": torch.nn.Parameter(v)},
            "name": "my-style",
            "step": 9,
            "sd_checkpoint": None,
        },
        "my-style",
    ),
    "a1111, no name": ("my-style.pt", lambda v: {"string_to_param": {"*": v}}, "my-style"),
    "a1111, safetensors": ("my-style.safetensors", lambda v: {"emb_params": v}, "my-style"),
    "diffusers": ("learned_embeds.bin", lambda v: {"<my-style>": v}, "<my-style>"),
    "diffusers, safetensors": (
        "learned_embeds.safetensors",
        lambda v: {"<my-style>": v},
        "<my-style>",
    ),
    "tensor": ("my-style.pt", lambda v: v, "my-style"),
}


def write(file, content):
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)
    return file


class Theirs(TextualInversionLoaderMixin):
    """What diffusers' pipelines do with learned words and prompts."""

    hf_device_map, components = None, {}

    def __init__(self, folder):
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")

    @torch.no_grad()
    def encode(self, prompts):
        prompts = self.maybe_convert_prompt(prompts, self.tokenizer)
        options = {"padding": "max_length", "max_length": 32, "truncation": True}
        ids = self.tokenizer(prompts, **options, return_tensors="pt").input_ids
        return self.text_encoder(ids)[0]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", FORMATS)
def test_embedded_prompts_are_those_of_diffusers(kind, count, folder, tmp_path):
    name, content, word = FORMATS[kind]
    file = write(tmp_path / name, content(vectors(count)))
    ours, theirs = DiffusionPrior.from_pretrained(folder, embeddings=[file]), Theirs(folder)
    theirs.load_textual_inversion({word: vectors(count)})
    assert list(ours.learned_words) == [word]
    assert len(ours.learned_words[word]) == count
    prompts = ["", "an elf", f"elf, {word}", f"{word} and {word}", f"a{word}b"]
    assert torch.equal(ours.encode_text(prompts), theirs.encode(prompts))
    condition = ours.condition("an elf", negative=word)
    assert torch.equal(condition.text, theirs.encode([word, "an elf"]))


def test_vector_without_a_second_axis_is_one_vector(folder, tmp_path):
    write(tmp_path / "learned_embeds.bin", {"<it>": vectors(1)[0]})
    prior = DiffusionPrior.from_pretrained(folder, embeddings=[tmp_path])
    (number,) = prior.learned_words["<it>"]
    assert torch.equal(prior.text_encoder.get_input_embeddings().weight[number], vectors(1)[0])


def test_several_embeddings_are_added_in_any_order(folder, tmp_path):
    files = [write(tmp_path / f"word{i}.pt", vectors(i)) for i in (1, 2, 3)]
    a, b = (DiffusionPrior.from_pretrained(folder, embeddings=e) for e in (files, files[::-1]))
    prompts = ["word3 word1", "an elf, word2", "word1word3"]
    assert torch.equal(a.encode_text(prompts), b.encode_text(prompts))
    assert [len(ids) for ids in a.learned_words.values()] == [1, 2, 3]


def test_half_precision_text_encoder_takes_them_too(folder, tmp_path):
    file = write(tmp_path / "style.pt", vectors())
    prior = DiffusionPrior.from_pretrained(folder, dtype=torch.bfloat16, embeddings=[file])
    assert prior.text_encoder.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in prior.text_encoder.parameters())


def test_learned_word_counts_as_its_vectors_where_a_prompt_is_cut(folder, tmp_path, recwarn):
    file = write(tmp_path / "style.pt", vectors(10))
    prior = DiffusionPrior.from_pretrained(folder, embeddings=[file])
    prior.encode_text(["style" + " a" * 20])  # 10 vectors and 20 letters fit.
    assert not recwarn.list
    with pytest.warns(UserWarning, match="cut off at 'x'"):
        cut = prior.encode_text(["style" + " a" * 20 + " x"])
    assert torch.equal(cut, prior.encode_text(["style" + " a" * 20]))
    with pytest.warns(UserWarning, match="cut off at 'style_4"):
        prior.encode_text([" a" * 26 + " style"])


def test_learned_word_is_no_unknown_word(folder, tmp_path):
    files = [
        write(tmp_path / "my-style.pt", vectors()),
        write(tmp_path / "x.pt", {"<it>": vectors()}),
    ]
    prior = DiffusionPrior.from_pretrained(folder, embeddings=files)
    assert prior.unknown_words("a statue, my-style, <it>, My-Style") == []
    assert prior.unknown_words("a robot, my-style") == ["robot"]


REFUSALS = {
    "width": ({"<it>": vectors(2, 48)}, "is of another model: its vectors have width 48, .* 32"),
    "taken": ({"a</w>": vectors()}, "its word 'a</w>' is taken"),
    "xl": ({"clip_l": vectors(), "clip_g": vectors()}, "is an embedding for Stable Diffusion XL"),
    "lora": (
        {"lora_unet_x.lora_up.weight": vectors(), "lora_unet_x.lora_down.weight": vectors()},
        "holds a LoRA, not one textual",
    ),
    "checkpoint": (
        {"model.diffusion_model.x": vectors(), "y": vectors()},
        "holds a whole Stable Diffusion, not one textual",
    ),
    "several": ({"<a>": vectors(), "<b>": vectors()}, "holds 2 things, not one textual"),
    "nothing": ({}, "holds 0 things"),
    "no vectors": ({"<it>": torch.ones(2, 2, 32)}, "no vectors"),
    "no numbers": ({"<it>": vectors() * torch.nan}, "not finite"),
    "integers": ({"<it>": torch.ones(2, 32, dtype=torch.int64)}, "not finite numbers"),
    "spaces": ({" it ": vectors()}, "its word is ' it '"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_embedding_for_the_model_is_refused_in_one_line(case, folder, tmp_path):
    content, reason = REFUSALS[case]
    file = write(tmp_path / "style.safetensors", content)
    with pytest.raises(ValueError, match=f"^{file}: .*{reason}") as caught:
        DiffusionPrior.from_pretrained(folder, embeddings=[file])
    assert "\n" not in str(caught.value)


def test_word_of_two_embeddings_is_refused(folder, tmp_path):
    files = [write(tmp_path / "style.pt", vectors()), tmp_path / "style.bin"]
    shutil.copy(files[0], files[1])
    with pytest.raises(ValueError, match=f"^{files[1]}: its word 'style' is taken"):
        DiffusionPrior.from_pretrained(folder, embeddings=files)
