// The paper's curve on rows that stand alone (softmax_approximation).

#include "kernels/cpu/rows.h"
#include "kernels/cpu/variants.h"

namespace remnant::kernels::REMNANT_VARIANT {

template <typename T>
void curve_encode(const CurveRows<T>& rows, int64_t begin, int64_t end, void* memory) {
  CurveScratch<T> scratch(memory, rows.keys);
  const int64_t code_bytes = rank_bytes(rows.keys);
  const int64_t width = curve_width(rows.keys, rows.m);
  for (int64_t i = begin; i < end; ++i) {
    const T* z = rows.input + i * rows.keys;
    T* p = rows.output + i * rows.keys;
    T highest = -std::numeric_limits<T>::infinity();
    for (int64_t j = 0; j < rows.keys; ++j) highest = z[j] > highest ? z[j] : highest;
    if (highest == -std::numeric_limits<T>::infinity()) highest = 0;  // nothing valid, or only NaN
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < rows.keys; ++j) {
      p[j] = exponential(z[j] - highest);
      sum += p[j];
    }
    const T inverse = sum == 0 ? T(0) : T(1) / sum;
#pragma omp simd
    for (int64_t j = 0; j < rows.keys; ++j) p[j] *= inverse;
    if (rows.table != nullptr) {  // codes may be null: a single key has a rank of no bits
      curve_encode_row(z, p, rows.keys, rows.m, rows.codes + i * code_bytes, rows.table + i * width, scratch);
    }
  }
}

template <typename T>
void curve_decode(const CurveRows<T>& rows, int64_t begin, int64_t end, void* memory) {
  CurveScratch<T> scratch(memory, rows.keys);
  const int64_t code_bytes = rank_bytes(rows.keys);
  const int64_t width = curve_width(rows.keys, rows.m);
  for (int64_t i = begin; i < end; ++i) {
    curve_decode_row(rows.codes + i * code_bytes, rows.table + i * width, rows.keys, rows.m, rows.paper_text,
                     rows.output + i * rows.keys, scratch);
  }
}

template void curve_encode(const CurveRows<float>&, int64_t, int64_t, void*);
template void curve_encode(const CurveRows<double>&, int64_t, int64_t, void*);
template void curve_decode(const CurveRows<float>&, int64_t, int64_t, void*);
template void curve_decode(const CurveRows<double>&, int64_t, int64_t, void*);

void dropout_bits(const Seed& seed, uint32_t head, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                  uint16_t* out) {
  // Element e of a block is the low (even e) or high half of word e / 2: the words' bytes in order.
  static_assert(std::endian::native == std::endian::little);
  random_words(seed, Stream::dropout, head, row, rows, block, blocks, reinterpret_cast<uint32_t*>(out));
}

}  // namespace remnant::kernels::REMNANT_VARIANT
