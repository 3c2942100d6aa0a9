"""Hybrids: unions of policy components, the ladders made of them, and heads' numbers from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastgen_vllm.kernels.contract import UNBOUNDED, HeadRules
from fastgen_vllm.policy.tokens import CLASS_BITS, PROTECTED, TOKEN_CLASSES
from fastgen_vllm.reads import Work, figures
from fastgen_vllm.tensors import RATIO_UNIT, ceil_ratio, to_device


class Hybrid(BaseModel):
    """A union of policy components; ``frequent`` and ``local`` are r_f and r_l, 0 for neither."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    special: bool = False
    punctuation: bool = False
    frequent: float = Field(default=0.0, ge=0.0, le=1.0)
    local: float = Field(default=0.0, ge=0.0, le=1.0)
    full: bool = False

    @model_validator(mode="after")
    def _check(self) -> Hybrid:
        for name in ("frequent", "local"):
            ratio = getattr(self, name) * RATIO_UNIT
            if abs(ratio - round(ratio)) > 1e-6:
                raise ValueError(f"{name} must be a multiple of {1 / RATIO_UNIT}")
        keeps_something = self.sticky_kinds or self.frequent or self.local
        if self.full == bool(keeps_something):
            raise ValueError("name at least one component, or 'full' alone")
        return self

    def count(self, component: Literal["frequent", "local"], num_tokens: int) -> int:
        """The tokens that r_f or r_l asks for: ``ceil(r * num_tokens)``."""
        return ceil_ratio(self.units(component), num_tokens)

    def units(self, component: Literal["frequent", "local"]) -> int:
        """r_f or r_l in units of 1/10000."""
        return round(getattr(self, component) * RATIO_UNIT)

    @property
    def sticky_kinds(self) -> int:
        """The bits of the token classes that it keeps for good."""
        return sum(CLASS_BITS[name] for name in TOKEN_CLASSES if getattr(self, name))

    @property
    def name(self) -> str:
        """The field's way of writing it, for example ``special+frequent(0.3)``."""
        if self.full:
            return "full"
        parts = [part for part in TOKEN_CLASSES if getattr(self, part)]
        parts += [f"{p}({getattr(self, p):g})" for p in ("frequent", "local") if getattr(self, p)]
        return "+".join(parts)

    @property
    def kind(self) -> str:
        """Its components without their ratios, for example ``special+frequent``."""
        parts = (*TOKEN_CLASSES, "frequent", "local", "full")
        return "+".join(part for part in parts if getattr(self, part))


FULL = Hybrid(full=True)
PAPER_LADDER = (
    Hybrid(special=True),
    Hybrid(special=True, punctuation=True),
    Hybrid(special=True, punctuation=True, frequent=0.3),
    Hybrid(special=True, punctuation=True, frequent=0.3, local=0.3),
    FULL,
)
FREQUENT_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
ADAPTIVE_LADDER = (
    Hybrid(special=True),
    *(Hybrid(special=True, frequent=f, local=f / 2) for f in FREQUENT_RATIOS),
    FULL,
)
"""Special tokens are few, and attention sinks are among them: they always stay."""


@dataclass(frozen=True)
class Ladder:
    """A ladder of ``C`` hybrids, ``full`` last, and the numbers that their heads get.

    Attributes:
        least_window: tokens; the local window is never narrower. At least 1, since a query always
            sees itself.
        rules: tensors ``[C]``.
    """

    hybrids: tuple[Hybrid, ...]
    least_window: int
    rules: HeadRules

    @classmethod
    def from_hybrids(
        cls,
        hybrids: Sequence[Hybrid],
        least_window: int,
        averages: bool = False,
        device: torch.device | str = "cpu",
        decode_window: int = 1,
        decay: float = 0.0,
    ) -> Ladder:
        """``averages``: scores are compared divided by the queries that saw the token.
        ``decode_window``: while decoding the local window is never narrower, ``least_window`` being
        that of the prompt. ``decay``: of scores, see ``HeadRules``."""
        columns = zip(
            *(
                (
                    hybrid.sticky_kinds if hybrid.full else hybrid.sticky_kinds | PROTECTED,
                    hybrid.units("frequent"),
                    hybrid.units("local"),
                    UNBOUNDED if hybrid.full else max(least_window, decode_window),
                    hybrid.frequent > 0,
                    averages,
                    decay,
                )
                for hybrid in hybrids
            ),
            strict=True,
        )
        empty = HeadRules.zeros((0,), torch.device("cpu"))
        typed = zip(columns, empty.tensors(), strict=True)
        tensors = (torch.tensor(column, dtype=like.dtype) for column, like in typed)
        rules = HeadRules(*(to_device(tensor, torch.device(device)) for tensor in tensors))
        return cls(tuple(hybrids), least_window, rules)

    @property
    def is_full(self) -> torch.Tensor:
        """bool ``[C]``."""
        return self.rules.least_window == UNBOUNDED

    def widths(self, num_tokens: int) -> list[int]:
        """The width of every hybrid's local window in a prompt of ``num_tokens``."""
        return [
            min(max(h.count("local", num_tokens), self.least_window), num_tokens)
            for h in self.hybrids
        ]

    def windows(self, num_tokens: int) -> list[int]:
        """Distinct widths of the local windows of hybrids that are not full, ascending."""
        widths = zip(self.hybrids, self.widths(num_tokens), strict=True)
        return sorted({width for h, width in widths if not h.full}) or [num_tokens]


def hybrids_of(rules: HeadRules) -> Work[list[Hybrid]]:
    """The policy of every head, from its numbers, in the order of ``flatten()``."""
    numbers = (rules.sticky_kinds, rules.frequent, rules.local, rules.least_window)
    asked = yield from figures(torch.stack([tensor.flatten().int() for tensor in numbers], dim=-1))
    rows = iter(map(int, asked))
    return [_hybrid_of(*row) for row in zip(rows, rows, rows, rows, strict=True)]


@lru_cache(maxsize=1 << 14)
def _hybrid_of(sticky_kinds: int, frequent: int, local: int, least_window: int) -> Hybrid:
    if least_window == UNBOUNDED:
        return FULL
    classes = {name: bool(sticky_kinds & bit) for name, bit in CLASS_BITS.items()}
    return Hybrid(**classes, frequent=frequent / RATIO_UNIT, local=local / RATIO_UNIT)
