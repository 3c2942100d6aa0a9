"""One engine step, and the prompts that are being encoded in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastgen_vllm.cache import PagePool
from fastgen_vllm.kernels.contract import DecodeBatch, PromptBatch
from fastgen_vllm.profiler.profile import Gathering, PromptProfile
from fastgen_vllm.runtime.growth import Growth
from fastgen_vllm.tensors import to_device

Index = slice | torch.Tensor
"""Some tokens of a batch: int64, where they do not follow each other."""


@dataclass
class Prefill:
    """A request whose prompt is being encoded.

    Attributes:
        profiles: the first, if any, chooses what is kept; a tool gathers others beside it.
        growth: how it goes on; None where it is not compacted again.
        blocks: that it was given so far, in token order.
        targets: blocks that it is compacted into; None where its own blocks are its alone.
        cached_tokens: those that it found encoded, once its first chunk is planned.
    """

    num_tokens: int
    profiles: list[PromptProfile] = field(default_factory=list)
    growth: Growth | None = None
    blocks: list[int] = field(default_factory=list)
    targets: list[int] | None = None
    cached_tokens: int | None = None

    @property
    def profile(self) -> PromptProfile | None:
        """None where all is kept."""
        return self.profiles[0] if self.profiles else None


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens ``[first, end)`` of a prompt."""

    request_id: str
    first: int
    end: int


@dataclass(frozen=True)
class Encoding:
    """What a step encodes of prompts, ``T`` tokens.

    Attributes:
        tokens: theirs in the batch.
        slots: int64 ``[T, H]``, where K and V go, in ``PagePool.of_layer`` of any layer.
        gathering: of profiles that look at peaks; None where none looks at these tokens.
        by_mass: other profiles, each with the index of its prompt.
    """

    tokens: Index
    prompts: PromptBatch
    slots: torch.Tensor
    gathering: Gathering | None
    by_mass: Sequence[tuple[int, PromptProfile]]

    @classmethod
    def of(
        cls,
        tokens: Index,
        chunks: Sequence[PrefillChunk],
        prefills: Mapping[str, Prefill],
        pool: PagePool,
    ) -> Encoding:
        device, block_size = pool.kv.device, pool.block_size
        page_slots = pool.pages_per_block * block_size
        blocks, lengths, slots = [], [], []
        peaks, by_mass, row = [], [], 0
        for i, chunk in enumerate(chunks):
            prefill, first, end = prefills[chunk.request_id], chunk.first, chunk.end
            own = torch.tensor(prefill.blocks[: -(-end // block_size)])
            position = torch.arange(first, end)
            block = own[position // block_size]
            slots.append(block * page_slots + position % block_size)
            for profile in prefill.profiles:
                if profile.profiling.peaks:
                    peaks.append((i, row, first, end, profile))
                else:
                    by_mass.append((i, profile))
            blocks.append(own)
            lengths.append(end - first)
            row += end - first
        num_heads, ends = pool.num_kv_heads, [chunk.end for chunk in chunks]
        prompts = PromptBatch.of(blocks, lengths, ends, num_heads, pool.pages_per_block, device)
        of_heads = torch.arange(0, num_heads * block_size, block_size, device=device)
        of_tokens = to_device(torch.cat(slots), device)[:, None] + of_heads
        return cls(tokens, prompts, of_tokens, Gathering.of(peaks, device), by_mass)


@dataclass(frozen=True)
class Step:
    """One engine step, shared by all layers.

    Attributes:
        num_tokens: tokens in the batch, without padding.
        encoding: of the ``chunks``; None where there are none.
        decode_tokens: of the decoding requests.
        decode: None where no request decodes.
        short: int32 ``[1]``, index of a decoding request that owns too few free pages, or -1; None
            where no request decodes.
    """

    num_tokens: int
    chunks: list[PrefillChunk]
    encoding: Encoding | None
    decode_ids: list[str]
    decode_tokens: Index
    decode: DecodeBatch | None
    short: torch.Tensor | None

    def finish_profiles(self) -> None:
        """All layers have been attended to."""
        if self.encoding is not None and self.encoding.gathering is not None:
            self.encoding.gathering.finish()
