"""Per-head KV cache: pages, head block tables, compaction after prefill, eviction in decode."""

from fastgen_vllm.cache.compaction import Compacted, compact
from fastgen_vllm.cache.eviction import DecodeStep, check_pages, plan_decode
from fastgen_vllm.cache.head_tables import HeadTables, OutOfPagesError
from fastgen_vllm.cache.pages import PagePool

__all__ = [
    "Compacted",
    "DecodeStep",
    "HeadTables",
    "OutOfPagesError",
    "PagePool",
    "check_pages",
    "compact",
    "plan_decode",
]
