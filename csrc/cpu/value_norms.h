// The norm of each key's value, whose halves of slots lie in pages.

struct NormsTask {
  const ValueNorms* a;
  int64_t num_pages;
};

template <class T>
static void norms_of_page(void* context, int64_t i) {
  const NormsTask& task = *(const NormsTask*)context;
  const ValueNorms& a = *task.a;
  int64_t head = i / task.num_pages, first = i % task.num_pages * a.block_size, D = a.head_size;
  int64_t page = a.page_table[head * a.table_stride + first / a.block_size];
  const T* slots = (const T*)a.pages + page * a.block_size * 2 * D;
  for (int64_t k = 0; k < lower(a.block_size, a.num_keys - first); ++k) {
    vf squares = {};
    for (int64_t d = 0; d < D; d += W) {
      vf x = load(slots + (2 * k + 1) * D + d);
      squares += x * x;
    }
    a.norms[head * a.num_keys + first + k] = __builtin_sqrtf(hsum(squares));
  }
}

static void value_norms(const ValueNorms& a) {
  NormsTask task{&a, (a.num_keys + a.block_size - 1) / a.block_size};
  int64_t n = a.num_heads * task.num_pages;
  if (a.dtype == DType::f32) return a.parallel(n, norms_of_page<float>, &task);
  if (a.dtype == DType::f16) return a.parallel(n, norms_of_page<f16>, &task);
  a.parallel(n, norms_of_page<bf16>, &task);
}
