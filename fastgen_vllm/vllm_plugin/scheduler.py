"""The scheduler: takes vacated blocks back and tells clients what their request kept."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from fastgen_vllm.runtime.footprint import MOST_CACHED_PROMPTS
from fastgen_vllm.runtime.report import Kept, StepReport
from fastgen_vllm.runtime.traffic import Accounts
from fastgen_vllm.vllm_plugin.block_manager import FastGenBlockManager, Prompt
from fastgen_vllm.vllm_plugin.metrics import ACCOUNT
from fastgen_vllm.vllm_plugin.names import LOGGER
from fastgen_vllm.vllm_plugin.overrides import override_of
from fastgen_vllm.vllm_plugin.settings import fastgen_config

logger = init_logger(LOGGER)

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as SchedulerBase
else:
    SchedulerBase = object


class FastGenSchedulerMixin(SchedulerBase):
    """Reads the worker's report of a step before the step's outputs, however late they come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, FastGenBlockManager)
        (group,) = self.kv_cache_config.kv_cache_groups
        manager.pages_per_block = len(group.layer_names) * group.kv_cache_spec.num_kv_heads
        self.block_manager = manager
        self.kept: dict[str, Kept] = {}
        self.stops_at_strings: set[str] = set()
        self.counted: set[str] = set()
        names = self.vllm_config.model_config.served_model_name
        model = names if isinstance(names, str) else names[0]
        index = self.vllm_config.parallel_config.data_parallel_index
        self.accounts = Accounts({"model": model, "engine": index})
        self.block_bytes = len(group.layer_names) * group.kv_cache_spec.page_size_bytes
        manager.most_cached_tokens = MOST_CACHED_PROMPTS * self.max_model_len
        config = self.config = fastgen_config(self.vllm_config)
        self.tells = self.log_stats or config.page
        self.debug = config.debug
        if manager.enable_caching and config.queries_looked_at(config.goal) is None:
            logger.info(
                "FASTGEN: %s looks at all tokens of a prompt, so prompts that it compresses take "
                "nothing from the prefix cache and leave nothing in it",
                config.description,
            )
        logger.info(
            "FASTGEN: %s, %d head pages of %d tokens per block, "
            "prompts from %d tokens are compressed",
            config.description,
            manager.pages_per_block,
            config.block_size,
            config.min_prompt_tokens,
        )

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        manager = self.block_manager
        manager.begin_step()
        manager.is_planning = True
        manager.reserve = len(self._squeezable())
        output = super().schedule(*args, **kwargs)
        manager.is_planning = False
        output.fastgen_squeeze = self._squeeze(output.num_scheduled_tokens)
        output.fastgen_step = manager.step
        output.fastgen_targets = {
            request_id: [block.block_id for block in blocks]
            for request_id, blocks in manager.targets.items()
        }
        if self.debug:
            new = {b for blocks in manager.given_since(manager.step - 1).values() for b in blocks}
            output.fastgen_hashed = {
                block.block_id: block.block_hash
                for block in manager.block_pool.blocks
                if block.block_hash and block.block_id not in new
            }
        return output

    def _get_local_prefix_cache_hit(
        self, request: Request, *limits: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Those blocks of a hit that leave the tokens to compute that the profile looks at."""
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request, *limits)
        self.block_manager.prompts.pop(request.request_id, None)  # of an earlier try
        prompt = self._expected(request, hit)
        if hit > prompt.cached:
            hit = prompt.cached
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, hit)
        self.block_manager.prompts[request.request_id] = prompt
        return blocks, hit, boundary, diverged

    def _expected(self, request: Request, hit: int) -> Prompt:
        """What comes of a request whose first ``hit`` tokens are cached."""
        config, manager, n = self.config, self.block_manager, request.num_tokens
        override = override_of(config, request.sampling_params)
        sent, block_size = request.num_prompt_tokens, manager.block_size
        goal, later = config.goals_for(n, override, sent, sent + request.max_tokens)
        if goal is None and later is None:
            return Prompt(n, True, cached=hit if hit // block_size <= manager.can_lend else 0)
        needed = 0 if goal is None else config.queries_looked_at(goal)
        if needed is None or not manager.enable_caching:
            return Prompt(n, False, squeezed=later)
        most = min(hit, max(0, n - needed) // block_size * block_size)
        # What keeps all of its prompt for now has blocks of its own from then on.
        targets = -(-n // block_size)
        if goal is not None and not config.waits(override):
            targets = config.most_blocks(n, goal, override)
        return Prompt(n, True, targets, most, later)

    def _squeezable(self) -> list[str]:
        """Requests that decode and can be compacted further."""
        manager = self.block_manager
        return [r for r in manager.free_pages if manager.prompts[r].squeezed is not None]

    def _squeeze(self, scheduled: dict[str, int]) -> list[str]:
        """Requests to compact in the step that is planned, those that hold most first, so that the
        next ones find blocks."""
        manager = self.block_manager
        able = [r for r in self._squeezable() if r in scheduled]
        free = manager.block_pool.get_num_free_blocks() + sum(manager.squeezing.values())
        if not able or free >= (soon := self._needed_soon()):
            return []
        able.sort(key=lambda r: -len(manager.owned_blocks(r)))
        chosen = []
        # Whoever decodes next may preempt somebody, which costs more than many small squeezes.
        for needed, urgent in ((soon, False), (len(self.running), True)):
            for request_id in able:
                if free >= needed:
                    break
                gain = 0 if request_id in manager.squeezing else self._gain(request_id, urgent)
                if gain:
                    manager.squeezing[request_id] = gain
                    chosen.append(request_id)
                    free += gain
        return chosen

    def _gain(self, request_id: str, urgent: bool) -> int:
        """Blocks that squeezing a request frees; 0 where that is not worth the while."""
        manager, length = self.block_manager, self.requests[request_id].num_tokens
        goal, kept = manager.prompts[request_id].squeezed, self.kept[request_id]
        assert goal is not None
        share = goal.with_protected(kept.protected_tokens / length).share_of(length)
        if goal.least_recovery:
            share = max(share, kept.budget or 0.0)
        slots, last = share * length, kept.last
        if last is not None and urgent:  # what was not reached before is not reached now
            slots = max(slots, last.ratio * last.num_tokens)
        owned = len(manager.owned_blocks(request_id))
        # Heads leave pages partly empty; with late reports what is free is counted on meanwhile.
        slack = 3 if urgent and isinstance(self, AsyncScheduler) else 2
        gain = owned - round(slots) // manager.block_size - slack
        if last is None and kept.kept_slots == kept.total_slots:
            return max(0, gain)  # it holds everything
        compacted_at = 0 if last is None else last.num_tokens
        grown = length - compacted_at
        if urgent:
            return gain if gain >= 2 and grown >= manager.block_size else 0
        return gain if 8 * gain >= owned and 16 * grown >= compacted_at else 0

    def _needed_soon(self) -> int:
        """Blocks that may be asked for in the next steps: by whoever decodes one, by prompts that
        are being encoded those of a step, and by the first that waits what it is admitted for."""
        manager, most = self.block_manager, self.max_num_scheduled_tokens
        prompts = [(r, manager.prompts.get(r.request_id)) for r in self.running]
        encoding = [(r, p) for r, p in prompts if p and r.num_computed_tokens < p.num_tokens]
        tokens = [min(most, p.num_tokens - r.num_computed_tokens) for r, p in encoding]
        targets = sum(p.targets for _, p in encoding)
        if self.waiting and len(self.running) < self.max_num_running_reqs:
            first = self.waiting.peek_request().num_tokens
            tokens.append(first if self.scheduler_reserve_full_isl else min(most, first))
        return len(self.running) + targets + sum(-(-n // manager.block_size) for n in tokens)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        report = getattr(model_runner_output, "fastgen_report", None)
        if report is not None:
            self.apply_report(report, scheduler_output.fastgen_step)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._tell_before_stop_strings(outputs)
        if self.tells:
            self._tell_account(outputs)
        return outputs

    def _tell_account(self, outputs: Any) -> None:
        """On some output of this step, to whatever API server it goes: see ``metrics``."""
        accounts, told = self.accounts, [o for each in outputs.values() for o in each.outputs]
        running, waiting = self.get_request_counts()
        # No output may follow: the engine is idle, or the front end ends what still runs.
        stopping = self.stops_at_strings
        untold = accounts.traffic and all(r.request_id in stopping for r in self.running)
        if told and (accounts.due() or untold or not running + waiting):
            account = accounts.tell({**self._held(), "running": running, "waiting": waiting})
            params = told[-1].kv_transfer_params or {}
            told[-1].kv_transfer_params = {**params, ACCOUNT: account}
        happened = accounts.to_log()
        if happened:
            saved = self._held()["kv_saved_bytes"] / 2**20
            logger.info("FASTGEN: %s; %.0f MiB of KV saved now", happened, saved)

    def _held(self) -> dict[str, int]:
        """What requests that decode hold of the pool."""
        manager, saved = self.block_manager, 0
        held: set[int] = set()
        for request_id in manager.free_pages:
            owned = manager.owned_blocks(request_id)
            held.update(owned)
            saved += max(0, len(manager.req_to_blocks[request_id]) - len(owned))
        return {
            "kv_held_bytes": len(held) * self.block_bytes,
            "kv_saved_bytes": saved * self.block_bytes,
            "free_pages": sum(manager.free_pages.values()),
        }

    def _tell_before_stop_strings(self, outputs: Any) -> None:
        """The front end finds a stop string, and takes what it then tells from the output that
        held it: no other comes from here. So every output tells it, where one could be the last.
        """
        if not self.stops_at_strings:
            return
        for output in (output for each in outputs.values() for output in each.outputs):
            kept = self.kept.get(output.request_id)
            if kept is not None and output.request_id in self.stops_at_strings:
                output.kv_transfer_params = {"fastgen": _summary(kept)}

    def apply_report(self, report: StepReport, step: int) -> None:
        """Take back what was vacated in ``step``; later steps may have been planned since."""
        manager, traffic = self.block_manager, self.accounts.traffic
        left, given = manager.left_since(step), manager.given_since(step)
        alive = [r for r in report.free_pages if r in manager.req_to_blocks and r not in left]
        for request_id in alive:
            vacated = report.vacated.get(request_id, ())
            manager.vacate(request_id, vacated)
            # A prompt may give back its blocks and keep others, which it was compacted into.
            ended = report.kept.get(request_id)
            traffic.vacated_blocks += len(vacated) if ended is None else ended.vacated_blocks
            since = len(given.get(request_id, ())) * manager.pages_per_block
            manager.free_pages[request_id] = report.free_pages[request_id] + since
            if request_id in report.kept:
                self._remember(request_id, report.kept[request_id])
            if request_id in report.kept_again:
                before, last = self.kept[request_id], report.kept_again[request_id]
                traffic.compactions += 1
                traffic.evicted_slots += last.dropped_slots
                if last.squeezed:
                    traffic.squeezes += 1
                    manager.squeezing.pop(request_id, None)
                again = replace(before, compactions=before.compactions + 1, last=last)
                self.kept[request_id] = again
        if self.debug and report.owned is not None:
            self._audit({r: [*report.owned[r], *given.get(r, ())] for r in alive})

    def _remember(self, request_id: str, kept: Kept) -> None:
        self.kept[request_id] = kept
        request = self.requests[request_id]
        sampling_params, n = request.sampling_params, request.num_prompt_tokens
        if self.tells and request_id not in self.counted:  # it may have been preempted since
            self.counted.add(request_id)
            override = override_of(self.config, sampling_params)
            self.accounts.traffic.add_prompt(n, kept, self.config.why_whole(n, override))
            self.accounts.show(request_id, n, kept)
        if sampling_params is not None and sampling_params.stop:
            self.stops_at_strings.add(request_id)

    def _audit(self, owned: dict[str, list[int]]) -> None:
        """The worker's blocks of each request are ours, and none is lost or has owners that it does
        not count."""
        manager, pool = self.block_manager, self.block_manager.block_pool
        for request_id, blocks in owned.items():
            ours, theirs = sorted(manager.owned_blocks(request_id)), sorted(blocks)
            assert ours == theirs, f"{request_id}: scheduler {ours}, worker {theirs}"
        held = Counter(b for r in manager.req_to_blocks for b in manager.owned_blocks(r))
        for block, owners in held.items():
            counted = pool.blocks[block].ref_cnt
            assert owners == counted, f"block {block} has {owners} owners and counts {counted}"
        total = len(held) + pool.get_num_free_blocks()
        assert total == pool.num_gpu_blocks - 1, f"{pool.num_gpu_blocks - 1 - total} blocks lost"

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        transfer, ec_transfer = super()._free_request(request, delay_free_blocks)
        kept = self.kept.pop(request.request_id, None)
        self.stops_at_strings.discard(request.request_id)
        self.counted.discard(request.request_id)
        if kept is None:
            return transfer, ec_transfer
        summary = _summary(kept)
        logger.debug("FASTGEN %s: %s", request.request_id, summary)
        return {**(transfer or {}), "fastgen": summary}, ec_transfer


def _summary(kept: Kept) -> dict[str, Any]:
    return {
        "kv_kept_ratio": kept.kept_slots / kept.total_slots,
        "vacated_blocks": kept.vacated_blocks,
        "policy_heads": kept.policy_heads,
        "cached_tokens": kept.cached_tokens,
        "kv_budget": kept.budget,
        "kv_recovery": kept.recovery,
        "protected_tokens": kept.protected_tokens,
        "compactions": kept.compactions,
        "kv_kept_last": None if kept.last is None else kept.last.ratio,
        "compacted_at": None if kept.last is None else kept.last.num_tokens,
    }


class FastGenScheduler(FastGenSchedulerMixin, Scheduler):
    """Over vLLM's scheduler."""


class FastGenAsyncScheduler(FastGenSchedulerMixin, AsyncScheduler):
    """Over vLLM's asynchronous scheduler, which plans a step before it has read the last."""
