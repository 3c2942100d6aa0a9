// torch.ops.fastgen: checks shapes, picks the instruction set, calls the kernels.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <vector>

#include "kernels.h"

namespace fastgen {
namespace {

using at::Tensor;

// By oneDNN, which multiplies with AMX where the machine has it.
void multiply(int64_t m, int64_t n, int64_t k, int64_t a_stride, int64_t b_stride, bool add,
              const void* a, const void* b, float* c) {
  using at::BFloat16;
  at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, b_stride, add, static_cast<const BFloat16*>(a),
                              static_cast<const BFloat16*>(b), c);
}

// AMX's tiles are a thread's: whoever multiplies next lays them out in another way.
struct Multiplying {
  ~Multiplying() { at::native::cpublas::brgemm_release(); }
};

// Whether this torch and this machine can: a oneDNN of other instructions says no by an exception.
bool multiplies() {
  Multiplying multiplying;
  try {
    std::vector<at::BFloat16> ones(16 * 16, 1.0f);
    std::vector<float> product(16 * 16);
    multiply(16, 16, 16, 16, 16, false, ones.data(), ones.data(), product.data());
    return product.back() == 16.0f;
  } catch (const std::exception&) {
    return false;
  }
}

const Kernels* kernels_named(c10::string_view isa) {
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx512_bf16") {
    bool pairs = avx512 && __builtin_cpu_supports("avx512bf16") && multiplies();
    return pairs ? &avx512_bf16_kernels : nullptr;
  }
  if (isa == "avx512") return avx512 ? &avx512_kernels : nullptr;
  if (isa == "avx2") return avx2 ? &avx2_kernels : nullptr;
  return nullptr;
}

const Kernels* chosen = nullptr;

const Kernels& kernels() {
  TORCH_CHECK(chosen, "fastgen: set_isa was not called");
  return *chosen;
}

bool set_isa(c10::string_view isa) {
  const Kernels* found = kernels_named(isa);
  if (found) chosen = found;
  return found != nullptr;
}

// Tasks are handed out one at a time, since they differ in length.
void parallel(int64_t n, void (*body)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  int64_t threads = std::min<int64_t>(n, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Multiplying multiplying;
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(context, i);
  });
}

DType dtype_of(const Tensor& t) {
  if (t.scalar_type() == at::kFloat) return DType::f32;
  if (t.scalar_type() == at::kHalf) return DType::f16;
  TORCH_CHECK(t.scalar_type() == at::kBFloat16, "fastgen: dtype ", t.scalar_type(),
              " is not float32, float16 or bfloat16");
  return DType::bf16;
}

template <class T>
T* contiguous(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_contiguous(), "fastgen: ", name, " must be contiguous");
  return t.data_ptr<T>();
}

// [tokens, H, G, D] whose tokens are each contiguous, of the pages' dtype.
void check_tokens(const Tensor& t, const Tensor& pages, const char* name) {
  TORCH_CHECK(t.dim() == 4 && t.scalar_type() == pages.scalar_type() && t[0].is_contiguous(),
              "fastgen: ", name, " must be [tokens, H, G, D] of the pages' dtype, contiguous per token");
}

void check_pages(const Tensor& pages, const Tensor& query) {
  int64_t D = query.size(3);
  TORCH_CHECK(pages.dim() == 3 && pages.is_contiguous() && pages.size(2) == 2 * D,
              "fastgen: pages must be contiguous [*, block_size, 2 * ", D, "]");
  TORCH_CHECK(D % 16 == 0 && D <= 256, "fastgen: head size ", D, " is not a multiple of 16 up to 256");
}

void check_lse(const Tensor& lse, const Tensor& query) {
  TORCH_CHECK(lse.size(0) == query.size(0) && lse.stride(1) == query.size(2) && lse.stride(2) == 1,
              "fastgen: lse must be [queries, H, G], contiguous per query");
}

Prefill prefill_arguments(const Tensor& query, const Tensor& pages, const Tensor& page_table,
                          int64_t num_keys, double scale) {
  check_tokens(query, pages, "query");
  check_pages(pages, query);
  TORCH_CHECK(page_table.size(0) == query.size(1) &&
                  page_table.size(1) * pages.size(1) >= num_keys && query.size(0) <= num_keys,
              "fastgen: the page table does not cover the keys");
  Prefill a;
  a.dtype = dtype_of(pages);
  a.num_queries = query.size(0);
  a.num_heads = query.size(1);
  a.group = query.size(2);
  a.head_size = query.size(3);
  a.num_keys = num_keys;
  a.block_size = pages.size(1);
  a.query = query.data_ptr();
  a.query_stride = query.stride(0);
  a.pages = pages.data_ptr();
  a.page_table = contiguous<int64_t>(page_table, "page_table");
  a.table_stride = page_table.size(1);
  a.scale = static_cast<float>(scale);
  a.parallel = parallel;
  a.multiply = multiply;
  return a;
}

