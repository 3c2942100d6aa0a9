"""A program: prompts that share a beginning, in chunks, through a small engine on the CPU that
compresses, compacts again, runs short of memory and loses a request. Prints a line of JSON.

Given ``v2`` it runs vLLM's V2 model runner, whose Triton kernels are interpreted: vLLM takes Triton
for missing where it cannot compile for the CPU, so a backend is named that is none.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from types import SimpleNamespace
from typing import Any


def use_runner(version: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if version == "v2" else "0"
    if version == "v2":
        os.environ["TRITON_INTERPRET"] = "1"
        import helpers.quick_interpreter  # noqa: F401
        from triton.backends import backends

        backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore


def generate(model: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, __version__

    gc.freeze()  # vLLM collects garbage time and again, and what is imported stays
    llm = LLM(
        model,
        attention_backend="fastgen",
        dtype="float32",
        max_model_len=224,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        compilation_config={"mode": 0, "custom_ops": ["none"]},
        additional_config={"fastgen": {"min_prompt_tokens": 48, "compact_every": 8, "debug": True}},
        kv_cache_memory_bytes=1 << 28,
        num_gpu_blocks_override=17,
        disable_log_stats=False,
    )
    shared, engine = [i * i % 1999 for i in range(48)], llm.llm_engine
    for i, n in enumerate((50, 20, 80, 40, 150, 30, 60)):
        params = SamplingParams(
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
            extra_args={"fastgen_compress": i % 3 == 0},  # whole ones cannot be squeezed
        )
        prompt = shared + [(i + 7) * j % 1997 for j in range(n)]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    outputs: dict[str, Any] = {}
    for step in range(1000):
        if not engine.has_unfinished_requests():
            break
        if step == 6:
            engine.abort_request(["3"])
        outputs.update({o.request_id: o for o in engine.step() if o.finished})
    worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
    (preempted,) = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    return {
        "vllm": __version__,
        "runner": type(worker.model_runner).__module__,
        "tokens": {name: list(o.outputs[0].token_ids) for name, o in sorted(outputs.items())},
        "told": {name: o.kv_transfer_params["fastgen"] for name, o in sorted(outputs.items())},
        "preempted": preempted,
    }


if __name__ == "__main__":
    use_runner(sys.argv[2])
    print(json.dumps(generate(sys.argv[1])))
