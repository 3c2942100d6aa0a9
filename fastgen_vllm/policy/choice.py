"""What a prompt's heads keep: the evaluation of a ladder's hybrids and the choice among them.

Notation of docs/how-it-works.md: ``n`` prompt tokens, ``L`` layers, ``H`` KV heads, ``G`` query
heads per KV head, ``C`` hybrids, ``T`` the recovery threshold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from fastgen_vllm.kernels.contract import UNBOUNDED, HeadRules
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.observed import Observed
from fastgen_vllm.policy.tokens import CLASS_BITS, PROTECTED
from fastgen_vllm.tensors import ceil_ratio, layers_at_once, to_device

QueryWeighting = Literal["uniform", "recent", "last", "end"]


@dataclass(frozen=True)
class Profiling:
    """How prompt queries are weighed and keys ranked.

    Attributes:
        weighting: ``uniform``; ``recent``: ``min(1, window / d)`` for the query ``d`` before the
            prompt's end (1 for the last), with every 2nd, 4th, ... of the far ones standing for
            the others; ``last``: the last ``window`` queries only; ``end``: as ``recent``, but
            the last 128 only, and those of a system prompt count a fifth of that.
        window: queries.
        pooling: a key's rank is the best score among this many keys around it.
        least_window: tokens; a head that is not full keeps at least the last so many, generated
            ones included.
        num_sinks: the prompt's first tokens that count as special: attention sinks, which hold
            the softmax together whatever they are.
        value_weighting: weigh attention on a key by the norm of its value, that is by what it
            adds to the output; sinks get much attention and add next to nothing.
        peaks: gather the most attention that a key receives of one query at least
            ``least_window`` tokens later, not the sum over queries by distance. What is nearer
            moves along with the queries.
        decode_window: tokens; while decoding, a head that is not full keeps at least the last so
            many.
    """

    weighting: QueryWeighting
    window: int
    pooling: int
    least_window: int
    num_sinks: int
    value_weighting: bool
    peaks: bool = False
    decode_window: int = 1


@dataclass(frozen=True)
class Goal:
    """What a prompt is compressed to: whatever reaches the recovery ``threshold``, or ``budget``, a
    share of the full cache's memory. The other one is None.

    ``least_tokens``: a budget leaves a prompt the memory of at least so many tokens.
    ``least_recovery``: and as much as it needs to recover this share of the attention, on average
    over its heads.
    """

    threshold: float | None
    budget: float | None
    least_tokens: int = 1
    least_recovery: float = 0.0

    def share_of(self, num_tokens: int) -> float:
        """The share that a budget gives a prompt of so many tokens."""
        assert self.budget is not None, "such a method has a budget"
        return min(1.0, max(self.budget, self.least_tokens / num_tokens))

    def with_protected(self, share: float) -> Goal:
        """A budget is of what is not protected of a prompt, which is kept beside it."""
        if self.budget is None:
            return self
        return replace(self, budget=share + self.budget * (1 - share))

    @property
    def keeps_everything(self) -> bool:
        return 1.0 in (self.threshold, self.budget)


@dataclass(frozen=True)
class PromptStats:
    """What profiling learned of one prompt.

    Attributes:
        mass: float32 ``[L, H, G, n, B + 1]``, the attention that each key receives of the queries,
            which count as ``Profiling`` says, by distance bucket. The buckets are bounded by
            ``Ladder.windows``; there is one where peaks are gathered. ``G`` is 1 where the group's
            mean is all that is asked.
        value_norms: float32 ``[L, H, n]``, what attention on a key counts.
        scores: float32 ``[L, H, n]``, the order among keys for the frequent component.
        sums: float32 ``[L, H, n]``, where the sums of the decode steps go on from.
        token_classes: uint8 ``[n]``, sinks among the special tokens.
        page_size: slots per page, the unit of memory.
        observed: for methods that need the model, where it was gathered.
        on_host: ``token_classes`` there, where they are known.
    """

    mass: torch.Tensor
    value_norms: torch.Tensor
    scores: torch.Tensor
    sums: torch.Tensor
    token_classes: torch.Tensor
    page_size: int
    profiling: Profiling
    observed: Observed | None = None
    on_host: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.scores.shape[-1]

    @property
    def classes_on_host(self) -> torch.Tensor:
        """Waits for the device where they are not known."""
        return self.token_classes.cpu() if self.on_host is None else self.on_host

    @property
    def seen(self) -> Observed:
        """``observed``, for a method that is never run without it."""
        assert self.observed is not None, "such a method runs in `fastgen eval` only"
        return self.observed

    @cached_property
    def order(self) -> torch.Tensor:
        """int32 ``[L, H, n]``: keys by falling score; ties go to the lower position."""
        order = torch.empty_like(self.scores, dtype=torch.int32)
        for layers in layers_at_once(order):
            order[layers] = self.scores[layers].sort(dim=-1, descending=True, stable=True).indices
        return order

    def shares(self, layers: slice) -> torch.Tensor:
        """Weighted mass of some layers; a query head's sums to 1, or is nothing."""
        mass = self.mass[layers] * self.value_norms[layers][:, :, None, :, None]
        total = mass.sum((-1, -2), keepdim=True)
        return mass.div_(total.clamp(min=torch.finfo(total.dtype).tiny))

    def with_sinks_alone(self) -> PromptStats:
        """The same, with no sticky tokens but the sinks and protected ones."""
        num_sinks, on_host = self.profiling.num_sinks, self.on_host
        if on_host is not None:
            on_host = with_sinks(on_host & PROTECTED, num_sinks)
        rest = with_sinks(self.token_classes & PROTECTED, num_sinks)
        return replace(self, token_classes=rest, on_host=on_host)


