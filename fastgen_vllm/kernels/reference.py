"""Each operation in plain PyTorch: the specification that faster kernels are tested against.

Arithmetic is float32 whatever the cache's dtype. ``H`` KV heads, ``G`` query heads per KV head,
``D`` head size. Pages are ``[num_pages, block_size, 2 * D]``, K then V in each slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastgen_vllm.tensors import EMPTY, ceil_ratio

NAME = "plain PyTorch"

_TILE_SCORES = 1 << 24
"""Scores held at once by a tile of queries (64 MiB of float32)."""


def write_kv(
    key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """Put each token's K and V into its slot of every head.

    Args:
        key, value: ``[tokens, H, D]``.
        pages: written.
        slots: int64 ``[tokens, H]``, ``page * block_size + offset``.
    """
    pages.view(-1, pages.shape[-1])[slots] = torch.cat([key, value], dim=-1).to(pages.dtype)


def _gather_keys(
    pages: torch.Tensor, page_table: torch.Tensor, num_keys: int
) -> tuple[torch.Tensor, torch.Tensor]:
    content = pages[page_table].flatten(1, 2)[:, :num_keys].transpose(0, 1)
    key, value = content.chunk(2, dim=-1)
    return key, value


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
    query: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    num_keys: int,
    scale: float,
    output: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of a chunk against its whole prefix and itself.

    Args:
        query: ``[c, H, G, D]``, the last ``c`` of ``num_keys`` tokens.
        page_table: int64 ``[H, P]``, pages of the tokens in order.
        output: ``[c, H, G, D]``, written.

    Returns:
        lse float32 ``[c, H, G]``, the log-sum-exp of each query's scaled scores.
    """
    c, heads, groups, _ = query.shape
    key, value = _gather_keys(pages, page_table, num_keys)
    lse = torch.empty((c, heads, groups), dtype=torch.float32, device=query.device)
    positions = torch.arange(num_keys - c, num_keys, device=query.device)
    keys = torch.arange(num_keys, device=query.device)
    for tile in _query_tiles(c, heads * groups * num_keys):
        distance = positions[tile, None] - keys
        scores = _masked_scores(query[tile], key, distance, scale)
        tile_lse = scores.logsumexp(dim=-1)
        probs = (scores - tile_lse[..., None]).exp()
        output[tile] = torch.einsum("hgqk,khd->qhgd", probs, value.float()).to(output.dtype)
        lse[tile] = tile_lse.permute(2, 0, 1)
    return lse


def attention_mass(
    query: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    num_keys: int,
    lse: torch.Tensor,
    first_position: int,
    position_step: int,
    bounds: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
) -> None:
    """Add the attention that each key receives, split by query-key distance, to ``mass``.

    Args:
        query: ``[c, H, G, D]``, the queries at ``first_position + i * position_step``.
        page_table: int64 ``[H, P]``, pages of the ``num_keys`` tokens in order.
        lse: float32 ``[c, H, G]``.
        bounds: int64, ascending distances; bucket ``b`` holds
            ``bounds[b-1] <= q - k < bounds[b]``, the last bucket everything farther.
        mass: float32 ``[H, 1 or G, >= num_keys, len(bounds) + 1]``, updated in place; with 1 the
            group is summed.
    """
    c, heads, groups, _ = query.shape
    key, _ = _gather_keys(pages, page_table, num_keys)
    mass = mass[:, :, :num_keys]
    positions = first_position + position_step * torch.arange(c, device=query.device)
    keys = torch.arange(num_keys, device=query.device)
    for tile in _query_tiles(c, heads * groups * num_keys):
        distance = positions[tile, None] - keys
        scores = _masked_scores(query[tile], key, distance, scale)
        probs = (scores - lse[tile].permute(1, 2, 0)[..., None]).exp()
        if mass.shape[1] == 1:
            probs = probs.sum(dim=1, keepdim=True)
        below = torch.zeros_like(mass[..., 0])
        for bucket, bound in enumerate(bounds.tolist()):
            near = torch.where(distance < bound, probs, 0.0).sum(dim=-2)
            mass[..., bucket] += near - below
            below = near
        mass[..., -1] += probs.sum(dim=-2) - below


