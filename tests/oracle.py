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
PAPER = [
    {"special"},
    {"special", "punctuation"},
    {"special", "punctuation", "frequent"},
    {"special", "punctuation", "frequent", "local"},
    {"full"},
]
RATIO = Fraction(3, 10)


@dataclass
class Trace:
    """What the engine did. ``kept[i]``: list over layers and heads of sets of positions, after
    the prompt (``i = 0``) and after each decode step."""

    prompt: list[int]
    output: list[int]
    policy: list[list[int]]
    kept: list[list[list[set[int]]]]


@dataclass
class Verdict:
    mismatches: list[str] = field(default_factory=list)
    granted: int = 0


def ceil_of(ratio: Fraction, count: int) -> int:
    return math.ceil(ratio * count)


class Oracle:
    def __init__(self, path: str) -> None:
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
        return (probs @ value).transpose(1, 2).contiguous(), probs

    @functools.cache  # noqa: B019 - one oracle a session
    def is_punctuation(self, token: int) -> bool:
        text = self.tokenizer.decode([token]).strip()
        if token in self.special or not text:
            return False
        return all(unicodedata.category(char)[0] == "P" for char in text)

    def is_sticky(self, token: int, policy: set[str]) -> bool:
        if "special" in policy and token in self.special:
            return True
        return "punctuation" in policy and self.is_punctuation(token)

    @torch.no_grad()
    def forward(self, tokens: list[int], past: Any) -> tuple[torch.Tensor, Any]:
        self.probs = []
        out = self.model(torch.tensor([tokens]), past_key_values=past, use_cache=True)
        return out.logits[0, -1], out.past_key_values

    @torch.no_grad()
    def replay(self, traces: dict[float, Trace]) -> dict[float, Verdict]:
        """Check the traces of one prompt, by recovery threshold."""
        prompt = next(iter(traces.values())).prompt
        self.visible = None
        logits, past = self.forward(prompt, None)
        attention = [p.view(self.heads, self.group, *p.shape[1:]) for p in self.probs]
        verdicts = {}
        for threshold, trace in traces.items():
            verdict = verdicts[threshold] = Verdict()
            assert trace.prompt == prompt
            rungs, kept, scores = self._after_prompt(threshold, trace, attention, verdict)
            self._decode(trace, rungs, kept, scores, logits, copy.deepcopy(past), verdict)
        return verdicts

    def _after_prompt(
        self, threshold: float, trace: Trace, attention: list[torch.Tensor], verdict: Verdict
    ) -> tuple[list[list[int]], list[list[set[int]]], list[list[np.ndarray]]]:
        n = len(trace.prompt)
        distance = torch.arange(n)[:, None] - torch.arange(n)
        rungs: list[list[int]] = []
        kept: list[list[set[int]]] = []
        scores: list[list[np.ndarray]] = []
        for layer in range(self.layers):
            rungs.append([])
            kept.append([])
            scores.append([])
            for head in range(self.heads):
                group = attention[layer][head]
                column = group.sum(dim=(0, 1)).double().numpy()
                recoveries, keeps = [], []
                for policy in PAPER:
                    end, always, window = self._end_of_prompt(trace.prompt, policy, column)
                    mask = torch.zeros(n, dtype=torch.bool)
                    mask[sorted(always)] = True
                    recovered = group.masked_fill(~(mask | (distance < window)), 0.0)
                    recoveries.append(float(recovered.double().sum(-1).mean()))
                    keeps.append(end)
                able = [i for i, r in enumerate(recoveries) if r >= threshold]
                rung = min(able, key=lambda i: (len(keeps[i]), i))
                theirs = trace.policy[layer][head]
                where = f"layer {layer} head {head}"
                if rung != theirs:
                    if min(abs(recoveries[i] - threshold) for i in (rung, theirs)) < NEAR:
                        verdict.granted += 1
                        rung = theirs
                    else:
                        verdict.mismatches.append(f"{where}: policy {theirs}, oracle {rung}")
                ours = self._compare(
                    keeps[rung], trace.kept[0][layer][head], column, f"{where} prompt", verdict
                )
                frequent = "frequent" in PAPER[rung]
                rungs[-1].append(rung)
                kept[-1].append(set(ours))
                scores[-1].append(column if frequent else np.zeros(n))
        return rungs, kept, scores

    def _end_of_prompt(
        self, prompt: list[int], policy: set[str], column: np.ndarray
    ) -> tuple[set[int], set[int], int]:
        """Kept keys at the end, keys always visible, and the window."""
        n = len(prompt)
        if "full" in policy:
            return set(range(n)), set(range(n)), n
        window = max(1, ceil_of(RATIO, n)) if "local" in policy else 1
        always = {p for p in range(n) if self.is_sticky(prompt[p], policy)}
        recent = set(range(n - window, n))
        if "frequent" in policy:
            rest = [p for p in range(n) if p not in always and p not in recent]
            rest.sort(key=lambda p: (-column[p], p))
            always |= set(rest[: ceil_of(RATIO, n)])
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
            self.visible = []
            for layer in range(self.layers):
                seen = torch.zeros(self.heads, len(tokens), dtype=torch.bool)
                for head in range(self.heads):
                    policy = PAPER[rungs[layer][head]]
                    score = scores[layer][head] = np.append(scores[layer][head], 0.0)
                    ours = self._evict(tokens, policy, kept[layer][head], score)
                    theirs = trace.kept[step + 1][layer][head]
                    where = f"step {step} layer {layer} head {head}"
                    ours = self._compare(ours, theirs, score, where, verdict)
                    kept[layer][head] = set(ours)
                    seen[head, sorted(ours)] = True
                self.visible.append(seen)
            logits, past = self.forward([token], past)
            for layer in range(self.layers):
                probs = self.probs[layer].view(self.heads, self.group, -1).sum(1).double().numpy()
                for head in range(self.heads):
                    if "frequent" in PAPER[rungs[layer][head]]:
                        scores[layer][head] += probs[head]

    def _evict(
        self, tokens: list[int], policy: set[str], kept: set[int], score: np.ndarray
    ) -> set[int]:
        t = len(tokens)
        kept = kept | {t - 1}
        if "full" in policy:
            return kept
        sticky = {p for p in kept if self.is_sticky(tokens[p], policy)}
        window = max(1, ceil_of(RATIO, t)) if "local" in policy else 1
        budget = len(sticky) + window
        if "frequent" in policy:
            budget += ceil_of(RATIO, t)
        if len(kept) > budget:
            candidates = [p for p in kept - sticky if p < t - window]
            kept = kept - {min(candidates, key=lambda p: (score[p], p))}
        return kept
