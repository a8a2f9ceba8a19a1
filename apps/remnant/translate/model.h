#pragma once

#include <remnant/nn/transformer.h>
#include <remnant/policy.h>

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <vector>

namespace remnant::app::translate {

struct ModelOptions {
  int64_t source_words = 0, target_words = 0;  ///< vocabulary sizes
  int64_t hidden = 256, layers = 3, heads = 8, feed_forward = 512;
  int64_t max_length = 100;  ///< positions
  double dropout = 0.1;
  Policy policy = Policy::recompute();
};

/// The paper's translation model: post-norm encoder and decoder, learned positions, token embeddings
/// scaled by sqrt(hidden), weight matrices Xavier uniform.
class TransformerImpl : public torch::nn::Module {
 public:
  explicit TransformerImpl(const ModelOptions& options);

  /// source [B, S] -> [B, S, hidden]. padding [B, S], true = padding, may be undefined.
  at::Tensor encode(const at::Tensor& source, const at::Tensor& padding);
  /// target [B, T] -> [B, T, hidden]; position t sees target positions up to t only.
  at::Tensor decode(const at::Tensor& target, const at::Tensor& memory, const at::Tensor& padding);
  /// Summed cross-entropy of `next` [B, T], the words after `target`'s, padding left out; no tensor of
  /// [B, T, target_words] is made.
  at::Tensor loss(const at::Tensor& source, const at::Tensor& padding, const at::Tensor& target,
                  const at::Tensor& next);
  /// Logits [B, T, target_words] of the word after each position of target.
  at::Tensor forward(const at::Tensor& source, const at::Tensor& padding, const at::Tensor& target);
  /// Decoding: logits [B, target_words] after `tokens` [B] at `position`, given the cached past.
  at::Tensor decode_next(const at::Tensor& tokens, int64_t position, const at::Tensor& memory,
                         const at::Tensor& padding, std::vector<nn::DecoderCache>& caches);

  const ModelOptions& options() const { return options_; }

 private:
  at::Tensor embed(torch::nn::Embedding& tokens, torch::nn::Embedding& positions, const at::Tensor& ids,
                   int64_t first_position);
  void initialise();

  ModelOptions options_;
  torch::nn::Embedding source_embedding_ = nullptr, source_position_ = nullptr;
  torch::nn::Embedding target_embedding_ = nullptr, target_position_ = nullptr;
  torch::nn::ModuleList encoder_ = nullptr, decoder_ = nullptr;
  torch::nn::Linear output_ = nullptr;
};
TORCH_MODULE(Transformer);

}  // namespace remnant::app::translate
