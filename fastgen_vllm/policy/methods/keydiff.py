"""KeyDiff: the keys least like the mean key of their head. It looks at no query."""

from __future__ import annotations

import torch

from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods.method import (
    Method,
    append_only,
    highest,
    keys_per_head,
    with_window,
)

NEWEST = Profiling("last", 1, 1, 1, 0, False)
"""For methods that look at no profile: the newest key alone is kept whatever its score."""


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    """Keys as the cache holds them, after RoPE, and the whole prompt at once: the paper goes
    block by block only where memory would not hold it."""
    keys = stats.seen.keys
    anchor = torch.nn.functional.normalize(keys, dim=-1).mean(dim=-2, keepdim=True)
    unlike = -torch.nn.functional.cosine_similarity(keys, anchor, dim=-1)
    kept = highest(with_window(unlike, stats), keys_per_head(stats, goal))
    return append_only(ladder, stats, kept)


KEYDIFF = Method("keydiff", "arXiv 2504.15364", NEWEST, choose, needs_model=True)
