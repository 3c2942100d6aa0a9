"""The prefill hook: what is gathered does not depend on how a prompt is cut into chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.prompts import Prompt

from fastgen_vllm.kernels import Kernels, cpu, reference, triton
from fastgen_vllm.policy.choice import Goal
from fastgen_vllm.policy.hybrids import hybrids_of
from fastgen_vllm.profiler.queries import THINNED_FROM, query_runs
from fastgen_vllm.reads import wait_for


@pytest.mark.parametrize("sampling", [1, 3])
@pytest.mark.parametrize("weighting", ["uniform", "recent", "last"])
def test_chunking_changes_nothing(sampling: int, weighting: str) -> None:
    how: dict[str, Any] = {
        "query_sampling": sampling,
        "query_weighting": weighting,
        "observation_window": 10,
    }
    goal = Goal(0.6, None)
    whole = Prompt.random(90, 3, goal, 90, **how).profile
    for chunk in (1, 7, 32):
        parts = Prompt.random(90, 3, goal, chunk, **how).profile
        torch.testing.assert_close(parts.mass, whole.mass, rtol=1e-4, atol=1e-5)
        assert wait_for(hybrids_of(parts.finish().rules)) == wait_for(
            hybrids_of(whole.finish().rules)
        )


@pytest.mark.parametrize("kernels", [cpu, triton], ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    "how",
    [
        {"query_sampling": 4},
        {"query_sampling": 16, "query_weighting": "uniform"},
        {"query_weighting": "recent", "observation_window": 256},
    ],
)
def test_queries_that_stand_for_many(kernels: Kernels, how: dict[str, Any]) -> None:
    """Their weights are above 1, in every implementation."""
    assert cpu.problem(16, torch.float32) == "", "the extension must be built to test it"
    found = [
        Prompt.random(300, 3, Goal(None, 0.3), 100, kernels=k, **how).profile.stats()
        for k in (kernels, reference)
    ]
    assert query_runs("recent", 256, 1, 300)[1].max() > 1
    for name in ("mass", "scores", "sums"):
        ours, wanted = (getattr(stats, name) for stats in found)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighting", ["end", "last"])
@pytest.mark.parametrize("n", [1, 20, 90, 300])
def test_peaks_over_chunks(n: int, weighting: str) -> None:
    """The most that each key received of one of the last queries, and the sum, however the prompt
    is cut."""
    goal = Goal(None, 0.5)
    how: dict[str, Any] = {"ladder": None, "least_window": 10, "query_weighting": weighting}
    for chunk in (1, 7, 32, 90):
        prompt = Prompt.random(n, 3, goal, chunk, num_sinks=0, **how)
        looked_at = prompt.far_attention()
        wanted = torch.stack([looked_at.amax(dim=(1, 2)), looked_at.sum(dim=(1, 2))])
        torch.testing.assert_close(prompt.profile.peaks[:, 0], wanted, rtol=1e-5, atol=1e-6)
        assert n < 10 or bool(wanted.any())


@pytest.mark.parametrize("cached", [1, 16, 172])
@pytest.mark.parametrize("chunk", [1, 50, 300])
def test_tokens_that_are_found_encoded(cached: int, chunk: int) -> None:
    """A prompt whose first tokens are cached is profiled as one that is computed."""
    goal = Goal(None, 0.3)
    how: dict[str, Any] = {"ladder": None}
    ours, whole = (
        Prompt.random(300, 3, goal, chunk, cached=found, **how).profile for found in (cached, 0)
    )
    torch.testing.assert_close(ours.value_norms, whole.value_norms)
    torch.testing.assert_close(ours.peaks, whole.peaks)
    assert torch.equal(ours.finish().kept, whole.finish().kept)


@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("weighting", ["uniform", "recent", "last", "end"])
def test_every_query_counts_once(weighting: Any, n: int) -> None:
    """Those that are looked at stand for the others, so that the weights' sum is the same."""
    runs, weights = query_runs(weighting, 20, 1, n, system=n - 50)
    looked_at = [q for run in runs for q in range(run.first, run.end, run.step)]
    assert len(set(looked_at)) == len(looked_at)
    assert sorted(looked_at) == weights.nonzero().flatten().tolist()
    by_distance = {
        "uniform": lambda d: 1.0,
        "recent": lambda d: min(1.0, 20 / d),
        "last": lambda d: float(d <= 20),
        "end": lambda d: (d <= 128) * min(1.0, 20 / d) * (1 if d <= 50 else 0.2),
    }[weighting]
    assert float(weights.sum()) == pytest.approx(sum(by_distance(n - q) for q in range(n)))
    if weighting != "last":
        near = range(max(0, n - THINNED_FROM), n)
        assert set(near) <= set(looked_at), "every near query is looked at"
