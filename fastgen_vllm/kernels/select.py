"""The choice among implementations of the operations."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from fastgen_vllm.basics import FastGenConfigError

if TYPE_CHECKING:
    from fastgen_vllm.config import KernelChoice

Kernels = ModuleType
"""A module with the functions of ``kernels/reference.py`` and a ``NAME``."""


@cache
def select(choice: KernelChoice, device_type: str, head_size: int, dtype: torch.dtype) -> Kernels:
    """The implementation for a cache of this device, head size and dtype.

    Args:
        choice: ``auto``, ``native``, ``cuda`` (decode attention in CUDA C++, the rest in Triton),
            or ``reference``.

    Raises:
        FastGenConfigError: ``native`` or ``cuda`` was asked for and cannot serve this cache.
    """
    reference = importlib.import_module("fastgen_vllm.kernels.reference")
    if choice == "reference":
        return reference
    names = {"cpu": "cpu", "cuda": "cuda" if choice == "cuda" else "triton"}
    if device_type not in names or (choice == "cuda" and device_type != "cuda"):
        problem = f"there are none for {device_type}"
    else:
        native = importlib.import_module(f"fastgen_vllm.kernels.{names[device_type]}")
        problem = native.problem(head_size, dtype)
        if not problem:
            return native
    if choice != "auto":
        raise FastGenConfigError(
            f"fastgen.kernels: '{choice}' was asked for, but {problem}; "
            "set it to 'auto' to run what serves this cache"
        )
    return reference
