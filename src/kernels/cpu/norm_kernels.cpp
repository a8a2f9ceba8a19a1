// LayerNorm and RMSNorm with what stands around them: dropout and the residual's addition. A row is read once
// into scratch that stays in the first-level cache; everything else works there. The backward gets by on the
// output, since the layer after it keeps that anyway: x^ = (y - bias) / weight, but for the columns that the
// caller kept aside because weight or bias hide x^ there.

#include "kernels/cpu/elements.h"
#include "kernels/cpu/variants.h"

#include <cmath>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

template <typename A>
struct NormScratch {
  A* values;
  uint16_t* bits;
  NormScratch(void* memory, int64_t columns)
      : values(static_cast<A*>(memory)),
        // Bits are written by the 64-bit word.
        bits(reinterpret_cast<uint16_t*>(values + (columns + 7) / 8 * 8)) {}
};

template <typename S>
void norm_forward_rows(const NormForward& p, int64_t begin, int64_t end, void* memory) {
  using A = Wide<S>;
  const int64_t n = p.columns;
  const NormScratch<A> scratch(memory, n);
  A* const values = scratch.values;
  const auto* const weight = static_cast<const A*>(p.weight);
  const auto* const bias = static_cast<const A*>(p.bias);
  const A keep_scale = static_cast<A>(dropout_keep_scale(p.drop_threshold));
  const A per_column = A(1) / static_cast<A>(n);
  for (int64_t i = begin; i < end; ++i) {
    const S* const x = static_cast<const S*>(p.x) + i * n;
    const S* const residual = p.residual != nullptr ? static_cast<const S*>(p.residual) + i * n : nullptr;
    S* const sum = p.sum != nullptr ? static_cast<S*>(p.sum) + i * n : nullptr;
    const uint16_t* const bits =
        p.drop_threshold > 0 ? random_flat(p.seed, Stream::dropout, i * n, n, scratch.bits) : nullptr;
    Vector<A> total{};
    each_vector<A>(n, [&](int64_t j, auto count) __attribute__((always_inline)) {
      Vector<A> v = load_count(x + j, count);
      if (bits != nullptr) v *= dropout_factor<A>(bits + j, p.drop_threshold, keep_scale);
      if (residual != nullptr) v += load_count(residual + j, count);
      if (sum != nullptr) store_count(sum + j, v, count);
      store_count(values + j, v, count);
      total += v;
    });
    const A mean = p.center ? add_lanes<A>(total) * per_column : A(0);
    Vector<A> squares{};
    each_vector<A>(n, [&](int64_t j, auto count) __attribute__((always_inline)) {
      Vector<A> v = load_count(values + j, count) - mean;
      if constexpr (std::is_same_v<decltype(count), int64_t>) {
        v = first_lanes<A>(count) ? v : Vector<A>{};
      }
      squares += v * v;
    });
    const A rstd = A(1) / std::sqrt(add_lanes<A>(squares) * per_column + static_cast<A>(p.eps));
    if (p.rstd != nullptr) static_cast<A*>(p.rstd)[i] = rstd;
    S* const y = static_cast<S*>(p.y) + i * n;
    each_vector<A>(n, [&](int64_t j, auto count) __attribute__((always_inline)) {
      const Vector<A> normalised = (load_count(values + j, count) - mean) * rstd;
      Vector<A> v = normalised;
      if (weight != nullptr) v *= load_count(weight + j, count);
      if (bias != nullptr) v += load_count(bias + j, count);
      store_count(y + j, v, count);
      store_count(values + j, normalised, count);
    });
    if (p.aside == nullptr) continue;
    A* const aside = static_cast<A*>(p.aside) + i * p.aside_count;
    if (p.aside_columns == nullptr) {
      std::memcpy(aside, values, static_cast<size_t>(n) * sizeof(A));
    } else {
      for (int64_t k = 0; k < p.aside_count; ++k) aside[k] = values[p.aside_columns[k]];
    }
  }
}

