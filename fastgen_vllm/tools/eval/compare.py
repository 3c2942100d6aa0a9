"""Compare methods at several shares of the KV cache on the tasks of ``tasks``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.methods import METHODS
from fastgen_vllm.tools.eval.kvpress import Kvpress, KvpressLab
from fastgen_vllm.tools.eval.material import Half, Item, Load
from fastgen_vllm.tools.eval.measure import run
from fastgen_vllm.tools.eval.tasks import items
from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.lab import Lab, Variant
from fastgen_vllm.tools.machine import machine
from fastgen_vllm.tools.models import check_context, load_tokenizer

PEER_METHODS = tuple(name for name in METHODS if name != "fastgen")
COUNTS = {
    **{"continuation": 8, "code": 6, "answers": 8, "retrieval": 6},
    **{"tools": 12, "instructions": 8, "chat": 6, "few_shot": 8},
}
"""Prompts of each task and length."""
LONG_COUNTS = {"generation": 4}
"""Of tasks that take long, so they are run where they are asked for."""
QUICK_COUNTS = dict.fromkeys(COUNTS, 2) | {"retrieval": 3, "continuation": 4}
LEAST_LENGTH = 256
LENGTHS, QUICK_LENGTHS = (1024, 2048), (1024,)
BUDGETS, QUICK_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7), (0.2, 0.4)
RECOVERIES, QUICK_RECOVERIES = (0.88, 0.96), (0.88,)
MOST_DIFFERENCE = 1e-3
"""Nats a token between two full caches of one model, in float32."""


def load_of(
    quick: bool, lengths: Sequence[int] | None, tasks: Sequence[str] | None, half: Half
) -> Load:
    """What was asked for, or else everything.

    Raises:
        InputError: there is no such task.
    """
    counts = QUICK_COUNTS if quick else COUNTS
    every = {**counts, **LONG_COUNTS}
    for task in tasks or ():
        if task not in every:
            raise InputError(f"There is no task {task!r}. Take one of {', '.join(every)}.")
    chosen = {task: every[task] for task in every if task in (tasks or counts)}
    for length in lengths or ():
        if length < LEAST_LENGTH and set(chosen) - set(LONG_COUNTS):
            raise InputError(
                f"--length {length} is too short for a text and a question. Take {LEAST_LENGTH} "
                "or more, or --task generation alone."
            )
    return Load(tuple(lengths or (QUICK_LENGTHS if quick else LENGTHS)), chosen, half)


def variants(
    methods: Sequence[str],
    budgets: Sequence[float],
    recoveries: Sequence[float],
    settings: dict[str, Any],
) -> list[Variant]:
    """The full cache first; then FastGen and every method over the budgets, and ladders.

    Args:
        settings: of FastGen's own method. A goal among them gives way to those compared, and
            where they do not say otherwise a budget is meant for short prompts too.
    """

    def of(name: str, budget: float | None, recovery: float | None, **other: Any) -> Variant:
        goal = {"kv_budget": budget} if recovery is None else {"recovery": recovery}
        config = FastGenConfig.from_dict({"min_prompt_tokens": 1, **other, **goal})
        target = f"budget {budget:g}" if recovery is None else f"T {recovery:g}"
        return Variant(f"{name}, {target}", config)

    own = {k: v for k, v in settings.items() if k not in ("kv_budget", "recovery")}
    found = [Variant("full", FastGenConfig(kv_budget=1.0))]
    for budget in budgets:
        found.append(of("FastGen", budget, None, **own))
        found.append(of("adaptive ladder", budget, None, ladder="adaptive"))
        found += [of(method, budget, None, method=method) for method in methods]
    for recovery in recoveries:
        found.append(of("adaptive ladder", None, recovery, ladder="adaptive"))
        found.append(of("paper's ladder", None, recovery, ladder="paper"))
    return [*{variant.name: variant for variant in found}.values()]  # each asked for once


def run_eval(
    model: str,
    texts: Path,
    load: Load,
    compared: Sequence[Variant],
    settings: dict[str, Any],
    kvpress: Kvpress | None = None,
) -> dict[str, Any]:
    """Everything, as one JSON object; the figures of every prompt are lists, a value a variant.

    Raises:
        InputError: the texts or the model are too short for the load.
    """
    check_context(model, max(load.lengths) + 256, "--length with a question and its answer")
    if kvpress is not None and "generation" in load.counts:
        raise InputError(
            "--kvpress does not go with the task generation, since its presses drop nothing "
            "while decoding. Leave one of them out."
        )
    todo = list(items(load_tokenizer(model), texts, load))
    longest = max(len(item.prompt) + max(len(item.target), item.most_tokens) for item in todo)
    share = sum(v.config.kv_budget or 1.0 for v in compared)
    # Beside the variants' own: the prompt as encoded, and the copy that is being compacted. Each
    # grows by its answer, and by what its heads' last pages leave free.
    lab = Lab(model, compared, int(longest * (share + 2) * 1.1) + 512 * len(compared))
    names = [v.name for v in compared]
    labs: list[Lab | KvpressLab] = [lab]
    with ExitStack() as stack:
        if kvpress is not None:
            peers = stack.enter_context(KvpressLab(model, kvpress, lab))
            names += [v.name for v in peers.variants[1:]]
            labs.append(peers)
        prompts = [_figures(labs, item) for item in track(todo, description="prompts")]
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": Path(model).name,
        "settings": settings,
        "kvpress": kvpress and {"version": peers.version},
        "load": asdict(load),
        "variants": [{"name": name, "method": name.split(",")[0]} for name in names],
        "prompts": prompts,
    }


def _figures(labs: Sequence[Lab | KvpressLab], item: Item) -> dict[str, Any]:
    about = {"task": item.task, "kind": item.kind, "length": item.length}
    found = side_by_side([run(lab, item) for lab in labs])
    return {**about, "tokens": len(item.prompt), **{k: v.tolist() for k, v in found.items()}}


def side_by_side(found: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Figures of several labs on one prompt. The full caches of all but the first only say whether
    theirs is the same model.

    Raises:
        InputError: it is not: the loss of a true continuation differs.
    """
    first, *others = found
    for other in others:
        difference = float(other["loss"][0] - first["loss"][0]) if "loss" in first else 0.0
        if abs(difference) > MOST_DIFFERENCE:
            raise InputError(
                f"The full cache's loss differs by {difference:+.4f} between kvpress's "
                "transformers and ours, so they do not compute the same model. Take another "
                "version of either."
            )
    return {
        name: torch.cat([values, *(other[name][1:] for other in others)])
        for name, values in first.items()
    }
