"""Whole steps of the runtime, chunked prompts beside decoding requests: every implementation of
the kernels gives the reference's outputs and head tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
import torch
from helpers.fake_model import FakeModel, kept_positions, run_step
from helpers.pretend_device import DEVICE, PretendDevice, pretend_device

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import Kernels, cpu, reference, triton
from fastgen_vllm.profiler.profile import PromptProfile, PromptTokens
from fastgen_vllm.runtime.driver import Driver
from fastgen_vllm.runtime.runtime import Runtime
from fastgen_vllm.runtime.warm_up import warm_up

LAYERS, HEADS, GROUP, SIZE, BLOCKS, VOCAB = 2, 2, 3, 32, 64, 50
BLOCK: Final = 8
PROMPTS = {"a": 47, "b": 16, "c": 90}
SEEDS = {"a": 1, "b": 2, "c": 3}
CHUNK, DECODE_STEPS = 32, 20
MODEL = FakeModel(LAYERS, HEADS, GROUP, SIZE)
_IDS = torch.arange(VOCAB)
CLASSES = (_IDS < 3).to(torch.uint8) + 2 * (_IDS % 7 == 5).to(torch.uint8)


def tokens_of(name: str) -> list[int]:
    generator = torch.Generator().manual_seed(SEEDS[name])
    return torch.randint(VOCAB, (PROMPTS[name] + DECODE_STEPS,), generator=generator).tolist()


class Trial:
    """The same prompts, tokens, queries, keys and values every time.

    Args:
        configs: of each request; the runtime's are the first one's.
    """

    def __init__(
        self,
        kernels: Kernels,
        configs: dict[str, FastGenConfig],
        mode: PretendDevice | None = None,
    ) -> None:
        device = DEVICE if mode else torch.device("cpu")
        kv = torch.full((BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE), float("nan")).to(device)
        self.mode, self.configs = mode, configs
        first = next(iter(configs.values()))
        self.runtime = Runtime(first, CLASSES.to(device), kv, GROUP)
        self.runtime.kernels = kernels
        self.driver = Driver(self.runtime)
        self.outputs: dict[str, list[torch.Tensor]] = {name: [] for name in configs}
        self.kept: dict[str, int] = {}
        self.positions: dict[str, list[list[list[int]]]] = {name: [] for name in configs}

    def run(self) -> Trial:
        for name, config in self.configs.items():
            self._begin(name, config)
        while unfinished := [n for n in self.configs if len(self.positions[n]) < DECODE_STEPS]:
            counts = {}
            for name in unfinished:
                left = PROMPTS[name] - self.driver.requests[name].computed
                counts[name] = min(CHUNK, max(1, left))
            outputs, report = run_step(self.driver, MODEL, SEEDS, counts, self.no_waiting)
            for name, output in outputs.items():
                self.outputs[name].append(output)
                if name in self.runtime.tables.rows:
                    self.positions[name].append(kept_positions(self.driver, name))
            self.kept.update({name: kept.kept_slots for name, kept in report.kept.items()})
        return self

    def _begin(self, name: str, config: FastGenConfig) -> None:
        tokens, runtime = tokens_of(name), self.runtime
        with self.no_waiting():
            self.driver.begin(name, tokens[: PROMPTS[name]], RequestOverride())
            self.driver.requests[name].tokens = tokens
            if config is not runtime.config:
                plan = config.plan_for(config.goal, runtime.token_classes.device)
                own = PromptTokens(CLASSES[torch.tensor(tokens[: PROMPTS[name]])])
                profile = PromptProfile(config, plan, runtime.heads, own, BLOCK, config.goal)
                runtime.prefills[name].profiles = [profile]

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """The host must not wait for the device in here."""
        before = len(self.mode.waits) if self.mode else 0
        yield
        assert self.mode is None or not self.mode.waits[before:], self.mode.waits[before:]

    def check(self, wanted: Trial, names: Iterable[str] = PROMPTS, atol: float = 1e-5) -> None:
        for name in names:
            assert self.kept[name] == wanted.kept[name]
            assert self.positions[name] == wanted.positions[name]
            pairs = zip(self.outputs[name], wanted.outputs[name], strict=True)
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=10 * atol, atol=atol)


def config_of(debug: bool = True, **settings: Any) -> FastGenConfig:
    return FastGenConfig(min_prompt_tokens=2, block_size=BLOCK, debug=debug, **settings)


LADDERS = ["paper", "adaptive", None]
"""Without one, who asks for a recovery has the adaptive ladder, and a budget looks at peaks."""


def one_ladder(ladder: Any, debug: bool = True) -> dict[str, FastGenConfig]:
    """Two requests that ask for a recovery and one that has a budget."""
    config = config_of(debug, ladder=ladder, recovery=0.8)
    return {"a": config, "b": config, "c": config_of(debug, ladder=ladder, kv_budget=0.6)}


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("kernels", [cpu, triton], ids=lambda module: module.__name__)
def test_whole_steps(kernels: Kernels, ladder: str) -> None:
    assert cpu.problem(SIZE, torch.float32) == "", "the extension must be built to test it"
    ours, wanted = (Trial(k, one_ladder(ladder)).run() for k in (kernels, reference))
    assert sum(ours.kept.values()) < LAYERS * HEADS * sum(PROMPTS.values())
    ours.check(wanted)


@pytest.mark.parametrize("kernels", [reference, cpu, triton], ids=lambda module: module.__name__)
def test_one_batch_has_ladders_and_methods_of_its_own(kernels: Kernels) -> None:
    """Three different ones decode as each does alone."""
    configs = {
        "a": config_of(ladder="paper", recovery=0.6, frequent_score="mean"),
        "b": config_of(method="h2o", kv_budget=0.4),
        "c": config_of(method="streaming", kv_budget=0.3),
    }
    together = Trial(kernels, configs).run()
    evicted = [set(t[0][0]) - set(t[-1][0]) for t in together.positions.values()]
    assert all(evicted), "each should evict while decoding"
    for name, config in configs.items():
        alone = Trial(kernels, {name: config}).run()
        together.check(alone, [name])


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


@pytest.mark.parametrize("ladder", LADDERS[::2])
def test_steps_on_a_device(ladder: str) -> None:
    """No tensor of the device meets one of the CPU, and the host waits at a prompt's end only."""
    wanted = Trial(triton, one_ladder(ladder)).run()
    with pretend_device() as mode:
        trial = Trial(triton, one_ladder(ladder, debug=False), mode).run()
    trial.check(wanted)


