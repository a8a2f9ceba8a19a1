#pragma once

// A tile of attention scores lies in scratch as [keys][rows]: lanes of a vector are query rows, so maxima,
// sums and lse are per lane and need no reduction across a vector. Rows are padded to whole vectors, keys
// to dropout's blocks of 8 columns.

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/vectors.h"

#include <cmath>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

template <typename T>
constexpr T kNothing = -std::numeric_limits<T>::infinity();

struct Range {
  int64_t begin, end;
};

/// Query rows [first, first + rows) of head h of batch entry b, with what belongs to their sequence.
struct Block {
  int64_t b, h, kv_head, first, rows, padded, keys;
  int64_t query_row, key_row;  // where the sequence begins in the tensors
  int64_t residual_row;        // of the block's first row
  uint32_t head;               // in the random numbers' counter
};

template <typename T>
Block make_block(const AttentionProblem<T>& problem, int64_t b, int64_t h, int64_t first) {
  Sequence sequence{0, problem.queries, 0, problem.keys, 0};
  if (problem.sequences != nullptr) sequence = problem.sequences[b];
  Block block;
  block.b = b;
  block.h = h;
  block.kv_head = h / (problem.heads / problem.kv_heads);
  block.first = first;
  block.rows = sequence.queries - first < problem.block_rows ? sequence.queries - first : problem.block_rows;
  block.padded = (block.rows + kTileUnit - 1) / kTileUnit * kTileUnit;
  block.keys = sequence.keys;
  block.query_row = sequence.first_query;
  block.key_row = sequence.first_key;
  block.residual_row = b * problem.row_batch + h * problem.row_head + sequence.first_query + first;
  block.head = static_cast<uint32_t>(b * problem.heads + h);
  return block;
}

template <typename T>
Range row_range(const AttentionProblem<T>& problem, int64_t keys, int64_t i) {
  int64_t begin = problem.left < 0 || i < problem.left ? 0 : i - problem.left;
  int64_t end = problem.right < 0 || i + problem.right >= keys ? keys : i + problem.right + 1;
  begin = begin < keys ? begin : keys;
  return {begin, end < begin ? begin : end};
}

// Whether the masks leave row i any key: scores of -Inf throughout then come from Inf in the inputs.
template <typename T>
bool attends(const AttentionProblem<T>& problem, const Block& block, int64_t i) {
  const Range range = row_range(problem, block.keys, i);
  const MaskView<T>& mask = problem.mask;
  const int64_t offset = block.b * mask.batch + block.h * mask.head + i * mask.row;
  for (int64_t j = range.begin; j < range.end; ++j) {
    if (mask.kind == MaskKind::none) return true;
    const int64_t at = offset + j * mask.column;
    if (mask.kind == MaskKind::boolean ? static_cast<const uint8_t*>(mask.data)[at] != 0
                                       : static_cast<const T*>(mask.data)[at] != kNothing<T>) {
      return true;
    }
  }
  return false;
}

/// The keys of a tile that some row may attend, and what has to be masked inside of it.
struct Tile {
  int64_t begin, end;  // begin is a multiple of dropout's columns; empty: nothing to do
  bool cut;            // by the window
  bool masked;         // by the mask
  bool per_key;        // the mask is the same for all rows
};

// Eight rows of eight bytes, transposed.
REMNANT_ALWAYS_INLINE void transpose_bytes(uint64_t (&r)[8]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint64_t t = ((r[i] >> 32) ^ r[i + 4]) & 0xffffffffu;
    r[i] ^= t << 32;
    r[i + 4] ^= t;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if ((i & 2) == 0) {
      const uint64_t t = ((r[i] >> 16) ^ r[i + 2]) & 0x0000ffff0000ffffu;
      r[i] ^= t << 16;
      r[i + 2] ^= t;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    const uint64_t t = ((r[i] >> 8) ^ r[i + 1]) & 0x00ff00ff00ff00ffu;
    r[i] ^= t << 8;
    r[i + 1] ^= t;
  }
}

