// Compaction's first half: each head's kept tokens move to the front of its own pages, in place.

#include <cstring>

#include "kernels.h"

namespace fastgen {

static void pack_head(void* context, int64_t head) {
  const PackSlots& a = *static_cast<const PackSlots*>(context);
  const int64_t* pages = a.page_table + head * a.table_stride;
  const bool* kept = a.kept + head * a.num_tokens;
  int64_t bs = a.block_size, target = 0;
  for (int64_t source = 0; source < a.num_tokens; ++source) {
    if (!kept[source]) continue;
    if (target != source)
      std::memcpy(a.pages + (pages[target / bs] * bs + target % bs) * a.slot_bytes,
                  a.pages + (pages[source / bs] * bs + source % bs) * a.slot_bytes, a.slot_bytes);
    ++target;
  }
}

void pack_slots(const PackSlots& a) { a.parallel(a.num_heads, pack_head, const_cast<PackSlots*>(&a)); }

}  // namespace fastgen
