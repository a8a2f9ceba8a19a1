#include "lm/model.h"

#include <remnant/memory.h>
#include <remnant/ops/linear_cross_entropy.h>

#include <ATen/ops/linear.h>

namespace remnant::app::lm {

using at::Tensor;

LanguageModelImpl::LanguageModelImpl(const EncoderOptions& options) {
  encoder_ = register_module("encoder", Encoder(options));
}

Tensor LanguageModelImpl::loss(const Tensor& ids, const Tensor& next) {
  const Tensor x = encoder_(ids, Tensor(), /*causal=*/true);
  const memory::LayerScope scope("output");
  return linear_cross_entropy(x.flatten(0, 1), encoder_->token_weight(), std::nullopt, next.flatten(),
                              /*ignore_index=*/-100, /*label_smoothing=*/0.0, at::Reduction::Sum);
}

Tensor LanguageModelImpl::next_logits(const Tensor& ids, int64_t past,
                                      std::vector<nn::KeyValueCache>& caches) {
  const Tensor x = encoder_->forward_cached(ids, past, caches);
  return at::linear(x.select(1, -1), encoder_->token_weight());
}

Tensor LanguageModelImpl::forward(const Tensor& ids) {
  return at::linear(encoder_(ids, Tensor(), /*causal=*/true), encoder_->token_weight());
}

}  // namespace remnant::app::lm
