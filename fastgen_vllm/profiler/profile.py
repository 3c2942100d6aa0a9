"""The prefill hook: attention mass gathered chunk by chunk while a prompt is encoded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.kernels.contract import Kernels, ProfiledQueries, PromptKeys
from fastgen_vllm.policy.choice import Choice, Goal, PromptStats, with_sinks
from fastgen_vllm.policy.hybrids import Ladder
from fastgen_vllm.policy.methods import METHODS
from fastgen_vllm.profiler.queries import query_runs
from fastgen_vllm.tensors import to_device


@dataclass(frozen=True)
class ModelHeads:
    """``L`` layers, ``H`` KV heads of each, ``G`` query heads of each of those."""

    num_layers: int
    num_kv_heads: int
    group_size: int


@dataclass(frozen=True)
class PromptChunk:
    """One layer's part of a prefill chunk, after its attention.

    Attributes:
        query: ``[c, H, G, D]``, the last ``c`` of the keys' tokens.
        value: ``[c, H, D]``.
        lse: float32 ``[c, H, G]``, log-sum-exp of each query's scaled scores.
        scale: what scores are multiplied by.
    """

    query: torch.Tensor
    value: torch.Tensor
    keys: PromptKeys
    lse: torch.Tensor
    scale: float


class PromptProfile:
    """Attention mass of one prompt, for all layers, and the choice that follows from it.

    Args:
        ladder: the config's, on the device.
        heads: of the model.
        token_classes: uint8 ``[n]``, of the whole prompt, whose length is known when it arrives.
        page_size: slots per page.
    """

    def __init__(
        self,
        config: FastGenConfig,
        ladder: Ladder,
        heads: ModelHeads,
        token_classes: torch.Tensor,
        page_size: int,
        goal: Goal,
    ) -> None:
        self.config, self.ladder, self.goal = config, ladder, goal
        self.num_tokens, self.heads, self.page_size = len(token_classes), heads, page_size
        device = token_classes.device
        profiling = self.profiling = config.profiling
        self.token_classes = with_sinks(token_classes, profiling.num_sinks)
        self.bounds = to_device(torch.tensor(ladder.windows(self.num_tokens)), device)
        groups = heads.group_size if config.group_reduction == "min" else 1
        shape = (heads.num_layers, heads.num_kv_heads)
        self.mass = torch.zeros((*shape, groups, 0, len(self.bounds) + 1), device=device)
        self.peaks = torch.zeros((*shape, 0), device=device)
        self.value_norms = torch.ones((*shape, 0), device=device)
        self.runs, weights = query_runs(
            profiling.weighting, profiling.window, config.query_sampling, self.num_tokens
        )
        # Kernels take weights up to 1. Only shares of the mass count, so it stays in this unit.
        self.most_weight = max(1.0, float(weights.max()))
        self.log_weights = to_device((weights / self.most_weight).log(), device)

    def make_room(self, num_keys: int) -> None:
        """Room for a prompt's first chunk, and from the second on for all of it: in the step in
        which one long prompt ends, the next one that begins takes little."""
        held = self.value_norms.shape[-1]
        if num_keys <= held:
            return
        more = (self.num_tokens if held else num_keys) - held
        if self.profiling.peaks:
            self.peaks = torch.nn.functional.pad(self.peaks, (0, more))
        else:
            self.mass = torch.nn.functional.pad(self.mass, (0, 0, 0, more))
        self.value_norms = torch.nn.functional.pad(self.value_norms, (0, more), value=1.0)

    def add_chunk(
        self,
        kernels: Kernels,
        layer: int,
        chunk: PromptChunk,
    ) -> None:
        """Add a chunk's queries and values.

        A query's weight multiplies its probabilities, ``exp(score - lse)``, so it goes into the
        log-sum-exp and costs the kernels nothing.
        """
        num_keys = chunk.keys.num_keys
        start = num_keys - chunk.query.shape[0]
        self.make_room(num_keys)
        if self.profiling.value_weighting:
            self.value_norms[layer, :, start:num_keys] = chunk.value.float().norm(dim=-1).T
        for run in self.runs:
            first, end = max(run.first, start), min(run.end, num_keys)
            first += (run.first - first) % run.step
            if first >= end:
                continue
            own = slice(first - start, end - start, run.step)
            lse = chunk.lse[own] - self.log_weights[first : end : run.step, None, None]
            queries = ProfiledQueries(chunk.query[own], lse, first, run.step)
            keys = replace(chunk.keys, num_keys=end)
            if self.profiling.peaks:
                kernels.attention_peaks(queries, keys, chunk.scale, self.peaks[layer])
            else:
                kernels.attention_mass(queries, keys, self.bounds, chunk.scale, self.mass[layer])

    def finish(self) -> Choice:
        """What the heads keep. Every chunk and layer has been added."""
        return METHODS[self.config.method].choose(self.ladder, self.stats(), self.goal)

    def _mass_of_keys(self) -> torch.Tensor:
        """float32 ``[L, H, n]``, of all distances and the whole group, in units of queries."""
        mass = self.mass.sum(dim=(2, 4))
        return mass if self.most_weight == 1.0 else mass * self.most_weight

    def stats(self) -> PromptStats:
        """What the choice is made from."""
        scores = self.peaks if self.profiling.peaks else self._mass_of_keys()
        seen_by = torch.arange(self.num_tokens, 0, -1, device=scores.device)
        averages, pooling = self.config.frequent_score == "mean", self.profiling.pooling
        if averages:
            scores = scores / seen_by
        if pooling > 1:
            scores = torch.nn.functional.max_pool1d(scores, pooling, 1, pooling // 2)
        return PromptStats(
            self.mass,
            self.value_norms,
            scores,
            scores * seen_by if averages else scores,
            self.token_classes,
            self.page_size,
            self.profiling,
        )
