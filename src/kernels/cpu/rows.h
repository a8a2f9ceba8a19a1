#pragma once

// Row operations of a softmax: exponentials, masks, dropout, packed codes, the paper's curve. Included
// by every kernel source inside its instruction set's namespace; loops are written so that the
// compiler vectorises them for that set.

#include "kernels/cpu/attention_kernels.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

// exp by 2^k * polynomial, within 2 units in the last place; exact 0 below the normal range; NaN
// stays NaN (comparisons with it are false and it runs through the polynomial).
REMNANT_ALWAYS_INLINE float exponential(float x) {
  constexpr float lowest = -87.3365f, highest = 88.7228f;
  const float bounded = x < lowest ? lowest : (x > highest ? highest : x);
  constexpr float shifter = 12582912.0f;
  const float shifted = bounded * 1.44269504088896341f + shifter;
  const float k = shifted - shifter;
  const float r = (bounded - k * 0.693359375f) - k * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(shifter);
  const float power = std::bit_cast<float>((exponent + 127) << 23);
  return x < lowest ? 0.0f : (x > highest ? std::numeric_limits<float>::infinity() : y * power);
}

REMNANT_ALWAYS_INLINE double exponential(double x) {
  constexpr double lowest = -708.0, highest = 709.0;
  const double bounded = x < lowest ? lowest : (x > highest ? highest : x);
  constexpr double shifter = 6755399441055744.0;
  const double shifted = bounded * 1.4426950408889634074 + shifter;
  const double k = shifted - shifter;
  const double r = (bounded - k * 6.93145751953125e-1) - k * 1.42860682030941723212e-6;
  double y = 1.0 / 6227020800.0;
  y = y * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = y * r * r + r + 1.0;
  const int64_t exponent = std::bit_cast<int64_t>(shifted) - std::bit_cast<int64_t>(shifter);
  const double power = std::bit_cast<double>((exponent + 1023) << 52);
  return x < lowest ? 0.0 : (x > highest ? std::numeric_limits<double>::infinity() : y * power);
}

constexpr int kLanes = 16;

// Philox 4x32-10 on kLanes counters at once; c[w][lane] in and out.
REMNANT_ALWAYS_INLINE void philox(uint32_t (&c)[4][kLanes], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * c[0][l];
      const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * c[2][l];
      const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c[1][l] ^ key0;
      const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c[3][l] ^ key1;
      c[1][l] = static_cast<uint32_t>(product1);
      c[3][l] = static_cast<uint32_t>(product0);
      c[0][l] = next0;
      c[2][l] = next2;
    }
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
}

// Words for blocks [block, block + blocks) of rows [row, row + rows), four a block, row-major. Lanes
// run over rows too, so that short rows fill them.
[[maybe_unused]] void random_words(const Seed& seed, Stream stream, uint32_t head, int64_t row, int64_t rows,
                                   int64_t block, int64_t blocks, uint32_t* out) {
  const int64_t total = rows * blocks;
  int64_t i = row, j = 0;
  for (int64_t start = 0; start < total; start += kLanes) {
    alignas(64) uint32_t c[4][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      c[0][l] = static_cast<uint32_t>(block + j);
      c[1][l] = static_cast<uint32_t>(i);
      c[2][l] = head;
      c[3][l] = seed.counter3(stream);
      if (++j == blocks) {
        j = 0;
        ++i;
      }
    }
    philox(c, seed.key0, seed.key1);
    const int64_t count = total - start < kLanes ? total - start : kLanes;
    for (int64_t l = 0; l < count; ++l) {
      for (int w = 0; w < 4; ++w) out[(start + l) * 4 + w] = c[w][l];
    }
  }
}

// --- codes: p / max(p) in `bits` bits, stochastically rounded -------------------------------------

