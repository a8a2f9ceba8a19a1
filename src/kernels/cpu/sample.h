#pragma once

// Policy sampled: weights of keys for a tile of query rows, gathered while the forward visits them, and the
// draw.

#include "kernels/cpu/rows.h"
#include "kernels/cpu/tiles.h"

#include <algorithm>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

// Squares of a tile's weights: the sum over the rows of (exp(z - maximum) / sum)^2, as these stand when the
// tile is visited. What later tiles add to a row's sum is made good for the tile as a whole: `mass` rows hold
// the tile's own sums of squares, and `mass_maximum` what they are relative to.
template <typename T>
void weigh_tile(const T* scores, int64_t stride, int64_t count, int64_t rows, const T* maximum, const T* sum,
                T* inverse, T* weights, T* mass, T* mass_maximum) {
  constexpr int width = kWidth<T>;
  for (int64_t r = 0; r < stride; ++r) inverse[r] = r < rows && sum[r] != 0 ? T(1) / sum[r] : T(0);
  for (int64_t j = 0; j < count; ++j) {
    const T* const row = scores + j * stride;
    Vector<T> total{};
    for (int64_t r = 0; r < stride; r += width) {
      const Vector<T> p = load(row + r) * load(inverse + r);
      total += p * p;
    }
    weights[j] = add_lanes<T>(total);
  }
  for (int64_t r = 0; r < stride; r += width) {
    Vector<T> total{};
    for (int64_t j = 0; j < count; ++j) {
      const Vector<T> p = load(scores + j * stride + r);
      total += p * p;
    }
    store(mass + r, total);
    store(mass_maximum + r, load(maximum + r));
  }
}

// A tile's weights from their squares, scaled to the tile's true sum of p^2 now that lse is known.
template <typename T>
void settle_weights(const T* mass, const T* mass_maximum, const T* lse, int64_t rows, T* weights,
                    int64_t count) {
  double share = 0, raw = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (mass[r] == 0) continue;  // nothing in this tile: what it would be relative to is not known
    const auto p = static_cast<double>(exponential(mass_maximum[r] - lse[r]));
    share += static_cast<double>(mass[r]) * p * p;
  }
  for (int64_t j = 0; j < count; ++j) raw += static_cast<double>(weights[j]);
  const auto factor = static_cast<T>(std::sqrt(raw > 0 ? share / raw : share));
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) weights[j] = std::sqrt(weights[j]) * factor;
}

// A number in (0, 1); see kernels/philox.h.
inline double tile_uniform(const Seed& seed, uint32_t head, uint32_t tile) {
  Words words[4];
  philox_rows(seed, Stream::rounding, 0, tile, head, words);
  const uint64_t x = words[0][0] & 0xffffffffu, y = words[1][0] & 0xffffffffu;
  return (static_cast<double>(x << 20 | y >> 12) + 0.5) * 0x1p-52;
}

// Draws `slots` keys by systematic sampling with probabilities min(1, c w): keys ascending in `drawn`, -1 in
// unused slots, and the inverse of each probability.
template <typename T>
void draw_keys(T* weights, int64_t keys, int64_t slots, double uniform, int32_t* drawn, T* inverse) {
  double total = 0;
  int64_t positive = 0;
  for (int64_t j = 0; j < keys; ++j) {
    total += static_cast<double>(weights[j]);
    positive += weights[j] > 0 ? 1 : 0;
  }
  if (!(total < std::numeric_limits<double>::infinity())) {  // NaN must show in the gradient: any keys do
    for (int64_t j = 0; j < keys; ++j) weights[j] = 1;
    total = static_cast<double>(keys);
    positive = keys;
  }
  int64_t used = 0;
  const auto take = [&](int64_t j, double probability) {
    drawn[used] = static_cast<int32_t>(j);
    inverse[used++] = static_cast<T>(1 / probability);
  };
  if (positive <= slots) {
    for (int64_t j = 0; j < keys; ++j) {
      if (weights[j] > 0) take(j, 1);
    }
  } else {
    // Water-filling: what reaches the mean of the rest is certain, until nothing more does.
    double rest = total, bound = total / static_cast<double>(slots);
    int64_t certain = 0;
    for (int64_t before = -1; certain != before && certain < slots;) {
      before = certain;
      certain = 0;
      rest = 0;
      for (int64_t j = 0; j < keys; ++j) {
        const auto w = static_cast<double>(weights[j]);
        certain += w >= bound ? 1 : 0;
        rest += w >= bound ? 0.0 : w;
      }
      if (certain < slots) bound = rest / static_cast<double>(slots - certain);
    }
    int64_t demoted = -1;
    if (certain >= slots) {
      // The rest is below rounding. One draw is left to it, or its keys could never be drawn.
      for (int64_t j = 0; j < keys; ++j) {
        if (static_cast<double>(weights[j]) >= bound && (demoted < 0 || weights[j] <= weights[demoted]))
          demoted = j;
      }
      rest += static_cast<double>(weights[demoted]);
      certain = slots - 1;
    }
    const double scale = static_cast<double>(slots - certain) / rest;
    double reached = 0, point = uniform;
    for (int64_t j = 0; j < keys; ++j) {
      const auto w = static_cast<double>(weights[j]);
      if (w >= bound && j != demoted) {
        take(j, 1);
        continue;
      }
      const double probability = std::min(1.0, w * scale);
      reached += probability;
      if (reached > point && used < slots) {
        take(j, probability);
        point += 1;
      }
    }
  }
  for (; used < slots; ++used) {
    drawn[used] = -1;
    inverse[used] = 0;
  }
}

