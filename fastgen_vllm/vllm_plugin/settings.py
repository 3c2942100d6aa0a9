"""What the FASTGEN backend asks of vLLM's configuration, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.policy.methods import EVAL_ONLY
from fastgen_vllm.vllm_plugin.names import (
    ASYNC_SCHEDULER,
    BACKEND_NAME,
    BACKEND_PATH,
    LOGGER,
    SCHEDULER,
    WORKERS,
)

logger = init_logger(LOGGER)


def is_fastgen(backend: Any) -> bool:
    """Whether ``backend``, a name or an enum member, is ours."""
    return str(getattr(backend, "name", backend)).upper() == BACKEND_NAME


def chosen(vllm_config: Any) -> bool:
    """Whether this engine's attention backend is ours."""
    return is_fastgen(vllm_config.attention_config.backend)


def fastgen_config(vllm_config: Any) -> FastGenConfig:
    """The engine's FastGen settings.

    Raises:
        FastGenConfigError: as ``FastGenConfig.from_dict``, and for a method that needs the model.
    """
    additional = vllm_config.additional_config
    settings = additional.get("fastgen", {}) if isinstance(additional, dict) else {}
    config = FastGenConfig.from_dict(settings)
    if config.method in EVAL_ONLY:
        raise FastGenConfigError(
            f"fastgen.method: {config.method!r} looks at weights and queries of the model that an "
            "engine does not hand over, so it runs in `fastgen eval` only. Leave the setting out "
            "for FastGen's own"
        )
    return config


def check_and_update(original: Callable[..., None], vllm_config: Any) -> None:
    """Wraps ``Platform.check_and_update_config``."""
    _check_backend_per_kind(vllm_config.attention_config)
    if not chosen(vllm_config):
        original(vllm_config)
        return
    config = fastgen_config(vllm_config)
    problems = _unsupported(vllm_config)
    if problems:
        raise FastGenConfigError(
            "the FASTGEN attention backend does not support: " + "; ".join(problems)
        )
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    device = vllm_config.device_config.device_type
    parallel.worker_cls = WORKERS[device]
    if device == "cuda":
        _set_cuda_graphs(vllm_config, config)
    elif config.cuda_graphs:
        raise FastGenConfigError(
            f"fastgen.cuda_graphs: got true, and device {device} has none; leave the setting out"
        )
    if cache.user_specified_block_size and cache.block_size != config.block_size:
        raise FastGenConfigError(
            f"--block-size {cache.block_size} and fastgen.block_size {config.block_size} differ; "
            "set only fastgen.block_size"
        )
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    logger.info("FASTGEN: vLLM's %s model runner", runner)
    original(vllm_config)
    # vLLM's CPU platform switches asynchronous scheduling off only now.
    scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
    cache.block_size = config.block_size


def _check_backend_per_kind(attention: Any) -> None:
    per_kind = attention.backend_per_kind
    if per_kind and any(map(is_fastgen, [attention.backend, *per_kind.values()])):
        names = {kind: backend.name for kind, backend in per_kind.items()}
        raise FastGenConfigError(
            f"FASTGEN serves all layers or none; --attention-config backend_per_kind {names}: "
            "leave it out, and pass --attention-backend fastgen for FASTGEN"
        )


def _unsupported(vllm_config: Any) -> list[str]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    device = vllm_config.device_config.device_type
    problems = [
        (device not in WORKERS, f"device {device} (only CPU and CUDA); choose another backend"),
        (
            str(cache.cache_dtype) not in ("auto", "float32", "float16", "bfloat16"),
            f"quantised KV cache; --kv-cache-dtype {cache.cache_dtype}, use auto",
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative decoding; leave --speculative-config out",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "KV connectors; leave --kv-transfer-config and KV offloading out",
        ),
        (parallel.use_ubatching, "dual-batch overlap; leave --enable-dbo and --ubatch-size out"),
        (
            scheduler.scheduler_cls not in (None, SCHEDULER, ASYNC_SCHEDULER),
            f"another scheduler; --scheduler-cls {scheduler.scheduler_cls}, leave it out",
        ),
        (
            parallel.worker_cls not in ("auto", *WORKERS.values()),
            f"another worker; --worker-cls {parallel.worker_cls}, leave it out",
        ),
    ]
    for option in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, option)
        problems.append((size > 1, f"--{option.replace('_', '-')} {size}; use 1"))
    if model is not None:
        problems += [
            (
                model.get_sliding_window() is not None,
                f"sliding-window models ({model.model}); try --disable-sliding-window",
            ),
            (model.use_mla, f"multi-head latent attention models ({model.model})"),
            (model.is_encoder_decoder, f"encoder-decoder models ({model.model})"),
            (model.runner_type != "generate", f"--runner {model.runner_type}; use generate"),
            (model.enable_prompt_embeds, "--enable-prompt-embeds; prompts must be tokens"),
            (model.is_multimodal_model, f"multimodal models ({model.model})"),
            (model.skip_tokenizer_init, "--skip-tokenizer-init; policies need the tokenizer"),
        ]
    return [text for refused, text in problems if refused]


def select_backend(
    original: Callable[..., str], selected_backend: Any, attn_selector_config: Any, **kwargs: Any
) -> str:
    """Wraps ``Platform.get_attn_backend_cls``."""
    if not is_fastgen(selected_backend):
        return original(selected_backend, attn_selector_config, **kwargs)
    layer = attn_selector_config
    problems = [
        (layer.use_mla, "multi-head latent attention"),
        (layer.use_sparse, "sparse attention"),
        (layer.has_sink, "attention-sink models"),
        (layer.has_sliding_window, "sliding-window layers"),
        (layer.attn_type != "decoder", f"attention type {layer.attn_type}"),
        (layer.use_non_causal, "non-causal attention"),
    ]
    refused = [text for wrong, text in problems if wrong]
    if refused:
        raise FastGenConfigError(
            f"the FASTGEN attention backend does not support: {'; '.join(refused)}; "
            "choose another --attention-backend for this model"
        )
    return BACKEND_PATH


def _set_cuda_graphs(vllm_config: Any, config: FastGenConfig) -> None:
    """Steps in which all requests decode are captured, where that is asked for: it has not been
    shown right on a device.

    Raises:
        FastGenConfigError: it is asked for beside what it does not go with.
    """
    compilation, wanted = vllm_config.compilation_config, config.cuda_graphs
    if wanted and vllm_config.parallel_config.data_parallel_size > 1:
        raise FastGenConfigError(
            "fastgen.cuda_graphs: got true, which does not go with --data-parallel-size above 1; "
            "leave the setting out"
        )
    if wanted and config.kernels == "reference":
        raise FastGenConfigError(
            "fastgen.cuda_graphs: got true, which does not go with fastgen.kernels 'reference'; "
            "leave one of them out"
        )
    on = wanted and compilation.cudagraph_mode != CUDAGraphMode.NONE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY if on else CUDAGraphMode.NONE
    why = ", as vLLM's own settings have none" if wanted and not on else ""
    logger.info("FASTGEN: CUDA graphs %s%s", "of decode steps" if on else "off", why)
