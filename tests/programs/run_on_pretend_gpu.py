"""A program: a small engine with FastGen on vLLM's CUDA platform and worker, with the pretend
device for a GPU, and the model runner that is named, ``v1`` or ``v2``, with captured decode steps
where ``graphs`` follows, in bfloat16 where that does; or, given ``cpu``, on vLLM's CPU worker.
Prints a line of JSON.

What is vLLM's runs as on a GPU but for three things: the model's own operations are PyTorch's, its
weights are loaded on the CPU and then moved, and streams and events do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from helpers import pretend_device

from fastgen_vllm.kernels import PromptBatch, libraries

MEMORY, TOKENS = 1 << 30, 12
SETTINGS = {"min_prompt_tokens": 32, "debug": True}
DEVICE = torch.device("cuda", 0)


def generate(model: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, __version__

    gc.freeze()  # vLLM collects garbage time and again, and what is imported stays
    in_16_bits = "bfloat16" in sys.argv
    settings = {**SETTINGS, "cuda_graphs": "graphs" in sys.argv}
    settings["block_size"] = 16 if in_16_bits else 8
    llm = LLM(
        model,
        attention_backend="fastgen",
        dtype="bfloat16" if in_16_bits else "float32",
        max_model_len=512,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        compilation_config={"mode": 0, "custom_ops": ["none"]},
        additional_config={"fastgen": settings},
        **({"kv_cache_memory_bytes": MEMORY // 8} if sys.argv[2] == "cpu" else {}),
    )
    prompts = [{"prompt_token_ids": [i * i % 1999 for i in range(n)]} for n in (90, 33, 200)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS))
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    pool = worker.runtime.pool
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "kept": [output.kv_transfer_params["fastgen"]["kv_kept_ratio"] for output in outputs],
        "vllm": __version__,
        "worker": type(worker).__name__,
        "runner": type(worker.model_runner).__module__,
        "kernels": worker.runtime.kernels.NAME,
        "report_lag": worker.runtime.report_lag,
        "block_size": pool.block_size,
        "prefill": libraries.choose(pool.kv.dtype, pool.block_size)[0],
    }


def on_pretend_gpu(model: str) -> dict[str, Any]:
    pretend_device.DEVICE = DEVICE
    with pretend_device.pretend_device() as mode:
        pretend_driver(mode)
        pretend_cuda_build(mode)
        load_on_cpu_then_move()
        figures = generate(model)
        return {
            **figures,
            "prefill_differs": differs(libraries.choose(torch.bfloat16, 16)[1]),
            "memory": mode.peak / MEMORY,
            "replays": pretend_device.PretendGraph.replays,
            "has_cpu_worker": "vllm.v1.worker.cpu_worker" in sys.modules,
        }


class Nothing:
    """A stream or an event: whatever is asked of it has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    synchronize = wait_stream = wait = record


def no_grad(mode: Any = True) -> Any:
    """Instead of inference mode, in which wrapped tensors have no views."""
    if callable(mode):
        return torch.no_grad(mode)
    return torch.no_grad() if mode else contextlib.nullcontext()


def pretend_driver(mode: pretend_device.PretendDevice) -> None:
    torch.inference_mode = no_grad
    torch.Event = torch.cuda.Event = torch.cuda.Stream = Nothing
    torch.cuda.current_stream = Nothing
    torch.cuda.set_stream = lambda stream: None
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.CUDAGraph = pretend_device.PretendGraph
    torch.cuda.graph = mode.capture
    torch.cuda.graph_pool_handle = lambda: None
    torch.cuda.get_device_properties = lambda *args: SimpleNamespace(multi_processor_count=4)
    torch.cuda.memory.get_allocator_backend = lambda: "pretend"
    figures = {
        "synchronize": None,
        "empty_cache": None,
        "empty_host_cache": None,
        "reset_peak_memory_stats": None,
        "set_device_index": None,
        "device_count": 1,
        "current_device_index": 0,
    }
    for name, figure in figures.items():
        setattr(torch.accelerator, name, lambda *args, figure=figure: figure)
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
        setattr(torch.accelerator, name, lambda *args: mode.in_use)
    torch.accelerator.get_memory_info = lambda *args: (MEMORY - mode.in_use, MEMORY)
    torch.accelerator.memory_stats = lambda *args: {
        "allocated_bytes.all.peak": mode.peak,
        "allocated_bytes.all.current": mode.in_use,
    }


