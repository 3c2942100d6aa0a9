"""Triton kernels, one operation a file, each doing what ``kernels/reference.py`` says.

They run on NVIDIA GPUs; under ``TRITON_INTERPRET=1`` Triton interprets them on CPU tensors, which
is how the test suite compares them with the reference.
"""

from __future__ import annotations

import torch

from fastgen_vllm.kernels.libraries import prefill_attention
from fastgen_vllm.kernels.reference import prepare, value_norms
from fastgen_vllm.kernels.triton.attention_mass import attention_mass
from fastgen_vllm.kernels.triton.attention_peaks import attention_peaks
from fastgen_vllm.kernels.triton.decode_attention import decode_attention
from fastgen_vllm.kernels.triton.free_pages import free_pages
from fastgen_vllm.kernels.triton.pack_slots import move_pages, pack_slots
from fastgen_vllm.kernels.triton.plan_decode import plan_decode
from fastgen_vllm.kernels.triton.write_kv import write_kv

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

NAME = "Triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(head_size: int, dtype: torch.dtype, group_size: int = 1) -> str:
    """Why these kernels cannot serve such a cache, or an empty string."""
    if head_size % 8 or head_size > 256:
        return f"head size {head_size} is not a multiple of 8 up to 256"
    if dtype not in DTYPES:
        return f"the cache's dtype is {dtype}"
    return ""
