// The profiling pass: attention that each key receives, by query-key distance. One task owns a
// tile of keys of a head and runs over all queries, so no two tasks write the same sums.

struct MassTask {
  const AttentionMass* a;
  PackedQueries queries;
};

// Adds one row's probabilities to sums[bucket][kTile]. Keys start at distance `far` and come one
// nearer each; `far_bucket` is that distance's.
template <int kTile>
INLINE void add_row(const AttentionMass& a, const vf* p, int64_t far, int64_t far_bucket, float* sums) {
  int64_t low = 0;
  for (int64_t b = far_bucket; b >= 0 && low < kTile; --b) {
    // Keys at distance bounds[b - 1] or more belong to bucket b.
    int64_t high = b ? lower(kTile, far - a.bounds[b - 1] + 1) : kTile;
    if (high <= low) continue;
    float* to = sums + b * kTile;
    for (int v = (int)(low / W); v * W < high; ++v) {
      vi key = iota() + v * W;
      vf inside = (key >= (int32_t)low) & (key < (int32_t)high) ? p[v] : splat(0.0f);
      store(to + v * W, load(to + v * W) + inside);
    }
    low = high;
  }
}

template <class Lane, class T>
static void mass_task(void* context, int64_t i) {
  const MassTask& task = *(const MassTask*)context;
  constexpr int kTile = Lane::kTile;
  const AttentionMass& a = *task.a;
  int64_t head = i % a.num_heads, tile = i / a.num_heads, G = a.group;
  int64_t lanes = a.head_size / Lane::kPer, buckets = a.num_bounds + 1, first_key = tile * kTile;
  float* keys = scratch(Scratch::task, lanes * kTile + a.mass_groups * buckets * kTile);
  float* sums = keys + lanes * kTile;
  pack_keys<Lane, T>(a, head, tile, keys);
  fill(sums, sums + a.mass_groups * buckets * kTile, 0.0f);

  const float* rows = task.queries.rows + head * task.queries.padded_rows * lanes;
  float scale = a.scale * kLog2e;
  int64_t num_rows = a.num_queries * G, bucket = 0;
  for (int64_t r = first_row(a, first_key); r < num_rows; r += kBlock) {
    alignas(64) float scores[kBlock * kTile];
    int64_t n = lower(kBlock, task.queries.padded_rows - r);
    block_scores(a, rows + r * lanes, n, keys, kTile, scores, Lane());
    for (int64_t j = r; j < lower(r + n, num_rows); ++j) {
      int64_t query = j / G, far = a.first_position + query * a.position_step - first_key;
      if (far < 0) continue;
      while (bucket < a.num_bounds && a.bounds[bucket] <= far) ++bucket;
      float minus_lse = -a.lse[query * a.lse_stride + head * G + j % G] * kLog2e;
      vf p[kTile / W];
      for (int v = 0; v < kTile / W; ++v) {
        // Rounding can put a score a little above its row's log-sum-exp.
        vf x = load(scores + (j - r) * kTile + v * W) * scale + minus_lse;
        p[v] = exp2_nonpositive(x < 0.0f ? x : splat(0.0f));
      }
      if (far < kTile - 1)
        for (int v = 0; v < kTile / W; ++v)
          p[v] = iota() + v * W <= (int32_t)far ? p[v] : splat(0.0f);
      float* own = sums + (a.mass_groups == 1 ? 0 : j % G * buckets * kTile);
      if (bucket == 0 || a.bounds[bucket - 1] <= far - (kTile - 1))
        for (int v = 0; v < kTile / W; ++v) {
          float* to = own + bucket * kTile + v * W;
          store(to, load(to) + p[v]);
        }
      else
        add_row<kTile>(a, p, far, bucket, own);
    }
  }
  int64_t num_keys = lower(kTile, a.num_keys - first_key);
  for (int64_t g = 0; g < a.mass_groups; ++g) {
    float* mass = a.mass + head * a.mass_head_stride + g * a.mass_group_stride + first_key * buckets;
    for (int64_t k = 0; k < num_keys; ++k)
      for (int64_t b = 0; b < buckets; ++b)
        mass[k * buckets + b] += sums[(g * buckets + b) * kTile + k];
  }
}

template <class T>
static void attention_mass_of(const AttentionMass& a) {
  typedef typename LaneOf<T>::type Lane;
  MassTask task{&a, pack_queries<Lane, T>(a)};
  int64_t num_tiles = (a.num_keys + Lane::kTile - 1) / Lane::kTile;
  a.parallel(a.num_heads * num_tiles, mass_task<Lane, T>, &task);
}

static void attention_mass(const AttentionMass& a) {
  if (a.dtype == DType::f32) return attention_mass_of<float>(a);
  if (a.dtype == DType::f16) return attention_mass_of<f16>(a);
  attention_mass_of<bf16>(a);
}
