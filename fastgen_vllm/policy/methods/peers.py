"""Other methods of the literature, on the same profile, kernels and memory accounting.

They are here to be compared with at an equal share of the KV cache, as their papers define them;
``FastGenConfig.profiling`` gives each the queries and pooling of its paper. Each takes the engine's
ladder (rung 0 says how its heads go on while decoding, ``full`` keeps all that is generated), the
prompt's statistics and the budget.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastgen_vllm.policy.choice import Choice, Ladder, PromptStats, kept_keys

NUM_SINKS = 4
OBSERVATION = 32
PYRAMID_BETA = 20
ADA_SAFEGUARD = 0.2


def streaming(ladder: Ladder, stats: PromptStats, budget: float) -> Choice:
    """StreamingLLM (arXiv 2309.17453): attention sinks and a window."""
    n = stats.scores.shape[-1]
    position = torch.arange(n, device=stats.scores.device)
    sinks = (position < NUM_SINKS).expand(stats.scores.shape)
    window = _count(budget, n) - NUM_SINKS
    choice = kept_keys(ladder, stats, _rung_zero(stats))
    return Choice(choice.policy, choice.recovery, sinks | (position >= n - window), sinks)


def h2o(ladder: Ladder, stats: PromptStats, budget: float) -> Choice:
    """H2O (arXiv 2306.14048): half heavy hitters by cumulative attention, half recent keys."""
    return kept_keys(ladder, stats, _rung_zero(stats))


def snapkv(ladder: Ladder, stats: PromptStats, budget: float) -> Choice:
    """SnapKV (arXiv 2404.14469): the keys that the last queries look at, the same in every head."""
    scores = _with_observation(stats)
    return _append_only(stats, _top(scores, _count(budget, scores.shape[-1])))


def pyramidkv(ladder: Ladder, stats: PromptStats, budget: float) -> Choice:
    """PyramidKV (arXiv 2406.02069): SnapKV with budgets that fall linearly with depth."""
    scores = _with_observation(stats)
    layers, _, n = scores.shape
    count = _count(budget, n)
    lowest = max(OBSERVATION, count // PYRAMID_BETA, 2 * count - n)
    counts = torch.linspace(2 * count - lowest, lowest, layers).round().int().tolist()
    return _append_only(
        stats, torch.stack([_top(s, c) for s, c in zip(scores, counts, strict=True)])
    )


def adakv(ladder: Ladder, stats: PromptStats, budget: float) -> Choice:
    """Ada-KV (arXiv 2407.11550): a layer's budget goes to the highest scores of all its heads."""
    scores = _with_observation(stats)
    layers, heads, n = scores.shape
    count = _count(budget, n)
    safe = _top(scores, max(OBSERVATION, int(ADA_SAFEGUARD * count)))
    shared = scores.masked_fill(safe, float("inf")).flatten(1)
    return _append_only(stats, _top(shared, count * heads).view(layers, heads, n))


def random(ladder: Ladder, stats: PromptStats, budget: float) -> Choice:
    """Sinks, the last keys, and a fixed random choice of the others: what any method must beat."""
    n = stats.scores.shape[-1]
    scores = torch.rand(stats.scores.shape, generator=torch.Generator().manual_seed(n))
    scores = scores.to(stats.scores.device)
    scores[..., n - OBSERVATION :] = float("inf")
    scores[..., :NUM_SINKS] = float("inf")
    return _append_only(stats, _top(scores, _count(budget, n)))


PEERS: dict[str, Callable[[Ladder, PromptStats, float], Choice]] = {
    "streaming": streaming,
    "h2o": h2o,
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "adakv": adakv,
    "random": random,
}


def _count(budget: float, num_tokens: int) -> int:
    """Keys a head may keep; the observation window's are never in question."""
    return min(num_tokens, max(OBSERVATION, round(budget * num_tokens)))


def _rung_zero(stats: PromptStats) -> torch.Tensor:
    return torch.zeros(stats.scores.shape[:2], dtype=torch.int64, device=stats.scores.device)


def _with_observation(stats: PromptStats) -> torch.Tensor:
    """The scores, with the observation window's own keys ahead of all."""
    scores = stats.scores.clone()
    scores[..., -OBSERVATION:] = float("inf")
    return scores


def _top(scores: torch.Tensor, count: int) -> torch.Tensor:
    best = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def _append_only(stats: PromptStats, kept: torch.Tensor) -> Choice:
    """``full`` is the only rung: whatever is generated stays."""
    policy = _rung_zero(stats)
    return Choice(policy, torch.ones(policy.shape), kept, torch.zeros_like(kept))
