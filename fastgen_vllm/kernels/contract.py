"""What kernels are given and what they must do. Needs torch alone.

``L`` layers, ``H`` KV heads, ``G`` query heads per KV head, ``D`` head size, ``R`` rows of requests
in the head tables, ``N`` requests of a batch. ``kernels/reference.py`` says what each operation
does; every other implementation gives the same. Kernels know numbers of heads, not policies.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch

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
        keys: PromptKeys,
        scale: float,
        output: torch.Tensor,
        first_lse: int = 0,
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
        queries: ProfiledQueries,
        keys: PromptKeys,
        scale: float,
        peaks: torch.Tensor,
        sums: torch.Tensor,
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