Tensor prefill_attention(const Tensor& query, const Tensor& pages, const Tensor& page_table,
                         int64_t num_keys, double scale, const Tensor& output) {
  PrefillAttention a{prefill_arguments(query, pages, page_table, num_keys, scale)};
  check_tokens(output, pages, "output");
  Tensor lse = at::empty({query.size(0), query.size(1), query.size(2)}, at::kFloat);
  a.output = output.data_ptr();
  a.output_stride = output.stride(0);
  a.lse = lse.data_ptr<float>();
  kernels().prefill_attention(a);
  return lse;
}

// What both profiling passes begin with.
Profiled profiled_arguments(const Tensor& query, const Tensor& pages, const Tensor& page_table,
                            int64_t num_keys, const Tensor& lse, int64_t first_position,
                            int64_t position_step, double scale) {
  Profiled a{prefill_arguments(query, pages, page_table, num_keys, scale)};
  check_lse(lse, query);
  a.first_position = first_position;
  a.position_step = position_step;
  a.lse = lse.data_ptr<float>();
  a.lse_stride = lse.stride(0);
  return a;
}

void attention_mass(const Tensor& query, const Tensor& pages, const Tensor& page_table,
                    int64_t num_keys, const Tensor& lse, int64_t first_position,
                    int64_t position_step, const Tensor& bounds, double scale, const Tensor& mass) {
  AttentionMass a{profiled_arguments(query, pages, page_table, num_keys, lse, first_position,
                                     position_step, scale)};
  int64_t buckets = bounds.size(0) + 1;
  TORCH_CHECK(mass.dim() == 4 && mass.size(0) == query.size(1) && mass.size(2) >= num_keys &&
                  mass.size(3) == buckets && mass.stride(3) == 1 && mass.stride(2) == buckets &&
                  (mass.size(1) == 1 || mass.size(1) == query.size(2)),
              "fastgen: mass must be [H, 1 or G, keys, bounds + 1]");
  a.bounds = contiguous<int64_t>(bounds, "bounds");
  a.num_bounds = bounds.size(0);
  a.mass = mass.data_ptr<float>();
  a.mass_groups = mass.size(1);
  a.mass_head_stride = mass.stride(0);
  a.mass_group_stride = mass.stride(1);
  kernels().attention_mass(a);
}

void attention_peaks(const Tensor& query, const Tensor& pages, const Tensor& page_table,
                     int64_t num_keys, const Tensor& lse, int64_t first_position,
                     int64_t position_step, double scale, const Tensor& peaks,
                     const Tensor& sums) {
  AttentionPeaks a{profiled_arguments(query, pages, page_table, num_keys, lse, first_position,
                                      position_step, scale)};
  for (const Tensor& t : {peaks, sums})
    TORCH_CHECK(t.dim() == 2 && t.size(0) == query.size(1) && t.size(1) >= num_keys &&
                    t.stride(1) == 1 && t.stride(0) == peaks.stride(0),
                "fastgen: peaks and sums must be [H, keys]");
  a.peaks = peaks.data_ptr<float>();
  a.sums = sums.data_ptr<float>();
  a.key_stride = peaks.stride(0);
  kernels().attention_peaks(a);
}

Tensor value_norms(const Tensor& pages, const Tensor& page_table, int64_t num_keys) {
  TORCH_CHECK(pages.dim() == 3 && pages.is_contiguous() && pages.size(2) % 32 == 0 &&
                  page_table.size(1) * pages.size(1) >= num_keys,
              "fastgen: pages must be contiguous and the page table cover the keys");
  Tensor norms = at::empty({page_table.size(0), num_keys}, at::kFloat);
  ValueNorms a;
  a.dtype = dtype_of(pages);
  a.num_heads = page_table.size(0);
  a.head_size = pages.size(2) / 2;
  a.num_keys = num_keys;
  a.block_size = pages.size(1);
  a.table_stride = page_table.size(1);
  a.pages = pages.data_ptr();
  a.page_table = contiguous<int64_t>(page_table, "page_table");
  a.norms = norms.data_ptr<float>();
  a.parallel = parallel;
  kernels().value_norms(a);
  return norms;
}

