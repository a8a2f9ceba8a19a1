// The hidden layer of a feed-forward block: bias, activation and dropout in one pass, and what the
// backward needs of them in another; or codes in between (kernels/hidden_codes.h).

#include "kernels/cpu/low_bits.h"
#include "kernels/cpu/variants.h"

#include <iterator>

namespace remnant::kernels::REMNANT_VARIANT {
namespace {

constexpr int64_t kColumns = 512;  // whose random bits are drawn at once

// 0.5 erfc(-x / sqrt 2), with a relative error of about 1e-7 also far down the left tail. Chebyshev fit of
// erfc: Press et al., Numerical Recipes, 6.2.
REMNANT_ALWAYS_INLINE Vector<float> normal_cdf(Vector<float> x) {
  const Vector<float> y = x * 0.70710678118654752f;
  const Vector<float> z = y < 0.0f ? -y : y;
  const Vector<float> t = 1.0f / (z * 0.5f + 1.0f);
  Vector<float> p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const Vector<float> half_tail = t * 0.5f * exponential_of_nonpositive(p - z * z);
  return y > 0.0f ? 1.0f - half_tail : half_tail;
}

REMNANT_ALWAYS_INLINE Vector<double> normal_cdf(Vector<double> x) {
  Vector<double> y{};
  for (int l = 0; l < kWidth<double>; ++l) y[l] = 0.5 * std::erfc(-x[l] * 0.70710678118654752440);
  return y;
}

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> activate(Vector<T> x, HiddenActivation activation) {
  // NaN passes, as the comparison is false for it.
  if (activation == HiddenActivation::relu) return x < T(0) ? Vector<T>{} : x;
  return x * normal_cdf(x);
}

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> slope(Vector<T> x, Vector<T> cdf) {
  return cdf + x * T(0.39894228040143267794) * exponential_of_nonpositive(x * x * T(-0.5));
}

// One row through `each(column, count, bias, factor)`, a vector at a time, with count lanes in use.
template <typename T, typename Each>
REMNANT_ALWAYS_INLINE void for_row(const HiddenRows<T>& rows, int64_t row, const Each& each) {
  constexpr int64_t width = kWidth<T>;
  alignas(64) uint16_t bits[kColumns];
  for (int64_t first = 0; first < rows.columns; first += kColumns) {
    const int64_t columns = rows.columns - first < kColumns ? rows.columns - first : kColumns;
    if (rows.threshold > 0) {
      dropout_bits(rows.seed, 0, rows.first_row + row, 1, first / kDropoutColumns,
                   (columns + kDropoutColumns - 1) / kDropoutColumns, bits);
    }
    for (int64_t j = 0; j < columns; j += width) {
      const int64_t count = columns - j < width ? columns - j : width;
      const Vector<T> factor =
          rows.threshold > 0 ? dropout_factor<T>(bits + j, rows.threshold, rows.keep_scale) : broadcast(T(1));
      const T* bias = rows.bias + first + j;
      const Vector<T> b = rows.bias == nullptr ? Vector<T>{}
                          : count == width     ? load(bias)
                                               : load_part(bias, count);
      each(first + j, count, b, factor);
    }
  }
}

// --- codes -----------------------------------------------------------------------------------------

// table[index] in each lane.
template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> lookup(const T* table, Bits<T> index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm512_i32gather_ps((__m512i)index, table, 4);
  } else {
    return (Vector<T>)_mm512_i64gather_pd((__m512i)index, table, 8);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm256_i32gather_ps(table, (__m256i)index, 4);
  } else {
    return (Vector<T>)_mm256_i64gather_pd(table, (__m256i)index, 8);
  }
#else
  Vector<T> found{};
  for (int l = 0; l < kWidth<T>; ++l) found[l] = table[index[l]];
  return found;
#endif
}
REMNANT_ALWAYS_INLINE Bits<float> lookup_arc(const int32_t* table, Bits<float> index) {
#if defined(__AVX512F__)
  return (Bits<float>)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (Bits<float>)_mm256_i32gather_epi32(table, (__m256i)index, 4);
#else
  Bits<float> found{};
  for (int l = 0; l < kWidth<float>; ++l) found[l] = table[index[l]];
  return found;
#endif
}
REMNANT_ALWAYS_INLINE Bits<double> lookup_arc(const int32_t* table, Bits<double> index) {
  Bits<double> found{};
  for (int l = 0; l < kWidth<double>; ++l) found[l] = table[index[l]];
  return found;
}

// The corner of x's arc that u, uniform in (0, 1), draws.
template <typename T>
REMNANT_ALWAYS_INLINE Bits<T> draw_code(const HiddenGrid<T>& grid, Vector<T> x, Vector<T> value,
                                        Vector<T> derivative, Vector<T> u) {
  using Grid = HiddenGrid<T>;
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr T edge = static_cast<T>(Grid::edge), scale = static_cast<T>(Grid::places / (2 * Grid::edge));
  // NaN is on no side of a bound: the comparison is false, and place 0 is as good as any.
  const Vector<T> bounded = x > -edge ? (x < edge ? x : broadcast(edge)) : broadcast(-edge);
  const Bits<T> place = __builtin_convertvector((bounded + edge) * scale, Bits<T>);
  Bits<T> arc = lookup_arc(grid.arc_of, place < static_cast<Lane>(Grid::places)
                                            ? place
                                            : Bits<T>{} + static_cast<Lane>(Grid::places - 1));
  const Bits<T> beyond = (Bits<T>)(x >= edge);
  Bits<T> nan =
      ~((Bits<T>)(x <= grid.far[grid.far_points]) & (Bits<T>)(x >= std::numeric_limits<T>::lowest()));
  if (bits_of<T>(beyond) != 0) {
    for (int64_t i = 0; i < grid.far_points; ++i) {
      arc = x >= grid.far[i] ? Bits<T>{} + static_cast<Lane>(grid.far_arc + i) : arc;
    }
  }
  const auto weight = [&](const T(&of)[3][Grid::most_arcs]) __attribute__((always_inline)) {
    return lookup<T>(of[0], arc) * value + (lookup<T>(of[1], arc) * derivative + lookup<T>(of[2], arc));
  };
  const Bits<T> first = __builtin_convertvector(lookup<T>(grid.code, arc), Bits<T>);
  // beyond is -1 where it holds.
  const Bits<T> last = first + static_cast<Lane>(2) + beyond;
  Bits<T> code = u > T(1) - weight(grid.first) ? first : first + static_cast<Lane>(1);
  code = u < weight(grid.last) ? last : code;
  return nan != 0 ? Bits<T>{} + static_cast<Lane>((1 << grid.bits) - 1) : code;
}

template <typename T>
REMNANT_ALWAYS_INLINE Vector<T> uniform(const uint16_t* random) {
  return __builtin_convertvector((Bits<T>)widen<T>(load_shorts<T>(random)), Vector<T>) * T(0x1p-16) +
         T(0x1p-17);
}

// Room for the codes of a group, one a byte, and for what packing and whole vectors reach beyond.
constexpr int64_t kGroupRoom = 2 * kCodeGroup + 8;

// Where a row's codes of group `group` are; `tops` at 6 bits alone, `step` for relu.
struct GroupPlace {
  uint8_t *low, *tops, *step;
};
template <typename T>
REMNANT_ALWAYS_INLINE GroupPlace place_of(const HiddenRows<T>& rows, int64_t row, int64_t group) {
  uint8_t* const codes = rows.codes + (rows.first_row + row) * rows.code_row_bytes;
  const int64_t low_bits = rows.bits == 6 ? 4 : rows.bits;
  uint8_t* const behind = codes + hidden_low_bytes(rows.bits, rows.columns);
  return {codes + group * kCodeGroup * low_bits / 8, behind + group * kCodeGroup / 4, behind + group * 2};
}

// Codes of a group, in vectors where it is whole, else one a byte.
template <typename T>
using GroupCodes = Bits<T>[kCodeGroup / kWidth<T>];
template <typename T>
REMNANT_ALWAYS_INLINE void pack_group(int64_t bits, GroupCodes<T>& codes, const GroupPlace& place) {
  if (bits == 8) return pack_vectors<T, 8>(codes, place.low);
  if (bits == 2) return pack_vectors<T, 2>(codes, place.low);
  if (bits == 6) {
    GroupCodes<T> tops;
    for (size_t i = 0; i < std::size(codes); ++i) {
      tops[i] = codes[i] >> 4;
      codes[i] &= 15;
    }
    pack_vectors<T, 2>(tops, place.tops);
  }
  pack_vectors<T, 4>(codes, place.low);
}
REMNANT_ALWAYS_INLINE void pack_group(int64_t bits, uint8_t* codes, int64_t size, const GroupPlace& place) {
  if (bits == 8) return pack<8>(codes, size, place.low);
  if (bits == 2) return pack<2>(codes, size, place.low);
  if (bits == 6) {
    uint8_t tops[kGroupRoom] = {};
    for (int64_t k = 0; k < size; ++k) {
      tops[k] = static_cast<uint8_t>(codes[k] >> 4);
      codes[k] &= 15;
    }
    pack<2>(tops, size, place.tops);
  }
  pack<4>(codes, size, place.low);
}
template <typename T>
REMNANT_ALWAYS_INLINE Bits<T> unpack_vector(int64_t bits, const GroupPlace& place, int64_t j) {
  if (bits == 8) return load_bytes<T>(place.low + j);
  if (bits == 2) return unpack_vector<T, 2>(place.low, j);
  const Bits<T> low = unpack_vector<T, 4>(place.low, j);
  return bits == 6 ? low | unpack_vector<T, 2>(place.tops, j) << 4 : low;
}
REMNANT_ALWAYS_INLINE void unpack_group(int64_t bits, const GroupPlace& place, int64_t size, uint8_t* codes) {
  if (bits == 8) return unpack<8>(place.low, size, codes);
  if (bits == 2) return unpack<2>(place.low, size, codes);
  unpack<4>(place.low, size, codes);
  if (bits == 6) {
    uint8_t tops[kGroupRoom];
    unpack<2>(place.tops, size, tops);
    for (int64_t k = 0; k < size; ++k) codes[k] = static_cast<uint8_t>(codes[k] | tops[k] << 4);
  }
}

template <typename T>
REMNANT_ALWAYS_INLINE void encode_relu(const T* x, int64_t size, int64_t bits, const uint16_t* random,
                                       GroupCodes<T>& codes, uint8_t* step_bytes) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const T levels = static_cast<T>((1 << bits) - 2);
  Vector<T> highest{};
  Bits<T> wrong{};
  for (int64_t j = 0; j < size; j += kWidth<T>) {
    const Vector<T> v = load(x + j);
    highest = v > highest ? v : highest;
    wrong |= ~((v < T(0) ? -v : v) <= std::numeric_limits<T>::max());
  }
  const T above = highest_lane<T>(highest);
  uint16_t step = kNan;
  T inverse = 0;
  if (bits_of<T>(wrong) == 0 && above <= static_cast<T>(std::numeric_limits<float>::max())) {
    const T exact = above / levels;
    step = narrow_outwards<true>(exact > 0 && exact < T(kLeastStep) ? T(kLeastStep) : exact);
    inverse = step == 0 ? T(0) : T(1) / widen_bfloat16(step);
  }
  std::memcpy(step_bytes, &step, sizeof(step));
  for (int64_t j = 0; j < size; j += kWidth<T>) {
    const Vector<T> v = load(x + j);
    const Vector<T> level = v * inverse + uniform<T>(random + j);
    const Bits<T> code =
        __builtin_convertvector(level < levels ? level : broadcast(levels), Bits<T>) + static_cast<Lane>(1);
    codes[j / kWidth<T>] = v > T(0) ? code : Bits<T>{};
  }
}

