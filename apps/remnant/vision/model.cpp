#include "vision/model.h"

#include <remnant/memory.h>

#include <torch/nn/init.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/cross_entropy_loss.h>

#include <charconv>
#include <optional>

namespace remnant::app::vision {

using at::Tensor;

namespace {

constexpr int64_t kStages = 3;

/// N of resnetN.
std::optional<int64_t> resnet_layers(const std::string& model) {
  constexpr std::string_view stem = "resnet";
  if (!model.starts_with(stem)) return std::nullopt;
  int64_t layers = 0;
  const char* end = model.data() + model.size();
  const auto [read, error] = std::from_chars(model.data() + stem.size(), end, layers);
  if (error != std::errc() || read != end || layers < 8 || layers % 6 != 2) return std::nullopt;
  return layers;
}

}  // namespace

bool is_resnet(const std::string& model) { return resnet_layers(model).has_value(); }

ConvNormReluImpl::ConvNormReluImpl(int64_t in, int64_t out, int64_t stride) {
  conv_ = register_module(
      "conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).stride(stride).padding(1).bias(false)));
  norm_ = register_module("norm", torch::nn::BatchNorm2d(out));
}

Tensor ConvNormReluImpl::forward(const Tensor& x, const Tensor& residual) {
  const memory::LayerScope scope(this);
  const Tensor normal = norm_(conv_(x));
  return (residual.defined() ? normal + residual : normal).relu();
}

ResidualBlockImpl::ResidualBlockImpl(int64_t in, int64_t out, int64_t stride)
    : stride_(stride), added_channels_(out - in) {
  first_ = register_module("first", ConvNormRelu(in, out, stride));
  second_ = register_module("second", ConvNormRelu(out, out, 1));
}

Tensor ResidualBlockImpl::forward(const Tensor& x) {
  Tensor shortcut = x;
  if (stride_ > 1) shortcut = shortcut.slice(2, {}, {}, stride_).slice(3, {}, {}, stride_);
  if (added_channels_ > 0) shortcut = at::constant_pad_nd(shortcut, {0, 0, 0, 0, 0, added_channels_});
  return second_(first_(x), shortcut);
}

ClassifierImpl::ClassifierImpl(const ModelOptions& options) {
  const auto layers = resnet_layers(options.model);
  TORCH_CHECK(layers.has_value(), "no model is called ", options.model);
  stem_ = register_module("stem", ConvNormRelu(3, options.width, 1));
  blocks_ = register_module("blocks", torch::nn::ModuleList());
  int64_t channels = options.width;
  for (int64_t stage = 0; stage < kStages; ++stage) {
    const int64_t out = options.width << stage;
    for (int64_t i = 0; i < (*layers - 2) / (2 * kStages); ++i) {
      blocks_->push_back(ResidualBlock(channels, out, stage > 0 && i == 0 ? 2 : 1));
      channels = out;
    }
  }
  output_ = register_module("output", torch::nn::Linear(channels, options.classes));
  const at::NoGradGuard no_grad;
  for (auto& parameter : parameters()) {
    if (parameter.dim() == 4) {
      torch::nn::init::kaiming_normal_(parameter, 0, torch::kFanOut, torch::kReLU);
    }
  }
}

Tensor ClassifierImpl::forward(const Tensor& images) {
  Tensor x = stem_(images);
  for (const auto& block : *blocks_) x = block->as<ResidualBlock>()->forward(x);
  const memory::LayerScope scope("output");
  return output_(x.mean({2, 3}));
}

Tensor ClassifierImpl::loss(const Tensor& images, const Tensor& labels) {
  const Tensor logits = forward(images);
  const memory::LayerScope scope("loss");
  return at::cross_entropy_loss(logits, labels, {}, at::Reduction::Sum);
}

}  // namespace remnant::app::vision
