"""One prompt, many policies: FastGen's own rooms under a Hugging Face model, without vLLM.

A prompt is encoded once. Each policy under comparison then gets its own copy of the prompt's pages,
is compacted, and decodes in one batch beside the others, through the same ``Runtime`` and kernels
that vLLM's worker drives (``tests/test_eval.py`` holds the two against each other).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.policy.choice import Choice, Ladder
from fastgen_vllm.policy.hybrids import FULL
from fastgen_vllm.policy.tokens import TokenFlags
from fastgen_vllm.profiler.profile import Goal, PromptProfile
from fastgen_vllm.runtime.runtime import Prefill, Runtime, Step

_BASE = "base"


@dataclass(frozen=True)
class Variant:
    """A method at one setting. ``kv_budget`` 1.0 is the full cache."""

    name: str
    config: FastGenConfig

    @property
    def goal(self) -> Goal:
        return Goal(self.config.recovery, self.config.kv_budget)


class _Profiles:
    """Several profiles of one prompt in one pass: variants that look at it alike share theirs."""

    def __init__(self, profiles: dict[Any, PromptProfile]) -> None:
        self.by_key = profiles

    def add_chunk(self, *args: Any) -> None:
        for profile in self.by_key.values():
            profile.add_chunk(*args)


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
        config = self.model.config
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", heads)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        block_size = variants[0].config.block_size
        shape = (num_tokens // block_size, config.num_hidden_layers, kv_heads, block_size)
        self.flags = TokenFlags.from_tokenizer(self.tokenizer, config.vocab_size)
        self.variants = list(variants)
        kv = torch.zeros(*shape, 2 * head_size)
        self.runtime = Runtime(variants[0].config, self.flags, kv, heads // kv_heads)
        # One ladder for all, so that one batch decodes them; each variant's rungs stand together.
        ladders = [_ladder(v.config) for v in variants] + [Ladder.from_hybrids([FULL], 1)]
        self.runtime.ladder = Ladder.joined(ladders)
        self.free = list(range(1, shape[0]))
        self._step: Step | None = None
        self.logits = torch.empty(0)
        self.positions: dict[str, int] = {}
        self.choices: dict[str, Choice] = {}
        """What each variant chose for the last prompt; policies index the variant's own ladder."""

    def prefill(self, tokens: list[int], chunk: int = 512) -> None:
        """Encode a prompt and give every variant its compacted copy, named as the variant is.

        After it, ``logits`` is float32 ``[variants, vocabulary]``, of the token after the prompt.
        """
        runtime, n = self.runtime, len(tokens)
        for name in list(runtime.tables.rows):
            self._release(name)
        runtime.begin_prefill(_BASE, tokens, RequestOverride(fastgen_compress=False))
        base = runtime.prefills[_BASE]
        profiles = _Profiles({})
        for variant in self.variants:
            if not variant.goal.keeps_everything:
                key = self._profile_key(variant)
                profiles.by_key.setdefault(key, self._profile(variant, base))
        if profiles.by_key:
            base.profile = profiles  # type: ignore[assignment]
        blocks = self._take(-(-n // runtime.pool.block_size))
        for start in range(0, n, chunk):
            end = min(start + chunk, n)
            ids = torch.tensor(tokens[start:end])
            self._step = runtime.start_step(
                [_BASE],
                torch.tensor([0, end - start]),
                torch.tensor([end]),
                torch.tensor([blocks]),
                ids,
            )
            logits = self._forward(ids[None], torch.arange(start, end)[None])
        self.logits = logits[:, -1].expand(len(self.variants), -1)
        self._fork(base, profiles, blocks)
        del runtime.prefills[_BASE]
        self.free += blocks
        self.positions = {v.name: n for v in self.variants}

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed each variant one token; the next token's logits, float32 ``[variants, vocab]``."""
        runtime, names = self.runtime, [v.name for v in self.variants]
        for name in names:
            row = runtime.tables.rows[name]
            if int(runtime.tables.num_free[row]) < runtime.pool.pages_per_block:
                runtime.grant(name, self._take(1))
            self.positions[name] += 1
        seen = torch.tensor([self.positions[name] for name in names])
        ids = torch.tensor(tokens)
        self._step = runtime.start_step(
            names, torch.arange(len(names) + 1), seen, torch.empty(len(names), 0), ids
        )
        self.logits = self._forward(ids[:, None], seen[:, None] - 1)[:, -1]
        return self.logits

    def kept_ratio(self) -> torch.Tensor:
        """float32 ``[variants]``: slots in use of the full cache's."""
        rows = self.runtime.tables.rows_of([v.name for v in self.variants])
        seen = torch.tensor([self.positions[v.name] for v in self.variants])
        return self.runtime.tables.lengths[rows].float().mean((1, 2)) / seen

    def page_ratio(self) -> torch.Tensor:
        """float32 ``[variants]``: memory held, free pages included, of the full cache's."""
        block_size, tables = self.runtime.pool.block_size, self.runtime.tables
        held = [len(tables.blocks[v.name]) for v in self.variants]
        whole = [-(-self.positions[v.name] // block_size) for v in self.variants]
        return torch.tensor(held) / torch.tensor(whole)

    def kept_positions(self, name: str) -> list[list[set[int]]]:
        """Positions kept by layer and head."""
        pool, pages = self.runtime.pool, self.runtime.tables.pages_of(name)
        return [
            [{p for p in head if p >= 0} for head in layer]
            for layer in pool.positions[pages].flatten(2).tolist()
        ]

    def _profile_key(self, variant: Variant) -> tuple[Any, ...]:
        config = variant.config
        windows = tuple(_ladder(config).windows(8192))
        profiling = config.profiling
        how = (profiling.weighting, profiling.window, profiling.value_weighting)
        return (*how, config.group_reduction, config.query_sampling, windows)

    def _profile(self, variant: Variant, base: Prefill) -> PromptProfile:
        pool, config = self.runtime.pool, variant.config
        return PromptProfile(
            config,
            _ladder(config),
            base.num_tokens,
            pool.num_layers,
            pool.num_kv_heads,
            self.runtime.group_size,
            base.special,
            base.punctuation,
            pool.block_size,
            variant.goal,
        )

    def _fork(self, base: Prefill, profiles: _Profiles, blocks: list[int]) -> None:
        pool, first = self.runtime.pool, 0
        shape = (pool.num_layers, pool.num_kv_heads)
        storage = pool.kv.view(pool.num_blocks, -1)
        for variant in self.variants:
            if variant.goal.keeps_everything:
                full = torch.full(shape, len(self.runtime.ladder.hybrids) - 1)
                everything = torch.ones(*shape, base.num_tokens, dtype=torch.bool)
                choice = Choice(full, torch.ones(shape), everything, ~everything)
                scores = torch.zeros(everything.shape)
            else:
                profile = self._profile(variant, base)
                gathered = profiles.by_key[self._profile_key(variant)]
                profile.mass, profile.value_norms = gathered.mass, gathered.value_norms
                stats = profile.stats()
                choice, scores = profile.choose(stats), profile.slot_scores(stats)
                self.choices[variant.name] = choice
                choice = replace(choice, policy=choice.policy + first)
            first += len(variant.config.hybrids)
            own = self._take(len(blocks))
            for ours, theirs in zip(own, blocks, strict=True):
                storage[ours] = storage[theirs]
            self.free += self.runtime.install(variant.name, own, choice, scores).vacated

    def _take(self, count: int) -> list[int]:
        if count > len(self.free):
            raise MemoryError(f"the lab's pool has {len(self.free)} blocks left of {count} asked")
        return [self.free.pop() for _ in range(count)]

    def _release(self, name: str) -> None:
        self.free += self.runtime.tables.blocks[name]
        self.runtime.release(name)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self.model(ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        return out.logits.float()

    def _attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """``query``: ``[batch, H * G, length, D]``; batch or length is 1."""
        assert self._step is not None
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = torch.empty_like(q)
        self.runtime.forward(self._step, module.layer_idx, q, k, v, output, scaling)
        return output.view(query.shape[0], query.shape[2], *output.shape[1:]), None


def _ladder(config: FastGenConfig) -> Ladder:
    return Ladder.from_hybrids(config.hybrids, config.profiling.least_window)
