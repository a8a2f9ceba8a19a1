#pragma once

#include <remnant/memory.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace remnant::memory {

/// Samples of any length of time in a bounded space: time is cut into slots of one width, and a slot keeps
/// its first lowest and first highest sample. When there are too many slots, two become one: the highest
/// and lowest of all stay, whatever is left out between them.
class Timeline {
 public:
  explicit Timeline(int64_t most_samples) : most_slots_(std::max<int64_t>(most_samples / 2, 1)) {}

  /// `seconds` must not go down from one call to the next.
  void add(double seconds, int64_t live_bytes) {
    const Sample sample{seconds, live_bytes};
    const auto number = static_cast<int64_t>(seconds / width_);
    if (!slots_.empty() && slots_.back().number == number) {
      slots_.back().merge({number, sample, sample});
      return;
    }
    slots_.push_back({number, sample, sample});
    while (static_cast<int64_t>(slots_.size()) > most_slots_) halve();
  }

  std::vector<Sample> samples() const {
    std::vector<Sample> samples;
    samples.reserve(2 * slots_.size());
    for (const Slot& slot : slots_) {
      const bool low_first = slot.low.seconds <= slot.high.seconds;
      samples.push_back(low_first ? slot.low : slot.high);
      if (slot.low.live_bytes != slot.high.live_bytes) samples.push_back(low_first ? slot.high : slot.low);
    }
    return samples;
  }

 private:
  struct Slot {
    int64_t number;
    Sample low, high;

    void merge(const Slot& later) {
      if (later.low.live_bytes < low.live_bytes) low = later.low;
      if (later.high.live_bytes > high.live_bytes) high = later.high;
    }
  };

  void halve() {
    width_ *= 2;
    size_t kept = 0;
    for (size_t i = 0; i < slots_.size(); ++i) {
      slots_[i].number /= 2;
      if (kept > 0 && slots_[kept - 1].number == slots_[i].number) {
        slots_[kept - 1].merge(slots_[i]);
      } else {
        slots_[kept++] = slots_[i];
      }
    }
    slots_.resize(kept);
  }

  int64_t most_slots_;
  double width_ = 1e-6;  // seconds: no two allocations are much nearer
  std::vector<Slot> slots_;
};

}  // namespace remnant::memory
