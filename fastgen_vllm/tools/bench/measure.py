"""Measure stock vLLM and FastGen, engines taking turns, and the kernels by themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.tools.bench.report import summary
from fastgen_vllm.tools.engine import Batch, engines
from fastgen_vllm.tools.inputs import InputError
from fastgen_vllm.tools.kernel_bench import kernel_figures, machine_rates
from fastgen_vllm.tools.machine import machine
from fastgen_vllm.tools.models import ModelShape, load_tokenizer
from fastgen_vllm.tools.texts import natural_text


@dataclass(frozen=True)
class Variant:
    """One line of a scenario: an engine, and what its requests ask for, if anything."""

    name: str
    engine: str
    recovery: float | None = None
    compress: str | None = None

    def batch(self, prompts: list[list[int]], max_tokens: int) -> Batch:
        return Batch(prompts, max_tokens, self.recovery, self.compress)


@dataclass(frozen=True)
class Scenario:
    """One batch, measured in every variant.

    Attributes:
        shared_tokens: the first so many tokens of its prompts are the same.
    """

    name: str
    prompt_tokens: int
    num_requests: int
    max_tokens: int
    shared_tokens: int = 0

    @property
    def kv_tokens(self) -> int:
        """Room for all requests at once, each with a block to spare of stock's 128 tokens."""
        own = self.prompt_tokens - self.shared_tokens + self.max_tokens + 128
        return self.shared_tokens + self.num_requests * own


@dataclass(frozen=True)
class Plan:
    """What is measured: ``ample`` with memory for all requests, ``scarce`` with a quarter of it,
    ``shared`` with either, and with prefix caching; ``long`` answers with a third of it, and under
    ``pressure``, with a quarter of it, requests that keep all while they can."""

    ample: tuple[Scenario, ...] = ()
    scarce: tuple[Scenario, ...] = ()
    shared: tuple[Scenario, ...] = ()
    long: tuple[Scenario, ...] = ()
    pressure: tuple[Scenario, ...] = ()
    rounds: int = 1

    def only(self, loads: Sequence[str]) -> Plan:
        """The loads of these names, or all of them where none is named.

        Raises:
            InputError: there is no such load.
        """
        known = [field.name for field in fields(self) if field.name != "rounds"]
        there = [name for name in known if getattr(self, name)]
        for name in loads:
            if name not in there:
                raise InputError(f"There is no load {name!r}. Name one of {', '.join(there)}.")
        left_out: dict[str, Any] = {n: () for n in known if loads and n not in loads}
        return replace(self, **left_out)

    @property
    def groups(self) -> dict[str, tuple[tuple[Scenario, ...], float]]:
        """Scenarios that are measured together, and their KV memory as a share of what the largest
        of them needs."""
        found = {
            "ample": (self.ample, 1.0),
            "scarce": (self.scarce, 0.25),
            "shared_ample": (self.shared, 1.0),
            "shared_scarce": (self.shared, 0.25),
            "long": (self.long, 1 / 3),
            "pressure": (self.pressure, 0.25),
        }
        return {name: group for name, group in found.items() if group[0]}


def _batch(
    prompt_tokens: int, num_requests: int, max_tokens: int, shared_tokens: int = 0
) -> Scenario:
    own = prompt_tokens - shared_tokens
    prompt = f"({shared_tokens} shared + {own})" if shared_tokens else str(own)
    name = f"{num_requests} x {prompt} + {max_tokens}"
    return Scenario(name, prompt_tokens, num_requests, max_tokens, shared_tokens)


FULL_PLAN = Plan(
    ample=(
        _batch(512, 1, 64),
        _batch(2048, 1, 64),
        _batch(4096, 1, 64),
        _batch(2048, 4, 64),
        _batch(2048, 16, 64),
    ),
    scarce=(_batch(1024, 16, 256),),
    shared=(_batch(2048, 16, 256, 1024),),
    long=(_batch(100, 16, 1500),),
    pressure=(_batch(128, 24, 1024),),
    rounds=3,
)
QUICK_PLAN = Plan(
    ample=(_batch(512, 1, 32), _batch(1024, 4, 32)),
    scarce=(_batch(512, 8, 64),),
    shared=(_batch(1024, 8, 64, 512),),
    rounds=2,
)


