"""Decode attention of csrc/cuda; the merge of its splits and every other operation in Triton."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from fastgen_vllm.kernels import triton
from fastgen_vllm.kernels.contract import DecodeBatch, HeadState, Pages
from fastgen_vllm.kernels.triton import (
    attention_mass,
    attention_peaks,
    free_pages,
    move_pages,
    pack_slots,
    plan_decode,
    prefill_attention,
    prepare,
    value_norms,
    write_kv,
)
from fastgen_vllm.kernels.triton.decode_attention import FirstPass, decode_in_parts

__all__ = [
    "NAME",
    "attention_mass",
    "attention_peaks",
    "decode_attention",
    "free_pages",
    "move_pages",
    "pack_slots",
    "plan_decode",
    "prefill_attention",
    "prepare",
    "value_norms",
    "write_kv",
]

NAME = "CUDA C++ and Triton"
HEAD_SIZES = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
MAX_GROUP = 8
PACKAGE = Path(__file__).parent.parent


def _built() -> Path | None:
    return next(PACKAGE.glob("_cuda*.so"), None)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_built()))


def problem(head_size: int, dtype: torch.dtype, group_size: int = 1) -> str:
    """Why these kernels cannot serve such a cache, or an empty string."""
    if head_size not in HEAD_SIZES:
        return f"head size {head_size} is none of {HEAD_SIZES}"
    if dtype not in DTYPES:
        return f"the cache's dtype is {dtype}, not float16 or bfloat16"
    if group_size > MAX_GROUP:
        return f"{group_size} query heads share a KV head, and it takes up to {MAX_GROUP}"
    if _built() is None:
        return (
            "the CUDA kernels were not built (reinstall where nvcc and a CUDA build of torch are, "
            "with --no-build-isolation)"
        )
    return triton.problem(head_size, dtype)


def _attend(p: FirstPass) -> None:
    n, heads, group, head_size = p.query.shape
    # 16-byte loads.
    assert all(stride % 8 == 0 for stride in p.query.stride()[:3])
    tensors = (
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
    )
    strides = (*p.query.stride()[:3], *p.strides)
    sizes = (
        n,
        heads,
        group,
        head_size,
        p.pages.block_size,
        p.split_slots,
        p.partial.shape[2],
        p.max_slots,
        int(p.pages.kv.dtype == torch.bfloat16),
    )
    error = _library().fastgen_decode_attention(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        ctypes.c_float(p.scale_log2),
        *map(ctypes.c_int, sizes),
        (ctypes.c_int64 * len(strides))(*strides),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    if error:
        raise RuntimeError(f"the CUDA decode kernel was not launched: cudaError_t {error}")


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
    decode_in_parts(_attend, query.to(pages.kv.dtype), pages, heads, batch, layer, scale, output)
