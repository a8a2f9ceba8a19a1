#include <remnant/memory.h>
#include <remnant/nn/transformer.h>

#include <remnant/ops/dropout.h>

#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>

#include <memory>
#include <optional>
#include <tuple>

namespace remnant::nn {
namespace {

using at::Tensor;

/// torch::nn::LayerNorm has no option for it; PyTorch's layers drop this bias too with bias = false.
class LayerNormWithoutBiasImpl final : public torch::nn::LayerNormImpl {
 public:
  explicit LayerNormWithoutBiasImpl(const torch::nn::LayerNormOptions& options) : LayerNormImpl(options) {
    drop_bias();
  }

  void reset() override {
    LayerNormImpl::reset();
    drop_bias();
  }

  // The base's clone makes a LayerNormImpl, whose parameters would not match.
  std::shared_ptr<torch::nn::Module> clone(const std::optional<at::Device>& device) const override {
    auto copy = std::make_shared<LayerNormWithoutBiasImpl>(options);
    const Tensor source = weight.detach();
    copy->weight.set_data(device && source.device() != *device ? source.to(*device) : source.clone());
    copy->train(is_training());
    return copy;
  }

 private:
  void drop_bias() {
    parameters_.erase("bias");
    bias = Tensor();
  }
};

MultiheadAttention make_attention(const TransformerLayerOptions& options) {
  return MultiheadAttention(MultiheadAttentionOptions(options.d_model(), options.nhead())
                                .dropout(options.dropout())
                                .bias(options.bias())
                                .batch_first(options.batch_first())
                                .policy(options.policy()));
}

torch::nn::Linear make_linear(int64_t in, int64_t out, bool bias) {
  return torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(bias));
}

torch::nn::LayerNorm make_norm(const TransformerLayerOptions& options) {
  const auto norm_options = torch::nn::LayerNormOptions({options.d_model()}).eps(options.layer_norm_eps());
  if (options.bias()) return torch::nn::LayerNorm(norm_options);
  return torch::nn::LayerNorm(std::static_pointer_cast<torch::nn::LayerNormImpl>(
      std::make_shared<LayerNormWithoutBiasImpl>(norm_options)));
}

torch::nn::Dropout make_dropout(const TransformerLayerOptions& options) {
  return torch::nn::Dropout(torch::nn::DropoutOptions(options.dropout()));
}

/// The module holds the probability and the mode; the op keeps no mask.
Tensor drop(const torch::nn::Dropout& module, const Tensor& x) {
  return module->is_training() ? remnant::dropout(x, module->options.p()) : x;
}

Tensor activate(const Tensor& x, Activation activation) {
  return activation == Activation::gelu ? at::gelu(x) : at::relu(x);
}

void check_options(const TransformerLayerOptions& options, const char* name) {
  TORCH_CHECK(options.dim_feedforward() > 0, name, ": dim_feedforward should be positive, got ",
              options.dim_feedforward());
}

void check_last_dim(const Tensor& x, const char* name, const char* argument,
                    const TransformerLayerOptions& options) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == options.d_model(), name, ": ", argument,
              "'s last dimension should be d_model = ", options.d_model(), ", got shape ", x.sizes());
}

constexpr const char* kEncoderName = "remnant::nn::TransformerEncoderLayer";
constexpr const char* kDecoderName = "remnant::nn::TransformerDecoderLayer";

/// x + block(x), normalised before the block (pre-norm) or after the sum (post-norm).
template <typename Block>
Tensor residual(const Tensor& x, torch::nn::LayerNorm& norm, bool norm_first, const Block& block) {
  return norm_first ? x + block(norm(x)) : norm(x + block(x));
}

/// The encoder layer with its attention given as a function of its input.
template <typename SelfAttention>
Tensor encode(TransformerEncoderLayerImpl& layer, const Tensor& src, const SelfAttention& self_attention) {
  const bool norm_first = layer.options.norm_first();
  const Tensor x = residual(src, layer.norm1, norm_first,
                            [&](const Tensor& y) { return drop(layer.dropout1, self_attention(y)); });
  return residual(x, layer.norm2, norm_first, [&](const Tensor& y) {
    const Tensor hidden = activate(layer.linear1(y), layer.options.activation());
    return drop(layer.dropout2, layer.linear2(drop(layer.dropout, hidden)));
  });
}

