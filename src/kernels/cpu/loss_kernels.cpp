// Cross-entropy of rows of logits. The gradient p - onehot takes the logits' place, so that a chunk of
// logits is all the memory a loss needs.

#include "kernels/cpu/rows.h"
#include "kernels/cpu/variants.h"

namespace remnant::kernels::REMNANT_VARIANT {

template <typename T>
void cross_entropy(const CrossEntropyRows<T>& rows, int64_t begin, int64_t end) {
  const int64_t classes = rows.classes;
  for (int64_t i = begin; i < end; ++i) {
    T* z = rows.logits + i * rows.stride;
    const int64_t target = rows.targets[i];
    if (target == rows.ignore_index) {
      rows.losses[i] = 0;
      if (rows.gradient) std::memset(z, 0, static_cast<size_t>(classes) * sizeof(T));
      continue;
    }
    T highest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < classes; ++j) highest = z[j] > highest ? z[j] : highest;
    if (highest == -std::numeric_limits<T>::infinity()) highest = 0;
    const T target_logit = z[target];
    T sum = 0, mean = 0;
    if (rows.label_smoothing > 0) {
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < classes; ++j) mean += z[j];
      mean /= static_cast<T>(classes);
    }
    if (rows.gradient) {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < classes; ++j) {
        z[j] = exponential(z[j] - highest);
        sum += z[j];
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < classes; ++j) sum += exponential(z[j] - highest);
    }
    const T lse = highest + std::log(sum);
    const T eps = rows.label_smoothing;
    rows.losses[i] = (T(1) - eps) * (lse - target_logit) + (eps > 0 ? eps * (lse - mean) : T(0));
    if (!rows.gradient) continue;
    const T factor = rows.scale / sum;
    const T flat = eps * rows.scale / static_cast<T>(classes);
#pragma omp simd
    for (int64_t j = 0; j < classes; ++j) z[j] = z[j] * factor - flat;
    z[target] -= (T(1) - eps) * rows.scale;
  }
}

template void cross_entropy(const CrossEntropyRows<float>&, int64_t, int64_t);
template void cross_entropy(const CrossEntropyRows<double>&, int64_t, int64_t);

}  // namespace remnant::kernels::REMNANT_VARIANT