template <typename T>
REMNANT_ALWAYS_INLINE void encode_row(const HiddenRows<T>& rows, int64_t row) {
  constexpr int64_t width = kWidth<T>, drawn = kWidth<uint64_t> * kDropoutColumns;
  alignas(64) uint16_t drops[kColumns], random[kColumns + drawn];
  T* const hidden = rows.hidden + row * rows.columns;
  for (int64_t first = 0; first < rows.columns; first += kColumns) {
    const int64_t columns = std::min(rows.columns - first, kColumns);
    if (rows.threshold > 0) {
      dropout_bits(rows.seed, 0, rows.first_row + row, 1, first / kDropoutColumns,
                   (columns + kDropoutColumns - 1) / kDropoutColumns, drops);
    }
    for (int64_t j = 0; j < columns; j += drawn) {
      random_blocks<1>(rows.seed, Stream::rounding, static_cast<uint32_t>(rows.first_row + row),
                       static_cast<uint32_t>((first + j) / kDropoutColumns), random + j);
    }
    for (int64_t j = 0; j < columns; j += kCodeGroup) {
      const int64_t size = std::min(columns - j, kCodeGroup);
      const GroupPlace place = place_of(rows, row, (first + j) / kCodeGroup);
      alignas(64) T x[kCodeGroup];
      GroupCodes<T> codes = {};
      if (size < kCodeGroup) std::memset(x, 0, sizeof(x));
      for (int64_t k = 0; k < size; k += width) {
        const int64_t count = std::min(size - k, width), at = first + j + k;
        Vector<T> v = count == width ? load(hidden + at) : load_part(hidden + at, count);
        if (rows.bias != nullptr)
          v += count == width ? load(rows.bias + at) : load_part(rows.bias + at, count);
        const Vector<T> factor = rows.threshold > 0
                                     ? dropout_factor<T>(drops + j + k, rows.threshold, rows.keep_scale)
                                     : broadcast(T(1));
        Vector<T> y;
        if (rows.activation == HiddenActivation::relu) {
          store(x + k, v);
          y = activate<T>(v, HiddenActivation::relu) * factor;
        } else {
          const Vector<T> cdf = normal_cdf(v);
          codes[k / width] =
              draw_code<T>(*rows.grid, v, v * cdf, slope<T>(v, cdf), uniform<T>(random + j + k));
          y = v * cdf * factor;
        }
        if (count == width) {
          store(hidden + at, y);
        } else {
          store_part(hidden + at, y, count);
        }
      }
      if (rows.activation == HiddenActivation::relu) {
        encode_relu<T>(x, size, rows.bits, random + j, codes, place.step);
      }
      if (size == kCodeGroup) {
        pack_group<T>(rows.bits, codes, place);
      } else {
        uint8_t bytes[kGroupRoom] = {};
        for (int64_t k = 0; k < size; ++k) bytes[k] = static_cast<uint8_t>(codes[k / width][k % width]);
        pack_group(rows.bits, bytes, size, place);
      }
    }
  }
}

