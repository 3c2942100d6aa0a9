"""What the scheduler must know after a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastgen_vllm.cache import check_pages


@dataclass(frozen=True)
class KeptAgain:
    """What a request keeps that was compacted while it decodes.

    Attributes:
        ratio: slots in use, of the full cache's.
        num_tokens: of the sequence by then.
        dropped_slots: over all heads.
        squeezed: for lack of memory.
    """

    ratio: float
    num_tokens: int
    dropped_slots: int
    squeezed: bool = False


@dataclass(frozen=True)
class HeadsKept:
    """What each head kept of a prompt, for who wants to look.

    Attributes:
        num_layers: heads of a layer follow each other in ``kinds`` and ``shares``.
        kinds: the components of each head's policy.
        shares: of the prompt's tokens that each head keeps.
        positions: in equal parts of the prompt, the share that heads keep on average.
    """

    num_layers: int
    kinds: list[str]
    shares: list[float]
    positions: list[float]

    @classmethod
    def of(cls, kept: torch.Tensor, kinds: list[str], parts: int = 64) -> HeadsKept:
        """``kept``: bool ``[L, H, n]``. Waits for the device once."""
        layers, heads, n = kept.shape
        parts, by_position = min(parts, n), kept.sum((0, 1)) / (layers * heads)
        pooled = torch.nn.functional.adaptive_avg_pool1d(by_position[None, None], parts)
        figures = torch.cat([kept.sum(-1).flatten() / n, pooled.flatten()]).tolist()
        rounded = [round(figure, 4) for figure in figures]
        return cls(layers, kinds, rounded[:-parts], rounded[-parts:])


@dataclass(frozen=True)
class Kept:
    """What a request kept after its prompt.

    Attributes:
        vacated_blocks: the prompt's, less those that it holds now.
        cached_tokens: of the prompt, found encoded in the prefix cache.
        budget: what it was given, with what is protected and what was needed for its recovery;
            None where it was not given one.
        recovery: the share of its last queries' attention that is kept, on average over heads;
            None where that is not known.
        protected_tokens: of the prompt, kept in every head because it was asked for.
        compactions: since then, for its growth or for lack of memory.
        last: what the last of them left.
        heads: where the engine was asked to show them.
    """

    kept_slots: int
    total_slots: int
    vacated_blocks: int
    policy_heads: dict[str, int]
    cached_tokens: int = 0
    budget: float | None = None
    recovery: float | None = None
    protected_tokens: int = 0
    compactions: int = 0
    last: KeptAgain | None = None
    heads: HeadsKept | None = None


@dataclass
class StepReport:
    """What the scheduler must know after a step, by request id.

    Attributes:
        vacated: block ids handed back.
        free_pages: of every decoding request, the pages that it owns and that will be unused when
            the scheduler reads this, ``report_lag`` steps later, at worst.
        kept: of requests that finished their prompt in this step.
        owned: in debug mode, the blocks that each decoding request owns.
        kept_again: of requests that were compacted while they decode.
    """

    vacated: dict[str, list[int]] = field(default_factory=dict)
    free_pages: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    owned: dict[str, list[int]] | None = None
    kept_again: dict[str, KeptAgain] = field(default_factory=dict)


class PendingReport:
    """A report whose figures may still be on their way from the device.

    Args:
        alive: requests whose free pages are reported; those that decoded in the step come first.
        figures: int32 ``[len(alive) + 1]``, their free pages and ``Step.short``.
    """

    def __init__(self, report: StepReport, alive: Sequence[str], figures: torch.Tensor):
        self._report, self._alive = report, alive
        self._figures = figures.to("cpu", non_blocking=True)
        self._arrived = None
        if figures.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def get(self) -> StepReport:
        """Wait for the figures.

        Raises:
            OutOfPagesError: the scheduler granted fewer blocks than the heads need.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        *free_pages, short = self._figures.tolist()
        check_pages(self._alive, short)
        self._report.free_pages = dict(zip(self._alive, free_pages, strict=True))
        return self._report
