"""One request's way through the rooms, on plain tensors: prefill, profile, compact, decode."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastgen_vllm.cache import (
    Compacted,
    DecodeStep,
    HeadTables,
    PagePool,
    check_pages,
    compact,
    plan_decode,
)
from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import cpu, select
from fastgen_vllm.policy.choice import Choice, Ladder
from fastgen_vllm.policy.tokens import TokenFlags
from fastgen_vllm.profiler.profile import Goal, PromptProfile
from fastgen_vllm.tensors import to_device

logger = logging.getLogger(__name__)


@dataclass
class Prefill:
    """A request whose prompt is being encoded. ``profile`` is None where all is kept."""

    num_tokens: int
    special: torch.Tensor
    punctuation: torch.Tensor
    profile: PromptProfile | None


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens ``[start, end)`` of the batch: positions from ``first`` of a prompt.

    Attributes:
        page_table: int64 ``[H, B]``, pages in ``PagePool.of_layer`` of any layer.
        slots: int64 ``[end - start, H]``, where there the chunk's K and V go.
    """

    request_id: str
    start: int
    end: int
    first: int
    blocks: torch.Tensor
    page_table: torch.Tensor
    slots: torch.Tensor

    @property
    def num_seen(self) -> int:
        return self.first + self.end - self.start


@dataclass(frozen=True)
class Step:
    """One engine step, shared by all layers.

    Attributes:
        num_tokens: tokens in the batch, without padding.
        decode_tokens: int64 ``[N]``, batch index of each decoding request's token, or None where
            the batch is those and nothing else.
    """

    num_tokens: int
    chunks: list[PrefillChunk]
    decode_ids: list[str]
    decode_tokens: torch.Tensor | None
    decode: DecodeStep | None


@dataclass(frozen=True)
class Kept:
    """What a request kept after its prompt."""

    kept_slots: int
    total_slots: int
    vacated_blocks: int
    policy_heads: dict[str, int]


@dataclass
class StepReport:
    """What the scheduler must know after a step, by request id.

    Attributes:
        vacated: block ids handed back.
        free_pages: of every decoding request, the pages that it owns and that will be unused when
            the scheduler reads this, ``report_lag`` steps later, at worst.
        kept: of requests that finished their prompt in this step.
        owned: in debug mode, the blocks that each decoding request owns.
    """

    vacated: dict[str, list[int]] = field(default_factory=dict)
    free_pages: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    owned: dict[str, list[int]] | None = None


class PendingReport:
    """A report whose figures may still be on their way from the device."""

    def __init__(self, report: StepReport, alive: Sequence[str], step: Step, figures: torch.Tensor):
        self._report, self._alive, self._step = report, alive, step
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
        check_pages(self._step.decode_ids, short)
        self._report.free_pages = dict(zip(self._alive, free_pages, strict=True))
        return self._report


