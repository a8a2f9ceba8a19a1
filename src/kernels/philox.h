#pragma once

#include <cstdint>

// Sources compiled for several instruction sets share these headers: an out-of-line copy made with AVX-512
// could be linked for everyone, so nothing here may have one.
#define REMNANT_ALWAYS_INLINE inline __attribute__((always_inline))

namespace remnant::kernels {

/// Which of the seed's independent streams a draw belongs to.
enum class Stream : uint32_t { dropout = 0, rounding = 1 };

/// A seed as the ops keep it (two int64 from the torch generator), split for Philox 4x32-10 (Salmon
/// et al., SC 2011): 64 bits of key, 31 bits of counter; the last counter bit is the stream. `salt` moves the
/// rounding stream alone.
struct Seed {
  uint32_t key0 = 0, key1 = 0, word = 0, salt = 0;

  static REMNANT_ALWAYS_INLINE Seed from(const int64_t* pair, uint32_t salt = 0) {
    const auto key = static_cast<uint64_t>(pair[0]);
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(pair[1]),
            salt};
  }
  REMNANT_ALWAYS_INLINE uint32_t counter3(Stream stream) const {
    return ((stream == Stream::rounding ? word ^ salt : word) << 1) | static_cast<uint32_t>(stream);
  }
};

// Counter of an element: (column block, row, batch * heads + head, counter3). A block is 8 columns of
// 16 bits for dropout, 4 columns of 32 bits for rounding.
constexpr int64_t kDropoutColumns = 8;
constexpr int64_t kRoundingColumns = 4;

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

/// Policy sampled: consecutive query rows that share their drawn keys.
constexpr int64_t kSampleRows = 64;
// The draw of tile t hangs on one number in (0, 1), ((x << 20 | y >> 12) + 0.5) / 2^52 in double, of the
// first two words x, y of the rounding stream at (block 0, row t): `sampled` has no rounding that could meet
// it.

/// Dropout decides with 16 random bits: the realised rate is threshold / 65536.
constexpr int64_t dropout_threshold(double rate) {
  if (rate <= 0) return 0;
  const auto rounded = static_cast<int64_t>(rate * 65536.0 + 0.5);
  return rounded < 1 ? 1 : (rounded > 65535 ? 65535 : rounded);
}
constexpr double dropout_keep_scale(int64_t threshold) {
  return 65536.0 / (65536.0 - static_cast<double>(threshold));
}

}  // namespace remnant::kernels
