"""Expected Attention: what queries yet to come, drawn as those of the prompt, will look at."""

from __future__ import annotations

import torch

from fastgen_vllm.policy.choice import Choice, Goal, Profiling, PromptStats
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods.adakv import shared
from fastgen_vllm.policy.methods.method import Method, append_only, keys_per_head, with_window
from fastgen_vllm.policy.observed import NUM_FUTURE, Observed, rotate

EPSILON = 0.01
"""Added to the expected attention. This, Ada-KV's shares for the heads of a layer and the L2 norms
of values are what the authors' own code measures the method with."""


def choose(ladder: Ladder, stats: PromptStats, goal: Goal) -> Choice:
    """Sinks and the newest key stay; the first are no part of the statistics either."""
    num_sinks = min(stats.profiling.num_sinks, keys_per_head(stats, goal) - 1)
    scores = torch.full_like(stats.scores, float("inf"))
    for layer in range(len(scores)):
        attention = expected_attention(stats.seen, layer, num_sinks)
        norms = stats.seen.values[layer, :, num_sinks:].norm(dim=-1)
        scores[layer, :, num_sinks:] = (attention + EPSILON) * norms
    return append_only(ladder, stats, shared(with_window(scores, stats), stats, goal))


def expected_attention(observed: Observed, layer: int, num_sinks: int) -> torch.Tensor:
    """Of the keys after the sinks, the mean over the group: float32 ``[H, n - num_sinks]``.

    A query is normal with mean ``m`` and covariance ``C``, so the mean of ``exp(s q k)`` is
    ``exp(s m k + s^2 k C k / 2)``.
    """
    mean, covariance = future_queries(observed, layer, num_sinks)
    keys, scale = observed.keys[layer, :, None, num_sinks:], observed.scale
    product = (keys @ mean[..., None])[..., 0]
    variance = (keys @ covariance * keys).sum(-1)
    return (scale * product + scale**2 / 2 * variance).softmax(-1).mean(dim=1)


def future_queries(
    observed: Observed, layer: int, num_sinks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean ``[H, G, D]`` and the covariance ``[H, G, D, D]`` of the prompt's queries, turned by
    the mean rotation of the ``NUM_FUTURE`` positions after the prompt."""
    queries = observed.queries_before_rotation(layer)[..., num_sinks:, :]
    mean = queries.mean(dim=-2, keepdim=True)
    centred = queries - mean
    covariance = centred.mT @ centred / queries.shape[-2]
    cos, sin = (table[-NUM_FUTURE:].mean(dim=0) for table in (observed.cos, observed.sin))
    turned = rotate(rotate(covariance, cos, sin).mT, cos, sin)
    return rotate(mean, cos, sin)[..., 0, :], turned


EXPECTED_ATTENTION = Method(
    "expected_attention",
    "arXiv 2510.00636",
    Profiling("last", 1, 1, 1, 4, False),
    choose,
    needs_model=True,
)
