// Tiles of Q K^T for prefill. A lane is 32 bits of the head dimension: one float, or a pair of
// bf16 where the machine multiplies pairs. Keys are packed lane-major, [lane][kTile keys], so that
// a tile of scores needs no horizontal sum. Floats are multiplied here, pairs by a library, which
// with AMX wants few large products: to change their shape is to set up its tiles anew.

constexpr int kBlock = 96;              // most rows (query, group) of a block of scores
constexpr int kVecs = W == 16 ? 4 : 2;  // vectors of a register block

struct FloatLane {
  typedef float Element;
  static constexpr int kTile = 64, kPer = 1, kRows = 6;  // keys; rows of a register block
  static inline __attribute__((always_inline)) vf dot(vf acc, vf a, vf b) { return a * b + acc; }
  template <class T>
  static inline __attribute__((always_inline)) vf load_row(const T* p) { return load(p); }
  template <class T>
  static inline __attribute__((always_inline)) void copy(Element* to, const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(to + i, load(from + i));
  }
};

static_assert(kBlock % FloatLane::kRows == 0);

#ifdef FASTGEN_BF16
struct PairLane {
  typedef bf16 Element;
  static constexpr int kTile = 128, kPer = 2, kRows = 16;  // keys; rows of a tile of AMX
  static inline __attribute__((always_inline)) vf dot(vf acc, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
  static inline __attribute__((always_inline)) vf load_row(const bf16* p) {
    return load((const float*)p);
  }
  static inline __attribute__((always_inline)) void copy(Element* to, const bf16* from, int64_t n) {
    __builtin_memcpy(to, from, n * sizeof(bf16));
  }
};
static_assert(kBlock % PairLane::kRows == 0);

template <class T>
struct LaneOf {
  typedef FloatLane type;
};
template <>
struct LaneOf<bf16> {
  typedef PairLane type;
};
#else
template <class T>
struct LaneOf {
  typedef FloatLane type;
};
#endif

// Two vectors of probabilities as consecutive lanes.
INLINE void store_lanes(float* to, vf x, vf y, FloatLane) {
  store(to, x);
  store(to + W, y);
}
#ifdef FASTGEN_BF16
INLINE void store_lanes(float* to, vf x, vf y, PairLane) {
  _mm512_storeu_ps(to, (__m512)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
}
#endif

template <class T>
INLINE const T* slot_of(const Prefill& a, int64_t head, int64_t key) {
  int64_t page = a.page_table[head * a.table_stride + key / a.block_size];
  return (const T*)a.pages + (page * a.block_size + key % a.block_size) * 2 * a.head_size;
}

// Keys [tile * kTile, ...) of a head as [lane][kTile][kPer]; keys past the last are 0.
template <class Lane, class T>
static void pack_keys(const Prefill& a, int64_t head, int64_t tile, float* to) {
  typedef typename Lane::Element Element;
  constexpr int kTile = Lane::kTile;
  int64_t lanes = a.head_size / Lane::kPer;
  alignas(64) float row[256];
  for (int64_t j = 0; j < kTile; ++j) {
    int64_t key = tile * kTile + j;
    if (key < a.num_keys)
      Lane::copy((Element*)row, slot_of<T>(a, head, key), a.head_size);
    else
      __builtin_memset(row, 0, lanes * sizeof(float));
    for (int64_t l = 0; l < lanes; ++l) to[l * kTile + j] = row[l];
  }
}

// scores[r][kTile] = rows[r] . keys, unscaled, of a register block and at least the first num_keys.
INLINE void tile_scores(const float* rows, int64_t lanes, const float* keys, int64_t num_keys,
                        float* scores) {
  constexpr int kRows = FloatLane::kRows, kTile = FloatLane::kTile;
  for (int k = 0; k < num_keys; k += kVecs * W) {
    vf acc[kRows][kVecs] = {};
    for (int64_t l = 0; l < lanes; ++l) {
      vf key[kVecs];
      for (int v = 0; v < kVecs; ++v) key[v] = load(keys + l * kTile + k + v * W);
      for (int r = 0; r < kRows; ++r) {
        vf row = splat(rows[r * lanes + l]);
        for (int v = 0; v < kVecs; ++v) acc[r][v] += row * key[v];
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVecs; ++v) store(scores + r * kTile + k + v * W, acc[r][v]);
  }
}

// The same of num_rows, at most kBlock and a multiple of Lane::kRows.
INLINE void block_scores(const Prefill& a, const float* rows, int64_t num_rows, const float* keys,
                         int64_t num_keys, float* scores, FloatLane) {
  for (int64_t r = 0; r < num_rows; r += FloatLane::kRows)
    tile_scores(rows + r * a.head_size, a.head_size, keys, num_keys,
                scores + r * FloatLane::kTile);
}
#ifdef FASTGEN_BF16
INLINE void block_scores(const Prefill& a, const float* rows, int64_t num_rows, const float* keys,
                         int64_t num_keys, float* scores, PairLane) {
  a.multiply(num_rows, num_keys, a.head_size, a.head_size, PairLane::kTile, false, rows, keys, scores);
}
#endif

template <class Lane>
INLINE int64_t padded(int64_t num_rows) {
  return (num_rows + Lane::kRows - 1) / Lane::kRows * Lane::kRows;
}

// Rows (query, group) of queries [first, last) of a head, padded with zeros.
template <class Lane, class T>
static int64_t pack_rows(const Prefill& a, int64_t head, int64_t first, int64_t last, float* to) {
  typedef typename Lane::Element Element;
  int64_t lanes = a.head_size / Lane::kPer, rows = (last - first) * a.group;
  for (int64_t q = first; q < last; ++q) {
    const T* from = (const T*)a.query + q * a.query_stride + head * a.group * a.head_size;
    Lane::copy((Element*)(to + (q - first) * a.group * lanes), from, a.group * a.head_size);
  }
  int64_t all = padded<Lane>(rows);
  __builtin_memset(to + rows * lanes, 0, (all - rows) * lanes * sizeof(float));
  return all;
}

// Where the block of rows begins in which the first query sees a tile of keys.
INLINE int64_t first_row(const Profiled& a, int64_t first_key) {
  if (first_key <= a.first_position) return 0;
  int64_t query = (first_key - a.first_position + a.position_step - 1) / a.position_step;
  return query * a.group / kBlock * kBlock;
}

// All queries of a prefill, packed: [head][padded_rows][lanes].
struct PackedQueries {
  const Prefill* a;
  int64_t padded_rows;
  float* rows;
};

template <class Lane, class T>
static void pack_queries_of_head(void* context, int64_t head) {
  const PackedQueries& packed = *(const PackedQueries*)context;
  int64_t lanes = packed.a->head_size / Lane::kPer;
  pack_rows<Lane, T>(*packed.a, head, 0, packed.a->num_queries,
                     packed.rows + head * packed.padded_rows * lanes);
}

template <class Lane, class T>
static PackedQueries pack_queries(const Prefill& a) {
  PackedQueries packed{&a, padded<Lane>(a.num_queries * a.group), 0};
  int64_t floats = a.num_heads * packed.padded_rows * a.head_size / Lane::kPer;
  packed.rows = scratch(Scratch::packed_queries, floats);
  a.parallel(a.num_heads, pack_queries_of_head<Lane, T>, &packed);
  return packed;
}