def decode_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    page_table: torch.Tensor,
    table_start: torch.Tensor,
    lengths: torch.Tensor,
    keeps_scores: torch.Tensor,
    scores: torch.Tensor,
    max_pages: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Attention of one query token per request over its heads' live slots.

    Slots whose position is -1 (evicted) are skipped. Every head has at least one live slot: its
    newest token. Heads that keep scores add each slot's probability, summed over the group.

    Args:
        query: ``[N, H, G, D]``.
        positions: int32 ``[num_pages, block_size]``.
        rows: int64 ``[N]``, each request's row of the three tables.
        page_table: int32 ``[A]``, every head's pages in slot order.
        table_start: int64 ``[R, H]``, where each head's pages begin there.
        lengths: int32 ``[R, H]``, slots in use.
        keeps_scores: bool ``[R, H]``.
        scores: float32 ``[num_pages, block_size]``, updated in place.
        max_pages: no head of the requests has more pages.
        output: ``[N, H, G, D]``, written.
    """
    n, heads = query.shape[:2]
    block_size, content = pages.shape[1:]
    length = lengths[rows].long()
    table = pages_in_order(page_table, table_start[rows], length, block_size, max_pages)
    index = table.reshape(-1)
    cache = pages[index].view(n, heads, max_pages * block_size, content).float()
    key, value = cache.chunk(2, dim=-1)
    in_use = torch.arange(max_pages * block_size, device=query.device) < length[..., None]
    live = (positions[index].view(n, heads, -1) >= 0) & in_use
    weights = torch.matmul(query.float(), key.transpose(-1, -2)) * scale
    probs = weights.masked_fill(~live[:, :, None], float("-inf")).softmax(dim=-1)
    # An evicted slot may hold anything, NaN included, and 0 * NaN is NaN.
    output.copy_(torch.matmul(probs, value.masked_fill(~live[..., None], 0.0)))
    received = probs.sum(dim=2).view(n, heads, max_pages, block_size)
    owned = keeps_scores[rows][..., None] & (table > 0)
    # A page has one owner, so no index repeats.
    scores[table[owned]] += received[owned]


def pages_in_order(
    page_table: torch.Tensor,
    table_start: torch.Tensor,
    lengths: torch.Tensor,
    block_size: int,
    max_pages: int,
) -> torch.Tensor:
    """Pages of heads whose tables begin at ``table_start`` ``[...]`` and that use ``lengths``
    ``[...]`` slots: int64 ``[..., max_pages]``, padded with page 0."""
    index = torch.arange(max_pages, device=page_table.device)
    at = (table_start[..., None] + index).clamp(max=len(page_table) - 1)
    in_use = index < -(-lengths[..., None] // block_size)
    return torch.where(in_use, page_table[at], 0).long()


def plan_decode(
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    special: torch.Tensor,
    punctuation: torch.Tensor,
    ladder: list[torch.Tensor],
    mean: bool,
    page_table: torch.Tensor,
    table_start: torch.Tensor,
    lengths: torch.Tensor,
    num_sticky: torch.Tensor,
    policy: torch.Tensor,
    free_pages: torch.Tensor,
    num_free: torch.Tensor,
    positions: torch.Tensor,
    scores: torch.Tensor,
    slots: torch.Tensor,
) -> int:
    """Give the newest token of each request a slot in every head, evicting where over budget.

    Steps 1 to 3 of docs/how-it-works.md, "Token generation", for all layers at once. The tables
    are ``HeadTables``'s and are updated in place.

    Args:
        rows: int64 ``[N]``.
        num_tokens: int64 ``[N]``, ``t``: tokens including the newest, at position ``t - 1``.
        special, punctuation: bool ``[N]``, the newest token's flags.
        ladder: ``Ladder.columns``.
        mean: divide scores by the queries that could see the token.
        page_table, table_start: with room for one more page a head.
        slots: int64 ``[N, L, H]``, written: the newest token's ``page * block_size + offset``.

    Returns:
        the index of a request that owns too few free pages, or -1.
    """
    block_size = positions.shape[1]
    ladder_special, ladder_punctuation, full, frequent, local, least_window = ladder
    choice, length = policy[rows], lengths[rows].long()
    t = num_tokens[:, None, None]
    sticky = (special[:, None, None] & ladder_special[choice]) | (
        punctuation[:, None, None] & ladder_punctuation[choice]
    )
    total_sticky = num_sticky[rows] + sticky
    window = torch.maximum(ceil_ratio(local[choice], t), least_window[choice])
    budget = total_sticky + ceil_ratio(frequent[choice], t) + window
    evicts = ~full[choice] & (length >= budget)

    start = table_start[rows]
    entry = start + length // block_size
    takes_page = ~evicts & (length % block_size == 0)
    taken = takes_page.flatten(1).sum(-1)
    height = num_free[rows].long()
    if (taken > height).any():
        return int((taken > height).nonzero()[0])
    if taken.any():
        flat = takes_page.flatten(1)
        where = (height[:, None] - flat.cumsum(-1)).clamp(min=0)
        new_pages = free_pages[rows].gather(-1, where)[flat]
        num_free[rows] = (height - taken).int()
        positions[new_pages] = EMPTY
        page_table[entry[takes_page]] = new_pages
    slots.copy_(page_table[entry].long() * block_size + length % block_size)
    if evicts.any():
        max_pages = -(-int(length.max()) // block_size)
        slots[evicts] = _victims(
            positions,
            scores,
            pages_in_order(page_table, start[evicts], length[evicts], block_size, max_pages),
            (t - window).expand_as(length)[evicts],
            (t - 1).expand_as(length)[evicts] if mean else None,
        )
    lengths[rows] = (length + ~evicts).int()
    num_sticky[rows] = total_sticky.int()
    positions.view(-1)[slots] = (t - 1).expand_as(slots).int()
    scores.view(-1)[slots] = torch.where(sticky, float("inf"), 0.0)
    return -1


def _victims(
    positions: torch.Tensor,
    scores: torch.Tensor,
    pages: torch.Tensor,
    window_start: torch.Tensor,
    queries_so_far: torch.Tensor | None,
) -> torch.Tensor:
    """Slot of the lowest score outside the window in each head ``[M, P]``; oldest on ties."""
    block_size = positions.shape[1]
    position = positions[pages].flatten(1)
    score = scores[pages].flatten(1)
    if queries_so_far is not None:
        score = score / (queries_so_far[:, None] - position).clamp(min=1)
    inf = float("inf")
    outside = (position != EMPTY) & (position < window_start[:, None])
    score = score.masked_fill(~outside, inf)
    tied = (score == score.amin(-1, keepdim=True)) & (score < inf)
    oldest = position.masked_fill(~tied, torch.iinfo(torch.int32).max).argmin(-1, keepdim=True)
    assert tied.gather(-1, oldest).all(), "a head over its budget has no token to evict"
    page = pages.gather(-1, oldest // block_size)
    return (page * block_size + oldest % block_size)[:, 0]


def pack_slots(pages: torch.Tensor, page_table: torch.Tensor, kept: torch.Tensor) -> None:
    """Move each head's kept tokens, in order, to the front of its own pages, in place.

    Args:
        pages: written.
        page_table: int64 ``[L, H, P]``.
        kept: bool ``[L, H, n]``.
    """
    block_size = pages.shape[1]
    slots = pages.view(-1, pages.shape[-1])
    for own, keeps in zip(page_table, kept, strict=True):
        head, source = keeps.nonzero(as_tuple=True)
        target = (keeps.cumsum(-1) - 1)[head, source]
        moved = source != target
        head, source, target = head[moved], source[moved], target[moved]
        src = own[head, source // block_size] * block_size + source % block_size
        dst = own[head, target // block_size] * block_size + target % block_size
        slots[dst] = slots[src]


def move_pages(pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy whole pages.

    Args:
        pages: written.
        source, target: int64 ``[k]``, page numbers; no page is in both.
    """
    pages[target] = pages[source]
