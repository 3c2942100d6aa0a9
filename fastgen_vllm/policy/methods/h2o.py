"""H2O: half heavy hitters by cumulative attention, half recent keys."""

from __future__ import annotations

from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats, kept_keys
from fastgen_vllm.policy.hybrids import FULL, Hybrid, Ladder
from fastgen_vllm.policy.methods.method import Method, as_ratio, first_rung


def hybrids(budget: float) -> tuple[Hybrid, ...]:
    half = as_ratio(budget / 2)
    return (Hybrid(frequent=half, local=half), FULL)


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    return kept_keys(ladder, stats, first_rung(stats))


H2O = Method("h2o", "arXiv 2306.14048", Profiling("uniform", 64, 1, 1, 0, False), choose, hybrids)
