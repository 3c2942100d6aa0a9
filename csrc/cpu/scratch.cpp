#include <cstdlib>
#include <new>

#include "kernels.h"

namespace fastgen {

namespace {
struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};
}  // namespace

float* scratch(Scratch use, int64_t n) {
  thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& buffer = buffers[static_cast<int>(use)];
  if (n > buffer.size) {
    std::free(buffer.data);
    buffer.size = (n + n / 2 + 15) / 16 * 16;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, buffer.size * sizeof(float)));
    if (!buffer.data) {
      buffer.size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

}  // namespace fastgen
