#pragma once

#include <remnant/export.h>
#include <remnant/plan.h>
#include <remnant/setting.h>

#include <ATen/core/Tensor.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace remnant::nn {

struct REMNANT_API ConvNormActOptions {
  /// kernel_size: one number for every spatial dimension, or one each; so stride, padding and dilation.
  ConvNormActOptions(int64_t in_channels, int64_t out_channels, std::vector<int64_t> kernel_size)
      : in_channels(in_channels), out_channels(out_channels), kernel_size(std::move(kernel_size)) {}
  ConvNormActOptions(int64_t in_channels, int64_t out_channels, int64_t kernel_size)
      : ConvNormActOptions(in_channels, out_channels, std::vector<int64_t>{kernel_size}) {}

  int64_t in_channels, out_channels;
  std::vector<int64_t> kernel_size;
  std::vector<int64_t> stride{1}, padding{0}, dilation{1};
  int64_t groups = 1;
  bool bias = false;
  /// "batch", "group:groups=8" or "none".
  std::string norm = "batch";
  double eps = 1e-5;
  /// nullopt: running statistics are the average of all batches so far.
  std::optional<double> momentum = 0.1;
  /// "relu", "leaky:slope=0.01", "silu" or "identity".
  std::string activation = "relu";
  /// eager, exact or unbiased.
  Memory memory = Memory::exact();
  /// Under exact: keep the input alone and convolve again in backward. For a convolution that is cheap beside
  /// what its output takes, such as a 1x1 shortcut or the first layer.
  bool recompute = false;
};

namespace detail {

/// Holds a torch convolution's weight and bias.
class REMNANT_API UnitConvImpl : public torch::nn::Cloneable<UnitConvImpl> {
 public:
  UnitConvImpl(ConvNormActOptions options, int64_t spatial);
  void reset() override;

  at::Tensor weight, bias;

 private:
  ConvNormActOptions options_;
  int64_t spatial_;
};

/// Holds a torch norm's weight, bias and running statistics.
class REMNANT_API UnitNormImpl : public torch::nn::Cloneable<UnitNormImpl> {
 public:
  explicit UnitNormImpl(ConvNormActOptions options);
  void reset() override;

  at::Tensor weight, bias, running_mean, running_var, num_batches_tracked;

 private:
  ConvNormActOptions options_;
};

}  // namespace detail

/// y = activation(norm(conv(x)) + residual) as remnant::conv_norm_act computes and keeps it. Parameters and
/// buffers are those of a torch convolution named `conv` and a torch norm named `norm` (none with norm
/// "none"), so that weights load both ways. In evaluation, or with `norm` in evaluation by itself (a frozen
/// norm), batch norm takes its running statistics.
template <size_t kSpatial, typename Derived>
class REMNANT_API ConvNormActImplBase : public torch::nn::Cloneable<Derived> {
 public:
  /// Throws c10::Error for a setting that conv_norm_act does not take.
  explicit ConvNormActImplBase(ConvNormActOptions options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  /// residual: the output's shape and dtype, or undefined.
  at::Tensor forward(const at::Tensor& input, const at::Tensor& residual = {});

  ConvNormActOptions options;
  std::shared_ptr<detail::UnitConvImpl> conv;
  std::shared_ptr<detail::UnitNormImpl> norm;  ///< null with norm "none"

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())})
};

class REMNANT_API ConvNormAct1dImpl : public ConvNormActImplBase<1, ConvNormAct1dImpl> {
 public:
  using ConvNormActImplBase<1, ConvNormAct1dImpl>::ConvNormActImplBase;
};
class REMNANT_API ConvNormAct2dImpl : public ConvNormActImplBase<2, ConvNormAct2dImpl> {
 public:
  using ConvNormActImplBase<2, ConvNormAct2dImpl>::ConvNormActImplBase;
};
class REMNANT_API ConvNormAct3dImpl : public ConvNormActImplBase<3, ConvNormAct3dImpl> {
 public:
  using ConvNormActImplBase<3, ConvNormAct3dImpl>::ConvNormActImplBase;
};
TORCH_MODULE(ConvNormAct1d);
TORCH_MODULE(ConvNormAct2d);
TORCH_MODULE(ConvNormAct3d);

}  // namespace remnant::nn
