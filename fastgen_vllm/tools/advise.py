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
        kl: nats a token, how much worse than the full cache it foretells the full cache's answer.
        agreement: the share of that answer's tokens which are the most likely ones here too.
    """

    budget: float
    memory: float
    kl: tuple[float, float]
    agreement: tuple[float, float]

    @property
    def at_once(self) -> float:
        """Requests in the memory of one with the full cache."""
        return 1 / self.memory


@dataclass(frozen=True)
class Advice:
    """``best`` is the lowest budget that, as all above it, agrees as often as was asked for; of
    those that hold the same memory, as ``min_prompt_tokens`` may have it, the highest."""

    title: str
    asked: float
    num_prompts: int
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
            job = json.loads(line)
            if "messages" in job:
                chat = {"add_generation_prompt": True, "return_dict": False}
                tokens = tokenizer.apply_chat_template(job["messages"], **chat)
            else:
                tokens = tokenizer.encode(job["prompt"])
        except Exception as error:  # a chat template raises what it likes
            raise InputError(
                f"{path}, line {number}: {type(error).__name__}: {error}. Every line is a JSON "
                'object with a "prompt", or with "messages" such as '
                '[{"role": "user", "content": "Hello"}].'
            ) from None
        prompts.append(tokens)
    return prompts


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
    own = {k: v for k, v in settings.items() if k not in ("kv_budget", "recovery")}
    compared = [Variant("full", FastGenConfig(kv_budget=1.0))]
    for budget in sorted(set(budgets)):
        compared.append(Variant(str(budget), FastGenConfig.from_dict({**own, "kv_budget": budget})))
    config = compared[1].config
    found = read_prompts(prompts, load_tokenizer(model))
    longest = max(map(len, found)) + max_tokens
    check_context(model, longest, f"The longest of {prompts} with its answer")
    short = sum(len(prompt) < config.min_prompt_tokens for prompt in found)
    if short == len(found):
        raise InputError(
            f"All prompts of {prompts} have fewer than {config.min_prompt_tokens} tokens, and are "
            "kept whole (min_prompt_tokens). Take longer ones; for short prompts with long "
            "answers see `fastgen eval --task generation`."
        )
    share = sum(variant.config.kv_budget or 1.0 for variant in compared)
    # Beside the variants' own: the prompt as encoded, and the copy that is being compacted.
    slots = int(longest * (share + 2) * 1.1) + config.min_prompt_tokens * len(compared)
    lab = Lab(model, compared, slots + 512 * len(compared))
    figures = [_measure(lab, p, max_tokens) for p in track(found, description="prompts")]
    lines = [_line(variant, i, figures) for i, variant in enumerate(compared) if i]
    title = (
        f"{Path(model).name}, {len(found)} prompts of {min(map(len, found))} to "
        f"{max(map(len, found))} tokens, answers of up to {max_tokens}"
    )
    return Advice(title, asked, len(found), lines, lowest(lines, asked))


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
    return Line(variant.config.kv_budget or 1.0, memory, kl_and_error, same_and_error)


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
    best, count = advice.best, advice.num_prompts
    if best is None:
        return (
            f"No budget here gives the full cache's next token {advice.asked:.0%} of the time. Try "
            'more of --budget, protect what must stay ("protect"), or begin with '
            '{"compress": "pressure"}, which keeps everything until memory runs short.'
        )
    few = f" These are only {count} prompts: try more." if count < FEW else ""
    return (
        f'Take {{"kv_budget": {best.budget:g}}}: {best.agreement[0]:.1%} of next tokens are the '
        f"full cache's, and {best.at_once:.1f} times as many requests run at once in the same "
        f"memory.{few}"
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
