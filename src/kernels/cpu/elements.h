#pragma once

// Vectors of wide numbers from and to memory of any element type, and a flat tensor's random bits. Included
// inside a variant's translation unit alone.

#include "kernels/cpu/step_kernels.h"
#include "kernels/cpu/vectors.h"

#include <algorithm>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename S>
struct WideOf {
  using Type = float;
};
template <>
struct WideOf<double> {
  using Type = double;
};
template <typename S>
using Wide = typename WideOf<S>::Type;

// As many 16-bit words as a vector of T has lanes.
template <typename T>
struct ShortsOf {
  typedef uint16_t Type __attribute__((vector_size(kWidth<T> * 2)));
  typedef uint16_t Loose __attribute__((vector_size(kWidth<T> * 2), aligned(2), may_alias));
};
template <typename T>
using Shorts = typename ShortsOf<T>::Type;

template <typename T>
REMNANT_ALWAYS_INLINE Shorts<T> load_shorts(const void* p) {
  return *static_cast<const typename ShortsOf<T>::Loose*>(p);
}
template <typename T>
REMNANT_ALWAYS_INLINE void store_shorts(void* p, Shorts<T> v) {
  *static_cast<typename ShortsOf<T>::Loose*>(p) = v;
}

template <typename T>
REMNANT_ALWAYS_INLINE UnsignedBits<T> widen(Shorts<T> v) {
  return __builtin_convertvector(v, UnsignedBits<T>);
}

REMNANT_ALWAYS_INLINE Vector<float> widen_half(Shorts<float> v) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps((__m256i)v);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)v);
#else
  Vector<float> wide{};
  for (int l = 0; l < kWidth<float>; ++l) {
    _Float16 half;
    const uint16_t bits = v[l];
    std::memcpy(&half, &bits, 2);
    wide[l] = static_cast<float>(half);
  }
  return wide;
#endif
}
REMNANT_ALWAYS_INLINE Shorts<float> narrow_half(Vector<float> v) {
#if defined(__AVX512F__)
  return (Shorts<float>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Shorts<float>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  Shorts<float> narrow{};
  for (int l = 0; l < kWidth<float>; ++l) {
    const auto half = static_cast<_Float16>(v[l]);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    narrow[l] = bits;
  }
  return narrow;
#endif
}
// To the nearest, ties to even; NaN stays NaN.
REMNANT_ALWAYS_INLINE Shorts<float> narrow_bfloat16(Vector<float> v) {
  const auto bits = (UnsignedBits<float>)v;
  const UnsignedBits<float> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UnsignedBits<float> result = v == v ? rounded : UnsignedBits<float>{} + 0x7fc0u;
  return __builtin_convertvector(result, Shorts<float>);
}

template <typename S>
REMNANT_ALWAYS_INLINE Vector<Wide<S>> load_wide(const S* p) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return (Vector<float>)(widen<float>(load_shorts<float>(p)) << 16);
  } else if constexpr (std::is_same_v<S, Half>) {
    return widen_half(load_shorts<float>(p));
  } else {
    return load(p);
  }
}
template <typename S>
REMNANT_ALWAYS_INLINE void store_narrow(S* p, Vector<Wide<S>> v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    store_shorts<float>(p, narrow_bfloat16(v));
  } else if constexpr (std::is_same_v<S, Half>) {
    store_shorts<float>(p, narrow_half(v));
  } else {
    store(p, v);
  }
}

// A whole vector's number of lanes is known to the compiler, a row's end is not.
template <typename T>
using WholeVector = std::integral_constant<int64_t, kWidth<T>>;

template <typename S, typename Count>
REMNANT_ALWAYS_INLINE Vector<Wide<S>> load_count(const S* p, Count count) {
  if constexpr (!std::is_same_v<Count, int64_t>) {
    return load_wide(p);
  } else if constexpr (sizeof(S) == 2) {
    S part[kWidth<float>] = {};
    std::memcpy(part, p, static_cast<size_t>(count) * sizeof(S));
    return load_wide(part);
  } else {
    return load_part(p, count);
  }
}
template <typename S, typename Count>
REMNANT_ALWAYS_INLINE void store_count(S* p, Vector<Wide<S>> v, Count count) {
  if constexpr (!std::is_same_v<Count, int64_t>) {
    store_narrow(p, v);
  } else if constexpr (sizeof(S) == 2) {
    S part[kWidth<float>];
    store_narrow(part, v);
    std::memcpy(p, part, static_cast<size_t>(count) * sizeof(S));
  } else {
    store_part(p, v, count);
  }
}

// f(j, count) for the vectors of T that cover [0, size).
template <typename T, typename F>
REMNANT_ALWAYS_INLINE void each_vector(int64_t size, F&& f) {
  int64_t j = 0;
  for (; j + kWidth<T> <= size; j += kWidth<T>) f(j, WholeVector<T>{});
  if (j < size) f(j, size - j);
}

template <typename F>
REMNANT_ALWAYS_INLINE void dispatch(Element element, F&& f) {
  switch (element) {
    case Element::f32:
      return f(float{});
    case Element::f64:
      return f(double{});
    case Element::bf16:
      return f(BFloat16{});
    case Element::f16:
      return f(Half{});
  }
}