// The boolean mask's tile as [keys][rows] bytes.
template <typename T>
void transpose_mask(const AttentionProblem<T>& problem, const Block& block, const Tile& tile,
                    uint8_t* allowed) {
  const MaskView<T>& mask = problem.mask;
  const auto* from = static_cast<const uint8_t*>(mask.data) + block.b * mask.batch + block.h * mask.head +
                     block.first * mask.row;
  const int64_t count = tile.end - tile.begin;
  for (int64_t r = 0; r < block.rows; r += 8) {
    for (int64_t c = 0; c < count; c += 8) {
      const int64_t height = block.rows - r < 8 ? block.rows - r : 8;
      const int64_t width = count - c < 8 ? count - c : 8;
      if (mask.column == 1 && height == 8 && width == 8) {
        uint64_t square[8];
        for (int64_t i = 0; i < 8; ++i)
          std::memcpy(&square[i], from + (r + i) * mask.row + tile.begin + c, 8);
        transpose_bytes(square);
        for (int64_t i = 0; i < 8; ++i) std::memcpy(allowed + (c + i) * block.padded + r, &square[i], 8);
      } else {
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t e = 0; e < width; ++e) {
            allowed[(c + e) * block.padded + r + i] =
                from[(r + i) * mask.row + (tile.begin + c + e) * mask.column];
          }
        }
      }
    }
  }
}

// Trims keys [begin, end) to what the window and the mask leave to the block's rows. kWhole: keeps all of
// them, for rows that are packed whole.
template <typename T>
Tile make_tile(const AttentionProblem<T>& problem, const Block& block, int64_t begin, int64_t end, bool whole,
               uint8_t* allowed) {
  const Range first = row_range(problem, block.keys, block.first);
  const Range last = row_range(problem, block.keys, block.first + block.rows - 1);
  Tile tile{begin, end < block.keys ? end : block.keys, false, false, false};
  if (!whole) {
    if (last.end < tile.end) tile.end = last.end;
    if (first.begin > tile.begin) tile.begin = first.begin / kDropoutColumns * kDropoutColumns;
    if (tile.begin >= tile.end) return tile;
  }
  tile.cut = last.begin > tile.begin || first.end < tile.end;
  const MaskView<T>& mask = problem.mask;
  if (mask.kind == MaskKind::none) return tile;
  tile.per_key = mask.row == 0 || block.rows == 1;
  const int64_t offset = block.b * mask.batch + block.h * mask.head + block.first * mask.row;
  if (tile.per_key) {
    const auto forbidden = [&](int64_t j) {
      const int64_t at = offset + j * mask.column;
      return mask.kind == MaskKind::boolean ? static_cast<const uint8_t*>(mask.data)[at] == 0
                                            : static_cast<const T*>(mask.data)[at] == kNothing<T>;
    };
    if (!whole) {
      while (tile.end > tile.begin && forbidden(tile.end - 1)) --tile.end;
      int64_t from = tile.begin;
      while (from < tile.end && forbidden(from)) ++from;
      tile.begin = from / kDropoutColumns * kDropoutColumns;
      if (tile.begin >= tile.end) return tile;
    }
    tile.masked = mask.kind == MaskKind::additive;
    for (int64_t j = tile.begin; !tile.masked && j < tile.end; ++j) tile.masked = forbidden(j);
    return tile;
  }
  bool any = false;
  if (mask.kind == MaskKind::boolean) {
    transpose_mask(problem, block, tile, allowed);
    bool all = true;
    for (int64_t j = 0; j < tile.end - tile.begin; ++j) {
      uint8_t some = 0, every = 1;
      const uint8_t* const row = allowed + j * block.padded;
      for (int64_t r = 0; r < block.rows; ++r) {
        some |= row[r];
        every &= row[r];
      }
      any |= some != 0;
      all &= every != 0;
    }
    tile.masked = !all;
  } else {
    const auto* bias = static_cast<const T*>(mask.data) + offset;
    for (int64_t r = 0; r < block.rows && !any; ++r) {
      for (int64_t j = tile.begin; j < tile.end && !any; ++j) {
        any = bias[r * mask.row + j * mask.column] != kNothing<T>;
      }
    }
    tile.masked = true;
  }
  if (!any && !whole) tile.end = tile.begin;
  return tile;
}

template <typename T>
void fill_nothing(T* from, T* to) {
  for (; from < to; ++from) *from = kNothing<T>;
}

// Takes the rows whose window does not hold the key out of its scores.
template <typename T>
void cut_key(const AttentionProblem<T>& problem, const Block& block, int64_t key, T* row) {
  const auto bounded = [&](int64_t r) { return r < 0 ? 0 : (r < block.padded ? r : block.padded); };
  if (problem.right >= 0) fill_nothing(row, row + bounded(key - problem.right - block.first));
  if (problem.left >= 0)
    fill_nothing(row + bounded(key + problem.left - block.first + 1), row + block.padded);
}

