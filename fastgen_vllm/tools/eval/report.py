"""The figures of ``fastgen eval`` as a Markdown table and as a chart."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

PANELS = {
    "loss_increase": "continuation loss, increase over the full cache",
    "retrieval": "retrieval accuracy",
    "rouge_l": "ROUGE-L against the full cache's answer",
}


def markdown(results: dict[str, Any]) -> str:
    """The table of ``docs/results/quality.md``, by method and share kept."""
    load = results["load"]
    count = len(load["lengths"])
    lines = [
        f"{results['model']}, float32, {results['machine']}, {results['date']}; prompts of "
        f"{' and '.join(map(str, load['lengths']))} tokens: {count * load['continuations']} "
        f"continuations of {load['num_tokens']} tokens, "
        f"{3 * count * load['retrievals']} retrievals, {count * load['agreements']} instructions.",
        "",
        "| method | slots kept | memory kept | loss against the full cache's | passkey | multi-key "
        "| tracking | ROUGE-L | same first tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = {v["method"]: i for i, v in reversed(list(enumerate(results["variants"])))}
    rows = sorted(results["variants"], key=lambda v: (order[v["method"]], v["kept_slots"]))
    for v in rows:
        kinds = v["retrieval_by_kind"]
        cells = [f"{kinds[k]:.2f}" for k in ("passkey", "multi-key", "variable tracking")]
        lines.append(
            f"| {v['name']} | {v['kept_slots']:.3f} | {v['kept_memory']:.3f} "
            f"| {v['loss_increase']:+.2%} ± {v['loss_increase_error']:.2%} | {' | '.join(cells)} "
            f"| {v['rouge_l']:.3f} ± {v['rouge_l_error']:.3f} | {v['same_tokens']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def chart(results: dict[str, Any], path: Path) -> None:
    """Quality against the share of the KV cache kept, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(15, 5), layout="constrained")
    full, *others = results["variants"]
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        _panel(axes, others, key)
        axes.axhline(full[key], color="black", linewidth=0.8)
        axes.set_title(title, fontsize=11)
    # Methods that fall apart would flatten all others.
    worst = sorted(v["loss_increase"] for v in others)[int(0.85 * len(others))]
    panels[0].set_ylim(-0.02, max(0.05, worst))
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"{results['model']}, {results['date']}", fontsize=11)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, variants: list[dict[str, Any]], key: str) -> None:
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for v in variants:
        by_budget = v["name"].startswith("FastGen, budget")
        lines["FastGen (budget)" if by_budget else v["method"]].append(v)
    for name, line in lines.items():
        line.sort(key=lambda v: v["kept_slots"])
        ours = name.startswith("FastGen")
        axes.plot(
            [v["kept_slots"] for v in line],
            [v[key] for v in line],
            marker="o" if ours else ".",
            linewidth=2.5 if ours else 1.2,
            linestyle="-" if ours else "--",
            label=name,
        )
    axes.set_xlabel("share of KV slots kept")
    axes.grid(alpha=0.3)
