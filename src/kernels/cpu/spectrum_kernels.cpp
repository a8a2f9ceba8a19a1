// A convolution's systems. The transform needs no FFT: at the sizes of images products with small matrices
// are as fast, round as well, and leave each frequency's channels side by side, which is how the systems want
// them.

#include "kernels/cpu/spectrum_kernels.h"
#include "kernels/cpu/products.h"
#include "kernels/cpu/variants.h"

namespace remnant::kernels::REMNANT_VARIANT {

template <typename T>
void spectrum_forward(const Spectrum<T>& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t channels = p.groups * p.channels, line = p.width * channels, row = p.scratch_row();
  const int64_t systems = p.grid_width * p.groups, each = p.samples * 2 * p.channels;
  T* const rows = static_cast<T*>(scratch);
  for (int64_t sample = begin; sample < end; ++sample) {
    multiply<false, false, T>(2 * p.half(), line, p.height, p.rows, p.grid_height,
                              p.x + sample * p.height * line, line, rows, row);
    for (int64_t f = 0; f < p.half(); ++f) {
      for (int64_t group = 0; group < p.groups; ++group) {
        for (int64_t part = 0; part < 2; ++part) {
          const T* const re = rows + 2 * f * row + group * p.channels;
          const T* const matrix = p.columns + part * 2 * p.grid_width;
          T* const out = p.spectrum + (f * systems + group) * each + (sample * 2 + part) * p.channels;
          multiply<false, false, T>(p.grid_width, p.channels, p.width, matrix, 4 * p.grid_width, re, channels,
                                    out, p.groups * each);
          multiply<false, true, T>(p.grid_width, p.channels, p.width, matrix + p.grid_width, 4 * p.grid_width,
                                   re + row, channels, out, p.groups * each);
        }
      }
    }
  }
}

template <typename T>
void spectrum_inverse(const Spectrum<T>& p, int64_t begin, int64_t end, void* scratch) {
  const int64_t channels = p.groups * p.channels, line = p.width * channels, row = p.scratch_row();
  const int64_t systems = p.grid_width * p.groups, each = p.samples * 2 * p.channels;
  T* const rows = static_cast<T*>(scratch);
  for (int64_t sample = begin; sample < end; ++sample) {
    for (int64_t f = 0; f < p.half(); ++f) {
      for (int64_t group = 0; group < p.groups; ++group) {
        const T* const re = p.z + (f * systems + group) * each + sample * 2 * p.channels;
        for (int64_t part = 0; part < 2; ++part) {
          const T* const matrix = p.columns + part * p.grid_width * 2 * p.grid_width;
          T* const out = rows + (2 * f + part) * row + group * p.channels;
          multiply<false, false, T>(p.width, p.channels, p.grid_width, matrix, 2 * p.grid_width, re,
                                    p.groups * each, out, channels);
          multiply<false, true, T>(p.width, p.channels, p.grid_width, matrix + p.grid_width, 2 * p.grid_width,
                                   re + p.channels, p.groups * each, out, channels);
        }
      }
    }
    multiply<false, false, T>(p.height, line, 2 * p.half(), p.rows, 2 * p.half(), rows, row,
                              p.out + sample * p.height * line, line);
  }
}

template <typename T>
void system_products(const SystemProducts<T>& p, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    multiply<false, false, T>(p.rows, p.columns, p.depth, p.y + s * p.rows * p.depth, p.depth,
                              p.blocks + s * p.depth * p.columns, p.columns, p.z + s * p.rows * p.columns,
                              p.columns);
  }
}

