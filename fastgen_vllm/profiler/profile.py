"""The prefill hook: attention mass gathered chunk by chunk while a prompt is encoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.kernels import Kernels
from fastgen_vllm.policy.choice import Choice, Ladder, PromptStats, choose, share_budget
from fastgen_vllm.policy.methods.peers import PEERS
from fastgen_vllm.profiler.queries import query_runs
from fastgen_vllm.tensors import to_device


@dataclass(frozen=True)
class Goal:
    """What a prompt is compressed to: ``budget``, a share of the full cache's memory, or whatever
    reaches the recovery ``threshold``. The other one is None."""

    threshold: float | None
    budget: float | None

    @property
    def keeps_everything(self) -> bool:
        return 1.0 in (self.threshold, self.budget)


class PromptProfile:
    """Attention mass of one prompt, for all layers, and the choice that follows from it.

    Args:
        num_tokens: ``n``, known when the request arrives.
        num_layers, num_kv_heads, group_size: ``L``, ``H``, ``G``.
        special, punctuation: bool ``[n]``.
        page_size: slots per page.
    """

    def __init__(
        self,
        config: FastGenConfig,
        ladder: Ladder,
        num_tokens: int,
        num_layers: int,
        num_kv_heads: int,
        group_size: int,
        special: torch.Tensor,
        punctuation: torch.Tensor,
        page_size: int,
        goal: Goal,
    ) -> None:
        self.config, self.ladder, self.goal = config, ladder, goal
        self.num_tokens, self.group_size, self.page_size = num_tokens, group_size, page_size
        device = special.device
        profiling = self.profiling = config.profiling
        sinks = torch.arange(num_tokens, device=device) < profiling.num_sinks
        self.special, self.punctuation = special | sinks, punctuation
        self.bounds = to_device(torch.tensor(ladder.windows(num_tokens)), device)
        groups = group_size if config.group_reduction == "min" else 1
        heads = (num_layers, num_kv_heads)
        self.mass = torch.zeros((*heads, groups, 0, len(self.bounds) + 1), device=device)
        self.value_norms = torch.ones((*heads, 0), device=device)
        self.runs, weights = query_runs(
            profiling.weighting, profiling.window, config.query_sampling, num_tokens
        )
        self.log_weights = to_device(weights.log(), device)

    def make_room(self, num_keys: int) -> None:
        """Room for a prompt's first chunk, and from the second on for all of it: in the step in
        which one long prompt ends, the next one that begins takes little."""
        held = self.mass.shape[3]
        if num_keys <= held:
            return
        more = (self.num_tokens if held else num_keys) - held
        self.mass = torch.nn.functional.pad(self.mass, (0, 0, 0, more))
        self.value_norms = torch.nn.functional.pad(self.value_norms, (0, more), value=1.0)

    def add_chunk(
        self,
        kernels: Kernels,
        layer: int,
        query: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        page_table: torch.Tensor,
        num_keys: int,
        lse: torch.Tensor,
        scale: float,
    ) -> None:
        """Add a chunk's queries and values.

        A query's weight multiplies its probabilities, ``exp(score - lse)``, so it goes into the
        log-sum-exp and costs the kernels nothing.

        Args:
            query: ``[c, H, G, D]``, the chunk's last ``c`` of the ``num_keys`` tokens so far.
            value: ``[c, H, D]``.
            pages, page_table: where the keys are, as ``kernels.prefill_attention`` takes them.
            lse: float32 ``[c, H, G]``, log-sum-exp of each query's scaled scores.
        """
        start = num_keys - query.shape[0]
        self.make_room(num_keys)
        if self.profiling.value_weighting:
            self.value_norms[layer, :, start:num_keys] = value.float().norm(dim=-1).T
        for run in self.runs:
            first, end = max(run.first, start), min(run.end, num_keys)
            first += (run.first - first) % run.step
            if first >= end:
                continue
            own = slice(first - start, end - start, run.step)
            kernels.attention_mass(
                query[own],
                pages,
                page_table,
                end,
                lse[own] - self.log_weights[first : end : run.step, None, None],
                first,
                run.step,
                self.bounds,
                scale,
                self.mass[layer],
            )

    def stats(self) -> PromptStats:
        """Once every chunk and layer has been added."""
        scores = self.mass.sum(dim=(2, 4)) / self._queries_per_key()
        pooling = self.profiling.pooling
        if pooling > 1:
            scores = torch.nn.functional.max_pool1d(scores, pooling, 1, pooling // 2)
        return PromptStats(
            self.mass, self.value_norms, scores, self.special, self.punctuation, self.page_size
        )

    def slot_scores(self, stats: PromptStats) -> torch.Tensor:
        """Where the decode step's sums go on from: float32 ``[L, H, n]``, in units of queries."""
        if self.config.frequent_score == "sum":
            return stats.scores
        return stats.scores * self._queries_per_key()

    def _queries_per_key(self) -> torch.Tensor:
        """``[n]`` or ``[1]``: what ``frequent_score: mean`` divides sums by."""
        n, device = self.num_tokens, self.mass.device
        if self.config.frequent_score == "mean":
            return torch.arange(n, 0, -1, device=device)
        return torch.ones(1, device=device)

    def choose(self, stats: PromptStats) -> Choice:
        """The policies."""
        if self.config.method != "fastgen":
            assert self.goal.budget is not None
            return PEERS[self.config.method](self.ladder, stats, self.goal.budget)
        if self.goal.budget is not None:
            least = self.config.min_prompt_tokens / self.num_tokens
            return share_budget(self.ladder, stats, max(self.goal.budget, least))
        assert self.goal.threshold is not None
        return choose(self.ladder, stats, self.goal.threshold)
