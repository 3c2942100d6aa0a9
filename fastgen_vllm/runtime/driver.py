"""Plays the scheduler for one ``Runtime``: for warm-up, for tools and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastgen_vllm.config import RequestOverride
from fastgen_vllm.policy.choice import Choice
from fastgen_vllm.reads import wait_for
from fastgen_vllm.runtime.growth import Growth
from fastgen_vllm.runtime.report import PendingReport, StepReport
from fastgen_vllm.runtime.runtime import Runtime
from fastgen_vllm.runtime.step import Step
from fastgen_vllm.tensors import to_device


@dataclass
class Driven:
    """A request.

    Attributes:
        tokens: its prompt and what was generated since; the newest may be yet to compute.
        computed: tokens that the model has seen.
        table: the engine's block table, a block or 0 for every ``block_size`` tokens.
        free_pages: what the last report said, and granted since; None while it is encoded.
    """

    tokens: list[int]
    computed: int = 0
    table: list[int] = field(default_factory=list)
    free_pages: int | None = None


class Driver:
    """Owns the blocks of the pool that no request owns."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.free = list(range(1, runtime.pool.num_blocks))
        self.requests: dict[str, Driven] = {}
        self._granted: dict[str, list[int]] = {}
        """For the step that is being planned."""

    def begin(self, name: str, tokens: Sequence[int], override: RequestOverride) -> None:
        """A request arrives, or comes back after ``end``."""
        self.requests[name] = Driven(list(tokens))
        self.runtime.begin_prefill(name, tokens, override)

    def adopt(
        self,
        name: str,
        tokens: Sequence[int],
        blocks: list[int],
        choice: Choice,
        growth: Growth | None = None,
    ) -> None:
        """A request whose prompt lies encoded in ``blocks`` keeps what it chose."""
        self.requests[name] = Driven(list(tokens), len(tokens), blocks)
        installed = wait_for(self.runtime.install(name, blocks, choice, growth=growth))
        self.give_back(name, installed.vacated)
        tables = self.runtime.tables
        self.requests[name].free_pages = int(tables.state.num_free[tables.rows[name]])

    def end(self, name: str) -> None:
        """A request finishes, is aborted or is preempted."""
        self.runtime.release(name)
        self._granted.pop(name, None)
        self.free += [block for block in self.requests.pop(name).table if block]

    def take(self, count: int) -> list[int]:
        """Raises:
        MemoryError: the pool has fewer blocks left.
        """
        if count > len(self.free):
            raise MemoryError(f"the pool has {len(self.free)} blocks left of {count} asked for")
        return [self.free.pop() for _ in range(count)]

    def grow(self, name: str, num_tokens: int) -> None:
        """Room for the request's first ``num_tokens`` tokens.

        Raises:
            MemoryError: as ``take``; nothing has changed.
        """
        request, pool = self.requests[name], self.runtime.pool
        missing = max(0, -(-num_tokens // pool.block_size) - len(request.table))
        if request.free_pages is not None and request.free_pages >= pool.pages_per_block:
            request.table += [0] * missing
            return
        blocks = self.take(missing)
        request.table += blocks
        self._granted.setdefault(name, []).extend(blocks)
        if request.free_pages is not None:
            request.free_pages += pool.pages_per_block * len(blocks)

    def start_step(self, counts: Mapping[str, int]) -> Step:
        """Plan a batch that computes so many further tokens of each request.

        Raises:
            MemoryError: as ``grow``.
        """
        device, batch = self.runtime.pool.kv.device, [self.requests[name] for name in counts]
        for name, count in counts.items():
            self.grow(name, self.requests[name].computed + count)
        self.runtime.grant(self._granted)
        self._granted = {}
        ids: list[int] = []
        for request, count in zip(batch, counts.values(), strict=True):
            ids += request.tokens[request.computed : request.computed + count]
            request.computed += count
        seen = torch.tensor([request.computed for request in batch])
        return self.runtime.start_step(
            list(counts),
            torch.tensor([0, *counts.values()]).cumsum(0),
            to_device(seen, device),
            to_device(torch.tensor(ids), device),
            seen,
        )

    def finish_step(self, step: Step, squeeze: Sequence[str] = ()) -> StepReport:
        """Compress the prompts that ended and whom to ``squeeze``, and take back what they
        vacate."""
        return self.read(self.runtime.finish_step(step, squeeze))

    def read(self, pending: PendingReport) -> StepReport:
        """Take back what was vacated in the step that is reported."""
        report = pending.get()
        for name, free_pages in report.free_pages.items():
            self.requests[name].free_pages = free_pages
            self.give_back(name, report.vacated.get(name, ()))
        return report

    def give_back(self, name: str, blocks: Sequence[int]) -> None:
        """The request owns these blocks no longer."""
        request, gone = self.requests[name], set(blocks)
        self.free += blocks
        request.table = [0 if block in gone else block for block in request.table]
