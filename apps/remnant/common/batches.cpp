#include "common/batches.h"

#include "common/text.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>

#include <algorithm>
#include <numeric>

namespace remnant::app {
namespace {

/// Batches are cut from pools of this many batches, sorted: long enough that a batch holds one
/// length, short enough that a batch's company changes from epoch to epoch.
constexpr int64_t kPool = 50;

}  // namespace

std::mt19937_64 epoch_random(uint64_t seed, int64_t epoch) {
  std::seed_seq sequence{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                         static_cast<uint32_t>(epoch)};
  return std::mt19937_64(sequence);
}

std::vector<std::vector<int64_t>> cut(const std::vector<int64_t>& rows, int64_t size) {
  std::vector<std::vector<int64_t>> batches;
  const int64_t total = static_cast<int64_t>(rows.size());
  for (int64_t first = 0; first < total; first += size) {
    batches.emplace_back(rows.begin() + first, rows.begin() + std::min(first + size, total));
  }
  return batches;
}

std::vector<std::vector<int64_t>> batches_by_length(const std::vector<int64_t>& lengths, int64_t batch_size,
                                                    uint64_t seed, int64_t epoch) {
  std::mt19937_64 random = epoch_random(seed, epoch);
  std::vector<int64_t> rows(lengths.size());
  std::iota(rows.begin(), rows.end(), 0);
  shuffle(rows, random);
  std::vector<std::vector<int64_t>> batches;
  for (std::vector<int64_t>& pool : cut(rows, kPool * batch_size)) {
    std::stable_sort(pool.begin(), pool.end(), [&](int64_t a, int64_t b) { return lengths[a] < lengths[b]; });
    for (std::vector<int64_t>& batch : cut(pool, batch_size)) batches.push_back(std::move(batch));
  }
  shuffle(batches, random);
  return batches;
}

std::vector<std::vector<int64_t>> sorted_batches(const std::vector<std::vector<int64_t>>& sentences,
                                                 int64_t batch_size) {
  std::vector<int64_t> rows(sentences.size());
  std::iota(rows.begin(), rows.end(), 0);
  std::stable_sort(rows.begin(), rows.end(),
                   [&](int64_t a, int64_t b) { return sentences[a].size() < sentences[b].size(); });
  return cut(rows, batch_size);
}

at::Tensor pad(const std::vector<std::vector<int64_t>>& sentences, const std::vector<int64_t>& rows) {
  size_t longest = 0;
  for (const int64_t row : rows) longest = std::max(longest, sentences[row].size());
  at::Tensor ids = at::empty({static_cast<int64_t>(rows.size()), static_cast<int64_t>(longest)}, at::kLong);
  int64_t* out = ids.mutable_data_ptr<int64_t>();
  for (const int64_t row : rows) {
    out = std::copy(sentences[row].begin(), sentences[row].end(), out);
    out = std::fill_n(out, longest - sentences[row].size(), Vocabulary::padding);
  }
  return ids;
}

at::Tensor padding_of(const at::Tensor& ids) {
  at::Tensor mask = at::eq(ids, Vocabulary::padding);
  return mask.any().item<bool>() ? mask : at::Tensor();
}

}  // namespace remnant::app
