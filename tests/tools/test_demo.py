"""``fastgen demo``, which scripts/demo.sh runs: a small load end to end, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastgen_vllm.tools import demo
from fastgen_vllm.tools.cli import app
from fastgen_vllm.tools.models import ModelShape

SMALL = demo.Load(num_requests=4, prompt_chars=2300, max_tokens=4, kv_tokens=1024, turns=1)


def test_prompts_of_the_demo() -> None:
    prompts = demo.DEMO_LOAD.prompts()
    assert len(set(prompts)) == 12
    assert all(len(prompt) == 4300 for prompt in prompts[:-1])
    assert "한국" in prompts[-1]


@pytest.mark.engine
def test_small_demo(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DEMO_LOAD", SMALL)
    out, settings = tmp_path / "new" / "demo.json", {"kv_budget": 0.3, "min_prompt_tokens": 64}
    arguments = ["demo", model, "--settings", json.dumps(settings), "--out", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines[:-1])) <= 80 and "most requests at once" in result.output
    assert "times as many tokens a second" in " ".join(lines) and str(out) in result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    dtype = getattr(torch, found["dtype"])
    assert found["kv_bytes"] == 1024 * ModelShape.from_folder(model).kv_bytes_per_token(dtype)
    assert found["goal"] == "kv_budget 0.3"
    assert found["max_running_stock"] < found["max_running_fastgen"] <= 4
    assert found["tokens_per_s_stock"] > 0 and found["tokens_per_s_fastgen"] > 0
    rows = found["outputs"]
    assert [row["prompt"] for row in rows] == SMALL.prompts()
    assert all(row["stock"] and row["fastgen"] for row in rows)
    kept = [row["kv_kept_ratio"] for row in rows]
    assert all(0.1 < ratio < 0.45 for ratio in kept)
    assert found["kv_kept_ratio"] == pytest.approx(sum(kept) / len(kept))
    assert all(row["vacated_blocks"] > 0 for row in rows)
