"""The native CPU kernels of csrc/cpu, with the signatures of ``kernels/reference.py``."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from fastgen_vllm.kernels.reference import move_pages

__all__ = [
    "attention_mass",
    "decode_attention",
    "move_pages",
    "pack_slots",
    "plan_decode",
    "prefill_attention",
    "write_kv",
]

NAME = "native"
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    wanted = os.environ.get("FASTGEN_CPU_ISA")
    for isa in (wanted,) if wanted else INSTRUCTION_SETS:
        if torch.ops.fastgen.set_isa(isa):
            return ""
    return f"this CPU has none of {', '.join([wanted] if wanted else INSTRUCTION_SETS)}"


def problem(head_size: int, dtype: torch.dtype) -> str:
    """Why these kernels cannot serve such a cache, or an empty string."""
    if head_size % 16 or head_size > 256:
        return f"head size {head_size} is not a multiple of 16 up to 256"
    if dtype not in DTYPES:
        return f"the cache's dtype is {dtype}"
    return _load()


def use_huge_pages(storage: torch.Tensor) -> None:
    """Ask the kernel to back ``storage`` by 2 MiB pages: decode reads small pages scattered over
    all of it, and address translation is a tenth of its time. Without effect where refused."""
    huge, advice = 2 << 20, (14, 25)  # MADV_HUGEPAGE, MADV_COLLAPSE
    start = -(-storage.data_ptr() // huge) * huge
    size = (storage.data_ptr() + storage.nbytes) // huge * huge - start
    if size > 0:
        madvise = ctypes.CDLL(None).madvise
        for value in advice:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), value)


def write_kv(
    key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
) -> None:
    torch.ops.fastgen.write_kv(key.to(pages.dtype), value.to(pages.dtype), pages, slots)


def prefill_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    num_keys: int,
    scale: float,
    output: torch.Tensor,
) -> torch.Tensor:
    if query.dtype == pages.dtype == output.dtype:
        return torch.ops.fastgen.prefill_attention(
            query, pages, page_table, num_keys, scale, output
        )
    attended = torch.empty_like(query, dtype=pages.dtype)
    lse = torch.ops.fastgen.prefill_attention(
        query.to(pages.dtype), pages, page_table, num_keys, scale, attended
    )
    output.copy_(attended)
    return lse


def attention_mass(
    query: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    num_keys: int,
    lse: torch.Tensor,
    first_position: int,
    position_step: int,
    bounds: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
) -> None:
    torch.ops.fastgen.attention_mass(
        query.to(pages.dtype),
        pages,
        page_table,
        num_keys,
        lse,
        first_position,
        position_step,
        bounds,
        scale,
        mass,
    )


def decode_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    page_table: torch.Tensor,
    table_start: torch.Tensor,
    lengths: torch.Tensor,
    keeps_scores: torch.Tensor,
    scores: torch.Tensor,
    max_pages: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    same = query.dtype == pages.dtype == output.dtype
    attended = output if same else torch.empty_like(query, dtype=pages.dtype)
    torch.ops.fastgen.decode_attention(
        query.to(pages.dtype),
        pages,
        positions,
        rows,
        page_table,
        table_start,
        lengths,
        keeps_scores,
        scores,
        scale,
        attended,
    )
    if not same:
        output.copy_(attended)


def plan_decode(
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    special: torch.Tensor,
    punctuation: torch.Tensor,
    ladder: list[torch.Tensor],
    mean: bool,
    page_table: torch.Tensor,
    table_start: torch.Tensor,
    lengths: torch.Tensor,
    num_sticky: torch.Tensor,
    policy: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    positions: torch.Tensor,
    scores: torch.Tensor,
    slots: torch.Tensor,
) -> int:
    return torch.ops.fastgen.plan_decode(
        rows,
        num_tokens,
        special,
        punctuation,
        ladder,
        mean,
        page_table,
        table_start,
        lengths,
        num_sticky,
        policy,
        free_pages,
        num_free,
        positions,
        scores,
        slots,
    )


def pack_slots(pages: torch.Tensor, page_table: torch.Tensor, kept: torch.Tensor) -> None:
    torch.ops.fastgen.pack_slots(pages, page_table.contiguous(), kept.contiguous())
