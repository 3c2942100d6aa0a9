"""FastGen (arXiv 2310.01801) inside vLLM: per-head adaptive KV-cache compression.

Importing the package imports nothing else: the kernels need torch alone, the policies no vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "FastGenConfig": "fastgen_vllm.config",
    "FastGenConfigError": "fastgen_vllm.errors",
    "Hybrid": "fastgen_vllm.policy.hybrids",
    "RequestOverride": "fastgen_vllm.config",
}
__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastgen-vllm")
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
