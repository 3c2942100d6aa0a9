"""Per-head KV cache: pages, head block tables, and the compaction of what they hold."""

from fastgen_vllm.cache.compaction import Compacted, compact
from fastgen_vllm.cache.head_tables import HeadTables, OutOfPagesError, check_pages
from fastgen_vllm.cache.pages import PagePool

__all__ = ["Compacted", "HeadTables", "OutOfPagesError", "PagePool", "check_pages", "compact"]
