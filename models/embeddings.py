"""Textual inversion: learned words, added to a tokenizer and a text encoder.

A learned word is a name and its vectors [n, D]. In a prompt the name stands for all of them.
"""

import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from models.pretrained import one_line_errors, quiet_loading
from models.weight_files import fetch_weights, find_weights, kind_of_weights, read_weights

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")  # As diffusers calls them.
SUFFIXES = (".safetensors", ".bin", ".pt")


def add_embedding(
    source: str | Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> dict[str, list[int]]:
    """Add a learned word, as diffusers' load_textual_inversion() does.

    Args:
        source: File, folder or hub id (user/repo or user/repo/file), in the format of A1111
            (`string_to_param` or `emb_params`) or of diffusers ({word: vectors}).
        tokenizer: Gets a token `word`, and `word_1`, `word_2` and so on for further vectors.
        text_encoder: Gets the vectors.

    Returns:
        {word: ids of its tokens}. The word is the one that the file names, else the file's name.

    Raises:
        ValueError: it is absent, no embedding or of another model, or the word is taken; one line.
    """
    root, subfolder, name = find_weights(source, "", "*", *FILES, suffixes=SUFFIXES)
    with one_line_errors(root, os.path.join(subfolder, name)), quiet_loading():
        word, vectors = read_embedding(fetch_weights(root, subfolder, name))
        table = text_encoder.get_input_embeddings().weight
        if vectors.shape[1] != table.shape[1]:
            raise ValueError(
                f"is of another model: its vectors have width {vectors.shape[1]}, those of the "
                f"text encoder {table.shape[1]} (768 in Stable Diffusion 1.x, 1024 in 2.x)"
            )
        tokens = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
        taken = tokenizer.get_vocab().keys() & {*tokens, f"{word}_1"}
        if taken:
            raise ValueError(f"its word {min(taken)!r} is taken; rename the word or the file")
        tokenizer.add_tokens(tokens)
        ids = tokenizer.convert_tokens_to_ids(tokens)
        if max(ids) >= len(table):
            text_encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight
        with torch.no_grad():
            table[ids] = vectors.to(table)
        return {word: ids}


def read_embedding(file: str) -> tuple[str, Tensor]:
    """Return the word and the vectors [n, D] of a file.

    Raises:
        ValueError: it holds none, several, or NaNs; the message names no file.
    """
    content, _ = read_weights(file)
    word = Path(file).stem
    if isinstance(content, dict) and "string_to_param" in content:
        named = content.get("name")
        word = named if isinstance(named, str) and named.strip() else word
        content = content["string_to_param"]
        content = next(iter(content.values())) if isinstance(content, dict) and content else None
    elif isinstance(content, dict) and "emb_params" in content:
        content = content["emb_params"]
    elif isinstance(content, dict) and content.keys() & {"clip_l", "clip_g"}:
        raise ValueError("is an embedding for Stable Diffusion XL or 3 (clip_l, clip_g)")
    elif isinstance(content, dict):
        if len(content) != 1 or not isinstance(next(iter(content)), str):
            kind = kind_of_weights(content) or f"{len(content)} things"
            raise ValueError(f"holds {kind}, not one textual inversion embedding")
        word, content = next(iter(content.items()))
    if not isinstance(content, Tensor) or content.ndim not in (1, 2) or not content.numel():
        raise ValueError("holds no textual inversion embedding: no vectors [n, width]")
    if not content.is_floating_point() or not content.isfinite().all():
        raise ValueError("its vectors are not finite numbers")
    if not word.strip() or word != word.strip():
        raise ValueError(f"its word is {word!r}")
    return word, content.detach().reshape(-1, content.shape[-1]).float()
