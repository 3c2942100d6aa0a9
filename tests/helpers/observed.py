"""A random prompt as a model might compute it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from fastgen_vllm.policy.observed import NUM_FUTURE, Observed

SIZE = 8


def random_observed(layers: int, heads: int, group: int, n: int) -> Observed:
    generator = torch.Generator().manual_seed(97 * n + group)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    angles = torch.arange(n + NUM_FUTURE)[:, None] * 0.3 ** torch.arange(SIZE // 2)
    angles = torch.cat([angles, angles], dim=-1)
    # Queries have a mean, as real ones do, and differ in how sharply they look.
    queries = normal(layers, heads, group, n, SIZE) + 2 * normal(layers, heads, group, 1, SIZE)
    return Observed(
        queries * (0.5 + 2 * torch.rand(layers, heads, group, n, 1, generator=generator)),
        normal(layers, heads, n, SIZE) + normal(layers, heads, 1, SIZE),
        normal(layers, heads, n, SIZE),
        0.02 + torch.rand(layers, heads, group, n, generator=generator) ** 6,
        angles.cos(),
        angles.sin(),
        SIZE**-0.5,
    )


def observed_on(observed: Observed, device: Any) -> Observed:
    moved: dict[str, Any] = {}
    for field in fields(Observed):
        value = getattr(observed, field.name)
        moved[field.name] = value.to(device) if isinstance(value, torch.Tensor) else value
    return Observed(**moved)
