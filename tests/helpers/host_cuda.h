// Just enough of CUDA for csrc/cuda to run on a CPU: the threads of a block are fibers that take
// turns, and every barrier or shuffle is where one hands over to the next. Shows wrong arithmetic
// and wrong addresses, not races.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using std::min;
#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static  // blocks run one after another

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaErrorInvalidValue = 1;
inline cudaError_t cudaGetLastError() { return 0; }

struct __half { _Float16 value; };
struct __half2 { __half x, y; };
inline float2 __half22float2(__half2 pair) { return {(float)pair.x.value, (float)pair.y.value}; }
struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
    float2 both;
    uint32_t low = (uint32_t)pair.x.bits << 16, high = (uint32_t)pair.y.bits << 16;
    std::memcpy(&both.x, &low, 4);
    std::memcpy(&both.y, &high, 4);
    return both;
}

inline dim3 blockIdx, threadIdx;
constexpr int kMostThreads = 1024;
struct Fibers {
    ucontext_t scheduler, threads[kMostThreads];
    bool finished[kMostThreads];
    float exchanged[2][kMostThreads];  // in turns: a slow reader still finds the last value
    int turns[kMostThreads];
    unsigned running;
};
inline Fibers fibers;

inline void hand_over() {
    unsigned self = fibers.running;
    swapcontext(&fibers.threads[self], &fibers.scheduler);
    threadIdx = dim3(self, 0, 0);
}
inline void __syncthreads() { hand_over(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    unsigned self = fibers.running;
    float* exchanged = fibers.exchanged[fibers.turns[self]++ % 2];
    exchanged[self] = value;
    hand_over();
    return exchanged[self ^ mask];
}

template <class Arguments> void emulate(void (*kernel)(Arguments), dim3 grid, dim3 block,
                                        const Arguments& arguments) {
    static void (*entry)(Arguments);
    static const Arguments* given;
    entry = kernel, given = &arguments;
    static std::vector<char> stacks;
    constexpr size_t kStack = 256 << 10;
    stacks.resize(block.x * kStack);
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, 0);
            for (unsigned t = 0; t < block.x; ++t) {
                getcontext(&fibers.threads[t]);
                fibers.threads[t].uc_stack.ss_sp = stacks.data() + t * kStack;
                fibers.threads[t].uc_stack.ss_size = kStack;
                fibers.threads[t].uc_link = &fibers.scheduler;
                fibers.finished[t] = false;
                fibers.turns[t] = 0;
                void (*body)() = [] {
                    entry(*given);
                    fibers.finished[fibers.running] = true;
                };
                makecontext(&fibers.threads[t], body, 0);
            }
            for (bool left = true; left;) {
                left = false;
                for (unsigned t = 0; t < block.x; ++t) {
                    if (fibers.finished[t]) continue;
                    fibers.running = t;
                    threadIdx = dim3(t, 0, 0);
                    swapcontext(&fibers.scheduler, &fibers.threads[t]);
                    left |= !fibers.finished[t];
                }
            }
        }
}
