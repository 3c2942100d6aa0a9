"""Peaks: one choice among the keys of all heads, by the most attention that each received of one of
the last queries."""

from __future__ import annotations

import torch

from fastgen_vllm.kernels.contract import UNBOUNDED, HeadRules
from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats
from fastgen_vllm.policy.hybrids import FULL, Hybrid, Ladder
from fastgen_vllm.policy.methods.method import Method
from fastgen_vllm.tensors import RATIO_UNIT, layers_at_once

POOL_WEIGHT, POOL_BEFORE, POOL_AFTER = 0.1, 32, 4
"""What follows an important key is read next: a key ranks higher for the best of the 32 before it
and of the 4 after it."""

SEED = 4.0
"""Slots go on while decoding with so many times their rank, in units of queries."""


def hybrids(budget: float) -> tuple[Hybrid, ...]:
    return (Hybrid(special=True), FULL)


def ranks(stats: PromptStats) -> torch.Tensor:
    """The order among all keys of all heads: float32 ``[L, H, n]``."""
    found = torch.empty_like(stats.scores)
    for layers in layers_at_once(found):
        norms = stats.value_norms[layers]
        own = stats.scores[layers] * norms / norms.mean(-1, keepdim=True)
        around = torch.nn.functional.pad(own, (POOL_BEFORE, POOL_AFTER))
        best = torch.nn.functional.max_pool1d(around, POOL_BEFORE + 1 + POOL_AFTER, 1)
        found[layers] = own + POOL_WEIGHT * best
    return found


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    """The highest ranks whose pages fit the budget, over all layers and heads; then the next best
    of each head until its last page is full. Sticky tokens and the last ones come first; where they
    would take more than the budget, the sticky ones compete like others."""
    assert goal.budget is not None, "such a method has a budget"
    n, page = stats.num_tokens, stats.page_size
    heads, pages_each = stats.scores.shape[0] * stats.scores.shape[1], -(-n // page)
    room = int(max(goal.budget, goal.least_tokens / n) * pages_each * heads)
    always = _always(ladder, stats)
    if -(-int(always.sum()) // page) * heads > room:
        stats = stats.with_sinks_alone()
        always = _always(ladder, stats)
    rank = ranks(stats).masked_fill(always, float("inf"))
    counts = _counts(rank, page, room)
    kept = torch.empty_like(rank, dtype=torch.bool)
    for layers in layers_at_once(kept):
        order = rank[layers].sort(dim=-1, descending=True, stable=True).indices
        first = torch.arange(n, device=rank.device) < counts[layers][..., None]
        kept[layers] = torch.zeros_like(first).scatter(-1, order, first)
    special = (stats.token_classes & ladder.hybrids[0].sticky_kinds) != 0
    sticky = special.expand(kept.shape)
    score = rank.masked_fill(always, 0.0)
    recovery = (kept * stats.scores).sum(-1) / stats.scores.sum(-1)
    rules = _rules(ladder, (kept & ~always).sum(-1), counts >= n, n)
    return Choice(rules, kept, sticky, SEED * score, recovery)


def _always(ladder: Ladder, stats: PromptStats) -> torch.Tensor:
    """bool ``[n]``: sticky tokens and the least window."""
    position = torch.arange(stats.num_tokens, device=stats.scores.device)
    sticky = (stats.token_classes & ladder.hybrids[0].sticky_kinds) != 0
    return sticky | (position >= stats.num_tokens - ladder.least_window)


def _counts(rank: torch.Tensor, page: int, room: int) -> torch.Tensor:
    """Keys of each head, in whole pages, of the lowest rank whose pages fit: int64 ``[L, H]``."""
    ordered, n = rank.flatten().sort(descending=True).values, rank.shape[-1]
    low = torch.zeros(1, dtype=torch.int64, device=rank.device)
    high = torch.full_like(low, len(ordered) - 1)
    for _ in range(len(ordered).bit_length()):
        middle = (low + high + 1) // 2
        used = -(-(rank >= ordered.gather(0, middle)).sum(-1) // page)
        fits = used.sum() <= room
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    counts = (rank >= ordered.gather(0, low)).sum(-1)
    return (-(-counts // page) * page).clamp(max=n)


def _rules(ladder: Ladder, frequent: torch.Tensor, full: torch.Tensor, n: int) -> HeadRules:
    """Each head's share: it keeps as large a share of frequent tokens while the sequence grows."""
    first = ladder.rules[0]
    shape = frequent.shape

    def everywhere(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(shape).clone()

    rules = HeadRules(*(everywhere(tensor) for tensor in first.tensors()))
    share = -(-frequent * RATIO_UNIT // n)
    rules.frequent.copy_(share.masked_fill(full, 0))
    rules.keeps_scores.copy_(~full)
    rules.least_window.masked_fill_(full, UNBOUNDED)
    rules.sticky_kinds.masked_fill_(full, 0)
    return rules


PEAKS = Method(
    "peaks", "this project", Profiling("last", 32, 1, 32, 4, True, True), choose, hybrids
)
