"""The audit of the prefix cache: it must see what it is there for."""

import pytest
import torch

from fastgen_vllm.cache.hashed import CHECKED, HashedBlocks
from fastgen_vllm.cache.pages import PagePool


def test_a_change_is_noticed() -> None:
    pool = PagePool.over(torch.zeros(40, 1, 2, 8, 4))
    audit, hashes = HashedBlocks(pool), {b: f"hash {b}" for b in range(1, 40)}
    audit.check(hashes)
    pool.kv.view(40, -1)[17, 3] = 1.0
    with pytest.raises(AssertionError, match="block 17 changed"):
        for _ in range(40 // CHECKED + 1):
            audit.check(hashes)


@pytest.mark.parametrize("back_as", [None, "another"])
def test_what_left_the_cache_may_change(back_as: str | None) -> None:
    pool = PagePool.over(torch.zeros(4, 1, 2, 8, 4, dtype=torch.bfloat16))
    audit = HashedBlocks(pool)
    audit.check({1: "a", 2: "b"})
    pool.kv.view(4, -1)[1] = 1.0
    audit.check({2: "b", **({1: back_as} if back_as else {})})
    audit.check({1: "a", 2: "b"})
