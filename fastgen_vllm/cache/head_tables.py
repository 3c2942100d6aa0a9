"""Head block tables: which pages each (request, layer, KV head) owns, as device tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgen_vllm.cache.pages import PagePool
from fastgen_vllm.kernels.reference import pages_in_order
from fastgen_vllm.tensors import to_device


class OutOfPagesError(RuntimeError):
    """A head had to grow and its request owned no free page: the accounting is broken."""


MOST_FREE_BLOCKS = 3
"""Blocks' worth of unused pages that a request can own: less than two after its compaction, and one
granted before the scheduler has read of it; later, one granted on top of less than one that the
scheduler counts and less than one that late reports hold back."""

ENTRIES_PER_PAGE = 4
"""Of the page table. Every head has as much room as its request's longest, and a quarter more."""

MARGIN = 8
"""Pages that a head can grow by before its request's table is moved, at least."""

_ROW_TENSORS = (
    "table_start",
    "lengths",
    "num_sticky",
    "policy",
    "keeps_scores",
    "free_pages",
    "num_free",
)


class HeadTables:
    """State of the requests that are past their prompt, one row each.

    All of it stays where it is in memory, but when there are more requests than ``num_rows`` or
    their heads differ in length beyond ``ENTRIES_PER_PAGE``.

    Attributes:
        page_table: int32 ``[A]``, each head's pages in slot order. A request's heads lie side by
            side, with as much room each; requests lie anywhere.
        table_start: int64 ``[R, L, H]``, where there a head's pages begin.
        lengths: int32 ``[R, L, H]``, slots in use. A head's slots are always dense.
        num_sticky: int32 ``[R, L, H]``, sticky tokens among them.
        policy: int64 ``[R, L, H]``, index into the ladder.
        keeps_scores: bool ``[R, L, H]``, heads with a frequent component.
        free_pages: int32 ``[R, 3 * L * H]``, a stack of pages that the request owns unused.
        num_free: int32 ``[R]``, its height.
        blocks: the block ids that each request owns.
        bounds: no head of the request has more slots. Kept on the host, so that a decode step
            need not wait for a device to learn its shapes.
    """

    def __init__(self, pool: PagePool, num_rows: int = 8) -> None:
        self.pool = pool
        layers, heads, device = pool.num_layers, pool.num_kv_heads, pool.kv.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.page_table = zeros(ENTRIES_PER_PAGE * len(pool.kv))
        self.table_start = zeros(num_rows, layers, heads, dtype=torch.int64)
        self.lengths = zeros(num_rows, layers, heads)
        self.num_sticky = zeros(num_rows, layers, heads)
        self.policy = zeros(num_rows, layers, heads, dtype=torch.int64)
        self.keeps_scores = zeros(num_rows, layers, heads, dtype=torch.bool)
        self.free_pages = zeros(num_rows, MOST_FREE_BLOCKS * pool.pages_per_block)
        self.num_free = zeros(num_rows)
        self.rows: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}
        self.bounds: dict[str, int] = {}
        self._free_rows = list(range(num_rows))[::-1]
        self._parts: dict[str, tuple[int, int]] = {}
        """Of each request: where its part of the page table begins, and a head's room there."""
        self._end = 0
        self._heads = torch.arange(layers * heads, device=device).view(layers, heads)
        self._last_rows: tuple[list[str], torch.Tensor] | None = None

    def rows_of(self, request_ids: Sequence[str]) -> torch.Tensor:
        """int64 ``[N]``. A batch often stays the same for many steps: the last one is kept."""
        if self._last_rows is None or list(request_ids) != self._last_rows[0]:
            rows = [self.rows[request_id] for request_id in request_ids]
            on_host = torch.tensor(rows, dtype=torch.int64)
            self._last_rows = (list(request_ids), to_device(on_host, self.lengths.device))
        return self._last_rows[1]

    def add(self, request_id: str) -> int:
        """Give the request a row."""
        assert request_id not in self.rows, f"{request_id} already has head tables"
        if not self._free_rows:
            self._double_rows()
        row = self._free_rows.pop()
        self.rows[request_id] = row
        self._last_rows = None
        return row

    def release(self, request_id: str) -> None:
        """Forget the request. Its pages are the scheduler's again."""
        row = self.rows.pop(request_id, None)
        if row is None:
            return
        del self.blocks[request_id], self.bounds[request_id]
        self._parts.pop(request_id, None)
        self.lengths[row] = 0
        self.num_free[row] = 0
        self._free_rows.append(row)

    def grant(self, request_id: str, blocks: Sequence[int]) -> None:
        """The scheduler gave the request more blocks: their pages become its free pages."""
        row = self.rows[request_id]
        device = self.page_table.device
        pages = self.pool.pages_of(to_device(torch.tensor(blocks), device)).flatten()
        top = self.num_free[row] + torch.arange(len(pages), device=device)
        self.free_pages[row].scatter_(0, top, pages.int())
        self.num_free[row] += len(pages)
        self.blocks[request_id].extend(blocks)

    def grow_bounds(self, request_ids: Sequence[str]) -> int:
        """Each request may get one slot more in every head; returns the most pages of a head."""
        longest = 0
        for request_id in request_ids:
            bound = self.bounds[request_id] = self.bounds[request_id] + 1
            self._make_room(request_id, -(-bound // self.pool.block_size))
            longest = max(longest, bound)
        return -(-longest // self.pool.block_size)

    def set_pages(self, request_id: str, pages: torch.Tensor) -> None:
        """Enter the pages that each head owns.

        Args:
            pages: int64 ``[L, H, P]``; what follows a head's own is not read.
        """
        self._make_room(request_id, pages.shape[-1])
        self._table_of(request_id)[:, : pages.shape[-1]] = pages.flatten(0, 1).int()

    def pages_of(self, request_id: str) -> torch.Tensor:
        """The pages that each head uses: int64 ``[L, H, P]``, padded with page 0."""
        row, (_, room) = self.rows[request_id], self._parts[request_id]
        starts, lengths = self.table_start[row], self.lengths[row]
        return pages_in_order(self.page_table, starts, lengths, self.pool.block_size, room)

    def _table_of(self, request_id: str) -> torch.Tensor:
        """``[L * H, room]``, a view."""
        start, room = self._parts[request_id]
        return self.page_table[start : start + self._heads.numel() * room].view(-1, room)

    def _make_room(self, request_id: str, num_pages: int) -> None:
        """Move the request's table where a head of it could not have ``num_pages`` pages."""
        heads, (_, room) = self._heads.numel(), self._parts.get(request_id, (0, 0))
        if num_pages <= room:
            return
        wider = num_pages + max(MARGIN, num_pages // 4)
        if self._end + heads * wider > len(self.page_table):
            self._repack(heads * wider)
        before = self._table_of(request_id) if room else None
        self._parts[request_id] = self._end, wider
        self.table_start[self.rows[request_id]] = self._heads * wider + self._end
        if before is not None:
            self._table_of(request_id)[:, :room] = before
        self._end += heads * wider

    def _repack(self, size: int) -> None:
        """Put the tables side by side. At least half of the page table is free then, and room for
        ``size`` entries."""
        heads, end = self._heads.numel(), 0
        for request_id, (start, room) in sorted(self._parts.items(), key=lambda part: part[1]):
            if start > end:
                own = self._table_of(request_id).clone()  # it may overlap its new place
                self._parts[request_id] = end, room
                self._table_of(request_id).copy_(own)
                self.table_start[self.rows[request_id]] += end - start
            end += heads * room
        self._end, capacity = end, len(self.page_table)
        while end + size > capacity or 2 * end > capacity:
            capacity *= 2
        more = capacity - len(self.page_table)
        if more:
            self.page_table = torch.nn.functional.pad(self.page_table, (0, more))

    def audit(self) -> None:
        """Check that owned pages are each owned once and are exactly the owned blocks' pages.

        Raises:
            AssertionError: naming the request and what is wrong.
        """
        owner: dict[int, str] = {}
        for request_id, row in self.rows.items():
            own = self.pages_of(request_id)
            pages = own[own > 0].tolist()
            pages += self.free_pages[row, : int(self.num_free[row])].tolist()
            owned = torch.tensor(self.blocks[request_id], dtype=torch.int64)
            expected = self.pool.pages_of(owned).flatten().tolist()
            assert sorted(pages) == sorted(expected), (
                f"{request_id} uses pages that its blocks {self.blocks[request_id]} do not hold, "
                f"or holds a page twice: {set(pages) ^ set(expected)}"
            )
            for page in pages:
                assert page not in owner, f"page {page}: {owner[page]} and {request_id} own it"
                owner[page] = request_id
            live = (self.pool.positions[own] >= 0).sum(dim=(-1, -2))
            assert torch.equal(live.int(), self.lengths[row]), f"{request_id}: empty slots in use"

    def _double_rows(self) -> None:
        count = len(self.num_free)
        for name in _ROW_TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, torch.cat([tensor, torch.zeros_like(tensor)]))
        self._free_rows.extend(range(2 * count - 1, count - 1, -1))
