"""Column sums give the recoveries that explicit masks give."""

import math

import pytest
import torch

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.kernels import reference
from fastgen_vllm.policy import Ladder, ceil_ratio, frequent_keys
from fastgen_vllm.profiler import PromptProfile

LADDER = [
    {"special": True},
    {"punctuation": True, "local": 0.1},
    {"special": True, "frequent": 0.2},
    {"special": True, "frequent": 0.25, "local": 0.3},
]


def profile_of(
    n: int, group: int, threshold: float, chunk: int, **settings: object
) -> tuple[PromptProfile, torch.Tensor]:
    """A random prompt of one layer and two heads, profiled in chunks; and its probabilities."""
    torch.manual_seed(n)
    config = FastGenConfig.from_dict({"ladder": LADDER, **settings})
    query = torch.randn(n, 2, group, 16) * 2
    key, value = torch.randn(n, 2, 16), torch.randn(n, 2, 16)
    special, punctuation = torch.rand(n) < 0.1, torch.rand(n) < 0.1
    ladder = Ladder.from_hybrids(config.hybrids)
    profile = PromptProfile(config, ladder, n, 1, 2, group, special, punctuation, threshold)
    page_table = torch.arange(2)[:, None]
    pages = torch.cat([key, value], dim=-1).transpose(0, 1)
    for start in range(0, n, chunk):
        end = min(start + chunk, n)
        part = query[start:end]
        output = torch.empty_like(part)
        lse = reference.prefill_attention(part, pages, page_table, end, 0.5, output)
        profile.add_chunk(reference, 0, part, pages, page_table, end, lse, 0.5)
    scores = torch.einsum("qhgd,khd->hgqk", query, key) * 0.5
    causal = torch.ones(n, n).tril().bool()
    return profile, scores.masked_fill(~causal, float("-inf")).softmax(-1)


@pytest.mark.parametrize("reduction", ["mean", "min"])
@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 16, 17, 90])
def test_recovery_equals_explicit_masks(n: int, group: int, reduction: str, score: str) -> None:
    profile, probs = profile_of(n, group, 0.6, 32, group_reduction=reduction, frequent_score=score)
    choice = profile.choose()
    column = probs.sum((1, 2))
    if score == "mean":
        column = column / torch.arange(n, 0, -1)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    for head in range(2):
        costs = []
        for rung in [*LADDER, None]:
            if rung is None:
                costs.append((n, 1.0, set(range(n))))
                continue
            window = max(1, math.ceil(round(rung.get("local", 0) * n, 6)))
            sticky = torch.zeros(n, dtype=torch.bool)
            if rung.get("special"):
                sticky |= profile.special
            if rung.get("punctuation"):
                sticky |= profile.punctuation
            recent = torch.arange(n) >= n - window
            rest = [p for p in range(n) if not sticky[p] and not recent[p]]
            rest.sort(key=lambda p: (-float(column[head][p]), p))
            visible = sticky.clone()
            visible[rest[: math.ceil(round(rung.get("frequent", 0) * n, 6))]] = True
            seen = probs[head].masked_fill(~(visible | (distance < window)), 0.0).sum(-1).mean(-1)
            recovery = float(seen.min() if reduction == "min" else seen.mean())
            kept = set((visible | recent).nonzero().flatten().tolist())
            costs.append((len(kept), recovery, kept))
        able = [c for c in costs if c[1] >= 0.6]
        best = min(able, key=lambda c: c[0])
        assert abs(float(choice.recovery[0, head]) - best[1]) < 1e-4
        assert set(choice.kept[0, head].nonzero().flatten().tolist()) == best[2]


@pytest.mark.parametrize("sampling", [1, 3])
def test_chunking_changes_nothing(sampling: int) -> None:
    whole, _ = profile_of(90, 3, 0.6, 90, query_sampling=sampling)
    for chunk in (1, 7, 32):
        parts, _ = profile_of(90, 3, 0.6, chunk, query_sampling=sampling)
        torch.testing.assert_close(parts.mass, whole.mass, rtol=1e-4, atol=1e-5)
        assert torch.equal(parts.choose().policy, whole.choose().policy)


def test_ties_go_to_the_lower_position() -> None:
    candidates = torch.tensor([True, False, True, True, True])
    scores = torch.tensor([1.0, 9.0, 2.0, 2.0, 1.0])
    assert frequent_keys(scores, candidates, 3).tolist() == [True, False, True, True, False]


@pytest.mark.parametrize(("ratio", "n", "expected"), [(3000, 10, 3), (1000, 30, 3), (3000, 11, 4)])
def test_ceil_is_exact(ratio: int, n: int, expected: int) -> None:
    assert ceil_ratio(ratio, n) == expected
