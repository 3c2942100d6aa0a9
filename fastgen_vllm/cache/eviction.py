"""The decode step: every head appends a slot or takes over its victim's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastgen_vllm.cache.head_tables import HeadTables, OutOfPagesError
from fastgen_vllm.policy.choice import Ladder

if TYPE_CHECKING:
    from fastgen_vllm.kernels import Kernels


@dataclass(frozen=True)
class DecodeStep:
    """Where one step of ``N`` requests writes.

    Attributes:
        rows: int64 ``[N]``, of the head tables.
        slots: int64 ``[N, L, H]``, the newest token's ``page * block_size + offset``.
        max_pages: no head of the batch has more pages.
        short: index of a request that owns too few free pages, or -1: an int, or int32 ``[1]``
            where the kernels run on a device and the host has not waited for them.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    max_pages: int
    short: int | torch.Tensor


def plan_decode(
    tables: HeadTables,
    ladder: Ladder,
    request_ids: Sequence[str],
    num_tokens: torch.Tensor,
    special: torch.Tensor,
    punctuation: torch.Tensor,
    frequent_score: str,
    kernels: Kernels,
) -> DecodeStep:
    """Give the newest token of each request a slot in every head, evicting where over budget.

    Args:
        num_tokens: int64 ``[N]``, ``t``: tokens including the newest, at position ``t - 1``.
        special, punctuation: bool ``[N]``, the newest token's flags.
        frequent_score: ``sum`` or ``mean``.

    Raises:
        OutOfPagesError: the scheduler granted fewer blocks than the heads need. Where the kernels
            run on a device, ``check_pages`` raises it later.
    """
    rows = tables.rows_of(request_ids)
    max_pages = tables.grow_bounds(request_ids)
    shape = (len(rows), *tables.lengths.shape[1:])
    slots = torch.empty(shape, dtype=torch.int64, device=rows.device)
    short = kernels.plan_decode(
        rows,
        num_tokens,
        special,
        punctuation,
        ladder.columns,
        frequent_score == "mean",
        tables.page_table,
        tables.table_start,
        tables.lengths,
        tables.num_sticky,
        tables.policy,
        tables.free_pages,
        tables.num_free,
        tables.pool.positions,
        tables.pool.scores,
        slots,
    )
    if isinstance(short, int):
        check_pages(request_ids, short)
    return DecodeStep(rows, slots, max_pages, short)


def check_pages(request_ids: Sequence[str], short: int) -> None:
    """Raises:
    OutOfPagesError: request ``short`` owned too few free pages.
    """
    if short >= 0:
        raise OutOfPagesError(f"{request_ids[short]} owns too few free pages to grow")
