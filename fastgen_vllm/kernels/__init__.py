"""One function per operation. The plain-PyTorch reference serves every device so far."""

from fastgen_vllm.kernels.reference import (
    attention_mass,
    decode_attention,
    prefill_attention,
)

__all__ = ["attention_mass", "decode_attention", "prefill_attention"]
