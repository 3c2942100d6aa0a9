"""What the prompts of ``fastgen eval`` are made of, and what a prompt is."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.texts import texts_in

Half = Literal["first", "second"]


@dataclass(frozen=True)
class Item:
    """One prompt of a task.

    Attributes:
        kind: what is shown apart within a task, for example the language.
        length: tokens that were asked for.
        target: the true continuation, where there is one; else answers are the model's own.
        most_tokens: of an answer.
        right: whether an answer is right, where a program can say.
        gist: what of two answers must be equal for them to be the same; the whole where None.
    """

    task: str
    kind: str
    length: int
    prompt: list[int]
    target: list[int] = field(default_factory=list)
    most_tokens: int = 64
    right: Callable[[str], bool] | None = None
    gist: Callable[[str], Any] | None = None


@dataclass(frozen=True)
class Load:
    """How many prompts of each task, for each length in tokens."""

    lengths: tuple[int, ...]
    counts: dict[str, int]
    half: Half = "second"


class Material:
    """What prompts are made of: one half of the texts, files, functions and words there are, so
    that settings can be chosen on the other.

    Attributes:
        rng: of this half, the same on every machine.
    """

    def __init__(self, tokenizer: Any, texts: Path, half: Half) -> None:
        self.tokenizer, self._texts = tokenizer, texts
        self._start = ("first", "second").index(half)
        self.rng = random.Random(half)

    def own(self, everything: list[Any]) -> list[Any]:
        """Every second one."""
        return everything[self._start :: 2]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def chat(self, *turns: tuple[str, str]) -> list[int]:
        """Roles and what they say, up to where the assistant answers."""
        messages = [{"role": role, "content": text} for role, text in turns]
        made = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.encode(made)

    @cached_property
    def streams(self) -> dict[str, list[int]]:
        """Natural texts by language, one after the other."""
        return {
            language: self.encode("\n\n".join(self.own(texts_in(self._texts, language))))
            for language in ("english", "korean")
        }

    @cached_property
    def files(self) -> list[str]:
        """Modules of Python's own library, in random order."""
        folder = Path(sysconfig.get_path("stdlib"))
        paths = self.own(sorted(folder.glob("*.py")))
        self.rng.shuffle(paths)
        return [path.read_text(encoding="utf-8") for path in paths]

    def stretch(self, language: str, size: int, where: float) -> list[int]:
        """Tokens of natural text, from 0 at the beginning to 1.

        Raises:
            InputError: there is not so much of it.
        """
        stream = self.streams[language]
        if len(stream) < size:
            raise InputError(
                f"The {language} texts have {len(stream)} tokens in each half, and a prompt needs "
                f"{size}. Add texts or take a smaller --length."
            )
        start = int(where * (len(stream) - size))
        return stream[start : start + size]

    def text(self, language: str, size: int, where: float) -> str:
        return self.tokenizer.decode(self.stretch(language, size, where))
