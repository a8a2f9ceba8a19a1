#pragma once

// Rows that are needed soon, brought into the second-level cache while products keep the core busy.

#include "kernels/cpu/attention_kernels.h"

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

// Short rows of many heads lie far apart, so that the hardware does not see the next head's coming. Asked for
// all at once they would fill the core's line buffers and hold up what it works on: products call this
// between blocks of their own.
class Ahead {
 public:
  template <typename T>
  void add(const HeadView<T>& view, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dims) {
    if (view.data == nullptr || rows <= 0) return;
    parts_[count_++] = {reinterpret_cast<const char*>(view.at(b, h, first)),
                        view.row * static_cast<int64_t>(sizeof(T)), dims * static_cast<int64_t>(sizeof(T)),
                        rows};
  }

  REMNANT_ALWAYS_INLINE void operator()() {
    for (int64_t lines = kLines; lines > 0 && next_ < count_;) {
      Part& part = parts_[next_];
      for (int64_t at = 0; at < part.bytes; at += kLineBytes, --lines) {
        __builtin_prefetch(part.data + at, 0, 2);
      }
      part.data += part.stride;
      if (--part.rows == 0) ++next_;
    }
  }

 private:
  static constexpr int64_t kLines = 40, kLineBytes = 64;
  struct Part {
    const char* data;
    int64_t stride, bytes, rows;
  };
  Part parts_[8];
  int count_ = 0, next_ = 0;
};

// For products that nothing goes along with.
struct Nothing {
  void operator()() const {}
};

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
