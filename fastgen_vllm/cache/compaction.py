"""After prefill: pack each head's kept tokens, gather them in few blocks, vacate the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastgen_vllm.cache.head_tables import HeadTables
from fastgen_vllm.cache.pages import PagePool
from fastgen_vllm.tensors import EMPTY, layers_at_once, to_device

if TYPE_CHECKING:
    from fastgen_vllm.kernels import Kernels


@dataclass(frozen=True)
class Compacted:
    """What a request's compaction left.

    Attributes:
        vacated: ids of the blocks it no longer owns.
        kept_slots: slots in use over all layers and heads, of ``total_slots``.
    """

    vacated: list[int]
    kept_slots: int
    total_slots: int


def compact(
    tables: HeadTables,
    request_id: str,
    blocks: Sequence[int],
    kept: torch.Tensor,
    policy: torch.Tensor,
    scores: torch.Tensor,
    sticky: torch.Tensor,
    keeps_scores: torch.Tensor,
    kernels: Kernels,
) -> Compacted:
    """Move a prompt from the engine's block table to head block tables, in place.

    Each head's kept tokens, in ascending order, go to the front of its own pages; a target never
    lies behind its source. Then the used pages of blocks to be vacated move to unused pages of
    blocks that stay. No second copy of the cache exists: the copies are one layer's at most.

    Enough pages stay for every head to grow until the next block boundary of the sequence,
    where the scheduler can grant a block.

    Args:
        blocks: the request's ``ceil(n / block_size)`` block ids, in token order.
        kept: bool ``[L, H, n]``.
        policy: int64 ``[L, H]``.
        scores: float32 ``[L, H, n]``, cumulative attention; read for heads that keep scores.
        sticky: bool ``[L, H, n]``.
        keeps_scores: bool ``[L, H]``.
    """
    pool = tables.pool
    block_size, n = pool.block_size, kept.shape[-1]
    row = tables.add(request_id)
    block_ids = to_device(torch.tensor(blocks), kept.device)
    lengths = kept.sum(-1)
    used = -(-lengths // block_size)
    pages = pool.pages_of(block_ids)
    kernels.pack_slots(pool.kv, pages, kept)

    room = used * block_size - lengths
    growing = room < len(blocks) * block_size - n
    figures = (used.sum() + growing.sum(), used.max(), lengths.max(), lengths.sum())
    needed, width, longest, kept_slots = torch.stack(figures).tolist()
    num_stay = -(-needed // pool.pages_per_block)
    pages, free = _gather_in_front(pool, pages, used, num_stay, kernels)
    pages = pages[..., :width]

    tables.bounds[request_id] = longest
    tables.set_pages(request_id, pages)
    is_used = torch.arange(width, device=kept.device) < used[..., None]
    tables.lengths[row] = lengths.int()
    tables.num_sticky[row] = (kept & sticky).sum(-1).int()
    tables.policy[row] = policy
    tables.keeps_scores[row] = keeps_scores
    tables.free_pages[row, : len(free)] = free.int()
    tables.num_free[row] = len(free)
    tables.blocks[request_id] = list(blocks[:num_stay])
    for layers in layers_at_once(kept):
        own = scores[layers] * keeps_scores[layers, :, None]
        own.masked_fill_(sticky[layers], float("inf"))
        _write_metadata(pool, pages[layers], is_used[layers], kept[layers], own)
    return Compacted(list(blocks[num_stay:]), kept_slots, kept.numel())


def _gather_in_front(
    pool: PagePool, pages: torch.Tensor, used: torch.Tensor, num_stay: int, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move used pages out of blocks from ``num_stay`` on; return the table and the free pages."""
    index = torch.arange(pages.shape[-1], device=pages.device)
    is_used = index < used[..., None]
    leaving = is_used & (index >= num_stay)
    free = pages[(index < num_stay) & ~is_used]
    source = pages[leaving]
    target = free[: len(source)]
    for start in range(0, len(source), pool.pages_per_block):
        part = slice(start, start + pool.pages_per_block)
        kernels.move_pages(pool.kv, source[part], target[part])
    pages[leaving] = target
    return pages, free[len(source) :]


def _write_metadata(
    pool: PagePool,
    pages: torch.Tensor,
    is_used: torch.Tensor,
    kept: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    layers, heads, width = pages.shape
    shape = (layers, heads, width * pool.block_size)
    positions = torch.full(shape, EMPTY, dtype=torch.int32, device=kept.device)
    slot_scores = torch.zeros(shape, dtype=torch.float32, device=kept.device)
    layer, head, position = kept.nonzero(as_tuple=True)
    slot = (kept.cumsum(-1) - 1)[layer, head, position]
    positions[layer, head, slot] = position.int()
    slot_scores[layer, head, slot] = scores[layer, head, position]
    pool.positions[pages[is_used]] = positions.view(*pages.shape, -1)[is_used]
    pool.scores[pages[is_used]] = slot_scores.view(*pages.shape, -1)[is_used]
