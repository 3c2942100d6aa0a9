"""Each operation in plain PyTorch: the specification that faster kernels are tested against.

Arithmetic is float32 whatever the cache's dtype. Shapes and arguments: ``kernels/contract.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastgen_vllm.kernels.contract import (
    PEAK_DISTANCE,
    DecodeBatch,
    HeadRules,
    HeadState,
    Looks,
    Pages,
    ProfiledQueries,
    PromptBatch,
    PromptKeys,
)
from fastgen_vllm.tensors import EMPTY, ceil_ratio

NAME = "plain PyTorch"

_PAGES_AT_ONCE = 1024

_TILE_SCORES = 1 << 24
"""Scores held at once by a tile of queries (64 MiB of float32)."""


def prepare(kv: torch.Tensor) -> None:
    """Whatever makes the engine's KV storage fast to read, before it is first used."""


def write_kv(key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """Put each token's K and V into its slot of every head.

    Args:
        key, value: ``[tokens, H, D]``.
        kv: pages, written.
        slots: int64 ``[tokens, H]``, ``page * block_size + offset``.
    """
    kv.view(-1, kv.shape[-1])[slots] = torch.cat([key, value], dim=-1).to(kv.dtype)


def gather_keys(keys: PromptKeys) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in token order: ``[num_keys, H, D]`` each."""
    content = keys.kv[keys.page_table].flatten(1, 2)[:, : keys.num_keys].transpose(0, 1)
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
    kv: torch.Tensor,
    prompts: PromptBatch,
    scale: float,
    output: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of each chunk against its whole prefix and itself.

    Args:
        query: ``[T, H, G, D]``.
        kv: pages, from the layer's first on.
        output: ``[T, H, G, D]``, written.

    Returns:
        lse float32 ``[T, H, G]``, the log-sum-exp of each query's scaled scores.
    """
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    for own, keys in prompts.chunks(kv):
        lse[own] = _attend(query[own], keys, scale, output[own])
    return lse


def _attend(
    query: torch.Tensor, keys: PromptKeys, scale: float, output: torch.Tensor
) -> torch.Tensor:
    c, heads, groups, _ = query.shape
    key, value = gather_keys(keys)
    lse = torch.empty((c, heads, groups), dtype=torch.float32, device=query.device)
    positions = torch.arange(keys.num_keys - c, keys.num_keys, device=query.device)
    key_positions = torch.arange(keys.num_keys, device=query.device)
    for tile in _query_tiles(c, heads * groups * keys.num_keys):
        distance = positions[tile, None] - key_positions
        scores = _masked_scores(query[tile], key, distance, scale)
        tile_lse = scores.logsumexp(dim=-1)
        probs = (scores - tile_lse[..., None]).exp()
        output[tile] = torch.einsum("hgqk,khd->qhgd", probs, value.float()).to(output.dtype)
        lse[tile] = tile_lse.permute(2, 0, 1)
    return lse


def _attention_of(
    queries: ProfiledQueries, keys: PromptKeys, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tile by tile of ``q`` queries: distances to the keys ``[q, k]``, and probabilities times what
    each query counts ``[H, G, q, k]``."""
    query, lse = queries.query, queries.lse
    c, heads, groups, _ = query.shape
    key, _ = gather_keys(keys)
    steps = torch.arange(c, device=query.device)
    positions = queries.first_position + queries.position_step * steps
    key_positions = torch.arange(keys.num_keys, device=query.device)
    for tile in _query_tiles(c, heads * groups * keys.num_keys):
        distance = positions[tile, None] - key_positions
        scores = _masked_scores(query[tile], key, distance, scale)
        yield distance, (scores - lse[tile].permute(1, 2, 0)[..., None]).exp()


def value_norms(keys: PromptKeys) -> torch.Tensor:
    """The norm of each key's value, as the cache holds it: float32 ``[H, num_keys]``."""
    values = keys.kv[..., keys.kv.shape[-1] // 2 :]
    parts = keys.page_table.split(_PAGES_AT_ONCE, dim=1)
    norms = [values[part].float().norm(dim=-1).flatten(1) for part in parts]
    return torch.cat(norms, dim=1)[:, : keys.num_keys]


def attention_mass(
    queries: ProfiledQueries,
    keys: PromptKeys,
    bounds: torch.Tensor,
    scale: float,
    mass: torch.Tensor,
) -> None:
    """Add the attention that each key receives, split by query-key distance, to ``mass``.

    Args:
        bounds: int64, ascending distances; bucket ``b`` holds
            ``bounds[b-1] <= q - k < bounds[b]``, the last bucket everything farther.
        mass: float32 ``[H, 1 or G, >= num_keys, len(bounds) + 1]``, updated in place; with 1 the
            group is summed.
    """
    mass = mass[:, :, : keys.num_keys]
    for distance, probs in _attention_of(queries, keys, scale):
        received = probs.sum(dim=1, keepdim=True) if mass.shape[1] == 1 else probs
        below = torch.zeros_like(mass[..., 0])
        for bucket, bound in enumerate(bounds.tolist()):
            near = torch.where(distance < bound, received, 0.0).sum(dim=-2)
            mass[..., bucket] += near - below
            below = near
        mass[..., -1] += received.sum(dim=-2) - below


def attention_peaks(
    query: torch.Tensor,
    lse: torch.Tensor,
    kv: torch.Tensor,
    prompts: PromptBatch,
    looks: Looks,
    layer: int,
    scale: float,
) -> None:
    """What every look of a step finds in one layer.

    Args:
        query, lse: ``[T, H, G, D]``, and of ``prefill_attention``.
        kv: pages, from the layer's first on.
        looks: ``found`` is written.
    """
    each = looks.queries(query, lse, prompts, kv)
    for (queries, keys), found in zip(each, looks.found, strict=True):
        peaks, sums, norms = found[:, layer]
        peaks.zero_()
        sums.zero_()
        for _, probs in _attention_of(queries, keys, scale):
            peaks.copy_(torch.maximum(peaks, probs.amax(dim=(1, 2))))
            sums += probs.sum(dim=(1, 2))
        norms.copy_(value_norms(keys))


def decode_attention(
    query: torch.Tensor,
    pages: Pages,
    heads: HeadState,
    batch: DecodeBatch,
    layer: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Attention of one query token per request over its heads' live slots, in one layer.

    Slots whose position is ``EMPTY`` (evicted) are skipped. Every head has at least one live slot:
    its newest token. Heads that keep scores add each slot's probability, summed over the group, or
    take it where it is the highest, as their rules say.

    Args:
        query: ``[N, H, G, D]``.
        pages: their scores are updated in place.
        output: ``[N, H, G, D]``, written.
    """
    n, num_heads = query.shape[:2]
    own = (batch.rows, layer)
    length = heads.lengths[own].long()
    width, block_size = batch.max_pages, pages.block_size
    table = pages_in_order(heads.page_table, heads.table_start[own], length, block_size, width)
    index = table.reshape(-1)
    cache = pages.kv[index].view(n, num_heads, width * block_size, -1).float()
    key, value = cache.chunk(2, dim=-1)
    in_use = torch.arange(width * block_size, device=query.device) < length[..., None]
    positions = pages.positions[index].view(n, num_heads, -1)
    live = (positions >= 0) & in_use
    weights = torch.matmul(query.float(), key.transpose(-1, -2)) * scale
    probs = weights.masked_fill(~live[:, :, None], float("-inf")).softmax(dim=-1)
    # An evicted slot may hold anything, NaN included, and 0 * NaN is NaN.
    output.copy_(torch.matmul(probs, value.masked_fill(~live[..., None], 0.0)))
    received, decay = probs.sum(dim=2), heads.rules.decay[own][..., None]
    before = pages.scores[index].view(n, num_heads, -1)
    is_far = batch.num_tokens[:, None, None] - 1 - positions >= PEAK_DISTANCE
    peak = torch.maximum(before * decay, received * is_far)
    after = torch.where(decay > 0, peak, before + received).unflatten(-1, (width, block_size))
    owned = heads.rules.keeps_scores[own][..., None] & (table > 0)
    # A page has one owner, so no index repeats.
    pages.scores[table[owned]] = after[owned]


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


def windows(rules: HeadRules, num_tokens: torch.Tensor) -> torch.Tensor:
    """Width of heads' local windows when there are ``num_tokens`` tokens: int64."""
    return torch.maximum(ceil_ratio(rules.local, num_tokens), rules.least_window)


def budgets(rules: HeadRules, num_sticky: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Slots that heads may have when there are ``num_tokens`` tokens: int64."""
    return num_sticky + ceil_ratio(rules.frequent, num_tokens) + windows(rules, num_tokens)


def free_pages(
    heads: HeadState, rows: torch.Tensor, num_tokens: torch.Tensor, block_size: int, steps: int
) -> torch.Tensor:
    """Pages that requests own unused, and will still after ``steps`` more steps.

    A head takes at most one page in them, near the end of its last and where it is below its
    budget.

    Args:
        rows: int64 ``[N]``.
        num_tokens: int64 ``[N]``, tokens so far.
        steps: 1 or more, and fewer than ``block_size``.

    Returns:
        int32 ``[N]``.
    """
    lengths, rules = heads.lengths[rows], heads.rules[rows]
    num_sticky = heads.num_sticky[rows] + steps * (rules.sticky_kinds != 0)
    grows = lengths < budgets(rules, num_sticky, num_tokens[:, None, None] + steps)
    takes_page = grows & (-lengths % block_size < steps)
    return (heads.num_free[rows] - takes_page.flatten(1).sum(-1)).int()


def plan_decode(pages: Pages, heads: HeadState, batch: DecodeBatch) -> torch.Tensor:
    """Give the newest token of each request a slot in every head, evicting where over budget.

    Steps 1 to 3 of docs/how-it-works.md, "Token generation", for all layers at once. A request that
    owns too few free pages is left as it was, and its token goes to page 0.

    Args:
        pages: positions and scores are updated in place.
        heads: updated in place, but for ``table_start`` and ``rules``.
        batch: ``slots`` is written.

    Returns:
        int32 ``[1]``, where the tensors are: the index of the last such request, or -1.
    """
    rows, t = batch.rows, batch.num_tokens[:, None, None]
    rules, length = heads.rules[rows], heads.lengths[rows].long()
    sticky = (rules.sticky_kinds & batch.token_classes[:, None, None]) != 0
    num_sticky = heads.num_sticky[rows] + sticky
    evicts = length >= budgets(rules, num_sticky, t)
    takes_page = ~evicts & (length % pages.block_size == 0)
    is_short = takes_page.flatten(1).sum(-1) > heads.num_free[rows]

    batch.slots[is_short] = 0
    able = ~is_short
    slots = _place(pages, heads, rows[able], evicts[able], windows(rules, t)[able], t[able])
    batch.slots[able] = slots
    heads.num_sticky[rows[able]] = num_sticky[able].int()
    pages.positions.view(-1)[slots] = (t[able] - 1).expand_as(slots).int()
    pages.scores.view(-1)[slots] = torch.where(sticky[able], float("inf"), 0.0)
    last = torch.arange(len(rows), device=rows.device).masked_fill(able, -1)
    return last.amax(0, keepdim=True).int()


def _place(
    pages: Pages,
    heads: HeadState,
    rows: torch.Tensor,
    evicts: torch.Tensor,
    window: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    """The slots of the newest tokens: appended, or their victims'; int64 ``[N, L, H]``."""
    block_size = pages.block_size
    length, start = heads.lengths[rows].long(), heads.table_start[rows]
    entry = start + length // block_size
    takes_page = ~evicts & (length % block_size == 0)
    flat, height = takes_page.flatten(1), heads.num_free[rows].long()
    where = (height[:, None] - flat.cumsum(-1)).clamp(min=0)
    new_pages = heads.free_pages[rows].gather(-1, where)[flat]
    heads.num_free[rows] = (height - flat.sum(-1)).int()
    pages.positions[new_pages] = EMPTY
    heads.page_table[entry[takes_page]] = new_pages
    slots = heads.page_table[entry].long() * block_size + length % block_size
    if evicts.any():
        max_pages = -(-int(length.max()) // block_size)
        seen_by = torch.where(heads.rules.averages[rows], t - 1, UNSEEN)
        slots[evicts] = _victims(
            pages,
            pages_in_order(heads.page_table, start[evicts], length[evicts], block_size, max_pages),
            (t - window)[evicts],
            seen_by[evicts],
        )
    heads.lengths[rows] = (length + ~evicts).int()
    return slots


UNSEEN = -1
"""In place of a number of queries: scores are compared as they are."""


def _victims(
    pages: Pages, table: torch.Tensor, window_start: torch.Tensor, newest: torch.Tensor
) -> torch.Tensor:
    """Slot of the lowest score outside the window in each head ``[M, P]``; oldest on ties.

    ``newest``: the newest token's position where scores are averages, else ``UNSEEN``.
    """
    block_size = pages.block_size
    position = pages.positions[table].flatten(1)
    score = pages.scores[table].flatten(1)
    seen_by = torch.where(newest[:, None] == UNSEEN, 1, newest[:, None] - position)
    score = score / seen_by.clamp(min=1)
    inf = float("inf")
    outside = (position != EMPTY) & (position < window_start[:, None])
    score = score.masked_fill(~outside, inf)
    tied = (score == score.amin(-1, keepdim=True)) & (score < inf)
    oldest = position.masked_fill(~tied, torch.iinfo(torch.int32).max).argmin(-1, keepdim=True)
    assert tied.gather(-1, oldest).all(), "a head over its budget has no token to evict"
    page = table.gather(-1, oldest // block_size)
    return (page * block_size + oldest % block_size)[:, 0]


def pack_slots(
    pages: Pages, source: torch.Tensor, kept: torch.Tensor, target: torch.Tensor
) -> None:
    """Move what each head's kept slots hold (K, V, position and score), in order, to the front of
    the target pages. The slots behind them in their last page become empty.

    Args:
        pages: written.
        source: int64 ``[L, H, P]``, each head's pages.
        kept: bool ``[L, H, S]``, of the slots there.
        target: int64 ``[L, H, Q]``; ``source`` itself packs in place, other pages must be apart.
    """
    block_size = pages.block_size
    kv, positions, scores = pages.kv.flatten(0, 1), pages.positions.view(-1), pages.scores.view(-1)
    lane = torch.arange(block_size, device=kept.device)
    for from_pages, keeps, to_pages in zip(source, kept, target, strict=True):
        head, at = keeps.nonzero(as_tuple=True)
        to = (keeps.cumsum(-1) - 1)[head, at]
        src = from_pages[head, at // block_size] * block_size + at % block_size
        dst = to_pages[head, to // block_size] * block_size + to % block_size
        for values in (kv, positions, scores):
            values[dst] = values[src]
        count = keeps.sum(-1)
        last = to_pages.gather(-1, ((count - 1).clamp(min=0) // block_size)[:, None])
        behind = (lane >= (count - 1)[:, None] % block_size + 1) & (count > 0)[:, None]
        positions[(last * block_size + lane)[behind]] = EMPTY


def move_pages(pages: Pages, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy whole pages: K, V, positions and scores.

    Args:
        pages: written.
        source, target: int64 ``[k]``, page numbers; no page is in both.
    """
    for values in (pages.kv, pages.positions, pages.scores):
        values[target] = values[source]
