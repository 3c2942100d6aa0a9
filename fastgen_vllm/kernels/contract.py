"""What kernels are given and what they must do. Needs torch alone.

``L`` layers, ``H`` KV heads, ``G`` query heads per KV head, ``D`` head size, ``R`` rows of requests
in the head tables, ``N`` requests of a batch. ``kernels/reference.py`` says what each operation
does; every other implementation gives the same. Kernels know numbers of heads, not policies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch

from fastgen_vllm.tensors import to_device

PEAK_DISTANCE = 32
"""Scores that are peaks count queries from so many tokens after the key on: what is nearer moves
along with the queries."""

UNBOUNDED = 1 << 30
"""The least window of a head that never evicts: longer than any sequence."""


@dataclass(frozen=True)
class Pages:
    """The page pool: the engine's KV storage in head pages, and each slot's metadata.

    Page 0 is nobody's, and its slots stay empty.

    Attributes:
        kv: ``[num_pages, block_size, 2 * D]``, K then V in each slot.
        positions: int32 ``[num_pages, block_size]``, the token's position or ``EMPTY``.
        scores: float32 ``[num_pages, block_size]``, the attention that slots received, as their
            head's rules say; ``+inf`` for sticky tokens, which are never the lowest, and 0 where
            the head keeps no scores.
    """

    kv: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor

    @property
    def block_size(self) -> int:
        return self.kv.shape[1]


@dataclass(frozen=True)
class PromptKeys:
    """Keys and values of a prompt, as far as it is encoded, in one layer.

    Attributes:
        kv: pages, as in ``Pages``.
        page_table: int64 ``[H, P]``, pages of the tokens in order.
        num_keys: tokens so far.
    """

    kv: torch.Tensor
    page_table: torch.Tensor
    num_keys: int


@dataclass(frozen=True)
class PromptBatch:
    """Chunks of ``N`` prompts that one step encodes, with ``T`` tokens together, in order.

    Attributes:
        lengths: of the chunks; this and the next two on the host.
        num_keys: tokens of each prompt so far, of which the chunk's are the last.
        num_blocks: in which those lie.
        starts: int32 ``[N + 1]``, where the chunks begin, and ``T``.
        seen: int32 ``[N]``, as ``num_keys``.
        block_table: int32 ``[N, B]``, the prompts' blocks in order, padded with 0. Page ``h`` of
            block ``b``, in one layer, is ``b * pages_per_block + h``.
    """

    lengths: Sequence[int]
    num_keys: Sequence[int]
    num_blocks: Sequence[int]
    starts: torch.Tensor
    seen: torch.Tensor
    block_table: torch.Tensor
    num_heads: int
    pages_per_block: int

    @classmethod
    def of(
        cls,
        blocks: Sequence[torch.Tensor],
        lengths: Sequence[int],
        num_keys: Sequence[int],
        num_heads: int,
        pages_per_block: int,
        device: torch.device,
    ) -> PromptBatch:
        """``blocks``: int64 on the host, those of each prompt's keys."""
        n, counts = len(blocks), [*map(len, blocks)]
        width = max(counts)
        numbers = torch.tensor(
            [0, *accumulate(lengths), *num_keys], dtype=torch.int32, device="cpu"
        )
        table = torch.zeros(n, width, dtype=torch.int32, device="cpu")
        for row, own in zip(table, blocks, strict=True):
            row[: len(own)] = own
        sent = to_device(torch.cat([numbers, table.flatten()]), device)
        starts, seen, table = sent.split([n + 1, n, n * width])
        on_device = starts, seen, table.view(n, width)
        return cls(lengths, num_keys, counts, *on_device, num_heads, pages_per_block)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def page_tables(self) -> list[torch.Tensor]:
        """Of each prompt int64 ``[H, P]``, its pages in one layer."""
        head = torch.arange(self.num_heads, device=self.block_table.device)[:, None]
        each = zip(self.block_table, self.num_blocks, strict=True)
        return [row[:count].long() * self.pages_per_block + head for row, count in each]

    def chunks(self, kv: torch.Tensor) -> Iterator[tuple[slice, PromptKeys]]:
        """Each prompt's tokens of the ``T``, and its keys; ``kv`` as in ``PromptKeys``."""
        end = 0
        for table, length, n in zip(self.page_tables, self.lengths, self.num_keys, strict=True):
            start, end = end, end + length
            yield slice(start, end), PromptKeys(kv, table, n)


