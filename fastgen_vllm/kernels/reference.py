"""Each operation in plain PyTorch: the specification that faster kernels are tested against.

Arithmetic is float32 whatever the cache's dtype. ``H`` KV heads, ``G`` query heads per KV head,
``D`` head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_TILE_SCORES = 1 << 24
"""Scores held at once by a tile of queries (64 MiB of float32)."""


def _query_tiles(num_queries: int, scores_per_query: int) -> Iterator[slice]:
    step = max(1, _TILE_SCORES // max(1, scores_per_query))
    for start in range(0, num_queries, step):
        yield slice(start, min(start + step, num_queries))


def _masked_scores(
    query: torch.Tensor, key: torch.Tensor, distance: torch.Tensor, scale: float
) -> torch.Tensor:
    scores = torch.einsum("qhgd,khd->hgqk", query.float(), key.float()) * scale
    return scores.masked_fill(distance < 0, float("-inf"))


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a chunk against its whole prefix and itself.

    Args:
        query: ``[c, H, G, D]``, the last ``c`` of ``m`` tokens.
        key, value: ``[m, H, D]``.

    Returns:
        output float32 ``[c, H, G, D]`` and lse float32 ``[c, H, G]``.
    """
    c, heads, groups, _ = query.shape
    m = key.shape[0]
    output = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty((c, heads, groups), dtype=torch.float32, device=query.device)
    positions = torch.arange(m - c, m, device=query.device)
    keys = torch.arange(m, device=query.device)
    values = value.float()
    for tile in _query_tiles(c, heads * groups * m):
        distance = positions[tile, None] - keys
        scores = _masked_scores(query[tile], key, distance, scale)
        tile_lse = scores.logsumexp(dim=-1)
        probs = (scores - tile_lse[..., None]).exp()
        output[tile] = torch.einsum("hgqk,khd->qhgd", probs, values)
        lse[tile] = tile_lse.permute(2, 0, 1)
    return output, lse


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    first_position: int,
    position_step: int,
    bounds: list[int],
    scale: float,
    mass: torch.Tensor,
) -> None:
    """Add the attention that each key receives, split by query-key distance, to ``mass``.

    Args:
        query: ``[c, H, G, D]``, the queries at ``first_position + i * position_step``.
        key: ``[m, H, D]``.
        lse: float32 ``[c, H, G]``.
        bounds: ascending distances; bucket ``b`` holds ``bounds[b-1] <= q - k < bounds[b]``,
            the last bucket everything farther.
        mass: float32 ``[H, 1 or G, m, len(bounds) + 1]``, updated in place; with 1 the group
            is summed.
    """
    c, heads, groups, _ = query.shape
    m = key.shape[0]
    positions = first_position + position_step * torch.arange(c, device=query.device)
    keys = torch.arange(m, device=query.device)
    for tile in _query_tiles(c, heads * groups * m):
        distance = positions[tile, None] - keys
        scores = _masked_scores(query[tile], key, distance, scale)
        probs = (scores - lse[tile].permute(1, 2, 0)[..., None]).exp()
        if mass.shape[1] == 1:
            probs = probs.sum(dim=1, keepdim=True)
        below = torch.zeros_like(mass[..., 0])
        for bucket, bound in enumerate(bounds):
            near = torch.where(distance < bound, probs, 0.0).sum(dim=-2)
            mass[..., bucket] += near - below
            below = near
        mass[..., -1] += probs.sum(dim=-2) - below


def decode_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    page_table: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token per request over its heads' live slots.

    Slots whose position is -1 (evicted, or never filled) are skipped. Every head has at least
    one live slot: its newest token.

    Args:
        query: ``[N, H, G, D]``.
        pages: ``[num_pages, block_size, 2 * D]``, K then V.
        positions: int32 ``[num_pages, block_size]``.
        page_table: int ``[N, H, P]``, padded with page 0, which has no live slot.

    Returns:
        output float32 ``[N, H, G, D]`` and probabilities float32 ``[N, H, P, block_size]``
        summed over the group.
    """
    n, heads, max_pages = page_table.shape
    block_size, content = pages.shape[1:]
    index = page_table.reshape(-1).long()
    cache = pages[index].view(n, heads, max_pages * block_size, content).float()
    key, value = cache.chunk(2, dim=-1)
    live = positions[index].view(n, heads, 1, max_pages * block_size) >= 0
    scores = torch.matmul(query.float(), key.transpose(-1, -2)) * scale
    probs = scores.masked_fill(~live, float("-inf")).softmax(dim=-1)
    # An evicted slot may hold anything, NaN included, and 0 * NaN is NaN.
    output = torch.matmul(probs, value.masked_fill(~live.transpose(-1, -2), 0.0))
    return output, probs.sum(dim=2).view(n, heads, max_pages, block_size)
