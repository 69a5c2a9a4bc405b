"""Prompts: token ids, learned words, and what is no plain English."""

import pytest
import torch

from models.diffusion import DiffusionPrior
from models.prompts import clip_tokenize


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
