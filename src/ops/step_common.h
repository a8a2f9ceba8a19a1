#pragma once

#include "kernels/cpu/step_kernels.h"

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <cstdint>
#include <optional>
#include <vector>

/// What the lean ops of a Transformer step share.
namespace remnant::ops {

/// Throws unless `x` is float32, float64, bfloat16 or float16.
void check_floating(const char* op, const char* name, const at::Tensor& x);

/// Reads `exact` (0) or `NAME:bits=B` with B among `allowed`; throws one sentence for anything else.
int64_t parse_bits(const char* op, c10::string_view policy, std::string_view name, at::IntArrayRef allowed);

/// [..., columns] as [rows, columns], also where there are no columns.
at::Tensor as_rows(const at::Tensor& x);

/// sum += a^T b, in sum's dtype.
void add_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b);

/// An activation's derivative, of input's shape and dtype; not for leaky.
at::Tensor activation_derivative(const at::Tensor& input, kernels::ActivationKind kind);

/// The kernels' name of a tensor's dtype.
kernels::Element element_of(at::ScalarType type);

/// Whether values cannot be read: torch.compile and other tracers hand in tensors without any.
bool is_traced(const at::Tensor& x);

/// residual + dropout(input) for `seed`; residual may be undefined. `input` is contiguous.
at::Tensor dropout_add_cpu(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& seed,
                           double p);
at::Tensor dropout_add_composite(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& seed,
                                 double p);
/// The mask of a flat tensor of that shape: 0 or 1 / (1 - realised rate).
at::Tensor flat_dropout_mask(const at::Tensor& like, const at::Tensor& seed, double p,
                             const at::TensorOptions& options);

/// The columns of a norm whose x^ cannot be had from y (bits > 0: from codes of y) well enough. `all`: every
/// one of them, or under codes so many that codes of x^ itself are smaller.
struct HiddenColumns {
  std::vector<int64_t> list;
  bool all = false;
};
HiddenColumns hidden_columns(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, int64_t bits);

}  // namespace remnant::ops
