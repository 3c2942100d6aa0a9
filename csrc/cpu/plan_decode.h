// The decode step's bookkeeping: every head appends a slot or takes over its victim's.

struct PlanTask {
  const PlanDecode* a;
};

INLINE int64_t ceil_ratio(int64_t ratio, int64_t num_tokens) {
  return (ratio * num_tokens + 9999) / 10000;
}

// Slot of the lowest score before `window_start`; the oldest on ties.
INLINE int64_t victim(const PlanDecode& a, const int32_t* pages, int64_t length, bool averages,
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
      if (averages) {
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

INLINE bool is_sticky(const PlanDecode& a, int64_t request, int64_t at) {
  return (a.sticky_kinds[at] & a.token_classes[request]) != 0;
}

// Writes the slots of heads that evict, and -1 for those that append; changes nothing else.
static void plan_heads(void* context, int64_t i) {
  const PlanDecode& a = *((const PlanTask*)context)->a;
  int64_t heads = a.num_layers * a.num_heads, request = i / a.num_layers;
  int64_t t = a.num_tokens[request];
  for (int64_t head = i % a.num_layers * a.num_heads, end = head + a.num_heads; head < end; ++head) {
    int64_t at = a.rows[request] * heads + head, length = a.lengths[at];
    int64_t window = higher(a.least_window[at], ceil_ratio(a.local[at], t));
    int64_t num_sticky = a.num_sticky[at] + is_sticky(a, request, at);
    bool evicts = length >= num_sticky + ceil_ratio(a.frequent[at], t) + window;
    const int32_t* pages = a.page_table + a.table_start[at];
    a.slots[request * heads + head] =
        evicts ? victim(a, pages, length, a.averages[at], t - window, t - 1) : -1;
  }
}

INLINE bool is_short_of_pages(const PlanDecode& a, int64_t request) {
  int64_t heads = a.num_layers * a.num_heads, row = a.rows[request], taken = 0;
  for (int64_t head = 0; head < heads; ++head)
    taken += a.slots[request * heads + head] < 0 && a.lengths[row * heads + head] % a.block_size == 0;
  return taken > a.num_free[row];
}

// The slot behind the head's last, in a new page where that is full.
INLINE int64_t append(const PlanDecode& a, int64_t row, int64_t at) {
  int64_t length = a.lengths[at]++, offset = length % a.block_size;
  int32_t& page = a.page_table[a.table_start[at] + length / a.block_size];
  if (offset == 0) {
    page = a.free_pages[row * a.free_width + --a.num_free[row]];
    for (int64_t j = 0; j < a.block_size; ++j) a.positions[page * a.block_size + j] = -1;
  }
  return page * a.block_size + offset;
}

static int64_t plan_decode(const PlanDecode& a) {
  PlanTask task{&a};
  a.parallel(a.num_requests * a.num_layers, plan_heads, &task);
  int64_t heads = a.num_layers * a.num_heads, last_short = -1;
  for (int64_t request = 0; request < a.num_requests; ++request) {
    int64_t row = a.rows[request];
    int64_t* slots = a.slots + request * heads;
    if (is_short_of_pages(a, request)) {
      last_short = request;
      for (int64_t head = 0; head < heads; ++head) slots[head] = 0;
      continue;
    }
    for (int64_t head = 0; head < heads; ++head) {
      int64_t at = row * heads + head;
      bool sticky = is_sticky(a, request, at);
      a.num_sticky[at] += sticky;
      if (slots[head] < 0) slots[head] = append(a, row, at);
      a.positions[slots[head]] = (int32_t)(a.num_tokens[request] - 1);
      a.scores[slots[head]] = sticky ? -kMinusInfinity : 0.0f;
    }
  }
  return last_short;
}
