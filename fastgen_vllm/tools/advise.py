"""``fastgen advise``: which budget a user's own prompts need, and what it buys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.policy.methods import EVAL_ONLY
from fastgen_vllm.tools.eval.material import Item
from fastgen_vllm.tools.eval.measure import run
from fastgen_vllm.tools.eval.report import standard_error
from fastgen_vllm.tools.inputs import InputError, read_text
from fastgen_vllm.tools.lab import Lab, Variant
from fastgen_vllm.tools.models import check_context, load_tokenizer

BUDGETS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
FEW = 10
"""Prompts: with fewer the advice says that it hangs on them."""


@dataclass(frozen=True)
class Line:
    """One budget over all prompts, with standard errors.

    Attributes:
        memory: blocks held where the answers end, of the full cache's.
        at_once: requests in the memory of one with the full cache.
        kl: divergence of the next token's distribution from the full cache's, nats a token along
            the full cache's own answer.
        agreement: the share of that answer's tokens which are the most likely ones here too.
    """

    budget: float
    memory: float
    at_once: float
    kl: tuple[float, float]
    agreement: tuple[float, float]


@dataclass(frozen=True)
class Advice:
    """What was found.

    Attributes:
        settings: that all budgets have.
        asked: the least agreement.
        num_short: prompts that are kept whole, and were left out.
        best: the lowest budget that, as all above it, agrees as often as was asked for; of those
            that hold the same memory, as ``min_prompt_tokens`` may have it, the highest.
    """

    model: str
    title: str
    settings: dict[str, Any]
    asked: float
    num_prompts: int
    num_short: int
    lines: list[Line]
    best: Line | None


def read_prompts(path: Path, tokenizer: Any) -> list[list[int]]:
    """Token ids of each line's "prompt", or of its chat "messages".

    Raises:
        InputError: a line has neither.
    """
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            tokens = _tokens(json.loads(line), tokenizer)
        except Exception as error:  # a chat template raises what it likes
            raise InputError(
                f"{path}, line {number}: {type(error).__name__}: {error}. Every line is a JSON "
                'object with a "prompt", or with "messages" such as '
                '[{"role": "user", "content": "Hello"}], and "tools" beside them.'
            ) from None
        prompts.append(tokens)
    return prompts


def _tokens(job: Any, tokenizer: Any) -> list[int]:
    if not isinstance(job, dict):
        raise ValueError("it is no object")
    messages, prompt = job.get("messages"), job.get("prompt")
    if messages is not None:
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError("its messages are no list of objects")
        chat = {"add_generation_prompt": True, "return_dict": False, "tools": job.get("tools")}
        tokens = tokenizer.apply_chat_template(messages, **chat)
    elif isinstance(prompt, str):
        tokens = tokenizer.encode(prompt)
    else:
        raise ValueError("it has no prompt that is a string, and no messages")
    if not tokens:
        raise ValueError("the prompt is empty")
    return tokens


def advise(
    model: str,
    prompts: Path,
    budgets: Sequence[float],
    asked: float,
    max_tokens: int,
    settings: dict[str, Any],
) -> Advice:
    """Each budget against the full cache, whose own greedy answers are given to all.

    Raises:
        InputError: the prompts cannot be read, or are too long or too short.
    """
    if not {"kv_budget", "recovery"}.isdisjoint(settings):
        raise InputError("--settings names a goal. Name budgets by --budget, and leave it out.")
    named = {"full": 1.0, **{f"{budget:g}": budget for budget in sorted(budgets)}}
    compared = [
        Variant(name, FastGenConfig.from_dict({**settings, "kv_budget": budget}))
        for name, budget in named.items()
    ]
    config = compared[1].config
    if config.method in EVAL_ONLY:
        raise InputError(
            f"--settings names the method {config.method!r}, which `fastgen eval` alone runs. Take "
            "another, or leave it out."
        )
    found = read_prompts(prompts, load_tokenizer(model))
    longest = max(map(len, found)) + max_tokens
    check_context(model, longest, f"The longest of {prompts} with its answer")
    compressed = [prompt for prompt in found if len(prompt) >= config.min_prompt_tokens]
    if not compressed:
        raise InputError(
            f"All prompts of {prompts} have fewer than {config.min_prompt_tokens} tokens, and are "
            "kept whole (min_prompt_tokens). Take longer ones; for short prompts with long "
            "answers see `fastgen eval --task generation`."
        )
    # Any of them may need everything, and beside theirs there is the prompt as it was encoded.
    lab = Lab(model, compared, (longest + 512) * (len(compared) + 1))
    figures = [_measure(lab, p, max_tokens) for p in track(compressed, description="prompts")]
    lines = [_line(variant, i, figures) for i, variant in enumerate(compared) if i]
    name, lengths, short = Path(model).name, [*map(len, compressed)], len(found) - len(compressed)
    title = (
        f"{name}, {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, answers of up "
        f"to {max_tokens}"
    )
    best = lowest(lines, asked)
    return Advice(name, title, settings, asked, len(lengths), short, lines, best)


def _measure(lab: Lab, prompt: list[int], max_tokens: int) -> dict[str, torch.Tensor]:
    found = run(lab, Item("advise", "", len(prompt), prompt, most_tokens=max_tokens))
    held = [len(lab.runtime.tables.blocks[v.name]) for v in lab.variants]
    return {**found, "held": torch.tensor(held)}


def _line(variant: Variant, i: int, figures: list[dict[str, torch.Tensor]]) -> Line:
    held = torch.stack([each["held"] for each in figures]).sum(0)
    kl, same = (torch.stack([each[k][i] for each in figures]) for k in ("kl", "same_top"))
    kl_and_error = float(kl.mean()), standard_error(kl)
    same_and_error = float(same.mean()), standard_error(same)
    memory = float(held[i] / held[0])
    budget = variant.config.kv_budget or 1.0
    return Line(budget, memory, 1 / memory, kl_and_error, same_and_error)


def lowest(lines: Sequence[Line], asked: float) -> Line | None:
    """Of lines from the lowest budget to the highest."""
    best: Line | None = None
    for line in reversed(lines):
        if line.agreement[0] < asked:
            break
        if best is None or line.memory < best.memory:
            best = line
    return best


def table(advice: Advice) -> Table:
    """For the terminal."""
    rows = Table(
        *("kv_budget", "KV memory", "at once", "same next token", "KL, nats"), title=advice.title
    )
    for line in advice.lines:
        same, error = line.agreement
        kl, kl_error = line.kl
        rows.add_row(
            f"{line.budget:g}",
            f"{line.memory:.1%}",
            f"{line.at_once:.1f}x",
            f"{same:.1%} ± {error:.1%}",
            f"{kl:.3f} ± {kl_error:.3f}",
            style="bold" if line is advice.best else None,
        )
    return rows


def sentence(advice: Advice) -> str:
    """What to do."""
    best, count, short = advice.best, advice.num_prompts, advice.num_short
    left_out = f" {short} short prompts are kept whole, and were left out." if short else ""
    if best is None:
        return (
            "The highest budget here does not give the full cache's next token "
            f"{100 * advice.asked:g}% of the time. Try more of --budget, protect what must stay "
            '("protect"), or begin with {"compress": "pressure"}, which keeps everything until '
            f"memory runs short.{left_out}"
        )
    few = f" These are only {count} prompts: try more." if count < FEW else ""
    settings = json.dumps({**advice.settings, "kv_budget": best.budget})
    return (
        f"Take {settings}: {best.agreement[0]:.1%} of next tokens are the full cache's, and up to "
        f"{best.at_once:.1f} times as many requests fit in the same memory.{left_out}{few}"
    )


def picture(advice: Advice) -> Any:
    """Agreement and requests at once over the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    budgets = [line.budget for line in advice.lines]
    same, errors = zip(*(line.agreement for line in advice.lines), strict=True)
    left.errorbar(budgets, [100 * x for x in same], [100 * x for x in errors], marker="o")
    left.axhline(100 * advice.asked, color="black", linewidth=0.8, linestyle="--")
    left.set_xlabel("kv_budget")
    left.set_ylabel("next tokens that are the full cache's, %")
    right = left.twinx()
    right.plot(budgets, [line.at_once for line in advice.lines], color="#e6550d", marker=".")
    right.set_ylabel("requests at once in the memory of one", color="#e6550d")
    if advice.best is not None:
        left.axvline(advice.best.budget, color="#31a354", linewidth=6, alpha=0.3)
    left.set_title(advice.title, fontsize=10)
    return figure
