"""What a method is, and what several of them do alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastgen_vllm.kernels.contract import HeadRules
from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats, SlotStats
from fastgen_vllm.policy.hybrids import FULL, Hybrid, Ladder
from fastgen_vllm.tensors import RATIO_UNIT


def full_only(budget: float) -> tuple[Hybrid, ...]:
    """Heads keep what they chose and all that is generated."""
    return (FULL,)


@dataclass(frozen=True)
class Method:
    """A way to choose what the heads of a prompt keep.

    Attributes:
        name: the value of the setting ``method``.
        paper: where it is defined.
        profiling: its queries, window, pooling and sinks; settings change them.
        choose: takes the ladder, the prompt's statistics and the goal.
        hybrids: the ladder for a budget, ``full`` last. Heads that are not full evict while
            decoding, as their hybrid says.
        needs_model: it looks at ``PromptStats.observed``, which ``fastgen eval`` alone gathers.
        choose_again: of a request that has grown, the heads' numbers and what they keep, bool
            ``[L, H, S]``, in so many pages; None where requests are compacted once.
        decay: of slots' scores while decoding; 0 where they are sums.
    """

    name: str
    paper: str
    profiling: Profiling
    choose: Callable[[Ladder, PromptStats, Goal], Choice]
    hybrids: Callable[[float], tuple[Hybrid, ...]] = full_only
    needs_model: bool = False
    choose_again: Callable[[Ladder, SlotStats, int], tuple[HeadRules, torch.Tensor]] | None = None
    decay: float = 0.0


def as_ratio(share: float) -> float:
    """``share`` as a ratio that a hybrid takes, at least the smallest."""
    return max(1, round(share * RATIO_UNIT)) / RATIO_UNIT


def keys_per_head(stats: PromptStats, goal: Goal) -> int:
    """Keys a head may keep; the observation window's are never in question."""
    assert goal.budget is not None, "such a method has a budget"
    n = stats.num_tokens
    return min(n, max(stats.profiling.window, round(goal.budget * n)))


def window_first(stats: PromptStats) -> torch.Tensor:
    """The scores, with the observation window's own keys ahead of all."""
    return with_window(stats.scores, stats)


def with_window(scores: torch.Tensor, stats: PromptStats) -> torch.Tensor:
    """``scores`` ``[L, H, n]``, with the observation window's own keys ahead of all."""
    scores = scores.clone()
    scores[..., -stats.profiling.window :] = float("inf")
    return scores


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool, where the ``count`` highest of the last dimension are."""
    best = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def highest_of_each(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """bool ``[L, H, n]``, where the ``counts`` ``[L, H]`` highest of each head are."""
    return first_of_each(scores.sort(dim=-1, descending=True, stable=True).indices, counts)


def first_of_each(order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """bool ``[L, H, n]``, where the first ``counts`` ``[L, H]`` of each head's ``order`` are."""
    first = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    return torch.zeros_like(first).scatter_(-1, order, first)


def first_rung(stats: PromptStats) -> torch.Tensor:
    """A policy: int64 ``[L, H]``, every head the ladder's first hybrid."""
    return torch.zeros(stats.scores.shape[:2], dtype=torch.int64, device=stats.scores.device)


def append_only(ladder: Ladder, stats: PromptStats, kept: torch.Tensor) -> Choice:
    """``kept`` stays, and so does whatever is generated."""
    policy = first_rung(stats)
    recovery = torch.ones(policy.shape, device=policy.device)
    return Choice(ladder.rules[policy], kept, torch.zeros_like(kept), stats.sums, recovery)
