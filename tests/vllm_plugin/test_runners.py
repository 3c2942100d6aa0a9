"""Both of vLLM's model runners with FastGen: on the CPU, and with vLLM's CUDA worker on a device
that is none. See the two programs."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from helpers.models import first_layers
from helpers.paths import PROGRAMS, ROOT
from helpers.programs import run_program

pytestmark = pytest.mark.engine
LAYERS, VOCABULARY = 2, 4096
"""As Triton's interpreter takes a while for each layer, and for vLLM's sampler."""


@pytest.fixture(scope="module")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return first_layers(LAYERS, tmp_path_factory.mktemp("models") / "shallow", VOCABULARY)


def newer_vllm() -> str:
    """Of which there is no CPU build, so its Python files run over the installed one's."""
    found = [mark.parent for mark in ROOT.glob(".cache/vllm-*/.complete")]
    assert len(found) == 1, "run scripts/newer_vllm.sh"
    return str(found[0])


def run(program: str, *arguments: str, is_newer: bool = False) -> dict[str, Any]:
    variables = {}
    if is_newer:
        path = newer_vllm()
        variables["PYTHONPATH"] = os.pathsep.join([path, os.environ["PYTHONPATH"]])
        # Where it remembers what it learned of models: two versions would forget each other's.
        variables["VLLM_CACHE_ROOT"] = f"{path}/.cache"
    printed = run_program(PROGRAMS / program, *arguments, **variables)
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def cpu(shallow_model: str) -> dict[str, Any]:
    return run("run_on_pretend_gpu.py", shallow_model, "cpu")


@pytest.mark.parametrize(
    ("vllm", "arguments", "module"),
    [
        ("0.32", ["v1", "graphs"], "gpu_model_runner"),
        ("0.32", ["v2", "graphs"], "gpu.model_runner"),
        ("0.33", ["v1", "bfloat16"], "gpu_model_runner"),
        ("0.33", ["v2"], "gpu.model_runner"),
        ("0.33", ["v2", "graphs"], "gpu.model_runner"),
    ],
)
def test_as_on_the_cpu(
    shallow_model: str, cpu: dict[str, Any], vllm: str, arguments: list[str], module: str
) -> None:
    """Step by step, and with decode steps that are captured once and replayed; in 16 bits prompts
    are encoded by flash attention."""
    gpu = run("run_on_pretend_gpu.py", shallow_model, *arguments, is_newer=vllm == "0.33")
    assert gpu["vllm"].startswith(vllm) and gpu["replays"] == (11 if "graphs" in arguments else 0)
    assert gpu["runner"] == f"vllm.v1.worker.{module}"
    assert (gpu["worker"], cpu["worker"]) == ("FastGenGPUWorker", "FastGenCPUWorker")
    if "bfloat16" in arguments:
        assert [*map(len, gpu["tokens"])] == [12] * 3 and gpu["kept"][1] == 1.0 > gpu["kept"][0]
        assert gpu["prefill"] == "vLLM's flash attention" and gpu["block_size"] == 16
    else:
        assert gpu["tokens"] == cpu["tokens"] and len({*gpu["tokens"][2]}) > 3
        assert gpu["kept"] == cpu["kept"] and gpu["block_size"] == cpu["block_size"] == 8
        assert gpu["prefill"] == "PyTorch SDPA"
    assert gpu["kernels"] == "Triton" and gpu["kept"][2] < 0.5
    assert (gpu["report_lag"], cpu["report_lag"]) == (1, 0)
    assert gpu["prefill_differs"] < 1e-2
    assert not gpu["has_cpu_worker"], "vLLM's CPU worker switches streams and events off"
    assert 0.8 < gpu["memory"] <= 0.92  # vLLM's gpu_memory_utilization


def test_all_on_the_cpu(shallow_model: str) -> None:
    """The same answers and shares, with prefix caching, compactions, a request that is preempted
    and one that is aborted."""
    v1, v2 = (run("run_on_runner.py", shallow_model, runner) for runner in ("v1", "v2"))
    newer = run("run_on_runner.py", shallow_model, "v1", is_newer=True)
    assert [each.pop("vllm")[:4] for each in (v1, v2, newer)] == ["0.32", "0.32", "0.33"]
    assert v1 == newer
    assert (v1.pop("runner"), v2.pop("runner")) == (
        "vllm.v1.worker.cpu_model_runner",
        "vllm.v1.worker.cpu.model_runner",
    )
    assert v1 == v2 and v1["preempted"] > 0 and list(v1["tokens"]) == ["0", "1", "2", "4", "5", "6"]
    assert all(len(tokens) == 20 for tokens in v1["tokens"].values())
    told = v1["told"].values()
    assert any(each["compactions"] > 1 for each in told)
    assert any(each["cached_tokens"] for each in told)
