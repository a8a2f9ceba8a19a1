// Activations. ReLU's backward needs one bit an element. GELU's and SiLU's derivative is a function of one
// number, so a few bits that say in which interval x lies stand for it (Novikov et al., "Few-bit backward",
// ICML 2023). Bits lie in planes: a comparison's result is stored as it comes out of the vector unit.

#include "kernels/cpu/elements.h"
#include "kernels/cpu/variants.h"

#include <bit>
#include <cmath>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

static_assert(std::endian::native == std::endian::little);

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> magnitude(Vector<T> x) {
  return x < T(0) ? -x : x;
}

// The normal distribution's Phi(x) and exp(-x^2 / 2). With t = 1 / (1 + |x| / 4), Phi(-|x|) is exp(-x^2 / 2)
// t times a polynomial in t: the Chebyshev interpolation of degree 9 on [0, 1], within 5e-8 of it.
REMNANT_ALWAYS_INLINE void normal(Vector<float> x, Vector<float>& below, Vector<float>& density) {
  const Vector<float> a = magnitude<float>(x);
  density = exponential_of_nonpositive(a * a * -0.5f);
  const Vector<float> t = 1.0f / (1.0f + a * 0.25f);
  Vector<float> y = t * 2.0137032907e-02f - 8.2339804475e-02f;
  y = y * t + 9.8084740976e-02f;
  y = y * t - 3.3975493931e-02f;
  y = y * t + 6.4878939907e-02f;
  y = y * t + 5.8618271691e-02f;
  y = y * t + 8.1662694677e-02f;
  y = y * t + 9.3461476722e-02f;
  y = y * t + 9.9736581395e-02f;
  y = y * t + 9.9735565991e-02f;
  const Vector<float> tail = density * t * y;
  below = x < 0.0f ? tail : 1.0f - tail;
}
// float64 is for reference: the C library's own, lane by lane.
REMNANT_ALWAYS_INLINE void normal(Vector<double> x, Vector<double>& below, Vector<double>& density) {
  density = exponential_of_nonpositive(x * x * -0.5);
  for (int l = 0; l < kWidth<double>; ++l) below[l] = 0.5 * std::erfc(x[l] * -0.70710678118654752440);
}

// sigmoid(v) and its derivative, without cancellation on either side.
template <typename T>
REMNANT_ALWAYS_INLINE void sigmoid(Vector<T> v, Vector<T>& value, Vector<T>& slope) {
  const Vector<T> e = exponential_of_nonpositive(-magnitude<T>(v));
  const Vector<T> inverse = T(1) / (T(1) + e);
  value = v < T(0) ? e * inverse : inverse;
  slope = e * inverse * inverse;
}

constexpr double kTanhScale = 1.5957691216057307117;  // 2 sqrt(2 / pi): tanh(u) = 2 sigmoid(2u) - 1
constexpr double kTanhCube = 0.044715;

template <ActivationKind kKind, typename T>
REMNANT_ALWAYS_INLINE Vector<T> value_of(Vector<T> x) {
  Vector<T> factor, ignored;
  if constexpr (kKind == ActivationKind::gelu) {
    normal(x, factor, ignored);
  } else if constexpr (kKind == ActivationKind::gelu_tanh) {
    sigmoid<T>(T(kTanhScale) * (x + T(kTanhCube) * (x * x * x)), factor, ignored);
  } else {
    sigmoid<T>(x, factor, ignored);
  }
  return x * factor;
}

template <ActivationKind kKind, typename T>
REMNANT_ALWAYS_INLINE Vector<T> derivative_of(Vector<T> x) {
  Vector<T> value, slope;
  if constexpr (kKind == ActivationKind::gelu) {
    normal(x, value, slope);
    return value + x * slope * T(0.39894228040143267794);
  } else if constexpr (kKind == ActivationKind::gelu_tanh) {
    sigmoid<T>(T(kTanhScale) * (x + T(kTanhCube) * (x * x * x)), value, slope);
    return value + x * slope * (T(kTanhScale) * (T(1) + T(3 * kTanhCube) * (x * x)));
  } else {
    sigmoid<T>(x, value, slope);
    return value + x * slope;
  }
}

template <typename T>
struct Levels {
  Vector<T> table;  // AVX-512, float: as many as a vector has lanes
  T level[16];
};