def with_sinks(token_classes: torch.Tensor, num_sinks: int) -> torch.Tensor:
    """uint8 ``[n]``, the first tokens among the special ones."""
    is_sink = torch.arange(len(token_classes), device=token_classes.device) < num_sinks
    return token_classes | is_sink.to(torch.uint8) * CLASS_BITS["special"]


@dataclass(frozen=True)
class Choice:
    """What the heads of one request keep.

    Attributes:
        rules: ``[L, H]``, how they go on while decoding.
        kept: bool ``[L, H, n]``.
        sticky: bool ``[L, H, n]``, those of them that are never evicted.
        scores: float32 ``[L, H, n]``, where heads that keep scores go on from.
        recovery: float32 ``[L, H]``, the mass that is kept, as far as the method knows it.
        is_everything: heads are full, whatever the prompt.
    """

    rules: HeadRules
    kept: torch.Tensor
    sticky: torch.Tensor
    scores: torch.Tensor
    recovery: torch.Tensor
    is_everything: bool = False

    @classmethod
    def everything(
        cls, shape: tuple[int, int, int], device: torch.device, sticky: torch.Tensor | None = None
    ) -> Choice:
        """Full heads: ``shape`` is ``(L, H, n)``. ``sticky``: bool ``[n]``, what would stay if they
        were not."""
        rules = HeadRules.zeros(shape[:2], device)
        rules.least_window.fill_(UNBOUNDED)
        kept = torch.ones((), dtype=torch.bool, device=device).expand(shape)
        stays = ~kept if sticky is None else sticky.expand(shape)
        scores = torch.zeros((), device=device).expand(shape)
        recovery = torch.ones(shape[:2], device=device)
        return cls(rules, kept, stays, scores, recovery, is_everything=True)

    def whole(self) -> Choice:
        """All of the prompt, and what is known of its keys for when some must go."""
        layers, heads, n = self.kept.shape
        everything = Choice.everything((layers, heads, n), self.kept.device)
        return replace(everything, sticky=self.sticky, scores=self.scores)


@dataclass(frozen=True)
class SlotStats:
    """What a request's slots tell while it decodes: ``S`` of each head, those in use first.

    Attributes:
        lengths: int64 ``[L, H]``, slots in use.
        positions: int32 ``[L, H, S]``.
        scores: float32 ``[L, H, S]``; ``+inf`` for sticky tokens.
        num_tokens: of the sequence so far.
        page_size: slots per page.
    """

    lengths: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor
    num_tokens: int
    page_size: int

    @property
    def in_use(self) -> torch.Tensor:
        """bool ``[L, H, S]``."""
        index = torch.arange(self.positions.shape[-1], device=self.positions.device)
        return index < self.lengths[..., None]


@dataclass(frozen=True)
class Evaluation:
    """Every hybrid on one prompt.

    Attributes:
        pages: int64 ``[C]`` on the CPU, memory of one head at the end of the prompt.
        recovery: float32 ``[C, L, H]``, exactly 1 for ``full``.
    """

    pages: torch.Tensor
    recovery: torch.Tensor


