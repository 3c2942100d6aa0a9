"""The kernels on a GPU at the shapes of 8B models, beside a dense baseline: tables and JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from fastgen_vllm.kernels import Kernels, triton
from fastgen_vllm.tools.kernel_bench import (
    BLOCK,
    Clock,
    DecodeLoad,
    DecodeState,
    PrefillState,
    copy_bandwidth,
)
from fastgen_vllm.tools.models import ModelShape

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
    """A model's attention, and what its matrix products follow from."""

    name: str
    shape: ModelShape
    hidden: int
    feed_forward: int


MODELS = (
    Model("Llama-3.1-8B", ModelShape(32, 8, 4, 128), 4096, 14336),
    Model("Qwen3-8B", ModelShape(36, 8, 4, 128), 4096, 12288),
)
"""One layer's attention is the same in both."""

TINY = Model("tiny", ModelShape(2, 2, 3, 32), 64, 128)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class DecodeFigure:
    """Decode attention of one layer.

    Attributes:
        microseconds: by kernel, and of the dense baselines at all the tokens.
        gigabytes: what must move.
        of_copy_bandwidth: by kernel, the floor's time over the measured one.
        of_dense: by kernel, the measured time over ``kept`` times the fastest dense baseline's.
    """

    requests: int
    tokens: int
    kept: float
    gigabytes: float
    microseconds: dict[str, float]
    of_copy_bandwidth: dict[str, float]
    of_dense: dict[str, float]


