"""vLLM's own CPU attention over keys in order, as whatever this machine has instructions for."""

import pytest
import torch

from fastgen_vllm.kernels import libraries
from fastgen_vllm.vllm_plugin import cpu_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3, 4, 7])
@pytest.mark.parametrize(("c", "m"), [(1, 1), (32, 32), (33, 33), (5, 70), (1, 64), (65, 257)])
def test_as_pytorch(c: int, m: int, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(c + m)
    query = torch.randn(c, 2, groups, 64, dtype=dtype)
    key, value = torch.randn(2, m, 2, 64, dtype=dtype)
    for _ in range(2):  # the second time with the plan of the first
        found = cpu_attention.attend(query, key, value, 0.1)
        wanted = libraries.sdpa_of(query.float(), key.float(), value.float(), 0.1)[0]
        tolerance = 2e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)


def test_preferred_with_amx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_attention._agrees(torch.bfloat16, 64), "whatever instructions this machine has"
    monkeypatch.setattr(libraries, "on_cpu", {})
    for instructions in ("vec", "vec16", "neon"):
        monkeypatch.setattr(cpu_attention, "instructions", lambda *args, i=instructions: i)
        cpu_attention.prefer(torch.bfloat16, 64)
    assert not libraries.on_cpu
    monkeypatch.setattr(cpu_attention, "instructions", lambda *args: "amx")
    for agrees in (False, True):
        assert not libraries.on_cpu, "it was used though it differs"
        monkeypatch.setattr(cpu_attention, "_agrees", lambda *args, a=agrees: a)
        cpu_attention.prefer(torch.bfloat16, 64)
    assert libraries.on_cpu == {(torch.bfloat16, 64): cpu_attention.attend}
