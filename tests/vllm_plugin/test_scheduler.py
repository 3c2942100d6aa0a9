"""The scheduler and its block manager, for real, with reports made up: no worker runs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from fastgen_vllm.runtime.report import Kept, KeptAgain, StepReport
from fastgen_vllm.vllm_plugin.block_manager import FastGenSpec
from fastgen_vllm.vllm_plugin.scheduler import FastGenAsyncScheduler, FastGenScheduler

BLOCK, PAGES = 16, 6
"""Tokens of a block; its pages, two heads in each of three layers."""
PROMPT = 64
KEPT = Kept(100, 384, 2, {"local": 6}, budget=0.25, recovery=0.75, protected_tokens=3)

Scheduler = FastGenScheduler | FastGenAsyncScheduler


@pytest.fixture(params=[FastGenScheduler, FastGenAsyncScheduler])
def scheduler(request: pytest.FixtureRequest, model: str) -> Scheduler:
    return start(request.param, model)


def start(kind: type[Scheduler], model: str) -> Scheduler:
    """32 requests of 64 tokens fit; prompts come in chunks of at most 32 tokens."""
    load_general_plugins()
    config = EngineArgs(
        model=model,
        max_model_len=512,
        max_num_batched_tokens=32,
        enable_prefix_caching=False,
        attention_backend="fastgen",
        additional_config={"fastgen": {"debug": True}},
    ).create_engine_config()
    spec = FastGenSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32)
    layers = KVCacheGroupSpec([f"layer.{i}" for i in range(3)], spec)
    config.cache_config.num_gpu_blocks = 129
    return kind(
        config, KVCacheConfig(129, [], [layers]), StructuredOutputManager(config), block_size=BLOCK
    )


def add(scheduler: Scheduler, name: str, tokens: int = PROMPT, **sampling: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 100, "ignore_eos": True, **sampling})
    request = Request(name, list(range(tokens)), params, None, block_hasher=None)
    scheduler.add_request(request)
    return request


def finish(scheduler: Scheduler, plan: Any, report: StepReport) -> Any:
    """The worker has done the step ``plan``: every request that ended its prompt has a token."""
    names = list(plan.num_scheduled_tokens)
    ended = [not scheduler.requests[name].is_prefill_chunk for name in names]
    output: Any = ModelRunnerOutput(
        names, {n: i for i, n in enumerate(names)}, [[7] if each else [] for each in ended]
    )
    output.fastgen_report = report
    return scheduler.update_from_output(plan, output)


def prefill(scheduler: Scheduler, name: str) -> list[int]:
    """All chunks of its prompt, and a report that vacates nothing yet. Returns its blocks."""
    for _ in range(scheduler.requests[name].num_prompt_tokens // 32 - 1):
        finish(scheduler, scheduler.schedule(), StepReport())
    plan = scheduler.schedule()
    owned = scheduler.block_manager.owned_blocks(name)
    finish(scheduler, plan, StepReport(free_pages={name: 0}, owned={name: owned}))
    return owned


class Counted(list[KVCacheBlock]):
    """Blocks that count how often somebody walks them."""

    walked = 0

    def __iter__(self) -> Iterator[KVCacheBlock]:
        self.walked += 1
        return super().__iter__()


def test_report_of_a_request_preempted_since_its_step(model: str) -> None:
    """Asynchronous scheduling: the report of the step that ended a prompt is read after the
    request was preempted and has come back with new blocks, which are no longer the report's."""
    scheduler = start(FastGenAsyncScheduler, model)
    request = add(scheduler, "a")
    finish(scheduler, scheduler.schedule(), StepReport())
    ending = scheduler.schedule()
    before = scheduler.block_manager.owned_blocks("a")
    report = StepReport(
        vacated={"a": before[:2]},
        free_pages={"a": 3},
        kept={"a": KEPT},
        owned={"a": before[2:]},
    )
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    scheduler.schedule()
    assert request.num_preemptions == 1
    again = scheduler.block_manager.owned_blocks("a")
    finish(scheduler, ending, report)
    assert scheduler.block_manager.owned_blocks("a") == again
    assert "a" not in scheduler.block_manager.free_pages, "it is not compressed any more"
    assert "a" not in scheduler.kept


def test_step_with_nothing_to_vacate_walks_no_blocks(scheduler: Scheduler) -> None:
    scheduler.debug = False
    add(scheduler, "a")
    prefill(scheduler, "a")
    manager = scheduler.block_manager
    blocks = manager.req_to_blocks["a"] = Counted(manager.req_to_blocks["a"])
    manager.free_pages["a"] = PAGES
    for _ in range(3):
        finish(scheduler, scheduler.schedule(), StepReport(free_pages={"a": PAGES}))
    assert blocks.walked == 0
    manager.vacate("a", manager.owned_blocks("a")[:1])
    assert blocks.walked == 2, "by owned_blocks and vacate, so it does count"


