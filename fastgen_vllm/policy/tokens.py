"""Which vocabulary entries are special tokens, which are punctuation."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgen_vllm.errors import FastGenConfigError


def is_punctuation(text: str) -> bool:
    """Whether ``text``, stripped, is made of Unicode category P characters only."""
    stripped = text.strip()
    return bool(stripped) and all(unicodedata.category(char).startswith("P") for char in stripped)


@dataclass(frozen=True)
class TokenFlags:
    """Lookup by token id. ``special`` and ``punctuation``: bool ``[vocab_size]``."""

    special: torch.Tensor
    punctuation: torch.Tensor

    def to(self, device: torch.device) -> TokenFlags:
        """The same flags there."""
        return TokenFlags(self.special.to(device), self.punctuation.to(device))

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, vocab_size: int, extra_special_tokens: Sequence[str] = ()
    ) -> TokenFlags:
        """Read a Hugging Face tokenizer.

        Special tokens are its BOS, EOS and the like, and every added token marked special
        (chat-template markers among them). A token that holds only part of a character's
        bytes decodes to U+FFFD and is not punctuation.

        Raises:
            FastGenConfigError: an entry of ``extra_special_tokens`` is not one token.
        """
        size = max(vocab_size, len(tokenizer))
        special_ids = set(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special_ids.update(index for index, token in added.items() if token.special)
        for token in extra_special_tokens:
            ids = tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1:
                raise FastGenConfigError(
                    f"fastgen.extra_special_tokens: {token!r} is {len(ids)} tokens for this "
                    "tokenizer; give strings that are one token each"
                )
            special_ids.add(ids[0])
        texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        special = torch.zeros(size, dtype=torch.bool)
        special[sorted(special_ids)] = True
        punctuation = torch.zeros(size, dtype=torch.bool)
        punctuation[: len(texts)] = torch.tensor([is_punctuation(text) for text in texts])
        return cls(special, punctuation & ~special)
