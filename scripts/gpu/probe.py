"""Do vLLM's compiled operations work on this machine's torch? Compared with PyTorch; exit code 0 if
so. Prints a line of JSON."""

import json

import torch
import vllm._C_stable_libtorch  # noqa: F401
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
from vllm.vllm_flash_attn import flash_attn_varlen_func

from fastgen_vllm.kernels import PromptBatch, libraries
from fastgen_vllm.vllm_plugin import flash_attention

torch.manual_seed(0)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


x, w, out = randn(300, 4096), randn(4096), randn(300, 4096)
torch.ops._C.rms_norm(out, x, w, 1e-5)
errors = {"rms_norm": distance(out, torch.nn.functional.rms_norm(x, (4096,), w, 1e-5))}
half = randn(300, 2048)
torch.ops._C.silu_and_mul(half, x)
errors["silu_and_mul"] = distance(half, torch.nn.functional.silu(x[:, :2048]) * x[:, 2048:])
for heads, kv_heads, size in ((9, 3, 64), (32, 8, 128)):
    q, k, v = randn(500, heads, size), randn(500, kv_heads, size), randn(500, kv_heads, size)
    ends = torch.tensor([0, 500], dtype=torch.int32, device="cuda")
    ours = flash_attn_varlen_func(
        q, k, v, 500, ends, 500, ends, softmax_scale=size**-0.5, causal=True, fa_version=3
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(y.float().transpose(0, 1)[None] for y in (q, k, v)), is_causal=True, enable_gqa=True
    )
    errors[f"flash attention 3, head size {size}"] = distance(ours, expected[0].transpose(0, 1))
# As FastGen calls it: prompts whose keys lie in the blocks of the second of two layers.
query, kv = randn(12, 8, 4, 128), randn(4 * 16, 16, 256)
blocks = [torch.tensor([3, 2, 1]), torch.tensor([0])]
prompts = PromptBatch.of(blocks, [5, 7], [40, 7], 8, 16, query.device)
ours, theirs = torch.empty_like(query), torch.empty_like(query)
lse = flash_attention.attend(query, kv[8:], prompts, 0.1, ours)
expected_lse = libraries.sdpa(query, kv[8:], prompts, 0.1, theirs)
errors["paged flash attention"] = distance(ours, theirs)
errors["paged flash attention, log-sum-exp"] = distance(lse, expected_lse)
pinned = torch.arange(9.0).pin_memory()
view = get_accelerator_view_from_cpu_tensor(pinned)
errors["a view of pinned memory"] = distance(view.cpu(), pinned)
# vLLM changes these while it loads a model.
settings = torch.cuda.memory._snapshot()["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"]
torch._C._accelerator_setAllocatorSettings(settings)
good = all(error < 1e-2 for error in errors.values())
print(json.dumps({"torch": torch.__version__, "good": good, "errors": errors}))
raise SystemExit(not good)
