"""Column sums give the recoveries that explicit masks give, and the choices that follow."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers.observed import observed_on, random_observed
from helpers.pretend_device import DEVICE, pretend_device
from helpers.prompts import PAGE, Prompt

from fastgen_vllm.policy.choice import (
    Choice,
    Goal,
    PromptStats,
    evaluate,
    kept_keys,
    pages_within,
    with_sinks,
)
from fastgen_vllm.policy.hybrids import (
    ADAPTIVE_LADDER,
    PAPER_LADDER,
    Hybrid,
    Ladder,
    hybrids_of,
)
from fastgen_vllm.policy.methods import LADDER, METHODS
from fastgen_vllm.reads import wait_for
from fastgen_vllm.tensors import ceil_ratio


def pages(kept: set[int]) -> int:
    return -(-len(kept) // PAGE)


def keys(kept: torch.Tensor) -> set[int]:
    return set(kept.nonzero().flatten().tolist())


def check_choice(prompt: Prompt, choice: Choice, threshold: float) -> None:
    """The cheapest in pages that reaches the threshold; the best of those; full over a draw."""
    hybrids = prompt.profile.plan.ladder.hybrids
    for head in range(2):
        found = [prompt.rung(h, head) for h in hybrids]
        able = [(pages(k), -r, i) for i, (k, r) in enumerate(found) if r >= threshold]
        able.append((pages(found[-1][0]), -2.0, len(found) - 1))
        _, _, best = min(able)
        taken = hybrids.index(wait_for(hybrids_of(choice.rules))[head])
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
    found = evaluate(prompt.profile.plan.ladder, stats)
    for i, hybrid in enumerate(prompt.profile.plan.ladder.hybrids):
        for head in range(2):
            kept, recovery = prompt.rung(hybrid, head)
            assert int(found.pages[i]) == pages(kept)
            assert abs(float(found.recovery[i, 0, head]) - recovery) < 1e-4
            every = kept_keys(prompt.profile.plan.ladder, stats, torch.full((1, 2), i))
            assert keys(every.kept[0, head]) == kept
    check_choice(prompt, prompt.profile.finish(), 0.6)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("n", [16, 90, 161])
def test_adaptive_ladder(n: int, threshold: float) -> None:
    prompt = Prompt.random(n, 3, Goal(threshold, None), 64, ladder="adaptive")
    assert prompt.profile.plan.ladder.hybrids == ADAPTIVE_LADDER
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
    choice, found = profile.finish(), evaluate(profile.plan.ladder, profile.stats())
    room = int(max(budget, least / 161) * 2 * -(-161 // PAGE))
    taken = [profile.plan.ladder.hybrids.index(h) for h in wait_for(hybrids_of(choice.rules))]
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


@pytest.mark.parametrize(
    ("method", "ladder"), [*((m, None) for m in METHODS), ("fastgen", "adaptive")]
)
def test_choices_on_a_device(method: str, ladder: str | None) -> None:
    how: dict[str, Any] = {"ladder": ladder, "method": method, "kv_budget": 0.4}
    prompt = Prompt.random(200, 3, Goal(None, 0.4), 64, **how)
    profile = prompt.profile
    observed = profile.observed = random_observed(1, 2, 3, 200)
    stats, wanted = profile.stats(), profile.finish()
    with pretend_device():
        plan = profile.config.plan_for(profile.goal, DEVICE)
        names = [f.name for f in fields(PromptStats)]
        there: dict[str, Any] = {
            name: value.to(DEVICE)
            if isinstance(value, torch.Tensor) and name != "on_host"
            else value
            for name, value in ((name, getattr(stats, name)) for name in names)
        }
        there["observed"] = observed_on(observed, DEVICE)
        found = plan.method.choose(plan.ladder, PromptStats(**there), profile.goal)
        for ours, theirs in zip(found.rules.tensors(), wanted.rules.tensors(), strict=True):
            assert torch.equal(ours.cpu(), theirs)
        for name in ("kept", "sticky", "scores"):
            assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name


def test_ties_go_to_the_lower_position() -> None:
    prompt = Prompt.random(10, 1, Goal(0.6, None), 10, ladder=[{"frequent": 0.3}])
    stats = prompt.profile.stats()
    stats.scores[:] = torch.tensor([1.0, 9, 2, 2, 1, 2, 0, 0, 0, 50])
    kept = kept_keys(prompt.profile.plan.ladder, stats, torch.zeros(1, 2, dtype=torch.int64)).kept
    assert keys(kept[0, 0]) == {1, 2, 3, 9}


def test_a_very_long_prompt_keeps_its_share() -> None:
    """Ratios times tokens are more than 32 bits hold."""
    n = 400_000
    ladder = Ladder.from_hybrids([Hybrid(frequent=0.6), Hybrid(full=True)], 1)
    scores = torch.rand(1, 1, n)
    profiling = LADDER.profiling
    none = torch.zeros(n, dtype=torch.uint8)
    stats = PromptStats(scores[:, :, None, :, None], scores, scores, scores, none, 16, profiling)
    kept = kept_keys(ladder, stats, torch.zeros(1, 1, dtype=torch.int64)).kept
    assert int(kept.sum()) == 240_000 + 1


@pytest.mark.parametrize(
    ("share", "num_pages", "expected"),
    [(0.29, 100, 29), (256 / 784, 49 * 90, 1440), (0.35, 49 * 90, 1543), (1.0, 7, 7), (0.1, 9, 0)],
)
def test_share_of_pages_is_exact(share: float, num_pages: int, expected: int) -> None:
    assert pages_within(share, num_pages) == expected


def test_heads_numbers_say_their_policy() -> None:
    hybrids = (*PAPER_LADDER, *ADAPTIVE_LADDER, Hybrid(local=0.25), Hybrid(frequent=0.0001))
    assert wait_for(hybrids_of(Ladder.from_hybrids(hybrids, 64).rules)) == list(hybrids)


@pytest.mark.parametrize(("ratio", "n", "expected"), [(3000, 10, 3), (1000, 30, 3), (3000, 11, 4)])
def test_ceil_is_exact(ratio: int, n: int, expected: int) -> None:
    assert ceil_ratio(ratio, n) == expected
