// What stands around a convolution: per-channel statistics, normalisation, residual, activation, and their
// backward. Memory's speed is the aim, so each is one pass over flat memory, in the order in which the tensor
// lies: channels are lanes where they are innermost, and otherwise constant over a run of positions.

#include "kernels/cpu/elements.h"
#include "kernels/cpu/variants.h"

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

// f(first element, size, its channel's index in the parameters) for the runs of [begin, end) along which a
// parameter's index is constant (kPlanes) or goes up with the element.
template <bool kPlanes, typename F>
REMNANT_ALWAYS_INLINE void each_run(const ConvUnit& p, int64_t begin, int64_t end, F&& f) {
  if (begin >= end) return;
  if constexpr (kPlanes) {
    const int64_t parameters = p.sets * p.channels;
    int64_t plane = begin / p.positions, stop = (plane + 1) * p.positions, index = plane % parameters;
    for (int64_t e = begin; e < end; e = stop, stop += p.positions) {
      f(e, std::min(stop, end) - e, index);
      if (++index == parameters) index = 0;
    }
  } else {
    const int64_t row = begin / p.channels;
    int64_t set = p.sets == 1 ? 0 : row / p.positions, left = p.positions - row % p.positions;
    int64_t column = begin - row * p.channels;
    for (int64_t e = begin; e < end;) {
      const int64_t size = std::min(p.channels - column, end - e);
      f(e, size, set * p.channels + column);
      e += size;
      column = 0;
      if (--left == 0) {
        left = p.positions;
        if (p.sets > 1) ++set;
      }
    }
  }
}

template <typename A, bool kPlanes>
struct Parameter {
  const A* values;
  Vector<A> one{};
  REMNANT_ALWAYS_INLINE Parameter(const void* all, int64_t index)
      : values(all != nullptr ? static_cast<const A*>(all) + index : nullptr) {
    if (kPlanes && values != nullptr) one = broadcast(*values);
  }
  template <typename Count>
  REMNANT_ALWAYS_INLINE Vector<A> operator()(int64_t j, Count count) const {
    if constexpr (kPlanes) return one;
    return load_count(values + j, count);
  }
};

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
  each_run<kPlanes>(p, begin, end,
                    [&](int64_t e, int64_t size, int64_t index) __attribute__((always_inline)) {
                      const Parameter<A, kPlanes> scale(p.scale, index), shift(p.shift, index);
                      const Parameter<A, kPlanes> factor(p.factor, index), offset(p.offset, index);
                      const int64_t from = e - p.input_first, to = e - p.kept_first;
                      each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
                        Vector<A> v = load_count(x + from + j, count);
                        if (p.scale != nullptr) v = v * scale(j, count) + shift(j, count);
                        if (u != nullptr) store_count(u + to + j, v, count);
                        if (p.factor != nullptr) v = v * factor(j, count) + offset(j, count);
                        if (residual != nullptr) v += load_count(residual + e + j, count);
                        if (s != nullptr) store_count(s + to + j, v, count);
                        if (y != nullptr) store_count(y + e + j, leak<A>(v, slope), count);
                      });
                    });
}

// Adds to sums[0][index] and sums[1][index] what f gives for each element.
template <typename A, bool kPlanes, typename F>
REMNANT_ALWAYS_INLINE void add_up(const ConvUnit& p, int64_t begin, int64_t end, void* scratch, F&& f) {
  double* const sums = p.sums;
  const int64_t all = p.sets * p.channels;
  if constexpr (kPlanes) {
    each_run<true>(p, begin, end, [&](int64_t e, int64_t size, int64_t index) __attribute__((always_inline)) {
      Vector<A> first{}, second{};
      f(e, size, index, [&](int64_t, auto count, Vector<A> a, Vector<A> b) __attribute__((always_inline)) {
        if constexpr (std::is_same_v<decltype(count), int64_t>) {
          a = first_lanes<A>(count) ? a : Vector<A>{};
          b = first_lanes<A>(count) ? b : Vector<A>{};
        }
        first += a;
        second += b;
      });
      sums[index] += add_lanes<A>(first);
      sums[all + index] += add_lanes<A>(second);
    });
  } else {
    auto* const first = static_cast<A*>(scratch);
    auto* const second = first + p.channels;
    const int64_t sample = p.positions * p.channels;
    for (int64_t from = begin; from < end;) {
      const int64_t set = p.sets == 1 ? 0 : from / sample;
      const int64_t to = p.sets == 1 ? end : std::min(end, (set + 1) * sample);
      const int64_t base = set * p.channels;
      std::memset(scratch, 0, static_cast<size_t>(2 * p.channels) * sizeof(A));
      each_run<false>(
          p, from, to, [&](int64_t e, int64_t size, int64_t index) __attribute__((always_inline)) {
            const int64_t column = index - base;
            f(e, size, index,
              [&](int64_t j, auto count, Vector<A> a, Vector<A> b) __attribute__((always_inline)) {
                A* const at = first + column + j;
                A* const beside = second + column + j;
                store_count(at, load_count(at, count) + a, count);
                store_count(beside, load_count(beside, count) + b, count);
              });
          });
      for (int64_t c = 0; c < p.channels; ++c) {
        sums[base + c] += first[c];
        sums[all + base + c] += second[c];
      }
      from = to;
    }
  }
}

