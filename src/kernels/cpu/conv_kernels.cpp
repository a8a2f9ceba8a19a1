// What stands around a convolution: per-channel statistics, normalisation, residual, activation, and their
// backward. Memory's speed is the aim, so each is one pass over flat memory, in the order in which the tensor
// lies: channels are lanes where they are innermost, and otherwise constant over a run of positions.

#include "kernels/cpu/elements.h"
#include "kernels/cpu/variants.h"

#include <array>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

template <typename A, size_t kCount>
using Values = std::array<Vector<A>, kCount>;

// Pointers to numbers of a channel each; one may be null, and is 0 then.
template <typename A, size_t kCount>
struct Parameters {
  std::array<const A*, kCount> all;

  template <typename... Pointer>
  REMNANT_ALWAYS_INLINE explicit Parameters(Pointer... pointers) : all{static_cast<const A*>(pointers)...} {}

  REMNANT_ALWAYS_INLINE Values<A, kCount> same(int64_t index) const {
    Values<A, kCount> values{};
    for (size_t i = 0; i < kCount; ++i) {
      if (all[i] != nullptr) values[i] = broadcast(all[i][index]);
    }
    return values;
  }
  template <typename Count>
  REMNANT_ALWAYS_INLINE Values<A, kCount> lanes(int64_t index, Count count) const {
    Values<A, kCount> values{};
    for (size_t i = 0; i < kCount; ++i) {
      if (all[i] != nullptr) values[i] = load_count(all[i] + index, count);
    }
    return values;
  }
};

// Rows [first, last) of channels-last memory, their columns from `column` on; `base` is their set's place in
// the parameters.
struct Rows {
  int64_t first, last, column, base;
};

// f(element, values, count, v) for the vectors v < kVectors of each row, whose values stay in registers.
template <typename A, int kVectors, size_t kCount, typename Count, typename F>
REMNANT_ALWAYS_INLINE void each_row(const ConvUnit& p, const Rows& rows,
                                    const Parameters<A, kCount>& parameters, Count count, F&& f) {
  Values<A, kCount> values[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    values[v] = parameters.lanes(rows.base + rows.column + v * kWidth<A>, count);
  }
  const int64_t channels = p.channels;
  for (int64_t e = rows.first * channels + rows.column; e < rows.last * channels; e += channels) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) f(e + v * kWidth<A>, values[v], count, v);
  }
}

// g(rows, how many vectors, each vector's lanes) until all columns are done.
template <typename A, typename G>
REMNANT_ALWAYS_INLINE void each_columns(const ConvUnit& p, Rows rows, G&& g) {
  int64_t& column = rows.column;
  if constexpr (sizeof(A) == 4) {  // more copies of all this code for float64 would be slow to compile
    for (; column + 4 * kWidth<A> <= p.channels; column += 4 * kWidth<A>) {
      g(rows, std::integral_constant<int, 4>{}, WholeVector<A>{});
    }
    if (column + 2 * kWidth<A> <= p.channels) {
      g(rows, std::integral_constant<int, 2>{}, WholeVector<A>{});
      column += 2 * kWidth<A>;
    }
  }
  for (; column + kWidth<A> <= p.channels; column += kWidth<A>) {
    g(rows, std::integral_constant<int, 1>{}, WholeVector<A>{});
  }
  if (column < p.channels) g(rows, std::integral_constant<int, 1>{}, p.channels - column);
}

// Channels-last: [begin, end) as whole rows, all(rows), and what is left of rows at both ends, part(element,
// size, index in the parameters).
template <typename All, typename Part>
REMNANT_ALWAYS_INLINE void each_set(const ConvUnit& p, int64_t begin, int64_t end, All&& all, Part&& part) {
  const int64_t channels = p.channels, sample = p.positions * channels;
  for (int64_t from = begin; from < end;) {
    const int64_t set = p.sets == 1 ? 0 : from / sample;
    const int64_t to = p.sets == 1 ? end : std::min(end, (set + 1) * sample);
    const int64_t base = set * channels, first = (from + channels - 1) / channels, last = to / channels;
    const int64_t head = std::min(first * channels, to);
    if (from < head) part(from, head - from, base + from % channels);
    if (first < last) all(Rows{first, last, 0, base});
    if (first <= last && last * channels < to) part(last * channels, to - last * channels, base);
    from = to;
  }
}

