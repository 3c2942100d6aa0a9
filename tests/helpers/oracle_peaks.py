"""The oracle's peaks: one choice among the keys of all heads, in whole pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from helpers.oracle import FULL, NEAR, PAGE, SPECIAL, Heads, Oracle, Rung, Trace, Verdict

SHARES = 10_000
"""r_f is a multiple of one part in so many."""


@dataclass(frozen=True)
class PeaksSettings:
    """The method's constants.

    Attributes:
        queries: the last so many of the prompt are looked at, at keys ``least_window`` before them
            and more.
        window: the ``d``-th query before the end counts ``min(1, window / d)``,
        of_system: and so much of that where it stands in a system prompt.
        pool_weight, pool_before, pool_after: what a key's rank takes of the best of those around
            it, from so many keys before it to so many after it.
        sinks, least_window: the first and the last tokens, which always stay.
        generated: while decoding the last so many stay. In the oracle's engines they are few, so
            that heads evict.
        decay, distance: while decoding a slot's score, which begins with its rank, fades by this
            factor with every token, and rises to the attention of a query so many tokens later.
        evicts: whether heads evict while decoding, or keep all that is generated.
    """

    queries: int = 128
    window: int = 32
    of_system: float = 0.2
    pool_weight: float = 0.1
    pool_before: int = 64
    pool_after: int = 4
    sinks: int = 4
    least_window: int = 32
    generated: int = 32
    decay: float = 0.99
    distance: int = 32
    evicts: bool = True


PEAKS = PeaksSettings()
Ranks = list[list[np.ndarray]]
"""By layer and head: ``[n]``."""


class PeaksOracle(Oracle[Ranks]):
    def __init__(self, path: str, settings: PeaksSettings = PEAKS) -> None:
        super().__init__(path, settings.sinks)
        self.settings = settings

    def keeps_scores(self, rung: Rung) -> bool:
        return rung is not FULL

    def receive(self, scores: np.ndarray, attention: np.ndarray) -> None:
        far = np.arange(len(scores)) <= len(scores) - 1 - self.settings.distance
        scores[:] = np.maximum(self.settings.decay * scores, attention * far)

    def profile(
        self, prompt: list[int], attention: list[torch.Tensor], norms: list[torch.Tensor]
    ) -> Ranks:
        counts = self._counts(prompt)
        return [
            [self._ranks(counts, *head) for head in zip(*layer, strict=True)]
            for layer in zip(attention, norms, strict=True)
        ]

    def _counts(self, prompt: list[int]) -> torch.Tensor:
        """What a query counts, and on which keys: ``[n, n]``."""
        how, n = self.settings, len(prompt)
        before, asks, _ = self.tokenizer.decode(prompt).partition("<|im_end|>\n<|im_start|>user")
        system = len(self.tokenizer.encode(before)) if asks else 0
        counts = torch.zeros(n, n)
        for d in range(1, min(how.queries, n) + 1):
            count = min(1.0, how.window / d) * (how.of_system if n - d < system else 1.0)
            counts[n - d, : max(0, n - d - how.least_window + 1)] = count
        return counts

    def _ranks(
        self, counts: torch.Tensor, attention: torch.Tensor, norms: torch.Tensor
    ) -> np.ndarray:
        """Of one head, from ``[n, n]``, ``[G, n, n]`` and ``[n]``."""
        how, n = self.settings, len(norms)
        peak = (attention * counts).amax((0, 1)).double().numpy()
        norm = norms.double().numpy()
        own = peak * norm / norm.mean()
        around = [own[max(0, j - how.pool_before) : j + how.pool_after + 1] for j in range(n)]
        return own + how.pool_weight * np.array([each.max() for each in around])

    def choose(self, trace: Trace, profile: Ranks, verdict: Verdict) -> Heads:
        n, room = len(trace.prompt), trace.room(self.layers * self.heads)
        always, competing = set(range(n)), 0
        if n >= trace.least_tokens:
            always, competing = self._always(trace.prompt, room)
        order = [
            [
                np.array([math.inf if p in always else r for p, r in enumerate(rank)])
                for rank in each
            ]
            for each in profile
        ]
        pages, chosen = self._check_pages(trace, order, room, verdict)
        kept = [
            [self._best(*head) for head in zip(*layer, strict=True)]
            for layer in zip(order, pages, strict=True)
        ]
        rungs = [
            [
                self._rung(len(keys), len(always) if count > len(always) else len(keys), n)
                for keys, count in zip(*layer, strict=True)
            ]
            for layer in zip(kept, chosen, strict=True)
        ]
        scores = [[np.where(np.isinf(ranks), 0.0, ranks) for ranks in layer] for layer in order]
        found = Heads(rungs, kept, scores, competing)
        for layer, ranks in enumerate(order):
            self._check_layer(trace, layer, found, ranks, verdict)
        return found

    def _always(self, prompt: list[int], room: int) -> tuple[set[int], int]:
        """Keys that every head keeps, and among how many tokens special ones compete like others,
        since they would take more than there is room for."""
        n, how = len(prompt), self.settings
        ends = {p for p in range(n) if p < how.sinks or p >= n - how.least_window}
        always = ends | {p for p in range(n) if prompt[p] in self.special}
        if self.layers * self.heads * -(-len(always) // PAGE) > room:
            return ends, n
        return always, 0

    def _check_pages(
        self, trace: Trace, order: Ranks, room: int, verdict: Verdict
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Pages of each head, and the keys that were chosen before the last page was filled: a head
        of which none was but those that always stay is local.

        The engine may have one page more or less of a head where the rank that decides on it is as
        good as that of the first page left out; in all it has what fits."""
        pages, chosen, edge = self._share(order, room)
        fits, used = sum(map(sum, pages)), 0
        for layer, heads in enumerate(trace.kept[0]):
            for head, kept in enumerate(heads):
                theirs, ours = -(-len(kept) // PAGE), pages[layer][head]
                used += theirs
                if theirs == ours:
                    continue
                decides = sorted(order[layer][head])[-1 - PAGE * (max(theirs, ours) - 1)]
                if abs(theirs - ours) == 1 and abs(decides - edge) <= NEAR * edge:
                    verdict.granted += 1
                    pages[layer][head] = theirs
                else:
                    where = f"layer {layer} head {head} prompt"
                    verdict.mismatches.append(f"{where}: {theirs} pages, oracle {ours}")
        if used != fits:
            verdict.mismatches.append(f"{used} pages, {fits} fit in {room}")
        return pages, chosen

    def _share(self, order: Ranks, room: int) -> tuple[list[list[int]], list[list[int]], float]:
        """Pages and keys of each head, and the rank of the first key that would open one too many.
        All that fit are used, unless there are no more keys."""
        pages = [[0] * self.heads for _ in range(self.layers)]
        counts = [[0] * self.heads for _ in range(self.layers)]
        keys = [
            (rank, layer, head)
            for layer, heads in enumerate(order)
            for head, ranks in enumerate(heads)
            for rank in ranks
        ]
        for rank, layer, head in sorted(keys, reverse=True):
            if room < 0 and rank < math.inf:  # what always stays is too much already
                return pages, counts, rank
            counts[layer][head] += 1
            if counts[layer][head] <= PAGE * pages[layer][head]:
                continue
            if room <= 0 and rank < math.inf:
                counts[layer][head] -= 1
                return pages, counts, rank
            pages[layer][head] += 1
            room -= 1
        return pages, counts, 0.0

    def _best(self, ranks: np.ndarray, pages: int) -> set[int]:
        return set(sorted(range(len(ranks)), key=lambda p: (-ranks[p], p))[: PAGE * pages])

    def _rung(self, count: int, others: int, n: int) -> Rung:
        """How a head that keeps ``count`` of ``n`` keys, ``others`` not for their rank, goes on."""
        if count == n or not self.settings.evicts:
            return FULL
        share = Fraction(math.ceil(Fraction(SHARES * (count - others), n)), SHARES)
        how = self.settings
        local = Fraction(min(SHARES, SHARES * how.least_window // n), SHARES)
        return Rung(SPECIAL, share, local, max(how.least_window, how.generated))

    def _check_layer(
        self, trace: Trace, layer: int, chosen: Heads, ranks: list[np.ndarray], verdict: Verdict
    ) -> None:
        """The engine's rules and keys; near-ties enter ``chosen``."""
        kept = chosen.kept[layer]
        for head, theirs in enumerate(trace.kept[0][layer]):
            where = f"layer {layer} head {head} prompt"
            rung, told = chosen.rungs[layer][head], trace.policy[layer][head]
            if rung != told:
                verdict.mismatches.append(f"{where}: goes on by {told}, oracle {rung}")
            kept[head] = set(self.compare(kept[head], theirs, ranks[head], where, verdict))
