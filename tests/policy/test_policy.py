"""Column sums give the recoveries that explicit masks give, and the choices that follow."""

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from helpers.pretend_device import DEVICE, pretend_device

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.kernels import PromptKeys, reference
from fastgen_vllm.policy.choice import (
    Choice,
    Goal,
    PromptStats,
    evaluate,
    kept_keys,
    with_sinks,
)
from fastgen_vllm.policy.hybrids import (
    ADAPTIVE_LADDER,
    PAPER_LADDER,
    Hybrid,
    Ladder,
    hybrids_of,
)
from fastgen_vllm.policy.methods import METHODS
from fastgen_vllm.profiler.profile import ModelHeads, PromptChunk, PromptProfile
from fastgen_vllm.tensors import ceil_ratio

LADDER = [
    {"special": True},
    {"punctuation": True, "local": 0.1},
    {"special": True, "frequent": 0.2},
    {"special": True, "frequent": 0.25, "local": 0.3},
]
PAGE = 4


@dataclass
class Prompt:
    """A random prompt of one layer and two heads, profiled in chunks; ``probs [H, G, n, n]``."""

    profile: PromptProfile
    probs: torch.Tensor
    value: torch.Tensor

    @classmethod
    def random(
        cls, n: int, group: int, goal: Goal, chunk: int, peaked: float = 2.0, **settings: Any
    ) -> "Prompt":
        torch.manual_seed(n)
        config = FastGenConfig.from_dict({"ladder": LADDER, "min_prompt_tokens": 1, **settings})
        query = torch.randn(n, 2, group, 16) * peaked
        key, value = torch.randn(n, 2, 16), torch.randn(n, 2, 16)
        classes = (torch.rand(n) < 0.1).to(torch.uint8) + 2 * (torch.rand(n) < 0.1).to(torch.uint8)
        ladder, heads = config.ladder_on(), ModelHeads(1, 2, group)
        profile = PromptProfile(config, ladder, heads, classes, PAGE, goal)
        page_table = torch.arange(2)[:, None]
        pages = torch.cat([key, value], dim=-1).transpose(0, 1)
        for start in range(0, n, chunk):
            end = min(start + chunk, n)
            part = query[start:end]
            output = torch.empty_like(part)
            keys = PromptKeys(pages, page_table, end)
            lse = reference.prefill_attention(part, keys, 0.5, output)
            chunk_of_layer = PromptChunk(part, value[start:end], keys, lse, 0.5)
            profile.add_chunk(reference, 0, chunk_of_layer)
        scores = torch.einsum("qhgd,khd->hgqk", query, key) * 0.5
        causal = torch.ones(n, n).tril().bool()
        return cls(profile, scores.masked_fill(~causal, float("-inf")).softmax(-1), value)

    def weights(self) -> list[float]:
        how = self.profile.config.profiling
        n = self.profile.num_tokens
        by_distance = {
            "uniform": lambda d: 1.0,
            "recent": lambda d: min(1.0, how.window / d),
            "last": lambda d: float(d <= how.window),
        }[how.weighting]
        weights = [by_distance(n - q) for q in range(n)]
        if how.weighting == "recent":
            for q in range(n):  # far queries are counted by the next one that is looked at
                step = stride(n - 1 - q)
                if (n - 1 - q) % step:
                    weights[q + (n - 1 - q) % step] += weights[q]
                    weights[q] = 0.0
        return weights

    def scores(self, head: int) -> list[float]:
        n, half = self.profile.num_tokens, self.profile.config.profiling.pooling // 2
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
        least = self.profile.config.profiling.least_window
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
        if self.profile.config.profiling.value_weighting:
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


def pages(kept: set[int]) -> int:
    return -(-len(kept) // PAGE)


def keys(kept: torch.Tensor) -> set[int]:
    return set(kept.nonzero().flatten().tolist())


def check_choice(prompt: Prompt, choice: Choice, threshold: float) -> None:
    """The cheapest in pages that reaches the threshold; the best of those; full over a draw."""
    hybrids = prompt.profile.ladder.hybrids
    for head in range(2):
        found = [prompt.rung(h, head) for h in hybrids]
        able = [(pages(k), -r, i) for i, (k, r) in enumerate(found) if r >= threshold]
        able.append((pages(found[-1][0]), -2.0, len(found) - 1))
        _, _, best = min(able)
        taken = hybrids.index(hybrids_of(choice.rules)[head])
        kept, recovery = found[taken]
        assert abs(float(choice.recovery[0, head]) - recovery) < 1e-4
        assert keys(choice.kept[0, head]) == kept
        if taken != best:  # a near-tie in recovery
            assert pages(kept) == pages(found[best][0])
            assert abs(recovery - found[best][1]) < 1e-4


@pytest.mark.parametrize("reduction", ["mean", "min"])
@pytest.mark.parametrize(
    "how",
    [
        {"frequent_score": "sum"},
        {"frequent_score": "mean"},
        {
            "query_weighting": "recent",
            "observation_window": 8,
            "score_pooling": 5,
            "least_window": 6,
        },
        {"query_weighting": "last", "observation_window": 20, "score_pooling": 3},
    ],
)
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 16, 17, 90])
def test_recovery_equals_explicit_masks(n: int, group: int, reduction: str, how: dict) -> None:
    prompt = Prompt.random(n, group, Goal(0.6, None), 32, group_reduction=reduction, **how)
    stats = prompt.profile.stats()
    found = evaluate(prompt.profile.ladder, stats)
    for i, hybrid in enumerate(prompt.profile.ladder.hybrids):
        for head in range(2):
            kept, recovery = prompt.rung(hybrid, head)
            assert int(found.pages[i]) == pages(kept)
            assert abs(float(found.recovery[i, 0, head]) - recovery) < 1e-4
            every = kept_keys(prompt.profile.ladder, stats, torch.full((1, 2), i))
            assert keys(every.kept[0, head]) == kept
    check_choice(prompt, prompt.profile.finish(), 0.6)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("n", [16, 90, 161])
