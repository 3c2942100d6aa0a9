"""What requests own unused when a late report is read: one launch for a batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgen_vllm.kernels.contract import HeadState
from fastgen_vllm.kernels.triton.plan_decode import budgets
from fastgen_vllm.tensors import RATIO_UNIT


@triton.jit(do_not_specialize=["steps"])
def free_pages_kernel(
    rows,
    num_tokens,
    lengths,
    num_sticky,
    sticky_kinds,
    frequent,
    local,
    least_window,
    num_free,
    found,
    steps,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
):
    n = tl.program_id(0)
    row, t = tl.load(rows + n), tl.load(num_tokens + n) + steps
    head = tl.arange(0, HEADS_PAD)
    is_head = head < HEADS
    at = row * HEADS + head
    length = tl.load(lengths + at, mask=is_head, other=0)
    has_sticky = tl.load(sticky_kinds + at, mask=is_head, other=0) != 0
    sticky = tl.load(num_sticky + at, mask=is_head, other=0) + has_sticky.to(tl.int32) * steps
    grows = length < budgets(sticky, frequent, local, least_window, at, is_head, t, UNIT)
    left = (BLOCK_SIZE - length % BLOCK_SIZE) % BLOCK_SIZE
    takes = (is_head & grows & (left < steps)).to(tl.int32)
    tl.store(found + n, tl.load(num_free + row) - tl.sum(takes, 0))


def free_pages(
    heads: HeadState, rows: torch.Tensor, num_tokens: torch.Tensor, block_size: int, steps: int
) -> torch.Tensor:
    """As ``reference.free_pages``."""
    rules, total = heads.rules, heads.lengths[0].numel()
    found = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    if not len(rows):
        return found
    free_pages_kernel[(len(rows),)](
        rows,
        num_tokens,
        heads.lengths,
        heads.num_sticky,
        rules.sticky_kinds,
        rules.frequent,
        rules.local,
        rules.least_window,
        heads.num_free,
        found,
        steps,
        HEADS=total,
        HEADS_PAD=triton.next_power_of_2(total),
        BLOCK_SIZE=block_size,
        UNIT=RATIO_UNIT,
    )
    return found
