"""The CPU's worker, on its own: importing vLLM's makes streams, events, pinned memory and memory
figures of GPUs do nothing in the whole process."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from fastgen_vllm.vllm_plugin.worker import FastGenWorkerMixin


class FastGenCPUWorker(FastGenWorkerMixin, CPUWorker):
    """vLLM's CPU worker with FastGen."""
