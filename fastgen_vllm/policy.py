"""Policies: which keys a hybrid keeps at the end of the prompt, and the choice among hybrids.

Notation of docs/how-it-works.md: ``n`` prompt tokens, ``L`` layers, ``H`` KV heads, ``T`` the
recovery threshold. To add a component, give it a field in ``config.Hybrid``, a row in ``Ladder``
and a line in ``kept_at_prompt_end``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fastgen_vllm.config import RATIO_UNIT, Hybrid

IntLike = TypeVar("IntLike", int, torch.Tensor)


@dataclass(frozen=True)
class Ladder:
    """A ladder of ``C`` hybrids as tensors, cheapest intended first, ``full`` last.

    Attributes:
        special, punctuation, full: bool ``[C]``.
        frequent, local: int64 ``[C]``, r_f and r_l in units of 1/10000.
    """

    hybrids: tuple[Hybrid, ...]
    special: torch.Tensor
    punctuation: torch.Tensor
    full: torch.Tensor
    frequent: torch.Tensor
    local: torch.Tensor

    @classmethod
    def from_hybrids(cls, hybrids: Sequence[Hybrid], device: torch.device | str = "cpu") -> Ladder:
        def column(name: str) -> torch.Tensor:
            return torch.tensor([getattr(h, name) for h in hybrids], device=device)

        def ratio(name: str) -> torch.Tensor:
            values = [round(getattr(h, name) * RATIO_UNIT) for h in hybrids]
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            tuple(hybrids),
            column("special"),
            column("punctuation"),
            column("full"),
            ratio("frequent"),
            ratio("local"),
        )

    @property
    def columns(self) -> list[torch.Tensor]:
        """What the decode step needs to know of every hybrid."""
        return [self.special, self.punctuation, self.full, self.frequent, self.local]

    def windows(self, num_tokens: int) -> list[int]:
        """``window_size(r_l, n)`` of each hybrid."""
        return [window_size(int(r), num_tokens) for r in self.local]


def ceil_ratio(ratio: IntLike, num_tokens: IntLike) -> IntLike:
    """``ceil(ratio / 10000 * num_tokens)`` without rounding error; also elementwise on tensors."""
    return -((-ratio * num_tokens) // RATIO_UNIT)


def window_size(ratio: int, num_tokens: int) -> int:
    """Width of ``local(r_l)``. At least 1, since a query always sees itself."""
    return max(1, ceil_ratio(ratio, num_tokens))


@dataclass(frozen=True)
class Choice:
    """The policies of one request.

    Attributes:
        policy: int64 ``[L, H]``, index into the ladder.
        recovery: float32 ``[L, H]``, the mass that the chosen policy keeps.
        kept: bool ``[L, H, n]``.
    """

    policy: torch.Tensor
    recovery: torch.Tensor
    kept: torch.Tensor


def frequent_keys(scores: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` candidates of highest score; ties go to the lower position.

    Args:
        scores: float32 ``[..., n]``.
        candidates: bool ``[n]``.
        count: how many, or all candidates where there are fewer.

    Returns:
        bool ``[..., n]``.
    """
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    count = min(count, int(candidates.sum()))
    if count == 0:
        return chosen
    ranked = scores.masked_fill(~candidates, -1.0).sort(dim=-1, descending=True, stable=True)
    return chosen.scatter_(-1, ranked.indices[..., :count], True)


def kept_at_prompt_end(
    ladder: Ladder,
    index: int,
    scores: torch.Tensor,
    special: torch.Tensor,
    punctuation: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that hybrid ``index`` keeps after the prompt.

    Args:
        scores: float32 ``[L, H, n]``, cumulative attention (sum or mean).
        special, punctuation: bool ``[n]``.

    Returns:
        ``kept`` bool ``[L, H, n]`` with the local window, and ``visible`` of the same shape
        without it: the keys that every query sees whatever its distance.
    """
    n = scores.shape[-1]
    if ladder.full[index]:
        everything = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        return everything, everything
    sticky = (special & ladder.special[index]) | (punctuation & ladder.punctuation[index])
    window = window_size(int(ladder.local[index]), n)
    in_window = torch.arange(n, device=scores.device) >= n - window
    count = ceil_ratio(int(ladder.frequent[index]), n)
    visible = frequent_keys(scores, ~(sticky | in_window), count) | sticky
    return visible | in_window, visible


def choose(
    ladder: Ladder,
    threshold: float,
    mass: torch.Tensor,
    num_queries: int,
    scores: torch.Tensor,
    special: torch.Tensor,
    punctuation: torch.Tensor,
    group_reduction: str,
) -> Choice:
    """The cheapest hybrid per head whose recovery reaches the threshold (arXiv 2310.01801, eq. 2).

    Args:
        mass: float32 ``[L, H, G, n, B + 1]``, attention mass by key and distance bucket, the
            bucket bounds being the ladder's distinct windows in ascending order.
        num_queries: how many queries the mass was gathered from.
        scores: float32 ``[L, H, n]`` for the frequent component.
        special, punctuation: bool ``[n]``.
        group_reduction: over ``G``: ``mean`` or ``min``.
    """
    layers, heads, _, n, _ = mass.shape
    windows = ladder.windows(n)
    bounds = sorted(set(windows))
    near = mass.cumsum(dim=-1)
    costs, recoveries, keeps = [], [], []
    for index, window in enumerate(windows):
        kept, visible = kept_at_prompt_end(ladder, index, scores, special, punctuation)
        if ladder.full[index]:
            recovery = torch.ones(layers, heads, device=mass.device)
        else:
            seen = torch.where(visible[:, :, None], near[..., -1], near[..., bounds.index(window)])
            per_query_head = seen.double().sum(-1) / num_queries
            reduce = torch.amin if group_reduction == "min" else torch.mean
            recovery = reduce(per_query_head, dim=-1).float()
        costs.append(torch.where(recovery >= threshold, kept.sum(-1), n + 1))
        recoveries.append(recovery)
        keeps.append(kept)
    cost = torch.stack(costs)
    # max() of a bool picks the first True: among equal costs, the earlier rung.
    policy = (cost == cost.amin(dim=0)).max(dim=0).indices
    recovery = torch.stack(recoveries).gather(0, policy[None])[0]
    where = policy[None, ..., None].expand(1, layers, heads, n)
    kept = torch.stack(keeps).gather(0, where)[0]
    return Choice(policy, recovery, kept)
