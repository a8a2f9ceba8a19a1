#pragma once

#include <remnant/export.h>
#include <remnant/setting.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace remnant {

struct REMNANT_API ConvNormActOptions {
  /// One number for every spatial dimension, or one each.
  std::vector<int64_t> stride{1}, padding{0}, dilation{1};
  int64_t groups = 1;
  /// "batch", "group:groups=8" or "none".
  std::string norm = "batch";
  /// Batch norm: statistics of the batch, and running ones updated; else the running ones, as constants.
  bool training = true;
  double momentum = 0.1;
  double eps = 1e-5;
  /// "relu", "leaky:slope=0.01" (slope >= 0), "silu" or "identity".
  std::string activation = "relu";
  /// eager, exact or unbiased.
  Memory memory = Memory::exact();
  std::optional<at::Generator> generator;
  /// Under exact: keep the input alone, and convolve again in backward for whoever needs the sum or the
  /// output.
  bool recompute = false;
};

/// y = activation(norm(convolution(input, weight) + bias) * norm_weight + norm_bias + residual).
///
/// input [N, C_in, L], [N, C_in, H, W] or [N, C_in, D, H, W], contiguous or channels-last; weight as in
/// torch's convolutions; bias, norm_weight, norm_bias, running_mean and running_var [C_out] or absent;
/// residual of the output's shape and dtype. float32, float64, bfloat16 and float16; norm parameters may be
/// float32 beside half types. Running statistics are updated once, in the forward.
///
/// Saves for backward, of activations:
///  * exact: the sum before a ReLU or SiLU, else the output. The next unit finds there what its weight's
///    gradient needs, so that the ReLU's output is kept by nobody and each storage has several readers; x^
///    comes back as (sum - norm_bias - residual) / norm_weight. Channels where norm_weight is too small for
///    that (0 among them) keep x^ aside.
///  * exact, recompute: input alone, which another unit's sum or a step's data often gives anyway; so for a
///    1x1 shortcut or a network's first layer. The convolution runs again for this unit's own backward (not
///    where neither the norm nor the activation needs it), for a unit that reads the output, and for one that
///    takes it as residual. Where input comes from codes, as exact.
///  * unbiased:bits=b: codes of x^ with an exact sign at the activation's kink, which are mask, x^ and the
///    next unit's input at once; with a residual codes of x^ and of the sum; codes of an input that no unit
///    made. weight's gradient is unbiased, input's has a second-order bias through the norm
///    (docs/numerics.md).
///  * eager, and under torch.compile: what PyTorch's own operations keep.
/// Double backward raises an error but under eager. Throws c10::Error, naming argument, expected and got.
REMNANT_API at::Tensor conv_norm_act(const at::Tensor& input, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias = std::nullopt,
                                     const std::optional<at::Tensor>& norm_weight = std::nullopt,
                                     const std::optional<at::Tensor>& norm_bias = std::nullopt,
                                     const std::optional<at::Tensor>& running_mean = std::nullopt,
                                     const std::optional<at::Tensor>& running_var = std::nullopt,
                                     const std::optional<at::Tensor>& residual = std::nullopt,
                                     const ConvNormActOptions& options = {});

}  // namespace remnant
