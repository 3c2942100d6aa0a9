"""Head block tables: which pages each (request, layer, KV head) owns, as device tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastgen_vllm.cache.pages import PagePool
from fastgen_vllm.kernels.contract import UNBOUNDED, DecodeBatch, HeadRules, HeadState
from fastgen_vllm.kernels.reference import pages_in_order
from fastgen_vllm.tensors import EMPTY, layers_at_once, to_device


class OutOfPagesError(RuntimeError):
    """A head had to grow and its request owned no free page: the accounting is broken."""


MOST_FREE_BLOCKS = 5
"""Blocks' worth of unused pages that a request can own. Less than two after its compaction, and one
granted before the scheduler has read of it; later, one granted on top of less than one that the
scheduler counts and less than one that late reports hold back. A later compaction leaves it what it
owned unused, less than one more, and one is granted before the scheduler has read of it."""

MARGIN = 32
"""Entries of the page table that a head can grow by, at least, before its request's are moved."""


MOST_SHARED = 2
"""Requests together hold at most so many times the blocks that there are: those that keep their
prompt whole can share blocks of it."""


def table_entries(num_blocks: int, max_requests: int) -> int:
    """Entries per page of a block that the page table needs: heads' pages and margins, twice, so
    that at least half of it is free after its parts were put side by side."""
    held = MOST_SHARED * num_blocks
    return 2 * (held + held // 4 + max_requests * MARGIN)


@dataclass(frozen=True)
class Holding:
    """The pages that a request's heads use, and those that it owns unused.

    Attributes:
        blocks: ids of the blocks whose pages they are.
        pages: int64 ``[L, H, P]``, each head's in slot order; what follows its own is not read.
        lengths: int64 ``[L, H]``, slots in use.
        num_sticky: int64 ``[L, H]``, sticky tokens among them.
        longest: no head has more slots.
        free: int64 ``[k]``.
    """

    blocks: list[int]
    pages: torch.Tensor
    lengths: torch.Tensor
    num_sticky: torch.Tensor
    longest: int
    free: torch.Tensor


class HeadTables:
    """State of the requests that are past their prompt, one row each.

    All of it stays where it is in memory, the batch's figures too, so that a CUDA graph can be
    replayed. A request's heads lie side by side in the page table, each with room of its own;
    requests lie anywhere. The last row is nobody's, and empty: it pads a batch.

    Attributes:
        state: what kernels read and change.
        rows: of each request, its row there.
        blocks: the block ids that each request owns.
    """

    def __init__(self, pool: PagePool, max_requests: int = 8) -> None:
        self.pool, self.max_requests = pool, max_requests
        device, shape = pool.kv.device, (pool.num_layers, pool.num_kv_heads)
        heads, self._nobody = (max_requests + 1, *shape), max_requests

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        entries = table_entries(pool.num_blocks, max_requests) * pool.pages_per_block
        self.state = HeadState(
            zeros(1 + entries),
            zeros(*heads, dtype=torch.int64),
            zeros(*heads),
            zeros(*heads),
            HeadRules.zeros(heads, device),
            zeros(max_requests + 1, MOST_FREE_BLOCKS * pool.pages_per_block),
            zeros(max_requests + 1),
        )
        self._batch = DecodeBatch(
            zeros(max_requests, dtype=torch.int64) + self._nobody,
            zeros(max_requests, dtype=torch.int64),
            zeros(max_requests, dtype=torch.uint8),
            zeros(max_requests, *shape, dtype=torch.int64),
            0,
        )
        self._seated: torch.Tensor | None = None
        """The rows that are in the batch."""
        self.rows: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}
        self._free_rows = list(range(max_requests))[::-1]
        self._bounds: dict[str, int] = {}
        """No head of the request has more slots. Kept on the host, so that a decode step need not
        wait for a device to learn its shapes."""
        self._parts: dict[str, tuple[int, int, int]] = {}
        """Where each request's part of the page table begins and ends, and the bound up to
        which none of its heads leaves its room."""
        self._end = 1
        """Entry 0 is nobody's."""
        self._last_rows: tuple[list[str], torch.Tensor] | None = None

    def rows_of(self, request_ids: Sequence[str]) -> torch.Tensor:
        """int64 ``[N]``. A batch often stays the same for many steps: the last one is kept."""
        if self._last_rows is None or list(request_ids) != self._last_rows[0]:
            rows = [self.rows[request_id] for request_id in request_ids]
            on_host = torch.tensor(rows, dtype=torch.int64)
            self._last_rows = (list(request_ids), to_device(on_host, self.pool.kv.device))
        return self._last_rows[1]

    def enter(
        self,
        request_id: str,
        blocks: Sequence[int],
        rules: HeadRules,
        scores: torch.Tensor,
        sticky: torch.Tensor,
    ) -> torch.Tensor:
        """A prompt ended: each of its heads has the prompt's pages of its own, int64
        ``[L, H, P]``, which are returned. What it holds of them is for ``hold`` to say.

        Args:
            blocks: the ``ceil(n / block_size)`` blocks that it lies in, in token order.
            rules: ``[L, H]``.
            scores: float32 ``[L, H, n]``, read for heads that keep scores.
            sticky: bool ``[L, H, n]``.
        """
        assert request_id not in self.rows, f"{request_id} already has head tables"
        assert self._free_rows, f"{request_id}: all {self.max_requests} rows are taken"
        self.rows[request_id] = self._free_rows.pop()
        self._last_rows = None
        self.blocks[request_id] = list(blocks)
        block_ids = to_device(torch.tensor(blocks, dtype=torch.int64), scores.device)
        pages = self.pool.pages_of(block_ids)
        for layers in layers_at_once(scores):
            own = scores[layers] * rules.keeps_scores[layers][..., None]
            self._describe(pages[layers], own.masked_fill_(sticky[layers], float("inf")))
        self.state.rules[self.rows[request_id]] = rules
        return pages

    def hold_all(self, request_id: str, pages: torch.Tensor, num_tokens: int) -> None:
        """What ``enter`` returned. Heads that keep everything evict nothing, so nobody asks how
        much of it is sticky."""
        shape = pages.shape[:2]
        lengths = torch.full(shape, num_tokens, device=pages.device)
        blocks, none = self.blocks[request_id], pages.new_empty(0)
        sticky = torch.zeros(shape, device=pages.device)
        self.hold(request_id, Holding(blocks, pages, lengths, sticky, num_tokens, none))

    def _describe(self, pages: torch.Tensor, scores: torch.Tensor) -> None:
        """Positions and scores of the ``n`` tokens that lie in ``pages`` in order."""
        n, width = scores.shape[-1], pages.shape[-1]
        empty = (0, width * self.pool.block_size - n)
        positions = torch.arange(n, dtype=torch.int32, device=scores.device)
        positions = torch.nn.functional.pad(positions, empty, value=EMPTY)
        self.pool.positions[pages] = positions.view(width, -1).expand(*pages.shape, -1)
        slots = torch.nn.functional.pad(scores, empty)
        self.pool.scores[pages] = slots.view(*pages.shape, -1)

    def hold(self, request_id: str, holding: Holding) -> None:
        """Enter what the request holds from now on, in place of what it held."""
        state, row = self.state, self.rows[request_id]
        self.blocks[request_id] = holding.blocks
        self._bounds[request_id] = holding.longest
        state.lengths[row] = holding.lengths.int()
        state.num_sticky[row] = holding.num_sticky.int()
        state.free_pages[row, : len(holding.free)] = holding.free.int()
        state.num_free[row] = len(holding.free)
        self._lay_out(request_id, holding.pages)

    def release(self, request_id: str) -> None:
        """Forget the request. Its pages are the scheduler's again."""
        row = self.rows.pop(request_id, None)
        if row is None:
            return
        del self.blocks[request_id], self._bounds[request_id], self._parts[request_id]
        self.state.lengths[row] = 0
        self.state.num_free[row] = 0
        self._free_rows.append(row)

    def grant(self, blocks: Mapping[str, Sequence[int]]) -> None:
        """The scheduler gave requests more blocks, one at least: their pages become free pages."""
        state, count = self.state, self.pool.pages_per_block
        each = [(self.rows[r], b, i) for r, own in blocks.items() for i, b in enumerate(own)]
        # Prepared on the host, and sent at once: every operation on a device is a launch.
        on_host = torch.tensor(each, dtype=torch.int64)
        added = torch.full_like(on_host[:, :1], count)
        pages, above = on_host[:, 1:, None].mul(count).add(torch.arange(count)).unbind(1)
        sent = torch.cat([on_host[:, :1], added, above, pages], dim=1)
        sent = to_device(sent, state.page_table.device)
        rows, added, above, pages = sent.split([1, 1, count, count], dim=1)
        index = state.num_free[rows] + above
        state.free_pages.index_put_((rows, index), pages.int())
        state.num_free.index_add_(0, rows[:, 0], added[:, 0].int())
        for request_id, own in blocks.items():
            self.blocks[request_id].extend(own)

    def batch(
        self, request_ids: Sequence[str], num_tokens: torch.Tensor, token_classes: torch.Tensor
    ) -> DecodeBatch:
        """A step in which each request may get one slot more in every head. It lies where that of
        the step before lay.

        Args:
            num_tokens: int ``[N]``, with the newest.
            token_classes: uint8 ``[N]``, the newest token's.
        """
        longest = 0
        for request_id in request_ids:
            bound = self._bounds[request_id] + 1
            if bound > self._parts[request_id][2]:
                self._lay_out(request_id, self.pages_of(request_id))
            self._bounds[request_id] = bound
            longest = max(longest, bound)
        rows, n = self.rows_of(request_ids), len(request_ids)
        if rows is not self._seated:
            self._seat(rows)
        self._batch.num_tokens[:n] = num_tokens
        self._batch.token_classes[:n] = token_classes
        return self.first_of_batch(n, -(-longest // self.pool.block_size))

    def _seat(self, rows: torch.Tensor) -> None:
        """Other requests are in the batch. What follows them there is nobody's, and its K and V go
        to page 0."""
        n, self._seated = len(rows), rows
        self._batch.rows[:n] = rows
        self._batch.rows[n:] = self._nobody
        self._batch.slots[n:] = 0

    def first_of_batch(self, count: int, max_pages: int) -> DecodeBatch:
        """The batch's first ``count`` places."""
        batch = self._batch
        return DecodeBatch(
            batch.rows[:count],
            batch.num_tokens[:count],
            batch.token_classes[:count],
            batch.slots[:count],
            max_pages,
        )

    def longest_of(self, request_ids: Sequence[str]) -> int:
        """No head of them has more slots."""
        return max(self._bounds[request_id] for request_id in request_ids)

    def pages_of(self, request_id: str) -> torch.Tensor:
        """The pages that each head uses: int64 ``[L, H, P]``, padded with page 0."""
        row, block_size = self.rows[request_id], self.pool.block_size
        starts, lengths = self.state.table_start[row], self.state.lengths[row]
        width = -(-self._bounds[request_id] // block_size)
        return pages_in_order(self.state.page_table, starts, lengths, block_size, width)

    def _lay_out(self, request_id: str, pages: torch.Tensor) -> None:
        """Give each head the entries that its pages take, and a margin: ``[L, H, P]``.

        A request's heads together take no more entries than it owns pages, so that where its part
        ends is known on the host.
        """
        state, row, block_size = self.state, self.rows[request_id], self.pool.block_size
        num_blocks = len(self.blocks[request_id])
        margin = max(MARGIN, num_blocks // 4)
        self._parts.pop(request_id, None)
        first = self._room_for(self.pool.pages_per_block * (num_blocks + margin))
        end = self._end
        self._parts[request_id] = first, end, self._bounds[request_id] + margin * block_size
        used = -(-state.lengths[row] // block_size)
        ends = (used + margin).flatten().cumsum(0).view(used.shape)
        starts = first + ends - used - margin
        state.table_start[row] = starts
        index = torch.arange(pages.shape[-1], device=pages.device)
        is_used = index < used[..., None]
        # What is no head's goes to entry 0, which is nobody's: a mask would have the host wait.
        entries = torch.where(is_used, starts[..., None] + index, 0)
        state.page_table[entries] = torch.where(is_used, pages, 0).int()

    def _room_for(self, size: int) -> int:
        """The first of ``size`` entries at the end of the page table."""
        if self._end + size > len(self.state.page_table):
            self._put_side_by_side()
        first, self._end = self._end, self._end + size
        assert self._end <= len(self.state.page_table), "requests own more blocks than there are"
        return first

    def _put_side_by_side(self) -> None:
        table, end = self.state.page_table, 1
        for request_id, (first, last, bound) in sorted(self._parts.items(), key=lambda p: p[1]):
            size = last - first
            if first > end:
                table[end : end + size] = table[first:last].clone()  # it may overlap its new place
                self.state.table_start[self.rows[request_id]] += end - first
                self._parts[request_id] = end, end + size, bound
            end += size
        self._end = end

    def audit(self) -> None:
        """Check that owned pages are exactly the owned blocks' pages, and each is owned once, or by
        requests that keep their prompt whole.

        Raises:
            AssertionError: naming the request and what is wrong.
        """
        owner: dict[int, str] = {}
        for request_id in self.rows:
            pages = self._owned_pages(request_id)
            for page in pages:
                shared = (
                    page in owner and self._is_whole(owner[page]) and self._is_whole(request_id)
                )
                assert shared or page not in owner, (
                    f"page {page}: {owner[page]} and {request_id} own it"
                )
                owner[page] = request_id

    def _is_whole(self, request_id: str) -> bool:
        return bool((self.state.rules[self.rows[request_id]].least_window == UNBOUNDED).all())

    def _owned_pages(self, request_id: str) -> list[int]:
        state, row, pool = self.state, self.rows[request_id], self.pool
        own = self.pages_of(request_id)
        pages = own[own > 0].tolist() + state.free_pages[row, : int(state.num_free[row])].tolist()
        owned = torch.tensor(self.blocks[request_id], dtype=torch.int64)
        expected = pool.pages_of(owned).flatten().tolist()
        assert sorted(pages) == sorted(expected), (
            f"{request_id} uses pages that its blocks {self.blocks[request_id]} do not hold, "
            f"or holds a page twice: {set(pages) ^ set(expected)}"
        )
        live = (pool.positions[own] >= 0).sum(dim=(-1, -2))
        assert torch.equal(live.int(), state.lengths[row]), f"{request_id}: empty slots in use"
        sticky = (pool.scores[own] == float("inf")) & (pool.positions[own] >= 0)
        counted = sticky.sum(dim=(-1, -2)).int()
        # Heads that keep everything count none, and others that share their pages may score them.
        evicts = state.rules[row].least_window != UNBOUNDED
        counts = torch.where(evicts, counted, 0)
        assert torch.equal(counts, state.num_sticky[row] * evicts), f"{request_id}: sticky tokens"
        return pages


def check_pages(request_ids: Sequence[str], short: int) -> None:
    """Raises:
    OutOfPagesError: request ``short`` owned too few free pages.
    """
    if short >= 0:
        raise OutOfPagesError(f"{request_ids[short]} owns too few free pages to grow")


def row_bytes() -> int:
    """Bytes of a head in a row of the tables, without its entries of the page table."""
    rules = HeadRules.zeros((1,), torch.device("cpu")).tensors()
    figures = sum(tensor.itemsize for tensor in rules)
    return figures + 8 + 4 + 4 + 4 * MOST_FREE_BLOCKS
