"""Ada-KV: a layer's budget goes to the highest scores of all its heads."""

from __future__ import annotations

import torch

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


def shared(scores: torch.Tensor, stats: PromptStats, goal: Goal) -> torch.Tensor:
    """bool ``[L, H, n]``: the highest ``scores`` of each layer's heads together, and of each head
    at least the safeguard."""
    count = keys_per_head(stats, goal)
    safe = highest(scores, max(stats.profiling.window, int(SAFEGUARD * count)))
    heads = scores.shape[1]
    together = scores.masked_fill(safe, float("inf")).flatten(1)
    return highest(together, count * heads).view(scores.shape)


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    return append_only(ladder, stats, shared(window_first(stats), stats, goal))


ADAKV = Method("adakv", "arXiv 2407.11550", OBSERVATION, choose)
