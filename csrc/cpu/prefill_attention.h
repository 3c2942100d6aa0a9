// Causal attention of a chunk against its prefix and itself: tiles of queries times tiles of
// packed keys, online softmax, output and log-sum-exp.

struct PrefillTask {
  const PrefillAttention* a;
  int64_t num_tiles, tile_queries, num_query_tiles;
  float *keys, *values;  // packed: [head][tile][head_size / kPer * kTile] each
};

// Values of a tile as [key / kPer][head_size][kPer]; keys past the last are 0.
template <class Lane, class T>
static void pack_values(const Prefill& a, int64_t head, int64_t tile, float* to) {
  typedef typename Lane::Element Element;
  constexpr int kTile = Lane::kTile;
  Element* out = (Element*)to;
  for (int64_t j = 0; j < kTile; ++j) {
    int64_t key = tile * kTile + j;
    alignas(64) Element row[256];
    if (key < a.num_keys)
      Lane::copy(row, slot_of<T>(a, head, key) + a.head_size, a.head_size);
    else
      __builtin_memset(row, 0, a.head_size * sizeof(Element));
    Element* base = out + j / Lane::kPer * Lane::kPer * a.head_size + j % Lane::kPer;
    for (int64_t d = 0; d < a.head_size; ++d) base[d * Lane::kPer] = row[d];
  }
}

template <class Lane, class T>
static void pack_task(void* context, int64_t i) {
  const PrefillTask& task = *(const PrefillTask*)context;
  int64_t size = task.a->head_size / Lane::kPer * Lane::kTile;
  pack_keys<Lane, T>(*task.a, i / task.num_tiles, i % task.num_tiles, task.keys + i * size);
  pack_values<Lane, T>(*task.a, i / task.num_tiles, i % task.num_tiles, task.values + i * size);
}

// Turns one row of kKeys scores into probabilities 2^(score - max), as lanes. Returns the factor by
// which what was accumulated under the old maximum must shrink.
template <class Lane, int kKeys>
INLINE float softmax_row(
    const float* scores, int64_t num_visible, float scale, float& row_max, float* row_sum, float* to) {
  vf x[kKeys / W], best = splat(kMinusInfinity);
  for (int v = 0; v < kKeys / W; ++v) {
    x[v] = load(scores + v * W) * scale;
    if (num_visible < (v + 1) * W)
      x[v] = iota() + v * W < (int32_t)num_visible ? x[v] : splat(kMinusInfinity);
    best = vmax(best, x[v]);
  }
  float shrink = 1.0f, new_max = hmax(best);
  if (new_max > row_max) {
    shrink = exp2_nonpositive(splat(row_max - new_max))[0];
    row_max = new_max;
  }
  vf sum = load(row_sum) * shrink;
  for (int v = 0; v < kKeys / W; v += 2) {
    vf low = exp2_nonpositive(x[v] - row_max), high = exp2_nonpositive(x[v + 1] - row_max);
    sum += low + high;
    store_lanes(to + v * W / Lane::kPer, low, high, Lane());
  }
  store(row_sum, sum);
  return shrink;
}

