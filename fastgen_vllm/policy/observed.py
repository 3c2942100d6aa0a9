"""A prompt as its model computes it, for methods that need more than profiling gathers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_FUTURE = 512
"""Positions after the prompt for which ``Observed`` has rotations."""


@dataclass(frozen=True)
class Observed:
    """One prompt's attention, ``D`` elements a head, gathered by ``fastgen eval`` alone.

    Attributes:
        queries: float32 ``[L, H, G, n, D]``, as they meet the keys: rotated by RoPE.
        keys: float32 ``[L, H, n, D]``, likewise.
        values: float32 ``[L, H, n, D]``.
        output_norms: float32 ``[L, H, G, n]``, ``||W_O v||_1``: how much full attention of a query
            head on a key would add to the residual stream, the sum of its elements' sizes.
        cos, sin: float32 ``[n + NUM_FUTURE, D]``, RoPE by position. Its halves are alike: element
            ``i`` turns with element ``i + D / 2``.
        scale: what the products of queries and keys are multiplied by.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    output_norms: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    scale: float

    def attention(self, layer: int, window: int) -> torch.Tensor:
        """Attention of the last ``window`` queries of a layer: float32 ``[H, G, window, n]``."""
        n = self.keys.shape[-2]
        keys = self.keys[layer][:, None]
        scores = self.queries[layer][..., n - window :, :] @ keys.mT * self.scale
        position = torch.arange(n, device=keys.device)
        unseen = position > position[n - window :, None]
        return scores.masked_fill(unseen, float("-inf")).softmax(-1)

    def queries_before_rotation(self, layer: int) -> torch.Tensor:
        """float32 ``[H, G, n, D]``."""
        n = self.queries.shape[-2]
        cos, sin = self.cos[:n], self.sin[:n]
        # Some kinds of RoPE scale besides.
        return rotate(self.queries[layer], cos, -sin) / (cos.square() + sin.square())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE, or a mean of several rotations, over the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
