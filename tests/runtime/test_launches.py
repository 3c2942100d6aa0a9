"""What a step asks of a GPU: launches of kernels, and how often the host waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import pytest
import torch
from helpers.fake_model import FakeModel
from helpers.pretend_device import DEVICE, PretendDevice, pretend_device

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import triton
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


def test_launches_and_waits(device: PretendDevice) -> None:
    """However many prompts end or requests are compacted, the host waits once, and never where
    requests decode."""
    config = FastGenConfig(kv_budget=0.3, min_prompt_tokens=8, block_size=BLOCK, compact_every=4)
    kv = torch.zeros(128, LAYERS, HEADS, BLOCK, 2 * SIZE).to(DEVICE)
    classes = torch.zeros(50, dtype=torch.uint8).to(DEVICE)
    runtime = Runtime(config, classes, kv, GROUP, max_requests=REQUESTS, report_lag=1)
    runtime.kernels = triton
    driver = Driver(runtime)
    for name, n in PROMPTS.items():
        driver.begin(name, [9] * n, RequestOverride())
        driver.requests[name].tokens += [9] * 16

    def step(counts: dict[str, int]) -> tuple[Counter[str], int, StepReport]:
        """Launches by name, waits, and the report."""
        launches, waits = len(device.launches), len(device.waits)
        made = driver.start_step(counts)
        where = [(SEEDS[r], p) for r, c in counts.items() for p in range(c)]
        for layer in range(LAYERS):
            MODEL.forward(driver, made, layer, where)
        pending = runtime.finish_step(made)
        counted = Counter(device.launches[launches:]), len(device.waits) - waits
        return *counted, driver.read(pending)

    _, waits, report = step(PROMPTS)
    assert waits == 1 and len(report.kept) == REQUESTS
    step(dict.fromkeys(PROMPTS, 1))  # these are new in the batch
    for _ in range(2):
        launches, waits, report = step(dict.fromkeys(PROMPTS, 1))
        assert waits == 0 and not report.kept_again
        of_layers = [launches[f"{name}_kernel"] for name in ("write_kv", "attend", "merge")]
        assert of_layers == [LAYERS] * 3
        # The model of this test takes three a layer and sends three tensors a step; blocks are
        # granted in each of these, which takes seven.
        assert launches.total() - 6 * LAYERS - 3 - 7 <= 10
    _, waits, report = step(dict.fromkeys(PROMPTS, 1))
    assert waits == 1 and len(report.kept_again) == REQUESTS
