"""The flat page pool over the engine's KV storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgen_vllm.kernels.contract import Pages
from fastgen_vllm.tensors import EMPTY


@dataclass(frozen=True)
class PagePool(Pages):
    """The head pages of every block.

    Block ``b`` of layer ``l`` and KV head ``h`` is page ``(b * L + l) * H + h``. Block 0 is the
    engine's null block: nobody owns its pages and their slots stay empty, so page 0 pads tables.
    """

    num_layers: int
    num_kv_heads: int

    @classmethod
    def over(cls, kv: torch.Tensor) -> PagePool:
        """View storage ``[num_blocks, L, H, block_size, 2 * head_size]`` as pages."""
        flat = kv.view(-1, *kv.shape[-2:])
        slots = flat.shape[:2]
        return cls(
            flat,
            torch.full(slots, EMPTY, dtype=torch.int32, device=kv.device),
            torch.zeros(slots, dtype=torch.float32, device=kv.device),
            kv.shape[1],
            kv.shape[2],
        )

    @property
    def pages_per_block(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def num_blocks(self) -> int:
        return self.kv.shape[0] // self.pages_per_block

    def of_layer(self, layer: int) -> torch.Tensor:
        """The K and V from this layer's first page on: there, every layer's blocks have the page
        numbers that ``pages_of`` gives for layer 0."""
        return self.kv[layer * self.num_kv_heads :]

    def pages_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """Pages of blocks ``[k]``: int64 ``[L, H, k]``."""
        head = torch.arange(self.pages_per_block, device=blocks.device)
        pages = blocks.long() * self.pages_per_block + head[:, None]
        return pages.view(self.num_layers, self.num_kv_heads, -1)
