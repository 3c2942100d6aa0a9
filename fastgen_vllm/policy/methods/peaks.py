"""Peaks: one choice among the keys of all heads, by the most attention that each received of one of
the last queries."""

from __future__ import annotations

import torch

from fastgen_vllm.kernels.contract import UNBOUNDED, HeadRules
from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats, SlotStats, pages_within
from fastgen_vllm.policy.hybrids import FULL, Hybrid, Ladder
from fastgen_vllm.policy.methods.method import Method, first_of_each
from fastgen_vllm.policy.tokens import PROTECTED
from fastgen_vllm.tensors import RATIO_UNIT, layers_at_once, to_device

POOL_WEIGHT, POOL_BEFORE, POOL_AFTER = 0.1, 64, 4
"""What follows an important key is read next: a key ranks higher for the best of the 64 before it
and of the 4 after it."""

DECAY = 0.99
"""While decoding a slot's score is such a peak too, which fades by this factor with every token; it
begins with the rank."""


def hybrids(budget: float) -> tuple[Hybrid, ...]:
    return (Hybrid(special=True), FULL)


def ranks(stats: PromptStats) -> torch.Tensor:
    """The order among all keys of all heads: float32 ``[L, H, n]``."""
    found = torch.empty_like(stats.scores)
    for layers in layers_at_once(found):
        norms = stats.value_norms[layers]
        found[layers] = _pooled(stats.scores[layers] * norms / norms.mean(-1, keepdim=True))
    return found


