"""TOVA: the keys that the last query looks at, the same in all heads of a layer."""

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


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    """The last query's attention, averaged over the heads of a layer; that query's own key stays.

    The paper drops a key with every token that it generates, by that token's attention alone. A
    head's rules know sums over all that it generated, each head's own, so here heads keep what is
    generated, which is also what kvpress does.
    """
    scores = window_first(stats)
    shared = scores.mean(dim=1, keepdim=True).expand(scores.shape)
    return append_only(ladder, stats, highest(shared, keys_per_head(stats, goal)))


TOVA = Method("tova", "arXiv 2401.06104", Profiling("last", 1, 1, 1, 0, False), choose)
