#pragma once

#include "common/encoder.h"

#include <cstdint>
#include <vector>

namespace remnant::app::lm {

/// The longest context that a model may have.
inline constexpr int64_t kLongestContext = 8192;

/// A decoder-only language model: a causal encoder whose token embeddings are the output's weights too.
class LanguageModelImpl : public torch::nn::Module {
 public:
  explicit LanguageModelImpl(const EncoderOptions& options);

  /// Summed cross-entropy of `next` [B, N], the tokens that follow those of `ids` [B, N]; no tensor of
  /// [B, N, words] is made.
  at::Tensor loss(const at::Tensor& ids, const at::Tensor& next);
  /// Logits [B, words] of the token after the last of ids [B, n], which stand behind the `past` positions
  /// that the caches hold.
  at::Tensor next_logits(const at::Tensor& ids, int64_t past, std::vector<nn::KeyValueCache>& caches);
  /// Logits [B, N, words] after each token.
  at::Tensor forward(const at::Tensor& ids);

  const EncoderOptions& options() const { return encoder_->options(); }

 private:
  Encoder encoder_ = nullptr;
};
TORCH_MODULE(LanguageModel);

}  // namespace remnant::app::lm
