"""vLLM's own flash attention for prefill, where its build has it for this GPU."""

from __future__ import annotations

from functools import cache

import torch

from fastgen_vllm.kernels import libraries
from fastgen_vllm.kernels.contract import PromptBatch

NAME = "vLLM's flash attention"


def _problem(dtype: torch.dtype, block_size: int) -> str:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it has no kernels for {dtype}"
    if block_size % 16:
        return f"blocks of {block_size} tokens are not a multiple of 16"
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401

        version = _version(128)
    except ImportError as error:
        return f"not importable ({error})"
    return "" if version else "this GPU is not supported"


def attend(
    query: torch.Tensor,
    kv: torch.Tensor,
    prompts: PromptBatch,
    scale: float,
    output: torch.Tensor,
) -> torch.Tensor:
    """As ``libraries.Attend``, for all prompts in one call: while a prompt is encoded, the pages of
    all its heads follow one block table. Its causal mask ends at the last key, as a chunk needs."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    heads, _, head_size = query.shape[1:]
    key, value = _in_blocks(kv, heads, prompts.pages_per_block).chunk(2, dim=-1)
    _, lse = flash_attn_varlen_func(
        query.flatten(1, 2),
        key,
        value,
        max_seqlen_q=max(prompts.lengths),
        cu_seqlens_q=prompts.starts,
        max_seqlen_k=max(prompts.num_keys),
        seqused_k=prompts.seen,
        block_table=prompts.block_table,
        softmax_scale=scale,
        causal=True,
        return_softmax_lse=True,
        out=output.view(len(output), -1, head_size),
        fa_version=_version(head_size),
    )
    return lse.T.unflatten(1, (heads, -1)).float()


def _in_blocks(kv: torch.Tensor, heads: int, pages_per_block: int) -> torch.Tensor:
    """The pages of a layer, of which ``kv`` begins with the first, as ``[num_blocks, block_size, H,
    2 * head_size]``."""
    num_pages, block_size, content = kv.shape
    page = block_size * content
    shape = (-(-num_pages // pages_per_block), block_size, heads, content)
    return kv.as_strided(shape, (pages_per_block * page, content, page, 1))


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


def prefer() -> None:
    """Put it in front of the other libraries."""
    if libraries.LIBRARIES[0][0] != NAME:
        libraries.LIBRARIES.insert(0, (NAME, _problem, attend))


def serves(dtype: torch.dtype, block_size: int) -> bool:
    """Whether it is what attends to a cache of this dtype and block size."""
    return libraries.choose(dtype, block_size)[0] == NAME
