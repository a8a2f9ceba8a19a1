#pragma once

#include "kernels/philox.h"

#include <cstdint>

/// Torch-free CPU kernels. They run serially over a range of tasks, neither throw nor print, and take
/// their matrix product as a pointer, so that whoever calls decides which one is fastest.
namespace remnant::kernels {

/// Row-major C (m x n) = alpha * op(A) op(B) + beta * C; beta is 0 or 1 (0: C is not read).
template <typename T>
using Gemm = void (*)(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha,
                      const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc);

/// A [B, H, N, D] tensor whose last stride is 1.
template <typename T>
struct HeadView {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides
  REMNANT_ALWAYS_INLINE T* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch + h * head + i * row;
  }
};

enum class MaskKind { none, boolean, additive };

template <typename T>
struct MaskView {
  MaskKind kind = MaskKind::none;
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;  // strides in elements, 0 where broadcast
};

/// What backward is fed with, one of the policies that keep less than P.
enum class Keep { nothing, probabilities, lse, curve, codes };

template <typename T>
struct AttentionProblem {
  int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  HeadView<const T> query, key, value;
  MaskView<T> mask;
  int64_t left = -1, right = -1;  // query i attends [i - left, i + right]; -1: no bound
  T scale = 1;
  int64_t drop_threshold = 0;  // of 65536; 0: no dropout
  Seed seed;
  Keep keep = Keep::nothing;
  int64_t m = 0;               // curve
  bool paper_text = false;     // curve
  int64_t bits = 0;            // codes
  T* probabilities = nullptr;  // [B, H, Nq, Nk]; keep probabilities
  T* lse = nullptr;            // [B, H, Nq]; keep lse
  uint8_t* codes = nullptr;    // [B, H, Nq, code_bytes]: packed ranks or codes
  int64_t code_bytes = 0;
  T* table = nullptr;  // [B, H, Nq, table_width]: the curve's numbers, or the codes' row maximum
  int64_t table_width = 0;
  Gemm<T> gemm = nullptr;
};

template <typename T>
struct AttentionForward : AttentionProblem<T> {
  HeadView<T> output;
  int64_t block_rows = 0;

  REMNANT_ALWAYS_INLINE int64_t row_blocks() const { return (this->queries + block_rows - 1) / block_rows; }
  REMNANT_ALWAYS_INLINE int64_t tasks() const { return this->batch * this->heads * row_blocks(); }
};

/// A task is one key-value head and one of `splits` shares of its rows; shares add up in a fixed
/// order afterwards, so that results depend on the number of shares only, never on timing.
template <typename T>
struct AttentionBackward : AttentionProblem<T> {
  HeadView<const T> grad_output;
  HeadView<const T> output;  // for delta = g . o; null data: delta from the decoded row (biased policies)
  HeadView<T> grad_query, grad_key, grad_value;  // null data where not needed; key, value zeroed, one a split
  int64_t split_stride_key = 0, split_stride_value = 0;
  int64_t splits = 1;
  int64_t block_rows = 0;

  REMNANT_ALWAYS_INLINE int64_t tasks() const { return this->batch * this->kv_heads * splits; }
};

/// Bytes of scratch one task runner needs.
template <typename T>
int64_t attention_scratch_bytes(const AttentionProblem<T>& problem, int64_t block_rows);

int64_t rank_bits(int64_t keys);
int64_t rank_bytes(int64_t keys);
/// 2m values (no more than keys), the decay and the number of valid keys.
int64_t curve_width(int64_t keys, int64_t m);

/// Rows of a softmax on their own, for softmax_approximation and tests. Row-major [rows, keys].
template <typename T>
struct CurveRows {
  int64_t rows = 0, keys = 0, m = 0;
  bool paper_text = false;
  const T* input = nullptr;  // encode: z, -inf where masked
  T* output = nullptr;       // encode: p; decode: p^
  uint8_t* codes = nullptr;
  T* table = nullptr;
};
template <typename T>
int64_t curve_scratch_bytes(int64_t keys);

/// Rows of logits to rows of their cross-entropy's gradient, in place.
template <typename T>
struct CrossEntropyRows {
  int64_t classes = 0, stride = 0;
  T* logits = nullptr;
  const int64_t* targets = nullptr;
  int64_t ignore_index = -100;
  T label_smoothing = 0;
  T scale = 1;            // of the gradient
  bool gradient = false;  // else logits are left as they are
  T* losses = nullptr;    // one a row, 0 where ignored
};

struct CpuKernels {
  const char* name;
  void (*forward_float)(const AttentionForward<float>&, int64_t begin, int64_t end, void* scratch);
  void (*forward_double)(const AttentionForward<double>&, int64_t begin, int64_t end, void* scratch);
  void (*backward_float)(const AttentionBackward<float>&, int64_t begin, int64_t end, void* scratch);
  void (*backward_double)(const AttentionBackward<double>&, int64_t begin, int64_t end, void* scratch);
  void (*curve_encode_float)(const CurveRows<float>&, int64_t begin, int64_t end, void* scratch);
  void (*curve_encode_double)(const CurveRows<double>&, int64_t begin, int64_t end, void* scratch);
  void (*curve_decode_float)(const CurveRows<float>&, int64_t begin, int64_t end, void* scratch);
  void (*curve_decode_double)(const CurveRows<double>&, int64_t begin, int64_t end, void* scratch);
  /// 16 random bits for `blocks` blocks of 8 columns in each of `rows` rows, row-major.
  void (*dropout_bits)(const Seed& seed, uint32_t head, int64_t row, int64_t rows, int64_t block,
                       int64_t blocks, uint16_t* out);
  void (*cross_entropy_float)(const CrossEntropyRows<float>&, int64_t begin, int64_t end);
  void (*cross_entropy_double)(const CrossEntropyRows<double>&, int64_t begin, int64_t end);
};

/// The best this machine runs, or the one that the environment variable REMNANT_CPU names
/// (`portable`, `avx2`, `avx512`); null when it names one that this machine or build lacks.
const CpuKernels* find_cpu_kernels(const char* name);
const CpuKernels& cpu_kernels();

/// A plain product for where no library offers one.
void gemm_plain(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, float alpha,
                const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
void gemm_plain(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
                int64_t ldc);

}  // namespace remnant::kernels
