"""Gathers what a Hugging Face model computes of one prompt, for methods that need it."""

from __future__ import annotations

from typing import Any

import torch

from fastgen_vllm.cache.pages import PagePool
from fastgen_vllm.policy.observed import NUM_FUTURE, Observed
from fastgen_vllm.tools.inputs import InputError


class Observer:
    """Sees each layer's attention, chunk by chunk."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._modules: list[Any] = []
        self._queries: list[list[torch.Tensor]] = []
        self._scale = 1.0

    def add(self, module: Any, query: torch.Tensor, scale: float) -> None:
        """A chunk's queries ``[1, H * G, c, D]`` in one layer; layers come in order."""
        if module.layer_idx == len(self._modules):
            self._modules.append(module)
            self._queries.append([])
        self._queries[module.layer_idx].append(query[0])
        self._scale = scale

    def finish(self, pool: PagePool, blocks: list[int]) -> Observed:
        """Of the prompt whose keys and values lie in ``blocks``, none evicted.

        Raises:
            InputError: the model's layers are not built as Llama's are.
        """
        heads = pool.num_kv_heads
        queries = torch.stack([torch.cat(chunks, dim=1) for chunks in self._queries])
        queries = queries.unflatten(1, (heads, -1))
        n = queries.shape[-2]
        stored = pool.kv[pool.pages_of(torch.tensor(blocks))].flatten(2, 3)[..., :n, :]
        keys, values = stored.chunk(2, dim=-1)
        norms = [_output_norms(m, v) for m, v in zip(self._modules, values, strict=True)]
        cos, sin = _rotations(self._model, n + NUM_FUTURE, keys.shape[-1])
        return Observed(queries, keys, values, torch.stack(norms), cos, sin, self._scale)


def _output_norms(module: Any, values: torch.Tensor) -> torch.Tensor:
    """``||W_O v||_1`` of one layer: float32 ``[H, G, n]``, from values ``[H, n, D]``."""
    projection = getattr(module, "o_proj", None)
    if projection is None:
        raise InputError(
            f"{type(module).__name__} has no o_proj, so methods that look at the output "
            "projection cannot be compared on this model. Leave them out of --method."
        )
    heads, _, size = values.shape
    # [hidden, H * G * D] to [H, G, D, hidden]
    weights = projection.weight.T.unflatten(0, (heads, -1, size))
    return torch.stack([(v @ w).abs().sum(-1) for v, w in zip(values, weights, strict=True)])


def _rotations(model: Any, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE's cosines and sines of the first ``count`` positions, ``[count, size]`` each."""
    rotary = getattr(model.model, "rotary_emb", None)
    position = torch.arange(count)[None]
    cos, sin = (t[0] for t in rotary(torch.zeros(1), position)) if rotary else (position,) * 2
    first, second = cos.chunk(2, dim=-1)
    if cos.shape[-1] != size or not torch.equal(first, second):
        raise InputError(
            f"{type(model).__name__} has no RoPE over the halves of a whole head, so methods that "
            "look at queries before it cannot be compared on this model. Leave them out of "
            "--method."
        )
    return cos, sin
