"""vLLM's own CPU attention for prefill, where its build multiplies with AMX."""

from __future__ import annotations

from functools import lru_cache

import torch
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from fastgen_vllm.kernels import libraries
from fastgen_vllm.vllm_plugin.names import LOGGER

logger = init_logger(LOGGER)

BLOCK = 32
"""Tokens of a block in its cache, which AMX wants a multiple of."""


def instructions(dtype: torch.dtype, head_size: int) -> str:
    """What vLLM would run here: ``amx``, ``vec`` and so forth."""
    return _get_attn_isa(dtype, BLOCK, head_size)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """As ``libraries.AttendOnly``. With AMX its cache is packed, so pages cannot be read where they
    are: K and V go into a cache of this layer alone, which costs ``O(m)`` beside ``O(c m)``."""
    c, heads, groups, head_size = query.shape
    m, isa = key.shape[0], instructions(query.dtype, head_size)
    shape = (-(-m // BLOCK), heads, 2 * BLOCK, head_size)
    cache = torch.empty(shape, dtype=query.dtype)
    cache[-1].zero_()  # of slots past the last key it takes the product with 0
    key_cache, value_cache = cache.chunk(2, dim=2)
    starts, lengths, table, slots, plan = _plan(c, m, heads, groups, head_size, query.dtype, isa)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)
    output = torch.empty((c, heads * groups, head_size), dtype=query.dtype)
    ops.cpu_attention_with_kv_cache(
        query=query.flatten(1, 2),
        key_cache=key_cache,
        value_cache=value_cache,
        output=output,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
        softcap=0.0,
        scheduler_metadata=plan,
        s_aux=None,
    )
    return output.unflatten(1, (heads, groups))


@lru_cache(maxsize=256)
def _plan(
    c: int, m: int, heads: int, groups: int, head_size: int, dtype: torch.dtype, isa: str
) -> tuple[torch.Tensor, ...]:
    """The same in every layer of a step: where the chunk starts and ends, its tokens, its blocks,
    its slots, and vLLM's plan."""
    starts = torch.tensor([0, c], dtype=torch.int32)
    lengths = torch.tensor([m], dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=heads * groups,
        num_kv_heads=heads,
        head_dim=head_size,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    table = torch.arange(-(-m // BLOCK), dtype=torch.int32)[None]
    return starts, lengths, table, torch.arange(m), plan


def prefer(dtype: torch.dtype, head_size: int) -> None:
    """Use it for this cache, where it is faster than the native kernels: with AMX. A first chunk is
    compared with PyTorch's."""
    if instructions(dtype, head_size) != "amx":
        return
    if not _agrees(dtype, head_size):
        logger.warning("FASTGEN: vLLM's own attention is not used for prefill: it differs")
        return
    libraries.on_cpu[dtype, head_size] = attend
    logger.info("FASTGEN: prefill attention from vLLM's own, with AMX")


def _agrees(dtype: torch.dtype, head_size: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(70, 2, 3, head_size, generator=generator).to(dtype)
    key, value = torch.randn(2, 150, 2, head_size, generator=generator).to(dtype)
    found, wanted = attend(query, key, value, 0.1), libraries.sdpa_of(query, key, value, 0.1)[0]
    return bool((found.float() - wanted.float()).abs().max() < 0.05)