class GpuBench:
    """All measurements on one device.

    Args:
        kernels: by the name that the tables show.
        deadline: of ``time.monotonic``; decode attention that has not begun by then is left out,
            and said so.
        small: tiny shapes, to try the program itself.
        measured: called after each measurement.
    """

    def __init__(
        self,
        device: str,
        kernels: dict[str, Kernels],
        deadline: float,
        small: bool,
        measured: Callable[[], None],
    ) -> None:
        self.device, self.kernels, self.deadline, self.small = device, kernels, deadline, small
        self.measured, self.clock = measured, Clock(device)
        self.copy_gb_s = copy_bandwidth(self.clock, 1 << 24 if small else 4 << 30)
        self.report: dict[str, Any] = {
            "copy_gb_s": self.copy_gb_s,
            "steps": {},
            "decode": [],
            "left_out": [],
        }

    def run(self) -> None:
        """Everything, into ``report``. Prints tables as it goes."""
        print(f"\nCopy on the device: {self.copy_gb_s:.0f} GB/s, read and written\n")
        models = (TINY,) if self.small else MODELS
        steps = [(2, 40)] if self.small else [(1, 8192), (16, 8192), (64, 4096)]
        for model, (requests, tokens) in product(models, steps):
            self._step(model, requests, tokens)
        self._prefill(models[0], 50 if self.small else 8192)
        print("\n| requests x tokens | kept | GB | us | of copy bandwidth | of kept x dense |")
        print("|---|---|---|---|---|---|")
        for requests, tokens in [(1, 40), (3, 100)] if self.small else DECODE_SHAPES:
            self._decode(models[0], requests, tokens)
            self.measured()

    def _leave_out(self, what: str, why: str) -> None:
        entry = f"{what}: {why}"
        if entry not in self.report["left_out"]:
            self.report["left_out"].append(entry)
            print(f"| {what} | left out: {why} | | | | |")

    def _step(self, model: Model, requests: int, tokens: int) -> None:
        """Milliseconds of one decode step: bookkeeping, cache writes, attention, projections."""
        layers = model.shape.num_layers
        load = DecodeLoad(requests, tokens, 1, kept=0.5, scored=0.5)
        one = DecodeState(model.shape, load, DTYPE)
        whole = DecodeState(
            ModelShape(layers, model.shape.num_kv_heads, 1, 8),
            DecodeLoad(requests, tokens, layers, kept=0.5, scored=0.5),
            DTYPE,
        )
        heads, size = model.shape.num_kv_heads, model.shape.head_size
        key = torch.randn(requests, heads, size).to(DTYPE)
        slots = torch.arange(requests * heads).view(requests, heads)
        write = partial(triton.write_kv, key, key, one.pages.kv, slots)
        figures = {
            "bookkeeping": self.clock.seconds(partial(whole.plan, triton)),
            "cache writes": layers * self.clock.seconds(write),
            "projections": layers * self.clock.seconds(projections(model, requests)),
            "attention": layers * self.clock.seconds(partial(one.attend, triton)),
        }
        name = f"{model.name}, decode step of {requests} x {tokens}, half kept"
        self._print_step(name, figures, sum(figures.values()))

    def _prefill(self, model: Model, tokens: int) -> None:
        """Milliseconds of one layer's prefill: attention, projections, and the profiling pass."""
        state = PrefillState(model.shape, tokens, DTYPE)
        runs: dict[str, Callable[[], None]] = {
            "attention": partial(state.attend, triton),
            "projections": projections(model, tokens),
            "profiling": partial(state.profile, triton),
            "profiling for a ladder": partial(state.mass, triton),
        }
        figures = {name: self.clock.seconds(run, 0.5) for name, run in runs.items()}
        rest = figures["attention"] + figures["projections"]
        self._print_step(f"{model.name}, one layer's prefill of {tokens} tokens", figures, rest)

    def _print_step(self, name: str, figures: dict[str, float], whole: float) -> None:
        self.report["steps"][name] = {key: s * 1e3 for key, s in figures.items()}
        print(f"{name} (ms):")
        shares = (f"{key} {s * 1e3:.3f} ({s / whole:.1%})" for key, s in figures.items())
        print("  " + ", ".join(shares), flush=True)
        self.measured()

    def _decode(self, model: Model, requests: int, tokens: int) -> None:
        what = f"{requests} x {tokens}"
        if time.monotonic() > self.deadline:
            self._leave_out(what, "out of time")
            return
        one_layer = requests * tokens * model.shape.num_kv_heads * (4 * model.shape.head_size + 8)
        if 1.3 * one_layer > free_memory(self.device):
            self._leave_out(what, "out of memory")
            return
        layers = max(1, min(32, CACHE_BYTES // one_layer)) if self.device == "cuda" else 1
        for row in self._decode_figures(model, requests, tokens, layers):
            self.report["decode"].append(asdict(row))
            print(
                f"| {what} | {row.kept} | {row.gigabytes:.3f} | {_each(row.microseconds, '.1f')} "
                f"| {_each(row.of_copy_bandwidth, '.0%')} | {_each(row.of_dense, '.2f')} |",
                flush=True,
            )

    def _decode_figures(
        self, model: Model, requests: int, tokens: int, layers: int
    ) -> Iterator[DecodeFigure]:
        """One for each kept ratio."""
        dense = {"dense, contiguous": self._dense(model.shape, requests, tokens, layers)}
        try:
            paged = self._dense_paged(model.shape, requests, tokens, layers)
            dense["dense, vLLM flash attention"] = paged
        except ImportError as error:
            self._leave_out("dense, vLLM flash attention", f"not importable ({error})")
        for kept in KEPT_RATIOS:
            torch.cuda.empty_cache()
            scored = 0.5 if kept < 1.0 else 0.0
            load = DecodeLoad(requests, tokens, layers, kept, scored)
            state = DecodeState(model.shape, load, DTYPE)
            seconds = {
                name: self.clock.seconds(partial(state.attend, module)) / layers
                for name, module in self.kernels.items()
            }
            floor = state.num_bytes / self.copy_gb_s / 1e9
            real_kept = float(state.heads.lengths.float().mean()) / tokens
            yield DecodeFigure(
                requests,
                tokens,
                kept,
                state.num_bytes / 1e9,
                {name: s * 1e6 for name, s in (dense | seconds).items()},
                {name: floor / s for name, s in seconds.items()},
                {name: s / (real_kept * min(dense.values())) for name, s in seconds.items()},
            )
            del state

    def _dense(self, shape: ModelShape, requests: int, tokens: int, layers: int) -> float:
        """Seconds of dense attention of one layer on contiguous keys, which no paged kernel reads
        faster. The query heads of a group stand as queries of one KV head, so that its keys are
        read once."""
        each = (layers, requests, shape.num_kv_heads, tokens, shape.head_size)
        key, value = torch.randn(2, *each, dtype=DTYPE)
        query = torch.randn(*each[1:3], shape.group_size, shape.head_size, dtype=DTYPE)

        def run() -> None:
            for layer in range(layers):
                torch.nn.functional.scaled_dot_product_attention(query, key[layer], value[layer])

        return self.clock.seconds(run) / layers

    def _dense_paged(self, shape: ModelShape, requests: int, tokens: int, layers: int) -> float:
        """Seconds of vLLM's flash attention over its own paged layout.

        Raises:
            ImportError: vLLM or its flash attention is not there.
        """
        from fastgen_vllm.vllm_plugin.flash_attention import decode_dense

        width = -(-tokens // BLOCK)
        each = (2, layers * requests * width, BLOCK, shape.num_kv_heads, shape.head_size)
        key, value = torch.randn(each, dtype=DTYPE)
        table = torch.randperm(each[1]).int().view(layers, requests, width)
        query = torch.randn(requests, shape.num_heads, shape.head_size, dtype=DTYPE)
        used = torch.full((requests,), tokens, dtype=torch.int32)

        def run() -> None:
            for layer in range(layers):
                decode_dense(query, key, value, table[layer], used, tokens)

        return self.clock.seconds(run) / layers


def projections(model: Model, tokens: int) -> Callable[[], None]:
    """One layer's matrix products."""
    x = torch.randn(tokens, model.hidden, dtype=DTYPE)
    wide = torch.randn(tokens, model.feed_forward, dtype=DTYPE)
    attended = model.shape.num_heads * model.shape.head_size
    both = 2 * model.shape.num_kv_heads * model.shape.head_size
    qkv, out, up, down = (
        torch.randn(rows, columns, dtype=DTYPE)
        for rows, columns in (
            (model.hidden, attended + both),
            (model.hidden, attended),
            (model.hidden, 2 * model.feed_forward),
            (model.feed_forward, model.hidden),
        )
    )

    def run() -> None:
        _ = x @ qkv, x @ out, x @ up, wide @ down

    return run


def free_memory(device: str) -> int:
    """Bytes, what torch keeps for later given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 4 << 30


def _each(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{key} {value:{form}}" for key, value in values.items())
