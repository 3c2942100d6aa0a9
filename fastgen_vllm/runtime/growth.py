"""Requests that are compacted again and again while they grow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgen_vllm.cache import PagePool
from fastgen_vllm.config import Plan
from fastgen_vllm.kernels.contract import HeadRules
from fastgen_vllm.policy.choice import Goal, SlotStats, pages_within, with_sinks
from fastgen_vllm.profiler.profile import PromptTokens


@dataclass
class Growth:
    """How one request goes on after its prompt.

    Attributes:
        plan: how its prompt was compressed, or would have been.
        goal: a budget.
        every: tokens between two compactions; 0 where it waits until blocks run short.
        prompt: as it was encoded.
        protected: tokens of it that are kept beside the budget.
        num_tokens: of the sequence so far.
    """

    plan: Plan
    goal: Goal
    every: int
    prompt: PromptTokens

    def __post_init__(self) -> None:
        self.num_tokens, self.protected = len(self.prompt.classes), self.prompt.num_protected
        # A short prompt is left whole until it has grown.
        self._next = max(self.num_tokens, self.goal.least_tokens) + self.every

    @property
    def waits(self) -> bool:
        return self.every == 0

    def sticky(self) -> torch.Tensor:
        """bool ``[n]`` on the host, tokens of the prompt that no head drops."""
        classes = with_sinks(self.prompt.classes, self.plan.profiling.num_sinks)
        return (classes & self.plan.sticky_kinds) != 0

    def rise_to(self, goal: Goal) -> None:
        """A budget that the prompt needed, with what is protected."""
        self.goal, self.protected = goal, 0

    def add_token(self) -> bool:
        """Whether it is time to compact the request."""
        self.num_tokens += 1
        if self.waits or self.num_tokens < self._next:
            return False
        self._next += self.every
        return True

    def choose(self, pool: PagePool, slots: SlotStats) -> tuple[HeadRules, torch.Tensor]:
        """How the heads go on, and which of their slots they keep."""
        share = self.goal.with_protected(self.protected / self.num_tokens).share_of(self.num_tokens)
        pages_each = -(-self.num_tokens // pool.block_size)
        assert self.plan.method.choose_again is not None
        room = pages_within(share, pages_each * pool.pages_per_block)
        rules, kept = self.plan.method.choose_again(self.plan.ladder, slots, room)
        self.prepare(rules)
        return rules, kept

    def prepare(self, rules: HeadRules) -> None:
        """Also heads that keep everything may drop keys later: all keep scores, and know which
        tokens stay."""
        rules.keeps_scores.fill_(True)
        rules.sticky_kinds.fill_(self.plan.sticky_kinds)
        rules.decay.fill_(self.plan.method.decay)


def slots_in(
    pool: PagePool, pages: torch.Tensor, lengths: torch.Tensor, num_tokens: int
) -> SlotStats:
    """What the slots of a request's pages ``[L, H, P]`` tell: nobody looks at K or V again."""
    positions, scores = pool.positions[pages].flatten(2), pool.scores[pages].flatten(2)
    return SlotStats(lengths.long(), positions, scores, num_tokens, pool.block_size)
