#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace remnant::app {

/// How a model labels examples.
struct Scores {
  double loss = 0;                              ///< mean cross-entropy an example
  std::vector<std::vector<int64_t>> confusion;  ///< [true label][label given]
  double accuracy() const;
};

/// The label that a model gives each example, and its probability.
class Answers {
 public:
  explicit Answers(int64_t count) : labels(count), probabilities(count) {}

  /// Of the examples `rows`: logits [rows, labels], and `truth` [rows] int64, undefined where not known.
  void add(const std::vector<int64_t>& rows, const at::Tensor& logits, const at::Tensor& truth);
  /// Against the labels of all examples, all of which add() was given.
  Scores scores(const std::vector<int64_t>& truth, int64_t label_count) const;

  std::vector<int64_t> labels;
  std::vector<double> probabilities;

 private:
  double loss_ = 0;  ///< summed
};

/// A header and a row a label, for print_table.
std::vector<std::vector<std::string>> confusion_table(const std::vector<std::string>& labels,
                                                      const Scores& scores);

}  // namespace remnant::app
