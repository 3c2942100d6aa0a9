"""Ada-KV: a layer's budget goes to the highest scores of all its heads."""

from __future__ import annotations

from fastgen_vllm.policy.choice import Choice, Goal, PromptStats
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods.method import (
    Method,
    append_only,
    highest,
    keys_per_head,
    window_first,
)
from fastgen_vllm.policy.methods.snapkv import OBSERVATION

SAFEGUARD = 0.2
"""The share of an even split that every head keeps, whatever its scores."""


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    scores, count = window_first(stats), keys_per_head(stats, goal)
    safe = highest(scores, max(stats.profiling.window, int(SAFEGUARD * count)))
    layers, heads, n = scores.shape
    shared = scores.masked_fill(safe, float("inf")).flatten(1)
    return append_only(ladder, stats, highest(shared, count * heads).view(layers, heads, n))


ADAKV = Method("adakv", "arXiv 2407.11550", OBSERVATION, choose)
