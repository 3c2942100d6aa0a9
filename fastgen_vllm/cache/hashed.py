"""An audit of the prefix cache, for debug mode."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from fastgen_vllm.cache.pages import PagePool

CHECKED = 16
"""Blocks a step."""


class HashedBlocks:
    """What the blocks of the prefix cache hold must not change while they are in it."""

    def __init__(self, pool: PagePool) -> None:
        self._content = pool.kv.view(pool.num_blocks, -1)
        self._known: dict[int, tuple[Hashable, int]] = {}

    def check(self, hashes: Mapping[int, Hashable]) -> None:
        """Remember blocks that are new in the cache, and look at those again that were not looked
        at for longest.

        Args:
            hashes: of every block in the cache, its hash. What it stands for is all there.

        Raises:
            AssertionError: a block has changed.
        """
        for block in [b for b, (of, _) in self._known.items() if hashes.get(b) != of]:
            del self._known[block]
        for block in list(self._known)[:CHECKED]:
            known = self._known.pop(block)
            assert known[1] == self._sum(block), f"block {block} changed while others could hit it"
            self._known[block] = known
        for block in hashes.keys() - self._known.keys():
            self._known[block] = hashes[block], self._sum(block)

    def _sum(self, block: int) -> int:
        return int(self._content[block].contiguous().view(torch.int32).sum())