class Look(NamedTuple):
    """What a profile looks at of a chunk: so many queries, every ``step``-th of the batch's tokens
    from ``first`` on. They look from ``position``, ``position + step``, ... at the keys up
    to there, of ``num_keys``."""

    prompt: int
    first: int
    queries: int
    step: int
    position: int
    num_keys: int


@dataclass(frozen=True)
class Looks:
    """What profiles look at in one step, and what they find.

    Attributes:
        each: what is looked at.
        table: int64 ``[M, 8]``, the same, and where each one's weights and findings begin.
        log_weights: float32, the logarithm of what each query counts, at most 0.
        found: float32, of each ``[3, L, H, num_keys]``: the most attention that a key receives of
            one query and query head, what it receives of all, and the norm of its value, as the
            cache holds it. Written by ``attention_peaks``.
    """

    each: Sequence[Look]
    table: torch.Tensor
    log_weights: torch.Tensor
    found: Sequence[torch.Tensor]
    all_found: torch.Tensor

    @classmethod
    def of(
        cls,
        each: Sequence[Look],
        log_weights: Sequence[torch.Tensor],
        num_layers: int,
        num_heads: int,
        device: torch.device,
    ) -> Looks:
        """``log_weights``: on the host, of each one's queries."""
        sizes = [3 * num_layers * num_heads * look.num_keys for look in each]
        found = torch.empty(sum(sizes), device=device)
        shapes = [(3, num_layers, num_heads, look.num_keys) for look in each]
        parts = [part.view(s) for part, s in zip(found.split(sizes), shapes, strict=True)]
        weights_at = [0, *accumulate(look.queries for look in each)]
        found_at = [0, *accumulate(sizes)]
        rows = [[*each[i], weights_at[i], found_at[i]] for i in range(len(each))]
        table = to_device(torch.tensor(rows, device="cpu"), device)
        return cls(each, table, to_device(torch.cat(list(log_weights)), device), parts, found)

    def queries(
        self, query: torch.Tensor, lse: torch.Tensor, prompts: PromptBatch, kv: torch.Tensor
    ) -> Iterator[tuple[ProfiledQueries, PromptKeys]]:
        """One after the other, of a layer."""
        for look, weight in zip(self.each, self._weight_of_each, strict=True):
            own = slice(look.first, look.first + look.queries * look.step, look.step)
            queries = ProfiledQueries(query[own], lse[own] - weight, look.position, look.step)
            yield queries, PromptKeys(kv, prompts.page_tables[look.prompt], look.num_keys)

    @cached_property
    def _weight_of_each(self) -> list[torch.Tensor]:
        split = self.log_weights.split([look.queries for look in self.each])
        return [weight[:, None, None] for weight in split]


@dataclass(frozen=True)
class ProfiledQueries:
    """Prompt queries at ``first_position + i * position_step``, in one layer. They look at keys up
    to their position, and at none where it is negative.

    Attributes:
        query: ``[c, H, G, D]``.
        lse: float32 ``[c, H, G]``, log-sum-exp of each query's scaled scores, less the logarithm of
            what the query counts, which is at most 1.
    """

    query: torch.Tensor
    lse: torch.Tensor
    first_position: int
    position_step: int


