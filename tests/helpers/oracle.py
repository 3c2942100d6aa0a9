"""The truth: a Hugging Face model with its full cache and per-head boolean masks.

Written from the definitions in docs/how-it-works.md, with none of the package's code: attention
matrices are materialised, policies are Python loops over heads, evictions follow the five steps
one by one. The engine's trace is replayed against it: where the engine decided otherwise, the
difference must be a near-tie (recovery within 1e-5 of T, or scores within 1e-5 of their size),
which the oracle then adopts; anything else is a mismatch.
"""

from __future__ import annotations

import copy
import functools
import math
import unicodedata
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

NEAR = 1e-5
PAGE = 16


@dataclass(frozen=True)
class Rung:
    components: frozenset[str]
    frequent: Fraction = Fraction(0)
    local: Fraction = Fraction(0)
    least_window: int = 1

    def window(self, count: int) -> int:
        return min(count, max(self.least_window, math.ceil(self.local * count)))


FULL = Rung(frozenset({"full"}))
SPECIAL = frozenset({"special"})
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
class Trace:
    """What the engine did. ``kept[i]``: list over layers and heads of sets of positions, after
    the prompt (``i = 0``) and after each decode step. ``budget`` None: recovery ``threshold``."""

    prompt: list[int]
    output: list[int]
    policy: list[list[int]]
    kept: list[list[list[set[int]]]]
    threshold: float
    budget: float | None = None


@dataclass
class Verdict:
    mismatches: list[str] = field(default_factory=list)
    granted: int = 0


