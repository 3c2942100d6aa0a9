"""The figures of ``fastgen eval`` as Markdown tables and as a chart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Figure:
    """One figure of one task.

    Attributes:
        name: among the figures of a prompt.
        kind: of the task's prompts, or all of them.
        low: whether less is better.
    """

    title: str
    task: str
    name: str
    kind: str | None = None
    low: bool = True

    @property
    def is_loss(self) -> bool:
        return self.name.startswith("loss")


FIGURES = (
    Figure("text: loss", "continuation", "loss"),
    Figure("text: KL", "continuation", "kl"),
    Figure("code: loss", "code", "loss"),
    Figure("code: KL", "code", "kl"),
    Figure("answers, English: KL", "answers", "kl", "english"),
    Figure("answers, Korean: KL", "answers", "kl", "korean"),
    Figure("chat: KL", "chat", "kl"),
    Figure("instructions: KL", "instructions", "kl"),
    Figure("tool calls: KL", "tools", "kl"),
    Figure("calls as the full cache's", "tools", "own", low=False),
    Figure("calls well formed", "tools", "right", low=False),
    Figure("instructions kept", "instructions", "right", low=False),
    Figure("examples followed", "few_shot", "right", low=False),
    Figure("numbers found", "retrieval", "right", low=False),
    Figure("generation: share held", "generation", "held"),
    Figure("generation: KL", "generation", "kl"),
    *(Figure(f"generation: loss, quarter {i}", "generation", f"loss_{i}") for i in (1, 2, 3, 4)),
)


class Summary:
    """Means over prompts of what ``run_eval`` found; the first variant is the full cache."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.variants: list[dict[str, Any]] = results["variants"]
        self._prompts: list[dict[str, Any]] = results["prompts"]
        slots, pages = (self._stack(self._prompts, name).mean(0) for name in ("slots", "pages"))
        self.slots, self.pages = slots.tolist(), pages.tolist()

    @staticmethod
    def _stack(prompts: list[dict[str, Any]], name: str) -> torch.Tensor:
        return torch.tensor([prompt[name] for prompt in prompts], dtype=torch.float64)

    def values(self, figure: Figure) -> torch.Tensor | None:
        """float64 ``[prompts, variants]``; losses over the full cache's mean. None without any."""
        prompts = [
            prompt
            for prompt in self._prompts
            if prompt["task"] == figure.task and figure.kind in (None, prompt["kind"])
        ]
        if not prompts:
            return None
        found = self._stack(prompts, figure.name)
        if figure.is_loss:
            found = (found - found[:, :1]) / found[:, :1].mean()
        return found

    def figures(self) -> Iterator[tuple[Figure, torch.Tensor]]:
        """Those whose task was run."""
        for figure in FIGURES:
            values = self.values(figure)
            if values is not None:
                yield figure, values

    def count(self, task: str) -> int:
        return sum(prompt["task"] == task for prompt in self._prompts)


