"""Micro-benchmarks of the native kernels: time, bytes or operations, and the machine's own rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastgen_vllm.kernels import cpu
from fastgen_vllm.policy.choice import Ladder
from fastgen_vllm.policy.hybrids import ADAPTIVE_LADDER


@dataclass(frozen=True)
class ModelShape:
    """Attention of one layer."""

    num_kv_heads: int
    group_size: int
    head_size: int


@dataclass(frozen=True)
class KernelFigure:
    """``rate`` is GB/s of bytes that must move, or GFLOP/s, as ``unit`` says."""

    name: str
    milliseconds: float
    rate: float
    unit: str


def best_seconds(function: Callable[[], Any], rounds: int = 7) -> float:
    """The shortest of some runs: what the machine can do when left alone."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth(num_bytes: int = 1 << 29) -> float:
    """GB/s of summing a large array, all threads."""
    data = torch.zeros(num_bytes // 4)
    return num_bytes / best_seconds(data.sum) / 1e9


def decode_figures(
    shape: ModelShape, dtype: torch.dtype, num_requests: int, slots: int
) -> list[KernelFigure]:
    """Decode attention over scattered pages, with and without scores, and its bookkeeping.

    Layers follow each other as in a model, so that no layer finds its pages in the CPU's cache.
    """
    layers, block = 8, 16
    heads, D = shape.num_kv_heads, shape.head_size
    pages_each = slots // block
    num_pages = num_requests * layers * heads * pages_each + 1
    pages = torch.empty((num_pages, block, 2 * D), dtype=dtype).normal_()
    cpu.use_huge_pages(pages)
    positions = torch.zeros((num_pages, block), dtype=torch.int32)
    scores = torch.zeros((num_pages, block))
    table = (torch.randperm(num_pages - 1) + 1).int()
    start = pages_each * torch.arange(num_requests * layers * heads)
    start = start.view(num_requests, layers, heads)
    lengths = torch.full((num_requests, layers, heads), slots, dtype=torch.int32)
    rows = torch.arange(num_requests)
    query = torch.randn(num_requests, heads, shape.group_size, D).to(dtype)
    output = torch.empty_like(query)
    figures = []
    for keeps in (False, True):
        keeps_scores = torch.full(lengths.shape, keeps)

        def run(keeps_scores: torch.Tensor = keeps_scores) -> None:
            for layer in range(layers):
                cpu.decode_attention(
                    query,
                    pages,
                    positions,
                    rows,
                    table,
                    start[:, layer],
                    lengths[:, layer],
                    keeps_scores[:, layer],
                    scores,
                    pages_each,
                    0.1,
                    output,
                )

        seconds = best_seconds(run)
        # K and V, positions, and scores read and written.
        moved = lengths.numel() * slots * (2 * D * dtype.itemsize + 4 + (8 if keeps else 0))
        name = "decode attention" + (", with scores" if keeps else "")
        figures.append(KernelFigure(name, seconds / layers * 1e3, moved / seconds / 1e9, "GB/s"))
    return figures


def prefill_figures(shape: ModelShape, dtype: torch.dtype, num_tokens: int) -> list[KernelFigure]:
    """Prefill attention and the profiling pass over one prompt."""
    heads, group, D, block = shape.num_kv_heads, shape.group_size, shape.head_size, 16
    blocks = -(-num_tokens // block)
    pages = torch.empty((heads * blocks, block, 2 * D), dtype=dtype).normal_()
    table = torch.arange(heads * blocks).view(heads, blocks)
    query = torch.randn(num_tokens, heads, group, D).to(dtype)
    output = torch.empty_like(query)
    lse = torch.empty(0)

    def attend() -> None:
        nonlocal lse
        lse = cpu.prefill_attention(query, pages, table, num_tokens, 0.1, output)

    ladder = Ladder.from_hybrids(ADAPTIVE_LADDER, least_window=64)
    bounds = torch.tensor(ladder.windows(num_tokens))
    mass = torch.zeros(heads, 1, num_tokens, len(bounds) + 1)

    def profile() -> None:
        cpu.attention_mass(query, pages, table, num_tokens, lse, 0, 1, bounds, 0.1, mass)

    pairs = heads * group * num_tokens * (num_tokens + 1) / 2
    figures = []
    for name, run, products in (("prefill attention", attend, 2), ("attention mass", profile, 1)):
        seconds = best_seconds(run)
        rate = pairs * products * 2 * D / seconds / 1e9
        figures.append(KernelFigure(name, seconds * 1e3, rate, "GFLOP/s"))
    return figures


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / best_seconds(lambda: a @ b.T) / 1e9


def kernel_figures(shape: ModelShape, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """All of it.

    Raises:
        RuntimeError: the native kernels cannot run here.
    """
    problem = cpu.problem(shape.head_size, dtype)
    if problem:
        raise RuntimeError(f"no native kernels to measure: {problem}")
    bandwidth = read_bandwidth()
    figures = decode_figures(shape, dtype, 16, 512 if quick else 2048)
    figures += prefill_figures(shape, dtype, 1024 if quick else 2048)
    return {
        "read_bandwidth_gb_s": bandwidth,
        "matmul_gflop_s": matmul_rate(dtype),
        "kernels": [asdict(figure) for figure in figures],
    }
