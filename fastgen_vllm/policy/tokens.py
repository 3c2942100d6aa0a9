"""Token classes: which vocabulary entries are special tokens, which are punctuation."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgen_vllm.errors import FastGenConfigError


def is_punctuation(text: str) -> bool:
    """Whether ``text``, stripped, is made of Unicode category P characters only."""
    stripped = text.strip()
    return bool(stripped) and all(unicodedata.category(char).startswith("P") for char in stripped)


TEXT_CLASSES: dict[str, Callable[[str], bool]] = {"punctuation": is_punctuation}
"""Classes that a token's text decides. Special tokens are in none of them."""

TOKEN_CLASSES = ("special", *TEXT_CLASSES)
"""Every class. A policy may keep a class's tokens for good: ``Hybrid`` has a field for each."""

CLASS_BITS = {name: 1 << i for i, name in enumerate(TOKEN_CLASSES)}
"""A class's bit in a byte of token classes, which is all that kernels know of it."""

PROTECTED = 1 << 7
"""The bit of prompt tokens that every policy keeps for good: see ``policy/protect.py``."""


def token_classes(
    tokenizer: Any, vocab_size: int, extra_special_tokens: Sequence[str] = ()
) -> torch.Tensor:
    """A byte of class bits for every token id of a Hugging Face tokenizer: uint8 ``[vocab_size]``
    or more.

    Special tokens are its BOS, EOS and the like, and every added token marked special (such as
    chat-template markers). A token that holds only part of a character's bytes decodes to U+FFFD,
    which is not punctuation.

    Raises:
        FastGenConfigError: an entry of ``extra_special_tokens`` is not one token.
    """
    special = _special_ids(tokenizer, extra_special_tokens)
    # A vocabulary may have holes, so that ids go beyond its length.
    size = max(vocab_size, len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    classes = torch.zeros(size, dtype=torch.uint8)
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    for name, belongs in TEXT_CLASSES.items():
        classes[: len(texts)] |= CLASS_BITS[name] * torch.tensor(
            [belongs(text) for text in texts], dtype=torch.uint8
        )
    classes[sorted(special)] = CLASS_BITS["special"]
    return classes


def _special_ids(tokenizer: Any, extra_special_tokens: Sequence[str]) -> set[int]:
    found = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found.update(index for index, token in added.items() if token.special)
    for token in extra_special_tokens:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise FastGenConfigError(
                f"fastgen.extra_special_tokens: {token!r} is {len(ids)} tokens for this "
                "tokenizer; give strings that are one token each"
            )
        found.add(ids[0])
    return found
