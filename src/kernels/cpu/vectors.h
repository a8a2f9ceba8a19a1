#pragma once

// Vectors of the instruction set that a source is compiled for: the compiler's vector types, with
// intrinsics only where those have no word for it. Included inside a variant's translation unit alone.

#include "kernels/philox.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  typedef T Loose __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::Type;
template <typename T>
using Bits = Vector<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
template <typename T>
using UnsignedBits = Vector<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <typename T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::Loose*>(p);
}
template <typename T>
REMNANT_ALWAYS_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::Loose*>(p) = v;
}
template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// 0, 1, 2, ...
template <typename V>
REMNANT_ALWAYS_INLINE V lane_numbers() {
  V lanes{};
  for (size_t l = 0; l < sizeof(V) / sizeof(lanes[0]); ++l) lanes[l] = static_cast<decltype(+lanes[0])>(l);
  return lanes;
}
// All bits set in the first `count` lanes.
template <typename T>
REMNANT_ALWAYS_INLINE Bits<T> first_lanes(int64_t count) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return lane_numbers<Bits<T>>() < static_cast<Lane>(count);
}

// The first `count` lanes; the others are 0 and not read.
template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> load_part(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return (Vector<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  } else {
    return (Vector<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    return (Vector<T>)_mm256_maskload_ps(p, (__m256i)first_lanes<T>(count));
  } else {
    return (Vector<T>)_mm256_maskload_pd(p, (__m256i)first_lanes<T>(count));
  }
#else
  Vector<T> v{};
  for (int l = 0; l < kWidth<T>; ++l) {
    if (l < count) v[l] = p[l];
  }
  return v;
#endif
}
template <typename T>
REMNANT_ALWAYS_INLINE void store_part(T* p, Vector<T> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) {
    _mm256_maskstore_ps(p, (__m256i)first_lanes<T>(count), (__m256)v);
  } else {
    _mm256_maskstore_pd(p, (__m256i)first_lanes<T>(count), (__m256d)v);
  }
#else
  for (int l = 0; l < kWidth<T>; ++l) {
    if (l < count) p[l] = v[l];
  }
#endif
}

// --- exponential -----------------------------------------------------------------------------------

// exp of x <= 0 (or NaN) by 2^k times a polynomial, within 2 units in the last place; exactly 0 below the
// normal range; NaN stays NaN: the bound's comparison is false for it.
REMNANT_ALWAYS_INLINE Vector<float> exponential_of_nonpositive(Vector<float> x) {
  constexpr float lowest = -87.3365f, shifter = 12582912.0f;
  const Vector<float> bounded = x < lowest ? broadcast(lowest) : x;
  const Vector<float> shifted = bounded * 1.44269504088896341f + shifter;
  const Vector<float> k = shifted - shifter;
  const Vector<float> r = (bounded - k * 0.693359375f) - k * -2.12194440e-4f;
  Vector<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + (r + 1.0f);
  // shifted's low bits are k: its own exponent field drops out of the shift.
  const auto power = ((Bits<float>)shifted + 127) << 23;
  return x < lowest ? Vector<float>{} : y * (Vector<float>)power;
}

REMNANT_ALWAYS_INLINE Vector<double> exponential_of_nonpositive(Vector<double> x) {
  constexpr double lowest = -708.0, shifter = 6755399441055744.0;
  const Vector<double> bounded = x < lowest ? broadcast(lowest) : x;
  const Vector<double> shifted = bounded * 1.4426950408889634074 + shifter;
  const Vector<double> k = shifted - shifter;
  const Vector<double> r = (bounded - k * 6.93145751953125e-1) - k * 1.42860682030941723212e-6;
  Vector<double> y = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
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
  y = y * (r * r) + (r + 1.0);
  const auto power = ((Bits<double>)shifted + 1023) << 52;
  return x < lowest ? Vector<double>{} : y * (Vector<double>)power;
}

// --- transposition ---------------------------------------------------------------------------------

template <int H, typename V, size_t... I>
REMNANT_ALWAYS_INLINE V take_even_blocks(V a, V b, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & H) == 0 ? I : I - H + n)...);
}
template <int H, typename V, size_t... I>
REMNANT_ALWAYS_INLINE V take_odd_blocks(V a, V b, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & H) == 0 ? I + H : I + n)...);
}

// One stage of a butterfly: swaps the off-diagonal H x H blocks of every 2H x 2H block.
template <int H, typename T>
REMNANT_ALWAYS_INLINE void transpose_stage(Vector<T> (&r)[kWidth<T>]) {
  using Lanes = std::make_index_sequence<static_cast<size_t>(kWidth<T>)>;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i) {
    if ((i & H) == 0) {
      const Vector<T> a = r[i], b = r[i + H];
      r[i] = take_even_blocks<H>(a, b, Lanes{});
      r[i + H] = take_odd_blocks<H>(a, b, Lanes{});
    }
  }
}
template <typename T>
REMNANT_ALWAYS_INLINE void transpose_square(Vector<T> (&r)[kWidth<T>]) {
  transpose_stage<1, T>(r);
  if constexpr (kWidth<T> > 2) transpose_stage<2, T>(r);
  if constexpr (kWidth<T> > 4) transpose_stage<4, T>(r);
  if constexpr (kWidth<T> > 8) transpose_stage<8, T>(r);
}

