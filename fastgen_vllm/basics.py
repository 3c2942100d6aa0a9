"""What the kernels share with every other room. Needs torch alone."""

from __future__ import annotations

from typing import TypeVar

import torch

EMPTY = -1
"""Position of a slot that holds no token: evicted, or never filled."""

RATIO_UNIT = 10_000
"""Ratios are whole multiples of 1/10000, so that ``ceil(r * t)`` is exact integer arithmetic."""

IntLike = TypeVar("IntLike", int, torch.Tensor)


class FastGenConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU, on a device, without waiting for what the device is doing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def ceil_ratio(ratio: IntLike, num_tokens: IntLike) -> IntLike:
    """``ceil(ratio / 10000 * num_tokens)`` without rounding error; also elementwise on tensors."""
    return -((-ratio * num_tokens) // RATIO_UNIT)
