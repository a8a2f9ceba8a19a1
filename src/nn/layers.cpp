#include <remnant/memory.h>
#include <remnant/nn/layers.h>
#include <remnant/ops/activation.h>
#include <remnant/ops/dropout.h>
#include <remnant/ops/linear.h>
#include <remnant/ops/norm.h>

#include <torch/nn/init.h>

#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <optional>
#include <ostream>
#include <string>

namespace remnant::nn {
namespace {

using at::Tensor;

std::optional<Tensor> optional(const Tensor& x) { return x.defined() ? std::make_optional(x) : std::nullopt; }

std::string codes_of(const LayerMemory& memory) {
  return memory.bits > 0 ? "quantized:bits=" + std::to_string(memory.bits) : std::string("exact");
}

void print_bits(std::ostream& stream, const LayerMemory& memory) {
  if (memory.bits > 0) stream << ", bits=" << memory.bits;
  stream << ")";
}

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
  return remnant::layer_norm(input, w, b, options.eps(), codes_of(memory_));
}

void LayerNormImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::LayerNorm(" << at::IntArrayRef(options.normalized_shape())
         << ", eps=" << options.eps() << ", norm=" << (memory_.norm_input ? "input" : "output");
  print_bits(stream, memory_);
}

LinearImpl::LinearImpl(const torch::nn::LinearOptions& options_in) : options(options_in) {
  LinearImpl::reset();
}

void LinearImpl::reset() {
  const int64_t in = options.in_features(), out = options.out_features();
  weight = register_parameter("weight", at::empty({out, in}));
  if (weight.numel() > 0) torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
  bias = Tensor();
  if (!options.bias()) return;
  bias = register_parameter("bias", at::empty({out}));
  const double bound = in > 0 ? 1 / std::sqrt(static_cast<double>(in)) : 0;
  torch::nn::init::uniform_(bias, -bound, bound);
}

Tensor LinearImpl::forward(const Tensor& input) {
  const memory::LayerScope scope(this);
  if (memory_.bits == 0 || !is_training()) return at::linear(input, weight, optional(bias));
  return remnant::linear(input, weight, optional(bias), codes_of(memory_));
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::Linear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias();
  print_bits(stream, memory_);
}

Tensor GELUImpl::forward(const Tensor& input) {
  const memory::LayerScope scope(this);
  if (memory_.bits == 0 || !is_training()) return at::gelu(input, options.approximate());
  return remnant::gelu(input, options.approximate(), codes_of(memory_));
}

void GELUImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::GELU(approximate=" << options.approximate();
  print_bits(stream, memory_);
}

Tensor SiLUImpl::forward(const Tensor& input) {
  const memory::LayerScope scope(this);
  if (memory_.bits == 0 || !is_training()) return at::silu(input);
  return remnant::silu(input, codes_of(memory_));
}

void SiLUImpl::pretty_print(std::ostream& stream) const {
  stream << "remnant::nn::SiLU(bits=" << memory_.bits << ")";
}

}  // namespace remnant::nn
