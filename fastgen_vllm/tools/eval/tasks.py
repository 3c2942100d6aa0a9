"""The tasks of ``fastgen eval``, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastgen_vllm.tools.eval import chats, natural
from fastgen_vllm.tools.eval.material import Item, Load, Material

TASKS: dict[str, Callable[[Material, int, int, float], Item]] = {
    task.__name__: task for task in (*natural.TASKS, *chats.TASKS)
}
"""Each makes the ``i``-th prompt of a length; ``where``, from 0 to 1, is its place among them."""


def items(tokenizer: Any, texts: Path, load: Load) -> Iterator[Item]:
    """All prompts, the same on every machine.

    Raises:
        InputError: the texts are too short.
    """
    material = Material(tokenizer, texts, load.half)
    for length in load.lengths:
        for task, count in load.counts.items():
            for i in range(count):
                yield TASKS[task](material, length, i, (i + 0.5) / count)
