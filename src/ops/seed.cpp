#include "ops/seed.h"

#include <atomic>

namespace remnant::ops {

namespace {

std::atomic<uint32_t>& current_salt() {
  static std::atomic<uint32_t> salt = 0;
  return salt;
}

}  // namespace

kernels::Seed seed_of(const at::Tensor& seed) {
  return kernels::Seed::from(seed.const_data_ptr<int64_t>(), current_salt());
}

RoundingSalt::RoundingSalt(uint32_t salt) : before_(current_salt().exchange(salt)) {}

RoundingSalt::~RoundingSalt() { current_salt() = before_; }

}  // namespace remnant::ops
