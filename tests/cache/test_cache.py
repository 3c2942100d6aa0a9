"""The page pool under random lives of requests: admit, chunk, compress, decode, squeeze, abort."""

from typing import Final

import pytest
import torch
from helpers.fake_model import FakeModel, run_step
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastgen_vllm.cache import HeadTables, PagePool, compact
from fastgen_vllm.cache.head_tables import MARGIN, Holding
from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import UNBOUNDED, HeadRules, reference
from fastgen_vllm.reads import wait_for
from fastgen_vllm.runtime.driver import Driver
from fastgen_vllm.runtime.runtime import Runtime

LAYERS, HEADS, GROUP, SIZE, BLOCKS, VOCAB = 2, 2, 2, 16, 40, 50
BLOCK: Final = 8
MODEL = FakeModel(LAYERS, HEADS, GROUP, SIZE)


class PoolLife(RuleBasedStateMachine):
    """Plays the scheduler over blocks whose every slot has known content."""

    def __init__(self) -> None:
        super().__init__()
        ids = torch.arange(VOCAB)
        classes = (ids < 3).to(torch.uint8) + 2 * (ids % 7 == 5).to(torch.uint8)
        config = FastGenConfig(
            ladder="paper",
            recovery=0.6,
            min_prompt_tokens=2,
            block_size=BLOCK,
            debug=True,
            frequent_score="mean",
        )
        kv = torch.full((BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE), float("nan"))
        self.runtime = Runtime(config, classes, kv, GROUP, max_requests=BLOCKS)
        self.driver = Driver(self.runtime)
        self.seeds: dict[str, int] = {}
        self.count = 0

    @property
    def decoding(self) -> list[str]:
        return sorted(self.runtime.tables.rows)

    @rule(num_tokens=st.sampled_from([1, 2, 7, 8, 9, 16, 17, 40]), seed=st.integers(0, 99))
    def admit(self, num_tokens: int, seed: int) -> None:
        if len(self.driver.free) < -(-num_tokens // BLOCK):
            return
        name = f"r{self.count}"
        self.count += 1
        self.seeds[name] = seed
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB, (num_tokens,), generator=generator).tolist()
        self.driver.begin(name, tokens, RequestOverride())

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """A batch of prefill chunks and decode tokens, as far as there is room for them."""
        counts: dict[str, int] = {}
        for name, request in self.driver.requests.items():
            left = len(request.tokens) - request.computed
            count = 1 if name in self.decoding else data.draw(st.integers(1, left))
            if data.draw(st.booleans()) and self.has_room(name, request.computed + count):
                counts[name] = count
        if not counts:
            return
        outputs, report = run_step(self.driver, MODEL, self.seeds, counts)
        for output in outputs.values():
            assert output.isfinite().all(), "a head read a slot that nobody wrote"
        for name in report.free_pages:
            self.driver.requests[name].tokens.append(data.draw(st.integers(0, VOCAB - 1)))

    def has_room(self, name: str, num_tokens: int) -> bool:
        try:
            self.driver.grow(name, num_tokens)
        except MemoryError:
            return False
        return True

    @precondition(lambda self: self.decoding)
    @rule(data=st.data(), out_of_place=st.booleans())
    def squeeze(self, data: st.DataObject, out_of_place: bool) -> None:
        """Compact a request that decodes to any of its slots, in its blocks or in others."""
        name = data.draw(st.sampled_from(self.decoding))
        request, tables = self.driver.requests[name], self.runtime.tables
        if len(self.driver.free) < len(tables.blocks[name]):
            out_of_place = False
        targets = self.driver.take(len(tables.blocks[name])) if out_of_place else None
        pages = tables.pages_of(name)
        positions = self.runtime.pool.positions[pages].flatten(2)
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        kept = torch.rand(positions.shape, generator=generator) < data.draw(st.floats(0, 1))
        kept = (kept | (positions == request.computed - 1)) & (positions >= 0)
        work = compact(tables, name, pages, kept, request.computed, self.runtime.kernels, targets)
        compacted = wait_for(work)
        assert compacted.kept_slots == kept.sum()
        if targets is not None:
            owned = [block for block in targets if block not in compacted.vacated]
            self.driver.free += [block for block in targets if block in compacted.vacated]
            self.driver.give_back(name, [b for b in compacted.vacated if b not in targets])
            # A list must have the place; which one a block takes does not matter.
            request.table[: len(owned)] = owned
        else:
            self.driver.give_back(name, compacted.vacated)
        request.free_pages = int(tables.state.num_free[tables.rows[name]])

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data(), again=st.booleans())
    def abort_or_preempt(self, data: st.DataObject, again: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.driver.requests)))
        tokens = self.driver.requests[name].tokens
        self.driver.end(name)
        if again:
            self.driver.begin(name, tokens, RequestOverride())

    @invariant()
    def pool_is_whole(self) -> None:
        held = [b for request in self.driver.requests.values() for b in request.table if b]
        assert sorted(held + self.driver.free) == list(range(1, BLOCKS))
        for name, blocks in self.runtime.tables.blocks.items():
            assert sorted(blocks) == sorted(b for b in self.driver.requests[name].table if b)
        self.runtime.tables.audit()

    @invariant()
    def slots_hold_their_tokens(self) -> None:
        pool, tables = self.runtime.pool, self.runtime.tables
        for name in tables.rows:
            pages = tables.pages_of(name)
            newest = self.driver.requests[name].computed - 1
            for layer in range(LAYERS):
                for head in range(HEADS):
                    own = pages[layer, head]
                    positions = pool.positions[own].flatten()
                    live = positions >= 0
                    kept = positions[live].tolist()
                    assert len(set(kept)) == len(kept) and newest in kept
                    contents = [MODEL.content(self.seeds[name], layer, p)[head] for p in kept]
                    assert torch.equal(pool.kv[own].flatten(0, 1)[live], torch.stack(contents))


