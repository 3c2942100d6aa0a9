"""Settings of FastGen: engine defaults and per-request overrides, validated once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
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

from fastgen_vllm.errors import FastGenConfigError, shorten
from fastgen_vllm.policy.choice import Goal, Profiling, QueryWeighting
from fastgen_vllm.policy.hybrids import ADAPTIVE_LADDER, FULL, PAPER_LADDER, Hybrid, Ladder
from fastgen_vllm.policy.methods import LADDER, METHODS, PAPER_PROFILING, PEAKS, Method
from fastgen_vllm.policy.tokens import PROTECTED
from fastgen_vllm.profiler.queries import queries_looked_at

KernelChoice = Literal["auto", "native", "cuda", "reference"]
MOST_TOKENS = 1 << 24
"""More than any prompt has."""

BUDGET, LADDER_BUDGET = 0.25, 0.4
"""The default budget, and that of the adaptive ladder: see docs/results/quality.md."""

WHY_WHOLE = ("asked", "short", "waits", "needed")
"""Why all of a prompt was kept: the request or the settings want it, it is short, it waits for
memory to run short, or there was nothing to leave out."""


@dataclass(frozen=True)
class Plan:
    """How prompts with one kind of goal are profiled and compressed."""

    method: Method
    profiling: Profiling
    ladder: Ladder

    @property
    def sticky_kinds(self) -> int:
        """Bits of the token classes that the ladder's first heads keep for good."""
        return self.ladder.hybrids[0].sticky_kinds | PROTECTED


