#pragma once

#include <remnant/export.h>

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

namespace remnant {

/// max(input, 0); any shape, float32, float64, bfloat16 or float16. Saves for backward: one bit an element,
/// ceil(n / 8) bytes (eager PyTorch keeps the output). NaN stays NaN and lets the gradient pass, as in
/// PyTorch. Twice differentiable.
REMNANT_API at::Tensor relu(const at::Tensor& input);

/// input where it is positive, else slope * input. Otherwise as relu.
REMNANT_API at::Tensor leaky_relu(const at::Tensor& input, double slope = 0.01);

/// GELU, input * Phi(input) (approximate "none") or with Phi's tanh form (approximate "tanh").
///
/// policy "exact": saves the input; the gradient is exact. "fewbit:bits=2", 3 or 4: saves which of 2^bits
/// intervals an element lies in, ceil(n / 8) * bits + ceil(n / 512) bytes; the gradient takes the interval's
/// mean derivative for the derivative, which is biased: docs/numerics.md has the error. The forward is exact
/// under both. "quantized:bits=8", 4 or 2: saves the derivative's codes by stochastic rounding
/// (linear_code_bytes); the gradient is unbiased. Groups of 64 elements (consecutive in memory order) with
/// NaN or Inf among them get a NaN gradient. Double backward raises an error. Throws c10::Error for a policy
/// that does not parse.
REMNANT_API at::Tensor gelu(const at::Tensor& input, c10::string_view approximate = "none",
                            c10::string_view policy = "exact");

/// SiLU, input * sigmoid(input); policies as in gelu.
REMNANT_API at::Tensor silu(const at::Tensor& input, c10::string_view policy = "exact");

}  // namespace remnant
