"""Compiles every Triton kernel for the compute capability given, on a machine without a GPU.

The operations are called as in the engine; their launches compile for the device and stop there.
Prints a line per kernel: its name and the bytes of its cubin and of its shared memory.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from helpers.kernel_cases import Tables
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastgen_vllm.kernels import DecodeBatch, Look, Looks, Pages, ProfiledQueries, PromptBatch
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
    n, heads, block_size = 3, 2, 16
    tables = Tables.random(4, block_size)
    num_pages = len(tables.pages.positions)
    kv = torch.zeros(num_pages, block_size, 2 * head_size, dtype=dtype)
    pages = Pages(kv, tables.pages.positions, tables.pages.scores)
    rows, classes = torch.arange(n), torch.zeros(n, dtype=torch.uint8)
    slots = torch.zeros(n, 2, heads, dtype=torch.int64)
    batch = DecodeBatch(rows, rows + 1, classes, slots, 6)
    ops.plan_decode(pages, tables.heads, batch)
    ops.free_pages(tables.heads, rows, rows + 1, block_size, 1)
    key = torch.zeros(n, heads, head_size, dtype=dtype)
    ops.write_kv(key, key, kv, slots[:, 0])
    query = torch.zeros(n, heads, group, head_size, dtype=dtype)
    ops.decode_attention(query, pages, tables.heads, batch, 0, 1.0, torch.zeros_like(query))
    table = torch.zeros(2, heads, 7, dtype=torch.int64)
    prompts = PromptBatch.of([torch.arange(7)], [n], [100], heads, heads, kv.device)
    ((_, keys),) = prompts.chunks(kv)
    lse = torch.zeros(n, heads, group)
    for groups in {1, group}:
        mass = torch.zeros(heads, groups, 100, 5)
        bounds = torch.tensor([1, 4, 20, 100])
        ops.attention_mass(ProfiledQueries(query, lse, 90, 3), keys, bounds, 1.0, mass)
    looks = Looks.of([Look(0, 0, n, 1, 65, 100)], [torch.zeros(n)], 2, heads, kv.device)
    ops.attention_peaks(query, lse, kv, prompts, looks, 0, 1.0)
    ops.pack_slots(pages, table, torch.ones(2, heads, 100, dtype=torch.bool), table)
    ops.move_pages(pages, torch.arange(4), torch.arange(4) + 4)


if __name__ == "__main__":
    launch_nothing(int(sys.argv[1]))
    every_operation(4, 128, torch.bfloat16)
    every_operation(7, 64, torch.float16)
    every_operation(3, 80, torch.float32)