// Masks the tile's scores, and the keys that pad it to blocks of 8 columns.
template <typename T>
void mask_tile(const AttentionProblem<T>& problem, const Block& block, const Tile& tile,
               const uint8_t* allowed, T* scores) {
  constexpr int width = kWidth<T>;
  const int64_t count = tile.end - tile.begin, stride = block.padded;
  const MaskView<T>& mask = problem.mask;
  if (tile.masked && tile.per_key) {
    const int64_t offset =
        block.b * mask.batch + block.h * mask.head + block.first * mask.row + tile.begin * mask.column;
    for (int64_t j = 0; j < count; ++j) {
      T* const row = scores + j * stride;
      if (mask.kind == MaskKind::boolean) {
        if (static_cast<const uint8_t*>(mask.data)[offset + j * mask.column] == 0) {
          fill_nothing(row, row + stride);
        }
      } else {
        const T bias = static_cast<const T*>(mask.data)[offset + j * mask.column];
        for (int64_t r = 0; r < stride; r += width) store(row + r, load(row + r) + bias);
      }
    }
  } else if (tile.masked && mask.kind == MaskKind::boolean) {
    for (int64_t j = 0; j < count; ++j) {
      T* const row = scores + j * stride;
      const uint8_t* const may = allowed + j * stride;
#pragma omp simd
      for (int64_t r = 0; r < block.rows; ++r) row[r] = may[r] != 0 ? row[r] : kNothing<T>;
    }
  } else if (tile.masked) {
    const auto* bias = static_cast<const T*>(mask.data) + block.b * mask.batch + block.h * mask.head +
                       block.first * mask.row + tile.begin * mask.column;
    if (mask.column == 1) {
      for (int64_t r = 0; r < block.rows; r += width) {
        const int64_t height = block.rows - r < width ? block.rows - r : width;
        for (int64_t c = 0; c < count; c += width) {
          alignas(64) T square[static_cast<size_t>(width * width)];
          const int64_t wide = count - c < width ? count - c : width;
          transpose<true>(bias + r * mask.row + c, mask.row, height, wide, T(1), square, int64_t{width});
          for (int64_t e = 0; e < wide; ++e) {
            T* const at = scores + (c + e) * stride + r;
            store(at, load(at) + load(square + e * width));
          }
        }
      }
    } else {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t r = 0; r < block.rows; ++r) {
          scores[j * stride + r] += bias[r * mask.row + j * mask.column];
        }
      }
    }
  }
  if (tile.cut) {
    for (int64_t j = 0; j < count; ++j) cut_key(problem, block, tile.begin + j, scores + j * stride);
  }
  const int64_t end = (count + kDropoutColumns - 1) / kDropoutColumns * kDropoutColumns;
  fill_nothing(scores + count * stride, scores + end * stride);
}

/// What decides dropout in a tile: its first column's block, its first row.
template <typename T>
struct TileDropout {
  const Seed* seed;
  int64_t threshold;
  T keep_scale;
  uint32_t block, row, head;
};

