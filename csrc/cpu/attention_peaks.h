// The profiling pass of peaks: the most attention that each key receives of one query, and the sum
// over queries. One task owns a tile of keys of a head and runs over all queries, so no two tasks
// write the same keys.

struct PeaksTask {
  const AttentionPeaks* a;
  PackedQueries queries;
};

template <class Lane, class T>
static void peaks_task(void* context, int64_t i) {
  const PeaksTask& task = *(const PeaksTask*)context;
  constexpr int kTile = Lane::kTile;
  const AttentionPeaks& a = *task.a;
  int64_t head = i % a.num_heads, tile = i / a.num_heads, G = a.group;
  int64_t lanes = a.head_size / Lane::kPer, first_key = tile * kTile;
  float* keys = scratch(Scratch::task, lanes * kTile);
  pack_keys<Lane, T>(a, head, tile, keys);
  const float* rows = task.queries.rows + head * task.queries.padded_rows * lanes;
  float scale = a.scale * kLog2e;
  int64_t num_rows = a.num_queries * G;
  vf peaks[kTile / W] = {}, sums[kTile / W] = {};
  for (int64_t r = first_row(a, first_key); r < num_rows; r += kBlock) {
    alignas(64) float scores[kBlock * kTile];
    int64_t n = lower(kBlock, task.queries.padded_rows - r);
    block_scores(a, rows + r * lanes, n, keys, kTile, scores, Lane());
    for (int64_t j = r; j < lower(r + n, num_rows); ++j) {
      int64_t query = j / G, far = a.first_position + query * a.position_step - first_key;
      if (far < 0) continue;
      float minus_lse = -a.lse[query * a.lse_stride + head * G + j % G] * kLog2e;
      for (int v = 0; v < kTile / W; ++v) {
        vf x = load(scores + (j - r) * kTile + v * W) * scale + minus_lse;
        if (far < kTile - 1) x = iota() + v * W <= (int32_t)far ? x : splat(kMinusInfinity);
        // Rounding can put a score a little above its row's log-sum-exp.
        vf p = exp2_nonpositive(x < 0.0f ? x : splat(0.0f));
        peaks[v] = vmax(peaks[v], p);
        sums[v] += p;
      }
    }
  }
  int64_t offset = head * a.key_stride + first_key;
  for (int64_t k = 0; k < lower(kTile, a.num_keys - first_key); ++k) {
    float *peak = a.peaks + offset + k, found = peaks[k / W][k % W];
    *peak = found > *peak ? found : *peak;
    a.sums[offset + k] += sums[k / W][k % W];
  }
}

template <class T>
static void attention_peaks_of(const AttentionPeaks& a) {
  typedef typename LaneOf<T>::type Lane;
  PeaksTask task{&a, pack_queries<Lane, T>(a)};
  int64_t num_tiles = (a.num_keys + Lane::kTile - 1) / Lane::kTile;
  a.parallel(a.num_heads * num_tiles, peaks_task<Lane, T>, &task);
}

static void attention_peaks(const AttentionPeaks& a) {
  if (a.dtype == DType::f32) return attention_peaks_of<float>(a);
  if (a.dtype == DType::f16) return attention_peaks_of<f16>(a);
  attention_peaks_of<bf16>(a);
}
