#pragma once

// Kernels of a Transformer step's other ops: norms, dropout, activations, low-bit codes. Flat tensors and
// rows of contiguous elements.

#include "kernels/philox.h"

#include <cstdint>

namespace remnant::kernels {

/// Element type of the tensors behind void pointers. Arithmetic and whatever is called wide is float, for
/// f64 double.
enum class Element { f32, f64, bf16, f16 };

/// A flat tensor's random bits: element e is column e mod kFlatChunk of row e / kFlatChunk, 16 bits each.
constexpr int64_t kFlatChunk = 4096;

/// y = (v - mean) * rstd * weight + bias a row, v = residual + dropout(x); center false: no mean.
struct NormForward {
  Element element = Element::f32;
  int64_t columns = 0;
  bool center = true;
  double eps = 0;
  const void* x = nullptr;
  const void* residual = nullptr;  // null: none
  const void* weight = nullptr;    // wide [columns]; null: 1
  const void* bias = nullptr;      // wide [columns]; null: 0
  int64_t drop_threshold = 0;      // of 65536; 0: no dropout
  Seed seed;
  void* y = nullptr;
  void* sum = nullptr;   // v; null: not wanted
  void* rstd = nullptr;  // wide [rows]; null: not wanted
  // The normalised rows' columns that weight and bias hide: wide [rows, aside_count]. Null aside_columns:
  // all.
  const int64_t* aside_columns = nullptr;
  int64_t aside_count = 0;
  void* aside = nullptr;
};

/// With x^ = (y - bias) / weight and h = grad_y * weight: grad_v = rstd (h - mean(h) - x^ mean(h x^)) +
/// grad_sum.
struct NormBackward {
  Element element = Element::f32;
  int64_t columns = 0;
  bool center = true;
  const void* grad_y = nullptr;
  const void* grad_sum = nullptr;        // null: 0
  const void* y = nullptr;               // null: every column is aside
  const void* rstd = nullptr;            // wide [rows]; null where grad_residual and grad_x are
  const void* weight = nullptr;          // wide; null: 1
  const void* inverse_weight = nullptr;  // wide; null: 1
  const void* bias = nullptr;            // wide; null: 0
  const int64_t* aside_columns = nullptr;
  int64_t aside_count = 0;
  const void* aside = nullptr;
  int64_t drop_threshold = 0;
  Seed seed;
  void* grad_residual = nullptr;  // grad_v; null: not wanted
  void* grad_x = nullptr;         // grad_v times the dropout mask; null: not wanted
  void* grad_weight = nullptr;    // wide [columns], added to; null: not wanted
  void* grad_bias = nullptr;
};

/// Bytes of scratch that a runner of either needs.
int64_t norm_scratch_bytes(int64_t columns);

/// y = residual + dropout(x) over a flat tensor.
struct DropoutAdd {
  Element element = Element::f32;
  const void* x = nullptr;
  const void* residual = nullptr;  // null: 0
  void* y = nullptr;
  int64_t drop_threshold = 0;
  Seed seed;
};

struct CpuKernels;
struct StepKernels {
  /// Rows [begin, end).
  void (*norm_forward)(const NormForward&, int64_t begin, int64_t end, void* scratch);
  void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end, void* scratch);
  /// Elements [begin, end).
  void (*dropout_add)(const DropoutAdd&, int64_t begin, int64_t end);
};

/// Of the instruction set of `chosen`.
const StepKernels& find_step_kernels(const CpuKernels* chosen);
/// Of the instruction set that cpu_kernels() chose.
const StepKernels& step_kernels();

}  // namespace remnant::kernels
