// Attention of one query token per request over its heads' live slots. Heads differ tenfold in
// length, so each is cut into parts of about equal work; whoever finishes a head's last part
// merges it, and adds the probabilities to the slots' scores from the raw scores it kept.

// Slots of a step of the online softmax. What is fetched ahead is so during the dot products and while
// the values are added: with short steps the memory idles less during what lies between.
constexpr int kSlots = W == 16 ? 64 : 16;
constexpr int kGroupMax = W == 16 ? 4 : 3;  // query heads of a register block

// Small enough that threads end together, large enough to outweigh a merge; and the same in every
// batch, so that a request's sums do not depend on what runs beside it.
constexpr int64_t kPart = 512;

struct DecodePart {
  int64_t head, first, last;  // head: request * num_heads + KV head
  float* out;                 // [group][head_size], then maxima [group], then sums [group]
};

struct DecodeHead {
  int64_t length, num_parts, first_part;
  std::atomic<int64_t> parts_left;
  float* raw;  // [group][length] scores in log2, or null
};

struct DecodeTask {
  const DecodeAttention* a;
  DecodePart* parts;
  DecodeHead* heads;
};

alignas(64) const float kZeros[512] = {};  // K and V of the largest head

// The block of n <= kSlots slots from `first`: rows of K, and their positions. An evicted slot may
// hold anything, NaN included: its row, and those past the last, are zeros.
template <class T>
INLINE void find_slots(const DecodeAttention& a, const int32_t* pages, int64_t first, int64_t n,
                       const T** rows, int32_t* positions) {
  int64_t page = first / a.block_size, offset = first % a.block_size;
  for (int64_t j = 0; j < n; ++page, offset = 0) {
    int64_t index = pages[page] * a.block_size + offset, row_size = 2 * a.head_size;
    const T* row = (const T*)a.pages + index * row_size;
    for (int64_t end = lower(n, j + a.block_size - offset); j < end; ++j, ++index, row += row_size) {
      positions[j] = a.positions[index];
      rows[j] = positions[j] < 0 ? (const T*)kZeros : row;
    }
  }
  for (int64_t j = n; j < kSlots; ++j) {
    rows[j] = (const T*)kZeros;
    positions[j] = -1;
  }
}

// The same for the metadata, two blocks ahead.
INLINE void prefetch_metadata(const DecodeAttention& a, const int32_t* pages, int64_t first,
                              int64_t last, bool scores) {
  for (int64_t slot = first; slot < last; slot += lower(a.block_size, kSlots)) {
    int64_t index = (int64_t)pages[slot / a.block_size] * a.block_size + slot % a.block_size;
    __builtin_prefetch(a.positions + index);
    if (scores) __builtin_prefetch(a.scores + index, 1, 2);
  }
}

// Pages lie anywhere, so the hardware does not see the next block coming. It is fetched into L2 in the
// order in which it lies in memory, K and V of slot after slot: the first half while the dot products
// run, the second while the values are added, which keeps misses in flight evenly. `i` counts the
// block's rows of K and V; n elements from d on are fetched.
template <class T>
INLINE void prefetch_row(const T** rows, int64_t i, int64_t D, int64_t d, int64_t n) {
  const T* row = rows[i / 2] + i % 2 * D + d;
  for (int64_t byte = 0; byte < n * (int64_t)sizeof(T); byte += 64)
    __builtin_prefetch((const char*)row + byte, 0, 2);
}

template <class Lane, int G, class T>
INLINE void dot_slots(const float* query, const T** rows, const T** next_rows, int64_t n, int64_t D,
                      float* scores) {
  for (int64_t j = 0; j < n; j += 4) {
    if (next_rows)
      for (int s = 0; s < 4; ++s) prefetch_row(next_rows, j + s, D, 0, D);
    vf acc[G][4] = {};
    for (int64_t lane = 0; lane < D / Lane::kPer; lane += W) {
      // 4 G sums, G queries and a key: with AVX2 and G = 3 just the 16 registers.
      vf q[G];
      for (int g = 0; g < G; ++g) q[g] = load(query + g * (D / Lane::kPer) + lane);
      for (int s = 0; s < 4; ++s) {
        vf key = Lane::load_row(rows[j + s] + lane * Lane::kPer);
        for (int g = 0; g < G; ++g) acc[g][s] = Lane::dot(acc[g][s], q[g], key);
      }
    }
    for (int g = 0; g < G; ++g)
      _mm_storeu_ps(scores + g * kSlots + j, hsum4(acc[g][0], acc[g][1], acc[g][2], acc[g][3]));
  }
}

