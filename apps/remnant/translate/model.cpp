#include "translate/model.h"

#include "common/text.h"

#include <remnant/memory.h>
#include <remnant/ops/dropout.h>
#include <remnant/ops/linear_cross_entropy.h>

#include <torch/nn/init.h>

#include <ATen/ops/arange.h>

#include <cmath>

namespace remnant::app::translate {

using at::Tensor;

TransformerImpl::TransformerImpl(const ModelOptions& options) : options_(options) {
  const auto embedding = [&](int64_t rows) { return torch::nn::Embedding(rows, options_.hidden); };
  source_embedding_ = register_module("source_embedding", embedding(options_.source_words));
  source_position_ = register_module("source_position", embedding(options_.max_length));
  target_embedding_ = register_module("target_embedding", embedding(options_.target_words));
  target_position_ = register_module("target_position", embedding(options_.max_length));
  const auto layer = nn::TransformerLayerOptions(options_.hidden, options_.heads)
                         .dim_feedforward(options_.feed_forward)
                         .dropout(options_.dropout)
                         .batch_first(true)
                         .policy(options_.policy);
  encoder_ = register_module("encoder", torch::nn::ModuleList());
  decoder_ = register_module("decoder", torch::nn::ModuleList());
  for (int64_t i = 0; i < options_.layers; ++i) {
    encoder_->push_back(nn::TransformerEncoderLayer(layer));
    decoder_->push_back(nn::TransformerDecoderLayer(layer));
  }
  output_ = register_module("output", torch::nn::Linear(options_.hidden, options_.target_words));
  initialise();
}

void TransformerImpl::initialise() {
  const at::NoGradGuard no_grad;
  for (auto& item : named_parameters()) {
    Tensor& weight = item.value();
    if (weight.dim() < 2) continue;
    const std::string& name = item.key();
    if (name.ends_with("in_proj_weight")) {
      // Three matrices in one tensor: together Xavier would see three times the outputs and draw
      // weights smaller by sqrt(2) than the separate projections of the paper's model have.
      for (Tensor& block : weight.chunk(3, 0)) torch::nn::init::xavier_uniform_(block);
    } else {
      torch::nn::init::xavier_uniform_(weight);
    }
  }
}

Tensor TransformerImpl::embed(torch::nn::Embedding& tokens, torch::nn::Embedding& positions,
                              const Tensor& ids, int64_t first_position) {
  TORCH_CHECK(first_position + ids.size(1) <= options_.max_length, "a sentence of ",
              first_position + ids.size(1), " words is longer than the model's ", options_.max_length,
              " positions");
  const Tensor places = at::arange(first_position, first_position + ids.size(1), ids.options());
  const Tensor x = tokens(ids) * std::sqrt(static_cast<double>(options_.hidden)) + positions(places);
  return is_training() ? remnant::dropout(x, options_.dropout) : x;
}

Tensor TransformerImpl::encode(const Tensor& source, const Tensor& padding) {
  Tensor x;
  {
    const memory::LayerScope scope("source_embedding");
    x = embed(source_embedding_, source_position_, source, 0);
  }
  for (const auto& layer : *encoder_) {
    x = layer->as<nn::TransformerEncoderLayer>()->forward(x, {}, padding);
  }
  return x;
}

Tensor TransformerImpl::decode(const Tensor& target, const Tensor& memory, const Tensor& padding) {
  Tensor x;
  {
    const memory::LayerScope scope("target_embedding");
    x = embed(target_embedding_, target_position_, target, 0);
  }
  for (const auto& layer : *decoder_) {
    // Padding is on the right, so the causal mask already hides it from every real position; what
    // the padded positions themselves attend to does not matter, as the loss ignores them.
    x = layer->as<nn::TransformerDecoderLayer>()->forward(x, memory, {}, {}, {}, padding,
                                                          /*tgt_is_causal=*/true);
  }
  return x;
}

Tensor TransformerImpl::forward(const Tensor& source, const Tensor& padding, const Tensor& target) {
  const Tensor x = decode(target, encode(source, padding), padding);
  const memory::LayerScope scope("output");
  return output_(x);
}

Tensor TransformerImpl::loss(const Tensor& source, const Tensor& padding, const Tensor& target,
                             const Tensor& next) {
  const Tensor x = decode(target, encode(source, padding), padding);
  const memory::LayerScope scope("output");
  return linear_cross_entropy(x.flatten(0, 1), output_->weight, output_->bias, next.flatten(),
                              Vocabulary::padding,
                              /*label_smoothing=*/0.0, at::Reduction::Sum);
}

Tensor TransformerImpl::decode_next(const Tensor& tokens, int64_t position, const Tensor& memory,
                                    const Tensor& padding, std::vector<nn::DecoderCache>& caches) {
  caches.resize(options_.layers);
  Tensor x = embed(target_embedding_, target_position_, tokens.unsqueeze(1), position);
  for (int64_t i = 0; i < options_.layers; ++i) {
    x = decoder_[i]->as<nn::TransformerDecoderLayer>()->forward_cached(x, memory, padding, caches[i]);
  }
  return output_(x).squeeze(1);
}

}  // namespace remnant::app::translate
