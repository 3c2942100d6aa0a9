"""Registration, refusals, and vLLM untouched where our backend is not chosen."""

import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.vllm_plugin import overrides, register
from fastgen_vllm.vllm_plugin.block_manager import FastGenSpec
from fastgen_vllm.vllm_plugin.names import SCHEDULER, WORKERS
from fastgen_vllm.vllm_plugin.worker import FastGenWorkerMixin, _check_alike


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
    assert config.cache_config.enable_prefix_caching is True
    nested = config_of(model, attention_backend=None, attention_config={"backend": "FASTGEN"})
    assert nested.scheduler_config.scheduler_cls == SCHEDULER


def test_stock_is_untouched(model: str) -> None:
    settings = {"fastgen": {"block_size": 32}}
    config = config_of(model, attention_backend=None, additional_config=settings)
    assert config.scheduler_config.scheduler_cls is None
    assert "fastgen" not in config.parallel_config.worker_cls.lower()
    assert config.cache_config.enable_prefix_caching is True
    assert config.cache_config.block_size == 128


def test_registering_twice_is_harmless() -> None:
    load_general_plugins()
    wrapped = [(type(current_platform), "check_and_update_config")]
    wrapped += [(InputProcessor, "process_inputs")]
    wrapped += [(OutputProcessor, "process_outputs"), (OutputProcessor, "__init__")]
    before = [getattr(*each) for each in wrapped]
    register()
    register()
    assert [getattr(*each) for each in wrapped] == before


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
        (
            {
                "attention_backend": None,
                "attention_config": {"backend_per_kind": {"full_attention": "FASTGEN"}},
            },
            r"backend_per_kind \{'full_attention': 'FASTGEN'\}: .* --attention-backend fastgen",
        ),
        (
            {
                "attention_backend": None,
                "attention_config": {
                    "backend": "FASTGEN",
                    "backend_per_kind": {"full_attention": "CPU_ATTN"},
                },
            },
            r"backend_per_kind \{'full_attention': 'CPU_ATTN'\}: leave it out",
        ),
        ({"additional_config": {"fastgen": {"recovry": 1}}}, r"fastgen\.recovry: unknown key"),
        ({"additional_config": {"fastgen": {"recovery": 2.0}}}, r"fastgen\.recovery: got 2\.0"),
        ({"additional_config": {"fastgen": {"cuda_graphs": True}}}, r"cuda_graphs: .* leave the"),
        (
            {"additional_config": {"fastgen": {"method": "defensivekv", "kv_budget": 0.3}}},
            r"fastgen\.method: 'defensivekv' .* `fastgen eval` only. Leave",
        ),
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
        ({"dtype": torch.float8_e4m3fn}, "--kv-cache-dtype with the model's"),
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


@pytest.mark.parametrize("field", ["num_kv_heads", "head_size", "dtype"])
def test_layers_that_differ_are_refused(field: str) -> None:
    plain = {"block_size": 16, "num_kv_heads": 4, "head_size": 64, "dtype": torch.float16}
    other = {**plain, field: {"dtype": torch.float32}.get(field, 32)}
    specs = [FastGenSpec(**plain), FastGenSpec(**other)]

    class VllmWorker:
        vllm_config = SimpleNamespace(
            additional_config={}, scheduler_config=None, model_config=None
        )
        model_runner = SimpleNamespace(get_kv_cache_spec=lambda: dict(enumerate(specs)))
        cache_config = SimpleNamespace(kv_cache_memory_bytes=None)

        def determine_available_memory(self) -> int:
            return 1 << 30

    class Worker(FastGenWorkerMixin, VllmWorker):
        pass

    with pytest.raises(FastGenConfigError, match=f"caches vary: .*{field}={other[field]}"):
        Worker().determine_available_memory()


def test_query_heads_that_differ_are_refused() -> None:
    """Some models vary them alone: their caches look alike."""
    _check_alike("query heads", [8, 8, 8])
    with pytest.raises(FastGenConfigError, match=r"query heads vary: 8 and 4; choose another"):
        _check_alike("query heads", [8, 8, 4])


