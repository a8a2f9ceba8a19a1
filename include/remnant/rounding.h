#pragma once

#include <remnant/export.h>

#include <cstdint>

/// For measuring what codes (`unbiased:bits=b`) do to a gradient: the same step from the same random state,
/// with the same dropout, once more. Both are for the whole process.
namespace remnant {

/// While it lives, codes round by another stream: two steps from one random state and under different salts
/// differ by the noise of codes alone. 0 is the usual stream. The composite path does not know it.
class REMNANT_API RoundingSalt {
 public:
  explicit RoundingSalt(uint32_t salt);
  ~RoundingSalt();
  RoundingSalt(const RoundingSalt&) = delete;
  RoundingSalt& operator=(const RoundingSalt&) = delete;

 private:
  uint32_t before_;
};

/// While it lives, what a Transformer layer would keep as codes (linear, norms, feed_forward and attention
/// with bits) is kept as it is: gradients are exact. As many seeds are drawn. Attention's policies go on as
/// they are.
class REMNANT_API NoRounding {
 public:
  NoRounding();
  ~NoRounding();
  NoRounding(const NoRounding&) = delete;
  NoRounding& operator=(const NoRounding&) = delete;

 private:
  bool before_;
};

}  // namespace remnant
