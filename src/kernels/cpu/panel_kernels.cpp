// Operands of a matrix product, brought into the order in which its inner loops read them.

#include "kernels/cpu/variants.h"
#include "kernels/cpu/vectors.h"

namespace remnant::kernels::REMNANT_VARIANT {

void transpose_floats(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                      int64_t to_stride) {
  transpose<false>(from, from_stride, rows, cols, 1.0f, to, to_stride);
}

}  // namespace remnant::kernels::REMNANT_VARIANT
