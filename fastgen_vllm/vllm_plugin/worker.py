"""The worker: follows the scheduler's decisions, compresses after prefill, reports."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from fastgen_vllm.cache.hashed import HashedBlocks
from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.kernels import libraries, reference
from fastgen_vllm.policy.protect import SystemPrompts
from fastgen_vllm.policy.tokens import token_classes
from fastgen_vllm.runtime import footprint
from fastgen_vllm.runtime.report import PendingReport
from fastgen_vllm.runtime.runtime import Runtime
from fastgen_vllm.runtime.step import Step
from fastgen_vllm.runtime.warm_up import warm_up, warm_up_captured
from fastgen_vllm.vllm_plugin import flash_attention
from fastgen_vllm.vllm_plugin.names import LOGGER
from fastgen_vllm.vllm_plugin.overrides import decodes, override_of
from fastgen_vllm.vllm_plugin.runners import current_batch, replay_switch
from fastgen_vllm.vllm_plugin.settings import fastgen_config

logger = init_logger(LOGGER)

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase
else:
    WorkerBase = object


class FastGenWorkerMixin(WorkerBase):
    """Over a vLLM worker with either model runner."""

    runtime: Runtime
    hashed: HashedBlocks
    pending: PendingReport | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampling_params: dict[str, Any] = {}
        """Of the requests that have begun and not finished."""
        self.captured_sizes: list[int] = []
        """Requests of the decode steps that CUDA graphs hold."""

    def determine_available_memory(self: Any) -> int:
        """Bytes for the KV cache: what vLLM finds less what FastGen needs beside it.

        Raises:
            FastGenConfigError: nothing is left.
        """
        asked = self.cache_config.kv_cache_memory_bytes  # vLLM may set it to what it finds
        available = super().determine_available_memory()
        config, load = fastgen_config(self.vllm_config), self._load()
        captured = config.cuda_graphs
        fixed = footprint.for_prompts(config, load) + footprint.for_requests(load)
        fixed += footprint.for_attention(load, captured, self._gathers_keys(config))
        share = footprint.for_each_kv_byte(config, load)
        kv = asked or int((available - fixed) / (1 + share))
        beside = fixed + int(share * kv)
        if kv <= 0:
            raise FastGenConfigError(
                f"FASTGEN needs {_gib(fixed)} beside the KV cache for prompts of up to "
                f"{load.longest} tokens, and {_gib(available)} are left; "
                "lower --max-model-len or raise --gpu-memory-utilization"
            )
        logger.info("FASTGEN: %s for the KV cache, up to %s beside it", _gib(kv), _gib(beside))
        return kv

    def _gathers_keys(self: Any, config: FastGenConfig) -> bool:
        """Whether prefill attention has a prompt's keys and values put in order first."""
        return True

    def _load(self: Any) -> footprint.Load:
        vllm_config = self.vllm_config
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        specs = list(self.model_runner.get_kv_cache_spec().values())
        _check_alike("caches", specs)
        threshold = scheduler.long_prefill_token_threshold
        partial = -(-scheduler.max_num_batched_tokens // threshold) if threshold else 1
        num_heads = model.get_num_attention_heads(vllm_config.parallel_config)
        return footprint.Load(
            len(specs),
            specs[0].num_kv_heads,
            num_heads // specs[0].num_kv_heads,
            2 * specs[0].head_size * specs[0].dtype.itemsize,
            model.max_model_len,
            partial,
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            bool(self.cache_config.enable_prefix_caching),
        )

    def initialize_from_config(self: Any, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        runner, model_config = self.model_runner, self.vllm_config.model_config
        (group,) = kv_cache_config.kv_cache_groups
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in group.layer_names]
        _check_alike("query heads", [layer.num_heads for layer in layers])
        kv = _pool_view([layer.kv_cache for layer in layers])
        config = fastgen_config(self.vllm_config)
        tokenizer = cached_tokenizer_from_config(model_config)
        vocab_size = model_config.get_vocab_size()
        classes = token_classes(tokenizer, vocab_size, config.extra_special_tokens)
        system_prompts = SystemPrompts.of(tokenizer)
        system_prompts.check("fastgen.protect", config.protect)
        scheduler = self.vllm_config.scheduler_config
        self.runtime = Runtime(
            config,
            classes.to(kv.device),
            kv,
            layers[0].num_heads // layers[0].num_kv_heads,
            scheduler.max_num_seqs,
            report_lag=int(bool(scheduler.async_scheduling)),
            system_prompts=system_prompts,
            longest=model_config.max_model_len,
        )
        self.hashed = HashedBlocks(self.runtime.pool)
        logger.info("FASTGEN: %s kernels on %s", self.runtime.kernels.NAME, kv.device.type)
        if kv.device.type == "cuda":
            library, _ = libraries.choose(kv.dtype, kv.shape[-2])
            logger.info("FASTGEN: prefill attention from %s", library)
        if self.runtime.why_not_faster and config.kernels == "auto":
            problem = self.runtime.why_not_faster
            logger.warning("FASTGEN: the native kernels are not used, which is slower: %s", problem)
        stride = kv.stride(1)
        for layer in layers:
            layer.impl.layer_index = layer.kv_cache.storage_offset() // stride
            layer.impl.runtime = self.runtime
        runner.fastgen_plans = False
        compilation = self.vllm_config.compilation_config
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:
            if self.runtime.kernels is reference:
                raise FastGenConfigError(
                    "fastgen.cuda_graphs: got true, and this model has no kernels to capture: "
                    f"{self.runtime.why_not_faster}; leave the setting out"
                )
            most, sizes = scheduler.max_num_seqs, sorted(compilation.cudagraph_capture_sizes)
            self.captured_sizes = [size for size in sizes if size <= most]
            self.may_replay = replay_switch(runner, self.use_v2_model_runner)
        batch = current_batch(runner, self.use_v2_model_runner)
        for attn_group in runner.attn_groups[0]:
            for builder in attn_group.metadata_builders:
                builder.runner, builder.runtime = runner, self.runtime
                builder.current_batch = batch

    @torch.inference_mode()
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        runner = self.model_runner
        runner.fastgen_step = self.pending = None
        # To warm up, the V2 runner is given batches that no scheduler of ours has planned.
        runner.fastgen_plans = hasattr(scheduler_output, "fastgen_step")
        if not runner.fastgen_plans:
            return super().execute_model(scheduler_output)
        self._follow(scheduler_output)
        if self.captured_sizes:
            self.may_replay(self._can_replay(list(scheduler_output.num_scheduled_tokens)))
        output = super().execute_model(scheduler_output)
        step = runner.fastgen_step
        squeeze = scheduler_output.fastgen_squeeze
        if step is not None:
            self.pending = self._finish_step(step, squeeze)
        if self.runtime.config.debug:
            self.hashed.check(scheduler_output.fastgen_hashed)
        return output

    def _can_replay(self: Any, request_ids: list[str]) -> bool:
        sizes = (size for size in self.captured_sizes if size >= len(request_ids))
        size = next(sizes, None)
        return size is not None and self.runtime.can_replay(request_ids, size)

    def _finish_step(self: Any, step: Step, squeeze: list[str]) -> PendingReport:
        params = self.sampling_params
        chunks = [chunk for chunk in step.chunks if decodes(params[chunk.request_id])]
        return self.runtime.finish_step(replace(step, chunks=chunks), squeeze)

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output, pending = super().sample_tokens(grammar_output), self.pending
        if pending is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _WithReport(output, pending)
        output.fastgen_report = pending.get()
        return output

    def _follow(self: Any, scheduler_output: Any) -> None:
        runtime = self.runtime
        for request_id in scheduler_output.finished_req_ids:
            runtime.release(request_id)
            self.sampling_params.pop(request_id, None)
        for request_id in scheduler_output.preempted_req_ids or ():
            runtime.release(request_id)
        granted: dict[str, list[int]] = {}
        for new in scheduler_output.scheduled_new_reqs:
            self.sampling_params[new.req_id] = new.sampling_params
            # The V2 runner gets resumed requests as new ones, with what they have generated.
            tokens = new.prefill_token_ids or new.prompt_token_ids
            self._begin(new.req_id, tokens, new.prompt_len)
            granted[new.req_id] = new.block_ids[0]
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in cached.resumed_req_ids:
                sent = self.model_runner.requests[request_id].num_prompt_tokens
                self._begin(request_id, cached.all_token_ids[request_id], sent)
            if cached.new_block_ids[i] is not None:
                granted[request_id] = cached.new_block_ids[i][0]
        runtime.grant(granted)
        for request_id, blocks in scheduler_output.fastgen_targets.items():
            runtime.compact_into(request_id, blocks)

    def _begin(self: Any, request_id: str, tokens: list[int], prompt_tokens: int) -> None:
        config, sampling_params = self.runtime.config, self.sampling_params[request_id]
        override = override_of(config, sampling_params)
        most = None if sampling_params is None else sampling_params.max_tokens
        longest = None if most is None else prompt_tokens + most
        self.runtime.begin_prefill(request_id, tokens, override, prompt_tokens, longest)


class _WithReport(AsyncModelRunnerOutput):
    """The report travels to the host with the sampled tokens."""

    def __init__(self, output: AsyncModelRunnerOutput, pending: PendingReport) -> None:
        self._output, self._pending = output, pending

    def get_kv_connector_output(self) -> Any:
        """vLLM 0.33 has it in the base class."""
        return self._output.get_kv_connector_output()  # type: ignore[attr-defined]

    def get_output(self) -> ModelRunnerOutput:
        output: Any = self._output.get_output()
        output.fastgen_report = self._pending.get()
        return output


class FastGenGPUWorker(FastGenWorkerMixin, GPUWorker):
    """vLLM's CUDA worker with FastGen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        flash_attention.prefer()

    def _gathers_keys(self, config: FastGenConfig) -> bool:
        dtype = next(iter(self.model_runner.get_kv_cache_spec().values())).dtype
        return not flash_attention.serves(dtype, config.block_size)

    def compile_or_warm_up_model(self) -> Any:
        warm_up(self.runtime)
        if self.captured_sizes:
            warm_up_captured(self.runtime, self.captured_sizes[-1], self.model_config.dtype)
        return super().compile_or_warm_up_model()


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _check_alike(what: str, of_layers: list[Any]) -> None:
    different = [value for value in of_layers if value != of_layers[0]]
    if different:
        raise FastGenConfigError(
            "the FASTGEN attention backend needs layers that are alike, as any page serves any "
            f"layer, but their {what} vary: {of_layers[0]} and {different[0]}; choose another "
            "--attention-backend for this model"
        )


def _pool_view(caches: list[torch.Tensor]) -> torch.Tensor:
    """The storage of all layers as ``[num_blocks, L, H, block_size, 2 * head_size]``.

    Raises:
        RuntimeError: vLLM laid the cache out otherwise than block, layer, head, token, content.
    """
    first = min(caches, key=torch.Tensor.storage_offset)
    num_blocks, heads, block_size, content = first.shape
    layer_stride = heads * block_size * content
    strides = (len(caches) * layer_stride, layer_stride, block_size * content, content, 1)
    offsets = sorted(cache.storage_offset() - first.storage_offset() for cache in caches)
    dense = first.stride() == (strides[0], *strides[2:])
    if not dense or offsets != [i * layer_stride for i in range(len(caches))]:
        raise RuntimeError(
            "the KV cache is not one BLHNC storage; unset VLLM_KV_CACHE_LAYOUT or report a bug"
        )
    shape = (num_blocks, len(caches), heads, block_size, content)
    return first.as_strided(shape, strides, first.storage_offset())
