"""Names that several files of the plugin share."""

from __future__ import annotations

BACKEND_NAME = "FASTGEN"
BACKEND_PATH = "fastgen_vllm.vllm_plugin.backend.FastGenBackend"
SCHEDULER = "fastgen_vllm.vllm_plugin.scheduler.FastGenScheduler"
ASYNC_SCHEDULER = "fastgen_vllm.vllm_plugin.scheduler.FastGenAsyncScheduler"
WORKERS = {
    "cpu": "fastgen_vllm.vllm_plugin.cpu_worker.FastGenCPUWorker",
    "cuda": "fastgen_vllm.vllm_plugin.worker.FastGenGPUWorker",
}

LOGGER = "vllm.fastgen"
"""vLLM configures the loggers below its own name only."""