template <typename S>
void norm_backward_rows(const NormBackward& p, int64_t begin, int64_t end, void* memory) {
  using A = Wide<S>;
  const int64_t n = p.columns;
  const NormScratch<A> scratch(memory, n);
  A* const normalised = scratch.values;
  const auto* const weight = static_cast<const A*>(p.weight);
  const auto* const inverse = static_cast<const A*>(p.inverse_weight);
  const auto* const bias = static_cast<const A*>(p.bias);
  auto* const grad_weight = static_cast<A*>(p.grad_weight);
  auto* const grad_bias = static_cast<A*>(p.grad_bias);
  const A keep_scale = static_cast<A>(dropout_keep_scale(p.drop_threshold));
  const A per_column = A(1) / static_cast<A>(n);
  for (int64_t i = begin; i < end; ++i) {
    const S* const grad_y = static_cast<const S*>(p.grad_y) + i * n;
    const A* const aside = static_cast<const A*>(p.aside) + i * p.aside_count;
    if (p.y == nullptr) {
      std::memcpy(normalised, aside, static_cast<size_t>(n) * sizeof(A));
    } else {
      const S* const y = static_cast<const S*>(p.y) + i * n;
      each_vector<A>(n, [&](int64_t j, auto count) __attribute__((always_inline)) {
        Vector<A> v = load_count(y + j, count);
        if (bias != nullptr) v -= load_count(bias + j, count);
        if (inverse != nullptr) v *= load_count(inverse + j, count);
        store_count(normalised + j, v, count);
      });
      for (int64_t k = 0; k < p.aside_count; ++k) normalised[p.aside_columns[k]] = aside[k];
    }
    Vector<A> total{}, product{};
    each_vector<A>(n, [&](int64_t j, auto count) __attribute__((always_inline)) {
      Vector<A> g = load_count(grad_y + j, count);
      const Vector<A> v = load_count(normalised + j, count);
      if (grad_weight != nullptr) {
        store_count(grad_weight + j, load_count(grad_weight + j, count) + g * v, count);
      }
      if (grad_bias != nullptr) store_count(grad_bias + j, load_count(grad_bias + j, count) + g, count);
      if (weight != nullptr) g *= load_count(weight + j, count);
      total += g;
      product += g * v;
    });
    if (p.grad_residual == nullptr && p.grad_x == nullptr) continue;
    const A mean = p.center ? add_lanes<A>(total) * per_column : A(0);
    const A slope = add_lanes<A>(product) * per_column;
    const A rstd = static_cast<const A*>(p.rstd)[i];
    const S* const grad_sum = p.grad_sum != nullptr ? static_cast<const S*>(p.grad_sum) + i * n : nullptr;
    S* const grad_residual = p.grad_residual != nullptr ? static_cast<S*>(p.grad_residual) + i * n : nullptr;
    S* const grad_x = p.grad_x != nullptr ? static_cast<S*>(p.grad_x) + i * n : nullptr;
    const uint16_t* const bits = p.drop_threshold > 0 && grad_x != nullptr
                                     ? random_flat(p.seed, Stream::dropout, i * n, n, scratch.bits)
                                     : nullptr;
    each_vector<A>(n, [&](int64_t j, auto count) __attribute__((always_inline)) {
      Vector<A> g = load_count(grad_y + j, count);
      if (weight != nullptr) g *= load_count(weight + j, count);
      Vector<A> d = rstd * (g - mean - load_count(normalised + j, count) * slope);
      if (grad_sum != nullptr) d += load_count(grad_sum + j, count);
      if (grad_residual != nullptr) store_count(grad_residual + j, d, count);
      if (grad_x != nullptr) {
        if (bits != nullptr) d *= dropout_factor<A>(bits + j, p.drop_threshold, keep_scale);
        store_count(grad_x + j, d, count);
      }
    });
  }
}

template <typename S>
void dropout_add_elements(const DropoutAdd& p, int64_t begin, int64_t end) {
  using A = Wide<S>;
  constexpr int64_t piece = 512;
  uint16_t random[piece + kRandomSlack];
  const A keep_scale = static_cast<A>(dropout_keep_scale(p.drop_threshold));
  const auto* const x = static_cast<const S*>(p.x);
  const auto* const residual = static_cast<const S*>(p.residual);
  auto* const y = static_cast<S*>(p.y);
  for (int64_t first = begin; first < end; first += piece) {
    const int64_t size = std::min(piece, end - first);
    const uint16_t* const bits = random_flat(p.seed, Stream::dropout, first, size, random);
    each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
      const int64_t e = first + j;
      Vector<A> v = load_count(x + e, count) * dropout_factor<A>(bits + j, p.drop_threshold, keep_scale);
      if (residual != nullptr) v += load_count(residual + e, count);
      store_count(y + e, v, count);
    });
  }
}

}  // namespace

void norm_forward(const NormForward& p, int64_t begin, int64_t end, void* scratch) {
  dispatch(p.element, [&](auto element) { norm_forward_rows<decltype(element)>(p, begin, end, scratch); });
}

void norm_backward(const NormBackward& p, int64_t begin, int64_t end, void* scratch) {
  dispatch(p.element, [&](auto element) { norm_backward_rows<decltype(element)>(p, begin, end, scratch); });
}

void dropout_add(const DropoutAdd& p, int64_t begin, int64_t end) {
  dispatch(p.element, [&](auto element) { dropout_add_elements<decltype(element)>(p, begin, end); });
}

}  // namespace remnant::kernels::REMNANT_VARIANT
