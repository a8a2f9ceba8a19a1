#pragma once

#include <remnant/nn/attention.h>
#include <remnant/plan.h>

#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/normalization.h>

namespace remnant::nn {

enum class Activation { relu, gelu };

/// Options of both layers; defaults are PyTorch's.
struct REMNANT_API TransformerLayerOptions {
  TransformerLayerOptions(int64_t d_model, int64_t nhead) : d_model_(d_model), nhead_(nhead) {}
  TORCH_ARG(int64_t, d_model);
  TORCH_ARG(int64_t, nhead);
  TORCH_ARG(int64_t, dim_feedforward) = 2048;
  TORCH_ARG(double, dropout) = 0.1;
  TORCH_ARG(Activation, activation) = Activation::relu;
  TORCH_ARG(double, layer_norm_eps) = 1e-5;
  TORCH_ARG(bool, batch_first) = false;
  TORCH_ARG(bool, norm_first) = false;
  TORCH_ARG(bool, bias) = true;
  /// What the attention ops keep for backward, unless memory has a policy.
  TORCH_ARG(Policy, policy) = Policy::recompute();
  /// What the layer keeps, of a Memory setting or op by op. Gradients equal PyTorch's up to rounding unless
  /// bits or the policy say otherwise.
  TORCH_ARG(LayerMemory, memory);
};

/// torch.nn.TransformerEncoderLayer: parameters self_attn.*, linear1.*, linear2.*, norm1.*, norm2.*.
class REMNANT_API TransformerEncoderLayerImpl : public torch::nn::Cloneable<TransformerEncoderLayerImpl>,
                                                public KeepsByChoice {
 public:
  TransformerEncoderLayerImpl(int64_t d_model, int64_t nhead)
      : TransformerEncoderLayerImpl(TransformerLayerOptions(d_model, nhead)) {}
  explicit TransformerEncoderLayerImpl(const TransformerLayerOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  /// Changes what the layer keeps from the next forward on; weights stay.
  void set_memory(const LayerMemory& memory) override;
  const LayerMemory& memory() const override { return options.memory(); }
  bool attends() const override { return true; }
  /// src [S, B, E] ([B, S, E] with batch_first); masks as in MultiheadAttention. Same shape out.
  at::Tensor forward(const at::Tensor& src, const at::Tensor& src_mask = {},
                     const at::Tensor& src_key_padding_mask = {}, bool is_causal = false);
  /// Decoding: one new position src [B, 1, E] (or several) given the cached past; always batch first. The
  /// same shape out; equal to `forward` with is_causal at those positions.
  at::Tensor forward_cached(const at::Tensor& src, KeyValueCache& cache);

  TransformerLayerOptions options;
  MultiheadAttention self_attn = nullptr;
  torch::nn::Linear linear1 = nullptr, linear2 = nullptr;
  torch::nn::LayerNorm norm1 = nullptr, norm2 = nullptr;
  torch::nn::Dropout dropout = nullptr, dropout1 = nullptr, dropout2 = nullptr;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())}, {2, torch::nn::AnyValue(at::Tensor())},
                           {3, torch::nn::AnyValue(false)})
};
TORCH_MODULE(TransformerEncoderLayer);

/// A decoder layer's caches: what it attends of the target so far and of the memory.
struct REMNANT_API DecoderCache {
  KeyValueCache self, cross;
};

/// torch.nn.TransformerDecoderLayer: self_attn.*, multihead_attn.*, linear1.*, linear2.*, norm1..3.*.
class REMNANT_API TransformerDecoderLayerImpl : public torch::nn::Cloneable<TransformerDecoderLayerImpl>,
                                                public KeepsByChoice {
 public:
  TransformerDecoderLayerImpl(int64_t d_model, int64_t nhead)
      : TransformerDecoderLayerImpl(TransformerLayerOptions(d_model, nhead)) {}
  explicit TransformerDecoderLayerImpl(const TransformerLayerOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  /// Changes what the layer keeps from the next forward on; weights stay.
  void set_memory(const LayerMemory& memory) override;
  const LayerMemory& memory() const override { return options.memory(); }
  bool attends() const override { return true; }
  /// tgt [T, B, E], memory [S, B, E] ([B, T, E], [B, S, E] with batch_first); masks as in
  /// MultiheadAttention, the tgt_ ones for self_attn, the memory_ ones for multihead_attn. tgt's shape out.
  at::Tensor forward(const at::Tensor& tgt, const at::Tensor& memory, const at::Tensor& tgt_mask = {},
                     const at::Tensor& memory_mask = {}, const at::Tensor& tgt_key_padding_mask = {},
                     const at::Tensor& memory_key_padding_mask = {}, bool tgt_is_causal = false,
                     bool memory_is_causal = false);
  /// Decoding: one new position tgt [B, 1, E] (or several) given the cached past; always batch
  /// first. The same shape out; equal to `forward` with tgt_is_causal at those positions.
  at::Tensor forward_cached(const at::Tensor& tgt, const at::Tensor& memory,
                            const at::Tensor& memory_key_padding_mask, DecoderCache& cache);

  TransformerLayerOptions options;
  MultiheadAttention self_attn = nullptr, multihead_attn = nullptr;
  torch::nn::Linear linear1 = nullptr, linear2 = nullptr;
  torch::nn::LayerNorm norm1 = nullptr, norm2 = nullptr, norm3 = nullptr;
  torch::nn::Dropout dropout = nullptr, dropout1 = nullptr, dropout2 = nullptr, dropout3 = nullptr;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(at::Tensor())}, {3, torch::nn::AnyValue(at::Tensor())},
                           {4, torch::nn::AnyValue(at::Tensor())}, {5, torch::nn::AnyValue(at::Tensor())},
                           {6, torch::nn::AnyValue(false)}, {7, torch::nn::AnyValue(false)})
};
TORCH_MODULE(TransformerDecoderLayer);

}  // namespace remnant::nn
