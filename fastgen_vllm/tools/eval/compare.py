"""Compare methods at several shares of the KV cache on the tasks of ``tasks``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.methods import METHODS
from fastgen_vllm.tools.eval.tasks import Item, Load, items, run
from fastgen_vllm.tools.lab import Lab, Variant
from fastgen_vllm.tools.machine import machine
from fastgen_vllm.tools.models import check_context, load_tokenizer

PEER_METHODS = tuple(name for name in METHODS if name != "fastgen")
FULL_LOAD = Load((1024, 2048), continuations=6, retrievals=3, agreements=12)
QUICK_LOAD = Load((1024,), continuations=4, retrievals=2, agreements=2, num_tokens=32)
BUDGETS, QUICK_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.7), (0.2, 0.4)
RECOVERIES, QUICK_RECOVERIES = (0.8, 0.84, 0.88, 0.92, 0.96), (0.84, 0.88)


def variants(
    methods: Sequence[str],
    budgets: Sequence[float],
    recoveries: Sequence[float],
    settings: dict[str, Any],
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
    """Everything, as one JSON object.

    Raises:
        InputError: the texts or the model are too short for the load.
    """
    longest = max(load.lengths) + load.num_tokens + 256
    check_context(model, longest, "--length with a question and its answer")
    todo = list(items(load_tokenizer(model), texts, load))
    share = sum(v.config.kv_budget or 1.0 for v in compared)
    lab = Lab(model, compared, int(longest * (share + 2) * 1.1))
    found = Found()
    with Progress() as progress:
        for item in progress.track(todo, description="prompts"):
            found.add(item, run(lab, item, load.num_tokens))
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": Path(model).name,
        "settings": settings,
        "load": asdict(load),
        "variants": [
            {"name": v.name, "method": v.name.split(",")[0], **figures(found, i)}
            for i, v in enumerate(compared)
        ],
    }


class Found:
    """Figures of all prompts so far."""

    def __init__(self) -> None:
        self._items: list[tuple[Item, dict[str, torch.Tensor]]] = []

    def add(self, item: Item, figures: dict[str, torch.Tensor]) -> None:
        """``figures`` are ``[variants]`` each."""
        self._items.append((item, figures))

    def values(self, name: str, task: str | None = None, kind: str | None = None) -> torch.Tensor:
        """float32 ``[prompts, variants]``, of one task and one kind of it where they are named."""
        return torch.stack(
            [
                figures[name]
                for item, figures in self._items
                if task in (None, item.task) and kind in (None, item.kind)
            ]
        )

    def by_kind(self, name: str, task: str, index: int) -> dict[str, float]:
        """The mean of variant ``index`` for each kind of a task."""
        kinds = {item.kind: None for item, _ in self._items if item.task == task}
        return {kind: float(self.values(name, task, kind)[:, index].mean()) for kind in kinds}


def figures(found: Found, index: int) -> dict[str, Any]:
    """What the report says of variant ``index``. Variant 0 is the full cache."""
    loss = found.values("loss", "continuation")
    excess, whole = loss[:, index] - loss[:, 0], float(loss[:, 0].mean())
    rouge_l = found.values("rouge_l", "agreement")[:, index]
    return {
        "kept_slots": float(found.values("slots")[:, index].mean()),
        "kept_memory": float(found.values("pages")[:, index].mean()),
        "loss": float(loss[:, index].mean()),
        "loss_increase": float(excess.mean()) / whole,
        "loss_increase_error": _standard_error(excess) / whole,
        "retrieval": float(found.values("accuracy", "retrieval")[:, index].mean()),
        "retrieval_by_kind": found.by_kind("accuracy", "retrieval", index),
        "rouge_l": float(rouge_l.mean()),
        "rouge_l_error": _standard_error(rouge_l),
        "same_tokens": float(found.values("same_tokens", "agreement")[:, index].mean()),
        "rouge_l_by_language": found.by_kind("rouge_l", "agreement", index),
    }


def _standard_error(values: torch.Tensor) -> float:
    """The standard error of the mean; 0 where there is one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
