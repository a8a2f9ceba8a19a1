#pragma once

// Kernels of a Transformer step's other ops: norms, dropout, activations, low-bit codes. Flat tensors and
// rows of contiguous elements.

#include "kernels/cpu/spectrum_kernels.h"
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

/// What an activation computes; leaky: x where x > 0 or NaN, else slope x.
enum class ActivationKind { leaky, gelu, gelu_tanh, silu };

/// Few-bit codes of a flat tensor: element e has bit i in plane i of its group of 64 elements. A group's
/// planes follow each other, 8 bytes each, ceil(r / 8) where the last group has only r elements. Behind the
/// last group come marks, one bit a group, 8 groups a byte: whether it holds NaN or Inf. leaky: one plane
/// that says which elements pass, no marks.
constexpr int64_t kCodeGroup = 64;
/// Elements of a byte of marks; ranges of work begin at multiples of it.
constexpr int64_t kMarkedElements = 8 * kCodeGroup;
constexpr int64_t plane_bytes(int64_t size, int64_t bits) { return (size + 7) / 8 * bits; }
constexpr int64_t mark_bytes(int64_t size) { return (size + kMarkedElements - 1) / kMarkedElements; }

struct Activation {
  Element element = Element::f32;
  ActivationKind kind = ActivationKind::leaky;
  int64_t size = 0;
  double slope = 0;
  const void* x = nullptr;     // null in a backward from codes
  void* y = nullptr;           // forward
  const void* grad = nullptr;  // backward
  void* grad_x = nullptr;
  uint8_t* codes = nullptr;  // null: none
  uint8_t* marks = nullptr;
  int64_t bits = 0;                // 0: backward from x
  const double* bounds = nullptr;  // 2^bits - 1, ascending: code is how many of them x exceeds
  const double* levels = nullptr;  // 2^bits: what stands for the derivative
};

/// A flat tensor at 8, 4 or 2 bits in groups of kCodeGroup elements, the last of any size. A group has a
/// minimum and a step, rounded outwards to bfloat16, table[group][2]; an element is minimum + code * step. Of
/// a group of r elements element e lies in byte e mod ceil(r bits / 8), at bit e / ceil(r bits / 8) * bits: a
/// byte holds neighbours half (a quarter) of a group apart, which suits vectors. A group with NaN, Inf or a
/// range beyond float has step NaN.
constexpr int64_t code_bytes(int64_t size, int64_t bits) { return (size * bits + 7) / 8; }
constexpr int64_t code_groups(int64_t size) { return (size + kCodeGroup - 1) / kCodeGroup; }
// What rounding adds is (r + 0.5) / 65536, r the 16 bits of a flat tensor's element in the rounding stream.

// kinked: a group has two steps instead, of the numbers below 0 and of those above, and a code is a sign (its
// highest bit, set for what is not above 0) and a level of that side, 0 among them: signs are exact, what was
// rounded to 0 keeps its own as -0 or +0, and each side is unbiased by itself.

struct LowBits {
  Element element = Element::f32;
  int64_t size = 0;
  int64_t bits = 8;
  const void* x = nullptr;  // encode
  void* y = nullptr;        // decode
  int64_t first = 0;        // x and y begin there
  bool kinked = false;
  uint8_t* codes = nullptr;
  uint16_t* table = nullptr;
  Seed seed;
};

/// A convolution's output with what follows it, elementwise over flat memory:
///   u = x scale + shift;  s = u factor + offset + residual;  y = s where s > 0, else slope s.
/// Parameters are wide [sets, channels]: a set for all samples or one a sample. Null pointers: left out. The
/// backward, with g = grad times the slope at s: grad_residual = g, grad_x = g of_grad + u of_u + constant.
struct ConvUnit {
  Element element = Element::f32;
  bool planes = true;  // memory is [sample, channel, position], else [sample, position, channel]
  int64_t channels = 0, positions = 0, sets = 1;
  const void *scale = nullptr, *shift = nullptr, *factor = nullptr, *offset = nullptr;
  double slope = 1;
  const void* x = nullptr;  // element `input_first` and on
  int64_t input_first = 0;
  const void* residual = nullptr;
  // Forward: written. Backward: read; without s it is made from u, without u it is s - residual.
  void *u = nullptr, *s = nullptr;
  int64_t kept_first = 0;  // where u and s begin
  void* y = nullptr;
  const void* grad = nullptr;
  double inverse_slope = 1;   // s where it is above 0, else s times this, is the sum: for a kept output
  double residual_slope = 1;  // the same: for a residual that is an activation's input
  bool by_sign = false;       // s = +0 passes whole, as its code says
  const void *of_grad = nullptr, *of_u = nullptr, *constant = nullptr;
  void *grad_x = nullptr, *grad_residual = nullptr;
  // [2][sets, channels], added to. Moments: of x - shift and its square. Reduction: of g and g u.
  double* sums = nullptr;
};