template <typename T>
T quantize_row(const T* p, int64_t keys, int64_t bits, const uint32_t* random, uint8_t* codes) {
  T highest = 0;
  bool nan = false;
  for (int64_t j = 0; j < keys; ++j) {
    highest = p[j] > highest ? p[j] : highest;
    nan |= p[j] != p[j];
  }
  if (nan) highest = std::numeric_limits<T>::quiet_NaN();
  const auto levels = static_cast<T>((1 << bits) - 1);
  const T factor = highest > 0 ? levels / highest : T(0);
  const int64_t per_byte = 8 / bits;
  const auto code = [&](int64_t j) -> uint32_t {
    // 24 random bits, centred: the chance of rounding up is right to 2^-25.
    const T u = (static_cast<T>(random[j] >> 8) + T(0.5)) * T(1.0 / 16777216.0);
    const T level = p[j] * factor + u;
    const T bounded = level < levels ? level : levels;  // also catches the rounding of p / max * levels
    return static_cast<uint32_t>(bounded);
  };
  if (nan) {
    std::memset(codes, 0xff, static_cast<size_t>((keys * bits + 7) / 8));
  } else if (bits == 8) {
    for (int64_t j = 0; j < keys; ++j) codes[j] = static_cast<uint8_t>(code(j));
  } else {
    for (int64_t j = 0; j < keys; j += per_byte) {
      uint32_t byte = 0;
      for (int64_t e = 0; e < per_byte && j + e < keys; ++e) byte |= code(j + e) << (e * bits);
      codes[j / per_byte] = static_cast<uint8_t>(byte);
    }
  }
  return highest;
}

template <typename T>
void dequantize_row(const uint8_t* codes, T highest, int64_t keys, int64_t bits, T* p) {
  const T step = highest / static_cast<T>((1 << bits) - 1);
  if (bits == 8) {
#pragma omp simd
    for (int64_t j = 0; j < keys; ++j) p[j] = static_cast<T>(codes[j]) * step;
    return;
  }
  const int64_t per_byte = 8 / bits;
  const uint32_t mask = (1u << bits) - 1;
  const int64_t whole = keys / per_byte;
  for (int64_t byte = 0; byte < whole; ++byte) {
    for (int64_t e = 0; e < per_byte; ++e) {
      p[byte * per_byte + e] = static_cast<T>((codes[byte] >> (e * bits)) & mask) * step;
    }
  }
  for (int64_t j = whole * per_byte; j < keys; ++j) {
    p[j] = static_cast<T>((codes[j / per_byte] >> ((j % per_byte) * bits)) & mask) * step;
  }
}

// --- curve: ranks in ceil(log2 n) bits, and 2m + 2 numbers ------------------------------------------

// A 64-bit window covers any rank of up to 32 bits at any bit offset, because 32 + 7 < 64.
[[maybe_unused]] void pack_ranks(const uint32_t* ranks, int64_t keys, int64_t bits, uint8_t* out) {
  const int64_t bytes = (keys * bits + 7) / 8;
  uint64_t window = 0;
  int64_t filled = 0, written = 0;
  for (int64_t j = 0; j < keys; ++j) {
    window |= static_cast<uint64_t>(ranks[j]) << filled;
    filled += bits;
    while (filled >= 8) {
      out[written++] = static_cast<uint8_t>(window);
      window >>= 8;
      filled -= 8;
    }
  }
  if (written < bytes) out[written] = static_cast<uint8_t>(window);
}

[[maybe_unused]] void unpack_ranks(const uint8_t* in, int64_t keys, int64_t bits, uint32_t* ranks) {
  const int64_t bytes = (keys * bits + 7) / 8;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  // Elements whose 8-byte window lies inside the row are read whole, the last few byte by byte.
  int64_t safe = bits == 0 ? 0 : (bytes - 8) * 8 / bits;
  safe = safe < 0 ? 0 : (safe < keys ? safe : keys);
  for (int64_t j = 0; j < safe; ++j) {
    const int64_t at = j * bits;
    uint64_t window;
    std::memcpy(&window, in + (at >> 3), 8);
    ranks[j] = static_cast<uint32_t>((window >> (at & 7)) & mask);
  }
  for (int64_t j = safe; j < keys; ++j) {
    const int64_t at = j * bits;
    uint64_t window = 0;
    for (int64_t byte = at >> 3, shift = 0; byte < bytes && shift < 64; ++byte, shift += 8) {
      window |= static_cast<uint64_t>(in[byte]) << shift;
    }
    ranks[j] = static_cast<uint32_t>((window >> (at & 7)) & mask);
  }
}

