#include <remnant/memory.h>
#include <remnant/nn/layers.h>
#include <remnant/ops/dropout.h>
#include <remnant/ops/norm.h>

#include <ATen/ops/dropout.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <ostream>

namespace remnant::nn {
namespace {

using at::Tensor;

std::optional<Tensor> optional(const Tensor& x) { return x.defined() ? std::make_optional(x) : std::nullopt; }

}  // namespace

DropoutImpl::DropoutImpl(const torch::nn::DropoutOptions& options_in) : options(options_in) {
  TORCH_CHECK(options.p() >= 0 && options.p() < 1, "remnant::nn::Dropout: p should be in [0, 1), got ",
              options.p());
  TORCH_CHECK(!options.inplace(),
              "remnant::nn::Dropout: it makes a new tensor, got inplace = true; set inplace to false");
}

void DropoutImpl::reset() {}

Tensor DropoutImpl::forward(const Tensor& input) {
  const memory::LayerScope scope(this);
  if (!is_training() || options.p() == 0) return input;
  return memory_.noise ? at::dropout(input, options.p(), true) : remnant::dropout(input, options.p());
}

void DropoutImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::Dropout(p=" << options.p() << ", dropout=" << (memory_.noise ? "noise" : "seed")
         << ")";
}

LayerNormImpl::LayerNormImpl(const torch::nn::LayerNormOptions& options_in) : options(options_in) {
  TORCH_CHECK(options.normalized_shape().size() == 1,
              "remnant::nn::LayerNorm: normalized_shape should have one dimension, the last, got ",
              at::IntArrayRef(options.normalized_shape()));
  LayerNormImpl::reset();
}

void LayerNormImpl::reset() {
  weight = bias = Tensor();
  if (!options.elementwise_affine()) return;
  weight = register_parameter("weight", at::ones(options.normalized_shape()));
  bias = register_parameter("bias", at::zeros(options.normalized_shape()));
}

Tensor LayerNormImpl::forward(const Tensor& input) {
  const memory::LayerScope scope(this);
  const auto w = optional(weight), b = optional(bias);
  if (memory_.norm_input || !is_training()) {
    return at::layer_norm(input, options.normalized_shape(), w, b, options.eps());
  }
  const std::string policy =
      memory_.bits > 0 ? "quantized:bits=" + std::to_string(memory_.bits) : std::string("exact");
  return remnant::layer_norm(input, w, b, options.eps(), policy);
}

void LayerNormImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::LayerNorm(" << at::IntArrayRef(options.normalized_shape())
         << ", eps=" << options.eps() << ", norm=" << (memory_.norm_input ? "input" : "output");
  if (memory_.bits > 0) stream << ", bits=" << memory_.bits;
  stream << ")";
}

}  // namespace remnant::nn
