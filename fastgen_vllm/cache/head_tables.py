"""Head block tables: which pages each (request, layer, KV head) owns, as device tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgen_vllm.basics import to_device
from fastgen_vllm.cache.pages import PagePool


class OutOfPagesError(RuntimeError):
    """A head had to grow and its request owned no free page: the accounting is broken."""


MOST_FREE_BLOCKS = 3
"""Blocks' worth of unused pages that a request can own: less than two after its compaction, and one
granted before the scheduler has read of it; later, one granted on top of less than one that the
scheduler counts and less than one that late reports hold back."""

_ROW_TENSORS = (
    "page_table",
    "lengths",
    "num_sticky",
    "policy",
    "keeps_scores",
    "free_pages",
    "num_free",
)


class HeadTables:
    """State of the requests that are past their prompt, one row each.

    Attributes:
        page_table: int32 ``[R, L, H, P]``, a head's pages in slot order, padded with 0.
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

    def __init__(self, pool: PagePool, num_rows: int = 8, max_pages: int = 16) -> None:
        self.pool = pool
        layers, heads, device = pool.num_layers, pool.num_kv_heads, pool.kv.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.page_table = zeros(num_rows, layers, heads, max_pages)
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
        self.page_table[row] = 0
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
        for request_id in request_ids:
            self.bounds[request_id] += 1
        longest = max(self.bounds[request_id] for request_id in request_ids)
        max_pages = -(-longest // self.pool.block_size)
        self.ensure_pages(max_pages)
        return max_pages

    def ensure_pages(self, max_pages: int) -> None:
        """Widen the table to at least ``max_pages`` pages a head."""
        width = self.page_table.shape[-1]
        if max_pages > width:
            more = max(max_pages, 2 * width) - width
            self.page_table = torch.nn.functional.pad(self.page_table, (0, more))

    def audit(self) -> None:
        """Check that owned pages are each owned once and are exactly the owned blocks' pages.

        Raises:
            AssertionError: naming the request and what is wrong.
        """
        owner: dict[int, str] = {}
        for request_id, row in self.rows.items():
            pages = []
            used = -(-self.lengths[row] // self.pool.block_size)
            width = torch.arange(self.page_table.shape[-1], device=used.device)
            pages += self.page_table[row][width < used[..., None]].tolist()
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
            live = (self.pool.positions[self.page_table[row].long()] >= 0).sum(dim=(-1, -2))
            assert torch.equal(live.int(), self.lengths[row]), f"{request_id}: empty slots in use"

    def _double_rows(self) -> None:
        count = len(self.num_free)
        for name in _ROW_TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, torch.cat([tensor, torch.zeros_like(tensor)]))
        self._free_rows.extend(range(2 * count - 1, count - 1, -1))
