"""Settings of FastGen: engine defaults and per-request overrides, validated once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RATIO_UNIT = 10_000
"""Ratios are whole multiples of 1/10000, so that ``ceil(r * t)`` is exact integer arithmetic."""


KernelChoice = Literal["auto", "native", "reference"]


class FastGenConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range."""


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

    @property
    def name(self) -> str:
        """The field's way of writing it, for example ``special+frequent(0.3)``."""
        if self.full:
            return "full"
        parts = [part for part in ("special", "punctuation") if getattr(self, part)]
        parts += [f"{p}({getattr(self, p):g})" for p in ("frequent", "local") if getattr(self, p)]
        return "+".join(parts)


FULL = Hybrid(full=True)
PAPER_LADDER = (
    Hybrid(special=True),
    Hybrid(special=True, punctuation=True),
    Hybrid(special=True, punctuation=True, frequent=0.3),
    Hybrid(special=True, punctuation=True, frequent=0.3, local=0.3),
    FULL,
)


class FastGenConfig(BaseModel):
    """Engine settings, read from ``additional_config["fastgen"]``.

    Attributes:
        recovery: threshold T, the attention mass a head's policy must keep (0 to 1). At 1.0
            every head keeps everything and nothing is profiled.
        ladder: ``"paper"``, or a list of hybrids; the full policy always ends it.
        group_reduction: how the recoveries of a GQA group become one: ``mean`` or ``min``.
        frequent_score: ``sum`` of attention over queries (the paper), or ``mean`` over the
            queries that could see the key.
        query_sampling: profile every s-th prompt query (1: all of them).
        block_size: tokens per block, and slots per head page.
        min_prompt_tokens: shorter prompts are kept whole.
        kernels: ``auto`` takes the fastest that serve this device and model; ``native`` insists
            on compiled ones; ``reference`` is plain PyTorch.
        extra_special_tokens: strings that count as special tokens beside the tokenizer's.
        debug: audit the page pool after every step (also ``FASTGEN_DEBUG=1``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    recovery: float = Field(default=0.95, ge=0.0, le=1.0)
    ladder: Literal["paper"] | tuple[Hybrid, ...] = "paper"
    group_reduction: Literal["mean", "min"] = "mean"
    frequent_score: Literal["sum", "mean"] = "sum"
    query_sampling: int = Field(default=1, ge=1, le=1024)
    block_size: Literal[8, 16, 32, 64, 128] = 16
    min_prompt_tokens: int = Field(default=64, ge=1)
    kernels: KernelChoice = "auto"
    extra_special_tokens: tuple[str, ...] = ()
    debug: bool = Field(default_factory=lambda: os.environ.get("FASTGEN_DEBUG", "0") == "1")

    @property
    def hybrids(self) -> tuple[Hybrid, ...]:
        """The ladder's hybrids, ending with ``full``."""
        if self.ladder == "paper":
            return PAPER_LADDER
        return (*(h for h in self.ladder if not h.full), FULL)

    @property
    def ladder_name(self) -> str:
        return "paper" if self.ladder == "paper" else " -> ".join(h.name for h in self.hybrids)

    @classmethod
    def from_dict(cls, settings: Any) -> FastGenConfig:
        """Validate ``additional_config["fastgen"]``.

        Raises:
            FastGenConfigError: naming every wrong key, its value and what is allowed.
        """
        if not isinstance(settings, Mapping):
            raise FastGenConfigError(
                f"additional_config['fastgen'] must be an object of settings, got {settings!r}"
            )
        values = dict(settings)
        for key in ("ladder", "extra_special_tokens"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        if isinstance(values.get("ladder"), tuple):
            if not values["ladder"]:
                raise FastGenConfigError('fastgen.ladder: an empty list; give hybrids or "paper"')
            values["ladder"] = tuple(_hybrid(h, i) for i, h in enumerate(values["ladder"]))
        try:
            return cls(**values)
        except ValidationError as error:
            raise FastGenConfigError(_explain(error, "fastgen", cls)) from None


def _hybrid(value: Any, index: int) -> Hybrid:
    if isinstance(value, Hybrid):
        return value
    where = f"fastgen.ladder[{index}]"
    if not isinstance(value, Mapping):
        raise FastGenConfigError(f"{where}: {value!r} is not an object such as {{'special': true}}")
    try:
        return Hybrid(**value)
    except ValidationError as error:
        raise FastGenConfigError(_explain(error, where, Hybrid)) from None


class RequestOverride(BaseModel):
    """What one request may change, in ``SamplingParams.extra_args`` or ``vllm_xargs``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    fastgen_recovery: float | None = Field(default=None, ge=0.0, le=1.0)
    fastgen_compress: bool = True

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestOverride:
        """Read the ``fastgen_*`` keys and leave the rest alone.

        Raises:
            FastGenConfigError: naming the key, its value and what is allowed.
        """
        ours = {k: v for k, v in (extra_args or {}).items() if k.startswith("fastgen")}
        try:
            return cls(**ours)
        except ValidationError as error:
            raise FastGenConfigError(_explain(error, "request", cls)) from None


def _explain(error: ValidationError, prefix: str, model: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("tuple["))
        where = f"{prefix}.{key}" if key else prefix
        if problem["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            lines.append(f"{where}: unknown key; known keys: {known}")
        else:
            lines.append(f"{where}: got {problem['input']!r}. {problem['msg']}")
    return "invalid FastGen setting: " + "; ".join(lines)
