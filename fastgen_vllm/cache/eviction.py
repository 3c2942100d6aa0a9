"""The decode step: every head appends a slot or takes over its victim's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fastgen_vllm.cache.head_tables import HeadTables, OutOfPagesError
from fastgen_vllm.policy import Ladder

if TYPE_CHECKING:
    from fastgen_vllm.kernels import Kernels


@dataclass(frozen=True)
class DecodeStep:
    """Where one step of ``N`` requests writes.

    Attributes:
        rows: int64 ``[N]``, of the head tables.
        slots: int64 ``[N, L, H]``, the newest token's ``page * block_size + offset``.
    """

    rows: torch.Tensor
    slots: torch.Tensor


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
        OutOfPagesError: the scheduler granted fewer blocks than the heads need.
    """
    rows = tables.rows_of(request_ids)
    longest = int(tables.lengths[rows].max())
    tables.ensure_pages(longest // tables.pool.block_size + 1)
    slots = torch.empty((len(rows), *tables.lengths.shape[1:]), dtype=torch.int64).to(rows.device)
    short = kernels.plan_decode(
        rows,
        num_tokens,
        special,
        punctuation,
        ladder.columns,
        frequent_score == "mean",
        tables.page_table,
        tables.lengths,
        tables.num_sticky,
        tables.policy,
        tables.free_pages,
        tables.num_free,
        tables.pool.positions,
        tables.pool.scores,
        slots,
    )
    if short >= 0:
        owned = int(tables.num_free[rows[short]])
        raise OutOfPagesError(f"{request_ids[short]} owns {owned} free pages, too few to grow")
    return DecodeStep(rows, slots)
