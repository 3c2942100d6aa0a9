"""A random prompt, profiled as an engine does it, and what explicit masks say of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.kernels import Kernels, PromptBatch, reference
from fastgen_vllm.policy.choice import Goal
from fastgen_vllm.policy.hybrids import Hybrid
from fastgen_vllm.profiler.profile import (
    Gathering,
    ModelHeads,
    PromptChunk,
    PromptProfile,
    PromptTokens,
)

LADDER = [
    {"special": True},
    {"punctuation": True, "local": 0.1},
    {"special": True, "frequent": 0.2},
    {"special": True, "frequent": 0.25, "local": 0.3},
]
PAGE = 4
SYSTEM = 250
"""Tokens of the system prompt."""


@dataclass
class Prompt:
    """A random prompt of one layer and two heads, profiled in chunks, without those tokens
    that were found ``cached``; ``probs [H, G, n, n]``."""

    profile: PromptProfile
    probs: torch.Tensor
    value: torch.Tensor

    @classmethod
    def random(
        cls,
        n: int,
        group: int,
        goal: Goal,
        chunk: int,
        peaked: float = 2.0,
        kernels: Kernels = reference,
        cached: int = 0,
        **settings: Any,
    ) -> Prompt:
        torch.manual_seed(n)
        config = FastGenConfig.from_dict({"ladder": LADDER, "min_prompt_tokens": 1, **settings})
        query = torch.randn(n, 2, group, 16) * peaked
        key, value = torch.randn(n, 2, 16), torch.randn(n, 2, 16)
        classes = (torch.rand(n) < 0.1).to(torch.uint8) + 2 * (torch.rand(n) < 0.1).to(torch.uint8)
        plan, heads = config.plan_for(goal), ModelHeads(1, 2, group)
        profile = PromptProfile(config, plan, heads, PromptTokens(classes, 0, SYSTEM), PAGE, goal)
        pages, cpu = torch.cat([key, value], dim=-1).transpose(0, 1).contiguous(), key.device
        for start in range(cached, n, chunk):
            end = min(start + chunk, n)
            part = query[start:end]
            output = torch.empty_like(part)
            batch = PromptBatch.of([torch.tensor([0])], [end - start], [end], 2, 2, cpu)
            lse = reference.prefill_attention(part, pages, batch, 0.5, output)
            gathering = Gathering.of([(0, 0, start, end, profile)], cpu)
            if not profile.profiling.peaks:
                ((_, keys),) = batch.chunks(pages)
                profile.add_chunk(kernels, 0, PromptChunk(part, keys, lse, 0.5))
            elif gathering is not None:
                kernels.attention_peaks(part, lse, pages, batch, gathering.looks, 0, 0.5)
                gathering.finish()
        scores = torch.einsum("qhgd,khd->hgqk", query, key) * 0.5
        causal = torch.ones(n, n).tril().bool()
        return cls(profile, scores.masked_fill(~causal, float("-inf")).softmax(-1), value)

    def weights(self) -> list[float]:
        """What each query counts."""
        how = self.profile.profiling
        n = self.profile.num_tokens
        by_distance = {
            "uniform": lambda d: 1.0,
            "recent": lambda d: min(1.0, how.window / d),
            "last": lambda d: float(d <= how.window),
            "end": lambda d: (
                (d <= 128) * min(1.0, how.window / d) * (1 if d <= n - SYSTEM else 0.2)
            ),
        }[how.weighting]
        weights = [by_distance(n - q) for q in range(n)]
        if how.weighting == "recent":
            for q in range(n):  # far queries are counted by the next one that is looked at
                step = stride(n - 1 - q)
                if (n - 1 - q) % step:
                    weights[q + (n - 1 - q) % step] += weights[q]
                    weights[q] = 0.0
        return weights

    def far_attention(self) -> torch.Tensor:
        """``[H, G, n, n]``: what counts of the attention on keys ``least_window`` tokens before a
        query or more."""
        n, least = self.profile.num_tokens, self.profile.profiling.least_window
        far = torch.arange(n)[:, None] - torch.arange(n) >= least
        return self.probs * torch.tensor(self.weights())[:, None] * far

    def scores(self, head: int) -> list[float]:
        n, half = self.profile.num_tokens, self.profile.profiling.pooling // 2
        weights = torch.tensor(self.weights())
        column = (self.probs[head] * weights[:, None]).sum((0, 1)).tolist()
        if self.profile.config.frequent_score == "mean":
            column = [c / (n - k) for k, c in enumerate(column)]
        return [max(column[max(0, k - half) : k + half + 1]) for k in range(n)]

    def rung(self, hybrid: Hybrid, head: int) -> tuple[set[int], float]:
        """Kept keys and recovery, by an explicit mask."""
        n = self.profile.num_tokens
        if hybrid.full:
            return set(range(n)), 1.0
        least = self.profile.profiling.least_window
        window = max(least, math.ceil(round(hybrid.local * n, 6)))
        sticky = (self.profile.token_classes & hybrid.sticky_kinds) != 0
        recent = torch.arange(n) >= n - window
        score = self.scores(head)
        rest = [p for p in range(n) if not sticky[p] and not recent[p]]
        rest.sort(key=lambda p: (-score[p], p))
        visible = sticky.clone()
        visible[rest[: math.ceil(round(hybrid.frequent * n, 6))]] = True
        distance = torch.arange(n)[:, None] - torch.arange(n)
        weighed = self.probs[head] * torch.tensor(self.weights())[:, None]
        if self.profile.profiling.value_weighting:
            weighed = weighed * self.value[:, head].norm(dim=-1)
        if self.profile.config.group_reduction == "mean":
            weighed = weighed.sum(0, keepdim=True)
        seen = weighed.masked_fill(~(visible | (distance < window)), 0.0)
        reduced = (seen.sum((1, 2)) / weighed.sum((1, 2))).min()
        return set((visible | recent).nonzero().flatten().tolist()), float(reduced)


def stride(distance: int) -> int:
    """Every how manieth query so far from the last one is looked at."""
    step = 1
    while distance >= 128 * step:
        step *= 2
    return step
