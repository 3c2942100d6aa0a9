"""Hybrids: unions of policy components, and the ladders made of them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastgen_vllm.tensors import RATIO_UNIT, ceil_ratio


class Hybrid(BaseModel):
    """A union of policy components; ``frequent`` and ``local`` are r_f and r_l, 0 for neither."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        keeps_something = self.special or self.punctuation or self.frequent or self.local
        if self.full == bool(keeps_something):
            raise ValueError("name at least one component, or 'full' alone")
        return self

    def count(self, component: Literal["frequent", "local"], num_tokens: int) -> int:
        """The tokens that r_f or r_l asks for: ``ceil(r * num_tokens)``."""
        return ceil_ratio(round(getattr(self, component) * RATIO_UNIT), num_tokens)

    @property
    def name(self) -> str:
        """The field's way of writing it, for example ``special+frequent(0.3)``."""
        if self.full:
            return "full"
        parts = [part for part in ("special", "punctuation") if getattr(self, part)]
        parts += [f"{p}({getattr(self, p):g})" for p in ("frequent", "local") if getattr(self, p)]
        return "+".join(parts)

    @property
    def kind(self) -> str:
        """Its components without their ratios, for example ``special+frequent``."""
        parts = ("special", "punctuation", "frequent", "local", "full")
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
