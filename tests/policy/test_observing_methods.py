"""Methods that look at a prompt's queries, keys and output projection are what their papers define:
each is computed here again, one key at a time."""

import math
from typing import Any

import pytest
import torch
from helpers.observed import SIZE, random_observed

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.choice import Choice, Goal, PromptStats, with_sinks
from fastgen_vllm.policy.observed import NUM_FUTURE, Observed

LAYERS, HEADS = 2, 3
CASES = [(group, n, budget) for group in (1, 3, 4) for n, budget in ((90, 0.5), (131, 0.4))]
Keys = set[tuple[int, int, int]]


def choose(method: str, group: int, n: int, budget: float, **how: Any) -> tuple[Choice, Any]:
    config = FastGenConfig.from_dict({"method": method, "kv_budget": budget, **how})
    plan = config.plan_for(config.goal)
    observed = random_observed(LAYERS, HEADS, group, n)
    scores = torch.rand(LAYERS, HEADS, n, generator=torch.Generator().manual_seed(n)) ** 3
    scores *= torch.tensor([0.1, 1.0, 3.0])[:, None]
    none = torch.zeros(n, dtype=torch.uint8)
    stats = PromptStats(
        scores[:, :, None, :, None],
        torch.ones_like(scores),
        scores,
        scores,
        with_sinks(none, plan.profiling.num_sinks),
        16,
        plan.profiling,
        observed,
    )
    choice = plan.method.choose(plan.ladder, stats, Goal(None, budget))
    return choice, stats


def kept(choice: Choice) -> Keys:
    return {(layer, head, j) for layer, head, j in choice.kept.nonzero().tolist()}


def best(scores: dict[Any, float], count: int) -> set[Any]:
    return set(sorted(scores, key=lambda at: -scores[at])[:count])


