"""``fastgen bench``: how it plans memory and sums up, and a tiny load end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastgen_vllm.config import BUDGET
from fastgen_vllm.tools.bench.measure import QUICK_PLAN, Bench, Plan, Scenario, run_bench
from fastgen_vllm.tools.bench.report import chart, markdown, summary
from fastgen_vllm.tools.inputs import InputError

WHOLE, COMPRESSED = "FastGen, recovery 1", f"FastGen, kv_budget {BUDGET:g}"


def bench_of(model: str, plan: Plan) -> Bench:
    return Bench(model, plan, (1.0, None), {"kernels": "native"}, "float32", quick_kernels=True)


def test_memory_of_both_groups(model: str) -> None:
    """Ample memory holds every request of the largest scenario; scarce is a quarter of it."""
    bench = bench_of(model, QUICK_PLAN)
    largest = 4 * (1024 + 32 + 128) * bench.kv_bytes_per_token
    ample = bench.engine_options(QUICK_PLAN.ample, 1.0)
    assert ample["kv_cache_memory_bytes"] == largest
    assert ample["max_model_len"] == 1024 + 32
    scarce = bench.engine_options(QUICK_PLAN.ample, 0.25)
    assert scarce == {**ample, "kv_cache_memory_bytes": largest // 4}


def test_loads_by_name() -> None:
    plan = QUICK_PLAN.only(["shared", "scarce"])
    assert list(plan.groups) == ["scarce", "shared_ample", "shared_scarce"]
    assert plan.rounds == QUICK_PLAN.rounds and QUICK_PLAN.only([]) == QUICK_PLAN
    with pytest.raises(InputError, match=r"no load 'long'.*one of ample, scarce, shared"):
        QUICK_PLAN.only(["long"])


def figures(seconds: float, decode_tokens: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens": 60,
        "prefill_seconds": seconds / 10,
        "decode_seconds": seconds / 2,
        "decode_tokens": decode_tokens,
        "max_running": int(seconds),
        "preemptions": int(seconds) // 2,
        "rss_bytes": int(seconds) << 20,
        "kv_kept": 0.5,
    }


def test_summary_is_of_medians() -> None:
    stock = [figures(seconds, 30) for seconds in (6.0, 2.0, 3.0)]
    fastgen = [figures(seconds, decode) for seconds, decode in ((1.5, 30), (9.0, 0), (1.0, 30))]
    lines = summary({"stock": stock, "FastGen": fastgen})
    assert lines["stock"]["tokens_per_s"] == 20 and lines["FastGen"]["tokens_per_s"] == 40
    assert lines["stock"]["spread"]["total_s"] == [2.0, 6.0]
    assert lines["stock"]["decode_tokens_per_s"] == 20
    assert lines["FastGen"]["ratio"] == {"tokens_per_s": 2.0, "prefill_s": 0.5, "rss_mib": 1.5}
    assert lines["stock"]["preemptions"] == 1
    assert lines["FastGen"]["max_running"] == 9 and lines["FastGen"]["kv_kept"] == 0.5


@pytest.mark.engine
def test_tiny_bench(model: str, tmp_path: Path) -> None:
    """Two scenarios in one scarce memory, so that one pair of engines is started."""
    plan = Plan(scarce=(Scenario("two", 100, 2, 8), Scenario("six", 400, 6, 8)))
    results = run_bench(bench_of(model, plan))
    two, six = results["scarce"]["scenarios"]
    for scenario in (two, six):
        assert list(scenario["variants"]) == ["stock", WHOLE, COMPRESSED]
        for line in scenario["variants"].values():
            assert line["tokens_per_s"] > 0 and line["prefill_s"] < line["total_s"]
    assert two["variants"]["stock"]["max_running"] == 2
    assert six["variants"]["stock"]["max_running"] < 6
    assert six["variants"][WHOLE]["kv_kept"] == 1.0
    assert two["variants"][COMPRESSED]["kv_kept"] == 1.0, "too short to be compressed"
    assert 0.5 < six["variants"][COMPRESSED]["kv_kept"] < 0.65, "256 of 400 tokens' memory"
    # The report shows both groups; the ample one stands in for engines of its own.
    changed = {"read_bandwidth_gb_s": 0.7, "matmul_gflop_s": 1.1}
    results["scarce"]["rates_after"] = {key: 1.0 for key in results["scarce"]["rates_after"]}
    results["ample"] = {"kv_bytes": 64 << 20, "scenarios": [two], "rates_after": changed}
    table = markdown(results)
    assert table.count("**The machine was not quiet.** The machine read 0.70 times") == 1
    assert table.index("### Ample KV memory (64 MiB)") < table.index("### Scarce KV memory")
    assert table.count(f"| {COMPRESSED} |") == 3 and "decode attention, with scores" in table
    chart(results).savefig(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