class Watched:
    """The reference, noting which operations ran."""

    def __init__(self) -> None:
        self.ran: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.ran.add(name)
        return getattr(reference, name)


@pytest.mark.parametrize("ladder", LADDERS)
def test_warm_up_runs_every_operation_and_leaves_nothing(ladder: str) -> None:
    watched = Watched()
    warm = Trial(watched, one_ladder(ladder))  # type: ignore[arg-type]
    with pretend_device() as mode:
        warm_up(Trial(reference, one_ladder(ladder), mode).runtime)
    warm_up(warm.runtime)
    warmed_up = set(watched.ran)
    warm.run()
    assert watched.ran == warmed_up
    warm.check(Trial(reference, one_ladder(ladder)).run(), atol=0.0)


def test_a_prompt_reads_what_another_of_its_batch_writes() -> None:
    """As with a shared prefix whose blocks are hashed when they are scheduled."""
    config = config_of(recovery=1.0)
    kv = torch.full((BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE), float("nan"))
    runtime = Runtime(config, torch.zeros(VOCAB, dtype=torch.uint8), kv, GROUP)
    for name in ("follower", "owner"):
        runtime.begin_prefill(name, [1] * 20, RequestOverride())
    # The follower's first 16 tokens lie in the owner's blocks.
    runtime.grant({"follower": [1, 2, 4], "owner": [1, 2, 3]})
    step = runtime.start_step(
        ["follower", "owner"],
        torch.tensor([0, 4, 24]),
        torch.tensor([20, 20]),
        torch.ones(24, dtype=torch.int64),
    )
    qkv = torch.stack([MODEL.qkv(1, 0, p) for p in (*range(16, 20), *range(20))])
    query, key, value = qkv.split([HEADS * GROUP, HEADS, HEADS], dim=1)
    output = torch.full_like(query, float("nan"))
    runtime.forward(step, 0, query, key, value, output, 0.4)
    torch.testing.assert_close(output[:4], output[-4:])


