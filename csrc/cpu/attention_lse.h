// The log-sum-exp of each query's scaled scores, where something else attended. A task owns a tile
// of keys of a head and leaves each row's maximum and sum over it; then one owns a head's rows.

struct LseTask {
  const PrefillAttention* a;
  PackedQueries queries;
  int64_t num_tiles;
  float* parts;  // [head][tile][row] of maximum and sum
};

template <class Lane, class T>
static void lse_tile(void* context, int64_t i) {
  const LseTask& task = *(const LseTask*)context;
  const PrefillAttention& a = *task.a;
  int64_t head = i % a.num_heads, tile = i / a.num_heads, lanes = a.head_size / Lane::kPer;
  int64_t padded_rows = task.queries.padded_rows, ahead = a.num_keys - a.num_queries - tile * kTile;
  float* keys = scratch(Scratch::task, lanes * kTile);
  pack_keys<Lane, T>(a, head, tile, keys);
  const float* rows = task.queries.rows + head * padded_rows * lanes;
  float* part = task.parts + (head * task.num_tiles + tile) * padded_rows * 2;
  for (int64_t r = 0; r < padded_rows; r += kBlock) {
    alignas(64) float scores[kBlock * kTile], unused[kTile];
    int64_t n = lower(kBlock, padded_rows - r);
    block_scores(a, rows + r * lanes, n, keys, scores, Lane());
    for (int64_t j = 0; j < n; ++j) {
      int64_t visible = higher(0, lower(kTile, ahead + (r + j) / a.group + 1));
      float maximum = -1e30f, sums[W] = {};
      softmax_row<Lane>(scores + j * kTile, visible, a.scale * kLog2e, maximum, sums, unused);
      part[(r + j) * 2] = maximum;
      part[(r + j) * 2 + 1] = hsum(load(sums));
    }
  }
}

static void lse_rows(void* context, int64_t head) {
  const LseTask& task = *(const LseTask*)context;
  const PrefillAttention& a = *task.a;
  int64_t stride = task.queries.padded_rows * 2;
  const float* parts = task.parts + head * task.num_tiles * stride;
  for (int64_t r = 0; r < a.num_queries * a.group; ++r) {
    float maximum = -1e30f, sum = 0.0f;
    for (int64_t tile = 0; tile < task.num_tiles; ++tile) {
      float best = parts[tile * stride + r * 2];
      maximum = best > maximum ? best : maximum;
    }
    for (int64_t tile = 0; tile < task.num_tiles; ++tile) {
      const float* part = parts + tile * stride + r * 2;
      sum += part[1] * exp2_nonpositive(splat(part[0] - maximum))[0];
    }
    float lse = (maximum + __builtin_log2f(sum)) * kLn2;
    a.lse[r / a.group * a.num_heads * a.group + head * a.group + r % a.group] = lse;
  }
}

template <class T>
static void attention_lse_of(const PrefillAttention& a) {
  typedef typename LaneOf<T>::type Lane;
  LseTask task{&a, pack_queries<Lane, T>(a), (a.num_keys + kTile - 1) / kTile, 0};
  int64_t num_parts = a.num_heads * task.num_tiles;
  task.parts = scratch(Scratch::parts, num_parts * task.queries.padded_rows * 2);
  a.parallel(num_parts, lse_tile<Lane, T>, &task);
  a.parallel(a.num_heads, lse_rows, &task);
}

static void attention_lse(const PrefillAttention& a) {
  if (a.dtype == DType::f32) return attention_lse_of<float>(a);
  if (a.dtype == DType::f16) return attention_lse_of<f16>(a);
  attention_lse_of<bf16>(a);
}
