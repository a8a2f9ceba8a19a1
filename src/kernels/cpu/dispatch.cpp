// Chooses the instruction set, and the sizes that callers and kernels share.

#include "kernels/cpu/variants.h"

#include <bit>
#include <cstdlib>
#include <cstring>

namespace remnant::kernels {

int64_t rank_bits(int64_t keys) {
  return keys <= 1 ? 0 : static_cast<int64_t>(std::bit_width(static_cast<uint64_t>(keys - 1)));
}

int64_t rank_bytes(int64_t keys) { return (keys * rank_bits(keys) + 7) / 8; }

int64_t curve_width(int64_t keys, int64_t m) { return (2 * m < keys ? 2 * m : keys) + 2; }

template <typename T>
int64_t curve_scratch_bytes(int64_t keys) {
  return keys * static_cast<int64_t>(3 * sizeof(T) + 3 * sizeof(uint32_t));
}
template int64_t curve_scratch_bytes<float>(int64_t);
template int64_t curve_scratch_bytes<double>(int64_t);

template <typename T>
int64_t attention_scratch_bytes(const AttentionProblem<T>& problem, int64_t block_rows) {
  const int64_t blocks = 2 * block_rows * problem.keys * static_cast<int64_t>(sizeof(T));
  const int64_t random = block_rows * (problem.keys + 16) * static_cast<int64_t>(sizeof(uint32_t));
  return blocks + random + curve_scratch_bytes<T>(problem.keys) + 64;
}
template int64_t attention_scratch_bytes(const AttentionProblem<float>&, int64_t);
template int64_t attention_scratch_bytes(const AttentionProblem<double>&, int64_t);

namespace {

#define REMNANT_KERNEL_TABLE(variant)                                                              \
  constexpr CpuKernels k_##variant {                                                               \
    #variant, variant::attention_forward<float>, variant::attention_forward<double>,               \
        variant::attention_backward<float>, variant::attention_backward<double>,                   \
        variant::curve_encode<float>, variant::curve_encode<double>, variant::curve_decode<float>, \
        variant::curve_decode<double>, variant::dropout_bits, variant::cross_entropy<float>,       \
        variant::cross_entropy<double>                                                             \
  }

REMNANT_KERNEL_TABLE(portable);
#ifdef REMNANT_HAVE_AVX2
REMNANT_KERNEL_TABLE(avx2);
#endif
#ifdef REMNANT_HAVE_AVX512
REMNANT_KERNEL_TABLE(avx512);
#endif

}  // namespace

const CpuKernels* find_cpu_kernels(const char* name) {
  const bool any = name == nullptr || *name == '\0';
#ifdef REMNANT_HAVE_AVX512
  if ((any || std::strcmp(name, "avx512") == 0) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return &k_avx512;
  }
#endif
#ifdef REMNANT_HAVE_AVX2
  if ((any || std::strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return &k_avx2;
  }
#endif
  return any || std::strcmp(name, "portable") == 0 ? &k_portable : nullptr;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels* const kernels = [] {
    const CpuKernels* named = find_cpu_kernels(std::getenv("REMNANT_CPU"));
    return named != nullptr ? named : find_cpu_kernels(nullptr);
  }();
  return *kernels;
}

namespace {

template <typename T>
void plain(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha, const T* a,
           int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    T* row = c + i * ldc;
    if (beta == 0) {
      for (int64_t j = 0; j < n; ++j) row[j] = 0;
    }
    if (transpose_b) {
      for (int64_t j = 0; j < n; ++j) {
        T sum = 0;
        for (int64_t l = 0; l < k; ++l)
          sum += (transpose_a ? a[l * lda + i] : a[i * lda + l]) * b[j * ldb + l];
        row[j] += alpha * sum;
      }
    } else {
      for (int64_t l = 0; l < k; ++l) {
        const T factor = alpha * (transpose_a ? a[l * lda + i] : a[i * lda + l]);
        for (int64_t j = 0; j < n; ++j) row[j] += factor * b[l * ldb + j];
      }
    }
  }
}

}  // namespace

void gemm_plain(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
                const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  plain(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm_plain(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
                int64_t ldc) {
  plain(transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

}  // namespace remnant::kernels
