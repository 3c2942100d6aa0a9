"""The decode step's bookkeeping: append, take over or evict, with no host round trip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgen_vllm.kernels.contract import DecodeBatch, HeadState, Pages
from fastgen_vllm.tensors import EMPTY, RATIO_UNIT

_INT_MAX = torch.iinfo(torch.int32).max


@triton.jit
def ceil_ratio(ratio, num_tokens, UNIT: tl.constexpr):
    return (ratio * num_tokens + (UNIT - 1)) // UNIT


@triton.jit
def budgets(num_sticky, frequent, local, least_window, at, is_head, t, UNIT: tl.constexpr):
    """Slots that heads may have when there are ``t`` tokens."""
    window = tl.maximum(
        ceil_ratio(tl.load(local + at, mask=is_head, other=0), t, UNIT),
        tl.load(least_window + at, mask=is_head, other=0),
    )
    share = ceil_ratio(tl.load(frequent + at, mask=is_head, other=0), t, UNIT)
    return num_sticky + share + window


@triton.jit
def grow_kernel(
    rows,
    num_tokens,
    token_classes,
    page_table,
    table_start,
    lengths,
    num_sticky,
    sticky_kinds,
    frequent,
    local,
    least_window,
    free_pages,
    num_free,
    slots,
    short,
    stride_fr,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """All heads of one request: who evicts (slot -1), who appends, who takes a free page."""
    n = tl.program_id(0)
    row, t = tl.load(rows + n), tl.load(num_tokens + n)
    head = tl.arange(0, HEADS_PAD)
    is_head = head < HEADS
    at = row * HEADS + head
    length = tl.load(lengths + at, mask=is_head, other=0)
    sticky = (tl.load(sticky_kinds + at, mask=is_head, other=0) & tl.load(token_classes + n)) != 0
    total_sticky = tl.load(num_sticky + at, mask=is_head, other=0) + sticky.to(tl.int32)
    evicts = length >= budgets(total_sticky, frequent, local, least_window, at, is_head, t, UNIT)
    offset = length % BLOCK_SIZE
    takes_page = (is_head & (offset == 0) & (evicts == 0)).to(tl.int32)
    height = tl.load(num_free + row)
    taken = tl.sum(takes_page, 0)
    if taken > height:
        tl.atomic_max(short, n)
        tl.store(slots + n * HEADS + head, tl.zeros([HEADS_PAD], tl.int64), mask=is_head)
        return
    rank = tl.cumsum(takes_page, 0)
    takes = takes_page != 0
    fresh = tl.load(free_pages + row * stride_fr + height - rank, mask=takes, other=0)
    start = tl.load(table_start + at, mask=is_head, other=0)
    entry = page_table + start + length // BLOCK_SIZE
    appends = is_head & (evicts == 0)
    current = tl.load(entry, mask=appends & (takes == 0), other=0)
    page = tl.where(takes, fresh, current)
    tl.store(entry, page, mask=takes)
    slot = tl.where(appends, page.to(tl.int64) * BLOCK_SIZE + offset, -1)
    tl.store(slots + n * HEADS + head, slot, mask=is_head)
    tl.store(lengths + at, length + appends.to(tl.int32), mask=is_head)
    tl.store(num_sticky + at, total_sticky, mask=is_head)
    tl.store(num_free + row, height - taken)


@triton.jit
def place_kernel(
    rows,
    num_tokens,
    token_classes,
    page_table,
    table_start,
    lengths,
    sticky_kinds,
    local,
    least_window,
    averages,
    positions,
    scores,
    slots,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    NO_TOKEN: tl.constexpr,
    INT_MAX: tl.constexpr,
    TILE: tl.constexpr,
):
    """One head: find its victim where it evicts, then enter the newest token.

    The victim is the lowest score outside the window, the oldest on ties: one reduction, no sort.
    """
    n, head = tl.program_id(0), tl.program_id(1)
    row, t = tl.load(rows + n), tl.load(num_tokens + n)
    own = row * HEADS + head
    slot = tl.load(slots + n * HEADS + head)
    if slot < 0:
        window = tl.maximum(ceil_ratio(tl.load(local + own), t, UNIT), tl.load(least_window + own))
        length = tl.load(lengths + own)
        averaged = tl.load(averages + own) != 0
        table = page_table + tl.load(table_start + own)
        lowest = tl.full([TILE], float("inf"), tl.float32)
        oldest = tl.full([TILE], INT_MAX, tl.int32)
        best = tl.zeros([TILE], tl.int64)
        for start in range(0, length, TILE):
            index = start + tl.arange(0, TILE)
            in_use = index < length
            page = tl.load(table + index // BLOCK_SIZE, mask=in_use, other=0).to(tl.int64)
            at = page * BLOCK_SIZE + index % BLOCK_SIZE
            position = tl.load(positions + at, mask=in_use, other=NO_TOKEN)
            score = tl.load(scores + at, mask=in_use, other=float("inf"))
            seen_by = tl.where(averaged, tl.maximum(t - 1 - position, 1), 1).to(tl.float32)
            score = tl.div_rn(score, seen_by)
            outside = (position != NO_TOKEN) & (position < t - window)
            score = tl.where(outside, score, float("inf"))
            better = (score < lowest) | ((score == lowest) & outside & (position < oldest))
            lowest = tl.where(better, score, lowest)
            oldest = tl.where(better, position, oldest)
            best = tl.where(better, at, best)
        minimum = tl.min(lowest, 0)
        oldest = tl.where(lowest == minimum, oldest, INT_MAX)
        first = tl.min(oldest, 0)
        slot = tl.max(tl.where((lowest == minimum) & (oldest == first), best, 0), 0)
        tl.store(slots + n * HEADS + head, slot)
    elif slot % BLOCK_SIZE == 0:
        lane = tl.arange(0, BLOCK_SIZE)  # a page just taken
        tl.store(positions + slot + lane, tl.full([BLOCK_SIZE], NO_TOKEN, tl.int32), mask=lane > 0)
    sticky = (tl.load(sticky_kinds + own) & tl.load(token_classes + n)) != 0
    if slot >= BLOCK_SIZE:  # page 0 is nobody's
        tl.store(positions + slot, (t - 1).to(tl.int32))
        tl.store(scores + slot, tl.where(sticky, float("inf"), 0.0))


def plan_decode(pages: Pages, heads: HeadState, batch: DecodeBatch) -> torch.Tensor:
    """As ``reference.plan_decode``."""
    rules, positions, scores, slots = heads.rules, pages.positions, pages.scores, batch.slots
    changed = (heads.lengths, heads.num_sticky, heads.num_free, positions, scores, slots)
    assert all(x.is_contiguous() for x in (heads.page_table, heads.table_start, *changed))
    assert all(x.is_contiguous() for x in rules.tensors())
    n, total = len(batch.rows), heads.lengths[0].numel()
    short = torch.full((1,), -1, dtype=torch.int32, device=batch.rows.device)
    step = (batch.rows, batch.num_tokens, batch.token_classes)
    tables = (heads.page_table, heads.table_start, heads.lengths)
    sizes = {"HEADS": total, "BLOCK_SIZE": pages.block_size, "UNIT": RATIO_UNIT}
    grow_kernel[(n,)](
        *step,
        *tables,
        heads.num_sticky,
        rules.sticky_kinds,
        rules.frequent,
        rules.local,
        rules.least_window,
        heads.free_pages,
        heads.num_free,
        slots,
        short,
        heads.free_pages.stride(0),
        HEADS_PAD=triton.next_power_of_2(total),
        **sizes,
    )
    place_kernel[(n, total)](
        *step,
        *tables,
        rules.sticky_kinds,
        rules.local,
        rules.least_window,
        rules.averages,
        positions,
        scores,
        slots,
        NO_TOKEN=EMPTY,
        INT_MAX=_INT_MAX,
        TILE=256,
        **sizes,
    )
    return short