class FastGenConfig(BaseModel):
    """Engine settings, read from ``additional_config["fastgen"]``.

    Attributes:
        kv_budget: the share of the full cache's memory that a prompt may keep, spread over its
            layers and heads. Where ``recovery`` is not given either, the default is ``BUDGET``, or
            ``LADDER_BUDGET`` with the adaptive ladder.
        recovery: or a threshold T, the attention mass a head's policy must keep (0 to 1). At 1.0
            every head keeps everything and nothing is profiled. 0.95 is the default of ladders
            other than the adaptive one.
        method: ``fastgen``, or a method of the literature for comparison, which needs
            ``kv_budget``: see ``fastgen_vllm/policy/methods/``.
        ladder: what a head chooses its policy from: ``"adaptive"``, rising ratios; ``"paper"``; or
            a list of hybrids. The full policy always ends it. Where it is not given, each head
            gets a share of its own of a budget, and a recovery takes the adaptive ladder.
        group_reduction: how the recoveries of a GQA group become one for a ladder: ``mean`` or
            ``min``.
        frequent_score: ``sum`` of attention over queries (the paper), or ``mean`` over the
            queries that could see the key.
        query_weighting, observation_window, score_pooling, least_window, num_sinks, decode_window,
            value_weighting: see ``Profiling``. None takes what suits the ladder or method; for
            the paper's ladder that is the paper's plain attention mass.
        query_sampling: profile every s-th of the prompt queries that the weighting looks at.
        block_size: tokens per block, and slots per head page.
        min_prompt_tokens: shorter prompts are kept whole, and a budget leaves a longer one the
            memory of at least so many tokens.
        compress: ``always``, where a prompt ends; or under ``pressure``, with a budget and no
            ladder: everything is kept until blocks run short.
        compact_every: with a budget and no ladder, a request that is compressed always is compacted
            again, to the budget of its length by then, whenever it has generated so many tokens,
            and sooner where blocks run short; 0 for never.
        kernels: ``auto`` takes the fastest that serve this device and model; ``native`` insists
            on compiled ones; ``reference`` is plain PyTorch.
        extra_special_tokens: strings that count as special tokens beside the tokenizer's.
        protect: ``"system"`` keeps every prompt's system prompt in all heads, and a budget is of
            the rest; ``protect_limit`` is the most that may be protected of a prompt, a share.
        min_recovery: a request keeps more than its budget where it would recover less than this
            share of its last queries' attention, on average over heads.
        page: serve a live page of the engine and its requests' heads at ``/fastgen``.
        debug: audit the page pool after every step (also ``FASTGEN_DEBUG=1``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kv_budget: float | None = Field(default=None, gt=0.0, le=1.0)
    recovery: float | None = Field(default=None, ge=0.0, le=1.0)
    method: str = "fastgen"
    ladder: Literal["adaptive", "paper"] | tuple[Hybrid, ...] | None = None
    group_reduction: Literal["mean", "min"] = "mean"
    frequent_score: Literal["sum", "mean"] = "sum"
    query_weighting: QueryWeighting | None = None
    observation_window: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    score_pooling: int | None = Field(default=None, ge=1, le=255)
    least_window: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    num_sinks: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    decode_window: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    value_weighting: bool | None = None
    query_sampling: int = Field(default=1, ge=1, le=1024)
    block_size: Literal[8, 16, 32, 64, 128] = 16
    min_prompt_tokens: int = Field(default=256, ge=1, le=MOST_TOKENS)
    compress: Literal["always", "pressure"] = "always"
    compact_every: int = Field(default=256, ge=0, le=MOST_TOKENS)
    kernels: KernelChoice = "auto"
    extra_special_tokens: tuple[str, ...] = ()
    protect: Literal["system"] | None = None
    protect_limit: float = Field(default=0.5, gt=0.0, le=1.0)
    min_recovery: float = Field(default=0.0, ge=0.0, le=1.0)
    page: bool = False
    cuda_graphs: bool = False
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
        ladder = values.get("ladder")
        if ladder is None:
            return {**values, "kv_budget": BUDGET}
        return {
            **values,
            **({"kv_budget": LADDER_BUDGET} if ladder == "adaptive" else {"recovery": 0.95}),
        }

    @model_validator(mode="after")
    def _check(self) -> FastGenConfig:
        if self.method != "fastgen" and self.recovery is not None:
            raise ValueError(f"method {self.method!r} takes a kv_budget in place of recovery")
        if self.kv_budget is not None and self.recovery is not None:
            raise ValueError("give kv_budget or recovery, not both")
        if self.method != "fastgen" and self.kv_budget is None:
            raise ValueError(f"method {self.method!r} needs a kv_budget, for example 0.3")
        for name in ("protect", "min_recovery"):
            if self.method != "fastgen" and getattr(self, name):
                raise ValueError(f"{name} does not go with method {self.method!r}; leave it out")
        if self.min_recovery and self.kv_budget is None:
            raise ValueError("min_recovery goes with a kv_budget; leave one of them out")
        if self.score_pooling is not None and self.score_pooling % 2 == 0:
            raise ValueError(f"score_pooling {self.score_pooling} is even; take an odd number")
        how = [self.profiling_for(goal) for goal in self.goals]
        if self.frequent_score == "mean" and any(p.peaks or p.weighting != "uniform" for p in how):
            raise ValueError(
                "frequent_score 'mean' goes with a ladder and query_weighting 'uniform' only; "
                "set those too, or take 'sum'"
            )
        return self

    @model_validator(mode="after")
    def _check_again(self) -> FastGenConfig:
        if self.compress == "pressure" and not self._compacts_again(self.goal):
            raise ValueError(
                "compress 'pressure' goes with a kv_budget and no ladder; give one or take 'always'"
            )
        given = "compact_every" in self.model_fields_set and self.compact_every
        if given and not any(map(self._compacts_again, self.goals)):
            raise ValueError("compact_every goes with the default method and no ladder; take 0")
        return self

    def method_for(self, goal: Goal) -> Method:
        """What chooses for prompts with such a goal."""
        if self.method != "fastgen":
            return METHODS[self.method]
        return PEAKS if self.ladder is None and goal.budget is not None else LADDER

    def hybrids_for(self, goal: Goal) -> tuple[Hybrid, ...]:
        """The hybrids of the ladder for such a goal, ending with ``full``."""
        method = self.method_for(goal)
        if method is not LADDER:
            assert goal.budget is not None
            return method.hybrids(goal.budget)
        if self.ladder in (None, "adaptive"):
            return ADAPTIVE_LADDER
        if self.ladder == "paper":
            return PAPER_LADDER
        assert isinstance(self.ladder, tuple)
        return (*(h for h in self.ladder if not h.full), FULL)

    def profiling_for(self, goal: Goal) -> Profiling:
        """The settings, with what suits the ladder or method where they are None."""
        method = self.method_for(goal)
        preset = method.profiling
        if method is LADDER and self.ladder not in (None, "adaptive"):
            preset = PAPER_PROFILING
        given = {
            "weighting": self.query_weighting,
            "window": self.observation_window,
            "pooling": self.score_pooling,
            "least_window": self.least_window,
            "num_sinks": self.num_sinks,
            "decode_window": self.decode_window,
            "value_weighting": self.value_weighting,
        }
        return replace(preset, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]

    def plan_for(self, goal: Goal, device: torch.device | str = "cpu") -> Plan:
        """How prompts with such a goal are compressed. It depends on whether the goal is a budget
        and, unless the method is ``fastgen``, on the budget."""
        profiling, averages = self.profiling_for(goal), self.frequent_score == "mean"
        hybrids = self.hybrids_for(goal)
        ladder = Ladder.from_hybrids(
            hybrids,
            profiling.least_window,
            averages=averages,
            device=device,
            decode_window=profiling.decode_window,
            decay=self.method_for(goal).decay,
        )
        return Plan(self.method_for(goal), profiling, ladder)

    @property
    def goal(self) -> Goal:
        """The engine's own."""
        return Goal(self.recovery, self.kv_budget, self.min_prompt_tokens, self.min_recovery)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """The engine's own, and one of the other kind where requests may ask for it."""
        other = Goal(None, BUDGET) if self.kv_budget is None else Goal(0.9, None)
        return (self.goal, other) if self.method == "fastgen" else (self.goal,)

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
        if self.method_for(self.goal) is not LADDER:
            return self.target
        name = str(self.ladder or "adaptive")
        if isinstance(self.ladder, tuple):
            name = " -> ".join(h.name for h in self.hybrids_for(self.goal))
        return f"{self.target}, ladder {name}"

    def goal_of(self, override: RequestOverride) -> Goal:
        """The request's own goal, or the engine's."""
        goal = self.goal
        threshold, budget = override.fastgen_recovery, override.fastgen_kv_budget
        if threshold is not None or budget is not None:
            goal = replace(goal, threshold=threshold, budget=budget)
        if override.fastgen_min_recovery is not None:
            goal = replace(goal, least_recovery=override.fastgen_min_recovery)
        return goal if goal.budget is not None else replace(goal, least_recovery=0.0)

    def waits(self, override: RequestOverride) -> bool:
        """Whether the request keeps everything until blocks run short."""
        asked = override.fastgen_compress
        if asked is not True:
            return asked == "pressure"
        return self.compress == "pressure" and self._compacts_again(self.goal_of(override))

    def _compacts_again(self, goal: Goal) -> bool:
        return self.method_for(goal).choose_again is not None

    def goal_for(
        self, num_tokens: int, override: RequestOverride, sent: int | None = None
    ) -> Goal | None:
        """What a prompt of so many tokens is compressed to, now or under pressure; None where all
        of it is kept.

        ``sent``: its tokens as it was sent, where output has been added since. What was kept whole
        for being short stays whole until it has grown.
        """
        goal = self.goal_of(override)
        if not override.fastgen_compress or goal.keeps_everything:
            return None
        least = self.min_prompt_tokens
        if sent is not None and sent < least:
            if self.growth_goal(override) is None:
                return None
            least += self.compact_every
        return goal if num_tokens >= least else None

    def growth_goal(self, override: RequestOverride) -> Goal | None:
        """What a request is compacted to again while it grows; None where it is not."""
        goal = self.goal_of(override)
        grows = override.fastgen_compress and (self.compact_every or self.waits(override))
        return goal if grows and self._compacts_again(goal) and not goal.keeps_everything else None

    def goals_for(
        self,
        num_tokens: int,
        override: RequestOverride,
        sent: int | None = None,
        longest: int | None = None,
    ) -> tuple[Goal | None, Goal | None]:
        """``goal_for`` and ``growth_goal``; a short request that can have no more than ``longest``
        tokens may never grow so far."""
        goal, later = self.goal_for(num_tokens, override, sent), self.growth_goal(override)
        first = self.min_prompt_tokens + self.compact_every * (not self.waits(override))
        if goal is None and longest is not None and longest <= first:
            later = None
        return goal, later

    def why_whole(self, num_tokens: int, override: RequestOverride) -> str:
        """Why all of a prompt was kept: one of ``WHY_WHOLE``."""
        if not override.fastgen_compress or self.goal_of(override).keeps_everything:
            return "asked"
        if num_tokens < self.min_prompt_tokens:
            return "short"
        return "waits" if self.waits(override) else "needed"

    def queries_looked_at(self, goal: Goal) -> int | None:
        """The last so many tokens of a prompt must be computed for its profile; None where all of
        them must."""
        how = self.profiling_for(goal)
        return queries_looked_at(how.weighting, how.window)

    def most_blocks(self, num_tokens: int, goal: Goal, override: RequestOverride) -> int:
        """Blocks that hold whatever a prompt keeps, and a page more in every head. Where that is
        not known beforehand they are as many as the prompt's own, which always do."""
        whole = -(-num_tokens // self.block_size)
        if self.method_for(goal) is not PEAKS or goal.least_recovery:
            return whole
        how = self.profiling_for(goal)
        protects = override.fastgen_protect or self.protect
        protected = self.protect_limit if protects else 0.0
        share = goal.with_protected(protected).share_of(num_tokens)
        always = how.num_sinks + how.least_window + protected * num_tokens
        keys = ceil(max(share * num_tokens, always))
        # Heads leave less than a page of theirs empty, a block together.
        return min(whole, -(-keys // self.block_size) + 2)

    def check_override(self, override: RequestOverride) -> None:
        """Raises:
        FastGenConfigError: what this engine's settings cannot give a request.
        """
        wanted = {
            name: getattr(override, name)
            for name in RequestOverride.model_fields
            if name != "fastgen_compress" and getattr(override, name) is not None
        }
        for name, value in wanted.items():
            if self.method != "fastgen":
                raise FastGenConfigError(
                    f"request.{name}: {value} cannot change method {self.method!r}, whose "
                    "kv_budget is fixed at start-up; leave it out"
                )
        if self.waits(override) and not self._compacts_again(self.goal_of(override)):
            raise FastGenConfigError(
                "request.fastgen_compress: 'pressure' goes with a kv_budget and no ladder or other "
                "method; take 'always', or give fastgen_kv_budget if the engine has no ladder"
            )
        if override.fastgen_min_recovery is not None and self.goal_of(override).budget is None:
            raise FastGenConfigError(
                f"request.fastgen_min_recovery: {override.fastgen_min_recovery} goes with a "
                "budget; leave it out, or give fastgen_kv_budget in place of a recovery"
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
        ladder = values.get("ladder")
        if not isinstance(ladder, tuple) and ladder not in (None, "adaptive", "paper"):
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
    fastgen_compress: bool | Literal["always", "pressure"] = True
    fastgen_protect: Literal["system"] | tuple[int, ...] | None = None
    fastgen_min_recovery: float | None = Field(default=None, ge=0.0, le=1.0)

    @field_validator("fastgen_protect", mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if value is None or value == "system":
            return value
        spans = tuple(value) if isinstance(value, list | tuple) else ()
        whole = all(type(index) is int and index >= 0 for index in spans)
        pairs = zip(spans[::2], spans[1::2], strict=False) if whole else ()
        rising = all(first < end for first, end in pairs)
        if not spans or len(spans) % 2 or not (whole and rising):
            raise ValueError(
                "give 'system', or a list of ranges of prompt tokens, each a first index and the "
                "one after its last, for example [0, 120, 300, 340]"
            )
        return spans

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Ranges of prompt tokens that are protected by their indices."""
        given = self.fastgen_protect if isinstance(self.fastgen_protect, tuple) else ()
        return list(zip(given[::2], given[1::2], strict=True))

    @field_validator("fastgen_compress", mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        # vLLM types vllm_xargs as str, int, float or list, so false arrives as 0 over HTTP.
        if type(value) in (bool, int, float) and value in (0, 1):
            return bool(value)
        if value not in ("always", "pressure"):
            raise ValueError("give true, false, 'always' or 'pressure'")
        return value

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
            lines.append(f"{where}: got {shorten(repr(problem['input']))}. {message}")
    return "invalid FastGen setting: " + "; ".join(lines)
