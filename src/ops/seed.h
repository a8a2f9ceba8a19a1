#pragma once

#include "kernels/philox.h"

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace remnant::ops {

/// A seed as the kernels take it.
kernels::Seed seed_of(const at::Tensor& seed);

/// While it lives, seeds drop what they always drop and round by another stream: two steps from one random
/// state and under different salts differ by the noise of codes alone. For the whole process; 0 is the usual
/// stream. The composite path does not know it.
class RoundingSalt {
 public:
  explicit RoundingSalt(uint32_t salt);
  ~RoundingSalt();
  RoundingSalt(const RoundingSalt&) = delete;
  RoundingSalt& operator=(const RoundingSalt&) = delete;

 private:
  uint32_t before_;
};

}  // namespace remnant::ops