class Runtime:
    """FastGen's state on one worker.

    Args:
        kv: the engine's storage, ``[num_blocks, L, H, block_size, 2 * head_size]``.
        group_size: query heads per KV head.
        max_requests: most that decode at once; more are possible, but move the head tables.
        report_lag: steps that are under way when the scheduler reads a report: 0 where it waits
            for each, 1 with asynchronous scheduling.
    """

    def __init__(
        self,
        config: FastGenConfig,
        flags: TokenFlags,
        kv: torch.Tensor,
        group_size: int,
        max_requests: int = 8,
        report_lag: int = 0,
    ) -> None:
        self.config, self.flags, self.group_size = config, flags, group_size
        self.report_lag = report_lag
        self.pool = PagePool.over(kv, kv.shape[1], kv.shape[2])
        self.tables = HeadTables(self.pool, max_requests)
        self.ladder = Ladder.from_hybrids(config.hybrids, config.profiling.least_window, kv.device)
        self.kernels = select(config.kernels, kv.device.type, kv.shape[-1] // 2, kv.dtype)
        if self.kernels is cpu:
            cpu.use_huge_pages(kv)
        self.prefills: dict[str, Prefill] = {}

    def begin_prefill(
        self, request_id: str, token_ids: Sequence[int], override: RequestOverride
    ) -> None:
        """A request starts, or starts again after a preemption with its output as prompt."""
        self.release(request_id)
        on_host = torch.tensor(token_ids, dtype=torch.int64)
        tokens = to_device(on_host, self.flags.special.device)
        special, punctuation = self.flags.special[tokens], self.flags.punctuation[tokens]
        goal = self._goal(override)
        n = len(token_ids)
        profile = None
        compresses = override.fastgen_compress and not goal.keeps_everything
        if compresses and n >= self.config.min_prompt_tokens:
            profile = PromptProfile(
                self.config,
                self.ladder,
                n,
                self.pool.num_layers,
                self.pool.num_kv_heads,
                self.group_size,
                special,
                punctuation,
                self.pool.block_size,
                goal,
            )
        self.prefills[request_id] = Prefill(n, special, punctuation, profile)

    def _goal(self, override: RequestOverride) -> Goal:
        goal = Goal(override.fastgen_recovery, override.fastgen_kv_budget)
        if goal == Goal(None, None):
            return Goal(self.config.recovery, self.config.kv_budget)
        return goal

    def release(self, request_id: str) -> None:
        """The request finished, was aborted or was preempted: its blocks are not its own now."""
        self.prefills.pop(request_id, None)
        self.tables.release(request_id)

    def grant(self, request_id: str, blocks: Sequence[int]) -> None:
        """Blocks that the scheduler gave a decoding request; 0, the null block, gives nothing."""
        real = [block for block in blocks if block]
        if real and request_id in self.tables.rows:
            self.tables.grant(request_id, real)

    def start_step(
        self,
        request_ids: Sequence[str],
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        token_ids: torch.Tensor,
        host_seq_lens: torch.Tensor | None = None,
    ) -> Step:
        """Plan a batch of mixed prefill chunks and decode tokens.

        Args:
            query_start: int ``[N + 1]`` on the host, cumulative query lengths.
            seq_lens: int ``[N]``, tokens so far including this step's.
            block_table: int ``[N, B]``, the engine's block table; read for prefills only.
            token_ids: int ``[num_tokens]``.
            host_seq_lens: ``seq_lens`` on the host, right for prefills at least.
        """
        chunks: list[PrefillChunk] = []
        decode_ids: Sequence[str] = request_ids
        if self.prefills:
            lengths = (seq_lens if host_seq_lens is None else host_seq_lens).tolist()
            starts = query_start.tolist()
            decode_rows: list[int] = []
            for i, request_id in enumerate(request_ids):
                if request_id in self.prefills:
                    first = lengths[i] - (starts[i + 1] - starts[i])
                    blocks = block_table[i, : -(-lengths[i] // self.pool.block_size)]
                    chunks.append(
                        self._chunk(request_id, starts[i], starts[i + 1], first, blocks.long())
                    )
                else:
                    decode_rows.append(i)
            decode_ids = [request_ids[i] for i in decode_rows]
        num_tokens = int(query_start[-1])
        assert chunks or num_tokens == len(request_ids), "a request decodes more than one token"
        decode_tokens = decode = None
        if decode_ids:
            if chunks:
                rows = to_device(torch.tensor(decode_rows), token_ids.device)
                decode_tokens = to_device(query_start[decode_rows].long(), token_ids.device)
                seq_lens, token_ids = seq_lens[rows], token_ids[decode_tokens]
            newest = token_ids.long()
            decode = plan_decode(
                self.tables,
                self.ladder,
                decode_ids,
                seq_lens.long(),
                self.flags.special[newest],
                self.flags.punctuation[newest],
                self.config.frequent_score,
                self.kernels,
            )
        return Step(num_tokens, chunks, list(decode_ids), decode_tokens, decode)

    def _chunk(
        self, request_id: str, start: int, end: int, first: int, blocks: torch.Tensor
    ) -> PrefillChunk:
        page_table = self.pool.pages_of(blocks)[0].contiguous()
        positions = torch.arange(first, first + end - start, device=blocks.device)
        block_size = self.pool.block_size
        slots = page_table[:, positions // block_size] * block_size + positions % block_size
        return PrefillChunk(request_id, start, end, first, blocks, page_table, slots.T.contiguous())

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
        shape = (self.pool.num_kv_heads, self.group_size)
        query, output = query.unflatten(1, shape), output.unflatten(1, shape)
        for chunk in step.chunks:
            tokens = slice(chunk.start, chunk.end)
            self._prefill(
                chunk, layer, query[tokens], key[tokens], value[tokens], output[tokens], scale
            )
        if step.decode is None:
            return
        if step.decode_tokens is None:
            self._decode(step.decode, layer, query, key, value, output, scale)
            return
        tokens = step.decode_tokens
        attended = torch.empty_like(query[: len(tokens)])
        self._decode(step.decode, layer, query[tokens], key[tokens], value[tokens], attended, scale)
        output[tokens] = attended

    def finish_step(self, step: Step) -> PendingReport:
        """Compress the requests whose prompt ended, and report."""
        report = StepReport()
        for chunk in step.chunks:
            prefill = self.prefills.get(chunk.request_id)
            if prefill is not None and chunk.num_seen == prefill.num_tokens:
                self._compress(chunk, prefill, report)
        alive = [*step.decode_ids, *report.kept]
        rows, block_size = self.tables.rows_of(alive), self.pool.block_size
        # A head takes at most one page in the steps under way, and only near the end of its last.
        takes_page = -self.tables.lengths[rows] % block_size < self.report_lag
        free_pages = self.tables.num_free[rows] - takes_page.flatten(1).sum(-1)
        if self.config.debug:
            self.tables.audit()
            report.owned = {r: list(self.tables.blocks[r]) for r in alive}
        short = -1 if step.decode is None else step.decode.short
        if isinstance(short, int):
            short = free_pages.new_tensor([short])
        return PendingReport(report, alive, step, torch.cat([free_pages, short]))

    def _prefill(
        self,
        chunk: PrefillChunk,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        pages, table = self.pool.of_layer(layer), chunk.page_table
        self.kernels.write_kv(key, value, pages, chunk.slots)
        lse = self.kernels.prefill_attention(query, pages, table, chunk.num_seen, scale, output)
        profile = self.prefills[chunk.request_id].profile
        if profile is not None:
            profile.add_chunk(
                self.kernels, layer, query, value, pages, table, chunk.num_seen, lse, scale
            )

    def _decode(
        self,
        step: DecodeStep,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> None:
        pool, tables = self.pool, self.tables
        self.kernels.write_kv(key, value, pool.kv, step.slots[:, layer])
        self.kernels.decode_attention(
            query,
            pool.kv,
            pool.positions,
            step.rows,
            tables.page_table,
            tables.table_start[:, layer],
            tables.lengths[:, layer],
            tables.keeps_scores[:, layer],
            pool.scores,
            step.max_pages,
            scale,
            output,
        )

    def _compress(self, chunk: PrefillChunk, prefill: Prefill, report: StepReport) -> None:
        request_id, shape = chunk.request_id, (self.pool.num_layers, self.pool.num_kv_heads)
        n, device = prefill.num_tokens, self.pool.kv.device
        if prefill.profile is None:
            policy = torch.full(shape, len(self.ladder.hybrids) - 1, device=device)
            kept = torch.ones((*shape, n), dtype=torch.bool, device=device)
            sticky = self.ladder.sticky(policy, prefill.special, prefill.punctuation)
            choice = Choice(policy, torch.ones(shape), kept, sticky)
            scores = torch.zeros((*shape, n), device=device)
        else:
            stats = prefill.profile.stats()
            choice, scores = prefill.profile.choose(stats), prefill.profile.slot_scores(stats)
        del self.prefills[request_id]
        compacted = self.install(request_id, chunk.blocks.tolist(), choice, scores)
        heads = Counter(self.ladder.hybrids[i].kind for i in choice.policy.flatten().tolist())
        report.vacated[request_id] = compacted.vacated
        report.kept[request_id] = Kept(
            compacted.kept_slots, compacted.total_slots, len(compacted.vacated), dict(heads)
        )
        logger.debug(
            "%s: kept %d of %d slots, vacated %d blocks",
            request_id,
            compacted.kept_slots,
            compacted.total_slots,
            len(compacted.vacated),
        )

    def install(
        self, request_id: str, blocks: Sequence[int], choice: Choice, scores: torch.Tensor
    ) -> Compacted:
        """Compact a prompt that lies in ``blocks``, in token order, to what ``choice`` keeps.

        Args:
            scores: float32 ``[L, H, n]``, where the sums of heads that keep scores go on from.
        """
        return compact(
            self.tables,
            request_id,
            blocks,
            choice.kept,
            choice.policy,
            scores,
            choice.sticky,
            self.ladder.frequent[choice.policy] > 0,
            self.kernels,
        )
