#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace remnant::app {

/// Random numbers of an epoch, from both numbers: seed + epoch would make epoch 1 of seed 1 the epoch 0 of
/// seed 2.
std::mt19937_64 epoch_random(uint64_t seed, int64_t epoch);

// std::shuffle and std::uniform_int_distribution may differ between standard libraries.
template <typename T>
void shuffle(std::vector<T>& items, std::mt19937_64& random) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random() % i]);
}

/// Rows in groups of `size`, in their order; the last group may be smaller.
std::vector<std::vector<int64_t>> cut(const std::vector<int64_t>& rows, int64_t size);

/// Every other item, and the others: two parts of like lengths where the items are sorted. `turn` decides
/// which part gets the first item, and with it the odd one: batches take turns.
template <typename T>
std::array<std::vector<T>, 2> alternate(const std::vector<T>& items, size_t turn) {
  std::array<std::vector<T>, 2> parts;
  for (const T& item : items) parts[turn++ % 2].push_back(item);
  return parts;
}

/// Rows grouped into batches of similar length, in random order; a function of `seed` and `epoch` alone.
std::vector<std::vector<int64_t>> batches_by_length(const std::vector<int64_t>& lengths, int64_t batch_size,
                                                    uint64_t seed, int64_t epoch);

/// The same without randomness, shortest first: for evaluation.
std::vector<std::vector<int64_t>> sorted_batches(const std::vector<std::vector<int64_t>>& sentences,
                                                 int64_t batch_size);

/// [rows, longest], filled up with <pad>.
at::Tensor pad(const std::vector<std::vector<int64_t>>& sentences, const std::vector<int64_t>& rows);

/// true where `ids` is padding; undefined when it is nowhere, which spares the mask.
at::Tensor padding_of(const at::Tensor& ids);

}  // namespace remnant::app