// Planes: f(first element, size, index in the parameters) for the runs of [begin, end) along which that index
// is constant.
template <typename F>
REMNANT_ALWAYS_INLINE void each_plane(const ConvUnit& p, int64_t begin, int64_t end, F&& f) {
  if (begin >= end) return;
  const int64_t parameters = p.sets * p.channels;
  int64_t plane = begin / p.positions, stop = (plane + 1) * p.positions, index = plane % parameters;
  for (int64_t e = begin; e < end; e = stop, stop += p.positions) {
    f(e, std::min(stop, end) - e, index);
    if (++index == parameters) index = 0;
  }
}

// f(element, values, count) for the vectors of [begin, end).
template <typename A, bool kPlanes, size_t kCount, typename F>
REMNANT_ALWAYS_INLINE void each_element(const ConvUnit& p, int64_t begin, int64_t end,
                                        const Parameters<A, kCount>& parameters, F&& f) {
  if constexpr (kPlanes) {
    each_plane(p, begin, end, [&](int64_t e, int64_t size, int64_t index) __attribute__((always_inline)) {
      const Values<A, kCount> values = parameters.same(index);
      each_vector<A>(size,
                     [&](int64_t j, auto count) __attribute__((always_inline)) { f(e + j, values, count); });
    });
  } else {
    each_set(
        p, begin, end,
        [&](const Rows& whole) __attribute__((always_inline)) {
          each_columns<A>(
              p, whole, [&](const Rows& rows, auto vectors, auto lanes) __attribute__((always_inline)) {
                each_row<A, vectors()>(p, rows, parameters, lanes,
                                       [&](int64_t e, const Values<A, kCount>& values, auto count, int)
                                           __attribute__((always_inline)) { f(e, values, count); });
              });
        },
        [&](int64_t e, int64_t size, int64_t index) __attribute__((always_inline)) {
          each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
            f(e + j, parameters.lanes(index + j, count), count);
          });
        });
  }
}

template <typename A>
REMNANT_ALWAYS_INLINE Vector<A> leak(Vector<A> v, A slope) {
  // NaN is its own, which a comparison with `v > 0` would multiply by a slope of 0: NaN again.
  return v > A(0) ? v : v * slope;
}

template <typename S, bool kPlanes>
void forward_elements(const ConvUnit& p, int64_t begin, int64_t end) {
  using A = Wide<S>;
  const auto* const x = static_cast<const S*>(p.x);
  const auto* const residual = static_cast<const S*>(p.residual);
  auto* const y = static_cast<S*>(p.y);
  auto* const u = static_cast<S*>(p.u);
  auto* const s = static_cast<S*>(p.s);
  const A slope = static_cast<A>(p.slope);
  const int64_t input = p.input_first, kept = p.kept_first;
  const bool scaled = p.scale != nullptr, factored = p.factor != nullptr;
  each_element<A, kPlanes>(p, begin, end, Parameters<A, 4>(p.scale, p.shift, p.factor, p.offset),
                           [=](int64_t e, const Values<A, 4>& of, auto count) __attribute__((always_inline)) {
                             Vector<A> v = load_count(x + (e - input), count);
                             if (scaled) v = v * of[0] + of[1];
                             if (u != nullptr) store_count(u + (e - kept), v, count);
                             if (factored) v = v * of[2] + of[3];
                             if (residual != nullptr) v += load_count(residual + e, count);
                             if (s != nullptr) store_count(s + (e - kept), v, count);
                             if (y != nullptr) store_count(y + e, leak<A>(v, slope), count);
                           });
}

template <typename A>
struct Pair {
  Vector<A> first, second;
};

