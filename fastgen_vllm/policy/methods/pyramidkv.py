"""PyramidKV: SnapKV with budgets that fall linearly with depth."""

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

BETA = 20
"""The deepest layer's budget is a mean layer's over this, as in the paper's code."""


def layer_budgets(stats: PromptStats, count: int) -> list[int]:
    """Keys a head may keep, by layer; ``count`` on average."""
    layers, n = stats.scores.shape[0], stats.num_tokens
    lowest = max(min(stats.profiling.window, count), count // BETA, 2 * count - n)
    return torch.linspace(2 * count - lowest, lowest, layers).round().int().tolist()


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    counts = layer_budgets(stats, keys_per_head(stats, goal))
    layers = zip(window_first(stats), counts, strict=True)
    return append_only(ladder, stats, torch.stack([highest(s, count) for s, count in layers]))


PYRAMIDKV = Method("pyramidkv", "arXiv 2406.02069", OBSERVATION, choose)
