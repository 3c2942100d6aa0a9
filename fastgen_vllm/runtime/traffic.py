"""What an engine did, counted for its metrics and its log."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from fastgen_vllm.runtime.report import Kept

TELL_EVERY = 1.0
"""Seconds between two accounts of a busy engine."""
LOG_EVERY = 60.0

COUNTS = ("vacated_blocks", "evicted_slots", "compactions", "squeezes")
"""Fields of ``Traffic`` that are plain numbers."""


@dataclass
class Traffic:
    """Counts since they were last told.

    Attributes:
        prompts: of each prompt that was compressed its tokens, the share of its slots that it
            kept, and the share of attention, or None where that is not known.
        whole: prompts of which everything was kept, by reason.
        evicted_slots: that prompts and compactions left out, over all heads.
        squeezes: compactions for lack of memory; they are among the ``compactions``.
    """

    prompts: list[tuple[int, float, float | None]] = field(default_factory=list)
    whole: Counter[str] = field(default_factory=Counter)
    vacated_blocks: int = 0
    evicted_slots: int = 0
    compactions: int = 0
    squeezes: int = 0

    def add_prompt(self, num_tokens: int, kept: Kept, why_whole: str) -> None:
        if kept.kept_slots == kept.total_slots:
            self.whole[why_whole] += 1
        else:
            ratio = kept.kept_slots / kept.total_slots
            self.prompts.append((num_tokens, ratio, kept.recovery))
            self.evicted_slots += kept.total_slots - kept.kept_slots

    def add(self, other: Traffic) -> None:
        self.prompts += other.prompts
        self.whole += other.whole
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __bool__(self) -> bool:
        return bool(self.prompts or self.whole or self.vacated_blocks or self.compactions)

    def __str__(self) -> str:
        kept = sum(ratio for _, ratio, _ in self.prompts) / max(1, len(self.prompts))
        whole = ", ".join(f"{n} {reason}" for reason, n in sorted(self.whole.items()))
        return (
            f"{len(self.prompts)} prompts compressed, to {kept:.2f} of their KV cache on average, "
            f"and {self.whole.total()} kept whole{f' ({whole})' if whole else ''}; "
            f"{self.vacated_blocks} blocks given back, {self.compactions} compactions while "
            f"decoding, {self.squeezes} of them for lack of memory"
        )


class Accounts:
    """When to tell of an engine's traffic, and when to log it.

    Args:
        labels: what the account says of the engine itself.
    """

    def __init__(self, labels: dict[str, Any]) -> None:
        self.labels, self.traffic, self._logged = labels, Traffic(), Traffic()
        self._told, self._last_log = float("-inf"), time.monotonic()
        self.shown: list[dict[str, Any]] = []
        """Requests whose heads are shown, since it was told last."""

    def due(self) -> bool:
        """Whether it is time to tell of an engine that goes on."""
        return time.monotonic() >= self._told + TELL_EVERY

    def tell(self, held: dict[str, int]) -> dict[str, Any]:
        """What happened since it was told last, and what the engine holds."""
        traffic, self.traffic, self._told = self.traffic, Traffic(), time.monotonic()
        shown, self.shown = self.shown, []
        self._logged.add(traffic)
        counts = {name: getattr(traffic, name) for name in COUNTS}
        return {
            **self.labels,
            **held,
            **counts,
            "prompts": traffic.prompts,
            "whole": dict(traffic.whole),
            "shown": shown,
        }

    def show(self, request_id: str, num_tokens: int, kept: Kept) -> None:
        if kept.heads is not None:
            self.shown.append(
                {
                    "id": request_id,
                    "time": time.time(),
                    "tokens": num_tokens,
                    "kept": kept.kept_slots / kept.total_slots,
                    "recovery": kept.recovery,
                    **asdict(kept.heads),
                }
            )

    def to_log(self) -> str:
        """What was told since this was asked last, a minute ago or more; else nothing."""
        seconds = time.monotonic() - self._last_log
        if seconds < LOG_EVERY:
            return ""
        traffic, self._logged, self._last_log = self._logged, Traffic(), time.monotonic()
        return f"in the last {seconds:.0f} seconds {traffic}" if traffic else ""
