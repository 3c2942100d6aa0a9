"""Compaction: kept slots to the front of their head's target pages, and whole pages elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgen_vllm.kernels.contract import Pages
from fastgen_vllm.tensors import EMPTY


@triton.jit(do_not_specialize=["num_slots", "source_width", "target_width"])
def pack_slots_kernel(
    kv,
    positions,
    scores,
    source,
    kept,
    place,
    target,
    num_slots,
    source_width,
    target_width,
    BLOCK_SIZE: tl.constexpr,
    CONTENT: tl.constexpr,
    CONTENT_PAD: tl.constexpr,
    NO_TOKEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """One head. Tiles go in ascending order and a target never lies behind its source, so a
    tile's stores touch nothing that a later tile loads."""
    head = tl.program_id(0).to(tl.int64)
    from_pages, to_pages = source + head * source_width, target + head * target_width
    lane = tl.arange(0, CONTENT_PAD)
    count = 0
    for start in range(0, num_slots, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < num_slots
        keeps = tl.load(kept + head * num_slots + at, mask=inside, other=0) != 0
        to = tl.load(place + head * num_slots + at, mask=inside, other=0)
        count += tl.sum(keeps.to(tl.int32), 0)
        from_page = tl.load(from_pages + at // BLOCK_SIZE, mask=keeps, other=0)
        to_page = tl.load(to_pages + to // BLOCK_SIZE, mask=keeps, other=0)
        from_slot = from_page * BLOCK_SIZE + at % BLOCK_SIZE
        to_slot = to_page * BLOCK_SIZE + to % BLOCK_SIZE
        moves = keeps & (from_slot != to_slot)
        mask = moves[:, None] & (lane < CONTENT)[None, :]
        content = tl.load(kv + from_slot[:, None] * CONTENT + lane[None, :], mask=mask)
        position = tl.load(positions + from_slot, mask=moves)
        score = tl.load(scores + from_slot, mask=moves)
        tl.debug_barrier()  # every thread has loaded before any stores
        tl.store(kv + to_slot[:, None] * CONTENT + lane[None, :], content, mask=mask)
        tl.store(positions + to_slot, position, mask=moves)
        tl.store(scores + to_slot, score, mask=moves)
        tl.debug_barrier()
    behind = tl.arange(0, BLOCK_SIZE)
    last = tl.load(to_pages + tl.maximum(count - 1, 0) // BLOCK_SIZE)
    is_behind = (behind > (count - 1) % BLOCK_SIZE) & (count > 0)
    nothing = tl.full([BLOCK_SIZE], NO_TOKEN, tl.int32)
    tl.store(positions + last * BLOCK_SIZE + behind, nothing, mask=is_behind)


@triton.jit
def move_pages_kernel(
    kv,
    positions,
    scores,
    source,
    target,
    BLOCK_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    move = tl.program_id(0)
    from_page, to_page = tl.load(source + move), tl.load(target + move)
    for start in range(0, SIZE, TILE):
        lane = start + tl.arange(0, TILE)
        content = tl.load(kv + from_page * SIZE + lane, lane < SIZE)
        tl.store(kv + to_page * SIZE + lane, content, lane < SIZE)
    slot = tl.arange(0, BLOCK_SIZE)
    from_slot, to_slot = from_page * BLOCK_SIZE + slot, to_page * BLOCK_SIZE + slot
    tl.store(positions + to_slot, tl.load(positions + from_slot))
    tl.store(scores + to_slot, tl.load(scores + from_slot))


def pack_slots(
    pages: Pages, source: torch.Tensor, kept: torch.Tensor, target: torch.Tensor
) -> None:
    """As ``reference.pack_slots``."""
    layers, heads, num_slots = kept.shape
    content = pages.kv.shape[-1]
    source, kept, target = source.contiguous(), kept.contiguous(), target.contiguous()
    place = kept.cumsum(-1, dtype=torch.int32).sub_(1)
    pack_slots_kernel[(layers * heads,)](
        pages.kv,
        pages.positions,
        pages.scores,
        source,
        kept,
        place,
        target,
        num_slots,
        source.shape[-1],
        target.shape[-1],
        BLOCK_SIZE=pages.block_size,
        CONTENT=content,
        CONTENT_PAD=triton.next_power_of_2(content),
        NO_TOKEN=EMPTY,
        TILE=32,
    )


def move_pages(pages: Pages, source: torch.Tensor, target: torch.Tensor) -> None:
    """As ``reference.move_pages``."""
    if len(source):
        size = pages.kv.shape[1] * pages.kv.shape[2]
        move_pages_kernel[(len(source),)](
            pages.kv,
            pages.positions,
            pages.scores,
            source,
            target,
            BLOCK_SIZE=pages.block_size,
            SIZE=size,
            TILE=1024,
        )
