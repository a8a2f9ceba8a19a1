#include "ops/seed.h"

#include <remnant/rounding.h>

#include <atomic>

namespace remnant {

namespace {

std::atomic<uint32_t>& current_salt() {
  static std::atomic<uint32_t> salt = 0;
  return salt;
}

std::atomic<bool>& whole() {
  static std::atomic<bool> whole = false;
  return whole;
}

}  // namespace

kernels::Seed ops::seed_of(const at::Tensor& seed) {
  return kernels::Seed::from(seed.const_data_ptr<int64_t>(), current_salt());
}

bool ops::keeps_whole() { return whole(); }

RoundingSalt::RoundingSalt(uint32_t salt) : before_(current_salt().exchange(salt)) {}

RoundingSalt::~RoundingSalt() { current_salt() = before_; }

NoRounding::NoRounding() : before_(whole().exchange(true)) {}

NoRounding::~NoRounding() { whole() = before_; }

}  // namespace remnant
