"""The CPU's worker, on its own: importing vLLM's makes streams, events, pinned memory and memory
figures of GPUs do nothing in the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from fastgen_vllm.kernels import cpu
from fastgen_vllm.vllm_plugin.worker import FastGenWorkerMixin


class FastGenCPUWorker(FastGenWorkerMixin, CPUWorker):
    """vLLM's CPU worker with FastGen."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        cpu.keep_freed_memory()  # what loading the model left is given back before

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.use_v2_model_runner:
            return super().sample_tokens(grammar_output)
        with _unfinished_prompts_draw_nothing(self.model_runner):
            return super().sample_tokens(grammar_output)


@contextmanager
def _unfinished_prompts_draw_nothing(runner: Any) -> Iterator[None]:
    """Set aside the generators of seeded requests whose token of this step is discarded, since
    more of the prompt is to come: vLLM rewinds them, which generators of the CPU cannot do.
    """
    batch, aside = runner.input_batch, {}
    for i in runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist():
        if i in batch.generators:
            aside[i] = batch.generators.pop(i)
    try:
        yield
    finally:
        batch.generators.update(aside)
