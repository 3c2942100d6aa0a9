"""Reference kernels against attention computed the long way."""

import pytest
import torch

from fastgen_vllm import kernels

GROUPS = (1, 3, 4, 7)


def dense_probs(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """``[H, G, c, m]`` in float64, by explicit loops over heads."""
    c, heads, groups, _ = query.shape
    m = key.shape[0]
    causal = torch.ones(c, m).tril(m - c).bool()
    probs = torch.zeros(heads, groups, c, m, dtype=torch.float64)
    for h in range(heads):
        for g in range(groups):
            scores = query[:, h, g].double() @ key[:, h].double().T * scale
            probs[h, g] = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    return probs


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("c", "m"), [(1, 1), (16, 16), (17, 17), (5, 33), (1, 48)])
def test_prefill_and_mass(group: int, c: int, m: int) -> None:
    torch.manual_seed(c * 100 + m)
    query, scale = torch.randn(c, 2, group, 32), 0.3
    key, value = torch.randn(m, 2, 32), torch.randn(m, 2, 32)
    probs = dense_probs(query, key, scale)
    output, lse = kernels.prefill_attention(query, key, value, scale)
    expected = torch.einsum("hgqk,khd->qhgd", probs, value.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)

    bounds = [1, 4, 20]
    distance = torch.arange(m - c, m)[:, None] - torch.arange(m)
    for groups in {1, group}:
        mass = torch.zeros(2, groups, m, 4)
        kernels.attention_mass(query, key, lse, m - c, 1, bounds, scale, mass)
        reduced = probs.sum(1, keepdim=True) if groups == 1 else probs
        for bucket, (low, high) in enumerate([(0, 1), (1, 4), (4, 20), (20, 10**9)]):
            inside = (distance >= low) & (distance < high)
            wanted = reduced.masked_fill(~inside, 0.0).sum(-2)
            torch.testing.assert_close(mass[..., bucket].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", GROUPS)
def test_decode_skips_evicted_slots(group: int, dtype: torch.dtype) -> None:
    """Head lengths from 1 to a page and past it; evicted slots hold NaN."""
    torch.manual_seed(group)
    lengths = [[1, 8], [9, 24], [16, 17]]
    pages = torch.full((40, 8, 2 * 32), float("nan"), dtype=dtype)
    positions = torch.full((40, 8), -1, dtype=torch.int32)
    table = torch.zeros(3, 2, 4, dtype=torch.int32)
    query = torch.randn(3, 2, group, 32, dtype=dtype)
    free = iter(torch.randperm(39).add(1).tolist())
    for n in range(3):
        for h in range(2):
            for index in range(-(-lengths[n][h] // 8)):
                table[n, h, index] = next(free)
            for slot in range(lengths[n][h]):
                if slot % 5 != 3:
                    page = table[n, h, slot // 8]
                    positions[page, slot % 8] = slot
                    pages[page, slot % 8] = torch.randn(64).to(dtype)
    output, probs = kernels.decode_attention(query, pages, positions, table, 0.3)
    for n in range(3):
        for h in range(2):
            own = table[n, h][table[n, h] > 0].long()
            live = positions[own].flatten() >= 0
            key, value = pages[own].flatten(0, 1)[live].double().chunk(2, -1)
            expected = (query[n, h].double() @ key.T * 0.3).softmax(-1)
            torch.testing.assert_close(
                output[n, h].double(), expected @ value, rtol=1e-4, atol=1e-5
            )
            seen = probs[n, h, : len(own)].flatten()
            torch.testing.assert_close(seen[live].double(), expected.sum(0), rtol=1e-4, atol=1e-5)
            assert seen[~live].sum() == 0
