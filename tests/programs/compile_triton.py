"""Compiles every Triton kernel for the compute capability given, on a machine without a GPU.

The operations are called as in the engine; their launches compile for the device and stop there.
Prints a line per kernel: its name and the bytes of its cubin and of its shared memory.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import torch
import triton
from helpers.kernel_cases import Tables
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastgen_vllm.kernels import triton as ops


class NoDevice:
    """A Triton driver of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_nothing(capability: int) -> None:
    triton.runtime.driver.set_active(NoDevice(capability))
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(self.__name__, len(kernel.asm["cubin"]), kernel.metadata.shared, flush=True)
        return kernel

    JITFunction.run = compile_only


def every_operation(group: int, head_size: int, dtype: torch.dtype) -> None:
    n, heads, block_size, width = 3, 2, 16, 8
    num_pages = 2 * n * heads * width + 1
    pages = torch.zeros(num_pages, block_size, 2 * head_size, dtype=dtype)
    key = torch.zeros(n, heads, head_size, dtype=dtype)
    ops.write_kv(key, key, pages, torch.zeros(n, heads, dtype=torch.int64))
    query = torch.zeros(n, heads, group, head_size, dtype=dtype)
    ops.decode_attention(
        query,
        pages,
        torch.zeros(num_pages, block_size, dtype=torch.int32),
        torch.arange(n),
        torch.zeros(n * 2 * heads * width, dtype=torch.int32),
        torch.zeros(n, 2, heads, dtype=torch.int64)[:, 0],
        torch.zeros(n, 2, heads, dtype=torch.int32)[:, 0],
        torch.zeros(n, 2, heads, dtype=torch.bool)[:, 0],
        torch.zeros(num_pages, block_size),
        width,
        1.0,
        torch.zeros_like(query),
    )
    table = torch.zeros(heads, width, dtype=torch.int64)
    for groups in {1, group}:
        mass = torch.zeros(heads, groups, 100, 5)
        bounds = torch.tensor([1, 4, 20, 100])
        lse = torch.zeros(n, heads, group)
        ops.attention_mass(query, pages, table, 100, lse, 90, 3, bounds, 1.0, mass)
    kept = torch.ones(2, heads, 100, dtype=torch.bool)
    ops.pack_slots(pages, torch.zeros(2, heads, width, dtype=torch.int64), kept)
    ops.move_pages(pages, torch.arange(4), torch.arange(4) + 4)


def bookkeeping() -> None:
    tables, n = Tables.random(4, 16, 1), 3
    state = [getattr(tables, field.name) for field in fields(Tables)]
    ladder = [torch.tensor([x]) for x in (False, False, True)] + [torch.tensor([0])] * 3
    none = torch.zeros(n, dtype=torch.bool)
    slots = torch.zeros(n, 2, 2, dtype=torch.int64)
    for mean in (False, True):
        ops.plan_decode(torch.arange(n), torch.arange(n), none, none, ladder, mean, *state, slots)


if __name__ == "__main__":
    launch_nothing(int(sys.argv[1]))
    bookkeeping()
    every_operation(4, 128, torch.bfloat16)
    every_operation(7, 64, torch.float16)
    every_operation(3, 80, torch.float32)