@pytest.mark.parametrize(
    ("extra_args", "found"),
    [
        (None, {}),
        ({"somebody_elses": [1]}, {}),
        ({"fastgen_compress": False}, {"fastgen_compress": False}),
        ({"fastgen_compress": 0}, {"fastgen_compress": False}),  # false, over HTTP
        ({"fastgen_compress": 0.0}, {"fastgen_compress": False}),
        ({"fastgen_compress": 1}, {"fastgen_compress": True}),
        ({"fastgen_compress": 2}, None),
        ({"fastgen_compress": "false"}, None),
        ({"fastgen_compress": None}, None),
        ({"fastgen_kv_budget": 1}, {"fastgen_kv_budget": 1.0}),
        ({"fastgen_kv_budget": True}, None),
        ({"fastgen_kv_budget": "0.5"}, None),
        ({"fastgen_kv_budget": 0}, None),
        ({"fastgen_kv_budget": float("nan")}, None),
        ({"fastgen_kv_budget": 10**400}, None),
        ({"fastgen_recovery": [0.5]}, None),
        ({"fastgen_recovery": True}, None),
        ({"fastgen_recovery": 0}, {"fastgen_recovery": 0.0}),
        ({"fastgen_recovery": 0.5, "fastgen_kv_budget": 0.5}, None),
        ({"fastgen": {}}, None),
    ],
)
def test_overrides(extra_args: dict[str, Any] | None, found: dict[str, Any] | None) -> None:
    if found is None:
        with pytest.raises(FastGenConfigError, match="request"):
            RequestOverride.from_extra_args(extra_args)
        return
    assert RequestOverride.from_extra_args(extra_args) == RequestOverride(**found)


def accepts(processor: InputProcessor, extra_args: dict[str, Any], **options: Any) -> bool:
    params = SamplingParams(max_tokens=8, extra_args=extra_args)
    prompt: Any = {"type": "token", "prompt_token_ids": [1, 2, 3]}
    try:
        processor.process_inputs("a", prompt, params, ("generate",), **options)
    except VLLMValidationError as error:
        assert "fastgen" in str(error).lower()
        return False
    return True


def test_requests_are_checked_by_their_own_engines_settings(model: str) -> None:
    """Whichever engine of the process was configured last."""
    method = {"fastgen": {"method": "streaming", "kv_budget": 0.3}}
    streaming = InputProcessor(config_of(model, additional_config=method))
    default = InputProcessor(config_of(model))
    stock = InputProcessor(config_of(model, attention_backend=None))
    again = InputProcessor(config_of(model, additional_config=method))
    valid, wrong = {"fastgen_kv_budget": 0.5}, {"fastgen_kv_budget": 5}
    expected = [
        (streaming, False, False),
        (default, True, False),
        (stock, True, True),
        (again, False, False),
    ]
    for processor, takes_valid, takes_wrong in expected:
        assert accepts(processor, valid) is takes_valid
        assert accepts(processor, wrong) is takes_wrong
        assert accepts(processor, {"fastgen_compress": False})


def test_streaming_input_sessions_are_refused(model: str) -> None:
    ours = InputProcessor(config_of(model))
    stock = InputProcessor(config_of(model, attention_backend=None))
    assert accepts(ours, {}) and not accepts(ours, {}, resumable=True)
    assert accepts(stock, {}, resumable=True)


@pytest.mark.parametrize(
    ("config", "extra_args"),
    [({}, {"fastgen_recovery": 7}), ({"method": "h2o", "kv_budget": 0.3}, {"fastgen_recovery": 1})],
)
def test_wrong_override_that_was_not_checked_is_left_out(
    config: dict[str, Any], extra_args: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As where a request is handed to the engine past its input processor."""
    params = SamplingParams(extra_args=extra_args)
    for _ in range(2):
        found = overrides.override_of(FastGenConfig.from_dict(config), params)
        assert found == RequestOverride()
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "vllm.fastgen"]
    assert "takes the engine's settings" in warning and "request.fastgen_recovery" in warning
