"""``fastgen eval``: what answers are worth at each share of the KV cache, beside other methods."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.tools.bench import machine
from fastgen_vllm.tools.eval_tasks import Load, items, run
from fastgen_vllm.tools.lab import Lab, Variant

PEER_METHODS = ("streaming", "h2o", "snapkv", "pyramidkv", "adakv", "random")
FULL_LOAD = Load((1024, 2048), continuations=6, retrievals=3, agreements=12)
QUICK_LOAD = Load((1024,), continuations=4, retrievals=2, agreements=2, num_tokens=32)
BUDGETS, QUICK_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.7), (0.2, 0.4)
RECOVERIES, QUICK_RECOVERIES = (0.8, 0.84, 0.88, 0.92, 0.96), (0.84, 0.88)


def variants(
    methods: Sequence[str], budgets: Sequence[float], recoveries: Sequence[float], settings: dict
) -> list[Variant]:
    """The full cache first; then every method over the budgets, and both ladders over T.

    Args:
        settings: of FastGen's own method. A goal among them gives way to those compared, and
            where they do not say otherwise a budget is meant for short prompts too.
    """
    goals = ("kv_budget", "recovery")
    own = {"min_prompt_tokens": 1} | {k: v for k, v in settings.items() if k not in goals}
    found = [Variant("full", FastGenConfig(kv_budget=1.0))]
    for recovery in recoveries:
        config = FastGenConfig.from_dict({**own, "recovery": recovery})
        found.append(Variant(f"FastGen, T {recovery:g}", config))
        config = FastGenConfig(ladder="paper", recovery=recovery)
        found.append(Variant(f"paper's ladder, T {recovery:g}", config))
    for budget in budgets:
        config = FastGenConfig.from_dict({**own, "kv_budget": budget})
        found.append(Variant(f"FastGen, budget {budget:g}", config))
        found += [
            Variant(
                f"{m}, budget {budget:g}",
                FastGenConfig.from_dict({"method": m, "kv_budget": budget}),
            )
            for m in methods
        ]
    return found


def run_eval(
    model: str, texts: Path, load: Load, compared: Sequence[Variant], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything, as one JSON object."""
    longest = max(load.lengths) + load.num_tokens + 256
    share = sum(v.config.kv_budget or 1.0 for v in compared)
    lab = Lab(model, compared, int(longest * (share + 2) * 1.1))
    todo = list(items(lab.tokenizer, texts, load))
    found: dict[tuple[str, str], list[dict[str, torch.Tensor]]] = defaultdict(list)
    with Progress() as progress:
        for item in progress.track(todo, description="prompts"):
            found[item.task, item.kind].append(run(lab, item, load.num_tokens))
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": Path(model).name,
        "settings": settings,
        "load": asdict(load),
        "variants": [_figures(v, i, found) for i, v in enumerate(compared)],
    }


def _figures(
    variant: Variant, index: int, found: dict[tuple[str, str], list[dict[str, torch.Tensor]]]
) -> dict[str, Any]:
    def mean(name: str, task: str | None = None) -> float:
        values = [f[name][index] for (t, _), fs in found.items() for f in fs if task in (None, t)]
        return float(torch.stack(values).mean())

    losses = [f["loss"] for (task, _), fs in found.items() if task == "continuation" for f in fs]
    answers = [f["rouge_l"] for (task, _), fs in found.items() if task == "agreement" for f in fs]
    excess = torch.stack([loss[index] - loss[0] for loss in losses])
    whole = float(torch.stack([loss[0] for loss in losses]).mean())
    return {
        "name": variant.name,
        "method": variant.name.split(",")[0],
        "kept_slots": mean("slots"),
        "kept_memory": mean("pages"),
        "loss": mean("loss", "continuation"),
        "loss_increase": float(excess.mean()) / whole,
        "loss_increase_error": _standard_error(excess) / whole,
        "retrieval": mean("accuracy", "retrieval"),
        "retrieval_by_kind": {
            kind: float(torch.stack([f["accuracy"][index] for f in fs]).mean())
            for (task, kind), fs in found.items()
            if task == "retrieval"
        },
        "rouge_l": mean("rouge_l", "agreement"),
        "rouge_l_error": _standard_error(torch.stack([answer[index] for answer in answers])),
        "same_tokens": mean("same_tokens", "agreement"),
        "rouge_l_by_language": {
            kind: float(torch.stack([f["rouge_l"][index] for f in fs]).mean())
            for (task, kind), fs in found.items()
            if task == "agreement"
        },
    }


def _standard_error(values: torch.Tensor) -> float:
    """Of the mean; 0 where there is one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


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

    figure, panels = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    titles = (
        ("loss_increase", "continuation loss, increase over the full cache"),
        ("retrieval", "retrieval accuracy"),
        ("rouge_l", "ROUGE-L against the full cache's answer"),
    )
    full, *others = results["variants"]
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for v in others:
        by_budget = v["name"].startswith("FastGen, budget")
        lines["FastGen (budget)" if by_budget else v["method"]].append(v)
    for axes, (key, title) in zip(panels, titles, strict=True):
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
        axes.axhline(full[key], color="black", linewidth=0.8)
        axes.set_xlabel("share of KV slots kept")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
    # Methods that fall apart would flatten all others.
    worst = sorted(v["loss_increase"] for v in others)[int(0.85 * len(others))]
    panels[0].set_ylim(-0.02, max(0.05, worst))
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"{results['model']}, {results['date']}", fontsize=11)
    figure.savefig(path, dpi=110)