// What masks leave of the drawn keys' scores [slots][rows], and their dropout.
template <typename T>
void mask_drawn(const AttentionProblem<T>& problem, const Block& block, const int32_t* drawn, int64_t count,
                T* scores) {
  const int64_t stride = block.padded;
  const MaskView<T>& mask = problem.mask;
  for (int64_t s = 0; s < count; ++s) {
    T* const row = scores + s * stride;
    const int64_t key = drawn[s];
    const int64_t offset =
        block.b * mask.batch + block.h * mask.head + block.first * mask.row + key * mask.column;
    if (mask.kind == MaskKind::boolean) {
      const auto* may = static_cast<const uint8_t*>(mask.data) + offset;
      for (int64_t r = 0; r < block.rows; ++r) {
        if (may[r * mask.row] == 0) row[r] = kNothing<T>;
      }
    } else if (mask.kind == MaskKind::additive) {
      const auto* bias = static_cast<const T*>(mask.data) + offset;
      for (int64_t r = 0; r < block.rows; ++r) row[r] += bias[r * mask.row];
    }
    cut_key(problem, block, key, row);
  }
}

// In place: scores to D p / probability, products (g v^T) to dz. Null products: only D p is wanted.
template <bool kDrop, typename T>
void gradient_drawn(const AttentionProblem<T>& problem, const Block& block, const int32_t* drawn,
                    const T* inverse, int64_t count, const T* lse, const T* delta, T* scores, T* products) {
  constexpr int width = kWidth<T>;
  const int64_t stride = block.padded;
  const T keep_scale = static_cast<T>(dropout_keep_scale(problem.drop_threshold));
  for (int64_t r = 0; r < stride; r += width) {
    const Vector<T> base = load(lse + r);
    const Vector<T> mean = load(delta + r);
    Vector<T> factors[kDropoutColumns];
    int64_t columns = -1;
    for (int64_t s = 0; s < count; ++s) {
      const int64_t offset = s * stride + r;
      const Vector<T> p = exponential_of_nonpositive(load(scores + offset) - base) * inverse[s];
      Vector<T> factor{};
      if constexpr (kDrop) {
        if (drawn[s] / kDropoutColumns != columns) {
          columns = drawn[s] / kDropoutColumns;
          dropout_factors(problem.seed, problem.drop_threshold, keep_scale, static_cast<uint32_t>(columns),
                          static_cast<uint32_t>(block.first + r), block.head, factors);
        }
        factor = factors[drawn[s] % kDropoutColumns];
      }
      if (products != nullptr) {
        const Vector<T> a = load(products + offset);
        store(products + offset, p * ((kDrop ? a * factor : a) - mean));
      }
      store(scores + offset, kDrop ? p * factor : p);
    }
  }
}

// D p from p, in place: for policies that need p as it is in between.
template <typename T>
void drop_tile(T* scores, int64_t stride, int64_t count, const TileDropout<T>& drop) {
  constexpr int width = kWidth<T>;
  for (int64_t r = 0; r < stride; r += width) {
    for (int64_t j = 0; j < count; j += kDropoutColumns) {
      Vector<T> factors[kDropoutColumns];
      dropout_factors(*drop.seed, drop.threshold, drop.keep_scale,
                      drop.block + static_cast<uint32_t>(j / kDropoutColumns),
                      drop.row + static_cast<uint32_t>(r), drop.head, factors);
#pragma GCC unroll 8
      for (int e = 0; e < kDropoutColumns; ++e) {
        T* const at = scores + (j + e) * stride + r;
        store(at, load(at) * factors[e]);
      }
    }
  }
}

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
