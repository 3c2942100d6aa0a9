"""The memory that is left free for FastGen is what it takes, measured on the pretend device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.pretend_device import DEVICE, pretend_device
from vllm.v1.kv_cache_interface import FullAttentionSpec

from fastgen_vllm import tensors
from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.kernels import reference
from fastgen_vllm.runtime import footprint
from fastgen_vllm.runtime.driver import Driver
from fastgen_vllm.runtime.runtime import Runtime
from fastgen_vllm.vllm_plugin.worker import FastGenWorkerMixin

LAYERS, HEADS, GROUP, SIZE, BLOCK, TOKENS, CHUNK = 6, 2, 4, 16, 16, 3000, 500
BLOCKS = 2 * TOKENS // BLOCK + 3


@pytest.mark.parametrize("at_once", [1 << 21, 2 * HEADS * TOKENS])
@pytest.mark.parametrize(
    ("settings", "recovery"),
    [
        ({}, None),
        ({}, 0.9),
        ({"min_recovery": 0.97}, None),
        ({"group_reduction": "min"}, 0.9),
        ({"ladder": "adaptive"}, None),
        ({"method": "h2o", "kv_budget": 0.4}, None),
        ({"ladder": [{"local": i / 100} for i in range(1, 41)], "recovery": 0.8}, None),
    ],
    ids=["budget", "recovery", "floor", "min", "ladder", "h2o", "40 windows"],
)
def test_prompts(
    settings: dict[str, Any],
    recovery: float | None,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One prompt ends while another, as long, has begun. A request may ask for a recovery, which
    takes more than a budget does, so that much is left free."""
    for module in (tensors, footprint):
        monkeypatch.setattr(module, "MOST_AT_ONCE", at_once)
    config = FastGenConfig.from_dict(settings)
    load = footprint.Load(LAYERS, HEADS, GROUP, 8 * SIZE, TOKENS, 1, CHUNK, 1)
    with pretend_device() as mode:
        classes = torch.ones(9, dtype=torch.uint8).to(DEVICE)
        kv = torch.zeros(BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE, device=DEVICE)
        kv_bytes = mode.in_use
        runtime = Runtime(config, classes, kv, GROUP, max_requests=1)
        runtime.kernels = reference
        driver = Driver(runtime)
        for name, chunks in (("ending", (CHUNK, TOKENS)), ("beginning", (CHUNK,))):
            driver.begin(name, [1] * TOKENS, RequestOverride(fastgen_recovery=recovery))
            profile = runtime.prefills[name].profile
            assert profile is not None
            for num_keys in chunks:
                if profile.profiling.peaks:
                    found = torch.rand(3, LAYERS, HEADS, num_keys).to(DEVICE)
                    profile.add_found(found)
                else:
                    profile.make_room(num_keys)
            profile.mass.copy_(torch.rand(profile.mass.shape))
        driver.finish_step(driver.start_step({"ending": TOKENS}))
        taken = mode.peak - kv_bytes
        assert mode.in_use < mode.peak
    share = footprint.for_each_kv_byte(config, load)
    left_free = footprint.for_prompts(config, load) + share * kv_bytes
    left_free += footprint.for_requests(load)
    assert 0.2 * left_free < taken <= left_free


class VllmWorker:
    available: int
    cache_config: Any

    def determine_available_memory(self) -> int:
        # vLLM does so where it plans its next start (VLLM_ENABLE_STARTUP_PLAN).
        self.cache_config.kv_cache_memory_bytes = self.available
        return self.available


class Worker(FastGenWorkerMixin, VllmWorker):
    """Of an 8B model: 32 layers of 8 KV heads of 128, prompts of up to 8,192 tokens."""

    def __init__(self, available: int, kv_bytes: int | None) -> None:
        spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
        self.available = available
        self.cache_config = SimpleNamespace(
            kv_cache_memory_bytes=kv_bytes, enable_prefix_caching=True
        )
        self.model_runner = SimpleNamespace(
            get_kv_cache_spec=lambda: dict.fromkeys(range(32), spec)
        )
        self.vllm_config: Any = SimpleNamespace(
            additional_config={},
            parallel_config=None,
            scheduler_config=SimpleNamespace(
                max_num_batched_tokens=2048, max_num_seqs=256, long_prefill_token_threshold=0
            ),
            model_config=SimpleNamespace(
                max_model_len=8192, get_num_attention_heads=lambda parallel_config: 32
            ),
        )


def test_what_vllm_finds_is_shared() -> None:
    found = 40 << 30
    kv = Worker(found, None).determine_available_memory()
    assert 0.95 * found < kv < 0.98 * found
    assert Worker(kv, kv).determine_available_memory() == kv, "asked for, so given"
    with pytest.raises(FastGenConfigError, match=r"0\.\d+ GiB .* lower --max-model-len"):
        Worker(100 << 20, None).determine_available_memory()