// Online softmax: from the running maximum and sum of each row to those with the tile, scores to
// exp(z - maximum), dropped and scaled for the product with the values; `correction` is what earlier
// output is multiplied by. Returns whether any row needs that.
template <bool kDrop, typename T>
bool softmax_tile(T* scores, int64_t stride, int64_t count, T* maximum, T* sum, T* correction,
                  const TileDropout<T>& drop) {
  constexpr int width = kWidth<T>;
  const int64_t end = (count + kDropoutColumns - 1) / kDropoutColumns * kDropoutColumns;
  bool corrects = false;
  for (int64_t r = 0; r < stride; r += width) {
    T* const column = scores + r;
    const Vector<T> before = load(maximum + r);
    Vector<T> highest[4] = {before, before, before, before};
    for (int64_t j = 0; j < end; j += 4) {
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) {
        const Vector<T> z = load(column + (j + e) * stride);
        highest[e] = z > highest[e] ? z : highest[e];
      }
    }
    highest[0] = highest[0] > highest[1] ? highest[0] : highest[1];
    highest[2] = highest[2] > highest[3] ? highest[2] : highest[3];
    const Vector<T> now = highest[0] > highest[2] ? highest[0] : highest[2];
    // Nothing valid so far, or only NaN, which the sum brings back.
    const Vector<T> base = now == kNothing<T> ? Vector<T>{} : now;
    const Vector<T> factor = exponential_of_nonpositive(before - base);
    Vector<T> total[2] = {load(sum + r) * factor, Vector<T>{}};
    for (int64_t j = 0; j < end; j += kDropoutColumns) {
      Vector<T> factors[kDropoutColumns];
      if constexpr (kDrop) {
        dropout_factors(*drop.seed, drop.threshold, drop.keep_scale,
                        drop.block + static_cast<uint32_t>(j / kDropoutColumns),
                        drop.row + static_cast<uint32_t>(r), drop.head, factors);
      }
#pragma GCC unroll 8
      for (int e = 0; e < kDropoutColumns; ++e) {
        T* const at = column + (j + e) * stride;
        const Vector<T> p = exponential_of_nonpositive(load(at) - base);
        total[e % 2] += p;
        // Multiplied, not selected: a NaN must survive being dropped, as in torch.
        store(at, kDrop ? p * factors[e] : p);
      }
    }
    store(maximum + r, now);
    store(sum + r, total[0] + total[1]);
    store(correction + r, factor);
    for (int l = 0; l < width; ++l) corrects |= factor[l] != T(1);
  }
  return corrects;
}

// z -> p from lse, in place; lse is +inf for rows that attend nothing.
template <typename T>
void probabilities_tile(T* scores, int64_t stride, int64_t count, const T* lse) {
  constexpr int width = kWidth<T>;
  for (int64_t r = 0; r < stride; r += width) {
    const Vector<T> base = load(lse + r);
    for (int64_t j = 0; j < count; ++j) {
      T* const at = scores + j * stride + r;
      store(at, exponential_of_nonpositive(load(at) - base));
    }
  }
}

// In place: scores (z, or p where !kLogits) to D p, products (g v^T, scaled) to dz = p (D a - delta).
// Null products: only D p is wanted.
template <bool kDrop, bool kLogits, typename T>
void gradient_tile(T* scores, T* products, int64_t stride, int64_t count, const T* lse, const T* delta,
                   const TileDropout<T>& drop) {
  constexpr int width = kWidth<T>;
  const int64_t end = (count + kDropoutColumns - 1) / kDropoutColumns * kDropoutColumns;
  for (int64_t r = 0; r < stride; r += width) {
    const Vector<T> base = load(lse + r);
    const Vector<T> mean = load(delta + r);
    for (int64_t j = 0; j < end; j += kDropoutColumns) {
      Vector<T> factors[kDropoutColumns];
      if constexpr (kDrop) {
        dropout_factors(*drop.seed, drop.threshold, drop.keep_scale,
                        drop.block + static_cast<uint32_t>(j / kDropoutColumns),
                        drop.row + static_cast<uint32_t>(r), drop.head, factors);
      }
#pragma GCC unroll 8
      for (int e = 0; e < kDropoutColumns; ++e) {
        const int64_t offset = (j + e) * stride + r;
        Vector<T> p = load(scores + offset);
        if constexpr (kLogits) p = exponential_of_nonpositive(p - base);
        if (products != nullptr) {
          const Vector<T> a = load(products + offset);
          store(products + offset, p * ((kDrop ? a * factors[e] : a) - mean));
        }
        if (kDrop || kLogits) store(scores + offset, kDrop ? p * factors[e] : p);
      }
    }
  }
}

// delta of rows whose p is decoded and whole: sum_j p a, from p and the products.
template <bool kDrop, typename T>
void delta_tile(const T* scores, const T* products, int64_t stride, int64_t count, T* delta,
                const TileDropout<T>& drop) {
  constexpr int width = kWidth<T>;
  const int64_t end = (count + kDropoutColumns - 1) / kDropoutColumns * kDropoutColumns;
  for (int64_t r = 0; r < stride; r += width) {
    Vector<T> total[2] = {};
    for (int64_t j = 0; j < end; j += kDropoutColumns) {
      Vector<T> factors[kDropoutColumns];
      if constexpr (kDrop) {
        dropout_factors(*drop.seed, drop.threshold, drop.keep_scale,
                        drop.block + static_cast<uint32_t>(j / kDropoutColumns),
                        drop.row + static_cast<uint32_t>(r), drop.head, factors);
      }
#pragma GCC unroll 8
      for (int e = 0; e < kDropoutColumns; ++e) {
        const int64_t offset = (j + e) * stride + r;
        const Vector<T> a = load(products + offset);
        total[e % 2] += load(scores + offset) * (kDrop ? a * factors[e] : a);
      }
    }
    store(delta + r, total[0] + total[1]);
  }
}

