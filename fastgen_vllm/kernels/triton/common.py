"""What several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def product(a, b, INTERPRETED: tl.constexpr):
    """Matrix product with float32 sums, on tensor cores where the inputs have 16 bits."""
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
