"""The choice among implementations of the operations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.kernels.contract import Selected

if TYPE_CHECKING:
    from fastgen_vllm.config import KernelChoice


def select(
    choice: KernelChoice,
    device_type: str,
    head_size: int,
    dtype: torch.dtype,
    group_size: int = 1,
) -> Selected:
    """The implementation for a cache of this device, head size and dtype, and its query heads.

    Args:
        choice: ``auto``, ``native``, ``cuda`` (decode attention in CUDA C++, the rest in Triton),
            or ``reference``.
        group_size: query heads per KV head.

    Raises:
        FastGenConfigError: ``native`` or ``cuda`` was asked for and cannot serve this cache.
    """
    reference = _module("reference")
    if choice == "reference":
        return Selected(reference, "fastgen.kernels is 'reference'")
    kernels = _compiled(device_type, choice)
    if kernels is None:
        problem = f"there are none for {device_type}"
    else:
        problem = kernels.problem(head_size, dtype, group_size)
        if not problem:
            return Selected(kernels, "")
    if choice != "auto":
        raise FastGenConfigError(
            f"fastgen.kernels: '{choice}' was asked for, but {problem}; "
            "set it to 'auto' to run what serves this cache"
        )
    return Selected(reference, problem)


def _compiled(device_type: str, choice: KernelChoice) -> Any:
    """The module of compiled kernels for a device, whether or not they can serve a cache."""
    if device_type == "cpu" and choice != "cuda":
        return _module("cpu")
    if device_type == "cuda":
        return _module("cuda" if choice == "cuda" else "triton")
    return None


def _module(name: str) -> Any:
    return importlib.import_module(f"fastgen_vllm.kernels.{name}")
