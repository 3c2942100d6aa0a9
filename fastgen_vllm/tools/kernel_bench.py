"""Micro-benchmarks of the kernels, on a CPU or a GPU: time, what must move, and the machine's own
rate. Needs torch alone, and triton for a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from fastgen_vllm.kernels import (
    UNBOUNDED,
    DecodeBatch,
    HeadRules,
    HeadState,
    Kernels,
    Look,
    Looks,
    Pages,
    ProfiledQueries,
    PromptBatch,
    cpu,
)
from fastgen_vllm.kernels.contract import PEAK_DISTANCE
from fastgen_vllm.profiler.queries import END_QUERIES
from fastgen_vllm.tensors import RATIO_UNIT
from fastgen_vllm.tools.models import ModelShape

BLOCK = 16
WINDOW_RATIOS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3)
"""Windows of the adaptive ladder's hybrids, which bound the distance buckets with its least one."""


class Clock:
    """Times by CUDA events, or by the host's clock where there is no GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def seconds(self, function: Callable[[], Any], total: float = 0.1) -> float:
        """On a GPU the median over as many runs as fit in ``total`` seconds, 3 at least; on a CPU
        the shortest of 7: what the machine can do when left alone."""
        function()
        if not self.cuda:
            return min(self._time(function) for _ in range(7))
        rounds = max(3, min(50, int(total / max(self._time(function), 1e-6))))
        return statistics.median(self._time(function) for _ in range(rounds))

    def _time(self, function: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The queue is never empty, so that launches by the host do not show, as in a CUDA graph.
        torch.cuda._sleep(20_000_000)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def copy_bandwidth(clock: Clock, num_bytes: int) -> float:
    """GB/s, read and written, of a large copy on the device."""
    source = torch.zeros(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock.seconds(lambda: target.copy_(source)) / 1e9


def read_bandwidth(clock: Clock, num_bytes: int = 1 << 29) -> float:
    """GB/s of summing a large array."""
    data = torch.zeros(num_bytes // 4)
    return num_bytes / clock.seconds(data.sum) / 1e9


def matmul_rate(clock: Clock, dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / clock.seconds(lambda: a @ b.T) / 1e9


def head_lengths(shape: tuple[int, ...], tokens: int, kept: float) -> torch.Tensor:
    """int32, ``kept * tokens`` on average; heads differ tenfold, as real profiles' do."""
    if kept >= 1.0:
        return torch.full(shape, tokens, dtype=torch.int32)
    spread = 10 ** torch.rand(shape)
    low, high = 0.0, 1.0
    for _ in range(40):
        scale = (low + high) / 2
        below = (spread * scale).clamp(max=1.0).mean() < kept
        low, high = (scale, high) if below else (low, scale)
    return (spread * high * tokens).clamp(1, tokens).int()


@dataclass(frozen=True)
class DecodeLoad:
    """What decodes: ``layers`` follow each other as in a model, so that no layer finds its pages in
    a cache; heads keep ``kept`` of ``tokens`` on average, and ``scored`` of them keep scores."""

    requests: int
    tokens: int
    layers: int
    kept: float = 1.0
    scored: float = 0.0


