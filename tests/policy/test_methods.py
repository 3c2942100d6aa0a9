"""Each method of the literature is what its paper defines, not just so many keys."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from helpers.observed import random_observed

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import UNBOUNDED
from fastgen_vllm.policy.choice import Choice, Goal, PromptStats, SlotStats, with_sinks
from fastgen_vllm.policy.methods import METHODS
from fastgen_vllm.policy.methods.adakv import SAFEGUARD
from fastgen_vllm.policy.methods.pyramidkv import BETA
from fastgen_vllm.tensors import ceil_ratio

LAYERS, HEADS = 5, 3
PEERS = [name for name in METHODS if name != "fastgen"]
"""Those that count keys; the others count pages."""
PAGE = 16


def value_norms(n: int) -> torch.Tensor:
    return 0.1 + torch.rand(LAYERS, HEADS, n, generator=torch.Generator().manual_seed(n + 1))


def choose(
    method: str,
    n: int,
    budget: float,
    spread: float = 1.0,
    norms: bool = False,
    **settings: Any,
) -> tuple[Choice, torch.Tensor]:
    """The choice of random scores ``[L, H, n]``, some heads' far larger than others', and those."""
    config = FastGenConfig.from_dict({"method": method, "kv_budget": budget, **settings})
    plan = config.plan_for(config.goal)
    generator = torch.Generator().manual_seed(n)
    scores = torch.rand(LAYERS, HEADS, n, generator=generator)
    scores *= torch.logspace(0, spread, HEADS)[:, None]
    none = torch.zeros(n, dtype=torch.uint8)
    classes = with_sinks(none, plan.profiling.num_sinks)
    stats = PromptStats(
        scores[:, :, None, :, None],
        value_norms(n) if norms else torch.ones_like(scores),
        scores,
        scores,
        classes,
        16,
        plan.profiling,
        random_observed(LAYERS, HEADS, 2, n) if METHODS[method].needs_model else None,
    )
    choice = plan.method.choose(plan.ladder, stats, Goal(None, budget))
    return choice, scores


def best(scores: torch.Tensor, count: int) -> set[int]:
    """Positions of the highest, by a plain sort."""
    order = sorted(range(len(scores)), key=lambda p: -float(scores[p]))
    return set(order[:count])


def kept(choice: Choice, layer: int, head: int) -> set[int]:
    return set(choice.kept[layer, head].nonzero().flatten().tolist())


def window_and_best(scores: torch.Tensor, count: int, window: int) -> set[int]:
    n = len(scores)
    return set(range(n - window, n)) | best(scores[: n - window], count - window)


@pytest.mark.parametrize("n", [40, 200, 333])
@pytest.mark.parametrize("budget", [0.2, 0.5])
@pytest.mark.parametrize("method", PEERS)
def test_budget(method: str, budget: float, n: int) -> None:
    choice, _ = choose(method, n, budget)
    config = FastGenConfig(method=method, kv_budget=budget)
    count = max(config.profiling_for(config.goal).window, round(budget * n))
    if method == "h2o":  # it has no observation window to keep
        count = 2 * math.ceil(budget * n / 2 - 1e-9)
    assert float(choice.kept.sum(-1).float().mean()) == pytest.approx(count, abs=0.5)
    assert choice.kept[..., -1].all() and not (choice.sticky & ~choice.kept).any()


@pytest.mark.parametrize("window", [None, 8, 50])
def test_snapkv_keeps_every_heads_best(window: int | None) -> None:
    settings: dict[str, Any] = {} if window is None else {"observation_window": window}
    choice, scores = choose("snapkv", 300, 0.4, **settings)
    for layer in range(LAYERS):
        for head in range(HEADS):
            wanted = window_and_best(scores[layer, head], 120, window or 32)
            assert kept(choice, layer, head) == wanted


@pytest.mark.parametrize(("budget", "n"), [(0.4, 300), (0.8, 300), (0.3, 2000)])
def test_pyramidkv_falls_linearly_with_depth(budget: float, n: int) -> None:
    choice, scores = choose("pyramidkv", n, budget)
    mean = round(budget * n)
    lowest = max(32, mean // BETA, 2 * mean - n)
    counts = choice.kept.sum(-1)
    assert (counts == counts[:, :1]).all(), "the heads of a layer keep as many"
    wanted = [2 * mean - lowest + (2 * lowest - 2 * mean) * i / (LAYERS - 1) for i in range(LAYERS)]
    assert counts[:, 0].tolist() == pytest.approx(wanted, abs=0.51)
    assert counts[0, 0] > counts[-1, 0]
    for layer in range(LAYERS):
        for head in range(HEADS):
            count = int(counts[layer, head])
            assert kept(choice, layer, head) == window_and_best(scores[layer, head], count, 32)


def test_adakv_shares_a_layers_budget_by_its_heads_scores() -> None:
    """Heads of small scores fall to the safeguard, those of large ones get the rest."""
    choice, scores = choose("adakv", 400, 0.3, spread=2.0)
    safe = int(SAFEGUARD * 120)
    counts = choice.kept.sum(-1)
    assert (counts.sum(-1) == 3 * 120).all()
    assert (counts[:, 0] == max(32, safe)).all() and (counts[:, 2] > 180).all()
    for layer in range(LAYERS):
        everything = {
            (head, p)
            for head in range(HEADS)
            for p in window_and_best(scores[layer, head], max(32, safe), 32)
        }
        rest = [
            (float(scores[layer, head, p]), head, p)
            for head in range(HEADS)
            for p in range(400)
            if (head, p) not in everything
        ]
        rest.sort(reverse=True)
        everything |= {(head, p) for _, head, p in rest[: 3 * 120 - len(everything)]}
        found = {(head, p) for head in range(HEADS) for p in kept(choice, layer, head)}
        assert found == everything


def test_tova_gives_all_heads_of_a_layer_the_same_keys() -> None:
    choice, scores = choose("tova", 200, 0.3)
    for layer in range(LAYERS):
        mean = [sum(scores[layer, :, j].tolist()) / HEADS for j in range(200)]
        for head in range(HEADS):
            assert kept(choice, layer, head) == window_and_best(torch.tensor(mean), 60, 1)


@pytest.mark.parametrize("sinks", [None, 0, 10])
def test_streaming_keeps_sinks_and_a_window(sinks: int | None) -> None:
    settings: dict[str, Any] = {} if sinks is None else {"num_sinks": sinks}
    choice, _ = choose("streaming", 200, 0.3, **settings)
    count = 4 if sinks is None else sinks
    wanted = set(range(count)) | set(range(200 - (60 - count), 200))
    assert kept(choice, 2, 1) == wanted
    assert choice.sticky.sum() == count * LAYERS * HEADS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("n", "settings"),
    [(1, {}), (10, {}), (300, {"observation_window": 1000}), (300, {"num_sinks": 400})],
)
def test_prompts_shorter_than_windows_and_sinks(
    method: str, n: int, settings: dict[str, Any]
) -> None:
    """Nothing fails, and the newest token stays in every head."""
    choice, _ = choose(method, n, 0.1, **settings)
    assert choice.kept[..., -1].all()


def test_streaming_keeps_its_budget_with_many_sinks() -> None:
    choice, _ = choose("streaming", 300, 0.1, num_sinks=64)
    assert (choice.kept.sum(-1) == 32).all() and choice.kept[..., -1].all()


def test_random_keeps_its_window_first() -> None:
    choice, _ = choose("random", 300, 0.1)
    assert choice.kept[..., -32:].all()


def test_h2o_keeps_heavy_hitters_and_a_window() -> None:
    choice, scores = choose("h2o", 200, 0.3)
    for head in range(HEADS):
        assert kept(choice, 1, head) == window_and_best(scores[1, head], 60, 30)
    assert choice.rules.keeps_scores.all(), "and goes on so while decoding"


def test_random_looks_at_nothing() -> None:
    choice, _ = choose("random", 300, 0.4)
    again, _ = choose("random", 300, 0.4, spread=3.0)
    assert torch.equal(choice.kept, again.kept), "other scores, the same keys"
    assert choice.kept[..., :4].all() and choice.kept[..., -32:].all()
    middle = choice.kept[..., 4:-32].float()
    assert 0.2 < float(middle.mean()) < 0.5 and not (middle[0] == middle[1]).all()


@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize("budget", [0.15, 0.4, 0.9])
@pytest.mark.parametrize("n", [200, 333])
def test_peaks_are_one_choice_over_all_heads(n: int, budget: float, spread: float) -> None:
    """The highest ranks of all heads together as far as whole pages go, and then full pages."""
    choice, peaks = choose("fastgen", n, budget, spread, norms=True)
    norms = value_norms(n)
    always = {*range(4), *range(n - 32, n)}
    ranks: dict[tuple[int, int], list[float]] = {}
    for layer in range(LAYERS):
        for head in range(HEADS):
            own = peaks[layer, head] * norms[layer, head] / norms[layer, head].mean()
            around = [float(own[max(0, j - 64) : j + 5].max()) for j in range(n)]
            ranks[layer, head] = [float(own[j]) + 0.1 * around[j] for j in range(n)]
    room = int(budget * LAYERS * HEADS * -(-n // PAGE))
    order = sorted(
        ((rank, at, j) for at, of_head in ranks.items() for j, rank in enumerate(of_head)),
        reverse=True,
    )
    counts = dict.fromkeys(ranks, len(always))
    for _, at, j in order:
        more = counts | {at: counts[at] + (j not in always)}
        if sum(-(-count // PAGE) for count in more.values()) > room:
            break
        counts = more
    for (layer, head), of_head in ranks.items():
        count = min(n, -(-counts[layer, head] // PAGE) * PAGE)
        rest = sorted(set(range(n)) - always, key=lambda j: (-of_head[j], j))
        wanted = always | set(rest[: count - len(always)])
        assert kept(choice, layer, head) == wanted
    assert -(-choice.kept.sum(-1) // PAGE).sum() <= room or all(
        count == len(always) for count in counts.values()
    )


def test_a_share_of_pages_is_exact() -> None:
    """0.18 of 20 pages in 15 heads are 54, and in floats a little less."""
    choice, _ = choose("fastgen", 20 * PAGE, 0.18)
    assert (-(-choice.kept.sum(-1) // PAGE)).sum() == 54


def test_peaks_go_on_with_each_heads_share() -> None:
    choice, _ = choose("fastgen", 400, 0.4, 2.0)
    count = choice.kept.sum(-1)
    rules, full = choice.rules, count == 400
    frequent = count - 36  # less sinks and the window
    frequent[frequent < PAGE] = 0  # none was chosen, and the last page is filled
    assert (rules.least_window == torch.where(full, UNBOUNDED, 256)).all()
    assert (rules.local == torch.where(full, 0, 800)).all(), "32 of 400"
    shares = ceil_ratio(rules.frequent, torch.tensor(400))
    assert (shares >= torch.where(full, 0, frequent)).all() and (shares <= frequent + 1).all()
    assert choice.sticky[..., :4].all() and not choice.sticky[..., 4:].any()
    assert (choice.scores[choice.kept & ~choice.sticky] >= 0).all()


@pytest.mark.parametrize("room", [3, 20, 61, 200])
@pytest.mark.parametrize("n", [100, 333])
def test_a_request_that_has_grown_is_chosen_from_by_its_scores(n: int, room: int) -> None:
    """Against plain loops: heads of different lengths, slots in any order, some of them sticky."""
    generator = torch.Generator().manual_seed(n + room)
    config = FastGenConfig(kv_budget=0.3)
    plan = config.plan_for(config.goal)
    lengths = torch.randint(40, n + 1, (LAYERS, HEADS), generator=generator)
    lengths[0, 0] = n
    positions = torch.full((LAYERS, HEADS, n + 9), -1, dtype=torch.int32)
    scores = torch.rand(LAYERS, HEADS, n + 9, generator=generator)
    scores[:, 1] *= 10
    for at in product(range(LAYERS), range(HEADS)):
        held = {*range(4), *range(n - 32, n)}
        rest = torch.randperm(n - 36, generator=generator)[: int(lengths[at]) - 36] + 4
        order = torch.tensor([*held, *rest.tolist()])
        positions[at][: len(order)] = order[torch.randperm(len(order), generator=generator)]
        scores[at][(positions[at] >= 0) & (positions[at] < 4)] = float("inf")
    slots = SlotStats(lengths, positions, scores, n, PAGE)
    assert plan.method.choose_again is not None
    rules, kept = plan.method.choose_again(plan.ladder, slots, room)
    assert kept.shape == scores.shape and not (kept & ~slots.in_use).any()
    wanted, order_of = {}, {}
    for at in product(range(LAYERS), range(HEADS)):
        own = again_ranks(slots, at)
        order_of[at] = sorted(own, key=lambda j: -own[j])
        wanted[at] = sum(rank == float("inf") for rank in own.values())
    best = sorted(
        ((again_ranks(slots, at)[j], at) for at, own in order_of.items() for j in own),
        reverse=True,
        key=lambda each: each[0],
    )
    for rank, at in best:
        if rank == float("inf"):
            continue
        more = wanted | {at: wanted[at] + 1}
        if sum(-(-count // PAGE) for count in more.values()) > room:
            break
        wanted = more
    for at, count in wanted.items():
        filled = min(-(-count // PAGE) * PAGE, int(lengths[at]))
        assert set(kept[at].nonzero().flatten().tolist()) == set(order_of[at][:filled]), at
        full = filled == n
        assert (int(rules.least_window[at]) == UNBOUNDED) == full
    fits = sum(-(-count // PAGE) for count in wanted.values())
    assert fits <= room or all(count == 36 for count in wanted.values())


def again_ranks(slots: SlotStats, at: tuple[int, int]) -> dict[int, float]:
    """Of each slot in use of one head."""
    scores = slots.scores[at].tolist()[: int(slots.lengths[at])]
    own = [0.0 if score == float("inf") else score for score in scores]
    is_new = slots.positions[at] >= slots.num_tokens - 32
    return {
        j: float("inf")
        if is_new[j] or scores[j] == float("inf")
        else own[j] + 0.1 * max(own[max(0, j - 64) : j + 5])
        for j in range(len(own))
    }


def test_no_two_methods_are_the_same() -> None:
    found = {method: choose(method, 300, 0.4)[0].kept for method in METHODS}
    for method, ours in found.items():
        for other, theirs in found.items():
            assert method == other or not torch.equal(ours, theirs), (method, other)


@pytest.mark.parametrize("n", [40, 129, 333, 1000])
@pytest.mark.parametrize("budget", [0.01, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("settings", [{}, {"least_window": 200, "num_sinks": 30}])
def test_room_for_what_is_kept(settings: dict[str, Any], budget: float, n: int) -> None:
    """Pages of a prompt's choice and one more for every head fit the blocks that are set aside."""
    config = FastGenConfig(kv_budget=budget, min_prompt_tokens=30, **settings)
    choice, _ = choose("fastgen", n, budget, spread=3.0, **settings)
    pages = -(-choice.kept.sum(-1) // PAGE) + 1
    most, whole = config.most_blocks(n, config.goal, RequestOverride()), -(-n // PAGE)
    assert most == whole or int(pages.sum()) <= most * LAYERS * HEADS
    assert most < 0.7 * whole or n < 1000 or budget > 0.5, "nothing is saved"
