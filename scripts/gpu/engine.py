"""One vLLM engine on the GPU: engine.py NAME OUT. Writes OUT/NAME.json; big runs a profile too.

NAME is MODEL-DTYPE-BACKEND: small or big, bf16 or fp32, and one of BACKENDS. NO_C=1 in the
environment replaces vLLM's compiled operations with PyTorch's. With --tiny everything shrinks, to
try the program. The model runner is what vLLM takes, but for ``v1``, and V1 where NO_C=1: V2 needs
vLLM's compiled operations, and so do graphs.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

FASTGEN = {
    "full": {"recovery": 1.0},
    "default": {},
    "v1": {},
    "replayed": {"cuda_graphs": True},
    "cuda": {"kernels": "cuda"},
    "compiled": {},
}
BACKENDS = [*FASTGEN, "stock", "graphs"]
PACE = {"bf16": 2, "fp32": 4}
TINY = "--tiny" in sys.argv
NO_C = bool(os.environ.get("NO_C"))
WORK = Path(os.environ.get("E2E", "/tmp/e2e"))

# model: prompts, tokens of each, answers, requests whose KV fits, elements of a token's K and V
SIZES = {"small": (24, 1500, 64, 8, 2 * 30 * 3 * 64), "big": (24, 8192, 256, 8, 2 * 32 * 8 * 128)}
if TINY:
    SIZES = {"small": (4, 300, 12, 2, 2 * 2 * 3 * 64), "big": (2, 280, 4, 2, 2 * 2 * 3 * 64)}


def without_compiled_operations() -> None:
    for name in ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa3_C"):
        sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    import torch

    torch.ops._C.silu_and_mul = None
    from vllm import _custom_ops, platforms
    from vllm.config.kernel import IrOpPriorityConfig

    from fastgen_vllm.vllm_plugin import flash_attention

    flash_attention.prefer = lambda: None

    native = classmethod(lambda cls, *a, **k: IrOpPriorityConfig.with_default(["native"]))
    type(platforms.current_platform).get_default_ir_op_priority = native
    for name in dir(_custom_ops):
        if name.startswith("cutlass") and "supports" in name:
            setattr(_custom_ops, name, lambda *args: False)


def start(model: str, dtype: str, backend: str) -> Any:
    _, length, answer, fit, kv = SIZES[model]
    kv *= PACE[dtype] * fit * (length + answer + 32)
    options: dict[str, Any] = {}
    if backend in FASTGEN:
        options["attention_backend"] = "FASTGEN"
        options["additional_config"] = {"fastgen": FASTGEN[backend]}
    else:
        flash = dtype == "bf16" and not NO_C
        options["attention_backend"] = "FLASH_ATTN" if flash else "TRITON_ATTN"
    compilation: dict[str, Any] = {"mode": 0, "cudagraph_mode": "NONE"}
    if NO_C:
        compilation["custom_ops"] = ["none"]
    if backend in ("graphs", "replayed"):
        compilation["cudagraph_mode"] = "FULL_DECODE_ONLY"
        compilation["cudagraph_capture_sizes"] = [1, 2, 4, 8, 16, 24]
    if backend == "compiled":  # what a user gets
        compilation = {}
    if model == "big":
        options["load_format"] = "dummy"
    from vllm import LLM

    return LLM(
        str(WORK / model),
        dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype],
        max_model_len=length + answer + 128,
        max_num_batched_tokens=min(length, 8192),
        max_num_seqs=32,
        kv_cache_memory_bytes=kv,
        gpu_memory_utilization=0.85 if model == "big" else 0.1,  # only checked at the start
        enable_prefix_caching=False,
        compilation_config=compilation,
        kernel_config={"enable_jit_warmup": False, "enable_cutedsl_warmup": False},
        seed=0,
        **options,
    )


def prompts_of(model: str, llm: Any) -> list[list[int]]:
    count, length = SIZES[model][:2]
    if model == "big":
        tokens = 1999 if TINY else 40009
        return [[(i * 7919 + j * j) % tokens for j in range(length)] for i in range(count)]
    prose = (WORK / "big/prose.txt").read_text()
    ids = llm.get_tokenizer().encode(prose[: 6 * count * length])
    return [ids[i * length : (i + 1) * length - 7 * i] for i in range(count)]


class Run:
    """Steps the engine by hand and counts."""

    def __init__(self, llm: Any, detokenize: bool = False) -> None:
        self.engine, self.detokenize = llm.llm_engine, detokenize
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.outputs: dict[str, Any] = {}
        self.running: list[int] = []
        self.preemptions: dict[str, int] = {}
        self.count = 0

    def add(self, prompts: list[list[int]], answer: int, logprobs: int | None = None) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=answer,
            ignore_eos=True,
            logprobs=logprobs,
            detokenize=self.detokenize,
        )
        for prompt in prompts:
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)
            self.count += 1

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                self.outputs[output.request_id] = output
        self.running.append(len(self.scheduler.running))
        for request in self.scheduler.running:
            self.preemptions[request.request_id] = request.num_preemptions

    def all(self) -> float:
        started = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.step()
        return time.perf_counter() - started

    def all_decoding(self) -> bool:
        s = self.scheduler
        return not s.waiting and all(r.num_output_tokens > 2 for r in s.running)


def figures(llm: Any, model: str, backend: str) -> dict[str, Any]:
    count, _, answer = SIZES[model][:3]
    prompts = prompts_of(model, llm)
    warm = Run(llm)
    warm.add([prompts[0][:200], prompts[1]], 4)
    warm.all()
    run = Run(llm, detokenize=model == "small")
    run.add(prompts, answer, 2 if model == "small" and backend == "stock" else None)
    seconds = run.all()
    outputs = [run.outputs[str(i)] for i in range(count)]
    info = [(o.kv_transfer_params or {}).get("fastgen", {}) for o in outputs]
    result = {
        "seconds": seconds,
        "output_tokens_per_second": count * answer / seconds,
        "most_running": max(run.running),
        "mean_running": sum(run.running) / len(run.running),
        "steps": len(run.running),
        "preemptions": sum(run.preemptions.values()),
        "kept": [i.get("kv_kept_ratio") for i in info],
        "vacated": [i.get("vacated_blocks") for i in info],
        "free_blocks": run.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "blocks": run.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
    }
    if model == "small":
        result["tokens"] = [list(o.outputs[0].token_ids) for o in outputs]
        result["text"] = outputs[0].outputs[0].text
        if outputs[0].outputs[0].logprobs:
            result["gaps"] = [[gap(lp) for lp in o.outputs[0].logprobs] for o in outputs]
    return result


def gap(logprobs: dict[int, Any]) -> float:
    """By how much the best token leads."""
    first, second = sorted((x.logprob for x in logprobs.values()), reverse=True)[:2]
    return first - second


def profile(llm: Any, path: Path) -> dict[str, Any]:
    """Decode steps of as many long requests as stock vLLM can hold."""
    import torch

    prompts, steps = prompts_of("big", llm)[: SIZES["big"][3] - 1], 2 if TINY else 20
    run = Run(llm)
    run.add(prompts, 4 * steps)
    while not run.all_decoding():
        run.step()
    started = time.perf_counter()
    for _ in range(steps):
        run.step()
    seconds = (time.perf_counter() - started) / steps
    with torch.profiler.profile() as profiler:
        for _ in range(4):
            run.step()
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=30)
    cpu = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
    path.write_text(f"4 decode steps of {len(prompts)} requests\n{table}\n{cpu}")
    run.engine.abort_request([str(i) for i in range(len(prompts))])
    return {"decode_requests": len(prompts), "decode_step_ms": 1000 * seconds}


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--tiny"]
    pattern = rf"(small|big)-(bf16|fp32)-({'|'.join(BACKENDS)})"
    known = re.fullmatch(pattern, " ".join(arguments[:1]))
    if known is None or len(arguments) != 2:
        raise SystemExit(
            f"engine.py NAME OUT [--tiny], not {' '.join(sys.argv[1:])!r}; NAME is small or big, "
            f"bf16 or fp32, and one of {', '.join(BACKENDS)}, for example small-bf16-default"
        )
    name, out = arguments[0], Path(arguments[1])
    model, dtype, backend = known.groups()
    if backend == "v1" or os.environ.get("NO_C") == "1":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    started = time.perf_counter()
    if NO_C:
        without_compiled_operations()
    llm = start(model, dtype, backend)
    result: dict[str, Any] = {"name": name, "start_seconds": time.perf_counter() - started}
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    result["backend"] = worker.model_runner.attn_groups[0][0].backend.get_name()
    result["runner"] = type(worker.model_runner).__module__
    if hasattr(worker, "runtime"):
        from fastgen_vllm.kernels import libraries

        kv = worker.runtime.pool.kv
        result["captured"] = worker.captured_sizes
        result["kernels"] = worker.runtime.kernels.NAME
        result["prefill"], _ = libraries.choose(kv.dtype, kv.shape[1])
    path = out / f"{name}.json"
    path.write_text(json.dumps(result))
    result |= figures(llm, model, backend)
    path.write_text(json.dumps(result))
    if model == "big":
        result |= profile(llm, out / f"{name}.profile.txt")
        path.write_text(json.dumps(result))
    print({k: v for k, v in result.items() if k not in ("tokens", "gaps", "kept", "vacated")})


if __name__ == "__main__":
    main()
