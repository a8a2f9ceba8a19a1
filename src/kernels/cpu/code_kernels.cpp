// Low-bit storage by stochastic rounding, unbiased: E[decode(encode(x))] = x. Memory's speed is the aim, so a
// group's codes are laid out such that packing is an OR of vectors.

#include "kernels/cpu/low_bits.h"
#include "kernels/cpu/variants.h"

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

template <bool kWhole, int kBits, bool kKinked, typename S>
REMNANT_ALWAYS_INLINE void encode_group(const S* x, int64_t size, const uint16_t* random, uint8_t* out,
                                        uint16_t* table) {
  using A = Wide<S>;
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr A levels = kKinked ? (1 << (kBits - 1)) - 1 : (1 << kBits) - 1;
  const int64_t count = kWhole ? kCodeGroup : size;
  Vector<A> highest = broadcast(-std::numeric_limits<A>::infinity()), lowest = highest;  // of x and of -x
  Bits<A> wrong{};
  each_vector<A>(count, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    Vector<A> v = load_count(x + j, lanes);
    if constexpr (std::is_same_v<decltype(lanes), int64_t>) {
      v = first_lanes<A>(lanes) ? v : broadcast(static_cast<A>(v[0]));
    }
    highest = v > highest ? v : highest;
    lowest = -v > lowest ? -v : lowest;
    wrong |= ~((v < A(0) ? -v : v) <= std::numeric_limits<A>::max());
  });
  uint16_t minimum = kKinked ? kNan : 0, step = kNan;
  A low = 0, inverse = 0, inverse_below = 0;
  const auto step_of = [](A range) __attribute__((always_inline)) {
    const A exact = range / levels;
    return narrow_outwards<true>(exact > 0 && exact < A(kLeastStep) ? A(kLeastStep) : exact);
  };
  const auto inverse_of = [](uint16_t bits) __attribute__((always_inline)) {
    return bits == 0 ? A(0) : A(1) / widen_bfloat16(bits);
  };
  if (kKinked) {
    // In this order: +0, not -0, of a group of zeros, or its step would turn signs.
    const A above = std::max(A(0), highest_lane<A>(highest)), below = std::max(A(0), highest_lane<A>(lowest));
    constexpr A most = static_cast<A>(std::numeric_limits<float>::max());
    if (bits_of<A>(wrong) == 0 && above <= most && below <= most) {
      step = step_of(above);
      minimum = step_of(below);
      inverse = inverse_of(step);
      inverse_below = inverse_of(minimum);
    }
  } else if (bits_of<A>(wrong) == 0) {
    minimum = narrow_outwards<false>(-highest_lane<A>(lowest));
    low = widen_bfloat16(minimum);
    const A range = highest_lane<A>(highest) - low;
    if (range <= static_cast<A>(std::numeric_limits<float>::max())) {
      step = step_of(range);
      inverse = inverse_of(step);
    } else {
      low = 0;
    }
  }
  table[0] = minimum;
  table[1] = step;
  Bits<A> vectors[kCodeGroup / kWidth<A>] = {};
  // A byte's parts beyond a short group are 0.
  alignas(64) uint8_t codes[kWhole ? 1 : 2 * kCodeGroup + 8] = {};
  if (kKinked || inverse != 0) {
    each_vector<A>(count, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      const Vector<A> u =
          __builtin_convertvector((Bits<A>)widen<A>(load_shorts<A>(random + j)), Vector<A>) * A(0x1p-16) +
          A(0x1p-17);
      const Vector<A> v = load_count(x + j, lanes);
      const Vector<A> level = kKinked ? v * (v > A(0) ? broadcast(inverse) : broadcast(-inverse_below)) + u
                                      : (v - low) * inverse + u;
      Bits<A> code = __builtin_convertvector(level < levels ? level : broadcast(levels), Bits<A>);
      if constexpr (kKinked) code |= v > A(0) ? Bits<A>{} : Bits<A>{} + (Lane(1) << (kBits - 1));
      if constexpr (kWhole) {
        vectors[j / kWidth<A>] = code;
      } else if constexpr (std::is_same_v<decltype(lanes), int64_t>) {
        for (int64_t l = 0; l < lanes; ++l) codes[j + l] = static_cast<uint8_t>(code[l]);
      } else {
        store_bytes<A>(codes + j, code);
      }
    });
  }
  if constexpr (kWhole) {
    pack_vectors<A, kBits>(vectors, out);
  } else {
    pack<kBits>(codes, count, out);
  }
}

