"""Registration, refusals, and vLLM untouched where our backend is not chosen."""

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.vllm_plugin import register
from fastgen_vllm.vllm_plugin.block_manager import FastGenSpec
from fastgen_vllm.vllm_plugin.settings import SCHEDULER, WORKERS


def config_of(model: str, **options: Any) -> Any:
    load_general_plugins()
    options.setdefault("attention_backend", "fastgen")
    return EngineArgs(model=model, max_model_len=512, **options).create_engine_config()


def test_backend_is_chosen_with_no_other_flag(model: str) -> None:
    config = config_of(model)
    assert config.attention_config.backend is AttentionBackendEnum["FASTGEN"]
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.parallel_config.worker_cls == WORKERS["cpu"]
    assert config.cache_config.block_size == 16
    assert config.cache_config.enable_prefix_caching is False
    nested = config_of(model, attention_backend=None, attention_config={"backend": "FASTGEN"})
    assert nested.scheduler_config.scheduler_cls == SCHEDULER


def test_stock_is_untouched(model: str) -> None:
    config = config_of(model, attention_backend=None)
    assert config.scheduler_config.scheduler_cls is None
    assert "fastgen" not in config.parallel_config.worker_cls.lower()
    assert config.cache_config.enable_prefix_caching is True
    assert config.cache_config.block_size == 128


def test_registering_twice_is_harmless() -> None:
    load_general_plugins()
    before = type(current_platform).check_and_update_config
    register()
    register()
    assert type(current_platform).check_and_update_config == before


def test_config_unpickles_before_plugins_load() -> None:
    register()
    blob = pickle.dumps(AttentionBackendEnum["FASTGEN"])
    code = (
        "import pickle, sys; from vllm.v1.attention.backends.registry import AttentionBackendEnum;"
        "assert 'FASTGEN' not in AttentionBackendEnum.__members__;"
        "print(pickle.loads(bytes.fromhex(sys.argv[1])).name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, blob.hex()], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split()[-1:] == ["FASTGEN"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}, "--enable-dbo"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "--kv-transfer-config",
        ),
        ({"hf_overrides": {"sliding_window": 128, "model_type": "mistral"}}, "sliding-window"),
        ({"skip_tokenizer_init": True}, "--skip-tokenizer-init"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"scheduler_cls": "a.B"}, "--scheduler-cls a.B"),
        ({"block_size": 64}, "--block-size 64 and fastgen.block_size 16"),
        ({"additional_config": {"fastgen": {"recovry": 1}}}, r"fastgen\.recovry: unknown key"),
        ({"additional_config": {"fastgen": {"recovery": 2.0}}}, r"fastgen\.recovery: got 2\.0"),
    ],
)
def test_refused_at_start_up(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FastGenConfigError), match=message):
        config_of(model, **options)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"has_sink": True}, "attention-sink models"),
        ({"has_sliding_window": True}, "sliding-window layers"),
        ({"use_mla": True}, "multi-head latent attention"),
        ({"attn_type": "encoder"}, "attention type encoder"),
    ],
)
def test_layers_refused(layer: dict[str, Any], message: str) -> None:
    from vllm.v1.attention.selector import AttentionSelectorConfig

    register()
    fields = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": 16}
    config = AttentionSelectorConfig(**{**fields, **layer})
    with pytest.raises(FastGenConfigError, match=message):
        current_platform.get_attn_backend_cls(
            selected_backend=AttentionBackendEnum["FASTGEN"], attn_selector_config=config
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": torch.float8_e4m3fn}, "--kv-cache-dtype bfloat16"),
        ({"head_size_v": 32}, "choose another --attention-backend"),
        ({"sliding_window": 64}, "choose another --attention-backend"),
    ],
)
def test_caches_refused(fields: dict[str, Any], message: str) -> None:
    plain = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float16}
    with pytest.raises(FastGenConfigError, match=message):
        FastGenSpec.from_spec(FullAttentionSpec(**{**plain, **fields}))


@pytest.mark.parametrize(
    ("name", "value"), [("alibi_slopes", [1.0]), ("logits_soft_cap", 30.0), ("sliding_window", 64)]
)
def test_layer_options_refused(name: str, value: Any) -> None:
    from fastgen_vllm.vllm_plugin.backend import FastGenImpl

    with pytest.raises(FastGenConfigError, match="choose another --attention-backend"):
        FastGenImpl(8, 64, 1.0, 2, **{name: value})
