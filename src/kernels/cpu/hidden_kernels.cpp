// The hidden layer of a feed-forward block: bias, activation and dropout in one pass, and what the
// backward needs of them in another.

#include "kernels/cpu/elements.h"
#include "kernels/cpu/variants.h"

#include <cmath>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

constexpr int64_t kColumns = 512;  // whose random bits are drawn at once

// 0.5 erfc(-x / sqrt 2), with a relative error of about 1e-7 also far down the left tail. Chebyshev fit of
// erfc: Press et al., Numerical Recipes, 6.2.
REMNANT_ALWAYS_INLINE Vector<float> normal_cdf(Vector<float> x) {
  const Vector<float> y = x * 0.70710678118654752f;
  const Vector<float> z = y < 0.0f ? -y : y;
  const Vector<float> t = 1.0f / (z * 0.5f + 1.0f);
  Vector<float> p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const Vector<float> half_tail = t * 0.5f * exponential_of_nonpositive(p - z * z);
  return y > 0.0f ? 1.0f - half_tail : half_tail;
}

REMNANT_ALWAYS_INLINE Vector<double> normal_cdf(Vector<double> x) {
  Vector<double> y{};
  for (int l = 0; l < kWidth<double>; ++l) y[l] = 0.5 * std::erfc(-x[l] * 0.70710678118654752440);
  return y;
}

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> activate(Vector<T> x, HiddenActivation activation) {
  // NaN passes, as the comparison is false for it.
  if (activation == HiddenActivation::relu) return x < T(0) ? Vector<T>{} : x;
  return x * normal_cdf(x);
}

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> slope(Vector<T> x, Vector<T> cdf) {
  return cdf + x * T(0.39894228040143267794) * exponential_of_nonpositive(x * x * T(-0.5));
}

// One row through `each(column, count, bias, factor)`, a vector at a time, with count lanes in use.
template <typename T, typename Each>
REMNANT_ALWAYS_INLINE void for_row(const HiddenRows<T>& rows, int64_t row, const Each& each) {
  constexpr int64_t width = kWidth<T>;
  alignas(64) uint16_t bits[kColumns];
  for (int64_t first = 0; first < rows.columns; first += kColumns) {
    const int64_t columns = rows.columns - first < kColumns ? rows.columns - first : kColumns;
    if (rows.threshold > 0) {
      dropout_bits(rows.seed, 0, rows.first_row + row, 1, first / kDropoutColumns,
                   (columns + kDropoutColumns - 1) / kDropoutColumns, bits);
    }
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t count = columns - j < width ? columns - j : width;
      const Vector<T> factor =
          rows.threshold > 0 ? dropout_factor<T>(bits + j, rows.threshold, rows.keep_scale) : broadcast(T(1));
      const T* bias = rows.bias + first + j;
      const Vector<T> b = rows.bias == nullptr ? Vector<T>{}
                          : count == width     ? load(bias)
                                               : load_part(bias, count);
      each(first + j, count, b, factor);
    }
  }
}

}  // namespace

template <typename T>
void hidden_forward(const HiddenRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* const hidden = rows.hidden + i * rows.columns;
    for_row(rows, i, [&](int64_t j, int64_t count, Vector<T> bias, Vector<T> factor) {
      if (count == kWidth<T>) {
        store(hidden + j, activate<T>(load(hidden + j) + bias, rows.activation) * factor);
      } else {
        store_part(hidden + j, activate<T>(load_part(hidden + j, count) + bias, rows.activation) * factor,
                   count);
      }
    });
  }
}

template <typename T>
void hidden_backward(const HiddenRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* const hidden = rows.hidden + i * rows.columns;
    T* const grad = rows.grad + i * rows.columns;
    for_row(rows, i, [&](int64_t j, int64_t count, Vector<T> bias, Vector<T> factor) {
      const bool whole = count == kWidth<T>;
      const Vector<T> x = (whole ? load(hidden + j) : load_part(hidden + j, count)) + bias;
      const Vector<T> g = whole ? load(grad + j) : load_part(grad + j, count);
      Vector<T> y, dx;
      if (rows.activation == HiddenActivation::relu) {
        y = activate<T>(x, HiddenActivation::relu) * factor;
        dx = x <= T(0) ? Vector<T>{} : g * factor;
      } else {
        const Vector<T> cdf = normal_cdf(x);
        y = x * cdf * factor;
        dx = g * factor * slope<T>(x, cdf);
      }
      if (whole) {
        store(hidden + j, y);
        store(grad + j, dx);
      } else {
        store_part(hidden + j, y, count);
        store_part(grad + j, dx, count);
      }
    });
  }
}

template void hidden_forward(const HiddenRows<float>&, int64_t, int64_t);
template void hidden_forward(const HiddenRows<double>&, int64_t, int64_t);
template void hidden_backward(const HiddenRows<float>&, int64_t, int64_t);
template void hidden_backward(const HiddenRows<double>&, int64_t, int64_t);

}  // namespace remnant::kernels::REMNANT_VARIANT