def standard_error(values: torch.Tensor) -> float:
    """Of the mean; 0 where there is one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _cell(figure: Figure, values: torch.Tensor) -> str:
    mean, error = float(values.mean()), standard_error(values)
    if not figure.low:
        return f"{int(values.sum())}"
    if figure.is_loss:
        return f"{mean:+.1%} ± {error:.1%}"
    if figure.name == "held":
        return f"{mean:.3f}"
    return f"{1000 * mean:.0f} ± {1000 * error:.0f}"


def markdown(results: dict[str, Any]) -> str:
    """A table of all variants by method and share, and where FastGen is not the best."""
    summary, load = Summary(results), results["load"]
    found = list(summary.figures())
    tasks = {figure.task: summary.count(figure.task) for figure, _ in found}
    counts = ", ".join(f"{count} {task.replace('_', '-')}" for task, count in tasks.items())
    titles = [
        f"{figure.title} of {len(values)}" if not figure.low else figure.title
        for figure, values in found
    ]
    lines = [
        f"{results['model']}, float32, {results['machine']}, {results['date']}; prompts of "
        f"{', '.join(map(str, load['lengths']))} tokens from the {load['half']} half: {counts}. KL "
        "in thousandths of a nat, and losses over the full cache's, with standard errors.",
        "",
        f"| method | slots kept | memory kept | {' | '.join(titles)} |",
        "|---|---|---|" + "---|" * len(found),
    ]
    order = {v["method"]: i for i, v in reversed(list(enumerate(summary.variants)))}
    by_method = sorted(
        range(len(summary.variants)),
        key=lambda i: (order[summary.variants[i]["method"]], summary.slots[i]),
    )
    for i in by_method:
        cells = [_cell(figure, values[:, i]) for figure, values in found]
        share = f"{summary.slots[i]:.3f} | {summary.pages[i]:.3f}"
        lines.append(f"| {summary.variants[i]['name']} | {share} | {' | '.join(cells)} |")
    better = list(_better(summary))
    if better:
        lines += ["", "Better than FastGen at the same budget, by more than one standard error of"]
        lines += ["the difference paired by prompt:", "", *better]
    return "\n".join(lines) + "\n"


def _better(summary: Summary) -> Iterator[str]:
    """A line for each budget at which some method is better in some figure."""
    goals = [v["name"].partition(", ")[2] for v in summary.variants]
    for ours, variant in enumerate(summary.variants):
        if variant["method"] != "FastGen":
            continue
        found: dict[str, list[str]] = defaultdict(list)
        for figure, values in summary.figures():
            for i, goal in enumerate(goals if figure.name != "held" else ()):
                gain = (values[:, ours] - values[:, i]) * (1 if figure.low else -1)
                if goal == goals[ours] and float(gain.mean()) > standard_error(gain):
                    found[figure.title].append(summary.variants[i]["method"])
        names = "; ".join(f"{title}: {', '.join(methods)}" for title, methods in found.items())
        if names:
            yield f"- {goals[ours]}: {names}."


PANELS = (
    Figure("text: KL", "continuation", "kl"),
    Figure("code: KL", "code", "kl"),
    Figure("answers: KL", "answers", "kl"),
    Figure("tool calls: KL", "tools", "kl"),
    Figure("chat: KL", "chat", "kl"),
    Figure("numbers found", "retrieval", "right", low=False),
    Figure("instructions: KL", "instructions", "kl"),
    Figure("examples followed", "few_shot", "right", low=False),
    Figure("generation: KL", "generation", "kl"),
)


def chart(results: dict[str, Any]) -> Any:
    """Quality against the share of the KV cache kept, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = Summary(results)
    shown = [figure for figure in PANELS if summary.values(figure) is not None]
    columns = min(4, len(shown))
    figure, panels = plt.subplots(
        -(-len(shown) // columns),
        columns,
        figsize=(4.5 * columns, 9 if len(shown) > 4 else 5),
        layout="constrained",
        squeeze=False,
    )
    for axes, each in zip(panels.flat, shown, strict=False):
        _panel(axes, summary, each)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.suptitle(f"{results['model']}, {results['date']}", fontsize=11)
    return figure


def _panel(axes: Any, summary: Summary, figure: Figure) -> None:
    values = summary.values(figure)
    assert values is not None
    means = values.mean(0).tolist()
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for i, variant in enumerate(summary.variants[1:], 1):
        lines[variant["method"]].append((summary.slots[i], means[i]))
    for name, line in lines.items():
        ours = name == "FastGen"
        axes.plot(
            *zip(*sorted(line), strict=True),
            marker="o" if ours else ".",
            linewidth=2.5 if ours else 1.2,
            linestyle="-" if ours else "--",
            label=name,
        )
    if figure.low:
        axes.set_yscale("log")
    else:
        axes.axhline(means[0], color="black", linewidth=0.8)
    axes.set_title(figure.title, fontsize=11)
    axes.set_xlabel("share of KV slots kept")
    axes.grid(alpha=0.3)