namespace {

// A lane's number of a row.
template <typename T>
using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <typename T>
REMNANT_ALWAYS_INLINE Bits<T> number(int64_t i) {
  return Bits<T>{} + static_cast<Lane<T>>(i);
}

template <typename T>
struct Complex {
  Vector<T> re, im;
};

template <typename T>
REMNANT_ALWAYS_INLINE Complex<T> reciprocal(const Complex<T>& a) {
  const Vector<T> scale = T{1} / (a.re * a.re + a.im * a.im);
  return {a.re * scale, -a.im * scale};
}

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> select(Bits<T> mask, Vector<T> yes, Vector<T> no) {
  return mask ? yes : no;
}

template <typename T>
REMNANT_ALWAYS_INLINE bool any(Bits<T> mask) {
  bool found = false;
  for (int l = 0; l < kWidth<T>; ++l) found |= mask[l] != 0;
  return found;
}

// Exchanges unknowns for right hand sides in y = A x, one column after the other, by the largest element that
// is left in the column (partial pivoting; rows stay where they are, so that lanes may choose different
// ones): then row pivot[k] has x_k as a function of y, whose coefficient of y_pivot[m] stands in column m. a
// is [n][n][2] of vectors; line has room for [n][2], pivot and used for [n].
template <typename T>
void exchange_all(int64_t n, T* a, T* line, Lane<T>* pivot, Lane<T>* used) {
  constexpr int width = kWidth<T>;
  const int64_t row = 2 * n * width;
  for (int64_t i = 0; i < n; ++i) store(used + i * width, Bits<T>{});
  for (int64_t k = 0; k < n; ++k) {
    Vector<T> best = broadcast(T{-1});
    Bits<T> chosen{};
    for (int64_t i = n - 1; i >= 0; --i) chosen = load(used + i * width) ? chosen : number<T>(i);
    for (int64_t i = 0; i < n; ++i) {
      const T* const at = a + i * row + 2 * k * width;
      const Vector<T> re = load(at), im = load(at + width), size = re * re + im * im;
      const Bits<T> larger = (size > best) & ~load(used + i * width);
      best = larger ? size : best;
      chosen = larger ? number<T>(i) : chosen;
    }
    store(pivot + k * width, chosen);
    // The pivots' rows, a lane at a time where they differ.
    if (!any<T>(chosen != number<T>(chosen[0]))) {
      std::memcpy(line, a + chosen[0] * row, static_cast<size_t>(row) * sizeof(T));
    } else {
      for (int l = 0; l < width; ++l) {
        const T* const from = a + chosen[l] * row + l;
        for (int64_t j = 0; j < 2 * n; ++j) line[j * width + l] = from[j * width];
      }
    }
    const Complex<T> inverse = reciprocal<T>({load(line + 2 * k * width), load(line + (2 * k + 1) * width)});
    for (int64_t j = 0; j < n; ++j) {
      T* const at = line + 2 * j * width;
      const Vector<T> re = load(at), im = load(at + width);
      store(at, inverse.im * im - inverse.re * re);
      store(at + width, -(inverse.re * im + inverse.im * re));
    }
    store(line + 2 * k * width, inverse.re);
    store(line + (2 * k + 1) * width, inverse.im);
    for (int64_t i = 0; i < n; ++i) {
      T* const at = a + i * row;
      const Bits<T> mine = chosen == number<T>(i);
      Vector<T> re = load(at + 2 * k * width), im = load(at + (2 * k + 1) * width);
      if (any<T>(mine)) {  // there the row becomes the line
        re = select<T>(mine, broadcast(T{1}), re);
        im = select<T>(mine, Vector<T>{}, im);
        store(used + i * width, load(used + i * width) | mine);
        for (int64_t j = 0; j < 2 * n; ++j) {
          store(at + j * width, select<T>(mine, Vector<T>{}, load(at + j * width)));
        }
      }
      store(at + 2 * k * width, Vector<T>{});
      store(at + (2 * k + 1) * width, Vector<T>{});
      for (int64_t j = 0; j < n; ++j) {
        T* const to = at + 2 * j * width;
        const Vector<T> x = load(line + 2 * j * width), y = load(line + (2 * j + 1) * width);
        store(to, load(to) + (re * x - im * y));
        store(to + width, load(to + width) + (re * y + im * x));
      }
    }
  }
}

}  // namespace

template <typename T>
void system_inverses(const SystemInverses<T>& p, int64_t begin, int64_t end, void* scratch) {
  constexpr int width = kWidth<T>;
  const int64_t n = p.n, numbers = 2 * n * n;
  T* const a = static_cast<T*>(scratch);
  T* const turned = a + numbers * width;
  T* const line = turned + numbers * width;
  auto* const pivot = reinterpret_cast<Lane<T>*>(line + 2 * n * width);
  Lane<T>* const used = pivot + n * width;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t count = end - first < width ? end - first : width;
    transpose<true>(p.a + first * numbers, numbers, count, numbers, T{1}, a, width);
    for (int64_t l = count; l < width; ++l) {
      for (int64_t i = 0; i < n; ++i) a[2 * (i * n + i) * width + l] = 1;  // a lane without a matrix
    }
    exchange_all<T>(n, a, line, pivot, used);
    transpose<false>(a, width, numbers, count, T{1}, turned, numbers);
    for (int64_t l = 0; l < count; ++l) {
      const T* const found = turned + l * numbers;
      for (int64_t k = 0; k < n; ++k) {
        const T* const from = found + pivot[k * width + l] * 2 * n;
        for (int64_t m = 0; m < n; ++m) {
          const int64_t column = pivot[m * width + l];
          const T re = from[2 * m], im = from[2 * m + 1];
          if (p.inverse != nullptr) {
            T* const to = p.inverse + (first + l) * numbers + 2 * (k * n + column);
            to[0] = re, to[1] = im;
          }
          if (p.blocks != nullptr) {
            T* const to = p.blocks + (first + l) * 2 * numbers + column * 2 * n + k;
            to[0] = to[2 * n * n + n] = re;
            to[n] = im, to[2 * n * n] = -im;
          }
        }
      }
    }
  }
}

template void spectrum_forward(const Spectrum<float>&, int64_t, int64_t, void*);
template void spectrum_forward(const Spectrum<double>&, int64_t, int64_t, void*);
template void spectrum_inverse(const Spectrum<float>&, int64_t, int64_t, void*);
template void spectrum_inverse(const Spectrum<double>&, int64_t, int64_t, void*);
template void system_products(const SystemProducts<float>&, int64_t, int64_t);
template void system_products(const SystemProducts<double>&, int64_t, int64_t);
template void system_inverses(const SystemInverses<float>&, int64_t, int64_t, void*);
template void system_inverses(const SystemInverses<double>&, int64_t, int64_t, void*);

}  // namespace remnant::kernels::REMNANT_VARIANT
