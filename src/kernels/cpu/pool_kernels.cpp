// Max pooling that remembers which tap of its window was the largest, in a byte: with the shapes that says
// where the gradient goes, without the input. The backward of channels-last
// tensors gathers, so that each element is written once.

#include "kernels/cpu/elements.h"
#include "kernels/cpu/variants.h"

#include <algorithm>
#include <limits>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

template <typename T>
struct BytesOf {
  typedef uint8_t Type __attribute__((vector_size(kWidth<T>)));
};

template <typename T, typename Count>
REMNANT_ALWAYS_INLINE Bits<T> load_bytes(const uint8_t* p, Count count) {
  typename BytesOf<T>::Type bytes{};
  std::memcpy(&bytes, p, static_cast<size_t>(count));
  return __builtin_convertvector(bytes, Bits<T>);
}
template <typename T, typename Count>
REMNANT_ALWAYS_INLINE void store_bytes(uint8_t* p, Bits<T> v, Count count) {
  const auto bytes = __builtin_convertvector(v, typename BytesOf<T>::Type);
  std::memcpy(p, &bytes, static_cast<size_t>(count));
}

// Where a tap meets the other tensor, in positions of its plane.
struct Tap {
  int64_t position;
  int place;
};

// The taps inside the input of the window at (row, column).
REMNANT_ALWAYS_INLINE int taps_of(const MaxPool& p, int64_t row, int64_t column, Tap* taps) {
  int count = 0;
  for (int64_t i = 0; i < p.kernel[0]; ++i) {
    const int64_t h = row * p.stride[0] - p.padding[0] + i * p.dilation[0];
    if (h < 0 || h >= p.height) continue;
    for (int64_t j = 0; j < p.kernel[1]; ++j) {
      const int64_t w = column * p.stride[1] - p.padding[1] + j * p.dilation[1];
      if (w < 0 || w >= p.width) continue;
      taps[count++] = {h * p.width + w, static_cast<int>(i * p.kernel[1] + j)};
    }
  }
  return count;
}

// The windows that the input's (row, column) is in, and as which tap.
REMNANT_ALWAYS_INLINE int windows_of(const MaxPool& p, int64_t row, int64_t column, Tap* taps) {
  int count = 0;
  for (int64_t i = 0; i < p.kernel[0]; ++i) {
    const int64_t h = row + p.padding[0] - i * p.dilation[0];
    if (h < 0 || h % p.stride[0] != 0 || h / p.stride[0] >= p.out_height) continue;
    for (int64_t j = 0; j < p.kernel[1]; ++j) {
      const int64_t w = column + p.padding[1] - j * p.dilation[1];
      if (w < 0 || w % p.stride[1] != 0 || w / p.stride[1] >= p.out_width) continue;
      taps[count++] = {h / p.stride[0] * p.out_width + w / p.stride[1],
                       static_cast<int>(i * p.kernel[1] + j)};
    }
  }
  return count;
}

template <typename S>
void forward_row(const MaxPool& p, int64_t r) {
  using T = Wide<S>;
  Tap taps[kMostTaps];
  const int64_t plane = r / p.out_height, row = r % p.out_height;
  const int64_t step = p.channels_last ? p.channels : 1;
  const S* const x = static_cast<const S*>(p.x) + plane * p.height * p.width * step;
  const int64_t first = r * p.out_width * step;
  S* const y = static_cast<S*>(p.y) + first;
  uint8_t* const places = p.new_places + first;
  for (int64_t column = 0; column < p.out_width; ++column) {
    const int count = taps_of(p, row, column, taps);
    const int64_t to = column * step;
    // One plane at a time has a single lane.
    each_vector<T>(step, [&](int64_t c, auto lanes) {
      Vector<T> best = Vector<T>{} - std::numeric_limits<T>::infinity();
      Bits<T> place = Bits<T>{} + (count > 0 ? taps[0].place : 0);
      for (int t = 0; t < count; ++t) {
        const Vector<T> v = load_count(x + taps[t].position * step + c, lanes);
        const Bits<T> larger = (v > best) | (v != v);  // a NaN wins, as in PyTorch
        best = larger ? v : best;
        place = larger ? Bits<T>{} + taps[t].place : place;
      }
      store_count(y + to + c, best, lanes);
      store_bytes<T>(places + to + c, place, lanes);
    });
  }
}

template <typename S>
void backward_row(const MaxPool& p, int64_t r) {
  using T = Wide<S>;
  Tap taps[kMostTaps];
  const int64_t plane = r / p.height, row = r % p.height;
  const int64_t step = p.channels_last ? p.channels : 1;
  const int64_t from = plane * p.out_height * p.out_width * step;
  const S* const grad_y = static_cast<const S*>(p.grad_y) + from;
  const uint8_t* const places = p.places + from;
  S* const grad_x = static_cast<S*>(p.grad_x) + r * p.width * step;
  for (int64_t column = 0; column < p.width; ++column) {
    const int count = windows_of(p, row, column, taps);
    each_vector<T>(step, [&](int64_t c, auto lanes) {
      Vector<T> sum{};
      for (int t = 0; t < count; ++t) {
        const int64_t at = taps[t].position * step + c;
        const Bits<T> here = load_bytes<T>(places + at, lanes) == Bits<T>{} + taps[t].place;
        sum += here ? load_count(grad_y + at, lanes) : Vector<T>{};
      }
      store_count(grad_x + column * step + c, sum, lanes);
    });
  }
}

// A plane by itself has no lanes to gather in; each output adds to where it came from.
template <typename S>
void scatter_plane(const MaxPool& p, int64_t plane) {
  int64_t offsets[kMostTaps];
  for (int64_t t = 0; t < p.kernel[0] * p.kernel[1]; ++t) {
    offsets[t] = t / p.kernel[1] * p.dilation[0] * p.width + t % p.kernel[1] * p.dilation[1];
  }
  const int64_t from = plane * p.out_height * p.out_width, size = p.height * p.width;
  const S* const grad_y = static_cast<const S*>(p.grad_y) + from;
  const uint8_t* const places = p.places + from;
  S* const grad_x = static_cast<S*>(p.grad_x) + plane * size;
  std::fill_n(grad_x, size, S(0));
  for (int64_t row = 0; row < p.out_height; ++row) {
    const int64_t corner = (row * p.stride[0] - p.padding[0]) * p.width - p.padding[1];
    for (int64_t column = 0; column < p.out_width; ++column) {
      const int64_t at = row * p.out_width + column;
      const int64_t to = corner + column * p.stride[1] + offsets[places[at]];
      // Of a window without elements there is nowhere to go.
      if (to >= 0 && to < size) grad_x[to] += grad_y[at];
    }
  }
}

}  // namespace

void max_pool_forward(const MaxPool& p, int64_t begin, int64_t end) {
  dispatch(p.element, [&](auto element) {
    for (int64_t r = begin; r < end; ++r) forward_row<decltype(element)>(p, r);
  });
}

void max_pool_backward(const MaxPool& p, int64_t begin, int64_t end) {
  dispatch(p.element, [&](auto element) {
    using S = decltype(element);
    if constexpr (std::is_same_v<S, Wide<S>>) {
      if (!p.channels_last) {
        for (int64_t plane = begin / p.height; plane < end / p.height; ++plane) scatter_plane<S>(p, plane);
        return;
      }
    }
    for (int64_t r = begin; r < end; ++r) backward_row<S>(p, r);
  });
}

}  // namespace remnant::kernels::REMNANT_VARIANT
