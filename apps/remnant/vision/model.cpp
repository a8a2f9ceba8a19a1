#include "vision/model.h"

#include <remnant/memory.h>
#include <remnant/ops/shortcut.h>

#include <torch/nn/init.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/Reduction.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>

#include <charconv>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

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

bool eager_or_exact(const LayerMemory& memory) {
  return memory == LayerMemory(Memory::eager()) || memory == LayerMemory(Memory::exact());
}

}  // namespace

bool is_resnet(const std::string& model) { return resnet_layers(model).has_value(); }

ConvNormImpl::ConvNormImpl(int64_t in, int64_t out, int64_t stride, bool recompute)
    : nn::ConvNormAct2dImpl([&] {
        nn::ConvNormActOptions options(in, out, 3);
        options.stride = {stride};
        options.padding = {1};
        options.recompute = recompute;
        return options;
      }()) {
  torch::nn::init::kaiming_normal_(conv->weight, 0, torch::kFanOut, torch::kReLU);
}

Tensor ConvNormImpl::forward(const Tensor& x, const Tensor& residual) {
  const memory::LayerScope scope(this);
  return nn::ConvNormAct2dImpl::forward(x, residual);
}

void ConvNormImpl::set_memory(const LayerMemory& memory) {
  options.memory = memory.bits > 0                          ? Memory::unbiased(memory.bits)
                   : memory == LayerMemory(Memory::eager()) ? Memory::eager()
                                                            : Memory::exact();
  memory_ = options.memory;
}

std::string ConvNormImpl::refusal(const LayerMemory& memory) const {
  const bool can =
      eager_or_exact(memory) || (memory.bits > 0 && memory == LayerMemory(Memory::unbiased(memory.bits)));
  return can ? "" : "eager, exact or unbiased:bits=8, 4 or 2";
}

std::string RebuildingImpl::refusal(const LayerMemory& memory) const {
  return eager_or_exact(memory) ? "" : "eager or exact";
}

ResidualBlockImpl::ResidualBlockImpl(int64_t in, int64_t out, int64_t stride)
    : stride_(stride), added_channels_(out - in) {
  first_ = register_module("first", ConvNorm(in, out, stride));
  second_ = register_module("second", ConvNorm(out, out, 1));
}

Tensor ResidualBlockImpl::forward(const Tensor& x) {
  const bool same = stride_ == 1 && added_channels_ == 0;
  return second_->forward(first_(x), same ? x : shortcut(x, stride_, x.size(1) + added_channels_));
}

ChainImpl::ChainImpl(const ModelOptions& options) {
  nn::ReversibleChainOptions layers(options.width, options.depth);
  layers.activation = options.activation;
  chain_ = register_module("chain", nn::ReversibleChain(layers));
  if (options.init != "he") return;
  for (const auto& layer : chain_->children()) {
    torch::nn::init::kaiming_normal_(layer->as<nn::ReversibleLayer>()->conv->weight, 0, torch::kFanOut,
                                     torch::kReLU);
  }
}

Tensor ChainImpl::forward(const Tensor& x) {
  if (!eager()) return chain_(x);
  const memory::LayerScope scope(chain_.get());
  Tensor y = x;
  for (const auto& layer : chain_->children()) y = layer->as<nn::ReversibleLayer>()->forward(y);
  return y;
}

BranchImpl::BranchImpl(int64_t channels) {
  const auto convolution = [&](const char* name) {
    auto made = register_module(
        name, torch::nn::Conv2d(torch::nn::Conv2dOptions(channels, channels, 3).padding(1).bias(false)));
    torch::nn::init::kaiming_normal_(made->weight, 0, torch::kFanOut, torch::kReLU);
    return made;
  };
  first_ = convolution("first");
  first_norm_ = register_module("first_norm", torch::nn::BatchNorm2d(channels));
  second_ = convolution("second");
  second_norm_ = register_module("second_norm", torch::nn::BatchNorm2d(channels));
}

Tensor BranchImpl::forward(const Tensor& x) {
  const memory::LayerScope scope(this);
  return second_norm_(second_(first_norm_(first_(x)).relu()));
}

CouplingsImpl::CouplingsImpl(int64_t channels, int64_t blocks) {
  const auto branch = [&] { return torch::nn::AnyModule(Branch(channels / 2)); };
  std::vector<nn::Coupling> couplings;
  for (int64_t i = 0; i < blocks; ++i) {
    // One after the other: the order decides which weights each gets.
    auto f = branch();
    couplings.push_back(nn::additive_coupling(std::move(f), branch()));
  }
  blocks_ = register_module("blocks", nn::ReversibleSequence(std::move(couplings)));
}

Tensor CouplingsImpl::forward(const Tensor& x) {
  if (!eager()) return blocks_(x);
  Tensor first = x.chunk(2, 1)[0], second = x.chunk(2, 1)[1];
  for (const auto& child : blocks_->children()) {
    auto& coupling = *child->as<nn::Coupling>();
    first = first + coupling.f.forward(second);
    second = second + coupling.g.forward(first);
  }
  return at::cat({first, second}, 1);
}

ClassifierImpl::ClassifierImpl(const ModelOptions& options) {
  const auto layers = resnet_layers(options.model);
  TORCH_CHECK(layers.has_value() || options.model == "chain" || options.model == "reversible",
              "no model is called ", options.model);
  // Cheap beside its output, and its input, the images, is there anyway.
  stem_ = register_module("stem", ConvNorm(3, options.width, options.model == "chain" ? 2 : 1, true));
  blocks_ = register_module("blocks", torch::nn::Sequential());
  int64_t channels = options.width;
  if (layers.has_value()) {
    channels = add_residual_blocks(options.width, (*layers - 2) / (2 * kStages));
  } else if (options.model == "reversible") {
    channels = add_couplings(options.width, options.depth);
  } else {
    blocks_->push_back(Chain(options));
  }
  output_ = register_module("output", torch::nn::Linear(channels, options.classes));
}

int64_t ClassifierImpl::add_residual_blocks(int64_t width, int64_t blocks) {
  int64_t channels = width;
  for (int64_t stage = 0; stage < kStages; ++stage) {
    const int64_t out = width << stage;
    for (int64_t i = 0; i < blocks; ++i) {
      blocks_->push_back(ResidualBlock(channels, out, stage > 0 && i == 0 ? 2 : 1));
      channels = out;
    }
  }
  return channels;
}

int64_t ClassifierImpl::add_couplings(int64_t width, int64_t blocks) {
  int64_t channels = width;
  for (int64_t stage = 0; stage < kStages; ++stage) {
    const int64_t out = width << stage;
    if (stage > 0) blocks_->push_back(ConvNorm(channels, out, 2));
    blocks_->push_back(Couplings(out, blocks / kStages + (stage < blocks % kStages ? 1 : 0)));
    channels = out;
  }
  return channels;
}

Tensor ClassifierImpl::forward(const Tensor& images) {
  const Tensor x = blocks_->forward(stem_->forward(images));
  const memory::LayerScope scope("output");
  return output_(x.mean({2, 3}));
}

Tensor ClassifierImpl::loss(const Tensor& images, const Tensor& labels) {
  const Tensor logits = forward(images);
  const memory::LayerScope scope("loss");
  return at::cross_entropy_loss(logits, labels, {}, at::Reduction::Sum);
}

}  // namespace remnant::app::vision
