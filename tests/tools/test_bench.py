"""``fastgen bench``: refuses what is wrong, and measures a tiny load end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastgen_vllm.tools.bench import Plan, Scenario, chart, markdown, run_bench
from fastgen_vllm.tools.cli import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no model folder"),
        (["--recovery", "1.5"], "recovery"),
        (["--settings", '{"laddr": 1}'], "unknown key"),
        (["--settings", "{"], "Expecting"),
        (["--recovery", "1", "--settings", '{"method": "h2o", "kv_budget": 0.3}'], "'h2o'"),
        (["--rounds", "0"], "rounds"),
        (["--dtype", "fp8"], "bfloat16"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.engine
def test_tiny_bench(model: str, tmp_path: Path) -> None:
    plan = Plan((Scenario("two", 100, 2, 8),), (Scenario("six", 400, 6, 8),), rounds=1)
    results = run_bench(model, plan, (1.0, None), {"kernels": "native"}, "float32", quick=True)
    whole, compressed = "FastGen, recovery 1", "FastGen, kv_budget 0.4"
    (two,), (six,) = (results[group]["scenarios"] for group in ("ample", "scarce"))
    for scenario in (two, six):
        assert list(scenario["variants"]) == ["stock", whole, compressed]
        for line in scenario["variants"].values():
            assert line["tokens_per_s"] > 0 and line["prefill_s"] < line["total_s"]
    assert two["variants"]["stock"]["max_running"] == 2
    assert six["variants"]["stock"]["max_running"] < 6
    assert six["variants"][whole]["kv_kept"] == 1.0
    assert two["variants"][compressed]["kv_kept"] == 1.0, "too short to be compressed"
    assert 0.5 < six["variants"][compressed]["kv_kept"] < 0.65, "256 of 400 tokens' memory"
    table = markdown(results)
    assert table.count(f"| {compressed} |") == 2 and "decode attention, with scores" in table
    chart(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
