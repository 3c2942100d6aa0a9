"""The oracle's ladders: the rung of each head that a recovery or a budget asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from helpers.oracle import FULL, NEAR, PAGE, SPECIAL, Heads, Oracle, Rung, Trace, Verdict

BOTH = frozenset({"special", "punctuation"})
R = Fraction(3, 10)
PAPER = [Rung(SPECIAL), Rung(BOTH), Rung(BOTH, R), Rung(BOTH, R, R), FULL]
ADAPTIVE = [
    *(
        Rung(SPECIAL, Fraction(f, 100), Fraction(f, 200), 64)
        for f in (0, 2, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60)
    ),
    FULL,
]


@dataclass(frozen=True)
class Settings:
    """``window`` 0 weighs all queries alike; else the ``d``-th before the end ``min(1, w/d)``."""

    ladder: list[Rung]
    window: int
    pooling: int
    sinks: int
    by_value: bool


SETTINGS = {
    "paper": Settings(PAPER, 0, 1, 0, False),
    "adaptive": Settings(ADAPTIVE, 32, 31, 4, True),
}


@dataclass
class Weighed:
    """By layer and head: attention as shares of a whole ``[n, n]``, scores ``[n]``, and every
    rung's pages and recovery."""

    attention: list[list[torch.Tensor]]
    scores: list[list[np.ndarray]]
    found: list[list[list[tuple[int, float]]]]