// out[r][0..V*W) = out * shrink[r] + probabilities[r] . values, of a register block.
template <int V>
INLINE void accumulate(const float* probs, const float* values, int64_t num_seen,
                       int64_t head_size, const float* shrink, float* out) {
  constexpr int kRows = FloatLane::kRows, kTile = FloatLane::kTile;
  vf acc[kRows][V];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * head_size + v * W) * shrink[r];
  for (int64_t k = 0; k < num_seen; ++k) {
    vf value[V];
    for (int v = 0; v < V; ++v) value[v] = load(values + k * head_size + v * W);
    for (int r = 0; r < kRows; ++r) {
      vf p = splat(probs[r * kTile + k]);
      for (int v = 0; v < V; ++v) acc[r][v] += p * value[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) store(out + r * head_size + v * W, acc[r][v]);
}

// How many keys of a tile are worked on where num_seen are seen.
template <class Lane>
INLINE int64_t taken(int64_t num_seen) {
  return num_seen > Lane::kTile / 2 ? Lane::kTile : Lane::kTile / 2;
}

// The same of num_rows as in block_scores, and of whole heads. From num_seen on probabilities are 0
// but in rows that pad.
INLINE void accumulate_block(const Prefill& a, const float* probs, int64_t num_rows,
                             const float* values, int64_t num_seen, const float* shrink, float* out,
                             FloatLane) {
  constexpr int kTile = FloatLane::kTile;
  int64_t D = a.head_size;
  for (int64_t r = 0; r < num_rows; r += FloatLane::kRows) {
    int64_t d = 0;
    for (; d + kVecs * W <= D; d += kVecs * W)
      accumulate<kVecs>(probs + r * kTile, values + d, num_seen, D, shrink + r, out + r * D + d);
    for (; d < D; d += W)
      accumulate<1>(probs + r * kTile, values + d, num_seen, D, shrink + r, out + r * D + d);
  }
}
#ifdef FASTGEN_BF16
INLINE void accumulate_block(const Prefill& a, const float* probs, int64_t num_rows,
                             const float* values, int64_t num_seen, const float* shrink, float* out,
                             PairLane) {
  for (int64_t r = 0; r < num_rows; ++r)
    if (shrink[r] != 1.0f)
      for (float* to = out + r * a.head_size; to < out + (r + 1) * a.head_size; to += W)
        store(to, load(to) * shrink[r]);
  a.multiply(num_rows, a.head_size, taken<PairLane>(num_seen), PairLane::kTile, a.head_size, true,
             probs, values, out);
}
#endif

template <class Lane, class T>
static void prefill_task(void* context, int64_t i) {
  const PrefillTask& task = *(const PrefillTask*)context;
  constexpr int kTile = Lane::kTile;
  const PrefillAttention& a = *task.a;
  // The last queries see the most keys: they go first, so that threads end together.
  int64_t head = i % a.num_heads, D = a.head_size, G = a.group;
  int64_t first = (task.num_query_tiles - 1 - i / a.num_heads) * task.tile_queries;
  int64_t last = lower(first + task.tile_queries, a.num_queries);
  int64_t offset = a.num_keys - a.num_queries, lanes = D / Lane::kPer, size = lanes * kTile;
  int64_t max_rows = padded<Lane>(task.tile_queries * G);

  float* rows = scratch(Scratch::task, max_rows * (lanes + D + W + 1));
  float *out = rows + max_rows * lanes, *sums = out + max_rows * D, *maxima = sums + max_rows * W;
  int64_t num_rows = pack_rows<Lane, T>(a, head, first, last, rows);
  fill(out, maxima, 0.0f);
  fill(maxima, maxima + max_rows, -1e30f);

  float scale = a.scale * kLog2e;
  for (int64_t tile = 0; tile * kTile < offset + last; ++tile) {
    const float* keys = task.keys + (head * task.num_tiles + tile) * size;
    const float* values = task.values + (head * task.num_tiles + tile) * size;
    for (int64_t r = 0; r < num_rows; r += kBlock) {
      int64_t n = lower(kBlock, num_rows - r);
      int64_t newest = lower(first + (r + n - 1) / G, last - 1) + offset;
      int64_t num_seen = lower(kTile, newest - tile * kTile + 1);
      if (num_seen <= 0) continue;
      alignas(64) float scores[kBlock * kTile], probs[kBlock * kTile / Lane::kPer], shrink[kBlock];
      int64_t num_keys = taken<Lane>(num_seen);
      block_scores(a, rows + r * lanes, n, keys, num_keys, scores, Lane());
      for (int j = 0; j < n; ++j) {
        int64_t visible = first + (r + j) / G + offset - tile * kTile + 1;
        visible = visible < 0 ? 0 : visible > kTile ? kTile : visible;
        float *sum = sums + (r + j) * W, *to = probs + j * (kTile / Lane::kPer);
        shrink[j] = num_keys == kTile ? softmax_row<Lane, kTile>(scores + j * kTile, visible, scale,
                                                                 maxima[r + j], sum, to)
                                      : softmax_row<Lane, kTile / 2>(scores + j * kTile, visible,
                                                                     scale, maxima[r + j], sum, to);
      }
      accumulate_block(a, probs, n, values, num_seen, shrink, out + r * D, Lane());
    }
  }
  for (int64_t r = 0; r < (last - first) * G; ++r) {
    int64_t query = first + r / G, head_of_query = head * G + r % G;
    float sum = hsum(load(sums + r * W));
    T* to = (T*)a.output + query * a.output_stride + head_of_query * D;
    for (int64_t d = 0; d < D; d += W) store(to + d, load(out + r * D + d) * (1.0f / sum));
    a.lse[query * a.num_heads * G + head_of_query] = (maxima[r] + __builtin_log2f(sum)) * kLn2;
  }
}

template <class T>
static void prefill_attention_of(const PrefillAttention& a) {
  typedef typename LaneOf<T>::type Lane;
  constexpr int kTile = Lane::kTile;
  PrefillTask task{&a, (a.num_keys + kTile - 1) / kTile, higher(1, kBlock / a.group), 0, 0, 0};
  task.num_query_tiles = (a.num_queries + task.tile_queries - 1) / task.tile_queries;
  int64_t num_packed = a.num_heads * task.num_tiles, size = a.head_size / Lane::kPer * kTile;
  task.keys = scratch(Scratch::packed_keys, 2 * num_packed * size);
  task.values = task.keys + num_packed * size;
  a.parallel(num_packed, pack_task<Lane, T>, &task);
  a.parallel(a.num_heads * task.num_query_tiles, prefill_task<Lane, T>, &task);
}

static void prefill_attention(const PrefillAttention& a) {
  if (a.dtype == DType::f32) return prefill_attention_of<float>(a);
  if (a.dtype == DType::f16) return prefill_attention_of<f16>(a);
  prefill_attention_of<bf16>(a);
}
