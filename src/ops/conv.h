#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace remnant::ops {

struct ConvGeometry {
  std::vector<int64_t> input, stride, padding, dilation;
  int64_t groups;
};

/// What policy "invert" keeps beside the output.
struct KeptOfInput {
  at::Tensor input;        ///< the input itself, where it is not to be rebuilt; then nothing else
  std::string reason;      ///< why
  at::Tensor ring;         ///< FullConvolution::ring; undefined for 1 x 1
  at::Tensor coordinates;  ///< [N, K, 2], for 1 x 1 [N, K, h, w]; undefined without any
  at::Tensor probes;       ///< [N, 4], for 1 x 1 [C, 4]
};

/// `least`: policy "min_norm".
KeptOfInput keep_of_input(const at::Tensor& input, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, const at::Tensor& output,
                          const ConvGeometry& geometry, bool least);

/// Gradients of input, weight and bias from the output and what was kept; undefined where not needed.
std::array<at::Tensor, 3> rebuilt_backward(const at::Tensor& grad_output, const at::Tensor& output,
                                           const KeptOfInput& kept, const at::Tensor& weight,
                                           const std::optional<at::Tensor>& bias,
                                           const ConvGeometry& geometry, bool least,
                                           std::array<bool, 3> needs);

}  // namespace remnant::ops