@dataclass(frozen=True)
class _Rungs:
    """Hybrids that keep the same tokens but for their frequent ones.

    Attributes:
        where: int64, positions of sticky tokens.
        always: bool ``[n]``, keys that they keep at the end of the prompt.
        counts: of each, by its index in the ladder: the frequent tokens that it keeps.
        num_always: keys in ``always``.
    """

    where: torch.Tensor
    always: torch.Tensor
    counts: dict[int, int]
    num_always: int


def evaluate(ladder: Ladder, stats: PromptStats) -> Evaluation:
    """Memory and recovery of every hybrid for every head, from column sums alone.

    Keys are ranked once. For each window and each set of sticky tokens, a running sum over the
    ranked keys that neither keeps then gives the recovery for every r_f.
    """
    kept = torch.full((len(ladder.hybrids),), stats.num_tokens)
    rungs = _rungs_by_window(ladder, stats)
    for group in (group for groups in rungs.values() for group in groups):
        for i, count in group.counts.items():
            kept[i] = group.num_always + count
    recovery = torch.ones(len(ladder.hybrids), *stats.mass.shape[:3], device=stats.mass.device)
    for layers in layers_at_once(stats.mass[..., 0]):
        for i, found in _recoveries(rungs, stats, layers):
            recovery[i, layers] = found
    # The paper's ladder asks for the group's mean, which is then all there is in G; else its worst.
    return Evaluation(-(-kept // stats.page_size), recovery.amin(-1))


def _rungs_by_window(ladder: Ladder, stats: PromptStats) -> dict[int, list[_Rungs]]:
    n = stats.num_tokens
    position = torch.arange(n, device=stats.token_classes.device)
    members: dict[tuple[int, int], list[int]] = {}
    for i, (hybrid, window) in enumerate(zip(ladder.hybrids, ladder.widths(n), strict=True)):
        if not hybrid.full:
            members.setdefault((window, hybrid.sticky_kinds | PROTECTED), []).append(i)
    places: dict[int, tuple[torch.Tensor, list[int]]] = {}
    for _, kinds in members:
        if kinds not in places:
            where = (stats.token_classes & kinds).nonzero()[:, 0]
            places[kinds] = where, where.tolist()
    found: dict[int, list[_Rungs]] = {}
    for (window, kinds), indices in sorted(members.items()):
        where, on_host = places[kinds]
        always = ((stats.token_classes & kinds) != 0) | (position >= n - window)
        num_always = window + bisect_left(on_host, n - window)
        counts = {i: min(ladder.hybrids[i].count("frequent", n), n - num_always) for i in indices}
        found.setdefault(window, []).append(_Rungs(where, always, counts, num_always))
    return found


def _recoveries(
    rungs: dict[int, list[_Rungs]], stats: PromptStats, layers: slice
) -> Iterator[tuple[int, torch.Tensor]]:
    """The recoveries of each hybrid, by its index: float32 ``[layers, H, G]``."""
    mass, order = stats.shares(layers), stats.order[layers, :, None].long()
    near, total = torch.zeros_like(mass[..., 0]), mass.sum(-1)
    for bucket, groups in enumerate(rungs[window] for window in sorted(rungs)):
        near = near + mass[..., bucket]
        far = total - near
        ranked_far = far.gather(-1, order.expand_as(far))
        for group in groups:
            base = near.sum(-1) + far[..., group.where].sum(-1)
            candidate = ~group.always[order]
            gain = (ranked_far * candidate).cumsum(-1)
            rank = candidate.cumsum(-1, dtype=torch.int32)
            for i, count in group.counts.items():
                yield i, base + _gain_of(gain, rank, count) if count else base


def _gain_of(gain: torch.Tensor, rank: torch.Tensor, count: int) -> torch.Tensor:
    last = torch.searchsorted(rank, rank.new_full((*rank.shape[:-1], 1), count))
    return gain.gather(-1, last.expand(*gain.shape[:-1], 1))[..., 0]


def kept_keys(ladder: Ladder, stats: PromptStats, policy: torch.Tensor) -> Choice:
    """What each head's policy keeps after the prompt; ``recovery`` is left at 1.

    Args:
        policy: int64 ``[L, H]``, index into the ladder.
    """
    n, device, rules = stats.num_tokens, policy.device, ladder.rules[policy]
    widths = to_device(torch.tensor(ladder.widths(n)), device)[policy]
    full = ladder.is_full[policy]
    counts = ceil_ratio(rules.frequent.long(), torch.tensor(n))  # 32 bits would overflow
    position = torch.arange(n, device=device)
    kept = torch.empty_like(stats.scores, dtype=torch.bool)
    sticky = torch.empty_like(kept)
    for layers in layers_at_once(kept):
        order = stats.order[layers].long()
        sticky[layers] = (rules.sticky_kinds[layers][..., None] & stats.token_classes) != 0
        always = sticky[layers] | (position >= n - widths[layers][..., None])
        candidate = ~always.gather(-1, order)
        ranks = candidate.cumsum(-1, dtype=torch.int32)
        chosen = ~candidate | (ranks <= counts[layers][..., None])
        kept[layers] = always.scatter(-1, order, chosen) | full[layers][..., None]
    return Choice(rules, kept, sticky, stats.sums, torch.ones(policy.shape, device=device))


def reach_threshold(ladder: Ladder, stats: PromptStats, threshold: float) -> Choice:
    """The cheapest hybrid per head whose recovery reaches the threshold (arXiv 2310.01801, eq. 2).

    Memory is counted in pages, so a choice that saves none is not made: among hybrids of equal
    memory the one of highest recovery is taken, the earlier on ties.
    """
    found = evaluate(ladder, stats)
    pages = to_device(found.pages, found.recovery.device)[:, None, None]
    able = (found.recovery >= threshold) | ladder.is_full[:, None, None]
    cost = torch.where(able, pages, pages.max() + 1)
    return _take(ladder, stats, found, torch.where(cost == cost.amin(0), found.recovery, -1.0))


def pages_within(share: float, num_pages: int) -> int:
    """Whole pages of a share: 0.29 of 100 are 29, though the product of floats is a little less."""
    return int(share * num_pages + 1e-6)


def share_budget(ladder: Ladder, stats: PromptStats, budget: float) -> Choice:
    """The hybrids of highest total recovery whose memory is at most ``budget`` of the full cache's,
    or the cheapest of every head where even those need more.

    Where the sticky tokens alone would take more than the budget, they compete like others, so that
    no prompt can undo it.
    """
    found = evaluate(ladder, stats)
    if int(found.pages.min()) > pages_within(budget, int(found.pages.max())):
        bare = stats.with_sinks_alone()
        less = evaluate(ladder, bare)
        if int(less.pages.min()) < int(found.pages.min()):
            stats, found = bare, less
    taken = _share(ladder, found, budget)
    value = torch.zeros(found.recovery.shape).flatten(1).scatter(0, taken[None], 1.0)
    value = value.to(found.recovery.device).view_as(found.recovery)
    return _take(ladder, stats, found, value)


def _share(ladder: Ladder, found: Evaluation, budget: float) -> torch.Tensor:
    """Index of each head's hybrid: int64 ``[L * H]`` on the CPU.

    Lagrangian relaxation: at a price per page each head takes the hybrid of highest recovery less
    its memory's price, and bisection finds the lowest price at which the sum fits. What is left
    over goes, step by step, to the head that gains most recovery per page. These figures are few
    and looked at often, so they come to the CPU.
    """
    recovery = found.recovery.clamp(max=1.0).flatten(1).double().cpu()
    full = torch.tensor([hybrid.full for hybrid in ladder.hybrids])
    recovery[(found.pages == found.pages.max()) & ~full] = 0.0  # full needs no more
    pages = found.pages[:, None].expand(recovery.shape)
    room = pages_within(budget, int(pages.max()) * pages.shape[1])
    low, high = 0.0, 1.0
    for _ in range(40):
        price = (low + high) / 2
        taken = (recovery - price * pages).argmax(0, keepdim=True)
        low, high = (low, price) if int(pages.gather(0, taken).sum()) <= room else (price, high)
    taken = (recovery - high * pages).argmax(0, keepdim=True)
    while True:
        more = pages - pages.gather(0, taken)
        gain = recovery - recovery.gather(0, taken)
        fits = (more > 0) & (more <= room - int(pages.gather(0, taken).sum()))
        worth = torch.where(fits & (gain > 0), gain / more.clamp(min=1), 0.0)
        if not worth.any():
            return taken[0]
        best = int(worth.argmax())
        taken[0, best % worth.shape[1]] = best // worth.shape[1]


def _take(ladder: Ladder, stats: PromptStats, found: Evaluation, value: torch.Tensor) -> Choice:
    # Full saves no page against itself, so it wins over whatever needs as many. max() of a bool
    # picks the first True: among equals, the earlier rung.
    value = torch.where(ladder.is_full[:, None, None] & (value > 0), 2.0, value)
    policy = (value == value.amax(0)).max(0).indices
    recovery = found.recovery.gather(0, policy[None])[0]
    return replace(kept_keys(ladder, stats, policy), recovery=recovery)
