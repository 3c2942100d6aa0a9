"""Decode steps that were captured once, and are replayed while requests come, grow and go."""

from __future__ import annotations

from typing import Final

import pytest
import torch
from helpers.fake_model import FakeModel, kept_positions, run_step
from helpers.pretend_device import DEVICE, PretendDevice, PretendGraph, pretend_device

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import triton
from fastgen_vllm.runtime.driver import Driver
from fastgen_vllm.runtime.runtime import Runtime

LAYERS, HEADS, GROUP, SIZE, VOCAB, PLACES = 2, 2, 3, 16, 50, 4
BLOCK: Final = 8
MODEL = FakeModel(LAYERS, HEADS, GROUP, SIZE)
PROMPTS = {"a": 30, "b": 7, "c": 45, "d": 16, "e": 33}
SEEDS = {name: i for i, name in enumerate(PROMPTS)}


def make_driver() -> Driver:
    config = FastGenConfig(
        kv_budget=0.4, min_prompt_tokens=8, block_size=BLOCK, compact_every=6, debug=True
    )
    kv = torch.zeros(80, LAYERS, HEADS, BLOCK, 2 * SIZE).to(DEVICE)
    classes = (torch.arange(VOCAB) < 2).to(torch.uint8).to(DEVICE)
    runtime = Runtime(config, classes, kv, GROUP, max_requests=PLACES, report_lag=1)
    runtime.kernels = triton
    return Driver(runtime)


class Captured:
    """A graph of a step of ``places`` requests, and where its inputs and outputs lie."""

    def __init__(self, device: PretendDevice, driver: Driver, places: int) -> None:
        rows = HEADS * (GROUP + 2)
        self.driver, self.places, self.graph = driver, places, PretendGraph()
        self.inputs = torch.full((LAYERS, places, rows, SIZE), float("nan")).to(DEVICE)
        query, *_ = self._split(0)
        self.outputs = torch.stack([torch.zeros_like(query)] * LAYERS)
        step = driver.runtime.captured_step(places)
        with device.capture(self.graph):
            for layer in range(LAYERS):
                query, key, value = self._split(layer)
                output = self.outputs[layer]
                driver.runtime.forward(step, layer, query, key, value, output, MODEL.scale)

    def _split(self, layer: int) -> tuple[torch.Tensor, ...]:
        return self.inputs[layer].split([HEADS * GROUP, HEADS, HEADS], dim=1)

    def run(self, counts: dict[str, int]) -> dict[str, torch.Tensor]:
        """A decode step: planned as always, and replayed."""
        runtime = self.driver.runtime
        assert runtime.can_replay(list(counts), self.places)
        where = [(SEEDS[name], self.driver.requests[name].computed) for name in counts]
        step = self.driver.start_step(counts)
        for layer in range(LAYERS):
            qkv = torch.stack([MODEL.qkv(seed, layer, position) for seed, position in where])
            qkv[:, : HEADS * GROUP] *= 2
            self.inputs[layer, : len(where)] = qkv.to(DEVICE)
        self.graph.replay()
        self.driver.read(runtime.finish_step(step))
        return {name: self.outputs[:, i : i + 1].cpu() for i, name in enumerate(counts)}


def test_replayed_steps_are_the_steps() -> None:
    """Outputs, head tables and what heads keep, through compactions, prompts between the steps,
    and batches that leave places of the graph to nobody."""
    with pretend_device() as device:
        ours, theirs = make_driver(), make_driver()
        graphs = {places: Captured(device, ours, places) for places in (1, 2, PLACES)}
        assert all(len(each.graph) == 3 * LAYERS for each in graphs.values())
        tables = ours.runtime.tables
        lie_at = [x.data_ptr() for x in (tables.state.lengths, tables.state.page_table)]
        arrive = {0: "ab", 2: "c", 4: "d", 10: "e"}
        leave = {7: "b", 9: "d", 13: "ac"}
        replayed = set()
        for number in range(16):
            for name in leave.get(number, ""):
                ours.end(name)
                theirs.end(name)
            for name in arrive.get(number, ""):
                tokens = [(7 * i + SEEDS[name]) % VOCAB for i in range(PROMPTS[name] + 30)]
                for driver in (ours, theirs):
                    driver.begin(name, tokens[: PROMPTS[name]], RequestOverride())
                    driver.requests[name].tokens = tokens
            counts = {
                name: max(1, PROMPTS[name] - request.computed)
                for name, request in ours.requests.items()
            }
            wanted, _ = run_step(theirs, MODEL, SEEDS, counts)
            if number in arrive:
                assert not ours.runtime.can_replay(list(counts), PLACES)
                found, _ = run_step(ours, MODEL, SEEDS, counts)
            else:
                places = min(size for size in graphs if size >= len(counts))
                replayed.add((places, len(counts)))
                found = graphs[places].run(counts)
            for name, output in wanted.items():
                torch.testing.assert_close(found[name], output)
                assert kept_positions(ours, name) == kept_positions(theirs, name)
        assert replayed == {(1, 1), (2, 2), (PLACES, 3), (PLACES, 4)}
        assert lie_at == [x.data_ptr() for x in (tables.state.lengths, tables.state.page_table)]
        nobody = ours.runtime.pool.positions[: LAYERS * HEADS]
        assert (nobody.cpu() == -1).all(), "page 0 stays empty"


def test_what_is_too_long_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_device():
        driver = make_driver()
        driver.begin("a", [9] * 30, RequestOverride())
        assert not driver.runtime.can_replay(["a"], PLACES), "its prompt is being encoded"
        driver.requests["a"].tokens += [9] * 4
        run_step(driver, MODEL, SEEDS, {"a": 30})
        assert driver.runtime.can_replay(["a"], PLACES)
        # A graph of three has room for 37 whole pages of 8 slots, and a little more.
        monkeypatch.setattr(
            "fastgen_vllm.runtime.runtime.LOGITS_BYTES", 3 * 4 * HEADS * GROUP * 300
        )
        step = driver.runtime.captured_step(3)
        assert step.decode is not None and step.decode.max_pages == 37
        for bound, fits in ((37 * BLOCK - 1, True), (37 * BLOCK, False)):
            driver.runtime.tables._bounds["a"] = bound  # one slot more is to come
            assert driver.runtime.can_replay(["a"], 3) == fits
