#pragma once

// The paper's curve on tiles [keys][rows] of whole rows: ranks, packing and the curve itself with a row in
// each lane, so that nothing branches and codes move 32 bits at a time.

#include "kernels/cpu/rows.h"
#include "kernels/cpu/tiles.h"

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

template <typename T>
using Lane = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Up to here counting n^2 / 2 comparisons, a row in each lane, beats sorting.
constexpr int64_t kCountingTileKeys = 64;

// Ranks of kWidth<T> rows in descending order of z, ties by position: each pair raises one of the two.
template <typename T>
void rank_lanes(const T* z, int64_t stride, int64_t keys, Lane<T>* ranks) {
  constexpr int group = 4;
  for (int64_t i = 0; i < keys; ++i) store(ranks + i * stride, UnsignedBits<T>{});
  for (int64_t i = 0; i < keys; i += group) {
    const int64_t inside = keys - i < group ? keys - i : group;
    for (int64_t e = 0; e < inside; ++e) {
      for (int64_t f = e + 1; f < inside; ++f) {
        const auto later = (UnsignedBits<T>)(load(z + (i + f) * stride) > load(z + (i + e) * stride));
        store(ranks + (i + e) * stride, load(ranks + (i + e) * stride) - later);
        store(ranks + (i + f) * stride, load(ranks + (i + f) * stride) + (later + 1));
      }
    }
    if (inside < group) break;
    Vector<T> own[group];
    UnsignedBits<T> count[group];
#pragma GCC unroll 4
    for (int e = 0; e < group; ++e) {
      own[e] = load(z + (i + e) * stride);
      count[e] = load(ranks + (i + e) * stride);
    }
    for (int64_t j = i + group; j < keys; ++j) {
      const Vector<T> other = load(z + j * stride);
      UnsignedBits<T> before = load(ranks + j * stride) + group;
#pragma GCC unroll 4
      for (int e = 0; e < group; ++e) {
        const auto later = (UnsignedBits<T>)(other > own[e]);  // all bits: minus one
        count[e] -= later;
        before += later;
      }
      store(ranks + j * stride, before);
    }
#pragma GCC unroll 4
    for (int e = 0; e < group; ++e) store(ranks + (i + e) * stride, count[e]);
  }
}

// --- longer rows: a sorting network over keys and positions, a row in each 64-bit lane ------------------

// The smaller of two words first.
REMNANT_ALWAYS_INLINE void exchange(Words* a, Words* b) {
  const Words x = *a, y = *b;
  const auto ordered = x < y;
  *a = ordered ? x : y;
  *b = ordered ? y : x;
}

// Batcher's odd-even merges of sorted runs of `run` words, two by two.
inline void merge_runs(Words* words, int64_t count, int64_t run) {
  for (int64_t span = 0; span + run < count; span += 2 * run) {
    const int64_t end = span + 2 * run < count ? span + 2 * run : count;
    for (int64_t i = span; i + run < end; ++i) exchange(words + i, words + i + run);
    for (int64_t k = run / 2; k >= 1; k /= 2) {
      for (int64_t j = span + k; j + k < end; j += 2 * k) {
        const int64_t last = j + 2 * k <= end ? j + k : end - k;
        for (int64_t i = j; i < last; ++i) exchange(words + i, words + i + k);
      }
    }
  }
}

inline void sort_words(Words* words, int64_t count) {
  constexpr int64_t chunk = 256;  // sorted while it lies in the first-level cache
  for (int64_t at = 0; at < count; at += chunk) {
    const int64_t part = count - at < chunk ? count - at : chunk;
    for (int64_t run = 1; run < part; run *= 2) merge_runs(words + at, part, run);
  }
  for (int64_t run = chunk; run < count; run *= 2) merge_runs(words, count, run);
}

// A word that sorts as the logit does, downwards, then by position.
REMNANT_ALWAYS_INLINE float logit_of_word(uint64_t word) {
  const auto key = static_cast<uint32_t>(word >> 32);
  return std::bit_cast<float>((key >> 31) != 0 ? key : ~key & 0x7fffffffu);
}

