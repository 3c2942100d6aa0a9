// The decode step's bookkeeping: every head appends a slot or takes over its victim's.

struct PlanTask {
  const PlanDecode* a;
};

INLINE int64_t ceil_ratio(int64_t ratio, int64_t num_tokens) {
  return (ratio * num_tokens + 9999) / 10000;
}

// Slot of the lowest score before `window_start`; the oldest on ties.
INLINE int64_t victim(const PlanDecode& a, const int32_t* pages, int64_t length,
                      int32_t window_start, int32_t num_queries) {
  const int32_t none = 0x7fffffff;
  float best = -kMinusInfinity;
  int32_t oldest = none;
  int64_t found = -1;
  for (int64_t first = 0; first < length; first += a.block_size) {
    int64_t slot = (int64_t)pages[first / a.block_size] * a.block_size;
    for (int64_t j = 0, n = lower(a.block_size, length - first); j < n; j += W) {
      vi lane = iota() + (int32_t)j;
      vi position;
      vf score;
      if (j + W <= a.block_size) {
        position = load_int(a.positions + slot + j);
        score = load(a.scores + slot + j);
      } else {  // pages of 8 slots and wider vectors
        position = splat_int(-1);
        score = splat(0.0f);
        for (int64_t k = j; k < a.block_size; ++k) {
          position[k - j] = a.positions[slot + k];
          score[k - j] = a.scores[slot + k];
        }
      }
      if (a.mean) {
        vi seen = num_queries - position;
        score /= __builtin_convertvector(seen < 1 ? splat_int(1) : seen, vf);
      }
      vi outside = (lane < (int32_t)n) & (position >= 0) & (position < window_start);
      score = outside ? score : splat(-kMinusInfinity);
      if (-hmax(-score) > best) continue;
      for (int k = 0; k < W; ++k)
        if (score[k] < best || (score[k] == best && found >= 0 && position[k] < oldest)) {
          best = score[k];
          oldest = position[k];
          found = slot + j + k;
        }
    }
  }
  return found;
}

static void plan_heads(void* context, int64_t i) {
  const PlanDecode& a = *((const PlanTask*)context)->a;
  int64_t heads = a.num_layers * a.num_heads, request = i / a.num_layers;
  int64_t t = a.num_tokens[request];
  for (int64_t head = i % a.num_layers * a.num_heads, end = head + a.num_heads; head < end; ++head) {
    int64_t at = a.rows[request] * heads + head, policy = a.policy[at], length = a.lengths[at];
    bool sticky = (a.special[request] && a.ladder_special[policy]) ||
                  (a.punctuation[request] && a.ladder_punctuation[policy]);
    a.num_sticky[at] += sticky;
    int64_t window = higher(a.ladder_least_window[policy], ceil_ratio(a.ladder_local[policy], t));
    int64_t budget = a.num_sticky[at] + ceil_ratio(a.ladder_frequent[policy], t) + window;
    int64_t& slot = a.slots[request * heads + head];
    slot = -1;  // appends
    if (!a.ladder_full[policy] && length >= budget)
      slot = victim(a, a.page_table + a.table_start[at], length, t - window, t - 1);
  }
}

// The newest token's position and score, and for heads that grow their slot.
static int64_t plan_decode(const PlanDecode& a) {
  PlanTask task{&a};
  a.parallel(a.num_requests * a.num_layers, plan_heads, &task);
  int64_t heads = a.num_layers * a.num_heads, page_size = a.block_size;
  for (int64_t request = 0; request < a.num_requests; ++request) {
    int64_t row = a.rows[request];
    for (int64_t head = 0; head < heads; ++head) {
      int64_t at = row * heads + head, policy = a.policy[at];
      int64_t& slot = a.slots[request * heads + head];
      if (slot < 0) {
        int64_t length = a.lengths[at]++;
        int32_t& page = a.page_table[a.table_start[at] + length / page_size];
        if (length % page_size == 0) {
          if (a.num_free[row] == 0) return request;
          page = a.free_pages[row * a.free_width + --a.num_free[row]];
          for (int64_t j = 0; j < page_size; ++j) a.positions[page * page_size + j] = -1;
        }
        slot = page * page_size + length % page_size;
      }
      bool sticky = (a.special[request] && a.ladder_special[policy]) ||
                    (a.punctuation[request] && a.ladder_punctuation[policy]);
      a.positions[slot] = (int32_t)(a.num_tokens[request] - 1);
      a.scores[slot] = sticky ? -kMinusInfinity : 0.0f;
    }
  }
  return -1;
}
