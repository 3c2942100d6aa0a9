#include <immintrin.h>

#include <atomic>

#include "kernels.h"

// From here on, so that nothing of the standard library is compiled for these instructions.
#pragma GCC target("avx2,fma,f16c")
#define FASTGEN_ISA avx2
#define FASTGEN_WIDTH 8
#include "isa.inc"

namespace fastgen {
extern const Kernels avx2_kernels = avx2::kernels;
}