template <typename T>
REMNANT_ALWAYS_INLINE void decode_row(const HiddenRows<T>& rows, int64_t row) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr int64_t width = kWidth<T>;
  alignas(64) uint16_t drops[kColumns];
  T* const hidden = rows.hidden + row * rows.columns;
  T* const grad = rows.grad + row * rows.columns;
  const bool relu = rows.activation == HiddenActivation::relu;
  for (int64_t first = 0; first < rows.columns; first += kColumns) {
    const int64_t columns = std::min(rows.columns - first, kColumns);
    if (rows.threshold > 0) {
      dropout_bits(rows.seed, 0, rows.first_row + row, 1, first / kDropoutColumns,
                   (columns + kDropoutColumns - 1) / kDropoutColumns, drops);
    }
    for (int64_t j = 0; j < columns; j += kCodeGroup) {
      const int64_t size = std::min(columns - j, kCodeGroup);
      const GroupPlace place = place_of(rows, row, (first + j) / kCodeGroup);
      alignas(64) uint8_t codes[kGroupRoom];
      const bool whole_group = size == kCodeGroup;
      if (!whole_group) {
        std::memset(codes, 0, sizeof(codes));
        unpack_group(rows.bits, place, size, codes);
      }
      T step = 0, nothing = 0;
      if (relu) {
        uint16_t bits;
        std::memcpy(&bits, place.step, sizeof(bits));
        step = widen_bfloat16(bits);
        nothing = step - step;  // NaN for a group that has it
      }
      for (int64_t k = 0; k < size; k += width) {
        const int64_t count = std::min(size - k, width), at = first + j + k;
        const bool whole = count == width;
        const Vector<T> factor = rows.threshold > 0
                                     ? dropout_factor<T>(drops + j + k, rows.threshold, rows.keep_scale)
                                     : broadcast(T(1));
        const Bits<T> code = whole_group ? unpack_vector<T>(rows.bits, place, k) : load_bytes<T>(codes + k);
        Vector<T> y, derivative;
        if (relu) {
          const Bits<T> passes = code > static_cast<Lane>(0);
          y = passes ? __builtin_convertvector(code - static_cast<Lane>(1), Vector<T>) * step : Vector<T>{};
          derivative = passes ? broadcast(T(1)) : Vector<T>{};
          y += nothing;
          derivative += nothing;
        } else {
          y = lookup<T>(rows.grid->value, code);
          derivative = lookup<T>(rows.grid->slope, code);
        }
        y *= factor;
        const Vector<T> g = (whole ? load(grad + at) : load_part(grad + at, count)) * factor * derivative;
        if (whole) {
          store(hidden + at, y);
          store(grad + at, g);
        } else {
          store_part(hidden + at, y, count);
          store_part(grad + at, g, count);
        }
      }
    }
  }
}

}  // namespace

