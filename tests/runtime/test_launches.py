"""What a step asks of a GPU: launches of kernels, and how often the host waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from helpers.fake_model import FakeModel
from helpers.pretend_device import DEVICE, PretendDevice, pretend_device

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import libraries, triton
from fastgen_vllm.runtime.driver import Driver
from fastgen_vllm.runtime.report import StepReport
from fastgen_vllm.runtime.runtime import Runtime

LAYERS, HEADS, GROUP, SIZE, REQUESTS = 2, 2, 2, 16, 8
BLOCK: Final = 8
MODEL = FakeModel(LAYERS, HEADS, GROUP, SIZE)
SEEDS = {f"r{i}": i for i in range(REQUESTS)}
PROMPTS = {name: 41 + seed for name, seed in SEEDS.items()}


@pytest.fixture
def device() -> Iterator[PretendDevice]:
    with pretend_device() as mode:
        yield mode


OF_MODEL, SENT = 3, 3
"""Launches of this test's model a layer, and tensors that it sends to the device for a step."""


def test_launches_and_waits(device: PretendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many prompts end or requests are compacted, the host waits once, and never where
    requests decode. Prompts are encoded and profiled together."""
    monkeypatch.setattr(libraries, "choose", lambda *cache: ("a library", attend_at_once))
    config = FastGenConfig(kv_budget=0.3, min_prompt_tokens=8, block_size=BLOCK, compact_every=4)
    kv = torch.zeros(128, LAYERS, HEADS, BLOCK, 2 * SIZE).to(DEVICE)
    classes = torch.zeros(50, dtype=torch.uint8).to(DEVICE)
    runtime = Runtime(config, classes, kv, GROUP, max_requests=REQUESTS, report_lag=1)
    runtime.kernels = triton
    driver = Driver(runtime)
    for name, n in PROMPTS.items():
        driver.begin(name, [9] * n, RequestOverride())
        driver.requests[name].tokens += [9] * 16

    def step(
        counts: dict[str, int], until_layers_are_done: bool = False
    ) -> tuple[Counter[str], int, StepReport]:
        """Launches by name, waits, and the report."""
        launches, waits = len(device.launches), len(device.waits)
        made = driver.start_step(counts)
        where = [(SEEDS[r], p) for r, c in counts.items() for p in range(c)]
        for layer in range(LAYERS):
            MODEL.forward(driver, made, layer, where)
        counted = Counter(device.launches[launches:])
        pending = runtime.finish_step(made)
        if not until_layers_are_done:
            counted = Counter(device.launches[launches:])
        waits = len(device.waits) - waits
        return counted, waits, driver.read(pending)

    def attend_at_once(*arguments: Any) -> torch.Tensor:
        """As flash attention does, which attends to all prompts in one launch."""
        count = len(device.launches)
        lse = libraries.sdpa(*arguments)
        device.launches[count:] = ["attend_at_once"]
        return lse

    launches, waits, report = step(PROMPTS, until_layers_are_done=True)
    of_prompts = ("write_kv_kernel", "attend_at_once", "attention_peaks_kernel")
    assert [launches[name] for name in of_prompts] == [LAYERS] * 3
    assert launches.total() <= (3 + OF_MODEL) * LAYERS + SENT + 9
    assert waits == 1 and len(report.kept) == REQUESTS
    step(dict.fromkeys(PROMPTS, 1))  # these are new in the batch
    for _ in range(2):
        launches, waits, report = step(dict.fromkeys(PROMPTS, 1))
        assert waits == 0 and not report.kept_again
        of_layers = [launches[f"{name}_kernel"] for name in ("write_kv", "attend", "merge")]
        assert of_layers == [LAYERS] * 3
        # Blocks are granted in each of these, which takes seven.
        assert launches.total() <= (3 + OF_MODEL) * LAYERS + SENT + 7 + 10
    _, waits, report = step(dict.fromkeys(PROMPTS, 1))
    assert waits == 1 and len(report.kept_again) == REQUESTS