// out[g][d..d + V*W) = out * shrink[g] + probabilities[g] . values, for whole lanes of slots.
template <int G, int V, class T>
INLINE void add_values(const float* probs, const T** rows, const T** next_rows, int64_t n,
                       int64_t D, int64_t d, const float* shrink, float* out, FloatLane) {
  vf acc[G][V];
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) acc[g][v] = load(out + g * D + d + v * W) * shrink[g];
  for (int64_t j = 0; j < n; ++j) {
    if (next_rows) prefetch_row(next_rows, kSlots + j, D, d, V * W);
    vf p[G];
    for (int g = 0; g < G; ++g) p[g] = splat(probs[g * kSlots + j]);
    for (int v = 0; v < V; ++v) {
      vf value = load(rows[j] + D + d + v * W);
      for (int g = 0; g < G; ++g) acc[g][v] += p[g] * value;
    }
  }
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) store(out + g * D + d + v * W, acc[g][v]);
}

#ifdef FASTGEN_BF16
// V is even: two rows of V are interleaved into pairs, 32 values at a time.
template <int G, int V>
INLINE void add_values(const float* probs, const bf16** rows, const bf16** next_rows, int64_t n,
                       int64_t D, int64_t d, const float* shrink, float* out, PairLane) {
  alignas(64) uint16_t order[64];
  for (int i = 0; i < 32; ++i) {
    order[2 * i] = (uint16_t)i;
    order[2 * i + 1] = (uint16_t)(32 + i);
  }
  __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  vf acc[G][V];
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) acc[g][v] = load(out + g * D + d + v * W) * shrink[g];
  for (int64_t j = 0; j < n; j += 2) {
    if (next_rows)
      for (int s = 0; s < 2; ++s) prefetch_row(next_rows, kSlots + j + s, D, d, V * W);
    vf value[V];
    for (int v = 0; v < V; v += 2) {
      __m512i first = _mm512_loadu_si512(rows[j] + D + d + v * W);
      __m512i second = _mm512_loadu_si512(rows[j + 1] + D + d + v * W);
      value[v] = (vf)_mm512_permutex2var_epi16(first, low, second);
      value[v + 1] = (vf)_mm512_permutex2var_epi16(first, high, second);
    }
    for (int g = 0; g < G; ++g) {
      vf p = splat(probs[g * kSlots + j / 2]);
      for (int v = 0; v < V; ++v) acc[g][v] = PairLane::dot(acc[g][v], p, value[v]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) store(out + g * D + d + v * W, acc[g][v]);
}
#endif

template <class Lane, int G, class T>
INLINE void attend_slots(const DecodeAttention& a, const float* query, const T** rows,
                         const T** next_rows, const int32_t* positions, int64_t n, float* out,
                         float* maxima, float* sums, float* raw, int64_t raw_stride) {
  int64_t D = a.head_size;
  float scale = a.scale * kLog2e;
  alignas(64) float scores[G * kSlots], shrink[W];
  dot_slots<Lane, G>(query, rows, next_rows, n, D, scores);
  vf x[G][kSlots / W];
  for (int g = 0; g < G; ++g) {
    float* row = scores + g * kSlots;
    vf best = splat(maxima[g]);
    for (int v = 0; v < kSlots / W; ++v) {
      x[g][v] = load_int(positions + v * W) >= 0 ? load(row + v * W) * scale : splat(kMinusInfinity);
      best = vmax(best, x[g][v]);
    }
    if (raw) {
      float* to = n == kSlots ? raw + g * raw_stride : row;
      for (int v = 0; v < kSlots / W; ++v) store(to + v * W, x[g][v]);
      if (n < kSlots) __builtin_memcpy(raw + g * raw_stride, row, n * sizeof(float));
    }
    float new_max = hmax(best);
    shrink[g] = maxima[g] - new_max;
    maxima[g] = new_max;
  }
  for (int g = G; g < W; ++g) shrink[g] = 0.0f;
  store(shrink, exp2_nonpositive(load(shrink)));
  for (int g = 0; g < G; ++g) {
    float* row = scores + g * kSlots;
    vf sum = splat(0.0f);
    for (int v = 0; v < kSlots / W; v += 2) {
      vf low = exp2_nonpositive(x[g][v] - maxima[g]), high = exp2_nonpositive(x[g][v + 1] - maxima[g]);
      sum += low + high;
      store_lanes(row + v * W / Lane::kPer, low, high, Lane());
    }
    sums[g] = sums[g] * shrink[g] + hsum(sum);
  }
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W)
    add_values<G, 4>(scores, rows, next_rows, n, D, d, shrink, out, Lane());
  for (; d < D; d += Lane::kPer * W)
    add_values<G, Lane::kPer>(scores, rows, next_rows, n, D, d, shrink, out, Lane());
}

