"""The memory that is left free for FastGen is what it takes, measured on the pretend device."""

import pytest
import torch
from pretend_device import DEVICE, pretend_device

from fastgen_vllm import basics, footprint
from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.kernels import reference
from fastgen_vllm.runtime import Runtime
from fastgen_vllm.tokens import TokenFlags

LAYERS, HEADS, GROUP, SIZE, BLOCK, TOKENS = 6, 2, 4, 16, 16, 3000
BLOCKS = 2 * TOKENS // BLOCK + 3


@pytest.mark.parametrize("at_once", [1 << 21, 2 * HEADS * TOKENS])
@pytest.mark.parametrize("reduction", ["mean", "min"])
def test_prompts(reduction: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt ends while another, as long, has begun."""
    for module in (basics, footprint):
        monkeypatch.setattr(module, "MOST_AT_ONCE", at_once)
    config = FastGenConfig(group_reduction=reduction)
    load = footprint.Load(LAYERS, HEADS, GROUP, 8 * SIZE, TOKENS, 0, 1)
    names = ["ending", "beginning"]
    with pretend_device() as mode:
        flags = TokenFlags(torch.arange(9) < 1, torch.arange(9) < 2).to(DEVICE)
        kv = torch.zeros(BLOCKS, LAYERS, HEADS, BLOCK, 2 * SIZE, device=DEVICE)
        kv_bytes = mode.in_use
        runtime = Runtime(config, flags, kv, GROUP)
        runtime.kernels = reference
        for name in names:
            runtime.begin_prefill(name, [1] * TOKENS, RequestOverride())
            profile = runtime.prefills[name].profile
            assert profile is not None
            profile.mass.copy_(torch.rand(profile.mass.shape))
        step = runtime.start_step(
            names[:1],
            torch.tensor([0, TOKENS]),
            torch.tensor([TOKENS], device=DEVICE),
            torch.arange(1, 1 + -(-TOKENS // BLOCK), device=DEVICE)[None],
            torch.zeros(TOKENS, dtype=torch.int64, device=DEVICE),
        )
        runtime.finish_step(step).get()
        taken = mode.peak - kv_bytes
        assert mode.in_use < mode.peak
    share = footprint.for_each_kv_byte(config, load)
    left_free = footprint.for_prompts(config, load) + share * kv_bytes
    assert 0.5 * left_free < taken <= left_free