class Oracle:
    def __init__(self, path: str, settings: Settings) -> None:
        self.settings, self.ladder = settings, settings.ladder
        AttentionInterface.register("fastgen_oracle", self._attend)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="fastgen_oracle"
        ).eval()
        config = self.model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self.group = config.num_attention_heads // self.heads
        self.special = set(self.tokenizer.all_special_ids)
        for index, token in self.tokenizer.added_tokens_decoder.items():
            if token.special:
                self.special.add(index)
        self.visible: list[torch.Tensor] | None = None
        self.probs: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []

    def _attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eager attention; ``visible[layer]`` bool ``[H, t]`` hides keys from a decode query."""
        key = key.repeat_interleave(self.group, dim=1)
        value = value.repeat_interleave(self.group, dim=1)
        scores = query @ key.transpose(2, 3) * scaling
        q, t = scores.shape[-2:]
        causal = torch.arange(t) <= torch.arange(t - q, t)[:, None]
        if self.visible is not None:
            seen = self.visible[module.layer_idx].repeat_interleave(self.group, dim=0)
            causal = causal & seen[:, None]
        probs = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        self.probs.append(probs[0])
        self.norms.append(value[0, :: self.group].norm(dim=-1))
        return (probs @ value).transpose(1, 2).contiguous(), probs

    @functools.cache  # noqa: B019 - one oracle a session
    def is_punctuation(self, token: int) -> bool:
        text = self.tokenizer.decode([token]).strip()
        if token in self.special or not text:
            return False
        return all(unicodedata.category(char)[0] == "P" for char in text)

    def is_sticky(self, tokens: list[int], position: int, rung: Rung) -> bool:
        token = tokens[position]
        special = token in self.special or position < self.settings.sinks
        if "special" in rung.components and special:
            return True
        return "punctuation" in rung.components and self.is_punctuation(token)

    @torch.no_grad()
    def forward(self, tokens: list[int], past: Any) -> tuple[torch.Tensor, Any]:
        self.probs, self.norms = [], []
        out = self.model(torch.tensor([tokens]), past_key_values=past, use_cache=True)
        return out.logits[0, -1], out.past_key_values

    @torch.no_grad()
    def replay(self, traces: list[Trace]) -> list[Verdict]:
        """Check the traces of one prompt."""
        prompt = traces[0].prompt
        self.visible = None
        logits, past = self.forward(prompt, None)
        attention = [p.view(self.heads, self.group, *p.shape[1:]) for p in self.probs]
        scores = [[self._scores(head) for head in layer] for layer in attention]
        weighed = [
            [self._weigh(head, norm) for head, norm in zip(layer, norms, strict=True)]
            for layer, norms in zip(attention, self.norms, strict=True)
        ]
        found = [
            [self._evaluate(prompt, *each) for each in zip(*layer, strict=True)]
            for layer in zip(weighed, scores, strict=True)
        ]
        verdicts = []
        for trace in traces:
            verdict = Verdict()
            assert trace.prompt == prompt
            if trace.budget is None:
                rungs = self._cheapest(trace, found, verdict)
            else:
                rungs = trace.policy
                self._check_budget(trace, found, verdict)
            kept = self._check_prompt(trace, rungs, found, weighed, scores, verdict)
            own = [
                [
                    s if self.ladder[r].frequent else np.zeros_like(s)
                    for r, s in zip(*pair, strict=True)
                ]
                for pair in zip(rungs, scores, strict=True)
            ]
            self._decode(trace, rungs, kept, own, logits, copy.deepcopy(past), verdict)
            verdicts.append(verdict)
        return verdicts

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

    def _cheapest(self, trace: Trace, found: Any, verdict: Verdict) -> list[list[int]]:
        """Fewest pages that reach the threshold; then full; then most recovery; then the first."""
        return [
            [
                self._cheapest_of(
                    each, trace.threshold, theirs, f"layer {layer} head {head}", verdict
                )
                for head, (each, theirs) in enumerate(zip(*both, strict=True))
            ]
            for layer, both in enumerate(zip(found, trace.policy, strict=True))
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

    def _check_budget(self, trace: Trace, found: Any, verdict: Verdict) -> None:
        """Within the budget, and no single step up that still fits would recover more; and at
        least what the steepest steps of every head's concave hull, taken while they fit, recover.
        """
        heads = [each for layer in found for each in layer]
        taken = [rung for layer in trace.policy for rung in layer]
        assert trace.budget is not None
        least = sum(min(pages for pages, _ in each) for each in heads)
        room = max(least, int(trace.budget * heads[0][-1][0] * len(heads)))
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
        self,
        trace: Trace,
        rungs: list[list[int]],
        found: Any,
        weighed: list[list[torch.Tensor]],
        scores: list[list[np.ndarray]],
        verdict: Verdict,
    ) -> list[list[set[int]]]:
        """Kept keys after the prompt; and the chosen rungs' recoveries by an explicit mask."""
        n = len(trace.prompt)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        kept: list[list[set[int]]] = []
        for layer in range(self.layers):
            kept.append([])
            for head in range(self.heads):
                rung, score = self.ladder[rungs[layer][head]], scores[layer][head]
                where = f"layer {layer} head {head} prompt"
                end, always, window = self._end_of_prompt(trace.prompt, rung, score)
                seen = distance < window
                seen[:, sorted(always)] = True
                recovery = float(weighed[layer][head].masked_fill(~seen, 0.0).sum())
                if abs(recovery - found[layer][head][rungs[layer][head]][1]) > NEAR:
                    verdict.mismatches.append(f"{where}: recovery {recovery} by the mask")
                theirs = trace.kept[0][layer][head]
                kept[-1].append(set(self._compare(end, theirs, score, where, verdict)))
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

    def _compare(
        self, ours: set[int], theirs: set[int], score: np.ndarray, where: str, verdict: Verdict
    ) -> set[int]:
        missing, extra = ours - theirs, theirs - ours
        if not missing and not extra:
            return ours
        if len(missing) == len(extra):
            differing = score[sorted(missing | extra)]
            if np.ptp(differing) <= NEAR * np.abs(differing).max():
                verdict.granted += 1
                return theirs
        verdict.mismatches.append(f"{where}: lacks {sorted(missing)}, has {sorted(extra)}")
        return ours

    def _decode(
        self,
        trace: Trace,
        rungs: list[list[int]],
        kept: list[list[set[int]]],
        scores: list[list[np.ndarray]],
        logits: torch.Tensor,
        past: Any,
        verdict: Verdict,
    ) -> None:
        tokens = list(trace.prompt)
        for step, token in enumerate(trace.output):
            best = int(logits.argmax())
            if best != token:
                gap = float(logits[best] - logits[token])
                if gap <= NEAR * float(logits[best].abs()):
                    verdict.granted += 1
                else:
                    verdict.mismatches.append(f"token {step}: {token}, oracle {best}, gap {gap}")
                    return
            if step + 1 == len(trace.output):
                return
            tokens.append(token)
            self.visible = [
                self._visible(tokens, layer, rungs, kept, scores, trace.kept[step + 1], verdict)
                for layer in range(self.layers)
            ]
            logits, past = self.forward([token], past)
            for layer in range(self.layers):
                probs = self.probs[layer].view(self.heads, self.group, -1).sum(1).double().numpy()
                for head in range(self.heads):
                    if self.ladder[rungs[layer][head]].frequent:
                        scores[layer][head] += probs[head]

    def _visible(
        self,
        tokens: list[int],
        layer: int,
        rungs: list[list[int]],
        kept: list[list[set[int]]],
        scores: list[list[np.ndarray]],
        theirs: list[list[set[int]]],
        verdict: Verdict,
    ) -> torch.Tensor:
        """What each head of a layer keeps with the newest token, entered in ``kept``: bool
        ``[H, t]``."""
        seen = torch.zeros(self.heads, len(tokens), dtype=torch.bool)
        for head in range(self.heads):
            rung = self.ladder[rungs[layer][head]]
            score = scores[layer][head] = np.append(scores[layer][head], 0.0)
            ours = self._evict(tokens, rung, kept[layer][head], score)
            where = f"length {len(tokens)} layer {layer} head {head}"
            ours = self._compare(ours, theirs[layer][head], score, where, verdict)
            kept[layer][head] = set(ours)
            seen[head, sorted(ours)] = True
        return seen

    def _evict(self, tokens: list[int], rung: Rung, kept: set[int], score: np.ndarray) -> set[int]:
        t = len(tokens)
        kept = kept | {t - 1}
        if rung is FULL:
            return kept
        sticky = {p for p in kept if self.is_sticky(tokens, p, rung)}
        window = rung.window(t)
        budget = len(sticky) + window + math.ceil(rung.frequent * t)
        if len(kept) > budget:
            candidates = [p for p in kept - sticky if p < t - window]
            kept = kept - {min(candidates, key=lambda p: (score[p], p))}
        return kept
