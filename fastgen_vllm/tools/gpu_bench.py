"""Micro-benchmarks of the GPU kernels at the shapes of 8B models. Needs torch and triton alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from fastgen_vllm.kernels import Kernels, triton
from fastgen_vllm.profiler.queries import QueryRun, query_runs
from fastgen_vllm.tensors import RATIO_UNIT

BLOCK = 16
KEPT_RATIOS = (1.0, 0.5, 0.25)
DECODE_SHAPES = [
    (1, 1024),
    (1, 8192),
    (1, 32768),
    (16, 1024),
    (16, 8192),
    (16, 32768),
    (64, 1024),
    (64, 8192),
    (64, 32768),
    (256, 1024),
    (256, 8192),
]
"""Requests and tokens of each."""

CACHE_BYTES = 256 << 20
"""Layers are added until one step reads this much, so that none finds its pages in the L2."""


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    kv_heads: int
    group: int
    head_size: int
    hidden: int
    feed_forward: int


MODELS = (
    Model("Llama-3.1-8B", 32, 8, 4, 128, 4096, 14336),
    Model("Qwen3-8B", 36, 8, 4, 128, 4096, 12288),
)
"""One layer's attention is the same in both."""

TINY = Model("tiny", 2, 2, 3, 32, 64, 128)


@dataclass(frozen=True)
class DecodeFigure:
    """Decode attention of one layer.

    Attributes:
        microseconds: by kernel, and of the dense baseline at all the tokens.
        gigabytes: what must move: K, V and positions of kept slots, scores read and written.
        of_copy_bandwidth: by kernel, the floor's time over the measured one.
        of_dense: by kernel, the measured time over ``kept`` times the dense baseline's.
    """

    requests: int
    tokens: int
    kept: float
    gigabytes: float
    microseconds: dict[str, float]
    of_copy_bandwidth: dict[str, float]
    of_dense: dict[str, float]


class Clock:
    """Times by CUDA events, or by the host's clock where there is no GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def seconds(self, function: Callable[[], Any], total: float = 0.1) -> float:
        """Median over as many runs as fit in ``total`` seconds, 3 at least."""
        function()
        once = self._time(function)
        rounds = max(3, min(50, int(total / max(once, 1e-6))))
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


def head_lengths(shape: tuple[int, ...], tokens: int, kept: float) -> torch.Tensor:
    """int32, ``kept * tokens`` on average; heads differ tenfold, as real profiles' do."""
    if kept >= 1.0:
        return torch.full(shape, tokens, dtype=torch.int32)
    spread = 10 ** torch.rand(shape)
    low, high = 0.0, 1.0
    for _ in range(40):
        scale = (low + high) / 2
        if (spread * scale).clamp(max=1.0).mean() < kept:
            low = scale
        else:
            high = scale
    return (spread * high * tokens).clamp(1, tokens).int()


