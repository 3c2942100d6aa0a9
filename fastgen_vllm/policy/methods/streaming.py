"""StreamingLLM: attention sinks and a window."""

from __future__ import annotations

import torch

from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats
from fastgen_vllm.policy.hybrids import FULL, Hybrid, Ladder
from fastgen_vllm.policy.methods.method import (
    Method,
    as_ratio,
    first_rung,
    keys_per_head,
)


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    n, count = stats.num_tokens, keys_per_head(stats, goal)
    num_sinks = min(stats.profiling.num_sinks, count - 1)  # the newest token stays
    position = torch.arange(n, device=stats.scores.device)
    sinks = (position < num_sinks).expand(stats.scores.shape)
    recent = position >= n - (count - num_sinks)
    policy = first_rung(stats)
    recovery = torch.ones(policy.shape, device=policy.device)
    return Choice(ladder.rules[policy], sinks | recent, sinks, stats.sums, recovery)


STREAMING = Method(
    "streaming",
    "arXiv 2309.17453",
    Profiling("uniform", 32, 1, 1, 4, False),
    choose,
    lambda budget: (Hybrid(local=as_ratio(budget)), FULL),
)
