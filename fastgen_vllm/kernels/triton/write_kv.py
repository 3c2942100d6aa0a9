"""Cache write by head slot mapping."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write_kv_kernel(
    key,
    value,
    pages,
    slots,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_st,
    stride_sh,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, D_PAD)
    inside = lane < D
    slot = tl.load(slots + token * stride_st + head * stride_sh)
    k = tl.load(key + token * stride_kt + head * stride_kh + lane, mask=inside)
    v = tl.load(value + token * stride_vt + head * stride_vh + lane, mask=inside)
    target = pages + slot * (2 * D) + lane
    tl.store(target, k.to(pages.dtype.element_ty), mask=inside)
    tl.store(target + D, v.to(pages.dtype.element_ty), mask=inside)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """As ``reference.write_kv``."""
    tokens, heads, head_size = key.shape
    if tokens == 0:
        return
    assert key.stride(2) == value.stride(2) == 1 and pages.is_contiguous()
    write_kv_kernel[(tokens, heads)](
        key,
        value,
        pages,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        slots.stride(0),
        slots.stride(1),
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
    )
