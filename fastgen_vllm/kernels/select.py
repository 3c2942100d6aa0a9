"""The choice among implementations of the operations."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

from fastgen_vllm.config import FastGenConfigError, KernelChoice

Kernels = ModuleType
"""A module with the functions of ``kernels/reference.py`` and a ``NAME``."""


@cache
def select(choice: KernelChoice, device_type: str, head_size: int, dtype: torch.dtype) -> Kernels:
    """The implementation for a cache of this device, head size and dtype.

    Args:
        choice: ``auto``, ``native``, or ``reference``.

    Raises:
        FastGenConfigError: ``native`` was asked for and cannot serve this cache.
    """
    reference = importlib.import_module("fastgen_vllm.kernels.reference")
    if choice == "reference":
        return reference
    if device_type == "cpu":
        cpu = importlib.import_module("fastgen_vllm.kernels.cpu")
        problem = cpu.problem(head_size, dtype)
        if not problem:
            return cpu
    else:
        problem = f"there are none for {device_type}"
    if choice == "native":
        raise FastGenConfigError(
            f"fastgen.kernels: 'native' was asked for, but {problem}; "
            "set it to 'auto' to run the slower plain-PyTorch kernels"
        )
    return reference
