"""The profiling pass: attention mass by key and query-key distance."""

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
        "stride_sh",
        "stride_sg",
        "stride_mh",
        "stride_mg",
        "stride_mk",
        "buckets",
    ]
)
def attention_mass_kernel(
    query,
    pages,
    page_table,
    lse,
    edges,
    mass,
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
    stride_mh,
    stride_mg,
    stride_mk,
    buckets,
    G: tl.constexpr,
    SUMS_GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BUCKETS_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``KEYS`` keys of one head, or of one query head. Nobody else adds to their mass."""
    first_key, head = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    key, lane = first_key + tl.arange(0, KEYS), tl.arange(0, D_PAD)
    bucket = tl.arange(0, BUCKETS_PAD)
    bound = tl.load(edges + 1 + bucket, mask=bucket < buckets, other=0x7FFFFFFF)
    is_key, is_lane = key < num_keys, lane < D
    table = page_table + head * stride_th
    page = tl.load(table + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
    at = page * BLOCK_SIZE + key % BLOCK_SIZE
    mask = is_key[:, None] & is_lane[None, :]
    k = tl.load(pages + at[:, None] * (2 * D) + lane[None, :], mask=mask, other=0.0)
    last_key = tl.minimum(first_key + KEYS, num_keys) - 1
    behind = tl.maximum(first_key - first_position, 0)
    first_query = (behind + position_step - 1) // position_step
    acc = tl.zeros([KEYS, BUCKETS_PAD], tl.float32)
    for member in range(0, G if SUMS_GROUP else 1):
        g = member if SUMS_GROUP else tl.program_id(2)
        for start in range(first_query, num_queries, QUERIES):
            i = start + tl.arange(0, QUERIES)
            is_query = i < num_queries
            position = first_position + i * position_step
            q_at = query + i[:, None].to(tl.int64) * stride_qc + head * stride_qh + g * stride_qg
            q_mask = is_query[:, None] & is_lane[None, :]
            q = tl.load(q_at + lane[None, :], mask=q_mask, other=0.0).to(k.dtype)
            lse_at = lse + i.to(tl.int64) * stride_sc + head * stride_sh + g * stride_sg
            # exp2(score - inf) = 0 drops queries past the end.
            normaliser = tl.load(lse_at, mask=is_query, other=float("inf")) * 1.4426950408889634
            score = product(k, tl.trans(q), INTERPRETED) * scale_log2
            distance = position[None, :] - key[:, None]
            seen = (distance >= 0) & is_key[:, None]
            prob = tl.where(seen, tl.exp2(score - normaliser[None, :]), 0.0)
            nearest = tl.maximum(first_position + start * position_step - last_key, 0)
            end = tl.minimum(start + QUERIES, num_queries) - 1
            farthest = first_position + end * position_step - first_key
            low = tl.sum((bound <= nearest).to(tl.int32), 0)
            high = tl.sum((bound <= farthest).to(tl.int32), 0)
            for b in range(low, high + 1):
                inside = (distance >= tl.load(edges + b)) & (distance < tl.load(edges + b + 1))
                part = tl.sum(tl.where(inside, prob, 0.0), 1)
                acc += tl.where(bucket[None, :] == b, part[:, None], 0.0)
    group = 0 if SUMS_GROUP else tl.program_id(2)
    into = mass + head * stride_mh + group * stride_mg + key[:, None].to(tl.int64) * stride_mk
    into += bucket[None, :]
    m_mask = is_key[:, None] & (bucket < buckets)[None, :]
    tl.store(into, tl.load(into, mask=m_mask, other=0.0) + acc, mask=m_mask)


def attention_mass(
    queries: ProfiledQueries,
    keys: PromptKeys,
    bounds: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
) -> None:
    """As ``reference.attention_mass``."""
    query, page_table = queries.query, keys.page_table
    c, heads, group, head_size = query.shape
    assert query.stride(3) == mass.stride(3) == page_table.stride(1) == 1
    edges = torch.nn.functional.pad(bounds.int(), (1, 0))
    edges = torch.nn.functional.pad(edges, (0, 1), value=torch.iinfo(torch.int32).max)
    sums_group = mass.shape[1] == 1
    tile = 64 if head_size <= 128 else 32
    attention_mass_kernel[(triton.cdiv(keys.num_keys, tile), heads, 1 if sums_group else group)](
        query,
        keys.kv,
        page_table,
        queries.lse,
        edges,
        mass,
        c,
        keys.num_keys,
        queries.first_position,
        queries.position_step,
        scale * LOG2_E,
        *query.stride()[:3],
        page_table.stride(0),
        *queries.lse.stride(),
        *mass.stride()[:3],
        mass.shape[3],
        G=group,
        SUMS_GROUP=sums_group,
        D=head_size,
        D_PAD=max(16, triton.next_power_of_2(head_size)),
        BLOCK_SIZE=keys.kv.shape[1],
        # One compilation for prompts of any length.
        BUCKETS_PAD=max(16, triton.next_power_of_2(mass.shape[3])),
        KEYS=tile,
        QUERIES=tile,
        INTERPRETED=INTERPRETED,
    )
