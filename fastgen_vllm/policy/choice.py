"""Policies: which keys a hybrid keeps at the end of the prompt, and the choice among hybrids.

Notation of docs/how-it-works.md: ``n`` prompt tokens, ``L`` layers, ``H`` KV heads, ``G`` query
heads per KV head, ``C`` hybrids, ``T`` the recovery threshold. To add a component, give it a field
in ``config.Hybrid``, a column in ``Ladder``, and its keys in ``evaluate`` and ``kept_keys``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fastgen_vllm.policy.hybrids import Hybrid
from fastgen_vllm.tensors import RATIO_UNIT, ceil_ratio, layers_at_once, to_device


@dataclass(frozen=True)
class Ladder:
    """A ladder of ``C`` hybrids as tensors, ``full`` last.

    Attributes:
        special, punctuation, full: bool ``[C]``.
        frequent, local: int64 ``[C]``, r_f and r_l in units of 1/10000.
        least_window: int64 ``[C]``, tokens: the local window is never narrower. At least 1, since
            a query always sees itself.
        least_windows: the same on the host.
    """

    hybrids: tuple[Hybrid, ...]
    least_windows: tuple[int, ...]
    special: torch.Tensor
    punctuation: torch.Tensor
    full: torch.Tensor
    frequent: torch.Tensor
    local: torch.Tensor
    least_window: torch.Tensor

    @classmethod
    def from_hybrids(
        cls, hybrids: Sequence[Hybrid], least_window: int, device: torch.device | str = "cpu"
    ) -> Ladder:
        def column(name: str) -> torch.Tensor:
            return torch.tensor([getattr(h, name) for h in hybrids], device=device)

        def ratio(name: str) -> torch.Tensor:
            values = [round(getattr(h, name) * RATIO_UNIT) for h in hybrids]
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            tuple(hybrids),
            (least_window,) * len(hybrids),
            column("special"),
            column("punctuation"),
            column("full"),
            ratio("frequent"),
            ratio("local"),
            torch.full((len(hybrids),), least_window, device=device),
        )

    @classmethod
    def joined(cls, ladders: Sequence[Ladder]) -> Ladder:
        """One after the other, for requests of several ladders in one batch."""
        columns = zip(*(ladder.columns for ladder in ladders), strict=True)
        hybrids = tuple(hybrid for ladder in ladders for hybrid in ladder.hybrids)
        least_windows = tuple(least for ladder in ladders for least in ladder.least_windows)
        return cls(hybrids, least_windows, *(torch.cat(column) for column in columns))

    @property
    def columns(self) -> list[torch.Tensor]:
        """What the decode step needs to know of every hybrid."""
        sticky = [self.special, self.punctuation]
        return [*sticky, self.full, self.frequent, self.local, self.least_window]

    def widths(self, num_tokens: int) -> list[int]:
        """The width of every hybrid's local window in a prompt of ``num_tokens``."""
        return [
            min(max(h.count("local", num_tokens), least), num_tokens)
            for h, least in zip(self.hybrids, self.least_windows, strict=True)
        ]

    def windows(self, num_tokens: int) -> list[int]:
        """Distinct widths of the local windows of hybrids that are not full, ascending."""
        widths = zip(self.hybrids, self.widths(num_tokens), strict=True)
        return sorted({width for h, width in widths if not h.full}) or [num_tokens]

    def sticky(
        self, policy: torch.Tensor, special: torch.Tensor, punctuation: torch.Tensor
    ) -> torch.Tensor:
        """Special and punctuation tokens that each head's policy keeps for good.

        Args:
            policy: int64 ``[...]``, index into the ladder.
            special, punctuation: bool ``[n]``.

        Returns:
            bool ``[..., n]``.
        """
        return (self.special[policy][..., None] & special) | (
            self.punctuation[policy][..., None] & punctuation
        )


