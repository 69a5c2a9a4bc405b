"""Prompts: token ids, learned words, and what is no plain English."""

import pytest
import torch

from models.diffusion import DiffusionPrior
from models.prompts import clip_tokenize, web_ui_syntax


def test_text_is_padded_as_the_folder_says(sd2, prior):
    ids = [clip_tokenize(p.tokenizer, ["an elf"], 32)[0] for p in (sd2, prior)]
    assert [len(set(row.tolist())) for row in ids] == [8, 7]  # Letters, start, end and padding.
    assert ids[0][-1] == 0  # An exclamation mark, in version 2.
    states = sd2.text_encoder(ids[0][None]).last_hidden_state
    torch.testing.assert_close(sd2.encode_text(["an elf"]), states)


def test_prompt_beyond_the_limit_is_cut_with_a_warning_that_names_what_is_lost(prior):
    long = "a " * 30 + "tail"  # Every letter is a token; 30 of them fit.
    with pytest.warns(UserWarning, match="'tail'"):
        cut = prior.encode_text([long])
    assert torch.equal(cut, prior.encode_text(["a " * 30]))


def test_unknown_words_are_those_outside_the_declared_vocabulary(prior, copy):
    assert prior.unknown_words("A Bronze statue, smiling") == ["smiling"]
    (copy / "vocabulary.json").unlink()
    assert DiffusionPrior.from_pretrained(copy).unknown_words("anything at all") == []


def test_words_beyond_the_vocabulary_are_named_once_and_signs_count_too(prior, monkeypatch):
    monkeypatch.setattr(prior, "vocabulary", {"words": ["a"]})
    assert prior.unknown_words("A clown a clown, a robot") == ["clown", "robot"]
    assert prior.unknown_words("\N{ROBOT FACE} !!!") == ["\N{ROBOT FACE}", "!!!"]
    assert prior.unknown_words("a") == prior.unknown_words(" ") == []


SYNTAX = {
    "a <lora:bronze:0.8> statue": ["<lora:bronze:0.8>"],
    "<hypernet:x:1>, <lyco:a b:1.0:0.5>": ["<hypernet:x:1>", "<lyco:a b:1.0:0.5>"],
    "a (bronze:1.3) statue": ["(bronze:1.3)"],
    "a (bronze, shiny : .5), (old:-1)": ["(bronze, shiny : .5)", "(old:-1)"],
    "a ((bronze)) statue": ["((bronze))"],
    "a [bronze] statue, [a:b:0.5], [x|y]": ["[bronze]", "[a:b:0.5]", "[x|y]"],
    "a statue BREAK bronze": ["BREAK"],
    "a cat AND a dog": ["AND"],
    r"a statue \(bronze\)": [r"\(", r"\)"],
    "a statue (bronze)": [],
    "a statue (bronze, 12:30)": [],
    "a statue (of 3:2)": [],
    "a statue (ratio 3 to 2), and a dog; a break": [],
    "A CAT AND A DOG": [],
    "<my-style> statue": [],
    "": [],
}


@pytest.mark.parametrize("prompt", [*SYNTAX])
def test_syntax_of_web_uis_is_found_and_plain_english_is_not(prompt):
    assert web_ui_syntax(prompt) == SYNTAX[prompt]


def test_syntax_of_web_uis_is_warned_of_once_in_one_line(prior, recwarn):
    for _ in range(2):
        prior.encode_text(["elf (old:1.3)"])
        prior.condition("elf (old:1.3)")
    (warning,) = recwarn.list
    assert str(warning.message) == (
        "(old:1.3) in the prompt is read as plain words, not as in a web UI"
    )
    with pytest.warns(UserWarning, match="^<lora:x:1> in .*; LoRAs are given with --lora$"):
        prior.encode_text(["elf <lora:x:1>"])


def test_ids_are_those_of_the_tokenizer(prior):
    prompts = ["", "a bronze statue", "a " * 40]
    with pytest.warns(UserWarning, match="too long"):
        ids = clip_tokenize(prior.tokenizer, prompts, 32)
    options = {"padding": "max_length", "max_length": 32, "truncation": True}
    theirs = prior.tokenizer(prompts, **options, return_tensors="pt").input_ids
    assert torch.equal(ids, theirs)


def test_id_that_stands_for_several_becomes_them(prior):
    (plain,) = clip_tokenize(prior.tokenizer, ["ab"], 6).tolist()
    start, a, b, end, *padding = plain
    (ids,) = clip_tokenize(prior.tokenizer, ["ab"], 6, {a: [7, 8]}).tolist()
    assert ids == [start, 7, 8, b, end, *padding[1:]]