template <class Lane, class T>
INLINE void attend_part(const DecodeAttention& a, const DecodePart& part, const DecodeHead& head) {
  int64_t D = a.head_size, G = a.group, lanes = D / Lane::kPer, request = part.head / a.num_heads;
  int64_t kv_head = part.head % a.num_heads;
  const int32_t* pages = a.page_table + a.table_start[a.rows[request] * a.row_stride + kv_head];
  const T* from = (const T*)a.query + request * a.query_stride + kv_head * G * D;
  float *query = scratch(Scratch::task, G * lanes), *maxima = part.out + G * D, *sums = maxima + G;
  Lane::copy((typename Lane::Element*)query, from, G * D);
  fill(part.out, maxima, 0.0f);
  fill(maxima, sums, -1e30f);
  fill(sums, sums + G, 0.0f);
  alignas(64) const T* rows[2][kSlots];
  alignas(64) int32_t positions[2][kSlots];
  prefetch_metadata(a, pages, part.first, lower(part.first + 2 * kSlots, part.last), head.raw);
  find_slots(a, pages, part.first, lower(kSlots, part.last - part.first), rows[0], positions[0]);
  int now = 0;
  for (int64_t first = part.first; first < part.last; first += kSlots, now = 1 - now) {
    int64_t n = lower(kSlots, part.last - first), next = first + kSlots;
    bool more = next < part.last;
    prefetch_metadata(a, pages, next + kSlots, lower(next + 2 * kSlots, part.last), head.raw);
    if (more)
      find_slots(a, pages, next, lower(kSlots, part.last - next), rows[1 - now], positions[1 - now]);
    for (int64_t g = 0; g < G;) {
      float *out = part.out + g * D, *raw = head.raw ? head.raw + g * head.length + first : nullptr;
      int64_t blocks_left = (G - g + kGroupMax - 1) / kGroupMax;
      int64_t take = (G - g + blocks_left - 1) / blocks_left;  // 2 + 2 rather than 3 + 1
#define ATTEND(n_heads)                                                                         \
  attend_slots<Lane, n_heads>(a, query + g * lanes, rows[now], more && !g ? rows[1 - now] : nullptr, \
                              positions[now], n, out, maxima + g, sums + g, raw, head.length)
      if (take == 1) ATTEND(1);
      if (take == 2) ATTEND(2);
      if (take == 3) ATTEND(3);
      if (kGroupMax > 3 && take == 4) ATTEND(4);
#undef ATTEND
      g += take;
    }
  }
}