@dataclass(frozen=True)
class Bench:
    """What to measure, and with which model and settings.

    Attributes:
        recoveries: each is a variant of FastGen; None stands for the settings' own goal.
        settings: FastGen's.
        dtype: of the model and its KV cache.
    """

    model: str
    plan: Plan
    recoveries: tuple[float | None, ...]
    settings: dict[str, Any]
    dtype: Literal["bfloat16", "float16", "float32"]
    quick_kernels: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_folder(self.model)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.shape.kv_bytes_per_token(self.torch_dtype)

    def variants(self, group: str) -> list[Variant]:
        """What is compared; where requests grow, keeping everything is left out."""
        config, found = FastGenConfig.from_dict(self.settings), [Variant("stock", "stock")]
        grow = group in ("long", "pressure")
        for recovery in self.recoveries:
            target = config.target if recovery is None else f"recovery {recovery:g}"
            if not (grow and recovery == 1.0):
                found.append(Variant(f"FastGen, {target}", "fastgen", recovery))
        if group == "pressure" and config.method_for(config.goal).choose_again is not None:
            name = f"FastGen, {config.target} under pressure"
            found.append(Variant(name, "fastgen", compress="pressure"))
        return found

    def engine_options(self, scenarios: Sequence[Scenario], share: float) -> dict[str, Any]:
        """Arguments of ``vllm.LLM`` that both engines get: ``share`` of the memory that the
        largest scenario needs."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
            "enforce_eager": True,
            "enable_prefix_caching": any(s.shared_tokens for s in scenarios),
            "kv_cache_memory_bytes": int(
                share * max(s.kv_tokens for s in scenarios) * self.kv_bytes_per_token
            ),
            "max_model_len": max(s.prompt_tokens + s.max_tokens for s in scenarios),
            "seed": 0,
        }


def run_bench(bench: Bench) -> dict[str, Any]:
    """Everything, as one JSON object.

    Raises:
        InputError: the native kernels cannot run here.
        ChildError: an engine failed.
    """
    text = load_tokenizer(bench.model).encode(natural_text())
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "model": Path(bench.model).name,
        "settings": bench.settings,
        "dtype": bench.dtype,
        "rounds": bench.plan.rounds,
        "kv_bytes_per_token": bench.kv_bytes_per_token,
        "load_average": os.getloadavg()[0],
    }
    with Progress() as progress:
        task = progress.add_task("kernels", total=1)
        results["micro"] = _kernel_figures(bench)
        progress.advance(task)
        for group, (scenarios, share) in bench.plan.groups.items():
            before = machine_rates(bench.torch_dtype)
            results[group] = measure_group(bench, group, scenarios, share, text, progress)
            after = machine_rates(bench.torch_dtype)
            results[group]["rates_after"] = {key: after[key] / before[key] for key in before}
    return results


def _kernel_figures(bench: Bench) -> dict[str, Any]:
    try:
        return kernel_figures(bench.shape, bench.torch_dtype, bench.quick_kernels)
    except RuntimeError as error:
        raise InputError(f"The kernels cannot be measured: {error}") from None


def measure_group(
    bench: Bench,
    group: str,
    scenarios: Sequence[Scenario],
    share: float,
    text: list[int],
    progress: Progress,
) -> dict[str, Any]:
    """The scenarios of one amount of memory, with engines started for it."""
    options, variants = bench.engine_options(scenarios, share), bench.variants(group)
    kv_bytes = options["kv_cache_memory_bytes"]
    total = len(scenarios) * bench.plan.rounds * len(variants)
    task = progress.add_task(f"KV memory of {kv_bytes >> 20} MiB", total=total)
    measured = []
    with engines(options, options, bench.settings) as running:
        warm = text[: min(256, options["max_model_len"] - 8)]
        for variant in variants:
            running[variant.engine].run(variant.batch([warm], 4))
        for scenario in scenarios:
            runs: dict[str, list[dict[str, Any]]] = {v.name: [] for v in variants}
            # Round by round: what else the machine does falls on all variants alike.
            for variant in variants * bench.plan.rounds:
                batch = variant.batch(prompts(text, scenario), scenario.max_tokens)
                runs[variant.name].append(running[variant.engine].run(batch))
                progress.advance(task)
            measured.append({"name": scenario.name, "variants": summary(runs)})
    return {"kv_bytes": kv_bytes, "scenarios": measured}


def prompts(text: list[int], scenario: Scenario) -> list[list[int]]:
    shared, text = text[: scenario.shared_tokens], text[scenario.shared_tokens :]
    size = scenario.prompt_tokens - len(shared)
    starts = [i * size % (len(text) - size) for i in range(scenario.num_requests)]
    return [shared + text[start : start + size] for start in starts]
