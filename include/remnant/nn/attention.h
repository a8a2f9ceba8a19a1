#pragma once

#include <remnant/export.h>
#include <remnant/policy.h>
#include <remnant/setting.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <tuple>

namespace remnant::nn {

struct REMNANT_API MultiheadAttentionOptions {
  MultiheadAttentionOptions(int64_t embed_dim, int64_t num_heads)
      : embed_dim_(embed_dim), num_heads_(num_heads) {}
  TORCH_ARG(int64_t, embed_dim);
  TORCH_ARG(int64_t, num_heads);
  TORCH_ARG(double, dropout) = 0.0;
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(bool, add_bias_kv) = false;
  TORCH_ARG(bool, add_zero_attn) = false;
  /// 0: the same as embed_dim.
  TORCH_ARG(int64_t, kdim) = 0;
  TORCH_ARG(int64_t, vdim) = 0;
  TORCH_ARG(bool, batch_first) = false;
  /// What the attention op keeps for backward. May be changed in a module's `options` from one forward to the
  /// next.
  TORCH_ARG(Policy, policy) = Policy::recompute();
  /// What the module keeps around it. `output`, `input` and `automatic` need policy recompute and one tensor
  /// as key and value; where that does not hold (or kdim, vdim, add_bias_kv, add_zero_attn, need_weights or
  /// attn_mask's own gradient are asked for), and in eval mode, it is `projections`.
  TORCH_ARG(AttentionKeep, keep) = AttentionKeep::projections;
  /// 8, 4 or 2: in training, with policy recompute and without need_weights, projections keep their input and
  /// attention its tensors at so many bits (AttentionOptions::bits, remnant::linear). 0: as they are.
  TORCH_ARG(int64_t, bits) = 0;
};

/// Keys and values of earlier positions, for decoding one position at a time: [B, H, n, D].
struct REMNANT_API KeyValueCache {
  at::Tensor key, value;
};

/// torch.nn.MultiheadAttention with its parameter names, initialisation, defaults and mask
/// conventions (boolean masks: true = do NOT attend), and a policy for what its softmax keeps.
///
/// Differs from PyTorch in three points: a query with every key masked gets out_proj.bias (attention 0)
/// and no gradient also with need_weights, where PyTorch gives NaN; returned weights are those before
/// dropout and carry no gradient, also in training; is_causal needs no attn_mask beside it, and is
/// obeyed, not a hint.
/// SAVES: what remnant::attention saves, and the inputs of the projections.
class REMNANT_API MultiheadAttentionImpl : public torch::nn::Cloneable<MultiheadAttentionImpl> {
 public:
  MultiheadAttentionImpl(int64_t embed_dim, int64_t num_heads)
      : MultiheadAttentionImpl(MultiheadAttentionOptions(embed_dim, num_heads)) {}
  explicit MultiheadAttentionImpl(const MultiheadAttentionOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// query [Nq, B, E] (or [B, Nq, E] with batch_first, or unbatched [Nq, E]); key_padding_mask
  /// [B, Nk]; attn_mask [Nq, Nk] or [B * num_heads, Nq, Nk]; masks boolean (true = not attended) or
  /// floating point (added). Returns the output and, with need_weights, the weights (averaged over
  /// heads when average_attn_weights: [B, Nq, Nk], else [B, H, Nq, Nk]); an undefined tensor otherwise.
  /// is_causal applies a causal mask together with any attn_mask. Neither it nor a key_padding_mask
  /// is materialised as [Nq, Nk] unless there is an attn_mask too (or, for is_causal, add_bias_kv or
  /// add_zero_attn, whose keys every query attends).
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key,
                                             const at::Tensor& value, const at::Tensor& key_padding_mask = {},
                                             bool need_weights = true, const at::Tensor& attn_mask = {},
                                             bool average_attn_weights = true, bool is_causal = false);

  /// Decoding. Appends the keys and values of `query`'s positions to `cache` and attends all of it
  /// (self-attention: every cached position is in the past). query [B, 1, E] -> [B, 1, E], batch first;
  /// several positions at once, [B, n, E], attend each other causally.
  at::Tensor forward_self_cached(const at::Tensor& query, KeyValueCache& cache);
  /// Decoding. Fills `cache` from `memory` [B, Nk, E] when it is empty, then attends it (`memory` is not
  /// read again). query [B, n, E], batch first. key_padding_mask [B, Nk] as in forward.
  at::Tensor forward_cross_cached(const at::Tensor& query, const at::Tensor& memory,
                                  const at::Tensor& key_padding_mask, KeyValueCache& cache);

  MultiheadAttentionOptions options;
  at::Tensor in_proj_weight, in_proj_bias;                 // packed, when kdim == vdim == embed_dim
  at::Tensor q_proj_weight, k_proj_weight, v_proj_weight;  // otherwise
  at::Tensor bias_k, bias_v;
  torch::nn::Linear out_proj = nullptr;  // "out_proj.weight", "out_proj.bias"

 protected:
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(at::Tensor())}, {4, torch::nn::AnyValue(true)},
                           {5, torch::nn::AnyValue(at::Tensor())}, {6, torch::nn::AnyValue(true)},
                           {7, torch::nn::AnyValue(false)})
};
TORCH_MODULE(MultiheadAttention);

}  // namespace remnant::nn
