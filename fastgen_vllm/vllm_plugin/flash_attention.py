"""vLLM's own flash attention for prefill, where its build has it for this GPU."""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from fastgen_vllm.kernels import libraries
from fastgen_vllm.tensors import to_device

NAME = "vLLM's flash attention"


def _problem(dtype: torch.dtype) -> str:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it has no kernels for {dtype}"
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401

        version = _version(128)
    except ImportError as error:
        return f"not importable ({error})"
    return "" if version else "this GPU is not supported"


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``libraries.Attend``. Its causal mask ends at the last key, as a chunk needs."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    c, heads, groups, head_size = query.shape
    m, device = key.shape[0], query.device
    output, lse = flash_attn_varlen_func(
        query.flatten(1, 2),
        key,
        value,
        max_seqlen_q=c,
        cu_seqlens_q=_one_sequence(c, device),
        max_seqlen_k=m,
        cu_seqlens_k=_one_sequence(m, device),
        softmax_scale=scale,
        causal=True,
        return_softmax_lse=True,
        fa_version=_version(head_size),
    )
    shape = (heads, groups)
    return output.unflatten(1, shape), lse.T.unflatten(1, shape).float()


def decode_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    used: torch.Tensor,
    max_tokens: int,
) -> torch.Tensor:
    """Decode attention over vLLM's own paged layout: what FastGen's is measured against.

    Args:
        query: ``[N, heads, D]``.
        key, value: ``[num_blocks, block_size, H, D]``.
        block_table: int32 ``[N, B]``.
        used: int32 ``[N]``, tokens of each request, at most ``max_tokens``.

    Raises:
        ImportError: this vLLM has no flash attention.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version = _version(query.shape[-1])
    if version is None:
        raise ImportError("this GPU is not supported")
    starts = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    return flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=max_tokens,
        seqused_k=used,
        causal=True,
        block_table=block_table,
        fa_version=version,
    )


@cache
def _version(head_size: int) -> int | None:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version(head_size=head_size, head_size_v=head_size)


@lru_cache(maxsize=64)
def _one_sequence(length: int, device: torch.device) -> torch.Tensor:
    """The same in every layer of a step."""
    return to_device(torch.tensor([0, length], dtype=torch.int32), device)


def prefer() -> None:
    """Put it in front of the other libraries."""
    if libraries.LIBRARIES[0][0] != NAME:
        libraries.LIBRARIES.insert(0, (NAME, _problem, attend))
