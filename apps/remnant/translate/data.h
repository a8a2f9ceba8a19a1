#pragma once

#include "common/batches.h"
#include "common/text.h"

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace remnant::app::translate {

/// Where the sentences come from.
struct CorpusSource {
  std::string data;  ///< a folder, or "captions" for the generated corpus
  std::string source_language = "de", target_language = "en";
  int64_t pairs = 20000;  ///< of the generated corpus
};

struct Corpus {
  ParallelText train, validation, test;
};

Corpus load_corpus(const CorpusSource& from);

/// One split only: "train", "val" or "test". Throws UsageError on any other name.
ParallelText load_split(const CorpusSource& from, const std::string& split);

/// The words of each sentence.
std::vector<std::vector<std::string>> tokenize_all(const std::vector<std::string>& sentences,
                                                   const std::string& locale);

/// Sentences as numbers, <s> and </s> included.
struct Encoded {
  std::vector<std::vector<int64_t>> sentences;
  int64_t truncated = 0;  ///< sentences cut to `max_length`
  int64_t words = 0, unknown = 0;
};

/// max_length counts <s> and </s>. A longer sentence loses its end and keeps its </s>.
Encoded encode_all(const std::vector<std::vector<std::string>>& sentences, const Vocabulary& vocabulary,
                   int64_t max_length);

/// A split ready for the model.
struct Pairs {
  std::vector<std::vector<int64_t>> source, target;
  std::vector<std::string> source_text, target_text;  ///< as read
  std::vector<std::string> target_words;  ///< lower-cased words joined by a space: the BLEU reference
  int64_t truncated = 0;
  int64_t size() const { return static_cast<int64_t>(source.size()); }
};

/// Words of both sides are given when the caller has them already (the training split).
Pairs encode_pairs(const ParallelText& text, const std::vector<std::vector<std::string>>& source_words,
                   const std::vector<std::vector<std::string>>& target_words,
                   const Vocabulary& source_vocabulary, const Vocabulary& target_vocabulary,
                   int64_t max_length);

/// Padded on the right to the longest sentence of the batch.
struct Batch {
  at::Tensor source;          ///< [B, S] int64
  at::Tensor source_padding;  ///< [B, S] bool, true = padding; undefined when there is none
  at::Tensor target;          ///< [B, T] int64, <s> .. </s>
  int64_t source_tokens = 0;  ///< without padding
  int64_t predicted = 0;      ///< target positions that count in the loss: all but <s> and padding
};

Batch make_batch(const Pairs& pairs, const std::vector<int64_t>& rows);

/// Every other sentence of the batches, and the others: halves of like lengths where a batch is sorted. One
/// is empty when there is only one sentence.
std::array<std::vector<Batch>, 2> halves(const std::vector<Batch>& batches);

/// Rows grouped into batches of sentences of similar length, in random order; a function of `seed`
/// and `epoch` alone.
std::vector<std::vector<int64_t>> batches_by_length(const Pairs& pairs, int64_t batch_size, uint64_t seed,
                                                    int64_t epoch);

/// Share of the softmax elements of one epoch that a curve of `m` highest and `m` lowest evicts:
/// those at ranks m+1 .. n-m of a row with n valid keys, over all valid elements (encoder, causal
/// decoder and cross attention, padding not counted).
double evicted_share(const Pairs& pairs, int64_t m);

}  // namespace remnant::app::translate
