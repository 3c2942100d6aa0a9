"""What the kernels share with every other room. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch

EMPTY = -1
"""Position of a slot that holds no token: evicted, or never filled."""

RATIO_UNIT = 10_000
"""Ratios are whole multiples of 1/10000, so that ``ceil(r * t)`` is exact integer arithmetic."""

MOST_AT_ONCE = 1 << 21
"""Keys, over layers and heads, that are looked at together where a prompt ends."""

LOGITS_BYTES = 1 << 28
"""Scratch for the logits of decoding requests on a GPU: larger batches are attended in parts."""

IntLike = TypeVar("IntLike", int, torch.Tensor)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the CPU, on a device, without waiting for what the device is doing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def layers_at_once(keys: torch.Tensor) -> Iterator[slice]:
    """Slices of the layers of ``keys`` ``[L, ...]``, each of a layer or of at most ``MOST_AT_ONCE``
    keys: what is made of every key on the way is made for one slice only."""
    num_layers, step = len(keys), max(1, MOST_AT_ONCE // keys[0].numel())
    for first in range(0, num_layers, step):
        yield slice(first, min(first + step, num_layers))


def ceil_ratio(ratio: IntLike, num_tokens: IntLike) -> IntLike:
    """``ceil(ratio / 10000 * num_tokens)`` without rounding error; also elementwise on tensors."""
    return -((-ratio * num_tokens) // RATIO_UNIT)
