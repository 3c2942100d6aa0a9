"""The kit that runs vLLM on a GPU machine without a network, as far as it goes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.models import first_layers
from helpers.paths import PROGRAMS, ROOT
from helpers.programs import run_program

pytestmark = pytest.mark.engine


def test_an_engine(tmp_path: Path) -> None:
    """One with dummy weights, whose decode steps are captured and profiled."""
    first_layers(2, tmp_path / "big", 4096)
    name = "big-fp32-replayed"
    run_program(PROGRAMS / "gpu_kit.py", name, str(tmp_path), "--tiny", E2E=str(tmp_path))
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["backend"] == "FASTGEN" and found["kernels"] == "Triton" and found["captured"]
    assert found["runner"] == "vllm.v1.worker.gpu.model_runner"
    assert all(0 < kept < 1 for kept in found["kept"]) and found["most_running"] >= 2
    assert found["decode_requests"] == 1 and found["steps"] > 4


def test_the_summary(tmp_path: Path) -> None:
    def write(backend: str, tokens: list[list[int]], **more: Any) -> None:
        kept = {"kept": [0.25, 0.35], "vacated": [3, 4], "output_tokens_per_second": 20.0}
        found = {"seconds": 1.0, "tokens": tokens, **kept, **more}
        (tmp_path / f"small-bf16-{backend}.json").write_text(json.dumps(found))

    same, other = [[1, 2], [3, 4]], [[1, 2], [3, 5]]
    write("stock", same, gaps=[[0.5, 0.5], [0.5, 0.01]], output_tokens_per_second=10.0)
    write("full", other)
    write("default", same)
    write("v1", same)
    write("replayed", other)
    run_program(ROOT / "scripts/gpu/summary.py", str(tmp_path), str(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())["found"]
    agreement = {"requests": 2, "equal": 1, "at": [[1, 0.01]]}
    assert found["bf16: recovery 1.0 against stock"] == agreement
    assert found["bf16: v1's answers equal to default's"] == [2, 2]
    assert found["bf16: replayed's answers equal to default's"] == [1, 2]
    assert found["small-bf16-default: kept"] == [0.25, 0.3, 0.35]
    assert found["small-bf16-default over small-bf16-stock"] == {"output_tokens_per_second": 2.0}