// Descending order of z, ties by position. Short rows count, which needs no branch; long rows sort by
// radix. order[rank] = position.
constexpr int64_t kCountingKeys = 96;

template <typename T>
void rank_by_counting(const T* z, int64_t keys, uint32_t* ranks) {
  for (int64_t i = 0; i < keys; ++i) {
    const T value = z[i];
    int32_t rank = 0;
#pragma omp simd reduction(+ : rank)
    for (int64_t j = 0; j < i; ++j) rank += z[j] >= value ? 1 : 0;
#pragma omp simd reduction(+ : rank)
    for (int64_t j = i + 1; j < keys; ++j) rank += z[j] > value ? 1 : 0;
    ranks[i] = static_cast<uint32_t>(rank);
  }
}

// Unsigned keys whose ascending order is the values' descending order.
REMNANT_ALWAYS_INLINE uint32_t descending_key(float z) {
  const auto bits = std::bit_cast<uint32_t>(z + 0.0f);  // -0 and 0 tie
  return (bits >> 31) != 0 ? bits : ~(bits | 0x80000000u);
}
REMNANT_ALWAYS_INLINE uint64_t descending_key(double z) {
  const auto bits = std::bit_cast<uint64_t>(z + 0.0);
  return (bits >> 63) != 0 ? bits : ~(bits | 0x8000000000000000u);
}

template <typename T>
using SortKey = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <typename T>
void rank_by_radix(const T* z, int64_t keys, uint32_t* ranks, SortKey<T>* key, SortKey<T>* key2,
                   uint32_t* order, uint32_t* order2) {
  for (int64_t j = 0; j < keys; ++j) {
    key[j] = descending_key(z[j]);
    order[j] = static_cast<uint32_t>(j);
  }
  for (unsigned shift = 0; shift < 8 * sizeof(T); shift += 8) {
    uint32_t start[256] = {};
    for (int64_t j = 0; j < keys; ++j) ++start[(key[j] >> shift) & 255];
    uint32_t sum = 0;
    for (uint32_t& bucket : start) {
      const uint32_t count = bucket;
      bucket = sum;
      sum += count;
    }
    for (int64_t j = 0; j < keys; ++j) {
      const uint32_t at = start[(key[j] >> shift) & 255]++;
      key2[at] = key[j];
      order2[at] = order[j];
    }
    SortKey<T>* const swap_key = key;
    key = key2;
    key2 = swap_key;
    uint32_t* const swap_order = order;
    order = order2;
    order2 = swap_order;
  }
  for (int64_t r = 0; r < keys; ++r) ranks[order[r]] = static_cast<uint32_t>(r);
}

template <typename T>
struct CurveScratch {
  SortKey<T>*key, *key2;
  uint32_t *ranks, *order, *order2;
  T* by_rank;

  CurveScratch(void* memory, int64_t keys) {
    key = static_cast<SortKey<T>*>(memory);
    key2 = key + keys;
    by_rank = reinterpret_cast<T*>(key2 + keys);
    ranks = reinterpret_cast<uint32_t*>(by_rank + keys);
    order = ranks + keys;
    order2 = order + keys;
  }
};