// Ranks of kWidth<uint64_t> rows; sorted words stay in `words`.
inline void rank_by_network(const float* z, int64_t stride, int64_t keys, int64_t height, Words* words,
                            uint32_t* ranks) {
  typedef uint32_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef float HalfLogits __attribute__((vector_size(kVectorBytes / 2), aligned(alignof(float)), may_alias));
  for (int64_t j = 0; j < keys; ++j) {
    // descending_key of each lane
    const auto bits = (Half)(*reinterpret_cast<const HalfLogits*>(z + j * stride) + 0.0f);
    const Half key = (bits >> 31) != 0 ? bits : ~(bits | 0x80000000u);
    words[j] = (__builtin_convertvector(key, Words) << 32) | static_cast<uint64_t>(j);
  }
  sort_words(words, keys);
  for (int64_t r = 0; r < keys; ++r) {
    const auto* const word = reinterpret_cast<const uint64_t*>(words + r);
    for (int64_t l = 0; l < height; ++l) {
      ranks[static_cast<int64_t>(word[l] & 0xffffffffu) * stride + l] = static_cast<uint32_t>(r);
    }
  }
}

// Packs ranks [keys][rows] of one vector of rows into `height` rows of codes.
template <typename T>
void pack_lanes(const Lane<T>* ranks, int64_t stride, int64_t keys, int64_t bits, int64_t height,
                uint8_t* codes, int64_t code_bytes) {
  UnsignedBits<T> window{};
  int filled = 0;
  int64_t written = 0;
  const auto emit = [&] {
    const int64_t left = code_bytes - written < 4 ? code_bytes - written : 4;
    for (int64_t l = 0; l < height; ++l) {
      const auto word = static_cast<uint32_t>(window[l]);
      uint8_t* const to = codes + l * code_bytes + written;
      std::memcpy(to, &word, left == 4 ? 4 : static_cast<size_t>(left));
    }
    written += left;
  };
  for (int64_t j = 0; j < keys; ++j) {
    const UnsignedBits<T> rank = load(ranks + j * stride);
    window |= rank << filled;
    filled += static_cast<int>(bits);
    if (filled < 32) continue;
    emit();
    filled -= 32;
    window = filled > 0 ? rank >> (static_cast<int>(bits) - filled) : UnsignedBits<T>{};
  }
  if (written < code_bytes) emit();
}

// Beta and the factor of the middle, from a row's table: what decoding needs of each row.
template <typename T>
struct CurveLanes {
  alignas(64) Lane<T> first[kWidth<T>];  // ranks below are in the table as they are
  alignas(64) Lane<T> last[kWidth<T>];   // ranks from here on are in the table after the first
  alignas(64) Lane<T> valid[kWidth<T>];  // ranks from here on are 0
  alignas(64) Lane<T> table[kWidth<T>];  // where the row's table begins
  alignas(64) T beta[kWidth<T>];
  alignas(64) T factor[kWidth<T>];
  alignas(64) T end[kWidth<T>];  // paper_text: stands for l_m
};

