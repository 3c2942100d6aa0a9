"""The Korean README says what the English one does."""

from __future__ import annotations

import json
import re

from helpers.paths import ROOT

from fastgen_vllm.runtime.traffic import COUNTS
from fastgen_vllm.vllm_plugin import metrics

ENGLISH, KOREAN = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md")
)


def code(text: str) -> list[str]:
    """Lines of its code blocks, without comments."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line.split("  #")[0].rstrip() for block in blocks for line in block.splitlines()]


def figures(text: str) -> set[str]:
    """Numbers with a fraction."""
    return set(re.findall(r"(?<![\d.])\d+\.\d+", text))


def test_same_commands_and_figures() -> None:
    assert code(KOREAN) == code(ENGLISH) and len(code(KOREAN)) > 10
    assert figures(KOREAN) == figures(ENGLISH) and len(figures(KOREAN)) > 8


def test_dashboard_and_documents_name_metrics_that_exist() -> None:
    histograms = [f"{name}{end}" for name in metrics.HISTOGRAMS for end in ("_sum", "_count", "")]
    buckets = [f"{name}_bucket" for name in metrics.HISTOGRAMS]
    counters = [f"fastgen:{name}_total" for name in (*COUNTS, "prompts_kept_whole")]
    known = {*histograms, *buckets, *counters, *(f"fastgen:{name}" for name in metrics.GAUGES)}
    board = (ROOT / "docs" / "grafana.json").read_text(encoding="utf-8")
    assert len(json.loads(board)["panels"]) == 8
    operating = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    for text in (board, operating):
        assert set(re.findall(r"fastgen:\w+", text)) <= known
    named = set(re.findall(r"`(fastgen:\w+)`", operating))
    gauges = [f"fastgen:{name}" for name in metrics.GAUGES]
    assert {*metrics.HISTOGRAMS, *counters, *gauges} == named
