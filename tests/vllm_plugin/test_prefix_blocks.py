"""Block manager, scheduler and vLLM's block pool under random lives of requests that share
beginnings, with the worker's part made up: what it writes where, and what it hands back."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.paths import MODEL
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from fastgen_vllm.runtime.report import Kept, KeptAgain, StepReport
from fastgen_vllm.vllm_plugin.block_manager import FastGenSpec
from fastgen_vllm.vllm_plugin.overrides import override_of
from fastgen_vllm.vllm_plugin.scheduler import FastGenScheduler

BLOCK, LAYERS, HEADS, POOL = 16, 3, 2, 55
PAGES, MOST_CACHED = LAYERS * HEADS, 400
OVERRIDES: list[dict[str, Any]] = [
    *({}, {}, {"fastgen_kv_budget": 0.6}, {"fastgen_compress": False}),
    *({"fastgen_recovery": 0.9}, {"fastgen_kv_budget": 0.2, "fastgen_min_recovery": 0.9}),
    {"fastgen_protect": [0, 40]},
]


def make_scheduler() -> tuple[Callable[[], FastGenScheduler], Callable[[Request], Any]]:
    load_general_plugins()
    config = EngineArgs(
        model=MODEL,
        max_model_len=800,
        max_num_batched_tokens=256,
        attention_backend="fastgen",
        enable_prefix_caching=True,
        scheduling_policy="priority",
        long_prefill_token_threshold=64,
        additional_config={"fastgen": {"debug": True, "min_prompt_tokens": 100}},
    ).create_engine_config()
    spec = FastGenSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=64, dtype=torch.float32)
    layers = KVCacheGroupSpec([f"layer.{i}" for i in range(LAYERS)], spec)
    config.cache_config.num_gpu_blocks = POOL
    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    hasher = get_request_block_hasher(BLOCK, hash_fn)

    def scheduler() -> FastGenScheduler:
        return FastGenScheduler(
            config,
            KVCacheConfig(POOL, [], [layers]),
            StructuredOutputManager(config),
            block_size=BLOCK,
        )

    return scheduler, hasher


class Ones:
    """Draws that are all 1."""

    def draw(self, strategy: Any) -> Any:
        return 1


class Lives(RuleBasedStateMachine):
    """``content`` is what the worker would have written: of each block's tokens, those up to it, or
    what else is there."""

    new_scheduler: Callable[[], FastGenScheduler]
    hasher: Callable[[Request], Any]

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(Lives, "new_scheduler"):
            new_scheduler, hasher = make_scheduler()
            Lives.new_scheduler, Lives.hasher = staticmethod(new_scheduler), staticmethod(hasher)
        self.scheduler = Lives.new_scheduler()
        self.scheduler.block_manager.most_cached_tokens = MOST_CACHED
        self.content: dict[int, list[Any]] = {}
        self.stands_for: dict[Any, tuple[int, ...]] = {}
        """Of each hash, the tokens up to its block's end."""
        self.past_prompt: dict[str, list[int]] = {}
        """Of decoding requests, the blocks that they own."""
        self.prompts: dict[str, list[int]] = {}
        self.whole: set[str] = set()
        """Those that keep all of their prompt, in its place."""
        self.count = 0

    @rule(
        beginning=st.integers(0, 2),
        shared=st.sampled_from([0, 40, 160, 176, 320, 500]),
        own=st.sampled_from([1, 15, 16, 17, 90, 200]),
        override=st.sampled_from(OVERRIDES),
        max_tokens=st.sampled_from([1, 2, 20, 60]),
        together=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 1]),
    )
    def admit(
        self,
        beginning: int,
        shared: int,
        own: int,
        override: dict[str, Any],
        max_tokens: int,
        together: int,
        priority: int,
    ) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=override)
        for _ in range(together):
            self.count += 1
            tokens = [beginning] * shared + random.Random(self.count).choices(range(9), k=own)
            name = f"r{self.count}"
            request = Request(
                name, tokens, params, None, priority=priority, block_hasher=Lives.hasher
            )
            self.scheduler.add_request(request)

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data(), count=st.integers(1, 8))
    def steps(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            if self.scheduler.requests:
                self.step(data)
                self.hashed_blocks_hold_what_they_stand_for()
                self.owners_are_counted()

    def step(self, data: st.DataObject | Ones) -> None:
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        plan = scheduler.schedule()
        for name in plan.preempted_req_ids or ():
            self.past_prompt.pop(name, None)
        names, report, ended = list(plan.num_scheduled_tokens), StepReport(), []
        started = {r.req_id: r.num_computed_tokens for r in plan.scheduled_new_reqs}
        cached = plan.scheduled_cached_reqs
        started |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, count in plan.num_scheduled_tokens.items():
            request, first = scheduler.requests[name], started[name]
            self.compute(name, request, first, first + count)
            if first + count == request.num_tokens:
                ended.append(name)
        begun = {r.req_id for r in plan.scheduled_new_reqs} | cached.resumed_req_ids
        found = [started[r] for r in begun if started[r] and self.shrinks(scheduler.requests[r])]
        assert len(found) < 2 or sum(found) <= MOST_CACHED
        for name in ended:
            self.end_prompt(name, scheduler.requests[name], plan, report, data)
        for name in names:
            if name in self.past_prompt:
                some = 0 if name in self.whole else data.draw(st.integers(0, 2 * PAGES))
                report.free_pages[name] = some
                if name not in {*ended, *self.whole} and not data.draw(st.integers(0, 5)):
                    self.compact_again(name, report, data)
        report.owned = {name: self.past_prompt[name] for name in report.free_pages}
        tokens = [[7] if name in ended else [] for name in names]
        if not data.draw(st.integers(0, 9)):
            self.abort_one(data)  # as clients do while the worker computes
        output: Any = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, tokens)
        output.fastgen_report = report
        scheduler.update_from_output(plan, output)
        self.past_prompt = {n: b for n, b in self.past_prompt.items() if n in scheduler.requests}
        assert manager.block_pool.get_num_free_blocks() <= POOL - 1

    def compute(self, name: str, request: Request, first: int, end: int) -> None:
        """Write tokens ``[first, end)``; of a prompt, each to its place."""
        tokens, table = (
            list(request.all_token_ids),
            self.scheduler.block_manager.req_to_blocks[name],
        )
        if name in self.past_prompt:
            own = [b.block_id for b in table if not b.is_null]
            written = set(own) - set(self.past_prompt[name])
            if name in self.whole:
                self.check_prompt(table, tokens[: len(self.prompts[name]) // BLOCK * BLOCK])
                written.add(table[first // BLOCK].block_id)
            for block in written:
                self.content[block] = [f"said by {name}"] * BLOCK
            self.past_prompt[name] = own
            return
        self.prompts[name] = tokens
        self.check_prompt(table, tokens[: first // BLOCK * BLOCK])
        for position in range(first, end):
            block = table[position // BLOCK].block_id
            slots = self.content.setdefault(block, [None] * BLOCK)
            slots[position % BLOCK] = tuple(tokens[: position + 1])
        for i, block_hash in enumerate(request.block_hashes):
            self.stands_for[block_hash] = tuple(tokens[: (i + 1) * BLOCK])

    def check_prompt(self, table: list[Any], tokens: list[int]) -> None:
        """Its full blocks hold these tokens."""
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            block = table[end // BLOCK - 1].block_id
            assert self.content[block][-1] == tuple(tokens[:end]), "it is not there"

    def shrinks(self, request: Request) -> bool:
        config, sampling = self.scheduler.config, request.sampling_params
        override = override_of(config, sampling)
        return config.goal_for(request.num_tokens, override, request.num_prompt_tokens) is not None

    def end_prompt(
        self, name: str, request: Request, plan: Any, report: StepReport, data: st.DataObject | Ones
    ) -> None:
        if name in self.past_prompt or request.sampling_params.max_tokens == 1:
            return
        manager = self.scheduler.block_manager
        own = [b.block_id for b in manager.req_to_blocks[name]]
        targets = plan.fastgen_targets.get(name)
        kept = own
        self.whole.discard(name)  # in an earlier life
        if not self.shrinks(request) and targets is None:
            self.whole.add(name)
        else:
            room = own if targets is None else targets
            kept = room[: data.draw(st.integers(1, min(len(room), len(own))))]
            for block in room:
                self.content[block] = [f"kept by {name}"] * BLOCK
        gone = [b for b in dict.fromkeys([*own, *(targets or ())]) if b not in kept]
        report.vacated[name] = gone
        report.kept[name] = Kept(1, 2, len(gone), {})
        self.past_prompt[name] = list(kept)

    def compact_again(self, name: str, report: StepReport, data: st.DataObject | Ones) -> None:
        """A request that has grown gives some of its blocks back."""
        own = self.past_prompt[name]
        kept = own[: data.draw(st.integers(1, len(own)))]
        report.vacated[name], report.kept_again[name] = own[len(kept) :], KeptAgain(0.5, 9, 7)
        self.past_prompt[name] = kept

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.abort_one(data)

    def abort_one(self, data: st.DataObject | Ones) -> None:
        name = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
        self.past_prompt.pop(name, None)

    @rule(running=st.booleans(), really=st.integers(0, 4))
    def reset(self, running: bool, really: int) -> None:
        if really:
            return
        if self.scheduler.reset_prefix_cache(reset_running_requests=running) and running:
            self.past_prompt.clear()

    @invariant()
    def hashed_blocks_hold_what_they_stand_for(self) -> None:
        for block in self.scheduler.block_manager.block_pool.blocks:
            if block.block_hash is not None:
                wanted = self.stands_for[block.block_hash[:-4]]
                assert self.content[block.block_id][-1] == wanted

    @invariant()
    def owners_are_counted(self) -> None:
        self.scheduler._audit({})

    def teardown(self) -> None:
        """Everybody finishes, and the pool is whole."""
        for _ in range(3000):
            if not self.scheduler.requests:
                break
            self.step(Ones())
            self.hashed_blocks_hold_what_they_stand_for()
        assert not self.scheduler.requests, "somebody waits for ever"
        manager = self.scheduler.block_manager
        assert manager.block_pool.get_num_free_blocks() == POOL - 1
        assert not manager.targets and not manager.prompts and not manager.free_pages


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_adapters_and_salts_keep_prompts_apart() -> None:
    new_scheduler, hasher = make_scheduler()
    scheduler, params = new_scheduler(), SamplingParams(max_tokens=5)

    def hit(name: str, adapter: str | None = None, salt: str | None = None) -> int:
        lora = None if adapter is None else LoRARequest(adapter, len(adapter), "/nowhere")
        options = {"lora_request": lora, "cache_salt": salt, "block_hasher": hasher}
        request = Request(name, list(range(200)), params, None, **options)
        scheduler.add_request(request)
        before = scheduler.schedule().scheduled_new_reqs[0].num_computed_tokens
        scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
        return before

    most = (200 - 128) // BLOCK * BLOCK
    assert [hit("a"), hit("b")] == [0, most]
    assert [hit("c", "one"), hit("d", "other"), hit("e", "one")] == [0, 0, most]
    assert [hit("f", salt="salt"), hit("g", salt="pepper"), hit("h", salt="salt")] == [0, 0, most]


@pytest.mark.parametrize("preempted", [True, False])
def test_a_hash_promises_what_is_computed(preempted: bool) -> None:
    """A request that is preempted in the step in which it was planned takes its new hashes along;
    one that leaves later does not."""
    new_scheduler, hasher = make_scheduler()
    scheduler, params = new_scheduler(), SamplingParams(max_tokens=5)
    request = Request("a", list(range(200)), params, None, block_hasher=hasher)
    scheduler.add_request(request)
    scheduler.schedule()
    manager = scheduler.block_manager
    assert any(block.block_hash for block in manager.block_pool.blocks)
    manager.is_planning = preempted
    manager.free("a")
    assert any(block.block_hash for block in manager.block_pool.blocks) != preempted
