"""CriticalKV: half a head's keys by attention, half by what the attention adds to the output."""

from __future__ import annotations

from fastgen_vllm.policy.choice import Choice, Goal, PromptStats
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods.adakv import shared
from fastgen_vllm.policy.methods.method import (
    Method,
    append_only,
    highest_of_each,
    window_first,
)
from fastgen_vllm.policy.methods.snapkv import OBSERVATION

FIRST_STAGE = 0.5
"""The share of a head's keys that attention alone chooses: the paper's alpha."""

EPSILON = 1e-4
"""Added to the mean attention of a query, so that keys without any rank by their values."""


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    """Algorithm 1 of the paper on SnapKV's scores. Ada-KV says how many keys a head has."""
    norms = stats.seen.output_norms  # [L, H, G, n]
    scores = window_first(stats)
    counts = shared(scores, stats, goal).sum(-1)
    first = highest_of_each(scores, (FIRST_STAGE * counts).long())
    num_queries = min(stats.profiling.window, stats.num_tokens) * norms.shape[2]
    weighed = (scores / num_queries + EPSILON) * norms.mean(dim=2)
    weighed.masked_fill_(first | scores.isinf(), float("inf"))
    return append_only(ladder, stats, highest_of_each(weighed, counts))


CRITICALKV = Method("criticalkv", "arXiv 2502.03805", OBSERVATION, choose, needs_model=True)
