#pragma once

#include "common/options.h"

#include <remnant/nn/layers.h>
#include <remnant/nn/transformer.h>

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>

#include <cstdint>
#include <vector>

namespace remnant::app {

struct EncoderOptions {
  int64_t words = 0, positions = 0;  ///< vocabulary, and longest sequence
  int64_t hidden = 256, layers = 4, heads = 4, feed_forward = 1024;
  double dropout = 0.1;
  Policy policy = Policy::recompute();
};

/// The model's part of a program's options.
EncoderOptions encoder_options(const TransformerOptions& options, int64_t words, int64_t positions);

/// A pre-norm Transformer over words: token and learned position embeddings, layers with GELU, and a last
/// normalisation. Weight matrices are drawn from a normal distribution of deviation 0.02, those that write
/// into the residual stream from a narrower one, by sqrt(2 layers), so that its variance does not grow with
/// depth.
class EncoderImpl : public torch::nn::Module {
 public:
  explicit EncoderImpl(const EncoderOptions& options);

  /// ids [B, N] -> [B, N, hidden]. padding [B, N], true = padding, may be undefined. Causal: position t sees
  /// positions up to t only.
  at::Tensor forward(const at::Tensor& ids, const at::Tensor& padding, bool causal);
  /// Causal, for ids [B, n] behind the `past` positions that the caches hold.
  at::Tensor forward_cached(const at::Tensor& ids, int64_t past, std::vector<nn::KeyValueCache>& caches);

  const EncoderOptions& options() const { return options_; }
  /// [words, hidden]
  const at::Tensor& token_weight() const { return tokens_->weight; }

 private:
  at::Tensor embed(const at::Tensor& ids, int64_t first_position);

  EncoderOptions options_;
  torch::nn::Embedding tokens_ = nullptr, positions_ = nullptr;
  torch::nn::ModuleList layers_ = nullptr;
  nn::LayerNorm norm_ = nullptr;
};
TORCH_MODULE(Encoder);

}  // namespace remnant::app