void decode_attention(const Tensor& query, const Tensor& pages, const Tensor& positions,
                      const Tensor& rows, const Tensor& page_table, const Tensor& table_start,
                      const Tensor& lengths, const Tensor& keeps_scores, const Tensor& decay,
                      const Tensor& far, const Tensor& scores, double scale,
                      const Tensor& output) {
  check_tokens(query, pages, "query");
  check_tokens(output, pages, "output");
  check_pages(pages, query);
  for (const Tensor& t : {table_start, lengths, keeps_scores, decay})
    TORCH_CHECK(t.stride(1) == 1 && t.stride(0) == lengths.stride(0) && t.size(1) == query.size(1),
                "fastgen: table_start, lengths, keeps_scores and decay [R, H]");
  TORCH_CHECK(rows.size(0) == query.size(0) && far.size(0) == query.size(0),
              "fastgen: rows and far [N]");
  DecodeAttention a;
  a.dtype = dtype_of(pages);
  a.num_requests = query.size(0);
  a.num_heads = query.size(1);
  a.group = query.size(2);
  a.head_size = query.size(3);
  a.block_size = pages.size(1);
  a.query = query.data_ptr();
  a.query_stride = query.stride(0);
  a.pages = pages.data_ptr();
  a.positions = contiguous<int32_t>(positions, "positions");
  a.rows = contiguous<int64_t>(rows, "rows");
  a.page_table = contiguous<int32_t>(page_table, "page_table");
  a.table_start = table_start.data_ptr<int64_t>();
  a.lengths = lengths.data_ptr<int32_t>();
  a.row_stride = lengths.stride(0);
  a.keeps_scores = keeps_scores.data_ptr<bool>();
  a.decay = decay.data_ptr<float>();
  a.far = contiguous<int64_t>(far, "far");
  a.scores = contiguous<float>(scores, "scores");
  a.output = output.data_ptr();
  a.output_stride = output.stride(0);
  a.scale = static_cast<float>(scale);
  a.parallel = parallel;
  kernels().decode_attention(a);
}

// int32 [1]: the last request that is short of pages, or -1. Rules: kernels/contract.py, HeadRules.
Tensor plan_decode(const Tensor& rows, const Tensor& num_tokens, const Tensor& token_classes,
                   const Tensor& slots, const Tensor& page_table, const Tensor& table_start,
                   const Tensor& lengths, const Tensor& num_sticky, const Tensor& sticky_kinds,
                   const Tensor& frequent, const Tensor& local, const Tensor& least_window,
                   const Tensor& averages, const Tensor& free_pages, const Tensor& num_free,
                   const Tensor& positions, const Tensor& scores) {
  PlanDecode a;
  a.num_requests = rows.size(0);
  a.num_layers = lengths.size(1);
  a.num_heads = lengths.size(2);
  a.block_size = positions.size(1);
  a.rows = contiguous<int64_t>(rows, "rows");
  a.num_tokens = contiguous<int64_t>(num_tokens, "num_tokens");
  a.token_classes = contiguous<uint8_t>(token_classes, "token_classes");
  a.slots = contiguous<int64_t>(slots, "slots");
  a.page_table = contiguous<int32_t>(page_table, "page_table");
  a.table_start = contiguous<int64_t>(table_start, "table_start");
  a.lengths = contiguous<int32_t>(lengths, "lengths");
  a.num_sticky = contiguous<int32_t>(num_sticky, "num_sticky");
  a.sticky_kinds = contiguous<uint8_t>(sticky_kinds, "sticky_kinds");
  a.frequent = contiguous<int32_t>(frequent, "frequent");
  a.local = contiguous<int32_t>(local, "local");
  a.least_window = contiguous<int32_t>(least_window, "least_window");
  a.averages = contiguous<bool>(averages, "averages");
  a.free_pages = contiguous<int32_t>(free_pages, "free_pages");
  a.free_width = free_pages.size(1);
  a.num_free = contiguous<int32_t>(num_free, "num_free");
  a.positions = contiguous<int32_t>(positions, "positions");
  a.scores = contiguous<float>(scores, "scores");
  a.parallel = parallel;
  return at::full({1}, kernels().plan_decode(a), at::kInt);
}