@dataclass(frozen=True)
class PromptStats:
    """What profiling learned of one prompt.

    Attributes:
        mass: float32 ``[L, H, G, n, B + 1]``, the attention that each key receives of the queries,
            which count as ``config.Profiling`` says, by distance bucket. The buckets are bounded
            by ``Ladder.windows``. ``G`` is 1 where the group's mean is all that is asked.
        value_norms: float32 ``[L, H, n]``, what attention on a key counts.
        scores: float32 ``[L, H, n]``, the order among keys for the frequent component.
        special, punctuation: bool ``[n]``.
        page_size: slots per page, the unit of memory.
    """

    mass: torch.Tensor
    value_norms: torch.Tensor
    scores: torch.Tensor
    special: torch.Tensor
    punctuation: torch.Tensor
    page_size: int

    @cached_property
    def order(self) -> torch.Tensor:
        """int32 ``[L, H, n]``: keys by falling score; ties go to the lower position."""
        order = torch.empty_like(self.scores, dtype=torch.int32)
        for layers in layers_at_once(order):
            order[layers] = self.scores[layers].sort(dim=-1, descending=True, stable=True).indices
        return order

    def shares(self, layers: slice) -> torch.Tensor:
        """Weighted mass of some layers; a query head's sums to 1."""
        mass = self.mass[layers] * self.value_norms[layers][:, :, None, :, None]
        return mass.div_(mass.sum((-1, -2), keepdim=True))


@dataclass(frozen=True)
class Choice:
    """The policies of one request.

    Attributes:
        policy: int64 ``[L, H]``, index into the ladder.
        recovery: float32 ``[L, H]``, the mass that the chosen policy keeps.
        kept: bool ``[L, H, n]``.
        sticky: bool ``[L, H, n]``, those of them that are never evicted.
    """

    policy: torch.Tensor
    recovery: torch.Tensor
    kept: torch.Tensor
    sticky: torch.Tensor


@dataclass(frozen=True)
class Evaluation:
    """Every hybrid on one prompt.

    Attributes:
        pages: int64 ``[C]`` on the CPU, memory of one head at the end of the prompt.
        recovery: float32 ``[C, L, H]``, exactly 1 for ``full``.
    """

    pages: torch.Tensor
    recovery: torch.Tensor


