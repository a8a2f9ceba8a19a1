#pragma once

#include <remnant/export.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <tuple>

namespace remnant {

/// LayerNorm over the last dimension: y = x^ * weight + bias, x^ = (input - mean) / sqrt(variance + eps),
/// the biased variance.
///
/// input [..., C], C > 0: float32, float64, bfloat16 or float16; weight and bias [C] or absent, in input's
/// dtype or, for half types, float32. Returns input's shape and dtype; computed in float32 (float64 for
/// float64).
///
/// Saves for backward: the output, which the next op usually keeps anyway, and 1 / sqrt(variance + eps), one
/// wide float a row, from which x^ = (y - bias) / weight comes back. Columns where weight or bias hide x^
/// (|bias| > 16 |weight|, for half types |bias| > |weight|; |weight| outside of [2^-64, 2^64], zero among
/// them) are kept aside as x^ itself, one wide float a row each; when every column is, the output is not
/// kept. So weights load and train as they are. A gradient that is not wanted keeps nothing. Under
/// torch.compile, which has to know shapes before values, every column is kept aside.
/// policy "quantized:bits=8", 4 or 2: keeps the output's codes by stochastic rounding (linear_code_bytes),
/// the same ones that `linear` keeps of it at as many bits. Gradients of weight and bias stay unbiased,
/// input's up to the codes' variance over C: docs/numerics.md has it. Double backward raises an error. Throws
/// c10::Error, naming argument, expected and got.
REMNANT_API at::Tensor layer_norm(const at::Tensor& input,
                                  const std::optional<at::Tensor>& weight = std::nullopt,
                                  const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
                                  c10::string_view policy = "exact");

/// RMSNorm over the last dimension: y = input / sqrt(mean(input^2) + eps) * weight. Shapes, dtypes, errors
/// and what is saved as in layer_norm. eps: the dtype's machine epsilon when absent, as in PyTorch.
REMNANT_API at::Tensor rms_norm(const at::Tensor& input,
                                const std::optional<at::Tensor>& weight = std::nullopt,
                                std::optional<double> eps = std::nullopt, c10::string_view policy = "exact");

/// (y, sum): sum = residual + dropout(input), y = layer_norm(sum, weight, bias, eps), in one pass forward and
/// one backward. Both outputs take part in backward; with need_sum = false `sum` is empty, for post-norm
/// layers, which use y alone.
///
/// input and residual: one shape [..., C] and dtype, otherwise as in layer_norm. Half types: y comes from
/// the sum before it is rounded. Dropout draws the mask that remnant::dropout draws for the same generator
/// state.
///
/// Saves for backward: what layer_norm saves, and a 16-byte seed when p > 0; neither sum nor input.
REMNANT_API std::tuple<at::Tensor, at::Tensor> dropout_add_layer_norm(
    const at::Tensor& input, const at::Tensor& residual, double p,
    const std::optional<at::Tensor>& weight = std::nullopt,
    const std::optional<at::Tensor>& bias = std::nullopt, double eps = 1e-5,
    const std::optional<at::Generator>& generator = std::nullopt, bool need_sum = true,
    c10::string_view policy = "exact");

}  // namespace remnant