// key, value: [tokens, H, D]; slots: [tokens, H], indices into pages [*, block_size, 2 * D].
void write_kv(const Tensor& key, const Tensor& value, const Tensor& pages, const Tensor& slots) {
  TORCH_CHECK(pages.is_contiguous() && slots.size(0) == key.size(0) &&
                  (slots.stride(1) == 1 || slots.size(1) == 1) &&
                  slots.size(1) == key.size(1) && pages.size(2) == 2 * key.size(2) &&
                  value.sizes() == key.sizes(),
              "fastgen: key and value [tokens, H, D], slots [tokens, H], pages [*, bs, 2 * D]");
  for (const Tensor& t : {key, value})
    TORCH_CHECK(t.scalar_type() == pages.scalar_type() && t.stride(2) == 1,
                "fastgen: key and value must be of the pages' dtype, contiguous per head");
  int64_t size = pages.element_size(), bytes = key.size(2) * size, heads = key.size(1);
  const char *keys = static_cast<const char*>(key.data_ptr());
  const char *values = static_cast<const char*>(value.data_ptr());
  char* to = static_cast<char*>(pages.data_ptr());
  const int64_t* slot = slots.data_ptr<int64_t>();
  at::parallel_for(0, key.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        char* at = to + slot[i * slots.stride(0) + h] * 2 * bytes;
        std::memcpy(at, keys + (i * key.stride(0) + h * key.stride(1)) * size, bytes);
        std::memcpy(at + bytes, values + (i * value.stride(0) + h * value.stride(1)) * size, bytes);
      }
  });
}

// source, target: int64 [L, H, P], [L, H, Q]; kept: bool [L, H, S].
void pack_slots_op(const Tensor& kv, const Tensor& positions, const Tensor& scores,
                   const Tensor& source, const Tensor& kept, const Tensor& target) {
  PackSlots a;
  a.num_heads = kept.size(0) * kept.size(1);
  a.num_slots = kept.size(2);
  a.block_size = kv.size(1);
  a.slot_bytes = kv.size(2) * kv.element_size();
  a.source_width = source.size(2);
  a.target_width = target.size(2);
  TORCH_CHECK(kv.is_contiguous() && a.source_width * a.block_size >= a.num_slots,
              "fastgen: the source pages do not cover the slots");
  a.kv = static_cast<char*>(kv.data_ptr());
  a.positions = contiguous<int32_t>(positions, "positions");
  a.scores = contiguous<float>(scores, "scores");
  a.source = contiguous<int64_t>(source, "source");
  a.target = contiguous<int64_t>(target, "target");
  a.kept = contiguous<bool>(kept, "kept");
  a.parallel = parallel;
  pack_slots(a);
}

}  // namespace

TORCH_LIBRARY(fastgen, m) {
  m.def("set_isa(str isa) -> bool", [](c10::string_view isa) { return set_isa(isa); });
  m.def("write_kv(Tensor key, Tensor value, Tensor(a!) pages, Tensor slots) -> ()", write_kv);
  m.def(
      "prefill_attention(Tensor query, Tensor pages, Tensor page_table, int num_keys, float scale, "
      "Tensor(a!) output) -> Tensor",
      prefill_attention);
  m.def(
      "attention_mass(Tensor query, Tensor pages, Tensor page_table, int num_keys, Tensor lse, "
      "int first_position, int position_step, Tensor bounds, float scale, Tensor(a!) mass) -> ()",
      attention_mass);
  m.def(
      "attention_peaks(Tensor query, Tensor pages, Tensor page_table, int num_keys, Tensor lse, "
      "int first_position, int position_step, float scale, Tensor(a!) peaks, Tensor(b!) sums) -> ()",
      attention_peaks);
  m.def("value_norms(Tensor pages, Tensor page_table, int num_keys) -> Tensor", value_norms);
  m.def(
      "decode_attention(Tensor query, Tensor pages, Tensor positions, Tensor rows, "
      "Tensor page_table, Tensor table_start, Tensor lengths, Tensor keeps_scores, Tensor decay, "
      "Tensor far, Tensor(a!) scores, float scale, Tensor(b!) output) -> ()",
      decode_attention);
  m.def(
      "plan_decode(Tensor rows, Tensor num_tokens, Tensor token_classes, Tensor(a!) slots, "
      "Tensor(b!) page_table, Tensor table_start, Tensor(c!) lengths, Tensor(d!) num_sticky, "
      "Tensor sticky_kinds, Tensor frequent, Tensor local, Tensor least_window, Tensor averages, "
      "Tensor free_pages, Tensor(e!) num_free, Tensor(f!) positions, Tensor(g!) scores) -> Tensor",
      plan_decode);
  m.def(
      "pack_slots(Tensor(a!) kv, Tensor(b!) positions, Tensor(c!) scores, Tensor source, "
      "Tensor kept, Tensor target) -> ()",
      pack_slots_op);
}

}  // namespace fastgen