template <typename T>
void curve_row(const T* table, int64_t keys, int64_t m, bool paper_text, int lane, int64_t offset,
               CurveLanes<T>& out) {
  const int64_t slots = curve_width(keys, m) - 2;
  const auto valid = static_cast<int64_t>(table[slots + 1]);
  out.valid[lane] = static_cast<Lane<T>>(valid);
  out.table[lane] = static_cast<Lane<T>>(offset);
  out.beta[lane] = 0;
  out.factor[lane] = 0;
  out.end[lane] = 0;
  if (valid <= 2 * m) {
    out.first[lane] = out.last[lane] = static_cast<Lane<T>>(valid);
    return;
  }
  const int64_t last = valid - m;
  out.first[lane] = static_cast<Lane<T>>(m);
  out.last[lane] = static_cast<Lane<T>>(last);
  T beta = table[slots];
  const T alpha = table[m - 1];
  T kept = 0;
  for (int64_t r = 0; r < 2 * m; ++r) kept += table[r];
  T factor = alpha * exponential(-beta);
  if (paper_text) {
    out.end[lane] = alpha * exponential(-beta * static_cast<T>(last - m + 1));
  } else {
    const T missing = T(1) - kept;
    // h_m itself is 0: no curve to follow, the rest is spread evenly.
    if (alpha == 0) beta = 0;
    const auto count = static_cast<double>(last - m);
    const double sum =
        beta == 0 ? count
                  : std::expm1(-static_cast<double>(beta) * count) / std::expm1(-static_cast<double>(beta));
    factor = (missing < 0 ? T(0) : missing) / static_cast<T>(sum);
  }
  out.beta[lane] = beta;
  out.factor[lane] = factor;
}

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> gather(const T* base, UnsignedBits<T> index, Bits<T> active) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), _mm512_movepi32_mask((__m512i)active),
                                               (__m512i)index, base, 4);
  } else {
    return (Vector<T>)_mm512_mask_i64gather_pd(_mm512_setzero_pd(), _mm512_movepi64_mask((__m512i)active),
                                               (__m512i)index, base, 8);
  }
#else
  Vector<T> v{};
  for (int l = 0; l < kWidth<T>; ++l) {
    if (active[l] != 0) v[l] = base[index[l]];
  }
  return v;
#endif
}

// Codes and tables of a block's rows to p^ [keys][rows]; rows that pad the block become 0.
template <typename T>
void decode_curve_tile(const uint8_t* codes, int64_t code_bytes, const T* table, int64_t table_width,
                       const Block& block, int64_t m, bool paper_text, T* p) {
  constexpr int width = kWidth<T>;
  const int64_t keys = block.keys, stride = block.padded, bits = rank_bits(keys);
  const auto mask = static_cast<Lane<T>>((uint64_t{1} << bits) - 1);
  for (int64_t r = 0; r < stride; r += width) {
    const int64_t height = block.rows - r < width ? (block.rows > r ? block.rows - r : 0) : width;
    CurveLanes<T> lanes{};
    for (int64_t l = 0; l < height; ++l) {
      curve_row(table + (r + l) * table_width, keys, m, paper_text, static_cast<int>(l),
                (r + l) * table_width, lanes);
    }
    const auto first = load(lanes.first), last = load(lanes.last), valid = load(lanes.valid);
    const auto begin = load(lanes.table);
    const Vector<T> beta = load(lanes.beta), factor = load(lanes.factor), end = load(lanes.end);
    int64_t read = 0;
    const auto next_word = [&] {
      UnsignedBits<T> word{};
      const int64_t left = code_bytes - read < 4 ? code_bytes - read : 4;
      for (int64_t l = 0; l < height && left > 0; ++l) {
        uint32_t four = 0;
        std::memcpy(&four, codes + (r + l) * code_bytes + read, left == 4 ? 4 : static_cast<size_t>(left));
        word[l] = four;
      }
      read += left;
      return word;
    };
    UnsignedBits<T> word = next_word();
    int used = 0;
    for (int64_t j = 0; j < keys; ++j) {
      UnsignedBits<T> rank = word >> used;
      used += static_cast<int>(bits);
      if (used >= 32) {
        used -= 32;
        word = next_word();
        if (used > 0) rank |= word << (static_cast<int>(bits) - used);
      }
      rank &= mask;
      const Vector<T> step = __builtin_convertvector((Bits<T>)(rank - first), Vector<T>);
      Vector<T> value = factor * exponential_of_nonpositive(-beta * step);
      const auto high = (Bits<T>)(rank < first);
      const auto low = (Bits<T>)(rank >= last) & (Bits<T>)(rank < valid);
      // After the m highest the table goes on with the m lowest.
      const UnsignedBits<T> index = begin + rank - ((UnsignedBits<T>)low & (last - static_cast<Lane<T>>(m)));
      const auto kept = high | low;
      value = kept ? gather(table, index, kept) : value;
      if (paper_text) value = (low & (Bits<T>)(rank == last)) ? end : value;
      value = rank >= valid ? Vector<T>{} : value;
      store(p + j * stride + r, value);
    }
  }
}

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
