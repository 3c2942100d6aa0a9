"""The page pool under random lives of requests: admit, chunk, compress, decode, abort, preempt."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastgen_vllm.cache.head_tables import HeadTables
from fastgen_vllm.cache.pages import PagePool
from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.policy.tokens import TokenFlags
from fastgen_vllm.runtime.runtime import Runtime

LAYERS, HEADS, GROUP, SIZE, BLOCK, BLOCKS, VOCAB = 2, 2, 2, 16, 8, 40, 50


class Model:
    """K and V that a request's token at a position would have: known, so they can be checked."""

    @staticmethod
    def content(seed: int, layer: int, position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 100_003 + layer * 10_007 + position)
        return torch.randn(HEADS, 2 * SIZE, generator=generator)


class PoolLife(RuleBasedStateMachine):
    """Plays the scheduler: a free list of blocks, a block table a request, grants on demand."""

    def __init__(self) -> None:
        super().__init__()
        flags = TokenFlags(torch.arange(VOCAB) < 3, torch.arange(VOCAB) % 7 == 5)
        config = FastGenConfig(
            ladder="paper",
            recovery=0.6,
            min_prompt_tokens=2,
            block_size=BLOCK,
            debug=True,
            frequent_score="mean",
        )
        kv = torch.full((BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE), float("nan"))
        self.runtime = Runtime(config, flags, kv, GROUP)
        self.free = list(range(1, BLOCKS))
        self.tables: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self.seeds: dict[str, int] = {}
        self.free_pages: dict[str, int] = {}
        self.count = 0

    @rule(num_tokens=st.sampled_from([1, 2, 7, 8, 9, 16, 17, 40]), seed=st.integers(0, 99))
    def admit(self, num_tokens: int, seed: int) -> None:
        if len(self.free) < -(-num_tokens // BLOCK):
            return
        request = f"r{self.count}"
        self.count += 1
        self.seeds[request] = seed
        generator = torch.Generator().manual_seed(seed)
        self.tokens[request] = torch.randint(VOCAB, (num_tokens,), generator=generator).tolist()
        self.start(request)

    def start(self, request: str) -> None:
        tokens = self.tokens[request]
        self.runtime.begin_prefill(request, tokens, RequestOverride())
        self.computed[request], self.tables[request] = 0, []

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """A batch of prefill chunks and decode tokens."""
        batch, lengths = [], []
        for request in list(self.tables):
            if data.draw(st.booleans()):
                continue
            left = len(self.tokens[request]) - self.computed[request]
            decodes = request in self.runtime.tables.rows
            length = 1 if decodes else data.draw(st.integers(1, left))
            if self.allocate(request, self.computed[request] + length):
                batch.append(request)
                lengths.append(length)
        if not batch:
            return
        seen = [self.computed[r] + n for r, n in zip(batch, lengths, strict=True)]
        start = torch.tensor([0, *lengths]).cumsum(0)
        width = max(len(self.tables[r]) for r in batch)
        table = torch.tensor([self.tables[r] + [0] * (width - len(self.tables[r])) for r in batch])
        ids = [
            token
            for r, n in zip(batch, seen, strict=True)
            for token in self.tokens[r][self.computed[r] : n]
        ]
        step = self.runtime.start_step(batch, start, torch.tensor(seen), table, torch.tensor(ids))
        for layer in range(LAYERS):
            content = torch.stack(
                [
                    Model.content(self.seeds[r], layer, p)
                    for r, n in zip(batch, seen, strict=True)
                    for p in range(self.computed[r], n)
                ]
            )
            query = torch.randn(len(content), HEADS * GROUP, SIZE)
            output = torch.full_like(query, float("nan"))
            self.runtime.forward(step, layer, query, *content.chunk(2, -1), output, 0.4)
            assert output.isfinite().all(), "a head read a slot that nobody wrote"
        report = self.runtime.finish_step(step).get()
        for request, n in zip(batch, seen, strict=True):
            self.computed[request] = n
            if request in report.free_pages:
                self.tokens[request].append(data.draw(st.integers(0, VOCAB - 1)))
                self.free_pages[request] = report.free_pages[request]
            gone = set(report.vacated.get(request, ()))
            self.free += gone
            self.tables[request] = [0 if b in gone else b for b in self.tables[request]]

    def allocate(self, request: str, num_tokens: int) -> bool:
        missing = -(-num_tokens // BLOCK) - len(self.tables[request])
        if request in self.free_pages and self.free_pages[request] >= LAYERS * HEADS:
            self.tables[request] += [0] * max(0, missing)
            return True
        if missing > len(self.free):
            return False
        blocks = [self.free.pop() for _ in range(missing)]
        self.tables[request] += blocks
        if request in self.free_pages and blocks:
            self.runtime.grant(request, blocks)
            self.free_pages[request] += LAYERS * HEADS * len(blocks)
        return True

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), again=st.booleans())
    def abort_or_preempt(self, data: st.DataObject, again: bool) -> None:
        request = data.draw(st.sampled_from(sorted(self.tables)))
        self.runtime.release(request)
        self.free += [b for b in self.tables.pop(request) if b]
        self.free_pages.pop(request, None)
        if again:
            self.start(request)

    @invariant()
    def pool_is_whole(self) -> None:
        held = [b for table in self.tables.values() for b in table if b]
        assert sorted(held + self.free) == list(range(1, BLOCKS))
        for request, blocks in self.runtime.tables.blocks.items():
            assert sorted(blocks) == sorted(b for b in self.tables[request] if b)
        self.runtime.tables.audit()

    @invariant()
    def slots_hold_their_tokens(self) -> None:
        pool, tables = self.runtime.pool, self.runtime.tables
        for request in tables.rows:
            pages = tables.pages_of(request)
            newest = self.computed[request] - 1
            for layer in range(LAYERS):
                for head in range(HEADS):
                    own = pages[layer, head]
                    positions = pool.positions[own].flatten()
                    live = positions >= 0
                    kept = positions[live].tolist()
                    assert len(set(kept)) == len(kept) and newest in kept
                    wanted = [Model.content(self.seeds[request], layer, p)[head] for p in kept]
                    assert torch.equal(pool.kv[own].flatten(0, 1)[live], torch.stack(wanted))


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
    flags = TokenFlags(torch.zeros(VOCAB).bool(), torch.zeros(VOCAB).bool())
    kv = torch.zeros(BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE)
    runtime = Runtime(config, flags, kv, GROUP)
    runtime.begin_prefill("a", list(range(17)), RequestOverride())
    table = torch.tensor([[5, 3, 9]])
    step = runtime.start_step(
        ["a"], torch.tensor([0, 17]), torch.tensor([17]), table, torch.arange(17)
    )
    for layer in range(LAYERS):
        query = torch.randn(17, HEADS * GROUP, SIZE)
        content = torch.randn(2, 17, HEADS, SIZE)
        runtime.forward(step, layer, query, *content, torch.empty_like(query), 0.4)
    before = kv.clone()
    report = runtime.finish_step(step).get()
    assert report.vacated == {"a": []} and report.free_pages == {"a": 0}
    assert torch.equal(kv, before)
    assert report.kept["a"].policy_heads == {"full": LAYERS * HEADS}


