"""Which prompt queries the profile looks at, and what each counts. Needs torch alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastgen_vllm.config import QueryWeighting

END_QUERIES = 128
"""With ``end`` weighting, the last so many queries are looked at,"""

SYSTEM = 0.2
"""and those of a system prompt count so much of what others do."""

THINNED_FROM = 128
"""With ``recent`` weighting, every 2nd query is looked at from this distance to the last one on,
every 4th from twice that distance on, and so forth: 64 queries for each doubling."""


@dataclass(frozen=True)
class QueryRun:
    """Prompt queries at ``first``, ``first + step``, ... below ``end``."""

    first: int
    end: int
    step: int

    @property
    def own(self) -> slice:
        return slice(self.first, self.end, self.step)


def queries_looked_at(weighting: QueryWeighting, window: int) -> int | None:
    """The last so many queries of a prompt; None where all of them are."""
    return {"end": END_QUERIES, "last": window}.get(weighting)


def query_runs(
    weighting: QueryWeighting, window: int, sampling: int, num_tokens: int, system: int = 0
) -> tuple[list[QueryRun], torch.Tensor]:
    """The queries that are looked at, and what each counts with those that it stands for.

    Distances count from the prompt's last query, so neither the queries nor the policies depend on
    how the prompt was chunked.

    Args:
        weighting, window: see ``policy.choice.Profiling``.
        sampling: of those queries, every s-th.
        system: tokens of the system prompt, which ``end`` weighting asks for.

    Returns:
        the runs, the last queries first, and weights float32 ``[n]``, 0 for the other queries.
    """
    bounds, steps = [0, num_tokens], [sampling]
    each = torch.ones(num_tokens, dtype=torch.float64)
    bounds[1] = min(queries_looked_at(weighting, window) or num_tokens, num_tokens)
    if weighting in ("recent", "end"):
        each = (window / torch.arange(1, num_tokens + 1).double()).clamp(max=1.0)
    if weighting == "end":
        each[num_tokens - system :] *= SYSTEM
    elif weighting == "recent":
        bounds[1] = min(THINNED_FROM, num_tokens)
        while bounds[-1] < num_tokens:
            bounds.append(min(2 * bounds[-1], num_tokens))
            steps.append(2 * steps[-1])
    up_to = torch.nn.functional.pad(each.cumsum(0), (1, 0))
    runs, weights = [], torch.zeros(num_tokens)
    for (nearest, beyond), step in zip(pairwise(bounds), steps, strict=True):
        distance = torch.arange(nearest, beyond, step)
        counts = up_to[(distance + step).clamp(max=beyond)] - up_to[distance]
        weights[num_tokens - 1 - distance] = counts.float()
        first = num_tokens - 1 - int(distance[-1])
        runs.append(QueryRun(first, num_tokens - nearest, step))
    return runs, weights
