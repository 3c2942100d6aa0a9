"""Settings of FastGen: engine defaults and per-request overrides, validated once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.policy.choice import Goal, Profiling, QueryWeighting
from fastgen_vllm.policy.hybrids import ADAPTIVE_LADDER, FULL, PAPER_LADDER, Hybrid, Ladder
from fastgen_vllm.policy.methods import METHODS
from fastgen_vllm.policy.methods.fastgen import PAPER_PROFILING

KernelChoice = Literal["auto", "native", "cuda", "reference"]
MOST_TOKENS = 1 << 24
"""More than any prompt has."""


class FastGenConfig(BaseModel):
    """Engine settings, read from ``additional_config["fastgen"]``.

    Attributes:
        kv_budget: the share of the full cache's memory that a prompt may keep, spread over its
            layers and heads so that most attention is recovered. The default, where ``recovery``
            is not given either, is 0.4 with the adaptive ladder.
        recovery: or a threshold T, the attention mass a head's policy must keep (0 to 1). At 1.0
            every head keeps everything and nothing is profiled. 0.95 is the default of other
            ladders.
        method: ``fastgen``, or a method of the literature for comparison, which needs
            ``kv_budget``: see ``fastgen_vllm/policy/methods/``.
        ladder: ``"adaptive"``, rising ratios; ``"paper"``; or a list of hybrids. The full policy
            always ends it.
        group_reduction: how the recoveries of a GQA group become one: ``mean`` or ``min``.
        frequent_score: ``sum`` of attention over queries (the paper), or ``mean`` over the
            queries that could see the key.
        query_weighting, observation_window, score_pooling, least_window, num_sinks,
            value_weighting: see ``Profiling``. None takes what suits the ladder or method; for
            the paper's ladder that is the paper's plain attention mass.
        query_sampling: profile every s-th of the prompt queries that the weighting looks at.
        block_size: tokens per block, and slots per head page.
        min_prompt_tokens: shorter prompts are kept whole, and a budget leaves a longer one the
            memory of at least so many tokens.
        kernels: ``auto`` takes the fastest that serve this device and model; ``native`` insists
            on compiled ones; ``reference`` is plain PyTorch.
        extra_special_tokens: strings that count as special tokens beside the tokenizer's.
        debug: audit the page pool after every step (also ``FASTGEN_DEBUG=1``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kv_budget: float | None = Field(default=None, gt=0.0, le=1.0)
    recovery: float | None = Field(default=None, ge=0.0, le=1.0)
    method: str = "fastgen"
    ladder: Literal["adaptive", "paper"] | tuple[Hybrid, ...] = "adaptive"
    group_reduction: Literal["mean", "min"] = "mean"
    frequent_score: Literal["sum", "mean"] = "sum"
    query_weighting: QueryWeighting | None = None
    observation_window: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    score_pooling: int | None = Field(default=None, ge=1, le=255)
    least_window: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    num_sinks: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    value_weighting: bool | None = None
    query_sampling: int = Field(default=1, ge=1, le=1024)
    block_size: Literal[8, 16, 32, 64, 128] = 16
    min_prompt_tokens: int = Field(default=256, ge=1)
    kernels: KernelChoice = "auto"
    extra_special_tokens: tuple[str, ...] = ()
    debug: bool = Field(default_factory=lambda: os.environ.get("FASTGEN_DEBUG", "0") == "1")

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"Take one of {', '.join(map(repr, METHODS))}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _default_goal(cls, values: dict[str, Any]) -> dict[str, Any]:
        if any(values.get(name) is not None for name in ("kv_budget", "recovery")):
            return values
        if values.get("method", "fastgen") != "fastgen":
            return values
        adaptive = values.get("ladder", "adaptive") == "adaptive"
        return {**values, **({"kv_budget": 0.4} if adaptive else {"recovery": 0.95})}

    @model_validator(mode="after")
    def _check(self) -> FastGenConfig:
        if self.method != "fastgen" and self.recovery is not None:
            raise ValueError(f"method {self.method!r} takes a kv_budget in place of recovery")
        if self.kv_budget is not None and self.recovery is not None:
            raise ValueError("give kv_budget or recovery, not both")
        if self.method != "fastgen" and self.kv_budget is None:
            raise ValueError(f"method {self.method!r} needs a kv_budget, for example 0.3")
        if self.score_pooling is not None and self.score_pooling % 2 == 0:
            raise ValueError(f"score_pooling {self.score_pooling} is even; take an odd number")
        if self.frequent_score == "mean" and self.profiling.weighting != "uniform":
            raise ValueError(
                "frequent_score 'mean' goes with query_weighting 'uniform' only; "
                "set that too, or take 'sum'"
            )
        return self

    @property
    def hybrids(self) -> tuple[Hybrid, ...]:
        """The ladder's hybrids, ending with ``full``."""
        if self.method != "fastgen":
            assert self.kv_budget is not None
            return METHODS[self.method].hybrids(self.kv_budget)
        if self.ladder == "adaptive":
            return ADAPTIVE_LADDER
        if self.ladder == "paper":
            return PAPER_LADDER
        return (*(h for h in self.ladder if not h.full), FULL)

    def ladder_on(self, device: torch.device | str = "cpu") -> Ladder:
        """The ladder, with its heads' numbers on a device."""
        averages = self.frequent_score == "mean"
        return Ladder.from_hybrids(self.hybrids, self.profiling.least_window, averages, device)

    @property
    def ladder_name(self) -> str:
        if isinstance(self.ladder, str):
            return self.ladder
        return " -> ".join(h.name for h in self.hybrids)

    @property
    def target(self) -> str:
        """The budget or the threshold."""
        if self.kv_budget is not None:
            return f"kv_budget {self.kv_budget:g}"
        return f"recovery {self.recovery:.4g}"

    @property
    def description(self) -> str:
        """What a prompt is compressed to, for the log."""
        if self.method != "fastgen":
            return f"method {self.method}, {self.target}"
        return f"{self.target}, ladder {self.ladder_name}"

    @property
    def profiling(self) -> Profiling:
        """The settings, with what suits the ladder or method where they are None."""
        preset = METHODS[self.method].profiling
        if self.method == "fastgen" and self.ladder != "adaptive":
            preset = PAPER_PROFILING
        given = {
            "weighting": self.query_weighting,
            "window": self.observation_window,
            "pooling": self.score_pooling,
            "least_window": self.least_window,
            "num_sinks": self.num_sinks,
            "value_weighting": self.value_weighting,
        }
        return replace(preset, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]

    def goal_of(self, override: RequestOverride) -> Goal:
        """The request's own goal, or the engine's."""
        threshold, budget = override.fastgen_recovery, override.fastgen_kv_budget
        if threshold is None and budget is None:
            threshold, budget = self.recovery, self.kv_budget
        return Goal(threshold, budget, self.min_prompt_tokens)

    def check_override(self, override: RequestOverride) -> None:
        """Raises:
        FastGenConfigError: a goal of its own, where the engine runs a method whose goal is fixed.
        """
        goals = {
            name: getattr(override, name) for name in ("fastgen_recovery", "fastgen_kv_budget")
        }
        for name, value in goals.items():
            if value is not None and self.method != "fastgen":
                raise FastGenConfigError(
                    f"request.{name}: {value} cannot change method {self.method!r}, whose "
                    "kv_budget is fixed at start-up; leave it out"
                )

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
        values = _named(settings, "fastgen")
        for key in ("ladder", "extra_special_tokens"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        ladder = values.get("ladder", "adaptive")
        if not isinstance(ladder, tuple) and ladder not in ("adaptive", "paper"):
            raise FastGenConfigError(
                f"fastgen.ladder: got {ladder!r}; give 'adaptive' or 'paper', or a list of hybrids"
            )
        if not isinstance(values.get("extra_special_tokens", ()), tuple):
            got = values["extra_special_tokens"]
            raise FastGenConfigError(
                f"fastgen.extra_special_tokens: got {got!r}; give a list of strings"
            )
        if isinstance(values.get("ladder"), tuple):
            if not values["ladder"]:
                raise FastGenConfigError(
                    'fastgen.ladder: an empty list; give hybrids, "adaptive" or "paper"'
                )
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
        return Hybrid(**_named(value, where))
    except ValidationError as error:
        raise FastGenConfigError(_explain(error, where, Hybrid)) from None


class RequestOverride(BaseModel):
    """What one request may change, in ``SamplingParams.extra_args`` or ``vllm_xargs``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    fastgen_recovery: float | None = Field(default=None, ge=0.0, le=1.0)
    fastgen_kv_budget: float | None = Field(default=None, gt=0.0, le=1.0)
    fastgen_compress: bool = True

    @field_validator("fastgen_compress", mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        # vLLM types vllm_xargs as str, int, float or list, so false arrives as 0 over HTTP.
        return bool(value) if type(value) in (int, float) and value in (0, 1) else value

    @model_validator(mode="after")
    def _check(self) -> RequestOverride:
        if self.fastgen_recovery is not None and self.fastgen_kv_budget is not None:
            raise ValueError("give fastgen_recovery or fastgen_kv_budget, not both")
        return self

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> RequestOverride:
        """Read the ``fastgen_*`` keys and leave the rest alone.

        Raises:
            FastGenConfigError: naming the key, its value and what is allowed.
        """
        ours = {k: v for k, v in (extra_args or {}).items() if str(k).startswith("fastgen")}
        try:
            return cls(**ours)
        except ValidationError as error:
            raise FastGenConfigError(_explain(error, "request", cls)) from None


def _named(settings: Mapping[Any, Any], where: str) -> dict[str, Any]:
    for key in settings:
        if not isinstance(key, str):
            raise FastGenConfigError(f"{where}: {key!r} is no name of a setting; names are strings")
    return dict(settings)


def _explain(error: ValidationError, prefix: str, model: type[BaseModel]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("tuple["))
        where = f"{prefix}.{key}" if key else prefix
        if problem["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            lines.append(f"{where}: unknown key; known keys: {known}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: got {problem['input']!r}. {message}")
    return "invalid FastGen setting: " + "; ".join(lines)
