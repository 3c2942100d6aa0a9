// Decode attention over head block tables, first pass: each thread block attends at most
// `split_slots` slots of one head and leaves an output and a log-sum-exp (base 2) for the merge.
//
// A slot's K and V lie side by side, 4 D bytes. D / 8 lanes share a slot, 16 bytes of K and of V
// each, so a warp reads whole slots in coalesced rows, and the G query heads of a group use them
// from registers. UNROLL slots of K and V are in flight per lane before the first is used. Slots
// whose position is -1 are neither read nor counted.
//
// Plain pointers and a stream: nothing of PyTorch is compiled in, so any build serves any PyTorch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kWarps = 4;
constexpr int kUnroll = 4;

struct Arguments {
    const void* query;
    const void* pages;
    const int32_t* positions;
    const int64_t* rows;
    const int32_t* page_table;
    const int64_t* table_start;
    const int32_t* lengths;
    const bool* keeps_scores;
    float* logits;
    float* partial;
    float* partial_lse;
    float scale_log2;
    int heads, split_slots, num_splits, max_slots, block_size;
    int64_t query_n, query_h, query_g;        // strides, in elements
    int64_t start_r, start_h, length_r, length_h, keeps_r, keeps_h;
};

__device__ inline float2 widen(__half2 x) { return __half22float2(x); }
__device__ inline float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
template <typename T> struct Pair;
template <> struct Pair<__half> { using type = __half2; };
template <> struct Pair<__nv_bfloat16> { using type = __nv_bfloat162; };

// The eight values of 16 bytes.
template <typename T> __device__ inline void unpack(const uint4& packed, float (&x)[8]) {
    const auto* pairs = reinterpret_cast<const typename Pair<T>::type*>(&packed);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 both = widen(pairs[i]);
        x[2 * i] = both.x;
        x[2 * i + 1] = both.y;
    }
}

template <typename T, int D, int G>
__global__ void __launch_bounds__(32 * kWarps) attend(const Arguments a) {
    constexpr int kLanes = D / 8;             // lanes that share a slot
    constexpr int kTeams = 32 * kWarps / kLanes;  // slots that the block looks at together
    const int64_t index = blockIdx.x;
    const int64_t n = index / a.heads, head = index % a.heads;
    const int64_t row = a.rows[n];
    const int length = a.lengths[row * a.length_r + head * a.length_h];
    const int first = blockIdx.y * a.split_slots;
    if (first >= length) return;
    const int last = min(first + a.split_slots, length);
    const bool keeps = a.keeps_scores[row * a.keeps_r + head * a.keeps_h];
    const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int32_t* table = a.page_table + a.table_start[row * a.start_r + head * a.start_h];

    float q[G][8];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        const T* source = static_cast<const T*>(a.query) + n * a.query_n + head * a.query_h +
                          g * a.query_g + 8 * lane;
        unpack<T>(*reinterpret_cast<const uint4*>(source), q[g]);
#pragma unroll
        for (float& x : q[g]) x *= a.scale_log2;
    }
    float highest[G], total[G], acc[G][8];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        highest[g] = -INFINITY;
        total[g] = 0.0f;
#pragma unroll
        for (float& x : acc[g]) x = 0.0f;
    }

    for (int start = first; start < last; start += kTeams * kUnroll) {
        uint4 k[kUnroll], v[kUnroll];
        bool live[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int slot = start + u * kTeams + team;
            live[u] = false;
            k[u] = v[u] = make_uint4(0, 0, 0, 0);
            if (slot < last) {
                const int64_t at = int64_t(table[slot / a.block_size]) * a.block_size +
                                   slot % a.block_size;
                live[u] = a.positions[at] >= 0;
                if (live[u]) {
                    const uint4* content =
                        reinterpret_cast<const uint4*>(static_cast<const T*>(a.pages) + at * 2 * D);
                    k[u] = content[lane];
                    v[u] = content[kLanes + lane];
                }
            }
        }
        float score[kUnroll][G];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float key[8];
            unpack<T>(k[u], key);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; ++i) sum = fmaf(q[g][i], key[i], sum);
#pragma unroll
                for (int step = kLanes / 2; step > 0; step /= 2)
                    sum += __shfl_xor_sync(0xffffffffu, sum, step);
                score[u][g] = live[u] ? sum : -INFINITY;
            }
        }
        if (keeps) {
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int slot = start + u * kTeams + team;
#pragma unroll
                for (int g = 0; g < G; ++g)
                    if (lane == g && slot < last)
                        a.logits[(index * a.max_slots + slot) * G + g] = score[u][g];
            }
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
            float top = highest[g];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) top = fmaxf(top, score[u][g]);
            // Nothing live so far: any finite reference keeps -inf - -inf out.
            const float against = top == -INFINITY ? 0.0f : top;
            const float fade = exp2f(highest[g] - against);
            highest[g] = top;
            total[g] *= fade;
