#pragma once

// What kernels of low-bit codes share: bfloat16 bounds that are rounded outwards, and a group's codes to bits
// and back. Included inside a variant's translation unit alone.

#include "kernels/cpu/elements.h"

#include <bit>
#include <cmath>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

constexpr uint16_t kNan = 0x7fc0;
// Steps below it would have no finite inverse.
constexpr float kLeastStep = 0x1p-120f;

REMNANT_ALWAYS_INLINE float widen_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
// The nearest bfloat16 that is no greater (kUp: no less).
template <bool kUp, typename T>
REMNANT_ALWAYS_INLINE uint16_t narrow_outwards(T x) {
  auto f = static_cast<float>(x);
  if (kUp ? static_cast<T>(f) < x : static_cast<T>(f) > x) {
    f = std::nextafter(
        f, kUp ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity());
  }
  const auto bits = std::bit_cast<uint32_t>(f);
  const bool away = ((bits >> 31) != 0) != kUp && (bits & 0xffffu) != 0;  // truncation goes towards 0
  return static_cast<uint16_t>((bits >> 16) + (away ? 1 : 0));
}

template <typename T>
struct BytesOf {
  typedef uint8_t Type __attribute__((vector_size(kWidth<T>)));
  typedef uint8_t Loose __attribute__((vector_size(kWidth<T>), aligned(1), may_alias));
};

// By way of 16 bits, which compilers have instructions for.
template <typename T>
REMNANT_ALWAYS_INLINE Bits<T> load_bytes(const uint8_t* p) {
  const typename BytesOf<T>::Type bytes = *reinterpret_cast<const typename BytesOf<T>::Loose*>(p);
  return (Bits<T>)widen<T>(__builtin_convertvector(bytes, Shorts<T>));
}
template <typename T>
REMNANT_ALWAYS_INLINE void store_bytes(uint8_t* p, Bits<T> v) {
  const Shorts<T> shorts = __builtin_convertvector((UnsignedBits<T>)v & 255u, Shorts<T>);
  *reinterpret_cast<typename BytesOf<T>::Loose*>(p) =
      __builtin_convertvector(shorts, typename BytesOf<T>::Type);
}

template <typename T>
REMNANT_ALWAYS_INLINE T highest_lane(Vector<T> v) {
  using Lanes = std::make_index_sequence<static_cast<size_t>(kWidth<T>)>;
  const auto with = [&](Vector<T> other) __attribute__((always_inline)) { v = other > v ? other : v; };
  if constexpr (kWidth<T> > 8) with(swap_blocks<8>(v, Lanes{}));
  if constexpr (kWidth<T> > 4) with(swap_blocks<4>(v, Lanes{}));
  if constexpr (kWidth<T> > 2) with(swap_blocks<2>(v, Lanes{}));
  with(swap_blocks<1>(v, Lanes{}));
  return v[0];
}

// Codes of a short group, one a byte, to bits and back.
template <int kBits>
REMNANT_ALWAYS_INLINE void pack(const uint8_t* codes, int64_t size, uint8_t* out) {
  const int64_t stride = (size * kBits + 7) / 8;
  for (int64_t k = 0; k < stride; ++k) {
    uint32_t byte = codes[k];
    for (int part = 1; part < 8 / kBits; ++part) {
      byte |= static_cast<uint32_t>(codes[k + part * stride]) << (part * kBits);
    }
    out[k] = static_cast<uint8_t>(byte);
  }
}
template <int kBits>
REMNANT_ALWAYS_INLINE void unpack(const uint8_t* in, int64_t size, uint8_t* codes) {
  const int64_t stride = (size * kBits + 7) / 8;
  for (int part = 0; part < 8 / kBits; ++part) {
    for (int64_t k = 0; k < stride; ++k) {
      codes[k + part * stride] = static_cast<uint8_t>((in[k] >> (part * kBits)) & ((1 << kBits) - 1));
    }
  }
}
// Of a whole group, a vector for each kWidth elements.
template <typename T, int kBits>
REMNANT_ALWAYS_INLINE void pack_vectors(const Bits<T> (&codes)[kCodeGroup / kWidth<T>], uint8_t* out) {
  constexpr int64_t stride = kCodeGroup * kBits / 8;
  for (int64_t k = 0; k < stride; k += kWidth<T>) {
    Bits<T> bytes = codes[k / kWidth<T>];
    for (int part = 1; part < 8 / kBits; ++part) {
      bytes |= codes[(k + part * stride) / kWidth<T>] << (part * kBits);
    }
    store_bytes<T>(out + k, bytes);
  }
}
template <typename T, int kBits>
REMNANT_ALWAYS_INLINE Bits<T> unpack_vector(const uint8_t* in, int64_t j) {
  constexpr int64_t stride = kCodeGroup * kBits / 8;
  return load_bytes<T>(in + j % stride) >> (j / stride * kBits) & ((1 << kBits) - 1);
}

}  // namespace
}  // namespace remnant::kernels::REMNANT_VARIANT
