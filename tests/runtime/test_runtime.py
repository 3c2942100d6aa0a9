"""Whole steps of the runtime, chunked prompts beside decoding requests: every implementation of
the kernels gives the reference's outputs and head tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers.pretend_device import DEVICE, PretendDevice, pretend_device

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import Kernels, cpu, reference, triton
from fastgen_vllm.policy.tokens import TokenFlags
from fastgen_vllm.runtime.runtime import Runtime
from fastgen_vllm.runtime.warm_up import warm_up

LAYERS, HEADS, GROUP, SIZE, BLOCK, BLOCKS, VOCAB = 2, 2, 3, 32, 8, 64, 50
PROMPTS = {"a": 47, "b": 16, "c": 90}
CHUNK, DECODE_STEPS = 32, 20


class Trial:
    """Plays engine and model: the same blocks, tokens, queries, keys and values every time."""

    def __init__(
        self, kernels: Kernels, ladder: str, mode: PretendDevice | None = None, debug: bool = True
    ) -> None:
        device = DEVICE if mode else torch.device("cpu")
        flags = TokenFlags(torch.arange(VOCAB) < 3, torch.arange(VOCAB) % 7 == 5).to(device)
        config = FastGenConfig(
            ladder=ladder, recovery=0.8, min_prompt_tokens=2, block_size=BLOCK, debug=debug
        )
        kv = torch.full((BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE), float("nan")).to(device)
        self.mode, self.device = mode, device
        self.runtime = Runtime(config, flags, kv, GROUP)
        self.runtime.kernels = kernels
        self.generator = torch.Generator().manual_seed(5)
        self.outputs: list[torch.Tensor] = []
        self.kept: dict[str, int] = {}

    def run(self) -> Trial:
        runtime, generator = self.runtime, self.generator
        free = list(range(1, BLOCKS))
        blocks, seen, left = {}, dict.fromkeys(PROMPTS, 0), {}
        for name, length in PROMPTS.items():
            tokens = torch.randint(VOCAB, (length,), generator=generator).tolist()
            override = RequestOverride(fastgen_kv_budget=0.6 if name == "c" else None)
            with self.no_waiting():
                runtime.begin_prefill(name, tokens, override)
            blocks[name] = [free.pop() for _ in range(-(-(length + DECODE_STEPS) // BLOCK))]
            left[name] = DECODE_STEPS
        while any(left.values()):
            batch = [name for name in PROMPTS if left[name]]
            counts = [min(CHUNK, max(1, PROMPTS[name] - seen[name])) for name in batch]
            for name, count in zip(batch, counts, strict=True):
                left[name] -= seen[name] >= PROMPTS[name]
                seen[name] += count
                if name in runtime.tables.rows and (seen[name] - 1) % BLOCK == 0:
                    row = runtime.tables.rows[name]
                    if int(runtime.tables.num_free[row]) < runtime.pool.pages_per_block:
                        runtime.grant(name, [blocks[name][(seen[name] - 1) // BLOCK]])
            num_tokens = sum(counts)
            only_decodes = not runtime.prefills
            table = torch.zeros(len(batch), 16, dtype=torch.int64)
            for i, name in enumerate(batch):
                table[i, : len(blocks[name])] = torch.tensor(blocks[name])
            seq_lens = torch.tensor([seen[name] for name in batch])
            tokens = torch.randint(VOCAB, (num_tokens,), generator=generator)
            inputs = [x.to(self.device) for x in (seq_lens, table, tokens)]
            heads = HEADS * (GROUP + 2)
            qkv = torch.randn(LAYERS, num_tokens, heads, SIZE, generator=generator).to(self.device)
            query, key, value = qkv.split([HEADS * GROUP, HEADS, HEADS], dim=2)
            output = torch.full_like(query, float("nan"))
            query_start = torch.tensor([0, *counts]).cumsum(0)
            with self.no_waiting():
                step = runtime.start_step(batch, query_start, *inputs, seq_lens)
                for i in range(LAYERS):
                    runtime.forward(step, i, 2 * query[i], key[i], value[i], output[i], 0.2)
            with self.no_waiting() if only_decodes else nullcontext():
                pending = runtime.finish_step(step)
            report = pending.get()
            self.outputs.append(output.cpu())
            self.kept.update({name: kept.kept_slots for name, kept in report.kept.items()})
        return self

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """The host must not wait for the device in here."""
        before = len(self.mode.waits) if self.mode else 0
        yield
        assert self.mode is None or not self.mode.waits[before:], self.mode.waits[before:]

    def positions(self, name: str) -> list[list[int]]:
        """Kept by each head."""
        pages = self.runtime.tables.pages_of(name).flatten(0, 1)
        positions = self.runtime.pool.positions[pages].flatten(1).tolist()
        return [sorted(p for p in head if p >= 0) for head in positions]


@pytest.mark.parametrize("ladder", ["paper", "adaptive"])
@pytest.mark.parametrize("kernels", [cpu, triton], ids=lambda module: module.__name__)
def test_whole_steps(kernels: Kernels, ladder: str) -> None:
    assert cpu.problem(SIZE, torch.float32) == "", "the extension must be built to test it"
    ours, wanted = Trial(kernels, ladder).run(), Trial(reference, ladder).run()
    assert ours.kept == wanted.kept and sum(ours.kept.values()) < LAYERS * HEADS * 153
    for name in PROMPTS:
        assert ours.positions(name) == wanted.positions(name)
    assert len(ours.outputs) == len(wanted.outputs)
    for a, b in zip(ours.outputs, wanted.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_pretend_device_refuses_and_notes() -> None:
    with pretend_device() as mode:
        there = torch.arange(3, device=DEVICE)
        assert torch.equal((2 * there + torch.tensor(1)).cpu(), torch.tensor([1, 3, 5]))
        with pytest.raises(RuntimeError, match="of the device and of the CPU"):
            there + torch.arange(3)
        mode.waits.clear()
        there[there.flip(0)] += 1
        assert not mode.waits
        assert int(there[there > 1].sum()) == 5
        assert mode.waits == ["aten.index.Tensor", "aten._local_scalar_dense.default"]


@pytest.mark.parametrize("ladder", ["paper", "adaptive"])
def test_steps_on_a_device(ladder: str) -> None:
    """No tensor of the device meets one of the CPU, and the host waits at a prompt's end only."""
    wanted = Trial(triton, ladder).run()
    with pretend_device() as mode:
        trial = Trial(triton, ladder, mode, debug=False).run()
        assert trial.kept == wanted.kept
        assert [trial.positions(name) for name in PROMPTS] == [
            wanted.positions(name) for name in PROMPTS
        ]
    for a, b in zip(trial.outputs, wanted.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Watched:
    """The reference, noting which operations ran."""

    def __init__(self) -> None:
        self.ran: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.ran.add(name)
        return getattr(reference, name)


@pytest.mark.parametrize("ladder", ["paper", "adaptive"])
def test_warm_up_runs_every_operation_and_leaves_nothing(ladder: str) -> None:
    watched = Watched()
    warm, cold = Trial(watched, ladder), Trial(reference, ladder).run()  # type: ignore[arg-type]
    with pretend_device() as mode:
        warm_up(Trial(reference, ladder, mode).runtime)
    warm_up(warm.runtime)
    warmed_up = set(watched.ran)
    warm.run()
    assert watched.ran == warmed_up
    for name in PROMPTS:
        assert warm.positions(name) == cold.positions(name)
    for a, b in zip(warm.outputs, cold.outputs, strict=True):
        assert torch.equal(a, b)
