"""A model whose queries, keys and values are known: they follow from a request's seed, the layer
and the position alone, so a request's outputs must not depend on what runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from fastgen_vllm.runtime.driver import Driver
from fastgen_vllm.runtime.report import StepReport
from fastgen_vllm.runtime.step import Step


@dataclass
class FakeModel:
    """``H`` KV heads of ``G`` query heads each, of size ``D``."""

    layers: int
    heads: int
    group: int
    size: int
    scale: float = 0.4
    _made: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    def qkv(self, seed: int, layer: int, position: int) -> torch.Tensor:
        """``[H * (G + 2), D]``: queries, keys, values."""
        at = (seed, layer, position)
        if at not in self._made:
            generator = torch.Generator().manual_seed(seed * 100_003 + layer * 10_007 + position)
            rows = self.heads * (self.group + 2)
            self._made[at] = torch.randn(rows, self.size, generator=generator)
        return self._made[at]

    def content(self, seed: int, layer: int, position: int) -> torch.Tensor:
        """What a slot of each head holds: ``[H, 2 * D]``."""
        key, value = self.qkv(seed, layer, position)[self.heads * self.group :].chunk(2)
        return torch.cat([key, value], dim=-1)

    def forward(
        self, driver: Driver, step: Step, layer: int, where: list[tuple[int, int]]
    ) -> torch.Tensor:
        """One layer of a batch of tokens, each a request's seed and a position."""
        device = driver.runtime.pool.kv.device
        qkv = torch.stack([self.qkv(seed, layer, position) for seed, position in where])
        queries = self.heads * self.group
        query, key, value = qkv.to(device, non_blocking=True).split(
            [queries, self.heads, self.heads], dim=1
        )
        output = torch.full_like(query, float("nan"))
        driver.runtime.forward(step, layer, 2 * query, key, value, output, self.scale)
        return output


def run_step(
    driver: Driver,
    model: FakeModel,
    seeds: Mapping[str, int],
    counts: Mapping[str, int],
    quiet: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[dict[str, torch.Tensor], StepReport]:
    """Compute so many further tokens of each request.

    Args:
        quiet: holds while the host must not wait for the device.

    Returns:
        each request's outputs ``[L, count, H * G, D]``, and the step's report.
    """
    where = []
    for name, count in counts.items():
        computed = driver.requests[name].computed
        where += [(seeds[name], position) for position in range(computed, computed + count)]
    with quiet():
        step = driver.start_step(counts)
        layers = [model.forward(driver, step, layer, where) for layer in range(model.layers)]
    with nullcontext() if step.chunks else quiet():
        pending = driver.runtime.finish_step(step)
    report = driver.read(pending)
    outputs = torch.stack(layers).cpu().split(list(counts.values()), dim=1)
    return dict(zip(counts, outputs, strict=True)), report


def kept_positions(driver: Driver, name: str) -> list[list[int]]:
    """Of each head, all layers one after the other."""
    pages = driver.runtime.tables.pages_of(name).flatten(0, 1)
    positions = driver.runtime.pool.positions[pages].flatten(1).tolist()
    return [sorted(p for p in head if p >= 0) for head in positions]