def scattered_pages(num_pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A page table of pages from 1 on in random order, and where there each head's begin: int64
    ``[*num_pages.shape]``."""
    ends = num_pages.flatten().cumsum(0)
    start = (ends - num_pages.flatten()).view(num_pages.shape)
    return (torch.randperm(int(ends[-1])) + 1).int(), start


class Cache:
    """Decode state of ``layers`` layers: pages in random order, half of the heads keep scores."""

    def __init__(self, m: Model, layers: int, requests: int, tokens: int, kept: float) -> None:
        self.lengths = head_lengths((requests, layers, m.kv_heads), tokens, kept)
        num_pages = -(-self.lengths // BLOCK)
        total = int(num_pages.sum())
        self.pages = torch.empty(total + 1, BLOCK, 2 * m.head_size, dtype=torch.bfloat16).normal_()
        self.positions = torch.zeros(total + 1, BLOCK, dtype=torch.int32)
        self.scores = torch.zeros(total + 1, BLOCK)
        self.keeps_scores = torch.rand(self.lengths.shape) < (0.5 if kept < 1.0 else 0.0)
        self.page_table, self.table_start = scattered_pages(num_pages)
        self.max_pages = int(num_pages.max())
        self.rows = torch.arange(requests)
        self.query = torch.randn(requests, m.kv_heads, m.group, m.head_size, dtype=torch.bfloat16)
        self.output = torch.empty_like(self.query)
        self.layers, self.head_size = layers, m.head_size

    @property
    def num_bytes(self) -> int:
        """Of one layer that must move, on average."""
        slots = int(self.lengths.sum())
        scored = int((self.lengths * self.keeps_scores).sum())
        return (slots * (4 * self.head_size + 4) + 8 * scored) // self.layers

    def attend(self, kernels: Kernels) -> None:
        for layer in range(self.layers):
            kernels.decode_attention(
                self.query,
                self.pages,
                self.positions,
                self.rows,
                self.page_table,
                self.table_start[:, layer],
                self.lengths[:, layer],
                self.keeps_scores[:, layer],
                self.scores,
                self.max_pages,
                self.head_size**-0.5,
                self.output,
            )


def dense_seconds(clock: Clock, m: Model, layers: int, requests: int, tokens: int) -> float:
    """Dense attention of one layer on contiguous keys, which no paged kernel reads faster.

    The query heads of a group stand as queries of one KV head, so that its keys are read once.
    """
    shape = (layers, requests, m.kv_heads, tokens, m.head_size)
    key, value = torch.randn(2, *shape, dtype=torch.bfloat16)
    query = torch.randn(requests, m.kv_heads, m.group, m.head_size, dtype=torch.bfloat16)

    def run() -> None:
        for layer in range(layers):
            torch.nn.functional.scaled_dot_product_attention(query, key[layer], value[layer])

    return clock.seconds(run) / layers


def paged_flash_seconds(
    clock: Clock, m: Model, layers: int, requests: int, tokens: int
) -> float | None:
    """vLLM's flash attention over its own paged layout, where vLLM is installed."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except Exception:
        return None
    width = -(-tokens // BLOCK)
    shape = (2, layers * requests * width, BLOCK, m.kv_heads, m.head_size)
    key, value = torch.randn(shape, dtype=torch.bfloat16)
    table = torch.randperm(shape[1]).int().view(layers, requests, width)
    query = torch.randn(requests, m.kv_heads * m.group, m.head_size, dtype=torch.bfloat16)
    used = torch.full((requests,), tokens, dtype=torch.int32)
    starts = torch.arange(requests + 1, dtype=torch.int32)

    def run() -> None:
        for layer in range(layers):
            flash_attn_varlen_func(
                query,
                key,
                value,
                max_seqlen_q=1,
                cu_seqlens_q=starts,
                max_seqlen_k=tokens,
                seqused_k=used,
                causal=True,
                block_table=table[layer],
                fa_version=get_flash_attn_version(),
            )

    return clock.seconds(run) / layers


def free_memory(device: str) -> int:
    """Bytes, what torch keeps for later given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 4 << 30


def decode_figures(
    device: str, m: Model, kernels: dict[str, Kernels], copy_gb_s: float, requests: int, tokens: int
) -> Iterator[DecodeFigure]:
    """One for each kept ratio; none where the memory is short."""
    clock = Clock(device)
    one_layer = requests * tokens * m.kv_heads * (4 * m.head_size + 8)
    if 1.3 * one_layer > free_memory(device):
        return
    layers = max(1, min(32, CACHE_BYTES // one_layer)) if device == "cuda" else 1
    dense = {"dense, contiguous": dense_seconds(clock, m, layers, requests, tokens)}
    paged = paged_flash_seconds(clock, m, layers, requests, tokens)
    if paged is not None:
        dense["dense, vLLM flash attention"] = paged
    for kept in KEPT_RATIOS:
        torch.cuda.empty_cache()
        cache = Cache(m, layers, requests, tokens, kept)
        seconds = {
            name: clock.seconds(partial(cache.attend, module)) / layers
            for name, module in kernels.items()
        }
        floor = cache.num_bytes / copy_gb_s / 1e9
        real_kept = float(cache.lengths.float().mean()) / tokens
        yield DecodeFigure(
            requests,
            tokens,
            kept,
            cache.num_bytes / 1e9,
            {name: s * 1e6 for name, s in (dense | seconds).items()},
            {name: floor / s for name, s in seconds.items()},
            {name: s / (real_kept * min(dense.values())) for name, s in seconds.items()},
        )
        del cache


def projections(m: Model, tokens: int) -> Callable[[], None]:
    """One layer's matrix products."""
    x = torch.randn(tokens, m.hidden, dtype=torch.bfloat16)
    wide = torch.randn(tokens, m.feed_forward, dtype=torch.bfloat16)
    attended = m.kv_heads * m.group * m.head_size
    qkv, out, up, down = (
        torch.randn(rows, columns, dtype=torch.bfloat16)
        for rows, columns in (
            (m.hidden, attended + 2 * m.kv_heads * m.head_size),
            (m.hidden, attended),
            (m.hidden, 2 * m.feed_forward),
            (m.feed_forward, m.hidden),
        )
    )

    def run() -> None:
        _ = x @ qkv, x @ out, x @ up, wide @ down

    return run


def profiling_figures(device: str, m: Model, tokens: int) -> dict[str, float]:
    """Milliseconds of one layer's prefill: attention, projections, and the profiling pass."""
    clock = Clock(device)
    width = -(-tokens // BLOCK)
    pages = torch.randn(m.kv_heads * width, BLOCK, 2 * m.head_size, dtype=torch.bfloat16)
    table = torch.randperm(len(pages)).view(m.kv_heads, width)
    query = torch.randn(tokens, m.kv_heads, m.group, m.head_size, dtype=torch.bfloat16)
    output = torch.empty_like(query)
    args = (pages, table, tokens)
    scale = m.head_size**-0.5
    lse = triton.prefill_attention(query, *args, scale, output)
    # The windows of the adaptive ladder, and its least.
    windows = [64, *(int(r * tokens) for r in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7))]
    bounds = torch.tensor(sorted(set(windows)))
    mass = torch.zeros(m.kv_heads, 1, tokens, len(bounds) + 1)
    figures = {
        "attention": clock.seconds(
            lambda: triton.prefill_attention(query, *args, scale, output), 0.5
        ),
        "projections": clock.seconds(projections(m, tokens), 0.5),
    }

    def profile(runs: list[QueryRun]) -> None:
        for run in runs:
            first, end, step = run.first, run.end, run.step
            own = slice(first, end, step)
            triton.attention_mass(
                query[own], pages, table, end, lse[own], first, step, bounds, scale, mass
            )

    thinned, every = query_runs("recent", 32, 1, tokens)[0], query_runs("uniform", 1, 1, tokens)[0]
    for name, runs in (("profiling", thinned), ("profiling, every query", every)):
        figures[name] = clock.seconds(partial(profile, runs), 0.5)
    return {name: s * 1e3 for name, s in figures.items()}


def bookkeeping_figures(device: str, m: Model, requests: int, tokens: int) -> dict[str, float]:
    """Milliseconds of one decode step: bookkeeping, cache writes, attention and projections."""
    clock = Clock(device)
    layers = m.layers
    heads = (requests, layers, m.kv_heads)
    kept = 0.5
    lengths = head_lengths(heads, tokens, kept)
    num_pages = -(-lengths // BLOCK) + 1
    total = int(num_pages.sum())
    page_table, table_start = scattered_pages(num_pages)
    positions = torch.randint(tokens, (total + 1, BLOCK), dtype=torch.int32)
    scores = torch.rand(total + 1, BLOCK)
    # Full heads append; the others, half of them by score, stand at their budget and evict.
    policy = torch.randint(3, heads)
    policy[lengths >= tokens - 1] = 0
    ladder = [
        torch.tensor([False, True, True]),
        torch.tensor([False, False, True]),
        torch.tensor([True, False, False]),
        torch.tensor([0, RATIO_UNIT // 10, 0]),
        torch.tensor([0, RATIO_UNIT // 10, RATIO_UNIT // 10]),
        torch.tensor([1, 64, 64]),
    ]
    free_pages = torch.zeros(requests, 3 * layers * m.kv_heads, dtype=torch.int32)
    num_free = torch.full((requests,), layers * m.kv_heads, dtype=torch.int32)
    sticky = torch.ones(heads, dtype=torch.int32)
    slots = torch.empty(heads, dtype=torch.int64)
    none = torch.zeros(requests, dtype=torch.bool)
    rows, seen = torch.arange(requests), torch.full((requests,), tokens)

    def plan() -> None:
        triton.plan_decode(
            rows,
            seen,
            none,
            none,
            ladder,
            False,
            page_table,
            table_start,
            lengths.clone(),
            sticky,
            policy,
            free_pages,
            num_free.clone(),
            positions,
            scores,
            slots,
        )

    key = torch.randn(requests, m.kv_heads, m.head_size, dtype=torch.bfloat16)
    pages = torch.empty(requests * m.kv_heads + 1, BLOCK, 2 * m.head_size, dtype=torch.bfloat16)
    one = torch.arange(requests * m.kv_heads).view(requests, m.kv_heads) * BLOCK
    figures = {
        "bookkeeping": clock.seconds(plan),
        "cache writes": layers * clock.seconds(lambda: triton.write_kv(key, key, pages, one)),
        "projections": layers * clock.seconds(projections(m, requests)),
    }
    cache = Cache(m, 1, requests, tokens, kept)
    figures["attention"] = layers * clock.seconds(lambda: cache.attend(triton))
    return {name: s * 1e3 for name, s in figures.items()}


def run(device: str, kernels: dict[str, Kernels], deadline: float, small: bool) -> dict[str, Any]:
    """Everything, as JSON. Prints tables as it goes.

    Args:
        deadline: of ``time.monotonic``; decode attention that has not begun by then is left out,
            and said so.
        small: tiny shapes, to try the program itself.
    """
    models = (TINY,) if small else MODELS
    m = models[0]
    copy_gb_s = copy_bandwidth(Clock(device), 1 << 24 if small else 4 << 30)
    print(f"\nCopy on the device: {copy_gb_s:.0f} GB/s, read and written\n")
    shapes = [(1, 40), (3, 100)] if small else DECODE_SHAPES
    report: dict[str, Any] = {"copy_gb_s": copy_gb_s, "steps": {}, "decode": [], "left_out": []}
    for model in models:
        for requests, tokens in [(2, 40)] if small else [(1, 8192), (16, 8192), (64, 4096)]:
            figures = bookkeeping_figures(device, model, requests, tokens)
            name = f"{model.name}, decode step of {requests} x {tokens}, half kept"
            report["steps"][name] = figures
            print(f"{name} (ms; bookkeeping {figures['bookkeeping'] / sum(figures.values()):.1%}):")
            print("  " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
    tokens = 50 if small else 8192
    figures = profiling_figures(device, m, tokens)
    name = f"{m.name}, one layer's prefill of {tokens} tokens"
    report["steps"][name] = figures
    rest = figures["attention"] + figures["projections"]
    print(f"{name} (ms, share of attention and projections):")
    print("  " + ", ".join(f"{k} {v:.3f} ({v / rest:.1%})" for k, v in figures.items()))
    print("\n| requests x tokens | kept | GB | us | of copy bandwidth | of kept x dense |")
    print("|---|---|---|---|---|---|")

    def each(values: dict[str, float], form: str) -> str:
        return ", ".join(f"{k} {v:{form}}" for k, v in values.items())

    for shape in shapes:
        if time.monotonic() > deadline:
            report["left_out"].append(f"decode {shape}: out of time")
            print(f"| {shape[0]} x {shape[1]} | left out: out of time | | | | |")
            continue
        rows = list(decode_figures(device, m, kernels, copy_gb_s, *shape))
        if not rows:
            report["left_out"].append(f"decode {shape}: out of memory")
            print(f"| {shape[0]} x {shape[1]} | left out: out of memory | | | | |")
        for row in rows:
            report["decode"].append(asdict(row))
            print(
                f"| {row.requests} x {row.tokens} | {row.kept} | {row.gigabytes:.3f} "
                f"| {each(row.microseconds, '.1f')} | {each(row.of_copy_bandwidth, '.0%')} "
                f"| {each(row.of_dense, '.2f')} |",
                flush=True,
            )
    return report
