"""``fastgen bench``: stock vLLM and FastGen side by side on the same prompts and KV bytes."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.tools.bench_engine import BenchEngine
from fastgen_vllm.tools.kernel_bench import ModelShape, kernel_figures
from fastgen_vllm.tools.texts import natural_text


@dataclass(frozen=True)
class Variant:
    """One line of a scenario: an engine, and the recovery its requests ask for, if any."""

    name: str
    engine: str
    recovery: float | None = None


@dataclass(frozen=True)
class Scenario:
    """One batch, measured in every variant."""

    name: str
    prompt_tokens: int
    num_requests: int
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """What is measured: ``ample`` with memory for all, ``scarce`` with a quarter of it."""

    ample: tuple[Scenario, ...]
    scarce: tuple[Scenario, ...]
    rounds: int


def _batch(prompt_tokens: int, num_requests: int, max_tokens: int) -> Scenario:
    name = f"{num_requests} x {prompt_tokens} + {max_tokens}"
    return Scenario(name, prompt_tokens, num_requests, max_tokens)


FULL_PLAN = Plan(
    ample=(
        _batch(512, 1, 64),
        _batch(2048, 1, 64),
        _batch(4096, 1, 64),
        _batch(2048, 4, 64),
        _batch(2048, 16, 64),
    ),
    scarce=(_batch(1024, 16, 256),),
    rounds=3,
)
QUICK_PLAN = Plan(
    ample=(_batch(512, 1, 32), _batch(1024, 4, 32)), scarce=(_batch(512, 8, 64),), rounds=2
)


def run_bench(
    model: str,
    plan: Plan,
    recoveries: tuple[float | None, ...],
    settings: dict[str, Any],
    dtype: str,
    quick: bool,
) -> dict[str, Any]:
    """Everything, as one JSON object. A recovery of None is the settings' own goal."""
    from transformers import AutoTokenizer

    config = json.loads((Path(model) / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    size = getattr(torch, dtype).itemsize
    token_bytes = config["num_hidden_layers"] * kv_heads * head_size * 2 * size
    text = AutoTokenizer.from_pretrained(model).encode(natural_text())
    variants = [Variant("stock", "stock")]
    own_target = FastGenConfig.from_dict(settings).target
    for recovery in recoveries:
        target = own_target if recovery is None else f"recovery {recovery:g}"
        variants.append(Variant(f"FastGen, {target}", "fastgen", recovery))
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": Path(model).name,
        "settings": settings,
        "dtype": dtype,
        "rounds": plan.rounds,
        "kv_bytes_per_token": token_bytes,
    }
    with Progress() as progress:
        for group, share in (("ample", 1.0), ("scarce", 0.25)):
            scenarios = getattr(plan, group)
            # A block more for each request, rounded up to stock's blocks of 128.
            load = max(s.num_requests * (s.prompt_tokens + s.max_tokens + 128) for s in scenarios)
            kv_bytes = int(share * load * token_bytes)
            longest = max(s.prompt_tokens + s.max_tokens for s in scenarios)
            with engines(model, kv_bytes, longest, settings, dtype) as running:
                total = len(scenarios) * plan.rounds * len(variants)
                task = progress.add_task(f"{group} KV memory, {kv_bytes >> 20} MiB", total=total)
                results[group] = {"kv_bytes": kv_bytes, "scenarios": []}
                warm = text[: min(256, longest - 8)]
                for variant in variants:
                    running[variant.engine].run([warm], 4, variant.recovery)
                for scenario in scenarios:
                    runs: dict[str, list[dict[str, Any]]] = {v.name: [] for v in variants}
                    for _ in range(plan.rounds):
                        for variant in variants:
                            engine = running[variant.engine]
                            batch = list(prompts(text, scenario))
                            figures = engine.run(batch, scenario.max_tokens, variant.recovery)
                            runs[variant.name].append(figures)
                            progress.advance(task)
                    results[group]["scenarios"].append(summary(scenario, runs))
        task = progress.add_task("kernels", total=1)
        shape = ModelShape(kv_heads, heads // kv_heads, head_size)
        results["micro"] = kernel_figures(shape, getattr(torch, dtype), quick)
        progress.advance(task)
    return results


def machine() -> str:
    """CPU, threads and system, for the record."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.processor()
    return f"{cpu}, {torch.get_num_threads()} threads, {platform.system()}"


@contextmanager
def engines(
    model: str,
    kv_bytes: int,
    max_model_len: int,
    settings: dict[str, Any],
    dtype: str,
) -> Iterator[dict[str, BenchEngine]]:
    """Stock and FastGen, started together, with the same options and KV bytes."""
    options = {
        "model": model,
        "dtype": dtype,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": kv_bytes,
        "max_model_len": max_model_len,
        "seed": 0,
    }
    running = {
        "stock": BenchEngine("stock", options),
        "fastgen": BenchEngine(
            "fastgen",
            {
                **options,
                "attention_backend": "FASTGEN",
                "additional_config": {"fastgen": settings},
            },
        ),
    }
    try:
        for engine in running.values():
            engine.wait_until_ready()
        yield running
    finally:
        for engine in running.values():
            engine.close()


def prompts(text: list[int], scenario: Scenario) -> Iterator[list[int]]:
    size = scenario.prompt_tokens
    for i in range(scenario.num_requests):
        start = i * size % (len(text) - size)
        yield text[start : start + size]


def summary(scenario: Scenario, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the rounds, their spread, and ratios to stock (above 1: FastGen is better)."""
    lines = {}
    for name, figures in runs.items():
        values = {
            "prefill_s": [f["prefill_seconds"] for f in figures],
            "total_s": [f["seconds"] for f in figures],
            "tokens_per_s": [f["tokens"] / f["seconds"] for f in figures],
        }
        if all(f["decode_tokens"] for f in figures):
            values["decode_tokens_per_s"] = [
                f["decode_tokens"] / f["decode_seconds"] for f in figures
            ]
        line: dict[str, Any] = {key: statistics.median(v) for key, v in values.items()}
        line["spread"] = {key: [min(v), max(v)] for key, v in values.items()}
        line["max_running"] = max(f["max_running"] for f in figures)
        line["rss_mib"] = max(f["rss_bytes"] for f in figures) / 2**20
        line["kv_kept"] = statistics.mean(f["kv_kept"] for f in figures)
        lines[name] = line
    stock = lines["stock"]
    for line in lines.values():
        line["ratio"] = {
            key: line[key] / stock[key]
            for key in ("tokens_per_s", "decode_tokens_per_s", "rss_mib")
            if key in line and key in stock
        }
        line["ratio"]["prefill_s"] = line["prefill_s"] / stock["prefill_s"]
    return {"name": scenario.name, "variants": lines}


def markdown(results: dict[str, Any]) -> str:
    """The tables of ``docs/results/cpu.md``."""
    lines = [
        f"{results['model']}, {results['dtype']}, eager, {results['machine']}, "
        f"{results['date']}; medians of "
        f"{results['rounds']} rounds, engines taking turns. `x` is the ratio to stock.",
        "",
    ]
    for group in ("ample", "scarce"):
        block = results[group]
        lines += [
            f"### {group.capitalize()} KV memory ({block['kv_bytes'] >> 20} MiB)",
            "",
            "| requests x prompt + output | engine | KV kept | most at once | prefill s "
            "| decode tok/s | total tok/s | RSS MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for scenario in block["scenarios"]:
            for name, line in scenario["variants"].items():
                ratio = line["ratio"]
                decode = "-"
                if "decode_tokens_per_s" in ratio:
                    decode = (
                        f"{line['decode_tokens_per_s']:.1f} ({ratio['decode_tokens_per_s']:.2f}x)"
                    )
                lines.append(
                    f"| {scenario['name']} | {name} | {line['kv_kept']:.2f} "
                    f"| {line['max_running']} | {line['prefill_s']:.2f} "
                    f"({ratio['prefill_s']:.2f}x) | {decode} "
                    f"| {line['tokens_per_s']:.1f} ({ratio['tokens_per_s']:.2f}x) "
                    f"| {line['rss_mib']:.0f} ({ratio['rss_mib']:.2f}x) |"
                )
        lines.append("")
    micro = results["micro"]
    lines += [
        f"### Kernels (one layer; the machine reads {micro['read_bandwidth_gb_s']:.1f} GB/s and "
        f"multiplies {micro['matmul_gflop_s']:.0f} GFLOP/s)",
        "",
        "| kernel | ms | rate | of the machine's |",
        "|---|---|---|---|",
    ]
    for figure in micro["kernels"]:
        limits = {"GB/s": "read_bandwidth_gb_s", "GFLOP/s": "matmul_gflop_s"}
        share = figure["rate"] / micro[limits[figure["unit"]]]
        lines.append(
            f"| {figure['name']} | {figure['milliseconds']:.2f} "
            f"| {figure['rate']:.1f} {figure['unit']} | {share:.2f} |"
        )
    return "\n".join(lines) + "\n"


def chart(results: dict[str, Any], path: Path) -> None:
    """Total throughput relative to stock, a group of bars per scenario."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenarios = [(g, s) for g in ("ample", "scarce") for s in results[g]["scenarios"]]
    names = list(scenarios[0][1]["variants"])
    figure, axes = plt.subplots(figsize=(1.6 * len(scenarios) + 2, 4), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [s["variants"][name]["ratio"]["tokens_per_s"] for _, s in scenarios]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(scenarios))]
        bars = axes.bar(places, heights, width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(
        range(len(scenarios)), [f"{s['name']}\n{group} memory" for group, s in scenarios]
    )
    axes.set_ylabel("throughput relative to stock vLLM")
    axes.set_title(f"{results['model']}, {results['machine']}", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=120)
