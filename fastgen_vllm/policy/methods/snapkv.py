"""SnapKV: the keys that the last queries look at, as many in every head."""

from __future__ import annotations

from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods.method import (
    Method,
    append_only,
    highest,
    keys_per_head,
    window_first,
)

OBSERVATION = Profiling("last", 32, 7, 1, 0, False)
"""Scores of the last 32 queries, pooled over 7 keys."""


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    return append_only(ladder, stats, highest(window_first(stats), keys_per_head(stats, goal)))


SNAPKV = Method("snapkv", "arXiv 2404.14469", OBSERVATION, choose)
