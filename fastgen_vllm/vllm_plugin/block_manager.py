"""The KV cache spec and its block manager: fewer blocks for requests that are compressed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec
from vllm.v1.request import Request

from fastgen_vllm.cache.head_tables import MOST_SHARED
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.policy.choice import Goal

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

REMEMBERED_STEPS = 8
"""More than a report can be late."""


@dataclass(frozen=True)
class Prompt:
    """What the scheduler expects of a prompt from its look-up on.

    Attributes:
        num_tokens: with what was generated before a preemption.
        serves_others: its full blocks go into the prefix cache.
        targets: blocks that it is compacted into, so that its own stay as they are; 0 where they
            may change, or where all of it is kept for good.
        cached: tokens that it takes from the cache.
        squeezed: what it is compacted to where blocks run short; None where it is not.
    """

    num_tokens: int
    serves_others: bool
    targets: int = 0
    cached: int = 0
    squeezed: Goal | None = None


class FastGenBlockManager(FullAttentionManager):
    """Keeps one list entry per ``block_size`` tokens, null where a block was vacated.

    A request is compressed from its first report on. From then on its list grows by a real block
    only where its free pages could run short before the next boundary: within ``block_size``
    tokens a head crosses at most one page boundary, so a block's worth of pages is enough.

    A report may be read some steps after its own, so blocks given and requests preempted since
    then are remembered by step.

    With prefix caching, a prompt's blocks serve others, so the step in which it ends gives it
    further blocks to be compacted into; then its own go to the free list with their hashes. Where
    the pool has too few, and nobody shares its blocks, they lose their hashes and it is compacted
    in place.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.free_pages: dict[str, int] = {}
        self.prompts: dict[str, Prompt] = {}
        self.targets: dict[str, list[KVCacheBlock]] = {}
        """Given, and not yet reported of."""
        self.squeezing: dict[str, int] = {}
        """Blocks that are to come from requests which are squeezed, until their report is read."""
        self.reserve = 0
        """Blocks that newcomers leave for those that decode, which would be squeezed for them. The
        scheduler sets it."""
        self.most_cached_tokens = 0
        """Prompts that begin in one step and are compressed, then or later, take no more tokens
        from the cache together, or are alone: profiles take memory for all tokens of theirs. The
        scheduler sets it."""
        self._cached_tokens = 0
        self._hashed: dict[str, set[int]] = {}
        self.is_planning = False
        self.step = 0
        self._given: deque[tuple[int, str, list[int]]] = deque()
        self._left: deque[tuple[int, str]] = deque()
        self.pages_per_block = 0
        """``L * H``; the scheduler sets it, since a spec knows one layer only."""

    def begin_step(self) -> None:
        """The scheduler plans the next step."""
        self.step += 1
        self._cached_tokens = 0
        self._hashed.clear()
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
        """Free the blocks that the worker handed back, leaving null blocks in their places; then
        those of its targets that it uses take some of these."""
        if not block_ids:
            return
        leaving = set(block_ids)
        blocks, targets = self.req_to_blocks[request_id], self.targets.pop(request_id, [])
        freed = []
        for i, block in enumerate(blocks):
            if block.block_id in leaving and not block.is_null:
                freed.append(block)
                blocks[i] = self._null_block
        unused = [block for block in targets if block.block_id in leaving]
        assert len(freed) + len(unused) == len(leaving), (
            f"{request_id} vacated blocks that it did not own"
        )
        self.block_pool.free_blocks([*reversed(freed), *unused])
        if targets:
            used = [block for block in targets if block.block_id not in leaving]
            places = [i for i, block in enumerate(blocks) if block.is_null]
            for i, block in zip(places, used, strict=False):
                blocks[i] = block

    def owned_blocks(self, request_id: str) -> list[int]:
        """Ids of the request's real blocks."""
        blocks = [*self.req_to_blocks.get(request_id, []), *self.targets.get(request_id, [])]
        return [block.block_id for block in blocks if not block.is_null]

    @property
    def can_lend(self) -> int:
        """Blocks that requests which keep their prompt whole may still share: see
        ``cache.head_tables.MOST_SHARED``."""
        whole = (prompt for prompt in self.prompts.values() if not prompt.targets)
        borrowed = sum(prompt.cached for prompt in whole) // self.block_size
        return (MOST_SHARED - 1) * self.block_pool.num_gpu_blocks - borrowed

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if not self._needs_blocks(request_id):
            return 0
        num_blocks = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        if self._must_wait(request_id):
            return self.block_pool.num_gpu_blocks  # more than there can be
        if not self.req_to_blocks.get(request_id):
            num_blocks += self.reserve
        targets = self._num_targets(request_id, num_tokens)
        spare = self.block_pool.get_num_free_blocks() - num_blocks
        if targets and (targets <= spare or self._is_shared(request_id, new_computed_blocks)):
            return num_blocks + targets
        return num_blocks

    def _must_wait(self, request_id: str) -> bool:
        """Whether the step's prompts take as much from the cache as they may."""
        prompt = self.prompts.get(request_id)
        if prompt is None or not prompt.targets or request_id in self.num_cached_block:
            return False
        most = max(0, self.most_cached_tokens - self._cached_tokens)
        return self._cached_tokens > 0 and prompt.cached > most

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        prompt = self.prompts.get(request_id)
        if prompt is not None and prompt.targets:
            self._cached_tokens += prompt.cached

    def _num_targets(self, request_id: str, num_tokens: int) -> int:
        """Blocks to give it beside those for its tokens, if the pool has as many."""
        prompt = self.prompts.get(request_id)
        if prompt is None or request_id in self.targets or request_id in self.free_pages:
            return 0
        return prompt.targets if num_tokens >= prompt.num_tokens else 0

    def _is_shared(self, request_id: str, hits: Sequence[KVCacheBlock]) -> bool:
        """Whether others read its blocks, or those that it hits."""
        own = self.req_to_blocks.get(request_id, ())
        return any(block.ref_cnt > 1 for block in own) or any(block.ref_cnt for block in hits)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if self._needs_blocks(request_id):
            new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
            self._give_targets(request_id, self._num_targets(request_id, num_tokens))
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

    def _give_targets(self, request_id: str, count: int) -> None:
        if not count:
            return
        is_shared = self._is_shared(request_id, ())
        if count + self.reserve * (not is_shared) <= self.block_pool.get_num_free_blocks():
            self.targets[request_id] = self.block_pool.get_new_blocks(count)
            return
        assert not is_shared, f"{request_id} got too few blocks"
        self.block_pool.evict_blocks(set(self.owned_blocks(request_id)))
        alone = replace(self.prompts[request_id], serves_others=False, targets=0)
        self.prompts[request_id] = alone

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Blocks of the prompt only: while decoding, a page holds whatever its head keeps."""
        request_id, blocks = request.request_id, self.req_to_blocks[request.request_id]
        prompt = self.prompts.get(request_id)
        if prompt is None or not prompt.serves_others:
            return
        before = self.num_cached_block.get(request_id, 0)
        super().cache_blocks(request, min(num_tokens, prompt.num_tokens), *args, **kwargs)
        new = blocks[before : self.num_cached_block.get(request_id, 0)]
        self._hashed.setdefault(request_id, set()).update(block.block_id for block in new)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Preempted after it was planned in the same step: what it was to compute never comes.
        if self.is_planning:
            self.block_pool.evict_blocks(self._hashed.pop(request_id, set()))
        for known in (self.free_pages, self.prompts, self.squeezing):
            known.pop(request_id, None)
        self._left.append((self.step, request_id))
        targets = self.targets.pop(request_id, [])
        return [*super().pop_blocks_for_free(request_id), *targets]

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
                "pass --kv-cache-dtype with the model's, float16 or bfloat16"
            )
        plain = type(spec) is FullAttentionSpec and spec.head_size == spec.head_size_v
        if not plain or spec.sliding_window or spec.attention_chunk_size or spec.non_causal:
            raise FastGenConfigError(
                f"the FASTGEN attention backend does not support layers with {spec}; "
                "choose another --attention-backend for this model"
            )
        return cls(**{f.name: getattr(spec, f.name) for f in fields(spec)})
