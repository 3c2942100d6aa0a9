"""The KV cache spec and its block manager: fewer blocks for requests that are compressed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from fastgen_vllm.errors import FastGenConfigError

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

REMEMBERED_STEPS = 8
"""More than a report can be late."""


class FastGenBlockManager(FullAttentionManager):
    """Keeps one list entry per ``block_size`` tokens, null where a block was vacated.

    A request is compressed from its first report on. From then on its list grows by a real block
    only where its free pages could run short before the next boundary: within ``block_size``
    tokens a head crosses at most one page boundary, so a block's worth of pages is enough.

    A report may be read some steps after its own, so blocks given and requests preempted since
    then are remembered by step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.free_pages: dict[str, int] = {}
        self.step = 0
        self._given: deque[tuple[int, str, list[int]]] = deque()
        self._left: deque[tuple[int, str]] = deque()
        self.pages_per_block = 0
        """``L * H``; the scheduler sets it, since a spec knows one layer only."""

    def begin_step(self) -> None:
        """The scheduler plans the next step."""
        self.step += 1
        for remembered in (self._given, self._left):
            while remembered and remembered[0][0] <= self.step - REMEMBERED_STEPS:
                remembered.popleft()

    def given_since(self, step: int) -> dict[str, list[int]]:
        """Ids of the blocks that each request was given in steps after ``step``."""
        given: dict[str, list[int]] = {}
        for given_in, request_id, blocks in self._given:
            if given_in > step:
                given.setdefault(request_id, []).extend(blocks)
        return given

    def left_since(self, step: int) -> set[str]:
        """Requests that gave all their blocks back, as preempted ones do, since ``step`` was
        planned: one that left while it was planned is not in its report."""
        return {request_id for left_in, request_id in self._left if left_in >= step}

    def vacate(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Free the blocks that the worker handed back, leaving null blocks in their places."""
        if not block_ids:
            return
        leaving = set(block_ids)
        blocks = self.req_to_blocks[request_id]
        freed = []
        for i, block in enumerate(blocks):
            if block.block_id in leaving and not block.is_null:
                freed.append(block)
                blocks[i] = self._null_block
        assert len(freed) == len(leaving), f"{request_id} vacated blocks that it did not own"
        self.block_pool.free_blocks(reversed(freed))

    def owned_blocks(self, request_id: str) -> list[int]:
        """Ids of the request's real blocks."""
        blocks = self.req_to_blocks.get(request_id, [])
        return [block.block_id for block in blocks if not block.is_null]

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        num_blocks = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        return num_blocks if self._needs_blocks(request_id) else 0

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if self._needs_blocks(request_id):
            new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
            if new_blocks:
                given = [block.block_id for block in new_blocks]
                self._given.append((self.step, request_id, given))
            if request_id in self.free_pages:
                self.free_pages[request_id] += len(new_blocks) * self.pages_per_block
            return new_blocks
        blocks = self.req_to_blocks[request_id]
        missing = max(0, -(-num_tokens // self.block_size) - len(blocks))
        blocks.extend([self._null_block] * missing)
        return [self._null_block] * missing

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.free_pages.pop(request_id, None)
        self._left.append((self.step, request_id))
        return super().pop_blocks_for_free(request_id)

    def _needs_blocks(self, request_id: str) -> bool:
        free_pages = self.free_pages.get(request_id)
        return free_pages is None or free_pages < self.pages_per_block


@register_kv_cache_spec(manager_class=FastGenBlockManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class FastGenSpec(FullAttentionSpec):
    """Full attention whose blocks come back."""

    @classmethod
    def from_spec(cls, spec: AttentionSpec) -> FastGenSpec:
        """Raises:
        FastGenConfigError: the layer's cache is not plain full attention, or quantised, which a
            checkpoint can ask for.
        """
        if spec.dtype not in KV_DTYPES:
            raise FastGenConfigError(
                f"the FASTGEN attention backend does not support a KV cache of {spec.dtype}; "
                "pass --kv-cache-dtype bfloat16"
            )
        plain = type(spec) is FullAttentionSpec and spec.head_size == spec.head_size_v
        if not plain or spec.sliding_window or spec.attention_chunk_size or spec.non_causal:
            raise FastGenConfigError(
                f"the FASTGEN attention backend does not support layers with {spec}; "
                "choose another --attention-backend for this model"
            )
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec)})