template <typename S, bool kPlanes>
void moment_elements(const ConvUnit& p, int64_t begin, int64_t end, void* scratch) {
  using A = Wide<S>;
  const auto* const x = static_cast<const S*>(p.x);
  add_up<A, kPlanes>(p, begin, end, scratch,
                     [&](int64_t e, int64_t size, int64_t index, auto add) __attribute__((always_inline)) {
                       const Parameter<A, kPlanes> pivot(p.shift, index);
                       each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
                         const Vector<A> v = load_count(x + e + j, count) - pivot(j, count);
                         add(j, count, v, v * v);
                       });
                     });
}

// What a backward's element needs of what was kept: the sum's slope, and u, which x^ is linear in.
template <typename S, bool kPlanes>
struct Kept {
  using A = Wide<S>;
  const ConvUnit& p;
  const S *u, *s, *residual;
  A slope, inverse, residual_slope;
  REMNANT_ALWAYS_INLINE explicit Kept(const ConvUnit& problem)
      : p(problem),
        u(static_cast<const S*>(p.u)),
        s(static_cast<const S*>(p.s)),
        residual(static_cast<const S*>(p.residual)),
        slope(static_cast<A>(p.slope)),
        inverse(static_cast<A>(p.inverse_slope)),
        residual_slope(static_cast<A>(p.residual_slope)) {}

  template <typename Count>
  REMNANT_ALWAYS_INLINE void read(int64_t e, int64_t j, Count count, const Parameter<A, kPlanes>& factor,
                                  const Parameter<A, kPlanes>& offset, Vector<A>& normal,
                                  Vector<A>& slopes) const {
    const int64_t at = e + j - p.kept_first;
    Vector<A> sum;
    if (u != nullptr) normal = load_count(u + at, count);
    if (s != nullptr) {
      sum = leak<A>(load_count(s + at, count), inverse);
    } else {
      sum = p.factor != nullptr ? normal * factor(j, count) + offset(j, count) : normal;
    }
    if (u == nullptr) {
      normal = sum;
      if (residual != nullptr) normal -= leak<A>(load_count(residual + e + j, count), residual_slope);
    }
    using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    const Bits<A> passes = p.by_sign ? (Bits<A>)((Bits<A>)sum >= Lane(0)) : (Bits<A>)(sum > A(0));
    slopes = passes ? broadcast(A(1)) : broadcast(slope);
  }
};

template <typename S, bool kPlanes>
void reduce_elements(const ConvUnit& p, int64_t begin, int64_t end, void* scratch) {
  using A = Wide<S>;
  const auto* const grad = static_cast<const S*>(p.grad);
  const Kept<S, kPlanes> kept(p);
  add_up<A, kPlanes>(p, begin, end, scratch,
                     [&](int64_t e, int64_t size, int64_t index, auto add) __attribute__((always_inline)) {
                       const Parameter<A, kPlanes> factor(p.factor, index), offset(p.offset, index);
                       each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
                         Vector<A> normal{}, slopes{};
                         kept.read(e, j, count, factor, offset, normal, slopes);
                         const Vector<A> g = load_count(grad + e + j, count) * slopes;
                         add(j, count, g, g * normal);
                       });
                     });
}

template <typename S, bool kPlanes>
void backward_elements(const ConvUnit& p, int64_t begin, int64_t end) {
  using A = Wide<S>;
  const auto* const grad = static_cast<const S*>(p.grad);
  auto* const grad_x = static_cast<S*>(p.grad_x);
  auto* const grad_residual = static_cast<S*>(p.grad_residual);
  const Kept<S, kPlanes> kept(p);
  each_run<kPlanes>(p, begin, end,
                    [&](int64_t e, int64_t size, int64_t index) __attribute__((always_inline)) {
                      const Parameter<A, kPlanes> factor(p.factor, index), offset(p.offset, index);
                      const Parameter<A, kPlanes> of_grad(p.of_grad, index), of_u(p.of_u, index),
                          constant(p.constant, index);
                      each_vector<A>(size, [&](int64_t j, auto count) __attribute__((always_inline)) {
                        Vector<A> normal{}, slopes{};
                        kept.read(e, j, count, factor, offset, normal, slopes);
                        const Vector<A> g = load_count(grad + e + j, count) * slopes;
                        if (grad_residual != nullptr) store_count(grad_residual + e + j, g, count);
                        if (grad_x == nullptr) return;
                        Vector<A> d = g;
                        if (p.of_grad != nullptr) d *= of_grad(j, count);
                        if (p.of_u != nullptr) d += of_u(j, count) * normal + constant(j, count);
                        store_count(grad_x + e + j, d, count);
                      });
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

void unit_moments(const ConvUnit& p, int64_t begin, int64_t end, void* scratch) {
  dispatch_unit(p, [&](auto element, auto planes) {
    moment_elements<decltype(element), planes()>(p, begin, end, scratch);
  });
}

void unit_forward(const ConvUnit& p, int64_t begin, int64_t end) {
  dispatch_unit(
      p, [&](auto element, auto planes) { forward_elements<decltype(element), planes()>(p, begin, end); });
}

void unit_reduce(const ConvUnit& p, int64_t begin, int64_t end, void* scratch) {
  dispatch_unit(p, [&](auto element, auto planes) {
    reduce_elements<decltype(element), planes()>(p, begin, end, scratch);
  });
}

void unit_backward(const ConvUnit& p, int64_t begin, int64_t end) {
  dispatch_unit(
      p, [&](auto element, auto planes) { backward_elements<decltype(element), planes()>(p, begin, end); });
}

}  // namespace remnant::kernels::REMNANT_VARIANT
