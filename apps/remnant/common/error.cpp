#include "error.h"

#include <algorithm>

namespace remnant::app {
namespace {

std::string lower_ascii(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return lower;
}

size_t length_without_dashes(std::string_view option) {
  const size_t first = option.find_first_not_of('-');
  return first == std::string_view::npos ? 0 : option.size() - first;
}

// Insertions, deletions, substitutions and swaps of neighbours, each at a cost of one.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> before_last(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    std::swap(before_last, last);
    std::swap(last, row);
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        row[j] = std::min(row[j], before_last[j - 2] + 1);
      }
    }
  }
  return row[b.size()];
}

}  // namespace

std::string nearest(std::string_view word, const std::vector<std::string>& candidates) {
  const std::string lower = lower_ascii(word);
  std::string best;
  size_t best_distance = 0;
  for (const std::string& candidate : candidates) {
    // The dashes of an option say nothing about which one was meant, so they do not widen the limit.
    const size_t length = std::max(length_without_dashes(word), length_without_dashes(candidate));
    const size_t limit = std::max<size_t>(1, (length + 1) / 3);
    const size_t distance = edit_distance(lower, lower_ascii(candidate));
    if (distance > limit || distance >= length) continue;
    if (best.empty() || distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

}  // namespace remnant::app