class LadderOracle(Oracle[Weighed]):
    def __init__(self, path: str, settings: Settings) -> None:
        super().__init__(path, settings.sinks)
        self.settings, self.ladder = settings, settings.ladder

    def profile(
        self, prompt: list[int], attention: list[torch.Tensor], norms: list[torch.Tensor]
    ) -> Weighed:
        scores = [[self._scores(head) for head in layer] for layer in attention]
        weighed = [
            [self._weigh(head, norm) for head, norm in zip(layer, norms, strict=True)]
            for layer, norms in zip(attention, norms, strict=True)
        ]
        found = [
            [self._evaluate(prompt, *each) for each in zip(*layer, strict=True)]
            for layer in zip(weighed, scores, strict=True)
        ]
        return Weighed(weighed, scores, found)

    def choose(self, trace: Trace, profile: Weighed, verdict: Verdict) -> Heads:
        theirs = [[self.ladder.index(rung) for rung in layer] for layer in trace.policy]
        if trace.budget is None:
            rungs = self._cheapest(theirs, trace.threshold, profile.found, verdict)
        else:
            rungs = theirs
            room = trace.room(self.layers * self.heads)
            self._check_budget(rungs, room, profile.found, verdict)
        kept = self._check_prompt(trace, rungs, profile, verdict)
        policy = [[self.ladder[rung] for rung in layer] for layer in rungs]
        own = [
            [
                s.copy() if self.keeps_scores(r) else np.zeros_like(s)
                for r, s in zip(*pair, strict=True)
            ]
            for pair in zip(policy, profile.scores, strict=True)
        ]
        return Heads(policy, kept, own)

    def _weights(self, n: int) -> torch.Tensor:
        """Of each query; from 128 before the last on, every 2nd counts for two, and so forth."""
        window = self.settings.window
        if not window:
            return torch.ones(n)
        weights = [0.0] * n
        for distance in range(n):
            step = 1 << max(0, (distance // 64).bit_length() - 1)
            weights[n - 1 - distance + distance % step] += min(1.0, window / (distance + 1))
        return torch.tensor(weights)

    def _scores(self, attention: torch.Tensor) -> np.ndarray:
        """Weighed column sums of ``[G, n, n]``, each key taking its neighbourhood's best."""
        n, half = attention.shape[-1], self.settings.pooling // 2
        column = (attention * self._weights(n)[:, None]).sum((0, 1)).double().numpy()
        return np.array([column[max(0, k - half) : k + half + 1].max() for k in range(n)])

    def _weigh(self, attention: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """``[n, n]``, the group's attention as shares of a whole, weighed by query and value."""
        weighed = (attention * self._weights(attention.shape[-1])[:, None]).double().sum(0)
        if self.settings.by_value:
            weighed = weighed * norms.double()
        return weighed / weighed.sum()

    def _evaluate(
        self, prompt: list[int], weighed: torch.Tensor, score: np.ndarray
    ) -> list[tuple[int, float]]:
        """Pages and recovery of every rung of one head."""
        n = len(prompt)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        total = weighed.sum(0).numpy()
        near = {
            w: weighed.masked_fill(distance >= w, 0.0).sum(0).numpy()
            for w in {rung.window(n) for rung in self.ladder if rung is not FULL}
        }
        found = []
        for rung in self.ladder:
            end, always, window = self._end_of_prompt(prompt, rung, score)
            if rung is FULL:
                found.append((-(-n // PAGE), 1.0))
                continue
            recovery = near[window].sum() + (total - near[window])[sorted(always)].sum()
            found.append((-(-len(end) // PAGE), float(recovery)))
        return found

    def _cheapest(
        self, policy: list[list[int]], threshold: float, found: Any, verdict: Verdict
    ) -> list[list[int]]:
        """Fewest pages that reach the threshold; then full; then most recovery; then the first."""
        return [
            [
                self._cheapest_of(each, threshold, theirs, f"layer {layer} head {head}", verdict)
                for head, (each, theirs) in enumerate(zip(*both, strict=True))
            ]
            for layer, both in enumerate(zip(found, policy, strict=True))
        ]

    def _cheapest_of(
        self,
        each: list[tuple[int, float]],
        threshold: float,
        theirs: int,
        where: str,
        verdict: Verdict,
    ) -> int:
        last = len(each) - 1
        able = sorted({*(i for i, (_, r) in enumerate(each) if r >= threshold), last})
        rung = min(able, key=lambda i: (each[i][0], i != last, -each[i][1], i))
        if rung == theirs:
            return rung
        near_threshold = min(abs(each[i][1] - threshold) for i in (rung, theirs)) < NEAR
        same_pages = each[rung][0] == each[theirs][0]
        if near_threshold or (same_pages and abs(each[rung][1] - each[theirs][1]) < NEAR):
            verdict.granted += 1
            return theirs
        verdict.mismatches.append(f"{where}: policy {theirs}, oracle {rung}")
        return rung

    def _check_budget(
        self, policy: list[list[int]], room: int, found: Any, verdict: Verdict
    ) -> None:
        """Within the budget, and no single step up that still fits would recover more; and at
        least what the steepest steps of every head's concave hull, taken while they fit, recover.
        """
        heads = [each for layer in found for each in layer]
        taken = [rung for layer in policy for rung in layer]
        least = sum(min(pages for pages, _ in each) for each in heads)
        room = max(least, room)
        used = sum(each[i][0] for each, i in zip(heads, taken, strict=True))
        if used > room:
            verdict.mismatches.append(f"{used} pages of {room}")
        steps, recovered = [], 0.0
        for each in heads:
            at = max(each, key=lambda c: (-c[0], c[1]))
            recovered, room = recovered + at[1], room - at[0]
            while True:
                up = [c for c in each if c[0] > at[0] and c[1] > at[1]]
                if not up:
                    break
                best = max(up, key=lambda c: (c[1] - at[1]) / (c[0] - at[0]))
                steps.append(((best[1] - at[1]) / (best[0] - at[0]), best[0] - at[0]))
                at = best
        for slope, pages in sorted(steps, reverse=True):
            if pages > room:
                break
            recovered, room = recovered + slope * pages, room - pages
        got = sum(each[i][1] for each, i in zip(heads, taken, strict=True))
        if got < recovered - NEAR * len(heads):
            verdict.mismatches.append(f"recovery {got} in all, the hulls' steps give {recovered}")

    def _check_prompt(
        self, trace: Trace, rungs: list[list[int]], profile: Weighed, verdict: Verdict
    ) -> list[list[set[int]]]:
        """Kept keys after the prompt; and the chosen rungs' recoveries by an explicit mask."""
        n = len(trace.prompt)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        kept: list[list[set[int]]] = []
        for layer in range(self.layers):
            kept.append([])
            for head in range(self.heads):
                index, score = rungs[layer][head], profile.scores[layer][head]
                where = f"layer {layer} head {head} prompt"
                end, always, window = self._end_of_prompt(trace.prompt, self.ladder[index], score)
                seen = distance < window
                seen[:, sorted(always)] = True
                recovery = float(profile.attention[layer][head].masked_fill(~seen, 0.0).sum())
                if abs(recovery - profile.found[layer][head][index][1]) > NEAR:
                    verdict.mismatches.append(f"{where}: recovery {recovery} by the mask")
                theirs = trace.kept[0][layer][head]
                kept[-1].append(set(self.compare(end, theirs, score, where, verdict)))
        return kept

    def _end_of_prompt(
        self, prompt: list[int], rung: Rung, score: np.ndarray
    ) -> tuple[set[int], set[int], int]:
        """Kept keys at the end, keys always visible, and the window."""
        n = len(prompt)
        if rung is FULL:
            return set(range(n)), set(range(n)), n
        window = rung.window(n)
        always = {p for p in range(n) if self.is_sticky(prompt, p, rung)}
        recent = set(range(n - window, n))
        if rung.frequent:
            rest = [p for p in range(n) if p not in always and p not in recent]
            rest.sort(key=lambda p: (-score[p], p))
            always |= set(rest[: math.ceil(rung.frequent * n)])
        return always | recent, always, window
