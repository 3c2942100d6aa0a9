"""One engine step, and the prompts that are being encoded in it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastgen_vllm.kernels.contract import DecodeBatch
from fastgen_vllm.profiler.profile import PromptProfile
from fastgen_vllm.runtime.growth import Growth


@dataclass
class Prefill:
    """A request whose prompt is being encoded.

    Attributes:
        profile: None where all is kept.
        growth: how it goes on; None where it is not compacted again.
        blocks: that it was given so far, in token order.
        targets: blocks that it is compacted into; None where its own blocks are its alone.
        cached_tokens: those that it found encoded, once its first chunk is planned.
    """

    num_tokens: int
    profile: PromptProfile | None = None
    growth: Growth | None = None
    blocks: list[int] = field(default_factory=list)
    targets: list[int] | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens ``[start, end)`` of the batch: positions from ``first`` of a prompt.

    Attributes:
        blocks: int64 ``[B]``, where the prompt lies so far.
        page_table: int64 ``[H, B]``, pages in ``PagePool.of_layer`` of any layer.
        slots: int64 ``[end - start, H]``, where there the chunk's K and V go.
    """

    request_id: str
    start: int
    end: int
    first: int
    blocks: torch.Tensor
    page_table: torch.Tensor
    slots: torch.Tensor

    @property
    def num_seen(self) -> int:
        return self.first + self.end - self.start

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.end)


@dataclass(frozen=True)
class Step:
    """One engine step, shared by all layers.

    Attributes:
        num_tokens: tokens in the batch, without padding.
        decode_tokens: int64 ``[N]``, batch index of each decoding request's token, or None where
            the batch is those and nothing else.
        decode: None where no request decodes.
        short: int32 ``[1]``, index of a decoding request that owns too few free pages, or -1; None
            where no request decodes.
    """

    num_tokens: int
    chunks: list[PrefillChunk]
    decode_ids: list[str]
    decode_tokens: torch.Tensor | None
    decode: DecodeBatch | None
    short: torch.Tensor | None
