// Compaction's first half: what each head keeps moves to the front of its target pages.

#include <cstring>

#include "kernels.h"

namespace fastgen {

static void pack_head(void* context, int64_t head) {
  const PackSlots& a = *static_cast<const PackSlots*>(context);
  const int64_t *source = a.source + head * a.source_width, *target = a.target + head * a.target_width;
  const bool* kept = a.kept + head * a.num_slots;
  int64_t bs = a.block_size, count = 0;
  for (int64_t i = 0; i < a.num_slots; ++i) {
    if (!kept[i]) continue;
    int64_t from = source[i / bs] * bs + i % bs, to = target[count / bs] * bs + count % bs;
    ++count;
    if (from == to) continue;
    std::memcpy(a.kv + to * a.slot_bytes, a.kv + from * a.slot_bytes, a.slot_bytes);
    a.positions[to] = a.positions[from];
    a.scores[to] = a.scores[from];
  }
  for (; count % bs; ++count) a.positions[target[count / bs] * bs + count % bs] = -1;
}

void pack_slots(const PackSlots& a) { a.parallel(a.num_heads, pack_head, const_cast<PackSlots*>(&a)); }

}  // namespace fastgen