// --- codes: p / max(p) in 2, 4 or 8 bits, stochastically rounded ------------------------------------

// Packs p of keys [tile.begin, tile.end) into rows of codes: 32 bits of codes a row at a time.
template <typename T>
void quantize_tile(const T* p, const Block& block, const Tile& tile, int64_t bits, const T* highest,
                   const Seed& seed, uint8_t* codes, int64_t code_bytes) {
  constexpr int width = kWidth<T>;
  const int64_t count = tile.end - tile.begin;
  const int64_t group = 32 / bits;
  const auto levels = static_cast<T>((1 << bits) - 1);
  for (int64_t r = 0; r < block.rows; r += width) {
    const Vector<T> top = load(highest + r);
    const Vector<T> factor = top > 0 ? levels / top : Vector<T>{};
    for (int64_t j = 0; j < count; j += group) {
      UnsignedBits<T> packed{};
      for (int64_t e = 0; e < group && j + e < count; e += kRoundingColumns) {
        UnsignedBits<T> random[4];
        random_rows<T>(seed, Stream::rounding, static_cast<uint32_t>((tile.begin + j + e) / kRoundingColumns),
                       static_cast<uint32_t>(block.first + r), block.head, random);
        for (int w = 0; w < 4 && j + e + w < count; ++w) {
          // 24 random bits, centred: the chance of rounding up is right to 2^-25.
          constexpr int spare = 8 * static_cast<int>(sizeof(T)) - 32;
          const auto word = (Bits<T>)(((random[w] << spare) >> spare) >> 8);
          const Vector<T> u = (__builtin_convertvector(word, Vector<T>) + T(0.5)) * T(1.0 / 16777216.0);
          Vector<T> level = load(p + (j + e + w) * block.padded + r) * factor + u;
          level = level < levels ? level : broadcast(levels);  // also the rounding of p / max * levels
          level = level > 0 ? level : Vector<T>{};
          packed |= (UnsignedBits<T>)__builtin_convertvector(level, Bits<T>)
                    << static_cast<int>((e + w) * bits);
        }
      }
      const int64_t left = (count - j < group ? count - j : group) * bits;
      const auto bytes = static_cast<size_t>((left + 7) / 8);
      const int64_t height = block.rows - r < width ? block.rows - r : width;
      for (int64_t l = 0; l < height; ++l) {
        const auto word = static_cast<uint32_t>(packed[l]);
        uint8_t* const to = codes + (r + l) * code_bytes + (tile.begin + j) * bits / 8;
        std::memcpy(to, &word, bytes == sizeof(word) ? sizeof(word) : bytes);
      }
    }
  }
}

// Codes back to p, [keys][rows]; rows beyond the block become 0.
template <typename T>
void dequantize_tile(const uint8_t* codes, int64_t code_bytes, const Block& block, const Tile& tile,
                     int64_t bits, const T* step, T* p) {
  constexpr int width = kWidth<T>;
  const int64_t count = tile.end - tile.begin;
  const int64_t group = 32 / bits;
  for (int64_t r = 0; r < block.padded; r += width) {
    const Vector<T> unit = load(step + r);
    const int64_t height = block.rows - r < width ? (block.rows > r ? block.rows - r : 0) : width;
    for (int64_t j = 0; j < count; j += group) {
      const int64_t left = count - j < group ? count - j : group;
      const auto bytes = static_cast<size_t>((left * bits + 7) / 8);
      UnsignedBits<T> packed{};
      for (int64_t l = 0; l < height; ++l) {
        uint32_t word = 0;
        const uint8_t* const from = codes + (r + l) * code_bytes + (tile.begin + j) * bits / 8;
        std::memcpy(&word, from, bytes == sizeof(word) ? sizeof(word) : bytes);
        packed[l] = word;
      }
      for (int64_t e = 0; e < left; ++e) {
        const auto level = (Bits<T>)((packed >> static_cast<int>(e * bits)) & ((1u << bits) - 1));
        store(p + (j + e) * block.padded + r, __builtin_convertvector(level, Vector<T>) * unit);
      }
    }
  }
}

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
