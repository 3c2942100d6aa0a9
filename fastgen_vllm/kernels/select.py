"""The choice among implementations of the operations."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from fastgen_vllm.errors import FastGenConfigError

if TYPE_CHECKING:
    from fastgen_vllm.config import KernelChoice

Kernels = ModuleType
"""A module with the functions of ``kernels/reference.py`` and a ``NAME``."""


def native(device_type: str, choice: KernelChoice = "auto") -> Kernels | None:
    """The compiled kernels for a device, whether or not they can serve a cache."""
    if device_type == "cpu" and choice != "cuda":
        return importlib.import_module("fastgen_vllm.kernels.cpu")
    if device_type == "cuda":
        name = "cuda" if choice == "cuda" else "triton"
        return importlib.import_module(f"fastgen_vllm.kernels.{name}")
    return None


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
    kernels = native(device_type, choice)
    if kernels is None:
        problem = f"there are none for {device_type}"
    else:
        problem = kernels.problem(head_size, dtype)
        if not problem:
            return kernels
    if choice != "auto":
        raise FastGenConfigError(
            f"fastgen.kernels: '{choice}' was asked for, but {problem}; "
            "set it to 'auto' to run what serves this cache"
        )
    return reference
