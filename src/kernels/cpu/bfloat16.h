#pragma once

// Products of bfloat16 inputs as they are, each term exact and added up in float: scores, and the gradient's
// product with the values. The other products have P or its gradient as a factor, stay in float, and find
// these inputs widened a tile or a block at a time.

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/vectors.h"

#include <bit>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

// A dimension's bfloat16 in whole tile registers.
constexpr int64_t bfloat16_dims(int64_t dims) { return (dims + 31) / 32 * 32; }

// Rows for products in the accumulation type.
template <typename T>
void widen_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t dims, T* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t d = 0; d < dims; ++d) {
      const uint32_t bits = static_cast<uint32_t>(from[r * stride + d]) << 16;
      to[r * to_stride + d] = static_cast<T>(std::bit_cast<float>(bits));
    }
  }
}

// Rows side by side in whole tile registers, what is missing as 0.
inline void stage_rows(const uint16_t* from, int64_t stride, int64_t rows, int64_t dims, int64_t padded_rows,
                       uint16_t* to) {
  const int64_t padded = bfloat16_dims(dims);
  for (int64_t r = 0; r < padded_rows; ++r) {
    const int64_t count = r < rows ? dims : 0;
    if (count > 0) std::memcpy(to + r * padded, from + r * stride, static_cast<size_t>(count) * sizeof(*to));
    if (count < padded)
      std::memset(to + r * padded + count, 0, static_cast<size_t>(padded - count) * sizeof(*to));
  }
}

// Staged rows to pairs of neighbouring dimensions, [dims / 2][rows]: the right factor of a product.
inline void transpose_pairs(const uint16_t* staged, int64_t padded_rows, int64_t padded_dims,
                            uint32_t* pairs) {
  constexpr int64_t width = kWidth<uint32_t>;
  const auto* const words = reinterpret_cast<const char*>(staged);
  for (int64_t r = 0; r < padded_rows; r += width) {
    for (int64_t c = 0; c < padded_dims / 2; c += width) {
      Vector<uint32_t> square[width];
#pragma GCC unroll 16
      for (int64_t i = 0; i < width; ++i)
        std::memcpy(&square[i], words + (r + i) * padded_dims * 2 + c * 4, sizeof(square[i]));
      transpose_square<uint32_t>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < width; ++i) store(pairs + (c + i) * padded_rows + r, square[i]);
    }
  }
}

#if defined(__AMX_BF16__)

// Tile registers of 16 rows of 64 bytes, for as long as this lives.
class TileRegisters {
 public:
  explicit TileRegisters(bool used) : used_(used) {
    if (!used_) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int i = 0; i < 8; ++i) {
      configuration.row_bytes[i] = 64;
      configuration.rows[i] = 16;
    }
    _tile_loadconfig(&configuration);
  }
  ~TileRegisters() {
    if (used_) _tile_release();
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  bool used_;
};

// out [keys][rows] = factor * staged (keys x dims) pairs; keys and rows multiples of 16, dims of 32.
inline void multiply_pairs(const uint16_t* staged, int64_t keys, int64_t dims, const uint32_t* pairs,
                           int64_t rows, float factor, float* out) {
  const int64_t row_bytes = dims * 2, pair_bytes = rows * 4;
  for (int64_t j = 0; j < keys; j += 32) {
    const bool low = j + 16 < keys;
    for (int64_t r = 0; r < rows; r += 32) {
      const bool right = r + 16 < rows;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t d = 0; d < dims; d += 32) {
        _tile_loadd(4, staged + j * dims + d, row_bytes);
        _tile_loadd(6, pairs + d / 2 * rows + r, pair_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (right) {
          _tile_loadd(7, pairs + d / 2 * rows + r + 16, pair_bytes);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (low) {
          _tile_loadd(5, staged + (j + 16) * dims + d, row_bytes);
          _tile_dpbf16ps(2, 5, 6);
          if (right) _tile_dpbf16ps(3, 5, 7);
        }
      }
      float* const to = out + j * rows + r;
      _tile_stored(0, to, pair_bytes);
      if (right) _tile_stored(1, to + 16, pair_bytes);
      if (low) _tile_stored(2, to + 16 * rows, pair_bytes);
      if (low && right) _tile_stored(3, to + 16 * rows + 16, pair_bytes);
      for (int64_t i = 0; i < (low ? 32 : 16); ++i) {
        for (int64_t e = 0; e < (right ? 32 : 16); e += kWidth<float>) {
          store(to + i * rows + e, load(to + i * rows + e) * factor);
        }
      }
    }
  }
}

#else

struct TileRegisters {
  explicit TileRegisters(bool /*used*/) {}
};

// Without tile registers there is no gain over float; it is here so that the rest is one code.
inline void multiply_pairs(const uint16_t* staged, int64_t keys, int64_t dims, const uint32_t* pairs,
                           int64_t rows, float factor, float* out) {
  constexpr int width = kWidth<float>;
  const auto widened = [](uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); };
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t r = 0; r < rows; r += width) {
      Vector<float> sum{};
      for (int64_t d = 0; d < dims; d += 2) {
        const Vector<uint32_t> pair = load(pairs + d / 2 * rows + r);
        sum += widened(staged[j * dims + d]) * (Vector<float>)(pair << 16);
        sum += widened(staged[j * dims + d + 1]) * (Vector<float>)(pair & 0xffff0000u);
      }
      store(out + j * rows + r, sum * factor);
    }
  }
}

#endif

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
