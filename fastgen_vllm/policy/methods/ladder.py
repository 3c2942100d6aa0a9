"""A ladder of hybrids: the cheapest that recover enough attention (the paper), or the best that a
budget buys."""

from __future__ import annotations

from fastgen_vllm.policy.choice import (
    Choice,
    Goal,
    Profiling,
    PromptStats,
    reach_threshold,
    share_budget,
)
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods.method import Method

PAPER_PROFILING = Profiling("uniform", 64, 1, 1, 0, False)
"""Plain attention mass over all queries, for the paper's ladder and ladders of the user's own."""


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    if goal.budget is not None:
        return share_budget(ladder, stats, goal.share_of(stats.num_tokens))
    assert goal.threshold is not None
    return reach_threshold(ladder, stats, goal.threshold)


LADDER = Method("fastgen", "arXiv 2310.01801", Profiling("recent", 32, 31, 64, 4, True), choose)