// Alg. 1 of the paper on one row: z the logits (-inf where masked), p their softmax. Slots 0..m-1 of
// the table are h_1..h_m, slots m..2m-1 are l_m..l_1, then beta and the number of valid keys. Rows
// with no more than 2m valid keys keep all of them, by rank.
template <typename T>
void curve_encode_row(const T* z, const T* p, int64_t keys, int64_t m, uint8_t* codes, T* table,
                      CurveScratch<T>& scratch) {
  int64_t valid = 0;
  for (int64_t j = 0; j < keys; ++j) valid += z[j] != -std::numeric_limits<T>::infinity() ? 1 : 0;
  uint32_t* ranks = scratch.ranks;
  if (keys <= kCountingKeys) {
    rank_by_counting(z, keys, ranks);
    // NaN compares false with everything and would leave holes.
    for (int64_t r = 0; r < keys; ++r) scratch.order[r] = 0;
  } else {
    rank_by_radix(z, keys, ranks, scratch.key, scratch.key2, scratch.order, scratch.order2);
  }
  uint32_t* order = scratch.order;
  for (int64_t j = 0; j < keys; ++j) order[ranks[j]] = static_cast<uint32_t>(j);
  pack_ranks(ranks, keys, rank_bits(keys), codes);

  const int64_t slots = curve_width(keys, m) - 2;
  T beta = 0;
  if (valid <= 2 * m) {
    for (int64_t r = 0; r < slots; ++r) table[r] = r < valid ? p[order[r]] : T(0);
  } else {
    for (int64_t r = 0; r < m; ++r) {
      table[r] = p[order[r]];
      table[m + r] = p[order[valid - m + r]];
    }
    const T highest = table[m - 1];
    const T rest = T(1) - highest;
    const T floor = T(1.0 / 16777216.0);
    const auto count = static_cast<T>(valid - 2 * m + 2);
    // ln(h_m / l_m) from the logits: l_m itself may have underflowed.
    const T fall = z[order[m - 1]] - z[order[valid - m]];
    beta = (fall + T(2) * (highest - p[order[m]])) / (count * (rest < floor ? floor : rest));
    beta = beta > T(1e30) ? T(1e30) : beta;  // finite, so that beta * 0 is 0
  }
  table[slots] = beta;
  table[slots + 1] = static_cast<T>(valid);
}

template <typename T>
void curve_decode_row(const uint8_t* codes, const T* table, int64_t keys, int64_t m, bool paper_text, T* p,
                      CurveScratch<T>& scratch) {
  const int64_t slots = curve_width(keys, m) - 2;
  const auto valid = static_cast<int64_t>(table[slots + 1]);
  T* by_rank = scratch.by_rank;
  for (int64_t r = valid; r < keys; ++r) by_rank[r] = 0;
  if (valid <= 2 * m) {
    for (int64_t r = 0; r < valid; ++r) by_rank[r] = table[r];
  } else {
    const T beta = table[slots];
    const T alpha = table[m - 1];
    const int64_t middle_end = valid - m;
    T kept = 0;
    for (int64_t r = 0; r < m; ++r) {
      by_rank[r] = table[r];
      by_rank[middle_end + r] = table[m + r];
      kept += table[r] + table[m + r];
    }
    // Relative to its first element, so that the sum that rescales it never underflows.
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t r = m; r < middle_end; ++r) {
      const T value = exponential(-beta * static_cast<T>(static_cast<int32_t>(r - m)));
      by_rank[r] = value;
      sum += value;
    }
    T factor = alpha * exponential(-beta);
    if (paper_text) {
      by_rank[middle_end] = alpha * exponential(-beta * static_cast<T>(middle_end - m + 1));
    } else {
      const T missing = T(1) - kept;
      factor = (missing < 0 ? T(0) : missing) / sum;
      // h_m itself is 0: no curve to follow, the rest is spread evenly.
      if (alpha == 0) {
        for (int64_t r = m; r < middle_end; ++r) by_rank[r] = 1;
        factor = (missing < 0 ? T(0) : missing) / static_cast<T>(middle_end - m);
      }
    }
#pragma omp simd
    for (int64_t r = m; r < middle_end; ++r) by_rank[r] *= factor;
  }
  unpack_ranks(codes, keys, rank_bits(keys), scratch.ranks);
  for (int64_t j = 0; j < keys; ++j) p[j] = by_rank[scratch.ranks[j]];
}

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
