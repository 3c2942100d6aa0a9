"""Both of vLLM's model runners with FastGen: on the CPU, and with vLLM's CUDA worker on a device
that is none. See the two programs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from helpers.models import first_layers
from helpers.paths import PROGRAMS

LAYERS = 2
"""As Triton's interpreter takes a while for each."""


@pytest.fixture(scope="module")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return first_layers(LAYERS, tmp_path_factory.mktemp("models") / "shallow")


def run(program: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAMS / program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cpu(shallow_model: str) -> dict[str, Any]:
    return run("run_on_pretend_gpu.py", shallow_model, "cpu")


@pytest.mark.parametrize(
    ("arguments", "module", "replays"),
    [
        (["v1", "graphs"], "gpu_model_runner", 17),
        (["v2"], "gpu.model_runner", 0),
        (["v2", "graphs"], "gpu.model_runner", 17),
    ],
)
def test_as_on_the_cpu(
    shallow_model: str, cpu: dict[str, Any], arguments: list[str], module: str, replays: int
) -> None:
    """Step by step, and with decode steps that are captured once and replayed."""
    gpu = run("run_on_pretend_gpu.py", shallow_model, *arguments)
    assert gpu["replays"] == replays
    assert gpu["runner"] == f"vllm.v1.worker.{module}"
    assert (gpu["worker"], cpu["worker"]) == ("FastGenGPUWorker", "FastGenCPUWorker")
    assert gpu["tokens"] == cpu["tokens"] and len({*gpu["tokens"][2]}) > 3
    assert gpu["kept"] == cpu["kept"] and gpu["kept"][2] < 0.5
    assert gpu["kernels"] == "Triton" and gpu["block_size"] == cpu["block_size"] == 8
    assert (gpu["report_lag"], cpu["report_lag"]) == (1, 0)
    assert gpu["prefill"] == "vLLM's flash attention" and gpu["prefill_differs"] < 1e-2
    assert not gpu["has_cpu_worker"], "vLLM's CPU worker switches streams and events off"
    assert 0.8 < gpu["memory"] <= 0.92  # vLLM's gpu_memory_utilization


def test_both_on_the_cpu(shallow_model: str) -> None:
    """The same answers and shares, with prefix caching, compactions, a request that is preempted
    and one that is aborted."""
    v1, v2 = (run("run_on_runner.py", shallow_model, runner) for runner in ("v1", "v2"))
    assert (v1.pop("runner"), v2.pop("runner")) == (
        "vllm.v1.worker.cpu_model_runner",
        "vllm.v1.worker.cpu.model_runner",
    )
    assert v1 == v2 and v1["preempted"] > 0 and list(v1["tokens"]) == ["0", "1", "2", "4", "5", "6"]
    assert all(len(tokens) == 20 for tokens in v1["tokens"].values())
    told = v1["told"].values()
    assert any(each["compactions"] > 1 for each in told)
    assert any(each["cached_tokens"] for each in told)
