"""The figures of ``fastgen bench``, summed up: medians, Markdown tables and a chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

GROUPS = {
    "ample": "Ample KV memory",
    "scarce": "Scarce KV memory",
    "shared_ample": "Prompts with one beginning, prefix caching, ample KV memory",
    "shared_scarce": "Prompts with one beginning, prefix caching, scarce KV memory",
    "long": "Long answers, a third of the KV memory",
    "pressure": "Short prompts that grow, a quarter of the KV memory",
}
LIMITS = {"GB/s": "read_bandwidth_gb_s", "GFLOP/s": "matmul_gflop_s"}
"""By the unit of a kernel's rate, the machine's own rate."""
QUIET = 1.2
"""A machine whose rates changed by more than this factor was busy with something else."""


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the rounds by variant, their spread, and ratios to stock.

    A ratio of ``tokens_per_s`` above 1 says that the variant is faster than stock, and one of
    ``prefill_s`` or ``rss_mib`` above 1 that it takes more.
    """
    lines = {name: _line(figures) for name, figures in runs.items()}
    stock = lines["stock"]
    for line in lines.values():
        line["ratio"] = {
            key: line[key] / stock[key]
            for key in ("tokens_per_s", "decode_tokens_per_s", "prefill_s", "rss_mib")
            if key in line and key in stock
        }
    return lines


def _line(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    values = {
        "prefill_s": [f["prefill_seconds"] for f in rounds],
        "total_s": [f["seconds"] for f in rounds],
        "tokens_per_s": [f["tokens"] / f["seconds"] for f in rounds],
    }
    # Where requests waited for memory, there may be no step in which all of them decode.
    if all(f["decode_tokens"] for f in rounds):
        values["decode_tokens_per_s"] = [f["decode_tokens"] / f["decode_seconds"] for f in rounds]
    return {
        **{key: statistics.median(v) for key, v in values.items()},
        "spread": {key: [min(v), max(v)] for key, v in values.items()},
        "max_running": max(f["max_running"] for f in rounds),
        "preemptions": statistics.median(f["preemptions"] for f in rounds),
        "rss_mib": max(f["rss_bytes"] for f in rounds) / 2**20,
        "kv_kept": statistics.mean(f["kv_kept"] for f in rounds),
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables of ``docs/results/cpu.md``."""
    lines = [
        f"{results['model']}, {results['dtype']}, eager, {results['machine']}, "
        f"{results['date']}, load average {results['load_average']:.1f} before. The figures are "
        f"medians of {results['rounds']} rounds in which the engines took turns, and `x` marks the "
        "ratio to stock.",
        "",
    ]
    for group, title in GROUPS.items():
        if group in results:
            lines += [f"### {title} ({results[group]['kv_bytes'] >> 20} MiB)", ""]
            lines += [*_group_table(results[group]["scenarios"]), ""]
            lines += [_quietness(results[group]["rates_after"]), ""]
    return "\n".join([*lines, *_kernel_table(results["micro"], results["dtype"])]) + "\n"


def _quietness(rates_after: dict[str, float]) -> str:
    """What the machine's rates were after the measurement, relative to before."""
    read, product = rates_after["read_bandwidth_gb_s"], rates_after["matmul_gflop_s"]
    noisy = any(not 1 / QUIET < rate < QUIET for rate in rates_after.values())
    return ("**The machine was not quiet.** " if noisy else "") + (
        f"The machine read {read:.2f} times as fast after this as before, and multiplied "
        f"{product:.2f} times as fast."
    )


def _group_table(scenarios: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| requests x prompt + output | engine | KV kept | most at once | preempted | prefill s "
        "| decode tok/s | total tok/s | RSS MiB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for scenario in scenarios:
        for name, line in scenario["variants"].items():
            cells = [
                scenario["name"],
                name,
                f"{line['kv_kept']:.2f}",
                str(line["max_running"]),
                f"{line['preemptions']:g}",
                _with_ratio(line, "prefill_s", 2),
                _with_ratio(line, "decode_tokens_per_s", 1),
                _with_ratio(line, "tokens_per_s", 1),
                _with_ratio(line, "rss_mib", 0),
            ]
            yield f"| {' | '.join(cells)} |"


def _with_ratio(line: dict[str, Any], key: str, digits: int) -> str:
    if key not in line["ratio"]:
        return "-"
    return f"{line[key]:.{digits}f} ({line['ratio'][key]:.2f}x)"


def _kernel_table(micro: dict[str, Any], dtype: str) -> Iterator[str]:
    yield (
        f"### Kernels (one layer; the machine reads {micro['read_bandwidth_gb_s']:.1f} GB/s and "
        f"multiplies {micro['matmul_gflop_s']:.0f} GFLOP/s in {dtype}, "
        f"{micro['matmul_bf16_gflop_s']:.0f} in bfloat16)"
    )
    yield ""
    yield "| kernel | ms | rate | share of the machine's rate |"
    yield "|---|---|---|---|"
    for figure in micro["kernels"]:
        share = figure["rate"] / micro[LIMITS[figure["unit"]]]
        yield (
            f"| {figure['name']} | {figure['milliseconds']:.2f} "
            f"| {figure['rate']:.1f} {figure['unit']} | {share:.2f} |"
        )


def _at_once(scenario: dict[str, Any]) -> str:
    """How many requests ran at once, with stock and with the variant that ran the most."""
    stock, *others = (line["max_running"] for line in scenario["variants"].values())
    most = max([stock, *others])
    return f"{stock} → {most} at once" if most > stock else ""


def chart(results: dict[str, Any]) -> Any:
    """Total throughput relative to stock, a group of bars per scenario."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenarios = [(g, s) for g in GROUPS if g in results for s in results[g]["scenarios"]]
    names = list(dict.fromkeys(name for _, s in scenarios for name in s["variants"]))
    figure, axes = plt.subplots(figsize=(1.6 * len(scenarios) + 2, 4), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        lines = [s["variants"].get(name) for _, s in scenarios]
        heights = [line["ratio"]["tokens_per_s"] if line else float("nan") for line in lines]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(scenarios))]
        bars = axes.bar(places, heights, width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(
        range(len(scenarios)),
        [
            f"{s['name'].replace(' shared', chr(10) + 'shared')}\n{group.removeprefix('shared_')}"
            f"\n{_at_once(s)}"
            for group, s in scenarios
        ],
    )
    axes.set_ylabel("throughput relative to stock vLLM")
    axes.set_title(f"{results['model']}, {results['machine']}", fontsize=10, loc="left")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 1.2), ncols=len(names))
    return figure