def evaluate(ladder: Ladder, stats: PromptStats) -> Evaluation:
    """Memory and recovery of every hybrid for every head, from column sums alone.

    Keys are ranked once. For each window and each set of sticky tokens, a running sum over the
    ranked keys that neither keeps then gives the recovery for every r_f.
    """
    n, device = stats.mass.shape[3], stats.mass.device
    positions = torch.arange(n, device=device)
    members: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
    for i, (hybrid, window) in enumerate(zip(ladder.hybrids, ladder.widths(n), strict=True)):
        if not hybrid.full:
            members[window, hybrid.special, hybrid.punctuation].append(i)
    sticky_at = {}
    for _, special, punctuation in members:
        if (special, punctuation) not in sticky_at:
            sticky = stats.special & special | stats.punctuation & punctuation
            where = sticky.nonzero()[:, 0]
            sticky_at[special, punctuation] = sticky, where, where.tolist()
    kept = torch.full((len(ladder.hybrids),), n)
    recovery = torch.ones(len(ladder.hybrids), *stats.mass.shape[:3], device=device)
    for layers in layers_at_once(stats.mass[..., 0]):
        mass, order = stats.shares(layers), stats.order[layers, :, None].long()
        near, total = torch.zeros_like(mass[..., 0]), mass.sum(-1)
        for bucket, window in enumerate(ladder.windows(n)):
            near = near + mass[..., bucket]
            far = total - near
            ranked_far = far.gather(-1, order.expand_as(far))
            for special, punctuation in sticky_at:
                group = members.get((window, special, punctuation))
                if group is None:
                    continue
                sticky, where, on_host = sticky_at[special, punctuation]
                always = sticky | (positions >= n - window)
                num_always = window + bisect_left(on_host, n - window)
                base = near.sum(-1) + far[..., where].sum(-1)
                candidate = ~always[order]
                gain = (ranked_far * candidate).cumsum(-1)
                rank = candidate.cumsum(-1, dtype=torch.int32)
                for i in group:
                    count = min(ladder.hybrids[i].count("frequent", n), n - num_always)
                    kept[i] = num_always + count
                    recovery[i, layers] = base
                    if count:
                        last = torch.searchsorted(rank, rank.new_full((*rank.shape[:-1], 1), count))
                        last = last.expand(*gain.shape[:-1], 1)
                        recovery[i, layers] += gain.gather(-1, last)[..., 0]
    # The paper's ladder asks for the group's mean, which is then all there is in G; else its worst.
    return Evaluation(-(-kept // stats.page_size), recovery.amin(-1))


def kept_keys(ladder: Ladder, stats: PromptStats, policy: torch.Tensor) -> Choice:
    """The keys that each head's policy keeps after the prompt; ``recovery`` is left at 1.

    Args:
        policy: int64 ``[L, H]``.
    """
    n, device = stats.scores.shape[-1], policy.device
    widths = to_device(torch.tensor(ladder.widths(n)), device)
    positions = torch.arange(n, device=device)
    kept = torch.empty_like(stats.scores, dtype=torch.bool)
    sticky = torch.empty_like(kept)
    for layers in layers_at_once(kept):
        own, order = policy[layers], stats.order[layers].long()
        sticky[layers] = ladder.sticky(own, stats.special, stats.punctuation)
        always = sticky[layers] | (positions >= n - widths[own][..., None])
        count = ceil_ratio(ladder.frequent[own], torch.tensor(n))
        candidate = ~always.gather(-1, order)
        chosen = ~candidate | (candidate.cumsum(-1, dtype=torch.int32) <= count[..., None])
        kept[layers] = always.scatter(-1, order, chosen) | ladder.full[own][..., None]
    return Choice(policy, torch.ones(policy.shape), kept, sticky)


def choose(ladder: Ladder, stats: PromptStats, threshold: float) -> Choice:
    """The cheapest hybrid per head whose recovery reaches the threshold (arXiv 2310.01801, eq. 2).

    Memory is counted in pages, so a choice that saves none is not made: among hybrids of equal
    memory the one of highest recovery is taken, the earlier on ties.
    """
    found = evaluate(ladder, stats)
    pages = to_device(found.pages, found.recovery.device)[:, None, None]
    able = (found.recovery >= threshold) | ladder.full[:, None, None]
    cost = torch.where(able, pages, pages.max() + 1)
    return _take(ladder, stats, found, torch.where(cost == cost.amin(0), found.recovery, -1.0))


def share_budget(ladder: Ladder, stats: PromptStats, budget: float) -> Choice:
    """The hybrids of highest total recovery whose memory is at most ``budget`` of the full cache's,
    or the cheapest of every head where even those need more.

    Lagrangian relaxation: at a price per page each head takes the hybrid of highest recovery less
    its memory's price, and bisection finds the lowest price at which the sum fits. What is left
    over goes, step by step, to the head that gains most recovery per page. These figures are few
    and looked at often, so they come to the CPU.
    """
    found = evaluate(ladder, stats)
    recovery = found.recovery.clamp(max=1.0).flatten(1).double().cpu()
    full = torch.tensor([hybrid.full for hybrid in ladder.hybrids])
    recovery[(found.pages == found.pages.max()) & ~full] = 0.0  # full needs no more
    pages = found.pages[:, None].expand(recovery.shape)
    room = int(budget * pages.max() * pages.shape[1])
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
            break
        best = int(worth.argmax())
        taken[0, best % worth.shape[1]] = best // worth.shape[1]
    value = torch.zeros_like(recovery).scatter(0, taken, 1.0).to(found.recovery.device)
    return _take(ladder, stats, found, value.view_as(found.recovery))


def _take(ladder: Ladder, stats: PromptStats, found: Evaluation, value: torch.Tensor) -> Choice:
    # Full saves no page against itself, so it wins over whatever needs as many. max() of a bool
    # picks the first True: among equals, the earlier rung.
    value = torch.where(ladder.full[:, None, None] & (value > 0), 2.0, value)
    policy = (value == value.amax(0)).max(0).indices
    choice = kept_keys(ladder, stats, policy)
    recovery = found.recovery.gather(0, policy[None])[0]
    return Choice(policy, recovery, choice.kept, choice.sticky)