@pytest.mark.parametrize("lag", [1, 2])
def test_only_heads_that_can_grow_hold_pages_back(lag: int) -> None:
    """Late reports leave out what a head may take meanwhile: a full one near the end of its page,
    not one that is at its budget."""
    trial = Trial(cpu, {"a": config_of(method="streaming", kv_budget=0.4)})
    trial.runtime.report_lag = lag
    trial.run()
    tables, computed = trial.runtime.tables, trial.driver.requests["a"].computed
    row = tables.rows["a"]
    tables.state.lengths[row] = 2 * BLOCK
    held = int(tables.state.num_free[row])
    seen, rows = torch.tensor([computed]), torch.tensor([row])

    def left() -> int:
        return int(trial.runtime.kernels.free_pages(tables.state, rows, seen, BLOCK, lag))

    # Its window is a share of all tokens: 0.4 of those here is more than two pages.
    assert left() == held - LAYERS * HEADS
    tables.state.rules[row].local.fill_(1000)
    budgets = tables.state.num_sticky[row] + computed // 10 + 1
    tables.state.lengths[row] = -(-budgets // BLOCK) * BLOCK
    assert left() == held, "at its budget a head takes no page"


GROWTHS = [(300, 5000), (50, 2000)]


@pytest.mark.parametrize(("prompt", "generated"), GROWTHS)
def test_memory_of_a_long_generation(prompt: int, generated: int) -> None:
    """Slots in use are never more than the budget of the length, what has grown since the last
    compaction, and a block a head; blocks are not many more. What is dropped is told."""
    block, every = 16, 256
    config = FastGenConfig(kv_budget=0.25, compact_every=every, debug=True)
    kv = torch.zeros(200, LAYERS, HEADS, block, 2 * SIZE)
    runtime = Runtime(config, CLASSES, kv, GROUP)
    driver, model = Driver(runtime), FakeModel(LAYERS, HEADS, GROUP, SIZE)
    tokens = [VOCAB - 1] * (prompt + generated)  # of no class
    driver.begin("a", tokens[:prompt], RequestOverride())
    driver.requests["a"].tokens = tokens
    last, compactions, dropped = prompt, 0, 0
    for length in range(prompt, prompt + generated):
        count = prompt if length == prompt else 1
        _, report = run_step(driver, model, {"a": 1}, {"a": count})
        model._made.clear()
        row = runtime.tables.rows["a"]
        for kept in report.kept.values():
            dropped += kept.total_slots - kept.kept_slots
        if report.kept_again:
            compactions, last = compactions + 1, length
            dropped += report.kept_again["a"].dropped_slots
            assert report.kept_again["a"].ratio <= max(0.25, 256 / length) + 16 / length
        share = max(0.25, 256 / length) if length >= 256 + every * (prompt < 256) else 1.0
        in_use = int(runtime.tables.state.lengths[row].sum())
        assert in_use == length * LAYERS * HEADS - dropped
        slots = in_use / (LAYERS * HEADS)
        assert slots <= min(length, share * length + length - last + block), length
        assert len(runtime.tables.blocks["a"]) <= -(-slots // block) + 3
    assert compactions == (prompt + generated - 1 - max(prompt, 256)) // every
    driver.end("a")
    assert len(driver.free) == 199
