"""One request's way through the rooms, on plain tensors: prefill, profile, compact, decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastgen_vllm.cache import Compacted, HeadTables, PagePool, compact
from fastgen_vllm.config import FastGenConfig, Plan, RequestOverride
from fastgen_vllm.kernels import Kernels, select
from fastgen_vllm.policy.choice import Choice, Goal
from fastgen_vllm.policy.hybrids import FULL, hybrids_of
from fastgen_vllm.policy.protect import SystemPrompts, protect
from fastgen_vllm.profiler.profile import ModelHeads, PromptChunk, PromptProfile, PromptTokens
from fastgen_vllm.reads import Work, figures, together, wait_for
from fastgen_vllm.runtime.growth import Growth, slots_in
from fastgen_vllm.runtime.report import HeadsKept, Kept, KeptAgain, PendingReport, StepReport
from fastgen_vllm.runtime.step import Encoding, Index, Prefill, PrefillChunk, Step
from fastgen_vllm.tensors import LOGITS_BYTES, MOST_AT_ONCE, to_device

NO_SYSTEM_PROMPTS = SystemPrompts()
CAPTURED_SPLIT = 256
"""Slots of a head that one program attends to in a captured step, whose grid is for the longest."""


class Runtime:
    """FastGen's state on one worker.

    Args:
        token_classes: uint8 ``[vocab_size]``, by token id, where ``kv`` is.
        kv: the engine's storage, ``[num_blocks, L, H, block_size, 2 * head_size]``.
        group_size: query heads per KV head.
        max_requests: most that decode at once.
        report_lag: steps that are under way when the scheduler reads a report: 0 where it waits
            for each, 1 with asynchronous scheduling.
        system_prompts: how the model's chats begin.
        longest: tokens of a request, at most; None where the pool alone says.

    Attributes:
        kernels: what runs; ``why_not_faster`` says why it is not the fastest, or is empty.
        prefills: requests whose prompt is being encoded.
        tables: of those that are past it.
        growths: of those among them that are compacted again.
    """

    kernels: Kernels

    def __init__(
        self,
        config: FastGenConfig,
        token_classes: torch.Tensor,
        kv: torch.Tensor,
        group_size: int,
        max_requests: int = 8,
        report_lag: int = 0,
        system_prompts: SystemPrompts = NO_SYSTEM_PROMPTS,
        longest: int | None = None,
    ) -> None:
        self.config, self.token_classes, self.report_lag = config, token_classes, report_lag
        self._classes_on_host = token_classes.cpu()
        self.pool = PagePool.over(kv)
        block_size, num_blocks = self.pool.block_size, self.pool.num_blocks
        self._most_pages = num_blocks if longest is None else -(-longest // block_size)
        self.heads = ModelHeads(self.pool.num_layers, self.pool.num_kv_heads, group_size)
        self.tables = HeadTables(self.pool, max_requests)
        self._plans: dict[bool, Plan] = {}
        self._system_prompts = system_prompts
        size = kv.shape[-1] // 2
        selected = select(config.kernels, kv.device.type, size, kv.dtype, group_size)
        self.kernels, self.why_not_faster = selected
        self.kernels.prepare(kv)
        self.prefills: dict[str, Prefill] = {}
        self.growths: dict[str, Growth] = {}

    def begin_prefill(
        self,
        request_id: str,
        token_ids: Sequence[int],
        override: RequestOverride,
        sent: int | None = None,
        longest: int | None = None,
    ) -> None:
        """A request starts, or starts again after a preemption with its output as prompt.

        Args:
            sent: tokens of the prompt as it was sent.
            longest: tokens that it can have in the end.
        """
        self.release(request_id)
        prefill = self.prefills[request_id] = Prefill(len(token_ids))
        goal, later = self.config.goals_for(prefill.num_tokens, override, sent, longest)
        if goal is None and later is None:
            return
        prompt = self.prompt_tokens(self.config, token_ids, override)
        if goal is not None:
            prefill.profiles = [self.new_profile(prompt, goal)]
        if later is not None:
            every = 0 if self.config.waits(override) else self.config.compact_every
            prefill.growth = Growth(self._plan(later), later, every, prompt)

    def compact_into(self, request_id: str, blocks: list[int]) -> None:
        """The scheduler gave a request whose prompt ends in this step blocks for what it keeps: the
        prompt's own may serve others, so they are not to change."""
        if request_id in self.prefills:
            self.prefills[request_id].targets = blocks

    def prompt_tokens(
        self, config: FastGenConfig, token_ids: Sequence[int], override: RequestOverride
    ) -> PromptTokens:
        """A prompt's tokens, with those marked that the settings or the request protect."""
        classes = self._classes_on_host[torch.tensor(token_ids, dtype=torch.int64)]
        system = self._system_prompts.length(token_ids)
        by_role = (override.fastgen_protect or config.protect) == "system"
        spans = [(0, system)] if by_role else override.spans
        return PromptTokens(*protect(classes, spans, config.protect_limit), system)

    def new_profile(self, prompt: PromptTokens, goal: Goal) -> PromptProfile:
        """The profile of a prompt that begins."""
        plan, block_size = self._plan(goal), self.pool.block_size
        return PromptProfile(self.config, plan, self.heads, prompt, block_size, goal)

    def _plan(self, goal: Goal) -> Plan:
        by_budget = goal.budget is not None
        if by_budget not in self._plans:  # a method of the literature has one budget
            self._plans[by_budget] = self.config.plan_for(goal, self.pool.kv.device)
        return self._plans[by_budget]

    def release(self, request_id: str) -> None:
        """The request finished, was aborted or was preempted: its blocks are not its own now."""
        self.prefills.pop(request_id, None)
        self.growths.pop(request_id, None)
        self.tables.release(request_id)

    def grant(self, blocks: Mapping[str, Sequence[int]]) -> None:
        """Blocks that the scheduler gave requests for a step. A prompt's come in token order, those
        of the prefix cache first. A decoding request may get 0, the null block, which adds nothing.
        """
        decoding = {}
        for request_id, own in blocks.items():
            if request_id in self.prefills:
                self.prefills[request_id].blocks += own
            elif request_id in self.tables.rows and any(own):
                decoding[request_id] = [block for block in own if block]
        if decoding:
            self.tables.grant(decoding)

    def start_step(
        self,
        request_ids: Sequence[str],
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        token_ids: torch.Tensor,
        host_seq_lens: torch.Tensor | None = None,
    ) -> Step:
        """Plan a batch of mixed prefill chunks and decode tokens.

        Args:
            query_start: int ``[N + 1]`` on the host, cumulative query lengths.
            seq_lens: int ``[N]``, tokens so far including this step's.
            token_ids: int ``[num_tokens]``.
            host_seq_lens: ``seq_lens`` on the host, right for prefills at least.
        """
        starts, device = query_start.tolist(), token_ids.device
        lengths = seq_lens if host_seq_lens is None else host_seq_lens
        is_prompt = [r in self.prefills for r in request_ids]
        of_prompts = [i for i, encodes in enumerate(is_prompt) if encodes]
        decoding = [i for i, encodes in enumerate(is_prompt) if not encodes]
        ids = [request_ids[i] for i in decoding]
        chunks = [
            self._chunk(request_ids[i], starts[i + 1] - starts[i], int(lengths[i]))
            for i in of_prompts
        ]
        encoding = None
        if chunks:
            tokens = _tokens(starts, of_prompts, device)
            encoding = Encoding.of(tokens, chunks, self.prefills, self.pool)
        own = _tokens(starts, decoding, device)
        if not ids:
            return Step(starts[-1], chunks, encoding, [], own, None, None)
        if chunks:
            rows = _index(decoding, device)
            seq_lens, token_ids = seq_lens[rows], token_ids[own]
        assert len(token_ids) == len(ids), "a request decodes more than one token"
        batch = self.tables.batch(ids, seq_lens, self.token_classes[token_ids.long()])
        short = self.kernels.plan_decode(self.pool, self.tables.state, batch)
        return Step(starts[-1], chunks, encoding, ids, own, batch, short)

    def captured_step(self, num_requests: int) -> Step:
        """What a CUDA graph holds of a step in which so many requests decode: replayed, it attends
        for those that ``start_step`` has planned since, and for nobody in the places they leave.
        """
        most = self._captured_slots(num_requests) // self.pool.block_size
        batch = self.tables.first_of_batch(num_requests, most)
        batch = replace(batch, split_slots=CAPTURED_SPLIT)
        return Step(num_requests, [], None, [], slice(None), batch, None)

    def can_replay(self, request_ids: Sequence[str], num_requests: int) -> bool:
        """Whether a graph of ``num_requests`` serves these in the step to come: all decode, and no
        head is longer than it was captured for."""
        if not request_ids or any(r not in self.tables.rows for r in request_ids):
            return False
        return self.tables.longest_of(request_ids) < self._captured_slots(num_requests)

    def _captured_slots(self, num_requests: int) -> int:
        """Of a head, at most, in whole pages: a captured step attends to all requests at once."""
        of_one = 4 * self.heads.num_kv_heads * self.heads.group_size
        pages = LOGITS_BYTES // (of_one * num_requests) // self.pool.block_size
        return min(pages, self._most_pages) * self.pool.block_size

    def _chunk(self, request_id: str, length: int, num_seen: int) -> PrefillChunk:
        prefill, first = self.prefills[request_id], num_seen - length
        if prefill.cached_tokens is None:
            prefill.cached_tokens = first
        return PrefillChunk(request_id, first, num_seen)

    def forward(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        """Write K and V, attend, and profile, for one layer.

        Args:
            query: ``[num_tokens, H * G, D]``.
            key, value: ``[num_tokens, H, D]``.
            output: ``[num_tokens, H * G, D]``, written.
        """
        shape = (self.pool.num_kv_heads, self.heads.group_size)
        query, output = query.unflatten(1, shape), output.unflatten(1, shape)
        if step.encoding is None:
            self._decode(step, layer, query, key, value, output, scale)
            return
        # All K and V of prompts first: one may read blocks that another writes.
        encoding, pages, own = step.encoding, self.pool.of_layer(layer), step.encoding.tokens
        self.kernels.write_kv(key[own], value[own], pages, encoding.slots)
        attended = _of(output, own)
        self._encode(encoding, layer, query[own], attended, scale)
        _put(output, own, attended)
        if step.decode is not None:
            own = step.decode_tokens
            attended = _of(output, own)
            self._decode(step, layer, query[own], key[own], value[own], attended, scale)
            _put(output, own, attended)

    def _decode(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        batch, state = step.decode, self.tables.state
        assert batch is not None
        self.kernels.write_kv(key, value, self.pool.kv, batch.slots[:, layer])
        self.kernels.decode_attention(query, self.pool, state, batch, layer, scale, output)

    def _encode(
        self,
        encoding: Encoding,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        kernels, kv, prompts = self.kernels, self.pool.of_layer(layer), encoding.prompts
        lse = kernels.prefill_attention(query, kv, prompts, scale, output)
        if encoding.gathering is not None:
            looks = encoding.gathering.looks
            kernels.attention_peaks(query, lse, kv, prompts, looks, layer, scale)
        if encoding.by_mass:
            chunks = list(prompts.chunks(kv))
            for i, profile in encoding.by_mass:
                own, keys = chunks[i]
                profile.add_chunk(kernels, layer, PromptChunk(query[own], keys, lse[own], scale))

    def finish_step(self, step: Step, squeeze: Collection[str] = ()) -> PendingReport:
        """Compress the requests whose prompt ended, those that have grown and those that the
        scheduler wants to ``squeeze``, and report."""
        report, ended = StepReport(), {}
        step.finish_profiles()
        self._compact_grown(step.decode_ids, squeeze, report)
        works: list[Work[None]] = []
        for chunk in step.chunks:
            prefill = self.prefills.get(chunk.request_id)
            if prefill is not None and chunk.end == prefill.num_tokens:
                works.append(self._compress(chunk.request_id, prefill, report))
                ended[chunk.request_id] = chunk.end
        wait_for(together(*works))
        alive = [*step.decode_ids, *ended]
        free_pages = self._free_pages(alive, step, list(ended.values()))
        if self.config.debug:
            self.tables.audit()
            report.owned = {r: list(self.tables.blocks[r]) for r in alive}
        short = free_pages.new_full((1,), -1) if step.short is None else step.short
        return PendingReport(report, alive, torch.cat([free_pages, short]))

    def _compact_grown(
        self, request_ids: Sequence[str], squeeze: Collection[str], report: StepReport
    ) -> None:
        """Those that have grown and those to squeeze, as many together as take little memory."""
        works: list[Work[None]] = []
        num_tokens = 0
        for request_id in request_ids:
            growth = self.growths.get(request_id)
            if growth is None:
                continue
            squeezed, grown = request_id in squeeze, growth.add_token()
            if not (grown or squeezed):
                continue
            num_tokens += growth.num_tokens
            if works and num_tokens * self.pool.pages_per_block > MOST_AT_ONCE:
                wait_for(together(*works))
                works, num_tokens = [], growth.num_tokens
            works.append(self._compact_again(request_id, growth, report, squeezed))
        wait_for(together(*works))

    def _free_pages(self, alive: Sequence[str], step: Step, ended: list[int]) -> torch.Tensor:
        """int32, of the requests that decoded and of the prompts that ended, when the report is
        read."""
        state, rows = self.tables.state, self.tables.rows_of(alive)
        if not self.report_lag:
            return state.num_free[rows]
        seen = None if step.decode is None else step.decode.num_tokens
        if ended or seen is None:
            prompts = to_device(torch.tensor(ended, dtype=torch.int64), self.pool.kv.device)
            seen = prompts if seen is None else torch.cat([seen, prompts])
        return self.kernels.free_pages(state, rows, seen, self.pool.block_size, self.report_lag)

    def _compress(self, request_id: str, prefill: Prefill, report: StepReport) -> Work[None]:
        n = prefill.num_tokens
        total = n * self.pool.pages_per_block
        profile, growth = prefill.profile, prefill.growth
        choice = self.everything(n, growth) if profile is None else profile.finish()
        if profile is not None and growth is not None and profile.goal.least_recovery:
            growth.rise_to(profile.goal)
        if growth is not None and growth.waits:
            choice = choice.whole()
        del self.prefills[request_id]
        blocks = prefill.blocks[: -(-n // self.pool.block_size)]
        works: list[Work[Any]] = [self.install(request_id, blocks, choice, prefill.targets, growth)]
        if not choice.is_everything:
            works += [hybrids_of(choice.rules), figures(choice.recovery.mean())]
        installed, *told = yield from together(*works)
        hybrids, (recovery,) = told or ([FULL] * choice.rules.local.numel(), [1.0])
        kinds = [hybrid.kind for hybrid in hybrids]
        report.vacated[request_id] = installed.vacated
        given_back = len(blocks) - len(self.tables.blocks[request_id])
        policies, cached = dict(Counter(kinds)), prefill.cached_tokens or 0
        kept = Kept(installed.kept_slots, total, given_back, policies, cached)
        if self.config.page:
            kept = replace(kept, heads=HeadsKept.of(choice.kept, kinds))
        if profile is not None and self.config.method == "fastgen":
            kept = replace(
                kept,
                budget=profile.budget,
                recovery=recovery,
                protected_tokens=profile.num_protected,
            )
        report.kept[request_id] = kept

    def everything(self, num_tokens: int, growth: Growth | None = None) -> Choice:
        """All that a prompt has; ``growth``: how it goes on, where it is compacted later."""
        shape = (self.heads.num_layers, self.heads.num_kv_heads, num_tokens)
        device = self.pool.kv.device
        sticky = None if growth is None else to_device(growth.sticky(), device)
        return Choice.everything(shape, device, sticky)

    def _compact_again(
        self, request_id: str, growth: Growth, report: StepReport, squeezed: bool
    ) -> Work[None]:
        tables = self.tables
        row, pages = tables.rows[request_id], tables.pages_of(request_id)
        slots = slots_in(self.pool, pages, tables.state.lengths[row], growth.num_tokens)
        rules, kept = growth.choose(self.pool, slots)
        # The scheduler may count on what was unused, where it reads of this later.
        spare = tables.state.num_free[row] if self.report_lag else None
        n, in_use = growth.num_tokens, slots.lengths.sum()
        compacted, (before,) = yield from together(
            compact(tables, request_id, pages, kept, n, self.kernels, spare=spare),
            figures(in_use),
        )
        tables.state.rules[row] = rules
        report.vacated[request_id] = compacted.vacated
        slots_left, total = compacted.kept_slots, n * self.pool.pages_per_block
        ratio, dropped = slots_left / total, int(before) - slots_left
        report.kept_again[request_id] = KeptAgain(ratio, n, dropped, squeezed)

    def install(
        self,
        request_id: str,
        blocks: Sequence[int],
        choice: Choice,
        targets: Sequence[int] | None = None,
        growth: Growth | None = None,
    ) -> Work[Compacted]:
        """Enter a prompt that lies in ``blocks``, in token order, and compact it to the choice,
        into ``targets`` where it is not to change."""
        tables, n = self.tables, choice.kept.shape[-1]
        if growth is not None:
            growth.prepare(choice.rules)
            self.growths[request_id] = growth
        pages = tables.enter(request_id, blocks, choice.rules, choice.scores, choice.sticky)
        if choice.is_everything and targets is None:
            tables.hold_all(request_id, pages, n)
            return Compacted([], n * self.pool.pages_per_block)
        return (
            yield from compact(tables, request_id, pages, choice.kept, n, self.kernels, targets)
        )


def _tokens(starts: Sequence[int], requests: Sequence[int], device: torch.device) -> Index:
    """Of some requests of a batch, whose tokens begin at ``starts``."""
    if requests and requests[-1] - requests[0] == len(requests) - 1:
        return slice(starts[requests[0]], starts[requests[-1] + 1])
    return _index([t for i in requests for t in range(starts[i], starts[i + 1])], device)


def _index(numbers: Sequence[int], device: torch.device) -> Index:
    """Of ascending numbers."""
    if not numbers:
        return slice(0)
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return to_device(torch.tensor(numbers), device)


def _of(output: torch.Tensor, tokens: Index) -> torch.Tensor:
    """Where those tokens' output is written: a part of it, or what ``_put`` then copies."""
    if isinstance(tokens, slice):
        return output[tokens]
    return output.new_empty((len(tokens), *output.shape[1:]))


def _put(output: torch.Tensor, tokens: Index, own: torch.Tensor) -> None:
    if not isinstance(tokens, slice):
        output[tokens] = own