// to[c][r] = factor * from[r][c]. kPad: `to` has room for whole vectors of rows, and rows beyond `rows`
// become 0; else nothing outside of [cols][rows] is written.
template <bool kPad, typename T>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t cols, T factor, T* to,
               int64_t to_stride) {
  constexpr int width = kWidth<T>;
  for (int64_t r0 = 0; r0 < rows; r0 += width) {
    const int64_t height = rows - r0 < width ? rows - r0 : width;
    for (int64_t c0 = 0; c0 < cols; c0 += width) {
      const int64_t wide = cols - c0 < width ? cols - c0 : width;
      Vector<T> square[width];
      const T* corner = from + r0 * from_stride + c0;
      if (wide == width && height == width) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) square[i] = load(corner + i * from_stride) * factor;
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
          square[i] = Vector<T>{};
          if (i < height) square[i] = load_part(corner + i * from_stride, wide) * factor;
        }
      }
      transpose_square<T>(square);
      T* out = to + c0 * to_stride + r0;
      if (kPad || height == width) {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
          if (i < wide) store(out + i * to_stride, square[i]);
        }
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < width; ++i) {
          if (i < wide) store_part(out + i * to_stride, square[i], height);
        }
      }
    }
  }
}

template <int H, typename V, size_t... I>
REMNANT_ALWAYS_INLINE V swap_blocks(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ H)...);
}

template <typename T>
REMNANT_ALWAYS_INLINE T add_lanes(Vector<T> v) {
  using Lanes = std::make_index_sequence<static_cast<size_t>(kWidth<T>)>;
  if constexpr (kWidth<T> > 8) v += swap_blocks<8>(v, Lanes{});
  if constexpr (kWidth<T> > 4) v += swap_blocks<4>(v, Lanes{});
  if constexpr (kWidth<T> > 2) v += swap_blocks<2>(v, Lanes{});
  v += swap_blocks<1>(v, Lanes{});
  return v[0];
}

// --- random numbers --------------------------------------------------------------------------------

using Words = Vector<uint64_t>;  // a 32-bit word in the low half of each lane; high halves are ignored

// Low half times low half, all 64 bits.
REMNANT_ALWAYS_INLINE Words multiply_low_halves(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Philox 4x32-10 of counters (block, row + lane, head, word) for kWidth<uint64_t> consecutive rows: out[w]
// has word w of each row. The first round is scalar: only the row differs between lanes.
REMNANT_ALWAYS_INLINE void philox_rows(const Seed& seed, Stream stream, uint32_t block, uint32_t row,
                                       uint32_t head, Words (&out)[4]) {
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * block;
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * head;
  uint32_t key0 = seed.key0, key1 = seed.key1;
  Words c0 = (lane_numbers<Words>() + row) ^ ((product1 >> 32) ^ key0);
  Words c1 = Words{} + (product1 & 0xffffffffu);
  Words c2 = Words{} + (((product0 >> 32) ^ seed.counter3(stream)) ^ key1);
  Words c3 = Words{} + (product0 & 0xffffffffu);
#pragma GCC unroll 10
  for (int round = 1; round < kPhiloxRounds; ++round) {
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
    const Words next0 = multiply_low_halves(c0, Words{} + kPhiloxM0);
    const Words next1 = multiply_low_halves(c2, Words{} + kPhiloxM1);
    c0 = (next1 >> 32) ^ c1 ^ (Words{} + key0);
    c2 = (next0 >> 32) ^ c3 ^ (Words{} + key1);
    c1 = next1;
    c3 = next0;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

template <typename V, size_t... I>
REMNANT_ALWAYS_INLINE V even_lanes(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}

// Word w of kWidth<T> consecutive rows, one a lane of T's size; of 64-bit lanes only the low half counts.
template <typename T>
REMNANT_ALWAYS_INLINE void random_rows(const Seed& seed, Stream stream, uint32_t block, uint32_t row,
                                       uint32_t head, UnsignedBits<T> (&out)[4]) {
  if constexpr (sizeof(T) == 8) {
    philox_rows(seed, stream, block, row, head, out);
  } else {
    constexpr auto half = static_cast<uint32_t>(kWidth<uint64_t>);
    Words low[4], high[4];
    philox_rows(seed, stream, block, row, head, low);
    philox_rows(seed, stream, block, row + half, head, high);
    for (int w = 0; w < 4; ++w) {
      out[w] = even_lanes((Vector<uint32_t>)low[w], (Vector<uint32_t>)high[w],
                          std::make_index_sequence<static_cast<size_t>(kWidth<uint32_t>)>{});
    }
  }
}

// What dropout multiplies columns [8 block, 8 block + 8) of kWidth<T> consecutive rows by.
template <typename T>
REMNANT_ALWAYS_INLINE void dropout_factors(const Seed& seed, int64_t threshold, T keep_scale, uint32_t block,
                                           uint32_t row, uint32_t head, Vector<T> (&out)[kDropoutColumns]) {
  UnsignedBits<T> words[4];
  random_rows<T>(seed, Stream::dropout, block, row, head, words);
  // Both halves are compared in the top 16 bits of a lane: what stands below cannot change the outcome.
  constexpr int spare = 8 * static_cast<int>(sizeof(T)) - 32;
  using Lane = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const Lane bound = static_cast<Lane>(threshold) << (16 + spare);
  for (int w = 0; w < 4; ++w) {
    const UnsignedBits<T> odd = words[w] << spare;
    const UnsignedBits<T> even = words[w] << (16 + spare);
    out[2 * w] = even >= bound ? broadcast(keep_scale) : Vector<T>{};
    out[2 * w + 1] = odd >= bound ? broadcast(keep_scale) : Vector<T>{};
  }
}

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
