"""The one compaction: pack what each head keeps, gather it in few blocks, vacate the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastgen_vllm.cache.head_tables import HeadTables, Holding
from fastgen_vllm.cache.pages import PagePool
from fastgen_vllm.kernels.contract import Kernels
from fastgen_vllm.reads import Work, figures
from fastgen_vllm.tensors import layers_at_once, to_device


@dataclass(frozen=True)
class Compacted:
    """What a request's compaction left.

    Attributes:
        vacated: ids of the blocks it no longer owns.
        kept_slots: slots in use over all layers and heads.
    """

    vacated: list[int]
    kept_slots: int


@dataclass(frozen=True)
class _Packed:
    """A request whose heads keep what they keep at the front of their pages.

    Attributes:
        pages: int64 ``[L, H, P]``.
        is_used: bool ``[L, H, P]``.
        in_blocks: of each of its blocks, how many of its pages are in use.
        needed: pages in use, and one for every head that can fill its last before the scheduler
            grants a block, or those to spare if they are more.
    """

    pages: torch.Tensor
    is_used: torch.Tensor
    in_blocks: list[int]
    needed: int
    longest: int
    kept_slots: int


def compact(
    tables: HeadTables,
    request_id: str,
    source: torch.Tensor,
    kept: torch.Tensor,
    num_tokens: int,
    kernels: Kernels,
    targets: Sequence[int] | None = None,
    spare: torch.Tensor | None = None,
) -> Work[Compacted]:
    """Keep some of a request's slots and give the blocks that this frees back. The host decides
    by figures, for which it asks once.

    K, V, position and score move together. In place, each head's kept slots go to the front of its
    own pages, in order, so that a target never lies behind its source; then the used pages of
    blocks to be vacated move to unused pages of blocks that stay, and there is no second copy of
    the cache. Out of place, what is kept goes to targets, and the source stays as it is.

    Enough pages stay for every head to grow until the next block boundary of the sequence, where
    the scheduler can grant a block.

    Args:
        source: the request's pages, int64 ``[L, H, P]``.
        kept: bool ``[L, H, S]``, of each head's slots in use, at most ``S``.
        num_tokens: of the sequence so far.
        targets: blocks to move into, out of place: what is not needed of them is vacated too.
        spare: int ``[]``, pages that stay unused at least.
    """
    pool = tables.pool
    blocks = list(tables.blocks[request_id] if targets is None else targets)
    lengths, num_sticky = kept.sum(-1), _count_sticky(pool, source, kept)
    used = -(-lengths // pool.block_size)
    target = source if targets is None else _spread(pool, blocks, used, source.shape[-1])
    kernels.pack_slots(pool, source, kept, target)
    packed = yield from _measure(pool, target, lengths, used, blocks, num_tokens, spare)
    staying, free = _gather(pool, packed, blocks, kernels)
    width = -(-packed.longest // pool.block_size)
    held = Holding(staying, packed.pages[..., :width], lengths, num_sticky, packed.longest, free)
    before = tables.blocks[request_id]
    tables.hold(request_id, held)
    gone = blocks if targets is None else [*before, *blocks]
    return Compacted([b for b in gone if b not in set(staying)], packed.kept_slots)


def _count_sticky(pool: PagePool, pages: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Sticky slots among the kept ones: int64 ``[L, H]``."""
    found = torch.empty(pages.shape[:2], dtype=torch.int64, device=kept.device)
    for layers in layers_at_once(kept):
        scores = pool.scores[pages[layers]].flatten(2)[..., : kept.shape[-1]]
        found[layers] = (kept[layers] & (scores == float("inf"))).sum(-1)
    return found


def _spread(pool: PagePool, blocks: Sequence[int], used: torch.Tensor, width: int) -> torch.Tensor:
    """The blocks' pages, to each head as many as it uses: int64 ``[L, H, width]``."""
    pages = pool.pages_of(to_device(torch.tensor(blocks, dtype=torch.int64), used.device)).flatten()
    first = used.flatten().cumsum(0).view(used.shape) - used
    index = torch.arange(width, device=used.device)
    at = (first[..., None] + index).clamp(max=len(pages) - 1)
    return torch.where(index < used[..., None], pages[at], 0)


def _measure(
    pool: PagePool,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    used: torch.Tensor,
    blocks: Sequence[int],
    num_tokens: int,
    spare: torch.Tensor | None,
) -> Work[_Packed]:
    """The figures that the host decides by."""
    until_boundary = -num_tokens % pool.block_size
    growing = used * pool.block_size - lengths < until_boundary
    index = torch.arange(pages.shape[-1], device=pages.device)
    counts = torch.zeros(pool.num_blocks, dtype=torch.int64, device=pages.device)
    is_used = index < used[..., None]
    block_of = (pages // pool.pages_per_block).flatten()
    counts.scatter_add_(0, block_of, is_used.flatten().long())
    block_ids = to_device(torch.tensor(blocks, dtype=torch.int64), pages.device)
    unused = growing.sum() if spare is None else torch.maximum(growing.sum(), spare)
    sums = torch.stack([used.sum() + unused, lengths.max(), lengths.sum()])
    sums = torch.cat([sums, counts[block_ids]])
    del counts  # of the whole pool
    asked = yield from figures(sums)
    needed, longest, kept_slots, *in_blocks = map(int, asked)
    return _Packed(pages, is_used, in_blocks, needed, longest, kept_slots)


def _gather(
    pool: PagePool, packed: _Packed, blocks: Sequence[int], kernels: Kernels
) -> tuple[list[int], torch.Tensor]:
    """Move used pages out of all blocks but the fullest that hold them.

    Returns:
        the blocks that stay, and their pages that are not in use. ``packed.pages`` is changed.
    """
    device, per_block = packed.pages.device, pool.pages_per_block
    num_stay = -(-packed.needed // per_block)
    assert num_stay <= len(blocks), f"{packed.needed} pages do not fit {len(blocks)} blocks"
    fullest = sorted(range(len(blocks)), key=lambda i: -packed.in_blocks[i])[:num_stay]
    staying = [blocks[i] for i in sorted(fullest)]
    used_there = sum(packed.in_blocks[i] for i in fullest)
    num_moves = sum(packed.in_blocks) - used_there

    place = torch.full((pool.num_blocks,), -1)
    place[staying] = torch.arange(num_stay)
    where = to_device(place, device)[packed.pages // per_block]
    stays, is_used = where >= 0, packed.is_used
    inside = where * per_block + packed.pages % per_block
    room = num_stay * per_block
    # One more, for all that is not counted: a mask would have the host wait.
    taken = torch.zeros(room + 1, dtype=torch.uint8, device=device)
    taken[torch.where(stays & is_used, inside, room).flatten()] = 1
    free = taken[:room].argsort(stable=True)[: room - used_there]
    stay_ids = to_device(torch.tensor(staying, dtype=torch.int64), device)
    free = stay_ids[free // per_block] * per_block + free % per_block

    leaving = (is_used & ~stays).flatten().to(torch.uint8)
    moved = leaving.argsort(descending=True, stable=True)[:num_moves]
    source, target = packed.pages.flatten()[moved], free[:num_moves]
    for start in range(0, num_moves, per_block):
        part = slice(start, start + per_block)
        kernels.move_pages(pool, source[part], target[part])
    packed.pages.view(-1)[moved] = target
    return staying, free[num_moves:]
