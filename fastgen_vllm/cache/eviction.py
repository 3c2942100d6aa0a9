"""The decode step: every head appends a slot or takes over its victim's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgen_vllm.cache.head_tables import HeadTables, OutOfPagesError
from fastgen_vllm.cache.pages import EMPTY, PagePool
from fastgen_vllm.policy import Ladder, ceil_ratio


@dataclass(frozen=True)
class DecodeStep:
    """Where one step of ``N`` requests writes and reads.

    Attributes:
        slots: int64 ``[N, L, H]``, the newest token's slot in ``PagePool.slots``.
        page_table: int32 ``[N, L, H, P]``.
        keeps_scores: bool ``[N, L, H]``, heads with a frequent component.
    """

    slots: torch.Tensor
    page_table: torch.Tensor
    keeps_scores: torch.Tensor


def plan_decode(
    tables: HeadTables,
    ladder: Ladder,
    request_ids: list[str],
    num_tokens: torch.Tensor,
    special: torch.Tensor,
    punctuation: torch.Tensor,
    frequent_score: str,
) -> DecodeStep:
    """Give the newest token of each request a slot in every head, evicting where over budget.

    Steps 1 to 3 of docs/how-it-works.md, "Token generation", for all layers at once.

    Args:
        num_tokens: int64 ``[N]``, ``t``: tokens including the newest, at position ``t - 1``.
        special, punctuation: bool ``[N]``, the newest token's flags.
        frequent_score: ``sum`` or ``mean``.

    Raises:
        OutOfPagesError: the scheduler granted fewer blocks than the heads need.
    """
    pool = tables.pool
    device = num_tokens.device
    rows = torch.tensor([tables.rows[r] for r in request_ids], device=device)
    policy, lengths = tables.policy[rows], tables.lengths[rows].long()
    t = num_tokens[:, None, None]
    sticky = (special[:, None, None] & ladder.special[policy]) | (
        punctuation[:, None, None] & ladder.punctuation[policy]
    )
    num_sticky = tables.num_sticky[rows] + sticky
    window = ceil_ratio(ladder.local[policy], t).clamp(min=1)
    budget = num_sticky + ceil_ratio(ladder.frequent[policy], t) + window
    evicts = ~ladder.full[policy] & (lengths >= budget)

    tables.ensure_pages(int(lengths.max()) // pool.block_size + 1)
    page_table = tables.page_table[rows]
    index = (lengths // pool.block_size)[..., None]
    takes_page = ~evicts & (lengths % pool.block_size == 0)
    if takes_page.any():
        new_pages = _pop_free_pages(tables, rows, takes_page, request_ids)
        pool.positions[new_pages] = EMPTY
        page_table.scatter_(
            -1, index, page_table.gather(-1, index).masked_scatter(takes_page[..., None], new_pages)
        )
        tables.page_table[rows] = page_table
    appended = page_table.gather(-1, index)[..., 0].long() * pool.block_size
    slots = appended + lengths % pool.block_size
    if evicts.any():
        slots[evicts] = _victims(
            pool,
            page_table[evicts],
            (t - window).expand_as(lengths)[evicts],
            (t - 1).expand_as(lengths)[evicts] if frequent_score == "mean" else None,
        )

    tables.lengths[rows] = (lengths + ~evicts).int()
    tables.num_sticky[rows] = num_sticky.int()
    pool.positions.view(-1)[slots] = (t - 1).expand_as(slots).int()
    pool.scores.view(-1)[slots] = torch.where(sticky, float("inf"), 0.0)
    max_pages = int(tables.lengths[rows].max() - 1) // pool.block_size + 1
    return DecodeStep(slots, page_table[..., :max_pages], ladder.frequent[policy] > 0)


def add_scores(
    pool: PagePool,
    page_table: torch.Tensor,
    probs: torch.Tensor,
    keeps_scores: torch.Tensor,
) -> None:
    """Add a decode step's attention to the slots of one layer's frequent heads.

    Args:
        page_table: int32 ``[N, H, P]``.
        probs: float32 ``[N, H, P, block_size]``, summed over the GQA group.
        keeps_scores: bool ``[N, H]``.
    """
    owned = keeps_scores[..., None] & (page_table > 0)
    # A page has one owner, so no index repeats.
    pool.scores[page_table[owned].long()] += probs[owned]


def _pop_free_pages(
    tables: HeadTables, rows: torch.Tensor, takes_page: torch.Tensor, request_ids: list[str]
) -> torch.Tensor:
    flat = takes_page.flatten(1)
    taken = flat.sum(-1)
    height = tables.num_free[rows].long()
    if (taken > height).any():
        short = int((taken > height).nonzero()[0])
        raise OutOfPagesError(
            f"{request_ids[short]} needs {int(taken[short])} pages and owns {int(height[short])}"
        )
    rank = flat.cumsum(-1)
    where = (height[:, None] - rank).clamp(min=0)
    pages = tables.free_pages[rows].gather(-1, where)[flat]
    tables.num_free[rows] = (height - taken).int()
    return pages


def _victims(
    pool: PagePool,
    page_table: torch.Tensor,
    window_start: torch.Tensor,
    queries_so_far: torch.Tensor | None,
) -> torch.Tensor:
    """Slot of the lowest score outside the window in each head ``[M, P]``; oldest on ties."""
    pages = page_table.long()
    positions = pool.positions[pages].flatten(1)
    scores = pool.scores[pages].flatten(1)
    if queries_so_far is not None:
        scores = scores / (queries_so_far[:, None] - positions).clamp(min=1)
    inf = float("inf")
    outside = (positions != EMPTY) & (positions < window_start[:, None])
    scores = scores.masked_fill(~outside, inf)
    lowest = scores.amin(-1, keepdim=True)
    tied = (scores == lowest) & (scores < inf)
    oldest = positions.masked_fill(~tied, torch.iinfo(torch.int32).max).argmin(-1, keepdim=True)
    assert tied.gather(-1, oldest).all(), "a head over its budget has no token to evict"
    page = pages.gather(-1, oldest // pool.block_size)
    return (page * pool.block_size + oldest % pool.block_size)[:, 0]
