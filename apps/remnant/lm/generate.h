#pragma once

#include "lm/model.h"

#include <cstdint>
#include <functional>
#include <vector>

namespace remnant::app::lm {

struct Sampling {
  int64_t length = 500;    ///< tokens to add
  double temperature = 1;  ///< 0: always the most likely token
  int64_t top_k = 0;       ///< draws from that many most likely tokens; 0: from all
  uint64_t seed = 1;
};

/// Continues `prompt`, which holds at least one token and at most the model's context, token by token with
/// cached keys and values; calls `emit` with each. When the context is full, the newer half of it stays and
/// is read anew. The model must be in evaluation mode. Throws Error on outputs that are not finite.
void generate(LanguageModelImpl& model, const std::vector<int64_t>& prompt, const Sampling& sampling,
              const std::function<void(int64_t token)>& emit);

}  // namespace remnant::app::lm
