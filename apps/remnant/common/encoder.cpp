#include "common/encoder.h"

#include <remnant/memory.h>
#include <remnant/ops/dropout.h>

#include <torch/nn/init.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>

#include <cmath>

namespace remnant::app {

using at::Tensor;

EncoderOptions encoder_options(const TransformerOptions& options, int64_t words, int64_t positions) {
  return {.words = words,
          .positions = positions,
          .hidden = options.hidden,
          .layers = options.layers,
          .heads = options.heads,
          .feed_forward = options.feed_forward,
          .dropout = options.dropout,
          .policy = Policy::parse(options.attention)};
}

EncoderImpl::EncoderImpl(const EncoderOptions& options) : options_(options) {
  tokens_ = register_module("tokens", torch::nn::Embedding(options_.words, options_.hidden));
  positions_ = register_module("positions", torch::nn::Embedding(options_.positions, options_.hidden));
  const auto layer = nn::TransformerLayerOptions(options_.hidden, options_.heads)
                         .dim_feedforward(options_.feed_forward)
                         .dropout(options_.dropout)
                         .activation(nn::Activation::gelu)
                         .norm_first(true)
                         .batch_first(true)
                         .policy(options_.policy);
  layers_ = register_module("layers", torch::nn::ModuleList());
  for (int64_t i = 0; i < options_.layers; ++i) layers_->push_back(nn::TransformerEncoderLayer(layer));
  norm_ = register_module("norm", nn::LayerNorm(torch::nn::LayerNormOptions({options_.hidden})));

  const at::NoGradGuard no_grad;
  const double deviation = 0.02, narrower = deviation / std::sqrt(2.0 * static_cast<double>(options_.layers));
  for (auto& item : named_parameters()) {
    if (item.value().dim() < 2) continue;
    const bool into_residual =
        item.key().ends_with("out_proj.weight") || item.key().ends_with("linear2.weight");
    torch::nn::init::normal_(item.value(), 0, into_residual ? narrower : deviation);
  }
}

Tensor EncoderImpl::embed(const Tensor& ids, int64_t first_position) {
  const int64_t end = first_position + ids.size(1);
  TORCH_CHECK(end <= options_.positions, "a sequence of ", end, " words is longer than the model's ",
              options_.positions, " positions");
  const memory::LayerScope scope("embedding");
  const Tensor x = tokens_(ids) + positions_(at::arange(first_position, end, ids.options()));
  return is_training() ? remnant::dropout(x, options_.dropout) : x;
}

Tensor EncoderImpl::forward(const Tensor& ids, const Tensor& padding, bool causal) {
  Tensor x = embed(ids, 0);
  for (const auto& layer : *layers_) {
    x = layer->as<nn::TransformerEncoderLayer>()->forward(x, {}, padding, causal);
  }
  return norm_(x);
}

Tensor EncoderImpl::forward_cached(const Tensor& ids, int64_t past, std::vector<nn::KeyValueCache>& caches) {
  caches.resize(options_.layers);
  Tensor x = embed(ids, past);
  for (int64_t i = 0; i < options_.layers; ++i) {
    x = layers_[i]->as<nn::TransformerEncoderLayer>()->forward_cached(x, caches[i]);
  }
  return norm_(x);
}

}  // namespace remnant::app