/// The decoder layer with its two attentions given as functions of their input.
template <typename SelfAttention, typename CrossAttention>
Tensor decode(TransformerDecoderLayerImpl& layer, const Tensor& tgt, const SelfAttention& self_attention,
              const CrossAttention& cross_attention) {
  const bool norm_first = layer.options.norm_first();
  Tensor x = residual(tgt, layer.norm1, norm_first,
                      [&](const Tensor& y) { return drop(layer.dropout1, self_attention(y)); });
  x = residual(x, layer.norm2, norm_first,
               [&](const Tensor& y) { return drop(layer.dropout2, cross_attention(y)); });
  return residual(x, layer.norm3, norm_first, [&](const Tensor& y) {
    const Tensor hidden = activate(layer.linear1(y), layer.options.activation());
    return drop(layer.dropout3, layer.linear2(drop(layer.dropout, hidden)));
  });
}

}  // namespace

TransformerEncoderLayerImpl::TransformerEncoderLayerImpl(const TransformerLayerOptions& options_in)
    : options(options_in) {
  check_options(options, kEncoderName);
  TransformerEncoderLayerImpl::reset();
}

void TransformerEncoderLayerImpl::reset() {
  const int64_t d_model = options.d_model(), width = options.dim_feedforward();
  self_attn = register_module("self_attn", make_attention(options));
  linear1 = register_module("linear1", make_linear(d_model, width, options.bias()));
  dropout = register_module("dropout", make_dropout(options));
  linear2 = register_module("linear2", make_linear(width, d_model, options.bias()));
  norm1 = register_module("norm1", make_norm(options));
  norm2 = register_module("norm2", make_norm(options));
  dropout1 = register_module("dropout1", make_dropout(options));
  dropout2 = register_module("dropout2", make_dropout(options));
}

Tensor TransformerEncoderLayerImpl::forward(const Tensor& src, const Tensor& src_mask,
                                            const Tensor& src_key_padding_mask, bool is_causal) {
  const memory::LayerScope scope(this);
  check_last_dim(src, kEncoderName, "src", options);
  return encode(*this, src, [&](const Tensor& x) {
    return std::get<0>(self_attn(x, x, x, src_key_padding_mask, false, src_mask, true, is_causal));
  });
}

Tensor TransformerEncoderLayerImpl::forward_cached(const Tensor& src, KeyValueCache& cache) {
  const memory::LayerScope scope(this);
  check_last_dim(src, kEncoderName, "src", options);
  return encode(*this, src, [&](const Tensor& x) { return self_attn->forward_self_cached(x, cache); });
}

TransformerDecoderLayerImpl::TransformerDecoderLayerImpl(const TransformerLayerOptions& options_in)
    : options(options_in) {
  check_options(options, kDecoderName);
  TransformerDecoderLayerImpl::reset();
}

void TransformerDecoderLayerImpl::reset() {
  const int64_t d_model = options.d_model(), width = options.dim_feedforward();
  self_attn = register_module("self_attn", make_attention(options));
  multihead_attn = register_module("multihead_attn", make_attention(options));
  linear1 = register_module("linear1", make_linear(d_model, width, options.bias()));
  dropout = register_module("dropout", make_dropout(options));
  linear2 = register_module("linear2", make_linear(width, d_model, options.bias()));
  norm1 = register_module("norm1", make_norm(options));
  norm2 = register_module("norm2", make_norm(options));
  norm3 = register_module("norm3", make_norm(options));
  dropout1 = register_module("dropout1", make_dropout(options));
  dropout2 = register_module("dropout2", make_dropout(options));
  dropout3 = register_module("dropout3", make_dropout(options));
}

Tensor TransformerDecoderLayerImpl::forward(const Tensor& tgt, const Tensor& memory, const Tensor& tgt_mask,
                                            const Tensor& memory_mask, const Tensor& tgt_key_padding_mask,
                                            const Tensor& memory_key_padding_mask, bool tgt_is_causal,
                                            bool memory_is_causal) {
  const remnant::memory::LayerScope scope(this);
  check_last_dim(tgt, kDecoderName, "tgt", options);
  check_last_dim(memory, kDecoderName, "memory", options);
  return decode(
      *this, tgt,
      [&](const Tensor& x) {
        return std::get<0>(self_attn(x, x, x, tgt_key_padding_mask, false, tgt_mask, true, tgt_is_causal));
      },
      [&](const Tensor& x) {
        return std::get<0>(multihead_attn(x, memory, memory, memory_key_padding_mask, false, memory_mask,
                                          true, memory_is_causal));
      });
}

Tensor TransformerDecoderLayerImpl::forward_cached(const Tensor& tgt, const Tensor& memory,
                                                   const Tensor& memory_key_padding_mask,
                                                   DecoderCache& cache) {
  const remnant::memory::LayerScope scope(this);
  check_last_dim(tgt, kDecoderName, "tgt", options);
  return decode(
      *this, tgt, [&](const Tensor& x) { return self_attn->forward_self_cached(x, cache.self); },
      [&](const Tensor& x) {
        return multihead_attn->forward_cross_cached(x, memory, memory_key_padding_mask, cache.cross);
      });
}

}  // namespace remnant::nn
