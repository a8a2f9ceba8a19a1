#pragma once

#include "common/text.h"

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace remnant::app::classify {

/// Where the texts come from.
struct DataSource {
  std::string data;      ///< a folder, a file, or "generated"
  int64_t texts = 4000;  ///< of the generated reviews
};

/// Texts and their labels as read.
struct LabelledTexts {
  std::vector<std::string> labels, texts;
  std::vector<int64_t> lines;  ///< where each was read
  std::filesystem::path file;  ///< from which; empty for generated texts
  int64_t skipped_empty = 0;   ///< lines whose text has no word
  int64_t repaired = 0;        ///< lines with bytes that are not UTF-8
  int64_t size() const { return static_cast<int64_t>(texts.size()); }
};

/// `label TAB text` a line, plain or gzip; a file whose name does not end in .tsv may have a space instead.
/// Throws Error on a missing or damaged file, more lines that
/// are not UTF-8 than one in a thousand, a line without label, a file without texts.
LabelledTexts read_labelled(const std::filesystem::path& file);

struct Corpus {
  LabelledTexts train, validation, test;
  bool held_out_validation = false, held_out_test = false;
};

/// A folder's train, val (also valid, dev) and test as .tsv or .txt, gzip or not. Where there is no
/// validation or test file, and for a single file, every tenth text of the training set is held out for each
/// of them. Throws Error.
Corpus load_corpus(const DataSource& from);

/// The labels in order: by value where all are whole numbers, else by their bytes. Throws Error when there
/// are fewer than 2, or more than could be meant.
std::vector<std::string> labels_of(const LabelledTexts& texts);

/// Texts as numbers.
struct Examples {
  std::vector<std::vector<int64_t>> texts;
  std::vector<int64_t> labels;
  int64_t truncated = 0;  ///< texts cut to the longest length
  int64_t words = 0, unknown = 0;
  int64_t size() const { return static_cast<int64_t>(texts.size()); }
};

/// The words of each text.
std::vector<std::vector<std::string>> words_of(const std::vector<std::string>& texts,
                                               const std::string& language);

/// A longer text than `max_length` words loses its end. `texts` has no label where `labels` is empty. Throws
/// Error on a label that `labels` lacks.
Examples encode(const LabelledTexts& texts, const std::vector<std::vector<std::string>>& words,
                const Vocabulary& vocabulary, const std::vector<std::string>& labels, int64_t max_length);

/// Padded on the right to the longest text of the batch.
struct Batch {
  at::Tensor ids;      ///< [B, N] int64
  at::Tensor padding;  ///< [B, N] bool, true = padding; undefined when there is none
  at::Tensor labels;   ///< [B] int64; undefined without labels
  int64_t tokens = 0;  ///< without padding
};

Batch make_batch(const Examples& examples, const std::vector<int64_t>& rows);

}  // namespace remnant::app::classify
