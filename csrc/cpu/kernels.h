// The operations of fastgen_vllm/kernels/reference.py on raw pointers, one table of them per
// instruction set. Shapes are those of the reference; strides count elements.
#pragma once

#include <cstdint>

namespace fastgen {

enum class DType { f32, f16, bf16 };

// Runs body(context, i) for every i in [0, n), spread over threads.
using ParallelFor = void (*)(int64_t n, void (*body)(void*, int64_t), void* context);

// c[m, n] = a[m, k] b[k, n] (+ c) of bf16 in float32. b is in pairs, [k / 2][b_stride][2], of which n
// are multiplied; rows of c are b_stride apart too, and those of a a_stride. Code is generated for each
// combination of the numbers, so they have to be few.
using Multiply = void (*)(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride,
                          bool add, const void* a, const void* b, float* c);

struct Prefill {
  DType dtype;
  int64_t num_queries, num_heads, group, head_size;
  int64_t num_keys, block_size, table_stride;
  const void* query;  // [num_queries, num_heads * group, head_size]
  int64_t query_stride;
  const void* pages;           // [*, block_size, 2 * head_size]
  const int64_t* page_table;   // [num_heads, table_stride]
  float scale;
  ParallelFor parallel;
  Multiply multiply;
};

struct PrefillAttention : Prefill {
  void* output;  // [num_queries, num_heads * group, head_size]
  int64_t output_stride;
  float* lse;  // [num_queries, num_heads * group]
};

struct Profiled : Prefill {
  // Query i has position first_position + i * position_step.
  int64_t first_position, position_step;
  const float* lse;  // [num_queries, num_heads * group]
  int64_t lse_stride;
};

struct AttentionMass : Profiled {
  const int64_t* bounds;  // ascending
  int64_t num_bounds;
  float* mass;  // [num_heads, mass_groups, *, num_bounds + 1]
  int64_t mass_groups, mass_head_stride, mass_group_stride;
};

struct AttentionPeaks : Profiled {
  float* peaks;  // [num_heads, *]
  float* sums;
  int64_t key_stride;
};

struct ValueNorms {
  DType dtype;
  int64_t num_heads, head_size, num_keys, block_size, table_stride;
  const void* pages;          // [*, block_size, 2 * head_size]
  const int64_t* page_table;  // [num_heads, table_stride]
  float* norms;               // [num_heads, num_keys]
  ParallelFor parallel;
};

struct DecodeAttention {
  DType dtype;
  int64_t num_requests, num_heads, group, head_size, block_size;
  const void* query;  // [num_requests, num_heads * group, head_size]
  int64_t query_stride;
  const void* pages;
  const int32_t* positions;   // [num_pages, block_size]
  const int64_t* rows;        // [num_requests]
  const int32_t* page_table;  // [A]
  const int64_t* table_start;  // [R, num_heads]
  const int32_t* lengths;      // [R, num_heads]
  const bool* keeps_scores;    // [R, num_heads]
  const float* decay;          // [R, num_heads], 0 where scores are sums
  int64_t row_stride;          // of these four
  const int64_t* far;          // [num_requests], peaks count before this position
  float* scores;               // [num_pages, block_size]
  void* output;                // as query
  int64_t output_stride;
  float scale;
  ParallelFor parallel;
};

struct PlanDecode {
  int64_t num_requests, num_layers, num_heads, block_size;
  const int64_t* rows;
  int32_t* page_table;         // [A]
  const int64_t* table_start;  // [R, L, H], contiguous, as the rest
  int32_t *lengths, *num_sticky;
  // The rules of each head: kernels/contract.py, HeadRules.
  const uint8_t* sticky_kinds;
  const int32_t *frequent, *local, *least_window;
  const bool* averages;
  int32_t* free_pages;  // [R, free_width]
  int64_t free_width;
  int32_t* num_free;
  int32_t* positions;
  float* scores;
  const int64_t* num_tokens;     // [num_requests]
  const uint8_t* token_classes;  // [num_requests]
  int64_t* slots;                // [num_requests, L, H]
  ParallelFor parallel;
};

struct PackSlots {
  int64_t num_heads;  // over all layers
  int64_t num_slots, block_size, slot_bytes;
  char* kv;
  int32_t* positions;
  float* scores;
  const int64_t *source, *target;  // [num_heads, source_width], [num_heads, target_width]
  int64_t source_width, target_width;
  const bool* kept;  // [num_heads, num_slots]
  ParallelFor parallel;
};

// A buffer of the calling thread that only grows: at least n floats, aligned for any vector.
enum class Scratch { packed_keys, packed_queries, task, parts, raw_scores, count };
float* scratch(Scratch use, int64_t n);

struct Kernels {
  void (*prefill_attention)(const PrefillAttention&);
  void (*attention_mass)(const AttentionMass&);
  void (*attention_peaks)(const AttentionPeaks&);
  void (*value_norms)(const ValueNorms&);
  void (*decode_attention)(const DecodeAttention&);
  // Returns the last request that is short of pages, or -1.
  int64_t (*plan_decode)(const PlanDecode&);
};

extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels;

void pack_slots(const PackSlots&);

}  // namespace fastgen
