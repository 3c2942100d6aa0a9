#include <immintrin.h>

#include <atomic>

#include "kernels.h"

// From here on, so that nothing of the standard library is compiled for these instructions.
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTGEN_ISA avx512_bf16
#define FASTGEN_WIDTH 16
#define FASTGEN_BF16
#include "isa.inc"

namespace fastgen {
extern const Kernels avx512_bf16_kernels = avx512_bf16::kernels;
}
