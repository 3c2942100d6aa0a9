"""A program: vLLM's CUDA platform, worker and V1 runner with FastGen, on the pretend device.

What is vLLM's runs as on a GPU but for three things: the model's own operations are PyTorch's, its
weights are loaded on the CPU and then moved, and streams and events do nothing. Prints a JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}

import pretend_device
import torch
from pretend_device import OnDevice

for name in ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa3_C"):
    sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
import vllm.platforms

# This vLLM is the CPU's build, which would switch Triton off.
vllm.platforms.vllm_version_matches_substr = lambda substring: False
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability

from fastgen_vllm.kernels import prefill

MEMORY = 4 << 30
DEVICE = torch.device("cuda", 0)


class PretendPlatform(NonNvmlCudaPlatform):
    dist_backend = "gloo"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "pretend"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return MEMORY

    @classmethod
    def device_count(cls) -> int:
        return 1

    @classmethod
    def is_integrated_gpu(cls, device_id: int = 0) -> bool:
        return False

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 4

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        pass

    @classmethod
    def get_current_memory_usage(cls, device: Any = None) -> float:
        return 0.0

    @classmethod
    def opaque_attention_op(cls) -> bool:
        return False


class Nothing:
    """A stream or an event: whatever is asked of it has happened."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    synchronize = wait_stream = wait = record


def pretend_driver(mode: pretend_device.PretendDevice) -> None:
    nothing = Nothing()
    for owner in (torch.cuda, torch):
        owner.Event = Nothing
    torch.cuda.Stream = Nothing
    torch.cuda.current_stream = lambda *args: nothing
    torch.cuda.set_stream = lambda stream: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.memory.get_allocator_backend = lambda: "pretend"
    torch.cuda.get_device_properties = lambda *args: SimpleNamespace(multi_processor_count=4)
    accelerator = torch.accelerator
    for name in ("synchronize", "empty_cache", "set_device_index", "reset_peak_memory_stats"):
        setattr(accelerator, name, lambda *args: None)
    accelerator.device_count = lambda: 1
    accelerator.current_device_index = lambda: 0
    accelerator.memory_stats = lambda *args: {
        "allocated_bytes.all.peak": mode.peak,
        "allocated_bytes.all.current": mode.in_use,
    }
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
        setattr(accelerator, name, lambda *args: mode.in_use)
    accelerator.get_memory_info = lambda *args: (MEMORY - mode.in_use, MEMORY)


def no_compiled_operations() -> None:
    from vllm import _custom_ops

    for name in dir(_custom_ops):
        if name.startswith("cutlass") and "supports" in name:
            setattr(_custom_ops, name, lambda *args: False)


def flash_attention_3(*args: Any) -> tuple[Any, ...]:
    """Causal attention of one sequence, whose mask ends at the last key; as vLLM calls it."""
    query, key, value, cu_query, cu_key, most_queries, most_keys = (
        args[i] for i in (0, 1, 2, 7, 8, 12, 13)
    )
    scale, causal = args[23:25]
    assert causal and cu_query.tolist() == [0, most_queries] and cu_key.tolist() == [0, most_keys]
    groups = query.shape[1] // key.shape[1]
    output, lse = prefill.sdpa(query.unflatten(1, (-1, groups)), key, value, scale)
    return output.flatten(1, 2), lse.flatten(1).T.contiguous(), None, None


def load_on_cpu_then_move() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    load = GPUModelRunner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        self.load_config.device = "cpu"
        load(self, *args, **kwargs)
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = tensor.detach().to(DEVICE)

    GPUModelRunner.load_model = load_model


def main(model: str) -> None:
    pretend_device.DEVICE = DEVICE
    vllm.platforms._current_platform = PretendPlatform()
    with pretend_device.pretend_device() as mode:
        pretend_driver(mode)
        no_compiled_operations()
        torch.ops._vllm_fa3_C = SimpleNamespace(fwd=flash_attention_3)
        load_on_cpu_then_move()
        from vllm import LLM, SamplingParams

        llm = LLM(
            model,
            attention_backend="fastgen",
            dtype="float32",
            max_model_len=512,
            max_num_batched_tokens=256,
            max_num_seqs=4,
            compilation_config={"mode": 0, "custom_ops": ["none"]},
            additional_config={"fastgen": {"min_prompt_tokens": 32, "debug": True}},
        )
        prompts = [{"prompt_token_ids": list(range(20, 20 + n))} for n in (90, 33, 300)]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        figures = {
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
            "kept": [o.kv_transfer_params["fastgen"]["kv_kept_ratio"] for o in outputs],
            "worker": [c.__name__ for c in type(worker).__mro__],
            "kernels": worker.runtime.kernels.NAME,
            "on_device": isinstance(worker.runtime.pool.kv, OnDevice),
            "report_lag": worker.runtime.report_lag,
            "peak": mode.peak,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
