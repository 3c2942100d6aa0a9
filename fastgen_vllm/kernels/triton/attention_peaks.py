"""The profiling pass of peaks: the most attention that a key receives of one query, and the sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgen_vllm.kernels.contract import ProfiledQueries, PromptKeys
from fastgen_vllm.kernels.triton.common import INTERPRETED, LOG2_E, product


# What changes from chunk to chunk: no new compilation for its divisors.
@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "first_position",
        "position_step",
        "stride_th",
        "stride_ph",
    ]
)
def attention_peaks_kernel(
    query,
    pages,
    page_table,
    lse,
    peaks,
    sums,
    num_queries,
    num_keys,
    first_position,
    position_step,
    scale_log2,
    stride_qc,
    stride_qh,
    stride_qg,
    stride_th,
    stride_sc,
    stride_sh,
    stride_sg,
    stride_ph,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``TILE`` keys of one head. Nobody else writes theirs."""
    first_key, head = tl.program_id(0) * TILE, tl.program_id(1).to(tl.int64)
    key, lane = first_key + tl.arange(0, TILE), tl.arange(0, D_PAD)
    is_key, is_lane = key < num_keys, lane < D
    table = page_table + head * stride_th
    page = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
    at = page * BLOCK_SIZE + key % BLOCK_SIZE
    mask = is_key[:, None] & is_lane[None, :]
    k = tl.load(pages + at[:, None] * (2 * D) + lane[None, :], mask=mask, other=0.0)
    behind = tl.maximum(first_key - first_position, 0)
    first_query = (behind + position_step - 1) // position_step
    best, total = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for g in range(0, G):
        for start in range(first_query, num_queries, TILE):
            i = start + tl.arange(0, TILE)
            is_query = i < num_queries
            position = first_position + i * position_step
            q_at = query + i[:, None].to(tl.int64) * stride_qc + head * stride_qh + g * stride_qg
            q_mask = is_query[:, None] & is_lane[None, :]
            q = tl.load(q_at + lane[None, :], mask=q_mask, other=0.0).to(k.dtype)
            lse_at = lse + i.to(tl.int64) * stride_sc + head * stride_sh + g * stride_sg
            # score - inf drops queries past the end.
            normaliser = tl.load(lse_at, mask=is_query, other=float("inf")) * 1.4426950408889634
            score = product(k, tl.trans(q), INTERPRETED) * scale_log2 - normaliser[None, :]
            seen = (position[None, :] >= key[:, None]) & is_key[:, None]
            p = tl.exp2(tl.where(seen, score, float("-inf")))
            best = tl.maximum(best, tl.max(p, 1))
            total += tl.sum(p, 1)
    into = head * stride_ph + key
    before = tl.load(peaks + into, mask=is_key, other=0.0)
    tl.store(peaks + into, tl.maximum(before, best), mask=is_key)
    before = tl.load(sums + into, mask=is_key, other=0.0)
    tl.store(sums + into, before + total, mask=is_key)


def attention_peaks(
    queries: ProfiledQueries,
    keys: PromptKeys,
    scale: float,
    peaks: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """As ``reference.attention_peaks``."""
    query, page_table = queries.query, keys.page_table
    c, heads, group, head_size = query.shape
    assert query.stride(3) == peaks.stride(1) == page_table.stride(1) == 1
    assert sums.stride() == peaks.stride()
    tile = 64 if head_size <= 128 else 32
    attention_peaks_kernel[(triton.cdiv(keys.num_keys, tile), heads)](
        query,
        keys.kv,
        page_table,
        queries.lse,
        peaks,
        sums,
        c,
        keys.num_keys,
        queries.first_position,
        queries.position_step,
        scale * LOG2_E,
        *query.stride()[:3],
        page_table.stride(0),
        *queries.lse.stride(),
        peaks.stride(0),
        G=group,
        D=head_size,
        D_PAD=max(16, triton.next_power_of_2(head_size)),
        BLOCK_SIZE=keys.kv.shape[1],
        TILE=tile,
        INTERPRETED=INTERPRETED,
    )