def pretend_cuda_build(mode: pretend_device.PretendDevice) -> None:
    """This vLLM is the CPU's build: it has no CUDA operations, and would switch Triton off."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Triton is not asked for its driver
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    for name in ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa3_C"):
        sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    torch.ops._vllm_fa3_C = SimpleNamespace(fwd=flash_attention_3)
    torch.ops._C.silu_and_mul = None
    torch.ops._C.weak_ref_tensor = lambda tensor: tensor
    torch.ops._C.get_cuda_view_from_cpu_tensor = mode.view_of

    from vllm import platforms

    platforms.vllm_version_matches_substr = lambda substring: False
    platforms._current_platform = pretend_platform()
    from vllm import _custom_ops
    from vllm.v1.sample.ops import topk_topp_sampler

    for name in dir(_custom_ops):
        if name.startswith("cutlass") and "supports" in name:
            setattr(_custom_ops, name, lambda *args: False)
    # The interpreter does not take vLLM's kernel.
    topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p, **_: (
        topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)
    )


def pretend_platform() -> Any:
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    answers = {
        "get_device_capability": DeviceCapability(9, 0),
        "get_device_name": "pretend",
        "get_device_total_memory": MEMORY,
        "get_current_memory_usage": 0.0,
        "device_count": 1,
        "is_integrated_gpu": False,
        "num_compute_units": 4,
        "manual_seed_all": None,
        "get_default_ir_op_priority": IrOpPriorityConfig.with_default(["native"]),
        "opaque_attention_op": False,
    }
    methods = {
        name: classmethod(lambda cls, *args, answer=answer, **kwargs: answer)
        for name, answer in answers.items()
    }
    return type("PretendPlatform", (NonNvmlCudaPlatform,), {**methods, "dist_backend": "gloo"})()


def flash_attention_3(*args: Any) -> tuple[Any, ...]:
    """Causal attention of prompts whose keys lie in blocks, as vLLM calls it."""
    query, key, value, output, starts = (args[i] for i in (0, 1, 2, 6, 7))
    used, longest_query, longest, table = (args[i] for i in (11, 12, 13, 14))
    scale, causal = args[23:25]
    assert causal is True and args[8] is None
    for numbers in (starts, used, table):
        assert numbers.dtype == torch.int32 and numbers.is_contiguous()
    ends, lse = starts.tolist(), []
    assert longest_query == max(b - a for a, b in pairwise(ends)) and longest == max(used.tolist())
    for (start, end), m, blocks in zip(pairwise(ends), used.tolist(), table, strict=True):
        own = query[start:end].unflatten(1, (key.shape[2], -1))
        k, v = (x[blocks.long()].flatten(0, 1)[:m] for x in (key, value))
        attended, own_lse = libraries.sdpa_of(own, k, v, scale)
        output[start:end] = attended.flatten(1, 2)
        lse.append(own_lse.flatten(1).T)
    return output, torch.cat(lse, 1).contiguous(), None, None


def differs(attend: libraries.Attend) -> float:
    """By how much from PyTorch's attention, for chunks of two prompts in the second layer."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator) for s in ((12, 2, 3, 64), (40, 16, 128))]
    query, kv = (x.bfloat16().to(DEVICE) for x in made)
    prompts = PromptBatch.of(
        [torch.tensor([3, 2, 1]), torch.tensor([0])], [5, 7], [40, 7], 2, 4, DEVICE
    )
    tries = (attend, libraries.sdpa)
    outputs = torch.empty_like(query), torch.empty_like(query)
    ours, theirs = (f(query, kv[2:], prompts, 0.1, o) for f, o in zip(tries, outputs, strict=True))
    both = ((ours, theirs), outputs)
    return max(float((x.float() - y.float()).abs().max()) for x, y in both)


def load_on_cpu_then_move() -> None:
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1

    def move(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                tensors[name] = tensor.detach().to(DEVICE)

    def load_then_move(load: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        self.load_config.device = "cpu"
        load(self, *args, **kwargs)
        for module in self.model.modules():
            move(module._parameters)
            move(module._buffers)

    for runner in (V1, V2):
        runner.load_model = functools.partialmethod(
            functools.partial(load_then_move, runner.load_model)
        )
    # Warming up asks for random generators of the device, and for the kernels of every model.
    V1._dummy_sampler_run = lambda self, hidden_states: None
    gpu_worker.kernel_warmup = lambda worker: None


if __name__ == "__main__":
    if sys.argv[2] == "v1":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2 is what vLLM takes
    run = generate if sys.argv[2] == "cpu" else on_pretend_gpu
    print(json.dumps(run(sys.argv[1])))