TestPoolLife = PoolLife.TestCase
TestPoolLife.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_full_heads_keep_every_page() -> None:
    """At recovery 1.0 nothing is vacated and nothing moves."""
    config = FastGenConfig(recovery=1.0, block_size=BLOCK, min_prompt_tokens=1, debug=True)
    kv = torch.zeros(BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE)
    runtime = Runtime(config, torch.zeros(VOCAB, dtype=torch.uint8), kv, GROUP)
    runtime.begin_prefill("a", list(range(17)), RequestOverride())
    runtime.grant({"a": [5, 3, 9]})
    step = runtime.start_step(["a"], torch.tensor([0, 17]), torch.tensor([17]), torch.arange(17))
    for layer in range(LAYERS):
        query = torch.randn(17, HEADS * GROUP, SIZE)
        content = torch.randn(2, 17, HEADS, SIZE)
        key, value = content
        runtime.forward(step, layer, query, key, value, torch.empty_like(query), 0.4)
    before = kv.clone()
    report = runtime.finish_step(step).get()
    assert report.vacated == {"a": []} and report.free_pages == {"a": 0}
    assert torch.equal(kv, before)
    assert report.kept["a"].policy_heads == {"full": LAYERS * HEADS}


def rules_of_full_heads(pool: PagePool) -> HeadRules:
    rules = HeadRules.zeros((pool.num_layers, pool.num_kv_heads), pool.kv.device)
    rules.least_window.fill_(UNBOUNDED)
    return rules