// level[code] for the codes whose bits are in `planes`.
template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> pick(const Levels<T>& levels, const Bits<T> (&planes)[4], int64_t bits) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    Bits<T> index = planes[0] & 1;
    for (int64_t i = 1; i < bits; ++i) index |= planes[i] & (1 << i);
    return (Vector<float>)_mm512_permutexvar_ps((__m512i)index, (__m512)levels.table);
  }
#endif
  const auto pair = [&](int64_t first) __attribute__((always_inline)) {
    return planes[0] ? broadcast(levels.level[first + 1]) : broadcast(levels.level[first]);
  };
  const auto four = [&](int64_t first)
                        __attribute__((always_inline)) { return planes[1] ? pair(first + 2) : pair(first); };
  if (bits == 1) return pair(0);
  if (bits == 2) return four(0);
  const Vector<T> low = planes[2] ? four(4) : four(0);
  if (bits == 3) return low;
  return planes[3] ? (planes[2] ? four(12) : four(8)) : low;
}

// Bit planes of how many of the 2^bits - 1 ascending bounds v exceeds. `table` has them one a lane.
template <typename T>
REMNANT_ALWAYS_INLINE void find_interval(Vector<T> v, const Vector<T>* bound,
                                         [[maybe_unused]] Vector<T> table, int64_t bits,
                                         uint64_t (&planes)[4]) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    // A binary search in a register: the comparisons are the code's bits, from the highest.
    __m512i code = _mm512_setzero_si512();
    for (int64_t i = bits - 1; i >= 0; --i) {
      const __m512i step = _mm512_set1_epi32(1 << i);
      const __m512i at = _mm512_add_epi32(code, _mm512_set1_epi32((1 << i) - 1));
      const __mmask16 above =
          _mm512_cmp_ps_mask((__m512)v, _mm512_permutexvar_ps(at, (__m512)table), _CMP_GT_OQ);
      code = _mm512_mask_add_epi32(code, above, code, step);
      planes[i] = above;
    }
    return;
  }
#endif
  Bits<T> code{};
  for (int64_t b = 0; b < (int64_t{1} << bits) - 1; ++b) code -= v > bound[b];
  for (int64_t i = 0; i < bits; ++i) planes[i] = bits_of<T>((code & (1 << i)) != 0);
}

// f(first, size, group) for the groups of codes in [begin, end).
template <typename F>
REMNANT_ALWAYS_INLINE void each_group(int64_t begin, int64_t end, F&& f) {
  for (int64_t first = begin; first < end; first += kCodeGroup) {
    f(first, std::min(kCodeGroup, end - first), first / kCodeGroup);
  }
}

template <ActivationKind kKind, typename S>
void forward_elements(const Activation& p, int64_t begin, int64_t end) {
  using A = Wide<S>;
  const auto* const x = static_cast<const S*>(p.x);
  auto* const y = static_cast<S*>(p.y);
  const A slope = static_cast<A>(p.slope);
  const auto value = [&](Vector<A> v) __attribute__((always_inline)) {
    if constexpr (kKind == ActivationKind::leaky) {
      // Not slope * v at slope 0, which would make NaN of -Inf and -0 of the rest.
      return v <= A(0) ? (slope == A(0) ? Vector<A>{} : v * slope) : v;
    } else {
      return value_of<kKind, A>(v);
    }
  };
  if (p.codes == nullptr) {
    each_vector<A>(end - begin, [&](int64_t j, auto count) __attribute__((always_inline)) {
      store_count(y + begin + j, value(load_count(x + begin + j, count)), count);
    });
    return;
  }
  const int64_t bounds = (int64_t{1} << p.bits) - 1;
  Vector<A> bound[15], table{};
  for (int64_t b = 0; b < bounds && kKind != ActivationKind::leaky; ++b) {
    bound[b] = broadcast(static_cast<A>(p.bounds[b]));
    if (b < kWidth<A>) table[b] = static_cast<A>(p.bounds[b]);
  }
  uint64_t marks = 0;
  each_group(begin, end, [&](int64_t first, int64_t size, int64_t group) {
    uint64_t planes[4] = {}, passes = 0;
    each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
      const Vector<A> v = load_count(x + first + j, count);
      store_count(y + first + j, value(v), count);
      if constexpr (kKind == ActivationKind::leaky) {
        passes |= bits_of<A>(~(v <= A(0))) << j;
      } else {
        uint64_t found[4];
        find_interval<A>(v, bound, table, p.bits, found);
        for (int64_t i = 0; i < p.bits; ++i) planes[i] |= found[i] << j;
        const Bits<A> finite = magnitude<A>(v) <= std::numeric_limits<A>::max();
        passes |= bits_of<A>(finite) << j;
      }
    });
    const uint64_t all = size == kCodeGroup ? ~uint64_t{0} : (uint64_t{1} << size) - 1;
    passes &= all;
    const auto bytes = static_cast<size_t>((size + 7) / 8);
    uint8_t* const codes = p.codes + group * (kCodeGroup / 8) * p.bits;
    if constexpr (kKind == ActivationKind::leaky) {
      std::memcpy(codes, &passes, bytes);
    } else {
      for (int64_t i = 0; i < p.bits; ++i) {
        planes[i] &= all;
        std::memcpy(codes + static_cast<size_t>(i) * bytes, &planes[i], bytes);
      }
      const int64_t place = group % 8;
      marks |= (passes != all ? uint64_t{1} : uint64_t{0}) << place;
      if (place == 7 || first + size == end) {
        p.marks[group / 8] = static_cast<uint8_t>(marks);
        marks = 0;
      }
    }
  });
}

