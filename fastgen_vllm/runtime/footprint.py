"""Memory that FastGen takes beside the KV cache, so that the engine can leave it free."""

from __future__ import annotations

from dataclasses import dataclass

from fastgen_vllm.cache.head_tables import row_bytes, table_entries
from fastgen_vllm.config import FastGenConfig, Plan
from fastgen_vllm.profiler.queries import query_runs
from fastgen_vllm.runtime.runtime import CAPTURED_SPLIT
from fastgen_vllm.tensors import LOGITS_BYTES, MOST_AT_ONCE

SLOT_BYTES = 8
"""A slot's position and score."""

ENTRY_BYTES = 4
"""An entry of the page table."""

KEY_BYTES = 32
"""What a prompt's key takes in a KV head until the prompt is compressed, beside its mass: the
norm of its value, its score and rank, whether it is kept, where it goes."""

AGAIN_BYTES = 40
"""What a key takes while it is decided whether its request still keeps it. Requests are looked at
together that have ``MOST_AT_ONCE`` keys, or one that has more."""

FOUND_BYTES = 12
"""What a look finds of a key, before it is added to what others found."""

SCRATCH_BYTES = 80
"""What a key takes while a prompt's policies are chosen or its metadata is written, beside a copy
of its mass."""


MOST_CACHED_PROMPTS = 2
"""Of prompts that begin in one step and are compressed, so many of the greatest length may be found
in the prefix cache."""


@dataclass(frozen=True)
class Load:
    """What the engine can be asked for at once, in its model's figures.

    Attributes:
        slot_bytes: K and V of one token in one KV head.
        longest: tokens of the longest prompt.
        partial: prompts that can be encoded in part at the same time.
        tokens_per_step: tokens of a batch.
        max_requests: requests of a batch.
        prefix_caching: whether prompts can be found encoded.
    """

    num_layers: int
    num_kv_heads: int
    group_size: int
    slot_bytes: int
    longest: int
    partial: int
    tokens_per_step: int
    max_requests: int
    prefix_caching: bool = False

    @property
    def keys(self) -> int:
        """Keys that one prompt token has, over all layers and KV heads."""
        return self.num_layers * self.num_kv_heads


def for_each_kv_byte(config: FastGenConfig, load: Load) -> float:
    """Bytes of metadata and of the page table for each byte of the KV cache."""
    some_blocks = 1 << 20
    entries = table_entries(some_blocks, 0) / some_blocks
    return (SLOT_BYTES + ENTRY_BYTES * entries / config.block_size) / load.slot_bytes


def for_requests(load: Load) -> int:
    """Bytes of the head tables' rows, of what each can grow by in the page table, and of the slots
    that a step writes to."""
    slot = 8
    entries = ENTRY_BYTES * table_entries(0, load.max_requests)
    return load.keys * ((load.max_requests + 1) * (row_bytes() + slot) + entries)


def for_prompts(config: FastGenConfig, load: Load) -> int:
    """Bytes of the profiles, from a prompt's first chunk until it is compressed.

    Beside prompts that are under way a step can hold other prompts' first chunks, or short ones,
    and what those found in the prefix cache.
    """
    groups = load.group_size if config.group_reduction == "min" else 1
    plans = [config.plan_for(goal) for goal in config.goals]
    mass = 4 * groups * max(len(plan.ladder.windows(load.longest)) + 1 for plan in plans)
    cached = MOST_CACHED_PROMPTS * load.longest if load.prefix_caching else 0
    tokens = load.partial * load.longest + load.tokens_per_step + cached
    one_layer = load.num_kv_heads * load.longest
    together = min(max(MOST_AT_ONCE, one_layer), one_layer * load.num_layers)
    scratch = together * (mass + groups * SCRATCH_BYTES)
    found = FOUND_BYTES * (max(_runs(plan, load.longest) for plan in plans) - 1)
    grows = any(plan.method.choose_again is not None for plan in plans)
    of_one = load.keys * load.longest
    looked_at = max(of_one, min(MOST_AT_ONCE, of_one * load.max_requests))
    again = AGAIN_BYTES * looked_at if grows else 0
    return load.keys * tokens * (mass + found + KEY_BYTES) + again + scratch


def _runs(plan: Plan, num_tokens: int) -> int:
    """In how many runs a prompt's queries are looked at, each of which finds peaks of its own."""
    how = plan.profiling
    return len(query_runs(how.weighting, how.window, 1, num_tokens)[0]) if how.peaks else 1


def for_attention(load: Load, captured: bool = False, gathers: bool = True) -> int:
    """Bytes of one layer's attention: a prompt's K and V, where it ``gathers`` them in order, and
    logits of decoding requests; and those again of captured steps, with what their splits leave."""
    heads = load.num_kv_heads * load.group_size
    of_one = 4 * heads * load.longest
    logits = max(of_one, min(LOGITS_BYTES, of_one * load.max_requests))
    # A split leaves 4 bytes for an element of V, of which a slot has as many as of K, in 16 bits.
    graphs = logits + logits * load.slot_bytes // (4 * CAPTURED_SPLIT) if captured else 0
    gathered = load.num_kv_heads * load.longest * load.slot_bytes if gathers else 0
    return gathered + logits + graphs