template <class T>
INLINE void merge_head(const DecodeTask& task, int64_t index) {
  const DecodeAttention& a = *task.a;
  const DecodeHead& head = task.heads[index];
  int64_t D = a.head_size, G = a.group, request = index / a.num_heads, kv_head = index % a.num_heads;
  const DecodePart *parts = task.parts + head.first_part, *end = parts + head.num_parts;
  float *merged = scratch(Scratch::task, D + G), *lse = merged + D;
  for (int64_t g = 0; g < G; ++g) {
    float best = -1e30f, sum = 0.0f;
    for (const DecodePart* p = parts; p < end; ++p)
      best = p->out[G * D + g] > best ? p->out[G * D + g] : best;
    fill(merged, merged + D, 0.0f);
    for (const DecodePart* p = parts; p < end; ++p) {
      float weight = exp2_nonpositive(splat(p->out[G * D + g] - best))[0];
      sum += weight * p->out[G * D + G + g];
      for (int64_t d = 0; d < D; d += W)
        store(merged + d, load(merged + d) + load(p->out + g * D + d) * weight);
    }
    T* to = (T*)a.output + request * a.output_stride + (kv_head * G + g) * D;
    for (int64_t d = 0; d < D; d += W) store(to + d, load(merged + d) * (1.0f / sum));
    lse[g] = best + __builtin_log2f(sum);
  }
  if (!head.raw) return;
  int64_t at = a.rows[request] * a.row_stride + kv_head;
  const int32_t *pages = a.page_table + a.table_start[at], far = (int32_t)a.far[request];
  float decay = a.decay[at];
  for (int64_t page = 0; page * a.block_size < head.length; ++page) {
    float* scores = a.scores + pages[page] * a.block_size;
    const int32_t* positions = a.positions + pages[page] * a.block_size;
    int64_t first = page * a.block_size, n = lower(a.block_size, head.length - first), j = 0;
    // An evicted slot's raw score is -inf, which adds 0.
    for (; j + W <= n; j += W) {
      vf received = splat(0.0f), before = load(scores + j);
      for (int64_t g = 0; g < G; ++g) {
        vf x = load(head.raw + g * head.length + first + j) - lse[g];
        received += exp2_nonpositive(x < 0.0f ? x : splat(0.0f));
      }
      vf peak = load_int(positions + j) < far ? received : splat(0.0f);
      store(scores + j, decay > 0.0f ? vmax(before * decay, peak) : before + received);
    }
    for (; j < n; ++j) {
      float received = 0.0f;
      for (int64_t g = 0; g < G; ++g) {
        float x = head.raw[g * head.length + first + j] - lse[g];
        received += exp2_nonpositive(splat(x < 0.0f ? x : 0.0f))[0];
      }
      float faded = scores[j] * decay, peak = positions[j] < far ? received : 0.0f;
      scores[j] = decay > 0.0f ? (faded > peak ? faded : peak) : scores[j] + received;
    }
  }
}

template <class Lane, class T>
static void decode_task(void* context, int64_t i) {
  const DecodeTask& task = *(const DecodeTask*)context;
  int64_t index = task.parts[i].head;
  attend_part<Lane, T>(*task.a, task.parts[i], task.heads[index]);
  if (task.heads[index].parts_left.fetch_sub(1, std::memory_order_acq_rel) == 1)
    merge_head<T>(task, index);
}

static void decode_attention(const DecodeAttention& a) {
  int64_t num = a.num_requests * a.num_heads, total = 0, raw_size = 0, num_parts = 0;
  for (int64_t i = 0; i < num; ++i) {
    int64_t at = a.rows[i / a.num_heads] * a.row_stride + i % a.num_heads;
    total += a.lengths[at];
    if (a.keeps_scores[at]) raw_size += a.lengths[at] * a.group;
  }
  int64_t out_size = a.group * (a.head_size + 2), max_parts = total / kPart + num;
  int64_t floats_of_heads = num * sizeof(DecodeHead) / sizeof(float);
  int64_t floats_of_parts = max_parts * sizeof(DecodePart) / sizeof(float);
  float* memory = scratch(Scratch::parts, floats_of_heads + floats_of_parts + max_parts * out_size);
  DecodeTask task{&a, (DecodePart*)(memory + floats_of_heads), (DecodeHead*)memory};
  float* out = memory + floats_of_heads + floats_of_parts;
  float* raw = scratch(Scratch::raw_scores, raw_size);
  for (int64_t i = 0; i < num; ++i) {
    int64_t at = a.rows[i / a.num_heads] * a.row_stride + i % a.num_heads;
    DecodeHead& head = task.heads[i];
    head.length = a.lengths[at];
    head.first_part = num_parts;
    head.raw = a.keeps_scores[at] ? raw : nullptr;
    if (head.raw) raw += head.length * a.group;
    for (int64_t first = 0; first < head.length; first += kPart, out += out_size)
      task.parts[num_parts++] = {i, first, lower(first + kPart, head.length), out};
    head.num_parts = num_parts - head.first_part;
    head.parts_left.store(head.num_parts, std::memory_order_relaxed);
  }
  bool whole_pairs = a.head_size % (2 * W) == 0;
  a.parallel(num_parts,
             a.dtype == DType::f32   ? decode_task<FloatLane, float>
             : a.dtype == DType::f16 ? decode_task<FloatLane, f16>
             : whole_pairs           ? decode_task<LaneOf<bf16>::type, bf16>
                                     : decode_task<FloatLane, bf16>,
             &task);
}
