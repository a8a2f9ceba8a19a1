#pragma once

#include "text.h"

#include <cstdint>
#include <string>

namespace remnant::app {

struct Captions {
  ParallelText train, validation, test;  ///< source German, target English
};

/// A German-English corpus of image captions generated from a grammar: gender, number and case
/// agreement, adjective endings, verb position (second, and last in subordinate clauses), separable
/// verbs, compounds, prepositions with two cases. Deterministic from `seed`; no sentence (either
/// side) appears in two splits. `pairs` counts all three splits (95 % / 2.5 % / 2.5 %).
Captions generate_captions(int64_t pairs = 20000, uint64_t seed = 1);

}  // namespace remnant::app