template <ActivationKind kKind, typename S>
void backward_elements(const Activation& p, int64_t begin, int64_t end) {
  using A = Wide<S>;
  const auto* const x = static_cast<const S*>(p.x);
  const auto* const grad = static_cast<const S*>(p.grad);
  auto* const grad_x = static_cast<S*>(p.grad_x);
  if constexpr (kKind != ActivationKind::leaky) {
    if (p.bits == 0) {
      each_vector<A>(end - begin, [&](int64_t j, auto count) __attribute__((always_inline)) {
        const int64_t e = begin + j;
        store_count(grad_x + e,
                    load_count(grad + e, count) * derivative_of<kKind, A>(load_count(x + e, count)), count);
      });
      return;
    }
  }
  Levels<A> levels{};
  for (int64_t k = 0; k < (int64_t{1} << p.bits) && kKind != ActivationKind::leaky; ++k) {
    levels.level[k] = static_cast<A>(p.levels[k]);
    if (k < kWidth<A>) levels.table[k] = levels.level[k];
  }
  const A slope = static_cast<A>(p.slope);
  each_group(begin, end, [&](int64_t first, int64_t size, int64_t group) {
    uint64_t planes[4] = {};
    const auto bytes = static_cast<size_t>((size + 7) / 8);
    const uint8_t* const codes = p.codes + group * (kCodeGroup / 8) * p.bits;
    for (int64_t i = 0; i < p.bits; ++i) {
      std::memcpy(&planes[i], codes + static_cast<size_t>(i) * bytes, bytes);
    }
    const bool marked = p.marks != nullptr && ((p.marks[group / 8] >> (group % 8)) & 1) != 0;
    const A poison = marked ? std::numeric_limits<A>::quiet_NaN() : A(0);
    each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
      Vector<A> g = load_count(grad + first + j, count);
      if constexpr (kKind == ActivationKind::leaky) {
        g = lanes_of<A>(planes[0] >> j) ? g : (slope == A(0) ? Vector<A>{} : g * slope);
      } else {
        Bits<A> lanes[4];
        for (int64_t i = 0; i < 4; ++i) lanes[i] = lanes_of<A>(planes[i] >> j);
        g *= pick<A>(levels, lanes, p.bits) + poison;
      }
      store_count(grad_x + first + j, g, count);
    });
  });
}

template <typename F>
REMNANT_ALWAYS_INLINE void dispatch_kind(ActivationKind kind, F&& f) {
  switch (kind) {
    case ActivationKind::leaky:
      return f(std::integral_constant<ActivationKind, ActivationKind::leaky>{});
    case ActivationKind::gelu:
      return f(std::integral_constant<ActivationKind, ActivationKind::gelu>{});
    case ActivationKind::gelu_tanh:
      return f(std::integral_constant<ActivationKind, ActivationKind::gelu_tanh>{});
    case ActivationKind::silu:
      return f(std::integral_constant<ActivationKind, ActivationKind::silu>{});
  }
}

}  // namespace

void activation_forward(const Activation& p, int64_t begin, int64_t end) {
  dispatch_kind(p.kind, [&](auto kind) {
    dispatch(p.element, [&](auto element) { forward_elements<kind(), decltype(element)>(p, begin, end); });
  });
}

void activation_backward(const Activation& p, int64_t begin, int64_t end) {
  dispatch_kind(p.kind, [&](auto kind) {
    dispatch(p.element, [&](auto element) { backward_elements<kind(), decltype(element)>(p, begin, end); });
  });
}

}  // namespace remnant::kernels::REMNANT_VARIANT
