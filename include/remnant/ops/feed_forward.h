#pragma once

#include <remnant/export.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace remnant {

/// linear(dropout(activation(linear(input, weight1, bias1))), weight2, bias2), the position-wise block of a
/// Transformer, without keeping its hidden layer.
///
/// input [..., E], weight1 [F, E], bias1 [F], weight2 [G, F], bias2 [G] (biases may be absent), one dtype:
/// float32, float64, bfloat16 or float16. activation "relu" or "gelu" (x Phi(x), not the tanh form).
/// Dropout zeroes elements of the hidden layer with probability `dropout`, by Philox as in remnant::dropout.
/// Returns [..., G]. Forward and backward run over blocks of rows, so that no [rows, F] tensor exists.
///
/// policy "exact". Saves for backward: input, the weights and bias1, and for dropout a 16-byte seed. Eager
/// PyTorch keeps input and at least 2 F (relu, no dropout: F) floats a row. The backward recomputes the first
/// product: 1 / 2 of the forward's operations where E = G. Exact up to rounding.
///
/// policy "quantized:bits=8", 4 or 2: recomputes no product and saves the weights, a seed, codes of input (as
/// remnant::linear, shared by input's readers) and one code for each element of the hidden layer, which gives
/// back the activation and its derivative, both without bias (docs/numerics.md): for relu of 8, 4 or 2 bits
/// and 2 bytes for each 64 elements, for gelu of 8, 6 or 4 bits. Elements above 81920 become NaN under gelu.
///
/// Double backward raises an error. Throws c10::Error.
REMNANT_API at::Tensor feed_forward(const at::Tensor& input, const at::Tensor& weight1,
                                    const std::optional<at::Tensor>& bias1, const at::Tensor& weight2,
                                    const std::optional<at::Tensor>& bias2,
                                    std::string_view activation = "relu", double dropout = 0.0,
                                    std::string_view policy = "exact",
                                    const std::optional<at::Generator>& generator = std::nullopt);

}  // namespace remnant