class DecodeState:
    """Decode state of a load: pages in random order. Heads of a third of the rules are full."""

    def __init__(self, shape: ModelShape, load: DecodeLoad, dtype: torch.dtype) -> None:
        self.load, self.head_size = load, shape.head_size
        heads = (load.requests, load.layers, shape.num_kv_heads)
        lengths = head_lengths(heads, load.tokens, load.kept)
        num_pages = -(-lengths // BLOCK) + 1
        ends = num_pages.flatten().cumsum(0)
        total = int(ends[-1]) + 1
        kv = torch.empty(total, BLOCK, 2 * shape.head_size, dtype=dtype).normal_()
        positions = torch.randint(load.tokens, (total, BLOCK), dtype=torch.int32)
        self.pages = Pages(kv, positions, torch.rand(total, BLOCK))
        self.heads = HeadState(
            (torch.randperm(total - 1) + 1).int(),
            (ends - num_pages.flatten()).view(heads),
            lengths,
            torch.ones(heads, dtype=torch.int32),
            self._rules(heads, lengths),
            torch.zeros(load.requests, 3 * load.layers * shape.num_kv_heads, dtype=torch.int32),
            torch.full((load.requests,), load.layers * shape.num_kv_heads, dtype=torch.int32),
        )
        rows = torch.arange(load.requests)
        self.batch = DecodeBatch(
            rows,
            torch.full((load.requests,), load.tokens),
            torch.zeros(load.requests, dtype=torch.uint8),
            torch.zeros(heads, dtype=torch.int64),
            int(num_pages.max()) - 1,
        )
        group = (load.requests, shape.num_kv_heads, shape.group_size, shape.head_size)
        self.query = torch.randn(group).to(dtype)
        self.output = torch.empty_like(self.query)

    def _rules(self, heads: tuple[int, ...], lengths: torch.Tensor) -> HeadRules:
        """Full heads append; the others, half of them by score, stand at their budget and evict."""
        rules = HeadRules.zeros(heads, lengths.device)
        full = (torch.rand(heads) < 1 / 3) | (lengths >= self.load.tokens - 1)
        rules.keeps_scores.copy_(torch.rand(heads) < self.load.scored)
        rules.frequent.copy_(rules.keeps_scores * (RATIO_UNIT // 10))
        rules.least_window.copy_(torch.where(full, UNBOUNDED, 64))
        return rules

    def attend(self, kernels: Kernels) -> None:
        """Every layer's decode attention."""
        for layer in range(self.load.layers):
            kernels.decode_attention(
                self.query,
                self.pages,
                self.heads,
                self.batch,
                layer,
                self.head_size**-0.5,
                self.output,
            )

    def plan(self, kernels: Kernels) -> None:
        """The step's bookkeeping. Lengths and free pages stay, so that it can be repeated."""
        lengths, num_free = self.heads.lengths.clone(), self.heads.num_free.clone()
        kernels.plan_decode(self.pages, self.heads, self.batch)
        self.heads.lengths.copy_(lengths)
        self.heads.num_free.copy_(num_free)

    @property
    def num_bytes(self) -> int:
        """What one layer's attention must move, on average: K, V and positions of kept slots,
        scores read and written."""
        slots = int(self.heads.lengths.sum())
        scored = int((self.heads.lengths * self.heads.rules.keeps_scores).sum())
        content = 2 * self.head_size * self.pages.kv.dtype.itemsize + 4
        return (slots * content + 8 * scored) // self.load.layers


class PrefillState:
    """One layer's prompt of ``tokens``, in scattered pages, and the operations on it."""

    def __init__(self, shape: ModelShape, tokens: int, dtype: torch.dtype) -> None:
        heads, width = shape.num_kv_heads, -(-tokens // BLOCK)
        self.kv = torch.empty(heads * width, BLOCK, 2 * shape.head_size, dtype=dtype).normal_()
        blocks = [torch.randperm(width, device="cpu")]
        device = self.kv.device
        self.prompts = PromptBatch.of(blocks, [tokens], [tokens], heads, heads, device)
        self.scale = shape.head_size**-0.5
        query = torch.randn(tokens, heads, shape.group_size, shape.head_size)
        self.query = query.to(dtype)
        self.output = torch.empty_like(self.query)
        self.lse = torch.zeros(tokens, heads, shape.group_size)
        windows = {64, *(int(ratio * tokens) for ratio in WINDOW_RATIOS)}
        self.bounds = torch.tensor(sorted(windows - {0}))
        self.received = torch.zeros(heads, 1, tokens, len(self.bounds) + 1)
        first, count = max(0, tokens - END_QUERIES), min(END_QUERIES, tokens)
        look = Look(0, first, count, 1, first - PEAK_DISTANCE, tokens)
        weights = torch.zeros(count, device="cpu")
        self.looks = Looks.of([look], [weights], 1, heads, device)

    def attend(self, kernels: Kernels) -> None:
        where = (self.kv, self.prompts, self.scale)
        self.lse = kernels.prefill_attention(self.query, *where, self.output)

    def profile(self, kernels: Kernels) -> None:
        """The default's profiling pass: peaks of the last queries."""
        where = (self.kv, self.prompts, self.looks)
        kernels.attention_peaks(self.query, self.lse, *where, 0, self.scale)

    def mass(self, kernels: Kernels) -> None:
        """That of a ladder: the mass of every query."""
        ((_, keys),) = self.prompts.chunks(self.kv)
        queries = ProfiledQueries(self.query, self.lse, 0, 1)
        kernels.attention_mass(queries, keys, self.bounds, self.scale, self.received)


@dataclass(frozen=True)
class KernelFigure:
    """``rate`` is GB/s of bytes that must move, or GFLOP/s, as ``unit`` says."""

    name: str
    milliseconds: float
    rate: float
    unit: str


def kernel_figures(shape: ModelShape, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """The native kernels of a CPU at a model's shape, one layer each, beside the machine's rates.

    Raises:
        RuntimeError: the native kernels cannot run here.
    """
    problem = cpu.problem(shape.head_size, dtype)
    if problem:
        raise RuntimeError(f"no native kernels to measure: {problem}")
    clock = Clock("cpu")
    figures = []
    loads = {
        "": (1.0, 0.0),
        ", with scores": (1.0, 1.0),
        ", with scores, a quarter kept": (0.25, 1.0),
    }
    for name, (kept, scored) in loads.items():
        load = DecodeLoad(16, 512 if quick else 2048, 8, kept, scored)
        state = DecodeState(shape, load, dtype)
        cpu.prepare(state.pages.kv)
        seconds = clock.seconds(partial(state.attend, cpu)) / 8
        rate = state.num_bytes / seconds / 1e9
        figures.append(KernelFigure(f"decode attention{name}", seconds * 1e3, rate, "GB/s"))
    tokens = 1024 if quick else 2048
    prompt = PrefillState(shape, tokens, dtype)
    pairs = shape.num_heads * tokens * (tokens + 1) / 2
    end_pairs = shape.num_heads * END_QUERIES * (tokens - (END_QUERIES - 1) / 2)
    passes = {
        "prefill attention": (partial(prompt.attend, cpu), 2 * pairs),
        f"attention peaks of {END_QUERIES} queries": (partial(prompt.profile, cpu), end_pairs),
        "attention mass": (partial(prompt.mass, cpu), pairs),
    }
    for name, (run, products) in passes.items():
        seconds = clock.seconds(run)
        rate = products * 2 * shape.head_size / seconds / 1e9
        figures.append(KernelFigure(name, seconds * 1e3, rate, "GFLOP/s"))
    return {
        **machine_rates(dtype),
        "matmul_bf16_gflop_s": matmul_rate(clock, torch.bfloat16),
        "kernels": [asdict(figure) for figure in figures],
    }


def machine_rates(dtype: torch.dtype) -> dict[str, float]:
    """What a CPU reads, and multiplies in a dtype: asked twice, it says how quiet a machine is."""
    clock = Clock("cpu")
    return {
        "read_bandwidth_gb_s": read_bandwidth(clock),
        "matmul_gflop_s": matmul_rate(clock, dtype),
    }