// Adds to sums[0][index] and sums[1][index] the pairs that f(element, values, count) gives.
template <typename A, bool kPlanes, size_t kCount, typename F>
REMNANT_ALWAYS_INLINE void add_up(const ConvUnit& p, int64_t begin, int64_t end,
                                  const Parameters<A, kCount>& parameters, F&& f) {
  double* const sums = p.sums;
  double* const beside = sums + p.sets * p.channels;
  if constexpr (kPlanes) {
    each_plane(p, begin, end, [&](int64_t e, int64_t size, int64_t index) __attribute__((always_inline)) {
      const Values<A, kCount> values = parameters.same(index);
      Vector<A> first{}, second{};
      each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
        Pair<A> pair = f(e + j, values, count);
        if constexpr (std::is_same_v<decltype(count), int64_t>) {
          pair.first = first_lanes<A>(count) ? pair.first : Vector<A>{};
          pair.second = first_lanes<A>(count) ? pair.second : Vector<A>{};
        }
        first += pair.first;
        second += pair.second;
      });
      sums[index] += add_lanes<A>(first);
      beside[index] += add_lanes<A>(second);
    });
  } else {
    const auto add = [&](int64_t index, const Pair<A>& pair, int64_t count) {
      A first[kWidth<A>], second[kWidth<A>];
      store_count(first, pair.first, WholeVector<A>{});
      store_count(second, pair.second, WholeVector<A>{});
      for (int64_t i = 0; i < count; ++i) {
        sums[index + i] += first[i];
        beside[index + i] += second[i];
      }
    };
    each_set(
        p, begin, end,
        [&](const Rows& whole) __attribute__((always_inline)) {
          each_columns<A>(
              p, whole, [&](const Rows& rows, auto vectors, auto lanes) __attribute__((always_inline)) {
                Pair<A> pairs[vectors()] = {};
                each_row<A, vectors()>(p, rows, parameters, lanes,
                                       [&](int64_t e, const Values<A, kCount>& values, auto count, int v)
                                           __attribute__((always_inline)) {
                                             const Pair<A> pair = f(e, values, count);
                                             pairs[v].first += pair.first;
                                             pairs[v].second += pair.second;
                                           });
                for (int v = 0; v < vectors(); ++v) {
                  const int64_t column = rows.column + v * kWidth<A>;
                  add(rows.base + column, pairs[v], std::min<int64_t>(p.channels - column, kWidth<A>));
                }
              });
        },
        [&](int64_t e, int64_t size, int64_t index) __attribute__((always_inline)) {
          each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
            add(index + j, f(e + j, parameters.lanes(index + j, count), count),
                std::min<int64_t>(size - j, kWidth<A>));
          });
        });
  }
}

template <typename S, bool kPlanes>
void moment_elements(const ConvUnit& p, int64_t begin, int64_t end) {
  using A = Wide<S>;
  const auto* const x = static_cast<const S*>(p.x);
  add_up<A, kPlanes>(p, begin, end, Parameters<A, 1>(p.shift),
                     [=](int64_t e, const Values<A, 1>& pivot, auto count) __attribute__((always_inline)) {
                       const Vector<A> v = load_count(x + e, count) - pivot[0];
                       return Pair<A>{v, v * v};
                     });
}

// What a backward's element needs of what was kept: the sum's slope, and u, which x^ is linear in.
template <typename S>
struct Kept {
  using A = Wide<S>;
  const S *u, *s, *residual;
  A slope, inverse, residual_slope;
  int64_t first;
  bool factored, by_sign;
  REMNANT_ALWAYS_INLINE explicit Kept(const ConvUnit& p)
      : u(static_cast<const S*>(p.u)),
        s(static_cast<const S*>(p.s)),
        residual(static_cast<const S*>(p.residual)),
        slope(static_cast<A>(p.slope)),
        inverse(static_cast<A>(p.inverse_slope)),
        residual_slope(static_cast<A>(p.residual_slope)),
        first(p.kept_first),
        factored(p.factor != nullptr),
        by_sign(p.by_sign) {}

