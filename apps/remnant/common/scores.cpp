#include "common/scores.h"

#include <ATen/ops/log_softmax.h>

#include <cmath>
#include <cstddef>
#include <numeric>

namespace remnant::app {

double Scores::accuracy() const {
  int64_t right = 0, all = 0;
  for (size_t i = 0; i < confusion.size(); ++i) {
    right += confusion[i][i];
    all = std::accumulate(confusion[i].begin(), confusion[i].end(), all);
  }
  return static_cast<double>(right) / static_cast<double>(all);
}

void Answers::add(const std::vector<int64_t>& rows, const at::Tensor& logits, const at::Tensor& truth) {
  const at::Tensor log_p = at::log_softmax(logits.to(at::kDouble), -1);
  const auto [best, label] = log_p.max(1);
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto place = static_cast<int64_t>(i);
    labels[rows[i]] = label[place].item<int64_t>();
    probabilities[rows[i]] = std::exp(best[place].item<double>());
  }
  if (truth.defined()) loss_ -= log_p.gather(1, truth.unsqueeze(1)).sum().item<double>();
}

Scores Answers::scores(const std::vector<int64_t>& truth, int64_t label_count) const {
  Scores scores{loss_ / static_cast<double>(labels.size()),
                std::vector<std::vector<int64_t>>(label_count, std::vector<int64_t>(label_count, 0))};
  for (size_t i = 0; i < labels.size(); ++i) ++scores.confusion[truth[i]][labels[i]];
  return scores;
}

std::vector<std::vector<std::string>> confusion_table(const std::vector<std::string>& labels,
                                                      const Scores& scores) {
  std::vector<std::vector<std::string>> table{{"true \\ given"}};
  table.front().insert(table.front().end(), labels.begin(), labels.end());
  for (size_t i = 0; i < labels.size(); ++i) {
    table.push_back({labels[i]});
    for (const int64_t count : scores.confusion[i]) table.back().push_back(std::to_string(count));
  }
  return table;
}

}  // namespace remnant::app