#pragma unroll
            for (float& x : acc[g]) x *= fade;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                score[u][g] = exp2f(score[u][g] - against);
                total[g] += score[u][g];
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float value[8];
            unpack<T>(v[u], value);
#pragma unroll
            for (int g = 0; g < G; ++g)
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[g][i] = fmaf(score[u][g], value[i], acc[g][i]);
        }
    }

    // Merge the teams, one query head of the group at a time to bound the shared memory.
    __shared__ float shared_acc[kTeams][D];
    __shared__ float shared_highest[kTeams], shared_total[kTeams];
    const int64_t into = (index * a.num_splits + blockIdx.y) * G;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        __syncthreads();
        if (lane == 0) {
            shared_highest[team] = highest[g];
            shared_total[team] = total[g];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) shared_acc[team][8 * lane + i] = acc[g][i];
        __syncthreads();
        float top = -INFINITY;
        for (int t = 0; t < kTeams; ++t) top = fmaxf(top, shared_highest[t]);
        const float against = top == -INFINITY ? 0.0f : top;
        float sum = 0.0f;
        for (int t = 0; t < kTeams; ++t) sum += shared_total[t] * exp2f(shared_highest[t] - against);
        for (int d = threadIdx.x; d < D; d += 32 * kWarps) {
            float merged = 0.0f;
            for (int t = 0; t < kTeams; ++t)
                merged = fmaf(shared_acc[t][d], exp2f(shared_highest[t] - against), merged);
            a.partial[(into + g) * D + d] = sum > 0.0f ? merged / sum : 0.0f;
        }
        if (threadIdx.x == 0) a.partial_lse[into + g] = sum > 0.0f ? top + log2f(sum) : -INFINITY;
    }
}

template <typename T, int D> cudaError_t launch(const Arguments& a, dim3 grid, int group,
                                                cudaStream_t stream) {
    const dim3 block(32 * kWarps);
    switch (group) {
#define FASTGEN_GROUP(G) \
    case G: attend<T, D, G><<<grid, block, 0, stream>>>(a); break;
        FASTGEN_GROUP(1)
        FASTGEN_GROUP(2)
        FASTGEN_GROUP(3)
        FASTGEN_GROUP(4)
        FASTGEN_GROUP(5)
        FASTGEN_GROUP(6)
        FASTGEN_GROUP(7)
        FASTGEN_GROUP(8)
#undef FASTGEN_GROUP
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

}  // namespace

// Returns a cudaError_t. `strides` holds, in elements: query n, h, g; table_start r, h; lengths r, h;
// keeps_scores r, h. Supported: head_size 64 and 128, group 1 to 8.
extern "C" int fastgen_decode_attention(
    const void* query, const void* pages, const void* positions, const void* rows,
    const void* page_table, const void* table_start, const void* lengths, const void* keeps_scores,
    void* logits, void* partial, void* partial_lse, float scale_log2, int num_requests, int heads,
    int group, int head_size, int block_size, int split_slots, int num_splits, int max_slots,
    int is_bfloat16, const int64_t* strides, void* stream) {
    Arguments a;
    a.query = query;
    a.pages = pages;
    a.positions = static_cast<const int32_t*>(positions);
    a.rows = static_cast<const int64_t*>(rows);
    a.page_table = static_cast<const int32_t*>(page_table);
    a.table_start = static_cast<const int64_t*>(table_start);
    a.lengths = static_cast<const int32_t*>(lengths);
    a.keeps_scores = static_cast<const bool*>(keeps_scores);
    a.logits = static_cast<float*>(logits);
    a.partial = static_cast<float*>(partial);
    a.partial_lse = static_cast<float*>(partial_lse);
    a.scale_log2 = scale_log2;
    a.heads = heads;
    a.split_slots = split_slots;
    a.num_splits = num_splits;
    a.max_slots = max_slots;
    a.block_size = block_size;
    a.query_n = strides[0];
    a.query_h = strides[1];
    a.query_g = strides[2];
    a.start_r = strides[3];
    a.start_h = strides[4];
    a.length_r = strides[5];
    a.length_h = strides[6];
    a.keeps_r = strides[7];
    a.keeps_h = strides[8];
    const dim3 grid(num_requests * heads, num_splits);
    const auto on = static_cast<cudaStream_t>(stream);
    if (head_size == 64)
        return is_bfloat16 ? launch<__nv_bfloat16, 64>(a, grid, group, on)
                           : launch<__half, 64>(a, grid, group, on);
    if (head_size == 128)
        return is_bfloat16 ? launch<__nv_bfloat16, 128>(a, grid, group, on)
                           : launch<__half, 128>(a, grid, group, on);
    return cudaErrorInvalidValue;
}
