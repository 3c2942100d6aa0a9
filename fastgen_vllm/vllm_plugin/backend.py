"""The attention backend: capabilities, the per-step metadata builder, the per-layer forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.runtime.runtime import Runtime
from fastgen_vllm.runtime.step import Step
from fastgen_vllm.vllm_plugin.block_manager import KV_DTYPES, FastGenSpec
from fastgen_vllm.vllm_plugin.names import BACKEND_NAME
from fastgen_vllm.vllm_plugin.runners import Batch
from fastgen_vllm.vllm_plugin.settings import fastgen_config

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


class FastGenBackend(AttentionBackend):
    """Per-head block tables over one pool: vLLM's block-outermost layout."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(KV_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[FastGenImpl]:
        return FastGenImpl

    @staticmethod
    def get_builder_cls() -> type[FastGenMetadataBuilder]:
        return FastGenMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(8)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The setting. vLLM asks once it has loaded the model, and would put its default there."""
        return fastgen_config(get_current_vllm_config()).block_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return FastGenSpec.from_spec(spec)


class FastGenMetadataBuilder(AttentionMetadataBuilder[Step]):
    """Plans the step once for all layers. The worker sets the attributes."""

    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1
    """The V1 runner puts requests that decode first, as V2 does: each part is one slice."""

    runner: Any
    current_batch: Callable[[], Batch | None]
    runtime: Runtime | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # abstract in the base class
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step | None:
        common = common_attn_metadata
        if self.runtime is None or not self.runner.fastgen_plans:
            return None
        batch = self.current_batch()
        if batch is None:
            return None
        request_ids, token_ids = batch
        n = len(request_ids)  # what is replayed is padded
        query_start, on_host = common.query_start_loc_cpu[: n + 1], common.seq_lens_cpu_upper_bound
        step = self.runtime.start_step(
            request_ids,
            query_start,
            common.seq_lens[:n],
            token_ids[: int(query_start[-1])],
            None if on_host is None else on_host[:n],
        )
        self.runner.fastgen_step = step
        return step

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> Step | None:
        """None where vLLM captures to measure memory, before there is a cache."""
        if self.runtime is None:
            return None
        return self.runtime.captured_step(common_attn_metadata.num_reqs)


class FastGenImpl(AttentionImpl[Step]):
    """One layer. The worker sets ``layer_index`` and ``runtime``."""

    layer_index: int
    runtime: Runtime

    def __init__(  # noqa: PLR0913 - vLLM's
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes,
            "sliding-window attention": sliding_window,
            "a logits soft cap": logits_soft_cap,
            "KV sharing between layers": kv_sharing_target_layer_name,
            "attention sinks": kwargs.pop("sinks", None),
            **{f"attention option {name}": value for name, value in kwargs.items()},
        }
        for feature, value in refused.items():
            if value is not None:
                raise FastGenConfigError(
                    f"the FASTGEN attention backend does not support {feature}; "
                    "choose another --attention-backend for this model"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads

    def forward(  # noqa: PLR0913 - vLLM's
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Step | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``query``: ``[tokens, H * G, D]``; ``key``, ``value``: ``[tokens, H, D]``; padded."""
        if attn_metadata is None:  # a batch that is made up, to warm up
            return output
        tokens = attn_metadata.num_tokens
        self.runtime.forward(
            attn_metadata,
            self.layer_index,
            query[:tokens].view(tokens, self.num_heads, self.head_size),
            key[:tokens].view(tokens, self.num_kv_heads, self.head_size),
            value[:tokens].view(tokens, self.num_kv_heads, self.head_size),
            output[:tokens].view(tokens, self.num_heads, self.head_size),
            self.scale,
        )
        return output
