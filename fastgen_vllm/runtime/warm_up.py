"""A made-up request at start-up."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastgen_vllm.config import RequestOverride
from fastgen_vllm.policy.choice import Goal
from fastgen_vllm.runtime.driver import Driver
from fastgen_vllm.runtime.runtime import Runtime


def warm_up(runtime: Runtime) -> None:
    """Run made-up requests, so that no user's request waits for kernels to be compiled.

    Nobody may own a block yet: they use some, and leave nothing but K and V there. They are short,
    and compressed however short they are.
    """
    for goal in runtime.config.goals:
        if not goal.keeps_everything:
            _run(runtime, replace(goal, least_tokens=1))


def warm_up_captured(runtime: Runtime, num_requests: int, dtype: torch.dtype) -> None:
    """Launch what a captured step of so many requests launches, for nobody, with a model's dtype:
    nothing may be compiled while a graph is captured."""
    pool, step = runtime.pool, runtime.captured_step(num_requests)
    shape = (num_requests, pool.num_kv_heads, pool.kv.shape[-1] // 2)
    key = torch.zeros(shape, dtype=dtype, device=pool.kv.device)
    query = key.repeat_interleave(runtime.heads.group_size, dim=1)
    runtime.forward(step, 0, query, key, key, torch.empty_like(query), shape[-1] ** -0.5)


def _run(runtime: Runtime, goal: Goal) -> None:
    pool, name = runtime.pool, "warm-up"
    tokens = [0] * (8 * pool.block_size)
    driver = Driver(runtime)
    driver.begin(name, tokens, RequestOverride(fastgen_compress="always"))
    prompt = runtime.prompt_tokens(runtime.config, tokens, RequestOverride())
    runtime.prefills[name].profiles = [runtime.new_profile(prompt, goal)]
    n = len(tokens)
    for num_tokens in (n, 1):
        step = driver.start_step({name: num_tokens})
        shape = (num_tokens, pool.num_kv_heads, pool.kv.shape[-1] // 2)
        key = torch.randn(shape, dtype=pool.kv.dtype, device=pool.kv.device)
        query = key.repeat_interleave(runtime.heads.group_size, dim=1)
        for layer in range(pool.num_layers):
            output = torch.empty_like(query)
            runtime.forward(step, layer, query, key, key, output, shape[-1] ** -0.5)
        driver.finish_step(step, [name])
        driver.requests[name].tokens.append(0)
    page = pool.pages_of(torch.tensor([1], device=pool.kv.device))[0, 0]
    runtime.kernels.move_pages(pool, page, page)  # if all heads kept alike, none had to move
    driver.end(name)