def test_only_what_was_given_is_remembered(scheduler: Scheduler) -> None:
    add(scheduler, "a")
    owned = prefill(scheduler, "a")
    manager = scheduler.block_manager
    assert manager.given_since(0) == {"a": owned}
    for _ in range(8):
        plan = scheduler.schedule()
        now = manager.owned_blocks("a")
        finish(scheduler, plan, StepReport(free_pages={"a": 0}, owned={"a": now}))
    (given,) = manager._given
    assert (given[1], len(given[2])) == ("a", 1), "one more block, at the boundary"
    assert manager.given_since(given[0]) == {}


@pytest.mark.parametrize(
    ("owned", "free", "grown", "ratio", "squeezed"),
    [
        (21, 0, 25, 0.5, True),
        (21, 0, 24, 0.5, True),
        (20, 0, 16, 0.5, True),
        (20, 0, 16, 0.9, False),
        (20, 0, 15, 0.5, False),
        (19, 0, 100, 0.5, False),
        (20, 1, 100, 0.5, False),
    ],
)
def test_small_squeezes_before_a_preemption(
    scheduler: Scheduler, owned: int, free: int, grown: int, ratio: float, squeezed: bool
) -> None:
    """Where less is free than runs, a request gives two blocks, if it has grown by one and could
    give them before; it keeps 256 tokens at least."""
    request = add(scheduler, "a", 416)
    manager, blocks = scheduler.block_manager, prefill(scheduler, "a")
    owned += isinstance(scheduler, FastGenAsyncScheduler)  # whose free pages are counted on
    manager.vacate("a", blocks[owned:])
    last = KeptAgain(ratio, request.num_tokens - grown, 100)
    manager.free_pages["a"], scheduler.kept["a"] = 2 * PAGES, replace(KEPT, last=last)
    pool = manager.block_pool
    pool.get_new_blocks(pool.get_num_free_blocks() - free)
    assert scheduler._squeeze({"a": 1}) == ["a"] * squeezed


@pytest.mark.parametrize(("stop", "told"), [(["end"], True), ([], False)])
def test_output_that_a_stop_string_may_end_tells_what_was_kept(
    scheduler: Scheduler, stop: list[str], told: bool
) -> None:
    add(scheduler, "a", stop=stop, detokenize=True)
    finish(scheduler, scheduler.schedule(), StepReport())
    plan = scheduler.schedule()
    owned = scheduler.block_manager.owned_blocks("a")
    report = StepReport({"a": owned[:2]}, {"a": 3}, {"a": KEPT}, {"a": owned[2:]})
    (outputs,) = finish(scheduler, plan, report).values()
    (output,) = outputs.outputs
    assert output.finish_reason is None
    summary = {
        **{"kv_kept_ratio": 100 / 384, "vacated_blocks": 2, "policy_heads": {"local": 6}},
        **{"cached_tokens": 0, "kv_budget": 0.25, "kv_recovery": 0.75, "protected_tokens": 3},
        **{"compactions": 0, "kv_kept_last": None, "compacted_at": None},
    }
    assert output.kv_transfer_params == ({"fastgen": summary} if told else None)


def test_what_is_given_back_is_counted_as_requests_tell_it(scheduler: Scheduler) -> None:
    """The net of it: with prefix caching a prompt leaves all its blocks for a few others."""
    add(scheduler, "a")
    finish(scheduler, scheduler.schedule(), StepReport())
    plan = scheduler.schedule()
    owned = scheduler.block_manager.owned_blocks("a")
    net = replace(KEPT, vacated_blocks=1)
    finish(scheduler, plan, StepReport({"a": owned[:3]}, {"a": 3}, {"a": net}, {"a": owned[3:]}))
    traffic = scheduler.accounts.traffic
    assert traffic.vacated_blocks == 1
    before = traffic.evicted_slots
    plan = scheduler.schedule()
    again = KeptAgain(0.2, 40, 25)
    left = scheduler.block_manager.owned_blocks("a")
    report = StepReport({"a": left[:1]}, {"a": 3}, {}, {"a": left[1:]}, {"a": again})
    finish(scheduler, plan, report)
    assert traffic.vacated_blocks == 2 and traffic.compactions == 1
    assert traffic.evicted_slots == before + 25
