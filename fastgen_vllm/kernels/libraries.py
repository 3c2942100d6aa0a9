"""Prefill attention on GPUs, with the log-sum-exps that profiling needs, from a well-kept library.

Flash attention, which the vLLM plugin puts in front, reads keys and values where they lie. For the
others they are gathered first: ``8 D`` bytes moved per key and head in 16 bits, against ``4 c G D``
multiplications. The libraries are tried in the order of ``LIBRARIES`` and one is chosen for the
life of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from fastgen_vllm.kernels.contract import PromptBatch
from fastgen_vllm.kernels.reference import gather_keys

Attend = Callable[[torch.Tensor, torch.Tensor, PromptBatch, float, torch.Tensor], torch.Tensor]
"""As ``reference.prefill_attention``, for a query and an output in the dtype of the cache."""


def _one_by_one(
    attend: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]
    ],
) -> Attend:
    """Prompt by prompt: the keys of one are gathered at a time."""

    def attend_all(
        query: torch.Tensor,
        kv: torch.Tensor,
        prompts: PromptBatch,
        scale: float,
        output: torch.Tensor,
    ) -> torch.Tensor:
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        for own, keys in prompts.chunks(kv):
            output[own], lse[own] = attend(query[own], *gather_keys(keys), scale)
        return lse

    return attend_all


def sdpa_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the last ``c`` of ``m`` tokens: query ``[c, H, G, D]``, key and value
    ``[m, H, D]`` and a scale give the output ``[c, H, G, D]`` and the LSE, float32 ``[c, H, G]``.

    PyTorch's causal mask starts at the first key, so the prefix and the chunk itself are attended
    separately and merged.
    """
    prefix = key.shape[0] - query.shape[0]
    own, own_lse = _sdpa(query, key[prefix:], value[prefix:], scale, True)
    if not prefix:
        return own, own_lse
    before, before_lse = _sdpa(query, key[:prefix], value[:prefix], scale, False)
    lse = torch.logaddexp(own_lse, before_lse)
    output = own.float() * (own_lse - lse).exp()[..., None]
    output += before.float() * (before_lse - lse).exp()[..., None]
    return output.to(query.dtype), lse


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads are the batch, so that a group shares its keys without a copy of them."""
    c, _, groups, _ = query.shape
    q = query.permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (key, value))
    ops = torch.ops.aten
    if query.device.type == "cpu":
        flash = ops._scaled_dot_product_flash_attention_for_cpu
        output, lse = flash(q, k, v, 0.0, causal, scale=scale)
    else:
        efficient = ops._scaled_dot_product_efficient_attention
        output, lse = efficient(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return output.permute(2, 0, 1, 3), lse[..., :c].permute(2, 0, 1).float()


def _xformers_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """xformers' memory-efficient attention over one block of a block-diagonal causal mask."""
    from xformers.ops import fmha

    c, m, groups = query.shape[0], key.shape[0], query.shape[2]
    bias = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens([c], [m])
    k, v = (x[None, :, :, None].expand(-1, -1, -1, groups, -1) for x in (key, value))
    output, lse = fmha.memory_efficient_attention_forward_requires_grad(
        query[None].contiguous(), k, v, bias, scale=scale
    )
    return output[0], lse[0, :, :, :c].permute(2, 0, 1).float()


def _xformers_problem(dtype: torch.dtype, block_size: int) -> str:
    try:
        from xformers.ops import fmha
    except ImportError as error:
        return f"not importable ({error})"
    if not torch.cuda.is_available():
        return "it has kernels for GPUs only"
    return "" if hasattr(fmha, "memory_efficient_attention_forward_requires_grad") else "too old"


sdpa = _one_by_one(sdpa_of)

LIBRARIES: list[tuple[str, Callable[[torch.dtype, int], str], Attend]] = [
    ("xformers", _xformers_problem, _one_by_one(_xformers_of)),
    ("PyTorch SDPA", lambda dtype, block_size: "", sdpa),
]
"""Name, what keeps it from reading a cache of a dtype and block size here (empty: nothing), and the
function."""


@cache
def choose(dtype: torch.dtype, block_size: int) -> tuple[str, Attend]:
    """The first library that can serve a cache of this dtype and block size in this process."""
    return next(
        (name, attend) for name, problem, attend in LIBRARIES if not problem(dtype, block_size)
    )


def prefill_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    prompts: PromptBatch,
    scale: float,
    output: torch.Tensor,
) -> torch.Tensor:
    """As ``reference.prefill_attention``."""
    same = query.dtype == kv.dtype == output.dtype
    attended = output if same else torch.empty_like(output, dtype=kv.dtype)
    attend = choose(kv.dtype, kv.shape[1])[1]
    lse = attend(query.to(kv.dtype), kv, prompts, scale, attended)
    if not same:
        output.copy_(attended)
    return lse
