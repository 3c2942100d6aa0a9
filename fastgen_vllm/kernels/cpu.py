"""The native CPU kernels of csrc/cpu. Each function does what ``kernels/reference.py`` says."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastgen_vllm.kernels.contract import (
    PEAK_DISTANCE,
    DecodeBatch,
    HeadState,
    Looks,
    Pages,
    ProfiledQueries,
    PromptBatch,
    PromptKeys,
)
from fastgen_vllm.kernels.reference import free_pages, move_pages

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

NAME = "native"
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPERATIONS = (
    "write_kv",
    "prefill_attention",
    "attention_mass",
    "attention_peaks",
    "value_norms",
    "plan_decode",
    "decode_attention",
    "pack_slots",
)


@cache
def _load() -> str:
    """Load the extension and choose its instruction set; returns what is wrong, or nothing."""
    found = sorted(Path(__file__).parent.parent.glob("_cpu*.so"))
    if not found:
        return (
            "the extension was not built (reinstall with a C++ compiler and "
            "--no-build-isolation beside torch)"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the extension was built for another torch ({error})"
    missing = [name for name in OPERATIONS if not hasattr(torch.ops.fastgen, name)]
    if missing:
        return f"the extension was built from older sources, without {missing[0]} (reinstall)"
    wanted = os.environ.get("FASTGEN_CPU_ISA")
    for isa in (wanted,) if wanted else INSTRUCTION_SETS:
        if torch.ops.fastgen.set_isa(isa):
            return ""
    return f"this CPU has none of {', '.join([wanted] if wanted else INSTRUCTION_SETS)}"


def problem(head_size: int, dtype: torch.dtype, group_size: int = 1) -> str:
    """Why these kernels cannot serve such a cache, or an empty string."""
    if head_size % 16 or head_size > 256:
        return f"head size {head_size} is not a multiple of 16 up to 256"
    if dtype not in DTYPES:
        return f"the cache's dtype is {dtype}"
    return _load()


def prepare(kv: torch.Tensor) -> None:
    """Ask the system to back ``kv`` by 2 MiB pages: decode reads small pages scattered over all of
    it, and address translation is a tenth of its time. Without effect where the system refuses.

    What lies in memory already, as after ``torch.zeros``, is put into such pages now. Memory that
    was never touched is not: that would take all of it at once.
    """
    libc, huge = ctypes.CDLL(None), 2 << 20
    start = -(-kv.data_ptr() // huge) * huge
    size = (kv.data_ptr() + kv.nbytes) // huge * huge - start
    if size <= 0:
        return
    where = ctypes.c_void_p(start), ctypes.c_size_t(size)
    libc.madvise(*where, 14)  # MADV_HUGEPAGE
    resident = (ctypes.c_char * (size // mmap.PAGESIZE))()
    if libc.mincore(*where, resident) == 0 and b"\0" not in resident.raw:
        libc.madvise(*where, 25)  # MADV_COLLAPSE


def keep_freed_memory() -> None:
    """Let glibc keep, for the life of this process, what one layer's activations leave for the next
    ones, tensors of less than 32 MiB. Else it may give each back to the system, which then clears
    the pages anew: 240,000 page faults, a tenth of the time, for 4,096 tokens of SmolLM2-135M.
    Whether it does depends on what lies last on its heap. Without effect where another allocator
    serves the process, or the environment says what glibc is to do."""
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
    told = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & {*os.environ}
    if hasattr(libc, "mallopt") and not told:
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes


def write_kv(key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    torch.ops.fastgen.write_kv(key.to(kv.dtype), value.to(kv.dtype), kv, slots)


def prefill_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    prompts: PromptBatch,
    scale: float,
    output: torch.Tensor,
) -> torch.Tensor:
    dtype, attend = kv.dtype, torch.ops.fastgen.prefill_attention
    query, same = query.to(dtype), output.dtype == dtype
    attended = output if same else torch.empty_like(query)
    lse = torch.empty(query.shape[:3])
    for own, keys in prompts.chunks(kv):
        lse[own] = attend(query[own], kv, keys.page_table, keys.num_keys, scale, attended[own])
    if not same:
        output.copy_(attended)
    return lse


def attention_mass(
    queries: ProfiledQueries,
    keys: PromptKeys,
    bounds: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
) -> None:
    torch.ops.fastgen.attention_mass(*_profiled(queries, keys), bounds, scale, mass)


def attention_peaks(
    query: torch.Tensor,
    lse: torch.Tensor,
    kv: torch.Tensor,
    prompts: PromptBatch,
    looks: Looks,
    layer: int,
    scale: float,
) -> None:
    each = looks.queries(query, lse, prompts, kv)
    for (queries, keys), found in zip(each, looks.found, strict=True):
        peaks, sums, norms = found[:, layer]
        peaks.zero_()
        sums.zero_()
        torch.ops.fastgen.attention_peaks(*_profiled(queries, keys), scale, peaks, sums)
        norms.copy_(value_norms(keys))


def value_norms(keys: PromptKeys) -> torch.Tensor:
    return torch.ops.fastgen.value_norms(keys.kv, keys.page_table, keys.num_keys)


def _profiled(queries: ProfiledQueries, keys: PromptKeys) -> tuple[Any, ...]:
    """The arguments that both profiling passes begin with."""
    return (
        queries.query.to(keys.kv.dtype),
        keys.kv,
        keys.page_table,
        keys.num_keys,
        queries.lse,
        queries.first_position,
        queries.position_step,
    )


def plan_decode(pages: Pages, heads: HeadState, batch: DecodeBatch) -> torch.Tensor:
    rules = heads.rules
    return torch.ops.fastgen.plan_decode(
        batch.rows,
        batch.num_tokens,
        batch.token_classes,
        batch.slots,
        heads.page_table,
        heads.table_start,
        heads.lengths,
        heads.num_sticky,
        rules.sticky_kinds,
        rules.frequent,
        rules.local,
        rules.least_window,
        rules.averages,
        heads.free_pages,
        heads.num_free,
        pages.positions,
        pages.scores,
    )


def decode_attention(
    query: torch.Tensor,
    pages: Pages,
    heads: HeadState,
    batch: DecodeBatch,
    layer: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    dtype = pages.kv.dtype
    same = query.dtype == dtype == output.dtype
    attended = output if same else torch.empty_like(query, dtype=dtype)
    torch.ops.fastgen.decode_attention(
        query.to(dtype),
        pages.kv,
        pages.positions,
        batch.rows,
        heads.page_table,
        heads.table_start[:, layer],
        heads.lengths[:, layer],
        heads.rules.keeps_scores[:, layer],
        heads.rules.decay[:, layer],
        batch.num_tokens - PEAK_DISTANCE,
        pages.scores,
        scale,
        attended,
    )
    if not same:
        output.copy_(attended)


def pack_slots(
    pages: Pages, source: torch.Tensor, kept: torch.Tensor, target: torch.Tensor
) -> None:
    torch.ops.fastgen.pack_slots(
        pages.kv,
        pages.positions,
        pages.scores,
        source.contiguous(),
        kept.contiguous(),
        target.contiguous(),
    )