  template <typename Count>
  REMNANT_ALWAYS_INLINE void read(int64_t e, Count count, Vector<A> factor, Vector<A> offset,
                                  Vector<A>& normal, Vector<A>& slopes) const {
    Vector<A> sum;
    if (u != nullptr) normal = load_count(u + (e - first), count);
    if (s != nullptr) {
      sum = leak<A>(load_count(s + (e - first), count), inverse);
    } else {
      sum = factored ? normal * factor + offset : normal;
    }
    if (u == nullptr) {
      normal = sum;
      if (residual != nullptr) normal -= leak<A>(load_count(residual + e, count), residual_slope);
    }
    using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    const Bits<A> passes = by_sign ? (Bits<A>)((Bits<A>)sum >= Lane(0)) : (Bits<A>)(sum > A(0));
    slopes = passes ? broadcast(A(1)) : broadcast(slope);
  }
};

template <typename S, bool kPlanes>
void reduce_elements(const ConvUnit& p, int64_t begin, int64_t end) {
  using A = Wide<S>;
  const auto* const grad = static_cast<const S*>(p.grad);
  const Kept<S> kept(p);
  add_up<A, kPlanes>(p, begin, end, Parameters<A, 2>(p.factor, p.offset),
                     [=](int64_t e, const Values<A, 2>& of, auto count) __attribute__((always_inline)) {
                       Vector<A> normal{}, slopes{};
                       kept.read(e, count, of[0], of[1], normal, slopes);
                       const Vector<A> g = load_count(grad + e, count) * slopes;
                       return Pair<A>{g, g * normal};
                     });
}

template <typename S, bool kPlanes>
void backward_elements(const ConvUnit& p, int64_t begin, int64_t end) {
  using A = Wide<S>;
  const auto* const grad = static_cast<const S*>(p.grad);
  auto* const grad_x = static_cast<S*>(p.grad_x);
  auto* const grad_residual = static_cast<S*>(p.grad_residual);
  const Kept<S> kept(p);
  const bool scaled = p.of_grad != nullptr, of_u = p.of_u != nullptr;
  each_element<A, kPlanes>(p, begin, end, Parameters<A, 5>(p.factor, p.offset, p.of_grad, p.of_u, p.constant),
                           [=](int64_t e, const Values<A, 5>& of, auto count) __attribute__((always_inline)) {
                             Vector<A> normal{}, slopes{};
                             kept.read(e, count, of[0], of[1], normal, slopes);
                             const Vector<A> g = load_count(grad + e, count) * slopes;
                             if (grad_residual != nullptr) store_count(grad_residual + e, g, count);
                             if (grad_x == nullptr) return;
                             Vector<A> d = g;
                             if (scaled) d *= of[2];
                             if (of_u) d += of[3] * normal + of[4];
                             store_count(grad_x + e, d, count);
                           });
}

template <typename F>
REMNANT_ALWAYS_INLINE void dispatch_unit(const ConvUnit& p, F&& f) {
  dispatch(p.element, [&](auto element) {
    if (p.planes) {
      f(element, std::true_type{});
    } else {
      f(element, std::false_type{});
    }
  });
}

}  // namespace

void unit_moments(const ConvUnit& p, int64_t begin, int64_t end) {
  dispatch_unit(
      p, [&](auto element, auto planes) { moment_elements<decltype(element), planes()>(p, begin, end); });
}

void unit_forward(const ConvUnit& p, int64_t begin, int64_t end) {
  dispatch_unit(
      p, [&](auto element, auto planes) { forward_elements<decltype(element), planes()>(p, begin, end); });
}

void unit_reduce(const ConvUnit& p, int64_t begin, int64_t end) {
  dispatch_unit(
      p, [&](auto element, auto planes) { reduce_elements<decltype(element), planes()>(p, begin, end); });
}

void unit_backward(const ConvUnit& p, int64_t begin, int64_t end) {
  dispatch_unit(
      p, [&](auto element, auto planes) { backward_elements<decltype(element), planes()>(p, begin, end); });
}

}  // namespace remnant::kernels::REMNANT_VARIANT
