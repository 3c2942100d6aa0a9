"""Greedy tokens of stock vLLM, with this package installed and its backend not chosen."""

import json
import sys
from pathlib import Path


def main() -> None:
    model, source, target, max_tokens = sys.argv[1:]
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        max_model_len=4096,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=int(max_tokens), ignore_eos=True)
    outputs = llm.generate(json.loads(Path(source).read_text()), params)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    backend = worker.model_runner.attn_groups[0][0].backend.get_name()
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    Path(target).write_text(json.dumps({"backend": backend, "tokens": tokens}))


if __name__ == "__main__":
    main()
