"""The prefill hook: attention gathered chunk by chunk while a prompt is encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fastgen_vllm.config import FastGenConfig, Plan
from fastgen_vllm.kernels.contract import Kernels, Look, Looks, ProfiledQueries, PromptKeys
from fastgen_vllm.policy.choice import Choice, Goal, PromptStats, with_sinks
from fastgen_vllm.policy.observed import Observed
from fastgen_vllm.profiler.queries import QueryRun, query_runs
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
        lse: float32 ``[c, H, G]``, log-sum-exp of the scaled scores of each query.
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
    """Attention of one prompt, for all layers, and the choice that follows from it: peaks, which
    ``Gathering`` finds for all prompts of a step, or mass by distance.

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
        self.found = torch.zeros((3, *shape, 0), device=device)
        """As ``Looks.found``, of the keys so far."""
        self._value_norms = torch.ones((*shape, 0), device=device)
        self.observed: Observed | None = None
        """For methods that need the model: whoever runs them sets it."""
        how = (profiling.weighting, profiling.window, config.query_sampling)
        self.runs, weights = query_runs(*how, self.num_tokens, prompt.system)
        # Kernels take weights up to 1. Only shares of the mass count, so it stays in this unit.
        self.most_weight = max(1.0, float(weights.max()))
        log_weights = (weights / self.most_weight).log()
        self.log_weights = log_weights if profiling.peaks else to_device(log_weights, device)
        """Those of peaks travel with the step's other numbers."""

    def runs_in(self, start: int, end: int) -> Iterator[QueryRun]:
        """What is looked at of tokens ``[start, end)``."""
        for run in self.runs:
            first, last = max(run.first, start), min(run.end, end)
            first += (run.first - first) % run.step
            if first < last:
                yield QueryRun(first, last, run.step)

    def make_room(self, num_keys: int) -> None:
        """Room for a prompt's first chunk, and from the second on for all of it: in the step in
        which one long prompt ends, the next one that begins takes little."""
        held = self._value_norms.shape[-1]
        if num_keys <= held:
            return
        more = (self.num_tokens if held else num_keys) - held
        self.mass = torch.nn.functional.pad(self.mass, (0, 0, 0, more))
        self._value_norms = torch.nn.functional.pad(self._value_norms, (0, more), value=1.0)

    def add_chunk(
        self,
        kernels: Kernels,
        layer: int,
        chunk: PromptChunk,
    ) -> None:
        """Add the mass of a chunk's queries, and with the last chunk the prompt's values.

        A query's weight multiplies its probabilities, ``exp(score - lse)``, so it goes into the
        log-sum-exp and costs the kernels nothing.
        """
        num_keys = chunk.keys.num_keys
        start = num_keys - len(chunk.query)
        self.make_room(num_keys)
        if self.profiling.value_weighting and num_keys == self.num_tokens:
            self._value_norms[layer] = kernels.value_norms(chunk.keys)
        for run in self.runs_in(start, num_keys):
            own = slice(run.first - start, run.end - start, run.step)
            lse = chunk.lse[own] - self.log_weights[run.own, None, None]
            keys = replace(chunk.keys, num_keys=run.end)
            queries = ProfiledQueries(chunk.query[own], lse, run.first, run.step)
            kernels.attention_mass(queries, keys, self.bounds, chunk.scale, self.mass[layer])

    def add_found(self, found: torch.Tensor) -> None:
        """Add what a look found: as ``Looks.found``, which is changed."""
        longer, other = found, self.found
        if other.shape[-1] > longer.shape[-1]:
            longer, other = other, longer
        both = longer[..., : other.shape[-1]]
        sums = both[1] + other[1]
        torch.maximum(both, other, out=both)  # of norms, whichever saw the key
        both[1] = sums
        self.found = longer

    @property
    def peaks(self) -> torch.Tensor:
        """float32 ``[2, L, H, keys]``: the most of one query, and the sum over queries."""
        return self.found[:2]

    @property
    def value_norms(self) -> torch.Tensor:
        """float32 ``[L, H, keys]``; ones where they do not count."""
        if not self.profiling.peaks:
            return self._value_norms
        return self.found[2] if self.profiling.value_weighting else torch.ones_like(self.found[2])

    def share(self, other: PromptProfile) -> None:
        """Take what another profile has gathered, which looked at the same prompt alike."""
        self.mass, self.found, self._value_norms = other.mass, other.found, other._value_norms

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
        if self.profiling.peaks:
            scores, sums = self.peaks
            mass = sums[:, :, None, :, None]
        else:
            mass, scores = self.mass, self._mass_of_keys()
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


@dataclass(frozen=True)
class Gathering:
    """Peaks that profiles gather in one step, for all its prompts and layers at once.

    Attributes:
        profiles: whose look each is.
    """

    looks: Looks
    profiles: Sequence[PromptProfile]

    @classmethod
    def of(
        cls, chunks: Sequence[tuple[int, int, int, int, PromptProfile]], device: torch.device
    ) -> Gathering | None:
        """None where there is nothing to look at.

        Args:
            chunks: of each profile, the prompt's index in the step, its chunk's first token there,
                and positions of the chunk's first token and past its last.
        """
        each: list[Look] = []
        weights, profiles = [], []
        for prompt, row, start, end, profile in chunks:
            for run in profile.runs_in(start, end):
                # Queries that stood further back would see what these see of far keys.
                stood = run.first - profile.profiling.least_window
                own = profile.log_weights[run.own]
                first = row + run.first - start
                each.append(Look(prompt, first, len(own), run.step, stood, run.end))
                weights.append(own)
                profiles.append(profile)
        if not each:
            return None
        heads = profiles[0].heads
        looks = Looks.of(each, weights, heads.num_layers, heads.num_kv_heads, device)
        return cls(looks, profiles)

    def finish(self) -> None:
        """All layers have been attended to."""
        for profile, found in zip(self.profiles, self.looks.found, strict=True):
            profile.add_found(found)