@dataclass(frozen=True)
class HeadRules:
    """What decoding needs to know of heads instead of their policies: tensors of one shape.

    Attributes:
        sticky_kinds: uint8, a bit for each token class whose tokens the head never evicts.
        frequent, local: int32, r_f and r_l in units of 1/10000.
        least_window: int32, tokens; the local window is never narrower. At least 1, since a query
            always sees itself, and ``UNBOUNDED`` where the head keeps everything.
        keeps_scores: bool, whether the attention that slots receive enters their scores.
        averages: bool, whether scores are compared divided by the queries that saw the token.
        decay: float32; 0 where scores are the sums of that attention. Else they are peaks, which
            fade by this factor with every token: the most that a query gave, ``PEAK_DISTANCE``
            tokens later or more.
    """

    sticky_kinds: torch.Tensor
    frequent: torch.Tensor
    local: torch.Tensor
    least_window: torch.Tensor
    keeps_scores: torch.Tensor
    averages: torch.Tensor
    decay: torch.Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...], device: torch.device) -> HeadRules:
        ints, bools = [torch.int32] * 3, [torch.bool] * 2
        types = (torch.uint8, *ints, *bools, torch.float32)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for dtype in types))

    def __getitem__(self, index: Any) -> HeadRules:
        return HeadRules(*(tensor[index] for tensor in self.tensors()))

    def __setitem__(self, index: Any, rules: HeadRules) -> None:
        for ours, theirs in zip(self.tensors(), rules.tensors(), strict=True):
            ours[index] = theirs

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass
class HeadState:
    """Head block tables and what else a decode step changes, one row a request.

    Attributes:
        page_table: int32 ``[A]``, each head's pages in slot order. Each head has room for one more.
        table_start: int64 ``[R, L, H]``, where there a head's pages begin.
        lengths: int32 ``[R, L, H]``, slots in use. A head's slots are always dense.
        num_sticky: int32 ``[R, L, H]``, sticky tokens among them.
        rules: ``[R, L, H]``.
        free_pages: int32 ``[R, F]``, a stack of pages that the request owns unused.
        num_free: int32 ``[R]``, its height.
    """

    page_table: torch.Tensor
    table_start: torch.Tensor
    lengths: torch.Tensor
    num_sticky: torch.Tensor
    rules: HeadRules
    free_pages: torch.Tensor
    num_free: torch.Tensor


@dataclass(frozen=True)
class DecodeBatch:
    """One step of ``N`` requests.

    Attributes:
        rows: int64 ``[N]``, of the head tables.
        num_tokens: int64 ``[N]``, ``t``: tokens including the newest, at position ``t - 1``.
        token_classes: uint8 ``[N]``, a bit for each class that the newest token belongs to.
        slots: int64 ``[N, L, H]``, the newest token's ``page * block_size + offset``, written by
            ``plan_decode``.
        max_pages: no head of the batch has more pages.
        split_slots: of a head, what one program of a GPU attends to; 0: as the lengths suggest.
    """

    rows: torch.Tensor
    num_tokens: torch.Tensor
    token_classes: torch.Tensor
    slots: torch.Tensor
    max_pages: int
    split_slots: int = 0


class Kernels(Protocol):
    """A module of kernels. The functions are described in ``kernels/reference.py``."""

    @property
    def NAME(self) -> str: ...

    def prepare(self, kv: torch.Tensor) -> None: ...

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor
    ) -> None: ...

    def prefill_attention(
        self,
        query: torch.Tensor,
        kv: torch.Tensor,
        prompts: PromptBatch,
        scale: float,
        output: torch.Tensor,
    ) -> torch.Tensor: ...

    def attention_mass(
        self,
        queries: ProfiledQueries,
        keys: PromptKeys,
        bounds: torch.Tensor,
        scale: float,
        mass: torch.Tensor,
    ) -> None: ...

    def attention_peaks(
        self,
        query: torch.Tensor,
        lse: torch.Tensor,
        kv: torch.Tensor,
        prompts: PromptBatch,
        looks: Looks,
        layer: int,
        scale: float,
    ) -> None: ...

    def value_norms(self, keys: PromptKeys) -> torch.Tensor: ...

    def plan_decode(self, pages: Pages, heads: HeadState, batch: DecodeBatch) -> torch.Tensor: ...

    def free_pages(
        self,
        heads: HeadState,
        rows: torch.Tensor,
        num_tokens: torch.Tensor,
        block_size: int,
        steps: int,
    ) -> torch.Tensor: ...

    def decode_attention(
        self,
        query: torch.Tensor,
        pages: Pages,
        heads: HeadState,
        batch: DecodeBatch,
        layer: int,
        scale: float,
        output: torch.Tensor,
    ) -> None: ...

    def pack_slots(
        self, pages: Pages, source: torch.Tensor, kept: torch.Tensor, target: torch.Tensor
    ) -> None: ...

    def move_pages(self, pages: Pages, source: torch.Tensor, target: torch.Tensor) -> None: ...


class Selected(NamedTuple):
    """Kernels that serve a cache, and why they are not the fastest there are (empty: they are)."""

    kernels: Kernels
    reason: str
