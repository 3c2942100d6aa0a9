"""A made-up request at start-up."""

from __future__ import annotations

import torch

from fastgen_vllm.config import RequestOverride
from fastgen_vllm.runtime.runtime import Runtime


def warm_up(runtime: Runtime) -> None:
    """Run a made-up request, so that no user's request waits for kernels to be compiled.

    Nobody may own a block yet: it uses the first ones, and leaves nothing but K and V there.
    """
    config, pool = runtime.config, runtime.pool
    name, device, dtype = "warm-up", pool.kv.device, pool.kv.dtype
    heads, size = pool.num_kv_heads, pool.kv.shape[-1] // 2
    room = (pool.num_blocks - 2) * pool.block_size
    n = min(2 * max(config.min_prompt_tokens, 4 * pool.block_size), room)
    compresses = config.method == "fastgen"
    runtime.begin_prefill(
        name, [0] * n, RequestOverride(fastgen_kv_budget=0.5 if compresses else None)
    )
    blocks = list(range(1, 1 + -(-n // pool.block_size)))
    for num_tokens, seen in ((n, n), (1, n + 1)):
        step = runtime.start_step(
            [name],
            torch.tensor([0, num_tokens]),
            torch.tensor([seen], device=device),
            torch.tensor([blocks], device=device),
            torch.zeros(num_tokens, dtype=torch.int64, device=device),
        )
        key = torch.randn(num_tokens, heads, size, dtype=dtype, device=device)
        query = key.repeat_interleave(runtime.group_size, dim=1)
        for layer in range(pool.num_layers):
            runtime.forward(step, layer, query, key, key, torch.empty_like(query), size**-0.5)
        runtime.finish_step(step).get()
        if seen == n:
            runtime.grant(name, [blocks[-1] + 1])
    page = pool.pages_of(torch.tensor(blocks[:1], device=device))[0, 0]
    runtime.kernels.move_pages(pool.kv, page, page)  # if all heads kept alike, none had to move
    runtime.release(name)
