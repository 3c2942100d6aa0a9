"""The profiling pass of peaks, for all prompts of a step: the most attention that a key receives of
one query, the sum, and the norm of its value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgen_vllm.kernels.contract import Looks, PromptBatch
from fastgen_vllm.kernels.triton.common import INTERPRETED, LOG2_E, product


# What changes from chunk to chunk: no new compilation for its divisors.
@triton.jit(do_not_specialize=["layer", "stride_tn", "stride_sh", "stride_sg"])
def attention_peaks_kernel(
    query,
    pages,
    block_table,
    lse,
    log_weights,
    looks,
    found,
    layer,
    num_layers,
    pages_per_block,
    scale_log2,
    stride_qc,
    stride_qh,
    stride_qg,
    stride_tn,
    stride_sc,
    stride_sh,
    stride_sg,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``TILE`` keys of one head, for one look. Nobody else writes what is found of them."""
    look = looks + tl.program_id(2) * 8
    prompt, first, num_queries = tl.load(look), tl.load(look + 1), tl.load(look + 2).to(tl.int32)
    step, first_position = tl.load(look + 3).to(tl.int32), tl.load(look + 4).to(tl.int32)
    num_keys = tl.load(look + 5)
    weights, into = log_weights + tl.load(look + 6), found + tl.load(look + 7)
    first_key, head = tl.program_id(0) * TILE, tl.program_id(1).to(tl.int64)
    if first_key >= num_keys:
        return
    key, lane = first_key + tl.arange(0, TILE), tl.arange(0, D_PAD)
    is_key, is_lane = key < num_keys, lane < D
    table = block_table + prompt * stride_tn
    block = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
    page = block * pages_per_block + head
    slot = pages + (page * BLOCK_SIZE + key % BLOCK_SIZE)[:, None] * (2 * D) + lane[None, :]
    mask = is_key[:, None] & is_lane[None, :]
    k = tl.load(slot, mask=mask, other=0.0)
    v = tl.load(slot + D, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(v * v, 1))
    behind = tl.maximum(first_key - first_position, 0)
    first_query = (behind + step - 1) // step
    best, total = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for g in range(0, G):
        for start in range(first_query, num_queries, TILE):
            i = start + tl.arange(0, TILE)
            is_query = i < num_queries
            position, row = first_position + i * step, first + i * step
            q_at = query + row[:, None] * stride_qc + head * stride_qh + g * stride_qg
            q_mask = is_query[:, None] & is_lane[None, :]
            q = tl.load(q_at + lane[None, :], mask=q_mask, other=0.0).to(k.dtype)
            lse_at = lse + row * stride_sc + head * stride_sh + g * stride_sg
            # score - inf drops queries past the end.
            normaliser = tl.load(lse_at, mask=is_query, other=float("inf"))
            normaliser -= tl.load(weights + i, mask=is_query, other=0.0)
            score = product(k, tl.trans(q), INTERPRETED) * scale_log2
            score -= normaliser[None, :] * 1.4426950408889634
            seen = position[None, :] >= key[:, None]
            p = tl.exp2(tl.where(seen, score, float("-inf")))
            best = tl.maximum(best, tl.max(p, 1))
            total += tl.sum(p, 1)
    heads = tl.num_programs(1)
    of_layer = num_layers * heads * num_keys
    into += (layer * heads + head) * num_keys + key
    tl.store(into, best, mask=is_key)
    tl.store(into + of_layer, total, mask=is_key)
    tl.store(into + 2 * of_layer, norm, mask=is_key)


def attention_peaks(
    query: torch.Tensor,
    lse: torch.Tensor,
    kv: torch.Tensor,
    prompts: PromptBatch,
    looks: Looks,
    layer: int,
    scale: float,
) -> None:
    """As ``reference.attention_peaks``."""
    _, heads, group, head_size = query.shape
    assert query.stride(3) == prompts.block_table.stride(1) == 1
    tile = 64 if head_size <= 128 else 32
    most = max(look.num_keys for look in looks.each)
    attention_peaks_kernel[(triton.cdiv(most, tile), heads, len(looks.each))](
        query,
        kv,
        prompts.block_table,
        lse,
        looks.log_weights,
        looks.table,
        looks.all_found,
        layer,
        looks.found[0].shape[1],
        prompts.pages_per_block,
        scale * LOG2_E,
        *query.stride()[:3],
        prompts.block_table.stride(0),
        *lse.stride(),
        G=group,
        D=head_size,
        D_PAD=max(16, triton.next_power_of_2(head_size)),
        BLOCK_SIZE=kv.shape[1],
        TILE=tile,
        INTERPRETED=INTERPRETED,
    )
