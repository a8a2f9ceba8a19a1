#include "classify/model.h"

#include <remnant/memory.h>
#include <remnant/ops/dropout.h>
#include <remnant/ops/linear_cross_entropy.h>

#include <ATen/TensorOperators.h>

namespace remnant::app::classify {

using at::Tensor;

ClassifierImpl::ClassifierImpl(const EncoderOptions& options, int64_t labels) {
  encoder_ = register_module("encoder", Encoder(options));
  output_ = register_module("output", torch::nn::Linear(options.hidden, labels));
}

Tensor ClassifierImpl::pool(const Tensor& ids, const Tensor& padding) {
  const Tensor x = encoder_(ids, padding, /*causal=*/false);
  const memory::LayerScope scope("pool");
  const Tensor mean =
      padding.defined() ? x.masked_fill(padding.unsqueeze(-1), 0).sum(1) / padding.logical_not().sum(1, true)
                        : x.mean(1);
  return is_training() ? remnant::dropout(mean, encoder_->options().dropout) : mean;
}

Tensor ClassifierImpl::forward(const Tensor& ids, const Tensor& padding) {
  const Tensor x = pool(ids, padding);
  const memory::LayerScope scope("output");
  return output_(x);
}

Tensor ClassifierImpl::loss(const Tensor& ids, const Tensor& padding, const Tensor& labels) {
  const Tensor x = pool(ids, padding);
  const memory::LayerScope scope("output");
  return linear_cross_entropy(x, output_->weight, output_->bias, labels, /*ignore_index=*/-100,
                              /*label_smoothing=*/0.0, at::Reduction::Sum);
}

}  // namespace remnant::app::classify