// --- one bit a lane ----------------------------------------------------------------------------------

// Bit l: whether lane l is set (all its bits, or none).
template <typename T>
REMNANT_ALWAYS_INLINE uint64_t bits_of(Bits<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_movepi32_mask((__m512i)mask);
  else
    return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  else
    return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
  else
    return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#else
  uint64_t bits = 0;
  for (int l = 0; l < kWidth<T>; ++l) bits |= (mask[l] != 0 ? uint64_t{1} : uint64_t{0}) << l;
  return bits;
#endif
}
// Lane l set where bit l is.
template <typename T>
REMNANT_ALWAYS_INLINE Bits<T> lanes_of(uint64_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Bits<T>)_mm512_movm_epi32(static_cast<__mmask16>(bits));
  else
    return (Bits<T>)_mm512_movm_epi64(static_cast<__mmask8>(bits));
#else
  using Lane = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const UnsignedBits<T> own = (UnsignedBits<T>{} + Lane{1}) << lane_numbers<UnsignedBits<T>>();
  return ((UnsignedBits<T>{} + static_cast<Lane>(bits)) & own) != UnsignedBits<T>{};
#endif
}

// --- random bits of a flat tensor --------------------------------------------------------------------

template <typename V, size_t... I>
REMNANT_ALWAYS_INLINE V interleave_low(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((I & 1) == 0 ? I / 2 : I / 2 + sizeof...(I))...);
}
template <typename V, size_t... I>
REMNANT_ALWAYS_INLINE V interleave_high(V a, V b, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I & 1) == 0 ? n / 2 + I / 2 : n / 2 + I / 2 + n)...);
}

// Philox of kGroups * kWidth<uint64_t> consecutive blocks of one row; several groups hide the
// multiplications' latency. Element e of a block is the low (even e) or high half of word e / 2.
template <int kGroups>
REMNANT_ALWAYS_INLINE void random_blocks(const Seed& seed, Stream stream, uint32_t row, uint32_t block,
                                         uint16_t* out) {
  constexpr auto lanes = static_cast<uint32_t>(kWidth<uint64_t>);
  Words c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  uint32_t key0 = seed.key0, key1 = seed.key1;
  for (int g = 0; g < kGroups; ++g) {
    c0[g] = lane_numbers<Words>() + (block + static_cast<uint32_t>(g) * lanes);
    c1[g] = Words{} + row;
    c2[g] = Words{};
    c3[g] = Words{} + seed.counter3(stream);
  }
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const Words next0 = multiply_low_halves(c0[g], Words{} + kPhiloxM0);
      const Words next1 = multiply_low_halves(c2[g], Words{} + kPhiloxM1);
      c0[g] = (next1 >> 32) ^ c1[g] ^ (Words{} + key0);
      c2[g] = (next0 >> 32) ^ c3[g] ^ (Words{} + key1);
      c1[g] = next1;
      c3[g] = next0;
    }
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  using Lanes = std::make_index_sequence<static_cast<size_t>(kWidth<uint64_t>)>;
  for (int g = 0; g < kGroups; ++g) {
    const Words first = (c0[g] & 0xffffffffu) | (c1[g] << 32);
    const Words second = (c2[g] & 0xffffffffu) | (c3[g] << 32);
    auto* const words = reinterpret_cast<uint64_t*>(out + g * lanes * kDropoutColumns);
    store(words, interleave_low(first, second, Lanes{}));
    store(words + lanes, interleave_high(first, second, Lanes{}));
  }
}

constexpr int kRandomGroups = 2;
// What random_flat may write beyond the elements asked for, before and after.
constexpr int64_t kRandomSlack = 2 * kRandomGroups * kWidth<uint64_t> * kDropoutColumns;

// The bits of elements [first, first + count), at the returned address inside of `out`, which has room for
// count + kRandomSlack.
REMNANT_ALWAYS_INLINE const uint16_t* random_flat(const Seed& seed, Stream stream, int64_t first,
                                                  int64_t count, uint16_t* out) {
  constexpr int64_t step = kRandomGroups * kWidth<uint64_t> * kDropoutColumns;
  const int64_t begin = first / kDropoutColumns * kDropoutColumns;
  for (int64_t e = begin; e < first + count;) {
    const int64_t row = e / kFlatChunk;
    const int64_t column = e % kFlatChunk;
    random_blocks<kRandomGroups>(seed, stream, static_cast<uint32_t>(row),
                                 static_cast<uint32_t>(column / kDropoutColumns), out + (e - begin));
    e += std::min(step, kFlatChunk - column);
  }
  return out + (first - begin);
}

// 0 or keep_scale, by the bits at p.
template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> dropout_factor(const uint16_t* p, int64_t threshold, T keep_scale) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const auto bits = (Bits<T>)widen<T>(load_shorts<T>(p));
  return bits >= static_cast<Lane>(threshold) ? broadcast(keep_scale) : Vector<T>{};
}

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
