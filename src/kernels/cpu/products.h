#pragma once

// Matrix products on tiles that lie in cache. A block of C stays in registers while rows of B stream past
// and elements of A are broadcast, so A may be transposed at no cost and nothing is packed. Each element
// of C sums over k in order, whatever the tile: results do not depend on blocking.

#include "kernels/cpu/ahead.h"
#include "kernels/cpu/vectors.h"

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

// Vectors of a row of C in registers, and rows that leave registers for them (32 of AVX-512, else 16).
constexpr int kProductVectors = kVectorBytes == 64 ? 4 : 2;
template <int NV>
constexpr int kProductRows = kVectorBytes == 64 ? (NV == 4 ? 6 : 8) : (NV == 2 ? 6 : 8);

// kTail: the last vector of a row has `tail` elements.
template <int MR, int NV, bool kTransposed, bool kAdd, bool kTail, typename T>
REMNANT_ALWAYS_INLINE void multiply_registers(int64_t depth, const T* a, int64_t a_stride, const T* b,
                                              int64_t b_stride, T* c, int64_t c_stride, int64_t tail) {
  constexpr int width = kWidth<T>;
  Vector<T> sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[i][v] = Vector<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<T> row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const T* at = b + k * b_stride + v * width;
      row[v] = kTail && v == NV - 1 ? load_part(at, tail) : load(at);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const T x = kTransposed ? a[k * a_stride + i] : a[i * a_stride + k];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      T* at = c + i * c_stride + v * width;
      if (kTail && v == NV - 1) {
        store_part(at, kAdd ? load_part(at, tail) + sum[i][v] : sum[i][v], tail);
      } else {
        store(at, kAdd ? load(at) + sum[i][v] : sum[i][v]);
      }
    }
  }
}

template <int MR, int NV, bool kTransposed, bool kAdd, bool kTail, typename T>
void multiply_rest(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                   T* c, int64_t c_stride, int64_t tail) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      multiply_registers<MR, NV, kTransposed, kAdd, kTail>(depth, a, a_stride, b, b_stride, c, c_stride,
                                                           tail);
    } else {
      multiply_rest<MR - 1, NV, kTransposed, kAdd, kTail>(rows, depth, a, a_stride, b, b_stride, c, c_stride,
                                                          tail);
    }
  }
}

template <int NV, bool kTransposed, bool kAdd, bool kTail, typename T, typename Between>
void multiply_panel(int64_t rows, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                    T* c, int64_t c_stride, int64_t tail, Between& between) {
  constexpr int height = kProductRows<NV>;
  int64_t i = 0;
  for (; i + height <= rows; i += height) {
    between();
    multiply_registers<height, NV, kTransposed, kAdd, kTail>(
        depth, a + (kTransposed ? i : i * a_stride), a_stride, b, b_stride, c + i * c_stride, c_stride, tail);
  }
  multiply_rest<height - 1, NV, kTransposed, kAdd, kTail>(rows - i, depth,
                                                          a + (kTransposed ? i : i * a_stride), a_stride, b,
                                                          b_stride, c + i * c_stride, c_stride, tail);
}

/// C (rows x cols) = op(A) B, or += with kAdd; all row-major, op(A) = A' with kTransposed. Calls between()
/// before every block that leaves registers.
template <bool kTransposed, bool kAdd, typename T, typename Between>
void multiply(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t a_stride, const T* b,
              int64_t b_stride, T* c, int64_t c_stride, Between& between) {
  constexpr int width = kWidth<T>;
  for (int64_t j = 0; j < cols;) {
    const int64_t left = (cols - j + width - 1) / width;
    // Five and six vectors go in threes, not as four and a thin rest.
    const int64_t take = left <= kProductVectors
                             ? left
                             : (left < 7 && kProductVectors == 4 && left != 4 ? 3 : kProductVectors);
    const int64_t tail = cols - j < take * width ? cols - j - (take - 1) * width : 0;
    const T* const panel = b + j;
    T* const out = c + j;
    const auto run = [&]<int NV>() {
      if (tail > 0) {
        multiply_panel<NV, kTransposed, kAdd, true>(rows, depth, a, a_stride, panel, b_stride, out, c_stride,
                                                    tail, between);
      } else {
        multiply_panel<NV, kTransposed, kAdd, false>(rows, depth, a, a_stride, panel, b_stride, out, c_stride,
                                                     tail, between);
      }
    };
    switch (take) {
      case 1:
        run.template operator()<1>();
        break;
      case 2:
        run.template operator()<2>();
        break;
      case 3:
        if constexpr (kProductVectors > 2) run.template operator()<3>();
        break;
      default:
        if constexpr (kProductVectors > 2) run.template operator()<4>();
        break;
    }
    j += take * width;
  }
}

template <bool kTransposed, bool kAdd, typename T>
void multiply(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t a_stride, const T* b,
              int64_t b_stride, T* c, int64_t c_stride) {
  const Nothing nothing;
  multiply<kTransposed, kAdd, T>(rows, cols, depth, a, a_stride, b, b_stride, c, c_stride, nothing);
}

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