def test_page_tables_lose_nothing_when_they_move() -> None:
    """Requests come, grow and go in a page table and rows that are too small for them at first."""
    pool = PagePool.over(torch.zeros(6, 1, 2, BLOCK, 4), 1, 2)
    tables, generator = HeadTables(pool, num_rows=2), torch.Generator().manual_seed(0)
    owned: dict[str, list[list[int]]] = {}
    capacity, moves = len(tables.page_table), 0

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(400):
        request = f"r{draw(9)}"
        starts = {name: tables.table_start[tables.rows[name]].clone() for name in owned}
        if request not in owned:
            row = tables.add(request)
            lengths = torch.tensor([[1 + draw(40), 1 + draw(40)]])
            used = (-(-lengths // BLOCK))[0].tolist()
            pages = torch.randint(1, 12, (1, 2, max(used)), generator=generator)
            tables.set_pages(request, pages)
            tables.lengths[row] = lengths.int()
            tables.bounds[request], tables.blocks[request] = int(lengths.max()), []
            owned[request] = [pages[0, h, : used[h]].tolist() for h in range(2)]
        elif draw(3):
            for _ in range(draw(40)):
                tables.grow_bounds([request])
        else:
            tables.release(request)
            del owned[request]
        for name, pages_by_head in owned.items():
            found = tables.pages_of(name)[0].tolist()
            assert [[p for p in head if p] for head in found] == pages_by_head
            if name in starts:
                moves += not torch.equal(starts[name], tables.table_start[tables.rows[name]])
    assert len(tables.page_table) > capacity and len(tables.num_free) > 2 and moves > 50