def test_adaptive_ladder(n: int, threshold: float) -> None:
    prompt = Prompt.random(n, 3, Goal(threshold, None), 64, ladder="adaptive")
    assert prompt.profile.ladder.hybrids == ADAPTIVE_LADDER
    choice = prompt.profile.finish()
    check_choice(prompt, choice, threshold)


@pytest.mark.parametrize("ladder", ["adaptive", "paper"])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("least", [1, 64])
def test_budget_is_kept_and_well_spent(least: int, budget: float, ladder: str) -> None:
    """No more than the budget, or than ``least_tokens`` need; and no exchange between the two heads
    would recover more."""
    how: dict[str, Any] = {"ladder": ladder, "frequent_score": "sum"}
    prompt = Prompt.random(161, 3, Goal(None, budget, least), 64, **how)
    profile = prompt.profile
    choice, found = profile.finish(), evaluate(profile.ladder, profile.stats())
    room = int(max(budget, least / 161) * 2 * -(-161 // PAGE))
    taken = [profile.ladder.hybrids.index(h) for h in hybrids_of(choice.rules)]
    assert int(found.pages[taken].sum()) <= room or taken == [0, 0]
    first, second = (found.recovery[:, 0, head].double() for head in range(2))
    fits = found.pages[:, None] + found.pages <= room
    best = torch.where(fits, first[:, None] + second, 0.0).max()
    got = float(choice.recovery.sum())
    # The relaxation can miss the optimum by at most what one head's last page was worth.
    steps = torch.stack([first, second]).sort(dim=1).values.diff(dim=1).max()
    assert got >= float(best) - float(steps), (got, float(best))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_special_tokens_do_not_undo_a_budget(share: float) -> None:
    """A prompt full of them keeps the budget; one with some keeps all of them."""
    prompt = Prompt.random(400, 3, Goal(None, 0.5), 100, ladder="adaptive")
    profile = prompt.profile
    special = torch.rand(400, generator=torch.Generator().manual_seed(0)) < share
    profile.token_classes = with_sinks(special.to(torch.uint8), profile.profiling.num_sinks)
    choice = profile.finish()
    kept_pages = -(-choice.kept.sum(-1) // PAGE)
    assert int(kept_pages.sum()) <= 0.5 * 2 * 100
    assert choice.kept[..., :4].all() and choice.sticky[..., :4].all()
    assert (choice.kept | ~special).all() == (share < 0.5)
    assert (choice.sticky[..., 4:].any()) == (share < 0.5), "else they compete like others"


@pytest.mark.parametrize("method", [*METHODS])
def test_choices_on_a_device(method: str) -> None:
    how: dict[str, Any] = {"ladder": "adaptive", "method": method, "kv_budget": 0.4}
    prompt = Prompt.random(200, 3, Goal(None, 0.4), 64, **how)
    profile = prompt.profile
    stats, wanted = profile.stats(), profile.finish()
    with pretend_device():
        ladder = profile.config.ladder_on(DEVICE)
        names = [f.name for f in fields(PromptStats)]
        there: dict[str, Any] = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for name, value in ((name, getattr(stats, name)) for name in names)
        }
        found = METHODS[method].choose(ladder, PromptStats(**there), profile.goal)
        for ours, theirs in zip(found.rules.tensors(), wanted.rules.tensors(), strict=True):
            assert torch.equal(ours.cpu(), theirs)
        assert torch.equal(found.kept.cpu(), wanted.kept)


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
        assert hybrids_of(parts.finish().rules) == hybrids_of(whole.finish().rules)


def test_ties_go_to_the_lower_position() -> None:
    prompt = Prompt.random(10, 1, Goal(0.6, None), 10, ladder=[{"frequent": 0.3}])
    stats = prompt.profile.stats()
    stats.scores[:] = torch.tensor([1.0, 9, 2, 2, 1, 2, 0, 0, 0, 50])
    kept = kept_keys(prompt.profile.ladder, stats, torch.zeros(1, 2, dtype=torch.int64)).kept
    assert keys(kept[0, 0]) == {1, 2, 3, 9}


def test_heads_numbers_say_their_policy() -> None:
    hybrids = (*PAPER_LADDER, *ADAPTIVE_LADDER, Hybrid(local=0.25), Hybrid(frequent=0.0001))
    assert hybrids_of(Ladder.from_hybrids(hybrids, 64).rules) == list(hybrids)


@pytest.mark.parametrize(("ratio", "n", "expected"), [(3000, 10, 3), (1000, 30, 3), (3000, 11, 4)])
def test_ceil_is_exact(ratio: int, n: int, expected: int) -> None:
    assert ceil_ratio(ratio, n) == expected
