"""vLLM's CUDA worker and V1 runner with FastGen, without a GPU: see ``run_on_pretend_gpu.py``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import PROGRAMS
from safetensors.torch import load_file, save_file

PROGRAM = PROGRAMS / "run_on_pretend_gpu.py"
LAYERS = 2
"""As Triton's interpreter takes a while for each."""


@pytest.fixture(scope="module")
def shallow_model(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model's first layers."""
    folder = tmp_path_factory.mktemp("models") / "shallow"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    weights = load_file(Path(model) / "model.safetensors")
    dropped = [f"model.layers.{i}." for i in range(LAYERS, config["num_hidden_layers"])]
    kept = {k: v for k, v in weights.items() if not k.startswith(tuple(dropped))}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_as_on_the_cpu(shallow_model: str) -> None:
    gpu, cpu = run(shallow_model), run(shallow_model, "cpu")
    assert (gpu["worker"], cpu["worker"]) == ("FastGenGPUWorker", "FastGenCPUWorker")
    assert gpu["tokens"] == cpu["tokens"] and len({*gpu["tokens"][2]}) > 3
    assert gpu["kept"] == cpu["kept"] and gpu["kept"][2] < 0.5
    assert gpu["kernels"] == "Triton"
    assert (gpu["report_lag"], cpu["report_lag"]) == (1, 0)
    assert gpu["prefill"] == "vLLM's flash attention" and gpu["prefill_differs"] < 1e-2
    assert not gpu["has_cpu_worker"], "vLLM's CPU worker switches streams and events off"
    assert 0.8 < gpu["memory"] <= 0.92  # vLLM's gpu_memory_utilization
