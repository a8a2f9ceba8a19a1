#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace remnant::app::classify {

struct Review {
  std::string label;  ///< "negative" or "positive"
  std::string text;
};

/// Film reviews from a grammar: five to ten sentences of plot, cast and evening out, of which two to four
/// are an opinion. A quarter of the opinions say the opposite of their adjective ("nobody would call the
/// ending dull"), so that words alone do not tell; sentences without an opinion hold negations too. Both
/// labels are equally frequent and alternate; no text occurs twice. Deterministic from `seed` on every
/// platform.
std::vector<Review> generate_reviews(int64_t count, uint64_t seed = 1);

}  // namespace remnant::app::classify