template <typename T>
void hidden_encode(const HiddenRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) encode_row(rows, i);
}

template <typename T>
void hidden_decode(const HiddenRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) decode_row(rows, i);
}

template <typename T>
void hidden_forward(const HiddenRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* const hidden = rows.hidden + i * rows.columns;
    for_row(rows, i, [&](int64_t j, int64_t count, Vector<T> bias, Vector<T> factor) {
      if (count == kWidth<T>) {
        store(hidden + j, activate<T>(load(hidden + j) + bias, rows.activation) * factor);
      } else {
        store_part(hidden + j, activate<T>(load_part(hidden + j, count) + bias, rows.activation) * factor,
                   count);
      }
    });
  }
}

template <typename T>
void hidden_backward(const HiddenRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    T* const hidden = rows.hidden + i * rows.columns;
    T* const grad = rows.grad + i * rows.columns;
    for_row(rows, i, [&](int64_t j, int64_t count, Vector<T> bias, Vector<T> factor) {
      const bool whole = count == kWidth<T>;
      const Vector<T> x = (whole ? load(hidden + j) : load_part(hidden + j, count)) + bias;
      const Vector<T> g = whole ? load(grad + j) : load_part(grad + j, count);
      Vector<T> y, dx;
      if (rows.activation == HiddenActivation::relu) {
        y = activate<T>(x, HiddenActivation::relu) * factor;
        dx = x <= T(0) ? Vector<T>{} : g * factor;
      } else {
        const Vector<T> cdf = normal_cdf(x);
        y = x * cdf * factor;
        dx = g * factor * slope<T>(x, cdf);
      }
      if (whole) {
        store(hidden + j, y);
        store(grad + j, dx);
      } else {
        store_part(hidden + j, y, count);
        store_part(grad + j, dx, count);
      }
    });
  }
}

template void hidden_forward(const HiddenRows<float>&, int64_t, int64_t);
template void hidden_forward(const HiddenRows<double>&, int64_t, int64_t);
template void hidden_backward(const HiddenRows<float>&, int64_t, int64_t);
template void hidden_backward(const HiddenRows<double>&, int64_t, int64_t);
template void hidden_encode(const HiddenRows<float>&, int64_t, int64_t);
template void hidden_encode(const HiddenRows<double>&, int64_t, int64_t);
template void hidden_decode(const HiddenRows<float>&, int64_t, int64_t);
template void hidden_decode(const HiddenRows<double>&, int64_t, int64_t);

}  // namespace remnant::kernels::REMNANT_VARIANT
