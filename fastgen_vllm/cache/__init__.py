"""Per-head KV cache: pages, head block tables, compaction after prefill, eviction in decode."""

from fastgen_vllm.cache.compaction import Compacted, compact
from fastgen_vllm.cache.eviction import DecodeStep, plan_decode
from fastgen_vllm.cache.head_tables import HeadTables, OutOfPagesError
from fastgen_vllm.cache.pages import PagePool

__all__ = [
    "Compacted",
    "DecodeStep",
    "HeadTables",
    "OutOfPagesError",
    "PagePool",
    "compact",
    "plan_decode",
]
