#pragma once

#include "common/bleu.h"
#include "translate/data.h"
#include "translate/model.h"

#include <cstdint>
#include <string>
#include <vector>

namespace remnant::app::translate {

/// Translations of source [B, S] (ids without <s> and </s>), by beam search with cached keys and
/// values; a beam of 1 is greedy decoding. A hypothesis' score is its log-probability a word. The
/// model must be in evaluation mode.
std::vector<std::vector<int64_t>> translate_batch(TransformerImpl& model, const at::Tensor& source,
                                                  const at::Tensor& padding, int64_t beam);

/// Translations of any number of sentences (<s> .. </s>), in their order; batches by length.
std::vector<std::vector<std::string>> translate(TransformerImpl& model,
                                                const std::vector<std::vector<int64_t>>& sentences,
                                                const Vocabulary& target_vocabulary, int64_t beam,
                                                int64_t batch_size);

/// exp of the mean cross-entropy a target word, </s> included.
double perplexity(TransformerImpl& model, const Pairs& pairs, int64_t batch_size);

struct Scores {
  double perplexity = 0;
  Bleu tokens;       ///< on lower-cased words
  Bleu detokenised;  ///< on text, lower-cased by the metric
};

/// Leaves the model in evaluation mode.
Scores evaluate(TransformerImpl& model, const Pairs& pairs, const Vocabulary& target_vocabulary, int64_t beam,
                int64_t batch_size);

}  // namespace remnant::app::translate
