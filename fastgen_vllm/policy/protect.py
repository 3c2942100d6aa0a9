"""Tokens of a prompt that every head keeps because a setting or the request says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.policy.tokens import PROTECTED

_SYSTEM, _USER = "FASTGEN SYSTEM", "FASTGEN USER"
FIRST = 4
"""What a template puts before a system prompt is known by so many tokens; a date may follow."""


@dataclass(frozen=True)
class SystemPrompts:
    """How a chat template writes a system prompt: the tokens that it begins with, and those between
    it and what the user says. Both are empty where that is not known."""

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any) -> SystemPrompts:
        """What the tokenizer's own chat template does."""
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # templates raise errors of their own where they know no system prompt
            return cls()
        before, has_system, rest = text.partition(_SYSTEM)
        between, has_user, _ = rest.partition(_USER)
        if not (has_system and has_user):
            return cls()

        def tokens(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        # Blanks at their ends may be tokens together with what stands beside them.
        found = cls(tokens(before.strip())[:FIRST], tokens(between.strip()))
        return found if found.length(tokens(text)) else cls()

    def length(self, token_ids: Sequence[int]) -> int:
        """Tokens of a prompt before its first user's turn; 0 where it has no system prompt."""
        if not self.end or tuple(token_ids[: len(self.begin)]) != self.begin:
            return 0
        at = -1
        while True:
            try:
                at = token_ids.index(self.end[0], at + 1)
            except ValueError:
                return 0
            if tuple(token_ids[at : at + len(self.end)]) == self.end:
                return at

    def check(self, name: str, protect: Any) -> None:
        """Raises:
        FastGenConfigError: a system prompt is to be protected, and nothing tells where it ends.
        """
        if protect == "system" and not self.end:
            raise FastGenConfigError(
                f"{name}: 'system' needs a chat template with a system prompt, and this model's "
                "tokenizer has none that could be read; name ranges of tokens in fastgen_protect"
            )


def protect(
    token_classes: torch.Tensor, spans: Sequence[tuple[int, int]], limit: float
) -> tuple[torch.Tensor, int]:
    """Mark the tokens of ``spans``, each from its first to before its second number; of more than
    ``limit``, a share of the prompt, the first ones.

    Args:
        token_classes: uint8 ``[n]``; it is left as it is.

    Returns:
        the classes, and how many tokens are marked.
    """
    left = int(limit * len(token_classes))
    marked = torch.zeros(len(token_classes), dtype=torch.uint8)
    for first, end in sorted(spans):
        own = marked[first:end]
        new = (own == 0).nonzero()[:left, 0]
        own[new] = PROTECTED
        left -= len(new)
    count = int((marked != 0).sum())
    return token_classes | marked, count
