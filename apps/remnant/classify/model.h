#pragma once

#include "common/encoder.h"

#include <torch/nn/modules/linear.h>

#include <cstdint>

namespace remnant::app::classify {

/// Labels texts: a bidirectional encoder, the mean over a text's words, and a linear layer.
class ClassifierImpl : public torch::nn::Module {
 public:
  ClassifierImpl(const EncoderOptions& options, int64_t labels);

  /// ids [B, N], padding [B, N] (true = padding; may be undefined) -> logits [B, labels]. Every text has a
  /// word.
  at::Tensor forward(const at::Tensor& ids, const at::Tensor& padding);
  /// Summed cross-entropy of `labels` [B].
  at::Tensor loss(const at::Tensor& ids, const at::Tensor& padding, const at::Tensor& labels);

 private:
  at::Tensor pool(const at::Tensor& ids, const at::Tensor& padding);

  Encoder encoder_ = nullptr;
  torch::nn::Linear output_ = nullptr;
};
TORCH_MODULE(Classifier);

}  // namespace remnant::app::classify
