"""kvpress, the library that most peers come with, measured as a ``Lab`` measures our own methods.

It wants an older transformers than vLLM does, so it runs in a process under a Python of its own.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from fastgen_vllm.tools.child import Child
from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.lab import Lab

KVPRESS_VERSION = "0.5.5"
PRESSES = {
    "SnapKV": "snapkv",
    "TOVA": "tova",
    "PyramidKV": "pyramidkv",
    "AdaKV": "adakv",
    "CriticalAdaKV": "criticalkv",
    "ExpectedAttention": "expected_attention",
    "KeyDiff": "keydiff",
}
"""kvpress's presses by name, and our own method of that definition."""

HOW_TO_MAKE = (
    "Make one: python3 -m venv .kvpress && "
    f".kvpress/bin/pip install kvpress=={KVPRESS_VERSION}; then give .kvpress/bin/python."
)


@dataclass(frozen=True)
class PressVariant:
    """A press at one share of the cache; without one, the full cache."""

    press: str | None
    budget: float

    @property
    def name(self) -> str:
        return f"kvpress {self.press}, budget {self.budget:g}" if self.press else "kvpress full"


@dataclass(frozen=True)
class Kvpress:
    """What is compared, the full cache first, and the Python that has it."""

    python: Path
    variants: Sequence[PressVariant]


def of(python: Path, budgets: Sequence[float]) -> Kvpress:
    """All presses over the budgets.

    Raises:
        InputError: this is no Python that has kvpress.
    """
    try:
        asked = "import importlib.metadata as m; print('kvpress', m.version('kvpress'))"
        asking = [str(python), "-I", "-c", asked]
        said = subprocess.run(asking, check=True, capture_output=True, text=True).stdout
        if not said.startswith("kvpress "):
            raise OSError
    except (OSError, ValueError, subprocess.CalledProcessError):
        raise InputError(
            f"--kvpress {python} is not a Python with kvpress. {HOW_TO_MAKE}"
        ) from None
    presses = [PressVariant(press, budget) for budget in budgets for press in PRESSES]
    return Kvpress(python, [PressVariant(None, 1.0), *presses])


class KvpressLab:
    """What ``Lab`` offers to the tasks, with kvpress's caches and attention.

    Args:
        lab: of the same model; its tokenizer and what ends an answer serve here too.
    """

    def __init__(self, model: str, kvpress: Kvpress, lab: Lab) -> None:
        self.variants = list(kvpress.variants)
        self.tokenizer, self.end_tokens = lab.tokenizer, lab.end_tokens
        self._shape = (len(self.variants), lab.model.config.vocab_size)
        size = self._shape[0] * self._shape[1]
        self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._file.truncate(4 * size)
        self._shared = torch.from_file(self._file.name, shared=True, size=size).view(self._shape)
        self._child = Child("kvpress", Path(__file__).with_name("kvpress_child.py"), kvpress.python)
        wanted = [(v.press, v.budget) for v in self.variants]
        self.version = self._child.ask(
            {"model": model, "variants": wanted, "logits": self._file.name}
        )
        self.logits = self._first = torch.empty(0)
        self._shares: dict[str, list[float]] = {}

    def prefill(self, tokens: list[int]) -> None:
        """As ``Lab.prefill``."""
        self._shares = self._ask("prefill", tokens)
        self._first = self.logits

    def fork(self) -> None:
        """As ``Lab.fork``."""
        self._ask("fork", None)
        self.logits = self._first

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """As ``Lab.decode``."""
        self._ask("decode", list(tokens))
        return self.logits

    def kept_ratio(self) -> torch.Tensor:
        """float32 ``[variants]``: the share of the prompt that queries see."""
        return torch.tensor(self._shares["slots"])

    def page_ratio(self) -> torch.Tensor:
        """float32 ``[variants]``: the share of the prompt in memory. Where heads of a layer keep
        different keys, kvpress hides those that are dropped and frees nothing."""
        return torch.tensor(self._shares["memory"])

    def kept_positions(self, name: str) -> list[list[set[int]]]:
        """Positions of the prompt that queries see, by layer and head."""
        index = [v.name for v in self.variants].index(name)
        return [[set(head) for head in layer] for layer in self._ask("kept", index)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._child.__exit__(*error)
        self._file.close()

    def _ask(self, what: str, argument: Any) -> Any:
        answer = self._child.ask([what, argument])
        self.logits = self._shared.clone()
        return answer
