"""Layer-DefensiveKV: one choice over all layers and heads, by the worst case of the last queries.

``e`` keys are earlier than the observation window of ``w`` queries, whose own keys always stay.
"""

from __future__ import annotations

import torch

from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods.method import Method, append_only, highest, keys_per_head

POOLING = 5
"""A query's attention on a key is its mean over so many keys around it."""

COVERED = 0.9
"""The share of a head's attention whose keys come first."""


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    count = keys_per_head(stats, goal)
    if count == stats.num_tokens:
        return append_only(ladder, stats, torch.ones_like(stats.scores, dtype=torch.bool))
    scores = torch.full_like(stats.scores, float("inf"))
    window = stats.profiling.window
    for layer in range(len(scores)):
        attention = stats.seen.attention(layer, window)[..., :-window]
        norms = stats.seen.output_norms[layer, ..., :-window].mean(dim=1)
        ranks = risk(attention) * norms / norms.sum(dim=0)
        first = covering(attention, count - window)
        scores[layer, :, :-window] = ranks.masked_fill(first, float("inf"))
    kept = highest(scores.flatten(), count * scores[..., 0].numel())
    return append_only(ladder, stats, kept.view(scores.shape))


def risk(attention: torch.Tensor) -> torch.Tensor:
    """What a key may be worth to one query, and no less than the mean key: ``[H, e]``.

    Args:
        attention: float32 ``[H, G, w, e]``.
    """
    flat = attention.flatten(0, 2)[:, None]
    pooled = torch.nn.functional.avg_pool1d(flat, POOLING, 1, POOLING // 2).view(attention.shape)
    total, least = attention.sum(-1, keepdim=True), torch.finfo(attention.dtype).tiny
    worst = (pooled * total / pooled.sum(-1, keepdim=True).clamp(min=least)).amax(dim=(1, 2))
    return worst.maximum(worst.mean(-1, keepdim=True))


def covering(attention: torch.Tensor, room: int) -> torch.Tensor:
    """bool ``[H, e]``: the keys of most mean attention, at most ``room`` of each head, whose sum
    stays below ``COVERED`` less what the window's own keys receive.

    The published code means to subtract that too, but its slice meets the ``w`` keys before the
    window. It takes the mean of a layer's heads, as is done here.
    """
    mean = attention.mean(dim=(1, 2))
    least = torch.finfo(attention.dtype).tiny
    shares, order = (mean / mean.sum(-1, keepdim=True).clamp(min=least)).sort(
        dim=-1, descending=True, stable=True
    )
    wanted = COVERED - (1.0 - attention.sum(-1).mean())
    below = (shares.cumsum(-1) < wanted) & (torch.arange(mean.shape[-1], device=mean.device) < room)
    return torch.zeros_like(below).scatter_(-1, order, below)


DEFENSIVEKV = Method(
    "defensivekv",
    "arXiv 2510.13334",
    Profiling("last", 32, 1, 1, 0, False),
    choose,
    needs_model=True,
)
