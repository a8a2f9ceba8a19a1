#pragma once

#include "text.h"

#include <cstdint>

namespace remnant::app {

struct Captions {
  ParallelText train, validation, test;  ///< source German, target English
};

/// A German-English corpus of image captions generated from a grammar: gender, number and case
/// agreement, adjective endings, verb position (second, and last in subordinate clauses), separable
/// verbs, compounds, prepositions with two cases. Deterministic from `seed` on every platform; every
/// sentence of either side appears once in the whole corpus. `pairs`, from 3 to 500,000, counts all
/// three splits (95 % / 2.5 % / 2.5 %, at least one each). One in ten of the combinations adjective +
/// noun and verb + object is missing from `train`; every other pair of `validation` and `test` has
/// such a combination. Throws Error on a number out of range.
Captions generate_captions(int64_t pairs = 20000, uint64_t seed = 1);

}  // namespace remnant::app