struct CpuKernels;
/// A window's most taps: a tap's number is a byte.
constexpr int64_t kMostTaps = 256;

/// Max pooling of planes [height, width], channels-last or one by one.
struct MaxPool {
  Element element = Element::f32;
  bool channels_last = false;
  int64_t channels = 0, height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t kernel[2] = {}, stride[2] = {}, padding[2] = {}, dilation[2] = {};
  const void* x = nullptr;
  void* y = nullptr;
  uint8_t* new_places = nullptr;  // beside y: which tap of its window is y
  const void* grad_y = nullptr;
  const uint8_t* places = nullptr;
  void* grad_x = nullptr;
};

struct StepKernels {
  /// Rows [begin, end).
  void (*norm_forward)(const NormForward&, int64_t begin, int64_t end, void* scratch);
  void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end, void* scratch);
  /// Elements [begin, end).
  void (*dropout_add)(const DropoutAdd&, int64_t begin, int64_t end);
  /// Elements [begin, end) of a tensor of `size`; both multiples of kMarkedElements, or the tensor's end.
  void (*activation_forward)(const Activation&, int64_t begin, int64_t end);
  void (*activation_backward)(const Activation&, int64_t begin, int64_t end);
  /// Elements [begin, end); both multiples of kCodeGroup, or the tensor's end.
  void (*encode)(const LowBits&, int64_t begin, int64_t end);
  void (*decode)(const LowBits&, int64_t begin, int64_t end);
  /// to[c][r] = from[r][c]; strides in elements.
  void (*transpose_floats)(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                           int64_t to_stride);
  /// Elements [begin, end).
  void (*unit_moments)(const ConvUnit&, int64_t begin, int64_t end);
  void (*unit_forward)(const ConvUnit&, int64_t begin, int64_t end);
  void (*unit_reduce)(const ConvUnit&, int64_t begin, int64_t end);
  void (*unit_backward)(const ConvUnit&, int64_t begin, int64_t end);
  /// Rows [begin, end) of all planes, or samples, of y; of grad_x, which are whole planes where those lie one
  /// by one.
  void (*max_pool_forward)(const MaxPool&, int64_t begin, int64_t end);
  void (*max_pool_backward)(const MaxPool&, int64_t begin, int64_t end);
  /// Samples [begin, end), scratch of scratch_floats().
  void (*spectrum_forward_f32)(const Spectrum<float>&, int64_t begin, int64_t end, void* scratch);
  void (*spectrum_forward_f64)(const Spectrum<double>&, int64_t begin, int64_t end, void* scratch);
  void (*spectrum_inverse_f32)(const Spectrum<float>&, int64_t begin, int64_t end, void* scratch);
  void (*spectrum_inverse_f64)(const Spectrum<double>&, int64_t begin, int64_t end, void* scratch);
  /// Systems [begin, end).
  void (*system_products_f32)(const SystemProducts<float>&, int64_t begin, int64_t end);
  void (*system_products_f64)(const SystemProducts<double>&, int64_t begin, int64_t end);
  void (*system_inverses_f32)(const SystemInverses<float>&, int64_t begin, int64_t end, void* scratch);
  void (*system_inverses_f64)(const SystemInverses<double>&, int64_t begin, int64_t end, void* scratch);
};

/// Of the instruction set of `chosen`.
const StepKernels& find_step_kernels(const CpuKernels* chosen);
/// Of the instruction set that cpu_kernels() chose.
const StepKernels& step_kernels();

}  // namespace remnant::kernels
