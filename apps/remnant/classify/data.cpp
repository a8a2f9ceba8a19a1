#include "classify/data.h"

#include "classify/reviews.h"
#include "common/batches.h"
#include "common/error.h"

#include <ATen/ops/tensor.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace remnant::app::classify {
namespace {

namespace fs = std::filesystem;

/// One in so many texts is held out for validation, and one for the test.
constexpr int64_t kHeldOut = 10;
/// More different labels than this are texts in the label's place.
constexpr size_t kMostLabels = 1000;

std::string quoted(const fs::path& file) { return "'" + file.string() + "'"; }

std::string listed(const std::vector<std::string>& labels) {
  std::string list;
  for (size_t i = 0; i < labels.size() && i < 10; ++i) list += (i > 0 ? ", " : "") + labels[i];
  return labels.size() > 10 ? list + ", ..." : list;
}

bool is_tsv(const fs::path& file) {
  const std::string name = file.filename().string();
  return name.ends_with(".tsv") || name.ends_with(".tsv.gz");
}

/// The file of a folder for the first of `stems` that has one.
std::optional<fs::path> find_split(const fs::path& folder, const std::set<std::string>& names,
                                   const std::vector<std::string>& stems) {
  for (const std::string& stem : stems) {
    for (const char* ending : {".tsv", ".tsv.gz", ".txt", ".txt.gz"}) {
      if (names.count(stem + ending) > 0) return folder / (stem + ending);
    }
  }
  return std::nullopt;
}

/// Moves the texts at `place` of every kHeldOut out of `texts`.
LabelledTexts hold_out(LabelledTexts& texts, int64_t place) {
  LabelledTexts held, left;
  left.file = held.file = texts.file;
  left.skipped_empty = texts.skipped_empty;
  left.repaired = texts.repaired;
  for (int64_t i = 0; i < texts.size(); ++i) {
    LabelledTexts& to = i % kHeldOut == place ? held : left;
    to.labels.push_back(std::move(texts.labels[i]));
    to.texts.push_back(std::move(texts.texts[i]));
    to.lines.push_back(texts.lines[i]);
  }
  texts = std::move(left);
  return held;
}

Corpus generated_corpus(int64_t count) {
  const std::vector<Review> reviews = generate_reviews(count);
  Corpus corpus;
  for (int64_t i = 0; i < count; ++i) {
    LabelledTexts& to = i < count * 8 / 10   ? corpus.train
                        : i < count * 9 / 10 ? corpus.validation
                                             : corpus.test;
    to.labels.push_back(reviews[i].label);
    to.texts.push_back(reviews[i].text);
    to.lines.push_back(i + 1);
  }
  return corpus;
}

std::optional<int64_t> whole_number(const std::string& text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

LabelledTexts read_labelled(const fs::path& file) {
  const std::string_view separators = is_tsv(file) ? "\t" : "\t ";
  LabelledTexts texts;
  texts.file = file;
  int64_t number = 0;
  for (const std::string& line : read_damaged_lines(file, texts.repaired)) {
    ++number;
    if (!has_word(line)) {
      ++texts.skipped_empty;
      continue;
    }
    const size_t end = line.find_first_of(separators);
    if (end == std::string::npos || !has_word(line.substr(0, end))) {
      throw Error("line " + std::to_string(number) + " of " + quoted(file) + " should be a label, " +
                  (is_tsv(file) ? "a tab" : "a tab or space") + " and a text");
    }
    std::string text = line.substr(end + 1);
    if (!has_word(text)) {
      ++texts.skipped_empty;
      continue;
    }
    texts.labels.push_back(line.substr(0, end));
    texts.texts.push_back(std::move(text));
    texts.lines.push_back(number);
  }
  if (texts.texts.empty()) throw Error(quoted(file) + " holds no labelled text");
  return texts;
}

Corpus load_corpus(const DataSource& from) {
  if (from.data == "generated") return generated_corpus(from.texts);
  const fs::path path = from.data;
  Corpus corpus;
  std::optional<fs::path> validation, test;
  if (fs::is_directory(path)) {
    const std::set<std::string> names = file_names(path);
    const auto train = find_split(path, names, {"train"});
    if (!train) {
      throw Error("no train.tsv or train.txt (or .gz) in " + quoted(path) + "; " + folder_listing(names));
    }
    validation = find_split(path, names, {"val", "valid", "dev"});
    test = find_split(path, names, {"test"});
    corpus.train = read_labelled(*train);
  } else {
    corpus.train = read_labelled(path);
  }
  corpus.held_out_validation = !validation;
  corpus.held_out_test = !test;
  if ((!validation || !test) && corpus.train.size() < 2 * kHeldOut) {
    throw Error(quoted(corpus.train.file) + " holds " + std::to_string(corpus.train.size()) +
                " texts, expected at least " + std::to_string(2 * kHeldOut) +
                ": some are held out, as there is no file of their own for validation and test");
  }
  // The test's first: which texts it has does not depend on whether there is a validation file.
  corpus.test = test ? read_labelled(*test) : hold_out(corpus.train, kHeldOut - 1);
  corpus.validation = validation ? read_labelled(*validation) : hold_out(corpus.train, kHeldOut - 2);
  return corpus;
}

std::vector<std::string> labels_of(const LabelledTexts& texts) {
  const std::set<std::string> found(texts.labels.begin(), texts.labels.end());
  std::vector<std::string> labels(found.begin(), found.end());
  if (labels.size() < 2) {
    throw Error(quoted(texts.file) + " has the label " + labels.front() +
                " on every text, expected two labels at least");
  }
  if (labels.size() > kMostLabels) {
    throw Error(quoted(texts.file) + " has " + std::to_string(labels.size()) +
                " different labels, expected at most " + std::to_string(kMostLabels) +
                ": each line should begin with its label");
  }
  if (std::all_of(labels.begin(), labels.end(),
                  [](const std::string& x) { return whole_number(x).has_value(); })) {
    std::stable_sort(labels.begin(), labels.end(), [](const std::string& a, const std::string& b) {
      return *whole_number(a) < *whole_number(b);
    });
  }
  return labels;
}

std::vector<std::vector<std::string>> words_of(const std::vector<std::string>& texts,
                                               const std::string& language) {
  std::vector<std::vector<std::string>> words;
  words.reserve(texts.size());
  for (const std::string& text : texts) words.push_back(tokenize(text, language));
  return words;
}

Examples encode(const LabelledTexts& texts, const std::vector<std::vector<std::string>>& words,
                const Vocabulary& vocabulary, const std::vector<std::string>& labels, int64_t max_length) {
  std::map<std::string, int64_t> numbers;
  for (const std::string& label : labels) numbers.emplace(label, static_cast<int64_t>(numbers.size()));
  Examples examples;
  for (size_t i = 0; i < words.size(); ++i) {
    std::vector<int64_t> ids = vocabulary.encode(words[i]);
    // What is classified needs neither begin nor end.
    ids.pop_back();
    ids.erase(ids.begin());
    examples.words += static_cast<int64_t>(ids.size());
    examples.unknown += std::count(ids.begin(), ids.end(), Vocabulary::unknown);
    if (static_cast<int64_t>(ids.size()) > max_length) {
      ids.resize(max_length);
      ++examples.truncated;
    }
    examples.texts.push_back(std::move(ids));
    if (labels.empty()) continue;
    const auto found = numbers.find(texts.labels[i]);
    if (found == numbers.end()) {
      throw Error("line " + std::to_string(texts.lines[i]) + " of " + quoted(texts.file) + " has the label " +
                  texts.labels[i] + ", which no training text has: expected one of " + listed(labels));
    }
    examples.labels.push_back(found->second);
  }
  return examples;
}

Batch make_batch(const Examples& examples, const std::vector<int64_t>& rows) {
  Batch batch;
  batch.ids = pad(examples.texts, rows);
  batch.padding = padding_of(batch.ids);
  std::vector<int64_t> labels;
  for (const int64_t row : rows) {
    batch.tokens += static_cast<int64_t>(examples.texts[row].size());
    if (!examples.labels.empty()) labels.push_back(examples.labels[row]);
  }
  if (!labels.empty()) batch.labels = at::tensor(labels);
  return batch;
}

}  // namespace remnant::app::classify
