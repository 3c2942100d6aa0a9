"""The truth: a Hugging Face model with its full cache and per-head boolean masks.

Written from the definitions in docs/how-it-works.md, with none of the package's code: attention
matrices are materialised, policies are Python loops over heads, evictions follow the five steps
one by one. The engine's trace is replayed against it: where the engine decided otherwise, the
difference must be a near-tie (recovery within 1e-5 of T, or scores within 1e-5 of their size),
which the oracle then adopts; anything else is a mismatch.

Here are the model and the decoding. What heads keep of a prompt is ``oracle_ladders.py``, and
``oracle_peaks.py`` for budgets without a ladder.
"""

from __future__ import annotations

import copy
import math
import unicodedata
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Generic, TypeVar

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


@dataclass
class Trace:
    """What the engine did. ``policy`` is by layer and head; ``kept[i]``: list over layers and heads
    of sets of positions, after the prompt (``i = 0``) and after each decode step. ``budget`` None:
    recovery ``threshold``. Prompts below ``least_tokens`` stay whole, and a budget leaves a longer
    one the memory of so many."""

    prompt: list[int]
    output: list[int]
    policy: list[list[Rung]]
    kept: list[list[list[set[int]]]]
    threshold: float
    budget: float | None = None
    least_tokens: int = 1

    def room(self, num_heads: int) -> int:
        """Pages that the budget leaves the prompt."""
        assert self.budget is not None
        n = len(self.prompt)
        share = max(Fraction(str(self.budget)), Fraction(self.least_tokens, n))
        return math.floor(share * -(-n // PAGE) * num_heads)


@dataclass
class Verdict:
    mismatches: list[str] = field(default_factory=list)
    granted: int = 0


@dataclass
class Heads:
    """By layer and head. ``competing``: among so many tokens special ones are not sticky."""

    rungs: list[list[Rung]]
    kept: list[list[set[int]]]
    scores: list[list[np.ndarray]]
    competing: int = 0


Profile = TypeVar("Profile")


class Oracle(ABC, Generic[Profile]):
    def __init__(self, path: str, sinks: int) -> None:
        self.sinks = sinks
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
        self._punctuation: dict[int, bool] = {}
        self.norms: list[torch.Tensor] = []

    @abstractmethod
    def profile(
        self, prompt: list[int], attention: list[torch.Tensor], norms: list[torch.Tensor]
    ) -> Profile:
        """What is the same for all traces, from each layer's attention ``[H, G, n, n]`` and norms
        of values ``[H, n]``."""

    @abstractmethod
    def choose(self, trace: Trace, profile: Profile, verdict: Verdict) -> Heads:
        """What heads keep of the prompt, checked against the trace."""

    def keeps_scores(self, rung: Rung) -> bool:
        return bool(rung.frequent)

    def receive(self, scores: np.ndarray, attention: np.ndarray) -> None:
        """Enter a step's attention, float64 ``[t]``, in a head's scores, in place."""
        scores += attention

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

    def is_punctuation(self, token: int) -> bool:
        if token not in self._punctuation:
            text = self.tokenizer.decode([token]).strip()
            is_text = token not in self.special and bool(text)
            self._punctuation[token] = is_text and all(
                unicodedata.category(char)[0] == "P" for char in text
            )
        return self._punctuation[token]

    def is_sticky(self, tokens: list[int], position: int, rung: Rung, competing: int = 0) -> bool:
        token = tokens[position]
        special = token in self.special and position >= competing
        if "special" in rung.components and (special or position < self.sinks):
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
        profile = self.profile(prompt, attention, self.norms)
        verdicts = []
        for trace in traces:
            verdict = Verdict()
            assert trace.prompt == prompt
            heads = self.choose(trace, profile, verdict)
            self._decode(trace, heads, logits, copy.deepcopy(past), verdict)
            verdicts.append(verdict)
        return verdicts

    def compare(
        self, ours: set[int], theirs: set[int], score: np.ndarray, where: str, verdict: Verdict
    ) -> set[int]:
        """``theirs`` where it differs by a near-tie. What always stays scores infinity."""
        missing, extra = ours - theirs, theirs - ours
        if not missing and not extra:
            return ours
        if len(missing) == len(extra):
            differing = score[sorted(missing | extra)]
            most = np.abs(differing).max()
            if most < math.inf and np.ptp(differing) <= NEAR * most:
                verdict.granted += 1
                return theirs
        verdict.mismatches.append(f"{where}: lacks {sorted(missing)}, has {sorted(extra)}")
        return ours

    def _decode(
        self, trace: Trace, heads: Heads, logits: torch.Tensor, past: Any, verdict: Verdict
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
                self._visible(tokens, layer, heads, trace.kept[step + 1], verdict)
                for layer in range(self.layers)
            ]
            logits, past = self.forward([token], past)
            for layer in range(self.layers):
                probs = self.probs[layer].view(self.heads, self.group, -1).sum(1).double().numpy()
                for head in range(self.heads):
                    if self.keeps_scores(heads.rungs[layer][head]):
                        self.receive(heads.scores[layer][head], probs[head])

    def _visible(
        self,
        tokens: list[int],
        layer: int,
        heads: Heads,
        theirs: list[list[set[int]]],
        verdict: Verdict,
    ) -> torch.Tensor:
        """What each head of a layer keeps with the newest token, entered in ``heads``: bool
        ``[H, t]``."""
        seen = torch.zeros(self.heads, len(tokens), dtype=torch.bool)
        kept, scores = heads.kept[layer], heads.scores[layer]
        for head, rung in enumerate(heads.rungs[layer]):
            score = scores[head] = np.append(scores[head], 0.0)
            ours = self._evict(tokens, rung, kept[head], score, heads.competing)
            where = f"length {len(tokens)} layer {layer} head {head}"
            ours = self.compare(ours, theirs[layer][head], score, where, verdict)
            kept[head] = set(ours)
            seen[head, sorted(ours)] = True
        return seen

    def _evict(
        self, tokens: list[int], rung: Rung, kept: set[int], score: np.ndarray, competing: int
    ) -> set[int]:
        t = len(tokens)
        kept = kept | {t - 1}
        if rung is FULL:
            return kept
        sticky = {p for p in kept if self.is_sticky(tokens, p, rung, competing)}
        window = rung.window(t)
        budget = len(sticky) + window + math.ceil(rung.frequent * t)
        if len(kept) > budget:
            candidates = [p for p in kept - sticky if p < t - window]
            kept = kept - {min(candidates, key=lambda p: (score[p], p))}
        return kept
