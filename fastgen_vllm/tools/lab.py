"""One prompt, many policies: FastGen's own rooms under a Hugging Face model, without vLLM.

A prompt is encoded once. Each policy under comparison then gets its own copy of the prompt's pages,
is compacted, and decodes in one batch beside the others, through the same ``Runtime`` and kernels
that vLLM's worker drives (``tests/tools/test_eval.py`` holds the two against each other).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.policy.choice import Choice, Goal
from fastgen_vllm.policy.methods import EVAL_ONLY
from fastgen_vllm.policy.observed import Observed
from fastgen_vllm.policy.protect import SystemPrompts
from fastgen_vllm.policy.tokens import token_classes
from fastgen_vllm.profiler.profile import PromptProfile
from fastgen_vllm.runtime.driver import Driver
from fastgen_vllm.runtime.growth import Growth
from fastgen_vllm.runtime.runtime import Runtime
from fastgen_vllm.runtime.step import Step
from fastgen_vllm.tools.models import ModelShape
from fastgen_vllm.tools.observe import Observer

_BASE = "base"


@dataclass(frozen=True)
class Variant:
    """A method at one setting. ``kv_budget`` 1.0 is the full cache."""

    name: str
    config: FastGenConfig

    @property
    def goal(self) -> Goal:
        return self.config.goal

    @property
    def needs_model(self) -> bool:
        return self.config.method in EVAL_ONLY and not self.goal.keeps_everything


class Lab:
    """A model, a page pool and the variants under comparison.

    Args:
        num_tokens: what the pool holds, in tokens of the full cache.
    """

    def __init__(self, model: str | Path, variants: Sequence[Variant], num_tokens: int) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        AttentionInterface.register("fastgen_lab", self._attend)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="fastgen_lab"
        ).eval()
        shape, config = ModelShape.from_config(self.model.config), self.model.config
        block_size = variants[0].config.block_size
        special = {token for v in variants for token in v.config.extra_special_tokens}
        classes = token_classes(self.tokenizer, config.vocab_size, sorted(special))
        self.end_tokens = _end_tokens(self.model, self.tokenizer)
        self.variants = list(variants)
        kv = torch.zeros(
            num_tokens // block_size,
            shape.num_layers,
            shape.num_kv_heads,
            block_size,
            2 * shape.head_size,
        )
        settings, most = variants[0].config, len(variants) + 1
        chats = SystemPrompts.of(self.tokenizer)
        self.runtime = Runtime(
            settings, classes, kv, shape.group_size, max_requests=most, system_prompts=chats
        )
        self.driver = Driver(self.runtime)
        self._step: Step | None = None
        self._observer: Observer | None = None
        self.logits = self._first = torch.empty(0)
        self.choices: dict[str, Choice] = {}
        """What each variant chose for the last prompt."""
        self.observed: Observed | None = None
        """The last prompt as the model computed it, where a variant needs that."""

    def prefill(self, tokens: list[int], chunk: int = 512) -> None:
        """Encode a prompt and ``fork``.

        After it, ``logits`` is float32 ``[variants, vocabulary]``, of the token after the prompt.
        """
        runtime, n = self.runtime, len(tokens)
        for name in list(self.driver.requests):
            self.driver.end(name)
        self.driver.begin(_BASE, tokens, RequestOverride(fastgen_compress=False))
        # Variants that look at the prompt alike share a profile.
        profiles: dict[Any, PromptProfile] = {}
        for variant in self.variants:
            if not variant.goal.keeps_everything:
                profiles.setdefault(self._profile_key(variant), self._profile(variant, tokens))
        runtime.prefills[_BASE].profiles = list(profiles.values())
        if any(variant.needs_model for variant in self.variants):
            self._observer = Observer(self.model)
        for start in range(0, n, chunk):
            end = min(start + chunk, n)
            self._step = self.driver.start_step({_BASE: end - start})
            ids = torch.tensor(tokens[start:end])
            logits = self._forward(ids[None], torch.arange(start, end)[None])
            self._step.finish_profiles()
        self._first = logits[:, -1].expand(len(self.variants), -1)
        if self._observer is not None:
            blocks = self.driver.requests[_BASE].table
            self.observed = self._observer.finish(runtime.pool, blocks)
            self._observer = None
        self.choices = {v.name: self._choose(v, tokens, profiles) for v in self.variants}
        self.fork()

    def fork(self) -> None:
        """Give every variant a compacted copy of the prompt, named as the variant is; a copy that
        has been decoded from is dropped."""
        base, pool = self.driver.requests[_BASE], self.runtime.pool
        storage = pool.kv.view(pool.num_blocks, -1)
        for variant in self.variants:
            if variant.name in self.driver.requests:
                self.driver.end(variant.name)
            own = self.driver.take(len(base.table))
            for ours, theirs in zip(own, base.table, strict=True):
                storage[ours] = storage[theirs]
            choice, growth = self.choices[variant.name], self._growth(variant, base.tokens)
            self.driver.adopt(variant.name, base.tokens, own, choice, growth)
        self.logits = self._first

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed each variant one token; the next token's logits, float32 ``[variants, vocab]``."""
        names = [v.name for v in self.variants]
        for name, token in zip(names, tokens, strict=True):
            self.driver.requests[name].tokens.append(token)
        step = self._step = self.driver.start_step(dict.fromkeys(names, 1))
        self.logits = self._forward(torch.tensor(tokens)[:, None], self._seen()[:, None] - 1)[:, -1]
        self.driver.finish_step(step)
        return self.logits

    def _seen(self) -> torch.Tensor:
        """int64 ``[variants]``, tokens so far."""
        return torch.tensor([self.driver.requests[v.name].computed for v in self.variants])

    def kept_ratio(self) -> torch.Tensor:
        """float32 ``[variants]``: slots in use of the full cache's."""
        rows = self.runtime.tables.rows_of([v.name for v in self.variants])
        return self.runtime.tables.state.lengths[rows].float().mean((1, 2)) / self._seen()

    def page_ratio(self) -> torch.Tensor:
        """float32 ``[variants]``: memory held, free pages included, of the full cache's."""
        held = [len(self.runtime.tables.blocks[v.name]) for v in self.variants]
        return torch.tensor(held) / -(-self._seen() // self.runtime.pool.block_size)

    def kept_positions(self, name: str) -> list[list[set[int]]]:
        """Positions kept by layer and head."""
        pool, pages = self.runtime.pool, self.runtime.tables.pages_of(name)
        return [
            [{p for p in head if p >= 0} for head in layer]
            for layer in pool.positions[pages].flatten(2).tolist()
        ]

    def _profile_key(self, variant: Variant) -> tuple[Any, ...]:
        config = variant.config
        plan = config.plan_for(variant.goal)
        windows, profiling = tuple(plan.ladder.windows(8192)), plan.profiling
        how = (profiling.weighting, profiling.window, profiling.value_weighting)
        peaks = (profiling.peaks, profiling.peaks and profiling.least_window)
        return (*how, *peaks, config.group_reduction, config.query_sampling, windows)

    def _profile(self, variant: Variant, tokens: list[int]) -> PromptProfile:
        runtime, config = self.runtime, variant.config
        prompt = runtime.prompt_tokens(config, tokens, RequestOverride())
        plan, goal = config.plan_for(variant.goal), variant.goal
        return PromptProfile(config, plan, runtime.heads, prompt, runtime.pool.block_size, goal)

    def _growth(self, variant: Variant, tokens: list[int]) -> Growth | None:
        config, asked = variant.config, RequestOverride()
        goal = config.growth_goal(asked)
        if goal is None:
            return None
        prompt = self.runtime.prompt_tokens(config, tokens, asked)
        return Growth(config.plan_for(goal), goal, config.compact_every, prompt)

    def _choose(
        self, variant: Variant, tokens: list[int], profiles: dict[Any, PromptProfile]
    ) -> Choice:
        if variant.config.goal_for(len(tokens), RequestOverride()) is None:
            growth = self._growth(variant, tokens)
            return self.runtime.everything(len(tokens), growth)
        profile = self._profile(variant, tokens)
        profile.share(profiles[self._profile_key(variant)])
        profile.observed = self.observed
        return profile.finish()

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self.model(ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        return out.logits.float()

    def _attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """``query``: ``[batch, H * G, length, D]``; batch or length is 1."""
        assert self._step is not None
        if self._observer is not None:
            self._observer.add(module, query, scaling)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = torch.empty_like(q)
        self.runtime.forward(self._step, module.layer_idx, q, k, v, output, scaling)
        return output.view(query.shape[0], query.shape[2], *output.shape[1:]), None


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end an answer."""
    known = model.generation_config.eos_token_id
    ends = known if isinstance(known, list) else [known]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
