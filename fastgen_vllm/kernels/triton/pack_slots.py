"""Compaction: kept tokens to the front of their head's pages, and whole pages elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "num_pages"])
def pack_slots_kernel(
    pages,
    page_table,
    kept,
    target,
    num_tokens,
    num_pages,
    BLOCK_SIZE: tl.constexpr,
    CONTENT: tl.constexpr,
    CONTENT_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """One head. Tiles go in ascending order and a target never lies behind its source, so a
    tile's stores touch nothing that a later tile loads."""
    head = tl.program_id(0).to(tl.int64)
    table = page_table + head * num_pages
    lane = tl.arange(0, CONTENT_PAD)
    for start in range(0, num_tokens, TILE):
        source = start + tl.arange(0, TILE)
        inside = source < num_tokens
        keeps = tl.load(kept + head * num_tokens + source, mask=inside, other=0) != 0
        goal = tl.load(target + head * num_tokens + source, mask=inside, other=0)
        moves = keeps & (goal != source)
        from_page = tl.load(table + source // BLOCK_SIZE, mask=moves, other=0)
        to_page = tl.load(table + goal // BLOCK_SIZE, mask=moves, other=0)
        from_slot = from_page * BLOCK_SIZE + source % BLOCK_SIZE
        to_slot = to_page * BLOCK_SIZE + goal % BLOCK_SIZE
        mask = moves[:, None] & (lane < CONTENT)[None, :]
        content = tl.load(pages + from_slot[:, None] * CONTENT + lane[None, :], mask=mask)
        tl.debug_barrier()  # every thread has loaded before any stores
        tl.store(pages + to_slot[:, None] * CONTENT + lane[None, :], content, mask=mask)
        tl.debug_barrier()


@triton.jit
def move_pages_kernel(pages, source, target, SIZE: tl.constexpr, TILE: tl.constexpr):
    move = tl.program_id(0)
    origin = tl.load(source + move) * SIZE
    goal = tl.load(target + move) * SIZE
    for start in range(0, SIZE, TILE):
        lane = start + tl.arange(0, TILE)
        tl.store(pages + goal + lane, tl.load(pages + origin + lane, lane < SIZE), lane < SIZE)


def pack_slots(pages: torch.Tensor, page_table: torch.Tensor, kept: torch.Tensor) -> None:
    """As ``reference.pack_slots``."""
    layers, heads, num_tokens = kept.shape
    content = pages.shape[-1]
    page_table, kept = page_table.contiguous(), kept.contiguous()
    target = kept.cumsum(-1, dtype=torch.int32).sub_(1)
    pack_slots_kernel[(layers * heads,)](
        pages,
        page_table,
        kept,
        target,
        num_tokens,
        page_table.shape[-1],
        BLOCK_SIZE=pages.shape[1],
        CONTENT=content,
        CONTENT_PAD=triton.next_power_of_2(content),
        TILE=32,
    )


def move_pages(pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """As ``reference.move_pages``."""
    if len(source):
        size = pages.shape[1] * pages.shape[2]
        move_pages_kernel[(len(source),)](pages, source, target, SIZE=size, TILE=1024)
