"""A fixed random choice: what any method must beat."""

from __future__ import annotations

import torch

from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods.method import Method, append_only, highest, keys_per_head


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    """Sinks, the last keys, and a random choice of the others that depends on the length alone."""
    generator = torch.Generator().manual_seed(stats.num_tokens)
    scores = torch.rand(stats.scores.shape, generator=generator).to(stats.scores.device)
    scores[..., : stats.profiling.num_sinks] = 2.0
    scores[..., -stats.profiling.window :] = float("inf")
    return append_only(ladder, stats, highest(scores, keys_per_head(stats, goal)))


RANDOM = Method("random", "none", Profiling("uniform", 32, 1, 1, 4, False), choose)
