#include <immintrin.h>

#include <atomic>

#include "kernels.h"

// From here on, so that nothing of the standard library is compiled for these instructions.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define FASTGEN_ISA avx512
#define FASTGEN_WIDTH 16
#include "isa.inc"

namespace fastgen {
extern const Kernels avx512_kernels = avx512::kernels;
}