def test_page_tables_lose_nothing_when_they_move() -> None:
    """Requests enter, shrink, grow and go: parts of the page table move, addresses do not, and no
    head's pages get lost."""
    pool = PagePool.over(torch.zeros(400, 1, 2, BLOCK, 4))
    tables, generator = HeadTables(pool, max_requests=3), torch.Generator().manual_seed(0)
    tables.state.page_table = tables.state.page_table[:700]  # so that it gets full
    address = tables.state.page_table.data_ptr()
    blocks = iter(range(1, 10**6))
    owned: dict[str, list[list[int]]] = {}
    moves = 0

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    def hold(name: str, num_blocks: int) -> list[list[int]]:
        """Heads of different lengths, one of all pages that it could have."""
        own = [next(blocks) % 399 + 1 for _ in range(num_blocks)]
        pages = pool.pages_of(torch.tensor(own))
        lengths = torch.tensor([[num_blocks * BLOCK, 1 + draw(num_blocks * BLOCK)]])
        none = pages.new_empty(0)
        longest = num_blocks * BLOCK
        sticky = torch.zeros_like(lengths)
        tables.hold(name, Holding(own, pages, lengths, sticky, longest, none))
        return [pages[0, h, : -(-int(lengths[0, h]) // BLOCK)].tolist() for h in range(2)]

    for _ in range(300):
        name = f"r{draw(3)}"
        starts = {other: tables.state.table_start[tables.rows[other]].clone() for other in owned}
        if name not in owned:
            own = [next(blocks) % 399 + 1]
            scores = torch.zeros(1, 2, 3)
            tables.enter(name, own, rules_of_full_heads(pool), scores, scores > 0)
            owned[name] = hold(name, 1 + draw(12))
        elif draw(3):
            for _ in range(draw(MARGIN * BLOCK)):
                tables.batch([name], torch.tensor([1]), torch.zeros(1, dtype=torch.uint8))
        else:
            tables.release(name)
            del owned[name]
        for other, pages_by_head in owned.items():
            found = tables.pages_of(other)[0].tolist()
            assert [[p for p in head if p] for head in found] == pages_by_head
            if other in starts:
                start = tables.state.table_start[tables.rows[other]]
                moves += not torch.equal(starts[other], start)
    assert moves > 50 and tables.state.page_table.data_ptr() == address


def test_each_head_has_room_of_its_own() -> None:
    """One full head of a long prompt beside heads that keep little: no room is taken for those."""
    blocks = 1000
    pool = PagePool.over(torch.zeros(blocks + 1, 2, 4, BLOCK, 2))
    tables = HeadTables(pool, max_requests=2)
    n = blocks * BLOCK
    own = list(range(1, blocks + 1))
    scores = torch.zeros(()).expand(2, 4, n)
    sticky = torch.zeros(2, 4, n).bool()
    pages = tables.enter("long", own, rules_of_full_heads(pool), scores, sticky)
    kept = torch.zeros(2, 4, n, dtype=torch.bool)
    kept[..., -BLOCK:] = True
    kept[0, 0] = True
    vacated = wait_for(compact(tables, "long", pages, kept, n, reference)).vacated
    assert len(vacated) == blocks - -(-(blocks + 7) // 8)
    starts = tables.state.table_start[tables.rows["long"]].flatten()
    rooms = starts[1:] - starts[:-1]
    assert rooms[0] == blocks + MARGIN and (rooms[1:] == 1 + MARGIN).all()


def test_a_request_more_than_there_are_rows() -> None:
    pool = PagePool.over(torch.zeros(9, 1, 2, BLOCK, 4))
    tables, scores = HeadTables(pool, max_requests=1), torch.zeros(1, 2, 3)
    tables.enter("a", [1], rules_of_full_heads(pool), scores, scores > 0)
    with pytest.raises(AssertionError, match="all 1 rows are taken"):
        tables.enter("b", [2], rules_of_full_heads(pool), scores, scores > 0)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_long_generation_stays_in_its_room(heads: int) -> None:
    """Heads that only grow, from a full page on, over several moves of their part of the table."""
    model = FakeModel(1, heads, 1, 32)
    num_tokens = 2 * MARGIN * BLOCK + 100
    kv = torch.zeros(num_tokens // BLOCK + 5, 1, heads, BLOCK, 64)
    config = FastGenConfig(block_size=BLOCK, compact_every=0, debug=True)
    runtime = Runtime(config, torch.zeros(VOCAB, dtype=torch.uint8), kv, 1)
    driver, starts = Driver(runtime), set()
    driver.begin("a", [1] * BLOCK, RequestOverride())
    driver.requests["a"].tokens = [1] * num_tokens
    for t in range(num_tokens - BLOCK + 1):
        run_step(driver, model, {"a": 1}, {"a": 1 if t else BLOCK})
        starts.add(int(runtime.tables.state.table_start[0, 0, -1]))
    assert len(starts) > 2, "its part of the table should have moved"
    pages = runtime.tables.pages_of("a")[0]
    for head in range(heads):
        positions = runtime.pool.positions[pages[head]].flatten()[:num_tokens]
        assert positions.tolist() == list(range(num_tokens))