template <bool kWhole, int kBits, bool kKinked, typename S>
REMNANT_ALWAYS_INLINE void decode_group(const uint8_t* in, const uint16_t* table, int64_t size, S* y) {
  using A = Wide<S>;
  const A low = widen_bfloat16(table[0]), step = widen_bfloat16(table[1]);
  alignas(64) uint8_t codes[kWhole ? 1 : 2 * kCodeGroup + 8];
  if constexpr (!kWhole) unpack<kBits>(in, size, codes);
  each_vector<A>(kWhole ? kCodeGroup : size, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    const Bits<A> code = kWhole ? unpack_vector<A, kBits>(in, j) : load_bytes<A>(codes + j);
    if constexpr (kKinked) {
      constexpr int sign = 1 << (kBits - 1);
      const Vector<A> level = __builtin_convertvector(code & (sign - 1), Vector<A>);
      store_count(y + j, level * ((code & sign) != 0 ? broadcast(-low) : broadcast(step)), lanes);
    } else {
      store_count(y + j, __builtin_convertvector(code, Vector<A>) * step + low, lanes);
    }
  });
}

template <int kBits, bool kKinked, typename S>
void encode_elements(const LowBits& p, int64_t begin, int64_t end) {
  constexpr int64_t piece = 8 * kCodeGroup;
  uint16_t random[piece + kRandomSlack];
  const auto* const x = static_cast<const S*>(p.x);
  for (int64_t first = begin; first < end; first += piece) {
    const int64_t last = std::min(first + piece, end);
    // Whole vectors are read of a short group's bits.
    const uint16_t* const bits = random_flat(p.seed, Stream::rounding, first, last - first, random);
    for (int64_t e = first; e < last; e += kCodeGroup) {
      uint8_t* const out = p.codes + e * kBits / 8;
      uint16_t* const table = p.table + e / kCodeGroup * 2;
      if (last - e >= kCodeGroup) {
        encode_group<true, kBits, kKinked>(x + (e - p.first), kCodeGroup, bits + (e - first), out, table);
      } else {
        encode_group<false, kBits, kKinked>(x + (e - p.first), last - e, bits + (e - first), out, table);
      }
    }
  }
}

template <int kBits, bool kKinked, typename S>
void decode_elements(const LowBits& p, int64_t begin, int64_t end) {
  auto* const y = static_cast<S*>(p.y);
  for (int64_t e = begin; e < end; e += kCodeGroup) {
    const uint8_t* const in = p.codes + e * kBits / 8;
    const uint16_t* const table = p.table + e / kCodeGroup * 2;
    if (end - e >= kCodeGroup) {
      decode_group<true, kBits, kKinked>(in, table, kCodeGroup, y + (e - p.first));
    } else {
      decode_group<false, kBits, kKinked>(in, table, end - e, y + (e - p.first));
    }
  }
}

template <typename F>
REMNANT_ALWAYS_INLINE void dispatch_bits(int64_t bits, F&& f) {
  if (bits == 8) return f(std::integral_constant<int, 8>{});
  if (bits == 4) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 2>{});
}

}  // namespace

void encode(const LowBits& p, int64_t begin, int64_t end) {
  dispatch_bits(p.bits, [&](auto bits) {
    dispatch(p.element, [&](auto element) {
      p.kinked ? encode_elements<bits(), true, decltype(element)>(p, begin, end)
               : encode_elements<bits(), false, decltype(element)>(p, begin, end);
    });
  });
}

void decode(const LowBits& p, int64_t begin, int64_t end) {
  dispatch_bits(p.bits, [&](auto bits) {
    dispatch(p.element, [&](auto element) {
      p.kinked ? decode_elements<bits(), true, decltype(element)>(p, begin, end)
               : decode_elements<bits(), false, decltype(element)>(p, begin, end);
    });
  });
}

}  // namespace remnant::kernels::REMNANT_VARIANT