def _pooled(own: torch.Tensor) -> torch.Tensor:
    """``own`` ``[..., n]`` and a share of the best around each."""
    around = torch.nn.functional.pad(own, (POOL_BEFORE, POOL_AFTER))
    best = torch.nn.functional.max_pool1d(around, POOL_BEFORE + 1 + POOL_AFTER, 1)
    return own + POOL_WEIGHT * best


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    """The highest ranks whose pages fit the budget, over all layers and heads; then the next best
    of each head until its last page is full. Sticky tokens and the last ones come first; where they
    would take more than the budget, the sticky ones compete like others."""
    n, page = stats.num_tokens, stats.page_size
    heads, pages_each = stats.scores.shape[0] * stats.scores.shape[1], -(-n // page)
    room = pages_within(goal.share_of(n), pages_each * heads)
    always = _always(ladder, stats)
    if -(-int(always.sum()) // page) * heads > room:
        stats = stats.with_sinks_alone()
        always = _always(ladder, stats)
    always = to_device(always, stats.scores.device)
    rank = ranks(stats).masked_fill(always, float("inf"))
    rules, kept = _take(ladder, rank, always, n, n, page, room)
    sticky = _sticky(ladder, stats).expand(kept.shape)
    return Choice(rules, kept, sticky, rank.masked_fill(always, 0.0), _recovery(stats, kept))


def choose_again(ladder: Ladder, slots: SlotStats, room: int) -> tuple[HeadRules, torch.Tensor]:
    """As ``choose``, among the slots of a request that has grown, by their scores. Sticky tokens
    always stay."""
    in_use, n = slots.in_use, slots.num_tokens
    sticky = slots.scores.isinf()
    always = (sticky | (slots.positions >= n - ladder.least_window)) & in_use
    rank = torch.empty_like(slots.scores)
    for layers in layers_at_once(rank):
        is_known = in_use[layers] & ~sticky[layers]
        rank[layers] = _pooled(slots.scores[layers].masked_fill(~is_known, 0.0))
    rank.masked_fill_(always, float("inf")).masked_fill_(~in_use, -1.0)
    return _take(ladder, rank, always, slots.lengths, n, slots.page_size, room)


def _take(
    ladder: Ladder,
    rank: torch.Tensor,
    always: torch.Tensor,
    lengths: int | torch.Tensor,
    n: int,
    page: int,
    room: int,
) -> tuple[HeadRules, torch.Tensor]:
    """The highest ranks whose pages fit in ``room``, and the next best until a head's last page is
    full: its numbers, and what is kept.

    Args:
        rank: float32 ``[L, H, S]``.
        always: bool ``[S]`` or ``[L, H, S]``, what ranks first.
        lengths: of the heads, or ``[L, H]``.
        n: tokens of the sequence.
    """
    order = torch.empty_like(rank, dtype=torch.int32)
    opening = rank.new_empty((*rank.shape[:2], -(-rank.shape[-1] // page)))
    for layers in layers_at_once(order):
        values, order[layers] = rank[layers].sort(dim=-1, descending=True, stable=True)
        opening[layers] = values[..., ::page]
    chosen = _counts(rank, opening.flatten(), room).clamp(max=lengths)
    counts = (-(-chosen // page) * page).clamp(max=lengths)
    kept = torch.empty_like(rank, dtype=torch.bool)
    for layers in layers_at_once(kept):
        kept[layers] = first_of_each(order[layers].long(), counts[layers])
    # A head of which nothing was chosen is local, though its last page is filled.
    frequent = (kept & ~always).sum(-1) * (chosen > always.sum(-1))
    return _rules(ladder, frequent, counts >= n, n), kept


def _recovery(stats: PromptStats, kept: torch.Tensor) -> torch.Tensor:
    """Attention of the queries that were looked at: float32 ``[L, H]``, 1 where it is all on keys
    that they do not count on."""
    lost = torch.empty(kept.shape[:2], device=kept.device)
    for layers in layers_at_once(kept):
        lost[layers] = (stats.shares(layers)[:, :, 0, :, 0] * ~kept[layers]).sum(-1)
    return 1 - lost


def _always(ladder: Ladder, stats: PromptStats) -> torch.Tensor:
    """bool ``[n]`` on the host: sticky tokens and the least window."""
    kinds = ladder.hybrids[0].sticky_kinds | PROTECTED
    always = (stats.classes_on_host & kinds) != 0
    always[max(0, stats.num_tokens - ladder.least_window) :] = True
    return always


def _sticky(ladder: Ladder, stats: PromptStats) -> torch.Tensor:
    """bool ``[n]``: special and protected tokens."""
    return (stats.token_classes & ladder.rules.sticky_kinds[0]) != 0


def _counts(rank: torch.Tensor, opening: torch.Tensor, room: int) -> torch.Tensor:
    """Keys of each head down to the lowest rank at which their pages fit, or to the highest of all
    where not even those do: int64 ``[L, H]``.

    ``opening``: the ranks, of all heads, that open a page. So many pages are in use down to a rank
    as are opened by it or a higher one.
    """
    ordered = opening.sort(descending=True).values
    if room >= len(ordered):
        return torch.full_like(rank[..., 0], rank.shape[-1], dtype=torch.int64)
    return ((rank > ordered[room]) | (rank == ordered[0])).sum(-1)


def _rules(ladder: Ladder, frequent: torch.Tensor, full: torch.Tensor, n: int) -> HeadRules:
    """Each head's shares, which it goes on with while the sequence grows."""
    first = ladder.rules[0]
    shape = frequent.shape

    def everywhere(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(shape).clone()

    rules = HeadRules(*(everywhere(tensor) for tensor in first.tensors()))
    share = -(-frequent * RATIO_UNIT // n)
    rules.frequent.copy_(share.masked_fill(full, 0))
    rules.local.copy_((~full) * min(RATIO_UNIT, ladder.least_window * RATIO_UNIT // n))
    rules.keeps_scores.copy_(~full)
    rules.least_window.masked_fill_(full, UNBOUNDED)
    rules.sticky_kinds.masked_fill_(full, 0)
    return rules


PEAKS = Method(
    "fastgen",
    "this project",
    Profiling("end", 32, 1, 32, 4, True, True, 256),
    choose,
    hybrids,
    choose_again=choose_again,
    decay=DECAY,
)
