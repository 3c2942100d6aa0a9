"""The prefill hook: attention mass gathered chunk by chunk while a prompt is encoded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastgen_vllm.config import FastGenConfig, Plan
from fastgen_vllm.kernels.contract import Kernels, ProfiledQueries, PromptKeys
from fastgen_vllm.policy.choice import Choice, Goal, PromptStats, with_sinks
from fastgen_vllm.policy.observed import Observed
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
        lse: float32 ``[k, H, G]``, log-sum-exp of the scaled scores of its last ``k`` queries,
            ``first_lse`` of the profile among them.
        scale: what scores are multiplied by.
    """

    query: torch.Tensor
    keys: PromptKeys
    lse: torch.Tensor
    scale: float


@dataclass(frozen=True)
class PromptTokens:
    """What a profile must know of a prompt's tokens.

    Attributes:
        classes: uint8 ``[n]`` on the host.
        num_protected: how many of them are marked so.
        system: tokens of the system prompt, 0 where none is known.
    """

    classes: torch.Tensor
    num_protected: int = 0
    system: int = 0


class PromptProfile:
    """Attention mass of one prompt, for all layers, and the choice that follows from it.

    Args:
        plan: the config's for such a goal, on the device.
        heads: of the model.
        prompt: the whole of it, since its length is known when it arrives.
        page_size: slots per page.
    """

    def __init__(
        self,
        config: FastGenConfig,
        plan: Plan,
        heads: ModelHeads,
        prompt: PromptTokens,
        page_size: int,
        goal: Goal,
    ) -> None:
        self.config, self.plan, self.goal = config, plan, goal
        self.num_tokens, self.heads, self.page_size = len(prompt.classes), heads, page_size
        self.num_protected = prompt.num_protected
        device = plan.ladder.rules.sticky_kinds.device
        profiling = self.profiling = plan.profiling
        self.token_classes = with_sinks(prompt.classes, profiling.num_sinks)
        self.bounds = to_device(torch.tensor(plan.ladder.windows(self.num_tokens)), device)
        groups = heads.group_size if config.group_reduction == "min" else 1
        shape = (heads.num_layers, heads.num_kv_heads)
        self.mass = torch.zeros((*shape, groups, 0, len(self.bounds) + 1), device=device)
        self.peaks = torch.zeros((2, *shape, 0), device=device)
        """Of one query, and the sum over queries."""
        self.value_norms = torch.ones((*shape, 0), device=device)
        self.observed: Observed | None = None
        """For methods that need the model: whoever runs them sets it."""
        how = (profiling.weighting, profiling.window, config.query_sampling)
        self.runs, weights = query_runs(*how, self.num_tokens, prompt.system)
        # Kernels take weights up to 1. Only shares of the mass count, so it stays in this unit.
        self.most_weight = max(1.0, float(weights.max()))
        self.log_weights = to_device((weights / self.most_weight).log(), device)

    def first_lse(self, start: int, end: int) -> int:
        """Of a chunk of tokens ``[start, end)``, the first query that is looked at; the chunk's
        length where none is."""
        looked_at = min(run.first for run in self.runs)
        return min(max(looked_at - start, 0), end - start)

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
        """Add a chunk's queries, and with the last chunk the prompt's values.

        A query's weight multiplies its probabilities, ``exp(score - lse)``, so it goes into the
        log-sum-exp and costs the kernels nothing.
        """
        num_keys = chunk.keys.num_keys
        start, first_lse = num_keys - len(chunk.query), num_keys - len(chunk.lse)
        self.make_room(num_keys)
        if self.profiling.value_weighting and num_keys == self.num_tokens:
            self.value_norms[layer] = kernels.value_norms(chunk.keys)
        for run in self.runs:
            first, end = max(run.first, start), min(run.end, num_keys)
            first += (run.first - first) % run.step
            if first >= end:
                continue
            own = slice(first - start, end - start, run.step)
            lse = chunk.lse[first - first_lse : end - first_lse : run.step]
            lse = lse - self.log_weights[first : end : run.step, None, None]
            keys = replace(chunk.keys, num_keys=end)
            if self.profiling.peaks:
                # Queries that stood further back would see what these see of far keys.
                stood = first - self.profiling.least_window
                queries = ProfiledQueries(chunk.query[own], lse, stood, run.step)
                kernels.attention_peaks(queries, keys, chunk.scale, *self.peaks[:, layer])
            else:
                queries = ProfiledQueries(chunk.query[own], lse, first, run.step)
                kernels.attention_mass(queries, keys, self.bounds, chunk.scale, self.mass[layer])

    def finish(self) -> Choice:
        """What the heads keep. Every chunk and layer has been added.

        A budget is of what is not protected, and rises until enough is recovered; ``goal`` is then
        what it rose to.
        """
        stats, goal = self.stats(), self.goal.with_protected(self.num_protected / self.num_tokens)
        choice = self.plan.method.choose(self.plan.ladder, stats, goal)
        if goal.least_recovery and float(choice.recovery.mean()) < goal.least_recovery:
            goal, choice = self._enough(stats, goal)
        self.goal = goal
        return choice

    @property
    def budget(self) -> float | None:
        """What the prompt is given."""
        if self.goal.budget is None:
            return None
        return self.goal.share_of(self.num_tokens)

    def _enough(self, stats: PromptStats, goal: Goal) -> tuple[Goal, Choice]:
        """The lowest budget that recovers enough, to a thousandth, and its choice."""
        assert goal.budget is not None
        low, high = goal.budget, 1.0
        shape = (self.heads.num_layers, self.heads.num_kv_heads, self.num_tokens)
        sticky = (stats.token_classes & self.plan.sticky_kinds) != 0
        choice = Choice.everything(shape, sticky.device, sticky)
        while high - low > 1e-3:
            middle = (low + high) / 2
            tried = replace(goal, budget=middle)
            found = self.plan.method.choose(self.plan.ladder, stats, tried)
            if float(found.recovery.mean()) >= goal.least_recovery:
                high, choice = middle, found
            else:
                low = middle
        return replace(goal, budget=high), choice

    def _mass_of_keys(self) -> torch.Tensor:
        """float32 ``[L, H, n]``, of all distances and the whole group, in units of queries."""
        mass = self.mass.sum(dim=(2, 4))
        return mass if self.most_weight == 1.0 else mass * self.most_weight

    def stats(self) -> PromptStats:
        """What the choice is made from."""
        mass, scores = self.mass, self.peaks[0]
        if self.profiling.peaks:
            mass = self.peaks[1][:, :, None, :, None]
        else:
            scores = self._mass_of_keys()
        seen_by = torch.arange(self.num_tokens, 0, -1, device=scores.device)
        averages, pooling = self.config.frequent_score == "mean", self.profiling.pooling
        if averages:
            scores = scores / seen_by
        if pooling > 1:
            scores = torch.nn.functional.max_pool1d(scores, pooling, 1, pooling // 2)
        return PromptStats(
            mass,
            self.value_norms,
            scores,
            scores * seen_by if averages else scores,
            to_device(self.token_classes, scores.device),
            self.page_size,
            self.profiling,
            self.observed,
            self.token_classes,
        )
