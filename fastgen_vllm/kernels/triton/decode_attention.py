"""Decode attention over head block tables: one query token per request.

Two passes. The first gives each program at most ``split`` slots of one head, so that heads whose
lengths differ tenfold load the device evenly; the query heads of a GQA group share one tile, so K
and V are read once. The second merges the splits by their log-sum-exps and adds the probabilities
to the slot scores, from logits that the first pass left (``4 G`` bytes a slot beside the ``4 D``
of K and V in 16 bits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastgen_vllm.kernels.contract import PEAK_DISTANCE, DecodeBatch, HeadState, Pages
from fastgen_vllm.kernels.triton.common import INTERPRETED, LOG2_E, product
from fastgen_vllm.tensors import LOGITS_BYTES

_CHANGING = ["num_splits", "max_slots"]
"""Arguments that grow with the heads: no new compilation for their divisors."""


@triton.jit(do_not_specialize=_CHANGING)
def attend_kernel(
    query,
    pages,
    positions,
    rows,
    page_table,
    table_start,
    lengths,
    keeps_scores,
    logits,
    partial,
    partial_lse,
    scale_log2,
    heads,
    split_slots,
    num_splits,
    max_slots,
    stride_qn,
    stride_qh,
    stride_qg,
    stride_sr,
    stride_sh,
    stride_lr,
    stride_lh,
    stride_kr,
    stride_kh,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, head = index // heads, index % heads
    row = tl.load(rows + n)
    length = tl.load(lengths + row * stride_lr + head * stride_lh)
    first = split * split_slots
    if first >= length:
        return
    last = tl.minimum(first + split_slots, length)
    keeps = tl.load(keeps_scores + row * stride_kr + head * stride_kh) != 0
    group, lane = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    q_mask = (group < G)[:, None] & (lane < D)[None, :]
    q_at = query + n * stride_qn + head * stride_qh + group[:, None] * stride_qg + lane[None, :]
    q = tl.load(q_at, mask=q_mask, other=0.0).to(pages.dtype.element_ty)
    table = page_table + tl.load(table_start + row * stride_sr + head * stride_sh)
    highest = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, D_PAD], tl.float32)
    for start in range(first, last, TILE):
        slot = start + tl.arange(0, TILE)
        in_use = slot < last
        page = tl.load(table + slot // BLOCK_SIZE, mask=in_use, other=0).to(tl.int64)
        at = page * BLOCK_SIZE + slot % BLOCK_SIZE
        live = tl.load(positions + at, mask=in_use, other=-1) >= 0
        mask = live[:, None] & (lane < D)[None, :]
        content = pages + at[:, None] * (2 * D) + lane[None, :]
        k = tl.load(content, mask=mask, other=0.0)
        v = tl.load(content + D, mask=mask, other=0.0)
        score = product(q, tl.trans(k), INTERPRETED) * scale_log2
        score = tl.where(live[None, :], score, float("-inf"))
        if keeps:
            left = logits + (index * max_slots + slot[None, :]) * G + group[:, None]
            tl.store(left, score, mask=in_use[None, :] & (group < G)[:, None])
        new_highest = tl.maximum(highest, tl.max(score, 1))
        # Nothing live so far: any finite reference keeps -inf - -inf out.
        against = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        prob = tl.exp2(score - against[:, None])
        fade = tl.exp2(highest - against)
        total = total * fade + tl.sum(prob, 1)
        acc = acc * fade[:, None] + product(prob.to(v.dtype), v, INTERPRETED)
        highest = new_highest
    into = (index * num_splits + split) * G + group
    weight = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, highest + tl.log2(weight), float("-inf"))
    tl.store(partial_lse + into, lse, mask=group < G)
    tl.store(partial + into[:, None] * D + lane[None, :], acc / weight[:, None], mask=q_mask)


@triton.jit(do_not_specialize=_CHANGING)
def merge_kernel(
    positions,
    rows,
    page_table,
    table_start,
    lengths,
    keeps_scores,
    decays,
    num_tokens,
    scores,
    logits,
    partial,
    partial_lse,
    output,
    heads,
    split_slots,
    num_splits,
    max_slots,
    stride_on,
    stride_oh,
    stride_og,
    stride_sr,
    stride_sh,
    stride_lr,
    stride_lh,
    stride_kr,
    stride_kh,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PEAK_DISTANCE: tl.constexpr,
):
    index, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, head = index // heads, index % heads
    row = tl.load(rows + n)
    length = tl.load(lengths + row * stride_lr + head * stride_lh)
    first = split * split_slots
    if first >= length:
        return
    used = (length + split_slots - 1) // split_slots
    group, lane = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    highest = tl.full([G_PAD], float("-inf"), tl.float32)
    against = tl.zeros([G_PAD], tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    for start in range(0, used, SPLITS):
        some = start + tl.arange(0, SPLITS)
        lse_at = partial_lse + (index * num_splits + some[:, None]) * G + group[None, :]
        lse_mask = (some < used)[:, None] & (group < G)[None, :]
        lse = tl.load(lse_at, mask=lse_mask, other=float("-inf"))
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        against = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        fade = tl.exp2(highest - against)
        total = total * fade + tl.sum(tl.exp2(lse - against[None, :]), 0)
        highest = new_highest
    merged = against + tl.log2(tl.maximum(total, 1e-30))
    if split == 0:
        mask = (group < G)[:, None] & (lane < D)[None, :]
        acc = tl.zeros([G_PAD, D_PAD], tl.float32)
        for s in range(0, used):
            part = (index * num_splits + s) * G + group
            one = tl.load(partial_lse + part, mask=group < G, other=float("-inf"))
            value = tl.load(partial + part[:, None] * D + lane[None, :], mask=mask, other=0.0)
            acc += tl.exp2(one - merged)[:, None] * value
        out = output + n * stride_on + head * stride_oh + group[:, None] * stride_og + lane[None, :]
        tl.store(out, acc.to(output.dtype.element_ty), mask=mask)
    if tl.load(keeps_scores + row * stride_kr + head * stride_kh) != 0:
        table = page_table + tl.load(table_start + row * stride_sr + head * stride_sh)
        last = tl.minimum(first + split_slots, length)
        decay = tl.load(decays + row * stride_kr + head * stride_kh)
        far = tl.load(num_tokens + n) - PEAK_DISTANCE
        for start in range(first, last, TILE):
            slot = start + tl.arange(0, TILE)
            in_use = slot < last
            page = tl.load(table + slot // BLOCK_SIZE, mask=in_use, other=0).to(tl.int64)
            at = page * BLOCK_SIZE + slot % BLOCK_SIZE
            position = tl.load(positions + at, mask=in_use, other=-1)
            live = position >= 0
            left = logits + (index * max_slots + slot[:, None]) * G + group[None, :]
            mask = live[:, None] & (group < G)[None, :]
            logit = tl.load(left, mask=mask, other=float("-inf"))
            received = tl.sum(tl.exp2(logit - merged[None, :]), 1)
            before = tl.load(scores + at, mask=live, other=0.0)
            peak = tl.maximum(before * decay, tl.where(position < far, received, 0.0))
            tl.store(scores + at, tl.where(decay > 0, peak, before + received), mask=live)


def split_size(programs: int, max_slots: int, tile: int, device: torch.device) -> int:
    """Slots per program, a power of two of tiles: some programs for each multiprocessor, long
    enough that the merge costs little."""
    wanted = 4 * _num_multiprocessors(device)
    size = tile
    while size < 2048 and programs * (max_slots // (2 * size)) >= wanted:
        size *= 2
    return size


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class FirstPass:
    """Arguments of the first pass: one layer's, and where it leaves its parts.

    Attributes:
        rows: int64 ``[N]``.
        table_start, lengths, keeps_scores, decay: ``[R, H]``, of the layer.
        num_tokens: int64 ``[N]``.
        logits: float32 ``[N, H, max_slots, G]``, base 2, written for heads that keep scores.
        partial: float32 ``[N, H, splits, G, D]``, written.
        partial_lse: float32 ``[N, H, splits, G]``, base 2, written.
        split_slots: slots of a split.
    """

    query: torch.Tensor
    pages: Pages
    rows: torch.Tensor
    page_table: torch.Tensor
    table_start: torch.Tensor
    lengths: torch.Tensor
    keeps_scores: torch.Tensor
    decay: torch.Tensor
    num_tokens: torch.Tensor
    logits: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor
    scale_log2: float
    split_slots: int
    max_slots: int

    @property
    def grid(self) -> tuple[int, int]:
        n, heads, num_splits = self.partial.shape[:3]
        return n * heads, num_splits

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.partial.shape[1], self.split_slots, self.partial.shape[2], self.max_slots

    @property
    def strides(self) -> tuple[int, ...]:
        return (
            *self.table_start.stride(),
            *self.lengths.stride(),
            *self.keeps_scores.stride(),
        )

    @property
    def constants(self) -> dict[str, int]:
        group, head_size = self.query.shape[2:]
        return {
            "G": group,
            "D": head_size,
            "D_PAD": max(16, triton.next_power_of_2(head_size)),
            "BLOCK_SIZE": self.pages.block_size,
            "TILE": _tile(head_size),
        }


def _tile(head_size: int) -> int:
    return 64 if head_size <= 128 else 32


def attend(p: FirstPass) -> None:
    """The first pass in Triton."""
    attend_kernel[p.grid](
        p.query,
        p.pages.kv,
        p.pages.positions,
        p.rows,
        p.page_table,
        p.table_start,
        p.lengths,
        p.keeps_scores,
        p.logits,
        p.partial,
        p.partial_lse,
        p.scale_log2,
        *p.sizes,
        *p.query.stride()[:3],
        *p.strides,
        # 16 rows are the least that tensor cores multiply.
        G_PAD=max(16, triton.next_power_of_2(p.query.shape[2])),
        INTERPRETED=INTERPRETED,
        **p.constants,
    )


def merge(p: FirstPass, output: torch.Tensor) -> None:
    """The second pass."""
    merge_kernel[p.grid](
        p.pages.positions,
        p.rows,
        p.page_table,
        p.table_start,
        p.lengths,
        p.keeps_scores,
        p.decay,
        p.num_tokens,
        p.pages.scores,
        p.logits,
        p.partial,
        p.partial_lse,
        output,
        *p.sizes,
        *output.stride()[:3],
        *p.strides,
        G_PAD=triton.next_power_of_2(p.query.shape[2]),
        SPLITS=16,
        PEAK_DISTANCE=PEAK_DISTANCE,
        **p.constants,
    )


def decode_in_parts(
    first_pass: Callable[[FirstPass], None],
    query: torch.Tensor,
    pages: Pages,
    heads: HeadState,
    batch: DecodeBatch,
    layer: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Both passes, over as many requests at once as the scratch for logits allows."""
    n, num_heads, group, head_size = query.shape
    max_slots = batch.max_pages * pages.block_size
    assert query.stride(3) == output.stride(3) == heads.page_table.stride(0) == 1
    assert all(x.is_contiguous() for x in (pages.kv, pages.positions, pages.scores))
    at_once = max(1, LOGITS_BYTES // (num_heads * max_slots * group * 4))
    for start in range(0, n, at_once):
        part = slice(start, min(start + at_once, n))
        count = part.stop - part.start
        size = batch.split_slots
        if not size:
            size = split_size(count * num_heads, max_slots, _tile(head_size), query.device)
        splits = triton.cdiv(max_slots, size)

        def scratch(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=query.device)

        arguments = FirstPass(
            query[part],
            pages,
            batch.rows[part],
            heads.page_table,
            heads.table_start[:, layer],
            heads.lengths[:, layer],
            heads.rules.keeps_scores[:, layer],
            heads.rules.decay[:, layer],
            batch.num_tokens[part],
            scratch(count, num_heads, max_slots, group),
            scratch(count, num_heads, splits, group, head_size),
            scratch(count, num_heads, splits, group),
            scale * LOG2_E,
            size,
            max_slots,
        )
        first_pass(arguments)
        merge(arguments, output[part])


def decode_attention(
    query: torch.Tensor,
    pages: Pages,
    heads: HeadState,
    batch: DecodeBatch,
    layer: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    """As ``reference.decode_attention``."""
    decode_in_parts(attend, query, pages, heads, batch, layer, scale, output)
