"""Prompts as text encoders take them: token ids, learned words, and what is no plain English.

ids [N, L] are token ids, L the length that a text encoder takes.
"""

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import CLIPTokenizer

# How web UIs weigh, mix and add within a prompt. One pair of parentheses is plain English.
NETWORKS = r"<(?:lora|lyco|locon|hypernet):[^<>]*>"
WEB_UI = re.compile(
    rf"{NETWORKS}"
    r"|\([^()]*[^\s\d()]\s*:\s*[-+]?\d*\.?\d+\s*\)"  # (word:1.3), but not (at 12:30)
    r"|\(\(+[^()]*\)\)+"  # ((word))
    r"|\[[^\[\]]+\]"  # [word], [from:to:when], [one|other]
    r"|\\[()\[\]]"  # \(, which stands for a parenthesis where those have a meaning.
    r"|\bBREAK\b|\bAND\b"
)


def web_ui_syntax(prompt: str) -> list[str]:
    """Return the parts of a prompt that only web UIs understand, such as (word:1.3) or BREAK.

    BREAK and AND are words like any other in a prompt of capitals.
    """
    found = WEB_UI.findall(prompt)
    words = re.sub(NETWORKS, "", prompt)
    return [part for part in found if part not in ("BREAK", "AND") or words != words.upper()]


def unknown_words(prompt: str, known: Collection[str], learned: Collection[str] = ()) -> list[str]:
    """Return the words of a prompt, each once, that are neither among the known nor the learned."""
    for word in learned:
        prompt = re.sub(re.escape(word), " ", prompt, flags=re.IGNORECASE)
    words = re.findall(r"[\w']+", prompt.lower()) or prompt.split()
    return [word for word in dict.fromkeys(words) if word not in known]


def clip_tokenize(
    tokenizer: CLIPTokenizer,
    sentences: list[str],
    length: int,
    several: Mapping[int, Sequence[int]] | None = None,
) -> Tensor:
    """Return token ids [N, length], padded; a sentence that is longer is cut, with a warning.

    What only web UIs understand is warned of, once for each sentence.

    Args:
        tokenizer: CLIP's.
        sentences: The prompts.
        length: Of the ids, start and end mark among them.
        several: What a learned word's id stands for, {id: ids}, where it has several vectors.
    """
    rows = []
    for sentence, ids in zip(sentences, tokenizer(sentences, verbose=False).input_ids, strict=True):
        warn_of_web_ui(sentence)
        ids = [part for i in ids for part in (several or {}).get(i, [i])]
        if len(ids) > length:  # The end mark takes the last place.
            cut = tokenizer.decode(ids[length - 1 : -1])[:40]
            warnings.warn(f"{sentence[:20]!r}... is too long, cut off at {cut!r}", stacklevel=2)
            ids = [*ids[: length - 1], ids[-1]]
        rows.append(ids + [tokenizer.pad_token_id] * (length - len(ids)))
    return torch.tensor(rows)


@lru_cache(maxsize=1000)
def warn_of_web_ui(prompt: str) -> None:
    """Warn of web UI syntax in a prompt, once a process."""
    if found := web_ui_syntax(prompt):
        lora = any(re.fullmatch(NETWORKS, part) for part in found)
        hint = "; LoRAs are given with --lora" if lora else ""
        warnings.warn(
            f"{', '.join(found)[:100]} in the prompt is read as plain words, not as in a web UI"
            f"{hint}",
            stacklevel=3,
        )