def attention(observed: Observed, layer: int, head: int, g: int, q: int) -> list[float]:
    """Of one query on the keys up to its own."""
    query = observed.queries[layer, head, g, q].tolist()
    keys = observed.keys[layer, head, : q + 1].tolist()
    scores = [sum(a * b for a, b in zip(query, key, strict=True)) / SIZE**0.5 for key in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def adaptive(scores: dict[tuple[int, int], float], n: int, count: int, least: int) -> Keys:
    """Ada-KV in one layer: (0, head, key)."""
    safe: set[tuple[int, int]] = set()
    for head in range(HEADS):
        safe |= best({(head, j): scores[head, j] for j in range(n)}, least)
    rest = {at: score for at, score in scores.items() if at not in safe}
    chosen = safe | best(rest, HEADS * count - len(safe))
    return {(0, head, j) for head, j in chosen}


@pytest.mark.parametrize(("group", "n", "budget"), CASES)
def test_criticalkv_chooses_in_two_stages(group: int, n: int, budget: float) -> None:
    choice, stats = choose("criticalkv", group, n, budget, observation_window=8)
    count, window, wanted = round(budget * n), 8, set()
    for layer in range(LAYERS):
        of_layer = {
            (head, j): math.inf if j >= n - window else float(stats.scores[layer, head, j])
            for head in range(HEADS)
            for j in range(n)
        }
        shares = adaptive(of_layer, n, count, max(window, int(0.2 * count)))
        for head in range(HEADS):
            own = sum(h == head for _, h, _ in shares)
            scores = {j: of_layer[head, j] for j in range(n)}
            first = best(scores, int(0.5 * own)) | set(range(n - window, n))
            weighed = {}
            for j in set(range(n)) - first:
                norms = stats.observed.output_norms[layer, head, :, j].tolist()
                weighed[j] = (scores[j] / (window * group) + 1e-4) * sum(norms) / group
            chosen = first | best(weighed, own - len(first))
            wanted |= {(layer, head, j) for j in chosen}
    assert kept(choice) == wanted


@pytest.mark.parametrize(("group", "n", "budget"), CASES)
def test_defensivekv_is_one_choice_by_the_worst_case(group: int, n: int, budget: float) -> None:
    window = 8
    choice, stats = choose("defensivekv", group, n, budget, observation_window=window)
    observed, early, count = stats.observed, n - window, round(budget * n)
    scores: dict[tuple[int, int, int], float] = {}
    for layer in range(LAYERS):
        rows = {
            (head, g, q): attention(observed, layer, head, g, q)
            for head in range(HEADS)
            for g in range(group)
            for q in range(n - window, n)
        }
        in_window = sum(sum(row[early:]) for row in rows.values()) / len(rows)
        norms = [
            [sum(observed.output_norms[layer, h, :, j].tolist()) / group for j in range(early)]
            for h in range(HEADS)
        ]
        for head in range(HEADS):
            own = [row[:early] for (h, _, _), row in rows.items() if h == head]
            worst = [0.0] * early
            for row in own:
                pooled = [sum(row[max(0, j - 2) : j + 3]) / 5 for j in range(early)]
                rescaled = [p * sum(row) / sum(pooled) for p in pooled]
                worst = [max(a, b) for a, b in zip(worst, rescaled, strict=True)]
            floor = sum(worst) / early
            mean = [sum(column) for column in zip(*own, strict=True)]
            order, covered, first = sorted(range(early), key=lambda j: -mean[j]), 0.0, set()
            for j in order[: count - window]:
                covered += mean[j] / sum(mean)
                if covered >= 0.9 - in_window:
                    break
                first.add(j)
            for j in range(early):
                share = norms[head][j] / sum(norms[h][j] for h in range(HEADS))
                scores[layer, head, j] = math.inf if j in first else max(worst[j], floor) * share
            scores |= {(layer, head, j): math.inf for j in range(early, n)}
    firsts = sum(map(math.isinf, scores.values()))
    assert LAYERS * HEADS * window < firsts < LAYERS * HEADS * count, "both stages choose"
    assert kept(choice) == best(scores, LAYERS * HEADS * count)
    assert len(set(choice.kept.sum(-1).flatten().tolist())) > 1


@pytest.mark.parametrize(("group", "n", "budget"), CASES)
def test_expected_attention_is_a_normal_querys(group: int, n: int, budget: float) -> None:
    """The closed form, in float64 and with rotations as matrices, then Ada-KV."""
    choice, stats = choose("expected_attention", group, n, budget)
    observed, count, wanted, half = stats.observed, round(budget * n), set(), SIZE // 2

    def rotation(position: int) -> torch.Tensor:
        matrix = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        for i in range(half):
            cos, sin = float(observed.cos[position, i]), float(observed.sin[position, i])
            matrix[i, i] = matrix[i + half, i + half] = cos
            matrix[i, i + half], matrix[i + half, i] = -sin, sin
        return matrix

    future = torch.stack([rotation(p) for p in range(n, n + NUM_FUTURE)]).mean(0)
    for layer in range(LAYERS):
        scores: dict[tuple[int, int], float] = {}
        for head in range(HEADS):
            expected = [0.0] * n
            for g in range(group):
                raw = observed.queries[layer, head, g].double()
                before = torch.stack([rotation(q).T @ raw[q] for q in range(4, n)])
                mean = future @ before.mean(0)
                covariance = future @ before.T.cov(correction=0) @ future.T
                logits = []
                for j in range(4, n):
                    key = observed.keys[layer, head, j].double() / SIZE**0.5
                    logits.append(float(key @ mean + key @ covariance @ key / 2))
                weights = [math.exp(x - max(logits)) for x in logits]
                for j in range(4, n):
                    expected[j] += weights[j - 4] / sum(weights) / group
            norms = observed.values[layer, head].norm(dim=-1).tolist()
            for j in range(n):
                score = (expected[j] + 0.01) * norms[j]
                scores[head, j] = math.inf if j < 4 or j == n - 1 else score
        chosen = adaptive(scores, n, count, max(1, int(0.2 * count)))
        wanted |= {(layer, head, j) for _, head, j in chosen}
    assert kept(choice) == wanted


@pytest.mark.parametrize(("group", "n", "budget"), CASES)
def test_keydiff_keeps_what_is_least_alike(group: int, n: int, budget: float) -> None:
    choice, stats = choose("keydiff", group, n, budget)
    wanted = set()
    for layer in range(LAYERS):
        for head in range(HEADS):
            keys = stats.observed.keys[layer, head].tolist()
            lengths = [math.hypot(*key) for key in keys]
            anchor = [
                sum(key[i] / length for key, length in zip(keys, lengths, strict=True)) / n
                for i in range(SIZE)
            ]
            alike = [
                sum(a * b for a, b in zip(key, anchor, strict=True)) / length
                for key, length in zip(keys, lengths, strict=True)
            ]
            scores = {j: math.inf if j == n - 1 else -alike[j] for j in range(n)}
            wanted |= {(layer, head, j) for j in best(scores, round(budget * n))}
    assert kept(choice) == wanted
